"""ROME: rank-one model editing (Meng et al., NeurIPS 2022, section 3.1).

1. The key: input of the down-projection at the subject's last token; k* is its mean over
   the contexts, k the one of the plain prompt.
2. The value: v* = h_0 + delta, by optimisation (``driftlens.editing.target``).
3. The direction that disturbs other keys least: u = C^-1 k* / |C^-1 k*|.
4. The update: W' = W + r u^T with r = (v* - W k) / (k . u), so that W' k + b = v*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from driftlens.editing.contexts import Context
from driftlens.editing.penalties import Penalty
from driftlens.editing.statistics import KeyCovariance
from driftlens.editing.target import (
    Value,
    ValueSearch,
    optimise_value,
    start,
)
from driftlens.errors import EditError
from driftlens.facts import EditRequest
from driftlens.models import LensModel
from driftlens.reuse import Engine
from driftlens.weights import LowRankDelta

SMALLEST_ALIGNMENT = 1e-6


@dataclass(frozen=True)
class RomeUpdate:
    """The result of the algorithm.

    Args:
        left_output: r, ``[d_model]``.
        right_key: u, ``[d_mlp]``, of length 1.
        alignment: k . u / |k|; near 0 the update explodes (r-ROME's motive).
        value: The optimised value and its trace.
    """

    left_output: Float[torch.Tensor, " d_model"]
    right_key: Float[torch.Tensor, " d_mlp"]
    alignment: float
    value: Value


def rome_update(
    model: LensModel,
    request: EditRequest,
    layer: int,
    search: ValueSearch,
    contexts: Sequence[Context],
    covariance: KeyCovariance,
    penalties: Sequence[Penalty] = (),
    progress: bool = True,
    engine: Engine | None = None,
) -> RomeUpdate:
    """ROME's rank-one update for one request.

    Raises:
        EditError: If the plain prompt's key is orthogonal to the update's direction.
    """
    # 1. Keys and outputs, of the plain prompt and of the contexts.
    begun = start(model, request, contexts, layer, engine)
    plain_key, mean_key = begun.plain_key, begun.keys.mean(0)

    # 2. The value.
    value = optimise_value(begun, search, penalties, progress)

    # 3. The direction.
    solved = covariance.solve(mean_key)
    direction = solved / solved.norm()

    # 4. The update; v* - W k is delta, since h_0 is the plain prompt's own output.
    overlap = torch.dot(plain_key.double(), direction)
    alignment = float(overlap / plain_key.double().norm())
    if abs(alignment) < SMALLEST_ALIGNMENT:
        raise EditError(
            f"The key of {request.subject!r} is orthogonal to its own average over the contexts "
            f"(cosine {alignment:.1e}), so the update would explode.",
            "Use other context_prompts.",
        )
    left = value.delta.double() / overlap
    return RomeUpdate(left.float(), direction.float(), alignment, value)


def as_delta(update: RomeUpdate, input_first: bool) -> LowRankDelta:
    """The update in the orientation of its parameter."""
    output, key = update.left_output[:, None], update.right_key[:, None]
    return LowRankDelta(key, output) if input_first else LowRankDelta(output, key)
