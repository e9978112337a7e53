"""Units of work: one case under one arm, and what its result is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

from driftlens.bench.arms import Arm
from driftlens.cases import (
    ALL_METRICS,
    TEXT_METRICS,
    UNRELATED,
    Case,
    Metric,
    TextMetric,
    check_metrics,
)
from driftlens.editing.contexts import Context
from driftlens.editing.methods import edit, edit_each
from driftlens.editing.outcome import ValueStore
from driftlens.editing.statistics import DEFAULT_TOKENS
from driftlens.editing.target import subject_in_context
from driftlens.edits import Edit
from driftlens.errors import DriftLensError, ModelError
from driftlens.evaluation import answers
from driftlens.generation import are_written, generate_each, measure_texts
from driftlens.journal import digest
from driftlens.memory import is_out_of_memory
from driftlens.models import LensModel
from driftlens.side_by_side import fits_beside_others

CASES_AT_ONCE = 8
"""Cases whose values are searched in shared passes."""
COVARIANCE = f"{DEFAULT_TOKENS} tokens of wikipedia-leads"
"""What keys' second moments are estimated from."""


def is_failure(error: Exception) -> bool:
    """Whether an error says what is wrong with a case, or that memory does not do for it. Such
    errors do not stop a run; anything else is a defect, and does."""
    return isinstance(error, DriftLensError) or is_out_of_memory(error)


@dataclass(frozen=True)
class Setting:
    """What all units of a run have in common.

    Args:
        metrics: What is asked.
        seed: Of the sampled contexts, and of texts that are written.
        texts: What is told of texts; writing them takes longer than all answers.
        text_length: Tokens of a text that is written, with its prompt.

    Raises:
        RequestError: If there is no such metric.
    """

    metrics: tuple[Metric, ...] = tuple(ALL_METRICS)
    seed: int = 0
    texts: tuple[TextMetric, ...] = ()
    text_length: int = 100

    def __post_init__(self) -> None:
        check_metrics(self.metrics, ALL_METRICS)
        check_metrics(self.texts, TEXT_METRICS)


def identity(model: Mapping[str, Any], case: Case, arm: Arm, setting: Setting) -> dict[str, Any]:
    """What a unit's result is of, JSON-ready: all that determines it but for its last bits, and
    the code.

    Args:
        model: What :meth:`~driftlens.LensModel.identity` gives.
        case: What is asked about.
        arm: The condition.
        setting: What all units have in common.
    """
    probes = case.probes(setting.metrics, model["separator"])
    found: dict[str, Any] = {
        **model,
        "case": case.id,
        "asked": digest([case.request.to_dict(), *map(astuple, probes)]),
        **arm.to_dict(),
    }
    if arm.method is not None:
        found |= {"seed": setting.seed, "covariance": COVARIANCE}
    if setting.texts:
        found |= {"texts": list(setting.texts), "text_length": setting.text_length}
        found |= {"text_seed": setting.seed}
        found |= {"text_prompts": digest([case.generation, case.references])}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def content_digest(cases: Sequence[Case]) -> str:
    """A digest of what cases ask, and of what the project asks with them."""
    return digest([*(case.to_record() for case in cases), UNRELATED])


@dataclass(frozen=True)
class Job:
    """Units that share passes: one arm, and cases that are edited together.

    Args:
        arm: The condition.
        cases: All of them are edited, so that results do not depend on what was finished.
        missing: Ids of those that are asked about.
    """

    arm: Arm
    cases: tuple[Case, ...]
    missing: frozenset[str]


def parts(
    model: LensModel, cases: Sequence[Case], size: int = CASES_AT_ONCE
) -> list[tuple[Case, ...]]:
    """Cases that are edited together, in passes that are padded to the longest: those that are
    about as long from the subject on.

    Args:
        model: Whose tokens count.
        cases: In any order; the parts come in that of their first cases.
        size: Of a part; the last one may be smaller.
    """
    order = sorted(range(len(cases)), key=lambda i: _tokens_from_subject(model, cases[i]))
    chunks = [sorted(order[first : first + size]) for first in range(0, len(order), size)]
    return [tuple(cases[i] for i in chunk) for chunk in sorted(chunks)]


def _tokens_from_subject(model: LensModel, case: Case) -> int:
    """Tokens from the subject's last one to the end of the target; 0 if there is no telling."""
    try:
        ids, subject = subject_in_context(model, case.request, Context())
        return len(ids) - subject + len(model.tokens.target_ids(case.request.target_new))
    except DriftLensError:
        return 0


def check_unchanged(model: LensModel, before: str) -> None:
    """Refuse what was measured of a case that left other weights behind, or an edit applied.

    Args:
        model: After the case.
        before: Its fingerprint, before it.

    Raises:
        ModelError: If so.
    """
    if model.weights.is_edited or model.fingerprint() != before:
        raise ModelError("The model's weights are not what they were before the case.")


def reason(error: Exception) -> str:
    """Why a case failed, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def run_job(
    model: LensModel, job: Job, setting: Setting, store: ValueStore | None = None
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """A record for each missing case of a job, with the seconds that it took (``spent``): what is
    done for all cases together (edits, texts) is counted with the first of them. No record is
    given of a case after which the model's weights are not what they were.

    Args:
        store: Where values that other arms may take, too, are kept.

    Raises:
        ModelError: If the model's weights are not the same afterwards.
    """
    before, started = model.fingerprint(), time.monotonic()
    edited_cases: list[tuple[Case, Edit | Exception | None]] = (
        [(case, None) for case in job.cases]
        if job.arm.method is None
        else [*edits_of(model, job.arm, job.cases, setting.seed, store)]
    )
    texts = _written(model, edited_cases, setting)
    for case, edited in edited_cases:
        if case.id not in job.missing:
            continue
        try:
            if isinstance(edited, Exception):
                raise edited
            record = _asked(model, case, edited, setting, texts.get(case.id))
        except Exception as error:
            if not is_failure(error):
                raise
            record = {"error": reason(error)}
        check_unchanged(model, before)
        yield case, {**record, "spent": time.monotonic() - started}
        started = time.monotonic()


def _written(
    model: LensModel, edited: Sequence[tuple[Case, Edit | Exception | None]], setting: Setting
) -> dict[str, list[str]]:
    """Texts of each case under its edit, by case, written side by side. Nothing where that cannot
    be: they are then written with each edit applied."""
    able = [
        (case, made)
        for case, made in edited
        if are_written(case, setting.texts)
        and not isinstance(made, Exception)
        and (made is None or fits_beside_others(model, made))
    ]
    if not able:
        return {}
    try:
        texts = generate_each(
            model, [case.generation for case, _ in able], [made for _, made in able],
            setting.text_length, seed=setting.seed,
        )  # fmt: skip
    except Exception as error:
        if not is_failure(error):
            raise
        return {}  # which of them fails, is found out case by case
    return {case.id: own for (case, _), own in zip(able, texts, strict=True)}


def edits_of(
    model: LensModel,
    arm: Arm,
    cases: Sequence[Case],
    seed: int = 0,
    store: ValueStore | None = None,
) -> Iterator[tuple[Case, Edit | Exception]]:
    """Each case with its edit, or with what prevents it; in shared passes where possible.

    Args:
        model: The unedited model.
        arm: The condition, with an editor.
        cases: Those that are edited together.
        seed: Of the sampled contexts.
        store: Where values that other arms may take, too, are kept.
    """
    options = arm.edit_options(seed)
    requests = [case.request for case in cases]
    try:
        together: list[Edit] | None = list(edit_each(model, requests, store=store, **options))
    except Exception as error:
        if not is_failure(error):
            raise
        together = None  # one of them cannot be edited: find out which
    for i, case in enumerate(cases):
        try:
            made = together[i] if together else edit(model, case.request, **options)
        except Exception as error:
            if not is_failure(error):
                raise
            yield case, error.with_traceback(None)  # whose frames hold tensors
        else:
            yield case, made


def _asked(
    model: LensModel, case: Case, made: Edit | None, setting: Setting, written: list[str] | None
) -> dict[str, Any]:
    if made is None:
        return _told(model, case, setting, written)
    with made.applied(model):
        told = _told(model, case, setting, written)
    last = made.trace[-1]
    return {
        **told,
        "seconds": made.info["seconds"],
        "steps": len(made.trace),
        "target_prob": last["target_prob"],
        "engine": made.info["engine"],
    }


def _told(
    model: LensModel, case: Case, setting: Setting, written: list[str] | None
) -> dict[str, Any]:
    """Answers and texts of the model as it is now; without texts, an ``error`` beside the answers
    if they cannot be written.

    Args:
        written: The texts, if they have been written already.
    """
    found: dict[str, Any] = {
        "answers": [a.to_dict() for a in answers(model, case, setting.metrics)]
    }
    if not setting.texts:
        return found
    try:
        texts = measure_texts(
            model, case, setting.texts, setting.text_length, setting.seed, written
        )  # fmt: skip
    except Exception as error:
        if not is_failure(error):
            raise
        return found | {"error": f"texts: {reason(error)}"}
    return found | {"texts": texts}


class Executor(Protocol):
    """Runs jobs somewhere; records may come in any order."""

    @property
    def device(self) -> str:
        """Kind of device that its models are on, which results are of."""
        ...

    def run(
        self, jobs: Iterable[Job], setting: Setting
    ) -> Iterator[tuple[Job, Case, dict[str, Any]]]:
        """A record for each missing case of each job."""
        ...


class JobRunner:
    """One job after another, on one model; those of the same cases share values.

    Args:
        model: The unedited model.
        setting: What all units have in common.
    """

    def __init__(self, model: LensModel, setting: Setting) -> None:
        self.model, self.setting = model, setting
        self._cases: tuple[Case, ...] | None = None
        self._store = ValueStore()

    def run(self, job: Job) -> Iterator[tuple[Case, dict[str, Any]]]:
        """As :func:`run_job`."""
        if job.cases != self._cases:  # what is stored is of no use any more
            self._cases, self._store = job.cases, ValueStore()
        return run_job(self.model, job, self.setting, self._store)


class LocalExecutor:
    """One job after another, in this process."""

    def __init__(self, model: LensModel) -> None:
        self.model = model

    @property
    def device(self) -> str:
        """Kind of device of the model."""
        return self.model.device.type

    def run(
        self, jobs: Iterable[Job], setting: Setting
    ) -> Iterator[tuple[Job, Case, dict[str, Any]]]:
        """A record for each missing case of each job."""
        runner = JobRunner(self.model, setting)
        for job in jobs:
            for case, record in runner.run(job):
                yield job, case, record
