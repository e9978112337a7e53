"""MEMIT: mass-editing memory in a transformer (Meng et al., ICLR 2023, algorithm 1).

1. For each fact, z = h + delta: what the residual stream after the last edited layer should
   be at the subject, by optimisation, before anything is changed.
2. For each edited layer, ascending, with the layers below already changed:
   K, the facts' keys; H, what the residual stream is now; R = (Z - H) / (layers left);
   W' = W + R K^T (lambda C + K K^T)^-1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float

from driftlens.editing.configs import MemitConfig, ValueSearch
from driftlens.editing.outcome import Outcome, Query, Resources, descent_of
from driftlens.editing.spreading import spread
from driftlens.editing.target import block_out, down_projection_out
from driftlens.facts import EditRequest
from driftlens.models import LensModel


def memit(
    model: LensModel, requests: Sequence[EditRequest], config: MemitConfig, resources: Resources
) -> Outcome:
    """MEMIT's update for one fact or many.

    Raises:
        EditError: If second moments cannot be used, or the change is not finite.
    """

    def right(layer: int, keys: Float[torch.Tensor, "fact d_mlp"]) -> torch.Tensor:
        return resources.covariances[layer].solve_with(keys, config.cov_weight)

    return spread(model, requests, residual_query(model, config), config, resources, right)


def residual_query(model: LensModel, config: ValueSearch) -> Query:
    """The vector is added to the residual stream after the last edited layer; or, where a norm
    stands in between, to what that layer's down-projection says."""
    top = config.edited_layers[-1]
    is_direct = top in model.writes_directly
    place = block_out(model, top) if is_direct else down_projection_out(model, top)
    return Query(top, (place,), descent_of(config), kl_position=config.kl_position)
