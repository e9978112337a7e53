"""ROME: rank-one model editing (Meng et al., NeurIPS 2022, section 3.1), and r-ROME.

1. The key: input of the down-projection at the subject's last token; k* is its mean over
   the contexts, k the one of the plain prompt.
2. The value: v* = h_0 + delta, by optimisation (``driftlens.editing.target``).
3. The direction that disturbs other keys least: u = C^-1 k* / |C^-1 k*|.
4. The update: W' = W + r u^T with r = (v* - W k) / (k . u), so that W' k + b = v*.

r-ROME (Gupta et al., 2024, "Rebuilding ROME") takes the mean key k*, and the mean output that
belongs to it, in step 4 too: r = (v* - W k*) / (k* . u). In ROME k . u can be small although
k* . u is not, and then the update disables the model.
"""

from __future__ import annotations

import torch

from driftlens.editing.configs import RomeConfig
from driftlens.editing.outcome import Outcome, Query, Resources, descent_of, find_value, outer
from driftlens.editing.target import down_projection_out
from driftlens.errors import EditError
from driftlens.facts import EditRequest
from driftlens.interventions import down_in_name, down_out_name
from driftlens.models import LensModel

SMALLEST_ALIGNMENT = 1e-6


def rome_query(model: LensModel, config: RomeConfig) -> Query:
    """The vector is added to the down-projection's output; keys are wanted, too."""
    place = down_projection_out(model, config.layer)
    return Query(
        config.layer, (place,), descent_of(config), (down_in_name(config.layer),),
        kl_position=config.kl_position,
    )  # fmt: skip


def rome(
    model: LensModel, request: EditRequest, config: RomeConfig, resources: Resources
) -> Outcome:
    """ROME's rank-one update for one fact.

    Raises:
        EditError: If the plain prompt's key is orthogonal to the update's direction.
    """
    return _rank_one(model, request, config, resources, averages=False)


def r_rome(
    model: LensModel, request: EditRequest, config: RomeConfig, resources: Resources
) -> Outcome:
    """r-ROME's rank-one update for one fact.

    Raises:
        EditError: If the mean key is orthogonal to the update's direction.
    """
    return _rank_one(model, request, config, resources, averages=True)


def _rank_one(
    model: LensModel,
    request: EditRequest,
    config: RomeConfig,
    resources: Resources,
    averages: bool,
) -> Outcome:
    layer = config.layer
    down = model.down_projection(layer)
    keys_name, out_name = down_in_name(layer), down_out_name(layer)

    # 1. and 2. Keys and outputs, of the plain prompt and of the contexts; the value.
    begun, value = find_value(model, request, rome_query(model, config), resources)
    mean_key = begun.contexts[keys_name].mean(0).cpu()

    # 3. The direction.
    solved = resources.covariances[layer].solve(mean_key)
    direction = solved / solved.norm()

    # 4. The update. h_0 is the plain prompt's own output, so there v* - W k is delta. In float64 on
    # the CPU, as not every device has it.
    key, residual = begun.plain[keys_name].cpu().double(), value.delta.cpu().double()
    if averages:
        key = mean_key.double()
        mean_out = begun.contexts[out_name].cpu().double().mean(0)
        residual = residual + (begun.plain[out_name].cpu().double() - mean_out)
    overlap = torch.dot(key, direction)
    alignment = float(overlap / key.norm())
    if abs(alignment) < SMALLEST_ALIGNMENT:
        raise EditError(
            f"The key of {request.subject!r} is orthogonal to its own average over the contexts "
            f"(cosine {alignment:.1e}), so the update would explode.",
            "Use other context_prompts.",
        )
    left = residual / overlap
    info = {
        "engine": value.engine,
        "key_alignment": alignment,
        "delta_norm": float(value.delta.norm()),
        "update_norms": {str(layer): float(left.norm())},
    }
    delta = outer(down, left[:, None], direction[:, None])
    return Outcome({down.name: delta}, value.trace, info)
