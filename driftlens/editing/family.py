"""All penalties under their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from driftlens.editing.penalties import Penalty
from driftlens.editing.rivals import EssenceKL, HiddenDrift, KeyDrift
from driftlens.editing.sadr import SADR
from driftlens.errors import RequestError

PENALTIES: dict[str, Any] = {kind.kind: kind for kind in (SADR, KeyDrift, HiddenDrift, EssenceKL)}


def as_penalties(given: Penalty | Sequence[Penalty] | None) -> tuple[Penalty, ...]:
    """One penalty, several, or none, as a tuple.

    Raises:
        RequestError: If something else was given.
    """
    if given is None:
        return ()
    penalties = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for penalty in penalties:
        if not isinstance(penalty, Penalty):
            raise RequestError(
                f"{penalty!r} is no penalty.", "Give an object such as driftlens.SADR(gamma=0.05)."
            )
    return penalties


def penalty_from_dict(record: Mapping[str, Any]) -> Penalty:
    """A penalty from what :meth:`Penalty.to_dict` gives.

    Raises:
        RequestError: If the kind or a field is unknown, or a value out of range.
    """
    record = dict(record)
    kind = record.pop("penalty", None)
    if kind not in PENALTIES:
        raise RequestError(
            f"There is no penalty {kind!r}.", f"Choose one of {', '.join(PENALTIES)}."
        )
    known = [item.name for item in fields(PENALTIES[kind])]
    unknown = sorted(set(record) - set(known))
    if unknown:
        raise RequestError(f"{kind} has no field {unknown[0]!r}.", f"It has {', '.join(known)}.")
    made: Penalty = PENALTIES[kind](**record)
    return made
