"""Proves that an export computes what we do: `transformers` loads it, and both read the same real text."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpm_jax.checkpoints.hf_config import find_layout
from cpm_jax.checkpoints.sources import CONFIG_FILE
from cpm_jax.common.config import ConfigError
from cpm_jax.common.extras import how_to_install
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import bind
from export.folders import ExportError
from export.hf_code import why_not_run


@dataclass(frozen=True)
class HfCheck:
    """How close `transformers` comes.

    Attributes:
        architecture: class that `transformers` loaded.
        max_error: largest absolute difference between two logits, both computed in float32.
        largest_logit: largest absolute logit, the scale that float32 rounds to.
        tokens: number of positions compared.
        greedy_tokens: number of greedily chosen tokens that agree.
        other_ids: number of texts to which transformers gives other token ids, as it does not know the rule by which a
            GGUF file says that text is split; both sides then read our ids. Always 0 for a folder.
    """

    architecture: str
    max_error: float
    largest_logit: float
    tokens: int
    greedy_tokens: int
    other_ids: int = 0

    def __str__(self) -> str:
        return (
            f"{self.architecture}: {self.tokens} positions, largest difference of logits {self.max_error:.2g} "
            f"where they reach {self.largest_logit:.3g}; "
            f"{self.greedy_tokens} greedy tokens agree"
        )


def _load(path: Path) -> tuple[Any, Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(f"checking against transformers needs {error.name}: {how_to_install('export')}") from error
    if path.suffix == ".gguf":
        folder, options, runs_code = path.parent, {"gguf_file": path.name}, False
    else:
        layout = find_layout(json.loads((path / CONFIG_FILE).read_text("utf-8")))
        if not layout.in_transformers and (reason := why_not_run(layout, path)):
            raise ConfigError(f"{path} cannot be checked: {reason}")
        folder, options, runs_code = path, {}, not layout.in_transformers
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=runs_code,
            **options,
        )
        model, info = loaded
        # Given the config, it has no reason to run code, and none of its own is run.
        given = {"config": model.config, "trust_remote_code": False} if runs_code else {}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **given, **options)
    except Exception as error:  # its classes raise whatever a file leads to
        raise ExportError(f"transformers does not load {path}: {error}") from error
    problems = {name: sorted(map(str, found)) for name, found in info.items() if found}
    if problems:
        raise ExportError(f"transformers loads {path} with {problems}")
    # What a model was published with may change greedy text too, by a penalty on repetition for one.
    ends = {name: getattr(model.generation_config, name) for name in ("eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**ends)
    return torch, model.eval(), tokenizer


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    decoder = bind(config, params)
    return decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))


def logits_of(config: ModelConfig, params: Any, ids: Sequence[int]) -> np.ndarray:
    """Our logits of one row of tokens, float32 [T, V]."""
    return np.asarray(_logits(config, params, jnp.asarray([ids], jnp.int32)))[0]


def greedy(
    config: ModelConfig, params: Any, ids: Sequence[int], count: int, follow: Sequence[int] = (), tie: float = 0.0
) -> list[int]:
    """The tokens by which our decoder goes on, the most probable one each time.

    Args:
        config: the model.
        params: its parameters.
        ids: what to continue.
        count: by how many tokens.
        follow: tokens to choose where they are as probable as the best.
        tie: difference of logits up to which two tokens are.
    """
    # One row of fixed length, so that it compiles once; what follows a position is not seen by it.
    row = np.zeros((1, len(ids) + count), np.int32)
    row[0, : len(ids)] = ids
    for step in range(count):
        place = len(ids) + step
        logits = np.asarray(_logits(config, params, jnp.asarray(row)))[0, place - 1]
        token = int(logits.argmax())
        if step < len(follow) and logits[token] - logits[follow[step]] <= tie:
            token = follow[step]
        row[0, place] = token
    return row[0, len(ids) :].tolist()


def check_hf(
    folder: Path,
    params: dict[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_tokens: int = 256,
    greedy_tokens: int = 32,
    tolerance: float = 1e-4,
) -> HfCheck:
    """Compares tokens, logits and greedy text of a folder with ours.

    Both sides compute in float32, from the weights as they are stored in the folder. What they may differ by scales
    with the logits, as rounding does. On trained models most of the difference is not ours: transformers rounds the
    angles of the rotary embedding to float32, which at position p is off by up to p · 2^-24 radians.

    Args:
        folder: written by `export.hf.export_hf`; or a .gguf file, of an architecture that transformers has.
        params: our tree; of a .gguf file as it reads back, because its types are not ours.
        config: its model.
        tokenizer: ours.
        texts: what to compare on.
        max_tokens: how much of each text is used.
        greedy_tokens: how many tokens each text is continued by.
        tolerance: largest difference of two logits that is allowed, as a fraction of the largest logit, or as it is
            where no logit is larger than 1.

    Returns:
        The largest difference found.

    Raises:
        ExportError: token ids, logits or greedy text differ.
        ConfigError: torch or transformers is not installed, transformers has no class for the layout and the folder
            no code of ours, or the texts have no tokens.
    """
    torch, model, hf_tokenizer = _load(folder := Path(folder))
    is_gguf = folder.suffix == ".gguf"
    stored = "float32" if is_gguf else json.loads((folder / CONFIG_FILE).read_text("utf-8"))["dtype"]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(stored).astype(jnp.float32), params)
    config = dataclasses.replace(config, dtype="float32", param_dtype="float32", fp8=False, remat="none")
    max_error, largest, positions, agreed, other_ids = 0.0, 0.0, 0, 0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        theirs = hf_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids != theirs and is_gguf:
            other_ids += 1
        elif ids != theirs:
            raise ExportError(f"token ids differ on {text[:60]!r}: ours {ids[:8]}…, transformers {theirs[:8]}…")
        if not (ids := ids[:max_tokens]):
            continue
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        ours = logits_of(config, params, ids)
        # By numpy, which keeps what is no number; Python's max would pass over it.
        max_error = float(np.maximum(max_error, np.abs(ours - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
        positions += len(ids)
        if greedy_tokens:
            agreed += _greedy(torch, model, config, params, ids, greedy_tokens, tolerance * max(1.0, largest))
    if not positions:
        raise ConfigError("texts: none of them has a token to compare on", field="texts")
    if not max_error <= tolerance * max(1.0, largest):
        raise ExportError(
            f"logits of {folder} differ from ours by {max_error:.3g}: more than {tolerance:g} of the largest, "
            f"{largest:.3g}"
        )
    return HfCheck(type(model).__name__, max_error, largest, positions, agreed, other_ids)


def _greedy(
    torch: Any, model: Any, config: ModelConfig, params: Any, ids: list[int], count: int, tolerance: float
) -> int:
    """Continues `ids` greedily on both sides; returns how many tokens agree, ties within the tolerance included.

    Raises:
        ExportError: they choose different tokens.
    """
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
    theirs = out[0, len(ids) :].tolist()
    ours = greedy(config, params, ids, len(theirs), follow=theirs, tie=2 * tolerance)
    for step, (token, other) in enumerate(zip(ours, theirs, strict=True)):
        if token != other:
            raise ExportError(f"greedy token {step} is {token} for us and {other} for transformers")
    return len(theirs)
