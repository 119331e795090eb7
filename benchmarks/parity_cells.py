"""What a cell of the parity matrix says: a runtime's logits and tokens beside those of our decoder, and a verdict.

The judge is our full forward pass, without a cache, in float32, of the same values: quantised ones where the format
quantises. So what a cell may differ by is rounding alone, and the limit is tight in every format. A runtime that rounds
activations to integers has a judge that rounds them likewise (`parity_rounding.py`); which code a value between two
becomes goes by the last bit of a sum and decides about single logits, so that perplexity is judged.

Greedy text is judged token by token behind the runtime's own: where it takes another token than ours, both go on from
its choice. With logits that may be off by a limit, two tokens whose logits are closer than twice that limit are a tie:
either may be chosen. Ties are no difference, and are counted.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from benchmarks.parity_rounding import rounded_logits_of
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params
from export.hf_check import logits_of

LOGITS, PERPLEXITY = 1e-4, 5e-3  # of the largest logit; of the perplexity
Status = Literal["equal", "differs", "failed", "cannot", "gap"]
RED: tuple[Status, ...] = ("differs", "failed")


@dataclass(frozen=True)
class Cell:
    """A checkpoint in a runtime.

    Attributes:
        checkpoint: its row.
        runtime: its column.
        status: "equal"; "differs" from ours by more than the limit; "failed" to run; "cannot" be, by the export's or
            the runtime's own words; "gap": the runtime is not installed.
        words: why, where it is not equal.
        format: what the runtime loaded.
        versions: of the runtime.
        rounds: whether the runtime rounds activations, so that perplexity is judged in place of logits and tokens.
        figures: `error` (largest difference of logits, of the largest logit) and `largest_logit`, `kl` (nats),
            `agreed`, `ties` and `tokens` of the greedy text, `perplexity`, `our_perplexity` and `drift` (how far they
            are apart, of ours) of held-out text, `megabytes`, `load_seconds`, `tokens_per_second`. Where the runtime
            rounds activations also `unrounded_drift`: that from our decoder which does not, what the rounding costs; it
            is not judged.
    """

    checkpoint: str
    runtime: str
    status: Status
    words: str = ""
    format: str = ""
    versions: str = ""
    rounds: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)


def describe_limit(rounds: bool) -> str:
    """What is allowed, in words."""
    if rounds:
        return f"perplexity within {PERPLEXITY:.1%} of ours with activations rounded likewise, to fit the weights"
    return f"logits within {LOGITS:g} of the largest; greedy tokens equal up to ties"


class OtherAnswerError(Exception):
    """A runtime gave something else than was asked for."""


class Judge:
    """Our decoder, which says what is right.

    Attributes:
        rows: held-out text.
        new: tokens of a greedy text.
        ends: tokens with which it may end early.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        rows: Int[np.ndarray, "R S"],
        prompt: int,
        ends: Collection[int | None] = (),
        rounds_for: str = "",
    ):
        """Takes a model.

        Args:
            config: the model, in float32.
            params: the values that the export stores.
            rows: token ids; all as long as the caches, so that what depends on a length is the same.
            prompt: tokens of each row that are continued.
            ends: tokens with which a greedy text may end early.
            rounds_for: rounds activations as llama.cpp does for weights of this type; "" does not.
        """
        # The next token does not depend on MTP layers.
        self._config, self._prompt = dataclasses.replace(config, num_nextn_predict_layers=0), prompt
        self.rows, self.new, self.ends = rows, rows.shape[1] - prompt, ends
        self._params = {name: jax.tree.map(jnp.asarray, leaf) for name, leaf in params.items() if name != "mtp_layers"}
        self._logits_of = functools.partial(rounded_logits_of, gguf_type=rounds_for) if rounds_for else logits_of
        # Runtimes that agree say the same text: it is read once.
        self.gaps = functools.lru_cache(maxsize=64)(self._gaps)
        self.logits = functools.lru_cache(maxsize=len(rows))(self._logits)

    def _logits(self, row: int) -> Float[np.ndarray, "S V"]:
        return self._logits_of(self._config, self._params, self.rows[row].tolist())

    def _gaps(self, row: int, said: tuple[int, ...]) -> Float[np.ndarray, " n"]:
        """How far below our best logit each token is that a runtime chose, given those before it."""
        ids = self.rows[row].copy()  # what follows is not seen, and every text is as long
        ids[self._prompt : self._prompt + len(said)] = said
        found = self._logits_of(self._config, self._params, ids.tolist())[self._prompt - 1 :][: len(said)]
        return found.max(axis=-1) - found[np.arange(len(said)), list(said)]


def _log_softmax(logits: Float[np.ndarray, "T V"]) -> Float[np.ndarray, "T V"]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(judge: Judge, said: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a cell, without size and times.

    Args:
        judge: of the values that the runtime was given.
        said: what `parity_worker.measure` found.

    Raises:
        OtherAnswerError: logits of another shape, or that are not finite.
    """
    largest = error = kl = 0.0
    losses: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for index, ids in enumerate(judge.rows):
        ours, theirs = judge.logits(index), said[f"logits_{index}"]
        if theirs.shape != ours.shape or not np.isfinite(theirs).all():
            raise OtherAnswerError(f"logits of the shape {theirs.shape}, of which {np.isfinite(theirs).mean():.1%} are "
                                 f"finite: ours have {ours.shape}")  # fmt: skip
        largest, error = max(largest, float(np.abs(ours).max())), max(error, float(np.abs(theirs - ours).max()))
        log_p, log_q = _log_softmax(ours), _log_softmax(theirs)
        kl += float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()) / len(judge.rows)
        for loss, log in zip(losses, (log_p, log_q), strict=True):
            loss.append(-log[np.arange(len(ids) - 1), ids[1:]])
    ours_ppl, theirs_ppl = (float(np.exp(np.concatenate(loss).mean())) for loss in losses)
    return {
        "error": error / largest,
        "largest_logit": largest,
        "kl": max(kl, 0.0),
        "perplexity": theirs_ppl,
        "our_perplexity": ours_ppl,
        "drift": abs(theirs_ppl / ours_ppl - 1),
    }


def compare_greedy(judge: Judge, greedy: Sequence[Sequence[int]], tie: float) -> dict[str, float]:
    """How much of a greedy text is ours.

    Args:
        judge: of the values that the runtime was given.
        greedy: its tokens after each text.
        tie: difference of two logits up to which either token may be chosen.

    Raises:
        OtherAnswerError: it is too short or too long.
    """
    if any(len(said) != judge.new and (len(said) == 0 or said[-1] not in judge.ends) for said in greedy):
        raise OtherAnswerError(f"texts of {', '.join(str(len(said)) for said in greedy)} tokens: asked for {judge.new}")
    gaps = np.concatenate([judge.gaps(index, tuple(map(int, said))) for index, said in enumerate(greedy)])
    return {
        "agreed": float((gaps <= 0).sum()),
        "ties": float(((gaps > 0) & (gaps <= tie)).sum()),
        "tokens": float(len(gaps)),
    }


def judge_cell(
    judge: Judge, said: Mapping[str, Any], *, rounds: bool, modules: Sequence[str] = ()
) -> tuple[Status, str, dict[str, float]]:
    """Verdict, reasons and figures of what a runtime said.

    Args:
        judge: of the values that the runtime was given.
        said: what `parity_worker.measure` found.
        rounds: whether the runtime rounds activations, so that perplexity is judged in place of logits and tokens.
        modules: packages and rooms of ours that it may import.
    """
    try:
        figures = compare(judge, said)
        # A decoding that rounds is as far off as the reading of a prompt that does.
        allowed = figures["error"] if rounds else LOGITS
        figures |= compare_greedy(judge, said["greedy"], 2 * allowed * figures["largest_logit"])
    except OtherAnswerError as error:
        return "failed", str(error), {}
    reasons = []
    if not rounds and not figures["error"] <= LOGITS:
        reasons.append(f"logits differ by {figures['error']:.2g} of the largest; {LOGITS:g} is allowed")
    if rounds and not figures["drift"] <= PERPLEXITY:
        reasons.append(
            f"perplexity is {figures['perplexity']:.5g} where ours is {figures['our_perplexity']:.5g}; "
            f"{PERPLEXITY:.1%} is allowed"
        )
    others = int(figures["tokens"] - figures["agreed"] - figures["ties"])
    if others and not rounds:
        reasons.append(f"{others} of {figures['tokens']:.0f} greedy tokens are others than ours, and no ties")
    imported = {name for name in str(said.get("our_modules", "")).split(",") if name} - set(modules)
    if imported:
        reasons.append(f"it needs {', '.join(sorted(imported))} of ours to run")
    return ("differs" if reasons else "equal"), "; ".join(reasons), figures
