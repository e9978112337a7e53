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

import torch
from jaxtyping import Float

from driftlens.editing.configs import AlphaEditConfig
from driftlens.editing.memit import wanted_residuals
from driftlens.editing.outcome import NullSpaceState, Outcome, Resources
from driftlens.editing.spreading import Facts, spreading
from driftlens.editing.statistics import KeyCovariance
from driftlens.errors import EditError
from driftlens.facts import EditRequest
from driftlens.interventions import block_out_name
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
    layers, top = config.edited_layers, config.edited_layers[-1]
    state = resources.state
    for layer in layers:
        if layer not in state.projections:
            project(state, layer, resources.covariances[layer], config.nullspace_threshold)
    wanted, trace, info = wanted_residuals(model, requests, top, config, resources)
    facts = Facts(model, requests, resources.contexts)
    with spreading(model, layers, resources.progress) as change:
        for layer, left in change.layers():
            keys = facts.keys(layer)
            residual = (wanted - facts.now(block_out_name(top))) / left
            right = null_space_right(
                keys, state.projections[layer], state.key_sums.get(layer), config.ridge
            )
            change.write(layer, residual, right, null_space=state.ranks[layer])
        # Keys as they are after the whole edit count as earlier ones from now on.
        after = {layer: facts.keys(layer).cpu() for layer in layers}
    for layer, keys in after.items():
        products = keys.T @ keys
        state.key_sums[layer] = state.key_sums.get(layer, 0) + products
    info = {**info, "earlier_facts": state.facts, "layers": change.info}
    state.facts += len(requests)
    return Outcome(change.deltas, trace, info)


def project(state: NullSpaceState, layer: int, covariance: KeyCovariance, threshold: float) -> None:
    """Put the projection onto the null space of other keys into the state.

    Raises:
        EditError: If no direction's second moment is below the threshold.
    """
    if covariance.matrix is None:
        raise EditError(
            "AlphaEdit confines its change to the null space of other keys, and the identity "
            "has none.",
            "Leave covariance out, or give real statistics.",
        )
    moments, directions = torch.linalg.eigh(covariance.matrix.double().cpu())
    small = directions[:, moments < threshold]
    if small.shape[1] == 0:
        raise EditError(
            f"No direction of layer {layer}'s keys has a second moment below {threshold} "
            f"(the smallest is {float(moments[0]):.2g}).",
            "Raise nullspace_threshold.",
        )
    state.projections[layer] = small @ small.T
    state.ranks[layer] = int(small.shape[1])


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
