"""What SADR takes off the drift, and whether the damage goes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from driftlens import figures
from driftlens.errors import RequestError
from driftlens.experiments.reproduce.editors import PAPERS
from driftlens.experiments.reproduce.finding import Failure, Finding, Study, in_all
from driftlens.experiments.reproduce.measuring import (
    DRIFTS,
    drifts,
    is_ahead,
    share_of,
    with_lengths,
)
from driftlens.intervals import with_interval

Prompt = dict[str, Any]


def _drift(name: str) -> Callable[[Prompt], float]:
    return lambda prompt: abs(float(prompt["drift"][name]))


def _overtaken(prompt: Prompt) -> float:
    return is_ahead(prompt["original"], prompt["tokens"]) - is_ahead(
        prompt["edited"], prompt["tokens"]
    )


MEASURES: dict[str, Callable[[Prompt], float]] = {
    **{f"drift, {name}": _drift(name) for name in DRIFTS},
    "fall of P(answer)": lambda p: float(p["original"]["answer"] - p["edited"]["answer"]),
    "rise of P(new target)": lambda p: float(p["edited"]["new"] - p["original"]["new"]),
    "answers overtaken": _overtaken,
}
"""What an edit did to a prompt. Drift is averaged over layers, and then counts whichever way it
goes: a model that looks away from the subject is not held where it was. Answers are overtaken if
the new target is likelier per token, and was not before: per cent of the prompts, less those on
which it is the other way round."""


def cure(study: Study) -> Finding:
    """Open question: how much of the drift SADR takes away, and how much of the damage."""
    methods = PAPERS[:1] if study.quick else PAPERS
    arms: list[dict[str, Any]] = []
    failed: list[Failure] = []
    spent: list[float | None] = []
    found: list[dict[str, Any]] = []
    for method in methods:
        sides = []
        for arm in study.arms((method,), ("none", "sadr"))[1:]:
            prompts, own_failed, seconds = drifts(study, arm)
            sides.append(with_lengths(study, prompts))
            arms.append({"name": arm.name, **arm.to_dict()})
            failed += own_failed
            spent.append(seconds)
        found += _rows(method, *sides)
    rows = pd.DataFrame(found)
    if rows.empty:
        raise RequestError(
            "No prompt could be measured both without and with SADR.", "Give other cases."
        )
    points = [
        f"{kind}, {method}: {_told(own.to_dict('records'))}."
        for (kind, method), own in rows.groupby(["kind", "method"], sort=False)
    ]
    text = (
        "What SADR takes off what an edit does, in per cent of it, prompt by prompt; drift of the "
        f"last token, averaged over layers, then without its sign.{study.untuned(methods)}"
    )
    title = "What SADR takes off the drift, and off the damage"
    paper = "The paper reports what SADR keeps (table 3), not how much of the drift is left."
    figure = figures.rate_bars(
        rows.assign(arm=rows["method"] + ", " + rows["kind"], metric=rows["measure"],
                    value=rows["taken off, %"]),
        list(MEASURES), title=title, unit="% taken off", top=None,
    )  # fmt: skip
    return Finding(
        "cure", title, rows, figure, text, paper, points, arms, failed, seconds=in_all(spent)
    )


def _rows(method: str, plain: Sequence[Prompt], held: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
    """Means without and with SADR over the prompts that both have, and what is taken off."""
    other = {(p["case"], p["kind"], p["prompt"]): p for p in held}
    pairs = [
        (p, other[place]) for p in plain if (place := (p["case"], p["kind"], p["prompt"])) in other
    ]
    for kind in dict.fromkeys(one["kind"] for one, _ in pairs):
        own = [pair for pair in pairs if pair[0]["kind"] == kind]
        cases = [one["case"] for one, _ in own]
        for name, measure in MEASURES.items():
            without = np.array([measure(one) for one, _ in own])
            with_sadr = np.array([measure(one) for _, one in own])
            share = share_of(cases, without - with_sadr, without)
            yield {
                "kind": kind,
                "method": method,
                "measure": name,
                "without": float(without.mean()),
                "with": float(with_sadr.mean()),
                "taken off, %": share["share, %"],
                "low": share["share low"],
                "high": share["share high"],
                "prompts": len(own),
                "cases": len(set(cases)),
            }


def _told(rows: Sequence[Mapping[Any, Any]]) -> str:
    return ", ".join(f"{row['measure']} {_taken_off(row)}" for row in rows)


def _taken_off(row: Mapping[Any, Any]) -> str:
    """In per cent with its interval; where the edit does nothing for sure, as it is."""
    if np.isfinite(row["taken off, %"]):
        ends = (-row[name] for name in ("taken off, %", "high", "low"))
        return with_interval(*ends, digits=0, sign="+", unit=" %")
    return f"{row['without']:.3g} to {row['with']:.3g}"
