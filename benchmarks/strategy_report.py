"""What a comparison of two strategies says, and the page's table and figure of all of them."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import scipy.stats
from matplotlib.figure import Figure

from benchmarks.results import RESULTS_DIR, Benchmark, origin
from cpm_jax.common.figures import COLORS

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
MARGIN = 0.005  # of the loss: what "no worse" may cost
Claim = Literal["better", "no worse", ""]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two strategies, each with some seeds, which they share: parameters and order of the data are paired.

    Attributes:
        question: what is asked.
        arm: the strategy that something is claimed of.
        reference: the other.
        claim: that the arm is better, or that it is no worse; "" claims nothing.
        losses: held-out, of each seed, in nats a token.
        reference_losses: likewise of the reference.
    """

    question: str
    arm: str
    reference: str
    claim: Claim
    losses: Mapping[int, float]
    reference_losses: Mapping[int, float]

    @property
    def differences(self) -> list[float]:
        """Arm less reference, of each seed."""
        return [self.losses[seed] - self.reference_losses[seed] for seed in sorted(self.losses)]

    @property
    def mean(self) -> float:
        """Mean difference; below 0 the arm is better."""
        return statistics.fmean(self.differences)

    @property
    def half(self) -> float:
        """Half of the 95% interval of the mean difference, by Student's t over seeds."""
        values = self.differences
        return float(scipy.stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))

    @property
    def verdict(self) -> str:
        """ "holds": the whole interval agrees with the claim; "direction only": the mean does; "not at this scale".

        Of "no worse" what agrees is a difference below `MARGIN` of the reference's loss. Without a claim: what the
        interval says.
        """
        if not self.claim:
            return "no difference told" if abs(self.mean) <= self.half else "better" if self.mean < 0 else "worse"
        limit = MARGIN * statistics.fmean(self.reference_losses.values()) if self.claim == "no worse" else 0.0
        if self.mean + self.half < limit:
            return "holds"
        return "direction only" if self.mean < limit else "not at this scale"

    def __str__(self) -> str:
        return (
            f"{self.question}: {self.arm} against {self.reference}: {self.mean:+.4f} ± {self.half:.4f} nats a token"
            f" ({f'claim: {self.claim}; ' if self.claim else ''}{self.verdict})"
        )


def save_answers(name: str, question: str, found: Sequence[Comparison], size: str) -> None:
    """Puts a question's comparisons, seed by seed, into `results/<name>_losses.jsonl`, in the place of older ones."""
    path = answers_file(name)
    kept = path.read_text("utf-8").splitlines() if path.exists() else []
    kept = [line for line in kept if json.loads(line)["asked"] != question]
    where = {key: value for key, value in origin().items() if key != "machine"}
    new = [json.dumps({"asked": question, "size": size, **where, **dataclasses.asdict(one)}) for one in found]
    path.write_text("\n".join([*kept, *new]) + "\n", "utf-8")


def read_answers(name: str, size: str) -> dict[str, list[Comparison]]:
    """The comparisons that `save_answers` wrote, by question; none where there is no file.

    Raises:
        ValueError: they are of another size.
    """
    found: dict[str, list[Comparison]] = {}
    if not answers_file(name).exists():
        return found
    for line in answers_file(name).read_text("utf-8").splitlines():
        value = json.loads(line)
        if value["size"] != size:
            raise ValueError(f"{answers_file(name)}: {value['asked']!r} is of {value['size']}, this study of {size}")
        fields = {field.name: value[field.name] for field in dataclasses.fields(Comparison)}
        for key in ("losses", "reference_losses"):
            fields[key] = {int(seed): loss for seed, loss in fields[key].items()}
        found.setdefault(value["asked"], []).append(Comparison(**fields))
    return found


def answers_file(name: str) -> Path:
    """Where the losses of a study are kept."""
    return RESULTS_DIR / f"{name}_losses.jsonl"


def write_results(name: str, command: str, found: Sequence[Comparison], size: str) -> None:
    """Writes `results/<name>.json` and `docs/images/<name>.svg`."""
    bench = Benchmark(name, command)
    add_rows(bench, found, size)
    bench.write()
    draw(found, size).savefig(IMAGES / f"{name}.svg", format="svg", metadata={"Date": None})


def add_rows(bench: Benchmark, found: Sequence[Comparison], size: str) -> None:
    """Adds a row for each comparison of a study of some size."""
    for one in found:
        claimed = f"; claimed to be {one.claim}: {one.verdict}" if one.claim else f"; {one.verdict}"
        bench.add(
            f"{size}; {one.question}: {one.arm}",
            "nats/token",
            statistics.fmean(one.losses.values()),
            larger_is_better=False,
            baseline_name=f"{one.reference}; difference {one.mean:+.4f} ± {one.half:.4f}{claimed}",
            baseline=statistics.fmean(one.reference_losses.values()),
        )


def draw(found: Sequence[Comparison], size: str) -> Figure:
    """Differences with their intervals, one line each; the seeds as dots."""
    colors = dict(zip(("holds", "direction only", "not at this scale"), (COLORS[2], COLORS[4], COLORS[1]), strict=True))
    canvas = Figure(figsize=(8.6, 0.6 + 0.32 * len(found)), layout="constrained")
    axis = canvas.subplots()
    for row, one in enumerate(found):
        color = colors.get(one.verdict, COLORS[6])
        axis.errorbar(one.mean, row, xerr=one.half, fmt="o", color=color, capsize=3, markersize=5)
        axis.plot(one.differences, [row] * len(one.differences), "|", color=color, alpha=0.6)
    axis.axvline(0, color="#5b6675", linewidth=0.8)
    axis.set_yticks(range(len(found)), [f"{one.question}: {one.arm} − {one.reference}" for one in found], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"difference of held-out loss, nats a token\n({size})")
    marks = [axis.plot([], [], "o", color=color, label=said)[0] for said, color in colors.items()]
    axis.legend(handles=marks, fontsize=7, frameon=False)
    return canvas
