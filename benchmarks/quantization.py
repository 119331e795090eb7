"""GPTQ, P-GPTQ, smoothing and rotation on real weights: SmolLM2-135M-Instruct, perplexity on texts as long as books.

    python -m benchmarks.quantization --work DIR            # measures what is missing, then reports
    python -m benchmarks.quantization --work DIR --report   # reports alone

Every method quantises the same weights on the same calibration sequences, and is measured on the same rows of other
books and the same items of tasks, so that differences are paired row by row and item by item. A method that is measured
stays in DIR; `--seconds` ends the call between two of them, and the next call goes on. The weights come from a file in
Q4_1: "float" is what that file says.

Beside it: the largest activation of the residual stream by position and layer, of the float model.
"""

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from benchmarks.long_texts import LongText, long_texts
from benchmarks.pretrained import smollm2_path
from benchmarks.results import RESULTS_DIR, Benchmark, origin
from benchmarks.sparse_quality_texts import Rows, make_rows
from cpm_jax.common.config import check_same_settings, config_to_dict
from cpm_jax.common.figures import Series, heat_map_figure, line_figure
from cpm_jax.common.files import write_json
from cpm_jax.common.statistics import holm
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.comparison import SIGNIFICANCE, compare_values
from cpm_jax.evaluation.lm_eval_adapter import CpmJaxLM
from cpm_jax.evaluation.results import ratio
from cpm_jax.evaluation.tasks import make_tasks
from cpm_jax.inference.load import LoadedModel, load_model
from cpm_jax.inference.scoring import Scorer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params
from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.layer import embed, run_layer
from cpm_jax.quantization.pipeline import quantize_model

FLOAT = "float"
SETTINGS_FILE = "settings.json"
ACTIVATIONS_FILE = "activations.npz"
POSITIONS = 64  # of the activations
SHOWN_POSITIONS = 8  # in the drawing
TASKS = ("hellaswag_sample", "truthfulqa_mc1_sample", "scaling_bench:gsm8k")  # 100 items each
# The paper's order (MiniCPM4 report, Table 4, averages: S-P- 74.91, P- 74.76, S- 74.63, GPTQ 74.31), and what GPTQ and
# rotation are worth: better first.
CLAIMS = (
    ("P-GPTQ", "GPTQ"),
    ("S-GPTQ", "GPTQ"),
    ("S-P-GPTQ", "S-GPTQ"),
    ("S-P-GPTQ", "P-GPTQ"),
    ("GPTQ", "RTN"),
    ("R-GPTQ", "GPTQ"),
    ("R-P-GPTQ", "P-GPTQ"),
)


def methods(group_size: int) -> dict[str, QuantizationConfig | None]:
    """What is measured, in the order in which it is."""
    gptq = QuantizationConfig(group_size=group_size, skip_initial_tokens=0)
    p_gptq = dataclasses.replace(gptq, skip_initial_tokens=4)
    return {
        FLOAT: None,
        "RTN": dataclasses.replace(gptq, method="rtn"),
        "GPTQ": gptq,
        "P-GPTQ": p_gptq,
        "S-GPTQ": dataclasses.replace(gptq, smoothing=True),
        "S-P-GPTQ": dataclasses.replace(p_gptq, smoothing=True),
        "R-P-GPTQ": dataclasses.replace(p_gptq, rotation=True),
        "R-GPTQ": dataclasses.replace(gptq, rotation=True),
    }


class Score(NamedTuple):
    """The main metric of a task.

    Attributes:
        metric: its name.
        higher_is_better: which way it is good.
        values: of each item, in their order.
        weights: of each item: 1 in a mean, its tokens in a loss.
    """

    metric: str
    higher_is_better: bool
    values: Sequence[float]
    weights: Sequence[float]


class Measured(NamedTuple):
    """One method's result.

    Attributes:
        nats: of each row, the mean of its tokens.
        scores: of each task.
        seconds: that quantisation took.
        errors: of the outputs of linear layers, as `QuantizedModel.errors`.
        origin: commit, date and machine.
    """

    nats: Float[np.ndarray, " rows"]
    scores: Mapping[str, Score]
    seconds: float
    errors: Mapping[str, Sequence[float]]
    origin: Mapping[str, Any]

    @staticmethod
    def path(work: Path, method: str) -> Path:
        """Where it is kept."""
        return work / "cells" / f"{method}.json"

    def save(self, work: Path, method: str) -> None:
        """Keeps it, whole or not at all."""
        scores = {name: score._asdict() for name, score in self.scores.items()}
        write_json(self.path(work, method), self._asdict() | {"nats": self.nats.tolist(), "scores": scores})

    @classmethod
    def load(cls, work: Path, method: str) -> "Measured":
        """Reads it back."""
        content = json.loads(cls.path(work, method).read_text("utf-8"))
        scores = {name: Score(**score) for name, score in content["scores"].items()}
        return cls(**content | {"nats": np.asarray(content["nats"]), "scores": scores})


def calibration_rows(
    texts: Mapping[str, LongText], tokenizer: Tokenizer, count: int, length: int
) -> Int[np.ndarray, "count length"]:
    """Rows of `length` tokens, as many of each kind of text, as far apart in its documents as they can be.

    A kind that is not calibrated on loses more by GPTQ than by rounding to nearest.
    """
    each, found = -(-count // len(texts)), []
    for text in texts.values():
        tokens = np.asarray(tokenizer.encode("\n\n".join(text.training)), np.int32)
        starts = np.linspace(0, len(tokens) - length, each).astype(int)
        found.append(np.stack([tokens[start : start + length] for start in starts]))
    return np.stack(found, axis=1).reshape(-1, length)[:count]


def evaluation_rows(rows: Rows, count: int, length: int) -> Int[np.ndarray, "count length+1"]:
    """Rows of `length + 1` tokens, as many of each excerpt, as far apart in it as they can be.

    Raises:
        ValueError: they would overlap.
    """
    each = -(-count // len(rows.excerpts))
    found = []
    for excerpt in rows.excerpts:
        last = len(excerpt.tokens) - length - 1
        if each * (length + 1) > len(excerpt.tokens):
            raise ValueError(f"{each} rows of {length + 1} tokens overlap in an excerpt of {len(excerpt.tokens)}")
        starts = [last * number // max(each - 1, 1) for number in range(each)]
        found += [excerpt.tokens[start : start + length + 1] for start in starts]
    # In turn from each excerpt, so that any number of rows is of all.
    return np.stack(found).reshape(len(rows.excerpts), each, -1).swapaxes(0, 1).reshape(-1, length + 1)[:count]


def row_losses(config: ModelConfig, params: Params, rows: Int[np.ndarray, "n T+1"]) -> Float[np.ndarray, " n"]:
    """Nats a token of each row, given its first token."""
    scores = Scorer(config, params).score([(row[:1].tolist(), row[1:].tolist()) for row in rows], progress=True)
    return np.array([-score.log_likelihood for score in scores]) / (rows.shape[1] - 1)


def task_scores(model: LoadedModel) -> dict[str, Score]:
    """What the model makes of `TASKS`."""
    lm, found = CpmJaxLM(model.config, model.params, model.tokenizer, eos_ids=model.eos_ids), {}
    for name, task in zip(TASKS, make_tasks(TASKS), strict=True):
        task.build(lm)
        items = [item for some in task.run(lm, task.hashes(), batch_size=8) for item in some]
        items.sort(key=lambda item: item.index)
        values, weights = zip(*(item.metrics[task.main_metric] for item in items), strict=True)
        found[name] = Score(task.main_metric, task.higher_is_better(task.main_metric), values, weights)
    return found


def largest_activations(
    config: ModelConfig, params: Params, tokens: Int[np.ndarray, "n T"]
) -> Float[np.ndarray, "L T"]:
    """The largest absolute value of the residual stream before each layer, by position: the mean over sequences."""
    stream, found = embed(config, params["embed_tokens"]["embedding"], tokens), []
    for index in range(config.num_layers):
        found.append(np.abs(np.asarray(stream, np.float32)).max(-1).mean(0))
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        stream, _ = run_layer(config, layer, stream)
    return np.stack(found)


def measure(
    work: Path,
    model: LoadedModel,
    calibration: Int[np.ndarray, "count length"],
    rows: Int[np.ndarray, "n length+1"],
    args: argparse.Namespace,
    deadline: float,
) -> None:
    """Measures the methods that are asked for and not measured yet.

    Args:
        work: what is measured is kept there.
        model: in float.
        calibration: rows that are calibrated on.
        rows: to measure on.
        args: `methods`, `group_size` and `seconds` of the command line.
        deadline: by `time.monotonic`; no method is begun after it.
    """
    if not (work / ACTIVATIONS_FILE).exists():
        values = largest_activations(model.config, model.params, calibration[:16, :POSITIONS])
        np.savez(work / "partial.npz", values=values)
        os.replace(work / "partial.npz", work / ACTIVATIONS_FILE)
    for method, quantization in methods(args.group_size).items():
        if method not in args.methods or Measured.path(work, method).exists():
            continue
        if time.monotonic() > deadline:
            print(f"{args.seconds:.0f} seconds are over: the same command goes on from here", flush=True)
            return
        print(method, flush=True)
        begin, made, errors = time.monotonic(), model, {}
        if quantization is not None:
            quantized = quantize_model(model.params, model.config, quantization, calibration, progress=True)
            made, errors = model._replace(config=quantized.config, params=quantized.params), quantized.errors
        seconds = time.monotonic() - begin
        nats = row_losses(made.config, made.params, rows)
        Measured(nats, task_scores(made), seconds, errors, origin()).save(work, method)


def add_rows(bench: Benchmark, results: Mapping[str, Measured], what: str) -> None:
    """Perplexities and scores, and what the differences say of the paper's order."""

    def baseline(figures: Mapping[str, float]) -> dict[str, Any]:
        return {"baseline_name": FLOAT, "baseline": figures[FLOAT]} if FLOAT in figures else {}

    perplexities = {method: math.exp(float(measured.nats.mean())) for method, measured in results.items()}
    for method, measured in results.items():
        error = float(np.std(measured.nats, ddof=1)) / math.sqrt(len(measured.nats)) * perplexities[method]
        bench.add(
            f"perplexity, {method}, {what}: ± {error:.2f} over {len(measured.nats)} rows, "
            f"{measured.seconds:.0f} s to quantise",
            "",
            perplexities[method],
            larger_is_better=False,
            **baseline(perplexities),
        )
    add_claims(
        bench,
        "text",
        {
            method: Score("nats/token", False, measured.nats.tolist(), [1.0] * len(measured.nats))
            for method, measured in results.items()
        },
    )
    for task in TASKS:
        scores = {method: measured.scores[task] for method, measured in results.items()}
        figures = {method: ratio(np.array(score.values), np.array(score.weights)) for method, score in scores.items()}
        for method, figure in figures.items():
            bench.add(
                f"{task}, {method}: ± {figure.standard_error:.3f} over {figure.n} items",
                scores[method].metric,
                figure.value,
                larger_is_better=scores[method].higher_is_better,
                **baseline({name: found.value for name, found in figures.items()}),
            )
        add_claims(bench, task, scores)


def add_claims(bench: Benchmark, task: str, scores: Mapping[str, Score]) -> None:
    """What one task says of each claim of which both methods are measured, paired item by item."""
    claims = [pair for pair in CLAIMS if pair[0] in scores and pair[1] in scores]
    compared = []
    for better, worse in claims:
        ours, theirs = (np.array(scores[method].values) for method in (better, worse))
        compared.append(compare_values(ours, theirs, np.array(scores[better].weights)))
    adjusted = holm([paired["p_value"] for paired in compared])
    for (better, worse), paired, p_value in zip(claims, compared, adjusted, strict=True):
        verdict, score = "no difference is shown", scores[better]
        if p_value < SIGNIFICANCE:
            verdict = "better" if (paired["difference"] > 0) == score.higher_is_better else "worse"
        first, second = (
            float(np.sum(scores[method].values) / np.sum(scores[method].weights)) for method in (better, worse)
        )
        bench.add(
            f"{task}: {better} against {worse}: {verdict}; {paired['difference']:+.4f} ± "
            f"{paired['standard_error']:.4f}, {paired['test']}, p = {p_value:.2g} after Holm",
            score.metric,
            first,
            larger_is_better=score.higher_is_better,
            baseline_name=worse,
            baseline=second,
        )


def add_activations(bench: Benchmark, values: Float[np.ndarray, "L T"], directory: Path) -> None:
    """How massive the first tokens' activations are; draws them by position."""
    rest = np.median(values[:, 4:], axis=1)
    layer = int(np.argmax(values[:, 0] / rest))
    for position in range(5):
        bench.add(
            f"largest activation before layer {layer}, token {position}",
            "|x|",
            float(values[layer, position]),
            larger_is_better=False,
            baseline_name=f"median of tokens 4 to {values.shape[1] - 1}",
            baseline=float(rest[layer]),
        )
    shown = [*range(SHOWN_POSITIONS)]
    shares = np.concatenate([values[:, shown], rest[:, None]], axis=1) / values.max(axis=1, keepdims=True)
    figure = heat_map_figure(
        shares.tolist(),
        rows=[str(index) for index in range(len(values))],
        columns=[*map(str, shown), "median of 4+"],
        xlabel="position in the sequence",
        ylabel="before layer",
        title="largest |x| of the residual stream, as a share of the layer's largest",
        wide=True,
    )
    (directory / "quantization_activations.svg").write_text(figure.svg, "utf-8")
    places = sorted({0, 1, len(values) // 3, 2 * len(values) // 3, len(values) - 1})
    lines = {
        f"before layer {index}": Series(np.arange(values.shape[1]).tolist(), np.log10(values[index]).tolist())
        for index in places
    }
    drawing = line_figure(lines, xlabel="position in the sequence", ylabel="log10 of the largest |x|")
    (directory / "quantization_positions.svg").write_text(drawing.svg, "utf-8")


def report(work: Path, directory: Path = RESULTS_DIR) -> Path:
    """Writes what is measured.

    Raises:
        FileNotFoundError: nothing is measured.
    """
    settings = json.loads((work / SETTINGS_FILE).read_text("utf-8"))
    known = methods(settings["group_size"])
    results = {name: Measured.load(work, name) for name in known if Measured.path(work, name).exists()}
    if not results:
        raise FileNotFoundError(f"nothing is measured in {work}")
    command = f"python -m benchmarks.quantization --work DIR --rows {settings['rows']}"
    command += f" --calibration_rows {settings['calibration_rows']} --length {settings['length']}"
    bench = Benchmark("quantization", command)
    directory.mkdir(parents=True, exist_ok=True)
    what = (
        f"4 bits, groups of {settings['group_size']}, calibrated on {settings['calibration_rows']} × "
        f"{settings['length']} tokens"
    )
    add_rows(bench, results, what)
    with np.load(work / ACTIVATIONS_FILE) as file:
        add_activations(bench, file["values"], directory)
    latest = max((measured.origin for measured in results.values()), key=lambda found: found["date"])
    return bench.write(directory, latest)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    known = list(methods(64))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of texts and of what is measured")
    parser.add_argument("--weights", type=Path, help="GGUF file of SmolLM2; its installed package's is the default")
    parser.add_argument("--methods", nargs="*", choices=known, default=known)
    parser.add_argument("--group_size", type=int, default=64, help="64 divides SmolLM2's width of 576, 128 does not")
    parser.add_argument("--calibration_rows", type=int, default=48, help="of 3 kinds of text")
    parser.add_argument("--rows", type=int, default=72, help="to measure on, of 9 excerpts from 3 kinds of text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no method is begun")
    parser.add_argument("--report", action="store_true", help="report what is there, measure nothing")
    args = parser.parse_args(argv)
    if not args.report:
        args.work.mkdir(parents=True, exist_ok=True)
        settings = {name: getattr(args, name) for name in ("group_size", "calibration_rows", "rows", "length")}
        published = load_model(args.weights or smollm2_path())
        settings["model"] = config_to_dict(published.config)
        kept = args.work / SETTINGS_FILE
        if kept.exists():
            check_same_settings(args.work, json.loads(kept.read_text("utf-8")), settings)
        write_json(kept, settings)
        excerpts = make_rows(args.work, published.tokenizer)
        texts = long_texts(args.work / "texts")
        calibration = calibration_rows(texts, published.tokenizer, args.calibration_rows, args.length)
        rows = evaluation_rows(excerpts, args.rows, args.length)
        measure(args.work, published, calibration, rows, args, time.monotonic() + args.seconds)
    report(args.work)


if __name__ == "__main__":
    main()
