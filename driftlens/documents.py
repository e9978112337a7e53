"""Pages of figures and tables: one HTML file, without a server or network.

Texts are escaped by the template; a content security policy lets nothing be loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jinja2
import pandas as pd
import plotly.graph_objects as go
import plotly.offline

from driftlens.figures import Figure


@dataclass(frozen=True)
class TableOf:
    """A table of a page.

    Args:
        caption: What it shows, with units.
        rows: The numbers; floats are shown with three decimals.
        folded: Whether it is opened by a click.
    """

    caption: str
    rows: pd.DataFrame
    folded: bool = False

    @property
    def columns(self) -> list[str]:
        """Headings."""
        return [str(name) for name in self.rows.columns]

    @property
    def cells(self) -> list[list[str]]:
        """What is shown, row by row."""
        return [[_shown(cell) for cell in row] for row in self.rows.itertuples(index=False)]


@dataclass(frozen=True)
class Frame:
    """A page within the page, e.g. of one prompt; it is opened by a click.

    Args:
        title: What it shows.
        document: A whole HTML document.
    """

    title: str
    document: str


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        id: To link to it.
        title: Its heading.
        texts: Paragraphs.
        points: A list below them.
        figures: Charts.
        tables: Tables, after the charts.
        frames: Pages within the page, last.
        aside: A paragraph that stands back, e.g. what others report.
    """

    id: str
    title: str
    texts: Sequence[str] = ()
    points: Sequence[str] = ()
    figures: Sequence[go.Figure] = field(default=(), repr=False)
    tables: Sequence[TableOf] = ()
    frames: Sequence[Frame] = ()
    aside: str = ""


def document(title: str, lead: Sequence[str], command: str, sections: Sequence[Section]) -> str:
    """HTML of a page; its charts can be saved as PNG and SVG there.

    Args:
        title: Its heading.
        lead: Paragraphs below it.
        command: How to make it again.
        sections: Its parts; more than three get a table of contents.
    """
    charts = {
        section.id: [
            (name := f"{section.id}-{i}", _chart(figure, name))
            for i, figure in enumerate(section.figures)
        ]
        for section in sections
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("driftlens", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("document.html").render(
        title=title, lead=lead, command=command, sections=sections, charts=charts,
        plotly=plotly.offline.get_plotlyjs() if any(charts.values()) else "",
    )  # fmt: skip


def _chart(figure: go.Figure, name: str) -> str:
    return Figure(figure).to_html(full_html=False, include_plotlyjs=False, div_id=name)


def _shown(cell: object) -> str:
    if isinstance(cell, float):
        return "" if pd.isna(cell) else f"{cell:.3f}"
    return "" if cell is None else str(cell)
