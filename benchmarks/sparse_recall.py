"""Does trained sparse attention still find things? Small models learn associative recall, dense and then sparse.

    python -m benchmarks.sparse_recall --work DIR           # trains and tests
    python -m benchmarks.sparse_recall_report --work DIR    # writes the results

A decoder learns to answer from a haystack (`recall_data.py`) with full attention, on rows that grow; from that
checkpoint each variant of sparse attention goes on for the same steps on the same rows, at an equal budget of blocks.
All sizes are those of MiniCPM4's `sparse_config` divided by 8: blocks of 8 tokens, 12 of them a query.

The seeds are one program, mapped over: models so small leave a device idle otherwise. All scores are held at once,
which is fastest for such rows. Every part that is done stays in `--work`, and a part that `--seconds` cut off goes on
where it was: call again until it is through. `--recipe` is one seed and the main variants.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compile_ahead import CompileAhead
from benchmarks.custom_attention import attention_by_config, hidden_states, make_step
from benchmarks.recall_data import RecallTask, Split, Vocabulary, batch_key, make_batch
from benchmarks.results import origin
from cpm_jax.checkpoints.manager import CheckpointConfig, Checkpointer, restore_params
from cpm_jax.common.files import write_json
from cpm_jax.common.progress import Progress
from cpm_jax.modeling.config import ModelConfig, RopeConfig, SparseConfig
from cpm_jax.modeling.decoder import bind, init_params
from cpm_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import cosine
from cpm_jax.training.train_state import TrainState, state_from_params

VOCABULARY = Vocabulary()
BLOCK_SIZE = 8
NUM_BLOCKS = 12  # |I|, of every variant
CHUNK = 100  # steps of a call of the compiled program
VALIDATION_ROWS = 64
SAVE_EVERY = 120.0  # seconds, within a cell
MODEL = ModelConfig(
    vocab_size=VOCABULARY.size,
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    d_ff=128,
    max_position_embeddings=4096,
    rope=RopeConfig(rope_theta=100_000.0),
    tie_word_embeddings=True,
    initializer_range=0.125,  # 1 / sqrt(d_model)
    dtype="float32",
    scan_layers=False,
)
# More tokens than windows of 12 blocks reach through the layers: the gap that no sliding window looks across.
GAP = MODEL.num_layers * NUM_BLOCKS * BLOCK_SIZE


def sparse(**changes: Any) -> SparseConfig:
    """The published sizes divided by 8, and what a variant changes; always sparse.

    Raises:
        ValueError: the variant sees more or fewer blocks than the others.
    """
    sizes = {"kernel_size": 4, "kernel_stride": 2, "init_blocks": 1, "block_size": BLOCK_SIZE, "window_size": 32}
    config = SparseConfig(**{**sizes, "topk": 8, "dense_len": -1, **changes})
    if config.selection.num_selected != NUM_BLOCKS:
        raise ValueError(f"{changes}: {config.selection.num_selected} blocks, must be {NUM_BLOCKS}")
    return config


FULL, INFLLM, WINDOW = "full attention", "InfLLM v2", "sliding window and first block"
# What the backbone of the study compares comes first; the others change one thing.
VARIANTS: dict[str, SparseConfig | None] = {
    FULL: None,
    INFLLM: sparse(),
    WINDOW: sparse(topk=1, window_size=88),
    "block means (MoBA-like)": sparse(kernel_size=8, kernel_stride=8, lse_approximation=False),
    "exact normaliser": sparse(lse_approximation=False),
    "kernels of 2, stride 1": sparse(kernel_size=2, kernel_stride=1),
    "kernels of 8, stride 4": sparse(kernel_size=8, kernel_stride=4),
    "top-k 4, window of 8 blocks": sparse(topk=4, window_size=64),
    "top-k 11, window of 1 block": sparse(topk=11, window_size=8),
}
MAIN = (FULL, INFLLM, WINDOW)
TASKS: dict[str, Callable[[int], RecallTask]] = {
    "recall": lambda length: RecallTask(length, 16, 16, gap=GAP),
    "needle": lambda length: RecallTask(length, 1, 1, gap=GAP),
    "multi-key": lambda length: RecallTask(length, 32, 16, gap=GAP),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training of all seeds, from scratch or from the parameters of another cell.

    Attributes:
        name: of its folder in `--work`.
        task: its rows.
        start: folder of the cell it goes on from; "" begins with random parameters.
        sparse_config: its attention.
        steps: steps at most.
        tokens: of a batch.
        first_batch: index of its first batch among those of a seed: what goes on learns from rows of its own.
        peak_lr: learning rate.
        stop_at: accuracy on validation rows at which it ends, when every seed has it; None takes all steps.
    """

    name: str
    task: RecallTask
    start: str
    sparse_config: SparseConfig | None
    steps: int
    tokens: int = 4096
    first_batch: int = 0
    peak_lr: float = 2e-3
    stop_at: float | None = None

    @property
    def model(self) -> ModelConfig:
        """The decoder."""
        return MODEL

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return max(self.tokens // self.task.seq_len, 1)

    @property
    def chunk(self) -> int:
        """Steps of a call of the compiled program."""
        return min(CHUNK, self.steps)

    @property
    def optimizer(self) -> Optimizer:
        """Adam; where it is not known when training ends, at a constant learning rate."""
        final = 0.1 if self.stop_at is None else 1.0
        schedule = cosine(self.peak_lr, self.steps, min(50, self.steps // 4), final_lr_ratio=final)
        return make_optimizer(OptimizerConfig(b2=0.98, weight_decay=0.0), schedule, self.model)


def curriculum(lengths: Sequence[int]) -> list[Cell]:
    """The dense model on rows that grow; the last cells have the rows of the study."""
    copying: dict[str, Any] = {"repeat": True, "copy_weight": 0.1}
    stages = [
        ("16", RecallTask(16, 2, 5, head=1, **copying), 4000, 1024, 0.95),
        ("32", RecallTask(32, (2, 4), 10, head=2, **copying), 1000, 1024, 0.95),
        ("64", RecallTask(64, (3, 8), 20, head=2, **copying), 1000, 2048, 0.95),
        ("128", RecallTask(128, (4, 16), 32, **copying), 1000, 2048, 0.95),
    ]
    stages += [(str(length), training_task(length), 1000, batch_tokens(length), 0.985) for length in lengths]
    cells: list[Cell] = []
    for name, task, steps, tokens, stop_at in stages:
        start = cells[-1].name if cells else ""
        cells.append(Cell(f"dense{name}", task, start, None, steps, tokens, stop_at=stop_at))
    return cells


def batch_tokens(length: int) -> int:
    """Tokens of a batch of such rows: four rows at least."""
    return max(4096, 4 * length)


def training_task(length: int) -> RecallTask:
    """Rows of 1 to 32 pairs, which hold all of `TASKS`."""
    return RecallTask(length, (1, 32), 16, gap=GAP)


def study(lengths: Sequence[int], ablated: Sequence[int], steps: int) -> list[Cell]:
    """All cells in their order: a dense model before what starts from it, shorter rows before longer ones.

    Args:
        lengths: tokens of the rows that the dense model grows to and the main variants are trained on, ascending.
        ablated: those of them that all variants are trained on.
        steps: of a variant.
    """
    dense = curriculum(lengths)
    cells = dense[: -len(lengths)]
    for length, grown in zip(lengths, dense[-len(lengths) :], strict=True):
        cells.append(grown)
        for variant, config in VARIANTS.items():
            if variant in MAIN or length in ablated:
                name, task, tokens = f"{length}/{variant}", training_task(length), batch_tokens(length)
                cells.append(Cell(name, task, grown.name, config, steps, tokens, first_batch=grown.steps))
    return cells


class OutOfTimeError(Exception):
    """The time that was given is over; what was done is kept."""


def _initial(cell: Cell, seeds: jax.Array) -> TrainState:
    params = jax.vmap(lambda seed: init_params(cell.model, jax.random.key(seed)))(seeds)
    return _begin(cell, params)


def _begin(cell: Cell, params: Any) -> TrainState:
    return jax.vmap(lambda params: state_from_params(params, cell.optimizer))(params)


def _steps(cell: Cell, states: TrainState, seeds: jax.Array) -> tuple[TrainState, jax.Array]:
    """States after `cell.chunk` steps, and their last losses."""
    step = make_step(cell.model, cell.optimizer, attention_by_config(cell.sparse_config, "reference"), "reference")

    def one(state: TrainState, seed: jax.Array) -> tuple[TrainState, jax.Array]:
        key = batch_key("train", seed, cell.first_batch + state.step)
        return step(state, make_batch(cell.task, cell.rows, key))

    states, losses = jax.lax.scan(lambda states, _: jax.vmap(one)(states, seeds), states, length=cell.chunk)
    return states, losses[-1]


def _right(cell: Cell, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """How many answers of a batch are the most probable token, of each seed, and how many answers there are."""

    def one(params: Any) -> jax.Array:
        model = bind(cell.model, params)
        hidden, _ = hidden_states(model, batch["tokens"], attention_by_config(cell.sparse_config, "reference"))
        right = jnp.argmax(model.logits(hidden), axis=-1) == batch["targets"]
        return jnp.sum(right * batch["loss_weights"])

    return jax.vmap(one)(params), jnp.sum(batch["loss_weights"])


class Programs(CompileAhead):
    """What cells run."""

    def __init__(self, seeds: int):
        """Holds no program yet.

        Args:
            seeds: number of seeds, the leading dimension of all states.
        """
        super().__init__()
        self.seeds = jnp.arange(seeds)

    def prepare(self, cell: Cell) -> None:
        """Begins to compile what `train` and `evaluate` of a cell call."""
        self.steps(cell)
        self.right(cell)
        for task in (cell.task, *(task(cell.task.seq_len) for task in TASKS.values() if cell.stop_at is None)):
            self.batch(task, cell.rows)

    def states(self, cell: Cell) -> TrainState:
        """Shapes of a cell's states."""
        return jax.eval_shape(functools.partial(_initial, cell), self.seeds)

    def steps(self, cell: Cell) -> Future[Any]:
        """`_steps` of a cell; the states that are passed in are gone after the call."""
        function = functools.partial(_steps, cell)
        return self.get(("steps", cell), function, lambda: (self.states(cell), self.seeds), donate=(0,))

    def right(self, cell: Cell) -> Future[Any]:
        """`_right` of a cell, which depends on the sizes of its rows and its attention."""
        draw = functools.partial(make_batch, cell.task, cell.rows)

        def shapes() -> tuple[Any, Any]:
            return self.states(cell).params, jax.eval_shape(draw, batch_key("test", 0, 0))

        key = "right", cell.task.seq_len, cell.rows, cell.sparse_config
        return self.get(key, functools.partial(_right, cell), shapes)

    def batch(self, task: RecallTask, rows: int) -> Future[Any]:
        """Rows whose answers are counted, from a key."""
        task = dataclasses.replace(task, copy_weight=0.0)
        draw = functools.partial(make_batch, task, rows)
        return self.get(("batch", task, rows), draw, lambda: (batch_key("test", 0, 0),))


def accuracy(cell: Cell, params: Any, task: RecallTask, split: Split, rows: int, programs: Programs) -> list[float]:
    """The share of answers that are the most probable token, of each seed, over at least `rows` rows."""
    draw, right = programs.batch(task, cell.rows).result(), programs.right(cell).result()
    keys = [batch_key(split, 0, index) for index in range(-(-rows // cell.rows))]
    counts = [right(params, draw(key)) for key in keys]
    found, total = (np.sum([np.asarray(count) for count in side], axis=0) for side in zip(*counts, strict=True))
    return (found / total).tolist()


def train(cell: Cell, work: Path, programs: Programs, deadline: float = math.inf) -> dict[str, Any]:
    """Trains a cell, or goes on with it, or reads what it came to.

    Args:
        cell: what to train.
        work: where cells are kept.
        programs: compiled ones.
        deadline: by `time.monotonic()`, when to end.

    Returns:
        "steps" taken, "seconds" of this call's training, "curve" of [step, accuracy of each seed on rows like those it
        trained on], and its `origin`.

    Raises:
        OutOfTimeError: the deadline has passed; the state so far is kept.
    """
    folder = work / cell.name
    if (folder / "training.json").exists():
        return json.loads((folder / "training.json").read_text("utf-8"))
    begin = saved = time.monotonic()
    step, curve = 0, []
    # Synchronous: a small state.
    with Checkpointer(folder / "checkpoints", CheckpointConfig(keep_last=1, asynchronous=False)) as checkpointer:
        restored = checkpointer.restore_latest(programs.states(cell))
        kept = None if restored is None else restored.step
        if restored is not None:
            states, step, curve = restored.state, restored.step, restored.meta["curve"]
        elif cell.start:
            states = jax.jit(functools.partial(_begin, cell))(restore_params(work / cell.start / "checkpoints")[0])
        else:
            states = jax.jit(functools.partial(_initial, cell))(programs.seeds)
        run = programs.steps(cell).result()

        def save() -> None:
            nonlocal kept, saved
            if step != kept:  # a step is kept once, also where its time came at the end, or was before a kill
                checkpointer.save(step, states, {"step": step, "curve": curve})
            kept, saved = step, time.monotonic()

        with Progress(cell.name, cell.steps, initial=step, tokens_per_step=cell.rows * cell.task.seq_len) as progress:
            while step < cell.steps and (cell.stop_at is None or not curve or min(curve[-1][1]) < cell.stop_at):
                if time.monotonic() > deadline:
                    save()
                    raise OutOfTimeError
                states, losses = run(states, programs.seeds)
                step += cell.chunk
                reached = accuracy(cell, states.params, cell.task, "validation", VALIDATION_ROWS, programs)
                curve.append([step, reached])
                progress.update(step, loss=float(losses.mean()), accuracy=min(reached))
                if time.monotonic() > saved + SAVE_EVERY:
                    save()
        save()
    seconds = time.monotonic() - begin
    result = {"steps": step, "seconds": seconds, "curve": curve, **origin()}
    write_json(folder / "training.json", result)
    return result


def evaluate(cell: Cell, work: Path, rows: int, programs: Programs) -> dict[str, list[float]]:
    """The accuracy of each seed of a trained cell on test rows by task, or what an earlier call found."""
    path = work / cell.name / "accuracy.json"
    if not path.exists():
        params, _ = restore_params(work / cell.name / "checkpoints")
        tasks = {name: task(cell.task.seq_len) for name, task in TASKS.items()}
        found = {name: accuracy(cell, params, task, "test", rows, programs) for name, task in tasks.items()}
        write_json(path, found)
    return json.loads(path.read_text("utf-8"))


def run_study(cells: Sequence[Cell], work: Path, rows: int, programs: Programs, deadline: float) -> None:
    """Runs all cells in their order, each at most once."""
    for number, cell in enumerate(cells, 1):
        for later in cells[number - 1 : number + programs.threads]:
            if not (work / later.name / "accuracy.json").exists():
                programs.prepare(later)
        print(f"{number}/{len(cells)}: {cell.name}", flush=True)
        result = train(cell, work, programs, deadline)
        shown = ", ".join(f"{share:.4f}" for share in result["curve"][-1][1])
        print(f"  {result['steps']} steps, {result['seconds']:.0f} s, accuracy on rows like those {shown}", flush=True)
        if cell.stop_at is None:
            for task, shares in evaluate(cell, work, rows, programs).items():
                print(f"  {task}: {', '.join(f'{share:.4f}' for share in shares)}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Does what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the cells; a cell that is there stays")
    parser.add_argument("--recipe", action="store_true", help="one seed, 512 tokens, the main variants")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024], help="tokens of the rows")
    parser.add_argument("--ablated", nargs="*", type=int, default=[512], help="lengths of all variants")
    parser.add_argument("--steps", type=int, default=1000, help="of a variant, from the dense checkpoint")
    parser.add_argument("--test_rows", type=int, default=256, help="rows of each test")
    parser.add_argument("--seconds", type=float, default=math.inf, help="when to end, with what is done by then")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    if args.recipe:
        args.seeds, args.lengths, args.ablated = 1, [512], []
    jax.config.update("jax_compilation_cache_dir", str(args.work / "compiled"))
    with Programs(args.seeds) as programs:
        try:
            run_study(study(args.lengths, args.ablated, args.steps), args.work, args.test_rows, programs, deadline)
        except OutOfTimeError:
            print(f"{args.seconds:.0f} seconds are over: the same command goes on from here", flush=True)


if __name__ == "__main__":
    main()
