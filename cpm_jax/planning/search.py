"""Finds a good candidate: formulas say which to compile, the compiled programs say which to take."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpm_jax.common.config import ConfigError, config_to_dict
from cpm_jax.common.sharding import MeshConfig
from cpm_jax.modeling.model_size import count_params, selection_flops_per_token, train_flops_per_token
from cpm_jax.planning.analytic import Guess, candidates, meshes
from cpm_jax.planning.aot import Compiled, compile_candidate
from cpm_jax.planning.chips import Topology
from cpm_jax.planning.exchange import exchange_of
from cpm_jax.planning.hlo_costs import KINDS, Costs, count_costs
from cpm_jax.planning.hlo_text import parse
from cpm_jax.planning.loops import stacked_bytes
from cpm_jax.planning.roofline import StepTime, step_time
from cpm_jax.planning.workload import Candidate, Remat, Workload, model_of, state_bytes

_SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a compiled candidate does on each chip.

    Attributes:
        candidate: the candidate.
        guess: what the formulas said of it.
        fits: whether the chip's memory holds it.
        memory: bytes by category, see `memory_by_category`; empty where the compiler refused the program.
        memory_total: bytes in all; where the compiler refused, what it says would be needed, or 0.
        costs: of one call of the program; None where the compiler refused.
        time: estimated; None where the compiler refused.
        tokens_per_step: over all chips.
        mfu: estimated model FLOPs utilisation: FLOPs that the model needs, without what remat repeats, over those that
            the chips could do in the estimated time.
        compile_seconds: that the compiler took.
        compile_cpu_seconds: of all its threads.
        refusal: what the compiler said where it refused.
    """

    candidate: Candidate
    guess: Guess
    fits: bool
    memory: dict[str, float]
    memory_total: float
    costs: Costs | None
    time: StepTime | None
    tokens_per_step: int
    mfu: float
    compile_seconds: float
    compile_cpu_seconds: float
    refusal: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Over all chips, estimated; 0 for what does not fit."""
        return self.tokens_per_step / self.time.total if self.time and self.fits else 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that was found for a workload on a topology.

    Attributes:
        workload: what runs.
        topology: on what.
        evaluations: of the compiled candidates, best first.
        num_considered: candidates that the formulas compared.
    """

    workload: Workload
    topology: Topology
    evaluations: tuple[Evaluation, ...]
    num_considered: int

    @property
    def best(self) -> Evaluation | None:
        """The fitting candidate with the most tokens per second; None where none fits."""
        return self.evaluations[0] if self.evaluations and self.evaluations[0].fits else None


@dataclasses.dataclass(frozen=True)
class Bill:
    """What a number of tokens takes, estimated.

    Attributes:
        tokens_per_day: of the whole slice.
        days: for all tokens.
        chip_hours: for all tokens.
        cost: chip-hours times the price.
    """

    tokens_per_day: float
    days: float
    chip_hours: float
    cost: float


def bill(evaluation: Evaluation, num_chips: int, tokens: float, price_per_chip_hour: float) -> Bill:
    """Computes what `tokens` tokens take."""
    seconds = tokens / evaluation.tokens_per_second
    hours = seconds / 3600 * num_chips
    return Bill(
        tokens_per_day=evaluation.tokens_per_second * _SECONDS_PER_DAY,
        days=seconds / _SECONDS_PER_DAY,
        chip_hours=hours,
        cost=hours * price_per_chip_hour,
    )


def find_guesses(
    workload: Workload,
    topology: Topology,
    batch_sizes: Sequence[int],
    remats: Sequence[Remat],
    mesh_choices: Sequence[MeshConfig] = (),
) -> list[Guess]:
    """The candidates of `analytic.candidates`, of which there is at least one.

    Raises:
        ConfigError: no batch size and mesh go together.
    """
    guesses = candidates(workload, topology, batch_sizes, remats, mesh_choices)
    if not guesses:
        groups = sorted({mesh.data * mesh.fsdp for mesh in mesh_choices or meshes(workload, topology)})
        raise ConfigError(
            f"PlanConfig.batch_sizes = {tuple(batch_sizes)}: none is a multiple of data x fsdp of any mesh of the "
            f"{topology.num_chips} chips of {topology.name} that divides the model; choose multiples of "
            f"{' or '.join(map(str, groups))}",
            field="PlanConfig.batch_sizes",
        )
    return guesses


def choose(guesses: Sequence[Guess], number: int) -> list[Guess]:
    """The best guesses that differ in more than the size of the batch: one of each mesh and remat policy.

    Meshes that differ only in how many copies they keep are guessed alike; after the best of all come the best with
    another number of tensor parts and with another policy, then the rest in order.
    """
    best_of: dict[Any, Guess] = {}
    for guess in guesses:
        best_of.setdefault((guess.candidate.mesh, guess.candidate.remat), guess)
    distinct = list(best_of.values())
    if not distinct:
        return []
    first = distinct[0].candidate
    others = (
        [g for g in distinct if g.candidate.mesh != first.mesh and g.candidate.remat == first.remat][:1]
        + [g for g in distinct if g.candidate.remat != first.remat][:1]
        + [g for g in distinct if g.candidate.mesh.tensor != first.mesh.tensor][:1]
    )
    ordered = itertools.chain(distinct[:1], others, distinct)
    return list(dict.fromkeys(ordered))[:number]


def memory_by_category(workload: Workload, candidate: Candidate, compiled: Compiled) -> dict[str, float]:
    """Bytes on a chip by what they are for; they sum to what the compiler reserves.

    Parameters, optimizer and cache are counted from shapes and shardings, and lie in the program's arguments. What
    loops stack up is read from the program: activations that the backward pass needs, and gradients.
    """
    held = dict[str, float](state_bytes(workload, candidate))
    memory = compiled.memory
    activations, gradients = stacked_bytes(parse(compiled.program))
    room = float(memory["temp"])
    activations = min(activations, room) if workload.kind == "train" else 0.0
    gradients = min(gradients, room - activations) if workload.kind == "train" else 0.0
    kept = {"activations": activations, "gradients": gradients} if workload.kind == "train" else {}
    return {
        **held,
        "batch": max(memory["argument"] - sum(held.values()), 0.0),
        **kept,
        "temporaries": room - activations - gradients,
        "output": float(max(memory["output"] - memory["alias"], 0)),
        "program": float(memory["generated_code"]),
    }


def evaluate(workload: Workload, guess: Guess, compiled: Compiled, topology: Topology) -> Evaluation:
    """Puts together what a compiled candidate does.

    Args:
        workload: what runs.
        guess: what the formulas said.
        compiled: what the compiler made of it.
        topology: on what.
    """
    candidate = guess.candidate
    tokens = candidate.batch_size * (workload.seq_len if workload.kind == "train" else 1)
    if compiled.refusal:
        return Evaluation(
            candidate,
            guess,
            fits=False,
            memory={},
            memory_total=compiled.used_bytes or 0,
            costs=None,
            time=None,
            tokens_per_step=tokens,
            mfu=0.0,
            compile_seconds=compiled.seconds,
            compile_cpu_seconds=compiled.cpu_seconds,
            refusal=compiled.refusal,
        )
    memory = memory_by_category(workload, candidate, compiled)
    costs = count_costs(compiled.program)
    call = dataclasses.asdict(step_time(costs, topology))
    time = StepTime(**{name: seconds / workload.steps_per_call for name, seconds in call.items()})
    needed = model_flops(workload, candidate) / topology.num_chips
    return Evaluation(
        candidate,
        guess,
        fits=sum(memory.values()) <= topology.chip.hbm_bytes,
        memory=memory,
        memory_total=sum(memory.values()),
        costs=costs,
        time=time,
        tokens_per_step=tokens,
        mfu=needed / (topology.chip.peak_flops * time.total),
        compile_seconds=compiled.seconds,
        compile_cpu_seconds=compiled.cpu_seconds,
    )


def model_flops(workload: Workload, candidate: Candidate) -> float:
    """FLOPs that the model needs for a step, as model FLOPs utilisation counts them: nothing that remat repeats.

    In decoding 2 for each parameter that is multiplied with, and attention over a full cache, or its chosen blocks.
    """
    model = model_of(workload, candidate)
    if workload.kind == "train":
        return float(train_flops_per_token(model, workload.seq_len)) * candidate.batch_size * workload.seq_len
    counts = count_params(model)
    matrices = counts.non_embedding - counts.mtp + model.d_model * model.vocab_size
    keys = workload.seq_len
    if (sparse := model.sparse_config) is not None and sparse.applies(keys):
        keys = min(sparse.selection.num_selected * sparse.block_size, keys)
    # The last query of a row sees twice what its mean one does.
    choosing = 2 * selection_flops_per_token(model, workload.seq_len)
    attention = model.num_layers * (4 * model.num_heads * model.head_size * keys + choosing)
    return float(2 * matrices + attention) * candidate.batch_size


def make_plan(
    workload: Workload,
    topology: Topology,
    *,
    batch_sizes: Sequence[int],
    remats: Sequence[Remat],
    mesh_choices: Sequence[MeshConfig],
    num_compiles: int,
    timeout: float,
    cache: Path,
    on_compiled: Callable[[int, int, Evaluation], None] = lambda done, total, evaluation: None,
) -> Plan:
    """Compares candidates by formulas, compiles the most promising, and orders those by estimated speed.

    Args:
        workload: what runs.
        topology: on what.
        batch_sizes: rows per step to choose from.
        remats: policies to choose from.
        mesh_choices: meshes to choose from; none takes all that divide chips and model.
        num_compiles: candidates to compile. Where none of them fits, as many that need less memory are tried.
        timeout: seconds for one of them.
        cache: folder where compiled candidates are kept; the same call takes them from there.
        on_compiled: is told how many are done, of how many, and the last one.

    Raises:
        ConfigError: no batch size and mesh go together, or what `compile_candidate` raises.
        InputError: as `compile_candidate`.
    """
    guesses = find_guesses(workload, topology, batch_sizes, remats, mesh_choices)
    found: list[Evaluation] = []

    def compile_all(chosen: Sequence[Guess]) -> None:
        total = len(found) + len(chosen)
        for guess in chosen:
            compiled = compile_candidate(workload, guess.candidate, topology, cache, timeout)
            found.append(evaluate(workload, guess, compiled, topology))
            on_compiled(len(found), total, found[-1])

    compile_all(choose(guesses, num_compiles))
    if not any(e.fits for e in found):
        tried = {e.candidate for e in found}
        rest = [g for g in guesses if g.candidate not in tried]
        compile_all(choose(sorted(rest, key=lambda g: g.memory), num_compiles))
    ordered = sorted(found, key=lambda e: (-e.tokens_per_second, e.memory_total))
    return Plan(workload, topology, tuple(ordered), len(guesses))


def to_json(plan: Plan, tokens: float, price_per_chip_hour: float) -> dict[str, Any]:
    """Everything that a plan says, as JSON has it; all times and what follows from them are estimates."""

    def one(evaluation: Evaluation) -> dict[str, Any]:
        time, costs = evaluation.time, evaluation.costs
        values: dict[str, Any] = {
            "candidate": config_to_dict(evaluation.candidate),
            "label": evaluation.candidate.label,
            "fits": evaluation.fits,
            "memory_bytes_per_chip": {k: round(v) for k, v in evaluation.memory.items()},
            "memory_total_bytes_per_chip": round(evaluation.memory_total),
            "guessed_memory_bytes_per_chip": round(evaluation.guess.memory),
            "guessed_seconds": evaluation.guess.seconds,
            "compile_seconds": round(evaluation.compile_seconds, 1),
            "compile_cpu_seconds": round(evaluation.compile_cpu_seconds, 1),
        }
        if (exchange := exchange_of(plan.workload, evaluation.candidate)) is not None:
            values["context_exchange_bytes_per_layer"] = {
                "as_it_is": exchange.now,
                **{name: size for name, size in dataclasses.asdict(exchange).items() if size is not None},
            }
        if time is None or costs is None:
            return values | {"compiler_refusal": evaluation.refusal}
        collectives = {
            kind: {
                "bytes_per_chip": costs.wire_bytes(kind),
                "overlapped_bytes_per_chip": costs.wire_bytes(kind, overlapped=True),
                "executions": sum(c.executions for c in costs.collectives if c.kind == kind),
            }
            for kind in KINDS
            if costs.wire_bytes(kind)
        }
        values |= {
            "steps_per_call": plan.workload.steps_per_call,
            "flops_per_chip": costs.flops,
            "hbm_bytes_per_chip": costs.hbm_bytes,
            "collectives": collectives,
            "uncounted": list(costs.uncounted),
            "estimated": {
                "step_seconds": time.total,
                **{f"{k}_seconds": v for k, v in dataclasses.asdict(time).items()},
                "mfu": evaluation.mfu,
                "tokens_per_second_per_chip": evaluation.tokens_per_step / time.total / plan.topology.num_chips,
            },
        }
        if evaluation.fits:
            values["estimated"] |= dataclasses.asdict(
                bill(evaluation, plan.topology.num_chips, tokens, price_per_chip_hour)
            )
        return values

    return {
        "topology": plan.topology.name,
        "chips": plan.topology.num_chips,
        "hbm_bytes_per_chip": plan.topology.chip.hbm_bytes,
        "workload": config_to_dict(plan.workload),
        "token_budget": tokens,
        "price_per_chip_hour": price_per_chip_hour,
        "considered": plan.num_considered,
        "recommended": plan.best.candidate.label if plan.best else None,
        "evaluations": [one(e) for e in plan.evaluations],
    }
