"""Whether SADR is more than a weaker edit: editors without and with it at equal P(new target)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from driftlens import figures
from driftlens.bench import Arm
from driftlens.cases import METRICS, Case
from driftlens.errors import RequestError
from driftlens.evaluation import Answer, Asked, answers, compare, rates
from driftlens.experiments.reproduce.editors import PAPERS, gains
from driftlens.experiments.reproduce.finding import Failure, Finding, Study, in_all
from driftlens.experiments.reproduce.measuring import each_case
from driftlens.journal import total
from driftlens.strength import target_prob, weakened

SIDES = ("without", "with")
"""SADR."""
AS_MADE, EQUAL = "as made", "at equal strength"


def strength(study: Study) -> Finding:
    """Open question: whether SADR keeps more only because its edits are weaker. Of each case, the
    stronger of both edits (the larger P(new target) on the edited prompt) is given so much less of
    its change that it is as strong as the other."""
    methods = PAPERS[:1] if study.quick else PAPERS
    rows: list[dict[str, Any]] = []
    points: list[str] = []
    made: list[dict[str, Any]] = []
    failed: list[Failure] = []
    spent: list[float | None] = []
    for method in methods:
        arms = study.arms((method,), ("none", "sadr"))[1:]
        records, own_failed = each_case(
            study, "strength", "strengths.jsonl", method,
            {"arms": [arm.to_dict() for arm in arms]}, partial(_of_case, study, arms),
        )  # fmt: skip
        made += [{"name": arm.name, **arm.to_dict()} for arm in arms]
        failed += own_failed
        spent.append(total(records, "seconds"))
        told = {
            case.id: record
            for case, record in zip(study.cases, records, strict=True)
            if "error" not in record
        }
        if told:
            rows += _rows(method, told)
            points += _told(method, told)
    if not rows:
        raise RequestError(
            f"Each of the {len(failed)} edits failed; the first, {failed[0][1]}: {failed[0][2]}",
            "Give other cases.",
        )
    table = pd.DataFrame(rows)
    text = (
        "SADR's edits less those without it, in points, paired by case: as they are made, and with "
        "the stronger of both scaled down, case by case, until P(new target) on the edited prompt "
        f"is the same.{study.untuned(methods)}"
    )
    ends = table["compared"].map({AS_MADE: "", EQUAL: f", {EQUAL}"})
    figure = figures.rate_bars(
        table.assign(arm=table["method"] + ends), METRICS, separator=", ", unit="points", top=None,
        title="SADR less none, as made and at equal strength",
    )  # fmt: skip
    title = "Editors without and with SADR at equal strength"
    paper = "The paper compares edits as they are made, and does not report P(new target)."
    return Finding(
        "strength", title, table, figure, text, paper, points, made, failed, seconds=in_all(spent)
    )


def _of_case(study: Study, arms: Sequence[Arm], case: Case) -> dict[str, Any]:
    """P(new target) of both edits; how much is left of each at equal strength; and the answers."""
    model = study.model
    edits = {side: study.edit(case, arm) for side, arm in zip(SIDES, arms, strict=True)}
    probs = {side: target_prob(model, edit) for side, edit in edits.items()}
    weaker = min(probs.values())
    found: dict[str, Any] = {"probs": probs, "factors": {}, "answers": {}}
    for side, edit in edits.items():
        equal = weakened(model, edit, weaker)
        found["factors"][side] = 1.0 if equal is edit else equal.info["factor"]
        for compared, one in ((AS_MADE, edit), (EQUAL, equal)):
            if compared == EQUAL and equal is edit:
                told = found["answers"][f"{side}, {AS_MADE}"]
            else:
                with one.applied(model):
                    told = [answer.to_dict() for answer in answers(model, case)]
            found["answers"][f"{side}, {compared}"] = told
    return found


def _answers(told: Mapping[str, dict[str, Any]], side: str, compared: str) -> Asked:
    """By case."""
    return {
        case: [Answer(**answer) for answer in record["answers"][f"{side}, {compared}"]]
        for case, record in told.items()
    }


def _rows(method: str, told: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What each metric is without and with SADR, and the difference with its interval, by success
    and by the probability of the right answer; and how much of the edits is left in the mean."""
    for compared in (AS_MADE, EQUAL):
        sides = {side: _answers(told, side, compared) for side in SIDES}
        success = {side: rates(own.values()) for side, own in sides.items()}
        prob = {side: rates(own.values(), "prob") for side, own in sides.items()}
        probable = compare(sides["with"], sides["without"], "prob")
        left = {side: _left(told, side) if compared == EQUAL else 1.0 for side in SIDES}
        for metric, less in compare(sides["with"], sides["without"]).items():
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
                **{f"left {side}": left[side] for side in SIDES},
                "prompts": success["with"][metric].prompts,
                "cases": less.cases,
            }


def _left(told: Mapping[str, dict[str, Any]], side: str) -> float:
    """Of the edits' changes, in the mean over cases."""
    return sum(record["factors"][side] for record in told.values()) / len(told)


def _told(method: str, told: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Both comparisons, and what is kept by a weaker edit alone."""
    whole, weak = (_answers(told, "without", compared) for compared in (AS_MADE, EQUAL))
    held = _answers(told, "with", EQUAL)
    more = gains(whole, _answers(told, "with", AS_MADE))
    yield f"{method} + sadr less {method}, as made: {more}."
    prob = rates(weak.values(), "prob")["ES"].value
    yield (
        f"At equal strength (P(new target) {prob:.3f} in the mean): {gains(weak, held)}. Left of "
        f"the edits' changes in the mean: {_left(told, 'without'):.2f} without SADR, "
        f"{_left(told, 'with'):.2f} with it."
    )
    yield f"{method} so much weaker less {method} as made: {gains(whole, weak)}."
