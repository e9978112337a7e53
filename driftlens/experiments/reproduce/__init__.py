"""The paper's experiments, and its reviewers' questions, on any model.

Each experiment is one function from a :class:`Study` to a :class:`Finding`: numbers, a figure, and
what these say, computed from them, beside what the paper reports. ``editors.py`` holds
those that ask edited models, ``inside.py`` those that look into them, ``single_heads.py`` one
head at a time, ``cure.py`` what SADR takes off the drift, ``strength.py`` edits that are equally
strong, ``cost.py`` time and memory, ``sequential.py`` edits that pile up. To add one, write such a
function and name it in EXPERIMENTS.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from driftlens.errors import RequestError
from driftlens.experiments.reproduce.cost import cost
from driftlens.experiments.reproduce.cure import cure
from driftlens.experiments.reproduce.editors import (
    fig6,
    fig7,
    fluency,
    rivals,
    rules,
    steps,
    table1,
    table3,
)
from driftlens.experiments.reproduce.finding import Finding, Study, recorded
from driftlens.experiments.reproduce.inside import fig3, fig4, fig5
from driftlens.experiments.reproduce.page import page
from driftlens.experiments.reproduce.sequential import sequential
from driftlens.experiments.reproduce.single_heads import heads
from driftlens.experiments.reproduce.strength import strength
from driftlens.records import write_result

EXPERIMENTS: dict[str, Callable[[Study], Finding]] = {
    "table1": table1,
    "table3": table3,
    "fluency": fluency,
    "fig3": fig3,
    "fig4": fig4,
    "fig5": fig5,
    "heads": heads,
    "fig6": fig6,
    "fig7": fig7,
    "steps": steps,
    "strength": strength,
    "cure": cure,
    "cost": cost,
    "rules": rules,
    "rivals": rivals,
    "sequential": sequential,
}

OF_ONE_EDITOR = ("fig3", "fig4", "fig5", "heads", "fig6", "rules", "rivals")
"""Experiments that take the study's editor."""

__all__ = ["EXPERIMENTS", "OF_ONE_EDITOR", "Finding", "Study", "known_names", "reproduce"]


def known_names(names: Sequence[str]) -> list[str]:
    """Names of experiments, each once; ``"all"`` stands for all of them.

    Raises:
        RequestError: If there is no such experiment.
    """
    for name in names:
        if name not in (*EXPERIMENTS, "all"):
            raise RequestError(
                f"There is no experiment {name!r}.", f"Choose all, or of {', '.join(EXPERIMENTS)}."
            )
    return list(EXPERIMENTS) if "all" in names else list(dict.fromkeys(names))


def reproduce(study: Study, names: Sequence[str] = ("all",)) -> list[Finding]:
    """Run experiments; write ``NAME.json`` of each when it is done, and ``index.html`` with all
    that are in the folder, earlier calls' on this model too.

    Args:
        study: The model, the cases, and where results go.
        names: Of `EXPERIMENTS`, or ``"all"``.

    Raises:
        RequestError: If there is no such experiment; after all the others, if one cannot be made
            with these cases.
        DataError: If results cannot be written.
    """
    findings = []
    refused: dict[str, RequestError] = {}
    for name in known_names(names):
        started = time.monotonic()
        try:
            finding = EXPERIMENTS[name](study)
        except RequestError as error:
            refused[name] = error
            continue
        finding.save(study, time.monotonic() - started)
        findings.append(finding)
        shown = [found for known in EXPERIMENTS if (found := recorded(study, known)) is not None]
        write_result(study.out / "index.html", page(study, shown))
    if refused:
        problems = " ".join(f"{name}: {error.problem}" for name, error in refused.items())
        first, *_ = refused.values()
        remedies = [first.remedy, *([f"The others are in {study.out}."] if findings else [])]
        raise RequestError(
            f"{', '.join(refused)} cannot be made. {problems}", " ".join(filter(None, remedies))
        ) from first
    return findings
