"""The verb `quantize`: a model with quantised weights, as a checkpoint that other verbs take, and packed for others."""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from cpm_jax.checkpoints.manager import CHECKPOINTS_DIR
from cpm_jax.checkpoints.weights import Weights, load_weights
from cpm_jax.common.config import ConfigError, as_tuple, config_dataclass, config_to_dict
from cpm_jax.data.corpus import clean_text
from cpm_jax.data.sources import Document, read_documents
from cpm_jax.quantization.calibration import calibration_sequences
from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.pipeline import QuantizedModel, quantize_model
from experiments.convert import check_free, write_checkpoint
from experiments.export import tell
from export.folders import check_replaceable
from export.publish import Written, publish_export

SUMMARY_FILE = "quantization.json"


@config_dataclass
class QuantizeConfig:
    """What to quantise, and how.

    Attributes:
        source: a workdir, checkpoints folder or checkpoint of ours, a Hugging Face folder, or a .gguf file.
        data: texts to calibrate on, as `prepare` takes them; not read where nothing depends on them.
        quantization: the method.
        sequences: calibration sequences, drawn evenly from the texts; the paper takes 1,024.
        seq_len: tokens of each.
        batch_size: sequences that run together.
        pack: "gptq" or "marlin" writes a folder of that name too, for vLLM and others or for CPM.cu; "" none.
        tokenizer: a tokenizer.json or its folder; "" is the one of the source.
        text_field: field of the text in records.
    """

    source: str
    data: str | tuple[str, ...] | list[str] = "stdlib"
    quantization: QuantizationConfig = QuantizationConfig()
    sequences: PositiveInt = 128
    seq_len: PositiveInt = 512
    batch_size: PositiveInt = 8
    pack: Literal["", "gptq", "marlin"] = ""
    tokenizer: str = ""
    text_field: str = "text"

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError(
                "QuantizeConfig.source = '': give a checkpoint, a Hugging Face folder or a .gguf file",
                field="QuantizeConfig.source",
            )


def _texts(config: QuantizeConfig) -> Iterator[str]:
    for source in as_tuple(config.data):
        for found in read_documents(source, text_field=config.text_field):
            if isinstance(found, Document):
                yield clean_text(found.text)


def run(config: QuantizeConfig, workdir: Path) -> None:
    """Quantises `config.source` into `workdir`.

    Raises:
        ConfigError: the workdir holds a training, or a setting does not fit the model.
        InputError: source, tokenizer or texts cannot be read, or do not suffice.
    """
    start = time.monotonic()
    check_free(workdir)
    check_target(config, workdir)
    weights = load_weights(Path(config.source), config.tokenizer)
    if config.pack:
        check_packing(config, weights)
    tokens: np.ndarray | None = None
    if config.quantization.calibrates:
        length = min(config.seq_len, weights.model.max_position_embeddings)
        seed = config.quantization.seed
        tokens = calibration_sequences(_texts(config), weights.tokenizer, config.sequences, length, seed)
    quantized = quantize_model(
        weights.params, weights.model, config.quantization, tokens, batch_size=config.batch_size, progress=True
    )
    summary = {"quantization": config_to_dict(quantized.quantization)}
    text = json.dumps(summary | {"errors": quantized.errors, "exponents": quantized.exponents}, indent=2) + "\n"
    # The type that the weights came in does not hold codes times scales.
    imported = {name: value for name, value in weights.imported.items() if name != "dtype"}
    saved = dataclasses.replace(weights, model=quantized.config, params=quantized.params, imported=imported)
    write_checkpoint(saved, workdir, {SUMMARY_FILE: text}, summary)
    if config.pack:  # last, as the checkpoint is what took the time
        pack(config, weights, quantized, workdir)
    worst = {name: max(errors) for name, errors in quantized.errors.items()}
    print(f"{workdir / CHECKPOINTS_DIR / '0'}: {_said(config)}, in {time.monotonic() - start:.1f} s")
    for name, error in worst.items():
        print(f"  {name}: at most {error:.2%} of the squares of its outputs on the calibration data is error")


def _said(config: QuantizeConfig) -> str:
    from export.gptq import describe

    return describe(config.quantization)


def check_target(config: QuantizeConfig, workdir: Path) -> None:
    """Checks that what is written replaces neither the source nor anything but an earlier export.

    Raises:
        ConfigError: it does.
    """
    source, here = Path(config.source).resolve(), workdir.resolve()
    written = {here / name for name in (CHECKPOINTS_DIR, config.pack) if name}
    if source == here or written & {source, *source.parents}:
        raise ConfigError(
            f"QuantizeConfig.source = {config.source!r}: what is written would replace it; give another --workdir",
            field="QuantizeConfig.source",
        )
    if config.pack:
        check_replaceable(workdir / config.pack)


def check_packing(config: QuantizeConfig, weights: Weights) -> None:
    """Checks, before anything is quantised, that the result can be packed.

    Raises:
        ConfigError: it cannot; says what can.
    """
    from export.gptq import DTYPE, check_gptq
    from export.hf import choose_layout, hf_config
    from export.marlin import check_marlin, marlin_layout

    if config.pack == "gptq":
        check_gptq(weights.model, config.quantization)
        layout = ""
    else:
        check_marlin(weights.model, config.quantization)
        layout = marlin_layout(weights.model)
    hf_config(weights.model, weights.tokenizer, DTYPE, choose_layout(layout, weights.model, weights.tokenizer))


def pack(config: QuantizeConfig, weights: Weights, quantized: QuantizedModel, workdir: Path) -> None:
    """Writes the folder of codes, checked against the quantised model, with a manifest that `export` verifies."""
    from export import gptq, marlin
    from export.checks import check_export
    from export.hf import left_out_notes
    from export.packed_source import check_read_back, tensor_types

    write = gptq.export_gptq if config.pack == "gptq" else marlin.export_marlin

    def write_into(folder: Path) -> Written:
        result = write(
            quantized,
            weights.tokenizer,
            folder,
            facts=weights.facts,
            imported_config=weights.imported.get("config"),
            imported_generation_config=weights.imported.get("generation_config"),
        )
        return Written(
            architecture=result.architecture,
            types=tensor_types(folder),
            parameters=result.parameters,
            left_out=left_out_notes(quantized.config, result),
            check=lambda path: check_export(path, weights, lambda: check_read_back(path, quantized)),
        )

    folder = workdir / config.pack
    written, checked = publish_export(folder, config.pack, weights, write_into)
    tell(written, checked)
    print(f"{folder}: {written.architecture}, {written.parameters:,} parameters, {_said(config)}")
