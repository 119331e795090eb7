"""Does InfLLM v2's selection work on weights that were trained dense? SmolLM2-135M-Instruct on texts as long as books.

    python -m benchmarks.sparse_quality --work DIR          # measures
    python -m benchmarks.sparse_quality_report --work DIR   # writes the results

1. The loss of every token of rows of 8,192 tokens (and of 16,384 with YaRN): dense, by InfLLM v2's selection, by a
   window with the first block, and by random blocks, for several numbers of visible blocks; and by a selection that
   16 or 64 neighbours share. Attention is causal, so that the first 2,048 tokens of a row are a row of 2,048.
2. The share of dense attention that the chosen blocks hold, for every layer and head, in the same dense pass.
3. The same weights trained further for some steps, sparse and, as a control, dense, on other texts; the losses after.

Every measured cell stays in DIR, and a training that `--seconds` cut off goes on where it was. Whatever is measured is
reported; `--parts` and `--rows` say what to measure now. On two cores a row of one cell takes minutes: two rows of each
text, and training of 60 steps of one row, are what they can do in some hours.
"""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.block_rules import TILES, Rule, attend_and_weigh, attend_by, sparse_config, token_losses
from benchmarks.compile_ahead import CompileAhead
from benchmarks.custom_attention import plain_on_gpu
from benchmarks.pretrained import smollm2_path
from benchmarks.results import origin
from benchmarks.sparse_quality_cells import Cell, Measured
from benchmarks.sparse_quality_texts import LENGTH, LONG, ROWS, TRAIN_LENGTH, Excerpt, Rows, make_rows
from benchmarks.sparse_quality_training import TRAIN_BLOCKS, OutOfTimeError, Plan, prepare, train
from cpm_jax.checkpoints.manager import restore_params
from cpm_jax.common.progress import Progress
from cpm_jax.inference.load import load_model
from cpm_jax.modeling.config import ModelConfig, RopeConfig
from cpm_jax.modeling.decoder import Params

BUDGETS = (16, 8, 32, 64)  # visible blocks; the first one is that of every table over lengths
TILE_BUDGETS = (16, 8)  # where neighbours share a choice
# What chooses how many blocks for the shares of attention, and for which queries: the second half of a row, at a
# distance that brings every place within a block.
WEIGHED: tuple[Rule, ...] = ("lse", "exact", "window", "random", "oracle")
WEIGHED_BUDGETS = (8, 16, 32, 64)
WEIGHED_POSITIONS = np.arange(LENGTH // 2 + 15, LENGTH, 31)
Part = Literal["rows", "training", "long"]
PARTS: tuple[Part, ...] = ("rows", "training", "long")


def cells(part: Part) -> Iterator[Cell]:
    """What is measured of each row."""
    main = BUDGETS[0]
    rules: tuple[Rule, ...] = ("lse", "window", "random", "exact")
    if part == "rows":
        yield Cell("published", "dense", 0, LENGTH, "plain")
        for budget in BUDGETS:
            of_budget = (*rules, *TILES) if budget in TILE_BUDGETS else rules
            yield from (Cell("published", rule, budget, LENGTH, "plain") for rule in of_budget)
    elif part == "training":
        for weights in ("trained_sparse", "trained_dense"):
            yield Cell(weights, "dense", 0, LENGTH, "plain")
            yield Cell(weights, "lse", TRAIN_BLOCKS, LENGTH, "plain")
    else:
        yield Cell("published", "dense", 0, LONG, "yarn")
        yield from (Cell("published", rule, main, LONG, "yarn") for rule in rules)
        yield Cell("published", "dense", 0, LONG, "plain")


def model_config(config: ModelConfig, cell: Cell) -> ModelConfig:
    """The model as a cell runs it: beyond its limit, YaRN stretches the rotary embedding from there."""
    # The cell says how attention is computed, whatever the weights were trained with.
    config = dataclasses.replace(config, sparse_config=None)
    if cell.rope == "plain":
        return config
    limit = config.max_position_embeddings
    rope = RopeConfig(
        rope_theta=config.rope.rope_theta,
        scaling="yarn",
        factor=cell.length / limit,
        original_max_position_embeddings=limit,
    )
    return dataclasses.replace(config, rope=rope, max_position_embeddings=cell.length)


class Measurement:
    """Measures rows with the weights that there are."""

    def __init__(self, config: ModelConfig, params: Params, work: Path, ahead: CompileAhead):
        """Measures the published weights, and trained ones once they are given or kept in `work`.

        Args:
            config: the model.
            params: as published.
            work: folder of cells and trainings.
            ahead: compiles the programs.
        """
        self.config, self.params, self.work, self.ahead = config, {"published": params}, work, ahead
        self.origin = origin()
        self.implementation = plain_on_gpu()

    def program(self, cell: Cell) -> Any:
        """The future program of a cell: from parameters, tokens and what is to be filled to losses and that."""
        weighed, kept = cell == Cell("published", "dense", 0, LENGTH, "plain"), None
        key = jax.random.key(0)
        if weighed:
            shape = (len(WEIGHED), len(WEIGHED_BUDGETS), 1, self.config.num_heads, len(WEIGHED_POSITIONS))
            kept = jax.ShapeDtypeStruct((self.config.num_layers, *shape), jnp.float32)
            attend = attend_and_weigh(
                WEIGHED, WEIGHED_BUDGETS, jnp.asarray(WEIGHED_POSITIONS), key, self.implementation
            )
        else:
            attend = attend_by(cell.rule, cell.blocks, key, self.implementation)
        run = functools.partial(
            token_losses, model_config(self.config, cell), attend, implementation=self.implementation
        )
        tokens = jax.ShapeDtypeStruct((1, cell.length + 1), jnp.int32)
        params = self.params["published"]
        return self.ahead.get((cell._replace(weights="published"), weighed), run, lambda: (params, tokens, kept)), kept

    def measure(self, cell: Cell, excerpt: Excerpt) -> Measured:
        """Runs one row."""
        if cell.weights not in self.params:
            self.params[cell.weights], _ = restore_params(self.work / cell.weights)
        program, kept = self.program(cell)
        kept = None if kept is None else jnp.zeros(kept.shape, kept.dtype)
        tokens = excerpt.tokens[None, : cell.length + 1]
        losses, shares = program.result()(self.params[cell.weights], tokens, kept)
        shares = None if shares is None else np.asarray(shares[:, :, :, 0], np.float16)
        return Measured(np.asarray(losses[0]), self.origin, shares)

    def measure_part(self, part: Part, rows: Sequence[Excerpt], deadline: float) -> None:
        """Measures the cells of a part that are not there yet, and keeps them.

        A cell runs on one row of every text before the next cell does, so that whatever is done by then makes a table.

        Raises:
            OutOfTimeError: the deadline has passed.
        """
        numbers = sorted({row.number for row in rows})
        wanted = [(cell, row) for number in numbers for cell in cells(part) for row in rows if row.number == number]
        missing = [(cell, row) for cell, row in wanted if not Measured.path(self.work, cell, row.name).exists()]
        begin = len(wanted) - len(missing)
        with Progress(f"sparse_quality, {part}", len(wanted), initial=begin) as bar:
            for done, (cell, row) in enumerate(missing):
                if time.monotonic() > deadline:
                    raise OutOfTimeError
                later = list(dict.fromkeys(cell for cell, _ in missing[done:]))
                for soon in later[: self.ahead.threads]:
                    self.program(soon)
                measured = self.measure(cell, row)
                measured.save(self.work, cell, row.name)
                bar.update(begin + done + 1, loss=float(measured.losses.mean()))

    def train(self, rows: Rows, steps: int, batch_size: int, deadline: float) -> None:
        """Trains the published weights further, sparse and dense, on the same rows.

        Raises:
            OutOfTimeError: the deadline has passed.
        """
        published, held_out = self.params["published"], np.stack([x.tokens[: TRAIN_LENGTH + 1] for x in rows.excerpts])
        sparse = sparse_config("lse", TRAIN_BLOCKS)
        plans = {
            name: Plan(self.config, sparse, steps, batch_size, self.implementation)
            for name, sparse in (("trained_sparse", sparse), ("trained_dense", None))
        }
        programs = {name: prepare(plan, published, len(held_out), self.ahead) for name, plan in plans.items()}
        for name, plan in plans.items():
            if not (self.work / name / "training.json").exists():
                folder = self.work / name
                self.params[name] = train(plan, published, rows.training, held_out, folder, programs[name], deadline)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of texts, cells and trainings")
    parser.add_argument("--weights", type=Path, help="GGUF file of SmolLM2; its installed package's is the default")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, choices=range(1, ROWS + 1), default=2, help="of each text")
    parser.add_argument("--long_rows", type=int, choices=range(1, ROWS + 1), default=1, help="of 16,384 tokens")
    parser.add_argument("--train_steps", type=int, default=200, help="a multiple of 10")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of 2,048 tokens of a step")
    parser.add_argument("--seconds", type=float, default=math.inf, help="when to end, with what is done by then")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    jax.config.update("jax_compilation_cache_dir", str(args.work / "compiled"))

    published = load_model(args.weights or smollm2_path())
    rows = make_rows(args.work, published.tokenizer)
    with CompileAhead() as ahead:
        study = Measurement(published.config, published.params, args.work, ahead)
        try:
            for part in (part for part in PARTS if part in args.parts):
                if part == "training":
                    study.train(rows, args.train_steps, args.batch_size, deadline)
                count = args.long_rows if part == "long" else args.rows
                study.measure_part(part, [row for row in rows.excerpts if row.number < count], deadline)
        except OutOfTimeError:
            print(f"{args.seconds:.0f} seconds are over: the same command goes on from here", flush=True)


if __name__ == "__main__":
    main()
