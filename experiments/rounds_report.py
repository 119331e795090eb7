"""The page that rounds end with."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpm_jax.common import report
from cpm_jax.common.figures import Interval, human_bytes, interval_figure
from cpm_jax.common.report import Block, Details, Headline, Page, Section, Table, Text
from cpm_jax.common.training_report import REPORT_FILE, footer
from cpm_jax.curation.rounds import DROPPED, KEPT, RAW


def write_rounds_report(workdir: Path, results: Mapping[str, Any]) -> Path:
    """Writes `report.html`.

    Args:
        workdir: of the rounds.
        results: what results.json holds.

    Returns:
        Path of the page.
    """
    rounds, verified = results["rounds"], results["verification"]
    counts, unit = rounds[-1]["counts"], verified["unit"]
    against_raw = next(m for m in results["margins"] if m["second"] == RAW)
    change = rounds[-1]["change"]
    page = Page(
        title="Rounds of curation",
        subtitle=f"{len(rounds)} rounds over {counts['documents']:,} documents; seeds by {_HOW[rounds[0]['how']]}.",
        headlines=[
            Headline(
                "Kept better than raw by",
                _signed(against_raw["value"], unit),
                unit["name"],
                f"{_interval(against_raw, unit)}; {'told apart' if against_raw['significant'] else 'not told apart'}",
            ),
            Headline(
                "Kept", f"{100 * counts[KEPT] / max(1, counts['documents']):.1f}", "%", f"{counts[KEPT]:,} documents"
            ),
            Headline("Text kept", human_bytes(counts["kept_bytes"]), "", f"of {human_bytes(counts['bytes'])}"),
            Headline(
                "Overlap with the round before",
                f"{100 * change['overlap']:.1f}" if change else "–",
                "%" if change else "",
                "of what either keeps",
            ),
        ],
        sections=[
            Section("What the filter is worth", [Text(verified["verdict"]), *_margins(results["margins"], unit)]),
            _all_rounds(rounds),
            *(_round(manifest, unit) for manifest in rounds),
            Section("Run", [Details("Settings", json.dumps(results["config"], indent=1))]),
        ],
        footer=footer(),
    )
    return report.write(page, workdir / REPORT_FILE)


_HOW = {"verify": "verification", "random": "chance"}


def _signed(value: float, unit: Mapping[str, Any]) -> str:
    return f"{value:+.{unit['digits']}f}"


def _interval(found: Mapping[str, Any], unit: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"95% interval {_signed(low, unit)} to {_signed(high, unit)}"


def _margins(margins: Sequence[Mapping[str, Any]], unit: Mapping[str, Any]) -> list[Block]:
    """A drawing and a table of how much better the first of each pair is; nothing where nothing was verified."""
    if not margins:
        return []
    first = margins[0]["first"]
    intervals = {m["second"]: Interval(m["value"], *m["interval"]) for m in margins}
    figure = interval_figure(intervals, ylabel=f"{first} better by ({unit['name']}) than")
    rows = [
        [m["second"], _signed(m["value"], unit), _interval(m, unit), f"{m['adjusted_p_value']:.2g}"] for m in margins
    ]
    strong = [index for index, m in enumerate(margins) if m["significant"]]
    caption = "Strong: told apart at the 5% level after Holm's correction for all pairs of this verification."
    header = [f"{first} better than", "by", "", "p (Holm)"]
    return [figure, Table(header, rows, caption, number_columns=(1, 3), strong_rows=strong)]


def _all_rounds(rounds: Sequence[Mapping[str, Any]]) -> Section:
    rows = []
    for manifest in rounds:
        counts, change, seeds = manifest["counts"], manifest["change"], manifest["seeds"]
        rows.append(
            [
                str(manifest["round"]),
                ", ".join(seeds["positive"]),
                ", ".join(seeds["negative"]),
                f"{sum(manifest['classifier']['examples'].values()):,}",
                f"{manifest['classifier']['average_precision']:.3f}",
                f"{counts[KEPT]:,}",
                f"{counts[DROPPED]:,}",
                *([f"{change[name]:,}" for name in ("only_now", "only_before")] if change else ["–", "–"]),
                f"{change['overlap']:.3f}" if change else "–",
            ]
        )
    header = ["round", "positive", "negative", "examples", "average precision", "kept", "dropped", "newly kept"]
    header += ["newly dropped", "overlap"]
    caption = (
        "Average precision is that of held-out documents of the round's own pools: it says how well they are told "
        "apart, and nothing of what the filter is worth. Overlap: documents that both rounds keep / that either keeps."
    )
    return Section("Round by round", [Table(header, rows, caption, number_columns=range(3, 10))])


def _round(manifest: Mapping[str, Any], unit: Mapping[str, Any]) -> Section:
    verified = manifest["verification"]
    said = (
        verified["verdict"] if verified else "The seeds are random documents of all candidates; nothing was verified."
    )
    blocks: list[Block] = [Text(said), *_margins(manifest["margins"], unit)]
    if manifest["change"]:
        blocks += [_side_by_side(manifest["change"]["examples"], "newly kept", "newly dropped")]
    blocks += [_side_by_side(manifest["examples"], "kept", "dropped")]
    return Section(f"Round {manifest['round']}", blocks)


def _side_by_side(examples: Mapping[str, Sequence[Mapping[str, Any]]], left: str, right: str) -> Table:
    pairs = itertools.zip_longest(*([_written(e) for e in examples[name]] for name in (KEPT, DROPPED)), fillvalue="")
    return Table([left, right], list(pairs))


def _written(example: Mapping[str, Any]) -> str:
    before = f", before {example['score_before']:.3f}" if "score_before" in example else ""
    return f"[{example['id']}, score {example['score']:.3f}{before}] {example['text']}"
