"""EMMET: an equality-constrained mass model editing (Gupta et al., 2024).

MEMIT's values, keys and residuals, but the facts are to be met exactly, with the least change
of what is said about other keys: with C' = w C + mu I,

    W' = W + R (K^T C'^-1 K + lambda_e I)^-1 K^T C'^-1.

lambda_e = 0 is the exact constraint; with mu = 0 the update is MEMIT's with lambda = w lambda_e.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float

from driftlens.editing.configs import EmmetConfig
from driftlens.editing.memit import residual_query
from driftlens.editing.outcome import Outcome, Resources
from driftlens.editing.spreading import spread
from driftlens.editing.statistics import KeyCovariance
from driftlens.facts import EditRequest
from driftlens.models import LensModel

EQUAL = 1e-9
"""Share of the largest eigenvalue below which keys count as equal: rounding in float32 makes equal
keys differ by about 1e-6 of their length, and so eigenvalues of the square of that."""


def emmet(
    model: LensModel, requests: Sequence[EditRequest], config: EmmetConfig, resources: Resources
) -> Outcome:
    """EMMET's update for one fact or many.

    Raises:
        EditError: If second moments cannot be used, or the change is not finite.
    """

    def right(layer: int, keys: Float[torch.Tensor, "fact d_mlp"]) -> torch.Tensor:
        return equality_right(keys, resources.covariances[layer], config)

    return spread(model, requests, residual_query(model, config), config, resources, right)


def equality_right(
    keys: Float[torch.Tensor, "fact d_mlp"], covariance: KeyCovariance, config: EmmetConfig
) -> Float[torch.Tensor, "d_mlp fact"]:
    """``C'^-1 K (K^T C'^-1 K + lambda_e I)^-1``, in float64.

    Facts that share a key make the inner matrix singular if lambda_e is 0; its pseudo-inverse
    then meets them on average. Such keys may differ by the rounding of the passes that they are
    from, which `EQUAL` covers.
    """
    solved = covariance.solve_scaled(keys.T, config.cov_weight, config.identity_weight)
    inner = keys.to(solved.device) @ solved
    inner = inner + config.key_weight * torch.eye(len(keys), dtype=inner.dtype, device=inner.device)
    return solved @ torch.linalg.pinv(inner, hermitian=True, rtol=EQUAL)
