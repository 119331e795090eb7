import json

import pytest

from benchmarks.results import Benchmark, load, main


def _benchmark(name="speed"):
    bench = Benchmark(name, command=f"python -m benchmarks.{name}")
    bench.add("throughput", "tokens/s", 300.0, larger_is_better=True, baseline_name="other", baseline=200.0, goal=1.0)
    bench.add("time", "s", 700.0, larger_is_better=False, baseline_name="at most 10 minutes", baseline=600.0, goal=1.0)
    bench.add("size", "MB", 5.0, larger_is_better=False)
    return bench


def test_ratio_is_oriented_so_that_larger_is_better():
    fast, slow, bare = _benchmark().rows
    assert (fast.ratio, fast.met) == (1.5, True)
    assert (slow.ratio, slow.met) == (pytest.approx(600 / 700), False)
    assert (bare.ratio, bare.goal, bare.met) == (None, None, None)


def test_file_has_exactly_the_agreed_form(tmp_path, capsys):
    path = _benchmark().write(tmp_path)
    content = json.loads(path.read_text())
    assert list(content) == ["name", "command", "commit", "date", "machine", "rows"]
    expected = ["metric", "unit", "ours", "baseline_name", "baseline", "ratio", "goal", "met"]
    assert [list(row) for row in content["rows"]] == [expected] * 3
    assert content["command"] == "python -m benchmarks.speed"
    assert load(tmp_path)[0]["rows"] == _benchmark().rows
    out = capsys.readouterr().out
    assert "at most 10 minutes" in out
    assert "speed.json" in out


def test_unmet_rows_of_all_files_come_first(tmp_path, capsys):
    _benchmark("a").write(tmp_path)
    _benchmark("b").write(tmp_path)
    capsys.readouterr()
    assert main(["--directory", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[2:8]] == ["NO", "NO", "yes", "yes", "–", "–"]
    assert [line.split()[0] for line in lines[2:4]] == ["a", "b"]


def test_results_in_folders_are_shown_under_the_folders_name(tmp_path, capsys):
    _benchmark("a").write(tmp_path)
    (tmp_path / "longer").mkdir()
    _benchmark("a").write(tmp_path / "longer")
    capsys.readouterr()
    assert [result["name"] for result in load(tmp_path)] == ["a", "longer/a"]
    assert main(["--directory", str(tmp_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["a", "longer/a"]


def test_costing_nothing_beats_everything_and_equals_nothing():
    bench = Benchmark("x", "x")
    assert bench.add("stall", "s", 0.0, larger_is_better=False, baseline_name="o", baseline=1.0, goal=10.0).met
    assert bench.add("lost", "steps", 0.0, larger_is_better=False, baseline_name="o", baseline=0.0, goal=1.0).ratio == 1
    json.dumps([row.ratio for row in bench.rows], allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ours": float("nan")}, "not a figure"),
        ({"ours": -1.0}, "not a figure"),
        ({"ours": 1.0, "goal": 2.0}, "no"),
    ],
)
def test_figures_that_say_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Benchmark("x", "x").add("m", "u", larger_is_better=True, **arguments)


def test_no_results_and_a_foreign_file(tmp_path, capsys):
    assert main(["--directory", str(tmp_path)]) == 0
    assert "no results" in capsys.readouterr().out
    (tmp_path / "broken.json").write_text("{}")
    assert main(["--directory", str(tmp_path)]) == 1
    assert "broken.json" in capsys.readouterr().err
