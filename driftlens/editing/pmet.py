"""PMET: precise model editing in a transformer (Li et al., AAAI 2024).

1. For each fact, two vectors are optimised at once: one added to the output of the attention
   and one to that of the MLP of the last edited layer, at the subject. Only the second is used:
   z = (MLP output) + delta_mlp.
2. For each edited layer, ascending, with the layers below already changed:
   K, the facts' keys; F, what the MLP of the last layer says now; R = (Z - F) / sqrt(layers
   left); W' = W + R K^T (lambda C + K K^T)^-1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float

from driftlens.editing.configs import PmetConfig
from driftlens.editing.outcome import Outcome, Query, Resources, descent_of
from driftlens.editing.spreading import spread
from driftlens.editing.target import Descent, attention_out, down_projection_out
from driftlens.facts import EditRequest
from driftlens.models import LensModel


def pmet_query(model: LensModel, config: PmetConfig) -> Query:
    """One vector is added to the MLP's output, and one to the attention's."""
    top = config.edited_layers[-1]
    places = (down_projection_out(model, top), attention_out(model, top))
    return Query(top, places, _search(config), kl_position=config.kl_position)


def pmet(
    model: LensModel, requests: Sequence[EditRequest], config: PmetConfig, resources: Resources
) -> Outcome:
    """PMET's update for one fact or many.

    Raises:
        EditError: If second moments cannot be used, or the change is not finite.
    """

    def right(layer: int, keys: Float[torch.Tensor, "fact d_mlp"]) -> torch.Tensor:
        return resources.covariances[layer].solve_with(keys, config.cov_weight)

    return spread(
        model, requests, pmet_query(model, config), config, resources, right, share=math.sqrt,
        in_stream=False,
    )  # fmt: skip


@dataclass(frozen=True)
class _Stops:
    """Once greedy decoding gives the target, KL decides."""

    greedy_kl: float
    loss: float

    def __call__(self, record: Mapping[str, Any]) -> bool:
        kept = bool(record["target_is_greedy"]) and record["kl"] <= self.greedy_kl
        return kept or bool(record["loss"] < self.loss)


@dataclass(frozen=True)
class _NllWeight:
    """Once greedy decoding gives the target, likelihood counts less."""

    always: float
    greedy: float

    def __call__(self, is_greedy: bool) -> float:
        return self.always * (self.greedy if is_greedy else 1.0)


def _search(config: PmetConfig) -> Descent:
    return replace(
        descent_of(config),
        stops=_Stops(config.greedy_stop_kl, config.early_stop_loss),
        nll_weight=_NllWeight(config.nll_factor, config.greedy_nll_factor),
    )
