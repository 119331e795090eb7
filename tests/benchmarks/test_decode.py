import dataclasses

import pytest

from benchmarks import decode


def test_measures_both_sides_on_the_same_tokens(monkeypatch):
    small = dataclasses.replace(
        decode.MODEL, vocab_size=300, num_layers=1, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, d_ff=64
    )
    monkeypatch.setattr(decode, "MODEL", small)
    monkeypatch.setattr(decode, "REPEATS", 1)
    bench = decode.measure(new_tokens=4)
    assert [row.unit for row in bench.rows] == ["tokens/s"] * 2
    assert all(row.ours > 0 and row.baseline > 0 for row in bench.rows)


def test_sides_that_disagree_are_not_compared():
    with pytest.raises(ValueError, match="decode different tokens"):
        decode.best_times([lambda prompts, n: [1, 2], lambda prompts, n: [1, 3]], [[1]], 2)
