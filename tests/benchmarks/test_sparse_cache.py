"""The measurement of prompts and tokens with a cache: that its sides do the same work, and that it resumes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import sparse_cache


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(sparse_cache, "LAYERS", {"tiny": (4, 2, 16)})
    monkeypatch.setattr(sparse_cache, "DECODE_CASES", (("tiny", 256),))
    monkeypatch.setattr(sparse_cache, "CHUNK", 64)
    monkeypatch.setattr(sparse_cache, "DECODE_REPEATS", 2)


@pytest.mark.parametrize("size", [1, 64])
def test_where_all_blocks_are_seen_both_sides_give_the_same(size):
    args = sparse_cache.inputs("tiny", 256)
    caches = sparse_cache.full_caches(*args[1:])
    new = [x[:, 150 : 150 + size] for x in args]
    ours, cache = sparse_cache.sparse(*new, jnp.int32(150), caches[0])
    np.testing.assert_allclose(ours, sparse_cache.dense(*new, jnp.int32(150), caches[1])[0], atol=1e-5)
    # What is written is what was there.
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(caches[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_cases_that_are_done_are_not_measured_again(tmp_path, monkeypatch):
    flags = ["--work", str(tmp_path / "work"), "--layers", "tiny", "--lengths", "256", "--directory", str(tmp_path)]
    sparse_cache.main(flags)
    first = json.loads((tmp_path / "sparse_cache.json").read_text())
    assert [row["baseline_name"] for row in first["rows"]] == [
        "our dense",
        "each query reads its own blocks",
        "our dense",
    ]
    assert all(row["ours"] > 0 for row in first["rows"])
    monkeypatch.setattr(sparse_cache, "times", None)
    sparse_cache.main(flags)
    assert json.loads((tmp_path / "sparse_cache.json").read_text())["rows"] == first["rows"]
