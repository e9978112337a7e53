"""Benchmark cases: one edit, and what is asked before and after it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from driftlens.errors import DataError, RequestError
from driftlens.facts import SLOT, EditRequest, occurrences

Metric = Literal["ES", "PS", "NS", "RS", "DNS"]
METRICS: tuple[Metric, ...] = ("ES", "PS", "NS", "RS", "DNS")
"""Success on the edited prompt, its paraphrases, neighbours (other subjects), relations (of the
edited subject), and neighbours behind the edited sentence."""


@dataclass(frozen=True)
class Probe:
    """One prompt and the two answers that are compared.

    Args:
        metric: What it counts for.
        prompt: Without its answer.
        right: The answer that should be likelier after the edit.
        wrong: The other.
    """

    metric: Metric
    prompt: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Case:
    """One edit and its probes.

    Args:
        id: Of its source and number.
        request: The edit.
        paraphrases: Prompts that ask for the same fact in other words.
        neighbours: (prompt, answer) about other subjects with the same true answer.
        relations: (prompt, answer) about the edited subject.
    """

    id: str
    request: EditRequest
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    relations: tuple[tuple[str, str], ...] = ()

    def probes(self) -> list[Probe]:
        """Everything that is asked (paper section 3; the metrics' usual definitions)."""
        new, true = self.request.target_new, self.request.target_true or ""
        edited = f"{self.request.text} {new}."
        return [
            Probe("ES", self.request.text, new, true),
            *(Probe("PS", prompt, new, true) for prompt in self.paraphrases),
            *(Probe("NS", prompt, answer, new) for prompt, answer in self.neighbours),
            *(Probe("RS", prompt, answer, new) for prompt, answer in self.relations),
            *(Probe("DNS", f"{edited} {p}", answer, new) for p, answer in self.neighbours),
        ]

    def draw(self) -> float:
        """A number from 0 to 1 that depends on the edit alone, to split cases by."""
        text = f"{self.request.prompt}|{self.request.subject}|{self.request.target_new}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


TUNING_SHARE = 0.25
"""Of the cases, for choosing hyperparameters; the others are for what is reported."""


def tuning_split(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Cases to tune on, and cases to report."""
    tuning = [case for case in cases if case.draw() < TUNING_SHARE]
    return tuning, [case for case in cases if case.draw() >= TUNING_SHARE]


def balanced(cases: Sequence[Case], n: int) -> list[Case]:
    """About ``n`` cases in a random but fixed order, half with neighbours, half with relations,
    as far as there are such."""
    ordered = sorted(cases, key=lambda case: hashlib.sha256(case.id.encode()).digest())
    with_neighbours = [case for case in ordered if case.neighbours]
    with_relations = [case for case in ordered if case.relations and not case.neighbours]
    half = min((n + 1) // 2, len(with_neighbours))
    others = with_relations[: n - half]
    chosen = {case.id for case in [*with_neighbours[: n - len(others)], *others]}
    return [case for case in ordered if case.id in chosen]


def read_merged(path: str | os.PathLike[str]) -> list[Case]:
    """Cases of the paper's merged CounterFact and WikiData file.

    Raises:
        DataError: If the file cannot be read, naming the record and the field that is wrong.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"The cases {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"The cases {path} are no JSON: {error}.") from error
    if not isinstance(records, list):
        raise DataError(f"The cases {path} are no list of records.")
    return [_case_of(record, f"{Path(path).stem}-{i}", i) for i, record in enumerate(records)]


def _case_of(record: Any, name: str, number: int) -> Case:
    def fail(field: str, problem: str) -> DataError:
        return DataError(f"Record {number}, {field}: {problem}.")

    if not isinstance(record, dict) or not isinstance(record.get("requested_rewrite"), dict):
        raise fail("requested_rewrite", "there is none")
    rewrite = record["requested_rewrite"]
    texts = {}
    for field in ("prompt", "subject", "target_new", "target_true"):
        if not isinstance(rewrite.get(field), str) or not rewrite[field].strip():
            raise fail(field, f"{rewrite.get(field)!r} is no text")
        texts[field] = rewrite[field].strip()
    starts = occurrences(texts["prompt"], texts["subject"])
    if len(starts) != 1:
        raise fail("prompt", f"it holds the subject {len(starts)} times instead of once")
    before, after = texts["prompt"][: starts[0]], texts["prompt"][starts[0] :]
    template = before + SLOT + after[len(texts["subject"]) :]
    try:
        request = EditRequest(template, texts["subject"], texts["target_new"], texts["target_true"])
    except RequestError as error:
        raise fail("requested_rewrite", error.problem.rstrip(".")) from error

    def pairs(group: str) -> Iterator[tuple[str, str]]:
        entry = record.get(group)
        if entry is None:
            return
        prompts, targets = (
            entry.get(key) if isinstance(entry, dict) else None for key in ("prompts", "targets")
        )
        if not isinstance(prompts, list) or not isinstance(targets, list):
            raise fail(group, "prompts or targets are no list")
        if len(prompts) != len(targets):
            raise fail(group, f"{len(prompts)} prompts and {len(targets)} targets")
        for prompt, target in zip(prompts, targets, strict=True):
            if not all(isinstance(x, str) and x.strip() for x in (prompt, target)):
                raise fail(group, f"{prompt!r} or {target!r} is no text")
            yield prompt.strip(), target.strip()

    return Case(
        name,
        request,
        tuple(prompt for prompt, _ in pairs("p-paraphrase")),
        tuple(pairs("l-neighbor")),
        tuple(pairs("l-relation")),
    )
