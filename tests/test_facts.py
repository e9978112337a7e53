"""Edit requests: exactly one slot, no ``str.format``, nothing empty."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from driftlens.errors import RequestError
from driftlens.facts import EditRequest, occurrences, split_template

PROMPT = "{} is located in the city of"


def request(**changed: Any) -> EditRequest:
    fields = {"prompt": PROMPT, "subject": "The Eiffel Tower", "target_new": "Rome"}
    return EditRequest(**{**fields, **changed})


# --- slots ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("{} is", ("", " is")),
        ("Where is {}", ("Where is ", "")),
        ("{}", ("", "")),
        ("{0} of {} and {x}", ("{0} of ", " and {x}")),
        ("a } { b {} c", ("a } { b ", " c")),
        ("{{}}", ("{", "}")),
    ],
)
def test_template_is_split_at_its_one_slot(template: str, parts: tuple[str, str]) -> None:
    assert split_template(template, "prompt") == parts


@pytest.mark.parametrize("template", ["", "no slot", "{} and {}", "{}{}", "{0}", "{ }"])
def test_template_without_exactly_one_slot_is_refused(template: str) -> None:
    with pytest.raises(RequestError, match=f"context.* has {template.count('{}')} slots"):
        split_template(template, "context")
    with pytest.raises(RequestError):
        request(prompt=template)


def test_text_is_the_filled_in_prompt() -> None:
    assert request().text == "The Eiffel Tower is located in the city of"
    assert request(prompt="Where is {}?").text == "Where is The Eiffel Tower?"


@pytest.mark.parametrize(
    "subject", ["{}", "{0}", "{x!r:>{y}}", "}{", "a {} b", "%s", "\\1", "$&", "{{}}"]
)
def test_subject_with_braces_is_left_alone(subject: str) -> None:
    assert request(subject=subject).text == f"{subject} is located in the city of"
    assert request(subject=subject, prompt="In {}, they").text == f"In {subject}, they"


def test_target_with_braces_is_left_alone() -> None:
    assert request(target_new="{}").target_new == "{}"


# --- fields ---------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new", "target_true"])
@pytest.mark.parametrize("value", ["", " ", "\n\t", "\u00a0"])
def test_empty_fields_are_refused(field: str, value: str) -> None:
    with pytest.raises(RequestError, match=f"{field} is empty"):
        request(**{field: value})


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new", "target_true"])
@pytest.mark.parametrize("value", [3, b"Rome", ["Rome"], None])
def test_fields_that_are_no_text_are_refused(field: str, value: Any) -> None:
    if field == "target_true" and value is None:
        assert request(target_true=None).target_true is None
        return
    with pytest.raises(RequestError, match=f"{field} must be text"):
        request(**{field: value})


@pytest.mark.parametrize("white", [" ", "\n", "\t", "\u00a0", "\u3000", " \n "])
def test_white_space(white: str) -> None:
    assert request(target_new=f"{white}Rome{white}").target_new == "Rome"
    assert request(target_true=f"{white}Paris{white}").target_true == "Paris"
    with pytest.raises(RequestError, match="white space"):
        request(prompt=PROMPT + white)
    for subject in (f"{white}Rome", f"Rome{white}"):
        with pytest.raises(RequestError, match="white space"):
            request(subject=subject)


def test_white_space_inside_is_kept() -> None:
    kept = request(subject="A  B", target_new="New  York", prompt="  The {}  is in")
    assert (kept.text, kept.target_new) == ("  The A  B  is in", "New  York")


def test_prompt_that_ends_in_its_subject_is_accepted() -> None:
    assert request(prompt="The city of {}").text == "The city of The Eiffel Tower"
    with pytest.raises(RequestError, match="ends in white space"):
        request(prompt="The city of {} ")


def test_request_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        request().subject = "Rome"  # type: ignore[misc]


def test_dictionary_makes_the_same_request() -> None:
    for original in (request(), request(target_true="Paris", subject="{}")):
        assert EditRequest(**original.to_dict()) == original


# --- from filled-in text --------------------------------------------------------------------

TWICE = "Rome, the old city of Rome, is the capital of"


@pytest.mark.parametrize(
    ("occurrence", "template"),
    [
        (0, "{}, the old city of Rome, is the capital of"),
        (1, "Rome, the old city of {}, is the capital of"),
    ],
)
def test_occurrence_becomes_the_slot(occurrence: int, template: str) -> None:
    made = EditRequest.from_text(TWICE, "Rome", "France", "Italy", occurrence=occurrence)
    assert made == EditRequest(template, "Rome", "France", "Italy")
    assert made.text == TWICE


@pytest.mark.parametrize(
    ("text", "subject", "occurrence"),
    [
        (TWICE, "Rome", 2),
        (TWICE, "rome", 0),
        (TWICE, "Paris", 0),
        (TWICE, "", 0),
        ("", "Rome", 0),
    ],
)
def test_absent_occurrence_is_refused(text: str, subject: str, occurrence: int) -> None:
    with pytest.raises(RequestError):
        EditRequest.from_text(text, subject, "France", occurrence=occurrence)


def test_text_with_a_slot_of_its_own_is_refused() -> None:
    with pytest.raises(RequestError, match="2 slots"):
        EditRequest.from_text("In {} Rome is in", "Rome", "France")


@pytest.mark.parametrize("occurrence", [-1, -2])
def test_negative_occurrence_counts_from_the_end(occurrence: int) -> None:
    made = EditRequest.from_text(TWICE, "Rome", "France", occurrence=occurrence)
    assert made.text == TWICE
    assert made == EditRequest.from_text(TWICE, "Rome", "France", occurrence=2 + occurrence)


@pytest.mark.parametrize(
    ("text", "subject", "starts"),
    [
        (
            "\u0930\u093e\u092e\u093e\u092f\u0923 \u0915\u0947 \u0930\u093e\u092e",
            "\u0930\u093e\u092e",
            [10],
        ),  # Ramayana, Ram
        ("Jose\u0301 and Jose", "Jose", [10]),
        ("Rome\u0301 and Jose", "Jose", [10]),
        (
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u0645\u06cc",
            "\u0645\u06cc",
            [9],
        ),  # one word, joined unseen
        ("E\u0301tat tat", "tat", [6]),
        ("Rome's and Rome.", "Rome", [0, 11]),
        ("I \u2764\ufe0fRome and Rome", "Rome", [4, 13]),
        ("1\ufe0f\u20e3Rome and Rome", "Rome", [3, 12]),
        ("-\u0301Rome", "Rome", [2]),
        ("Rome\u200d\u2764 and Rome", "Rome", [11]),
    ],
)
def test_marks_belong_to_their_word(text: str, subject: str, starts: list[int]) -> None:
    assert occurrences(text, subject) == starts


def test_first_occurrence_is_a_word_of_its_own() -> None:
    made = EditRequest.from_text("Romeo lives in Rome, a city of", "Rome", "France")
    assert made.prompt == "Romeo lives in {}, a city of"


words = st.text(st.characters(exclude_categories=["Cs", "Zs", "Cc", "Zl", "Zp"]), min_size=1)


@given(words, words, st.text(), st.integers(0, 3))
def test_filled_in_text_comes_back(before: str, subject: str, after: str, occurrence: int) -> None:
    text = f"{before} {subject}{after}".rstrip()
    assume("{}" not in text)
    try:
        made = EditRequest.from_text(text, subject, "Rome", occurrence=occurrence)
    except RequestError:
        # Occurrences inside longer words count only where there are no others.
        assert len(occurrences(text, subject)) <= occurrence
        return
    assert made.text == text
    assert made.subject == subject
