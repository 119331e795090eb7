"""What a dataset folder holds: the manifest that `prepare` writes and everything else reads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from cpm_jax.common.files import sha256, write_json
from cpm_jax.data.errors import DataError

VERSION = 1
FILE_NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file.

    Attributes:
        path: relative to the dataset folder.
        sha256: of the file, in hex.
        file_bytes: its size.
        records: number of packed records.
        tokens: number of tokens, each counted once though the last of a record opens the next one.
        documents: number of documents.
        text_bytes: size of the documents' text in UTF-8.
    """

    path: str
    sha256: str
    file_bytes: int
    records: int
    tokens: int
    documents: int
    text_bytes: int


@dataclasses.dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    shards: tuple[Shard, ...]

    @property
    def records(self) -> int:
        """Number of packed records."""
        return sum(shard.records for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """Size of the text in UTF-8 bytes."""
        return sum(shard.text_bytes for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A dataset folder in numbers.

    Attributes:
        seq_len: tokens per row of a batch; a record holds at most one more.
        format: "text" or "chat".
        tokenizer_sha256: of `tokenizer/tokenizer.json`.
        vocab_size: number of tokens the tokenizer knows.
        splits: "train" and "validation" (absent when it was not asked for).
        rejects: number of rejects by reason; they are listed in `rejects.jsonl`.
        duplicates: number of documents dropped because their text had been seen before.
        truncated: number of conversations cut to the length of a record.
        sources: what was read: the source strings with their numbers of documents.
        arguments: the arguments of `prepare`, without those that do not change the result.
        complete: whether the sources were read to their end; False where `max_bytes` ended the reading.
        version: of this format.
    """

    seq_len: int
    format: str
    tokenizer_sha256: str
    vocab_size: int
    splits: dict[str, Split]
    rejects: dict[str, int]
    duplicates: int
    truncated: int
    sources: dict[str, int]
    arguments: dict[str, Any]
    complete: bool = True
    version: int = VERSION

    def save(self, folder: str | Path) -> None:
        """Writes `manifest.json` atomically."""
        totals = ("records", "tokens", "documents", "text_bytes")
        content = dataclasses.asdict(self)
        for name, split in self.splits.items():
            content["splits"][name] = {total: getattr(split, total) for total in totals} | content["splits"][name]
        write_json(Path(folder) / FILE_NAME, content)

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Reads `manifest.json` and checks that the shards it lists are there in full size.

        Raises:
            DataError: there is no manifest, it is of another version, or a shard is missing or cut off.
        """
        folder = Path(folder)
        path = folder / FILE_NAME
        if not path.is_file():
            raise DataError(f"{folder} is not a prepared dataset: it has no {FILE_NAME}; run `prepare` into it first")
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["version"] != VERSION:
                raise DataError(f"{path} is of version {content['version']}; this program reads version {VERSION}")
            content["splits"] = {
                name: Split(tuple(Shard(**shard) for shard in split["shards"]))
                for name, split in content["splits"].items()
            }
            manifest = cls(**content)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error!r}); delete it and run `prepare` again") from error
        for split in manifest.splits.values():
            for shard in split.shards:
                shard_path = folder / shard.path
                if not shard_path.is_file():
                    raise DataError(f"shard {shard_path} is missing; delete {path} and run `prepare` again")
                if (size := shard_path.stat().st_size) != shard.file_bytes:
                    raise DataError(
                        f"shard {shard_path} has {size} bytes where the manifest says {shard.file_bytes}: "
                        f"it is damaged; delete it and {path} and run `prepare` again"
                    )
        return manifest

    def shard_paths(self, folder: str | Path, split: str) -> list[str]:
        """The paths of the shards of a split, in order.

        Raises:
            DataError: the dataset has no such split.
        """
        if split not in self.splits:
            raise DataError(f"{folder} has no split {split!r}; it has {sorted(self.splits)}")
        return [str(Path(folder) / shard.path) for shard in self.splits[split].shards]

    def verify(self, folder: str | Path) -> None:
        """Compares the content of every shard with its hash.

        Raises:
            DataError: the content of a shard has changed.
        """
        for split in self.splits.values():
            for shard in split.shards:
                if (found := sha256(Path(folder) / shard.path)) != shard.sha256:
                    raise DataError(f"shard {Path(folder) / shard.path}: sha256 {found} is not {shard.sha256}")
