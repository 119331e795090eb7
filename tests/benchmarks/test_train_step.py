"""The benchmark of the training step compares like with like."""

import dataclasses

import numpy as np
import pytest

from benchmarks import train_step
from benchmarks.results import Benchmark


def write_moments(folder, **changes):
    moments = {"norm/scale": np.arange(1.0, 5.0), "embed_tokens/embedding": np.ones((3, 4))}
    for side in train_step.SIDES:
        np.savez(folder / f"{side}.npz", **moments | changes.get(side, {}))


def test_sides_that_differ_are_not_compared(tmp_path):
    losses = {side: [9.0, 8.5] for side in train_step.SIDES}
    write_moments(tmp_path)
    train_step.check_equal(losses, tmp_path)
    with pytest.raises(AssertionError, match="losses of compiled"):
        train_step.check_equal(losses | {"compiled": [9.0, 8.6]}, tmp_path)
    write_moments(tmp_path, eager={"norm/scale": np.arange(1.0, 5.0) * 1.001})
    with pytest.raises(ValueError, match=r"gradient of norm/scale differs by 1.0e-03 from that of eager"):
        train_step.check_equal(losses, tmp_path)
    write_moments(tmp_path, compiled={"lm_head/kernel": np.ones(2)})
    with pytest.raises(ValueError, match=r"compiled has other parameters: .*lm_head"):
        train_step.check_equal(losses, tmp_path)


@pytest.mark.slow
def test_measures_all_sides_on_the_same_model():
    """Gradients and losses of ours, PyTorch eager and compiled are equal, or `compare` raises."""
    small = dataclasses.replace(
        train_step.MODELS["15m"], vocab_size=300, num_layers=1, d_model=64, num_heads=4, num_kv_heads=2, d_ff=96
    )
    bench = Benchmark("train_step")
    train_step.compare(bench, "tiny", small, 32, tokens=64, repeats=2, threads=1)
    assert [row.goal for row in bench.rows] == [1.3, 1.0, None, None]
    assert all(row.ours > 0 and row.baseline > 0 for row in bench.rows)
