"""Cached decoding on the device: chunked prefill, then many tokens per call in one compiled loop.

All shapes are static. Prompts are padded on the right, and slot p of the cache belongs to position p; padding gets
positions beyond the cache, where nothing is written. Rows never see each other.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from cpm_jax.common.config import ConfigError
from cpm_jax.inference.sampling import SamplingConfig, sample, sequence_keys
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params, bind
from cpm_jax.modeling.kv_cache import Cache, CacheDType, init_cache

NO_TOKEN = -1
SMALLEST_CACHE = 128
PREFILL_CHUNKS = (512, 256, 32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch of sequences under way.

    Attributes:
        cache: keys and values of all positions before `positions`.
        tokens: last token of each sequence, not yet in the cache.
        positions: its position.
        limits: length at which each sequence ends, prompt included.
        finished: sequences that get no more tokens.
        keys: random key of each sequence.
        seen: tokens that occur in each sequence; None without a repetition penalty.
    """

    cache: Cache
    tokens: Int[Array, " B"]
    positions: Int[Array, " B"]
    limits: Int[Array, " B"]
    finished: Bool[Array, " B"]
    keys: Key[Array, " B"]
    seen: Bool[Array, "B V"] | None


def cache_length(config: ModelConfig, length: int) -> int:
    """Number of cache slots for sequences of up to `length` tokens: a power of two, so that few programs are compiled.

    It never exceeds max_position_embeddings, nor, as long as the sequences do not, a length above which the model
    computes in another way (LongRoPE's factors, dynamic NTK's base, sparse attention): it goes by the length of the
    cache.

    Raises:
        ConfigError: such sequences are longer than the model's context.
    """
    if length > config.max_position_embeddings:
        raise ConfigError(
            f"a cache for sequences of {length} tokens: must be at most ModelConfig.max_position_embeddings = "
            f"{config.max_position_embeddings}",
            field="ModelConfig.max_position_embeddings",
        )
    slots = max(SMALLEST_CACHE, 1 << (length - 1).bit_length())
    switches = (switch for switch in config.switch_lengths if length <= switch)
    return min(slots, config.max_position_embeddings, *switches)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _prefill(
    params: Params,
    tokens: Int[Array, "B C"],
    lengths: Int[Array, " B"],
    start: Int[Array, ""],
    cache: Cache,
    *,
    config: ModelConfig,
) -> Cache:
    positions = start + jnp.arange(tokens.shape[1])
    positions = jnp.where(positions < lengths[:, None], positions, cache.length)
    return bind(config, params).decode(tokens, positions, cache)[1]


def start(
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    config: ModelConfig,
    sampling: SamplingConfig,
    max_new_tokens: int,
    seed: int,
    indices: Sequence[int],
    cache_dtype: CacheDType = "",
    prefill_chunks: Sequence[int] = PREFILL_CHUNKS,
) -> DecodeState:
    """Writes all but the last token of each prompt into a new cache, a chunk of positions per call.

    Args:
        params: parameters of the model.
        prompts: token ids, at least one each.
        config: the model.
        sampling: decides whether the tokens seen are kept.
        max_new_tokens: most tokens that a sequence gets.
        seed: of the random keys.
        indices: index of each sequence among all prompts of the run, for its random key.
        cache_dtype: what keys and values are held in; "" is the compute dtype.
        prefill_chunks: sizes of chunks, from large to small: a call takes the largest that is more than half filled,
            else the last. None is larger than the cache.

    Returns:
        The state from which `extend` goes on with the last token of each prompt.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    slots = cache_length(config, int(lengths.max()) + max_new_tokens)
    tokens = np.zeros((len(prompts), int(lengths.max()) + prefill_chunks[0]), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    cache = init_cache(config, len(prompts), slots, cache_dtype)
    first, end = 0, int(lengths.max()) - 1
    while first < end:
        size = min(next((size for size in prefill_chunks if size < 2 * (end - first)), prefill_chunks[-1]), slots)
        cache = _prefill(params, tokens[:, first : first + size], lengths - 1, np.int32(first), cache, config=config)
        first += size
    seen = None
    if sampling.repetition_penalty != 1:
        seen = np.zeros((len(prompts), config.vocab_size), bool)
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
    return DecodeState(
        cache=cache,
        tokens=jnp.asarray(tokens[np.arange(len(prompts)), lengths - 1]),
        positions=jnp.asarray(lengths - 1),
        limits=jnp.asarray(lengths + max_new_tokens),
        finished=jnp.zeros(len(prompts), bool),
        keys=sequence_keys(seed, jnp.asarray(indices, jnp.int32)),
        seen=None if seen is None else jnp.asarray(seen),
    )


@functools.partial(jax.jit, static_argnames=("num_tokens", "config", "sampling"), donate_argnames="state")
def extend(
    params: Params,
    state: DecodeState,
    eos_ids: Int[Array, " E"],
    *,
    num_tokens: int,
    config: ModelConfig,
    sampling: SamplingConfig,
) -> tuple[DecodeState, Int[Array, "B num_tokens"]]:
    """Gives every unfinished sequence up to `num_tokens` more tokens, in one `lax.while_loop`.

    A sequence finishes with a token of `eos_ids` or at its limit; the loop ends early when all have.

    Args:
        params: parameters of the model.
        state: is consumed: its buffers are reused for the new state.
        eos_ids: tokens that end a sequence.
        num_tokens: most tokens per call.
        config: the model.
        sampling: the distribution to draw from.

    Returns:
        The new state, and the new tokens with the one of `eos_ids` included; NO_TOKEN fills the rest.
    """
    decoder = bind(config, params)
    batch = jnp.arange(state.tokens.shape[0])

    def unfinished(carry: tuple[Array, DecodeState, Array]) -> Array:
        step, state, _ = carry
        return (step < num_tokens) & ~state.finished.all()

    def one_token(carry: tuple[Array, DecodeState, Array]) -> tuple[Array, DecodeState, Array]:
        step, state, new_tokens = carry
        hidden, cache = decoder.decode(state.tokens[:, None], state.positions[:, None], state.cache)
        positions = state.positions + 1
        drawn = sample(decoder.logits(hidden)[:, 0], state.seen, state.keys, positions, sampling)
        drawn = jnp.where(state.finished, state.tokens, drawn)
        new_tokens = new_tokens.at[:, step].set(jnp.where(state.finished, NO_TOKEN, drawn))
        state = DecodeState(
            cache=cache,
            tokens=drawn,
            positions=jnp.where(state.finished, state.positions, positions),
            limits=state.limits,
            finished=state.finished | jnp.isin(drawn, eos_ids) | (positions + 1 >= state.limits),
            keys=state.keys,
            seen=None if state.seen is None else state.seen.at[batch, drawn].set(True),
        )
        return step + 1, state, new_tokens

    new_tokens = jnp.full((state.tokens.shape[0], num_tokens), NO_TOKEN, jnp.int32)
    _, state, new_tokens = jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), state, new_tokens))
    return state, new_tokens
