"""The fact that an edit changes."""

from __future__ import annotations

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
            occurrence: Which occurrence of the subject becomes the slot; 0 is the first.

        Raises:
            RequestError: If the subject does not occur that often.
        """
        start = -1
        for _ in range(occurrence + 1):
            start = text.find(subject, start + 1) if subject else -1
            if start < 0:
                raise RequestError(
                    f"The subject {subject!r} does not occur {occurrence + 1} time(s) in {text!r}.",
                    "Check the spelling, or choose another occurrence.",
                )
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
