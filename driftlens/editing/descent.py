"""The loop that all optimising editors share: Adam, a trace of every term, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from driftlens.errors import EditError
from driftlens.models import LensModel

Terms = dict[str, torch.Tensor]
Notes = dict[str, float]


def descend(
    model: LensModel,
    parameters: Sequence[torch.Tensor],
    evaluate: Callable[[int], tuple[Terms, Notes]],
    *,
    steps: int,
    lr: float,
    stops: Callable[[dict[str, Any]], bool],
    confine: Callable[[], None],
    decay: Callable[[], None] | None = None,
    description: str = "optimising",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Adam on ``parameters``, in place.

    The last evaluation is not followed by an update, so there are at most ``steps - 1``.

    Args:
        model: Whose own parameters collect no gradients meanwhile.
        parameters: What is optimised.
        evaluate: Gives the terms of the loss at a step, and what else to note of it.
        stops: Whether to stop after a record of the trace, before its update.
        confine: Brings the parameters back to where they may be, after each update.
        decay: Adds to the gradients before each update.

    Returns:
        One record per evaluation: ``step``, ``loss``, its terms, and the notes.

    Raises:
        EditError: If the loss stops being a number.
    """
    optimiser = torch.optim.Adam(parameters, lr=lr)
    trace: list[dict[str, Any]] = []
    bar = tqdm(total=steps, desc=description, disable=not progress, leave=False)
    with model.frozen(), bar, torch.enable_grad():
        for step in range(steps):
            terms, notes = evaluate(step)
            loss = torch.stack(list(terms.values())).sum()
            record = {
                "step": step,
                "loss": float(loss.detach()),
                **{name: float(value.detach()) for name, value in terms.items()},
                **notes,
            }
            trace.append(record)
            bar.update()
            bar.set_postfix(
                loss=f"{record['loss']:.3f}", p=f"{record['target_prob']:.3f}", refresh=False
            )
            if not math.isfinite(record["loss"]):
                raise EditError(
                    f"The loss became {record['loss']} at step {step}.",
                    "Lower lr or clamp_factor, or load the model in float32.",
                )
            if step == steps - 1 or stops(record):
                break
            optimiser.zero_grad()
            loss.backward()
            if decay is not None:
                decay()
            optimiser.step()
            with torch.no_grad():
                confine()
    return trace
