"""What `scaling_bench` measured: which measure of small models orders recipes as larger ones do; table and figure."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.results import Benchmark
from cpm_jax.common.figures import COLORS
from cpm_jax.scaling.laws import Interval
from cpm_jax.scaling.scores import HeldOutScore, ScoreLaw, check_scores, fit_scores, noise_ratio

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
ALL = "all tasks"
FEW = 100  # items of a task, as many as `gsm8k_sample` has
DRAWS = 1000
LEVEL = 0.95


class Measured(NamedTuple):
    """Models of one width.

    Attributes:
        loss: ScalingBench loss by recipe and seed, nats a token; of several tasks their mean.
        accuracy: share of right answers, likewise.
    """

    loss: Float[np.ndarray, "recipes seeds"]
    accuracy: Float[np.ndarray, "recipes seeds"]


class Study(NamedTuple):
    """All that was measured.

    Attributes:
        recipes: their names.
        small: by width, then by task or `ALL`.
        few: likewise, by the first `FEW` items of each task.
        large: of the larger models, by task or `ALL`.
        width: of the larger models.
    """

    recipes: list[str]
    small: dict[int, dict[str, Measured]]
    few: dict[int, dict[str, Measured]]
    large: dict[str, Measured]
    width: int

    @classmethod
    def of(cls, cells: Mapping[tuple[int, int], Mapping[str, Any]], small: Sequence[int], large: int) -> "Study":
        """Takes items by width and seed, then by recipe and task, as `scaling_bench.measure` gives them."""
        recipes = list(next(iter(cells.values())))

        def at(width: int, items: int | None) -> dict[str, Measured]:
            seeds = [cell for (found, _), cell in cells.items() if found == width]
            tasks = {}
            for task in next(iter(seeds[0].values())):
                every = [[cell[recipe][task] for cell in seeds] for recipe in recipes]
                loss = [[sum(one["nll"][:items]) / sum(one["tokens"][:items]) for one in row] for row in every]
                right = [[np.mean(one["right"][:items]) for one in row] for row in every]
                tasks[task] = Measured(np.array(loss), np.array(right))
            mean = Measured(*(np.mean(each, axis=0) for each in zip(*tasks.values(), strict=True)))
            return {ALL: mean} | tasks

        return cls(
            recipes,
            {width: at(width, None) for width in small},
            {width: at(width, FEW) for width in small},
            at(large, None),
            large,
        )


def spearman(predicted: Float[np.ndarray, "*n recipes"], truth: Float[np.ndarray, "*n recipes"]) -> np.ndarray:
    """Spearman's correlation over the last axis; 0 where one side is constant and so says nothing of an order."""
    a, b = (stats.rankdata(side, axis=-1) for side in np.broadcast_arrays(predicted, truth))
    a, b = a - a.mean(axis=-1, keepdims=True), b - b.mean(axis=-1, keepdims=True)
    scale = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), scale, out=np.zeros_like(scale), where=scale > 0)


def pairs_in_order(predicted: Float[np.ndarray, "*n recipes"], truth: Float[np.ndarray, "*n recipes"]) -> np.ndarray:
    """The share of pairs of recipes in the right order: (1 + Kendall's τ) / 2. A tie of the prediction counts a half.

    Pairs that are equal in truth, such as a recipe that a bootstrap drew twice, do not count.
    """
    predicted, truth = np.broadcast_arrays(predicted, truth)
    i, j = np.triu_indices(truth.shape[-1], 1)
    wanted = np.sign(truth[..., i] - truth[..., j])
    agree = np.sign(predicted[..., i] - predicted[..., j]) * wanted
    return (1 + agree.sum(axis=-1) / np.maximum(np.abs(wanted).sum(axis=-1), 1)) / 2


MEASURES = {"Spearman's ρ": spearman, "pairs in order": pairs_in_order}


class Ordering(NamedTuple):
    """How well both measures of small models order recipes, each with its interval over recipes and seeds.

    Attributes:
        loss: of the loss.
        accuracy: of the accuracy.
        difference: of the two, in the same draws.
    """

    loss: Interval
    accuracy: Interval
    difference: Interval

    @property
    def verdict(self) -> str:
        """ "holds": the whole interval has the loss ahead; "direction only": the mean does; "not at this scale"."""
        if self.difference.low > 0:
            return "holds"
        return "direction only" if self.difference.value > 0 else "not at this scale"


def ordering(small: Measured, large: Measured, measure: Any, *, draws: int = DRAWS, seed: int = 0) -> Ordering:
    """Holds single small models against the mean of the larger ones.

    One small model a recipe is what a search trains, so the measure is taken for each seed by itself, then averaged.

    Args:
        small: of one width.
        large: whose accuracy, averaged over seeds, is the truth.
        measure: `spearman` or `pairs_in_order`.
        draws: of the bootstrap, over recipes and over the seeds of either side.
        seed: of it.
    """

    def both(recipes: Int[np.ndarray, " r"], seeds: Int[np.ndarray, " s"], of_large: Int[np.ndarray, " l"]) -> Any:
        truth = large.accuracy[np.ix_(recipes, of_large)].mean(axis=1)
        chosen = np.ix_(recipes, seeds)
        return [float(measure(side[chosen].T, truth).mean()) for side in (-small.loss, small.accuracy)]

    rng = np.random.default_rng(seed)
    count, seeds, of_large = small.loss.shape[0], small.loss.shape[1], large.accuracy.shape[1]
    point = both(np.arange(count), np.arange(seeds), np.arange(of_large))
    numbers = count, seeds, of_large
    drawn = np.array([both(*(rng.choice(number, (number,)) for number in numbers)) for _ in range(draws)])
    columns = [*zip(point, drawn.T, strict=True), (point[0] - point[1], drawn[:, 0] - drawn[:, 1])]
    ends = [np.quantile(column, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) for _, column in columns]
    return Ordering(
        *(Interval(value, float(low), float(high)) for (value, _), (low, high) in zip(columns, ends, strict=True))
    )


def repeated(large: Measured, measure: Any) -> float:
    """How well one larger model a recipe orders them as the mean of the other seeds does: more nobody can ask for."""
    accuracy, seeds = large.accuracy, range(large.accuracy.shape[1])
    others = [np.delete(accuracy, seed, axis=1).mean(axis=1) for seed in seeds]
    return float(np.mean([measure(accuracy[:, seed], others[seed]) for seed in seeds]))


def law_of(study: Study, task: str) -> ScoreLaw | None:
    """The sigmoid from loss to accuracy, of all small models. Nothing is right by chance, and all can be.

    None where all of them have one accuracy: where nothing is right yet.
    """
    losses, scores = (
        np.concatenate([getattr(of_width[task], name).ravel() for of_width in study.small.values()])
        for name in ("loss", "accuracy")
    )
    if np.ptp(scores) == 0:
        return None
    return fit_scores(losses, scores, "sigmoid", floor=0.0, ceiling=1.0)


def held_out(study: Study, task: str, law: ScoreLaw) -> list[HeldOutScore]:
    """The larger models beside what the law says at their losses."""
    large = study.large[task]
    return check_scores(law, large.loss.ravel().tolist(), large.accuracy.ravel().tolist())


def write_results(solutions: str, study: Study, tokens: int) -> None:
    """Writes `results/scaling_bench_<solutions>.json` and the figure.

    Args:
        solutions: "short" or "long".
        study: what was measured.
        tokens: of a training.
    """
    name = f"scaling_bench_{solutions}"
    bench = Benchmark(name, f"python -m benchmarks.scaling_bench --solutions {solutions}")
    for row in rows(study, tokens):
        bench.add(**row)
    bench.write()
    IMAGES.mkdir(parents=True, exist_ok=True)
    draw(study).savefig(IMAGES / f"{name}.svg", format="svg", metadata={"Date": None})


def rows(study: Study, tokens: int) -> list[dict[str, Any]]:
    """The figures, as `Benchmark.add` takes them."""
    scale = f"{len(study.recipes)} recipes, {tokens / 1e6:.2g}M tokens each; "
    found = []
    for width, measured in study.small.items():
        of = f"d {width} for d {study.width}, "
        large = study.large[ALL]
        found += [
            _order_row(scale + of + ALL, measured[ALL], large, "Spearman's ρ"),
            _order_row(of + ALL, measured[ALL], large, "pairs in order"),
            _order_row(f"{of}{ALL}, {FEW} items each", study.few[width][ALL], large, "pairs in order"),
        ]
        found += [
            _order_row(of + task, small, study.large[task], "pairs in order")
            for task, small in measured.items()
            if task != ALL
        ]
        noisy = measured | {f"{ALL}, {FEW} items each": study.few[width][ALL]}
        found += [_noise_row(f"d {width}, {task}", small) for task, small in noisy.items()]
    found.append(
        {
            "metric": f"d {study.width}, {ALL}: pairs in order, one seed's accuracy for that of the others",
            "unit": "share",
            "ours": repeated(study.large[ALL], pairs_in_order),
            "larger_is_better": True,
        }
    )
    laws = {task: law_of(study, task) for task in study.large}
    return found + [_law_row(study, task, law) for task, law in laws.items() if law]


def _order_row(what: str, small: Measured, large: Measured, name: str) -> dict[str, Any]:
    order = ordering(small, large, MEASURES[name])
    difference = f"difference {order.difference.value:+.3f} ({_range(order.difference)})"
    return {
        "metric": f"{what}: {name} of the loss ({_range(order.loss)}); {difference}: {order.verdict}",
        "unit": "share" if name == "pairs in order" else "0 to 1",
        "ours": max(order.loss.value, 0.0),  # a correlation below 0 is no better than none; its interval says so
        "larger_is_better": True,
        "baseline_name": f"of the accuracy ({_range(order.accuracy)})",
        "baseline": max(order.accuracy.value, 0.0),
    }


def _noise_row(what: str, small: Measured) -> dict[str, Any]:
    # Infinity, where all recipes are the same, is written as `Benchmark` shows it.
    loss, accuracy = (min(noise_ratio(side.tolist()), sys.float_info.max) for side in small)
    return {
        "metric": f"{what}: spread over seeds by spread over recipes, of the loss",
        "unit": "noise ratio",
        "ours": loss,
        "larger_is_better": False,
        "baseline_name": "of the accuracy",
        "baseline": accuracy,
    }


def _law_row(study: Study, task: str, law: ScoreLaw) -> dict[str, Any]:
    checked = held_out(study, task, law)
    errors = np.array([one.predicted.value - one.score for one in checked])
    mean = np.mean([of_width[task].accuracy.mean() for of_width in study.small.values()])
    widths = ", ".join(map(str, study.small))
    return {
        "metric": f"{task}: mean error of {len(checked)} accuracies of d {study.width} by the sigmoid of d {widths} "
        f"(bias {errors.mean():+.3f}); in the 90% interval: {np.mean([one.covered for one in checked]):.0%}",
        "unit": "accuracy",
        "ours": float(np.abs(errors).mean()),
        "larger_is_better": False,
        "baseline_name": "by the small models' mean accuracy",
        "baseline": float(np.abs(mean - study.large[task].accuracy).mean()),
    }


def _range(interval: Interval) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}"


def draw(study: Study) -> Figure:
    """Both measures of the widest small models over the larger models' accuracy, and the sigmoid with both."""
    canvas = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, middle, right = canvas.subplots(1, 3)
    width = max(study.small)
    small, large = study.small[width][ALL], study.large[ALL]
    order = ordering(small, large, pairs_in_order)
    for axis, values, name, share in (
        (left, small.loss, "ScalingBench loss, nats a token", order.loss),
        (middle, small.accuracy, "accuracy", order.accuracy),
    ):
        for i, recipe in enumerate(study.recipes):
            color = COLORS[i % len(COLORS)]
            marker = "o" if i < len(COLORS) else "s"
            truth = large.accuracy[i].mean()
            axis.plot(values[i], [truth] * values.shape[1], marker, color=color, markersize=3, alpha=0.5)
            axis.plot(values[i].mean(), truth, marker, color=color, markersize=6, label=recipe)
        axis.set(xlabel=f"{name}, d {width}", title=f"{share.value:.0%} of pairs in order")
    left.set_ylabel(f"accuracy, d {study.width}")
    left.invert_xaxis()
    for number, (of_width, measured) in enumerate(study.small.items()):
        at = measured[ALL]
        right.plot(at.loss.ravel(), at.accuracy.ravel(), ".", color=COLORS[number], label=f"d {of_width}", markersize=4)
    right.plot(
        large.loss.ravel(),
        large.accuracy.ravel(),
        "x",
        color=COLORS[6],
        label=f"d {study.width}, held out",
        markersize=5,
    )
    if law := law_of(study, ALL):
        losses = np.linspace(min(large.loss.min(), law.losses.min()), law.losses.max(), 60)
        band = [law.interval(float(loss)) for loss in losses]
        right.plot(losses, [one.value for one in band], color="#1b2430", linewidth=1)
        right.fill_between(losses, [one.low for one in band], [one.high for one in band], color="#1b2430", alpha=0.12)
    right.set(xlabel="ScalingBench loss, nats a token", ylabel="accuracy", title="loss → score")
    right.invert_xaxis()
    right.legend(fontsize=6, frameon=False)
    canvas.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=6, frameon=False)
    return canvas
