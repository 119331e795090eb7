"""Rows, sums and the table of `sparse_quality`, on losses that are made up, and the texts' format."""

import csv
import json
import math
import struct
import zlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import sparse_quality, sparse_quality_training
from benchmarks.block_rules import sparse_config
from benchmarks.compile_ahead import CompileAhead
from benchmarks.long_texts import r_character_vectors
from benchmarks.results import load
from benchmarks.sparse_quality_cells import Cell, Measured
from benchmarks.sparse_quality_report import Estimate, Losses, Plan, markdown, report
from benchmarks.sparse_quality_texts import LONG, Excerpt, excerpts, token_bytes
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import init_params

DENSE = Cell("published", "dense", 0, 2048, "plain")
OURS = Cell("published", "lse", 4, 2048, "plain")


def serialised(strings, version=3, kind=16):
    header = b"X\n" + struct.pack(">iii", version, 0, 0)
    if version == 3:
        header += struct.pack(">i", 5) + b"UTF-8"
    body = b"".join(struct.pack(">ii", 0x40009, len(text.encode())) + text.encode() for text in strings)
    data = header + struct.pack(">ii", kind, len(strings)) + body
    return struct.pack(">i", len(data)) + zlib.compress(data)


def test_character_vectors_of_r_are_read_one_after_the_other():
    data = serialised(["CHAPTER I", "", "café"]) + serialised(["x" * 5000], version=2)
    assert r_character_vectors(data) == [["CHAPTER I", "", "café"], ["x" * 5000]]


def test_another_object_of_r_is_refused():
    with pytest.raises(ValueError, match="type 19 is no character vector"):
        r_character_vectors(serialised([], kind=19))


def test_excerpts_do_not_overlap_and_reach_the_end():
    tokens = list(range(3 * (LONG + 1) + 50))
    rows = excerpts("novels", tokens, [3 * token for token in tokens])
    assert [row.name for row in rows] == ["novels0", "novels1", "novels2"]
    assert rows[0].tokens[0] == 0
    assert rows[-1].tokens[-1] == tokens[-1]
    together = np.concatenate([row.tokens for row in rows])
    assert len(set(together.tolist())) == len(together) == 3 * (LONG + 1)
    assert rows[1].num_bytes(100, 200) == 300
    with pytest.raises(ValueError, match="novels has 100 tokens"):
        excerpts("novels", tokens[:100], tokens[:100])


def test_every_cell_of_a_part_is_another():
    for part in sparse_quality.PARTS:
        cells = list(sparse_quality.cells(part))
        assert len(cells) == len(set(cells))


def test_bytes_are_counted_to_the_end_of_each_token():
    text = "naïve café"
    assert token_bytes(text, [(0, 3), (3, 5), (5, 10)]).tolist() == [4, 6, 12]


CONFIG = ModelConfig(vocab_size=50, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, d_ff=32, dtype="float32")
ORIGIN = {"commit": "abc", "date": "2026-01-02T03:04:05+00:00", "machine": {"cpu": "of the cells"}}


def test_a_dense_row_is_weighed_by_layer_rule_budget_head_and_query(monkeypatch, tmp_path):
    monkeypatch.setattr(sparse_quality, "LENGTH", 512)
    monkeypatch.setattr(sparse_quality, "WEIGHED_BUDGETS", (4, 8))
    monkeypatch.setattr(sparse_quality, "WEIGHED_POSITIONS", np.arange(300, 512, 30))
    row = Excerpt("novels0", np.arange(600, dtype=np.int32) % 50, np.arange(600))
    dense = Cell("published", "dense", 0, 512, "plain")
    with CompileAhead() as ahead:
        study = sparse_quality.Measurement(CONFIG, init_params(CONFIG, jax.random.key(0)), tmp_path, ahead)
        study.measure(dense, row).save(tmp_path, dense, row.name)
        window = study.measure(Cell("published", "window", 4, 512, "plain"), row)
    measured = Measured.load(tmp_path, dense, row.name)
    assert measured.origin == study.origin
    assert measured.origin["machine"]["platform"] == jax.default_backend()
    assert measured.losses.shape == (512,)
    assert measured.shares.shape == (3, len(sparse_quality.WEIGHED), 2, 4, 8)
    # Budgets ascend, and 8 blocks are all that a row of 512 has.
    assert (measured.shares[:, :, 0] < 0.999).all()
    np.testing.assert_allclose(measured.shares[:, :, 1], 1.0, atol=2e-3)
    assert window.shares is None
    np.testing.assert_allclose(window.losses[:256], measured.losses[:256], atol=1e-5)
    assert np.abs(window.losses[300:] - measured.losses[300:]).max() > 1e-4


def test_what_is_measured_is_not_measured_again_and_time_ends_it(monkeypatch, tmp_path):
    row = Excerpt("novels0", np.arange(600, dtype=np.int32) % 50, np.arange(600))
    cells = [Cell("published", "dense", 0, 128, "plain"), Cell("published", "window", 3, 128, "plain")]
    monkeypatch.setattr(sparse_quality, "cells", lambda part: iter(cells))
    Measured(np.zeros(128, np.float32), ORIGIN).save(tmp_path, cells[0], row.name)
    with CompileAhead() as ahead:
        study = sparse_quality.Measurement(CONFIG, init_params(CONFIG, jax.random.key(0)), tmp_path, ahead)
        with pytest.raises(sparse_quality.OutOfTimeError):
            study.measure_part("rows", [row], deadline=-math.inf)
        study.measure_part("rows", [row], deadline=math.inf)
    assert (Measured.load(tmp_path, cells[0], row.name).losses == 0).all()
    assert (Measured.load(tmp_path, cells[1], row.name).losses > 1).all()


def test_a_training_that_time_ended_goes_on_and_comes_to_the_same(monkeypatch, tmp_path):
    for name, value in (("TRAIN_LENGTH", 256), ("TRAIN_BLOCKS", 3), ("CHUNK", 2), ("HELD_OUT_EVERY", 2)):
        monkeypatch.setattr(sparse_quality_training, name, value)
    plan = sparse_quality_training.Plan(CONFIG, sparse_config("lse", 3), 4, 2, "reference")
    params = init_params(CONFIG, jax.random.key(0))
    rows = np.random.default_rng(0).integers(50, size=(5, 257))
    with CompileAhead() as ahead:
        programs = sparse_quality_training.prepare(plan, params, 3, ahead)

        def train(folder, deadline):
            return sparse_quality_training.train(plan, params, rows, rows[:3], folder, programs, deadline)

        whole = train(tmp_path / "whole", math.inf)
        times = iter([0.0, 9.0])
        with monkeypatch.context() as patch:
            patch.setattr(sparse_quality_training, "time", SimpleNamespace(monotonic=lambda: next(times)))
            with pytest.raises(sparse_quality_training.OutOfTimeError):
                train(tmp_path / "cut", 1.0)
        assert not (tmp_path / "cut" / "training.json").exists()
        cut = train(tmp_path / "cut", math.inf)
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    curve = sparse_quality_training.curve_of(tmp_path / "cut")
    assert curve == sparse_quality_training.curve_of(tmp_path / "whole")
    assert [step for step, *_ in curve] == [0, 2, 4]
    # It learned its rows, and running sparse is not running dense.
    assert np.mean(curve[-1][2]) < np.mean(curve[0][2])
    assert curve[0][1] != curve[0][2]


def test_estimates_are_paired_by_row(tmp_path):
    rng = np.random.default_rng(0)
    for row, level in (("novels0", 1.0), ("novels1", 5.0), ("essays0", 3.0)):
        losses = level + rng.random(2048).astype(np.float32)
        Measured(losses, ORIGIN).save(tmp_path, DENSE, row)
        if row != "essays0":
            Measured(losses + np.float32(0.25 * level), ORIGIN).save(tmp_path, OURS, row)
    read = Losses(tmp_path, {})
    rows = read.rows(OURS, DENSE)
    assert rows == ["novels0", "novels1"]
    more = read.beyond(OURS, DENSE, 1024, 2048, rows)
    # Differences of 0.25 and 1.25: the spread of the levels themselves, 4 nats, does not enter.
    np.testing.assert_allclose(more, (0.75, 0.5), atol=1e-5)
    assert read.loss(DENSE, 0, 2048, read.rows(DENSE)).error > 1.0
    assert read.rows(Cell("published", "random", 4, 2048, "plain"), DENSE) == []


def test_estimate_of_one_row_has_no_error():
    assert Estimate.of([2.0]).value == 2.0
    assert math.isnan(Estimate.of([2.0]).error)


def test_bits_per_byte_divide_by_the_bytes_of_the_range(tmp_path):
    Measured(np.full(2048, math.log(2), np.float32), ORIGIN).save(tmp_path, DENSE, "novels0")
    read = Losses(tmp_path, {"novels0": lambda begin, end: 4 * (end - begin)})
    np.testing.assert_allclose(read.bits_per_byte(DENSE, 100, 200, ["novels0"]), 0.25, rtol=1e-6)


def test_the_report_says_where_selection_does_not_win(tmp_path):
    rng = np.random.default_rng(1)
    work, rules = tmp_path / "work", ("lse", "window")
    shares = np.full((3, 2, 2, 2, 5), 0.5, np.float16)  # layers, rules, budgets, heads, queries
    shares[1, 0, :, 0] = 0.9
    rows = [f"novels{number}" for number in range(4)]
    for row in rows:
        losses = 3 + rng.random(2048).astype(np.float32)
        Measured(losses, ORIGIN, shares).save(work, DENSE, row)
        for rule, more in (("lse", 0.1), ("tile16", 0.2), ("window", 0.5), ("random", 0.0)):
            drift = more + 0.05 * rng.random() if more else 0.1 * rng.random()
            Measured(losses + np.float32(drift), ORIGIN).save(work, OURS._replace(rule=rule), row)
    plan = Plan(2048, 4096, (4, 8), 4, rules, 2048, 8)
    for name, gap in (("trained_sparse", 0.1), ("trained_dense", 0.3)):
        curve = [[0, [3.0, 4.0], [3.5, 4.5]], [50, [2.0, 3.0], [2.0 + gap, 3.0 + gap]]]
        (work / name).mkdir()
        (work / name / "training.json").write_text(json.dumps({"curve": curve}))
    report(work, dict.fromkeys(rows, lambda begin, end: 4 * (end - begin)), plan, tmp_path)
    (result,) = load(tmp_path)
    assert (result["machine"], result["date"]) == (ORIGIN["machine"], ORIGIN["date"])
    wins = {row.metric: row for row in result["rows"] if row.unit == "standard errors"}
    assert {row.met for name, row in wins.items() if "window" in name} == {True}
    assert {row.met for name, row in wins.items() if "random" in name} == {False}
    ours = next(row for row in result["rows"] if row.metric.startswith("2K tokens, all, InfLLM v2"))
    assert ours.ratio is not None
    assert ours.ratio < 1
    assert "+0.1" in ours.metric
    assert "n = 4" in ours.metric
    shared = [row for row in result["rows"] if row.metric.startswith("2K tokens, all, InfLLM v2, shared by 16")]
    assert [("+0.2" in row.metric, row.baseline_name) for row in shared] == [(True, "dense"), (False, "InfLLM v2")]
    gaps = [row.metric for row in result["rows"] if row.metric.startswith("held-out")]
    assert [("+0.5000" in gap, "+0.1000" in gap, "+0.3000" in gap) for gap in gaps] == [
        (True, False, False),
        (False, True, False),
        (True, False, False),
        (False, False, True),
        (False, False, False),
        (False, False, False),
    ]
    assert all("trained sparse, run dense: +0.0000" in gap for gap in gaps[4:])
    dense, ours = (line for line in markdown(Losses(work, {}), plan).splitlines()[2:4])
    assert dense.startswith("| dense | 3")
    assert ours.count("(+0.1") == 3
    with (tmp_path / "sparse_quality_shares.csv").open(newline="") as file:
        held = {(r["rule"], r["blocks"], r["layer"], r["head"]): float(r["share"]) for r in csv.DictReader(file)}
    assert held["lse", "4", "1", "0"] == pytest.approx(0.9, abs=1e-3)
    assert held["window", "8", "2", "1"] == 0.5
    for name in ("positions", "blocks", "shares_lse", "shares_window", "training"):
        assert (tmp_path / f"sparse_quality_{name}.svg").read_text().startswith("<svg")
