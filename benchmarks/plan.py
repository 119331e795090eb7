"""Plans of 8B models on pods, and one of a run whose speed is published.

`python -m benchmarks.plan [CASE ...]` makes the plans named, or all; each writes `results/plan_<case>.json`. Programs
that were compiled before are taken from `--workdir`. Needs libtpu (`make aot`), no TPU.
"""

import argparse
from pathlib import Path

from benchmarks.results import Benchmark
from cpm_jax.common.gin_utils import Settings
from cpm_jax.modeling.model_size import count_params
from cpm_jax.planning.analytic import train_flops
from cpm_jax.planning.plan_report import describe
from cpm_jax.planning.search import Plan, bill
from experiments import plan

_MINICPM4 = ("arch/minicpm4.gin", "size/minicpm4_8b.gin")
_MINICPM4_128K = ("arch/minicpm4_128k.gin", "size/minicpm4_8b.gin")
_SPARSE = "arch/infllm_v2.gin"
_MIMO = ("arch/mimo.gin", "size/mimo_7b.gin")
# Examples of a price, in dollars: ask for yours.
_V5P, _V6E = ("PRICE=4.2",), ("PRICE=2.7", "TOPOLOGY='v6e:16x16'")
# Llama 3.1 8B, whose shape gin_configs/size/ has no file for.
_LLAMA = (
    *("VOCAB_SIZE=128256", "NUM_LAYERS=32", "D_MODEL=4096", "NUM_HEADS=32", "NUM_KV_HEADS=8", "D_FF=14336"),
    *("MAX_POSITION_EMBEDDINGS=131072", "SEQ_LEN=8192", "BATCH_SIZES=(512, 1024)", "REMATS=('full', 'dots')"),
)
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "minicpm4_8b_4k_v5p": ((*_MINICPM4, "papers/minicpm4/plan_4k.gin"), _V5P),
    "minicpm4_8b_4k_v6e": ((*_MINICPM4, "papers/minicpm4/plan_4k.gin"), _V6E),
    **{
        f"minicpm4_8b_{length}{kind}_{chip}": ((*arch, *sparse, f"papers/minicpm4/plan_{length}.gin"), flags)
        for length, arch in (("32k", _MINICPM4), ("128k", _MINICPM4_128K))
        for kind, sparse in (("", ()), ("_sparse", (_SPARSE,)))
        for chip, flags in (("v5p", _V5P), ("v6e", _V6E))
    },
    "mimo_7b_8k_v5p": ((*_MIMO, "papers/mimo/plan_8k.gin"), _V5P),
    "mimo_7b_8k_v6e": ((*_MIMO, "papers/mimo/plan_8k.gin"), _V6E),
    "mimo_7b_32k_v5p": ((*_MIMO, "papers/mimo/plan_32k.gin"), _V5P),
    "mimo_7b_32k_v6e": ((*_MIMO, "papers/mimo/plan_32k.gin"), _V6E),
    "minicpm4_8b_decode_v6e": ((*_MINICPM4, "papers/minicpm4/plan_decode.gin"), ("PRICE=2.7",)),
    "llama3_8b_8k_v6e": (("arch/llama.gin", "runs/plan.gin"), (*_V6E, *_LLAMA)),
}
# Tokens per second and chip that MaxText reaches: AI-Hypercomputer/tpu-recipes, training/trillium/Llama3.1-8B-MaxText/
# v6e-256/README.md (4 rows of 8,192 tokens per chip, fsdp 256, activations offloaded to the host).
_PUBLISHED = {"llama3_8b_8k_v6e": 7207.0}
_GIB = 2**30


def read_config(case: str, num_compiles: int, compile_timeout: float = 600.0) -> plan.PlanConfig:
    """The plan that a case asks for."""
    files, flags = CASES[case]
    flags = (*flags, f"NUM_COMPILES={num_compiles}", f"COMPILE_TIMEOUT={compile_timeout}")
    arguments = [f"--gin.{flag}" for flag in flags]
    return Settings(list(files), arguments, plan.PlanConfig).build()


def record(case: str, config: plan.PlanConfig, found: Plan) -> None:
    """Writes the figures of a plan down."""
    print(describe(found, config.token_budget, config.price_per_chip_hour))
    best = found.best
    benchmark = Benchmark(f"plan_{case}", f"python -m benchmarks.plan {case}")
    slowest = max(found.evaluations, key=lambda e: e.compile_seconds)
    benchmark.add(
        *("slowest candidate to compile", "s", slowest.compile_seconds),
        larger_is_better=False,
        baseline_name="at most",
        baseline=150.0,
        goal=1.0,
    )
    benchmark.add("  its CPU time, all threads", "s", slowest.compile_cpu_seconds, larger_is_better=False)
    if best is None or best.time is None or best.costs is None:
        benchmark.add("candidates that fit", "", 0, larger_is_better=True, baseline_name="at least", baseline=1, goal=1)
        benchmark.write()
        return
    chips, chip = found.topology.num_chips, found.topology.chip
    costs, rate = bill(best, chips, config.token_budget, config.price_per_chip_hour), best.tokens_per_second / chips
    benchmark.add(
        *(f"memory per chip: {best.candidate.label}", "GiB", best.memory_total / _GIB),
        larger_is_better=False,
        baseline_name=f"capacity of {chip.name}",
        baseline=chip.hbm_bytes / _GIB,
        goal=1.0,
    )
    for name, size in best.memory.items():
        if size > 2**20:
            benchmark.add(f"  {name}", "GiB", size / _GIB, larger_is_better=False)
    if config.workload.kind == "train":
        parts = best.candidate.mesh.fsdp * best.candidate.mesh.tensor
        benchmark.add(
            *("parameters and optimizer", "GiB", (best.memory["parameters"] + best.memory["optimizer"]) / _GIB),
            larger_is_better=False,
            baseline_name="12 bytes each, by hand",
            baseline=12 * count_params(config.workload.model).total / parts / _GIB,
        )
        formula = train_flops(
            config.workload.model, config.workload.seq_len, best.candidate.batch_size, best.candidate.remat
        )
        benchmark.add(
            *("FLOPs: off 6ND + attention + remat by", "%", 100 * abs(best.costs.flops * chips / formula - 1)),
            larger_is_better=False,
            baseline_name="at most",
            baseline=2.0,
            goal=1.0,
        )
    benchmark.add("estimated step", "s", best.time.total, larger_is_better=False)
    benchmark.add("  of it communication that nothing hides", "s", best.time.exposed, larger_is_better=False)
    benchmark.add(
        *("estimated MFU", "%", 100 * best.mfu),
        larger_is_better=False,
        baseline_name="peak",
        baseline=100.0,
        goal=1.0,
    )
    published = _PUBLISHED.get(case)
    benchmark.add(
        *("estimated tokens/s per chip", "tokens/s", rate),
        larger_is_better=True,
        baseline_name="MaxText, published" if published else "",
        baseline=published,
    )
    benchmark.add("estimated tokens per day", "tokens", costs.tokens_per_day, larger_is_better=True)
    for metric, unit, value in (
        ("days", "d", costs.days),
        ("chip-hours", "h", costs.chip_hours),
        (f"cost at {config.price_per_chip_hour:g} per chip-hour", "$", costs.cost),
    ):
        benchmark.add(f"{config.token_budget:.4g} tokens: {metric}", unit, value, larger_is_better=False)
    benchmark.write()


def main() -> None:
    """Makes the plans that the command names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--workdir", type=Path, default=Path("runs/plan"), help="where compiled programs are kept")
    parser.add_argument("--num_compiles", type=int, default=2, help="candidates compiled for a case")
    parser.add_argument("--compile_timeout", type=float, default=600.0, help="seconds for one of them")
    args = parser.parse_args()
    for case in args.cases or CASES:
        if case not in CASES:
            parser.error(f"no case {case!r}: must be one of {', '.join(CASES)}")
        config = read_config(case, args.num_compiles, args.compile_timeout)
        record(case, config, plan.make(config, args.workdir))


if __name__ == "__main__":
    main()
