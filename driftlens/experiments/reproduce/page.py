"""One page with the figures and texts of all experiments, without a server or network."""

from __future__ import annotations

from collections.abc import Sequence

from driftlens.bench.units import content_digest
from driftlens.documents import Section, TableOf, document
from driftlens.experiments.reproduce.finding import Recorded, Study

QUICK = " A quick run: numbers are not for conclusions."


def page(study: Study, findings: Sequence[Recorded]) -> str:
    """HTML of what is in the study's folder; what an earlier call found otherwise says so."""
    info = study.model.info
    sections = [
        Section(
            str(found.record["name"]),
            str(found.record["title"]),
            texts=[str(found.record["text"]), *_earlier(study, found)],
            points=found.record["points"],
            aside=f"The paper: {found.record['paper']}",
            figures=[] if found.figure is None else [found.figure],
            tables=[TableOf("Numbers", found.rows, folded=True)],
        )
        for found in findings
    ]
    return document(
        f"Attention drift in {info.name}",
        [f"{study.label}: {len(study.cases)} cases, {info.weights}.{QUICK if study.quick else ''}"],
        study.command,
        sections,
    )


def _earlier(study: Study, found: Recorded) -> list[str]:
    """How a finding was made, if not like this call's."""
    record = found.record
    setting = [record[name] for name in ("content", "quick", "seed", "data")]
    same = setting == [content_digest(study.cases), study.quick, study.seed, study.label]
    if same and record.get("plans", {}) == study.planned:
        return []
    quick = QUICK if record["quick"] else ""
    of = f"{len(record['cases'])} cases ({record['data']})"
    return [f"Of an earlier call, on {of}: {record['command']}.{quick}"]
