"""Does InfLLM v2's selection work on weights that were trained dense? SmolLM2-135M-Instruct on texts as long as books.

    python -m benchmarks.sparse_quality --work DIR

1. The loss of every token of rows of 8,192 tokens (and of 16,384 with YaRN): dense, by InfLLM v2's selection, by a
   window with the first block, and by random blocks, for several numbers of visible blocks. Attention is causal, so
   that the first 2,048 tokens of a row are a row of 2,048.
2. The share of dense attention that the chosen blocks hold, for every layer and head, in the same dense pass.
3. The same weights trained further for some steps, sparse and, as a control, dense, on other texts; the losses after.

Every measured cell stays in DIR and training resumes from its checkpoints: a call that was cut off goes on from there.
Whatever is measured is reported; `--parts` and `--rows` say what to measure now.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.block_rules import LayerAttend, Rule, attend_and_weigh, attend_by, sparse_config, token_losses
from benchmarks.finetune import MODEL, verb
from benchmarks.long_texts import LongText, long_texts
from benchmarks.pretrained import smollm2_path
from benchmarks.results import RESULTS_DIR
from benchmarks.sparse_quality_report import Cell, Measured, Plan, report
from cpm_jax.checkpoints.manager import find_checkpoint
from cpm_jax.common.files import write_text
from cpm_jax.common.progress import Progress
from cpm_jax.inference.load import LoadedModel, load_model
from cpm_jax.modeling.config import ModelConfig, RopeConfig

LENGTH, LONG = 8192, 16_384
ROWS = 3  # of each text
BUDGETS = (16, 8, 32)  # visible blocks; the first one is that of every table over lengths
# What chooses how many blocks for the shares of attention, and for which queries: the second half of a row, in every
# quarter of a block.
WEIGHED: tuple[Rule, ...] = ("lse", "exact", "window", "random", "oracle")
WEIGHED_BUDGETS = (8, 16, 32, 64)
WEIGHED_POSITIONS = np.arange(LENGTH // 2 + 15, LENGTH, 16)
TRAIN_LENGTH, TRAIN_BLOCKS, TRAIN_STEPS = 2048, 8, 60
TRAINING = {"PEAK_LR": 1e-4, "WARMUP_STEPS": 10, "BATCH_SIZE": 1, "DTYPE": "float32", "LOG_EVERY": 10, "EVAL_EVERY": 0}
CHECKPOINT_EVERY = 20
TRAIN_CHARACTERS = 500_000  # of each kind of text; together more than the steps read
Part = Literal["rows", "training", "long"]
PARTS: tuple[Part, ...] = ("rows", "training", "long")


class Excerpt(NamedTuple):
    """A row of a text: `LONG` tokens and the one after.

    Attributes:
        text: its kind.
        number: which of the text's.
        tokens: of which shorter rows take the first.
    """

    text: str
    number: int
    tokens: np.ndarray

    @property
    def name(self) -> str:
        """Kind and number."""
        return f"{self.text}{self.number}"


def excerpts(text: str, tokens: Sequence[int]) -> list[Excerpt]:
    """Cuts rows out of a text, as far apart as they can be.

    Raises:
        ValueError: the text is too short for them not to overlap.
    """
    size = LONG + 1
    if len(tokens) < ROWS * size:
        raise ValueError(f"the text {text} has {len(tokens)} tokens: {ROWS} rows need {ROWS * size}")
    starts = [(len(tokens) - size) * number // max(ROWS - 1, 1) for number in range(ROWS)]
    return [Excerpt(text, n, np.asarray(tokens[start : start + size], np.int32)) for n, start in enumerate(starts)]


def cells(part: Part) -> Iterator[Cell]:
    """What is measured of each row."""
    main = BUDGETS[0]
    rules: tuple[Rule, ...] = ("lse", "window", "random")
    if part == "rows":
        yield Cell("published", "dense", 0, LENGTH, "plain")
        yield Cell("published", "exact", main, LENGTH, "plain")
        yield from (Cell("published", rule, budget, LENGTH, "plain") for budget in BUDGETS for rule in rules)
    elif part == "training":
        for weights in ("trained_dense", "trained_sparse"):
            yield Cell(weights, "dense", 0, LENGTH, "plain")
            yield Cell(weights, "lse", TRAIN_BLOCKS, LENGTH, "plain")
    else:
        yield Cell("published", "dense", 0, LONG, "plain")
        yield Cell("published", "dense", 0, LONG, "yarn")
        yield from (Cell("published", rule, main, LONG, "yarn") for rule in rules)


def model_config(config: ModelConfig, cell: Cell) -> ModelConfig:
    """The model as a cell runs it: beyond its limit, YaRN stretches the rotary embedding from there."""
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


@functools.lru_cache
def attention(rule: Rule, num_blocks: int, weighed: bool) -> LayerAttend:
    """What computes a cell's attention: one object for one program, so that rows share what is compiled."""
    if weighed:
        return attend_and_weigh(WEIGHED, WEIGHED_BUDGETS, WEIGHED_POSITIONS, jax.random.key(0))
    return attend_by(rule, num_blocks, jax.random.key(0))


def measure(model: LoadedModel, cell: Cell, excerpt: Excerpt) -> Measured:
    """Runs one row."""
    # The cell says how attention is computed, whatever the weights were trained with.
    config = dataclasses.replace(model_config(model.config, cell), sparse_config=None)
    weighed = cell == Cell("published", "dense", 0, LENGTH, "plain")
    kept = None
    if weighed:
        shape = config.num_layers, len(WEIGHED), len(WEIGHED_BUDGETS), 1, config.num_heads, len(WEIGHED_POSITIONS)
        kept = jnp.zeros(shape)
    losses, shares = token_losses(
        model.params,
        excerpt.tokens[None, : cell.length + 1],
        kept,
        config=config,
        attend=attention(cell.rule, cell.blocks, weighed),
    )
    return Measured(np.asarray(losses[0]), None if shares is None else np.asarray(shares[:, :, :, 0], np.float16))


def train(work: Path, texts: dict[str, LongText]) -> None:
    """Trains the published weights further, sparse and dense, on the same rows of the texts' training parts."""
    published, dataset = work / "smollm2", work / "dataset"
    if not (published / "model.gin").exists():
        verb("convert", published, {"SOURCE": smollm2_path()})
    if not (dataset / "manifest.json").exists():
        for kind, text in texts.items():
            write_text(work / "documents" / f"{kind}.txt", "\n\n".join(text.training)[:TRAIN_CHARACTERS])
        settings = {"TOKENIZER": published / "tokenizer", "SEQ_LEN": TRAIN_LENGTH, "VALIDATION_FRACTION": 0.0}
        verb("prepare", dataset, settings | {"DATA": work / "documents"})
    arch, *rest = MODEL
    sparse = sparse_config("lse", TRAIN_BLOCKS)
    sizes = {"DENSE_LEN": -1, "SparseConfig.topk": sparse.topk, "SparseConfig.window_size": sparse.window_size}
    for name, files, macros in (
        ("trained_sparse", (arch, "arch/infllm_v2.gin", *rest), sizes),
        ("trained_dense", (arch, *rest), {}),
    ):
        if not (work / name / "checkpoints" / str(TRAIN_STEPS)).exists():
            steps = {"TRAIN_STEPS": TRAIN_STEPS, "CHECKPOINT_EVERY": CHECKPOINT_EVERY}
            start = {"INIT_FROM": published, "DATA": dataset}
            verb("pretrain", work / name, TRAINING | steps | start | macros, files)


def measure_part(work: Path, part: Part, published: LoadedModel, rows: Sequence[Excerpt]) -> None:
    """Measures the cells of a part that are not there yet, and keeps them.

    A cell runs on one row of every text before the next cell does, so that whatever is done by then makes a table.
    """
    wanted = [(cell, row) for number in range(ROWS) for cell in cells(part) for row in rows if row.number == number]
    missing = [(cell, row) for cell, row in wanted if not Measured.path(work, cell, row.name).exists()]
    # Weights one after the other: they are not all in memory.
    missing.sort(key=lambda item: item[0].weights)
    model, weights, begin = published, "published", len(wanted) - len(missing)
    with Progress(f"sparse_quality, {part}", len(wanted), initial=begin) as bar:
        for done, (cell, row) in enumerate(missing, start=begin + 1):
            if cell.weights != weights:
                model, weights = load_model(find_checkpoint(work / cell.weights)), cell.weights
            measured = measure(model, cell, row)
            measured.save(work, cell, row.name)
            bar.update(done, loss=float(measured.losses.mean()))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what is not measured yet and writes `results/sparse_quality.json` and its drawings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of texts, cells and trainings")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, choices=range(1, ROWS + 1), default=2, help="of each text")
    parser.add_argument(
        "--long_rows", type=int, choices=range(1, ROWS + 1), default=1, help="of those of 16,384 tokens"
    )
    parser.add_argument("--directory", type=Path, default=RESULTS_DIR, help="where the results go")
    args = parser.parse_args(argv)

    texts = long_texts(args.work / "texts")
    published = load_model(smollm2_path())
    rows = [row for kind, text in texts.items() for row in excerpts(kind, published.tokenizer.encode(text.evaluation))]
    for part in (part for part in PARTS if part in args.parts):
        if part == "training":
            train(args.work, texts)
        count = args.long_rows if part == "long" else args.rows
        measure_part(args.work, part, published, [row for row in rows if row.number < count])

    def num_bytes(row: Excerpt, begin: int, end: int) -> int:
        return len(published.tokenizer.decode(row.tokens[begin + 1 : end + 1].tolist()).encode("utf-8"))

    plan = Plan(LENGTH, LONG, WEIGHED_BUDGETS, BUDGETS[0], WEIGHED, TRAIN_LENGTH, TRAIN_BLOCKS)
    report(args.work, {row.name: functools.partial(num_bytes, row) for row in rows}, plan, args.directory)


if __name__ == "__main__":
    main()
