"""The checkpoints of the parity matrix: SmolLM2 as it is published, and small models trained here, with seeds, on text.

The small ones learn Python's standard library for some minutes, so that their logits say something and greedy text is
decided by more than rounding. A checkpoint is the values that its type stores: they are rounded before anything is
compared, so that every format which holds them holds them exactly.
"""

import dataclasses
import functools
import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from benchmarks.pretrained import smollm2_path
from cpm_jax.checkpoints.weights import Weights, load_weights
from cpm_jax.common.config import config_to_dict
from cpm_jax.common.progress import Progress
from cpm_jax.data.sources import Document, read_documents
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig, RopeConfig, SparseConfig, TernaryConfig
from cpm_jax.modeling.decoder import Params
from cpm_jax.quantization.calibration import calibration_sequences
from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.pipeline import QuantizedModel, quantize_model
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import cosine
from cpm_jax.training.train_state import init_state
from cpm_jax.training.train_step import make_train_step
from experiments.convert import write_checkpoint
from export.gptq import DTYPE as PACKED_DTYPE
from export.hf import DTYPES

HELD_OUT = 10  # of so many documents one is not trained on


@dataclass(frozen=True)
class Scale:
    """How large the small models are, and how long they learn.

    Attributes:
        num_layers: of each.
        mtp_layers: of those that are trained with them.
        vocab_size: of their tokenizer.
        characters: of text that is read.
        steps: of training.
        batch_size: rows of a step.
        seq_len: tokens of a row.
        calibration_sequences: of GPTQ; 0 rounds to the nearest code instead.
        rows: held-out rows that every runtime reads, and continues the beginnings of.
    """

    num_layers: int
    mtp_layers: int
    vocab_size: int
    characters: int
    steps: int
    batch_size: int
    seq_len: int
    calibration_sequences: int
    rows: int


FULL = Scale(4, 1, 1024, 2_000_000, 200, 8, 256, 32, 3)
REDUCED = Scale(2, 0, 512, 300_000, 40, 4, 128, 0, 1)


@dataclass(frozen=True)
class Checkpoint:
    """A model whose logits every runtime is to give.

    Attributes:
        config: the model, in float32.
        params: its parameters, float32 arrays of the values that `dtype` stores.
        tokenizer: its tokenizer.
        dtype: the type that holds the values without loss.
        layout: of Hugging Face folders, its own.
        gguf_type: the packed type of GGUF that it is also written in, a key of `parity_rounding.BLOCKS`.
        quantized: codes and scales, where it is quantised to integers.
        packing: format of folders with those: "gptq" or "marlin".
        ternary: how it was trained, where its weights are ternary.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    dtype: str
    layout: str
    gguf_type: str = "Q8_0"
    quantized: QuantizedModel | None = None
    packing: str = ""
    ternary: TernaryConfig | None = None

    @property
    def bytes(self) -> int:
        """Its values in their type."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params)) * DTYPES[self.dtype].itemsize

    @functools.cached_property
    def sha256(self) -> str:
        """Of its values, configuration and tokenizer."""
        digest = hashlib.sha256(json.dumps(config_to_dict(self.config), sort_keys=True).encode())
        digest.update(self.tokenizer.sha256.encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Texts:
    """Real text.

    Attributes:
        train: documents to learn from.
        held_out: what is measured on.
    """

    train: tuple[str, ...]
    held_out: str


@functools.cache
def read_texts(characters: int) -> Texts:
    """The first documents of the running Python's standard library."""
    texts: list[str] = []
    for document in read_documents("stdlib"):
        if isinstance(document, Document):
            texts.append(document.text)
        if sum(map(len, texts)) >= characters:
            break
    held_out = "".join(texts[::HELD_OUT])
    return Texts(tuple(text for index, text in enumerate(texts) if index % HELD_OUT), held_out)


def held_out_rows(tokenizer: Tokenizer, scale: Scale, length: int) -> Int[np.ndarray, "rows length"]:
    """Rows of held-out text, as far from each other as they can be."""
    ids = tokenizer.encode(read_texts(scale.characters).held_out)
    starts = np.linspace(0, len(ids) - length, scale.rows + 1).astype(int)[:-1]
    return np.asarray([ids[start : start + length] for start in starts], np.int32)


def _small(scale: Scale, **changes: Any) -> ModelConfig:
    """What the small models have in common: widths that groups of 128 and of 256 weights divide."""
    return ModelConfig(
        vocab_size=scale.vocab_size,
        num_layers=scale.num_layers,
        d_model=256,
        num_heads=4,
        num_kv_heads=2,
        d_ff=512,
        max_position_embeddings=1024,
        dtype="float32",
        **changes,
    )


def minicpm(scale: Scale) -> ModelConfig:
    """MiniCPM4 in small: µP's multipliers, LongRoPE below its switch, MTP layers."""
    frequencies = range(32)
    rope = RopeConfig(
        short_factor=tuple(1 + i / 128 for i in frequencies),
        long_factor=tuple(1 + i / 4 for i in frequencies),
        original_max_position_embeddings=512,
    )
    return _small(
        scale,
        rope=rope,
        scale_emb=12.0,
        scale_depth=1.4,
        dim_model_base=128,
        initializer_range=0.1,
        num_nextn_predict_layers=scale.mtp_layers,
    )


def internlm2(scale: Scale) -> ModelConfig:
    """InternLM2 in small: no multipliers, its base of the rotary embedding."""
    return _small(scale, rope=RopeConfig(rope_theta=1_000_000.0))


def ternary(scale: Scale) -> ModelConfig:
    """BitCPM4 in small: the dense model with ternary weights, one scale for each 256."""
    return dataclasses.replace(minicpm(scale), num_nextn_predict_layers=0, ternary=TernaryConfig())


# At 320 tokens 20 blocks, of which a query sees six.
SPARSE = SparseConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4, dense_len=64, variant="huggingface"
)
# The models that are trained, and their learning rates.
FAMILIES: Mapping[str, tuple[Callable[[Scale], ModelConfig], float]] = {
    "minicpm": (minicpm, 0.01),
    "ternary": (ternary, 0.01),
    "internlm2": (internlm2, 0.003),
}


def _train(config: ModelConfig, peak_lr: float, scale: Scale, tokenizer: Tokenizer) -> Params:
    """Parameters after some steps on rows drawn from the text."""
    optimizer = make_optimizer(OptimizerConfig(), cosine(peak_lr, scale.steps, scale.steps // 10), config)
    state, step = init_state(config, optimizer, jax.random.key(0)), make_train_step(config, optimizer)
    ids = np.asarray(tokenizer.encode("".join(read_texts(scale.characters).train)), np.int32)
    random = np.random.default_rng(0)
    positions = np.broadcast_to(np.arange(scale.seq_len), (scale.batch_size, scale.seq_len))
    with Progress("train", scale.steps) as bar:
        for index in range(scale.steps):
            starts = random.integers(0, len(ids) - scale.seq_len - 1, scale.batch_size)
            rows = ids[starts[:, None] + np.arange(scale.seq_len + 1)]
            batch = {
                "tokens": rows[:, :-1],
                "targets": rows[:, 1:],
                "loss_weights": np.ones(positions.shape, np.float32),
                "segment_ids": np.ones_like(positions),
                "positions": positions,
                "source_ids": np.zeros(len(rows), np.int32),
            }
            state, metrics = step(state, batch)
            bar.update(index + 1, loss=float(metrics["ntp_loss"]))
    return state.params


def trained(family: str, scale: Scale, work: Path) -> Weights:
    """A small model; it is trained once for each folder.

    Args:
        family: a key of `FAMILIES`.
        scale: its size and training.
        work: where it is kept.
    """
    make, peak_lr = FAMILIES[family]
    config = make(scale)
    recipe = [config_to_dict(config), dataclasses.asdict(scale), peak_lr, platform.python_version()]
    name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    folder = work / "checkpoints" / f"{family}-{name}"
    if not (folder / "checkpoints/0").is_dir():  # it gets that name when it is whole
        tokenizer = Tokenizer.train(read_texts(scale.characters).train, scale.vocab_size)
        params = _train(config, peak_lr, scale, tokenizer)
        write_checkpoint(Weights(config, params, tokenizer, {}, {}, {}), folder, {})
    return load_weights(folder)


def _float(weights: Weights, layout: str, dtype: str = "float32", **changes: Any) -> Checkpoint:
    """The values as `dtype` stores them."""
    config = dataclasses.replace(weights.model, dtype="float32", param_dtype="float32", **changes)
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(DTYPES[dtype]).astype(np.float32), weights.params)
    if not config.num_nextn_predict_layers:
        params.pop("mtp_layers", None)
    return Checkpoint(config, params, weights.tokenizer, dtype, layout)


def _minicpm(scale: Scale, work: Path, **changes: Any) -> Checkpoint:
    return _float(trained("minicpm", scale, work), "minicpm", **{"num_nextn_predict_layers": 0, **changes})


def _int4(scale: Scale, work: Path, packing: str, method: QuantizationConfig) -> Checkpoint:
    """The dense model in 4 bits; what is not quantised in the type of packed folders."""
    dense, sequences = _minicpm(scale, work), None
    if not scale.calibration_sequences:
        method = dataclasses.replace(method, method="rtn")
    if method.calibrates:
        texts = read_texts(scale.characters).train
        sequences = calibration_sequences(texts, dense.tokenizer, scale.calibration_sequences, scale.seq_len)
    quantized = quantize_model(dense.params, dense.config, method, sequences)

    def stored(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        linear = "_proj" in jax.tree_util.keystr(path)
        return leaf if linear else leaf.astype(DTYPES[PACKED_DTYPE]).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(stored, quantized.params)
    return Checkpoint(
        quantized.config, params, dense.tokenizer, "float32", dense.layout, quantized=quantized, packing=packing
    )


def _ternary(scale: Scale, work: Path) -> Checkpoint:
    """The rounded values that the training multiplied with, as every verb loads them."""
    weights = trained("ternary", scale, work)
    return dataclasses.replace(_float(weights, "minicpm"), gguf_type="TQ2_0", ternary=weights.ternary)


def _smollm2(scale: Scale, work: Path) -> Checkpoint:
    return _float(load_weights(smollm2_path()), "llama", "bfloat16")


P_GPTQ = QuantizationConfig(method="gptq", skip_initial_tokens=4)
RTN = QuantizationConfig(method="rtn")
# The rows of the matrix.
CHECKPOINTS: Mapping[str, Callable[[Scale, Path], Checkpoint]] = {
    "SmolLM2-135M": _smollm2,
    "MiniCPM, dense": _minicpm,
    "MiniCPM, sparse": functools.partial(_minicpm, sparse_config=SPARSE),
    "MiniCPM, MTP": functools.partial(_minicpm, num_nextn_predict_layers=1),
    "MiniCPM, ternary": _ternary,
    "MiniCPM, GPTQ": functools.partial(_int4, packing="gptq", method=P_GPTQ),
    "MiniCPM, Marlin": functools.partial(_int4, packing="marlin", method=RTN),
    "InternLM2": lambda scale, work: _float(trained("internlm2", scale, work), "internlm2"),
}
