"""The cache in 8 and 4 bits against the float cache: exact where it can be, within half a step elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.modeling import kv_cache, quantized_cache
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.decoder import abstract_params, bind
from cpm_jax.modeling.kv_cache import DenseCache, attend_to_cache, init_cache
from cpm_jax.modeling.quantized_cache import QuantizedKVCache

GROUP, BLOCK = 4, 8
LENGTH, SLOTS = 20, 22  # five groups of tokens; room for 24
HEADS, KV_HEADS, SIZE = 4, 2, 16
LAYER = 1
LARGEST = {"int8": 127, "int4": 7}
DTYPES = [*LARGEST]


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_cache, "GROUP", GROUP)
    monkeypatch.setattr(kv_cache, "KEY_BLOCK", BLOCK)


def normal(number: int, seed: int) -> jax.Array:
    """Normal values; some channels are far from zero in every token, as those of keys are."""
    values = np.random.default_rng(seed).standard_normal((2, LENGTH, number, SIZE))
    return jnp.asarray(values + np.where(np.arange(SIZE) % 5 == 0, 20, 0), jnp.float32)


POSITIONS = np.broadcast_to(np.arange(LENGTH), (2, LENGTH))
QUERIES, KEYS, VALUES = normal(HEADS, 0), normal(KV_HEADS, 1), normal(KV_HEADS, 2)


def keys_on_the_grid(largest: int) -> jax.Array:
    """A middle and whole multiples of a step for each group and channel, the first two of them at the ends."""
    rng = np.random.default_rng(1)
    steps = rng.integers(-largest, largest + 1, (2, LENGTH // GROUP, GROUP, KV_HEADS, SIZE))
    steps[:, :, :2] = np.array([-largest, largest])[:, None, None]
    shared = (2, LENGTH // GROUP, 1, KV_HEADS, SIZE)
    keys = steps * 2.0 ** rng.integers(-9, -5, shared) + rng.integers(-100, 100, shared) / 64
    return jnp.asarray(keys.reshape(2, LENGTH, KV_HEADS, SIZE), jnp.float32)


def values_on_the_grid(largest: int) -> jax.Array:
    """Whole multiples of a step for each token and head, the largest among them."""
    rng = np.random.default_rng(2)
    steps = rng.integers(-largest, largest + 1, (2, LENGTH, KV_HEADS, SIZE))
    steps[..., 2] = largest
    return jnp.asarray(steps * 2.0 ** rng.integers(-3, 2, (*steps.shape[:-1], 1)), jnp.float32)


@jax.jit
def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, cache: DenseCache) -> tuple:
    return attend_to_cache(q, k, v, positions, cache, jnp.int32(LAYER))


@jax.jit
def write(k: jax.Array, v: jax.Array, positions: jax.Array, cache: DenseCache) -> DenseCache:
    return cache.write(k, v, positions, jnp.int32(LAYER))


def held(cache: DenseCache) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of the slots in use, [B, T, K, H]."""
    keys, values = (np.asarray(x).swapaxes(1, 2) for x in cache.read(LAYER, 0, LENGTH, jnp.dtype("float32")))
    return keys, values


@pytest.mark.usefixtures("small_groups")
class TestAgainstTheFloatCache:
    @pytest.fixture(params=DTYPES)
    def dtype(self, request: pytest.FixtureRequest) -> str:
        return request.param

    def test_what_the_format_can_hold_is_exact(self, tiny_config: ModelConfig, dtype: str) -> None:
        k, v = keys_on_the_grid(LARGEST[dtype]), values_on_the_grid(LARGEST[dtype])
        expected, _ = attend(QUERIES, k, v, POSITIONS, init_cache(tiny_config, 2, SLOTS))
        attended, cache = attend(QUERIES, k, v, POSITIONS, init_cache(tiny_config, 2, SLOTS, dtype))
        keys, values = held(cache)
        np.testing.assert_array_equal(keys, k)
        np.testing.assert_array_equal(values, v)
        np.testing.assert_allclose(attended, expected, rtol=1e-5, atol=1e-5)

    def test_other_values_are_within_half_a_step(self, tiny_config: ModelConfig, dtype: str) -> None:
        keys, values = held(write(KEYS, VALUES, POSITIONS, init_cache(tiny_config, 2, SLOTS, dtype)))
        # A step is half a channel's range, or the largest value, by the largest code; scales are bfloat16, and so is
        # the middle, whose rounding lengthens the range on one side.
        groups = np.asarray(KEYS).reshape(2, -1, GROUP, KV_HEADS, SIZE)
        reach = np.ptp(groups, axis=2, keepdims=True) / 2 + np.abs(groups).max(2, keepdims=True) * 2.0**-8
        key_error = np.abs(keys.reshape(groups.shape) - groups)
        value_error = np.abs(values - VALUES)
        largest_values = np.abs(VALUES).max(-1, keepdims=True)
        for error, step in ((key_error, reach / LARGEST[dtype]), (value_error, largest_values / LARGEST[dtype])):
            assert (error <= step / 2 * (1 + 2.0**-8) + 1e-6).all()
            assert (error > step / 4).any()
        # Weights are exact where keys are, and an average is no further off than what it is of.
        k = keys_on_the_grid(LARGEST[dtype])
        expected, _ = attend(QUERIES, k, VALUES, POSITIONS, init_cache(tiny_config, 2, SLOTS))
        attended, _ = attend(QUERIES, k, VALUES, POSITIONS, init_cache(tiny_config, 2, SLOTS, dtype))
        error = np.abs(attended - expected).max()
        assert error <= np.abs(VALUES).max() / LARGEST[dtype] / 2 * (1 + 2.0**-8)

    def test_codes_do_not_depend_on_chunks(self, tiny_config: ModelConfig, dtype: str) -> None:
        empty = init_cache(tiny_config, 2, SLOTS, dtype)
        whole = write(KEYS, VALUES, POSITIONS, empty)
        for chunks in ([7, 6, 7], [1] * LENGTH):
            cache, start = empty, 0
            for size in chunks:
                span = slice(start, start + size)
                cache = write(KEYS[:, span], VALUES[:, span], POSITIONS[:, span], cache)
                start += size
            jax.tree.map(np.testing.assert_array_equal, cache, whole)

    def test_a_row_is_read_as_it_is_alone(self, tiny_config: ModelConfig, dtype: str) -> None:
        """Rows of 13, 3 and no tokens and padding; single tokens follow in all, at their own positions."""
        width, lengths = 13, np.array([13, 3, 0])
        q, k, v = (jnp.concatenate([x, x[:1]]) for x in (QUERIES, KEYS, VALUES))
        real = np.arange(width) < lengths[:, None]
        given = [jnp.where(real[..., None, None], x[:, :width], 99.0) for x in (q, k, v)]
        empty, rows = init_cache(tiny_config, 3, SLOTS, dtype), np.arange(3)
        _, cache = attend(*given, np.where(real, np.arange(width), SLOTS), empty)
        for at in (lengths + step for step in range(LENGTH - width)):
            attended, cache = attend(*(x[rows, at][:, None] for x in (q, k, v)), at[:, None], cache)
        within = np.arange(LENGTH) <= at[:, None]
        whole = write(k, v, np.where(within, np.arange(LENGTH), SLOTS), empty)
        jax.tree.map(np.testing.assert_array_equal, cache, whole)
        keys, values = (np.repeat(x, HEADS // KV_HEADS, axis=2).astype(np.float64) for x in held(cache))
        scores = np.einsum("bnh,bsnh->bns", np.asarray(q)[rows, at], keys) / SIZE**0.5
        weights = np.exp(np.where(within[:, None], scores - scores.max(-1, keepdims=True), -np.inf))
        expected = np.einsum("bns,bsnh->bnh", weights / weights.sum(-1, keepdims=True), values)
        np.testing.assert_allclose(attended[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_positions_beyond_the_cache_are_not_written(tiny_config: ModelConfig) -> None:
    q, k, v = (jnp.asarray(x[:, :2]) for x in (QUERIES, KEYS, VALUES))
    empty = init_cache(tiny_config, 2, 4, "int4")
    assert isinstance(empty, QuantizedKVCache)
    assert empty.num_slots == quantized_cache.GROUP
    _, cache = attend_to_cache(q, k, v, jnp.array([[3, 4], [4, 5]]), empty, LAYER)
    assert np.argwhere(np.asarray(cache.key_scales, np.float32).any((2, 4))).tolist() == [[LAYER, 0, 0]]
    assert np.argwhere(np.asarray(cache.value_scales, np.float32).any(2)).tolist() == [[LAYER, 0, 3]]


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16), ("int8", 8), ("int4", 4)])
def test_bytes(dtype: str, bits: int) -> None:
    """Codes, a scale for each value of a head, scale and middle of each channel and group, and the last keys."""
    config = ModelConfig(vocab_size=8, num_layers=3, d_model=512, num_heads=4, num_kv_heads=2, d_ff=8)
    cache = jax.eval_shape(lambda: init_cache(config, 5, 64, dtype))
    per_head = 2 * 64 * 128 * bits
    if bits < 16:
        per_head += 64 * 16 + 64 // 32 * 128 * 2 * 16 + 32 * 128 * 16
    assert sum(leaf.size * leaf.dtype.itemsize * 8 for leaf in jax.tree.leaves(cache)) == 3 * 5 * 2 * per_head


@pytest.mark.parametrize(("dtype", "scan_layers", "new_tokens"), [("int8", True, 16), ("int4", False, 1)])
def test_no_program_holds_a_layer_of_the_cache_in_float(
    tiny_config: ModelConfig, dtype: str, scan_layers: bool, new_tokens: int
) -> None:
    """And codes are updated where they lie."""
    config = dataclasses.replace(tiny_config, scan_layers=scan_layers)
    cache = jax.eval_shape(lambda: init_cache(config, 2, 16_384, dtype))
    tokens = jax.ShapeDtypeStruct((2, new_tokens), jnp.int32)
    step = jax.jit(lambda p, t, at, cache: bind(config, p).decode(t, at, cache), donate_argnums=3)
    memory = step.lower(abstract_params(config), tokens, tokens, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    layer_in_float = 2 * 2 * config.num_kv_heads * cache.length * config.head_size * 4
    assert memory.temp_size_in_bytes < layer_in_float / 2


def test_sparse_attention_is_refused_where_it_applies(tiny_config: ModelConfig) -> None:
    sparse = SparseConfig(kernel_size=4, kernel_stride=2, block_size=4, window_size=8, topk=2, dense_len=32)
    config = dataclasses.replace(tiny_config, sparse_config=sparse)
    assert isinstance(init_cache(config, 1, 32, "int8"), QuantizedKVCache)
    with pytest.raises(ConfigError, match=r"cache_dtype = 'int8': a cache of 33 slots .*dense_len = 32"):
        init_cache(config, 1, 33, "int8")
