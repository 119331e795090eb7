"""What curating a trillion tokens would cost, from what each stage takes of a core here. On paper.

    python -m benchmarks.curate_at_scale --text a.jsonl b.jsonl --pages html/ [--tokens 1e12]
    python -m benchmarks.curate_at_scale --recorded    # multiplies anew, measures nothing

All that is measured is time of the processor (of this process, or of Spark's JVM and its Python workers), so other work
on the machine does not count. Spark's part is measured on random keys, of which a tenth is equal to another; what the
same number of tasks costs at any size is taken away by measuring two sizes.

The classifier's rate is that of results/curate.json, or of results/classify.json while that has none.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.results import RESULTS_DIR, Benchmark, Row, load
from cpm_jax.common.gin_utils import Settings
from cpm_jax.curation.dedup import DedupConfig
from cpm_jax.curation.places import DROPPED_ROWS, FILTERED, KEPT_ROWS, KEYS, PARAGRAPH_COUNTS, PARAGRAPHS, Places
from cpm_jax.curation.readers import InputShard, plan_shards
from cpm_jax.curation.runners import Pool
from cpm_jax.curation.shards import FilterShard, WriteShard
from cpm_jax.curation.writers import Columns, load_rows
from experiments.curate import CurateConfig

# Not measured here. FineWeb's sample of 10B tokens has 14.9 million documents; its tokens are GPT-2's.
TOKENS_PER_DOCUMENT = 690
BYTES_PER_TOKEN = 4.4
PARAGRAPHS_PER_DOCUMENT = 3
KINDS = ("text", "web pages")  # of sources


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the stages take.

    Attributes:
        filter_bytes: bytes of text that one core reads and filters per second; its keys are made, too.
        write_bytes: bytes of kept text that one core writes per second.
        kept: the share of the text that the filters keep.
        staged: bytes of the files between the stages, per byte of text; keys excepted.
        decide_seconds: of a core, per document, to find the duplicates.
        shuffled: bytes that Spark's shuffles write, per document.
        classify_bytes: bytes of text that one core scores with the classifier per second; None for no classifier.
    """

    filter_bytes: float
    write_bytes: float
    kept: float
    staged: float
    decide_seconds: float
    shuffled: float
    classify_bytes: float | None = None


def plan(rates: Rates, tokens: float, config: DedupConfig) -> dict[str, float]:
    """Core hours and terabytes for so many tokens of text that is read; all cores busy all the time."""
    num_bytes = tokens * BYTES_PER_TOKEN
    kept = tokens / TOKENS_PER_DOCUMENT * rates.kept
    stages = {
        "filter, core hours": num_bytes / rates.filter_bytes / 3600,
        "find duplicates, core hours": kept * rates.decide_seconds / 3600,
        "write, core hours": num_bytes * rates.kept / rates.write_bytes / 3600,
    }
    total = sum(stages.values())
    key_bytes = 8 * (2 + config.bands + PARAGRAPHS_PER_DOCUMENT + 1)
    with_classifier = {}
    if rates.classify_bytes is not None:  # the last filter: it sees what the others keep
        hours = num_bytes * rates.kept / rates.classify_bytes / 3600
        with_classifier = {"classifier, core hours": hours, "core hours with the classifier": total + hours}
    return stages | {
        "core hours": total,
        **with_classifier,
        "documents and scores between the stages, TB": num_bytes * rates.staged / 1e12,
        "keys, TB": kept * key_bytes / 1e12,
        "shuffles, TB": kept * rates.shuffled / 1e12,
    }


def classifier_rate(directory: Path = RESULTS_DIR) -> tuple[float, str]:
    """Bytes of text that one core scores per second, as recorded, and where that stands.

    Of results/curate.json, where the classifier has a core of its own; else of results/classify.json, as for an equal
    amount of text of each of its tasks.

    Raises:
        ValueError: neither has been recorded.
    """
    recorded = {result["name"]: result["rows"] for result in load(directory)}
    for name, unit, end in (("curate", "MB/s/core", "classifier"), ("classify", "MB/s", "scoring in one process")):
        found = [row.ours for row in recorded.get(name, ()) if row.unit == unit and row.metric.endswith(end)]
        if found:
            return 1e6 * statistics.harmonic_mean(found), f"results/{name}.json"
    raise ValueError(f"{directory} has no rate of the classifier: run benchmarks.curate or benchmarks.classify")


def recorded_rates(rows: Sequence[Row], kind: str, tokens: float) -> Rates:
    """The rates of text or of web pages that an earlier call has recorded for so many tokens.

    Raises:
        ValueError: it has recorded none.
    """
    found = {row.metric: row.ours for row in rows}
    staged = found.get(f"{kind}, {tokens:.0e} tokens: documents and scores between the stages, TB")
    if staged is None:
        raise ValueError(f"no plan of {tokens:.0e} tokens from {kind} is recorded: measure first")
    return Rates(
        filter_bytes=1e6 * found[f"{kind}: filter"],
        write_bytes=1e6 * found[f"{kind}: write"],
        kept=found[f"{kind}: kept by the filters"] / 100,
        staged=1e12 * staged / (tokens * BYTES_PER_TOKEN),
        decide_seconds=1 / found["find duplicates"],
        shuffled=found["find duplicates, shuffles"],
    )


def add_kind(benchmark: Benchmark, kind: str, rates: Rates, tokens: float) -> None:
    """The rows of text or of web pages: what was measured, and what follows from it."""
    benchmark.add(f"{kind}: filter", "MB of text/s/core", rates.filter_bytes / 1e6, larger_is_better=True)
    benchmark.add(f"{kind}: write", "MB of text/s/core", rates.write_bytes / 1e6, larger_is_better=True)
    benchmark.add(f"{kind}: kept by the filters", "%", 100 * rates.kept, larger_is_better=True)
    costs = plan(rates, tokens, DedupConfig())
    for name, value in costs.items():
        benchmark.add(f"{kind}, {tokens:.0e} tokens: {name}", "", value, larger_is_better=False)
    for what in ("", " with the classifier"):
        hours = costs.get(f"core hours{what}")
        if hours is None:
            continue
        for cores in (100, 1000):
            name = f"{kind}, {tokens:.0e} tokens on {cores:,} cores{what}"
            benchmark.add(name, "days", hours / cores / 24, larger_is_better=False)


def add_recorded(benchmark: Benchmark, directory: Path, tokens: float) -> dict[str, object]:
    """All rows anew from the rates that were recorded; gives where and when these were measured.

    Raises:
        ValueError: nothing has been recorded.
    """
    before = next((result for result in load(directory) if result["name"] == "curate_at_scale"), None)
    if before is None:
        raise ValueError(f"{directory} has no curate_at_scale.json: measure first")
    shared = [row for row in before["rows"] if row.metric.startswith(("Spark", "find duplicates"))]
    benchmark.rows += shared
    rate = add_classifier(benchmark, directory)
    for kind in KINDS:
        if any(row.metric == f"{kind}: filter" for row in before["rows"]):
            rates = recorded_rates(before["rows"], kind, tokens)
            add_kind(benchmark, kind, dataclasses.replace(rates, classify_bytes=rate), tokens)
    return {key: before[key] for key in ("commit", "date", "machine")}


def add_classifier(benchmark: Benchmark, directory: Path = RESULTS_DIR) -> float:
    """The row of the classifier; gives its rate in bytes per second."""
    rate, place = classifier_rate(directory)
    benchmark.add(f"classifier, recorded in {place}", "MB of text/s/core", rate / 1e6, larger_is_better=True)
    return rate


def measure_stages(sources: Sequence[str]) -> Rates:
    """Stages 1 and 3 on real documents, with the filters of runs/curate.gin."""
    flags = [f"--gin.DATA={tuple(sources)!r}", "--gin.EVALUATION_SETS=()"]
    config = Settings(["runs/curate.gin"], flags, CurateConfig).build().pipeline
    shards, _ = plan_shards(sources)
    with tempfile.TemporaryDirectory() as folder:
        places = Places(folder)
        places.make_folders()
        run = FilterShard(config.reading, tuple(config.filters), config.dedup, places)
        run(shards[0])  # loads what it needs
        begin = time.process_time()
        for shard in shards:
            run(shard)
        filter_seconds = time.process_time() - begin
        staged = sum(path.stat().st_size for path in (places.work_dir / FILTERED).glob("*.zst"))
        sizes, columns = {KEPT_ROWS: 0, DROPPED_ROWS: 0}, Columns()
        for shard in shards:
            note = places.note(FILTERED, shard.index) or {}
            columns.merge(Columns(note["scores"], note["fields"]))
            for rows in sizes:
                texts = load_rows(places.file(FILTERED, shard.index, rows))
                sizes[rows] += sum(len(row["text"].encode()) for row in texts)
        Pool(0).find_duplicates(config.dedup, shards, places)
        write = WriteShard(columns, config.output_format, config.dedup, places)
        write(shards[0])
        begin = time.process_time()
        for shard in shards:
            write(shard)
        write_seconds = time.process_time() - begin
    total = sum(sizes.values())
    return Rates(
        filter_bytes=total / filter_seconds,
        write_bytes=sizes[KEPT_ROWS] / write_seconds,
        kept=sizes[KEPT_ROWS] / total,
        staged=staged / total,
        decide_seconds=0.0,
        shuffled=0.0,
    )


def _family() -> dict[int, float]:
    """This process and all that descend from it, with the seconds that each, and its children that ended, computed."""
    parents, seconds = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        process = int(stat.parent.name)
        parents[process] = int(fields[1])
        seconds[process] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    tree = [os.getpid()]
    for process in tree:
        tree += [child for child, parent in parents.items() if parent == process]
    return {process: seconds[process] for process in tree}


def _processor_seconds() -> float:
    return sum(_family().values())


def _plant_keys(places: Places, documents: int, num_shards: int) -> list[InputShard]:
    """Keys of documents of which a tenth is like an earlier one in some band, and paragraphs likewise."""
    draw = np.random.default_rng(0)
    size = documents // num_shards
    bands = DedupConfig().bands
    for shard in range(num_shards):
        keys = draw.integers(1, 1 << 63, size=(2 + bands, size), dtype=np.uint64)
        paragraphs = draw.integers(1, 1 << 63, size=(1, PARAGRAPHS_PER_DOCUMENT * size), dtype=np.uint64)
        for array in (keys[2:], paragraphs):
            array[:, : array.shape[1] // 10] = np.sort(array[:, : array.shape[1] // 10] % np.uint64(documents)) + 1
        places.save(FILTERED, shard, KEYS, keys)
        places.save(FILTERED, shard, PARAGRAPHS, paragraphs)
        places.save(FILTERED, shard, PARAGRAPH_COUNTS, np.full(size, PARAGRAPHS_PER_DOCUMENT))
        places.leave_note(FILTERED, shard, {"documents": size})
    return [InputShard(shard, "", (), 0) for shard in range(num_shards)]


def measure_duplicates(benchmark: Benchmark, sizes: Sequence[int]) -> tuple[float, float]:
    """Seconds of a core, and bytes of shuffles, per document; what it costs to start Spark goes to the benchmark."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SPARK_LOCAL_DIRS"] = scratch
        from cpm_jax.curation import spark

        seconds, num_bytes = [], []
        begin = _processor_seconds()
        with spark.session("local[1]") as session:
            benchmark.add("Spark, to start", "s of a core", _processor_seconds() - begin, larger_is_better=False)
            runner = spark.Spark(session)
            for documents in (sizes[0] // 10, *sizes):  # the first starts what there is to start
                with tempfile.TemporaryDirectory() as folder:
                    places = Places(folder)
                    places.make_folders()
                    shards = _plant_keys(places, documents, num_shards=8)
                    begin, before = _processor_seconds(), _shuffled(scratch)
                    runner.find_duplicates(DedupConfig(), shards, places)
                    seconds.append(_processor_seconds() - begin)
                    num_bytes.append(_shuffled(scratch) - before)
            benchmark.add("Spark, memory of the JVM", "MiB", _jvm_memory(), larger_is_better=False)
    more = sizes[1] - sizes[0]
    return (seconds[2] - seconds[1]) / more, (num_bytes[2] - num_bytes[1]) / more


def _jvm_memory() -> float:
    """The most that the JVM below this process held."""
    for status in Path("/proc").glob("[0-9]*/status"):
        said = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if said["Name"].strip() == "java" and int(said["PPid"]) in _family():
            return int(said["VmHWM"].split()[0]) / 1024
    raise RuntimeError("no JVM was found")


def _shuffled(scratch: str) -> int:
    return sum(path.stat().st_size for path in Path(scratch).rglob("shuffle_*.data"))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes results/curate_at_scale.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=[], help="documents as text: jsonl, parquet, …")
    parser.add_argument("--pages", nargs="*", default=[], help="web pages, of which the text is extracted")
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--documents", type=int, nargs=2, default=(40_000, 160_000), help="whose keys Spark compares")
    parser.add_argument("--recorded", action="store_true", help="take the recorded rates and measure nothing")
    args = parser.parse_args(argv)
    benchmark = Benchmark("curate_at_scale", "python -m benchmarks.curate_at_scale, see docs/curate.md")
    if args.recorded:
        measured = add_recorded(benchmark, RESULTS_DIR, args.tokens)
        benchmark.write(measured=measured)
        return
    if not args.text:
        parser.error("give documents: --text")
    decide_seconds, shuffled = measure_duplicates(benchmark, args.documents)
    benchmark.add("find duplicates", "documents/s/core", 1 / decide_seconds, larger_is_better=True)
    benchmark.add("find duplicates, shuffles", "bytes/document", shuffled, larger_is_better=False)
    classify_bytes = add_classifier(benchmark)
    for kind, sources in zip(KINDS, (args.text, args.pages), strict=True):
        if sources:
            rates = dataclasses.replace(
                measure_stages(sources), decide_seconds=decide_seconds, shuffled=shuffled, classify_bytes=classify_bytes
            )
            add_kind(benchmark, kind, rates, args.tokens)
    benchmark.write()


if __name__ == "__main__":
    main()
