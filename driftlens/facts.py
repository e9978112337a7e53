"""The fact that an edit changes."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from driftlens.errors import RequestError

SLOT = "{}"


def split_template(template: str, what: str) -> tuple[str, str]:
    """The text before and after the one ``{}`` of ``template``.

    Text is never passed through :meth:`str.format`: generated contexts and subjects may
    contain braces of their own.

    Raises:
        RequestError: If there is no slot, or more than one.
    """
    count = template.count(SLOT)
    if count != 1:
        raise RequestError(
            f"The {what} {template!r} has {count} slots '{{}}' instead of exactly one.",
            "Put '{}' where the subject belongs, once.",
        )
    before, after = template.split(SLOT)
    return before, after


def occurrences(text: str, subject: str) -> list[int]:
    """Start of each occurrence of a subject, in reading order.

    Where it stands as a word of its own, only such occurrences count (``"Rome"`` is not found
    in ``"Romeo"``). Scripts without spaces have no such words, so there all count.
    """
    if not subject.strip():
        return []
    starts: list[int] = []
    at = text.find(subject)
    while at >= 0:
        starts.append(at)
        at = text.find(subject, at + len(subject))
    whole = [s for s in starts if _is_whole_word(text, s, s + len(subject))]
    return whole or starts


def _is_whole_word(text: str, start: int, end: int) -> bool:
    return not (_joined(text, start) or _joined(text, end))


def _joined(text: str, boundary: int) -> bool:
    """Whether the characters on both sides of a boundary belong to one word."""
    at = boundary - 1
    while at >= 0 and _is_attached(text[at]):
        at -= 1  # to what it stands on
    left, right = text[max(at, 0) : at + 1], text[boundary : boundary + 1]
    if not left.isalnum() or _UNSPACED.match(left):
        return False
    if right and _is_attached(right):
        return True
    return right.isalnum() and not _UNSPACED.match(right)


def _is_attached(character: str) -> bool:
    """Marks (vowel signs, accents), and what joins letters unseen; not what makes an emoji."""
    if character in "\ufe0e\ufe0f\u20e3":
        return False
    return character in "\u200c\u200d" or unicodedata.category(character).startswith("M")


_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
)
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese, which are written without spaces."""


@dataclass(frozen=True)
class EditRequest:
    """One fact to change: (subject, relation, target_true -> target_new).

    Args:
        prompt: The relation as a template with one ``{}`` for the subject, ending where
            the object is to follow: ``"{} is located in the city of"``.
        subject: ``"The Eiffel Tower"``.
        target_new: The object that the edited model is to answer: ``"Rome"``.
        target_true: The object that the original model answers, if known: ``"Paris"``.

    White space around targets is dropped; the tokenizer's leading space is added where a
    target is turned into tokens.

    Raises:
        RequestError: If a field is empty, the template has not exactly one slot, or the
            prompt ends in white space.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new", "target_true"):
            value = getattr(self, name)
            if value is None and name == "target_true":
                continue
            if not isinstance(value, str):
                raise RequestError(f"EditRequest.{name} must be text, not {type(value).__name__}.")
            if not value.strip():
                raise RequestError(f"EditRequest.{name} is empty.", "Give it some text.")
        split_template(self.prompt, "prompt")
        if self.text != self.text.rstrip():
            raise RequestError(
                f"The prompt {self.text!r} ends in white space.",
                "Remove it: a target brings its own leading space.",
            )
        if self.subject != self.subject.strip():
            raise RequestError(f"The subject {self.subject!r} has white space around it.")
        object.__setattr__(self, "target_new", self.target_new.strip())
        if self.target_true is not None:
            object.__setattr__(self, "target_true", self.target_true.strip())

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        before, after = split_template(self.prompt, "prompt")
        return before + self.subject + after

    @classmethod
    def from_text(
        cls,
        text: str,
        subject: str,
        target_new: str,
        target_true: str | None = None,
        occurrence: int = 0,
    ) -> EditRequest:
        """A request from a filled-in prompt, e.g. a benchmark record.

        Args:
            text: The prompt with the subject in it.
            occurrence: Which occurrence of the subject becomes the slot; 0 is the first, -1 the
                last. Occurrences inside a longer word count only if there are no others.

        Raises:
            RequestError: If the subject does not occur that often.
        """
        starts = occurrences(text, subject)
        if not -len(starts) <= occurrence < len(starts):
            raise RequestError(
                f"The subject {subject!r} occurs {len(starts)} time(s) in {text!r}, so there is no "
                f"occurrence {occurrence}.",
                "Check the spelling, or choose another occurrence.",
            )
        start = starts[occurrence]
        template = text[:start] + SLOT + text[start + len(subject) :]
        return cls(template, subject, target_new, target_true)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return {
            "prompt": self.prompt,
            "subject": self.subject,
            "target_new": self.target_new,
            "target_true": self.target_true,
        }
