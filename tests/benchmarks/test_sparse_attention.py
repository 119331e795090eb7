"""What the measurement of sparse attention says of its own input."""

import jax
import numpy as np

from benchmarks import sparse_attention


def test_union_ratio_counts_each_block_once_and_no_absent_one():
    block_ids = np.array([[0, 1], [0, 2], [3, -1], [3, -1], [9, 9]])
    # {0, 1, 2} over lists of 2, and {3} over lists of 1; the fifth query fills no tile.
    assert sparse_attention.union_ratio(block_ids, 2) == (1.5 + 1.0) / 2


def test_drifting_has_unit_variance_and_half_the_correlation_after_64_tokens():
    x = np.asarray(sparse_attention.drifting(jax.random.key(1), 2000, 4, 64))[0]
    np.testing.assert_allclose(x.var(), 1.0, atol=0.03)
    np.testing.assert_allclose((x[64:] * x[:-64]).mean(), 0.5, atol=0.04)
