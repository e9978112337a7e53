"""Benchmark cases: one edit, and what is asked before and after it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from driftlens.errors import RequestError, check_choice
from driftlens.facts import EditRequest

Metric = Literal[
    "ES", "PS", "NS", "RS", "DNS",
    "alias", "reasoning", "distractor", "distract-relation", "commonsense",
    "distract-commonsense", "lead-neighbour", "lead-relation",
]  # fmt: skip

TextMetric = Literal["FL", "reference", "perplexity"]

TEXT_METRICS: dict[TextMetric, str] = {
    "FL": "fluency: n-gram entropy of texts about the subject, times 100",
    "reference": "likeness of such texts to the case's references, in %",
    "perplexity": "of Wikipedia paragraphs",
}
"""What can be told of text, beside answers to prompts."""

METRICS: tuple[Metric, ...] = ("ES", "PS", "NS", "RS", "DNS")
"""Success on the edited prompt, its paraphrases, neighbours (other subjects), relations (of the
edited subject), and neighbours behind the edited sentence: the SADR paper's main table."""

ALL_METRICS: dict[Metric, str] = {
    "ES": "edit success: the edited prompt",
    "PS": "paraphrase success: the same fact in other words",
    "NS": "neighbourhood: other subjects",
    "RS": "relation: other facts about the edited subject",
    "DNS": "distract neighbourhood: the edited sentence, then a neighbour",
    "alias": "the same fact under another name of the subject",
    "reasoning": "portability: what follows from the new fact",
    "distractor": "a sentence with the edited subject, then another question",
    "distract-relation": "the edited sentence, then a relation",
    "commonsense": "sensible against senseless continuations",
    "distract-commonsense": "the edited sentence, then such a choice",
    "lead-neighbour": "control: an unrelated sentence, then a neighbour",
    "lead-relation": "control: an unrelated sentence, then a relation",
}
"""Everything that can be asked about a case."""

UNRELATED = (
    "The meeting of the committee was held in the hall of the library.",
    "The recipe for the soup is printed on the back of the box.",
    "The price of the ticket depends on the day of the week.",
    "The color of the curtain in the bedroom is green.",
    "The owner of the bicycle works at the bakery on the corner.",
    "The second chapter of the manual is about the brakes.",
    "The path through the garden was covered with leaves.",
    "The winner of the school chess tournament received a book.",
)
"""Sentences in front of the control prompts; each case has one of them."""


BEGINNINGS = (
    "{} is best known for",
    "Most of what is written about {} says that",
    "When people talk about {}, they",
)
"""Beginnings of texts about a subject, for data that brings none (:func:`with_beginnings`)."""


@dataclass(frozen=True)
class Probe:
    """One prompt and the two answers that are compared.

    Args:
        metric: What it counts for.
        prompt: Without its answer.
        right: The answer that should be likelier after the edit.
        wrong: The other; ``None`` where there is nothing to compare with.
    """

    metric: Metric
    prompt: str
    right: str
    wrong: str | None


class Cloze(NamedTuple):
    """A prompt to complete, and its true answer."""

    prompt: str
    answer: str


class Commonsense(NamedTuple):
    """A prompt with a sensible and a senseless continuation."""

    prompt: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Case:
    """One edit and what is asked about it.

    Args:
        id: Of its source and number.
        request: The edit.
        paraphrases: Prompts that ask for the same fact in other words.
        neighbours: About other subjects, mostly with the same relation.
        relations: About the edited subject, other relations.
        aliases: Prompts that ask for the same fact under another name of the subject, with the
            answer: the new target, or what it is called there.
        reasoning: What follows from the new fact, with the answers that then hold.
        distractors: A sentence with the edited subject, then a question about something else.
        generation: Beginnings of texts about the subject.
        commonsense: About nothing of the kind.
        category: Of the fact, where the source has some.
        references: Texts of the kind that the new fact would lead to, e.g. about other subjects
            of which it is true.
    """

    id: str
    request: EditRequest
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Cloze, ...] = ()
    relations: tuple[Cloze, ...] = ()
    aliases: tuple[Cloze, ...] = ()
    reasoning: tuple[Cloze, ...] = ()
    distractors: tuple[Cloze, ...] = ()
    generation: tuple[str, ...] = ()
    commonsense: tuple[Commonsense, ...] = ()
    category: str = ""
    references: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The edit, and how many prompts there are of each kind."""
        counts = {
            name: len(value) for name, value in vars(self).items() if isinstance(value, tuple)
        }
        return {"id": self.id, "category": self.category, **self.request.to_dict(), **counts}

    def to_record(self) -> dict[str, Any]:
        """JSON-ready, in the project's own format, which :func:`~driftlens.readers.read_cases`
        reads back."""
        asked = ("neighbours", "relations", "distractors", "reasoning")
        new = self.request.target_new
        return {
            "id": self.id,
            **({"category": self.category} if self.category else {}),
            **{name: value for name, value in self.request.to_dict().items() if value is not None},
            "paraphrases": list(self.paraphrases),
            **{
                "neighbors" if name == "neighbours" else name: [
                    query._asdict() for query in getattr(self, name)
                ]
                for name in asked
            },
            "aliases": [
                alias.prompt if alias.answer == new else alias._asdict() for alias in self.aliases
            ],
            "generation": list(self.generation),
            **({"references": list(self.references)} if self.references else {}),
            "commonsense": [choice._asdict() for choice in self.commonsense],
        }

    def probes(self, metrics: Collection[Metric] = METRICS, separator: str = " ") -> list[Probe]:
        """What is asked (paper section 3; the benchmarks' usual definitions).

        Args:
            metrics: Which of `ALL_METRICS`.
            separator: What stands between the edited prompt and the new target, and between a
                sentence in front and the prompt: that of the model that is asked
                (``model.tokens.separator``).

        Raises:
            RequestError: If one is none of them.
        """
        check_metrics(metrics, ALL_METRICS)
        new, true = self.request.target_new, self.request.target_true
        edited = f"{self.request.text}{separator}{new}.{separator}"
        lead = UNRELATED[int(self.draw() * 2**32) % len(UNRELATED)] + separator
        everything = [
            Probe("ES", self.request.text, new, true),
            *(Probe("PS", prompt, new, true) for prompt in self.paraphrases),
            *(Probe("NS", prompt, answer, new) for prompt, answer in self.neighbours),
            *(Probe("RS", prompt, answer, new) for prompt, answer in self.relations),
            *(Probe("DNS", edited + p, answer, new) for p, answer in self.neighbours),
            *(Probe("alias", prompt, answer, true) for prompt, answer in self.aliases),
            *(Probe("reasoning", prompt, answer, true) for prompt, answer in self.reasoning),
            *(Probe("distractor", prompt, answer, new) for prompt, answer in self.distractors),
            *(Probe("distract-relation", edited + p, a, new) for p, a in self.relations),
            *(Probe("commonsense", *choice) for choice in self.commonsense),
            *(Probe("distract-commonsense", edited + p, *two) for p, *two in self.commonsense),
            *(Probe("lead-neighbour", lead + p, a, new) for p, a in self.neighbours),
            *(Probe("lead-relation", lead + p, a, new) for p, a in self.relations),
        ]
        return [probe for probe in everything if probe.metric in metrics]

    def draw(self) -> float:
        """A number from 0 to 1 that depends on the edit alone, to split cases by."""
        text = f"{self.request.prompt}|{self.request.subject}|{self.request.target_new}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def check_metrics(metrics: Collection[str], known: Collection[str]) -> None:
    """Raise `RequestError` if a metric is none of those that are known."""
    for metric in metrics:
        check_choice("A metric", metric, known)


def with_beginnings(cases: Sequence[Case]) -> list[Case]:
    """Cases whose texts can be measured: as they are, or, if none of them has a ``generation``
    prompt, each with `BEGINNINGS` about its subject."""
    if any(case.generation for case in cases):
        return list(cases)
    return [
        replace(case, generation=tuple(b.replace("{}", case.request.subject) for b in BEGINNINGS))
        for case in cases
    ]


TUNING_SHARE = 0.25
"""Of the cases, for choosing hyperparameters; the others are for what is reported."""


def tuning_split(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Cases to tune on, and cases to report."""
    tuning = [case for case in cases if case.draw() < TUNING_SHARE]
    return tuning, [case for case in cases if case.draw() >= TUNING_SHARE]


def balanced(cases: Sequence[Case], n: int) -> list[Case]:
    """About ``n`` cases in a random but fixed order, half with neighbours, half with relations,
    as far as there are such; others where there are not.

    Raises:
        RequestError: If ``n`` is not positive.
    """
    if n < 1:
        raise RequestError(f"{n} cases are asked for.", "Give at least 1.")
    ordered = sorted(cases, key=lambda case: hashlib.sha256(case.id.encode()).digest())
    with_neighbours = [case for case in ordered if case.neighbours]
    with_relations = [case for case in ordered if case.relations and not case.neighbours]
    rest = [case for case in ordered if not case.relations and not case.neighbours]
    half = min((n + 1) // 2, len(with_neighbours))
    others = with_relations[: n - half]
    first = [*with_neighbours[: n - len(others)], *others]
    chosen = {case.id for case in [*first, *rest[: n - len(first)]]}
    return [case for case in ordered if case.id in chosen]


def without_edited_facts(cases: Sequence[Case]) -> list[Case]:
    """Cases that are edited in one model, without the neighbours, relations and distractors that
    ask for what another of these edits changes: that their answers change is no damage.

    A prompt asks for it if it is the other's prompt or one of its paraphrases, or if it holds the
    other's subject and its answer is what was true of that.
    """
    edited: dict[str, set[str]] = {}
    subjects: dict[str, set[tuple[str, str]]] = {}
    for case in cases:
        for prompt in (case.request.text, *case.paraphrases):
            edited.setdefault(prompt, set()).add(case.id)
        true = (case.request.target_true or "").strip().casefold()
        subjects.setdefault(true, set()).add((case.id, case.request.subject))

    def asks_for_another(case: Case, cloze: Cloze) -> bool:
        if edited.get(cloze.prompt, set()) - {case.id}:
            return True
        known = subjects.get(cloze.answer.strip().casefold(), set())
        return any(name != case.id and subject in cloze.prompt for name, subject in known)

    def left(case: Case, asked: Sequence[Cloze]) -> tuple[Cloze, ...]:
        return tuple(cloze for cloze in asked if not asks_for_another(case, cloze))

    return [
        replace(
            case,
            neighbours=left(case, case.neighbours),
            relations=left(case, case.relations),
            distractors=left(case, case.distractors),
        )
        for case in cases
    ]
