"""What every editor is given besides the facts, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float

from driftlens.editing.configs import ValueSearch
from driftlens.editing.contexts import Context
from driftlens.editing.penalties import Penalty
from driftlens.editing.statistics import KeyCovariance
from driftlens.editing.target import Descent, Place, Start, Value, optimise_value, start
from driftlens.facts import EditRequest
from driftlens.models import DownProjection, LensModel
from driftlens.reuse import Engine
from driftlens.weights import Delta, LowRankDelta


@dataclass
class NullSpaceState:
    """What AlphaEdit carries from one edit to the next: pass the same object to each.

    Args:
        projections: For each layer, the projection onto the null space of other keys.
        ranks: For each layer, the dimension of that null space.
        key_sums: For each layer, the sum of ``k k^T`` over the keys of all edits so far.
        facts: Number of facts edited so far.
    """

    projections: dict[int, Float[torch.Tensor, "d_mlp d_mlp"]] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    key_sums: dict[int, Float[torch.Tensor, "d_mlp d_mlp"]] = field(default_factory=dict)
    facts: int = 0


@dataclass(frozen=True)
class Resources:
    """What every method shares.

    Args:
        contexts: In which values and keys are taken.
        covariances: Second moments of other keys, for each edited layer that needs them.
        penalties: That are added to the loss.
        progress: Whether to show bars.
        engine: How passes are run; ``None``: the fast way wherever it is exact.
        state: What AlphaEdit carries from edit to edit.
    """

    contexts: Sequence[Context]
    covariances: Mapping[int, KeyCovariance] = field(default_factory=dict)
    penalties: Sequence[Penalty] = ()
    progress: bool = True
    engine: Engine | None = None
    state: NullSpaceState = field(default_factory=NullSpaceState)


@dataclass(frozen=True)
class Outcome:
    """What an editor computed.

    Args:
        deltas: Change of each parameter.
        trace: One record per fact and optimisation step.
        info: Norms, ranks and whatever else is worth keeping.
    """

    deltas: dict[str, Delta]
    trace: list[dict[str, Any]]
    info: dict[str, Any]


def descent_of(config: ValueSearch) -> Descent:
    """The search that a configuration describes."""
    return Descent(
        steps=config.steps,
        lr=config.lr,
        weight_decay=config.weight_decay,
        clamp_factor=config.clamp_factor,
        kl_factor=config.kl_factor,
        stops=lambda record: record["loss"] < config.early_stop_loss,
    )


def find_value(
    model: LensModel,
    request: EditRequest,
    layer: int,
    places: Sequence[Place],
    config: ValueSearch,
    resources: Resources,
    record: Sequence[str] = (),
    search: Descent | None = None,
) -> tuple[Start, Value]:
    """What is known before the search for one fact's values, and what it found.

    Raises:
        TokenError: If the subject cannot be located or the target is empty.
        EditError: If the loss stops being a number.
    """
    begun = start(
        model, request, resources.contexts, layer, places, record,
        kl_position=config.kl_position, engine=resources.engine,
    )  # fmt: skip
    search = descent_of(config) if search is None else search
    return begun, optimise_value(begun, search, resources.penalties, resources.progress)


def outer(
    down: DownProjection,
    left: Float[torch.Tensor, "d_model rank"],
    right: Float[torch.Tensor, "d_mlp rank"],
) -> LowRankDelta:
    """``left @ right.T`` as a change of a down-projection, in its parameter's orientation."""
    left, right = left.float(), right.float()
    return LowRankDelta(right, left) if down.input_first else LowRankDelta(left, right)
