"""How the GPU kernels lay queries out: tiles of consecutive queries, whose rows are queries times heads of a group."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

# One bit of an int32 for each query of a tile.
MAX_TILE = 32


class QueryTiles(NamedTuple):
    """The rows of a program: R = Q queries times the heads of a group, filled up to a power of two.

    Attributes:
        batch: B.
        length: T.
        kv_heads: K.
        group: query heads of a key/value head.
        tile: Q, a power of two.
        heads_of_query: rows of a query.
    """

    batch: int
    length: int
    kv_heads: int
    group: int
    tile: int
    heads_of_query: int

    @classmethod
    def of(cls, q: Float[Array, "B T N H"], kv_heads: int, rows: int) -> "QueryTiles":
        """Tiles of about `rows` rows, a power of two."""
        batch, length, heads, _ = q.shape
        group = heads // kv_heads
        heads_of_query = 1 << (group - 1).bit_length()
        return cls(batch, length, kv_heads, group, min(max(rows // heads_of_query, 1), MAX_TILE), heads_of_query)

    @property
    def rows(self) -> int:
        """R."""
        return self.tile * self.heads_of_query

    @property
    def number(self) -> int:
        """M, how many tiles there are."""
        return math.ceil(self.length / self.tile)

    def batch_and_head(self, index: Any) -> tuple[Any, Any]:
        """Of an index into B·K."""
        return lax.div(index, self.kv_heads), lax.rem(index, self.kv_heads)

    def block_spec(self, *width: int) -> pl.BlockSpec:
        """The rows of a program's tile; the grid begins with M and B·K."""
        return pl.BlockSpec(
            (None, None, None, self.rows, *width),
            lambda m, h, *_: (*self.batch_and_head(h), m, 0, *[0] * len(width)),
        )

    def shape(self, dtype: Any, *width: int) -> jax.ShapeDtypeStruct:
        """[B, K, M, R, ...]."""
        return jax.ShapeDtypeStruct((self.batch, self.kv_heads, self.number, self.rows, *width), dtype)

    def fill(self, x: Array, axis: int, value: int = 0) -> Array:
        """Fills the last tile up along the axis of queries."""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, self.number * self.tile - self.length)
        return jnp.pad(x, padding, constant_values=value)

    def to_rows(self, x: Array) -> Array:
        """[B, T, N, ...] -> [B, K, M, R, ...]."""
        width = x.shape[3:]
        x = self.fill(x, axis=1).reshape(self.batch, self.number, self.tile, self.kv_heads, self.group, *width)
        padding = [(0, 0)] * x.ndim
        padding[4] = (0, self.heads_of_query - self.group)
        x = jnp.moveaxis(jnp.pad(x, padding), 3, 1)  # [B, K, M, Q, G', ...]
        return x.reshape(self.batch, self.kv_heads, self.number, self.rows, *width)

    def from_rows(self, x: Array) -> Array:
        """[B, K, M, R, ...] -> [B, T, N, ...]."""
        width = x.shape[4:]
        x = x.reshape(self.batch, self.kv_heads, -1, self.heads_of_query, *width)[:, :, : self.length, : self.group]
        return jnp.moveaxis(x, 1, 2).reshape(self.batch, self.length, self.kv_heads * self.group, *width)

    def repeated(self, x: Array, value: int) -> Array:
        """[B, T] -> [B, M, R], the same for all heads; `value` for the queries that fill the last tile."""
        x = jnp.repeat(self.fill(x.astype(jnp.int32), axis=1, value=value), self.heads_of_query, axis=1)
        return x.reshape(self.batch, self.number, self.rows)

    def query_of_row(self) -> Array:
        """[R], for use in a kernel."""
        return lax.div(jnp.arange(self.rows), self.heads_of_query)
