"""A cache of keys and values in 8 or 4 bits, which attention turns back a block of slots at a time.

Values have a scale for each token and head. Keys have one for each channel of a head over a group of consecutive
tokens, and are counted from the middle of what the channel has in that group, as some channels of keys are far from
zero in every token; the idea is KIVI's (arXiv 2402.02750). docs/quantization.md has the errors of this and other rules.

A group's keys lie in float too until it is full, and the group is quantised anew with each token that comes to it. So
codes depend on the tokens of their group up to then, and not on chunks, padding or other rows. Unlike KIVI, attention
reads codes alone, also of the newest tokens.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool, Float, Int, Int8

from cpm_jax.modeling.absmax import pack_int4, quantize_absmax, unpack_int4

# The dtypes that this cache is for, and the bits of their codes.
CACHE_BITS = {"int8": 8, "int4": 4}

# Tokens whose keys share the scale of a channel, as in KIVI.
GROUP = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedKVCache:
    """Codes of rotated keys, and of values, of every layer; slot = position, as in `KVCache`.

    The slots are those of C whole groups of g = `GROUP`. P bytes hold the H codes of a token and head.

    A row is written in the order of its positions: what it had written in the group before its last stays.

    Attributes:
        keys: codes [L, B, K, C, g, P].
        key_scales: of each group and channel [L, B, K, C, H].
        key_middles: what the keys of each group and channel are counted from [L, B, K, C, H].
        recent: keys of each row's last group [L, B, K, g, H].
        values: codes [L, B, K, C·g, P].
        value_scales: of each token [L, B, K, C·g].
        bits: of a code, 8 or 4.
        length: positions that may be written, S.
    """

    keys: Int8[Array, "L B K C g P"]
    key_scales: BFloat16[Array, "L B K C H"]
    key_middles: BFloat16[Array, "L B K C H"]
    recent: Float[Array, "L B K g H"]
    values: Int8[Array, "L B K C*g P"]
    value_scales: BFloat16[Array, "L B K C*g"]
    bits: int = field(metadata={"static": True})
    length: int = field(metadata={"static": True})

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int, int], bits: int, dtype: jnp.dtype | str) -> "QuantizedKVCache":
        """A cache for keys and values of `shape` [L, B, K, S, H] that come in `dtype`."""
        *rows, length, size = shape
        groups, width = -(-length // GROUP), size * bits // 8
        return cls(
            keys=jnp.zeros((*rows, groups, GROUP, width), jnp.int8),
            key_scales=jnp.zeros((*rows, groups, size), jnp.bfloat16),
            key_middles=jnp.zeros((*rows, groups, size), jnp.bfloat16),
            recent=jnp.zeros((*rows, GROUP, size), dtype),
            values=jnp.zeros((*rows, groups * GROUP, width), jnp.int8),
            value_scales=jnp.zeros((*rows, groups * GROUP), jnp.bfloat16),
            bits=bits,
            length=length,
        )

    @property
    def num_slots(self) -> int:
        """Slots that there is room for: S, rounded up to whole groups."""
        return self.values.shape[3]

    def write(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
        layer: int | Int[Array, ""],
    ) -> "QuantizedKVCache":
        """Quantises keys and values into the slots of their positions; positions from S on are not written."""
        rows = jnp.arange(k.shape[0])[:, None]
        real = positions < self.length
        codes, scales = quantize_absmax(v, self.bits, axis=-1)
        slots = jnp.where(real, positions, self.num_slots)
        values = self.values.at[layer, rows, :, slots].set(self._packed(codes), mode="drop")
        value_scales = self.value_scales.at[layer, rows, :, slots].set(scales, mode="drop")

        groups, held = self._groups(k, positions, real, layer)
        codes, scales, middles = quantize_channels(groups, held, self.bits)
        number = groups.shape[1]
        ids = positions[:, :1] // GROUP + jnp.arange(number)
        ids = jnp.where(held.any(2), ids, self.keys.shape[3])
        last = jnp.maximum(held.any(2).sum(1) - 1, 0)[:, None, None, None, None]
        recent = jnp.take_along_axis(groups, last, axis=1)[:, 0].swapaxes(1, 2)
        recent = jnp.where(real.any(1)[:, None, None, None], recent, self.recent[layer])
        return QuantizedKVCache(
            keys=self.keys.at[layer, rows, :, ids].set(self._packed(codes).swapaxes(2, 3), mode="drop"),
            key_scales=self.key_scales.at[layer, rows, :, ids].set(scales, mode="drop"),
            key_middles=self.key_middles.at[layer, rows, :, ids].set(middles, mode="drop"),
            recent=self.recent.at[layer].set(recent),
            values=values,
            value_scales=value_scales,
            bits=self.bits,
            length=self.length,
        )

    def _packed(self, codes: Int8[Array, "... H"]) -> Int8[Array, "... P"]:
        return pack_int4(codes) if self.bits == 4 else codes

    def _unpacked(self, codes: Int8[Array, "... P"]) -> Float[Array, "... H"]:
        return (unpack_int4(codes) if self.bits == 4 else codes).astype(jnp.float32)

    def _groups(
        self, k: Float[Array, "B T K H"], positions: Int[Array, "B T"], real: Bool[Array, "B T"], layer: Array | int
    ) -> tuple[Float[Array, "B n g K H"], Bool[Array, "B n g"]]:
        """The groups that new keys come to, with the keys that are there before, and which of their slots are held."""
        batch, new, heads, size = k.shape
        number = (new + GROUP - 2) // GROUP + 1  # so many groups may T consecutive slots lie in
        places = positions[:, :1] % GROUP + jnp.arange(new)
        keys = jnp.zeros((batch, number * GROUP, heads, size), k.dtype)
        keys = keys.at[:, :GROUP].set(self.recent[layer].swapaxes(1, 2).astype(k.dtype))
        keys = keys.at[jnp.arange(batch)[:, None], jnp.where(real, places, number * GROUP)].set(k, mode="drop")
        ends = jnp.where(real.any(1), positions[:, 0] % GROUP + real.sum(1), 0)
        held = jnp.arange(number * GROUP) < ends[:, None]
        keys = jnp.where(held[..., None, None], keys, 0)  # `recent` has more of an older group
        return keys.reshape(batch, number, GROUP, heads, size), held.reshape(batch, number, GROUP)

    def read(
        self, layer: int | Int[Array, ""], first: int | Int[Array, ""], size: int, dtype: jnp.dtype
    ) -> tuple[Float[Array, "B K size H"], Float[Array, "B K size H"]]:
        """Keys and values of `size` slots of a layer from `first` on, both whole groups, in floating point."""

        def block(x: Array, first: int | Array, size: int) -> Array:
            """`size` entries of the fourth dimension."""
            starts = (layer, 0, 0, first, *[0] * (x.ndim - 4))
            return jax.lax.dynamic_slice(x, starts, (1, *x.shape[1:3], size, *x.shape[4:]))[0]

        groups = first // GROUP, size // GROUP
        scales, middles = (
            block(x, *groups)[..., None, :].astype(jnp.float32) for x in (self.key_scales, self.key_middles)
        )
        keys = self._unpacked(block(self.keys, *groups)) * scales + middles
        keys = keys.reshape(*keys.shape[:2], size, -1)
        scales = block(self.value_scales, first, size)[..., None].astype(jnp.float32)
        values = self._unpacked(block(self.values, first, size)) * scales
        return keys.astype(dtype), values.astype(dtype)


def quantize_channels(
    groups: Float[Array, "B n g K H"], held: Bool[Array, "B n g"], bits: int
) -> tuple[Int8[Array, "B n g K H"], BFloat16[Array, "B n K H"], BFloat16[Array, "B n K H"]]:
    """Codes of keys by channel, with their scales and the middles that they are counted from.

    Args:
        groups: keys of groups of tokens.
        held: which of them count; the others get the code 0.
        bits: of a code.
    """
    mask, keys = held[..., None, None], groups.astype(jnp.float32)
    low = jnp.min(jnp.where(mask, keys, jnp.inf), axis=2)
    high = jnp.max(jnp.where(mask, keys, -jnp.inf), axis=2)
    middles = jnp.where(mask.any(2), (low + high) / 2, 0).astype(jnp.bfloat16)
    centred = jnp.where(mask, keys - middles[:, :, None].astype(jnp.float32), 0)
    codes, scales = quantize_absmax(centred, bits, axis=2)
    return codes, scales, middles
