"""What is measured of edited models on prompts that an edit should leave alone and that hold its
subject: relations, and neighbours behind the edited sentence. Each finished case is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from driftlens.bench import Arm
from driftlens.bench.units import COVARIANCE, check_unchanged, is_failure, reason
from driftlens.cases import Case, Metric, Probe
from driftlens.drift import measure_drift
from driftlens.edits import Edit
from driftlens.errors import RequestError
from driftlens.experiments.reproduce.editors import PAPERS
from driftlens.experiments.reproduce.finding import Failure, Study
from driftlens.intervals import bootstrap_interval
from driftlens.journal import Journal, total
from driftlens.models import LensModel
from driftlens.patch_results import Exchange, Readout
from driftlens.patching import PatchExperiment
from driftlens.records import versions

KINDS: dict[Metric, str] = {"RS": "relation", "DNS": "distract neighbourhood"}
DRIFTS = {
    "max head": "change of the largest head's attention to the subject",
    "mean head": "change of the mean head's attention to the subject",
    "row KL": "KL between the rows, mean over heads",
}
PER_KIND = 3
"""Prompts of each kind that are taken of a case."""

EXCHANGES: tuple[Exchange, ...] = ("pattern", "values", "both")

Pair = dict[str, float]
Measure = Callable[[LensModel, Edit, Probe], dict[str, Any]]
"""What is measured on a prompt."""


def drifts(
    study: Study, arm: Arm | None = None
) -> tuple[list[dict[str, Any]], list[Failure], float | None]:
    """As :func:`measured`, of :func:`drifted`: all experiments that ask for it share the file."""
    return measured(study, "drift", drifted, arm)


def measured(
    study: Study,
    name: str,
    measure: Measure,
    arm: Arm | None = None,
    per_kind: int = PER_KIND,
) -> tuple[list[dict[str, Any]], list[Failure], float | None]:
    """A record for each prompt, the cases that failed, and the seconds that all took, if that was
    kept; each finished case is kept at once.

    Args:
        study: The model and the cases.
        name: Of the file and the bar.
        measure: Of one prompt.
        arm: Which edits; by default those of the study's editor.
        per_kind: Prompts of each kind that are taken of a case.

    Raises:
        RequestError: If no case has a prompt of these kinds, or each one failed.
    """
    arm = study.editor if arm is None else arm
    prompts, failed, seconds = each_prompt(
        study, name, arm.name, lambda _: arm.to_dict(), lambda case: study.edit(case, arm), measure,
        per_kind, stacklevel=4,
    )  # fmt: skip
    if not prompts:
        if failed:
            raise RequestError(
                f"{len(failed)} of {len(study.cases)} cases failed, the first, {failed[0][1]}: "
                f"{failed[0][2]}",
                "Give other cases; the others have no relation and no neighbour.",
            )
        raise RequestError(
            f"None of the {len(study.cases)} cases has a relation, or a neighbour.",
            "Give other cases, or more of them.",
        )
    return prompts, failed, seconds


def each_prompt(
    study: Study,
    name: str,
    label: str,
    determined_by: Callable[[Case], Mapping[str, Any]],
    edit_of: Callable[[Case], Edit],
    measure: Measure,
    per_kind: int = PER_KIND,
    stacklevel: int = 3,
) -> tuple[list[dict[str, Any]], list[Failure], float | None]:
    """As :func:`measured`, of any edits of the cases; nothing is raised.

    Args:
        study: The model and the cases.
        name: Of the file and the bar.
        label: How the bar and failures call the edits.
        determined_by: What makes a case's edit, JSON-ready.
        edit_of: A case's edit.
        measure: Of one prompt.
        per_kind: Prompts of each kind that are taken of a case.
        stacklevel: Of a warning, from here.
    """

    def of_case(case: Case) -> dict[str, Any]:
        return {"prompts": [*_of_case(study.model, case, edit_of, measure, per_kind)]}

    records, failed = each_case(
        study, name, f"{name}.prompts.jsonl", label,
        lambda case: {**determined_by(case), "per_kind": per_kind}, of_case,
        stacklevel=stacklevel + 1,
    )  # fmt: skip
    prompts = [prompt for record in records for prompt in record.get("prompts", ())]
    return prompts, failed, total(records, "seconds")


def each_case(
    study: Study,
    name: str,
    file: str,
    label: str,
    determined_by: Callable[[Case], Mapping[str, Any]],
    of_case: Callable[[Case], dict[str, Any]],
    stacklevel: int = 3,
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """A record for each case, with the seconds that it took, or the ``error`` that it failed with;
    and the failures. Each finished case is kept at once.

    Args:
        study: The model and the cases.
        name: Of the bar.
        file: In the study's folder.
        label: How the bar and failures call the edits.
        determined_by: What a case's record is of, besides the model and the case, JSON-ready.
        of_case: What is measured of a case.
        stacklevel: Of a warning, from here.

    Raises:
        ModelError: If the model's weights are not the same after a case, which is not kept then.
        DataError: If the file cannot be written.
    """
    journal = Journal(study.out / file)
    common = {
        **study.model.identity(),
        "covariance": COVARIANCE,
        "seed": study.seed,
        "quick": study.quick,
    }
    units = [{**common, **determined_by(case), "case": case.to_record()} for case in study.cases]
    made_by = versions()
    journal.warn_of_other_versions(units, made_by, stacklevel=stacklevel + 1)
    missing = [
        (unit, case)
        for unit, case in zip(units, study.cases, strict=True)
        if not journal.is_finished(unit, study.retry_failed)
    ]
    before = study.model.fingerprint()
    with tqdm(
        total=len(units), initial=len(units) - len(missing), desc=f"{name}, {label}", unit="case",
        disable=not study.progress,
    ) as bar:  # fmt: skip
        for unit, case in missing:
            started = time.monotonic()
            try:
                found = of_case(case)
            except Exception as error:
                if not is_failure(error):
                    raise
                found = {"error": reason(error)}
            check_unchanged(study.model, before)
            journal.add(unit, **found, seconds=time.monotonic() - started, versions=made_by)
            bar.update()
    records = [journal[unit] for unit in units]
    failed = [
        (label, case.id, record["error"])
        for case, record in zip(study.cases, records, strict=True)
        if "error" in record
    ]
    return records, failed


def _always(found: Mapping[str, Any]) -> Callable[[Case], Mapping[str, Any]]:
    """The same of each case."""
    return lambda _: found


@dataclass(frozen=True)
class BothSides:
    """What was measured of editors without and with SADR.

    Args:
        told: Of each editor, its arms without and with SADR, and a record for each case.
        arms: All of them, JSON-ready.
        failed: Cases without a record.
        spent: Seconds that each editor's cases took.
    """

    told: Mapping[str, tuple[Sequence[Arm], Mapping[str, dict[str, Any]]]]
    arms: Sequence[dict[str, Any]]
    failed: Sequence[Failure]
    spent: Sequence[float | None]


def without_and_with(
    study: Study,
    name: str,
    file: str,
    of_case: Callable[[str, Sequence[Arm], Case], dict[str, Any]],
    **determined_by: Any,
) -> BothSides:
    """As :func:`each_case`, of the paper's editors (if quick, of its first), each without SADR and
    with it.

    Args:
        study: The model and the cases.
        name: Of the bar.
        file: In the study's folder.
        of_case: What is measured of a case, by the editor's name and both arms.
        **determined_by: What a record is of, besides these, JSON-ready.

    Raises:
        RequestError: If each case failed with each editor.
    """
    told: dict[str, tuple[Sequence[Arm], dict[str, dict[str, Any]]]] = {}
    made: list[dict[str, Any]] = []
    failed: list[Failure] = []
    spent: list[float | None] = []
    for method in PAPERS[:1] if study.quick else PAPERS:
        arms = study.arms((method,), ("none", "sadr"))[1:]
        made += [{"name": arm.name, **arm.to_dict()} for arm in arms]
        unit = {"arms": [arm.to_dict() for arm in arms], **determined_by}
        records, own_failed = each_case(
            study, name, file, method, _always(unit), partial(of_case, method, arms),
            stacklevel=4,
        )  # fmt: skip
        failed += own_failed
        spent.append(total(records, "seconds"))
        pairs = zip(study.cases, records, strict=True)
        told[method] = arms, {case.id: one for case, one in pairs if "error" not in one}
    if not any(records for _, records in told.values()):
        raise RequestError(
            f"Each of the {len(failed)} edits failed; the first, {failed[0][1]}: {failed[0][2]}",
            "Give other cases.",
        )
    return BothSides(told, made, failed, spent)


def _of_case(
    model: LensModel,
    case: Case,
    edit_of: Callable[[Case], Edit],
    measure: Measure,
    per_kind: int,
) -> Iterator[dict[str, Any]]:
    for metric, kind in KINDS.items():
        probes = case.probes((metric,), model.tokens.separator)
        about = [p for p in probes if case.request.subject in p.prompt]
        for probe in about[:per_kind]:
            found = measure(model, edit_of(case), probe)
            yield {"case": case.id, "kind": kind, "prompt": probe.prompt, **found}


def drifted(model: LensModel, made: Edit, probe: Probe) -> dict[str, Any]:
    """A measure: P(answer) and P(new target) before and after, and the drift of the last token,
    averaged over layers."""
    experiment = PatchExperiment(model, made, probe.prompt, answer=probe.right)
    drift = measure_drift(model, made, probe.prompt)
    return baselines(experiment, made) | {
        "drift": {
            "max head": float(drift.max_head.mean()),
            "mean head": float(drift.mean_head.mean()),
            "row KL": float(drift.kl.mean()),
        }
    }


def baselines(experiment: PatchExperiment, made: Edit) -> dict[str, Pair]:
    """P(answer) and P(new target), of the original and of the edited model."""
    return {
        "original": pair(experiment.original, made),
        "edited": pair(experiment.edited, made),
    }


def pair(readout: Readout, made: Edit) -> Pair:
    """P(answer) and P(new target) of a state."""
    return {"answer": readout.prob, "new": readout[made.requests[0].target_new].prob}


def with_lengths(study: Study, prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The prompts with the numbers of tokens of the answer and of the new target."""

    def count(text: str) -> int:
        return len(study.model.tokens.target_ids(text))

    found = {
        (case.id, probe.prompt): {
            "answer": count(probe.right), "new": count(case.request.target_new)
        }
        for case in study.cases
        for probe in case.probes(tuple(KINDS), study.model.tokens.separator)
    }  # fmt: skip
    return [{**p, "tokens": found[p["case"], p["prompt"]]} for p in prompts]


def is_ahead(pair: Pair, tokens: Mapping[str, int]) -> float:
    """100 if the answer is likelier than the new target per token, as RS and DNS ask, else 0."""
    least = np.finfo(float).tiny
    answer, new = (math.log(max(pair[of], least)) / tokens[of] for of in ("answer", "new"))
    return 100.0 * (answer > new)


def interval_of(cases: Sequence[str], values: np.ndarray) -> tuple[float, float]:
    """A 95 % interval of the mean over prompts, by bootstrap over cases."""
    sums, counts = by_case(cases, values)
    return bootstrap_interval(sums, counts)


def by_case(cases: Sequence[str], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each case, the sum over its prompts and their number."""
    frame = pd.DataFrame({"case": list(cases), "value": values})
    grouped = frame.groupby("case", sort=False)["value"]
    return grouped.sum().to_numpy(), grouped.count().to_numpy(dtype=float)


def case_draws(cases: Sequence[str], seed: int, draws: int) -> np.ndarray:
    """How often each prompt counts, ``[1 + draw, prompt]``: first once, then, in each draw of the
    bootstrap, as often as its case."""
    names = list(dict.fromkeys(cases))
    of_prompt = np.array([names.index(case) for case in cases])
    chosen = np.random.default_rng(seed).integers(0, len(names), (draws, len(names)))
    times = np.stack([np.bincount(row, minlength=len(names)) for row in chosen]).astype(float)
    return np.concatenate([np.ones((1, len(cases))), times[:, of_prompt]])


def share_of(cases: Sequence[str], gains: np.ndarray, lost: np.ndarray) -> dict[str, float]:
    """What is brought back, in per cent of what was lost, with a 95 % interval by bootstrap over
    cases; not a number unless something was surely lost. The ends are none where a draw of few
    cases has lost nothing."""
    if not interval_of(cases, lost)[0] > 0:
        return dict.fromkeys(("share, %", "share low", "share high"), float("nan"))
    # A mean over prompts of which each counts as much as it lost.
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = bootstrap_interval(by_case(cases, gains)[0], by_case(cases, lost)[0])
    return {
        "share, %": 100 * float(gains.sum() / lost.sum()),
        "share low": 100 * low,
        "share high": 100 * high,
    }
