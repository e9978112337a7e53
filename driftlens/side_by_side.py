"""Several edited models in one pass: each row of a batch goes through one of them.

A linear layer whose weight W is changed by D says ``x (W + D)^T``, which is what it says without
the edit and ``x D^T``. So edited models that differ in a few matrices read all the others
together, which is most of the time of writing texts. Results are those of :meth:`Edit.applied`,
but for the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from transformers.pytorch_utils import Conv1D

from driftlens.codebook import Codebook
from driftlens.edits import Edit
from driftlens.errors import EditError
from driftlens.models import LensModel
from driftlens.weights import DenseDelta, LowRankDelta

Change = LowRankDelta | DenseDelta
Own = tuple[slice, Change]
"""Rows, and what is changed for them."""


def fits_beside_others(model: LensModel, edit: Edit) -> bool:
    """Whether an edit can be heard in some rows of a batch only.

    It can if it changes nothing but linear layers inside the model's layers, in float32 or more: in
    less, an edited weight is rounded, and what a row hears would not be. And if no adapter is
    applied beside these layers, which would replace what the change does.
    """
    return all(
        not isinstance(delta, Codebook)
        and model.layer_of(name) is not None
        and isinstance(model.weights.owner(name), torch.nn.Linear | Conv1D)
        and model.weights.parameters[name].dtype in (torch.float32, torch.float64)
        and not model.weights.is_adapted(name)
        for name, delta in edit.deltas.items()
    )


@contextmanager
def side_by_side(
    model: LensModel, edits: Sequence[Edit | None], rows: Sequence[int]
) -> Iterator[None]:
    """Inside, the first ``rows[0]`` rows of each batch go through the first edited model, the next
    ``rows[1]`` through the second, and so on.

    Args:
        model: The unedited model; or one to which other edits are applied, in all rows.
        edits: For each group of rows; ``None`` leaves the model as it is.
        rows: How many each has.

    Raises:
        EditError: If an edit was made for other weights, cannot be heard in some rows only, or a
            batch has another number of rows.
    """
    own: dict[str, list[Own]] = {}
    for edit, end, count in zip(edits, accumulate(rows), rows, strict=True):
        if edit is None:
            continue
        edit.check_fits(model)
        if not fits_beside_others(model, edit):
            raise EditError(
                f"{edit!r} cannot be heard in some rows only.",
                "Apply it to the whole model: `with edit.applied(model)`.",
            )
        for name, delta in edit.deltas.items():
            assert not isinstance(delta, Codebook)
            own.setdefault(name, []).append((slice(end - count, end), delta))
    handles = []
    try:
        for name, changes in own.items():
            layer = model.weights.owner(name)
            hook = _hook(changes, isinstance(layer, Conv1D), sum(rows))
            handles.append(layer.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(changes: Sequence[Own], input_first: bool, rows: int) -> Callable[..., torch.Tensor]:
    def hook(_: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        if out.ndim < 3 or len(out) != rows:
            raise EditError(
                f"A layer was given {tuple(out.shape[:-1])} inputs, not {rows} rows of them.",
                "Apply the edits to the whole model, one after another.",
            )
        heard = out.clone()
        for own, delta in changes:
            heard[own] += _said(delta, args[0][own], input_first)
        return heard

    return hook


def _said(
    delta: Change, inputs: Float[torch.Tensor, "row pos d_in"], input_first: bool
) -> Float[torch.Tensor, "row pos d_out"]:
    """What a change of a weight or a bias adds to a layer's outputs.

    Args:
        input_first: Whether the weight is ``[d_in, d_out]``.
    """
    if isinstance(delta, DenseDelta):
        change = delta.tensor.to(inputs)
        if change.ndim == 1:
            return change.expand(*inputs.shape[:-1], -1)
        return inputs @ (change if input_first else change.T)
    left, right = delta.left.to(inputs), delta.right.to(inputs)
    return inputs @ left @ right.T if input_first else inputs @ right @ left.T
