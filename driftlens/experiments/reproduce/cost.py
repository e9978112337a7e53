"""What SADR adds to the time and to the memory of an edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from driftlens import figures
from driftlens.bench import Arm
from driftlens.cases import Case, balanced
from driftlens.editing.methods import edit
from driftlens.edits import Edit
from driftlens.experiments.reproduce.finding import Finding, Study, in_all
from driftlens.experiments.reproduce.measuring import without_and_with
from driftlens.intervals import median_interval, with_interval
from driftlens.journal import digest
from driftlens.memory import kept_for_gradient

CASES = 30
"""How many of the study's cases are timed: time differs less from case to case than answers do."""
SIDES = ("without", "with")
"""SADR."""
EDIT, STEP, MEMORY = "time of an edit", "time of a step", "memory of a step"
UNITS = {EDIT: "s", STEP: "s", MEMORY: "MB"}
Pair = dict[str, float]
"""Without and with SADR."""


def cost(study: Study) -> Finding:
    """Open question: what SADR costs in time and memory. Each case is edited without and with it,
    one right after the other, with nothing else in the same passes."""
    timed = replace(study, cases=balanced(study.cases, 2 if study.quick else CASES))
    found = without_and_with(
        timed, "cost", "costs.jsonl", partial(_of_case, study), threads=torch.get_num_threads()
    )
    rows: list[dict[str, Any]] = []
    points: list[str] = []
    for method, (_, told) in found.told.items():
        if told:
            own = [*_rows(method, [*told.values()])]
            rows += own
            points.append(_told(method, own))
    table = pd.DataFrame(rows)
    text = (
        "What SADR adds, in per cent of the same edit without it: medians over cases. The two "
        "edits of a case are made one right after the other, in about half of the cases the one "
        "with SADR first. A step's time is that of the edit over its steps; its memory is what one "
        f"step keeps for its gradient, without the weights.{study.untuned([*found.told])}"
    )
    figure = figures.rate_bars(
        table.assign(arm=table["method"], metric=table["quantity"]), list(UNITS),
        title="What SADR adds to an edit", unit="% more", top=None,
    )  # fmt: skip
    title = "What SADR costs in time and memory"
    paper = "The paper reports neither time nor memory."
    return Finding(
        "cost", title, table, figure, text, paper, points, found.arms, found.failed,
        seconds=in_all(found.spent), cases=timed.cases,
    )  # fmt: skip


def _of_case(
    study: Study, method: str, arms: Sequence[Arm], case: Case
) -> dict[str, dict[str, Any]]:
    """The seconds and steps of both edits, and the bytes of a step."""
    both = dict(zip(SIDES, arms, strict=True))
    one_step, weights = replace(study.config(method), steps=1), [*study.model.hf_model.parameters()]
    # First, so that what all edits have in common (contexts, covariances) is there when time counts
    kept = {
        side: kept_for_gradient(partial(_edit, study, replace(arm, config=one_step), case), weights)
        for side, arm in both.items()
    }
    is_turned = int(digest(case.id), 16) % 2
    edits = {side: _edit(study, both[side], case) for side in SIDES[:: -1 if is_turned else 1]}
    return {
        "edit_seconds": {side: edits[side].info["seconds"] for side in SIDES},
        "edit_steps": {side: len(edits[side].trace) for side in SIDES},
        "step_bytes": kept,
    }


def _edit(study: Study, arm: Arm, case: Case) -> Edit:
    return edit(study.model, case.request, **arm.edit_options(study.seed))


def _rows(method: str, records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Medians over cases without and with SADR, and of what it adds, in per cent."""
    found: dict[str, list[Pair]] = {
        EDIT: [one["edit_seconds"] for one in records],
        STEP: [
            {s: one["edit_seconds"][s] / one["edit_steps"][s] for s in SIDES} for one in records
        ],
        MEMORY: [{side: one["step_bytes"][side] / 1e6 for side in SIDES} for one in records],
    }
    steps = {
        f"steps {side}": float(np.median([one["edit_steps"][side] for one in records]))
        for side in SIDES
    }
    for quantity, pairs in found.items():
        more = np.array([100 * (pair["with"] / pair["without"] - 1) for pair in pairs])
        low, high = median_interval(more)
        yield {
            "method": method,
            "quantity": quantity,
            "unit": UNITS[quantity],
            **{side: float(np.median([pair[side] for pair in pairs])) for side in SIDES},
            "value": float(np.median(more)),
            "low": low,
            "high": high,
            **steps,
            "cases": len(pairs),
        }


def _told(method: str, rows: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for row in rows:
        more = with_interval(row["value"], row["low"], row["high"], sign="+", unit=" %")
        sides = f"{row['without']:.3g} and {row['with']:.3g} {row['unit']}"
        parts.append(f"{row['quantity']} {more} ({sides})")
    steps = f"{rows[0]['steps without']:g} and {rows[0]['steps with']:g} steps"
    return f"{method} without and with SADR, {steps}: {'; '.join(parts)}."
