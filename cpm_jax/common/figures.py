"""Figures of reports: plain lines and bars in one quiet style, drawn as SVG that lies inside the page."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cpm_jax.common.report import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart, darkened for a white page.
COLORS = ("#1f5fa8", "#d1661c", "#12806a", "#a8487f", "#7a6a00", "#4f9ccf", "#5b6675")
_INK, _SOFT, _RULE = "#1b2430", "#5b6675", "#dfe4ea"
_MAX_POINTS = 800

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # Text stays text: it is set in the page's font, can be searched, and may be Chinese.
    "svg.hashsalt": "cpm_jax",  # The same data gives the same bytes.
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.parse_math": False,  # names and paths of users may hold dollars
    "text.color": _INK,
    "axes.edgecolor": "#b9c2cd",
    "axes.labelcolor": _SOFT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Series:
    """One line of a figure.

    Attributes:
        x: positions, ascending.
        y: values of the same length; values that are not finite leave a gap.
        markers: whether each point is marked, for values that were measured seldom.
        smooth: whether the running mean is drawn in full and the values themselves pale behind it.
    """

    x: Sequence[float]
    y: Sequence[float]
    markers: bool = False
    smooth: bool = False


def human(value: float) -> str:
    """Writes a number shortly: 1234567 as "1.23M", 12000 as "12,000", 0.0003 as "0.0003"."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def human_bytes(value: float) -> str:
    """Writes a number of bytes with a decimal unit: 1234567 as "1.23 MB"."""
    for limit, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {suffix}"
    return f"{value:.0f} B"


def human_seconds(value: float) -> str:
    """Writes a duration: 59.4 as "59.4 s", 125 as "2 min 05 s", 7325 as "2 h 02 min"."""
    if value < 60:
        return f"{value:.3g} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02d} min"


def _to_svg(canvas: Canvas) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Matplotlib only measures the text here; the reader's browser draws it, with a font that has the glyph.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font", category=UserWarning)
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # it inherits the page's
    # The page scales the drawing; a fixed size in points would not fit a phone.
    head, body = svg.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + body


def _thin(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighbours until a line has at most `_MAX_POINTS` points, which is more than a page can show."""
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    width = -(-len(x) // _MAX_POINTS)
    if width <= 1:
        return x, y
    starts = np.arange(0, len(x), width)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _running_mean(y: np.ndarray) -> np.ndarray:
    """Centred mean over about a thirtieth of the line."""
    half = max(1, len(y) // 60)
    finite = np.isfinite(y)
    total, count = np.cumsum(np.append(0.0, np.where(finite, y, 0.0))), np.cumsum(np.append(0, finite))
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    seen = count[high] - count[low]
    return np.where(seen > 0, (total[high] - total[low]) / np.maximum(seen, 1), np.nan)


def _label(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    # Above the axis and level, where it is read first and takes no width from the curve.
    axes.set_title(ylabel, loc="left", fontsize=10, color=_SOFT, pad=10)


def line_figure(
    lines: Mapping[str, Series],
    *,
    xlabel: str,
    ylabel: str,
    caption: str = "",
    from_zero: bool = False,
    log_x: bool = False,
    wide: bool = True,
) -> Figure:
    """Draws lines over a common axis.

    Args:
        lines: by the name that the legend shows.
        xlabel: name and unit of x.
        ylabel: name and unit of y, written above the axis.
        caption: a sentence below the figure.
        from_zero: whether the y axis starts at zero.
        log_x: whether x is logarithmic.
        wide: whether the figure takes the page's width, or half of it.

    Returns:
        A block for a report's section.
    """
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(8.6, 3.4) if wide else (4.4, 2.6), layout="constrained")
        axes = canvas.add_subplot()
        for color, (name, series) in zip(_cycle(len(lines)), lines.items(), strict=True):
            x, y = _thin(series)
            # A smoothed line shows as many steps as it has, or there is nothing to smooth.
            if series.smooth and len(y) >= 30:
                axes.plot(x, y, color=color, alpha=0.28, linewidth=0.8)
                y = _running_mean(y)
            marker: dict[str, Any] = (
                {"marker": "o", "markersize": 4.5, "markeredgecolor": "white"} if series.markers else {}
            )
            axes.plot(x, y, color=color, label=name, **marker)
        _label(axes, xlabel, ylabel)
        axes.margins(x=0.015)
        if from_zero:
            axes.set_ylim(bottom=0)
        whole = all(float(x).is_integer() for series in lines.values() for x in series.x)  # steps, not shares
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
        if log_x:
            axes.set_xscale("log")
            places = sorted({x for series in lines.values() for x in series.x})
            axes.xaxis.set_major_locator(FixedLocator(places) if len(places) <= 8 else LogLocator())
        axes.yaxis.set_major_locator(MaxNLocator(5))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
            axis.set_minor_formatter(NullFormatter())
        if len(lines) > 1:
            axes.legend(loc="best", fontsize=9.5, handlelength=1.6)
        return Figure(
            svg=_to_svg(canvas), caption=caption, alt=f"{ylabel} over {xlabel}: {', '.join(lines)}", wide=wide
        )


def bar_figure(
    bars: Mapping[str, float],
    *,
    ylabel: str,
    caption: str = "",
    strong: Sequence[str] = (),
    errors: Mapping[str, float] | None = None,
    format_value: Any = None,
    wide: bool = True,
) -> Figure:
    """Draws horizontal bars, each with its value written at the end.

    Args:
        bars: by name, from top to bottom.
        ylabel: what the bars measure, with its unit.
        caption: a sentence below the figure.
        strong: names of the bars to stress.
        errors: standard error by name, drawn as a whisker.
        format_value: function that writes a value; None takes three decimals.
        wide: whether the figure takes the page's width, or half of it.

    Returns:
        A block for a report's section.
    """
    write = format_value or (lambda value: f"{value:.3f}")
    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x", "axes.spines.bottom": False}):
        height = 0.75 + 0.42 * len(bars)
        canvas = Canvas(figsize=(8.6, height) if wide else (4.4, height), layout="constrained")
        axes = canvas.add_subplot()
        top = max((value + (errors or {}).get(name, 0.0) for name, value in bars.items()), default=1.0) or 1.0
        for place, (name, value) in enumerate(bars.items()):
            stressed = not strong or name in strong
            axes.barh(place, value, height=0.62, color=COLORS[0] if stressed else "#b9c2cd")
            error = (errors or {}).get(name, 0.0)
            if error:
                axes.errorbar(value, place, xerr=error, color=_INK, capsize=3, linewidth=1)
            axes.annotate(
                write(value),
                (value + error, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=_INK,
                weight="bold" if name in strong else "normal",
            )
        axes.set_yticks(range(len(bars)), list(bars), color=_INK)
        axes.invert_yaxis()
        axes.set_xlim(0, top * (1.15 if wide else 1.35))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value) if format_value else f"{value:g}"))
        axes.tick_params(axis="x", length=0)
        axes.set_title(ylabel, loc="left", fontsize=10, color=_SOFT, pad=8)
        alt = f"{ylabel}: " + ", ".join(f"{name} {write(value)}" for name, value in bars.items())
        return Figure(svg=_to_svg(canvas), caption=caption, alt=alt, wide=wide)


@dataclass(frozen=True)
class Interval:
    """A figure with its uncertainty.

    Attributes:
        value: the figure.
        low: lower end of its interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


def interval_figure(intervals: Mapping[str, Interval], *, ylabel: str, caption: str = "") -> Figure:
    """Draws differences as dots with their intervals around a line at zero; those that exclude zero are stressed.

    Args:
        intervals: by name, from top to bottom.
        ylabel: what the figures measure, with its unit.
        caption: a sentence below the figure.

    Returns:
        A block for a report's section.
    """
    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x", "axes.spines.bottom": False}):
        canvas = Canvas(figsize=(8.6, 0.9 + 0.42 * len(intervals)), layout="constrained")
        axes = canvas.add_subplot()
        axes.axvline(0, color=_SOFT, linewidth=1)
        for place, interval in enumerate(intervals.values()):
            color = COLORS[0] if interval.low > 0 or interval.high < 0 else _SOFT
            axes.plot([interval.low, interval.high], [place, place], color=color, linewidth=2.4)
            axes.plot(interval.value, place, "o", color=color, markersize=6, markeredgecolor="white")
        axes.set_yticks(range(len(intervals)), list(intervals), color=_INK)
        axes.set_ylim(len(intervals) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(axis="x", length=0)
        axes.set_title(ylabel, loc="left", fontsize=10, color=_SOFT, pad=8)
        said = ", ".join(f"{name} {i.value:+.3g} ({i.low:+.3g} to {i.high:+.3g})" for name, i in intervals.items())
        return Figure(svg=_to_svg(canvas), caption=caption, alt=f"{ylabel}: {said}", wide=True)


def heat_map_figure(
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    xlabel: str,
    ylabel: str,
    title: str,
    caption: str = "",
    wide: bool = False,
) -> Figure:
    """Draws a table of shares as colours, each with its value written in it: pale is 0, dark is 1.

    Args:
        values: in [0, 1], by row and column; what is not finite stays white and empty.
        rows: labels from top to bottom.
        columns: labels from left to right.
        xlabel: what the columns are.
        ylabel: what the rows are.
        title: what the values are, written above.
        caption: a sentence below the figure.
        wide: whether the figure takes the page's width, or half of it.

    Returns:
        A block for a report's section.
    """
    with matplotlib.rc_context({**_STYLE, "axes.grid": False, "axes.spines.bottom": False, "xtick.major.size": 0}):
        width = 8.6 if wide else 4.4
        canvas = Canvas(figsize=(width, 1.15 + 0.32 * len(rows)), layout="constrained")
        axes = canvas.add_subplot()
        colors = LinearSegmentedColormap.from_list("shares", ["#eef3f9", COLORS[0]])
        table = np.ma.masked_invalid(np.asarray(values, float))
        # Cells are rectangles of the drawing, not pixels of an image, so that they stay sharp at any size.
        axes.pcolormesh(table, cmap=colors, vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
        for (row, column), value in np.ndenumerate(table.filled(np.nan)):
            if np.isfinite(value):
                ink = "white" if value > 0.55 else _INK
                axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8.5)
        axes.set_xticks(np.arange(len(columns)) + 0.5, list(columns))
        axes.set_yticks(np.arange(len(rows)) + 0.5, list(rows))
        axes.invert_yaxis()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.set_title(title, loc="left", fontsize=10, color=_SOFT, pad=8)
        said = "; ".join(
            f"{row}: " + ", ".join("–" if not np.isfinite(value) else f"{value:.2f}" for value in cells)
            for row, cells in zip(rows, values, strict=True)
        )
        return Figure(svg=_to_svg(canvas), caption=caption, alt=f"{title}, {ylabel} by {xlabel}: {said}", wide=wide)


def parallel_figure(
    columns: Mapping[str, Sequence[Any]], values: Sequence[float], *, value: str, caption: str = ""
) -> Figure:
    """Draws parallel coordinates: an axis for each column and one for the value, a line for each row; low is dark.

    Args:
        columns: the rows' settings by name; None where a row has none. Numbers over more than a decade are placed by
            their logarithm, other values that are no numbers side by side.
        values: of the rows, lower is better.
        value: what they are, with their unit.
        caption: a sentence below the figure.
    """
    with matplotlib.rc_context({**_STYLE, "axes.grid": False, "axes.spines.bottom": False}):
        canvas = Canvas(figsize=(8.6, 3.6), layout="constrained")
        axes = canvas.add_subplot()
        placed, labels = [], []
        for column in [*columns.values(), values]:
            places, ticks = _places(column)
            placed.append(places)
            labels.append(ticks)
        goodness = 1 - np.asarray(placed[-1], float)
        for row in np.argsort(goodness):
            line = np.array([column[row] for column in placed], float)
            color = COLORS[0] if goodness[row] >= np.quantile(goodness, 0.9) else _SOFT
            axes.plot(range(len(line)), line, color=color, alpha=0.15 + 0.85 * goodness[row], linewidth=1.3)
        for place, ticks in enumerate(labels):
            axes.axvline(place, color=_RULE, linewidth=1, zorder=0)
            for height, text in ticks:
                axes.annotate(
                    text, (place, height), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5
                )
        axes.set_xticks(range(len(labels)), [*columns, value])
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(labels) - 1 + 0.35)
        alt = f"Parallel coordinates of {', '.join(columns)} and {value} of {len(values)} rows"
        return Figure(svg=_to_svg(canvas), caption=caption, alt=alt, wide=True)


def _places(column: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in [0, 1] of a column's values, NaN where there is none, and its ticks."""
    present = [value for value in column if value is not None]
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in present):
        low, high = min(present, default=0.0), max(present, default=1.0)
        scale = np.log if low > 0 and high / low > 10 else float
        width = float(scale(high) - scale(low)) or 1.0

        def place(value: Any) -> float:
            return float("nan") if value is None else float(scale(value) - scale(low)) / width

        shown = sorted(set(present))
        if len(shown) > 6:
            shown = [low, high]
        return [place(value) for value in column], [(place(value), human(value)) for value in shown]
    options = list(dict.fromkeys(map(str, present)))
    height = {option: index / max(1, len(options) - 1) for index, option in enumerate(options)}
    return [height.get(str(value), float("nan")) for value in column], [(h, option) for option, h in height.items()]


def _cycle(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]
