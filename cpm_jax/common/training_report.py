"""What a training run shows: curves from its `metrics.jsonl`, its throughput, its memory and its config."""

import datetime
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpm_jax.common import provenance, report
from cpm_jax.common.figures import Series, bar_figure, human, human_bytes, line_figure
from cpm_jax.common.metrics import METRICS_FILE, read_metrics

REPORT_FILE = "report.html"

Rows = Sequence[Mapping[str, Any]]


def _column(rows: Rows, key: str, **style: bool) -> Series:
    """The values of a key over the steps that have one; null, a value that was not finite, leaves a gap."""
    points = [(row["step"], float("nan") if row[key] is None else row[key]) for row in rows if key in row]
    return Series([x for x, _ in points], [y for _, y in points], **style)


def _last(rows: Rows, key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def median_throughput(rows: Rows) -> float:
    """Tokens per second of the median logged step; 0 where none was logged."""
    rates = sorted(row["tokens_per_second"] for row in rows if row.get("tokens_per_second"))
    return rates[len(rates) // 2] if rates else 0.0


def loss_figure(rows: Rows) -> report.Figure:
    """Training loss, also of each source where there are several, and held-out loss over steps."""
    sources = sorted({key for row in rows for key in row if key.startswith("loss/")})
    lines = {"training": _column(rows, "loss", smooth=True)}
    if len(sources) > 1:
        lines |= {f"training, {key.removeprefix('loss/')}": _column(rows, key, smooth=True) for key in sources}
    if any("eval/loss" in row for row in rows):
        lines["held out"] = _column(rows, "eval/loss", markers=True)
    return line_figure(
        lines,
        xlabel="step",
        ylabel="loss (nats per token)",
        caption="Pale: each logged step; full: running mean. Dots: the validation split, which is never trained on.",
    )


def curve_figures(rows: Rows) -> report.Figures:
    """Learning rate, throughput and gradient norm over steps, as far as the run logged them."""
    curves = (
        ("lr", "learning rate", True),
        ("tokens_per_second", "throughput (tokens/s)", True),
        ("grad_norm", "gradient norm before clipping", False),
    )
    return report.Figures(
        [
            line_figure(
                {label: _column(rows, key, smooth=key != "lr")},
                xlabel="step",
                ylabel=label,
                from_zero=from_zero,
                wide=False,
            )
            for key, label, from_zero in curves
            if any(key in row for row in rows)
        ]
    )


def memory_figure(memory: Mapping[str, float]) -> report.Figure:
    """Bytes by what holds them."""
    return bar_figure(memory, ylabel="memory", format_value=human_bytes, wide=False)


def peak_memory() -> int:
    """Most bytes of main memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def training_section(rows: Rows, memory: Mapping[str, float]) -> report.Section:
    """The section with a run's curves.

    Args:
        rows: lines of `metrics.jsonl`.
        memory: bytes by what holds them.
    """
    curves = curve_figures(rows)
    if memory:
        curves = report.Figures([*curves.figures, memory_figure(memory)])
    return report.Section("Training", [loss_figure(rows), curves])


def footer() -> str:
    """Machine, versions, date and revision, in one line."""
    machine, versions = provenance.machine(), provenance.versions()
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}",
        f"{machine['device_count']} × {machine['device_kind']}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        f"commit {provenance.git_revision()[:12] or 'unknown'}",
    ]
    return " · ".join(parts)


def write_training_report(
    workdir: Path,
    *,
    title: str = "Training run",
    config: str = "",
    memory: Mapping[str, float] | None = None,
    sections: Sequence[report.Section] = (),
) -> Path:
    """Writes `report.html` of a run from what lies in its workdir.

    Args:
        workdir: folder of the run, with its `metrics.jsonl`.
        title: heading of the page.
        config: the run's config, shown folded.
        memory: bytes by what holds them, for example parameters and optimizer; this process's peak is added.
        sections: shown after the curves.

    Returns:
        Path of the page.
    """
    rows = read_metrics(Path(workdir) / METRICS_FILE)
    held = {**(memory or {}), "this process, peak": float(peak_memory())}
    blocks = [training_section(rows, held)] if any("loss" in row for row in rows) else []
    folded = [report.Section("Configuration", [report.Details("Everything that was set", config)])] if config else []
    page = report.Page(
        title=title,
        subtitle="" if blocks else "No step was logged yet.",
        headlines=training_headlines(rows),
        sections=[*blocks, *sections, *folded],
        footer=footer(),
    )
    return report.write(page, Path(workdir) / REPORT_FILE)


def training_headlines(rows: Rows) -> list[report.Headline]:
    """Final losses, steps, throughput and time, as far as the run logged them."""
    headlines = []
    if (held_out := _last(rows, "eval/loss")) is not None:
        headlines.append(report.Headline("Held-out loss", f"{held_out:.3f}", "nats per token"))
    if (loss := _last(rows, "loss")) is not None:
        headlines.append(report.Headline("Training loss", f"{loss:.3f}", "nats per token", "at the last logged step"))
        headlines.append(report.Headline("Steps", f"{rows[-1]['step']:,}"))
    if rate := median_throughput(rows):
        headlines.append(report.Headline("Throughput", human(rate), "tokens/s", "median"))
    if (utilisation := _last(rows, "mfu")) is not None:
        headlines.append(report.Headline("Model-FLOP utilisation", f"{100 * utilisation:.1f}", "%"))
    return headlines
