"""MEMIT: mass-editing memory in a transformer (Meng et al., ICLR 2023, algorithm 1).

1. For each fact, z = h + delta: what the residual stream after the last edited layer should
   be at the subject, by optimisation, before anything is changed.
2. For each edited layer, ascending, with the layers below already changed:
   K, the facts' keys; H, what the residual stream is now; R = (Z - H) / (layers left);
   W' = W + R K^T (lambda C + K K^T)^-1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float

from driftlens.editing.configs import MemitConfig, ValueSearch
from driftlens.editing.outcome import Outcome, Query, Resources, find_values
from driftlens.editing.spreading import Facts, spreading
from driftlens.editing.target import block_out
from driftlens.facts import EditRequest
from driftlens.interventions import block_out_name
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

    return spread(model, requests, config, resources, right)


def spread(
    model: LensModel,
    requests: Sequence[EditRequest],
    config: ValueSearch,
    resources: Resources,
    right: Callable[[int, Float[torch.Tensor, "fact d_mlp"]], torch.Tensor],
    afterwards: Callable[[Facts], None] | None = None,
) -> Outcome:
    """MEMIT's two steps, with any way of writing residuals.

    Args:
        right: X of a layer, ``[d_mlp, fact]``, from its keys; its change is then ``R X^T``.
        afterwards: Called with the facts while the whole change is applied.
    """
    layers, top = config.edited_layers, config.edited_layers[-1]

    # 1. What is wanted.
    wanted, trace, info = wanted_residuals(model, requests, config, resources)

    # 2. Layer by layer.
    facts = Facts(model, requests, resources.contexts)
    with spreading(model, layers, resources.progress) as change:
        for layer, left in change.layers():
            keys = facts.keys(layer)
            residual = (wanted - facts.now(block_out_name(top))) / left
            change.write(layer, residual, right(layer, keys))
        if afterwards is not None:
            afterwards(facts)
    return Outcome(change.deltas, trace, {**info, "layers": change.info})


def residual_query(model: LensModel, config: ValueSearch) -> Query:
    """The vector is added to the residual stream after the last edited layer."""
    top = config.edited_layers[-1]
    return Query(top, (block_out(model, top),))


def wanted_residuals(
    model: LensModel,
    requests: Sequence[EditRequest],
    config: ValueSearch,
    resources: Resources,
) -> tuple[Float[torch.Tensor, "fact d_model"], list[dict[str, Any]], dict[str, Any]]:
    """Z, in float64, with the trace of all searches and what is worth keeping."""
    wanted: list[torch.Tensor] = []
    trace: list[dict[str, Any]] = []
    norms: list[float] = []
    info: dict[str, Any] = {}
    found = find_values(model, requests, residual_query(model, config), config, resources)
    for i, (begun, value) in enumerate(found):
        wanted.append(begun.initial[0].double() + value.delta.double())
        trace += [{"fact": i, **record} for record in value.trace]
        norms.append(float(value.delta.norm()))
        info["engine"] = value.engine
    return torch.stack(wanted), trace, {**info, "delta_norms": norms}
