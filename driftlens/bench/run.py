"""A run: what is missing of cases x arms, each finished unit kept at once."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from driftlens.bench.arms import Arm
from driftlens.bench.results import CASES, PLAN, UNITS, BenchResult
from driftlens.bench.units import (
    CASES_AT_ONCE,
    Executor,
    Job,
    LocalExecutor,
    Setting,
    identity,
    parts,
)
from driftlens.cases import Case
from driftlens.errors import DataError, ModelError, RequestError
from driftlens.journal import Journal
from driftlens.models import LensModel
from driftlens.readers import check_case
from driftlens.records import versions, write_result
from driftlens.weights import RESET


def run_bench(
    model: LensModel,
    cases: Sequence[Case],
    arms: Sequence[Arm],
    out: str | os.PathLike[str],
    *,
    setting: Setting | None = None,
    executor: Executor | None = None,
    cases_at_once: int = CASES_AT_ONCE,
    retry_failed: bool = False,
    command: str = "",
    progress: bool = True,
) -> BenchResult:
    """Run what is missing of cases x arms, and read the folder's results.

    Args:
        model: The unedited model.
        cases: The cases; each is edited alone.
        arms: The conditions (:func:`make_arms`).
        out: Folder of results; made if it is not there.
        setting: What is asked, and the seed.
        executor: Where jobs run; by default in this process.
        cases_at_once: Cases whose values are searched in shared passes.
        retry_failed: Try cases again that failed before.
        command: How to run this again, for the record.
        progress: Whether to show a bar with the time to go.

    Raises:
        RequestError: If there is nothing to run, or nothing is asked; if two arms or cases have
            one name; if an arm has no such hyperparameters; if a case could not be read back from
            its file; or if texts have no beginnings, or are to be longer than the model's context.
        ModelError: If an edit is applied to the model, or its weights changed on the way; if an
            arm edits a layer that is not there.
        DataError: If the folder cannot be written, or another run is writing to it.
    """
    setting = Setting() if setting is None else setting
    _check(model, cases, arms)
    arms = [arm.settled(model) for arm in arms]
    _check_asked(model, cases, setting)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        held = lock.acquire(timeout=0)
    except Timeout:
        raise DataError(
            f"Another run is writing to {folder}.", "Wait for it, or choose another folder."
        ) from None
    except OSError as error:
        raise DataError(
            f"The folder {folder} cannot be written to: {error.strerror or error}."
        ) from error
    with held:
        run = LocalExecutor(model) if executor is None else executor
        known = model.identity() | {"device": run.device}
        units = {
            (case.id, arm.name): identity(known, case, arm, setting)
            for arm in arms
            for case in cases
        }
        made_by = versions()
        _write_plan(folder, model, cases, arms, units, setting, command, made_by)
        journal = Journal(folder / UNITS)
        journal.warn_of_other_versions(units.values(), made_by, stacklevel=3)
        missing = {
            key for key, unit in units.items() if not journal.is_finished(unit, retry_failed)
        }
        jobs = _jobs(parts(model, cases, cases_at_once), arms, missing)
        bar = tqdm(total=len(units), initial=len(units) - len(missing), desc="bench",
                   unit="unit", disable=not progress)  # fmt: skip
        with bar:
            for job, case, record in run.run(jobs, setting):
                journal.add(units[case.id, job.arm.name], **record, versions=made_by)
                bar.update()
                bar.set_postfix_str(job.arm.name, refresh=False)
    return BenchResult(folder)


def _check(model: LensModel, cases: Sequence[Case], arms: Sequence[Arm]) -> None:
    if model.weights.is_edited:
        raise ModelError(
            "An edit is applied to the model.", f"Run the benchmark outside of it; {RESET}."
        )
    if not cases or not arms:
        raise RequestError(f"There are {len(cases)} cases and {len(arms)} arms.", "Give some.")
    for what, names in (("cases", [c.id for c in cases]), ("arms", [a.name for a in arms])):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RequestError(f"Two {what} are called {twice[0]!r}.", "Give each its own name.")
    for case in cases:
        check_case(case)


def _check_asked(model: LensModel, cases: Sequence[Case], setting: Setting) -> None:
    """What a setting asks must be there, before hours are spent on edits."""
    if not setting.metrics and not setting.texts:
        raise RequestError("Nothing is asked of the cases.", "Give metrics, or measures of texts.")
    if "FL" in setting.texts and not any(case.generation for case in cases):
        raise RequestError(
            "No case has beginnings of texts (generation), so that FL cannot be told.",
            "Give some; driftlens.cases.with_beginnings adds the project's own.",
        )
    if "reference" in setting.texts and not any(c.generation and c.references for c in cases):
        warnings.warn("No case has references to compare texts with.", stacklevel=3)
    length = setting.text_length
    if setting.texts and length > model.info.n_ctx:
        raise RequestError(
            f"Texts of {length} tokens are longer than the {model.info.n_ctx} of "
            f"{model.info.name}.",
            "Give a smaller text_length.",
        )


def _jobs(
    together: Iterable[tuple[Case, ...]], arms: Sequence[Arm], missing: set[tuple[str, str]]
) -> Iterator[Job]:
    """Part by part of the cases, so that a stopped run has something of every arm."""
    for part in together:
        for arm in arms:
            wanted = frozenset(case.id for case in part if (case.id, arm.name) in missing)
            if wanted:
                yield Job(arm, part, wanted)


def _write_plan(
    folder: Path,
    model: LensModel,
    cases: Sequence[Case],
    arms: Sequence[Arm],
    units: Mapping[tuple[str, str], dict[str, Any]],
    setting: Setting,
    command: str,
    made_by: Mapping[str, str],
) -> None:
    plan = {
        "model": model.info.to_dict(),
        "arms": [{"name": arm.name, **arm.to_dict()} for arm in arms],
        "setting": asdict(setting),
        "command": command,
        "versions": {**made_by, "threads": torch.get_num_threads()},
        "units": [
            {"case": case, "arm": arm, "identity": unit} for (case, arm), unit in units.items()
        ],
    }
    lines = [json.dumps(case.to_record(), ensure_ascii=False) for case in cases]
    write_result(folder / CASES, "\n".join(lines) + "\n")
    write_result(folder / PLAN, json.dumps(plan, indent=1) + "\n")
