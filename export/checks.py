"""Proof that an export computes what the model does; the same functions check it when written and when verified.

An export is read back from its files alone, as one of others would be. What is then in memory is compared with the
source (when it is written), with what was recorded (when it is verified), and with `transformers`, where that has a
class for it.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpm_jax.checkpoints.hf_config import LAYOUTS, find_layout
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import open_source
from cpm_jax.common.extras import how_to_install
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from export.devices.runtimes import RUNTIMES
from export.folders import ExportError
from export.hf_check import check_hf, greedy, logits_of
from export.manifest import Check, Manifest, RecordedText, check_files, read_manifest, tool_versions
from export.stablehlo import compare_programs, is_stablehlo, read_model

MAX_TOKENS, GREEDY_TOKENS, TOP, TOLERANCE = 64, 16, 8, 1e-4

TEXTS = {
    "code": (
        "def moving_average(values, window):\n    total = sum(values[:window])\n    yield total / window\n"
        "    for old, new in zip(values, values[window:]):\n        total += new - old\n        yield total / window\n"
    ),
    "prose": (
        "The harbour was still dark when the first boats came in. On the quay stood 24 crates, wet from the night, "
        "and a clerk who counted them twice: “Twenty-three,” he said, and began anew.\n"
    ),
    "other scripts": "清晨的码头上有二十四个箱子,数了两遍还是二十三个。 В гавани было темно; 24 ящика… naïve café 🙂\n",
}


@dataclass(frozen=True)
class Exported:
    """An export, read back from its files.

    Attributes:
        path: the folder or file that a runtime loads.
        config: the model, computing densely in float32.
        params: its parameters, float32: the values as they are stored.
        tokenizer: its tokenizer.
    """

    path: Path
    config: ModelConfig
    params: Any
    tokenizer: Tokenizer


def exact(config: ModelConfig) -> ModelConfig:
    """The model as it is compared: dense attention and float32 throughout."""
    return dataclasses.replace(
        config, dtype="float32", param_dtype="float32", fp8=False, remat="none", sparse_config=None
    )


def _num_tokens(config: ModelConfig) -> int:
    """How much of a text is used: so much that it and its continuation are rotated alike, however long the row is."""
    longest = min(config.max_position_embeddings, config.rope.switch_length or MAX_TOKENS + GREEDY_TOKENS)
    return min(MAX_TOKENS, max(1, longest - GREEDY_TOKENS))


def read_export(path: Path) -> Exported:
    """Reads an export back.

    Raises:
        ExportError: it has no tokenizer, or its programs' parameters cannot be read.
        SourceError: its weights or its configuration cannot be read.
    """
    if is_stablehlo(path):
        config, params = read_model(path)
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return Exported(path, exact(config), wide, Tokenizer.load(path))
    source = open_source(path)
    if (tokenizer := source.tokenizer()) is None:
        raise ExportError(f"{path} has no tokenizer")
    config, params = import_params(source)
    return Exported(path, exact(config), params, tokenizer)


def record(exported: Exported) -> tuple[RecordedText, ...]:
    """What the model says of each text."""
    recorded = []
    for name, text in TEXTS.items():
        ids = exported.tokenizer.encode(text)[: _num_tokens(exported.config)]
        last = logits_of(exported.config, exported.params, ids)[-1]
        top = np.argsort(-last, kind="stable")[:TOP]
        recorded.append(
            RecordedText(
                name=name,
                text=text,
                token_ids=tuple(ids),
                greedy=tuple(greedy(exported.config, exported.params, ids, GREEDY_TOKENS)),
                top_tokens=tuple(int(token) for token in top),
                top_logits=tuple(float(last[token]) for token in top),
            )
        )
    return tuple(recorded)


def compare_recorded(exported: Exported, texts: Sequence[RecordedText]) -> Check:
    """Compares what the model says with what it said when it was exported.

    Raises:
        ExportError: token ids, logits or greedy text differ.
    """
    largest_error = 0.0
    for text in texts:
        ids = exported.tokenizer.encode(text.text)[: len(text.token_ids)]
        if tuple(ids) != text.token_ids:
            raise ExportError(f"{exported.path}: the tokens of the text {text.name!r} are not those recorded")
        last = logits_of(exported.config, exported.params, ids)[-1]
        tolerance = TOLERANCE * max(1.0, float(np.abs(last).max()))
        error = float(np.abs(last[list(text.top_tokens)] - np.asarray(text.top_logits)).max())
        if not error <= tolerance:
            raise ExportError(
                f"{exported.path}: logits after the text {text.name!r} differ by {error:.3g} from those recorded"
            )
        largest_error = max(largest_error, error)
        said = greedy(exported.config, exported.params, ids, len(text.greedy), follow=text.greedy, tie=2 * tolerance)
        if tuple(said) != text.greedy:
            raise ExportError(f"{exported.path}: the text {text.name!r} is continued in another way than was recorded")
    return Check("recorded", {"texts": len(texts), "max_error": largest_error})


def compare_source(exported: Exported, params: Any, config: ModelConfig, tokenizer: Tokenizer) -> Check:
    """What the stored type costs: the export against the model that it was made of, on the texts.

    Raises:
        ExportError: token ids differ.
    """
    config = exact(config)
    errors, divergences, positions = [0.0], [], 0
    losses: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for name, text in TEXTS.items():
        ids = tokenizer.encode(text)
        if ids != exported.tokenizer.encode(text):
            raise ExportError(f"{exported.path}: the tokens of the text {name!r} are not those of the source")
        ids = ids[: _num_tokens(config)]
        theirs, ours = logits_of(exported.config, exported.params, ids), logits_of(config, params, ids)
        errors.append(float(np.abs(theirs - ours).max()))
        log_q, log_p = (np.asarray(jax.nn.log_softmax(jnp.asarray(x))) for x in (theirs, ours))
        divergences.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        for loss, log in zip(losses, (log_q, log_p), strict=True):
            loss.append(-log[np.arange(len(ids) - 1), ids[1:]])
        positions += len(ids)
    perplexities = [math.exp(float(np.mean(np.concatenate(loss)))) for loss in losses]
    return Check(
        "source",
        {
            "positions": positions,
            "max_error": max(errors),
            "kl_divergence": max(0.0, float(np.mean(np.concatenate(divergences)))),
            "perplexity": perplexities[0],
            "perplexity_of_source": perplexities[1],
        },
    )


def compare_runtime(exported: Exported, texts: Sequence[str]) -> Check | str:
    """Compares with what runs the export elsewhere: its own programs, or `transformers`.

    Returns:
        The check that was passed; or why it cannot be made, in words.

    Raises:
        ExportError: they differ.
    """
    if is_stablehlo(exported.path):
        limit = _num_tokens(exported.config)
        return compare_programs(exported.path, [exported.tokenizer.encode(text)[:limit] for text in texts])
    return compare_transformers(exported, texts)


def compare_transformers(exported: Exported, texts: Sequence[str]) -> Check | str:
    """Compares with `transformers`.

    Returns:
        The check that was passed; or why it cannot be made, in words.

    Raises:
        ExportError: token ids, logits or greedy text differ.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed ({how_to_install('export')})"
    source = open_source(exported.path)
    layout = find_layout(source.config)
    if exported.path.suffix == ".gguf":
        if layout.model_type not in ("llama", "qwen2"):
            return f"transformers does not load GGUF files of {layout.model_type}"
        if exported.config.rope.rope_type != "default":
            return f"transformers reads no scaling of the rotary embedding ({exported.config.rope.rope_type}) from GGUF"
        if layout.model_type == "llama" and exported.config.attention_bias:
            return "transformers reads no biases of llama from GGUF"
    elif not layout.in_transformers:
        known = ", ".join(name for name, other in LAYOUTS.items() if other.in_transformers)
        return f"transformers has no class {layout.architecture}; it has those of {known}"
    result = check_hf(
        exported.path,
        exported.params,
        exported.config,
        exported.tokenizer,
        texts,
        max_tokens=_num_tokens(exported.config),
        greedy_tokens=GREEDY_TOKENS,
        tolerance=TOLERANCE,
    )
    return Check("transformers", dataclasses.asdict(result))


def verify_export(folder: Path) -> list[str]:
    """Repeats the checks of an export from its manifest and its files alone.

    Args:
        folder: the export.

    Returns:
        What was found, in sentences.

    Raises:
        ExportError: a file is missing, damaged or changed, or the model does not say what it said.
        SourceError: the files are as they were written, and cannot be read.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    size = sum(entry.bytes for entry in manifest.files.values())
    found = [f"{len(manifest.files)} files, {size:,} bytes: as they were written {manifest.date}"]
    if manifest.format in RUNTIMES:
        from export.devices.checks import verify_device  # it uses what stands here

        said, tools = verify_device(folder, manifest)
        return [*found, *said, *_changed_tools(manifest, tool_versions() | dict(tools))]
    models = [name for name in manifest.files if name.endswith(".gguf")]
    exported = read_export(folder / models[0] if models else folder)
    found.append(f"{manifest.architecture}, {manifest.parameters:,} parameters: read back")
    if manifest.texts:
        figures = compare_recorded(exported, manifest.texts).figures
        found.append(
            f"{len(manifest.texts)} texts: tokens and greedy text as recorded, logits within {figures['max_error']:.2g}"
        )
    else:
        found.append("no texts were recorded, as it was written without checks")
    texts = [text.text for text in manifest.texts] or list(TEXTS.values())
    against = compare_runtime(exported, texts)
    found.append(f"transformers: {against}" if isinstance(against, str) else f"{against.name}: {describe(against)}")
    return found + _changed_tools(manifest, tool_versions())


def _changed_tools(manifest: Manifest, here: Mapping[str, str]) -> list[str]:
    changed = {name: there for name, there in manifest.tools.items() if here.get(name, there) != there}
    words = ", ".join(f"{name} {here[name]} (then {there})" for name, there in changed.items())
    return [f"other versions than when it was written: {words}"] if changed else []


def describe(check: Check) -> str:
    """A check in one line."""
    figures = (
        f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in check.figures.items()
    )
    return ", ".join(figures)
