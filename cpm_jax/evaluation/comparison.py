"""Two evaluations of the same items: paired differences, their confidence interval and a test."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float

from cpm_jax.common.statistics import holm
from cpm_jax.evaluation.errors import ComparisonError
from cpm_jax.evaluation.results import RESULTS_FILE, Item, items_path, ratio, read_items

BOOTSTRAPS = 10_000
SIGNIFICANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Paired:
    """One metric of one task, in both evaluations, over the items that both have.

    Attributes:
        task: name of the task.
        metric: name of the metric.
        higher_is_better: which way the metric is good.
        n: number of items.
        ours: value of this evaluation.
        theirs: value of the other.
        difference: ours - theirs.
        standard_error: of the difference, from the differences of the items; None of a single item.
        interval: 95% percentile interval of the difference, items being drawn with replacement.
        test: what the p-value is of: "McNemar, exact" where an item is right or wrong, else "paired t".
        p_value: two-sided; 1 where no item differs.
        adjusted_p_value: after Holm's correction for the number of tasks compared; equal to `p_value` of other metrics
            than a task's first.
        changed: items that are better, and worse, in this evaluation.
        prompts_differ: items whose prompts are not the same (another chat template, other examples).
    """

    task: str
    metric: str
    higher_is_better: bool
    n: int
    ours: float
    theirs: float
    difference: float
    standard_error: float | None
    interval: tuple[float, float]
    test: str
    p_value: float
    adjusted_p_value: float
    changed: tuple[int, int]
    prompts_differ: int

    @property
    def verdict(self) -> str:
        """The finding in a sentence."""
        low, high = self.interval
        shown = f"{self.difference:+.4f}, 95% interval {low:+.4f} to {high:+.4f}, p = {self.adjusted_p_value:.2g}"
        if self.adjusted_p_value >= SIGNIFICANCE:
            return f"No difference in {self.metric} of {self.task} is shown by {self.n} items ({shown})."
        better = (self.difference > 0) == self.higher_is_better
        return f"This model is {'better' if better else 'worse'} on {self.task}: {self.metric} {shown}."


def compare(folder: Path, other: Path) -> list[Paired]:
    """Compares an evaluation with another, over the tasks and items that both have.

    Args:
        folder: of this evaluation, which has ended.
        other: of the other.

    Returns:
        Every metric that both have, the main one of a task first.

    Raises:
        ComparisonError: a folder is not of an evaluation, they have no item in common, an item of the same place in
            the same task is not the same in both, or a figure is not finite.
    """
    ours, theirs = read_results(folder), read_results(other)
    shared = [name for name in ours["tasks"] if name in theirs["tasks"]]
    if not shared:
        raise ComparisonError(
            f"{other} has no task in common with {folder}: it has {', '.join(theirs['tasks'])}, and this evaluation "
            f"{', '.join(ours['tasks'])}"
        )
    found: list[Paired] = []
    for name in shared:
        a, b = (read_items(items_path(place, name)) for place in (folder, other))
        common = sorted(a.keys() & b.keys())
        for index in common:
            if a[index].doc_hash != b[index].doc_hash:
                raise ComparisonError(
                    f"item {index} of {name} is not the same in {folder} and {other}: the data, or the seed it was "
                    "made with, differs; evaluate both on the same items"
                )
        if common:
            found += _metrics(name, ours["tasks"][name], [a[index] for index in common], [b[index] for index in common])
    if not found:
        raise ComparisonError(f"{folder} and {other} have no item in common in {', '.join(shared)}")
    return _adjusted(found)


def read_results(folder: Path) -> dict[str, Any]:
    """What results.json says.

    Raises:
        ComparisonError: the folder is not of an evaluation that has ended.
    """
    path = folder / RESULTS_FILE
    try:
        results = json.loads(path.read_text("utf-8"))
        assert isinstance(results["tasks"], dict)
    except OSError as error:
        raise ComparisonError(
            f"{folder} is not the folder of an evaluation that has ended: {path.name}: {error.strerror}"
        ) from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ComparisonError(f"{path} is not the results of an evaluation") from error
    return results


def _metrics(task: str, summary: dict[str, Any], ours: list[Item], theirs: list[Item]) -> list[Paired]:
    better, main = summary["higher_is_better"], summary["main_metric"]
    prompts_differ = sum(a.prompt != b.prompt for a, b in zip(ours, theirs, strict=True))
    found = []
    for metric in sorted(ours[0].metrics, key=lambda name: name != main):
        if metric not in theirs[0].metrics:
            continue
        a, b = (np.array([item.metrics[metric] for item in items], np.float64) for items in (ours, theirs))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ComparisonError(f"{metric} of {task} is not finite for some items: one of the two models diverged")
        paired = compare_values(a[:, 0], b[:, 0], a[:, 1])
        better_items = int(((a[:, 0] > b[:, 0]) == better[metric])[a[:, 0] != b[:, 0]].sum())
        found.append(
            Paired(
                task=task,
                metric=metric,
                higher_is_better=better[metric],
                n=len(ours),
                ours=ratio(a[:, 0], a[:, 1]).value,
                theirs=ratio(b[:, 0], b[:, 1]).value,
                changed=(better_items, int((a[:, 0] != b[:, 0]).sum()) - better_items),
                prompts_differ=prompts_differ,
                adjusted_p_value=paired["p_value"],
                **paired,
            )
        )
    return found


def compare_values(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> dict[str, Any]:
    """The difference of two ratios over the same items.

    Args:
        a: numerators of the first.
        b: numerators of the second.
        weights: denominators, of both.

    Returns:
        The fields `difference`, `standard_error`, `interval`, `test` and `p_value` of `Paired`.
    """
    differences, n = a - b, len(a)
    value, error, _ = ratio(differences, weights)
    if bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all() and (weights == 1).all()):
        gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
        test = "McNemar, exact"  # of the items on which the two differ, half would be gained by chance
        p_value = float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    else:
        test = "paired t"
        p_value = float(2 * scipy.stats.t.sf(abs(value) / error, n - 1)) if error else 1.0
    return {
        "difference": value,
        "standard_error": error,
        "interval": _bootstrap(differences, weights),
        "test": test,
        "p_value": p_value,
    }


def _bootstrap(differences: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """The 95% percentile interval of the ratio of sums over items drawn with replacement; the same for equal input."""
    rng, n = np.random.default_rng(0), len(differences)
    drawn = []
    for _ in range(BOOTSTRAPS // 100):
        chosen = rng.integers(0, n, (100, n))
        drawn.append(differences[chosen].sum(1) / weights[chosen].sum(1))
    low, high = np.percentile(np.concatenate(drawn), (2.5, 97.5))
    return float(low), float(high)


def _adjusted(found: list[Paired]) -> list[Paired]:
    """Holm's correction over the main metrics, one a task: so many tests would else find something by chance."""
    main = list({paired.task: place for place, paired in reversed(list(enumerate(found)))}.values())
    adjusted = list(found)
    for place, p_value in zip(main, holm([found[place].p_value for place in main]), strict=True):
        adjusted[place] = dataclasses.replace(found[place], adjusted_p_value=p_value)
    return adjusted
