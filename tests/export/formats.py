"""Every format that a model in memory can be exported to, by the name of its row in the tests of all of them."""

from collections.abc import Callable
from pathlib import Path

from cpm_jax.checkpoints.weights import Weights
from cpm_jax.quantization.pipeline import quantize_model
from experiments import export, quantize
from experiments.export import ExportConfig
from experiments.quantize import QuantizeConfig
from tests.export.quantized_models import ROUNDED

# Writes an export of weights into a workdir, and returns its folder.
Writer = Callable[[Weights, Path], Path]


def _verb(dtype: str = "float32", **settings: str) -> Writer:
    config = ExportConfig(**settings)

    def write_export(weights: Weights, workdir: Path) -> Path:
        folder = workdir / export.folder_name(config, dtype)
        export.write(config, weights, dtype, folder)
        return folder

    return write_export


def _packed(name: str) -> Writer:
    config = QuantizeConfig(source="here", pack=name, quantization=ROUNDED)

    def write_packed(weights: Weights, workdir: Path) -> Path:
        quantize.check_packing(config, weights)
        quantize.pack(config, weights, quantize_model(weights.params, weights.model, ROUNDED), workdir)
        return workdir / name

    return write_packed


FORMATS: dict[str, Writer] = {
    **{name: _verb(format=name) for name in ("hf", "llama", "qwen2", "granite", "minicpm", "internlm2", "mimo")},
    **{f"gguf {kind}": _verb(kind, format="gguf") for kind in ("F16", "Q4_0")},
    "stablehlo": _verb(format="stablehlo"),
    **{name: _packed(name) for name in ("gptq", "marlin")},
}
