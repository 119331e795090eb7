"""Proof that an export computes what the model does; the same functions check it when written and when verified.

An export is read back from its files alone, as one of others would be. What is then in memory is compared with the
source (when it is written), with what was recorded (when it is verified), and with `transformers`, where that has a
class for it.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpm_jax.checkpoints.hf_config import find_layout
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import open_source
from cpm_jax.checkpoints.weights import Weights
from cpm_jax.common.extras import how_to_install
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from export.config_check import check_config
from export.devices.runtimes import RUNTIMES
from export.folders import ExportError
from export.hf_check import check_hf, greedy, logits_of
from export.hf_code import why_not_run
from export.manifest import Check, Manifest, RecordedText, check_files, read_manifest, tool_versions
from export.packed_source import PackedSource, is_marlin, is_packed
from export.stablehlo import compare_programs, is_stablehlo, read_model

MAX_TOKENS, GREEDY_TOKENS, TOP, TOLERANCE = 64, 16, 8, 1e-4
# Nats a token by which a narrower type may change what a model says: beyond, it is another model.
MAX_DIVERGENCE = 1.0

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
        sparse: the sparse attention of runtimes that have it.
        params: its parameters, float32: the values as they are stored.
        tokenizer: its tokenizer.
    """

    path: Path
    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    sparse: SparseConfig | None = None

    @property
    def as_run(self) -> ModelConfig:
        """The model as such a runtime computes it."""
        return dataclasses.replace(self.config, sparse_config=self.sparse)


def exact(config: ModelConfig) -> ModelConfig:
    """The model as it is compared: dense attention and float32 throughout."""
    return dataclasses.replace(
        config, dtype="float32", param_dtype="float32", fp8=False, remat="none", sparse_config=None
    )


def text_lengths(config: ModelConfig) -> tuple[int, int]:
    """How many tokens of a text are used, and by how many it is continued.

    So many that both are computed alike, however long the row is, and of the used ones one at least is predicted.
    """
    longest = max(3, min(config.max_position_embeddings, *config.switch_lengths, MAX_TOKENS + GREEDY_TOKENS))
    used = max(2, longest - GREEDY_TOKENS)
    return used, longest - used


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
    source = PackedSource(path) if is_packed(path) else open_source(path)
    if (tokenizer := source.tokenizer()) is None:
        raise ExportError(f"{path} has no tokenizer")
    config, params = import_params(source)
    return Exported(path, exact(config), params, tokenizer, config.sparse_config)


def readable_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """The texts to which a tokenizer gives tokens: one of few scripts may pass over all of a text.

    Raises:
        ExportError: there is none.
    """
    found = {name: text for name, text in TEXTS.items() if tokenizer.encode(text)}
    if not found:
        raise ExportError(
            f"the tokenizer, of {tokenizer.vocab_size:,} tokens, gives none to any of the texts {', '.join(TEXTS)}, by "
            "which exports are checked; CHECK=False writes without the checks"
        )
    return found


def record(exported: Exported) -> tuple[RecordedText, ...]:
    """What the model says of each text."""
    used, new = text_lengths(exported.config)
    recorded = []
    for name, text in readable_texts(exported.tokenizer).items():
        ids = exported.tokenizer.encode(text)[:used]
        last = logits_of(exported.config, exported.params, ids)[-1]
        top = np.argsort(-last, kind="stable")[:TOP]
        recorded.append(
            RecordedText(
                name=name,
                text=text,
                token_ids=tuple(ids),
                greedy=tuple(greedy(exported.config, exported.params, ids, new)),
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
        error, tolerance = recorded_error(exported.path, text, last, TOLERANCE)
        largest_error = max(largest_error, error)
        said = greedy(exported.config, exported.params, ids, len(text.greedy), follow=text.greedy, tie=2 * tolerance)
        if tuple(said) != text.greedy:
            raise ExportError(f"{exported.path}: the text {text.name!r} is continued in another way than was recorded")
    return Check("recorded", {"texts": len(texts), "max_error": largest_error})


def recorded_error(path: Path, text: RecordedText, last: np.ndarray, part: float) -> tuple[float, float]:
    """Compares the logits after a text with those recorded.

    Args:
        path: of the export.
        text: what was recorded.
        last: the logits after it [V].
        part: of the largest logit that they may differ by, or of 1 where none is above.

    Returns:
        The largest difference, and the one that is allowed.

    Raises:
        ExportError: they differ by more, or tokens are recorded that the model does not have.
    """
    if max(*text.top_tokens, *text.greedy, 0) >= len(last):
        raise ExportError(f"{path}: tokens are recorded after the text {text.name!r} that no model of {len(last)} has")
    tolerance = part * max(1.0, float(np.abs(last).max()))
    error = float(np.abs(last[list(text.top_tokens)] - np.asarray(text.top_logits)).max())
    if not error <= tolerance:
        raise ExportError(f"{path}: logits after the text {text.name!r} differ by {error:.3g} from those recorded")
    return error, tolerance


def compare_source(exported: Exported, params: Any, config: ModelConfig, tokenizer: Tokenizer) -> Check:
    """What the stored type costs: the export against the model that it was made of, on the texts.

    Raises:
        ExportError: token ids differ, there are none, logits are not finite, or a GGUF file's type ruins the model.
    """
    config = exact(config)
    errors, divergences, positions = [0.0], [], 0
    losses: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for name, text in TEXTS.items():
        if tokenizer.encode(text) != exported.tokenizer.encode(text):
            raise ExportError(f"{exported.path}: the tokens of the text {name!r} are not those of the source")
    for text in readable_texts(tokenizer).values():
        ids = tokenizer.encode(text)[: text_lengths(config)[0]]
        theirs, ours = logits_of(exported.config, exported.params, ids), logits_of(config, params, ids)
        for whose, logits in (("the source", ours), (exported.path, theirs)):
            if not np.isfinite(logits).all():
                raise ExportError(f"{whose} gives logits that are not finite: its weights are damaged or diverged")
        errors.append(float(np.abs(theirs - ours).max()))
        log_q, log_p = (np.asarray(jax.nn.log_softmax(jnp.asarray(x))) for x in (theirs, ours))
        divergences.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        for loss, log in zip(losses, (log_q, log_p), strict=True):
            loss.append(-log[np.arange(len(ids) - 1), ids[1:]])
        positions += len(ids)
    perplexities = [math.exp(float(np.mean(np.concatenate(loss)))) for loss in losses]
    divergence = float(np.mean(np.concatenate(divergences)))
    # What quantised folders cost depends on a method and its data, which were chosen; a type here is all there is.
    if exported.path.suffix == ".gguf" and not divergence <= MAX_DIVERGENCE:
        raise ExportError(
            f"{exported.path} says something else than the source, by {divergence:.3g} nats a token, where "
            f"{MAX_DIVERGENCE} is the most that a type may cost; choose a wider TYPE. TQ1_0 and TQ2_0 are for weights "
            "that are ternary"
        )
    return Check(
        "source",
        {
            "positions": positions,
            "max_error": max(errors),
            "kl_divergence": max(0.0, divergence),
            "perplexity": perplexities[0],
            "perplexity_of_source": perplexities[1],
        },
    )


@dataclass(frozen=True)
class NotMade:
    """A check that cannot be made.

    Attributes:
        name: which.
        reason: why, in words.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Checked:
    """What the checks of an export found.

    Attributes:
        passed: the checks that were passed.
        texts: what the exported model says of texts.
        not_made: checks that could not be made, and why.
        tools: versions of packages that other processes checked it with.
    """

    passed: tuple[Check, ...] = ()
    texts: tuple[RecordedText, ...] = ()
    not_made: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)


def check_export(path: Path, weights: Weights, read_back: Callable[[], int]) -> Checked:
    """Makes all checks of an export.

    Args:
        path: the folder or file that a runtime loads.
        weights: what it was made of.
        read_back: compares every value, and returns their number.

    Raises:
        ExportError: one is not passed.
    """
    passed = [Check("read_back", {"values": read_back()})]
    exported = read_export(path)
    # The texts are too short to show a wrong switch of the rotary embedding, or wrong sizes of sparse attention.
    holds_sparse = path.suffix != ".gguf" and not is_stablehlo(path)
    check_config(path, exported.as_run, weights.model, sparse=holds_sparse)
    passed.append(compare_source(exported, weights.params, weights.model, weights.tokenizer))
    against = compare_runtime(exported, list(readable_texts(exported.tokenizer).values()))
    if isinstance(against, NotMade):
        return Checked(tuple(passed), record(exported), {against.name: against.reason})
    return Checked((*passed, against), record(exported))


def compare_runtime(exported: Exported, texts: Sequence[str]) -> Check | NotMade:
    """Compares with what runs the export elsewhere: its own programs, `transformers`, or our runtime in PyTorch.

    Raises:
        ExportError: they differ.
    """
    if is_stablehlo(exported.path):
        limit, _ = text_lengths(exported.config)
        return compare_programs(exported.path, [exported.tokenizer.encode(text)[:limit] for text in texts])
    if is_packed(exported.path):
        return compare_torch_runtime(exported, texts)
    return compare_transformers(exported, texts)


def compare_torch_runtime(exported: Exported, texts: Sequence[str]) -> Check | NotMade:
    """Compares GPTQ weights with our runtime in PyTorch, as transformers loads them with CUDA kernels only.

    Raises:
        ExportError: logits or greedy text differ.
    """
    if is_marlin(exported.path):
        return NotMade("CPM.cu", "its kernels, which load Marlin weights, need a GPU")
    if importlib.util.find_spec("torch") is None:
        return NotMade("torch_runtime", f"torch not installed ({how_to_install('export')})")
    from export.torch_check import check_torch_runtime

    config = exported.as_run
    used, new = text_lengths(config)
    rows = [exported.tokenizer.encode(text)[:used] for text in texts]
    return check_torch_runtime(exported.path, config, exported.params, rows, new, TOLERANCE)


def compare_transformers(exported: Exported, texts: Sequence[str]) -> Check | NotMade:
    """Compares with `transformers`.

    Raises:
        ExportError: token ids, logits or greedy text differ.
    """
    if reason := _no_transformers(exported):
        return NotMade("transformers", reason)
    of_transformers = exported.path.suffix == ".gguf" or find_layout(open_source(exported.path).config).in_transformers
    config = exported.config if of_transformers else exported.as_run
    used, new = text_lengths(config)
    result = check_hf(
        exported.path,
        exported.params,
        config,
        exported.tokenizer,
        texts,
        max_tokens=used,
        greedy_tokens=new,
        tolerance=TOLERANCE,
    )
    return Check("transformers", dataclasses.asdict(result))


def _no_transformers(exported: Exported) -> str:
    """Why transformers cannot be compared with; "" where it can."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed ({how_to_install('export')})"
    layout = find_layout(open_source(exported.path).config)
    if exported.path.suffix != ".gguf":
        return "" if layout.in_transformers else why_not_run(layout, exported.path)
    if layout.model_type not in ("llama", "qwen2"):
        return f"transformers does not load GGUF files of {layout.model_type}"
    if exported.config.rope.rope_type != "default":
        return f"transformers reads no scaling of the rotary embedding ({exported.config.rope.rope_type}) from GGUF"
    if layout.model_type == "llama" and exported.config.attention_bias:
        return "transformers reads no biases of llama from GGUF"
    return ""


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
    texts = [text.text for text in manifest.texts] or list(readable_texts(exported.tokenizer).values())
    against = compare_runtime(exported, texts)
    found.append(f"{against.name}: {against.reason if isinstance(against, NotMade) else describe(against)}")
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
