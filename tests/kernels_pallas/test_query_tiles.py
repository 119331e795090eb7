"""How the GPU kernels lay queries out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.query_tiles import QueryTiles


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "tile", "heads_of_query"),
    [(32, 2, 64, 4, 16), (9, 3, 64, 16, 4), (4, 4, 64, 32, 1), (128, 1, 64, 1, 128), (6, 2, 16, 4, 4)],
)
def test_rows_are_queries_times_heads(heads, kv_heads, rows, tile, heads_of_query):
    q = jax.random.normal(jax.random.key(0), (2, 37, heads, 5))
    tiles = QueryTiles.of(q, kv_heads, rows)
    assert (tiles.tile, tiles.heads_of_query) == (tile, heads_of_query)
    laid = tiles.to_rows(q)
    assert laid.shape == tiles.shape(q.dtype, 5).shape
    # Query 36's second head of the last group, found by hand.
    group = heads // kv_heads
    row = 36 % tile * heads_of_query + min(1, group - 1)
    np.testing.assert_array_equal(laid[1, -1, 36 // tile, row], q[1, 36, heads - group + min(1, group - 1)])
    np.testing.assert_array_equal(tiles.from_rows(laid), q)
    assert int(tiles.query_of_row()[row]) == 36 % tile


def test_what_fills_the_last_tile_up():
    q = jnp.ones((1, 5, 3, 2))
    tiles = QueryTiles.of(q, 1, 16)  # 4 queries of 3 heads and an empty row each
    laid = tiles.to_rows(q)
    assert laid.shape == (1, 1, 2, 16, 2)
    assert laid.sum() == q.sum()
    positions = tiles.repeated(jnp.arange(5)[None], value=-1)
    np.testing.assert_array_equal(positions[0, 1], [4] * 4 + [-1] * 12)
