"""Does trained sparse attention still find things? Small models learn associative recall, dense and then sparse.

A decoder learns to answer from a haystack (`recall_data.py`) with full attention, on rows that grow; from that
checkpoint each variant of sparse attention goes on for the same steps on the same rows, at an equal budget of blocks.
All sizes are those of MiniCPM4's `sparse_config` divided by 8: blocks of 8 tokens, 12 of them a query.

Every part that is done stays in `--work`, and a part that was cut off goes on from its last checkpoint: call again
until it is through. `--recipe` is one seed and the main variants. `--dataset` writes rows for the `pretrain` verb
(papers/minicpm4/recall.gin), and `--checkpoint` tells the accuracy of what it trained.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.recall_data import RecallTask, Split, Vocabulary, long_task, make_batch, write_dataset
from benchmarks.results import RESULTS_DIR, Benchmark
from cpm_jax.checkpoints.manager import CheckpointConfig, Checkpointer, restore_params
from cpm_jax.common.config import config_from_dict, config_to_dict
from cpm_jax.common.figures import bar_figure
from cpm_jax.common.files import write_json
from cpm_jax.common.progress import Progress
from cpm_jax.modeling import decoder
from cpm_jax.modeling.config import ModelConfig, RopeConfig, SparseConfig
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import cosine
from cpm_jax.training.train_state import abstract_state, init_state, state_from_params
from cpm_jax.training.train_step import make_train_step

VOCABULARY = Vocabulary()
BLOCK_SIZE = 8
NUM_BLOCKS = 12  # |I|, of every variant
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
    """One training, from scratch or from the parameters of another cell.

    Attributes:
        name: of its folder in `--work`.
        task: its rows.
        start: folder of the cell it goes on from; "" begins with random parameters.
        seed: of the initial parameters and the rows.
        sparse_config: its attention.
        steps: steps at most.
        tokens: of a batch.
        peak_lr: learning rate.
        stop_at: accuracy on validation rows at which it ends; None takes all steps.
    """

    name: str
    task: RecallTask
    start: str
    seed: int
    sparse_config: SparseConfig | None
    steps: int
    tokens: int = 4096
    peak_lr: float = 2e-3
    stop_at: float | None = None

    @property
    def model(self) -> ModelConfig:
        """The decoder."""
        return dataclasses.replace(MODEL, sparse_config=self.sparse_config)


def curriculum(seed: int, lengths: Sequence[int]) -> list[Cell]:
    """The dense model on rows that grow; the last cells have the rows of the study."""
    copying = {"repeat": True, "copy_weight": 0.1}
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
        cells.append(Cell(f"seed{seed}/dense{name}", task, start, seed, None, steps, tokens, 2e-3, stop_at))
    return cells


def batch_tokens(length: int) -> int:
    """Tokens of a batch of such rows: four rows at least."""
    return max(4096, 4 * length)


def training_task(length: int) -> RecallTask:
    """Rows of 1 to 32 pairs, which hold all of `TASKS`."""
    return RecallTask(length, (1, 32), 16, gap=GAP)


def study(seeds: int, lengths: Sequence[int], ablated: Sequence[int], steps: int) -> list[Cell]:
    """All cells in their order.

    Args:
        seeds: number of seeds.
        lengths: tokens of the rows that the dense model grows to and the main variants are trained on.
        ablated: those of them that all variants are trained on.
        steps: of a variant.
    """
    cells: list[Cell] = []
    for seed in range(seeds):
        cells += curriculum(seed, lengths)
        for length in lengths:
            for variant, config in VARIANTS.items():
                if variant in MAIN or length in ablated:
                    name, start = f"seed{seed}/{length}/{variant}", f"seed{seed}/dense{length}"
                    task, tokens = training_task(length), batch_tokens(length)
                    cells.append(Cell(name, task, start, seed, config, steps, tokens, peak_lr=2e-3))
    return cells


@functools.lru_cache(maxsize=4)
def _answers(model: ModelConfig) -> Callable[[Any, dict[str, Any]], tuple[jax.Array, jax.Array]]:
    def count(params: Any, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        bound = decoder.bind(model, params)
        hidden = bound(batch["tokens"], batch["positions"], batch["segment_ids"])
        right = jnp.argmax(bound.logits(hidden), axis=-1) == batch["targets"]
        return jnp.sum(right * batch["loss_weights"]), jnp.sum(batch["loss_weights"])

    return jax.jit(count)


def accuracy(model: ModelConfig, params: Any, task: RecallTask, split: Split, rows: int, tokens: int) -> float:
    """The share of answers that are the most probable token, over `rows` rows in batches of about `tokens` tokens."""
    task = dataclasses.replace(task, copy_weight=0.0)
    batch_size = min(max(tokens // task.seq_len, 1), rows)
    counts = [
        _answers(model)(params, make_batch(task, batch_size, split, 0, index))
        for index in range(-(-rows // batch_size))
    ]
    right, total = (float(sum(side)) for side in zip(*counts, strict=True))
    return right / total


def train(cell: Cell, work: Path, checkpoint_every: int = 100) -> dict[str, Any]:
    """Trains a cell, or goes on with it, or reads what it came to.

    Returns:
        "steps" taken, "seconds" of this call's training, and "validation" accuracy on rows like those it trained on.
    """
    folder, model = work / cell.name, cell.model
    done = folder / "training.json"
    if done.exists():
        return json.loads(done.read_text("utf-8"))
    schedule = cosine(cell.peak_lr, cell.steps, min(50, cell.steps // 4))
    if cell.stop_at is not None:  # it is not known when it ends: a constant learning rate
        schedule = cosine(cell.peak_lr, cell.steps, min(50, cell.steps // 4), final_lr_ratio=1.0)
    optimizer = make_optimizer(OptimizerConfig(b2=0.98, weight_decay=0.0), schedule, model)
    step_fn = make_train_step(model, optimizer)
    rows, begin = max(cell.tokens // cell.task.seq_len, 1), time.monotonic()
    step, reached = 0, -1.0
    # Synchronous: a small state, and a killed cell loses no more than what came after the last save.
    with Checkpointer(folder / "checkpoints", CheckpointConfig(keep_last=1, asynchronous=False)) as checkpointer:
        restored = checkpointer.restore_latest(abstract_state(model, optimizer))
        if restored is not None:
            state, step, reached = restored.state, restored.step, restored.meta["accuracy"]
        elif cell.start:
            params, _ = restore_params(work / cell.start / "checkpoints")
            state = state_from_params(params, optimizer)
        else:
            state = init_state(model, optimizer, jax.random.key(cell.seed))
        with Progress(cell.name, cell.steps, initial=step, tokens_per_step=rows * cell.task.seq_len) as progress:
            while step < cell.steps and (cell.stop_at is None or reached < cell.stop_at):
                state, metrics = step_fn(state, make_batch(cell.task, rows, "train", cell.seed, step))
                step += 1
                if step == cell.steps or step % checkpoint_every == 0:
                    reached = accuracy(model, state.params, cell.task, "validation", 64, cell.tokens)
                    meta = {"step": step, "accuracy": reached, "model": config_to_dict(model)}
                    checkpointer.save(step, state, meta)
                    progress.update(step, loss=float(metrics["loss"]), accuracy=reached)
    result = {"steps": step, "seconds": time.monotonic() - begin, "validation": reached}
    write_json(done, result)
    return result


def evaluate(cell: Cell, work: Path, rows: int) -> dict[str, float]:
    """The accuracy of a trained cell on test rows by task, or what an earlier call found."""
    path = work / cell.name / f"accuracy_{rows}.json"
    if not path.exists():
        params, _ = restore_params(work / cell.name / "checkpoints")
        found = {
            name: accuracy(cell.model, params, task(cell.task.seq_len), "test", rows, 4 * cell.tokens)
            for name, task in TASKS.items()
        }
        write_json(path, found)
    return json.loads(path.read_text("utf-8"))


Accuracies = dict[tuple[int, str, str], list[float]]  # of each seed, by length, task and variant


def gather(cells: Sequence[Cell], work: Path, rows: int) -> Accuracies:
    """Runs all cells in their order, each at most once, and returns the accuracies of the variants in percent."""
    accuracies: Accuracies = {}
    for number, cell in enumerate(cells, 1):
        print(f"{number}/{len(cells)}: {cell.name}", flush=True)
        result = train(cell, work)
        if cell.stop_at is not None:
            print(f"  {result['steps']} steps, accuracy {result['validation']:.3f} on rows like those", flush=True)
            continue
        found = evaluate(cell, work, rows)
        print("  " + ", ".join(f"{task} {value:.4f}" for task, value in found.items()), flush=True)
        for task, value in found.items():
            key = (cell.task.seq_len, task, cell.name.rpartition("/")[2])
            accuracies.setdefault(key, []).append(100 * value)
    return accuracies


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(accuracies: Accuracies) -> str:
    """The table of the page: mean ± standard deviation over seeds, by variant, length and task."""
    columns = sorted({(length, task) for length, task, _ in accuracies}, key=lambda c: (c[0], list(TASKS).index(c[1])))
    lines = ["| | " + " | ".join(f"{length}, {task}" for length, task in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for variant in VARIANTS:
        cells = [accuracies.get((length, task, variant)) for length, task in columns]
        shown = ["" if x is None else f"{statistics.mean(x):.1f} ± {spread(x):.1f}" for x in cells]
        if any(shown):
            lines.append(f"| {variant} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def report(accuracies: Accuracies, directory: Path) -> None:
    """Writes `sparse_recall.json` and, for each length, a figure of the accuracies."""
    bench = Benchmark("sparse_recall")
    for (length, task, variant), values in accuracies.items():
        name = f"{length} tokens, {task}, {variant}: right answers, mean of {len(values)} seeds"
        mean, full = statistics.mean(values), statistics.mean(accuracies[length, task, FULL])
        goal = {"baseline_name": "at least", "baseline": 95.0, "goal": 1.0} if variant == FULL else {}
        against = {"baseline_name": FULL, "baseline": full} if variant != FULL else {}
        bench.add(name, "%", mean, larger_is_better=True, **goal, **against)  # type: ignore[arg-type]
        bench.add(f"{name}: their standard deviation", "points", spread(values), larger_is_better=False)
        if variant == INFLLM:
            bench.add(
                f"{length} tokens, {task}: {INFLLM} below {FULL}",
                "points",
                max(full - mean, 0.0),
                larger_is_better=False,
                baseline_name="at most",
                baseline=2.0,
                goal=1.0,
            )
    bench.write(directory)
    for length in sorted({length for length, _, _ in accuracies}):
        values = {
            name: accuracies[length, "recall", name] for name in VARIANTS if (length, "recall", name) in accuracies
        }
        figure = bar_figure(
            {name: statistics.mean(x) for name, x in values.items()},
            ylabel=f"right answers, 16 pairs in {length} tokens, %",
            strong=[FULL, INFLLM],
            errors={name: spread(x) for name, x in values.items()},
            format_value=lambda value: f"{value:.1f}",
        )
        (directory / f"sparse_recall_{length}.svg").write_text(figure.svg, "utf-8")


def evaluate_checkpoint(folder: Path, lengths: Sequence[int], rows: int) -> dict[int, float]:
    """The accuracy of a checkpoint of the `pretrain` verb by length, on rows like those of `write_dataset`."""
    params, meta = restore_params(folder)
    model = config_from_dict(ModelConfig, meta["model"])
    found = {}
    for length in lengths:
        task = dataclasses.replace(long_task(length), num_pairs=long_task(length).pairs[1])
        found[length] = accuracy(model, params, task, "test", rows, length)
        print(
            f"{length} tokens, {task.pairs[1]} pairs: {100 * found[length]:.1f}% of the answers are right", flush=True
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Does what is not done yet and writes `results/sparse_recall.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the cells; a cell that is there is not trained again")
    parser.add_argument("--recipe", action="store_true", help="one seed, 512 tokens, the main variants")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024], help="tokens of the rows")
    parser.add_argument("--ablated", nargs="*", type=int, default=[512], help="lengths of all variants")
    parser.add_argument("--steps", type=int, default=300, help="of a variant, from the dense checkpoint")
    parser.add_argument("--test_rows", type=int, default=256, help="rows of each test")
    parser.add_argument("--directory", type=Path, default=RESULTS_DIR, help="where the results go")
    parser.add_argument("--dataset", type=Path, help="write rows for `pretrain` into this folder, and nothing else")
    parser.add_argument("--rows", type=int, default=20_000, help="training rows of --dataset")
    parser.add_argument("--checkpoint", type=Path, help="test what `pretrain` trained on them, and nothing else")
    parser.add_argument("--copies", type=float, default=0.0, help="share of them that teaches to copy")
    args = parser.parse_args(argv)
    if args.dataset:
        for length in args.lengths:
            write_dataset(args.dataset / str(length), long_task(length), args.rows, args.copies)
        return
    if args.checkpoint:
        evaluate_checkpoint(args.checkpoint, args.lengths, args.test_rows)
        return
    if not args.work:
        parser.error("--work is required")
    jax.config.update("jax_compilation_cache_dir", str(args.work / "compiled"))
    if args.recipe:
        args.seeds, args.lengths, args.ablated = 1, [512], []
    accuracies = gather(study(args.seeds, args.lengths, args.ablated, args.steps), args.work, args.test_rows)
    print(markdown(accuracies))
    if not args.recipe:
        report(accuracies, args.directory)


if __name__ == "__main__":
    main()
