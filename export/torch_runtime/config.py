"""What a folder's config.json asks to be computed; what this package does not compute is refused.

The entries are those that `export/hf.py`, `export/gptq.py` and the folders' owners write. Nothing of the training code
is imported, so that the package runs where only PyTorch is installed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]

CONFIG_FILE = "config.json"
MOST_MTP_LAYERS = 32
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "minicpm": "MiniCPMForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "mimo": "MiMoForCausalLM",
}
# Entries that change the computation in a way that this package does not have, with the values that leave it alone.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "hidden_activation": ("silu", "swish", None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "partial_rotary_factor": (1, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "n_routed_experts": (0, None),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}
# The entries of each kind of rotary embedding; those marked True must be there.
_ROPE_ENTRIES: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "dynamic": {"factor": True},
    "yarn": {"factor": False, "beta_fast": False, "beta_slow": False, "truncate": False},
    "longrope": {"short_factor": True, "long_factor": True},
    "llama3": {"factor": True, "low_freq_factor": True, "high_freq_factor": True},
}


class FolderError(Exception):
    """A folder that cannot be run; says what was found and what is accepted."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; the formulas are in `rope.py`.

    Attributes:
        rope_type: "default", "linear", "dynamic", "yarn", "longrope" or "llama3".
        theta: base of the wavelengths.
        factor: how much longer sequences may become than `original_max_position_embeddings`.
        short_factor: LongRoPE's divisor of each frequency up to `original_max_position_embeddings`.
        long_factor: the same for longer sequences.
        original_max_position_embeddings: length before the extension, in tokens.
        attention_factor: factor on cos and sin.
        beta_fast: YaRN leaves alone what turns more often than this within the original length.
        beta_slow: YaRN divides by `factor` what turns less often than this within it.
        truncate: whether YaRN rounds the ends of the ramp between the two to whole dimensions.
        low_freq_factor: Llama 3 divides by `factor` the wavelengths above original / low_freq_factor.
        high_freq_factor: Llama 3 leaves alone the wavelengths below original / high_freq_factor.
    """

    rope_type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class SparseConfig:
    """InfLLM v2 (arXiv 2509.24663), under the names of the published `sparse_config`.

    Attributes:
        kernel_size: keys in one semantic kernel, whose mean stands for them.
        kernel_stride: keys from one semantic kernel's start to the next one's.
        init_blocks: blocks at the beginning that every query sees.
        block_size: keys in a block.
        window_size: recent keys that every query sees.
        topk: blocks chosen by score, the initial ones included, the local ones not.
        use_nope: whether blocks are chosen by queries and keys before rotary embedding.
        dense_len: caches of at most so many tokens attend densely; -1 is always sparse.
        variant: "huggingface" sees one local block more and one by score fewer than "paper" and "cpm_cu".
        lse_approximation: whether the softmax over kernels is normalised by kernels four times as long and as far
            apart, or exactly.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    use_nope: bool = False
    dense_len: int = 8192
    variant: str = "huggingface"
    lse_approximation: bool = True

    def __post_init__(self) -> None:
        def check(field: str, works: bool, accepted: str) -> None:
            if not works:
                raise FolderError(f"config.json: sparse_config.{field} = {getattr(self, field)!r}: must be {accepted}")

        for field in fields(self):
            value = getattr(self, field.name)
            check(field.name, type(value) is field.type, f"of type {getattr(field.type, '__name__', field.type)}")
        check("kernel_stride", self.kernel_stride >= 1, "at least 1")
        check("kernel_size", self.kernel_size >= self.kernel_stride, f"at least kernel_stride = {self.kernel_stride}")
        divides = self.block_size >= 1 and self.block_size % self.kernel_stride == 0
        check("block_size", divides, f"a multiple of kernel_stride = {self.kernel_stride}")
        whole = self.window_size >= self.block_size and self.window_size % self.block_size == 0
        check("window_size", whole, f"a multiple of block_size = {self.block_size}, at least one block")
        check("init_blocks", self.init_blocks >= 0, "at least 0")
        check("dense_len", self.dense_len >= -1, "a number of tokens, or -1 for always sparse")
        check("variant", self.variant in ("paper", "huggingface", "cpm_cu"), "'paper', 'huggingface' or 'cpm_cu'")
        least = max(self.init_blocks, 1) + (self.variant == "huggingface" and self.init_blocks > 0)
        check("topk", self.topk >= least, f"at least {least}: init_blocks = {self.init_blocks} are among them")

    def applies(self, length: int) -> bool:
        """Whether caches of `length` tokens attend sparsely."""
        return length > self.dense_len

    @property
    def num_local(self) -> int:
        """Blocks up to and including the query's own that it always sees."""
        return self.window_size // self.block_size + (self.variant == "huggingface")

    @property
    def num_selected(self) -> int:
        """The most blocks that a query sees, |I|."""
        return self.topk + self.window_size // self.block_size

    @property
    def coarse(self) -> tuple[int, int]:
        """Size and stride of the kernels that normalise (InfLLM-V2 §3.3: four times the others')."""
        return 4 * self.kernel_size, 4 * self.kernel_stride


@dataclass(frozen=True)
class QuantizationConfig:
    """Weights of linear layers in the GPTQ format.

    Attributes:
        bits: of a code: 2, 4 or 8.
        group_size: consecutive inputs that share a scale; -1 is all of them.
        zero_offset: what is added to a stored zero point to get the code of zero ("gptq": 1, "gptq_v2": 0).
    """

    bits: int
    group_size: int
    zero_offset: int


@dataclass(frozen=True)
class ModelConfig:
    """A decoder.

    Attributes:
        model_type: a key of `ARCHITECTURES`; decides the names of tensors.
        vocab_size: number of token ids, V.
        hidden_size: width of the residual stream, D.
        intermediate_size: width of the SwiGLU layer, F.
        num_layers: L.
        num_nextn_predict_layers: MTP layers, M.
        num_heads: query heads, N.
        num_kv_heads: key and value heads, K.
        head_dim: width of a head, H.
        max_position_embeddings: longest sequence, in tokens.
        rms_norm_eps: epsilon of RMSNorm.
        tie_word_embeddings: whether the head is the embedding.
        qkv_bias: whether q, k and v have biases.
        o_bias: whether o has one.
        embedding_multiplier: factor on the embeddings.
        residual_multiplier: factor on each residual branch.
        logits_divisor: divides the head's input.
        attention_scale: factor on attention scores.
        rope: rotary embedding.
        sparse: sparse attention for long caches, or None.
        quantization: of the layers' linear weights, or None.
        dtype: type that the weights are stored in: "float32", "bfloat16" or "float16".
        eos_token_ids: tokens that end a text.
        bos_token_id: token that begins one, or None.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_nextn_predict_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    embedding_multiplier: float
    residual_multiplier: float
    logits_divisor: float
    attention_scale: float
    rope: RopeConfig
    sparse: SparseConfig | None
    quantization: QuantizationConfig | None
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FolderError: there is no such file, or something else is in it.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{file.parent} has no {file.name}: give a folder that `export` wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise FolderError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content


def read_config(folder: str | Path) -> ModelConfig:
    """Reads a folder's config.json, and of generation_config.json the special tokens.

    Raises:
        FolderError: a file or an entry is missing, of a wrong type, or asks for what is not computed.
    """
    folder = Path(folder)
    hf = read_json(folder / CONFIG_FILE)
    generation = folder / "generation_config.json"
    tokens = hf | (read_json(generation) if generation.is_file() else {})
    kind = _model_type(hf)
    for name, accepted in _ONLY.items():
        if hf.get(name) not in accepted:
            wanted = " or ".join(map(repr, accepted))
            raise FolderError(f"config.json: {name} = {hf[name]!r}: accepted is {wanted}; nothing else is computed")
    layer_types = hf.get("layer_types") or ["full_attention"]
    if any(layer_type != "full_attention" for layer_type in layer_types):
        raise FolderError(f"config.json: layer_types = {layer_types!r}: accepted is 'full_attention' for every layer")
    width, heads, layers = (_whole(hf, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads = _whole(hf, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise FolderError(f"config.json: num_key_value_heads = {kv_heads}: must divide num_attention_heads = {heads}")
    if hf.get("head_dim") is None and width % heads:
        raise FolderError(f"config.json: hidden_size = {width}: must be a multiple of num_attention_heads = {heads}")
    head_dim = _whole(hf, "head_dim", width // heads)
    if head_dim % 2:
        raise FolderError(f"config.json: head_dim = {head_dim}: must be even, as rotary embedding turns pairs")
    longest = _whole(hf, "max_position_embeddings", 32768 if kind in ("qwen2", "mimo") else 2048)
    rope, longest = _read_rope(hf, longest, head_dim)
    bias = {"qwen2": True, "mimo": True, "internlm2": hf.get("bias", True)}.get(kind, hf.get("attention_bias", False))
    sparse = _object(hf, "sparse_config")
    return ModelConfig(
        model_type=kind,
        vocab_size=_whole(hf, "vocab_size"),
        hidden_size=width,
        intermediate_size=_whole(hf, "intermediate_size"),
        num_layers=layers,
        num_nextn_predict_layers=_mtp_layers(hf) if kind == "mimo" else 0,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=longest,
        rms_norm_eps=_number(hf, "rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", kind == "minicpm")),
        qkv_bias=bool(bias),
        o_bias=bool(bias) and kind not in ("qwen2", "mimo"),
        **_multipliers(hf, kind, width, layers, head_dim),
        rope=rope,
        sparse=_read_sparse(sparse) if sparse else None,
        quantization=_read_quantization(_object(hf, "quantization_config")),
        dtype=_read_dtype(hf),
        eos_token_ids=_token_ids(tokens, "eos_token_id"),
        bos_token_id=next(iter(_token_ids(tokens, "bos_token_id")), None),
    )


def _model_type(hf: Json) -> str:
    kind, classes = hf.get("model_type"), hf.get("architectures") or []
    for name, architecture in ARCHITECTURES.items():
        if kind == name or (kind is None and architecture in classes):
            return name
    accepted = ", ".join(ARCHITECTURES)
    raise FolderError(f"config.json: model_type = {kind!r} (architectures {classes}): accepted are {accepted}")


def _object(hf: Json, name: str) -> Json:
    value = hf.get(name) or {}
    if not isinstance(value, Mapping):
        raise FolderError(f"config.json: {name} = {value!r}: accepted are an object and null")
    return value


def _whole(hf: Json, name: str, default: int | None = None) -> int:
    value = default if hf.get(name) is None else hf[name]
    if type(value) is not int or value < 1:
        found = "is missing" if value is None else f"= {value!r}"
        raise FolderError(f"config.json: {name} {found}: accepted are whole numbers above 0")
    return value


def _mtp_layers(hf: Json) -> int:
    value = hf.get("num_nextn_predict_layers") or 0
    if type(value) is not int or not 0 <= value <= MOST_MTP_LAYERS:
        raise FolderError(
            f"config.json: num_nextn_predict_layers = {value!r}: accepted are whole numbers from 0 to {MOST_MTP_LAYERS}"
        )
    return value


def _number(hf: Json, name: str, default: float) -> float:
    value = default if hf.get(name) is None else hf[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or math.isinf(value):
        raise FolderError(f"config.json: {name} = {value!r}: accepted are numbers above 0")
    return float(value)


def _multipliers(hf: Json, kind: str, width: int, layers: int, head_dim: int) -> dict[str, float]:
    """MiniCPM's µP factors, and Granite's names for them."""
    found = {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_divisor": 1.0,
        "attention_scale": head_dim**-0.5,
    }
    if kind == "minicpm":
        found["embedding_multiplier"] = _number(hf, "scale_emb", 1.0)
        found["residual_multiplier"] = _number(hf, "scale_depth", 1.0) / math.sqrt(layers)
        found["logits_divisor"] = width / _number(hf, "dim_model_base", 1.0)
    if kind == "granite":
        found["embedding_multiplier"] = _number(hf, "embedding_multiplier", 1.0)
        found["residual_multiplier"] = _number(hf, "residual_multiplier", 1.0)
        found["logits_divisor"] = _number(hf, "logits_scaling", 1.0)
        found["attention_scale"] = _number(hf, "attention_multiplier", 1.0)
    return found


def _read_rope(hf: Json, longest: int, head_dim: int) -> tuple[RopeConfig, int]:
    """Rotary embedding, and the longest sequence: with dynamic NTK `factor` times that of config.json."""
    where = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    entries = _object(hf, where)
    kind = entries.get("rope_type", entries.get("type", "default"))
    if kind not in _ROPE_ENTRIES:
        raise FolderError(f"config.json: {where} has the type {kind!r}: accepted are {', '.join(_ROPE_ENTRIES)}")
    if missing := [name for name, needed in _ROPE_ENTRIES[kind].items() if needed and entries.get(name) is None]:
        raise FolderError(f"config.json: {where} of type {kind!r} lacks {', '.join(missing)}")
    if entries.get("partial_rotary_factor") not in (None, 1):
        raise FolderError(
            f"config.json: {where}.partial_rotary_factor = {entries['partial_rotary_factor']!r}: accepted is 1"
        )
    values: dict[str, Any] = {"rope_type": kind, "theta": _number(dict(hf) | dict(entries), "rope_theta", 10_000.0)}
    for name in _ROPE_ENTRIES[kind]:
        if name in ("short_factor", "long_factor"):
            factors = entries[name]
            if not isinstance(factors, list) or len(factors) != head_dim // 2 or None in factors:
                raise FolderError(f"config.json: {where}.{name} must be a list of head_dim/2 = {head_dim // 2} numbers")
            values[name] = tuple(_number({name: factor}, name, 1.0) for factor in factors)
        elif entries.get(name) is not None:
            values[name] = bool(entries[name]) if name == "truncate" else _number(entries, name, 1.0)
    name = "original_max_position_embeddings"
    original = _whole(hf, name, _whole(entries, name, longest))
    values[name] = original
    if kind == "dynamic":
        values[name] = longest
        return RopeConfig(**values), int(longest * values["factor"])
    if kind == "yarn":
        values.setdefault("factor", longest / original)
    values["attention_factor"] = _attention_factor(kind, entries, values.get("factor", 1.0), longest, original)
    return RopeConfig(**values), longest


def _attention_factor(kind: str, entries: Json, factor: float, longest: int, original: int) -> float:
    """The factor on cos and sin: LongRoPE's sqrt(1 + ln(s) / ln(original)), YaRN's 0.1 ln(factor) + 1, or as given."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if entries.get("attention_factor") is not None:
        return _number(entries, "attention_factor", 1.0)
    if kind == "longrope":
        stretch = _number(entries, "factor", longest / original)
        return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    log, mscale, mscale_all_dim = 0.1 * math.log(factor), entries.get("mscale"), entries.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return (mscale * log + 1) / (mscale_all_dim * log + 1)
    return log + 1


def _read_sparse(entries: Json) -> SparseConfig:
    known = [field.name for field in fields(SparseConfig)]
    if strange := sorted(set(entries) - set(known)):
        raise FolderError(f"config.json: sparse_config has {', '.join(strange)}: accepted are {', '.join(known)}")
    return SparseConfig(**entries)


def _read_quantization(entries: Json) -> QuantizationConfig | None:
    if not entries:
        return None

    def check(name: str, accepted: tuple[Any, ...], default: Any = None) -> Any:
        value = entries.get(name, default)
        if value not in accepted:
            wanted = " or ".join(map(repr, accepted))
            raise FolderError(f"config.json: quantization_config.{name} = {value!r}: accepted is {wanted}")
        return value

    check("quant_method", ("gptq",))
    check("desc_act", (False,), False)
    check("lm_head", (False,), False)
    version = check("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    group_size = entries.get("group_size")
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise FolderError(
            f"config.json: quantization_config.group_size = {group_size!r}: accepted are whole numbers above 0, and -1"
        )
    return QuantizationConfig(check("bits", (2, 4, 8)), group_size, zero_offset=1 if version == "gptq" else 0)


def _read_dtype(hf: Json) -> str:
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise FolderError(f"config.json: dtype = {dtype!r}: accepted are float32, bfloat16 and float16")
    return dtype


def _token_ids(entries: Json, name: str) -> tuple[int, ...]:
    ids = entries.get(name)
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if any(type(token) is not int for token in listed):
        raise FolderError(f"{name} = {ids!r}: accepted are a whole number, a list of them, and null")
    return tuple(listed)
