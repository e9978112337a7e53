"""One page with the figures and paragraphs of all experiments, without a server or network."""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.offline

from driftlens.experiments.reproduce.finding import Finding, Study
from driftlens.figures import CONFIG

_STYLE = """
body { font: 16px/1.5 Inter, "Helvetica Neue", Arial, sans-serif; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 2px 8px; text-align: left; white-space: nowrap; }
.paper { color: #555; } details { margin: 1rem 0; } code { overflow-wrap: anywhere; }
"""


def page(study: Study, findings: Sequence[Finding]) -> str:
    """HTML of the findings."""
    info = study.model.info
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{html.escape(info.name)}: experiments</title><style>{_STYLE}</style>",
        f"<script>{plotly.offline.get_plotlyjs()}</script></head><body>",
        f"<h1>Attention drift in {html.escape(info.name)}</h1>",
        f"<p>{len(study.cases)} cases, {html.escape(info.weights)}.",
        " A quick run: numbers are not for conclusions." if study.quick else "",
        f"</p><p><code>{html.escape(study.command)}</code></p>",
    ]
    for finding in findings:
        figure = finding.figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)
        table = finding.rows.to_html(index=False, border=0, float_format=lambda v: f"{v:.3f}")
        parts += [
            f"<section id='{finding.name}'><h2>{html.escape(finding.title)}</h2>",
            f"<p>{html.escape(finding.text)}</p>",
            f"<p class='paper'>The paper: {html.escape(finding.paper)}</p>",
            figure,
            f"<details><summary>Numbers</summary>{table}</details></section>",
        ]
    return "\n".join([*parts, "</body></html>\n"])
