"""Does ScalingBench's loss of small models order recipes as larger models do, and better than accuracy does?

    python -m benchmarks.scaling_bench [--solutions short | long] [--work DIR]

Twelve recipes (mixtures of data, learning rates, schedules) are each trained at small widths and at a large one, from
several seeds, on generated problems with worked solutions. Each model is measured on problems that none has seen: the
loss of the solution given its question, as `scaling_bench:` of `evaluate` has it, and the share of right answers. All
recipes of a width and seed are one program, in a process on a core of its own; each such cell stays in `--work`, and a
second call goes on.
Writes `results/scaling_bench_<solutions>.json` and `docs/images/scaling_bench_<solutions>.svg`.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cores import process_on_each_core
from benchmarks.scaling_bench_report import Study, write_results
from benchmarks.scaling_bench_texts import (
    BARE,
    TASKS,
    TEXT,
    WRONG,
    Texts,
    answer_of,
    held_out_problems,
    make_batch,
    training_texts,
)
from cpm_jax.common.files import write_json
from cpm_jax.evaluation.lm_eval_adapter import CpmJaxLM
from cpm_jax.evaluation.scaling_bench import METRIC, ScalingBenchTask, Solved
from cpm_jax.inference.decode_loop import NO_TOKEN, extend, start
from cpm_jax.inference.generate import unstack_on_cpu
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.scaling.mup import at_width
from cpm_jax.scaling.stacked_program import StackedProgram, Trial
from cpm_jax.training.losses import LossConfig
from cpm_jax.training.optimizer import OptimizerConfig
from cpm_jax.training.schedules import ScheduleConfig, cosine, wsd

LEARNING_RATE = 0.01
BATCH_SIZE = 100  # of the evaluation
EVEN = dict.fromkeys(TASKS, 1.0)
MODEL = ModelConfig(
    vocab_size=384,
    num_layers=2,
    d_model=32,
    num_heads=2,
    num_kv_heads=2,
    d_ff=64,
    max_position_embeddings=256,  # of a question and an answer
    tie_word_embeddings=True,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=32,
    initializer_range=0.1,
    dtype="float32",
)


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a study is.

    Attributes:
        small: widths of the models that predict.
        large: width of those that are predicted.
        small_seeds: seeds of each recipe at a small width: parameters and order of the data.
        large_seeds: likewise at the large one.
        steps: of a training.
        rows: of a batch.
        seq_len: tokens of a row.
        problems: of each task, to train on.
        test_problems: of each task, to measure by.
        solutions: "short" or "long".
        answer_tokens: most of an output: the longest solution has fewer.
    """

    small: tuple[int, ...] = (16, 32)
    large: int = 64
    small_seeds: int = 4
    large_seeds: int = 3
    steps: int = 2500
    rows: int = 16
    seq_len: int = 64
    problems: int = 20_000
    test_problems: int = 400
    solutions: str = "short"
    answer_tokens: int = 60

    def cells(self) -> list[tuple[int, int]]:
        """Width and seed of every cell, the large ones first: the cores are then done at about the same time."""
        small = [(width, seed) for width in sorted(self.small)[::-1] for seed in range(self.small_seeds)]
        return [(self.large, seed) for seed in range(self.large_seeds)] + small


SIZES = {
    "short": Size(),
    "long": Size(solutions="long", rows=8, seq_len=128, answer_tokens=90),
    "smoke": Size((16,), 32, 2, 2, steps=6, rows=2, problems=200, test_problems=5),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A choice that a laboratory would have to make before it trains the large model.

    Attributes:
        mixture: shares of the data's components.
        learning_rate: peak, at any width by µP.
        schedule: "wsd", "cosine", or "constant" after the warm-up.
    """

    mixture: Mapping[str, float] = dataclasses.field(default_factory=lambda: EVEN)
    learning_rate: float = LEARNING_RATE
    schedule: str = "wsd"

    def schedule_config(self, steps: int) -> ScheduleConfig:
        """The schedule over so many steps: a twentieth of warm-up, and of WSD a fifth of decay."""
        if self.schedule == "cosine":
            return cosine(self.learning_rate, steps, steps // 20)
        return wsd(self.learning_rate, steps, steps // 20, steps // 5 if self.schedule == "wsd" else 0)


RECIPES = {
    "base": Recipe(),
    "learning rate / 4": Recipe(learning_rate=LEARNING_RATE / 4),
    "learning rate · 3": Recipe(learning_rate=LEARNING_RATE * 3),
    "cosine": Recipe(schedule="cosine"),
    "no decay": Recipe(schedule="constant"),
    "more of the easy task": Recipe(EVEN | {"one digit": 4.0}),
    "more of the hard task": Recipe(EVEN | {"two digits": 4.0}),
    "more of the third task": Recipe(EVEN | {"legs": 4.0}),
    "a third of source code": Recipe(EVEN | {TEXT: 1.5}),
    "two thirds of source code": Recipe(EVEN | {TEXT: 6.0}),
    "a quarter wrong": Recipe(EVEN | {WRONG: 1.0}),
    "a quarter without steps": Recipe(EVEN | {BARE: 1.0}),
}


def trials(size: Size, width: int, seed: int) -> list[Trial]:
    """All recipes at a width."""
    model = at_width(MODEL, width, "grow")
    return [
        Trial(name, model, OptimizerConfig(), recipe.schedule_config(size.steps), seed)
        for name, recipe in RECIPES.items()
    ]


@functools.cache
def program_of(size: Size, width: int, seed: int) -> StackedProgram:
    """The program of all recipes at a width."""
    return StackedProgram(trials(size, width, seed), steps=size.steps, loss=LossConfig(), shared_batch=False)


def train(size: Size, width: int, seed: int, texts: Texts) -> list[Any]:
    """Parameters of each recipe's model."""
    states = program_of(size, width, seed).init()
    program = program_of(size, width, 0)  # seeds differ in what they begin with: a process compiles the steps once
    for number in range(size.steps):
        # Recipes draw alike, so that they differ by what they are and not by the luck of the draw.
        each = [
            make_batch(texts.streams, recipe.mixture, size.rows, size.seq_len, np.random.default_rng((seed, number)))
            for recipe in RECIPES.values()
        ]
        states, _ = program.step(
            states, program.put({key: np.stack([batch[key] for batch in each]) for key in each[0]})
        )
    params = jax.device_get(states.params)
    return [jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), params) for i in range(len(RECIPES))]


def solution_losses(lm: CpmJaxLM, solved: Sequence[Solved]) -> tuple[list[float], list[int]]:
    """ScalingBench: negative log-likelihood in nats, and tokens, of each solution given its question."""
    task = ScalingBenchTask("scaling_bench", solved, "")
    items = [item for found in task.run(lm, range(len(solved)), batch_size=BATCH_SIZE) for item in found]
    measured = [item.metrics[METRIC] for item in sorted(items, key=lambda item: item.index)]
    return [one.value for one in measured], [int(one.weight) for one in measured]


def right_answers(lm: CpmJaxLM, solved: Sequence[Solved], answer_tokens: int) -> list[int]:
    """1 where what the model writes after the question, greedily, gives the right answer."""
    config, greedy = lm.generator.config, SamplingConfig(temperature=0.0)
    params, end = unstack_on_cpu(lm.params), jnp.array([lm.tokens.eos_id])
    prompts = [lm.tokens.encode_prompt(one.context) for one in solved]
    state = start(
        params,
        prompts,
        config=config,
        sampling=greedy,
        max_new_tokens=answer_tokens,
        seed=0,
        indices=range(len(prompts)),
    )
    _, tokens = extend(params, state, end, num_tokens=answer_tokens, config=config, sampling=greedy)
    outputs = [lm.tokens.decode(row[row != NO_TOKEN], skip_special_tokens=True) for row in np.asarray(tokens)]
    return [int(answer_of(output) == one.answer) for output, one in zip(outputs, solved, strict=True)]


def measure(size: Size, width: int, params: Any) -> dict[str, Any]:
    """What each problem of each task came to: its loss and tokens, and whether its answer was right."""
    texts, test = texts_of(size)
    lm = CpmJaxLM(at_width(MODEL, width, "grow"), params, texts.tokenizer, batch_size=BATCH_SIZE)
    found = {}
    for task, solved in test.items():
        nll, tokens = solution_losses(lm, solved)
        right = right_answers(lm, solved, size.answer_tokens)
        found[task] = {"nll": [round(value, 4) for value in nll], "tokens": tokens, "right": right}
    return found


@functools.cache
def texts_of(size: Size) -> tuple[Texts, dict[str, list[Solved]]]:
    """What to train on and what to measure by, made once in a process."""
    test = held_out_problems(size.solutions, size.test_problems)
    return training_texts(size.solutions, size.problems, test), test


def run_cell(size: Size, width: int, seed: int, path: Path) -> str:
    """Trains all recipes of a width and seed, measures them and writes that down; says how long it took."""
    texts, _ = texts_of(size)
    begin = time.perf_counter()
    params = train(size, width, seed, texts)
    trained = time.perf_counter()
    write_json(path, {name: measure(size, width, one) for name, one in zip(RECIPES, params, strict=True)})
    return f"width {width}, seed {seed}: {trained - begin:.0f} + {time.perf_counter() - trained:.0f} s"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the cells that are missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/scaling_bench"), help="what is measured already")
    parser.add_argument("--solutions", choices=SIZES, default="short", help="smoke: a study of seconds")
    parser.add_argument("--no-results", action="store_true", help="train and measure only")
    args = parser.parse_args(argv)
    size = SIZES[args.solutions]
    folder = args.work / hashlib.sha256(repr((size, RECIPES, MODEL)).encode()).hexdigest()[:8]
    folder.mkdir(parents=True, exist_ok=True)
    paths = {cell: folder / f"d{cell[0]}_seed{cell[1]}.json" for cell in size.cells()}
    with process_on_each_core() as pool:
        pending = [pool.submit(run_cell, size, *cell, path) for cell, path in paths.items() if not path.exists()]
        for future in as_completed(pending):
            print(future.result(), flush=True)
    cells = {cell: json.loads(path.read_text("utf-8")) for cell, path in paths.items()}
    if not args.no_results:
        write_results(args.solutions, Study.of(cells, size.small, size.large), size.steps * size.rows * size.seq_len)


if __name__ == "__main__":
    main()
