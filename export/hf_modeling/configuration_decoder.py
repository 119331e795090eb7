"""config.json of the model in `modeling_decoder.py`, written by cpm_jax."""

import math
from typing import Any

from transformers import PretrainedConfig


class DecoderConfig(PretrainedConfig):
    """What a folder's config.json says; entries that are not named here are kept as they are.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU layer.
        num_hidden_layers: number of layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        head_dim: width of a head; None is hidden_size / num_attention_heads.
        max_position_embeddings: longest sequence in tokens; with dynamic NTK, before it is extended.
        rms_norm_eps: epsilon of the norms.
        attention_bias: whether q, k and v have biases, and o, which in MiMo has none.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how they change for long sequences, under transformers' names; None leaves them.
        rope_parameters: both, as transformers 5 writes them.
        sparse_config: sizes of InfLLM v2, under MiniCPM4's names; None attends densely.
        scale_emb: factor on the embeddings.
        scale_depth: residual branches are multiplied by scale_depth / sqrt(num_hidden_layers); None is by 1.
        dim_model_base: the head's input is divided by hidden_size / dim_model_base; None is by 1.
        initializer_range: standard deviation of new matrices.
        use_cache: whether a call returns a cache where it does not say.
        tie_word_embeddings: whether the head is the embedding.
        entries: further ones.
    """

    model_type = "decoder"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 32_000,
        hidden_size: int = 512,
        intermediate_size: int = 1536,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        attention_bias: bool = False,
        rope_theta: float = 10_000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        sparse_config: dict[str, Any] | None = None,
        scale_emb: float = 1.0,
        scale_depth: float | None = None,
        dim_model_base: int | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **entries: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.attention_bias = attention_bias
        rope = rope_parameters or rope_scaling or {}
        self.rope_parameters = {"rope_type": rope.get("type", "default"), "rope_theta": rope_theta} | rope
        # transformers 5 has these two as other names of the entries; loaders on transformers 4 read them.
        if not hasattr(type(self), "rope_scaling"):
            self.rope_theta, self.rope_scaling = self.rope_parameters["rope_theta"], self.rope_parameters
        self.sparse_config = sparse_config
        self.scale_emb = scale_emb
        self.scale_depth = math.sqrt(num_hidden_layers) if scale_depth is None else scale_depth
        self.dim_model_base = hidden_size if dim_model_base is None else dim_model_base
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(**entries | {"tie_word_embeddings": tie_word_embeddings})
