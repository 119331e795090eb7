"""The page that a run ends with: one self-contained HTML file with headline figures, tables, drawings and samples.

A page is a list of sections, a section a list of blocks. `cpm_jax/common/figures.py` draws; `report.html.jinja` lays
out. Nothing is loaded from elsewhere, so the file can be mailed, printed, or opened years later.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2

from cpm_jax.common.files import write_text


@dataclass(frozen=True)
class Headline:
    """One of the few figures that a reader should take away.

    Attributes:
        label: what it is.
        value: the figure, written out.
        unit: its unit.
        note: a few words on what to compare it with.
    """

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Figure:
    """A drawing.

    Attributes:
        svg: its markup; trusted, so only `figures.py` makes it.
        caption: a sentence below it.
        alt: what it shows, for those who cannot see it.
        wide: whether it needs the page's width; a phone then scrolls it.
    """

    svg: str
    caption: str = ""
    alt: str = ""
    wide: bool = False
    kind: str = "figure"


@dataclass(frozen=True)
class Figures:
    """Drawings side by side where the page is wide enough."""

    figures: Sequence[Figure]
    kind: str = "figures"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: names of the columns, with units; none for a list of facts.
        rows: cells as they are to be written.
        caption: a sentence below it.
        number_columns: indices of the columns that hold numbers, which are set flush right.
        strong_rows: indices of the rows to stress.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    number_columns: Sequence[int] = ()
    strong_rows: Sequence[int] = ()
    kind: str = "table"


@dataclass(frozen=True)
class Mark:
    """A cell of a grid.

    Attributes:
        text: what it says.
        tone: "good", "bad", "none" where there is nothing to judge, or "gap" where that is missing.
        detail: smaller, below it.
        tooltip: everything, for those who point at it.
    """

    text: str
    tone: Literal["good", "bad", "none", "gap"]
    detail: str = ""
    tooltip: str = ""


@dataclass(frozen=True)
class Grid:
    """Verdicts by two things, in colours.

    Attributes:
        header: names of the columns, the first of which holds the names of the rows.
        rows: name and marks of each.
        caption: a sentence below it.
    """

    header: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Mark]]]
    caption: str = ""
    kind: str = "grid"


@dataclass(frozen=True)
class Sample:
    """Text that a model wrote.

    Attributes:
        title: where the prompt is from.
        prompt: what it was given, shown pale.
        text: how it went on.
    """

    title: str
    prompt: str
    text: str
    kind: str = "sample"


@dataclass(frozen=True)
class Details:
    """Text that is folded away until the reader asks for it, such as a config."""

    title: str
    text: str
    kind: str = "details"


Block = Text | Figure | Figures | Table | Grid | Sample | Details


@dataclass(frozen=True)
class Section:
    """A titled part of the page."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: heading and title of the window.
        subtitle: a sentence below it.
        headlines: figures at the top.
        sections: the rest, in order.
        footer: where, when and from which revision.
        refresh_seconds: after which a browser loads the page again, while what it shows goes on; None for never.
    """

    title: str
    subtitle: str = ""
    headlines: Sequence[Headline] = ()
    sections: Sequence[Section] = ()
    footer: str = ""
    refresh_seconds: int | None = None


def render(page: Page) -> str:
    """Returns the page as HTML; all text is escaped, only drawings are inserted as they are."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(page=page)


def write(page: Page, path: Path) -> Path:
    """Writes the page to `path`, whole or not at all, and returns the path."""
    # Generated text may hold lone surrogates, which UTF-8 has no bytes for: they must not cost the report.
    write_text(path, render(page).encode("utf-8", errors="replace").decode("utf-8"))
    return path
