"""What the context axis exchanges, counted by hand for one row of 128K tokens of MiniCPM4-8B."""

import dataclasses

import pytest

from cpm_jax.common.sharding import MeshConfig
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.planning.exchange import attention_exchange, exchange_of, shard_share
from cpm_jax.planning.workload import Candidate, Workload

DENSE = ModelConfig(
    vocab_size=73448,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=2,
    d_ff=16384,
    max_position_embeddings=131_072,
)
SPARSE = dataclasses.replace(DENSE, sparse_config=SparseConfig())
MIB = 2**20


def test_a_head_for_each_chip():
    """On 8 chips: queries and values of 16K tokens, 32 heads of 128 in bfloat16, go two chips far on average."""
    found = attention_exchange(SPARSE, 131_072, 1, MeshConfig(1, 1, 1, 8))
    queries = 16_384 * 32 * 128 * 2
    assert found.tokens_for_heads == 2 * queries * 2 * 7 / 8
    # Two heads of keys and values of the whole row, 128 MiB, of which an eighth is there.
    assert found.heads_whole == found.keys_whole == 128 * MIB * 7 / 8
    assert found.chosen_blocks == pytest.approx(shard_share(96 * 64 / 131_072) * found.keys_whole)
    # Sixteen heads share keys and values: to exchange those alone is less, and sparse attention does.
    assert found.now == found.keys_whole < (found.tokens_for_heads + found.heads_whole) / 4


def test_chosen_blocks_are_those_of_other_chips():
    """At 128K 54% of all blocks are needed, of which 25% are the last quarter's own: 29 of the other 75."""
    assert shard_share(96 / 2048) == pytest.approx(29 / 75)
    assert shard_share(96 / 512) == pytest.approx(54 / 75)
    assert shard_share(96 / 8192) == shard_share(96 / 2048)


def test_tensor_parts_hold_one_key_head_each():
    found = attention_exchange(SPARSE, 131_072, 1, MeshConfig(1, 1, 2, 4))
    assert found.keys_whole == 64 * MIB * 3 / 4
    assert found.tokens_for_heads == 2 * (32_768 * 16 * 128 * 2) * 3 / 4


def test_key_heads_that_the_axis_divides_are_exchanged_like_queries():
    eight = dataclasses.replace(DENSE, num_kv_heads=8)
    found = attention_exchange(eight, 131_072, 1, MeshConfig(1, 1, 1, 4))
    assert found.heads_whole == 2 * (32_768 * 8 * 128 * 2) * 3 / 4
    assert found.keys_whole == 4 * found.heads_whole
    assert found.chosen_blocks is None
    assert found.now == found.tokens_for_heads + found.heads_whole


def test_only_divided_rows_exchange():
    workload = Workload("train", SPARSE, 131_072)
    assert exchange_of(workload, Candidate(MeshConfig(1, 64, 8), 64)) is None
    one = exchange_of(workload, Candidate(MeshConfig(1, 64, 1, 8), 64))
    assert one == attention_exchange(SPARSE, 131_072, 1, MeshConfig(1, 64, 1, 8))
    assert exchange_of(workload, Candidate(MeshConfig(1, 64, 1, 8), 128, num_microbatches=2)) == one
