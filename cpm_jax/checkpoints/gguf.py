"""GGUF files as a source of Hugging Face tensors: names, configuration and the order of rows translated back.

llama.cpp writes a Hugging Face model under its own names and, for some architectures, with the rows of q and k
permuted for a rotary embedding of neighbouring pairs. Here both are undone, so that the tables of `hf_layouts.py` serve
GGUF too.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpm_jax.checkpoints.gguf_file import GgufError, GgufFile
from cpm_jax.checkpoints.sources import Index, some_names
from cpm_jax.data.gguf_tokenizer import tokenizer_from_gguf
from cpm_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class GgufArchitecture:
    """What `general.architecture` says of a file; `export/gguf.py` writes by the same tables.

    Attributes:
        hf_class: class of `transformers` (or of the model's own repository) that it was converted from.
        model_type: its `model_type`.
        permuted: tensors of a layer whose rows llama.cpp permutes.
        mup: whether MiniCPM's multipliers stand in the metadata.
    """

    hf_class: str
    model_type: str
    permuted: frozenset[str] = frozenset()
    mup: bool = False


_Q_K = frozenset({"attn_q.weight", "attn_k.weight"})
ARCHITECTURES = {
    "llama": GgufArchitecture("LlamaForCausalLM", "llama", _Q_K | {"attn_q.bias", "attn_k.bias"}),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", "qwen2"),
    "minicpm": GgufArchitecture("MiniCPMForCausalLM", "minicpm", _Q_K, mup=True),
}

# GGUF's name, Hugging Face's, and the shape in the letters of docs/architecture.md (Q and K: the rows of q and k).
TOP = {
    "token_embd.weight": ("model.embed_tokens.weight", "VD"),
    "output_norm.weight": ("model.norm.weight", "D"),
    "output.weight": ("lm_head.weight", "VD"),
}
LAYER = {
    "attn_norm.weight": ("input_layernorm.weight", "D"),
    "attn_q.weight": ("self_attn.q_proj.weight", "QD"),
    "attn_q.bias": ("self_attn.q_proj.bias", "Q"),
    "attn_k.weight": ("self_attn.k_proj.weight", "KD"),
    "attn_k.bias": ("self_attn.k_proj.bias", "K"),
    "attn_v.weight": ("self_attn.v_proj.weight", "KD"),
    "attn_v.bias": ("self_attn.v_proj.bias", "K"),
    "attn_output.weight": ("self_attn.o_proj.weight", "DQ"),
    "attn_output.bias": ("self_attn.o_proj.bias", "D"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "D"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "FD"),
    "ffn_up.weight": ("mlp.up_proj.weight", "FD"),
    "ffn_down.weight": ("mlp.down_proj.weight", "DF"),
}
_OPTIONAL = {"output.weight", *(name for name in LAYER if name.endswith(".bias"))}
# They go into the configuration, not among the parameters. One value for each of the head_dim/2 frequencies.
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_ROPE = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)


class GgufSource:
    """A GGUF file as a `TensorSource`: Hugging Face names and shapes, float32 values.

    Attributes:
        config: the content of the `config.json` that it was converted from, as far as a decoder needs it.
    """

    def __init__(self, path: str | Path):
        """Reads metadata and the table of tensors; the values are read one tensor at a time.

        Raises:
            GgufError: the file cannot be read, its architecture or a setting of it is not known, or tensors are
                missing, are too many or have another shape than the metadata says.
        """
        self._file = GgufFile(path)
        name = self._file.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise GgufError(
                f"{self._file.path}: general.architecture is {name!r}; known are {', '.join(sorted(ARCHITECTURES))}"
            )
        self._name, self._architecture = name, ARCHITECTURES[name]
        if (parts := self._file.metadata.get("split.count", 1)) not in (0, 1):
            raise GgufError(
                f"{self._file.path} is one of {parts} parts: give the whole file, which llama.cpp's llama-gguf-split "
                "--merge writes"
            )
        self._stored = self._check_tensors()
        self.config = self._hf_config()
        self.generation_config: dict[str, Any] = {}

    def names(self) -> Iterable[str]:
        """The Hugging Face names of the tensors, in the order of the file."""
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, by its Hugging Face name."""
        return self._file.tensors[self._stored[name]].shape

    def dtype(self, name: str) -> np.dtype:
        """float32, whatever it is stored as."""
        return np.dtype(np.float32)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A tensor or a part of it, by its Hugging Face name: float32, rows in Hugging Face's order.

        Args:
            name: one of `names()`.
            index: which part: a slice for each dimension; the empty index is the whole.

        Raises:
            GgufError: the file has become shorter.
        """
        stored = self._stored[name]
        kind = stored.split(".", 2)[-1]
        if kind in self._architecture.permuted:
            heads = self._heads if kind.startswith("attn_q") else self._kv_heads
            return _half_split_rows(self._file.read(stored), heads)[index]
        shape = self.shape(name)
        if index and len(shape) == 2:
            return self._file.read(stored, range(*index[0].indices(shape[0])))[:, index[1]]
        return self._file.read(stored)[index]

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the metadata; None where there is none.

        Raises:
            DataError: it is of a kind that is not known, or damaged.
        """
        return tokenizer_from_gguf(self._file.metadata, str(self._file.path))

    # What the metadata says.

    def _get(self, key: str, accepts: Callable[[Any], bool], expected: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`; a `default` of None makes it required."""
        full = f"{self._name}.{key}"
        value = self._file.metadata.get(full, default)
        if value is None:
            raise GgufError(f"{self._file.path} has no metadata {full}: expected {expected}")
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one number for each layer, all the same
        if isinstance(value, bool) or not accepts(value):
            raise GgufError(f"{self._file.path}: {full} = {str(value)[:80]}: expected {expected}")
        return value

    def _integer(self, key: str, default: int | None = None) -> int:
        return self._get(
            key, lambda v: isinstance(v, int) and v > 0, "a positive integer, equal in all layers", default
        )

    def _number(self, key: str, default: float | None = None) -> float:
        return self._get(key, lambda v: isinstance(v, int | float) and v > 0, "a positive number", default)

    def _only(self, key: str, value: Any, why: str) -> None:
        """Refuses a file in which a setting that we do not have is on."""
        self._get(key, lambda given: given == value, f"{value}, as {why}", value)

    @property
    def _width(self) -> int:
        return self._integer("embedding_length")

    @property
    def _heads(self) -> int:
        return self._integer("attention.head_count")

    @property
    def _kv_heads(self) -> int:
        return self._integer("attention.head_count_kv", self._heads)

    @property
    def _head_dim(self) -> int:
        return self._integer("attention.key_length", self._width // self._heads)

    @property
    def _vocab_size(self) -> int:
        tokens = self._file.metadata.get("tokenizer.ggml.tokens")
        return self._integer("vocab_size", len(tokens) if isinstance(tokens, list) else None)

    def _hf_config(self) -> dict[str, Any]:
        self._only("expert_count", 0, "mixtures of experts are not supported")
        for key in ("attention.value_length", "rope.dimension_count"):
            self._only(key, self._head_dim, "every dimension of a head is rotated and keys are as wide as values")
        metadata = self._file.metadata
        token_ids = {name: metadata.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
        return {
            "architectures": [self._architecture.hf_class],
            "model_type": self._architecture.model_type,
            "vocab_size": self._vocab_size,
            "hidden_size": self._width,
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": self._integer("block_count"),
            "num_attention_heads": self._heads,
            "num_key_value_heads": self._kv_heads,
            "head_dim": self._head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._integer("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._number("rope.freq_base", 10_000.0),
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._file.tensors,
            **token_ids,
            **(self._mup() if self._architecture.mup else {}),
        }

    def _mup(self) -> dict[str, Any]:
        """MiniCPM's multipliers. The file holds float32 quotients; what they were computed from has few digits."""
        layers, logit_scale = self._integer("block_count"), self._number("logit_scale")
        base = round(self._width / logit_scale)
        if not base or not math.isclose(self._width / base, logit_scale, rel_tol=1e-6):
            raise GgufError(
                f"{self._file.path}: {self._name}.logit_scale = {logit_scale}: expected {self._name}.embedding_length "
                f"= {self._width} divided by a whole number, dim_model_base"
            )
        residual = self._number("residual_scale")
        depth = residual * math.sqrt(layers)
        return {
            "scale_emb": self._number("embedding_scale"),
            "scale_depth": depth if residual == 1 else _shortest(depth, rel_tol=1e-6),  # 1 is no multiplier, exactly
            "dim_model_base": base,
        }

    def _rope_scaling(self) -> dict[str, Any] | None:
        kinds = ("none", "linear", "yarn", "longrope")
        kind = self._get("rope.scaling.type", lambda value: value in kinds, f"one of {', '.join(kinds)}", "none")
        given = {name: self._file.read(name).tolist() for name in _ROPE if name in self._file.tensors}
        original = self._integer("rope.scaling.original_context_length", self._integer("context_length"))
        if ROPE_FREQS in given:
            # Llama 3.1's scaling: one divisor for each frequency, at any length, which LongRoPE with equal lists is.
            given = {ROPE_LONG: given[ROPE_FREQS], ROPE_SHORT: given[ROPE_FREQS]}
        if given:
            if len(given) != 2:
                raise GgufError(f"{self._file.path} has only one of {ROPE_LONG} and {ROPE_SHORT}: expected both")
            # Where the file does not say up to what length the short factors hold, it is the whole context, as in
            # llama.cpp.
            return {
                "rope_type": "longrope",
                "long_factor": given[ROPE_LONG],
                "short_factor": given[ROPE_SHORT],
                "original_max_position_embeddings": original,
                "attention_factor": self._number("rope.scaling.attn_factor", 1.0),
            }
        if kind == "longrope":
            raise GgufError(f"{self._file.path}: rope.scaling.type is longrope: expected {ROPE_LONG} and {ROPE_SHORT}")
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": self._number("rope.scaling.factor")}
        if kind == "yarn":
            for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"):
                self._only(key, 1.0, "llama.cpp and transformers read other values differently")
            self._only("rope.scaling.yarn_log_multiplier", 0.0, "only DeepSeek's YaRN has one")
            scaling |= {
                "original_max_position_embeddings": original,
                "beta_fast": self._number("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": self._number("rope.scaling.yarn_beta_slow", 1.0),
            }
        return scaling

    # What the table of tensors says.

    def _check_tensors(self) -> dict[str, str]:
        """GGUF's names by Hugging Face's.

        Raises:
            GgufError: tensors are missing, are too many, or have another shape than the metadata says.
        """
        tensors, path = self._file.tensors, self._file.path
        if (layers := self._integer("block_count")) > len(tensors):
            raise GgufError(f"{path} says {self._name}.block_count = {layers} and has only {len(tensors)} tensors")
        sizes = {
            "V": self._vocab_size,
            "D": self._width,
            "F": self._integer("feed_forward_length"),
            "Q": self._heads * self._head_dim,
            "K": self._kv_heads * self._head_dim,
        }
        expected = {name: (theirs, tuple(sizes[s] for s in shape)) for name, (theirs, shape) in TOP.items()}
        for layer in range(layers):
            expected |= {
                f"blk.{layer}.{name}": (f"model.layers.{layer}.{theirs}", tuple(sizes[s] for s in shape))
                for name, (theirs, shape) in LAYER.items()
            }
        required = [name for name in expected if re.sub(r"^blk\.\d+\.", "", name) not in _OPTIONAL]
        if missing := [name for name in required if name not in tensors]:
            raise GgufError(
                f"{path} lacks {some_names(missing)}: {self._name} with {layers} layers has at least {len(required)} "
                "tensors"
            )
        rope = dict.fromkeys(_ROPE, (self._head_dim // 2,))
        if extra := [name for name in tensors if name not in expected and name not in rope]:
            raise GgufError(
                f"{path} has tensors that {self._name} with {layers} layers has no place for: {some_names(extra)}"
            )
        for name, tensor in tensors.items():
            shape = rope[name] if name in rope else expected[name][1]
            if tensor.shape != shape:
                raise GgufError(
                    f"{path}: tensor {name} has shape {tensor.shape}: by the metadata of the file expected {shape}"
                )
        return {expected[name][0]: name for name in tensors if name not in rope}


def interleaved_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head in llama.cpp's order of neighbouring pairs: (0, H/2, 1, H/2 + 1, …)."""
    half = len(values) // heads // 2
    halves = values.reshape(heads, 2, half, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _half_split_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Brings the rows of each head from the order (0, H/2, 1, H/2 + 1, …) of pairs back to (0, 1, …, H - 1)."""
    half = len(values) // heads // 2
    pairs = values.reshape(heads, half, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _shortest(value: float, rel_tol: float) -> float:
    """The decimal with the fewest digits that is as close as `rel_tol`."""
    rounded = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next((short for short in rounded if math.isclose(short, value, rel_tol=rel_tol)), value)
