"""Folders of GPTQ and Marlin weights, read as the fake-quantised model that they stand for."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from cpm_jax.checkpoints.hf_config import read_config
from cpm_jax.checkpoints.hf_layouts import flatten
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import CONFIG_FILE, Index, SourceError
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.quantization.layer import LINEARS
from cpm_jax.quantization.pipeline import QuantizedModel
from export import gptq, marlin
from export.folders import ExportError, on_host

_BESIDE = ("scales", "qzeros", "g_idx")  # of a linear layer, beside its qweight


def is_packed(path: Path) -> bool:
    """Whether a folder holds quantised weights."""
    try:
        return bool(json.loads((path / CONFIG_FILE).read_text("utf-8"))["quantization_config"])
    except (OSError, ValueError, LookupError, TypeError):  # another export; a damaged one is named where it is read
        return False


def is_marlin(path: Path) -> bool:
    """Whether they are packed for CPM.cu."""
    return (path / marlin.WEIGHTS_FILE).is_file()


class _Place(NamedTuple):
    """Where a tensor's values lie: in which stored tensor, in which rows of it (None: it is not packed)."""

    stored: str
    rows: slice | None
    shape: tuple[int, ...]


class PackedSource:
    """The weights of a folder as a `TensorSource`: float32, one tensor at a time, fused layers taken apart.

    Attributes:
        folder: where it is.
        config: the content of config.json, without what it says of the packing.
        generation_config: empty.
    """

    def __init__(self, folder: Path):
        """Reads config.json and the names of all tensors.

        Raises:
            SourceError: a file cannot be read.
        """
        self.folder = folder
        self.generation_config: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        self._places: dict[str, _Place] = {}
        try:
            self.config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
            self._bits = self.config.pop("quantization_config")["bits"]
            if self._bits not in gptq.PACKED_BITS:
                raise SourceError(f"{folder / CONFIG_FILE}: bits = {self._bits!r}: accepted are {gptq.PACKED_BITS}")
            self._outputs = {name: shape[1] for name, shape in gptq.kernel_shapes(read_config(self.config)).items()}
            for file in sorted(folder.glob("*.safetensors")):
                with safetensors.safe_open(file, "numpy") as weights:
                    self._files |= dict.fromkeys(weights.keys(), file)
                    for name in weights.keys():  # noqa: SIM118 (no mapping)
                        self._place(name, tuple(weights.get_slice(name).get_shape()))
        except (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
            raise SourceError(f"{folder} cannot be read as quantised weights: {error}") from error

    def _place(self, stored: str, shape: tuple[int, ...]) -> None:
        """Notes which tensors of the model a stored one holds."""
        layer, _, part = stored.rpartition(".")
        if part in _BESIDE:
            return
        if part != "qweight":
            self._places[stored] = _Place(stored, None, shape)
        elif not is_marlin(self.folder):
            inputs = shape[0] * gptq.WORD // self._bits
            self._places[f"{layer}.weight"] = _Place(stored, slice(None), (shape[1], inputs))
        else:
            room, start = layer[: layer.index(".", len("model.layers.")) + 1], 0
            for name in marlin.FUSED[layer.removeprefix(room)]:
                rows = slice(start, start + self._outputs[name])
                place = _Place(stored, rows, (self._outputs[name], shape[0] * marlin.TILE))
                self._places[f"{room}{name.replace('/', '.')}.weight"] = place
                start = rows.stop

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._places[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The type that `read` gives."""
        return np.dtype(np.float32)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A tensor, or a part of it; a packed one as what its codes stand for.

        Raises:
            SourceError: the file cannot be read.
        """
        stored, rows, _ = self._places[name]
        if rows is None:
            values = self._tensor(stored).astype(np.float32)
        else:
            layer = stored.removesuffix("qweight")
            parts = {part: self._tensor(layer + part) for part in ("qweight", *_BESIDE) if layer + part in self._files}
            try:
                if is_marlin(self.folder):
                    values = marlin.unpack_linear(parts)[rows]
                else:
                    values = gptq.unpack_linear(parts, self._bits)[rows]
            except (ValueError, LookupError, ArithmeticError) as error:
                raise SourceError(f"{self.folder}: the tensors of {layer[:-1]} do not fit together: {error}") from error
        return values[index] if index else values

    def _tensor(self, stored: str) -> np.ndarray:
        try:
            with safetensors.safe_open(self._files[stored], "numpy") as weights:
                return weights.get_tensor(stored)
        except (OSError, safetensors.SafetensorError) as error:
            raise SourceError(f"{self._files[stored]} cannot be read: {error}") from error

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the folder; None without a tokenizer.json."""
        return Tokenizer.load(self.folder) if (self.folder / "tokenizer.json").is_file() else None


def tensor_types(folder: Path) -> dict[str, int]:
    """The number of stored tensors of each type, by safetensors' names."""
    count: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "numpy") as weights:
            count.update(weights.get_slice(name).get_dtype() for name in weights.keys())  # noqa: SIM118 (no mapping)
    return dict(count)


def check_read_back(folder: Path, quantized: QuantizedModel) -> int:
    """Reads every value of a folder back: those of quantised layers must be the fake-quantised ones, bit for bit.

    Args:
        folder: written by `export_gptq` or `export_marlin`.
        quantized: what it was made of.

    Returns:
        The number of values compared.

    Raises:
        ExportError: a value differs.
    """
    _, params = import_params(PackedSource(folder))
    ours, exact = flatten(quantized.params), {f"layers/{name}/kernel" for name in LINEARS}
    found = flatten(params)
    for path, values in found.items():
        expected, stored = on_host(ours[path], None), np.asarray(values)
        # Parameters that are kept in bfloat16 are those of the codes, rounded once more.
        same = stored.astype(expected.dtype) if path in exact else stored.astype(gptq.DTYPE)
        if not np.array_equal(same, expected if path in exact else expected.astype(gptq.DTYPE)):
            raise ExportError(f"{folder}: {path} reads back with other values than it had")
    return sum(values.size for values in found.values())
