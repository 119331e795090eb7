"""From sources to a dataset folder: clean, split, tokenise, pack, write shards; resumable at any moment."""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from cpm_jax.common.config import ConfigError, check_same_settings, config_dataclass
from cpm_jax.common.files import write_json
from cpm_jax.data.corpus import CleanDocument, Corpus, CorpusPass
from cpm_jax.data.encoding import Encoded, Encoder, LongConversations
from cpm_jax.data.errors import DataError
from cpm_jax.data.manifest import FILE_NAME, Manifest, Split
from cpm_jax.data.packing import BestFitDecreasing, ConcatThenSplit
from cpm_jax.data.shards import Chunk, FinishedShard, ShardWriter, find_finished, group_documents
from cpm_jax.data.sources import Format, Reject, read_documents
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.data.workers import ordered_map

REJECTS_FILE = "rejects.jsonl"
PROGRESS_DIR = "_progress"
_TOKENIZER_BYTES = 1 << 26  # of text to train a tokenizer on


@config_dataclass
class PrepareConfig:
    """What to prepare.

    Attributes:
        sources: what to read: one source string or several (`sources.read_documents` says what they may be).
        seq_len: tokens per row of a batch.
        tokenizer: path of a tokenizer.json or its folder; None to train one on the training split.
        vocab_size: size of the tokenizer to train; if `tokenizer` is given, the most tokens that it may have (what
            the model has room for), None for any number.
        format: "text", or "chat" for conversations.
        text_field: the field or column of the text in jsonl, parquet, ArrayRecord and TFDS.
        extensions: endings of the file names to take from folders, such as (".py", ".md"); all if None.
        tfds_data_dir: where TFDS keeps its data sets; its own default if None.
        validation_fraction: share of the documents to hold out, chosen by the hash of their ids; of a small corpus
            at least one document. 0 for no validation split.
        long_conversations: what to do with a conversation that is longer than a record.
        min_tokens: documents of fewer tokens are rejected, those with which they begin and end included; None rejects
            none.
        max_tokens: documents of more tokens are rejected; None rejects none.
        shard_bytes: text per shard in bytes; also what is done again at most after a kill.
        max_bytes: reading ends before the document that would take the text beyond it; None reads all. The manifest
            says when something was left unread.
        seed: of the choice of held-out documents.
        num_workers: processes that tokenise; None for one per core, 0 for none but this one.
    """

    sources: str | tuple[str, ...] | list[str]
    seq_len: int
    tokenizer: str | None = None
    vocab_size: int | None = None
    format: Format = "text"
    text_field: str = "text"
    extensions: tuple[str, ...] | list[str] | None = None
    tfds_data_dir: str | None = None
    validation_fraction: float = 0.01
    long_conversations: LongConversations = "reject"
    min_tokens: int | None = None
    max_tokens: int | None = None
    shard_bytes: int = 1 << 26
    max_bytes: int | None = None
    seed: int = 0
    num_workers: int | None = None

    def __post_init__(self) -> None:
        """Checks what the types do not say."""
        if not self.source_list:
            raise ConfigError("PrepareConfig.sources = (): at least one source is needed", "PrepareConfig.sources")
        if self.tokenizer is None and self.vocab_size is None:
            raise ConfigError(
                "PrepareConfig.tokenizer = None: give a tokenizer (a path), or vocab_size to train one",
                "PrepareConfig.tokenizer",
            )
        least_of = {"seq_len": 1, "min_tokens": 1, "max_tokens": self.min_tokens or 1, "shard_bytes": 1, "max_bytes": 1}
        for name, least in (least_of | {"num_workers": 0}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"PrepareConfig.{name} = {value}: must be at least {least}", f"PrepareConfig.{name}")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"PrepareConfig.validation_fraction = {self.validation_fraction}: must be in [0, 1)",
                "PrepareConfig.validation_fraction",
            )

    @property
    def source_list(self) -> tuple[str, ...]:
        """The sources, also when only one was given."""
        return (self.sources,) if isinstance(self.sources, str) else tuple(self.sources)

    def arguments(self) -> dict[str, Any]:
        """The arguments that the result depends on, as JSON holds them."""
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del arguments["num_workers"]
        arguments["sources"] = self.source_list
        return json.loads(json.dumps(arguments))


def prepare(config: PrepareConfig, output_dir: str | Path, *, progress: bool = True) -> Manifest:
    """Makes a dataset folder, or goes on with one that an earlier call did not finish, or finds it done.

    The result is the same to the byte for any number of workers and however often it was interrupted.

    Args:
        config: what to prepare.
        output_dir: the folder to write, see docs/prepare.md.
        progress: whether to show a progress bar.

    Returns:
        The manifest that was written, now or by an earlier call.

    Raises:
        DataError: a source does not exist, holds no document or has changed since the interrupted call; the folder
            was made with other arguments; the disk is full.
    """
    output_dir = Path(output_dir)
    arguments = config.arguments()
    if config.tokenizer is not None:
        arguments["tokenizer_sha256"] = Tokenizer.load(config.tokenizer).sha256
    _check_not_inside_source(config, output_dir)
    if (output_dir / FILE_NAME).exists():
        manifest = Manifest.load(output_dir)
        check_same_settings(output_dir, manifest.arguments, arguments, DataError)
        shutil.rmtree(output_dir / PROGRESS_DIR, ignore_errors=True)  # a kill at the very end may have left it
        return manifest
    with full_disk_as_data_error(output_dir):
        work_dir = output_dir / PROGRESS_DIR
        os.makedirs(work_dir, exist_ok=True)
        with only_process(work_dir):
            return _prepare(config, arguments, output_dir, work_dir, progress)


def _prepare(
    config: PrepareConfig, arguments: dict[str, Any], output_dir: Path, work_dir: Path, progress: bool
) -> Manifest:
    arguments_file = work_dir / "arguments.json"
    if arguments_file.exists():
        check_same_settings(output_dir, json.loads(arguments_file.read_text("utf-8")), arguments, DataError)
    corpus = Corpus(
        sources=config.source_list,
        format=config.format,
        text_field=config.text_field,
        extensions=None if config.extensions is None else tuple(config.extensions),
        tfds_data_dir=config.tfds_data_dir,
        seed=config.seed,
        work_dir=work_dir,
        max_bytes=config.max_bytes,
    )
    for source in corpus.sources:
        next(read_documents(source, tfds_data_dir=config.tfds_data_dir), None)  # a missing one is found at once
    threshold = corpus.validation_threshold(config.validation_fraction)
    write_json(arguments_file, arguments)
    tokenizer_dir = output_dir / "tokenizer"
    tokenizer = _make_tokenizer(config, corpus, threshold, tokenizer_dir, progress)
    make_encoder = functools.partial(
        Encoder.load,
        tokenizer_dir,
        config.format,
        config.seq_len,
        config.long_conversations,
        config.min_tokens,
        config.max_tokens,
    )
    make_encoder()  # a tokenizer that does not fit is found before any worker starts

    corpus_pass = corpus.read()
    earlier = find_finished(output_dir, work_dir)
    finished: list[FinishedShard] = []
    num_workers = (os.cpu_count() or 1) if config.num_workers is None else config.num_workers
    with (
        open(work_dir / REJECTS_FILE, "w", encoding="utf-8") as rejects_file,
        _ProgressBar(corpus.total_bytes(), show=progress) as bar,
        contextlib.closing(_OpenShards(config, work_dir)) as open_shards,
    ):
        chunks = group_documents(
            corpus_pass, threshold, config.shard_bytes, functools.partial(_write_reject, rejects_file)
        )
        # Chunks of shards that are there already are read, to see that they are the same, but not tokenised.
        tasks = ((chunk, None if chunk.name in earlier else chunk.texts) for chunk in chunks)
        for chunk, encoded in ordered_map(make_encoder, tasks, num_workers):
            if encoded is not None:
                finished.extend(open_shards.add(chunk, encoded))
            elif chunk.last:
                _check_same_input(chunk, earlier[chunk.name], output_dir)
                finished.append(earlier[chunk.name])
            bar.update(chunk, encoded)
        for shard in finished:
            for reject in shard.rejects:
                _write_reject(rejects_file, reject)
    return _finish(config, arguments, output_dir, work_dir, tokenizer, corpus_pass, finished)


class _OpenShards:
    """The shards that are being written, at most one per split."""

    def __init__(self, config: PrepareConfig, work_dir: Path):
        self._config = config
        self._work_dir = work_dir
        self._writers: dict[str, ShardWriter] = {}

    def add(self, chunk: Chunk, encoded: Encoded) -> list[FinishedShard]:
        if chunk.name not in self._writers:
            packer = BestFitDecreasing if self._config.format == "chat" else ConcatThenSplit
            self._writers[chunk.name] = ShardWriter(chunk, packer(self._config.seq_len), self._work_dir)
        self._writers[chunk.name].add(chunk, encoded)
        return [self._writers.pop(chunk.name).finish(chunk)] if chunk.last else []

    def close(self) -> None:
        for writer in self._writers.values():
            writer.abandon()


def _finish(
    config: PrepareConfig,
    arguments: dict[str, Any],
    output_dir: Path,
    work_dir: Path,
    tokenizer: Tokenizer,
    corpus_pass: CorpusPass,
    finished: list[FinishedShard],
) -> Manifest:
    """Gives the shards their final names and writes the manifest, which makes the data set complete."""
    splits = {}
    for split in ("train", "validation") if config.validation_fraction else ("train",):
        in_split = [item.shard for item in finished if item.split == split]
        if not sum(shard.records for shard in in_split):
            raise DataError(
                f"no document of {', '.join(config.source_list)} is left for the {split} split; "
                f"rejected: {dict(corpus_pass.rejects) or 'none'}; see {work_dir / REJECTS_FILE}"
            )
        shards = []
        for number, shard in enumerate(in_split):
            name = f"{split}-{number:05d}-of-{len(in_split):05d}.array_record"
            os.replace(output_dir / shard.path, output_dir / name)
            shards.append(dataclasses.replace(shard, path=name))
        splits[split] = Split(tuple(shards))
    rejects = corpus_pass.rejects + collections.Counter(reject.reason for shard in finished for reject in shard.rejects)
    manifest = Manifest(
        seq_len=config.seq_len,
        format=config.format,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        splits=splits,
        rejects=dict(sorted(rejects.items())),
        duplicates=corpus_pass.duplicates,
        truncated=sum(shard.truncated for shard in finished),
        sources=dict(corpus_pass.documents),
        arguments=arguments,
        complete=corpus_pass.complete,
    )
    shutil.copyfile(work_dir / REJECTS_FILE, output_dir / REJECTS_FILE)
    manifest.save(work_dir)
    os.replace(work_dir / FILE_NAME, output_dir / FILE_NAME)
    shutil.rmtree(work_dir)
    return manifest


def _make_tokenizer(config: PrepareConfig, corpus: Corpus, threshold: float, folder: Path, show: bool) -> Tokenizer:
    """Loads or trains the tokenizer and puts it into the data set; takes the one that an earlier call put there."""
    if (folder / "tokenizer.json").exists():
        return Tokenizer.load(folder)
    if config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
        if config.vocab_size is not None and tokenizer.vocab_size > config.vocab_size:
            raise DataError(
                f"tokenizer {config.tokenizer!r} has {tokenizer.vocab_size} tokens, more than vocab_size "
                f"{config.vocab_size}: set vocab_size to at least that"
            )
    else:
        assert config.vocab_size is not None
        total = corpus.total_bytes()
        with _bar("tokenizer", None if total is None else min(total, _TOKENIZER_BYTES), show) as bar:
            tokenizer = Tokenizer.train(_training_texts(corpus, threshold, bar), config.vocab_size)
    temporary = corpus.work_dir / "tokenizer"
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    os.replace(temporary, folder)
    return tokenizer


def _training_texts(corpus: Corpus, threshold: float, bar: tqdm) -> Iterator[str]:
    """Training documents from the beginning of every source, an equal share of bytes of each."""
    share = _TOKENIZER_BYTES // len(corpus.sources)
    for source in corpus.sources:
        taken = 0
        for item in dataclasses.replace(corpus, sources=(source,)).read():
            if isinstance(item, CleanDocument) and item.position >= threshold:
                yield item.document.text[: share - taken]
                bar.update(min(item.num_bytes, share - taken))
                taken += item.num_bytes
                if taken >= share:
                    break


def _bar(name: str, total: int | None, show: bool) -> tqdm:
    interval = 0.1 if sys.stderr.isatty() else 30.0  # seconds; a log file is not to be filled with bars
    return tqdm(desc=name, total=total, unit="B", unit_scale=True, disable=not show, mininterval=interval, miniters=1)


def _write_reject(file: IO[str], reject: Reject) -> None:
    line = {"reason": reject.reason, "source": reject.source, "id": reject.id, "detail": reject.detail}
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


class _ProgressBar:
    """Bytes of text done, with tokens and documents per second, and the time left where the total is known."""

    def __init__(self, total: int | None, show: bool):
        self._bar = _bar("prepare", total, show)
        self._begin = time.monotonic()
        self._tokens = self._documents = 0

    def __enter__(self) -> "_ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, chunk: Chunk, encoded: Encoded | None) -> None:
        if encoded is not None:
            self._tokens += len(encoded.documents.tokens)
            self._documents += len(chunk.documents)
        seconds = max(time.monotonic() - self._begin, 1e-9)
        self._bar.set_postfix_str(
            f"{self._documents / seconds:,.0f} documents/s, {self._tokens / seconds:,.0f} tokens/s", refresh=False
        )
        self._bar.update(chunk.num_bytes)


def _check_same_input(chunk: Chunk, earlier: FinishedShard, output_dir: Path) -> None:
    if chunk.input_digest != earlier.input_digest:
        raise DataError(
            f"the sources have changed since the call that began {output_dir} (first seen in {earlier.shard.path}): "
            "delete that folder, or give another one"
        )


def _check_not_inside_source(config: PrepareConfig, output_dir: Path) -> None:
    for source in map(os.path.expanduser, config.source_list):
        if os.path.isdir(source) and output_dir.resolve().is_relative_to(Path(source).resolve()):
            raise DataError(f"the output folder {output_dir} lies inside the source {source!r}: choose one outside")


@contextlib.contextmanager
def only_process(work_dir: Path) -> Iterator[None]:
    """Keeps a second process from writing the same folder; the system frees the lock however this one ends."""
    with open(work_dir / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is preparing {work_dir.parent}; wait until it is done") from error
        yield


@contextlib.contextmanager
def full_disk_as_data_error(output_dir: Path) -> Iterator[None]:
    """Turns errors of a full disk into a `DataError` that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, sqlite3.OperationalError) as error:
        # ArrayRecord raises RuntimeErrors that hold the text of the system's error.
        numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        texts = [os.strerror(number) for number in numbers] + ["database or disk is full"]
        if getattr(error, "errno", None) in numbers or any(text in str(error) for text in texts):
            raise DataError(
                f"no room to write {output_dir} ({error}): free some, then run the same command; it goes on from "
                "the last finished shard"
            ) from error
        raise
