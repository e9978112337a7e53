"""What is left of the model when edits pile up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from driftlens import figures
from driftlens.bench import UNEDITED, Arm
from driftlens.bench.results import difference_rows
from driftlens.cases import METRICS, Case, Metric, without_edited_facts
from driftlens.evaluation import Answer, Difference, Rate, compare
from driftlens.experiments.many import measure
from driftlens.experiments.reproduce.finding import Failure, Finding, Study
from driftlens.journal import Journal, total

SHOWN = ("ES", "NS", "RS", "DNS")


def sequential(study: Study) -> Finding:
    """Open question: edits one after another, without and with SADR."""
    methods = ("rome",) if study.quick else ("rome", "memit", "alphaedit")
    arms = study.arms(methods, ("none", "sadr"))
    journal = Journal(study.out / "sequences.jsonl")
    rows: list[dict[str, Any]] = []
    points: list[str] = []
    failed: list[Failure] = []
    measured: list[dict[str, Any]] = []
    asked: dict[str, dict[str, list[Answer]]] = {}
    for arm in arms:
        found = measure(
            study.model, study.cases, arm, UNEDITED if arm.method is None else "sequence", journal,
            seed=study.seed, retry_failed=study.retry_failed, progress=study.progress,
        )  # fmt: skip
        measured.append(found)
        checkpoints = found.get("checkpoints", {})
        for count, rates in checkpoints.items():
            rows += _rows(arm.name, int(count), rates)
        if checkpoints:
            points.append(_told(arm.name, checkpoints, "error" in found))
        if "answers" in found:
            asked[arm.name] = {
                case: [Answer(**answer) for answer in own] for case, own in found["answers"].items()
            }
        if "error" in found:
            failed.append((arm.name, "a sequence", found["error"]))
    differences: list[dict[str, Any]] = []
    for name, other, less in _differences(asked, methods):
        differences += difference_rows(name, other, less)
        told = ", ".join(f"{metric} {less[metric]}" for metric in METRICS if metric in less)
        points.append(f"{name} less {other}, after {len(study.cases)} facts: {told}.")
    text = (
        "One order of the facts; intervals are over the facts in one edited model."
        f"{_left_out(study.cases)}{study.untuned(methods)}"
    )
    table = pd.DataFrame(rows, columns=["arm", "facts", "metric", *(f.name for f in fields(Rate))])
    title = "Edits one after another"
    paper = "The paper edits one fact at a time; its reviewers ask what happens in a sequence."
    made = [{"name": arm.name, **arm.to_dict()} for arm in arms[1:]]
    seconds = total(measured, "spent")
    figure = _curves(table, arms)
    return Finding(
        "sequential", title, table, figure, text, paper, points, made, failed, differences,
        seconds=seconds,
    )  # fmt: skip


def _differences(
    asked: Mapping[str, Mapping[str, Sequence[Answer]]], methods: Sequence[str]
) -> Iterator[tuple[str, str, dict[Metric, Difference]]]:
    """After all facts, paired by fact: each sequence less the unedited model, each restricted one
    less the same without."""
    for arm, other in (pair for m in methods for pair in ((m, UNEDITED), (f"{m} + sadr", m))):
        if arm in asked and other in asked:
            yield arm, other, compare(asked[arm], asked[other])


def _left_out(cases: Sequence[Case]) -> str:
    """How many prompts are not asked, as another of the edits changes their answers."""
    counts = [
        (sum(len(case.neighbours) for case in some), sum(len(case.relations) for case in some))
        for some in (cases, without_edited_facts(cases))
    ]
    parts = [
        f"{before - left} of {before} {kind}"
        for kind, before, left in zip(("neighbours", "relations"), *counts, strict=True)
        if before > left
    ]
    if not parts:
        return ""
    return f" Not asked, as another of the edits changes the answers: {' and '.join(parts)}."


def _rows(arm: str, count: int, rates: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "facts": count, "metric": metric, **rate} for metric, rate in rates.items()
    ]


def _told(arm: str, checkpoints: dict[str, Any], stopped: bool) -> str:
    """The first and the last look, in a sentence."""
    parts = []
    for count in dict.fromkeys((next(iter(checkpoints)), list(checkpoints)[-1])):
        rates = checkpoints[count]
        values = ", ".join(f"{m} {rates[m]['value']:.1f}" for m in METRICS if m in rates)
        parts.append(f"after {count} fact{'' if count == '1' else 's'} {values}")
    return f"{arm}: {'; '.join(parts)}{', the last before it stopped' if stopped else ''}."


def _dash(arm: Arm) -> str:
    if arm.method is None:
        return "dot"
    return "dash" if arm.penalties else "solid"


def _curves(table: pd.DataFrame, arms: Sequence[Arm]) -> go.Figure:
    """Rates over the number of facts so far, a colour for each editor; those of the unedited
    model are over the same facts."""
    fig = make_subplots(1, len(SHOWN), subplot_titles=SHOWN, shared_yaxes=True)
    methods = list(dict.fromkeys(arm.method for arm in arms))
    for arm in arms:
        own = table[table["arm"] == arm.name]
        for place, metric in enumerate(SHOWN, 1):
            found = own[own["metric"] == metric]
            fig.add_scatter(
                row=1,
                col=place,
                x=found["facts"],
                y=found["value"],
                name=arm.name,
                legendgroup=arm.name,
                showlegend=place == 1,
                mode="lines+markers",
                line={
                    "color": figures.COLOURS[methods.index(arm.method) % len(figures.COLOURS)],
                    "dash": _dash(arm),
                },
                error_y=figures.interval(found),
                hovertemplate="after %{x} facts: %{y:.1f}<extra>%{fullData.name}</extra>",
            )
    fig.update_xaxes(title_text="facts so far", type="log")
    fig.update_yaxes(range=[0, 104])
    fig.update_yaxes(title_text="%", col=1)
    fig.update_layout({**figures.LAYOUT, "title": "Edits one after another", "height": 420})
    return figures.Figure(fig)
