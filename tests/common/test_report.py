import html.parser
import json
import re

import numpy as np
import pytest

from cpm_jax.common import report
from cpm_jax.common.figures import (
    COLORS,
    Interval,
    Series,
    _running_mean,
    bar_figure,
    heat_map_figure,
    human,
    human_bytes,
    human_seconds,
    interval_figure,
    line_figure,
    parallel_figure,
)
from cpm_jax.common.training_report import write_training_report


class _Collector(html.parser.HTMLParser):
    """Collects the text and the addresses that a page refers to, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self):
        super().__init__()
        self.open, self.text, self.addresses, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _parse(page: str) -> _Collector:
    collector = _Collector()
    collector.feed(page)
    collector.close()
    assert collector.open == []
    return collector


def _page() -> report.Page:
    lines = {"训练": Series(range(1000), [9 - x / 200 for x in range(1000)], smooth=True), "held out": Series([1], [2])}
    return report.Page(
        title="A <run> & more",
        headlines=[report.Headline("Loss", "1.23", "nats", "at the end")],
        sections=[
            report.Section(
                "Figures",
                [
                    line_figure(lines, xlabel="step", ylabel="loss (nats)"),
                    report.Figures([bar_figure({"ours": 1.5, "theirs": 2.0}, ylabel="bits", strong=["ours"])]),
                ],
            ),
            report.Section(
                "Rest",
                [
                    report.Text("中文 <script>alert(1)</script>"),
                    report.Table(["name", "bytes"], [["a", "1"], ["b", "2"]], number_columns=[1], caption="sizes"),
                    report.Grid(["", "there"], [("here", [report.Mark("6e-7", "good", "all", 'of <"1">')])], "grid"),
                    report.Sample("a.py", "def f(", "x\ud800):"),
                    report.Details("config", "LR = 1e-3"),
                ],
            ),
        ],
        footer="machine",
    )


def test_page_is_well_formed_self_contained_and_escaped(tmp_path):
    path = report.write(_page(), tmp_path / "deep" / "report.html")
    page = path.read_text("utf-8")
    seen = _parse(page)
    assert "script" not in seen.tags
    assert all(address.startswith("#") for address in seen.addresses)
    assert not re.search(r"url\((?!#)", page)
    text = " ".join(seen.text)
    for words in (
        "A <run> & more",
        "中文 <script>alert(1)</script>",
        "loss (nats)",
        "训练",
        "held out",
        "1.500",
        "6e-7",
        "x?):",
    ):
        assert words in text
    assert '<td class="good" title="of &lt;&#34;1&#34;&gt;">' in page
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_same_data_gives_same_page():
    assert report.render(_page()) == report.render(_page())


def test_line_figure_thins_long_series_and_survives_gaps():
    long = line_figure({"x": Series(range(100_000), [1.0] * 100_000)}, xlabel="step", ylabel="y")
    assert len(long.svg) < 60_000
    line_figure({"x": Series([1, 2, 3], [1.0, float("nan"), 2.0])}, xlabel="step", ylabel="y")
    line_figure({"x": Series([], [])}, xlabel="step", ylabel="y")


def test_intervals_that_exclude_zero_are_stressed():
    shown = interval_figure(
        {"surely": Interval(0.2, 0.1, 0.3), "perhaps": Interval(0.1, -0.1, 0.3)}, ylabel="ours minus theirs"
    )
    assert shown.svg.count(f"stroke: {COLORS[0]}") == 1
    assert "surely +0.2 (+0.1 to +0.3), perhaps" in shown.alt


def test_a_map_writes_its_values_and_leaves_out_what_is_not_there():
    shown = heat_map_figure(
        [[1.0, 0.254], [float("nan"), 0.0]],
        rows=["early", "late"],
        columns=["1K", "2K"],
        xlabel="length",
        ylabel="depth",
        title="found",
    )
    assert shown.alt == "found, depth by length: early: 1.00, 0.25; late: –, 0.00"
    written = set(re.findall(r"<text[^>]*>([^<]+)<", shown.svg))
    assert {"1.00", "0.25", "0.00", "early", "late", "1K", "2K"} <= written
    assert "nan" not in written


def test_parallel_coordinates_have_an_axis_for_each_setting_and_a_line_for_each_row():
    columns = {"lr": [0.001, 0.01, 0.1], "kind": ["a", "b", None]}
    shown = parallel_figure(columns, [3.0, 2.5, 2.75], value="loss")
    written = set(re.findall(r"<text[^>]*>([^<]+)<", shown.svg))
    assert {"lr", "kind", "loss", "0.001", "0.01", "0.1", "a", "b", "3", "2.5", "2.75"} <= written
    assert "None" not in written
    lines = re.findall(r'<path d="([^"]+)" clip-path[^>]*style="fill: none; stroke: (#\w+)', shown.svg)
    rows = [(path.count("L"), color) for path, color in lines if path.count("L") == 2]
    assert len(rows) == 2  # the third has no kind, and so no line through that axis
    assert [color for _, color in rows].count(COLORS[0]) == 1  # the best is stressed


def test_bars_leave_room_for_their_whiskers():
    def right_end(errors):
        svg = bar_figure({"a": 1.0, "b": 0.5}, ylabel="y", errors=errors).svg
        return float(svg.split('id="patch_3"')[1].split("L ")[1].split()[0])  # of the first bar, in the drawing

    assert right_end({"a": 1.0}) < right_end({})


def test_smoothed_line_is_the_running_mean():

    values = [float(i % 2) for i in range(200)]
    assert _running_mean(np.array(values))[50:150] == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (human(12000), "12,000"),
        (human(1234567), "1.23M"),
        (human(0.0003), "0.0003"),
        (human(-2.5e9), "-2.5G"),
        (human_bytes(1234567), "1.23 MB"),
        (human_bytes(12), "12 B"),
        (human_seconds(59.44), "59.4 s"),
        (human_seconds(125), "2 min 05 s"),
        (human_seconds(7325), "2 h 02 min"),
    ],
)
def test_numbers_for_people(written, expected):
    assert written == expected


def test_training_report_shows_every_source_and_gaps(tmp_path):
    rows = [
        {"step": s, "loss": 5 / s, "loss/code": 4 / s, "loss/prose": 6 / s, "lr": 1e-3, "grad_norm": 1.0}
        | {"tokens_per_second": 1000.0 + s}
        for s in range(1, 60)
    ]
    rows[5]["loss"] = None
    rows.append({"step": 60, "eval/loss": 2.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_training_report(tmp_path, title="A run", config="LR = 1e-3", memory={"parameters": 4e6})
    text = " ".join(_parse(path.read_text("utf-8")).text)
    for words in ("training, code", "training, prose", "held out", "2.500", "1,030", "learning rate", "LR = 1e-3"):
        assert words in text
    assert "4 MB" in text


def test_training_report_of_a_run_without_steps(tmp_path):
    path = write_training_report(tmp_path)
    assert "No step was logged yet." in path.read_text("utf-8")
