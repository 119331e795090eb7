"""Shards on other filesystems than the local one, and several workers at the same shard."""

import gzip
import json
import os
import threading

import fsspec
import pyarrow.parquet
import pytest

from cpm_jax.common.config import InputError
from cpm_jax.common.files import as_path, remove_folder, whole_file
from cpm_jax.curation.dedup import DedupConfig
from cpm_jax.curation.pipeline import PipelineConfig, curate
from cpm_jax.curation.places import FILTERED, Places
from cpm_jax.curation.readers import InputShard, Reading
from cpm_jax.curation.shards import FilterShard
from cpm_jax.curation.writers import load_rows
from cpm_jax.data.errors import DataError
from tests.curation.test_pipeline import EVALUATION, digest, prose
from tests.curation.web_pages import CODE, page


@pytest.fixture
def corpus(tmp_path):
    """Files of every kind of reader, also in a folder, and a damaged one."""
    root = tmp_path / "in"
    (root / "more").mkdir(parents=True)
    rows = [{"text": prose(number), "id": str(number)} for number in (*range(8), 3)]
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "more" / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": prose(9)}).encode()))
    (root / "more" / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": prose(9)}).encode())[:-9])
    (root / "more" / ".hidden").write_text("not read")
    (root / "d.txt").write_text(f"{prose(10)} {EVALUATION}")
    (root / "e.html").write_text(page(f"<p>{prose(11)}</p>{CODE}"))
    curate(PipelineConfig(str(root / "a.jsonl"), num_workers=0), tmp_path / "first", progress=False)
    os.replace(tmp_path / "first" / "data" / "shard-00000.parquet", root / "f.parquet")
    return root


@pytest.fixture
def memory():
    """A filesystem of fsspec's that no function of the operating system can reach."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def run(sources, output, **changes):
    config = PipelineConfig(sources, num_workers=0, **changes)
    return curate(config, output, evaluation_sets={"exam": [EVALUATION]}, progress=False)


def content(folder):
    """All rows of all shards, but for the source that they name."""
    found = {}
    for path in sorted([*folder.glob("data/*"), *folder.glob("dropped/*")]):
        rows = pyarrow.parquet.read_table(path).to_pylist() if path.suffix == ".parquet" else load_rows(path)
        name = f"{path.parent.name}/{path.name}"
        found[name] = [{column: value for column, value in row.items() if column != "source"} for row in rows]
    assert sum(map(len, found.values())) >= 15
    return found


def test_urls_are_read_and_written_as_paths_are(corpus, tmp_path, memory):
    memory.put(str(corpus), "/in", recursive=True)
    for output_format in ("parquet", "jsonl.zst"):
        expected = run(str(corpus), tmp_path / output_format, output_format=output_format)
        assert expected["drops"].keys() == {"contaminated: exam", "exact duplicate"}
        assert [item["id"] for item in expected["quarantined"]] == ["more/c.jsonl.gz:1"]
        assert expected["rejects"] == {"hidden": 1}
        manifest = run("memory://in", f"memory://out/{output_format}", output_format=output_format)
        memory.get(f"/out/{output_format}", str(tmp_path / f"copy {output_format}"), recursive=True)
        assert digest(tmp_path / f"copy {output_format}").keys() == digest(tmp_path / output_format).keys()
        assert content(tmp_path / f"copy {output_format}") == content(tmp_path / output_format)
        assert run("memory://in", f"memory://out/{output_format}", output_format=output_format) == manifest
        for name in ("documents", "characters", "drops", "rejects", "languages", "evaluation_sets", "input_shards"):
            assert manifest[name] == expected[name]


def test_files_and_patterns_of_urls_are_found(corpus, memory, tmp_path):
    memory.put(str(corpus), "/in", recursive=True)
    assert run("memory://in/more/b.jsonl.gz", tmp_path / "one")["input_shards"] == ["b.jsonl.gz"]
    assert run("memory://in/**/*.jsonl*", tmp_path / "some")["input_shards"] == [
        "a.jsonl",
        "more/b.jsonl.gz",
        "more/c.jsonl.gz",
    ]
    with pytest.raises(DataError, match=r"source 'memory://nowhere' does not exist"):
        run("memory://nowhere", tmp_path / "none")
    with pytest.raises(DataError, match="lies inside the source"):
        run("memory://in", "memory://in/out")
    with pytest.raises(InputError, match="nosuch://x"):
        run("nosuch://x", tmp_path / "none")


def test_a_url_that_changes_after_an_interruption_is_noticed(memory):
    def fail(document):
        raise DataError("stop")

    memory.pipe("/in/a.jsonl", b'{"text": "one"}\n')
    with pytest.raises(DataError, match="stop"):
        run("memory://in", "memory://out", filters=(fail,))
    memory.pipe("/in/a.jsonl", b'{"text": "two"}\n')
    with pytest.raises(DataError, match="the sources have changed"):
        run("memory://in", "memory://out", filters=(fail,))


def test_a_file_appears_whole_or_not_at_all(tmp_path, memory):
    for folder in (tmp_path, as_path("memory://files")):
        folder.mkdir(exist_ok=True)
        path = folder / "a"
        with pytest.raises(TypeError), whole_file(path) as file:
            file.write(b"half" + None)
        assert list(folder.iterdir()) == []
        for content in (b"one", b"two"):
            with whole_file(path) as file:
                file.write(content)
            assert path.read_bytes() == content
        assert [found.name for found in folder.iterdir()] == ["a"]
        remove_folder(folder / "nothing")
        remove_folder(folder)
        assert not folder.exists()


def test_two_workers_at_one_shard_do_no_harm(tmp_path):
    rows = [{"text": prose(number), "id": str(number)} for number in range(10)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shard = InputShard(0, "source", ((str(tmp_path / "in.jsonl"), "in.jsonl"),), 0)
    both = threading.Barrier(2, timeout=60)

    def together(document):
        if document.id in ("0", "9"):
            both.wait()
        return document

    def filtered(name, filters):
        places = Places(str(tmp_path / name))
        places.make_folders()
        return FilterShard(Reading(), filters, DedupConfig(), places)

    filtered("alone", ())(shard)
    worker = filtered("two", (together,))
    other = threading.Thread(target=worker, args=(shard,))
    other.start()
    worker(shard)
    other.join()
    assert digest(tmp_path / "two") == digest(tmp_path / "alone")
    assert Places(str(tmp_path / "two")).finished(FILTERED) == {0}


def test_a_worker_that_outlives_its_job_brings_nothing_back(tmp_path):
    (tmp_path / "in.txt").write_text(prose(1))
    shard = InputShard(0, "source", ((str(tmp_path / "in.txt"), "in.txt"),), 0)
    places = Places(str(tmp_path / "out"))
    places.make_folders()
    late = FilterShard(Reading(), (), None, places)
    run(str(tmp_path / "in.txt"), tmp_path / "out")
    before = digest(tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        late(shard)
    assert digest(tmp_path / "out") == before
    assert not places.work_dir.exists()
