"""The formulas that choose what is compiled."""

import dataclasses
import math

import pytest

from cpm_jax.common.sharding import MeshConfig
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.model_size import train_flops_per_token
from cpm_jax.planning.analytic import FILL, attention_flops, candidates, guess, meshes, train_flops
from cpm_jax.planning.chips import parse_topology
from cpm_jax.planning.workload import Candidate, Workload

MINICPM4_8B = ModelConfig(
    vocab_size=73448, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=2, d_ff=16384, scale_emb=12.0
)
SPARSE_8B = dataclasses.replace(
    MINICPM4_8B, num_nextn_predict_layers=1, sparse_config=SparseConfig(), max_position_embeddings=131_072
)
V5P, V6E = parse_topology("v5p:8x8x8"), parse_topology("v6e:16x16")
TRAIN = Workload("train", MINICPM4_8B, 4096)


@pytest.mark.parametrize("num_mtp_layers", [0, 1])
def test_flops_are_those_of_model_flops_utilisation_but_for_attention_and_remat(num_mtp_layers):
    """6·N·tokens agrees with `train_flops_per_token`, which counts attention as the model needs it."""
    model = dataclasses.replace(MINICPM4_8B, num_nextn_predict_layers=num_mtp_layers)
    layers = 32 + num_mtp_layers
    needed = train_flops_per_token(model, 4096) - 6 * layers * 4096 * 4096
    attention = attention_flops(model, 4096)
    ours = train_flops(model, 4096, 1, "none") - attention.forward - attention.backward
    assert ours / 4096 == pytest.approx(needed, rel=1e-9)


def test_attention_in_blocks_is_half_of_all_pairs_and_the_diagonal():
    all_pairs = 2 * 2 * 32 * 32 * 4096**2 * 128
    attention = attention_flops(MINICPM4_8B, 4096)
    assert attention.forward == pytest.approx(all_pairs * 9 / 16)
    assert attention.backward == pytest.approx(7 / 2 * attention.forward)
    assert attention.selection == 0


def test_sparse_attention_by_hand():
    """33 layers; 4,096 tiles of 32 queries times 16 heads, for each of two key/value heads."""
    attention = attention_flops(SPARSE_8B, 131_072)
    union = math.ceil(2.2 * 96 / 8) * 8  # in groups of eight blocks
    # Tiles in the first blocks see no more than exist: tile n of two to a block sees n // 2 + 1.
    fewer = sum(union - math.ceil(min(n // 2 + 1, 2.2 * min(n // 2 + 1, 96)) / 8) * 8 for n in range(4096))
    keys = (4096 * union - fewer) * 64
    assert attention.forward == 33 * 2 * (2 * 2 * 32 * 16 * 128) * keys
    # Semantic kernels every 16 and every 64 tokens, a causal half, rounded up to whole chunks.
    kernels = 131_072 / 2 * (1 / 16 + 1 / 64)
    assert attention.selection == pytest.approx(33 * 2 * 32 * 128 * 131_072 * kernels, rel=0.1)
    # Five products for two; groups that are not full make it more.
    assert 2.5 < attention.backward / attention.forward < 2.8


def test_short_rows_of_a_sparse_model_are_dense():
    dense = dataclasses.replace(SPARSE_8B, sparse_config=None)
    assert attention_flops(SPARSE_8B, 8192) == attention_flops(dense, 8192)
    assert attention_flops(SPARSE_8B, 131_072).forward < attention_flops(dense, 131_072).forward / 4


def test_short_caches_of_a_sparse_model_are_dense():
    candidate = Candidate(MeshConfig(data=256, fsdp=1), 256)
    dense = dataclasses.replace(SPARSE_8B, sparse_config=None)
    short = [guess(Workload("decode", model, 8192), candidate, V6E) for model in (SPARSE_8B, dense)]
    assert short[0] == short[1]


def test_remat_repeats_no_selection():
    attention = attention_flops(SPARSE_8B, 131_072)
    none, dots = (train_flops(SPARSE_8B, 131_072, 1, remat) for remat in ("none", "dots"))
    assert dots - none == pytest.approx(attention.forward * 32 / 33)
    dense = dataclasses.replace(SPARSE_8B, sparse_config=None)
    densely = attention_flops(dense, 131_072)
    saved = densely.forward + densely.backward - attention.forward - attention.backward - attention.selection
    assert train_flops(dense, 131_072, 1, "none") - none == pytest.approx(saved)


def test_remat_costs_a_forward_pass_without_its_last_product():
    none, dots, full = (train_flops(MINICPM4_8B, 4096, 1, remat) for remat in ("none", "dots", "full"))
    assert dots - none == attention_flops(MINICPM4_8B, 4096).forward
    layer = 4096 * (2 * 4096 + 2 * 256 + 2 * 16384)
    assert full - dots == 2 * 32 * layer * 4096


def test_parameters_and_moments_by_hand():
    """16 bytes of each parameter, divided over 512 chips, are in every guess."""
    one = guess(TRAIN, Candidate(MeshConfig(data=1, fsdp=512), 512), V5P)
    eight = guess(TRAIN, Candidate(MeshConfig(data=8, fsdp=64), 512), V5P)
    assert eight.memory - one.memory == pytest.approx(16 * 8_185_253_888 * (1 / 64 - 1 / 512))


def test_meshes_multiply_to_the_chips_and_divide_the_model():
    found = meshes(TRAIN, V5P)
    assert all(m.data * m.fsdp * m.tensor * m.context == 512 for m in found)
    assert {m.tensor for m in found} == {1, 2, 4, 8}  # 16 does not divide the vocabulary
    assert all(m.fsdp == 1 for m in meshes(dataclasses.replace(TRAIN, kind="decode"), V6E))


def test_long_rows_are_divided_too():
    """Eight chips have a row of 128K where there are 64 rows for 512 chips; its heads are divided as often."""
    long = Workload("train", dataclasses.replace(SPARSE_8B, sparse_config=None), 131_072)
    found = meshes(long, V5P)
    assert {m.context for m in found} == {1, 2, 4, 8, 16}
    assert all(m.data * m.fsdp * m.tensor * m.context == 512 for m in found)
    assert all(32 % (m.tensor * m.context) == 0 for m in found)
    assert all(m.context == 1 for m in meshes(dataclasses.replace(long, seq_len=32_768), V5P))
    assert candidates(long, V5P, (64,), ("full",))[0].candidate.mesh.context > 1


def test_chosen_blocks_are_kept():
    """96 numbers of four bytes for each token, layer and key/value head, whatever is recomputed."""
    candidate = Candidate(MeshConfig(data=1, fsdp=64, context=8), 64)
    sparse, dense = (
        guess(Workload("train", model, 131_072), candidate, V5P)
        for model in (SPARSE_8B, dataclasses.replace(SPARSE_8B, sparse_config=None))
    )
    assert sparse.memory - dense.memory == pytest.approx(33 * 16_384 * 2 * 96 * 4)
    assert sparse.seconds < dense.seconds


def test_a_sparse_decoder_reads_its_blocks_and_the_kernels_to_choose_them_by():
    """Of 128K slots 96 blocks of 64; it holds the kernels beside keys and values."""
    candidate = Candidate(MeshConfig(data=256, fsdp=1), 256)
    dense, sparse = (
        guess(Workload("decode", model, 131_072), candidate, V6E)
        for model in (dataclasses.replace(SPARSE_8B, sparse_config=None), SPARSE_8B)
    )
    key = 32 * 2 * 128 * 2  # bytes of a token's keys in all layers
    saved = (dense.seconds - sparse.seconds) * V6E.chip.hbm_bandwidth / key
    # Kernels are read in whole chunks; block scores of a tile of queries are written.
    assert saved == pytest.approx(2 * (131_072 - 96 * 64) - 131_072 * (1 / 16 + 1 / 64), rel=0.02)
    assert sparse.memory - dense.memory == pytest.approx(1.5 * key * 131_072 * (1 / 16 + 1 / 64))


def test_candidates_fit_and_come_in_order_of_speed():
    found = candidates(TRAIN, V6E, (1024,), ("none", "dots", "full"))
    assert found
    assert all(g.memory <= FILL * V6E.chip.hbm_bytes for g in found)
    assert found[0].seconds <= 1.02 * min(g.seconds for g in found)
    assert all(g.candidate.batch_size % (g.candidate.mesh.data * g.candidate.mesh.fsdp) == 0 for g in found)


def test_parts_too_small_to_gather_come_after_those_that_are_not():
    """512 parts of 4,096 rows hold 8 each, less than a tile of bfloat16."""
    (best, *_) = candidates(TRAIN, V5P, (1024,), ("dots",))
    assert best.candidate.mesh.fsdp <= 128


def test_where_nothing_fits_those_that_need_least_come_first():
    tiny = parse_topology("v5e:2x2")
    found = candidates(TRAIN, tiny, (4,), ("full", "none"))
    assert found[0].memory > tiny.chip.hbm_bytes
    assert [g.memory for g in found] == sorted(g.memory for g in found)


def test_batches_that_no_mesh_divides():
    assert candidates(TRAIN, V5P, (3,), ("full",), [MeshConfig(data=1, fsdp=512)]) == []


def test_decoding_reads_weights_and_cache_once_a_token():
    decode = Workload("decode", MINICPM4_8B, 4096)
    topology = parse_topology("v6e:2x4")
    found = guess(decode, Candidate(MeshConfig(data=4, fsdp=1, tensor=2), 32), topology)
    weights = 2 * 8_185_253_888 / 2
    cache = 2 * 2 * 32 * 8 * 1 * 4096 * 128
    assert found.seconds == pytest.approx((weights + cache) / topology.chip.hbm_bandwidth, rel=0.1)
