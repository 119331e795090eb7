"""Many trainings as one program: throughput against one after another, from tiny models to 5M parameters.

`python -m benchmarks.stacked_trials [--cells DIR]`: the trials differ in learning rate. Each size is measured in a
process of its own with two host devices, in turns of all ways, so that other load meets all: a ratio is the median of
those of each turn, and again of `--repeats` processes. What is measured stays in `--cells`, and a second call goes on.
`--tpu` adds what the compiler for TPUs says of the same programs (needs libtpu, `make aot`).
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.results import Benchmark
from cpm_jax.common.files import write_json
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.model_size import count_params
from cpm_jax.scaling.stacked_program import Method, StackedProgram, Trial
from cpm_jax.training.losses import Batch, LossConfig
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import wsd
from cpm_jax.training.train_state import init_state
from cpm_jax.training.train_step import make_train_step

_ENVIRONMENT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
_TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_TOPOLOGY = "v6e:2x2"
STEPS = 1000  # of a whole training, over which compiling is spread


@dataclasses.dataclass(frozen=True)
class Case:
    """A size of model, and how many trainings of it.

    Attributes:
        d_model: width; heads of 16, of 64 from a width of 256 on; d_ff 4 · d_model.
        num_layers: depth.
        vocab_size: number of token ids.
        trials: N.
        rows: of a batch.
        seq_len: tokens of a row.
        goal: least ratio to one after another that is asked for; None where none is.
    """

    d_model: int
    num_layers: int
    vocab_size: int
    trials: int
    rows: int
    seq_len: int
    goal: float | None = None

    @property
    def model(self) -> ModelConfig:
        """The model, µP's multipliers with it."""
        num_heads = self.d_model // (64 if self.d_model >= 256 else 16)
        return ModelConfig(
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=num_heads,
            num_kv_heads=min(2, num_heads),
            d_ff=4 * self.d_model,
            tie_word_embeddings=True,
            scale_emb=12.0,
            scale_depth=1.4,
            dim_model_base=256,
            initializer_range=0.1,
            dtype="float32",
        )


CASES = {
    "d16": Case(16, 2, 256, 16, 4, 64, goal=2.0),
    "d32": Case(32, 2, 256, 16, 4, 64, goal=2.0),
    "d64": Case(64, 2, 256, 16, 4, 64),
    "d96": Case(96, 2, 1024, 8, 4, 128),
    "d128": Case(128, 3, 2048, 8, 8, 128),
    "5m": Case(256, 5, 8192, 4, 4, 128, goal=1.0),  # size/5m.gin
}
WAYS: dict[str, tuple[Method, int]] = {
    "map": ("map", 1),
    "vmap": ("vmap", 1),
    "map on 2 devices": ("map", 2),
    "vmap on 2 devices": ("vmap", 2),
}


def make_trials(case: Case) -> list[Trial]:
    """Trials over learning rates."""
    rates = np.geomspace(0.002, 0.02, case.trials)
    return [Trial(f"{i}", case.model, OptimizerConfig(), wsd(float(r), STEPS, 100, 100)) for i, r in enumerate(rates)]


def make_batch(case: Case) -> Batch:
    """Full rows of random tokens."""
    tokens = np.random.default_rng(0).integers(case.vocab_size, size=(case.rows, case.seq_len + 1), dtype=np.int32)
    shape = tokens[:, 1:].shape
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(case.seq_len, dtype=np.int32), shape),
        "source_ids": np.zeros(case.rows, np.int32),
    }


def one_after_another(trials: Sequence[Trial], batch: Batch) -> tuple[Callable[[], Any], float]:
    """A call that takes a step of each training by its own, and the seconds until all were compiled.

    Their programs differ in a constant only. One is compiled here and serves all: what the processors then do is the
    same, and compiling it again would take as long.
    """
    begin = time.perf_counter()
    optimizer = make_optimizer(trials[0].optimizer, trials[0].schedule, trials[0].model)
    step = make_train_step(trials[0].model, optimizer)
    states = [init_state(trials[0].model, optimizer, jax.random.key(0))]
    states[0], metrics = step(states[0], batch)
    jax.block_until_ready(metrics)
    compiled = (time.perf_counter() - begin) * len(trials)
    states += [init_state(trials[0].model, optimizer, jax.random.key(0)) for _ in trials[1:]]

    def run() -> Any:
        found = []
        for i in range(len(trials)):
            states[i], metrics = step(states[i], batch)
            found.append(metrics["loss"])
        return found

    return run, compiled


def as_one(trials: Sequence[Trial], batch: Batch, method: Method, devices: int) -> tuple[Callable[[], Any], float]:
    """A call that takes a step of all trainings in one program, and the seconds until it was compiled."""
    begin = time.perf_counter()
    program = StackedProgram(trials, steps=STEPS, loss=LossConfig(), method=method, devices=jax.devices()[:devices])
    states = program.init()
    states, metrics = program.step(states, batch)
    jax.block_until_ready(metrics)
    compiled = time.perf_counter() - begin

    def run() -> Any:
        nonlocal states
        states, metrics = program.step(states, batch)
        return metrics["loss"]

    return run, compiled


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Seconds of a step of all trainings one after another, the ratio of each way to that, and seconds of compiling."""
    trials, batch = make_trials(case), make_batch(case)
    ways = {"one after another": one_after_another(trials, batch)}
    ways |= {name: as_one(trials, batch, *way) for name, way in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["one after another"]) < 3:
        for name, (run, _) in ways.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - begin)
    alone = np.array(times["one after another"])
    return {
        "step": float(np.median(alone)),
        "ratio": {name: float(np.median(alone / np.array(times[name]))) for name in WAYS},
        "compile": {name: compiled for name, (_, compiled) in ways.items()},
        "turns": len(alone),
    }


def estimate_tpu(case: Case) -> dict[str, Any]:
    """What one chip would do by the compiled programs: estimated seconds and operations of a step of all trainings."""
    from jax.experimental import topologies

    from cpm_jax.planning.chips import parse_topology
    from cpm_jax.planning.hlo_costs import count_costs
    from cpm_jax.planning.roofline import step_time

    device = topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGY).devices[0]
    case = dataclasses.replace(case, seq_len=max(case.seq_len, 128))
    found: dict[str, Any] = {"step": {}, "operations": {}}
    for name, trials, method in (
        ("one after another", make_trials(case)[:1], "map"),
        ("map", make_trials(case), "map"),
        ("vmap", make_trials(case), "vmap"),
    ):
        model = dataclasses.replace(trials[0].model, dtype="bfloat16")
        trials = [dataclasses.replace(trial, model=model) for trial in trials]
        program = StackedProgram(
            trials, steps=STEPS, loss=LossConfig(), method="vmap" if method == "vmap" else "map", devices=[device]
        )
        costs = count_costs(program.lower(make_batch(case)).compile().as_text() or "")
        times = case.trials if name == "one after another" else 1
        found["step"][name] = times * step_time(costs, parse_topology(_TOPOLOGY)).total
        found["operations"][name] = times * sum(operation.executions for operation in costs.operations)
    return found


def run_cell(name: str, kind: str, path: Path, seconds: float) -> None:
    """Measures one case in a process of its own."""
    environment = os.environ | (_TPU_ENVIRONMENT if kind == "tpu" else _ENVIRONMENT)
    if kind == "tpu":
        from cpm_jax.planning.aot import libtpu_path

        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (libtpu_path(), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "benchmarks.stacked_trials", "--cell", name, "--kind", kind]
    subprocess.run([*command, "--path", str(path), "--seconds", str(seconds)], env=environment, check=True)


def record(found: dict[str, list[dict[str, Any]]], tpu: dict[str, dict[str, Any]], command: str) -> None:
    """Writes the figures down: the median of the repeats, and their range."""
    bench = Benchmark("stacked_trials", command)
    for name, repeats in found.items():
        case = CASES[name]
        tokens = case.trials * case.rows * case.seq_len
        size = f"{count_params(case.model).non_embedding / 1e6:.2g}M parameters, {case.trials} trials"
        alone = float(np.median([cell["step"] for cell in repeats]))
        ratios = {way: [cell["ratio"][way] for cell in repeats] for way in WAYS}
        best = max(WAYS, key=lambda way: np.median(ratios[way]))
        for way, of_way in ratios.items():
            bench.add(
                f"{name} ({size}): {way} ({min(of_way):.2f} to {max(of_way):.2f} times)",
                "tokens/s",
                tokens / alone * float(np.median(of_way)),
                larger_is_better=True,
                baseline_name="one after another",
                baseline=tokens / alone,
                goal=case.goal if way == best else None,
            )
        compiled = {way: float(np.median([c["compile"][way] for c in repeats])) for way in repeats[0]["compile"]}
        bench.add(
            f"{name}: {STEPS} steps of all and compiling, {best}; alone as often as there are trainings",
            "s",
            compiled[best] + STEPS * alone / float(np.median(ratios[best])),
            larger_is_better=False,
            baseline_name="one after another",
            baseline=compiled["one after another"] + STEPS * alone,
        )
    for name, cell in tpu.items():
        for way in ("map", "vmap"):
            bench.add(
                f"{name}, a v6e chip, estimated: {way}",
                "s/step",
                cell["step"][way],
                larger_is_better=False,
                baseline_name="one after another",
                baseline=cell["step"]["one after another"],
            )
            bench.add(
                f"{name}, a v6e chip, counted: {way}",
                "operations/step",
                cell["operations"][way],
                larger_is_better=False,
                baseline_name="one after another",
                baseline=cell["operations"]["one after another"],
            )
    bench.write()


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all sizes and writes `results/stacked_trials.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path("runs/stacked_trials"), help="what is measured already")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each size and repeat, compiling aside")
    parser.add_argument("--repeats", type=int, default=3, help="processes that measure each size")
    parser.add_argument("--sizes", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tpu", action="store_true", help="add the estimates for a TPU")
    parser.add_argument("--no-results", action="store_true", help="print the cells only")
    for name in ("--cell", "--kind", "--path"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cell:
        case = CASES[args.cell]
        write_json(Path(args.path), estimate_tpu(case) if args.kind == "tpu" else measure(case, args.seconds))
        return
    args.cells.mkdir(parents=True, exist_ok=True)

    def cell(name: str, kind: str, file: str) -> dict[str, Any]:
        path = args.cells / file
        if not path.exists():
            run_cell(name, kind, path, args.seconds)
        found = json.loads(path.read_text("utf-8"))
        print(name, kind, json.dumps(found), flush=True)
        return found

    cpu = [{name: cell(name, "cpu", f"{name}_{i}.json") for name in args.sizes} for i in range(args.repeats)]
    tpu = {name: cell(name, "tpu", f"{name}_tpu.json") for name in args.sizes} if args.tpu else {}
    if not args.no_results:
        measured = {name: [repeat[name] for repeat in cpu] for name in args.sizes}
        record(measured, tpu, "python -m benchmarks.stacked_trials" + (" --tpu" if args.tpu else ""))


if __name__ == "__main__":
    main()
