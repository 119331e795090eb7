"""config.json of Hugging Face's models and our `ModelConfig`, in both directions; what we cannot compute is refused.

An architecture is a `Layout`: its table of names from `hf_layouts.py`, and what its config.json says in its own words.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cpm_jax.checkpoints.hf_layouts import INTERNLM2, LLAMA, MIMO, QWEN2, Names
from cpm_jax.checkpoints.hf_rope import read_rope, write_rope
from cpm_jax.checkpoints.sources import SourceError
from cpm_jax.common.config import ConfigError, config_from_dict, config_to_dict
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.rotary import attention_factor

Json = Mapping[str, Any]

# Theirs and ours, in every architecture.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
_WHOLE = tuple(_FIELDS)[: list(_FIELDS).index("rms_norm_eps")]  # whole numbers
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# What changes the computation in a way that our decoder does not have, and the values that leave it alone.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish", None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "use_mrope": (False, None),
    "quantization_config": (None, {}),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "n_routed_experts": (0, None),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}


@dataclass(frozen=True)
class Layout:
    """An architecture of Hugging Face folders.

    Attributes:
        model_type: its name in config.json.
        architecture: name of its class.
        names: its tensors.
        fields: entries of config.json beside those that all have, and the fields of ours that they are.
        defaults: what its class takes where config.json says nothing (`None` for head_dim and num_key_value_heads is
            what they are derived from).
        rope_types: kinds of rotary embedding that its class computes.
        attention_factor: whether its class reads the attention factor of rope_scaling, where its type has one.
        bias: entry of config.json that switches on the biases of attention; "" where q, k and v always have them.
        has_head_dim: whether heads may be of another width than hidden_size / num_attention_heads.
        in_transformers: whether transformers has its class, so that no code of others is needed.
        constants: entries that are written, and of which no other value is computed by ours.
        read: further fields of ours out of config.json.
        write: further entries of config.json.
    """

    model_type: str
    architecture: str
    names: Names
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
    attention_factor: bool = True
    bias: str = "attention_bias"
    has_head_dim: bool = True
    in_transformers: bool = True
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Json], dict[str, Any]] = lambda hf: {}
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}

    @property
    def multipliers(self) -> bool:
        """Whether it has MiniCPM's multipliers of embeddings, residual branches and logits."""
        return self.model_type in ("granite", "minicpm")


def _granite_fields(hf: Json) -> dict[str, Any]:
    """Granite's multipliers as ours; they are the same factors."""
    width, layers = hf["hidden_size"], hf["num_hidden_layers"]
    head = hf.get("head_dim") or width // hf["num_attention_heads"]
    attention = hf.get("attention_multiplier", 1.0)
    if not math.isclose(attention, head**-0.5, rel_tol=1e-9):
        raise SourceError(
            f"config.json: attention_multiplier = {attention}: accepted is 1/sqrt(head_dim) = {head**-0.5}, by which "
            "our attention scales"
        )
    logits, residual = hf.get("logits_scaling", 1.0), hf.get("residual_multiplier", 1.0)
    base = round(width / logits)
    if base < 1 or not math.isclose(width / base, logits, rel_tol=1e-9):
        raise SourceError(
            f"config.json: logits_scaling = {logits}: accepted is hidden_size / n for a whole n, such as "
            f"{width / max(base, 1)}"
        )
    depth = residual * math.sqrt(layers)
    shorter = float(f"{depth:.12g}")  # 1.4 comes back as 1.4
    return {
        "scale_emb": float(hf.get("embedding_multiplier", 1.0)),
        "scale_depth": 0.0 if residual == 1 else shorter if shorter / math.sqrt(layers) == residual else depth,
        "dim_model_base": 0 if logits == 1 else base,
    }


def _granite_entries(config: ModelConfig) -> dict[str, Any]:
    return {
        "embedding_multiplier": config.scale_emb,
        "residual_multiplier": config.residual_multiplier,
        "attention_multiplier": config.head_size**-0.5,
        "logits_scaling": config.width_multiplier,
    }


def _minicpm_fields(hf: Json) -> dict[str, Any]:
    """The values by which MiniCPM's factors are 1 are 0 with us, which switches them off."""
    off: dict[str, Any] = {}
    if hf.get("scale_depth", 1) / math.sqrt(hf["num_hidden_layers"]) == 1:
        off["scale_depth"] = 0.0
    if hf.get("dim_model_base", 1) == hf["hidden_size"]:
        off["dim_model_base"] = 0
    return off


def _minicpm_entries(config: ModelConfig) -> dict[str, Any]:
    return {
        "scale_depth": config.scale_depth or math.sqrt(config.num_layers),
        "dim_model_base": config.dim_model_base or config.d_model,
        "mup_denominator": config.num_layers,
    }


def _read_sparse(hf: Json) -> SparseConfig | None:
    """What the code published with MiniCPM4 computes by a sparse_config; what is left out are that code's defaults."""
    entries = hf.get("sparse_config")
    return config_from_dict(SparseConfig, {"variant": "huggingface"} | entries) if entries else None


def _write_sparse(sparse: SparseConfig | None) -> dict[str, Any]:
    """Theirs has no name for other readings of the algorithm: those are entries of our own, which its code passes over.

    Classes without sparse attention pass over all of it, and attend densely with the same weights.
    """
    if sparse is None:
        return {}
    entries = config_to_dict(sparse)
    usual = {"variant": "huggingface", "lse_approximation": True}
    return {"sparse_config": {name: value for name, value in entries.items() if usual.get(name) != value}}


_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}

LAYOUTS = {
    layout.model_type: layout
    for layout in (
        Layout("llama", "LlamaForCausalLM", LLAMA, {}, _UNTIED | {"max_position_embeddings": 2048}),
        Layout(
            "qwen2",
            "Qwen2ForCausalLM",
            QWEN2,
            {},
            _UNTIED | {"max_position_embeddings": 32768},
            bias="",
            constants={"use_sliding_window": False},
        ),
        Layout(
            "granite",
            "GraniteForCausalLM",
            LLAMA,
            {},
            _UNTIED | {"max_position_embeddings": 2048},
            read=_granite_fields,
            write=_granite_entries,
        ),
        Layout(
            "minicpm",
            "MiniCPMForCausalLM",
            LLAMA,
            {"scale_emb": "scale_emb", "scale_depth": "scale_depth", "dim_model_base": "dim_model_base"},
            _TIED | {"max_position_embeddings": 2048, "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1},
            rope_types=("default", "linear", "dynamic", "longrope"),
            attention_factor=False,
            has_head_dim=False,
            in_transformers=False,
            read=_minicpm_fields,
            write=_minicpm_entries,
        ),
        Layout(
            "internlm2",
            "InternLM2ForCausalLM",
            INTERNLM2,
            {},
            _UNTIED | {"max_position_embeddings": 2048},
            rope_types=("default", "linear", "dynamic"),
            bias="bias",
            has_head_dim=False,
            in_transformers=False,
        ),
        Layout(
            "mimo",
            "MiMoForCausalLM",
            MIMO,
            {"num_nextn_predict_layers": "num_nextn_predict_layers"},
            _UNTIED | {"max_position_embeddings": 32768, "num_nextn_predict_layers": 0},
            bias="",
            in_transformers=False,
            constants={"use_sliding_window": False, "use_mrope": False, "attention_bias": True},
        ),
    )
}
_BIAS_DEFAULT = {"bias": True}  # of InternLM2's class; the others take False


def find_layout(hf: Json) -> Layout:
    """The layout that a config.json names.

    Raises:
        SourceError: it names another one.
    """
    model_type = hf.get("model_type")
    architectures = hf.get("architectures") or []
    named = architectures if isinstance(architectures, list) else [architectures]
    for layout in LAYOUTS.values():
        if model_type == layout.model_type or (model_type is None and layout.architecture in named):
            return layout
    raise SourceError(
        f"config.json: model_type = {model_type!r} (architectures {architectures}): accepted are {', '.join(LAYOUTS)}"
    )


def default_layout(config: ModelConfig) -> Layout:
    """The layout of a class in `transformers` that computes what our decoder does, whatever its tokenizer.

    Qwen2's class is not among them: for its model type transformers puts Qwen's own rules for splitting text in place
    of those in tokenizer.json. Llama's computes the same with a zero bias on o.
    """
    return LAYOUTS["granite" if _has_multipliers(config) else "llama"]


def _has_multipliers(config: ModelConfig) -> bool:
    return bool(config.scale_emb != 1 or config.scale_depth or config.dim_model_base)


def read_config(hf: Json) -> ModelConfig:
    """The decoder that a config.json describes; dtypes are the defaults.

    Raises:
        SourceError: an entry is missing, of a wrong type, or asks for what our decoder does not compute.
    """
    layout = find_layout(hf)
    if missing := [name for name in _REQUIRED if hf.get(name) is None]:
        raise SourceError(f"config.json lacks {', '.join(missing)}")
    for name in _WHOLE:
        if (value := hf.get(name)) is not None and (type(value) is not int or value < 1):
            raise SourceError(f"config.json: {name} = {value!r}: accepted are whole numbers above 0")
    for name, accepted in (_ONLY | {name: (value, None) for name, value in layout.constants.items()}).items():
        if name in hf and hf[name] not in accepted:
            raise SourceError(
                f"config.json: {name} = {hf[name]!r}: accepted is {' or '.join(map(repr, accepted))}; our decoder does "
                "not compute anything else"
            )
    kinds = hf.get("layer_types") or ["full_attention"]
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise SourceError(f"config.json: layer_types = {kinds!r}: accepted is 'full_attention' for every layer")
    values = dict(layout.defaults)
    values |= {name: hf[name] for name in (_FIELDS | dict(layout.fields)) if hf.get(name) is not None}
    values.setdefault("num_key_value_heads", hf["num_attention_heads"])
    ours = {(_FIELDS | dict(layout.fields))[name]: value for name, value in values.items()}
    if ours["d_model"] % ours["num_heads"] == 0:
        width = ours["d_model"] // ours["num_heads"]
        if not layout.has_head_dim and ours.get("head_dim", width) != width:
            raise SourceError(
                f"config.json: head_dim = {ours['head_dim']}: {layout.architecture} has heads of hidden_size / "
                f"num_attention_heads = {width}"
            )
        ours.setdefault("head_dim", width)
    bias = hf.get(layout.bias, _BIAS_DEFAULT.get(layout.bias, False)) if layout.bias else True
    try:
        rope, longest = read_rope(hf, ours["max_position_embeddings"])
        ours |= {"attention_bias": bias, "rope": rope, "max_position_embeddings": longest} | layout.read(hf)
        return dataclasses.replace(config_from_dict(ModelConfig, ours), sparse_config=_read_sparse(hf))
    except (ConfigError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise SourceError(f"config.json does not describe a decoder of ours: {error}") from error


def notes(hf: Json) -> list[str]:
    """What a config.json says that our decoder leaves aside without computing something else where it is used."""
    found = []
    layers, denominator = hf.get("num_hidden_layers"), hf.get("mup_denominator")
    if denominator not in (None, layers):
        found.append(
            f"config.json: mup_denominator = {denominator}: residual branches are multiplied by scale_depth / "
            f"sqrt(num_hidden_layers = {layers}), as in the code published with the weights"
        )
    return found


def without_token_ids(imported: Json) -> dict[str, Any]:
    """What the metadata of an imported model says, for the model with another tokenizer.

    Args:
        imported: with config.json as "config" and generation_config.json as "generation_config", as `convert` keeps
            them in a checkpoint.
    """
    files = {name: imported.get(name, {}) for name in ("config", "generation_config")}
    return dict(imported) | {
        file: {name: value for name, value in content.items() if not name.endswith("_token_id")}
        for file, content in files.items()
    }


def eos_token_ids(config: Json, generation_config: Json) -> tuple[int, ...]:
    """The tokens that end a text, by what a model was published with; empty where it does not say.

    Args:
        config: its config.json.
        generation_config: its generation_config.json, which comes first, as in transformers.

    Raises:
        SourceError: they are no whole numbers.
    """
    ids = generation_config.get("eos_token_id", config.get("eos_token_id"))
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if any(type(token) is not int for token in listed):
        file = "generation_config.json" if "eos_token_id" in generation_config else "config.json"
        raise SourceError(f"{file}: eos_token_id = {ids!r}: accepted are a whole number, a list of them, and null")
    return tuple(listed)


def write_config(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The entries of config.json that say what is computed.

    Args:
        config: our model.
        layout: from `LAYOUTS`.

    Raises:
        ConfigError: the layout has no place for something that the model computes.
    """
    _check_holds(config, layout)
    fields = _FIELDS | dict(layout.fields)
    entries: dict[str, Any] = {"architectures": [layout.architecture], "model_type": layout.model_type}
    entries |= {theirs: getattr(config, ours) for theirs, ours in fields.items()}
    entries |= {"head_dim": config.head_size, "hidden_act": "silu", **layout.constants}
    if layout.bias:
        entries[layout.bias] = config.attention_bias
    return entries | write_rope(config) | layout.write(config) | _write_sparse(config.sparse_config)


def _check_holds(config: ModelConfig, layout: Layout) -> None:
    def refuse(field: str, value: Any, why: str) -> None:
        raise ConfigError(f"{field} = {value}: the layout {layout.model_type!r} {why}", field=field)

    config.refuse_ternary("a published config")
    others = ", ".join(name for name, other in LAYOUTS.items() if other.multipliers)
    if _has_multipliers(config) and not layout.multipliers:
        for name, off in (("scale_emb", 1), ("scale_depth", 0), ("dim_model_base", 0)):
            if (value := getattr(config, name)) != off:
                refuse(f"ModelConfig.{name}", value, f"has no such multiplier; {others} have")
    if not layout.bias and not config.attention_bias:
        others = ", ".join(name for name, other in LAYOUTS.items() if other.bias)
        refuse("ModelConfig.attention_bias", False, f"always has biases on q, k and v; choose one of {others}")
    if not layout.has_head_dim and config.head_size * config.num_heads != config.d_model:
        others = ", ".join(name for name, other in LAYOUTS.items() if other.has_head_dim)
        refuse("ModelConfig.head_dim", config.head_size, f"takes d_model / num_heads; {others} take any")
    if (kind := config.rope.rope_type) not in layout.rope_types:
        others = ", ".join(name for name, other in LAYOUTS.items() if kind in other.rope_types)
        refuse("RopeConfig.scaling", kind, f"knows {', '.join(layout.rope_types)}; {others} have it")
    usual = attention_factor(dataclasses.replace(config, rope=dataclasses.replace(config.rope, attention_factor=None)))
    held = layout.attention_factor and kind in ("yarn", "longrope")
    if config.rope.attention_factor not in (None, usual) and not held:
        why = f"takes {usual:.6g} for rope type {kind!r} and max_position_embeddings = {config.max_position_embeddings}"
        refuse("RopeConfig.attention_factor", config.rope.attention_factor, why)
