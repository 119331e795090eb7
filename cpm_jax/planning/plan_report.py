"""A plan as text for the terminal and as a page."""

import datetime
from collections.abc import Sequence

from cpm_jax.common import provenance, report
from cpm_jax.common.figures import bar_figure, human, human_bytes, human_seconds
from cpm_jax.planning.aot import COMPILER_OPTIONS
from cpm_jax.planning.exchange import exchange_of
from cpm_jax.planning.hlo_costs import KINDS
from cpm_jax.planning.search import Bill, Evaluation, Plan, bill

_GIB = 2**30
_HEADER = ("candidate", "memory/chip", "step", "MFU", "tokens/s/chip", "exposed comm.", "")


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"


def _row(evaluation: Evaluation, plan: Plan) -> list[str]:
    memory = _gib(evaluation.memory_total) if evaluation.memory_total else "too much"
    if evaluation.time is None:
        return [evaluation.candidate.label, memory, "", "", "", "", "does not fit"]
    rate = evaluation.tokens_per_step / evaluation.time.total / plan.topology.num_chips
    return [
        evaluation.candidate.label,
        memory,
        human_seconds(evaluation.time.total),
        f"{evaluation.mfu:.1%}",
        f"{rate:,.0f}",
        f"{evaluation.time.exposed / evaluation.time.total:.0%}",
        ("recommended" if evaluation is plan.best else "fits") if evaluation.fits else "does not fit",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in [header, *rows]) for at in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (zip(row, widths, strict=True) for row in [header, *rows])
    ]


def _what(plan: Plan) -> str:
    model, chip = plan.workload.model, plan.topology.chip
    kind = "training" if plan.workload.kind == "train" else "decoding"
    return (
        f"{kind}, {model.num_layers} layers of width {model.d_model}, {plan.workload.seq_len:,} tokens, on "
        f"{plan.topology.num_chips} {chip.name} chips ({plan.topology.name}) of {_gib(chip.hbm_bytes)}"
    )


def _bill_lines(evaluation: Evaluation, costs: Bill, tokens: float, price: float) -> list[str]:
    return [
        f"estimated: {human(costs.tokens_per_day)} tokens a day; {human(tokens)} tokens take {costs.days:,.1f} days, "
        f"{costs.chip_hours:,.0f} chip-hours, {costs.cost:,.0f} at {price:g} per chip-hour",
        f"compiled in {evaluation.compile_seconds:.0f} s; {human(evaluation.costs.flops if evaluation.costs else 0)} "
        "FLOPs per chip and call",
    ]


def _exchange_line(evaluation: Evaluation, plan: Plan) -> str:
    """What the context axis exchanges, and what it might; "" where there is none."""
    exchange = exchange_of(plan.workload, evaluation.candidate)
    if exchange is None:
        return ""
    said = f"context axis: in the forward pass of a layer a chip sends {human_bytes(exchange.now)}"
    if exchange.chosen_blocks is not None:
        return f"{said}, keys and values; {human_bytes(exchange.chosen_blocks)} were it for the chosen blocks only"
    return (
        f"{said}, of it {human_bytes(exchange.heads_whole)} keys and values and the rest queries and what they "
        "attended to"
    )


def describe(plan: Plan, tokens: float, price: float) -> str:
    """The plan in some lines for the terminal.

    Args:
        plan: from `search.make_plan`.
        tokens: the budget.
        price: of a chip for an hour.
    """
    lines = [f"plan for {_what(plan)}", f"{plan.num_considered} candidates compared, {len(plan.evaluations)} compiled"]
    lines += ["", *_table(_HEADER, [_row(e, plan) for e in plan.evaluations]), ""]
    if plan.best is None:
        return "\n".join([*lines, "no candidate fits: take more chips, smaller batches, or more parts of the model"])
    lines.append("memory per chip: " + ", ".join(f"{k} {_gib(v)}" for k, v in plan.best.memory.items() if v > 2**20))
    if exchanged := _exchange_line(plan.best, plan):
        lines.append(exchanged)
    return "\n".join(
        [*lines, *_bill_lines(plan.best, bill(plan.best, plan.topology.num_chips, tokens, price), tokens, price)]
    )


def libtpu_init_args() -> str:
    """What the environment variable LIBTPU_INIT_ARGS of the real run must say for the plan to hold."""
    return " ".join(f"--{name}={value}" for name, value in COMPILER_OPTIONS.items())


def _collective_rows(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    costs = evaluation.costs
    for kind in KINDS:
        chosen = [c for c in costs.collectives if c.kind == kind] if costs else []
        if not chosen or costs is None:
            continue
        largest = max(chosen, key=lambda c: c.num_bytes)
        total = costs.wire_bytes(kind)
        rows.append(
            [
                kind,
                f"{sum(c.executions for c in chosen):,}",
                human_bytes(total),
                f"{costs.wire_bytes(kind, overlapped=True) / total:.0%}" if total else "",
                f"{human_bytes(largest.num_bytes)} over {largest.group_size} chips",
            ]
        )
    return rows


def build_page(plan: Plan, title: str, tokens: float, price: float) -> report.Page:
    """The plan as a page.

    Args:
        plan: from `search.make_plan`.
        title: its heading.
        tokens: the budget.
        price: of a chip for an hour.
    """
    best, chip = plan.best, plan.topology.chip
    rows = [_row(e, plan) for e in plan.evaluations]
    sections = [
        report.Section(
            "Candidates",
            [
                report.Text(
                    f"{plan.num_considered} combinations of mesh, batch size and remat policy were compared by "
                    f"formulas; these {len(rows)} were compiled for the TPU. Times, rates and MFU are estimated."
                ),
                report.Table(
                    _HEADER,
                    rows,
                    number_columns=range(1, 6),
                    strong_rows=[0] if best else [],
                    caption="MFU leaves out what remat repeats. Exposed: communication that no computation hides.",
                ),
            ],
        )
    ]
    headlines = []
    if best is not None and best.time is not None:
        costs = bill(best, plan.topology.num_chips, tokens, price)
        headlines = [
            report.Headline("estimated step", human_seconds(best.time.total), note=best.candidate.label),
            report.Headline("estimated MFU", f"{best.mfu:.1%}", note=f"of {human(chip.peak_flops)} FLOP/s per chip"),
            report.Headline("memory per chip", _gib(best.memory_total), note=f"of {_gib(chip.hbm_bytes)}"),
            report.Headline(
                f"{human(tokens)} tokens", f"{costs.days:,.1f}", "days", f"{human(costs.chip_hours)} chip-hours"
            ),
            report.Headline("cost", human(costs.cost), note=f"at {price:g} per chip-hour"),
        ]
        time = best.time
        seconds = {
            "matrix products at peak": time.matmul,
            "memory traffic": time.memory,
            "all computation": time.compute,
            "communication hidden": time.hidden,
            "communication exposed": time.exposed,
            "step": time.total,
        }
        memory = {name: size / _GIB for name, size in best.memory.items() if size > 2**20}
        sections += [
            report.Section(
                "The recommended one",
                [
                    report.Figures(
                        [
                            bar_figure(
                                {**memory, "free": max(chip.hbm_bytes - best.memory_total, 0) / _GIB},
                                ylabel="memory of a chip (GiB)",
                                strong=list(memory),
                                format_value=lambda v: f"{v:.1f}",
                                wide=False,
                            ),
                            bar_figure(
                                {name: value * 1e3 for name, value in seconds.items()},
                                ylabel="estimated time of a step (ms)",
                                strong=["step"],
                                format_value=lambda v: f"{v:,.0f}",
                                wide=False,
                            ),
                        ]
                    ),
                    report.Table(
                        ("collective", "times", "bytes sent per chip", "beside computation", "largest"),
                        _collective_rows(best),
                        number_columns=(1, 2, 3),
                    ),
                    *([report.Text(_exchange_line(best, plan) + ".")] if _exchange_line(best, plan) else []),
                    report.Text(
                        "The real run needs the same compiler options: set the environment variable LIBTPU_INIT_ARGS."
                    ),
                    report.Details("LIBTPU_INIT_ARGS", libtpu_init_args()),
                ],
            )
        ]
    sections.append(
        report.Section(
            "How it is counted",
            [
                report.Text(
                    "Memory is what the compiler reserves. FLOPs, memory traffic and collectives are read from the "
                    "compiled program, loops multiplied by how often they run, attention kernels by their shapes or "
                    "by what they were declared to cost. Each operation takes the longer of its FLOPs at the chip's "
                    "published peak and its bytes at the published bandwidth; communication beside computation costs "
                    "what exceeds it, other communication all of it. Latency, kernels below their peak and input are "
                    "not in it: the estimate is what the hardware allows."
                ),
                *(
                    [report.Text("Not counted: " + ", ".join(best.costs.uncounted))]
                    if best is not None and best.costs is not None and best.costs.uncounted
                    else []
                ),
            ],
        )
    )
    versions = provenance.versions()
    revision = provenance.git_revision()[:12] or "unknown"
    footer = f"{datetime.date.today().isoformat()}, revision {revision}, jax {versions['jax']}"
    return report.Page(title, f"Estimated: {_what(plan)}", headlines, sections, footer)
