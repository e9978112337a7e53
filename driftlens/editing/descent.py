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
    tasks: Sequence[Sequence[torch.Tensor]],
    evaluate: Callable[[list[int]], Sequence[tuple[Terms, Notes]]],
    *,
    steps: int,
    lr: float,
    stops: Callable[[dict[str, Any]], bool],
    confine: Callable[[int], None],
    decay: Callable[[int], None] | None = None,
    description: str = "optimising",
    progress: bool = True,
) -> list[list[dict[str, Any]]]:
    """Adam on the parameters of independent tasks, in place and in step with one another.

    The last evaluation of a task is not followed by an update, so there are at most
    ``steps - 1``.

    Args:
        model: Whose own parameters collect no gradients meanwhile.
        tasks: What is optimised, for each task.
        evaluate: Gives, for each task that goes on, the terms of its loss, and what else to note
            of it.
        stops: Whether a task is finished with a record of its trace, before its update.
        confine: Brings a task's parameters back to where they may be, after each update.
        decay: Adds to a task's gradients before each update.

    Returns:
        For each task, one record per evaluation: ``step``, ``loss``, its terms, and the notes.

    Raises:
        EditError: If a loss stops being a number.
    """
    optimiser = torch.optim.Adam([tensor for task in tasks for tensor in task], lr=lr)
    traces: list[list[dict[str, Any]]] = [[] for _ in tasks]
    active = list(range(len(tasks)))
    bar = tqdm(total=steps, desc=description, disable=not progress, leave=False)
    with model.frozen(), bar, torch.enable_grad():
        for step in range(steps):
            losses: dict[int, torch.Tensor] = {}
            for task, (terms, notes) in zip(active, evaluate(active), strict=True):
                loss = torch.stack(list(terms.values())).sum()
                record = {
                    "step": step,
                    "loss": float(loss.detach()),
                    **{name: float(value.detach()) for name, value in terms.items()},
                    **notes,
                }
                traces[task].append(record)
                if not math.isfinite(record["loss"]):
                    raise EditError(
                        f"The loss became {record['loss']} at step {step}.",
                        "Lower lr or clamp_factor, or load the model in float32.",
                    )
                if step < steps - 1 and not stops(record):
                    losses[task] = loss
            _show(bar, [traces[task][-1] for task in active])
            finished = [task for task in active if task not in losses]
            active = list(losses)
            if not active:
                break
            optimiser.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            for task in finished:  # a zero gradient would still move them, by momentum
                for tensor in tasks[task]:
                    tensor.grad = None
            for task in active if decay is not None else []:
                decay(task)  # type: ignore[misc]
            optimiser.step()
            with torch.no_grad():
                for task in active:
                    confine(task)
    return traces


def _show(bar: Any, records: Sequence[dict[str, Any]]) -> None:
    loss, prob = (sum(r[n] for r in records) / len(records) for n in ("loss", "target_prob"))
    bar.update()
    bar.set_postfix(loss=f"{loss:.3f}", p=f"{prob:.3f}", refresh=False)
