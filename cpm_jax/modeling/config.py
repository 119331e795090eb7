"""What a decoder is: the one configuration that the model, its checkpoints and its exports read.

Field names follow the Hugging Face configs where the papers' own notation does not say otherwise. The published
values are in `gin_configs/arch/` and `gin_configs/size/`.
"""

import dataclasses
import functools
import logging
import math
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cpm_jax.common.config import ConfigError, config_dataclass
from kernels_pallas.block_selection.selection import BlockSelection, Variant

logger = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16"]
RopeScaling = Literal["none", "linear", "dynamic", "yarn", "llama3"]


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """Factors in the forward pass that change no shape.

    Numbers of a `ModelConfig`; or traced scalars, where models that differ in nothing else share a program.

    Attributes:
        embedding: on the embeddings.
        residual: on each residual branch.
        width: divides the head's input, µP's relative width.
    """

    embedding: Any
    residual: Any
    width: Any


@config_dataclass
class RopeConfig:
    """Rotary position embedding, plain or changed for longer sequences than were trained on.

    LongRoPE is chosen by its factors, everything else by `scaling`; the formulas are in `rotary.py`.

    Attributes:
        rope_theta: base of the wavelengths.
        scaling: "none"; "linear" divides all frequencies by `factor`; "dynamic" (NTK) raises the base for sequences
            longer than `original_max_position_embeddings`; "yarn" divides the slow frequencies only; "llama3" likewise,
            by wavelength.
        factor: how much longer than `original_max_position_embeddings` sequences may become.
        short_factor: LongRoPE divisor of each of the head_dim/2 frequencies, for sequences up to
            `original_max_position_embeddings`; empty for all other kinds.
        long_factor: the same for longer sequences.
        original_max_position_embeddings: length before the extension, in tokens; "none" and "linear" do not read it.
        attention_factor: factor on cos and sin; None takes what the method says: LongRoPE sqrt(1 + ln(s) /
            ln(original)) where s = max_position_embeddings / original, YaRN 0.1 ln(factor) + 1, the others 1.
        beta_fast: YaRN leaves alone what turns more often than this within the original length.
        beta_slow: YaRN divides by `factor` what turns less often than this within the original length.
        truncate: whether YaRN rounds the ends of the ramp between the two to whole dimensions.
        low_freq_factor: Llama 3 divides by `factor` the wavelengths above original / low_freq_factor.
        high_freq_factor: Llama 3 leaves alone the wavelengths below original / high_freq_factor.
    """

    rope_theta: PositiveFloat = 10_000.0
    scaling: RopeScaling = "none"
    factor: PositiveFloat = 1.0
    short_factor: tuple[PositiveFloat, ...] = ()
    long_factor: tuple[PositiveFloat, ...] = ()
    original_max_position_embeddings: NonNegativeInt = 0
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    truncate: bool = True
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0

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
        if self.short_factor and self.scaling != "none":
            raise ConfigError(
                f"RopeConfig.scaling = {self.scaling!r}: short_factor and long_factor make it LongRoPE; give one of "
                "the two",
                field="RopeConfig.scaling",
            )
        if self.scaling not in ("none", "linear") and not self.original_max_position_embeddings:
            raise ConfigError(
                f"RopeConfig.original_max_position_embeddings = 0: scaling {self.scaling!r} needs the length before "
                "the extension, for example 32768",
                field="RopeConfig.original_max_position_embeddings",
            )
        if self.scaling != "none" and self.factor < 1:
            raise ConfigError(f"RopeConfig.factor = {self.factor}: must be at least 1", field="RopeConfig.factor")
        if self.scaling == "yarn" and self.beta_fast <= self.beta_slow:
            raise ConfigError(
                f"RopeConfig.beta_fast = {self.beta_fast}: must be above beta_slow = {self.beta_slow}",
                field="RopeConfig.beta_fast",
            )
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"RopeConfig.high_freq_factor = {self.high_freq_factor}: must be above low_freq_factor = "
                f"{self.low_freq_factor}",
                field="RopeConfig.high_freq_factor",
            )

    @property
    def is_longrope(self) -> bool:
        """Whether the LongRoPE factors are used."""
        return bool(self.short_factor)

    @property
    def rope_type(self) -> str:
        """The name that Hugging Face's configs have for it."""
        return "longrope" if self.is_longrope else {"none": "default"}.get(self.scaling, self.scaling)

    @property
    def switch_length(self) -> int | None:
        """Length in tokens above which sequences are rotated at other frequencies; None where they never are."""
        if self.is_longrope or self.scaling == "dynamic":
            return self.original_max_position_embeddings
        return None


@config_dataclass
class SparseConfig:
    """Sparse attention by InfLLM v2 (arXiv 2509.24663; MiniCPM4 report §2.1), under the names of the published configs.

    It adds no parameters: the same weights run dense or sparse.

    Attributes:
        kernel_size: keys in one semantic kernel, whose mean stands for them.
        kernel_stride: keys from one semantic kernel's start to the next one's.
        init_blocks: blocks at the document's beginning that every query sees.
        block_size: keys in a block; a multiple of `kernel_stride`.
        window_size: recent keys that every query sees; a multiple of `block_size`.
        topk: blocks chosen by score, the initial ones included, the local ones not.
        use_nope: whether blocks are chosen by queries and keys before rotary embedding; attention itself is always
            between rotated ones.
        dense_len: rows (in decoding: caches) of at most this many tokens attend densely; -1 is always sparse.
        variant: reading of the sources, see `BlockSelection`.
        lse_approximation: whether the softmax over kernels is normalised by kernels four times as long, a quarter of
            the work (InfLLM-V2 §3.3), or exactly.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    use_nope: bool = False
    dense_len: int = 8192
    variant: Variant = "paper"
    lse_approximation: bool = True

    def __post_init__(self) -> None:
        if self.dense_len < -1:
            raise ConfigError(
                f"SparseConfig.dense_len = {self.dense_len}: must be a number of tokens, or -1 for always sparse",
                field="SparseConfig.dense_len",
            )
        try:
            _ = self.selection
        except ValueError as error:
            reason = str(error).removeprefix("block selection: ")
            raise ConfigError(f"SparseConfig.{reason}", field=f"SparseConfig.{reason.split(' ')[0]}") from None

    @property
    def selection(self) -> BlockSelection:
        """What the kernels select by."""
        return BlockSelection(
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            init_blocks=self.init_blocks,
            block_size=self.block_size,
            window_size=self.window_size,
            topk=self.topk,
            variant=self.variant,
        )

    def applies(self, length: int) -> bool:
        """Whether rows or caches of `length` tokens attend sparsely."""
        return length > self.dense_len


PER_TENSOR, PER_CHANNEL = 0, -1  # as TernaryConfig.group_size


@config_dataclass
class TernaryConfig:
    """Weights of -1, 0 and 1 times a scale in the linear layers (BitCPM4, MiniCPM4 report §3.3); see `ternary.py`.

    Attributes:
        group_size: consecutive inputs of an output that share a scale, 256 in llama.cpp's packed files; -1 gives each
            output one, 0 the whole matrix (BitNet b1.58).
    """

    group_size: int = 256

    def __post_init__(self) -> None:
        if self.group_size < PER_CHANNEL:
            raise ConfigError(
                f"TernaryConfig.group_size = {self.group_size}: must be positive, {PER_TENSOR} for one scale for each "
                f"matrix, or {PER_CHANNEL} for one for each output",
                field="TernaryConfig.group_size",
            )


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
        sparse_config: sparse attention for long rows; None attends densely at every length.
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
        ternary: how the linear projections' weights are rounded to three values as they are multiplied; embedding,
            norms, biases and head are not. None does not round them.
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
    sparse_config: SparseConfig | None = None
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
    ternary: TernaryConfig | None = None
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
        if self.rope.scaling == "dynamic" and self.head_size < 4:
            raise ConfigError(
                f"ModelConfig.head_dim = {self.head_size}: rope scaling 'dynamic' needs at least 4",
                field="ModelConfig.head_dim",
            )
        if self.rope.is_longrope and len(self.rope.short_factor) != self.head_size // 2:
            raise ConfigError(
                f"RopeConfig.short_factor has {len(self.rope.short_factor)} values: must be head_dim/2 = "
                f"{self.head_size // 2}",
                field="RopeConfig.short_factor",
            )
        if self.ternary is not None:
            self._check_ternary(self.ternary.group_size)
        sparse = self.sparse_config
        if sparse is not None and not sparse.applies(self.max_position_embeddings):
            _warn_once(
                f"SparseConfig.dense_len = {sparse.dense_len} and ModelConfig.max_position_embeddings = "
                f"{self.max_position_embeddings}: attention is dense at every length; dense_len = -1 is always sparse"
            )
        elif sparse is not None:
            blocks = math.ceil(self.max_position_embeddings / sparse.block_size)
            if sparse.topk > blocks:
                raise ConfigError(
                    f"SparseConfig.topk = {sparse.topk}: must be at most the {blocks} blocks of {sparse.block_size} "
                    f"tokens that max_position_embeddings = {self.max_position_embeddings} has",
                    field="SparseConfig.topk",
                )

    def refuse_ternary(self, where: str) -> None:
        """Refuses a model whose parameters are not yet the ternary values that it computes with.

        Args:
            where: what has no place for them, in words.

        Raises:
            ConfigError: it is one.
        """
        if self.ternary is not None:
            raise ConfigError(
                f"ModelConfig.ternary = {self.ternary}: {where} holds weights as they are multiplied; must be None, "
                "with the parameters that `cpm_jax.modeling.ternary.materialize` gives",
                field="ModelConfig.ternary",
            )

    def _check_ternary(self, group_size: int) -> None:
        inputs = {
            "d_model": self.d_model,
            "num_heads x head_dim": self.num_heads * self.head_size,
            "d_ff": self.d_ff,
        }
        odd = [f"{name} = {size}" for name, size in inputs.items() if group_size > 0 and size % group_size]
        if odd:
            raise ConfigError(
                f"TernaryConfig.group_size = {group_size}: must divide the inputs of every linear layer, and does not "
                f"divide {', '.join(odd)}; {PER_CHANNEL} is one scale for each output, {PER_TENSOR} for each matrix",
                field="TernaryConfig.group_size",
            )
        if self.fp8:
            raise ConfigError(
                "ModelConfig.fp8 = True: FP8 would round the scales of ternary weights again; must be False with "
                "ModelConfig.ternary",
                field="ModelConfig.fp8",
            )

    @property
    def switch_lengths(self) -> tuple[int, ...]:
        """Lengths in tokens above which rows and caches are computed in another way: rotated, or attending sparsely."""
        dense = None if self.sparse_config is None or self.sparse_config.dense_len < 1 else self.sparse_config.dense_len
        return tuple(length for length in (self.rope.switch_length, dense) if length is not None)

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

    @property
    def multipliers(self) -> Multipliers:
        """The factors of the forward pass."""
        return Multipliers(self.scale_emb, self.residual_multiplier, self.width_multiplier)
