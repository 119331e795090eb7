"""What a decoder is: the one configuration that the model, its checkpoints and its exports read.

Field names follow the Hugging Face configs where the papers' own notation does not say otherwise. The published
values are in `gin_configs/arch/` and `gin_configs/size/`.
"""

import math
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cpm_jax.common.config import ConfigError, config_dataclass

DType = Literal["float32", "bfloat16"]


@config_dataclass
class RopeConfig:
    """Rotary position embedding, plain or LongRoPE.

    Attributes:
        rope_theta: base of the wavelengths.
        short_factor: LongRoPE divisor of each of the head_dim/2 frequencies, for sequences up to
            `original_max_position_embeddings`; empty for plain RoPE.
        long_factor: the same for longer sequences.
        original_max_position_embeddings: length that the short factors were trained for, in tokens; 0 for plain RoPE.
        attention_factor: factor on cos and sin; None takes LongRoPE's sqrt(1 + ln(s) / ln(original)), where
            s = max_position_embeddings / original.
    """

    rope_theta: PositiveFloat = 10_000.0
    short_factor: tuple[PositiveFloat, ...] = ()
    long_factor: tuple[PositiveFloat, ...] = ()
    original_max_position_embeddings: NonNegativeInt = 0
    attention_factor: PositiveFloat | None = None

    def __post_init__(self) -> None:
        if len(self.short_factor) != len(self.long_factor):
            raise ConfigError(
                f"RopeConfig.short_factor has {len(self.short_factor)} values and RopeConfig.long_factor has "
                f"{len(self.long_factor)}: give both head_dim/2 values, or neither for plain RoPE",
                field="RopeConfig.short_factor",
            )
        if self.short_factor and not self.original_max_position_embeddings:
            raise ConfigError(
                "RopeConfig.original_max_position_embeddings = 0: LongRoPE needs the length that short_factor was "
                "trained for, for example 32768",
                field="RopeConfig.original_max_position_embeddings",
            )

    @property
    def is_longrope(self) -> bool:
        """Whether the LongRoPE factors are used."""
        return bool(self.short_factor)


@config_dataclass
class ModelConfig:
    """A decoder-only transformer of the MiniCPM4, MiMo, InternLM2 and Llama family.

    The µP multipliers are MiniCPM's: embeddings are multiplied by `scale_emb`, each residual branch by
    `scale_depth / sqrt(num_layers)`, and the hidden state before the language-model head by
    `dim_model_base / d_model`. `scale_depth = 0` and `dim_model_base = 0` switch the last two off.

    Attributes:
        vocab_size: number of token ids.
        num_layers: number of decoder layers, without MTP layers.
        d_model: width of the residual stream.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads; divides `num_heads`.
        head_dim: width of a head; None takes d_model / num_heads.
        d_ff: width of the SwiGLU feed-forward layer.
        max_position_embeddings: longest sequence, in tokens.
        rms_norm_eps: epsilon of RMSNorm.
        rope: rotary position embedding.
        tie_word_embeddings: whether the language-model head is the transposed embedding.
        attention_bias: whether the q, k and v projections have biases (Qwen2, MiMo).
        scale_emb: factor on the embeddings.
        scale_depth: residual branches are multiplied by scale_depth / sqrt(num_layers); 0 means by 1.
        dim_model_base: width at which the µP multipliers are 1; 0 means standard parametrisation.
        initializer_range: standard deviation of the initial matrices, at width `dim_model_base` where µP is on.
        num_nextn_predict_layers: number of MTP layers.
        dtype: type of activations and of the matrices as they are multiplied.
        param_dtype: type in which parameters are stored and updated.
        fp8: whether the linear projections multiply in FP8 (MiniCPM4 report §2.3).
        remat: what the backward pass recomputes: nothing, all but the outputs of matrix products ("dots"), or
            the whole layer ("full").
        scan_layers: whether layers run in `lax.scan` (fast to compile) or unrolled (fast to run when small).
    """

    vocab_size: PositiveInt
    num_layers: PositiveInt
    d_model: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    d_ff: PositiveInt
    head_dim: PositiveInt | None = None
    max_position_embeddings: PositiveInt = 4096
    rms_norm_eps: PositiveFloat = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    scale_emb: PositiveFloat = 1.0
    scale_depth: NonNegativeFloat = 0.0
    dim_model_base: NonNegativeInt = 0
    initializer_range: PositiveFloat = 0.02
    num_nextn_predict_layers: NonNegativeInt = 0
    dtype: DType = "bfloat16"
    param_dtype: DType = "float32"
    fp8: bool = False
    remat: Literal["none", "dots", "full"] = "none"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"ModelConfig.num_kv_heads = {self.num_kv_heads}: must divide num_heads = {self.num_heads}",
                field="ModelConfig.num_kv_heads",
            )
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ConfigError(
                f"ModelConfig.d_model = {self.d_model}: must be divisible by num_heads = {self.num_heads}, "
                "or set head_dim",
                field="ModelConfig.d_model",
            )
        if self.head_size % 2:
            raise ConfigError(
                f"ModelConfig.head_dim = {self.head_size}: rotary embedding needs an even head_dim",
                field="ModelConfig.head_dim",
            )
        if self.rope.is_longrope and len(self.rope.short_factor) != self.head_size // 2:
            raise ConfigError(
                f"RopeConfig.short_factor has {len(self.rope.short_factor)} values: must be head_dim/2 = "
                f"{self.head_size // 2}",
                field="RopeConfig.short_factor",
            )

    @property
    def head_size(self) -> int:
        """Width of a head, H."""
        return self.head_dim if self.head_dim is not None else self.d_model // self.num_heads

    @property
    def residual_multiplier(self) -> float:
        """Factor on each residual branch."""
        return self.scale_depth / math.sqrt(self.num_layers) if self.scale_depth else 1.0

    @property
    def width_multiplier(self) -> float:
        """µP's relative width, d_model / dim_model_base; 1 under standard parametrisation."""
        return self.d_model / self.dim_model_base if self.dim_model_base else 1.0
