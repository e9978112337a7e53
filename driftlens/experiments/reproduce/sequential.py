"""What is left of the model when edits pile up."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from driftlens import figures
from driftlens.bench import UNEDITED
from driftlens.cases import METRICS
from driftlens.experiments.many import asked, measure
from driftlens.experiments.reproduce.finding import Finding, Study
from driftlens.journal import Journal

SHOWN = ("ES", "RS", "DNS")


def sequential(study: Study) -> Finding:
    """Open question: edits one after another, without and with SADR."""
    methods = ("rome",) if study.quick else ("rome", "memit", "alphaedit")
    arms = study.arms(methods, ("none", "sadr"))[1:]
    journal = Journal(study.out / "sequences.jsonl")
    rows = _rows(UNEDITED, 0, asked(study.model, study.cases, "unedited", study.progress))
    texts = []
    for arm in arms:
        found = measure(
            study.model, study.cases, arm, "sequence", journal,
            seed=study.seed, progress=study.progress,
        )  # fmt: skip
        if "error" in found:
            texts.append(f"{arm.name}: {found['error']}")
            continue
        for count, rates in found["checkpoints"].items():
            rows += _rows(arm.name, int(count), rates)
        texts.append(_told(arm.name, found["checkpoints"]))
    table = pd.DataFrame(rows)
    title = "Edits one after another"
    paper = "The paper edits one fact at a time; its reviewers ask what happens in a sequence."
    made = [{"name": arm.name, **arm.to_dict()} for arm in arms]
    return Finding("sequential", title, table, _curves(table), " ".join(texts), paper, made)


def _rows(arm: str, count: int, rates: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "facts": count, "metric": metric, **rate} for metric, rate in rates.items()
    ]


def _told(arm: str, checkpoints: dict[str, Any]) -> str:
    """The first and the last look, in a sentence."""
    parts = []
    for count in dict.fromkeys((next(iter(checkpoints)), list(checkpoints)[-1])):
        rates = checkpoints[count]
        values = ", ".join(f"{m} {rates[m]['value']:.1f}" for m in METRICS if m in rates)
        parts.append(f"after {count} fact{'' if count == '1' else 's'} {values}")
    return f"{arm}: {'; '.join(parts)}."


def _curves(table: pd.DataFrame) -> go.Figure:
    """Rates over the number of facts so far, a colour for each arm."""
    fig = make_subplots(1, len(SHOWN), subplot_titles=SHOWN, shared_yaxes=True)
    edited = table[table["arm"] != UNEDITED]
    for index, (arm, own) in enumerate(edited.groupby("arm", sort=False)):
        for place, metric in enumerate(SHOWN, 1):
            found = own[own["metric"] == metric]
            fig.add_scatter(
                row=1,
                col=place,
                x=found["facts"],
                y=found["value"],
                name=str(arm),
                legendgroup=str(arm),
                showlegend=place == 1,
                mode="lines+markers",
                line={
                    "color": figures.COLOURS[index // 2 % len(figures.COLOURS)],
                    "dash": "dash" if "sadr" in str(arm) else "solid",
                },
                error_y=figures.interval(found),
                hovertemplate="after %{x} facts: %{y:.1f}<extra>%{fullData.name}</extra>",
            )
    fig.update_xaxes(title_text="facts so far", type="log")
    fig.update_yaxes(range=[0, 104])
    fig.update_yaxes(title_text="%", col=1)
    fig.update_layout({**figures.LAYOUT, "title": "Edits one after another", "height": 420})
    return figures.Figure(fig)
