"""Rows, sums and the table of `sparse_quality`, on losses that are made up, and the texts' format."""

import json
import math
import struct
import zlib

import jax
import numpy as np
import pytest

from benchmarks import sparse_quality
from benchmarks.long_texts import r_character_vectors
from benchmarks.results import load
from benchmarks.sparse_quality_report import Cell, Estimate, Losses, Measured, Plan, report
from cpm_jax.inference.load import LoadedModel
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
    tokens = list(range(3 * (sparse_quality.LONG + 1) + 50))
    rows = sparse_quality.excerpts("novels", tokens)
    assert [row.name for row in rows] == ["novels0", "novels1", "novels2"]
    assert rows[0].tokens[0] == 0
    assert rows[-1].tokens[-1] == tokens[-1]
    together = np.concatenate([row.tokens for row in rows])
    assert len(set(together.tolist())) == len(together) == 3 * (sparse_quality.LONG + 1)
    with pytest.raises(ValueError, match="novels has 100 tokens"):
        sparse_quality.excerpts("novels", tokens[:100])


def test_every_cell_of_a_part_is_another():
    for part in sparse_quality.PARTS:
        cells = list(sparse_quality.cells(part))
        assert len(cells) == len(set(cells))


def test_a_dense_row_is_weighed_by_layer_rule_budget_head_and_query(monkeypatch, tmp_path):
    monkeypatch.setattr(sparse_quality, "LENGTH", 512)
    monkeypatch.setattr(sparse_quality, "WEIGHED_BUDGETS", (4, 8))
    monkeypatch.setattr(sparse_quality, "WEIGHED_POSITIONS", np.arange(300, 512, 30))
    sparse_quality.attention.cache_clear()
    config = ModelConfig(vocab_size=50, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, d_ff=32, dtype="float32")
    model = LoadedModel(config, init_params(config, jax.random.key(0)), None, 0, tmp_path)
    row = sparse_quality.Excerpt("novels", 0, np.arange(600, dtype=np.int32) % 50)
    dense = Cell("published", "dense", 0, 512, "plain")
    sparse_quality.measure(model, dense, row).save(tmp_path, dense, row.name)
    measured = Measured.load(tmp_path, dense, row.name)
    assert measured.losses.shape == (512,)
    assert measured.shares.shape == (3, len(sparse_quality.WEIGHED), 2, 4, 8)
    # Budgets ascend, and 8 blocks are all that a row of 512 has.
    assert (measured.shares[:, :, 0] < 0.999).all()
    np.testing.assert_allclose(measured.shares[:, :, 1], 1.0, atol=2e-3)
    window = sparse_quality.measure(model, Cell("published", "window", 4, 512, "plain"), row)
    assert window.shares is None
    np.testing.assert_allclose(window.losses[:256], measured.losses[:256], atol=1e-5)
    assert np.abs(window.losses[300:] - measured.losses[300:]).max() > 1e-4
    sparse_quality.attention.cache_clear()


def test_estimates_are_paired_by_row(tmp_path):
    rng = np.random.default_rng(0)
    for row, level in (("novels0", 1.0), ("novels1", 5.0), ("essays0", 3.0)):
        losses = level + rng.random(2048).astype(np.float32)
        Measured(losses).save(tmp_path, DENSE, row)
        if row != "essays0":
            Measured(losses + np.float32(0.25 * level)).save(tmp_path, OURS, row)
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
    Measured(np.full(2048, math.log(2), np.float32)).save(tmp_path, DENSE, "novels0")
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
        Measured(losses, shares).save(work, DENSE, row)
        for rule, more in (("lse", 0.1), ("window", 0.5), ("random", 0.0)):
            drift = more + 0.05 * rng.random() if more else 0.1 * rng.random()
            Measured(losses + np.float32(drift)).save(work, OURS._replace(rule=rule), row)
    plan = Plan(2048, 4096, (4, 8), 4, rules, 2048, 8)
    report(work, dict.fromkeys(rows, lambda begin, end: 4 * (end - begin)), plan, tmp_path)
    (result,) = load(tmp_path)
    wins = {row.metric: row for row in result["rows"] if row.unit == "standard errors"}
    assert {row.met for name, row in wins.items() if "window" in name} == {True}
    assert {row.met for name, row in wins.items() if "random" in name} == {False}
    ours = next(row for row in result["rows"] if row.metric.startswith("2K tokens, all, InfLLM v2"))
    assert ours.ratio is not None
    assert ours.ratio < 1
    assert "+0.1" in ours.metric
    assert "n = 4" in ours.metric
    held = json.loads((tmp_path / "sparse_quality" / "shares.json").read_text())
    assert held["lse, 4 blocks"][1][0] == pytest.approx(0.9, abs=1e-3)
    assert held["window, 8 blocks"][2][1] == 0.5
    for name in ("positions", "blocks", "shares_lse", "shares_window"):
        assert (tmp_path / f"sparse_quality_{name}.svg").read_text().startswith("<svg")
