"""Where weights come from outside: a Hugging Face folder, or whatever else shows itself as one.

Every source has the names and shapes of Hugging Face's tensors and a config.json, so that what they mean is written
once, in `hf_layouts.py` and `hf_config.py`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import safetensors

from cpm_jax.common.config import InputError
from cpm_jax.data.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# A part of a tensor: one slice for each dimension. The empty index is the whole tensor.
Index = tuple[slice, ...]

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class SourceError(InputError):
    """Weights that cannot be read, or that our decoder cannot hold or compute; says what was found and expected."""


class TensorSource(Protocol):
    """Weights under Hugging Face's names, read one tensor at a time."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json; empty where there is none."""

    def names(self) -> Iterable[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def dtype(self, name: str) -> np.dtype:
        """Type that `read` gives."""

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A tensor, or a part of it, on the host.

        Args:
            name: one of `names()`.
            index: which part: a slice for each dimension; the empty index is the whole.

        Raises:
            SourceError: the file cannot be read.
        """

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that comes with the weights; None where there is none."""


def open_source(path: str | Path) -> TensorSource:
    """Opens a folder with config.json and safetensors, or a .gguf file.

    Raises:
        SourceError: there is nothing of the kind, a file is missing, cut short or contradicts another.
        ConfigError: it is a .gguf file, and the gguf package is not installed.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from cpm_jax.checkpoints.gguf import GgufSource  # needs the extra `gguf`

        return GgufSource(path)
    if path.is_dir() and (path / CONFIG_FILE).is_file():
        return HfSource(path)
    if path.is_dir():
        raise SourceError(f"{path} is no Hugging Face folder: it has no {CONFIG_FILE}")
    wrong = "neither of these" if path.is_file() else "no such folder"
    raise SourceError(f"{path}: {wrong}; give a Hugging Face folder ({CONFIG_FILE} and *.safetensors) or a .gguf file")


class HfSource:
    """A Hugging Face folder: config.json, and safetensors in one file or in shards with an index.

    Attributes:
        folder: where it is.
        config: the content of config.json.
        generation_config: the content of generation_config.json; empty where there is none.
    """

    def __init__(self, folder: str | Path):
        """Reads config.json, the index and the header of every file, so that what is missing shows before work begins.

        Raises:
            SourceError: a file is missing, is cut short, or is not what the index says.
        """
        self.folder = Path(folder)
        self.config = _read_json(self.folder / CONFIG_FILE)
        generation_config = self.folder / GENERATION_CONFIG_FILE
        self.generation_config = _read_json(generation_config) if generation_config.is_file() else {}
        self._headers: dict[str, tuple[Path, tuple[int, ...], np.dtype]] = {}
        weight_map = self._weight_map()
        for file in sorted(set(weight_map.values())):
            self._read_header(self.folder / file)
        said, found = weight_map.keys(), self._headers.keys()
        if missing := sorted(said - found):
            raise SourceError(
                f"{self.folder / weight_map[missing[0]]} lacks {some_names(missing)}, which {INDEX_FILE} says it has"
            )
        if extra := sorted(found - said):
            where = self._headers[extra[0]][0]
            raise SourceError(f"{where} has {some_names(extra)}, of which {INDEX_FILE} does not know")

    def _weight_map(self) -> dict[str, str]:
        """The file of each tensor, by the index; of a single file, by its header."""
        index = self.folder / INDEX_FILE
        if index.is_file() and not (self.folder / WEIGHTS_FILE).is_file():  # transformers' order, too
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise SourceError(f'{index} must have a "weight_map" from the names of tensors to those of files')
            for file in sorted(set(weight_map.values())):
                if not (self.folder / file).is_file():
                    tensors = sum(1 for other in weight_map.values() if other == file)
                    raise SourceError(
                        f"{self.folder} lacks the shard {file}, in which {index.name} says {tensors} of "
                        f"{len(weight_map)} tensors are: download it again"
                    )
            return weight_map
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if WEIGHTS_FILE in files:
            files = [WEIGHTS_FILE]
        if len(files) != 1:
            found = f"{len(files)} of them without an index" if files else "none"
            raise SourceError(
                f"{self.folder} needs {WEIGHTS_FILE}, or shards named in {INDEX_FILE}; it has {found}. Other "
                "formats of weights (pytorch_model.bin) are not read: save them as safetensors"
            )
        self._read_header(self.folder / files[0])
        return dict.fromkeys(self._headers, files[0])

    def _read_header(self, file: Path) -> None:
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                part = tensors.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise SourceError(
                        f"{file}: {name} is of type {part.get_dtype()}; accepted are {', '.join(_DTYPES)} (quantised "
                        "weights have to be dequantised first)"
                    )
                self._headers[name] = (file, tuple(part.get_shape()), _DTYPES[part.get_dtype()])

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._headers.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._headers[name][1]

    def dtype(self, name: str) -> np.dtype:
        """The type it is stored in."""
        return self._headers[name][2]

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A tensor or a part of it; as it is stored.

        Raises:
            SourceError: the file cannot be read.
        """
        # Opened anew each time: what was mapped of the file is then not held any longer than the tensor.
        with _open(self._headers[name][0]) as tensors:
            return tensors.get_slice(name)[index] if index else tensors.get_tensor(name)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the folder, with its chat template; None without a tokenizer.json.

        Raises:
            DataError: tokenizer.json cannot be read.
        """
        return Tokenizer.load(self.folder) if (self.folder / "tokenizer.json").is_file() else None


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, place: str | Path) -> None:
    """Checks that a tokenizer is of the model's size: no id beyond it, and few rows beyond its ids.

    Published models round their vocabulary up (Qwen2 by 271 rows), so it need not be equal.

    Raises:
        SourceError: it is of another size.
    """
    spare = vocab_size - tokenizer.vocab_size
    if not 0 <= spare <= max(1024, vocab_size // 10):
        raise SourceError(
            f"the tokenizer of {place} has {tokenizer.vocab_size:,} ids and the model's vocab_size is {vocab_size:,}: "
            "accepted are as many, or somewhat fewer where the model rounds up (by at most 1,024 or a tenth)"
        )


def _open(file: Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="np")
    except (OSError, safetensors.SafetensorError) as error:
        size = f"{file.stat().st_size:,} bytes" if file.is_file() else "no such file"
        raise SourceError(
            f"{file} ({size}) cannot be read as safetensors: {error}. If it was cut short, download it again"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise SourceError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return dict(content)


def some_names(names: list[str], limit: int = 5) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
