"""The decoder, and its parameters as a plain tree.

Modules (flax.nnx) only say which parameters exist and what is computed from them. Outside of them parameters are a
nested dict of arrays, laid out as in docs/architecture.md; inside a jitted function `bind(config, params)` gives the
model that computes with them.
"""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from cpm_jax.common.config import ConfigError
from cpm_jax.common.sharding import constrain, params_sharding
from cpm_jax.modeling.attention import Selectors
from cpm_jax.modeling.block import Block, causal_attend, run_layers, select, stack
from cpm_jax.modeling.config import ModelConfig, Multipliers
from cpm_jax.modeling.kv_cache import Cache, attend_to_cache
from cpm_jax.modeling.layers import Embed, Head, RMSNorm, factor
from cpm_jax.modeling.mtp import MtpLayer
from cpm_jax.modeling.rotary import rotation
from cpm_jax.modeling.sparse_cache import SparseKVCache, attend_to_sparse_cache

Params = dict[str, Any]


class Decoder(nnx.Module):
    """A decoder-only transformer; get one with parameters from `bind`."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.multipliers = config.multipliers
        self.embed_tokens = Embed(config)
        self.layers = stack(Block(config), config.num_layers)
        self.norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = Head(config)
        if config.num_nextn_predict_layers:
            self.mtp_layers = stack(MtpLayer(config), config.num_nextn_predict_layers)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm.

        Args:
            tokens: token ids.
            positions: position of each token within its document.
            segment_ids: document of each token; a token attends only to earlier ones of its own document.
        """
        angles = rotation(self.config, positions, length=tokens.shape[1])
        attend = causal_attend(self.config, segment_ids)

        def body(x: jax.Array, block: Block, _: Any) -> jax.Array:
            return block(x, angles, attend, self.multipliers.residual)[0]

        return self.norm(run_layers(self.config, self.layers, body, self._embed(tokens)))

    def mtp(
        self,
        hidden: Float[Array, "B T D"],
        next_tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        depth: int,
    ) -> Float[Array, "B T D"]:
        """Hidden states of MTP layer `depth`, from which the shared head predicts the token `depth + 2` ahead.

        Args:
            hidden: at depth 0 what `__call__` returned, else what this method returned at `depth - 1`.
            next_tokens: the token `depth + 1` ahead of each position.
            positions: as in `__call__`.
            segment_ids: as in `__call__`.
            depth: which MTP layer, from 0.

        Raises:
            IndexError: if there is no such layer (JAX itself would take the last one).
        """
        if not 0 <= depth < self.config.num_nextn_predict_layers:
            raise IndexError(
                f"depth = {depth}: must be below ModelConfig.num_nextn_predict_layers = "
                f"{self.config.num_nextn_predict_layers}"
            )
        with jax.named_scope(f"mtp_{depth}"):
            angles = rotation(self.config, positions, length=hidden.shape[1])
            layer, embedded = select(self.mtp_layers, depth), self._embed(next_tokens)
            return layer.predict(hidden, embedded, angles, segment_ids, self.multipliers.residual)

    def decode(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of new tokens, which attend to the cache; reads a prompt, a part of one, or single tokens.

        Args:
            tokens: token ids; a row may end in padding.
            positions: position of each token, which is also its slot in the cache; consecutive within a row.
            cache: from `init_cache`, or from the call before.

        Returns:
            Hidden states after the final norm, and the cache with the new tokens.

        Raises:
            ValueError: more new tokens than the cache has slots.
        """
        angles = rotation(self.config, positions, length=cache.length)

        def body(carry: tuple[jax.Array, Cache], block: Block, index: Any) -> tuple[jax.Array, Cache]:
            x, cache = carry

            def attend(q: jax.Array, k: jax.Array, v: jax.Array, selectors: Selectors) -> tuple[jax.Array, Cache]:
                if isinstance(cache, SparseKVCache):
                    return attend_to_sparse_cache(q, k, v, selectors, positions, cache, index)
                return attend_to_cache(q, k, v, positions, cache, index)

            return block(x, angles, attend, self.multipliers.residual)

        # The cache is carried whole, not scanned over, so that XLA can update it in place.
        x, cache = run_layers(self.config, self.layers, body, (self._embed(tokens), cache))
        return self.norm(x), cache

    def head_inputs(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Hidden states as the head takes them: times µP's dim_model_base / d_model."""
        return hidden / factor(self.multipliers.width, hidden.dtype)

    def lm_head_kernel(self) -> Float[Array, "D V"]:
        """The head's matrix in the type it is stored in; the transposed embedding where they are tied."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding[...].T
        return self.lm_head.kernel[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32, from operands in the compute dtype."""
        kernel = self.lm_head_kernel().astype(hidden.dtype)
        return jnp.einsum("btd,dv->btv", self.head_inputs(hidden), kernel, preferred_element_type=jnp.float32)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        with jax.named_scope("embed_tokens"):
            return constrain(self.embed_tokens(tokens, self.multipliers.embedding), ("batch", "length", "embed"))


@functools.lru_cache
def _declared(config: ModelConfig) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    return nnx.split(Decoder(config))


def _map_declared(config: ModelConfig, leaf: Any) -> Params:
    """The parameter tree with `leaf(path, declared_param)` at each place."""
    flat = {path: leaf(path, param) for path, param in nnx.to_flat_state(_declared(config)[1])}
    return nnx.traversals.unflatten_mapping(flat)


def abstract_params(config: ModelConfig, mesh: Mesh | AbstractMesh | None = None) -> Params:
    """Shapes and dtypes of all parameters, as `jax.ShapeDtypeStruct`; with their shardings where a mesh is given.

    Raises:
        ConfigError: naming a parameter, or the heads, that the mesh does not divide.
    """
    params = _map_declared(config, lambda _, param: param.get_value())
    if mesh is None:
        return params
    if config.num_heads % mesh.shape["tensor"]:
        raise ConfigError(
            f"MeshConfig.tensor = {mesh.shape['tensor']}: must divide ModelConfig.num_heads = {config.num_heads}",
            field="MeshConfig.tensor",
        )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        params_sharding(param_axes(config), params, mesh),
    )


def param_axes(config: ModelConfig) -> Params:
    """Logical axes of all parameters: a tuple of names for each, as long as its shape."""
    return _map_declared(config, lambda _, param: param.get_metadata("axes"))


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Draws initial parameters: normal matrices (see `layers.hidden_std`), norm scales 1, biases 0.

    A parameter's values depend on the key and its path, so they stay the same when other parameters come or go.
    """

    def draw(path: tuple[Any, ...], param: nnx.Param) -> jax.Array:
        declared, mean, std = param.get_value(), param.get_metadata("mean"), param.get_metadata("std")
        if not std:
            return jnp.full(declared.shape, mean, declared.dtype)
        leaf_key = jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))
        noise = jax.random.normal(leaf_key, declared.shape, jnp.float32)
        return (mean + std * noise).astype(declared.dtype)

    return _map_declared(config, draw)


def bind(config: ModelConfig, params: Params, multipliers: Multipliers | None = None) -> Decoder:
    """The model that computes with `params`.

    Args:
        config: of the model.
        params: with the structure of `abstract_params(config)`.
        multipliers: in place of the config's.
    """
    model = nnx.merge(_declared(config)[0], params)
    if multipliers is not None:
        model.multipliers = multipliers
    return model
