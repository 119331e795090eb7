"""What an export is, in `manifest.json` beside its files: its source, its files' hashes, the checks it passed."""

import datetime
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpm_jax.common import provenance
from cpm_jax.common.config import ConfigError, config_dataclass, config_from_dict, config_to_dict
from cpm_jax.common.files import sha256, write_json
from export.folders import MANIFEST_FILE, ExportError

VERSION = 1
TOOLS = ("flatbuffers", "gguf", "safetensors", "tokenizers", "torch", "transformers")


@config_dataclass
class FileEntry:
    """A file of an export.

    Attributes:
        bytes: its size.
        sha256: of its content.
    """

    bytes: int
    sha256: str


@config_dataclass
class Check:
    """A check that an export has passed.

    Attributes:
        name: which.
        figures: what it measured: errors, numbers of values or positions compared.
    """

    name: str
    figures: dict[str, float | int | str]


@config_dataclass
class RecordedText:
    """A text and what the exported model said of it, in our decoder; `verify` compares with it.

    Attributes:
        name: of the text.
        text: the text.
        token_ids: its tokens, as far as they were used.
        greedy: the tokens by which the model goes on, the most probable one each time.
        top_tokens: the most probable tokens after the text.
        top_logits: their logits.
    """

    name: str
    text: str
    token_ids: tuple[int, ...]
    greedy: tuple[int, ...]
    top_tokens: tuple[int, ...]
    top_logits: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.token_ids or not 0 < len(self.top_tokens) == len(self.top_logits):
            raise ConfigError(
                f"RecordedText.top_tokens: the text {self.name!r} has {len(self.token_ids)} tokens, "
                f"{len(self.top_tokens)} after it and {len(self.top_logits)} logits of these; must have some of each",
                field="RecordedText.top_tokens",
            )
        if min(*self.token_ids, *self.greedy, *self.top_tokens, 0) < 0:
            raise ConfigError(
                f"RecordedText.token_ids: the text {self.name!r} has tokens below 0; must be ids",
                field="RecordedText.token_ids",
            )


@config_dataclass
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        format: "hf", "gguf", "stablehlo", "onnx", "openvino", "executorch", "gptq" or "marlin".
        architecture: what the runtime is to load it as.
        types: number of tensors of each stored type.
        parameters: number of values in them.
        source: name, kind, step, tokens and commit of the checkpoint; `config_sha256` of its configuration (our fields,
            as JSON with sorted keys) and `tokenizer_sha256`.
        left_out: what is not as in the source, in sentences.
        checks: those that were passed.
        not_checked: checks that were not made, with the reason.
        texts: what the model said when it was exported; empty where checks were turned off.
        files: every file of the export but the manifest.
        tools: versions of the packages that wrote and checked it.
        commit: of the code that wrote it; "" where it is unknown.
        date: when, UTC.
        version: of this format.
    """

    format: str
    architecture: str
    types: dict[str, int]
    parameters: int
    source: dict[str, str | int]
    left_out: tuple[str, ...]
    checks: tuple[Check, ...]
    not_checked: dict[str, str]
    texts: tuple[RecordedText, ...]
    files: dict[str, FileEntry]
    tools: dict[str, str]
    commit: str
    date: str
    version: int = VERSION


def tool_versions() -> dict[str, str]:
    """Versions of the packages that decide what an export is and how it is read; those not installed are left out."""
    found = provenance.versions()
    for name in TOOLS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Size and hash of every file in a folder, by its path in it; the manifest itself is left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: FileEntry(path.stat().st_size, sha256(path)) for name, path in names.items() if name != MANIFEST_FILE}


def write_manifest(folder: Path, *, tools: Mapping[str, str] | None = None, **fields: Any) -> Manifest:
    """Describes the files of a finished export, and writes its `manifest.json`.

    Args:
        folder: the export.
        tools: versions of packages that other processes wrote or checked it with.
        fields: of `Manifest`, without files, tools, commit and date.
    """
    manifest = Manifest(
        **fields,
        files=describe_files(folder),
        tools=tool_versions() | dict(tools or {}),
        commit=provenance.git_revision(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    write_json(folder / MANIFEST_FILE, config_to_dict(manifest))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Reads the `manifest.json` of an export.

    Raises:
        ExportError: there is none, or it is damaged or of another version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ExportError(f"{folder} has no {MANIFEST_FILE}: it was not written by the verb export")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is damaged: it is not JSON ({error})") from error
    version = content.get("version") if isinstance(content, Mapping) else None
    if version != VERSION:
        raise ExportError(f"{path} is of version {version!r}; this program reads version {VERSION}")
    try:
        return config_from_dict(Manifest, content)
    except ConfigError as error:
        raise ExportError(f"{path} is damaged: {error}") from error


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares every file of an export with its size and hash.

    Raises:
        ExportError: a file is missing, is of another size or content, or is not in the manifest; names all of them.
    """
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST_FILE}
    problems = [f"{name} is missing" for name in sorted(manifest.files.keys() - there)]
    problems += [f"{name} is not in the manifest" for name in sorted(there - manifest.files.keys())]
    for name in sorted(there & manifest.files.keys()):
        entry, path = manifest.files[name], folder / name
        if (size := path.stat().st_size) != entry.bytes:
            problems.append(f"{name} has {size:,} bytes where the manifest says {entry.bytes:,}")
        elif (found := sha256(path)) != entry.sha256:
            problems.append(f"{name} has changed: sha256 {found[:12]}… is not {entry.sha256[:12]}…")
    if problems:
        raise ExportError(f"{folder} is not as it was exported: {'; '.join(problems)}")
