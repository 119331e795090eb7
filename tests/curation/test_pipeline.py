"""The whole of curation: what comes out, that nothing is lost, and that it is the same however it was made."""

import dataclasses
import gzip
import hashlib
import io
import json
import random
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.curation import pipeline, readers
from cpm_jax.curation.cleaning import MaskPersonalData
from cpm_jax.curation.dedup import DedupConfig
from cpm_jax.curation.document import Document
from cpm_jax.curation.gopher import GopherQuality
from cpm_jax.curation.pipeline import CARD, MANIFEST, PipelineConfig, curate
from cpm_jax.curation.places import Places
from cpm_jax.curation.readers import InputShard
from cpm_jax.curation.runners import Runner
from cpm_jax.curation.writers import load_dump
from cpm_jax.data.errors import DataError
from cpm_jax.data.prepare import PrepareConfig, prepare

WORDS = ["the", "sea", "of", "and", "light", "that", "storm", "rock", "with", "keeper", "tower", "ship", "be", "wind"]


def prose(seed: int, words: int = 80) -> str:
    """Sentences that no other seed gives."""
    draw = random.Random(seed)
    return " ".join(" ".join(draw.choices(WORDS, k=10)).capitalize() + f" {seed}." for _ in range(words // 10))


EVALUATION = "how many lamps did the third keeper of the northern tower light on the longest night of the year"


@pytest.fixture
def corpus(tmp_path):
    """Several kinds of files, with every kind of thing that may go wrong."""
    root = tmp_path / "in"
    root.mkdir()
    rows = [
        {"text": prose(number), "id": f"a{number}", "license": "CC0", "n_score": number / 10} for number in range(12)
    ]
    rows[3]["text"] = rows[2]["text"]
    rows[4]["text"] = rows[1]["text"] + " One more sentence."
    rows[5]["text"] = "too short"
    rows[6]["text"] = f"{prose(6)} {EVALUATION}"
    rows[7]["text"] += " Write to keeper@lighthouse.net."
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    more = [{"text": prose(number), "id": f"b{number}"} for number in range(20, 30)]
    more[0]["text"] = rows[0]["text"]
    more[1]["id"] = more[2]["id"]
    (root / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in more).encode()))
    (root / "c.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in more).encode())[:-40])
    (root / "d.txt").write_text(prose(40))
    (root / "e.txt").write_bytes(b"\xff\xff")
    return root


def config(corpus, **changes) -> PipelineConfig:
    filters = (GopherQuality(), MaskPersonalData())
    return PipelineConfig(sources=str(corpus), **({"filters": filters, "num_workers": 0} | changes))


def run(corpus, output, **changes):
    return curate(config(corpus, **changes), output, evaluation_sets={"exam": [EVALUATION]}, progress=False)


def digest(folder) -> dict[str, str]:
    """The content of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_document_is_kept_dropped_rejected_or_in_a_named_damaged_file(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "out")
    assert manifest["drops"] == {
        "contaminated: exam": 1,
        "exact duplicate": 2,
        "gopher: too few words": 1,
        "near duplicate": 1,
    }
    assert manifest["rejects"] == {"invalid UTF-8": 1, "malformed JSON": 1}
    assert [item["id"] for item in manifest["quarantined"]] == ["c.jsonl.gz:10"]
    assert manifest["documents"] == 12 + 10 + 1 - 5
    assert manifest["repeated_ids"] == 1
    table = datasets.load_dataset(str(tmp_path / "out" / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["id"][:] == [f"a{n}" for n in (0, 1, 2, 7, 8, 9, 10, 11)] + ["b22", "b22#00001-2"] + [
        *(f"b{n}" for n in range(23, 30)),
        "d.txt",
    ]
    assert table["n_score"][2] == 0.2
    assert table["license"][0] == "CC0"
    assert "Write to email@example.org." in table["text"][3]
    dropped = {
        document.id: document
        for path in sorted((tmp_path / "out" / "dropped").iterdir())
        for document in load_dump(path)
    }
    assert len(dropped) == 5
    assert dropped["a6"].dropped == "contaminated: exam"
    assert dropped["a6"].scores["contaminated_ngrams"] == len(EVALUATION.split()) - 12
    assert dropped["a5"].text == "too short"
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(item["id"], item["reason"]) for item in rejects] == [
        ("a.jsonl:13", "malformed JSON"),
        ("e.txt", "invalid UTF-8"),
    ]


def test_the_card_says_what_happened(corpus, tmp_path):
    run(corpus, tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    assert card.startswith("---\nconfigs:\n")
    for line in (
        "# 18 documents, ",
        "1 had the id of an earlier document",
        "| exact duplicate | 2 | 8.7% |",
        "| c.jsonl.gz:10 | truncated |",
        "| CC0 | 8 | 44.4% |",
        "| exam | 1 | 1 |",
        "## Score `n_score`: 8 documents",
        "### Dropped: gopher: too few words",
        "curate --gin_file=config.gin --workdir=OUT",
    ):
        assert line in card


def test_the_result_does_not_depend_on_the_number_of_workers(corpus, tmp_path):
    run(corpus, tmp_path / "alone")
    run(corpus, tmp_path / "pool", num_workers=3)
    assert digest(tmp_path / "alone") == digest(tmp_path / "pool")


def test_prepare_reads_what_curate_writes(corpus, tmp_path):
    for output_format in ("parquet", "jsonl.zst"):
        manifest = run(corpus, tmp_path / output_format, output_format=output_format)
        prepared = prepare(
            PrepareConfig(sources=str(tmp_path / output_format / "data"), seq_len=16, vocab_size=300, num_workers=0),
            tmp_path / f"prepared {output_format}",
            progress=False,
        )
        documents = sum(split.documents for split in prepared.splits.values())
        text_bytes = sum(split.text_bytes for split in prepared.splits.values())
        assert (documents, text_bytes) == (manifest["documents"], manifest["text_bytes"])


def test_a_second_call_finds_it_done_and_other_arguments_are_refused(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "out")
    before = digest(tmp_path / "out")
    assert run(corpus, tmp_path / "out") == manifest
    assert digest(tmp_path / "out") == before
    with pytest.raises(DataError, match="was made with decontamination_ngram = 13"):
        run(corpus, tmp_path / "out", decontamination_ngram=16)
    with pytest.raises(DataError, match="was made with filters"):
        run(corpus, tmp_path / "out", filters=(GopherQuality(min_words=51),))


def test_shards_without_paragraphs_or_without_any_document_are_no_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "short"}\n')
    (tmp_path / "in" / "b.jsonl").write_text("")
    (tmp_path / "in" / "c.jsonl").write_text('{"text": "short"}\n')
    manifest = run(tmp_path / "in", tmp_path / "out", filters=())
    assert manifest["drops"] == {"exact duplicate": 1}
    assert sorted(name for name in manifest["files"] if name.startswith("data")) == ["data/shard-00000.parquet"]
    table = datasets.load_dataset(str(tmp_path / "out" / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["text"][:] == ["short"]


def test_paragraphs_that_were_seen_go_and_what_is_left_of_little_is_dropped(tmp_path):
    shared = prose(1)
    texts = [shared, f"{shared}\n\n{prose(2)}", f"{shared}\n\nNo more than this."]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": text, "id": str(n)}) + "\n" for n, text in enumerate(texts))
    )
    manifest = run(tmp_path / "in.jsonl", tmp_path / "out", dedup=DedupConfig(bands=0), output_format="jsonl.zst")
    assert manifest["drops"] == {"duplicate paragraphs": 1}
    rows = datasets.load_dataset(str(tmp_path / "out" / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["text"][:] == [shared, prose(2)]
    assert run(tmp_path / "in.jsonl", tmp_path / "all", dedup=None)["documents"] == 3


class Stop(BaseException):
    """Stands for whatever ends a process."""


@dataclasses.dataclass(frozen=True)
class StopAt:
    """A filter that passes all documents but one."""

    id: str

    def __call__(self, document: Document) -> Document:
        if document.id == self.id:
            raise Stop
        return document


def test_sources_that_change_after_an_interruption_are_noticed(corpus, tmp_path):
    with pytest.raises(Stop):
        run(corpus, tmp_path / "out", filters=(StopAt("b25"),))
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "another"}\n'))
    with pytest.raises(DataError, match="the sources have changed"):
        run(corpus, tmp_path / "out", filters=(StopAt("b25"),))


def test_what_was_finished_before_an_interruption_is_not_done_again(corpus, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        run(corpus, tmp_path / "out", filters=(StopAt("b25"),))
    read = []
    monkeypatch.setattr(
        "cpm_jax.curation.shards.read_shard",
        lambda shard, reading: (read.append(shard.name), readers.read_shard(shard, reading))[1],
    )
    monkeypatch.setattr(StopAt, "__call__", lambda self, document: document)
    manifest = run(corpus, tmp_path / "out", filters=(StopAt("b25"),))
    assert read == ["b.jsonl.gz", "c.jsonl.gz", "d.txt … e.txt (2 files)"]
    assert manifest["documents"] > 0
    assert not (tmp_path / "out" / "_progress").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": -1}, "PipelineConfig.num_workers = -1: must be at least 0"),
        ({"filters": ("C4",)}, "'C4' is no filter"),
        ({"decontamination_ngram": 0}, "PipelineConfig.decontamination_ngram = 0"),
        ({"output_format": "csv"}, "PipelineConfig.output_format = 'csv'"),
    ],
)
def test_bad_values_are_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **changes)


def test_nothing_left_is_an_error_that_says_why(corpus, tmp_path):
    with pytest.raises(DataError, match=r"no document of .* is left.*gopher: too few words"):
        run(corpus, tmp_path / "out", filters=(GopherQuality(min_words=10_000),))
    assert not (tmp_path / "out" / MANIFEST).exists()
    with pytest.raises(DataError, match="'missing field': 22"):
        run(corpus, tmp_path / "out1", text_field="content", extensions=(".jsonl", ".jsonl.gz"))
    assert "no field 'content' among ['id', 'license'" in (tmp_path / "out1" / "rejects.jsonl").read_text()
    with pytest.raises(DataError, match="does not exist"):
        run(tmp_path / "nowhere", tmp_path / "out2")
    with pytest.raises(DataError, match="lies inside the source"):
        run(corpus, corpus / "out")


def test_a_record_with_endless_metadata_is_a_counted_reject(tmp_path, monkeypatch):
    monkeypatch.setattr("cpm_jax.curation.shards.MAX_ROW_BYTES", 2000)
    rows = [{"text": prose(n), "id": str(n), "page": "x" * (3000 if n == 1 else 30)} for n in range(3)]
    rows[2]["page"] = "lone \ud800 surrogate"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"text": prose(n), "id": str(n), "page": "x" * (3000 if n == 11 else 30)} for n in range(10, 13)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    sources = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet")]
    manifest = curate(PipelineConfig(sources, num_workers=0), tmp_path / "out", progress=False)
    assert (manifest["documents"], manifest["rejects"]) == (4, {"record too long": 2})
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [item["id"] for item in rejects] == ["1", "11"]
    assert rejects[0]["detail"].endswith("bytes with its metadata, as JSON, more than 2000")
    kept = pyarrow.parquet.read_table(tmp_path / "out" / "data" / "shard-00000.parquet").to_pylist()
    assert [row["page"] for row in kept] == ["x" * 30, "lone ? surrogate"]


class EveryFortySeconds(Runner):
    """A runner that finishes a shard of 80 documents every 40 seconds of a clock."""

    def __init__(self, clock):
        self.clock = clock

    def map(self, make_function, shards, stage, places):
        for shard in shards:
            self.clock[0] += 40
            places.leave_note(stage, shard.index, {"documents": 80})
            yield shard

    def find_duplicates(self, config, shards, places):
        pytest.fail("nobody asked for duplicates")


@pytest.mark.parametrize(
    ("files", "done", "later"),
    [((("place", "name"),), "2.00kB/4.00kB", "3.00kB/4.00kB"), ((), "2/4 shards", "3/4 shards")],
)
def test_progress_has_documents_per_second_and_the_time_left(tmp_path, monkeypatch, files, done, later):
    """Without files, as of TFDS, nobody knows the bytes."""
    clock, err = [0.0], io.StringIO()
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("sys.stderr", err)
    places = Places(str(tmp_path))
    places.make_folders()
    shards = [InputShard(number, "source", files, 1000 if files else 0) for number in range(4)]
    places.leave_note("filtered", 0, {"documents": 80})  # by an earlier call
    pipeline._run(EveryFortySeconds(clock), lambda: None, shards, "filtered", places, progress=True)
    lines = err.getvalue().splitlines()
    assert lines[0] == f"filtered: {done}, ETA 1:20, documents/s 2"
    assert lines[1] == f"filtered: {later}, ETA 0:40, documents/s 2"
    assert lines[-1].endswith("ETA 0:00, documents/s 2")


def test_the_pool_shows_how_far_it_is(corpus, tmp_path, monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr("cpm_jax.common.progress.LINE_INTERVAL", 0.0)
    curate(config(corpus, num_workers=2), tmp_path / "out")
    lines = err.getvalue().splitlines()
    for stage, shards in (("filtered", 4), ("written", 3)):
        own = [line for line in lines if line.startswith(f"{stage}: ")]
        assert len(own) == shards + 1  # each shard, and the end
        assert all(re.fullmatch(rf"{stage}: \S+B/\S+B, ETA \d+:\d\d, documents/s \S+", line) for line in own)
    err.truncate(0)
    curate(config(corpus, num_workers=0), tmp_path / "quiet", progress=False)
    assert not err.getvalue()
