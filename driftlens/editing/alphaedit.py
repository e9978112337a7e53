"""AlphaEdit: null-space constrained knowledge editing (Fang et al., ICLR 2025).

MEMIT's values, keys and residuals, but the change is confined to the null space of other keys.
P projects onto the directions in which C is almost zero; M is the sum of k k^T over the keys of
all earlier edits; then

    [P (K K^T + M) + L2 I] Delta^T = P K R^T      and      W' = W + Delta.

With K_P = P K this is Delta = R K_P^T S^-1, where S = K_P K_P^T + P M P + L2 I is symmetric and
positive definite. P and M are kept by the caller in a :class:`NullSpaceState`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float

from driftlens.editing.configs import AlphaEditConfig
from driftlens.editing.memit import residual_query
from driftlens.editing.outcome import NullSpaceState, Outcome, Resources
from driftlens.editing.spreading import Facts, spread
from driftlens.editing.statistics import KeyCovariance
from driftlens.errors import EditError
from driftlens.facts import EditRequest
from driftlens.models import LensModel


def alphaedit(
    model: LensModel,
    requests: Sequence[EditRequest],
    config: AlphaEditConfig,
    resources: Resources,
) -> Outcome:
    """AlphaEdit's update for one fact or many, on top of those in ``resources.state``.

    Raises:
        EditError: If the null space is empty, or the change is not finite.
    """
    layers, state = config.edited_layers, resources.state
    for layer in layers:
        threshold, given = config.nullspace_threshold, resources.covariances.get(layer)
        if layer not in state.projections:
            project(state, layer, resources.covariances[layer], threshold, model)
        else:
            _check_source(state, layer, given, threshold, model)

    def right(layer: int, keys: Float[torch.Tensor, "fact d_mlp"]) -> torch.Tensor:
        earlier = state.key_sums.get(layer)
        return null_space_right(keys, state.projections[layer], earlier, config.ridge)

    # Keys as they are after the whole edit count as earlier ones from then on.
    products: dict[int, torch.Tensor] = {}

    def look(facts: Facts) -> None:
        for layer in layers:
            keys = facts.keys(layer).cpu()
            products[layer] = keys.T @ keys

    query = residual_query(model, config)
    outcome = spread(model, requests, query, config, resources, right, afterwards=look)
    for layer, product in products.items():
        state.key_sums[layer] = state.key_sums.get(layer, 0) + product
    null_space = {str(layer): state.ranks[layer] for layer in layers}
    info = {**outcome.info, "null_space": null_space, "earlier_facts": state.facts}
    state.facts += len(requests)
    return replace(outcome, info=info)


def project(
    state: NullSpaceState,
    layer: int,
    covariance: KeyCovariance,
    threshold: float,
    model: LensModel | None = None,
) -> None:
    """Put the projection onto the null space of other keys into the state.

    Args:
        model: Which is remembered, so that the state is not used for another one.

    Raises:
        EditError: If no direction's second moment is below the threshold, or the moments are of
            too little text.
    """
    if covariance.matrix is None:
        raise EditError(
            "AlphaEdit confines its change to the null space of other keys, and the identity "
            "has none.",
            "Leave covariance out, or give real statistics.",
        )
    covariance.check_enough_text()
    moments, directions = torch.linalg.eigh(covariance.matrix.cpu().double())
    small = directions[:, moments < threshold]
    if small.shape[1] == 0:
        raise EditError(
            f"No direction of layer {layer}'s keys has a second moment below {threshold} "
            f"(the smallest is {float(moments[0]):.2g}).",
            "Raise nullspace_threshold.",
        )
    state.projections[layer] = small @ small.T
    state.ranks[layer] = int(small.shape[1])
    if model is not None:
        state.sources[layer] = _source(covariance, threshold, model)


def _source(covariance: KeyCovariance | None, threshold: float, model: LensModel) -> dict[str, Any]:
    """What a projection depends on."""
    found: dict[str, Any] = {"model": model.fingerprint(), "nullspace_threshold": threshold}
    return found if covariance is None else {**found, "covariance": covariance.to_dict()}


def _check_source(
    state: NullSpaceState,
    layer: int,
    covariance: KeyCovariance | None,
    threshold: float,
    model: LensModel,
) -> None:
    """Refuse a projection that is of something else than what is asked for now.

    Raises:
        EditError: Naming what differs.
    """
    known = state.sources.get(layer, {})
    for name, value in _source(covariance, threshold, model).items():
        if name in known and known[name] != value:
            raise EditError(
                f"The state's null space in layer {layer} is of another {name}.",
                "Pass a new NullSpaceState, or the same arguments as before.",
            )


def null_space_right(
    keys: Float[torch.Tensor, "fact d_mlp"],
    projection: Float[torch.Tensor, "d_mlp d_mlp"],
    earlier: Float[torch.Tensor, "d_mlp d_mlp"] | None,
    ridge: float,
) -> Float[torch.Tensor, "d_mlp fact"]:
    """``S^-1 K_P``, in float64."""
    inside = projection @ keys.T.to(projection)
    system = inside @ inside.T
    if earlier is not None:
        system = system + projection @ earlier.to(projection) @ projection
    system = system + ridge * torch.eye(len(system), dtype=system.dtype, device=system.device)
    return torch.cholesky_solve(inside, torch.linalg.cholesky(system))
