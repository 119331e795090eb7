"""Reads GGUF files (llama.cpp's format, versions 2 and 3): metadata, and tensors one at a time, dequantised.

The header is parsed here rather than by `gguf.GGUFReader`, which takes slices of the file without looking whether it is
long enough, and makes an array object of every token of the vocabulary. The arithmetic of the quantised types is the
package's own.
"""

import functools
import itertools
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpm_jax.checkpoints.sources import SourceError
from cpm_jax.common.config import ConfigError
from cpm_jax.common.extras import how_to_install

try:
    import gguf
except ImportError as _error:
    raise ConfigError(f"reading GGUF files needs {_error.name}: {how_to_install('gguf')}") from _error

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32 = 6
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # bytes of an entry of the table of tensors: name, rank, type, offset
_MAX_RANK = 4
_VALUES_AT_A_TIME = 1 << 20  # values that are dequantised together


class GgufError(SourceError):
    """A GGUF file that cannot be read, or whose content does not fit together."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        kind: how its values are stored.
        shape: in numpy's order, the contiguous axis last.
        start: first byte in the file.
        num_bytes: length in the file.
    """

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class _Cursor:
    """Reads little-endian values one after another, and says what was being read where the file ends early."""

    def __init__(self, data: mmap.mmap, path: Path):
        self._data = data
        self._path = path
        self.position = 0

    def take(self, num_bytes: int, what: str) -> bytes:
        end = self.position + num_bytes
        if end > len(self._data):
            raise GgufError(
                f"{self._path} is cut short or damaged: {what} takes bytes {self.position:,} to {end:,}, and the file "
                f"has {len(self._data):,}"
            )
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str) -> str:
        text = self.take(self.scalar("Q", f"the length of {what}"), what)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise GgufError(f"{self._path} is damaged: {what} is not UTF-8 ({error.reason})") from error

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _FLOAT32:
            # The shortest decimal that rounds to it is what somebody wrote: 1e-5, not 9.999999747378752e-06.
            return float(str(np.float32(self.scalar("f", what))))
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind != _ARRAY:
            raise GgufError(f"{self._path} is damaged: {what} has type {kind}; GGUF has types 0 to 12")
        kind = self.scalar("I", f"the type of {what}")
        count = self.scalar("Q", f"the length of {what}")
        if kind == _STRING:
            return [self.string(f"item {index} of {what}") for index in range(count)]
        if kind not in _SCALARS:
            raise GgufError(f"{self._path}: {what} is an array of type {kind}; only scalars and strings are known")
        return np.frombuffer(self.take(count * struct.calcsize(_SCALARS[kind]), what), f"<{_SCALARS[kind]}").tolist()


class GgufFile:
    """The metadata of a GGUF file and the table of its tensors; the values stay on disk.

    Attributes:
        path: the file.
        metadata: values by key, arrays as lists.
        tensors: by name, in the order of the file.
    """

    def __init__(self, path: str | Path):
        """Reads the header and checks that every tensor it lists is there.

        Raises:
            GgufError: it is not a GGUF file, is cut short, or has a version or a type of tensor that is not known.
        """
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                if (magic := file.read(4)) != _MAGIC:
                    raise GgufError(f"{self.path} is not a GGUF file: it begins with {magic!r}, not {_MAGIC!r}")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._parse(_Cursor(data, self.path), len(data))
        except OSError as error:
            raise GgufError(f"{self.path}: {error.strerror or error}") from error

    def _parse(self, cursor: _Cursor, size: int) -> None:
        cursor.take(len(_MAGIC), "the magic number")
        version = cursor.scalar("I", "the version")
        if version not in _VERSIONS:
            swapped = ", as big-endian files do" if version and version % 65536 == 0 else ""
            raise GgufError(
                f"{self.path} says GGUF version {version}{swapped}; versions 2 and 3, little-endian, are read"
            )
        num_tensors, num_values = (
            cursor.scalar("Q", "the number of tensors"),
            cursor.scalar("Q", "the number of values"),
        )
        self.metadata: dict[str, Any] = {}
        for index in range(num_values):
            key = cursor.string(f"the name of metadata value {index} of {num_values}")
            if key in self.metadata:
                raise GgufError(f"{self.path} is damaged: metadata {key!r} stands there twice")
            self.metadata[key] = cursor.value(cursor.scalar("I", f"the type of {key}"), f"metadata {key!r}")
        if num_tensors * _SMALLEST_TENSOR > size - cursor.position:
            cursor.take(num_tensors * _SMALLEST_TENSOR, f"the table of {num_tensors:,} tensors")
        entries = [self._entry(cursor, f"entry {index} of {num_tensors}") for index in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise GgufError(f"{self.path}: general.alignment = {alignment!r} must be a positive integer, such as 32")
        start = math.ceil(cursor.position / alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in entries:
            if name in self.tensors:
                raise GgufError(f"{self.path} is damaged: tensor {name!r} stands there twice")
            if offset % alignment:
                raise GgufError(
                    f"{self.path} is damaged: tensor {name!r} begins {offset:,} bytes into the data, which is no "
                    f"multiple of the alignment {alignment}"
                )
            tensor = GgufTensor(kind, shape, start + offset, _num_bytes(kind, shape))
            if (end := tensor.start + tensor.num_bytes) > size:
                raise GgufError(
                    f"{self.path} is cut short: tensor {name!r} ({kind.name}, shape {shape}) ends at byte {end:,}, and "
                    f"the file has {size:,}"
                )
            self.tensors[name] = tensor
        ordered = sorted(self.tensors.items(), key=lambda item: item[1].start)
        for (before, tensor), (after, following) in itertools.pairwise(ordered):
            if tensor.start + tensor.num_bytes > following.start:
                raise GgufError(f"{self.path} is damaged: tensors {before!r} and {after!r} overlap")

    def _entry(self, cursor: _Cursor, what: str) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int]:
        name = cursor.string(f"the name of {what} in the table of tensors")
        what = f"tensor {name!r}"
        if not 1 <= (rank := cursor.scalar("I", f"the rank of {what}")) <= _MAX_RANK:
            raise GgufError(f"{self.path} is damaged: {what} has {rank} axes; GGUF tensors have 1 to {_MAX_RANK}")
        shape = tuple(cursor.scalar("Q", f"the shape of {what}") for _ in range(rank))[::-1]
        if not all(shape):
            raise GgufError(f"{self.path} is damaged: {what} has shape {shape}, an axis of no length")
        number, known = cursor.scalar("I", f"the type of {what}"), _known_kinds()
        if number not in known:
            raise GgufError(
                f"{self.path}: {what} is stored as type {number}, which the installed gguf package does not "
                f"dequantise; it does {', '.join(sorted(kind.name for kind in known.values()))}"
            )
        kind, block = known[number], gguf.GGML_QUANT_SIZES[known[number]][0]
        if shape[-1] % block:
            raise GgufError(
                f"{self.path}: {what} is stored as {kind.name} and has rows of {shape[-1]} values; must be a multiple "
                f"of {block}"
            )
        return name, kind, shape, cursor.scalar("Q", f"the offset of {what}")

    def read(self, name: str, rows: range | None = None) -> np.ndarray:
        """The values of one tensor, float32, in numpy's order of axes.

        Args:
            name: which.
            rows: the rows to read of a matrix; None reads any tensor whole.

        Raises:
            GgufError: the file has become shorter.
        """
        tensor = self.tensors[name]
        wanted = range(math.prod(tensor.shape[:-1])) if rows is None else rows
        values = np.empty((len(wanted), tensor.shape[-1]), np.float32)
        bytes_per_row = _num_bytes(tensor.kind, tensor.shape[-1:])
        with open(self.path, "rb") as file:
            file.seek(tensor.start + wanted.start * bytes_per_row)
            for part in _in_parts(values, max(1, _VALUES_AT_A_TIME // tensor.shape[-1])):
                raw = np.fromfile(file, np.uint8, len(part) * bytes_per_row)
                if len(raw) != len(part) * bytes_per_row:
                    raise GgufError(f"{self.path} ends within tensor {name!r}: it has changed since it was opened")
                part[:] = dequantise(raw.reshape(len(part), bytes_per_row), tensor.kind)
        return values.reshape(tensor.shape) if rows is None else values


def _in_parts(values: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    return (values[first : first + rows] for first in range(0, len(values), rows))


def _num_bytes(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def dequantise(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The values of rows of bytes as the file has them, uint8 [rows, bytes]."""
    if kind in _PLAIN:
        return rows.view(_PLAIN[kind])
    return gguf.dequantize(rows, kind)


_PLAIN: dict[gguf.GGMLQuantizationType, np.dtype[Any]] = {
    gguf.GGMLQuantizationType.F32: np.dtype("<f4"),
    gguf.GGMLQuantizationType.F16: np.dtype("<f2"),
}


@functools.cache
def _known_kinds() -> dict[int, gguf.GGMLQuantizationType]:
    """The types that the package dequantises: asked of itself, so that what a later version learns is read too."""
    known = {}
    for kind in gguf.GGMLQuantizationType:
        try:
            dequantise(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        known[kind.value] = kind
    return known
