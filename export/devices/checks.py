"""Proof that a device's runtime computes what the model does: it is asked for logits, token ids and greedy text.

When an export is written, they are compared with our decoder's; when it is verified, with what the runtime said then,
as the files hold no weights that we could read back.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cpm_jax.checkpoints.weights import Weights
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params
from export.checks import (
    MAX_DIVERGENCE,
    TOLERANCE,
    TOP,
    Checked,
    exact,
    readable_texts,
    recorded_error,
    text_lengths,
)
from export.devices.convert import device_model
from export.devices.runtimes import RUNTIMES, Job
from export.folders import ExportError
from export.hf_check import logits_of
from export.manifest import Check, Manifest, RecordedText

# Integer kernels round activations, and every processor has its own: of the largest logit.
INTEGER_TOLERANCE = 0.05


@dataclass(frozen=True)
class Said:
    """What a runtime says of a text.

    Attributes:
        ids: its tokens, by the runtime's tokenizer.
        logits: of the tokens that it was given, float32 [T, V].
        greedy: the tokens by which it goes on.
    """

    ids: list[int]
    logits: np.ndarray
    greedy: list[int]


def ask(
    folder: Path,
    runtime: str,
    texts: Sequence[str],
    rows: Sequence[Sequence[int]],
    new_tokens: int,
    prompts: Sequence[Sequence[int]] | None = None,
) -> tuple[list[Said], dict]:
    """What a runtime says of texts, given their tokens, and the versions of its packages; prompts, if not the rows."""
    answer = RUNTIMES[runtime].ask(Job(str(folder), texts, rows, rows if prompts is None else prompts, new_tokens))
    said = [
        Said(answer[f"ids_{i}"].tolist(), answer[f"logits_{i}"], answer[f"said_{i}"].tolist())
        for i in range(len(texts))
    ]
    return said, json.loads(str(answer["versions"]))


def other_ids(said: Sequence[Said], texts: Sequence[str], tokenizer: Tokenizer) -> int:
    """The number of texts to which a runtime gives other ids; whether it begins with the token for that is its own."""
    ids = [tokenizer.encode(text) for text in texts]
    return sum(found.ids not in (own, tokenizer.affixes + own) for found, own in zip(said, ids, strict=True))


def check_device(folder: Path, runtime: str, dtype: str, weights: Weights) -> Checked:
    """Compares what the runtime says with our decoder.

    In float32 logits must agree to 1e-4 of the largest and greedy text up to ties. For other types it is said what they
    cost.

    Raises:
        ExportError: they differ by more, the runtime does not run the folder, or no text has tokens.
    """
    config = exact(device_model(weights.model))
    named = readable_texts(weights.tokenizer)
    texts = list(named.values())
    used, new = text_lengths(config)
    rows = [weights.tokenizer.encode(text)[:used] for text in texts]
    said, tools = ask(folder, runtime, texts, rows, new)
    check = compare(said, rows, weights.params, config, RUNTIMES[runtime].title, exactly=dtype == "float32")
    check = dataclasses.replace(check, figures=check.figures | {"other_ids": other_ids(said, texts, weights.tokenizer)})
    return Checked((check,), tuple(map(_recorded, named, texts, rows, said)), tools=tools)


def compare(
    said: Sequence[Said],
    rows: Sequence[Sequence[int]],
    params: Params,
    config: ModelConfig,
    title: str,
    *,
    exactly: bool,
) -> Check:
    """Compares logits and greedy text with our decoder's.

    Args:
        said: what the runtime says of each row.
        rows: token ids.
        params: of the source.
        config: the model, from `exact`.
        title: name of the check.
        exactly: whether only rounding in float32 may differ.

    Raises:
        ExportError: they differ by more than they may.
    """
    # Of all rows, so that one program is compiled.
    length = max(len(row) + len(found.greedy) for row, found in zip(rows, said, strict=True))
    largest = 0.0
    agreed = chosen = 0
    errors, gaps, divergences, losses = [], [0.0], [], ([], [])  # type: ignore[var-annotated]
    for row, found in zip(rows, said, strict=True):
        whole = [*row, *found.greedy]
        logits = logits_of(config, params, whole + [0] * (length - len(whole)))  # what follows is not seen
        ours = logits[: len(row)]
        largest = max(largest, float(np.abs(ours).max()))
        errors.append(np.abs(found.logits - ours).max())
        log_q, log_p = (np.asarray(jax.nn.log_softmax(jnp.asarray(x))) for x in (found.logits, ours))
        divergences.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        for loss, log in zip(losses, (log_q, log_p), strict=True):
            loss.append(-log[np.arange(len(row) - 1), row[1:]])
        for place, token in enumerate(found.greedy, len(row) - 1):
            gaps.append(float(logits[place].max() - logits[place, token]))
            agreed += gaps[-1] == 0
            chosen += 1
    perplexities = [math.exp(float(np.mean(np.concatenate(loss)))) for loss in losses]
    # By numpy, for which no number is above what is none.
    error, divergence = float(np.max(errors)), float(np.mean(np.concatenate(divergences)))
    tolerance = TOLERANCE * max(1.0, largest)
    if exactly and not (error <= tolerance and max(gaps) <= 2 * tolerance):
        raise ExportError(
            f"{title} gives other logits than we do: they differ by {error:.3g} where {tolerance:.3g} is rounding, and "
            f"it chooses tokens of which ours say {max(gaps):.3g} less than of the best"
        )
    if not divergence <= MAX_DIVERGENCE:
        raise ExportError(
            f"{title} says something else than the source, by {divergence:.3g} nats a token, where {MAX_DIVERGENCE} is "
            "the most that a type may cost; choose a wider one"
        )
    return Check(
        title,
        {
            "positions": sum(map(len, rows)),
            "max_error": error,
            "largest_logit": largest,
            "kl_divergence": max(0.0, divergence),
            "perplexity": perplexities[0],
            "perplexity_of_source": perplexities[1],
            "greedy_tokens": f"{agreed} of {chosen}",
        },
    )


def _recorded(name: str, text: str, row: Sequence[int], said: Said) -> RecordedText:
    last = said.logits[-1]
    top = np.argsort(-last, kind="stable")[:TOP]
    return RecordedText(
        name=name,
        text=text,
        token_ids=tuple(row),
        greedy=tuple(said.greedy),
        top_tokens=tuple(int(token) for token in top),
        top_logits=tuple(float(last[token]) for token in top),
    )


def goes_on_alike(text: RecordedText, said: Said, tie: float) -> bool:
    """Whether a text is continued as recorded up to a choice between tokens of equal logits.

    Args:
        text: what was recorded.
        said: what the runtime says, with the logits of the recorded tokens and of their continuation.
        tie: difference of logits below which either token may be chosen; what follows then is of another text.
    """
    for place, (now, then) in enumerate(zip(said.greedy, text.greedy, strict=False), len(text.token_ids) - 1):
        if now != then:
            logits = said.logits[place]
            return bool(logits.max() - min(logits[now], logits[then]) <= tie)
    return len(said.greedy) == len(text.greedy)


def verify_device(folder: Path, manifest: Manifest) -> tuple[list[str], Mapping[str, str]]:
    """Compares what the runtime says with what it said when the export was written.

    Returns:
        What was found, in sentences, and the versions of the runtime's packages.

    Raises:
        ExportError: token ids, logits or greedy text differ, or the runtime does not run the folder.
    """
    runtime = RUNTIMES[manifest.format]
    if words := runtime.missing():
        return [f"{runtime.title}: {words}"], {}
    if not manifest.texts:
        return ["no texts were recorded, as it was written without checks"], {}
    exactly = "float32" in manifest.types
    texts = [text.text for text in manifest.texts]
    new = max(len(text.greedy) for text in manifest.texts)
    prompts = [text.token_ids for text in manifest.texts]
    # Where a choice is a tie is seen from the logits of the recorded text; integers may be rounded by the whole row.
    rows = [text.token_ids + text.greedy for text in manifest.texts] if exactly else prompts
    said, tools = ask(folder, manifest.format, texts, rows, new, prompts)
    if others := other_ids(said, texts, Tokenizer.load(folder)):
        notes = [f"{runtime.title} gives {others} of {len(texts)} texts other token ids than tokenizer.json does"]
    else:
        notes = []
    part = TOLERANCE if exactly else INTEGER_TOLERANCE
    worst = 0.0
    for text, found in zip(manifest.texts, said, strict=True):
        error, tolerance = recorded_error(folder, text, found.logits[len(text.token_ids) - 1], part)
        worst = max(worst, error)
        # Integer kernels of another processor may choose otherwise, and go on in another way then.
        if exactly and not goes_on_alike(text, found, 2 * tolerance):
            raise ExportError(f"{folder}: the text {text.name!r} is continued in another way than was recorded")
    return [*notes, f"{len(said)} texts in {runtime.title}: as recorded, logits within {worst:.2g}"], tools
