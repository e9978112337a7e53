"""What an experiment is given, and what it gives: numbers, a figure, and what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from driftlens.bench import (
    Arm,
    BenchResult,
    Setting,
    edits_of,
    make_arms,
    parts,
    run_bench,
)
from driftlens.bench.units import content_digest
from driftlens.cases import Case, with_beginnings
from driftlens.edits import Edit
from driftlens.errors import RequestError
from driftlens.models import LensModel
from driftlens.records import plain, result_json, versions, write_result

Failure = tuple[str, str, str]
"""Arm, case and reason."""


@dataclass(frozen=True)
class Study:
    """What all experiments of one call share.

    Args:
        model: The unedited model.
        cases: Held back from tuning.
        out: Folder of results; finished units in it are not done again.
        data: How tables call the cases.
        quick: Fewer conditions, to see that everything runs.
        retry_failed: Try again what failed before.
        seed: Of the sampled contexts.
        progress: Whether to show bars.
        command: How to run this again, for the record.
        method: The editor of the experiments that take one: figures 3 to 6, ``heads``, ``rules``,
            ``rivals``.

    Raises:
        RequestError: If there are no cases.
    """

    model: LensModel
    cases: Sequence[Case]
    out: Path
    data: str = "given cases"
    quick: bool = False
    seed: int = 0
    retry_failed: bool = False
    progress: bool = True
    command: str = ""
    method: str = "rome"
    _edits: dict[tuple[str, str], Edit | Exception] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.cases:
            raise RequestError(
                "There are no cases.",
                "Give some that were held back, with neighbours or relations.",
            )

    @property
    def label(self) -> str:
        """What tables call the cases; with the editor, unless it is the paper's own choice."""
        return self.data if self.method == "rome" else f"{self.data}, edits of {self.method}"

    @property
    def editor(self) -> Arm:
        """The study's editor with the model's defaults."""
        return self.arms((self.method,))[1]

    @property
    def editors(self) -> list[dict[str, Any]]:
        """The study's editor, for the record."""
        return [{"name": self.editor.name, **self.editor.to_dict()}]

    def edit(self, case: Case, arm: Arm | None = None) -> Edit:
        """The edit of one of the cases as :meth:`bench` makes it: together with some of the other
        cases; made once for all experiments.

        Args:
            case: One of the study's.
            arm: Which edit; by default that of the study's editor.

        Raises:
            DriftLensError: If it cannot be made.
            torch.OutOfMemoryError: If memory does not do for it.
        """
        arm = self.editor if arm is None else arm
        if (arm.name, case.id) not in self._edits:
            together = next(part for part in parts(self.model, self.cases) if case in part)
            for one, made in edits_of(self.model, arm, together, self.seed):
                self._edits[arm.name, one.id] = made
        found = self._edits[arm.name, case.id]
        if isinstance(found, Exception):
            raise found
        return found

    def bench(self, arms: Sequence[Arm]) -> BenchResult:
        """Results of some arms, by all metrics. All experiments write to one folder, so that
        conditions which they have in common are run once."""
        return self._run(self.cases, arms, "bench", Setting(seed=self.seed))

    def texts(self, arms: Sequence[Arm]) -> BenchResult:
        """Fluency (FL) of what the model writes under some arms, of the cases with beginnings of
        texts, if quick of two only. In a folder of their own: texts take longer than answers."""
        cases = with_beginnings(self.cases[:2] if self.quick else self.cases)
        cases = [case for case in cases if case.generation]
        setting = Setting((), self.seed, texts=("FL",), text_length=60 if self.quick else 100)
        return self._run(cases, arms, "texts", setting)

    def _run(
        self, cases: Sequence[Case], arms: Sequence[Arm], folder: str, setting: Setting
    ) -> BenchResult:
        return run_bench(
            self.model, cases, arms, self.out / folder, setting=setting,
            retry_failed=self.retry_failed, command=self.command, progress=self.progress,
        )  # fmt: skip

    def arms(self, methods: Sequence[str], penalties: Sequence[str] = ("none",)) -> list[Arm]:
        """The unedited model, and editors with the model's defaults."""
        return make_arms(self.model, methods, penalties)


def in_all(spent: Sequence[float | None]) -> float | None:
    """The sum of seconds; ``None`` if some are not known."""
    known = [seconds for seconds in spent if seconds is not None]
    return sum(known) if len(known) == len(spent) else None


@dataclass(frozen=True)
class Finding:
    """The outcome of one experiment.

    Args:
        name: As on the command line.
        title: What was looked at.
        rows: The numbers.
        figure: Their picture.
        text: What they say, computed from them.
        points: The same in detail, one condition or kind of prompts each.
        paper: What the paper reports.
        arms: Editors and restrictions with their configurations, JSON-ready.
        failed: What failed; the numbers are without it.
        differences: Paired differences in success, with effect sizes, if arms are compared.
        probabilities: The mean probability of the right answer in each row, too.
        seconds: What all that was measured took, in this call or earlier ones; ``None`` if that
            is not known.
    """

    name: str
    title: str
    rows: pd.DataFrame
    figure: go.Figure = field(repr=False)
    text: str
    paper: str
    points: Sequence[str] = ()
    arms: Sequence[Mapping[str, Any]] = ()
    failed: Sequence[Failure] = ()
    differences: Sequence[Mapping[str, Any]] = ()
    probabilities: pd.DataFrame = field(default_factory=pd.DataFrame)
    seconds: float | None = None

    @property
    def summary(self) -> str:
        """The text, and what is missing."""
        if not self.failed:
            return self.text
        arm, case, reason = self.failed[0]
        return f"{self.text} {len(self.failed)} failed; the first, {arm} on {case}: {reason}"

    def to_dict(self, study: Study, seconds: float) -> dict[str, Any]:
        """JSON-ready: how it was made, and the numbers."""
        return {
            "name": self.name,
            "title": self.title,
            "text": self.summary,
            "points": list(self.points),
            "paper": self.paper,
            "model": study.model.info.to_dict(),
            "fingerprint": study.model.fingerprint(),
            "data": study.label,
            "cases": [case.id for case in study.cases],
            "content": content_digest(study.cases),
            "quick": study.quick,
            "seed": study.seed,
            "command": study.command,
            "seconds_of_last_run": round(seconds),
            "seconds_in_all": None if self.seconds is None else round(self.seconds),
            "versions": versions(),
            "arms": list(self.arms),
            "failed": [{"arm": a, "case": c, "reason": r} for a, c, r in self.failed],
            "rows": plain(self.rows.to_dict("records")),
            "differences": list(self.differences),
            "probabilities": plain(self.probabilities.to_dict("records")),
        }

    def save(self, study: Study, seconds: float) -> Path:
        """Write ``NAME.json`` and ``NAME.figure.json`` into the study's folder, atomically.

        Raises:
            DataError: If it cannot be written.
        """
        write_result(study.out / f"{self.name}.figure.json", str(self.figure.to_json()))
        target = study.out / f"{self.name}.json"
        write_result(target, result_json(self.to_dict(study, seconds)))
        return target


@dataclass(frozen=True)
class Recorded:
    """An experiment as its files hold it, of this call or an earlier one.

    Args:
        record: What :meth:`Finding.to_dict` gave.
        figure: The picture; ``None`` if its file is missing.
    """

    record: Mapping[str, Any]
    figure: go.Figure | None = field(repr=False)

    @property
    def rows(self) -> pd.DataFrame:
        """The numbers."""
        return pd.DataFrame(self.record["rows"])


def recorded(study: Study, name: str) -> Recorded | None:
    """An experiment's files in the study's folder; ``None`` if they are not there, are damaged,
    or are of another model."""
    needed = {
        "name", "title", "text", "points", "paper", "rows", "data", "cases", "content", "quick",
        "seed", "command",
    }  # fmt: skip
    try:
        record = json.loads((study.out / f"{name}.json").read_text("utf-8"))
        if record["fingerprint"] != study.model.fingerprint() or needed - set(record):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        figure = pio.from_json((study.out / f"{name}.figure.json").read_text("utf-8"))
    except (OSError, ValueError):
        figure = None
    return Recorded(record, figure)
