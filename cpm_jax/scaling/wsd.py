"""Many numbers of tokens for the price of one: a stable run, and decays from its checkpoints (MiniCPM §4.3)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from cpm_jax.common.config import InputError
from cpm_jax.scaling.runs import Run


class Decay(NamedTuple):
    """A decay from a checkpoint of the stable run.

    Attributes:
        start_tokens: tokens that the stable run had seen there.
        run: the decay's own training, whose steps count on from the stable run's (`init="state"`), so that its `tokens`
            are all that the model has seen.
    """

    start_tokens: int
    run: Run


class Family(NamedTuple):
    """The runs that a stable run and its decays stand for.

    Attributes:
        runs: one for each decay, as if it had been trained alone: `tokens`, `flops` and `seconds` of all its way.
        tokens_trained: tokens that were in fact trained on: the stable run's up to the last decay, and the decays'.
        tokens_alone: tokens that the runs would have taken one by one.
    """

    runs: list[Run]
    tokens_trained: int
    tokens_alone: int


def wsd_family(stable: Run, decays: Sequence[Decay], *, share_tolerance: float = 0.02) -> Family:
    """Turns a stable run and its decays into runs of different D.

    Args:
        stable: the run, of any status; its loss does not matter.
        decays: from its checkpoints.
        share_tolerance: by how much the decays' shares of all tokens may differ.

    Raises:
        InputError: a decay starts after the stable run's end or has no tokens, is of another model, batch or learning
            rate, or is a larger or smaller share of its run than the others: losses after different shares of decay are
            no function of D alone.
    """
    if not decays:
        raise InputError("wsd_family.decays is empty: give at least one decay of the stable run")
    same = ("num_params", "d_model", "num_layers", "batch_tokens")
    runs, shares = [], {}
    for start, run in decays:
        if other := [name for name in same if getattr(run, name) != getattr(stable, name)]:
            raise InputError(
                f"decay {run.id}: {other[0]} = {getattr(run, other[0])}, the stable run {stable.id} has "
                f"{getattr(stable, other[0])}; a decay goes on with the stable run's own"
            )
        if not 0 < start <= stable.tokens or run.tokens <= start:
            raise InputError(
                f"decay {run.id}: it starts at {start} tokens and ends at {run.tokens}; accepted are starts from 1 to "
                f"the stable run's {stable.tokens}, and ends after them"
            )
        shares[run.id] = (run.tokens - start) / run.tokens
        before = start / stable.tokens
        own = (run.tokens - start) / run.tokens
        runs.append(
            replace(
                run,
                flops=stable.flops / stable.tokens * run.tokens,
                learning_rate=stable.learning_rate,
                seconds=before * stable.seconds + own * run.seconds,
                config=run.config | {"stable_run": stable.id, "decay_share": shares[run.id]},
            )
        )
    low, high = min(shares, key=lambda id: shares[id]), max(shares, key=lambda id: shares[id])
    if shares[high] - shares[low] > share_tolerance:
        raise InputError(
            f"decay {low} is {shares[low]:.1%} of its tokens and {high} {shares[high]:.1%}: accepted are shares within "
            f"{share_tolerance:.0%} of each other"
        )
    trained = max(start for start, _ in decays) + sum(run.tokens - start for start, run in decays)
    return Family(runs, trained, sum(run.tokens for _, run in decays))
