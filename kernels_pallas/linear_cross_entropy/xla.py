"""The language-model loss in chunks of tokens, in plain JAX: logits exist for one chunk at a time.

Under differentiation both gradients are formed in the forward pass, while a chunk's logits are at hand: three matrix
products a chunk, where recomputing the logits in the backward pass would take four. The backward pass only scales.
Without differentiation no gradient is formed.

Chunks run along T, so that a batch sharded over devices stays where it is and only the kernel's gradient is summed
over devices.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Rows of logits a chunk holds on each device: enough to keep the kernel's gradient, read and written once a chunk, from
# dominating; 512 and 2,048 were slower on CPU with V = 16,384.
ROWS_PER_DEVICE = 1024
# What those rows may take in float32: 1,024 rows up to V = 65,536, fewer above.
MAX_CHUNK_BYTES = 2**28


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """See `kernels_pallas.linear_cross_entropy.api.linear_cross_entropy`."""
    return _loss(hidden, kernel, targets, weights)


def chunk_length(batch_size: int, seq_len: int, vocab_size: int, num_devices: int) -> int:
    """Returns how many tokens of each sequence make a chunk.

    As many as give every device `ROWS_PER_DEVICE` rows of logits, or what fits in `MAX_CHUNK_BYTES`, when the batch
    and the vocabulary are spread over `num_devices`; the chunks of a sequence are evenly filled.
    """
    rows = num_devices * min(ROWS_PER_DEVICE, MAX_CHUNK_BYTES // (4 * vocab_size))
    longest = min(max(rows // batch_size, 1), seq_len)
    return math.ceil(seq_len / math.ceil(seq_len / longest))


@jax.custom_vjp
def _loss(hidden: Array, kernel: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    kernel = kernel.astype(hidden.dtype)

    def chunk(total: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden, targets, weights = inputs
        nll = _chunk_logits(hidden, kernel, targets)[2]
        return total + jnp.sum(weights * nll), nll

    total, nll = lax.scan(chunk, jnp.zeros(()), to_chunks(kernel.shape[1], hidden, targets, weights))
    return total, _from_chunks(nll, targets.shape[1])


def _loss_fwd(
    hidden: Array, kernel: Array, targets: Array, weights: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """As `_loss`, with the gradients of the sum with respect to `hidden` and `kernel` as residuals."""
    vocabulary = jnp.arange(kernel.shape[1])
    cast_kernel = kernel.astype(hidden.dtype)

    def chunk(carry: tuple[Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        total, dkernel = carry
        hidden, targets, weights = inputs
        logits, lse, nll = _chunk_logits(hidden, cast_kernel, targets)
        dlogits = jnp.exp(logits - lse[..., None]) - (targets[..., None] == vocabulary)
        dlogits = (weights[..., None] * dlogits).astype(hidden.dtype)
        dhidden = jnp.einsum("btv,dv->btd", dlogits, cast_kernel, preferred_element_type=jnp.float32)
        dkernel += jnp.einsum("btd,btv->dv", hidden, dlogits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(weights * nll), dkernel), (nll, dhidden.astype(hidden.dtype))

    start = jnp.zeros(()), jnp.zeros(kernel.shape, jnp.float32)
    chunks = to_chunks(kernel.shape[1], hidden, targets, weights)
    (total, dkernel), (nll, dhidden) = lax.scan(chunk, start, chunks)
    nll, dhidden = (_from_chunks(x, targets.shape[1]) for x in (nll, dhidden))
    return (total, nll), (dhidden, dkernel.astype(kernel.dtype))


def _loss_bwd(residuals: tuple[Array, Array], cotangents: tuple[Array, Array]) -> tuple:
    dtotal, _ = cotangents  # nll is for metrics only
    dhidden, dkernel = ((dtotal * x).astype(x.dtype) for x in residuals)
    return dhidden, dkernel, None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _chunk_logits(
    hidden: Float[Array, "B c D"], kernel: Float[Array, "D V"], targets: Int[Array, "B c"]
) -> tuple[Float[Array, "B c V"], Float[Array, "B c"], Float[Array, "B c"]]:
    """Returns the logits in float32, their log-sum-exp and the loss of each token."""
    logits = jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return logits, lse, lse - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def to_chunks(vocab_size: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [n, B, c, ...], padded with zeros (so with weight 0) at the end of T.

    Args:
        vocab_size: V of the logits that are to exist for one chunk at a time, see `chunk_length`.
        arrays: with the same B and T.
    """
    batch_size, seq_len = arrays[0].shape[:2]
    mesh = jax.sharding.get_abstract_mesh()
    # Devices whose part is already cut out (`per_device.py`) do not share these rows.
    num_devices = math.prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
    length = chunk_length(batch_size, seq_len, vocab_size, num_devices)
    number = math.ceil(seq_len / length)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, number * length - seq_len)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch_size, number, length, *x.shape[2:]), 1, 0)

    return tuple(split(x) for x in arrays)


def _from_chunks(x: Array, seq_len: int) -> Array:
    """[n, B, c, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :seq_len]
