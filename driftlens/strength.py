"""How strong an edit is, and the same edit made weaker: two edits are compared fairly at equal
strength, as one that changes less breaks less."""

from __future__ import annotations

from driftlens.edits import Edit
from driftlens.errors import EditError, RequestError
from driftlens.facts import EditRequest
from driftlens.models import LensModel
from driftlens.scoring import score_details

HALVINGS = 40
"""After which a search for a factor ends in any case: P(new target) may jump."""


def target_prob(model: LensModel, edit: Edit) -> float:
    """P(new target) after the edited prompt, of the model with the edit.

    Args:
        model: The unedited model.
        edit: Of one fact that is known.

    Raises:
        EditError: If the edit was made for other weights, is of several facts, or of unknown ones.
    """
    request = _request_of(edit)
    with edit.applied(model):
        return _prob(model, request)


def weakened(model: LensModel, edit: Edit, prob: float, *, tolerance: float = 0.01) -> Edit:
    """The edit with so much of its change (:meth:`Edit.scaled`) that P(new target) after the edited
    prompt is as given; the edit itself if it is so already.

    The factor is searched by halving between the original model and the edited one. If more than
    one gives this probability, as P(new target) need not rise all the way, it is any of them; if
    none does, as it jumps (in half precision, where edited weights are rounded), it is one below
    the jump. ``info["factor"]`` of what is returned says how much of the change is left.

    Args:
        model: The unedited model.
        edit: Of one fact that is known.
        prob: The probability, larger than 0. If the original model gives the new target as much,
            nothing is left of the edit.
        tolerance: How far the probability may be from that, as a share of it.

    Raises:
        RequestError: If the probability, or the tolerance, is not larger than 0, or the edit does
            not reach it.
        EditError: If the edit was made for other weights, is an adapter, of several facts, or of
            unknown ones.
    """
    if not (prob > 0 and tolerance > 0):
        raise RequestError(
            f"P(new target) is to be {prob}, up to {tolerance} of it.", "Give positive numbers."
        )
    whole = target_prob(model, edit)
    if whole < prob * (1 - tolerance):
        raise RequestError(
            f"P(new target) is {whole:.3g} with the whole edit, less than {prob:.3g}.",
            "Weaken the stronger one of two edits.",
        )
    if whole <= prob * (1 + tolerance):
        return edit
    low, high = 0.0, 1.0
    if _prob(model, _request_of(edit)) >= prob:
        return edit.scaled(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        half = edit.scaled(middle)
        found = target_prob(model, half)
        if abs(found - prob) <= tolerance * prob:
            return half
        low, high = (middle, high) if found < prob else (low, middle)
    return edit.scaled(low)


def _request_of(edit: Edit) -> EditRequest:
    if edit.request is None:
        raise EditError(
            f"{edit!r} is not of one known fact.", "Give an edit of one, with its request."
        )
    return edit.request


def _prob(model: LensModel, request: EditRequest) -> float:
    """P(new target) after the edited prompt, of the model as it is now."""
    new = request.target_new
    return score_details(model, request.text, [new])[new].prob
