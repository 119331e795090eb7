"""Block selection against the paper's text token by token, and what must hold for any keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_selection.api import block_scores, document_starts, select_blocks
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.compress_keys.api import compress_keys
from tests.kernels_pallas.block_selection.by_hand import scores_by_hand, select_by_hand

IMPLEMENTATIONS = ["reference", "xla"]
SMALL = BlockSelection(kernel_size=4, kernel_stride=2, init_blocks=1, block_size=8, window_size=16, topk=3)
# No overlap at all, a kernel longer than a block, sizes that share no factor.
OTHERS = {
    "small": SMALL,
    "block_means": dataclasses.replace(SMALL, kernel_size=8, kernel_stride=8),
    "long_kernels": dataclasses.replace(SMALL, kernel_size=12, kernel_stride=4, block_size=8),
    "odd_kernels": dataclasses.replace(SMALL, kernel_size=5, kernel_stride=2, block_size=6, window_size=12),
    "two_initial": dataclasses.replace(SMALL, init_blocks=2, topk=4),
}


def inputs(length, heads=4, kv_heads=2, width=8, batch=1, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, length, heads, width)).astype(dtype)
    k = rng.normal(size=(batch, length, kv_heads, width)).astype(dtype)
    return jnp.asarray(2 * q), jnp.asarray(2 * k)


def kernels_of(k, selection, coarse=True):
    fine = compress_keys(k, kernel_size=selection.kernel_size, kernel_stride=selection.kernel_stride)
    if not coarse:
        return fine, None
    sizes = {"kernel_size": selection.coarse_kernel_size, "kernel_stride": selection.coarse_kernel_stride}
    return fine, compress_keys(k, **sizes)


def select(q, k, selection, coarse=True, **kwargs):
    return np.asarray(select_blocks(q, *kernels_of(k, selection, coarse), selection=selection, **kwargs))


def packed(lengths, batch=1):
    return jnp.asarray(np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].repeat(batch, 0).astype(np.int32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("lengths", [[67], [17, 8, 24, 20]])
def test_as_the_paper_says(implementation, name, coarse, lengths):
    selection = OTHERS[name]
    q, k = inputs(sum(lengths), batch=1)
    segments = packed(lengths) if len(lengths) > 1 else None
    kwargs = {"segment_ids": segments, "selection": selection, "implementation": implementation}
    got = block_scores(q, *kernels_of(k, selection, coarse), **kwargs)
    settings = dataclasses.asdict(selection)
    want = scores_by_hand(q, k, settings, None if segments is None else np.asarray(segments), coarse=coarse)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)

    chosen = np.asarray(select_blocks(q, *kernels_of(k, selection, coarse), **kwargs))
    starts = np.cumsum([0, *lengths])[:-1]
    for g in range(k.shape[2]):
        for t in range(q.shape[1]):
            first_block = max(s for s in starts if s <= t) // selection.block_size
            # 1 initial, the local ones, the rest by score: |I| in all.
            num_local = selection.window_size // selection.block_size
            blocks = select_by_hand(want[0, g, t], t, first_block, settings, num_local, selection.topk + num_local)
            assert [c for c in chosen[0, g, t] if c >= 0] == blocks, (g, t)
            assert list(chosen[0, g, t][len(blocks) :]) == [-1] * (chosen.shape[-1] - len(blocks))


def test_published_numbers():
    selection = BlockSelection()
    assert (selection.num_selected, selection.num_local) == (96, 32)
    assert (selection.pool_size, selection.kernels_per_block, selection.pool_padding) == (5, 4, 1)
    assert (selection.coarse_kernel_size, selection.coarse_kernel_stride) == (128, 64)
    assert (BlockSelection(variant="huggingface").num_selected, BlockSelection(variant="huggingface").num_local) == (
        96,
        33,
    )


def test_variants():
    q, k = inputs(120)
    paper, huggingface, cpm_cu = (
        select(q, k, dataclasses.replace(SMALL, variant=variant)) for variant in ("paper", "huggingface", "cpm_cu")
    )
    np.testing.assert_array_equal(paper, cpm_cu)
    assert not np.array_equal(paper, huggingface)
    own = np.arange(120) // 8
    for t in range(40, 120):  # five blocks of at least six visible
        for lists, local in ((paper, 2), (huggingface, 3)):
            assert lists.shape[-1] == 5
            for blocks in lists[0, :, t]:
                assert blocks[0] == 0
                assert list(blocks[-local:]) == list(range(own[t] - local + 1, own[t] + 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_equal_scores_the_lowest_block_wins(implementation):
    q, k = inputs(96)
    chosen = select(q, jnp.ones_like(k), SMALL, implementation=implementation)
    # 0 is initial, own and the one before are local, two more by score.
    for t in range(40, 96):
        own = t // 8
        assert chosen[0, 0, t].tolist() == [0, 1, 2, own - 1, own]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_future_does_not_matter(implementation):
    q, k = inputs(100)
    other = select(q, k.at[:, 61:].set(-k[:, 61:]), SMALL, implementation=implementation)
    chosen = select(q, k, SMALL, implementation=implementation)
    np.testing.assert_array_equal(chosen[:, :, :61], other[:, :, :61])
    assert not np.array_equal(chosen, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("coarse", [True, False])
def test_packed_documents_are_strangers(implementation, coarse):
    # 45 and 50 tokens: the second document begins within a block, the third (after 48 of both) on a boundary.
    lengths = [43, 53, 40]
    q, k = inputs(sum(lengths))
    segments = packed(lengths)
    chosen = select(q, k, SMALL, coarse, segment_ids=segments, implementation=implementation)
    for first, end in ((0, 43), (43, 96), (96, 136)):
        inside = np.zeros(136, bool)
        inside[first:end] = True
        strange = jnp.where(jnp.asarray(inside)[None, :, None, None], k, 7.0 - k)
        other = select(q, strange, SMALL, coarse, segment_ids=segments, implementation=implementation)
        np.testing.assert_array_equal(chosen[:, :, inside], other[:, :, inside])
        numbers = chosen[:, :, inside]
        assert numbers.max() == (end - 1) // 8
        assert numbers[numbers >= 0].min() == first // 8
    alone = select(q[:, 96:], k[:, 96:], SMALL, coarse, implementation=implementation)
    later = chosen[:, :, 96:]
    np.testing.assert_array_equal(np.where(later >= 0, later - 12, -1)[..., : alone.shape[-1]], alone)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_few_queries_at_given_positions(implementation):
    q, k = inputs(100, batch=2)
    whole = select(q, k, SMALL, implementation=implementation)
    positions = jnp.array([[3, 99, 64], [40, -1, 63]])
    some = jnp.take_along_axis(q, jnp.maximum(positions, 0)[:, :, None, None], axis=1)
    got = select(some, k, SMALL, query_positions=positions, implementation=implementation)
    for b in range(2):
        for i in range(3):
            place = int(positions[b, i])
            want = whole[b, :, place] if place >= 0 else np.full_like(whole[b, :, 0], -1)
            np.testing.assert_array_equal(got[b, :, i], want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, 3, 7, 8, 9])
def test_short_sequences_see_everything(implementation, length):
    q, k = inputs(length)
    chosen = select(q, k, SMALL, implementation=implementation)
    for t in range(length):
        assert [c for c in chosen[0, 0, t] if c >= 0] == list(range(t // 8 + 1))


def test_no_gradient_flows():
    q, k = inputs(60)

    def through(q, k):
        return block_scores(q, *kernels_of(k, SMALL), selection=SMALL)[..., 0].sum()

    dq, dk = jax.grad(through, argnums=(0, 1))(q, k)
    assert not dq.any()
    assert not dk.any()


def test_document_starts():
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3]])
    assert document_starts(segments).tolist() == [[0, 0, 2, 2, 2, 5, 5], [0] * 7]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 40}, "block_size = 40: must be a multiple of kernel_stride = 16"),
        ({"window_size": 100}, "window_size = 100: must be a multiple of block_size = 64"),
        ({"window_size": 0}, "window_size = 0: must be a multiple of block_size = 64, at least one block"),
        ({"kernel_size": 8}, "kernel_size = 8: must be at least kernel_stride = 16"),
        ({"kernel_stride": 0}, "kernel_stride = 0: must be at least 1"),
        ({"topk": 2, "init_blocks": 3}, "topk = 2: must be at least 1 and init_blocks = 3"),
        (
            {"topk": 1, "variant": "huggingface"},
            "topk = 1: must be above init_blocks = 1 with variant = 'huggingface', or no local block is left",
        ),
        ({"topk": 4.0}, "topk = 4.0: must be an int"),
        ({"block_size": None}, "block_size = None: must be an int"),
        ({"init_blocks": -1}, "init_blocks = -1: must be at least 0"),
        ({"variant": "nsa"}, "variant = 'nsa': must be one of 'paper', 'huggingface', 'cpm_cu'"),
    ],
)
def test_settings_that_cannot_work(fields, message):
    with pytest.raises(ValueError, match=message):
        BlockSelection(**fields)


def test_arguments_that_do_not_fit():
    q, k = inputs(64)
    fine, coarse = kernels_of(k, SMALL)
    with pytest.raises(ValueError, match="q has 3 heads: must be a multiple of the 2 key heads"):
        select_blocks(q[:, :, :3], fine, coarse, selection=SMALL)
    with pytest.raises(ValueError, match=r"k_compressed has shape \(1, 30, 2, 8\): 64 keys have \(1, 31, 2, 8\)"):
        select_blocks(q, fine[:, 1:], coarse, selection=SMALL)
    with pytest.raises(ValueError, match=r"k_coarse has shape \(1, 31, 2, 8\): 64 keys have \(1, 7, 2, 8\)"):
        select_blocks(q, fine, fine, selection=SMALL)
    with pytest.raises(ValueError, match=r"query_positions has shape \(1, 3\): must be \[B, T\] = \(1, 64\)"):
        select_blocks(q, fine, coarse, selection=SMALL, query_positions=jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"segment_ids has shape \(1, 5\) and q \(1, 64, 4, 8\): without query_pos"):
        select_blocks(q, fine, coarse, selection=SMALL, segment_ids=jnp.zeros((1, 5), jnp.int32))
    with pytest.raises(ValueError, match="implementation = 'cuda': must be None or one of 'reference'"):
        select_blocks(q, fine, coarse, selection=SMALL, implementation="cuda")
    with pytest.raises(ValueError, match=r"q has shape \(0, 64, 4, 8\): every size must be at least 1"):
        select_blocks(q[:0], fine[:0], coarse[:0], selection=SMALL)
    with pytest.raises(ValueError, match=r"k_compressed has shape \(1, 0, 8\): every size"):
        select_blocks(q, fine[:, :, :0], coarse[:, :, :0], selection=SMALL)
    with pytest.raises(ValueError, match="q is of int32: must be floats"):
        select_blocks(q.astype(jnp.int32), fine, coarse, selection=SMALL)
    with pytest.raises(ValueError, match="segment_ids is of float32: must be integers"):
        select_blocks(q, fine, coarse, selection=SMALL, segment_ids=jnp.zeros((1, 64)))


@pytest.mark.parametrize("topk", [2, 3])
def test_a_local_block_takes_no_place_of_an_initial_one(topk):
    selection = BlockSelection(4, 2, 1, 8, 16, topk, "huggingface")
    q, k = inputs(80)
    ids = np.asarray(select_blocks(q, *kernels_of(k, selection), selection=selection))
    own = np.arange(80) // 8
    assert (ids == own[None, None, :, None]).any(axis=-1).all()
    assert (ids == 0).any(axis=-1).all()
