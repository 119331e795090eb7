"""What became of the trials of a sweep, which setting to take, and the bill."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

Status = Literal["waiting", "running", "done", "pruned", "diverged", "failed", "retried", "duplicate"]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A trial as a report shows it.

    Attributes:
        number: in the study.
        id: hash of its resolved config.
        choices: what the study chose, by label of the space's dimensions.
        bindings: what it sets.
        status: "retried": its worker died, and a later trial goes on from its checkpoint. "duplicate": another trial
            has the same resolved config, and only that one is trained.
        loss: held-out loss at the end, in nats per token; of one that was ended early, where it was.
        tokens: that it trained on.
        planned_tokens: that it was to train on.
        flops: that it took.
        planned_flops: that it would take to its end.
        cpu_seconds: of processor time, over all attempts.
        seconds: of wall time, over all attempts.
        curve: (tokens, held-out loss) of each evaluation.
        error: one line; "" without one.
        log: the end of its log, for those that failed.
    """

    number: int
    id: str
    choices: Mapping[str, Any]
    bindings: Mapping[str, Any]
    status: Status
    loss: float | None = None
    tokens: int = 0
    planned_tokens: int = 0
    flops: float = 0.0
    planned_flops: float = 0.0
    cpu_seconds: float = 0.0
    seconds: float = 0.0
    curve: Sequence[tuple[int, float]] = ()
    error: str = ""
    log: str = ""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Trials that differ in their seed alone.

    Attributes:
        choices: what they share.
        bindings: likewise, without the seed.
        loss: mean over seeds.
        spread: standard deviation over seeds; NaN of one.
        seeds: how many.
        tokens: of each.
        group: value of the binding that settings are grouped by; None without one.
    """

    choices: Mapping[str, Any]
    bindings: Mapping[str, Any]
    loss: float
    spread: float
    seeds: int
    tokens: int
    group: Any = None


@dataclasses.dataclass(frozen=True)
class SharedSetting:
    """The setting that is best for all groups together.

    Attributes:
        choices: of the dimensions other than that which makes the groups.
        regret: the most that it loses to the best setting of a group, in nats per token.
    """

    choices: Mapping[str, Any]
    regret: float


@dataclasses.dataclass(frozen=True)
class Step:
    """What it costs to be wrong by one step in one dimension, all else equal.

    Attributes:
        label: of the dimension.
        best: its value in the chosen setting.
        other: the neighbouring value.
        cost: loss there minus that of the chosen setting, in nats per token.
    """

    label: str
    best: Any
    other: Any
    cost: float


@dataclasses.dataclass(frozen=True)
class Bill:
    """What a sweep cost.

    Attributes:
        flops: all trials as far as they were trained, once each.
        core_hours: of processor time.
        naive_flops: every setting that was tried, trained to its end at full size.
        full_size: what full size is, in words.
    """

    flops: float
    core_hours: float
    naive_flops: float
    full_size: str


def trained(trials: Sequence[Trial]) -> list[Trial]:
    """One trial for each id that was trained at all: the last of its attempts."""
    kept = {t.id: t for t in trials if t.status not in ("duplicate", "retried", "waiting") and t.id}
    return list(kept.values())


def split_by_tokens(trials: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
    """Trials that are done with the most common number of tokens, which may be compared, and those with another one.

    Of equally common numbers the larger one counts.
    """
    done = [t for t in trained(trials) if t.status == "done" and t.loss is not None and math.isfinite(t.loss)]
    counts = [t.tokens for t in done]
    common = max(set(counts), key=lambda tokens: (counts.count(tokens), tokens), default=0)
    return [t for t in done if t.tokens == common], [t for t in done if t.tokens != common]


def settings(trials: Sequence[Trial], *, group_by: str = "", seed: str = "SEED") -> list[Setting]:
    """Comparable settings, best first.

    Args:
        trials: of a sweep.
        group_by: binding within whose values settings are compared, such as the width; "" for none.
        seed: binding that is averaged over.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in split_by_tokens(trials)[0]:
        key = repr(sorted((name, repr(value)) for name, value in trial.bindings.items() if name != seed))
        groups.setdefault(key, []).append(trial)
    found = []
    for members in groups.values():
        losses = np.array([t.loss for t in members], float)
        first = members[0]
        found.append(
            Setting(
                choices={k: v for k, v in first.choices.items() if k.rpartition("/")[2] != seed},
                bindings={k: v for k, v in first.bindings.items() if k != seed},
                loss=float(losses.mean()),
                spread=float(losses.std(ddof=1)) if len(losses) > 1 else math.nan,
                seeds=len(members),
                tokens=first.tokens,
                group=first.bindings.get(group_by) if group_by else None,
            )
        )
    return sorted(found, key=lambda s: s.loss)


def best_settings(found: Sequence[Setting]) -> list[Setting]:
    """The best setting of each group, in the order of those values."""
    best: dict[Any, Setting] = {}
    for setting in found:
        best.setdefault(repr(setting.group), setting)
    return sorted(best.values(), key=lambda s: _order(s.group))


def shared_setting(found: Sequence[Setting], group_by: str) -> SharedSetting | None:
    """The setting with the least regret over all groups, of those that were measured in each; None without groups.

    Args:
        found: all settings.
        group_by: binding that they are grouped by.
    """
    best = {repr(s.group): s.loss for s in sorted(found, key=lambda s: -s.loss)}
    candidates: dict[str, list[Setting]] = {}
    for setting in found:
        choices = {label: repr(value) for label, value in setting.choices.items() if not _binds(label, group_by)}
        candidates.setdefault(repr(sorted(choices.items())), []).append(setting)
    shared = [
        SharedSetting(
            {label: value for label, value in members[0].choices.items() if not _binds(label, group_by)},
            max(s.loss - best[repr(s.group)] for s in members),
        )
        for members in candidates.values()
        if len({repr(s.group) for s in members}) == len(best) > 1
    ]
    return min((s for s in shared if s.choices), key=lambda s: s.regret, default=None)


def loss_over(found: Sequence[Setting], label: str) -> dict[Any, list[tuple[float, float]]]:
    """(value, loss) by group: the best loss that was measured at each value of a dimension, in the order of values.

    Args:
        found: all settings.
        label: of a dimension of numbers.
    """
    best: dict[str, tuple[Any, dict[float, float]]] = {}
    for setting in sorted(found, key=lambda s: -s.loss):
        if label in setting.choices:
            best.setdefault(repr(setting.group), (setting.group, {}))[1][setting.choices[label]] = setting.loss
    return {group: sorted(losses.items()) for group, losses in sorted(best.values(), key=lambda b: _order(b[0]))}


def one_step_wrong(
    best: Setting, found: Sequence[Setting], dimensions: Mapping[str, Any], group_by: str = ""
) -> list[Step]:
    """The neighbours of a setting that were measured, one dimension at a time.

    In a list of options a step is the next option (of numbers the next larger or smaller one), in a range the next
    measured value. That of `group_by` is not a choice, and is left out.

    Args:
        best: the chosen setting.
        found: all settings.
        dimensions: of the space (`Space.dimensions`).
        group_by: binding that settings are compared within.
    """
    steps = []
    for label, what in dimensions.items():
        if label not in best.choices or _binds(label, group_by):
            continue
        others = [
            s
            for s in found
            if label in s.choices
            and {k: v for k, v in s.choices.items() if k != label}
            == {k: v for k, v in best.choices.items() if k != label}
        ]
        here = best.choices[label]
        if isinstance(what, Mapping):
            below = [s for s in others if s.choices[label] < here]
            above = [s for s in others if s.choices[label] > here]
            near = [max(below, key=lambda s: s.choices[label], default=None)] if below else []
            near += [min(above, key=lambda s: s.choices[label], default=None)] if above else []
        else:
            options = sorted(what) if is_numeric(what) else list(what)
            place = options.index(here)
            wanted = [options[i] for i in (place - 1, place + 1) if 0 <= i < len(options)]
            near = [s for option in wanted for s in others if s.choices[label] == option]
        steps += [Step(label, here, s.choices[label], s.loss - best.loss) for s in near if s is not None]
    return steps


def is_numeric(dimension: Any) -> bool:
    """Whether a dimension is a range, or has options that are numbers."""
    return isinstance(dimension, Mapping) or all(
        isinstance(option, (int, float)) and not isinstance(option, bool) for option in dimension
    )


def at_the_edge(best: Setting, dimensions: Mapping[str, Any], group_by: str = "") -> list[str]:
    """Labels of ordered dimensions whose first or last option is the best: the space may be too small there."""
    edges = []
    for label, what in dimensions.items():
        if label not in best.choices or isinstance(what, Mapping) or _binds(label, group_by):
            continue
        if is_numeric(what) and len(what) > 2 and best.choices[label] in (min(what), max(what)):
            edges.append(label)
    return edges


def _order(group: Any) -> tuple[bool, float, str]:
    """Numbers by size, then what is none."""
    number = isinstance(group, (int, float))
    return (not number, group if number else 0.0, "" if number else repr(group))


def _binds(label: str, name: str) -> bool:
    """Whether a dimension decides a binding."""
    return bool(name) and name in label.rpartition("/")[2].split("+")


def bill(trials: Sequence[Trial], *, full_flops: float = 0.0, full_size: str = "") -> Bill:
    """Adds up a sweep.

    Args:
        trials: of the sweep.
        full_flops: of one training at full size; 0 takes the most expensive trial.
        full_size: what that is, in words.
    """
    # Attempts of a trial share a folder, whose figures cover all of them: the last one stands for them.
    once = {t.id: t for t in trials if t.id and t.status not in ("duplicate", "waiting")}.values()
    tried = trained(trials)
    most = max((t.planned_flops for t in tried), default=0.0)
    return Bill(
        flops=sum(t.flops for t in once),
        core_hours=sum(t.cpu_seconds for t in once) / 3600,
        naive_flops=len(tried) * (full_flops or most),
        full_size=full_size or "the largest trial",
    )
