"""What went wrong, what was expected, and what to do about it.

Every error that a user can cause is a :class:`DriftLensError`. Its text is one
sentence about the problem followed by one about the remedy, so that the command
line can print it as it is, without a traceback.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any


class DriftLensError(Exception):
    """Base of all errors raised on purpose by DriftLens.

    Args:
        problem: What went wrong, with the offending value in it.
        remedy: What the user can do about it. Empty if there is nothing to do.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem} {remedy}".strip())


class ModelError(DriftLensError):
    """A model cannot be found, loaded, or intervened on."""


class TokenError(DriftLensError):
    """A text cannot be tokenized as asked: subject absent, target empty, ..."""


class RequestError(DriftLensError):
    """An edit request, a prompt or an argument is malformed."""


class EditError(DriftLensError):
    """An edit cannot be computed, applied, saved or loaded."""


class DataError(DriftLensError):
    """A file is missing, damaged, or not in the expected format."""


class DownloadError(DriftLensError):
    """A bundled file could not be fetched or does not have its checksum."""


def check_choice(what: str, given: object, choices: Iterable[str]) -> None:
    """Raise if an argument is none of its choices.

    Args:
        what: The argument's name.
        given: What was passed.
        choices: What may be.

    Raises:
        RequestError: With the choices.
    """
    known = list(choices)
    if given not in known:
        raise RequestError(f"{what} is {given!r}.", f"Choose one of {', '.join(known)}.")


def check_count(what: str, given: int) -> None:
    """Raise if a number of things is negative.

    Raises:
        RequestError: If it is.
    """
    if given < 0:
        raise RequestError(f"{what} is {given}.", "Give 0 or more.")


def as_integer(what: str, given: Any) -> int:
    """An argument of any integer type as Python's own, which files can hold.

    Raises:
        RequestError: If it is no whole number.
    """
    try:
        return int(operator.index(given))
    except TypeError as error:
        raise RequestError(f"{what} is {given!r}.", "Give a whole number.") from error


def as_number(what: str, given: Any, remedy: str = "Give a number.") -> float:
    """An argument of any number type (numpy's and torch's too) as Python's ``float``.

    Raises:
        RequestError: If it is no number, or too large.
    """
    if isinstance(given, bool):
        raise RequestError(f"{what} is {given!r}.", remedy)
    try:
        return float(given.__float__())
    except (AttributeError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RequestError(f"{what} is {given!r}.", remedy) from error


def first_line(error: Exception) -> str:
    """What an error says, in a line; its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
