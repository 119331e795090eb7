"""What the TPU kernels are declared to cost, against closed forms and a loop over tiles."""

import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from benchmarks.results import RESULTS_DIR
from kernels_pallas.attention import costs as dense
from kernels_pallas.attention.arg_specs import ARG_SPECS as DENSE_SPECS
from kernels_pallas.block_selection import costs as selecting
from kernels_pallas.block_selection import pallas_tpu as selecting_tpu
from kernels_pallas.block_selection.arg_specs import ARG_SPECS as SELECTION_SPECS
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.block_sparse_attention import costs as sparse
from kernels_pallas.block_sparse_attention import pallas_tpu as sparse_tpu
from kernels_pallas.block_sparse_attention.arg_specs import ARG_SPECS, ArgSpec
from kernels_pallas.block_sparse_attention.tuned_block_sizes import TILE
from kernels_pallas.sparse_decode_attention import costs as decoding
from kernels_pallas.sparse_decode_attention import pallas_tpu as decoding_tpu
from kernels_pallas.sparse_decode_attention.arg_specs import ARG_SPECS as DECODE_SPECS

LONG = ARG_SPECS["minicpm4_8b_128k"]
# Of 128K tokens and 32 heads of 128: one product of all queries with the keys before them.
HALF = 32 * 128 * 131_072**2


def test_splash_attention_multiplies_the_causal_half():
    spec = DENSE_SPECS["minicpm4_8b_32k"]
    half = 32 * 128 * 32_768**2
    assert dense.forward_cost(spec).flops == pytest.approx(2 * half, rel=0.02)
    assert [cost.flops / half for cost in dense.backward_costs(spec)] == pytest.approx([3, 4], rel=0.02)
    # 64 blocks of 512 on each side; 32 heads read 2 x 512 x 128 numbers for each of the 64·65/2 pairs.
    pairs, row = 64 * 65 // 2, 2 * 128
    assert dense.forward_cost(spec).flops == 32 * pairs * 512**2 * 4 * 128
    assert dense.forward_cost(spec).bytes_accessed == 32 * (pairs * 2 * 512 * row + 32_768 * (2 * row + 4))


def test_blocks_of_two_sizes():
    assert dense.causal_pairs(1024, 256, 512) == 1 + 1 + 2 + 2
    assert dense.causal_pairs(1024, 512, 256) == 2 + 4


def test_selection_multiplies_fine_and_coarse_kernels():
    # One kernel in 16 tokens and one in 64, for the causal half; whole chunks beyond the queries make it a little more.
    spec = SELECTION_SPECS["minicpm4_8b_128k"]
    scores, ranking = selecting.selection_costs(spec)
    assert scores.flops == pytest.approx(HALF * (1 / 16 + 1 / 64), rel=0.1)
    assert scores.flops >= HALF * (1 / 16 + 1 / 64)
    assert ranking.flops == 0
    q, k_compressed, k_coarse, _ = spec.abstract_args()
    block_scores = 4 * spec.num_kv_heads * spec.seq_len * spec.seq_len // BlockSelection().block_size
    once = sum(math.prod(x.shape) * 2 for x in (q, k_compressed, k_coarse)) + block_scores
    assert once < scores.bytes_accessed < 1.5 * once


def test_selection_in_parts_costs_what_the_row_does():
    spec = SELECTION_SPECS["minicpm4_8b_32k"]
    one, row = selecting.scores_cost(spec, 2048), selecting.scores_cost(spec, spec.seq_len)
    assert 16 * one.flops == pytest.approx(row.flops)
    exact = selecting.scores_cost(spec, spec.seq_len, lse_approximation=False)
    assert exact.flops / row.flops == pytest.approx((2 / 16) / (1 / 16 + 1 / 64), rel=0.1)


@pytest.mark.parametrize("ratio", [1.0, 1.7])
def test_sparse_attention_reads_each_union_in_whole_groups(ratio):
    spec = ARG_SPECS["minicpm4_8b_32k"]
    blocks = 0
    for last in range(31, spec.seq_len, 32):
        visible = last // 64 + 1
        blocks += math.ceil(min(visible, ratio * min(visible, 96)) / 8) * 8
    keys = blocks * 64 * spec.num_kv_heads
    entries = 512 + 8
    tables = spec.num_kv_heads * spec.seq_len // 32 * 3 * entries * 4
    rows = spec.seq_len * spec.num_heads * (2 * 128 * 2 + 4)
    forward = sparse.forward_cost(spec, ratio)
    assert forward.bytes_accessed == keys * 2 * 128 * 2 + tables + rows
    assert forward.flops == 4 * 32 * 16 * 128 * keys
    # Five products where the forward pass has two, in smaller groups and for one range of keys after another.
    backward = sparse.backward_cost(spec, ratio)
    assert 2.4 * forward.flops < backward.flops < 2.8 * forward.flops
    sums = spec.seq_len * spec.num_heads * 128 * 4
    assert backward.bytes_accessed > 2 * sums


def test_union_ratios_are_those_measured():
    """On SmolLM2, to a digit after the point, at the shares of blocks that 32K and 128K tokens have."""
    rows = json.loads((RESULTS_DIR / "sparse_roofline.json").read_text("utf-8"))["rows"]
    form = rf"union of {TILE} queries over one query's blocks, SmolLM2, (\d+) of (\d+) blocks"
    found = ((re.match(form, row["metric"]), row["ours"]) for row in rows)
    measured = {int(match[1]) / int(match[2]): round(ratio, 1) for match, ratio in found if match}
    assert dict(sparse.UNION_RATIOS) == measured
    at_32k, at_128k = measured[96 / 512], measured[96 / 2048]
    assert sparse.union_ratio(96, 512) == sparse.union_ratio(96, 128) == at_32k
    assert sparse.union_ratio(96, 1024) == sparse.union_ratio(96, 2048) == sparse.union_ratio(96, 4096) == at_128k
    assert sparse.forward_cost(LONG) == sparse.forward_cost(LONG, at_128k)


def declared(function, *args) -> dict[str, tuple[int, int]]:
    """FLOPs and bytes that the kernels of a program are declared to cost, by name, each call once."""
    found = {}

    def walk(jaxpr) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                cost = eqn.params["cost_estimate"]
                found[eqn.params["name"]] = cost.flops, cost.bytes_accessed
            else:
                for inner in jaxprs_in_params(eqn.params):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def test_the_kernels_are_declared_with_these_costs():
    spec = ARG_SPECS["minicpm4_8b_4k"]
    *qkv, ids, segments = spec.abstract_args()

    def loss(q, k, v, ids, segments):
        return sparse_tpu.block_sparse_attention(q, k, v, ids, segments, 64, 1.0)[0].astype(jnp.float32).sum()

    costs = declared(jax.grad(loss), *qkv, ids, segments)
    # All 64 blocks are chosen at 4K.
    counted = ArgSpec(1, 4096, 32, 2, 128, num_selected=64)
    for name, cost in (("forward", sparse.forward_cost(counted)), ("backward", sparse.backward_cost(counted))):
        assert costs[f"block_sparse_attention_{name}"] == (cost.flops, cost.bytes_accessed)


def test_a_part_of_the_queries_costs_its_share():
    """As on a context axis, where every device has some queries and all keys."""
    spec = ARG_SPECS["minicpm4_8b_32k"]
    whole, part = sparse.forward_cost(spec), sparse.forward_cost(spec, share=1 / 8)
    assert 8 * part.flops == pytest.approx(whole.flops)
    assert 8 * part.bytes_accessed == pytest.approx(whole.bytes_accessed)
    whole, part = sparse.backward_cost(spec), sparse.backward_cost(spec, share=1 / 8)
    assert 8 * part.flops == pytest.approx(whole.flops)
    keys = 4 * spec.num_kv_heads * spec.seq_len * 2 * 128  # read and written whole by each
    assert part.bytes_accessed > whole.bytes_accessed / 8 + 7 / 8 * keys

    q, k, v, ids, segments = spec.abstract_args()
    q, ids = (jax.ShapeDtypeStruct(s, x.dtype) for s, x in (((1, 4096, 32, 128), q), ((1, 2, 4096, 96), ids)))
    positions = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def loss(q, k, v, ids, segments, positions):
        out, _ = sparse_tpu.block_sparse_attention(q, k, v, ids, segments, 64, 1.0, positions)
        return out.astype(jnp.float32).sum()

    costs = declared(jax.grad(loss), q, k, v, ids, segments, positions)
    assert costs["block_sparse_attention_backward"] == (part.flops, part.bytes_accessed)


def test_selection_is_declared_with_its_cost_for_each_span():
    spec = SELECTION_SPECS["minicpm4_8b_4k"]
    q, fine, coarse, _ = spec.abstract_args()
    positions = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def select(q, fine, coarse, positions, starts):
        return selecting_tpu.select_blocks(q, fine, coarse, 1.0, spec.selection, positions, starts, 64)

    costs = declared(select, q, fine, coarse, positions, positions)
    one = selecting.scores_cost(spec, 2048)
    assert costs["block_selection_scores"] == (one.flops, one.bytes_accessed)


def test_decoding_reads_the_blocks_of_each_key_head_once():
    """96 blocks of 64 for each of two heads, in whole steps of 8: however long the cache is."""
    cost = decoding.decode_cost(DECODE_SPECS["minicpm4_8b_128k"])
    assert cost == decoding.decode_cost(DECODE_SPECS["minicpm4_8b_32k"])
    keys = 96 * 64
    assert cost.flops == 2 * 2 * 32 * 128 * keys
    assert cost.bytes_accessed == 2 * (2 * 128 * 2 * keys + 4 * 96) + 2 * 32 * 128 * 2
    # 24 blocks in three steps; 5 blocks of 16 in one, though it could hold more.
    assert decoding.decode_cost(DECODE_SPECS["smollm2_135m_8k"]).flops == 4 * 4 * 9 * 64 * (24 * 64)
    assert decoding.blocks_per_step(16, 5) == 5


@pytest.mark.parametrize("name", ["minicpm4_8b_32k", "minicpm4_8b_32k_paged", "odd_tiny"])
def test_decoding_is_declared_with_its_cost(name):
    spec = DECODE_SPECS[name]

    def attend(q, k, v, ids, positions, table=None):
        args = q, k[None], v[None], ids, positions, 0, table, spec.block_size, 1.0
        return decoding_tpu.sparse_decode_attention(*args)

    cost = decoding.decode_cost(spec)
    assert declared(attend, *spec.abstract_args())["sparse_decode_attention"] == (cost.flops, cost.bytes_accessed)
