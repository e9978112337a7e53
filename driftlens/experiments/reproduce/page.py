"""One page with the figures and paragraphs of all experiments, without a server or network."""

from __future__ import annotations

from collections.abc import Sequence

from driftlens.documents import Section, TableOf, document
from driftlens.experiments.reproduce.finding import Finding, Study


def page(study: Study, findings: Sequence[Finding]) -> str:
    """HTML of the findings."""
    info = study.model.info
    quick = " A quick run: numbers are not for conclusions." if study.quick else ""
    sections = [
        Section(
            finding.name,
            finding.title,
            texts=[finding.paragraph],
            aside=f"The paper: {finding.paper}",
            figures=[finding.figure],
            tables=[TableOf("Numbers", finding.rows, folded=True)],
        )
        for finding in findings
    ]
    return document(
        f"Attention drift in {info.name}",
        [f"{len(study.cases)} cases, {info.weights}.{quick}"],
        study.command,
        sections,
    )
