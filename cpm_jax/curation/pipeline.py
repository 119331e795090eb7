"""Sources to a curated data set: filter, find duplicates, write; by many workers, resumable at any moment.

1. Each input shard, by some worker: read, filter; the kept documents and their keys for deduplication lie on disk.
2. Which documents and paragraphs are duplicates, from the keys: this process alone, or Spark's shuffles.
3. Each input shard again, by some worker: its output shard.
Then the card and the manifest, which makes the data set complete. What a worker finished has a note, written last; a
later call goes by the notes, so each input shard has one output shard, however often the job was killed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.common.files import absolute, as_path, remove_folder, whole_file
from cpm_jax.common.progress import Progress
from cpm_jax.curation.card import dataset_card
from cpm_jax.curation.decontamination import Decontaminate, build_index
from cpm_jax.curation.dedup import DedupConfig
from cpm_jax.curation.filters import described
from cpm_jax.curation.html import Extractor
from cpm_jax.curation.places import DECIDED, FILTERED, WRITTEN, Places
from cpm_jax.curation.readers import InputShard, Reading, plan_shards, progress_sizes
from cpm_jax.curation.runners import Pool, Runner
from cpm_jax.curation.shards import FilterShard, WriteShard
from cpm_jax.curation.statistics import Statistics
from cpm_jax.curation.writers import Columns, OutputFormat
from cpm_jax.data.errors import DataError
from cpm_jax.data.prepare import REJECTS_FILE, full_disk_as_data_error, only_process

MANIFEST = "curation.json"
CARD = "dataset_card.md"


@config_dataclass
class PipelineConfig:
    """What to curate, and how.

    Attributes:
        sources: what to read: one source string or several (`cpm_jax.data.sources.read_documents` says what they may
            be); WARC, WET and HTML files, too; also URLs.
        filters: applied to each document in this order, up to the first that drops it: any callables
            `Document -> Document` that can be pickled.
        dedup: what counts as a duplicate; None keeps all.
        decontamination_ngram: documents that share this many words in a row with an evaluation set are dropped: 13 in
            the GPT-3 paper, 16 in MiMo's report.
        text_field: the field or column of the text in jsonl, parquet, ArrayRecord and TFDS.
        extensions: endings of the file names to take from folders, such as (".warc.gz",); all if None.
        extractor: of the text of web pages, see `cpm_jax.curation.html`.
        tfds_data_dir: where TFDS keeps its data sets; its own default if None.
        output_format: of the shards.
        num_workers: processes; None for one per core, 0 for none but this one.
        spark_master: the master of a Spark cluster that does the work in place of processes here:
            "spark://host:7077", "yarn", or "local[4]"; None for no Spark.
    """

    sources: str | tuple[str, ...] | list[str]
    filters: tuple[Any, ...] | list[Any] = ()
    dedup: DedupConfig | None = dataclasses.field(default_factory=DedupConfig)
    decontamination_ngram: int = 13
    text_field: str = "text"
    extensions: tuple[str, ...] | list[str] | None = None
    extractor: Extractor = "keep_code_and_math"
    tfds_data_dir: str | None = None
    output_format: OutputFormat = "parquet"
    num_workers: int | None = None
    spark_master: str | None = None

    def __post_init__(self) -> None:
        """Checks what the types do not say."""
        if not self.source_list:
            raise ConfigError("PipelineConfig.sources = (): at least one source is needed", "PipelineConfig.sources")
        for apply in self.filters:
            if not callable(apply):
                message = f"PipelineConfig.filters: {apply!r} is no filter: a callable Document -> Document is"
                raise ConfigError(message, "PipelineConfig.filters")
        for name, least in {"decontamination_ngram": 1, "num_workers": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(
                    f"PipelineConfig.{name} = {value}: must be at least {least}", f"PipelineConfig.{name}"
                )

        if self.spark_master is not None and self.num_workers is not None:
            message = (
                f"PipelineConfig.num_workers = {self.num_workers}: with spark_master = {self.spark_master!r} the "
                "cluster says how many workers there are; leave one of them None"
            )
            raise ConfigError(message, "PipelineConfig.num_workers")

    @property
    def source_list(self) -> tuple[str, ...]:
        """The sources, also when only one was given."""
        return (self.sources,) if isinstance(self.sources, str) else tuple(self.sources)

    @property
    def reading(self) -> Reading:
        """How records become documents."""
        return Reading(self.text_field, self.extractor, self.tfds_data_dir)

    def arguments(self) -> dict[str, Any]:
        """The arguments that the result depends on, as JSON holds them."""
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del arguments["num_workers"], arguments["spark_master"]
        arguments["sources"] = self.source_list
        arguments["filters"] = [described(apply) for apply in self.filters]
        arguments["dedup"] = None if self.dedup is None else dataclasses.asdict(self.dedup)
        return json.loads(json.dumps(arguments))


def curate(
    config: PipelineConfig,
    output_dir: str | Path,
    *,
    evaluation_sets: Mapping[str, Sequence[str]] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Makes a curated data set, or goes on with one that an earlier call did not finish, or finds it done.

    The result is the same to the byte for any number of workers and however often it was interrupted.

    Args:
        config: what to curate.
        output_dir: the folder to write, a path or a URL, see docs/curate.md.
        evaluation_sets: texts that no document may hold, by the name of their set.
        progress: whether to show how far each stage is, on stderr.

    Returns:
        The manifest that was written, now or by an earlier call.

    Raises:
        DataError: a source does not exist or holds nothing that can be used, or has changed since the interrupted
            call; the folder was made with other arguments; the disk is full.
    """
    places = Places(absolute(output_dir))
    output_dir = places.output_dir
    evaluation_sets = evaluation_sets or {}
    arguments = config.arguments() | {"evaluation_sets": {name: _digest(t) for name, t in evaluation_sets.items()}}
    manifest_file = output_dir / MANIFEST
    if manifest_file.exists():
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        _check_same(manifest["arguments"], arguments, output_dir)
        remove_folder(places.work_dir)  # a kill at the very end may have left it
        return manifest
    for source in config.source_list:
        if _lies_inside(output_dir, source):
            raise DataError(f"the output folder {output_dir} lies inside the source {source!r}: choose one outside")
    with full_disk_as_data_error(output_dir):
        places.make_folders()
        # Other filesystems have no such lock. Two processes there write the same bytes, but one ends in an error when
        # the other, done first, has removed the work folder.
        only_one = only_process(places.work_dir) if isinstance(output_dir, Path) else contextlib.nullcontext()
        with only_one, _runner(config) as runner:
            return _curate(config, arguments, places, evaluation_sets, runner, progress)


def _lies_inside(folder: Path, source: str) -> bool:
    if "://" in source or not isinstance(folder, Path):
        return f"{folder}/".startswith(f"{source.rstrip('/')}/")
    return os.path.isdir(source) and folder.resolve().is_relative_to(Path(source).resolve())


def _digest(texts: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(texts).encode(errors="replace"), digest_size=16).hexdigest()


def _curate(
    config: PipelineConfig,
    arguments: dict[str, Any],
    places: Places,
    evaluation_sets: Mapping[str, Sequence[str]],
    runner: Runner,
    progress: bool,
) -> dict[str, Any]:
    shards, unread = plan_shards(config.source_list, config.extensions)
    _check_plan(places, {"arguments": arguments, "shards": [_identity(shard) for shard in shards]})
    filters, compared = tuple(config.filters), dict[str, int]()
    if evaluation_sets:
        index = places.work_dir / "evaluation_sets.npz"
        compared = build_index(index, evaluation_sets, config.decontamination_ngram)
        # Before duplicates are looked for: a document that goes must not stand for those that are like it.
        filters = (*filters, Decontaminate(str(index)))
    make_filter = functools.partial(FilterShard, config.reading, filters, config.dedup, places)
    _run(runner, make_filter, shards, FILTERED, places, progress)

    total, columns = Statistics(), Columns()
    usable, quarantined = [], []
    for shard in shards:
        note = places.note(FILTERED, shard.index) or {}
        total.merge(Statistics.from_json(note["statistics"]))
        columns.merge(Columns(note["scores"], note["fields"]))
        if note["damage"] is None:
            usable.append(shard)
        else:
            quarantined.append(note["damage"])
    total.rejects.update(reject.reason for reject in unread)
    all_decided = places.work_dir / f"{DECIDED}.json"
    if config.dedup is not None and not all_decided.exists():
        runner.find_duplicates(config.dedup, usable, places)
        _write_json(all_decided, {})
    make_writer = functools.partial(WriteShard, columns, config.output_format, config.dedup, places)
    _run(runner, make_writer, usable, WRITTEN, places, progress)

    files: dict[str, Any] = {}
    for shard in usable:
        note = places.note(WRITTEN, shard.index) or {}
        total.merge(Statistics.from_json(note["statistics"]))
        files |= note["files"]
    with whole_file(places.output_dir / REJECTS_FILE, places.temporary_dir) as file:
        read_in_vain = (reject for shard in usable for reject in places.rejects(shard.index))
        for reject in itertools.chain(map(dataclasses.asdict, unread), read_in_vain):
            file.write((json.dumps(reject, ensure_ascii=False) + "\n").encode())
    if not total.documents:
        raise DataError(
            f"no document of {', '.join(config.source_list)} is left; rejected: {dict(total.rejects) or 'none'}; "
            f"dropped: {dict(total.drops) or 'none'}; damaged: {[item['id'] for item in quarantined] or 'none'}; "
            f"see {places.output_dir / REJECTS_FILE}"
        )
    manifest = {
        "documents": total.documents,
        "characters": total.characters,
        "text_bytes": total.text_bytes,
        "drops": dict(sorted(total.drops.items())),
        "rejects": dict(sorted(total.rejects.items())),
        "quarantined": quarantined,
        "languages": dict(sorted(total.languages.items())),
        "sources": dict(sorted(total.sources.items())),
        "input_shards": [shard.name for shard in shards],
        "files": files,
        "evaluation_sets": compared,
        "arguments": arguments,
    }
    with whole_file(places.output_dir / CARD, places.temporary_dir) as file:
        file.write(dataset_card(manifest, total).encode())
    _write_json(places.output_dir / MANIFEST, manifest)
    remove_folder(places.work_dir)
    return manifest


def _write_json(path: Path, value: Any) -> None:
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def _runner(config: PipelineConfig) -> Iterator[Runner]:
    if config.spark_master is None:
        yield Pool(config.num_workers)
        return
    from cpm_jax.curation import spark  # needs the extra `spark`

    with spark.session(config.spark_master) as session:
        yield spark.Spark(session)


def _run(
    runner: Runner,
    make_function: Callable[[], Callable[[InputShard], None]],
    shards: Sequence[InputShard],
    stage: str,
    places: Places,
    progress: bool,
) -> None:
    """Runs a stage over the shards that it has not finished, with documents per second and the time left."""
    finished = places.finished(stage)
    unit, sizes = progress_sizes(shards)
    done = sum(sizes[index] for index in finished & sizes.keys())
    with Progress(stage, sum(sizes.values()), initial=done, unit=unit, first_compiles=False, enabled=progress) as bar:
        begin, documents = time.monotonic(), 0
        for shard in runner.map(make_function, [s for s in shards if s.index not in finished], stage, places):
            done += sizes[shard.index]
            if progress:
                documents += (places.note(stage, shard.index) or {"documents": 0})["documents"]
            bar.update(done, **{"documents/s": documents / max(time.monotonic() - begin, 1e-9)})


def _identity(shard: InputShard) -> dict[str, Any]:
    """What tells whether a shard is still the same: names, sizes and times of its files."""
    files = [[name, *_version(as_path(place))] for place, name in shard.files]
    return {"source": shard.source, "files": files}


def _version(path: Path) -> tuple[int | None, Any]:
    if not path.exists():
        return None, None
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns if isinstance(path, Path) else path.fs.ukey(path.path)


def _check_plan(places: Places, plan: dict[str, Any]) -> None:
    path = places.work_dir / "plan.json"
    if not path.exists():
        _write_json(path, plan)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    _check_same(before["arguments"], plan["arguments"], places.output_dir)
    if before["shards"] != json.loads(json.dumps(plan["shards"])):
        raise DataError(
            f"the sources have changed since the call that began {places.output_dir}: delete that folder, or give "
            "another one"
        )


def _check_same(before: dict[str, Any], now: dict[str, Any], output_dir: Path) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise DataError(
                f"{output_dir} was made with {name} = {before.get(name)!r}, now {name} = {now.get(name)!r}: "
                "give the same arguments, or another folder"
            )
