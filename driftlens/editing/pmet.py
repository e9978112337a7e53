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
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from driftlens.editing.configs import PmetConfig
from driftlens.editing.outcome import Outcome, Query, Resources, descent_of, find_values
from driftlens.editing.spreading import Facts, spreading
from driftlens.editing.target import Descent, attention_out, down_projection_out
from driftlens.facts import EditRequest
from driftlens.interventions import down_out_name
from driftlens.models import LensModel


def pmet_query(model: LensModel, config: PmetConfig) -> Query:
    """One vector is added to the MLP's output, and one to the attention's."""
    top = config.edited_layers[-1]
    places = (down_projection_out(model, top), attention_out(model, top))
    return Query(top, places, search=_search(config))


def pmet(
    model: LensModel, requests: Sequence[EditRequest], config: PmetConfig, resources: Resources
) -> Outcome:
    """PMET's update for one fact or many.

    Raises:
        EditError: If second moments cannot be used, or the change is not finite.
    """
    layers, top = config.edited_layers, config.edited_layers[-1]

    # 1. What is wanted of the last layer's MLP.
    wanted: list[torch.Tensor] = []
    trace: list[dict[str, Any]] = []
    norms: list[list[float]] = []
    for i, (begun, value) in enumerate(
        find_values(model, requests, pmet_query(model, config), config, resources)
    ):
        wanted.append(begun.initial[0].double() + value.deltas[0].double())
        trace += [{"fact": i, **record} for record in value.trace]
        norms.append([float(delta.norm()) for delta in value.deltas])
    target = torch.stack(wanted)

    # 2. Layer by layer.
    facts = Facts(model, requests, resources.contexts)
    with spreading(model, layers, resources.progress) as change:
        for layer, left in change.layers():
            keys = facts.keys(layer)
            residual = (target - facts.now(down_out_name(top))) / math.sqrt(left)
            change.write(layer, residual, resources.covariances[layer].solve_with(
                keys, config.cov_weight))  # fmt: skip
    info = {"engine": value.engine, "delta_norms": norms, "layers": change.info}
    return Outcome(change.deltas, trace, info)


def _search(config: PmetConfig) -> Descent:
    """Once greedy decoding gives the target, likelihood counts less, and KL decides."""

    def stops(record: dict[str, Any]) -> bool:
        kept = bool(record["target_is_greedy"]) and record["kl"] <= config.greedy_stop_kl
        return kept or record["loss"] < config.early_stop_loss

    def nll_weight(is_greedy: bool) -> float:
        return config.nll_factor * (config.greedy_nll_factor if is_greedy else 1.0)

    return replace(descent_of(config), stops=stops, nll_weight=nll_weight)
