"""Published fits again, from their published points: `python -m benchmarks.published_laws`.

Two tables come with a licence and lie in tests/scaling/data. Two have none and are read from where you put them:
--chinchilla takes data/svg_extracted_data.csv of https://github.com/epoch-research/analyzing-chinchilla,
--steplaw takes data/dense_lr_bs_loss.csv of https://github.com/step-law/steplaw.
"""

import argparse
import contextlib
import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.results import Benchmark
from cpm_jax.scaling.fitting import FitError
from cpm_jax.scaling.hyperparameters import fit_power_law, optimum_on_surface
from cpm_jax.scaling.laws import compute_optimal, fit_loss, frontier_exponent, make_points
from cpm_jax.scaling.scores import fit_scores, paired_difference

DATA = Path(__file__).resolve().parents[1] / "tests" / "scaling" / "data"
# MiniCPM4 (arXiv:2506.07900) table 3, as in tests/scaling/test_scores.py: StepLaw's setting, µP's.
LM = (
    (2.1834, 2.0335, 1.9608, 1.8510, 1.7755, 1.7274, 1.6956, 1.6391),
    (2.1797, 2.0491, 1.9666, 1.8547, 1.7721, 1.7174, 1.7091, 1.6419),
)
BENCH = (
    (0.4310, 0.3897, 0.3685, 0.3383, 0.3172, 0.3004, 0.2984, 0.2805),
    (0.4434, 0.3915, 0.3677, 0.3371, 0.3196, 0.3045, 0.3013, 0.2789),
)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def chinchilla(benchmark: Benchmark, path: Path) -> None:
    """Besiroglu et al. 2024 (arXiv:2404.10102), table 1: 240 of the 245 points, the five highest losses left out."""
    rows = [row for row in read(path) if row["loss"]]
    n, c, loss = (np.array([float(row[name]) for row in rows]) for name in ("Model Size", "Training FLOP", "loss"))
    kept = loss < np.sort(loss)[-5]
    points = make_points(n[kept], (c / 6 / n)[kept], loss[kept], c[kept])
    law = fit_loss(points, samples=200, resample="points")
    published = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
    errors = {"E": 0.03, "A": 124.58, "B": 1293.23, "alpha": 0.02, "beta": 0.02}
    samples = law.coefficient_samples()
    for name, wanted in published.items():
        add(benchmark, f"Chinchilla's points: {name}", law.coefficients[name], "Besiroglu et al.", wanted)
        spread = float(samples[name].std())
        add(benchmark, f"Chinchilla's points: standard error of {name}", spread, "Besiroglu et al.", errors[name])
        off = abs(law.coefficients[name] - wanted) / errors[name]
        benchmark.add(f"Chinchilla's points: {name} off by", "their standard errors", off, larger_is_better=False)
    num_params, tokens = compute_optimal(law, 5.76e23)
    add(benchmark, "Chinchilla's points: tokens a parameter at 5.76e23 FLOPs", tokens / num_params, "theirs: about", 20)


def steplaw(benchmark: Benchmark, path: Path) -> None:
    """StepLaw (arXiv:2503.04715), eq. 1: the best learning rate and batch of each dense model and number of tokens."""
    groups = defaultdict(list)
    for row in read(path):
        if "mlr1.00e-05" in row["exp_name"]:  # one last learning rate for all, as their fit has it
            groups[float(row["N"]), float(row["D"])].append(row)
    optima = []
    for (n, d), rows in groups.items():
        columns = [[float(row[name]) for row in rows] for name in ("lr", "bs", "smooth loss")]
        with contextlib.suppress(FitError):  # a size with a few runs, or without a minimum within its grid
            optima.append((n, d, *optimum_on_surface(*columns)[:2]))
    n, d, rates, sequences = np.array(optima).T
    batches = sequences * 2048
    rate, batch = fit_power_law(rates, {"N": n, "D": d}), fit_power_law(batches, {"D": d})
    for name, wanted in (("N", 0.713), ("D", 0.307)):
        low, high = (abs(end) for end in rate.exponent_intervals()[name][1:])
        label = f"StepLaw: learning rate over {name}, |exponent| ({min(low, high):.2f} to {max(low, high):.2f})"
        add(benchmark, label, abs(rate.exponents[name]), "StepLaw", wanted)
    low, high = batch.exponent_intervals()["D"][1:]
    add(benchmark, f"StepLaw: batch over D, exponent ({low:.2f} to {high:.2f})", batch.exponents["D"], "StepLaw", 0.571)
    benchmark.add("StepLaw: sizes with a minimum within their grid", "", len(optima), larger_is_better=True)
    ours, theirs = rate.predict(N=1e9, D=1e11), 1.79 * 1e9**-0.713 * 1e11**0.307
    add(benchmark, "StepLaw: learning rate of 1B at 100B tokens", ours, "StepLaw", theirs)
    add(benchmark, "StepLaw: batch at 100B tokens", batch.predict(D=1e11), "StepLaw", 0.58 * 1e11**0.571)


def gadre(benchmark: Benchmark) -> None:
    """Gadre et al. 2024 (arXiv:2403.08540): five models of at most 0.4B predict 1.4B at 900B tokens, and 6.9B."""
    rows = [row for row in read(DATA / "gadre2024.csv") if row["dataset"] == "rpj"]
    five = [
        row
        for row in rows
        if not row["model"].startswith("open_lm")
        and (float(row["multiplier"]) == 1 or (row["model"].startswith("d=96") and row["multiplier"] == "16.0"))
    ]
    columns = [[float(row[name]) for row in five] for name in ("num_params", "tokens", "c4_val_loss")]
    law = fit_loss(make_points(*columns), "tied", samples=0, squares=True)
    eta = law.coefficients["alpha"] / 2
    for name, ours, wanted in (("a", "A", 212), ("b", "B", 367)):
        add(benchmark, f"Gadre et al., RedPajama: {name}", law.coefficients[ours] * 6**eta, "theirs", wanted)
    add(benchmark, "Gadre et al., RedPajama: η", eta, "theirs", 0.136)
    six = five + [row for row in rows if row["model"] == "open_lm_1b" and row["multiplier"] == "1.0"]
    scores = fit_scores(
        [float(row["c4_val_loss"]) for row in six],
        [1 - float(row["error_17_tasks"]) for row in six],
        "exponential",
        samples=0,
    )
    published = {("open_lm_1b", "32.0"): (0.7103, 3.6365), ("open_lm_7b", "1.0"): (0.7320, 0.0464)}
    for row in rows:
        figures = published.get((row["model"], row["multiplier"]))
        if figures is None:
            continue
        loss = law.predict(float(row["num_params"]), float(row["tokens"]))
        error = 1 - scores.predict(loss)
        found = (100 * abs(loss / float(row["c4_val_loss"]) - 1), 100 * abs(error / float(row["error_17_tasks"]) - 1))
        for what, measured, theirs in zip(("loss", "mean error of 17 tasks"), found, figures, strict=True):
            name = f"Gadre et al., {row['model']} at {float(row['tokens']):.2g} tokens: error of the predicted {what}"
            add(benchmark, name, measured, "theirs", theirs, unit="%")


def porian(benchmark: Benchmark) -> None:
    """Porian et al. 2024 (arXiv:2406.19146), tuned: the exponent of N over C, by L(N, D) instead of parabolas."""
    rows = read(DATA / "porian2024_tuned.csv")
    names = ("num_params", "tokens", "loss", "flops", "optimal_num_params")
    n, d, loss, c, optimum = (np.array([float(row[name]) for row in rows]) for name in names)
    near = np.abs(np.log(n / optimum)) < np.log(2.5)
    law = fit_loss(make_points(n[near], d[near], loss[near], c[near]), samples=0)
    add(benchmark, "Porian et al., tuned: exponent of N over C", frontier_exponent(law), "theirs", 0.4970)


def table_3(benchmark: Benchmark) -> None:
    """What MiniCPM4's eight cells say: µP's search against StepLaw's, of a thirty-thousandth of its cost."""
    for name, (vanilla, mup) in (("LM loss", LM), ("ScalingBench loss", BENCH)):
        found = paired_difference(mup, vanilla)
        said = f"MiniCPM4 table 3, {name}, µP - StepLaw"
        benchmark.add(f"{said}: |mean|", "nats", abs(found.mean), larger_is_better=False)
        benchmark.add(f"{said}: half of the 95% interval", "nats", (found.high - found.low) / 2, larger_is_better=False)
        benchmark.add(f"{said}: p of a paired t test", "", found.p_value, larger_is_better=True)
        benchmark.add(f"{said}: cells where µP is lower", f"of {found.cells}", found.first_lower, larger_is_better=True)


def add(benchmark: Benchmark, metric: str, ours: float, name: str, theirs: float, unit: str = "") -> None:
    """A row where neither larger nor smaller is better: the ratio says how near they are."""
    benchmark.add(metric, unit, float(ours), larger_is_better=True, baseline_name=name, baseline=float(theirs))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what has its points."""
    parser = argparse.ArgumentParser(description="Published fits again, from their published points.")
    parser.add_argument("--chinchilla", type=Path, help="svg_extracted_data.csv of Epoch's replication")
    parser.add_argument("--steplaw", type=Path, help="dense_lr_bs_loss.csv of StepLaw")
    arguments = parser.parse_args(argv)
    said = [f" --{name}={path.name}" for name, path in vars(arguments).items() if path is not None]
    benchmark = Benchmark("published_laws", "python -m benchmarks.published_laws" + "".join(said))
    if arguments.chinchilla is not None:
        chinchilla(benchmark, arguments.chinchilla)
    if arguments.steplaw is not None:
        steplaw(benchmark, arguments.steplaw)
    gadre(benchmark)
    porian(benchmark)
    table_3(benchmark)
    benchmark.write()


if __name__ == "__main__":
    main()
