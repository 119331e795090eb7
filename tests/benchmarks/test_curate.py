import json
import time

import numpy as np
import pytest

from benchmarks import curate, curate_cells
from benchmarks.results import Benchmark

TEXT = " ".join(f"word{i % 97}" for i in range(4000))


def test_copies_differ_by_the_share_that_is_asked_for():
    copy = curate_cells.vary(TEXT, np.random.default_rng(0), 0.3)
    pairs = list(zip(TEXT.split(" "), copy.split(" "), strict=True))
    assert np.mean([a != b for a, b in pairs]) == pytest.approx(0.3 * 96 / 97, abs=0.03)
    assert curate_cells.vary(TEXT, np.random.default_rng(0), 0.0) == TEXT


def test_an_input_has_the_size_and_no_near_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(curate_cells, "SHARD_BYTES", 60_000)
    (tmp_path / "documents.json").write_text(
        json.dumps([{"text": " ".join(f"w{n}x{i}" for i in range(600)), "id": str(n), "pool": 0} for n in range(3)])
    )
    folder = curate_cells.make_input(tmp_path, 0.00012)
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == ["00000.jsonl", "00001.jsonl"]
    assert sum(path.stat().st_size for path in files) == pytest.approx(120_000, rel=0.05)
    rows = [json.loads(line) for path in files for line in path.open()]
    assert len({row["id"] for row in rows}) == len(rows) > 20
    config = curate_cells.DedupConfig()
    documents = [curate_cells.Document(row["text"], row["id"]) for row in rows]
    keys = np.stack([curate_cells.dedup.document_keys(document, config) for document in documents], axis=1)
    assert (curate_cells.dedup.find_duplicates([keys]) == curate_cells.dedup.KEPT).all()


def _hold(megabytes: int) -> dict[str, int]:
    held = np.ones(megabytes << 17)
    time.sleep(1.0)
    return {"sum": int(held.sum())}


def test_a_cell_is_measured_once_with_its_memory(tmp_path):
    psutil = pytest.importorskip("psutil")
    before = psutil.Process().memory_info().rss
    cell = curate.run_cell("hold", tmp_path, _hold, 200)
    assert cell["sum"] == 200 << 17
    assert cell["peak_bytes"] > 200 << 20
    assert cell["wall_seconds"] >= 1.0
    assert psutil.Process().memory_info().rss < before + (100 << 20)
    assert curate.run_cell("hold", tmp_path, _hold, 1) == cell


def _fail() -> dict[str, int]:
    raise SystemExit(3)


def test_a_cell_that_fails_is_not_there(tmp_path):
    pytest.importorskip("psutil")
    with pytest.raises(RuntimeError, match="the cell bad ended with exit code 3"):
        curate.run_cell("bad", tmp_path, _fail)
    assert not (tmp_path / "cells").exists()


def found() -> curate.Cells:
    """What the cells give; datatrove takes four times as long, without preprocessing as long."""
    about = {"documents": 100, "bytes": 10**6}
    ours, slower = {"kept": 50, "seconds": 2.0}, {"kept": 49, "seconds": 8.0}
    run = {"documents": 1000, "kept": 900, "bytes": 10**8, "wall_seconds": 60.0, "peak_bytes": 10**9}
    pair = {"about": about, "ours": ours, "datatrove": slower}
    return {
        "documents": about,
        "chain": pair,
        "dedup": pair,
        "train": {"examples": {"positive": 30, "negative": 60}},
        "score": pair | {"datatrove": ours, "datatrove, preprocessed": slower},
        "scoring, 0 workers": run | {"seconds": 20.0, "cores": 1},
        "scoring, 2 workers": run | {"seconds": 12.0, "cores": 2},
        "pipeline, 0.1 GB, 0 workers": run | {"seconds": 100.0, "cores": 1},
        "pipeline, 0.1 GB, 2 workers": run | {"seconds": 50.0, "cores": 2},
        "pipeline, 2 GB, 2 workers": run
        | {"seconds": 1000.0, "cores": 2, "bytes": 2 * 10**9, "documents": 20_000, "peak_bytes": 2.5e9},
    }


def test_rows_say_what_is_met():
    rows = {(row.metric, row.unit): row for row in curate.report(found()).rows}
    chain = rows["all filters", "MB/s/core"]
    assert (chain.ours, chain.baseline, chain.ratio, chain.met) == (0.5, 0.125, 4.0, True)
    assert rows["classifier", "documents/s/core"].ratio == 4.0
    assert not rows["classifier, beside a filter without preprocessing", "documents/s/core"].met
    assert rows["curate, 2 workers on 2 cores, 0.1 GB", "MB/s"].ratio == 2.0
    assert not rows["classify, scoring, 2 workers on 2 cores, 0.1 GB", "MB/s"].met
    assert rows["curate, 0.1 GB: most memory of all processes together", "GB"].met
    assert not rows["curate, 2 GB: most memory of all processes together", "GB"].met
    assert rows["curate, most memory: 2 GB beside 0.1 GB", "GB"].ratio == pytest.approx(0.4)


def test_the_table_is_that_of_the_recorded_figures(tmp_path):
    assert curate.markdown(tmp_path) == "Not recorded yet."
    benchmark: Benchmark = curate.report(found())
    benchmark.write(tmp_path)
    table = curate.markdown(tmp_path).splitlines()
    assert len(table) == len(benchmark.rows) + 2
    assert "| all filters | MB/s/core | 0.5 | datatrove's filters and formatters: 0.125 | 4 | 1.5 |" in table
    assert any(line.endswith("| 1.8, missed |") for line in table)


def test_sizes_beyond_the_time_are_left_out(tmp_path, monkeypatch, capsys):
    cells = found()
    asked = []

    def run_cell(name, workdir, function, *arguments, cores=1):
        asked.append(name)
        half = cells["pipeline, 0.1 GB, 2 workers"] | {"bytes": 5 * 10**8, "wall_seconds": 300.0}
        return {"wall_seconds": 60.0} | cells.get(name, half)

    monkeypatch.setattr(curate, "run_cell", run_cell)
    done = curate.run_all(["a", "b"], 10, [0.1, 0.5, 2.0], 16.0, tmp_path)  # 8 minutes, 5, and 20
    assert {"pipeline, 0.5 GB, 2 workers", "pipeline, 0.5 GB, 0 workers"} <= done.keys()
    assert "pipeline, 2 GB, 2 workers" not in asked
    assert "pipeline, 2 GB, 2 workers: left out" in capsys.readouterr().out
