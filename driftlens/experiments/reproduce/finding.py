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
from driftlens.bench.arms import planned_config, planned_sadr, sadr_of
from driftlens.bench.units import content_digest
from driftlens.cases import Case, with_beginnings
from driftlens.editing.config_files import EditPlan
from driftlens.editing.defaults import known_gamma, sadr_gamma
from driftlens.editing.sadr import SADR
from driftlens.edits import Edit
from driftlens.errors import RequestError
from driftlens.journal import digest
from driftlens.models import LensModel
from driftlens.records import plain, result_json, versions, write_result

Failure = tuple[str, str, str]
"""Arm, case and reason."""
KEPT_BYTES = 2**30
"""What edits may take that are kept for the next experiment; those of fine-tuning are whole
matrices."""


@dataclass(frozen=True)
class Study:
    """What all experiments of one call share.

    Args:
        model: The unedited model.
        cases: Held back from tuning.
        out: Folder of results, a string or a path; finished units in it are not done again.
        data: How tables call the cases.
        quick: Fewer conditions, to see that everything runs.
        retry_failed: Try again what failed before.
        seed: Of the sampled contexts.
        progress: Whether to show bars.
        command: How to run this again, for the record.
        method: The editor of the experiments that take one: figures 3 to 6, ``heads``, ``rules``,
            ``rivals``.
        plans: By editor, hyperparameters to take instead of the model's defaults, and SADR instead
            of that with the model's gamma (:func:`~driftlens.read_config`).

    Raises:
        RequestError: If there are no cases, or a plan holds another penalty than one SADR.
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
    plans: Mapping[str, EditPlan] = field(default_factory=dict)
    _edits: dict[str, dict[str, Edit | Exception]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        for method, plan in self.plans.items():
            if plan.penalties and (len(plan.penalties) > 1 or sadr_of(plan) is None):
                raise RequestError(
                    f"The plan of {method} has other penalties than SADR.",
                    "Leave them out: experiments choose which penalties they compare.",
                )
        if not self.cases:
            raise RequestError(
                "There are no cases.",
                "Give some that were held back, with neighbours or relations.",
            )

    @property
    def label(self) -> str:
        """What tables call the cases; with the editor, unless it is the paper's own choice, and
        with the editors whose hyperparameters are not the model's defaults."""
        found = [self.data]
        if self.method != "rome":
            found.append(f"edits of {self.method}")
        if self.plans:
            found.append(f"own settings of {' and '.join(sorted(self.plans))}")
        return ", ".join(found)

    @property
    def planned(self) -> dict[str, Any]:
        """The plans, JSON-ready."""
        found: dict[str, Any] = plain(
            {method: plan.to_dict() for method, plan in self.plans.items()}
        )
        return found

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
        cases; made once for all experiments, as far as memory does (`KEPT_BYTES`).

        Args:
            case: One of the study's.
            arm: Which edit; by default that of the study's editor.

        Raises:
            DriftLensError: If it cannot be made.
            torch.OutOfMemoryError: If memory does not do for it.
        """
        arm = self.editor if arm is None else arm
        made = self._edits.setdefault(digest(arm.to_dict()), {})
        if case.id not in made:
            if _bytes(self._edits) > KEPT_BYTES:
                self._edits.clear()
                made = self._edits.setdefault(digest(arm.to_dict()), {})
            together = next(part for part in parts(self.model, self.cases) if case in part)
            for one, edit in edits_of(self.model, arm, together, self.seed):
                made[one.id] = edit
        found = made[case.id]
        if isinstance(found, Exception):
            raise found
        return found

    def config(self, method: str) -> Any:
        """The hyperparameters of an editor: those of its plan, or the model's."""
        return planned_config(self.model, method, self.plans)

    def sadr(self, method: str) -> SADR:
        """SADR with an editor: that of its plan, or with the model's gamma."""
        return planned_sadr(self.model, method, self.plans)

    def untuned(self, methods: Sequence[str]) -> str:
        """A warning for editors whose strength of SADR nobody has searched for on the model; for
        the end of a text."""
        unknown = [
            method
            for method in methods
            if sadr_of(self.plans.get(method)) is None and known_gamma(self.model, method) is None
        ]
        if not unknown:
            return ""
        return (
            f" No strength of SADR is known for {', '.join(unknown)} on {self.model.info.name}: "
            f"{sadr_gamma(self.model, unknown[0]):g} is taken, GPT-J's, which may be far from the "
            "best."
        )

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
        return make_arms(self.model, methods, penalties, self.plans)


def _bytes(edits: Mapping[str, Mapping[str, Edit | Exception]]) -> int:
    return sum(
        tensor.nbytes
        for own in edits.values()
        for edit in own.values()
        if isinstance(edit, Edit)
        for delta in edit.deltas.values()
        for tensor in delta.tensors().values()
    )


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
        greedy: And the share of prompts, in per cent, whose right answer greedy decoding gives.
        seconds: What all that was measured took, in this call or earlier ones; ``None`` if that
            is not known.
        cases: Those that were asked, if they are not all of the study's.
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
    greedy: pd.DataFrame = field(default_factory=pd.DataFrame)
    seconds: float | None = None
    cases: Sequence[Case] | None = None

    @property
    def summary(self) -> str:
        """The text, and what is missing."""
        if not self.failed:
            return self.text
        arm, case, reason = self.failed[0]
        return f"{self.text} {len(self.failed)} failed; the first, {arm} on {case}: {reason}"

    def to_dict(self, study: Study, seconds: float) -> dict[str, Any]:
        """JSON-ready: how it was made, and the numbers."""
        cases = study.cases if self.cases is None else self.cases
        return {
            "name": self.name,
            "title": self.title,
            "text": self.summary,
            "points": list(self.points),
            "paper": self.paper,
            "model": study.model.info.to_dict(),
            "fingerprint": study.model.fingerprint(),
            "data": study.label,
            "cases": [case.id for case in cases],
            "content": content_digest(study.cases),
            "quick": study.quick,
            "seed": study.seed,
            "plans": study.planned,
            "command": study.command,
            "seconds_of_last_run": round(seconds),
            "seconds_in_all": None if self.seconds is None else round(self.seconds),
            "versions": versions(),
            "arms": list(self.arms),
            "failed": [{"arm": a, "case": c, "reason": r} for a, c, r in self.failed],
            "rows": plain(self.rows.to_dict("records")),
            "differences": list(self.differences),
            "probabilities": plain(self.probabilities.to_dict("records")),
            "greedy": plain(self.greedy.to_dict("records")),
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
