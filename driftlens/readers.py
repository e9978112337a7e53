"""Files of benchmark cases, in each format that the field uses, as one type.

:func:`read_cases` is the whole path: bytes, records, a schema that checks a record, a case. A new
format is a model with a method ``case`` in `FORMATS`.
"""

from __future__ import annotations

import codecs
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, overload

import pandas as pd
import pydantic

from driftlens.cases import Case, Cloze, Commonsense
from driftlens.errors import DataError, RequestError
from driftlens.facts import SLOT, EditRequest, occurrences

FormatName = Literal["merged", "counterfact", "knowedit", "zsre", "driftlens"]


@dataclass(frozen=True)
class Skipped:
    """A record that is no case.

    Args:
        record: Its number in the file, from 0.
        field: What is wrong with it, as a path into the record; empty for the record itself.
        reason: Why.
    """

    record: int
    field: str
    reason: str

    def __str__(self) -> str:
        where = f", {self.field}" if self.field else ""
        return f"Record {self.record}{where}: {self.reason}."


class CaseList(Sequence[Case]):
    """Cases of a file, and what was skipped.

    Args:
        cases: In the file's order.
        skipped: Records that are no case.
        source: The file.
        format: Its format.
    """

    def __init__(
        self, cases: Sequence[Case], skipped: Sequence[Skipped], source: Path, format: str
    ) -> None:
        self.cases, self.skipped = tuple(cases), tuple(skipped)
        self.source, self.format = source, format

    @overload
    def __getitem__(self, index: int) -> Case: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Case]: ...

    def __getitem__(self, index: int | slice) -> Case | Sequence[Case]:
        return self.cases[index]

    def __len__(self) -> int:
        return len(self.cases)

    def __repr__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"<{len(self)} cases of {self.source.name} ({self.format}){skipped}>"

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each case: its edit, and how much is asked about it."""
        return pd.DataFrame([case.summary() for case in self.cases])


def read_cases(
    path: str | os.PathLike[str], format: FormatName | None = None, *, strict: bool = True
) -> CaseList:
    """Read a file of benchmark cases: JSON, or JSON lines.

    Args:
        path: The file.
        format: ``"merged"`` (CounterFact and WikiData as the SADR paper merges them),
            ``"counterfact"`` (as ROME's authors publish it), ``"knowedit"`` (KnowEdit's
            WikiData_counterfact and WikiData_recent), ``"zsre"`` (as MEND's and ROME's authors
            publish it) or ``"driftlens"`` (assets/facts.md); ``None`` tells by the first record.
        strict: Refuse a file that holds a record which is no case; ``False`` leaves such records
            out and lists them as ``skipped``.

    Raises:
        DataError: If the file cannot be read, its format is unknown, no record is a case, or,
            if strict, one is not: naming the record and the field.
    """
    source = Path(path)
    numbered = list(_records(source))
    chosen = format if format is not None else _format_of([r for _, r in numbered], source)
    if chosen not in FORMATS:
        raise DataError(
            f"There is no format {chosen!r} of cases.", f"Choose one of {', '.join(FORMATS)}."
        )
    schema = FORMATS[chosen]
    cases: list[Case] = []
    skipped: list[Skipped] = []
    ids: set[str] = set()
    for number, record in numbered:
        try:
            if isinstance(record, _Unreadable):
                raise _NoCase("", record.reason)
            case = _case(schema, record, f"{source.stem}-{number}")
            if case.id in ids:
                raise _NoCase(
                    schema.names, f"the name {case.id!r} stands for an earlier record already"
                )
            cases.append(case)
            ids.add(case.id)
        except _NoCase as problem:
            skipped.append(Skipped(number, problem.field, problem.reason))
            if strict:
                raise DataError(
                    f"{source.name}: {skipped[0]}", "Mend it, or read with strict=False."
                ) from None
    if not cases:
        shown = f" {skipped[0]}" if skipped else ""
        raise DataError(f"No record of {source} is a case.{shown}")
    return CaseList(cases, skipped, source, chosen)


def check_case(case: Case) -> None:
    """Raise `RequestError` unless a case is one that can be written down and read back as it is:
    a case made in Python may have an empty answer, or white space at an end that readers strip."""
    try:
        found = _case(DriftLens, case.to_record(), case.id)
    except _NoCase as problem:
        raise RequestError(
            f"The case {case.id!r} cannot be kept: {problem.field}: {problem.reason}.",
            "Mend that field.",
        ) from None
    for name, value in vars(case).items():
        if getattr(found, name) != value:
            raise RequestError(
                f"The case {case.id!r} cannot be kept as it is: its {name} would be read back "
                "otherwise.",
                "Leave out white space at the ends of texts.",
            )


# --- records ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unreadable:
    reason: str


class _NoCase(Exception):
    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason.rstrip(".")


def _records(source: Path) -> Iterator[tuple[int, Any]]:
    """Numbered records; a line that is no JSON, or no text, is one that cannot be read."""
    try:
        content_bytes = source.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"The cases {source} cannot be read: {error.strerror or error}.") from error
    if source.suffix in (".jsonl", ".ndjson"):
        yield from enumerate(_loads(line) for line in content_bytes.split(b"\n") if line.strip())
        return
    try:
        text = content_bytes.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"The cases {source} are no UTF-8 text: {error.reason}.") from error
    lines = [line for line in text.split("\n") if line.strip()]
    content = _loads(text)
    if isinstance(content, _Unreadable):
        several = [_loads(line) for line in lines]
        if len(several) > 1 and all(isinstance(one, dict) for one in several):
            yield from enumerate(several)  # JSON lines under another name
            return
        raise DataError(f"The cases {source} cannot be read: {content.reason}.")
    if not isinstance(content, list):
        raise DataError(f"The cases {source} are no list of records.")
    yield from enumerate(content)


def _loads(text: str | bytes) -> Any:
    try:
        text = text.decode() if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_named_once)
    except UnicodeDecodeError as error:
        return _Unreadable(f"no UTF-8 text, {error.reason}")
    except ValueError as error:
        return _Unreadable(f"no JSON, {error}")
    except RecursionError:
        return _Unreadable("no JSON, nested too deeply")


def _named_once(fields: list[tuple[str, Any]]) -> dict[Any, Any]:
    """An object of JSON; of fields of one name it would keep the last one only."""
    found: dict[Any, Any] = dict(fields)
    if len(found) < len(fields):
        twice = next(name for name, n in Counter(name for name, _ in fields).items() if n > 1)
        found[_TWICE] = twice
    return found


_TWICE = object()
"""Under this key, which no file can hold, an object tells which field it has more than once."""


def _field_that_stands_twice(value: Any, place: tuple[Any, ...] = ()) -> str | None:
    """In a record, or in anything that it holds, as a path into the record."""
    if isinstance(value, dict):
        if _TWICE in value:
            return ".".join(map(str, (*place, value[_TWICE])))
        inner: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    else:
        return None
    found = (_field_that_stands_twice(part, (*place, name)) for name, part in inner)
    return next(filter(None, found), None)


def _format_of(records: Sequence[Any], source: Path) -> str:
    """By the fields of the first record that has the fields of any format."""
    for record in records:
        for name, schema in FORMATS.items():
            if isinstance(record, dict) and schema.marks <= record.keys():
                return name
    raise DataError(
        f"The format of {source} is unknown.", f"Name it: format= one of {', '.join(FORMATS)}."
    )


def _case(schema: type[_Schema], record: Any, name: str) -> Case:
    twice = _field_that_stands_twice(record)
    if twice is not None:
        raise _NoCase(twice, "it stands there twice")
    try:
        found = schema.model_validate(record).case(name)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        cause = first.get("ctx", {}).get("error")
        raise _NoCase(field, str(cause or first["msg"])) from error
    except RequestError as error:
        raise _NoCase(schema.template, error.problem) from error
    if found.request.target_new == found.request.target_true:
        raise _NoCase(schema.new, "it is the true answer, too: nothing would be edited")
    return found


# --- schemas ----------------------------------------------------------------------------------


def _checked_text(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair") from None
    if not value.strip():
        raise ValueError("it is empty")
    return value.strip()


Text = Annotated[str, pydantic.Field(strict=True), pydantic.AfterValidator(_checked_text)]


def _filled_in(value: str) -> str:
    if SLOT in value:
        raise ValueError(f"it holds {SLOT}, and only the edited prompt is a template")
    return value


Prompt = Annotated[Text, pydantic.AfterValidator(_filled_in)]
"""What is asked as it is."""


class _Schema(pydantic.BaseModel):
    """A record of some format; fields that are not named are not read."""

    marks: ClassVar[frozenset[str]]
    """Fields by which the format is told."""
    template: ClassVar[str] = "prompt"
    """The field of the edited prompt."""
    new: ClassVar[str] = "target_new"
    """The field of the new target."""
    names: ClassVar[str] = ""
    """The field that names a case; none if the file's name and the record's number do."""

    def case(self, name: str) -> Case:
        """The case that the record tells; ``name`` is for those without an id."""
        raise NotImplementedError

    def _request(self, prompt: str, subject: str, new: str, true: str | None) -> EditRequest:
        """From a prompt with the subject in it, exactly once."""
        starts = occurrences(prompt, subject)
        if len(starts) != 1:
            raise _NoCase(
                self.template, f"it holds the subject {len(starts)} times instead of once"
            )
        template = prompt[: starts[0]] + SLOT + prompt[starts[0] + len(subject) :]
        return EditRequest(template, subject, new, true)


def _no_others(record: Any, known: Collection[str], are_prompts: Callable[[str], bool]) -> Any:
    """The record, unless it holds prompts under a name that is not known: they would be left out
    without a word."""
    for name in record if isinstance(record, dict) else ():
        if isinstance(name, str) and are_prompts(name) and name not in known:
            raise ValueError(f"no prompts are called {name!r}; {', '.join(sorted(known))} are")
    return record


def _is_a_group(name: str) -> bool:
    """Whether a field of KnowEdit or zsRE holds prompts, by its name, also if it is misspelt."""
    return name.lower().startswith(("rephras", "paraphras", "portab", "local"))


class _Pairs(pydantic.BaseModel):
    prompts: list[Prompt]
    targets: list[Text]

    @pydantic.model_validator(mode="after")
    def _same_length(self) -> _Pairs:
        if len(self.prompts) != len(self.targets):
            raise ValueError(f"{len(self.prompts)} prompts and {len(self.targets)} targets")
        return self

    def queries(self) -> tuple[Cloze, ...]:
        return tuple(map(Cloze, self.prompts, self.targets))


class _Generation(pydantic.BaseModel):
    prompts: list[Prompt]


class _Commonsense(pydantic.BaseModel):
    prompts: Prompt
    right: Text
    wrong: Text


class _MergedRewrite(pydantic.BaseModel):
    prompt: Text
    subject: Text
    target_new: Text
    target_true: Text


class Merged(_Schema):
    """The SADR paper's file; a prompt has its subject filled in."""

    marks: ClassVar[frozenset[str]] = frozenset({"requested_rewrite"})
    template = "requested_rewrite.prompt"
    new = "requested_rewrite.target_new"

    requested_rewrite: _MergedRewrite
    paraphrase: _Pairs | None = pydantic.Field(None, alias="p-paraphrase")
    alias: _Pairs | None = pydantic.Field(None, alias="p-subject_alias")
    reasoning: _Pairs | None = pydantic.Field(None, alias="p-reasoning")
    neighbor: _Pairs | None = pydantic.Field(None, alias="l-neighbor")
    relation: _Pairs | None = pydantic.Field(None, alias="l-relation")
    generation: _Generation | None = None
    commonsense: _Commonsense | None = pydantic.Field(None, alias="o-commonsense")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_other_prompts(cls, record: Any) -> Any:
        known = {field.alias for field in cls.model_fields.values() if field.alias}
        return _no_others(record, known, lambda name: name[:2] in ("p-", "l-", "o-"))

    def case(self, name: str) -> Case:
        """As named by the file and the number."""
        edit = self.requested_rewrite
        common = self.commonsense
        for i, target in enumerate(self.paraphrase.targets if self.paraphrase else ()):
            if target != edit.target_new:
                raise _NoCase(
                    f"p-paraphrase.targets.{i}", f"{target!r} is not the new target of the edit"
                )
        return Case(
            name,
            self._request(edit.prompt, edit.subject, edit.target_new, edit.target_true),
            paraphrases=tuple(self.paraphrase.prompts) if self.paraphrase else (),
            neighbours=self.neighbor.queries() if self.neighbor else (),
            relations=self.relation.queries() if self.relation else (),
            aliases=self.alias.queries() if self.alias else (),
            reasoning=self.reasoning.queries() if self.reasoning else (),
            generation=tuple(self.generation.prompts) if self.generation else (),
            commonsense=(
                (Commonsense(common.prompts, common.right, common.wrong),) if common else ()
            ),
        )  # fmt: skip


class _Named(pydantic.BaseModel):
    str: Text


def _number_as_text(value: Any) -> Any:
    """A name may be a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class _CounterFactRewrite(pydantic.BaseModel):
    prompt: Text
    subject: Text
    target_new: _Named
    target_true: _Named


class CounterFact(_Schema):
    """CounterFact as published; a prompt is a template, neighbours share the true answer."""

    marks: ClassVar[frozenset[str]] = frozenset({"requested_rewrite", "paraphrase_prompts"})
    template = "requested_rewrite.prompt"
    new = "requested_rewrite.target_new.str"
    names = "case_id"

    case_id: Annotated[Text | None, pydantic.BeforeValidator(_number_as_text)] = None
    requested_rewrite: _CounterFactRewrite
    paraphrase_prompts: list[Prompt] = []
    neighborhood_prompts: list[Prompt] = []
    generation_prompts: list[Prompt] = []

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_other_prompts(cls, record: Any) -> Any:
        known = [name for name in (*cls.model_fields, "attribute_prompts") if "prompts" in name]
        return _no_others(record, known, lambda name: name.endswith("prompts"))

    def case(self, name: str) -> Case:
        """Named by its ``case_id``, if it has one."""
        edit = self.requested_rewrite
        true = edit.target_true.str
        return Case(
            name if self.case_id is None else f"counterfact-{self.case_id}",
            EditRequest(edit.prompt, edit.subject, edit.target_new.str, true),
            paraphrases=tuple(self.paraphrase_prompts),
            neighbours=tuple(Cloze(prompt, true) for prompt in self.neighborhood_prompts),
            generation=tuple(self.generation_prompts),
        )


def _first_answer(value: Any) -> Any:
    """KnowEdit's answers are text, a list of synonyms, or a list of such lists."""
    while isinstance(value, list) and value:
        value = value[0]
    return value


class _KnowEditQuery(pydantic.BaseModel):
    prompt: Prompt
    ground_truth: Annotated[Text, pydantic.BeforeValidator(_first_answer)]

    def query(self) -> Cloze:
        return Cloze(self.prompt, self.ground_truth)


def _none_is_nothing(value: Any) -> Any:
    """A group that is null, or holds null, as some files have it, has no prompts."""
    if value is None:
        return {}
    if isinstance(value, dict):
        return {name: [] if group is None else group for name, group in value.items()}
    return value


def _one_is_several(value: Any) -> Any:
    """A prompt alone is a list of one, and is checked here: its place is no list's. Null is a list
    of none."""
    if value is None:
        return []
    return [_filled_in(_checked_text(value))] if isinstance(value, str) else value


class _Groups(pydantic.BaseModel):
    """Prompts by what they ask for."""

    unread: ClassVar[tuple[str, ...]] = ()
    """Names of groups that there are, and that no metric asks for."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_other_groups(cls, record: Any) -> Any:
        return _no_others(record, (*cls.model_fields, *cls.unread), lambda name: True)


class _Portability(_Groups):
    Subject_Aliasing: list[_KnowEditQuery] = []
    Reasoning: list[_KnowEditQuery] = []
    Logical_Generalization: list[_KnowEditQuery] = []


class _Locality(_Groups):
    unread = ("Forgetfulness",)

    Relation_Specificity: list[_KnowEditQuery] = []


class KnowEdit(_Schema):
    """KnowEdit's WikiData files; of several accepted answers the first is asked for.

    The prompts of ``Forgetfulness`` (former values of the edited relation, in its file of recent
    facts) are not read.
    """

    marks: ClassVar[frozenset[str]] = frozenset({"subject", "prompt", "target_new", "portability"})

    subject: Text
    prompt: Text
    target_new: Annotated[Text, pydantic.BeforeValidator(_first_answer)]
    ground_truth: Annotated[Text | None, pydantic.BeforeValidator(_first_answer)] = None
    rephrase: Annotated[
        list[Prompt],
        pydantic.BeforeValidator(_one_is_several),
        pydantic.Field(validation_alias=pydantic.AliasChoices("rephrase", "rephrase_prompt")),
    ] = []
    portability: Annotated[_Portability, pydantic.BeforeValidator(_none_is_nothing)] = (
        _Portability()
    )
    locality: Annotated[_Locality, pydantic.BeforeValidator(_none_is_nothing)] = _Locality()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_other_prompts(cls, record: Any) -> Any:
        if isinstance(record, dict) and {"rephrase", "rephrase_prompt"} <= record.keys():
            raise ValueError("of rephrase and rephrase_prompt there may be one, not both")
        known = ("rephrase", "rephrase_prompt", "portability", "locality")
        return _no_others(record, known, _is_a_group)

    def case(self, name: str) -> Case:
        """As named by the file and the number."""
        ported = self.portability
        return Case(
            name,
            self._request(self.prompt, self.subject, self.target_new, self.ground_truth),
            paraphrases=tuple(self.rephrase),
            relations=tuple(q.query() for q in self.locality.Relation_Specificity),
            aliases=tuple(q.query() for q in ported.Subject_Aliasing),
            reasoning=tuple(
                q.query() for q in [*ported.Reasoning, *ported.Logical_Generalization]
            ),
        )  # fmt: skip


class _OneHop(pydantic.BaseModel):
    """A question that takes the new answer one step further."""

    question: Annotated[Prompt, pydantic.Field(alias="New Question")]
    answer: Annotated[Text, pydantic.Field(alias="New Answer")]

    def query(self) -> Cloze:
        return Cloze(self.question, self.answer)


class ZsRE(_Schema):
    """zsRE for editing: the answer becomes ``alt``; ``loc`` asks about something else, and
    ``portability``, which EasyEdit's file adds, what follows from the new answer."""

    marks: ClassVar[frozenset[str]] = frozenset({"subject", "src", "alt"})
    template = "src"
    new = "alt"

    subject: Text
    src: Text
    alt: Text
    answers: Annotated[list[Text], pydantic.Field(min_length=1)]
    rephrase: Prompt | None = None
    loc: Prompt | None = None
    loc_ans: Annotated[Text | None, pydantic.BeforeValidator(_first_answer)] = None
    portability: _OneHop | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_other_prompts(cls, record: Any) -> Any:
        return _no_others(record, ("rephrase", "portability"), _is_a_group)

    @pydantic.model_validator(mode="after")
    def _asked_with_its_answer(self) -> ZsRE:
        if (self.loc is None) != (self.loc_ans is None):
            raise ValueError("of loc and loc_ans there is one without the other")
        return self

    def case(self, name: str) -> Case:
        """As named by the file and the number."""
        elsewhere: tuple[Cloze, ...] = ()
        if self.loc is not None and self.loc_ans is not None:
            question = self.loc if self.loc.endswith("?") else f"{self.loc}?"
            elsewhere = (Cloze(question, self.loc_ans),)
        return Case(
            name,
            self._request(self.src, self.subject, self.alt, self.answers[0]),
            paraphrases=(self.rephrase,) if self.rephrase else (),
            neighbours=elsewhere,
            reasoning=() if self.portability is None else (self.portability.query(),),
        )


class _Own(pydantic.BaseModel):
    """What the project's own format holds: an unknown field is an error."""

    model_config = pydantic.ConfigDict(extra="forbid")


class _Asked(_Own):
    prompt: Prompt
    answer: Text

    def query(self) -> Cloze:
        return Cloze(self.prompt, self.answer)


class _Alias(_Own):
    """A prompt whose answer is the new target, or a prompt with an answer of its own."""

    prompt: Prompt
    answer: Text | None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _alone_or_with_its_answer(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"prompt": _filled_in(_checked_text(value)), "answer": None}
        if not isinstance(value, dict):
            raise ValueError("it is neither a valid prompt nor a prompt with an answer")
        if "answer" in value and value["answer"] is None:
            raise ValueError("its answer is null")
        return value


class _Choice(_Own):
    prompt: Prompt
    right: Text
    wrong: Text


class DriftLens(_Schema):
    """The project's own format (assets/facts.md); an unknown field is an error."""

    model_config = pydantic.ConfigDict(extra="forbid")
    marks: ClassVar[frozenset[str]] = frozenset({"prompt", "subject", "target_new", "neighbors"})
    names = "id"

    id: Text | None = None
    category: Text | None = None
    prompt: Text
    subject: Text
    target_true: Text | None = None
    target_new: Text
    paraphrases: list[Prompt] = []
    neighbors: list[_Asked] = []
    relations: list[_Asked] = []
    distractors: list[_Asked] = []
    aliases: list[_Alias] = []
    reasoning: list[_Asked] = []
    generation: list[Prompt] = []
    references: list[Text] = []
    commonsense: list[_Choice] = []

    def case(self, name: str) -> Case:
        """Named by its ``id``, if it has one."""
        return Case(
            name if self.id is None else self.id,
            EditRequest(self.prompt, self.subject, self.target_new, self.target_true),
            category=self.category or "",
            paraphrases=tuple(self.paraphrases),
            neighbours=tuple(q.query() for q in self.neighbors),
            relations=tuple(q.query() for q in self.relations),
            distractors=tuple(q.query() for q in self.distractors),
            aliases=tuple(
                Cloze(alias.prompt, self.target_new if alias.answer is None else alias.answer)
                for alias in self.aliases
            ),
            reasoning=tuple(q.query() for q in self.reasoning),
            generation=tuple(self.generation),
            references=tuple(self.references),
            commonsense=tuple(Commonsense(c.prompt, c.right, c.wrong) for c in self.commonsense),
        )


FORMATS: dict[str, type[_Schema]] = {
    # In the order in which they are told apart.
    "counterfact": CounterFact,
    "merged": Merged,
    "knowedit": KnowEdit,
    "zsre": ZsRE,
    "driftlens": DriftLens,
}
