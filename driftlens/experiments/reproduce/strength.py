"""Whether SADR is more than a weaker edit: editors without and with it at equal P(new target)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from driftlens import figures
from driftlens.bench import Arm
from driftlens.cases import METRICS, Case
from driftlens.edits import Edit
from driftlens.errors import EditError
from driftlens.evaluation import Answer, Asked, answers, compare, rates
from driftlens.experiments.reproduce.editors import gains
from driftlens.experiments.reproduce.finding import Failure, Finding, Study, in_all
from driftlens.experiments.reproduce.measuring import (
    DRIFTS,
    drifted,
    drifts,
    each_prompt,
    interval_of,
    without_and_with,
)
from driftlens.intervals import with_interval
from driftlens.models import LensModel
from driftlens.strength import target_prob, weakened

SIDES = ("without", "with")
"""SADR."""
AS_MADE, EQUAL = "as made", "at equal strength"
Drifts = dict[tuple[str, str, str], dict[tuple[str, str], dict[str, float]]]
"""By case, kind and prompt: by side and comparison, the measures of drift."""


def strength(study: Study) -> Finding:
    """Open question: whether SADR keeps more only because its edits are weaker. Of each case, the
    stronger of both edits (the larger P(new target) on the edited prompt) is given so much less of
    its change that it is as strong as the other."""
    found = without_and_with(study, "strength", "strengths.jsonl", partial(_of_case, study))
    rows: list[dict[str, Any]] = []
    points: list[str] = []
    failed, spent = [*found.failed], [*found.spent]
    for method, (arms, told) in found.told.items():
        if told:
            by_prompt, unmeasured, seconds = _drifts(study, method, arms, told)
            failed += unmeasured
            spent += seconds
            asked, looked = [*_rows(method, told)], [*_drift_rows(method, by_prompt)]
            rows += [*asked, *looked]
            points += [*_told(method, told, asked), *_told_of_drift(method, looked)]
    table = pd.DataFrame(rows)
    text = (
        "SADR's edits less those without it, in points, paired by case: as they are made, and with "
        "the stronger of both scaled down, case by case, until P(new target) on the edited prompt "
        f"is within one per cent of the other's.{study.untuned([*found.told])}"
    )
    ends = table["compared"].map({AS_MADE: "", EQUAL: f", {EQUAL}"})
    answered = table[table["metric"].isin(METRICS)]
    figure = figures.rate_bars(
        answered.assign(arm=answered["method"] + ends), METRICS, separator=", ",
        title="SADR less none, as made and at equal strength", unit="points", top=None,
    )  # fmt: skip
    title = "Editors without and with SADR at equal strength"
    paper = "The paper compares edits as they are made, and does not report P(new target)."
    return Finding(
        "strength", title, table, figure, text, paper, points, found.arms, failed,
        seconds=in_all(spent),
    )  # fmt: skip


def _of_case(study: Study, _: str, arms: Sequence[Arm], case: Case) -> dict[str, Any]:
    """P(new target) of both edits; how much is left of each at equal strength; and the answers."""
    model = study.model
    edits = {side: study.edit(case, arm) for side, arm in zip(SIDES, arms, strict=True)}
    probs = {side: target_prob(model, edit) for side, edit in edits.items()}
    stronger = max(SIDES, key=lambda side: probs[side])
    equal = weakened(model, edits[stronger], min(probs.values()))
    told = {side: _asked(model, case, edit) for side, edit in edits.items()}
    found = {f"{side}, {compared}": told[side] for side in SIDES for compared in (AS_MADE, EQUAL)}
    if equal is not edits[stronger]:
        found[f"{stronger}, {EQUAL}"] = _asked(model, case, equal)
    factors = dict.fromkeys(SIDES, 1.0) | {stronger: equal.info.get("factor", 1.0)}
    return {"probs": probs, "factors": factors, "answers": found}


def _asked(model: LensModel, case: Case, edit: Edit) -> list[dict[str, Any]]:
    with edit.applied(model):
        return [answer.to_dict() for answer in answers(model, case)]


def _answers(told: Mapping[str, dict[str, Any]], side: str, compared: str) -> Asked:
    """By case."""
    return {
        case: [Answer(**answer) for answer in record["answers"][f"{side}, {compared}"]]
        for case, record in told.items()
    }


def _rows(method: str, told: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What each metric is without and with SADR, and the difference with its interval, by success
    and by the probability of the right answer. Of the cases that are asked for it: P(new target) on
    the edited prompt, how often greedy decoding gives it, and how much of the edits is left."""
    for compared in (AS_MADE, EQUAL):
        sides = {side: _answers(told, side, compared) for side in SIDES}
        success = {side: rates(own.values()) for side, own in sides.items()}
        prob = {side: rates(own.values(), "prob") for side, own in sides.items()}
        probable = compare(sides["with"], sides["without"], "prob")
        for metric, less in compare(sides["with"], sides["without"]).items():
            behind = {
                case: record
                for case, record in told.items()
                if any(answer.metric == metric for answer in sides["with"][case])
            }
            edited = {side: [sides[side][case] for case in behind] for side in SIDES}
            new = {side: rates(own, "prob")["ES"].value for side, own in edited.items()}
            given = {side: rates(own, "exact")["ES"].value for side, own in edited.items()}
            left = {side: _left(behind, side) if compared == EQUAL else 1.0 for side in SIDES}
            yield {
                "method": method,
                "compared": compared,
                "metric": metric,
                **{side: success[side][metric].value for side in SIDES},
                "value": less.value,
                "low": less.low,
                "high": less.high,
                "effect": less.effect,
                **{f"P {side}": prob[side][metric].value for side in SIDES},
                "P value": probable[metric].value,
                "P low": probable[metric].low,
                "P high": probable[metric].high,
                **{f"P(new target) {side}": new[side] for side in SIDES},
                **{f"new target given {side}, %": given[side] for side in SIDES},
                **{f"left {side}": left[side] for side in SIDES},
                "prompts": success["with"][metric].prompts,
                "cases": less.cases,
            }


def _drifts(
    study: Study, method: str, arms: Sequence[Arm], told: Mapping[str, dict[str, Any]]
) -> tuple[Drifts, list[Failure], list[float | None]]:
    """The drift of each prompt under both edits, as made and at equal strength, where all were
    measured; which of the cases failed; and the seconds that it took."""

    def scaled(case: Case) -> Edit:
        if case.id not in told:
            raise EditError("its edits could not be compared")
        side, factor = _scaled_side(told[case.id])
        return study.edit(case, arms[SIDES.index(side)]).scaled(factor)

    def determined_by(case: Case) -> dict[str, Any]:
        factors = told[case.id]["factors"] if case.id in told else None
        return {"arms": [arm.to_dict() for arm in arms], "factors": factors}

    prompts, failed, seconds = each_prompt(
        study, "strength-drift", method, determined_by, scaled, drifted
    )
    if not prompts:
        return {}, [one for one in failed if one[1] in told], [seconds]
    found: Drifts = {(p["case"], p["kind"], p["prompt"]): {} for p in prompts}
    spent = [seconds]
    for side, arm in zip(SIDES, arms, strict=True):
        own, own_failed, seconds = drifts(study, arm)
        failed += own_failed
        spent.append(seconds)
        for p in own:
            place = p["case"], p["kind"], p["prompt"]
            if place in found:
                found[place] |= {(side, AS_MADE): p["drift"], (side, EQUAL): p["drift"]}
    for p in prompts:
        side, _ = _scaled_side(told[p["case"]])
        found[p["case"], p["kind"], p["prompt"]][side, EQUAL] = p["drift"]
    whole = {place: own for place, own in found.items() if len(own) == 4}
    return whole, [one for one in failed if one[1] in told], spent


def _scaled_side(record: Mapping[str, Any]) -> tuple[str, float]:
    """Which of both edits is scaled down, and how much of it is left."""
    side = min(SIDES, key=lambda one: float(record["factors"][one]))
    return side, float(record["factors"][side])


def _drift_rows(method: str, by_prompt: Drifts) -> Iterator[dict[str, Any]]:
    """The mean drift of prompts without and with SADR, and the difference with its interval."""
    for kind in dict.fromkeys(kind for _, kind, _ in by_prompt):
        own = {place: sides for place, sides in by_prompt.items() if place[1] == kind}
        cases = [case for case, *_ in own]
        for compared, name in product((AS_MADE, EQUAL), DRIFTS):
            values = {
                side: np.array([abs(sides[side, compared][name]) for sides in own.values()])
                for side in SIDES
            }
            less = values["with"] - values["without"]
            low, high = interval_of(cases, less)
            yield {
                "method": method,
                "compared": compared,
                "metric": f"drift, {name}: {kind}",
                **{side: float(values[side].mean()) for side in SIDES},
                "value": float(less.mean()),
                "low": low,
                "high": high,
                "prompts": len(cases),
                "cases": len(set(cases)),
            }


def _told_of_drift(method: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The largest head's drift without and with SADR."""
    parts = [
        f"{row['metric'].partition(': ')[2]}, {row['compared']}, {row['without']:.3f} and "
        f"{row['with']:.3f}"
        for row in rows
        if "max head" in row["metric"]
    ]
    if parts:
        yield f"{method}, drift of the largest head without and with SADR: {'; '.join(parts)}."


def _left(told: Mapping[str, dict[str, Any]], side: str) -> float:
    """Of the edits' changes, in the mean over cases."""
    return sum(record["factors"][side] for record in told.values()) / len(told)


def _told(
    method: str, told: Mapping[str, dict[str, Any]], asked: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Both comparisons, by success and by P(answer); how strong the edits are behind RS and DNS,
    which may be of other cases each; which edits were scaled; and what is kept by scaling alone."""
    rows = {(row["compared"], row["metric"]): row for row in asked}
    whole, weak = (_answers(told, "without", compared) for compared in (AS_MADE, EQUAL))
    more = gains(whole, _answers(told, "with", AS_MADE))
    yield f"{method} + sadr less {method}, as made: {more}."
    less = gains(weak, _answers(told, "with", EQUAL))
    yield f"{method} + sadr less {method}, at equal strength: {less}."
    for metric in (metric for metric in ("RS", "DNS") if (EQUAL, metric) in rows):
        made, equal = rows[AS_MADE, metric], rows[EQUAL, metric]
        ends = (equal[f"P {end}"] for end in ("value", "low", "high"))
        yield (
            f"{method}, P(answer) of {metric} at equal strength: "
            f"{with_interval(*ends, digits=4, sign='+')}. Behind it ({equal['cases']} cases): "
            f"P(new target) without and with SADR {_pair(made, 'P(new target) {}', 3)} as made, "
            f"{_pair(equal, 'P(new target) {}', 3)} at equal strength; greedy decoding gives it on "
            f"{_pair(made, 'new target given {}, %', 1)} and "
            f"{_pair(equal, 'new target given {}, %', 1)} %."
        )
    scaled = [_scaled_side(record) for record in told.values()]
    counts = [sum(one == side and factor < 1 for one, factor in scaled) for side in SIDES]
    nothing = sum(factor == 0 for _, factor in scaled)
    yield (
        f"{method}, scaled down: {counts[0]} edits without SADR, {counts[1]} with it, "
        f"{len(told) - sum(counts)} of neither; left of their changes in the mean: "
        f"{_left(told, 'without'):.2f} and {_left(told, 'with'):.2f}."
        + (f" Of {nothing} nothing is left, as the original is as strong." if nothing else "")
    )
    yield f"{method} scaled down less {method} as made: {gains(whole, weak)}."


def _pair(row: Mapping[str, Any], name: str, digits: int) -> str:
    """Without and with SADR."""
    return " and ".join(f"{row[name.format(side)]:.{digits}f}" for side in SIDES)
