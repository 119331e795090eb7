"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p and the draw.

The processors and their order are those of Hugging Face `transformers`, so that settings published with a model mean
the same here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
from pydantic import Field, NonNegativeInt

from cpm_jax.common.config import config_dataclass


@config_dataclass
class SamplingConfig:
    """The distribution that the next token is drawn from.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token (top_k, top_p and min_p then have no effect).
        top_k: keeps the k most probable tokens; 0 keeps all.
        top_p: keeps the smallest set of most probable tokens with at least this probability (nucleus sampling, Holtzman
            et al. 2020); 1 keeps all.
        min_p: keeps tokens with at least this fraction of the highest probability (Nguyen et al. 2024); 0 keeps all.
        repetition_penalty: divides positive logits, and multiplies negative ones, of the tokens that already occur in
            the prompt or in the output (Keskar et al. 2019, CTRL); 1 is none.
    """

    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    top_k: NonNegativeInt = 0
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)


def apply_repetition_penalty(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float
) -> Float[Array, "B V"]:
    """Makes the tokens marked in `seen` less likely: logit / penalty where positive, logit · penalty where negative."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def apply_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Sets all but the k largest logits to -inf; ties with the k-th stay."""
    smallest_kept = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < smallest_kept, -jnp.inf, logits)


def apply_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keeps the smallest set of most probable tokens whose probabilities add up to p or more; the rest becomes -inf.

    Of equally probable tokens the smaller ids are kept first; the most probable token always stays.
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    drop = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, mass_before >= p, axis=-1, inplace=False)
    return jnp.where(drop, -jnp.inf, logits)


def apply_min_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Sets the logits of tokens less probable than p times the most probable one to -inf."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.where(probabilities < p * probabilities.max(axis=-1, keepdims=True), -jnp.inf, logits)


def process_logits(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, config: SamplingConfig
) -> Float[Array, "B V"]:
    """Applies repetition penalty, temperature, top-k, top-p and min-p, in that order, as far as they are switched on.

    Args:
        logits: float32.
        seen: which tokens occur in each sequence so far; may be None when there is no repetition penalty.
        config: what to apply; with temperature 0 only the repetition penalty is.

    Returns:
        The unnormalised log-probabilities to draw from, float32, -inf for the tokens that are ruled out.
    """
    if config.repetition_penalty != 1:
        if seen is None:
            raise ValueError("a repetition penalty needs `seen`, the tokens that occur in each sequence")
        logits = apply_repetition_penalty(logits, seen, config.repetition_penalty)
    if config.temperature == 0:
        return logits
    logits = logits / config.temperature
    if config.top_k:
        logits = apply_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = apply_top_p(logits, config.top_p)
    if config.min_p:
        logits = apply_min_p(logits, config.min_p)
    return logits


def sequence_keys(seed: Int[Array, ""] | int, sequence_indices: Int[Array, " B"]) -> Key[Array, " B"]:
    """One random key per sequence, made from the seed and the index of the sequence among all prompts of the run."""
    # The generator is named so that a changed default does not change anyone's samples.
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, sequence_indices)


def sample(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    keys: Key[Array, " B"],
    positions: Int[Array, " B"],
    config: SamplingConfig,
) -> Int[Array, " B"]:
    """Draws the next token of each sequence.

    The draw depends on the sequence's key and on the position alone: neither on the other rows of the batch nor on
    how the generation was cut into calls.

    Args:
        logits: float32.
        seen: as in `process_logits`.
        keys: from `sequence_keys`.
        positions: position in the sequence of the token to draw.
        config: the distribution; temperature 0 takes the largest logit, the first of equal ones.

    Returns:
        Token ids, int32.
    """
    logits = process_logits(logits, seen, config)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    step_keys = jax.vmap(jax.random.fold_in)(keys, positions)
    return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)
