"""GRACE: general retrieval adaptors for continual editing (Hartvigsen et al., NeurIPS 2023).

No weight changes. One layer's down-projection gets a codebook: where its input lies near to the
key of an edited prompt, its output is a trained value instead.

1. The key: the layer's input at the last prompt token.
2. The value: from the layer's own output there, trained by Adam on
   mean over target tokens of -log P(o_t), and the penalties.
3. The radius within which the value answers; among several edits balls give way to one another
   (``driftlens.codebook``).

The value starts as what the layer says (the authors' code offers that, and a random start, which
no penalty could be measured from).
"""

from __future__ import annotations

from driftlens.codebook import Codebook
from driftlens.editing.configs import GraceConfig
from driftlens.editing.outcome import Outcome, Query, Resources, find_value
from driftlens.editing.target import Below, Descent, down_projection_out
from driftlens.facts import EditRequest
from driftlens.interventions import down_in_name, down_out_name
from driftlens.models import LensModel


def grace_query(model: LensModel, config: GraceConfig) -> Query:
    """The vector is added to the down-projection's output at the last prompt token."""
    search = Descent(
        steps=config.steps,
        lr=config.lr,
        weight_decay=0.0,
        clamp_factor=float("inf"),
        kl_factor=0.0,
        stops=Below("nll", config.stop_loss),
    )
    place = down_projection_out(model, config.layer)
    return Query(config.layer, (place,), search, (down_in_name(config.layer),), "last_prompt")


def grace(
    model: LensModel, request: EditRequest, config: GraceConfig, resources: Resources
) -> Outcome:
    """GRACE's adapter for one fact.

    Raises:
        EditError: If the loss stops being a number.
    """
    layer = config.layer
    down = model.down_projection(layer)
    begun, value = find_value(model, request, grace_query(model, config), resources)
    key, output = begun.plain[down_in_name(layer)], begun.plain[down_out_name(layer)]
    entry = Codebook.single(
        key, output + value.delta, config.radius, request.target_new, down.input_first
    )
    trace = [{k: v for k, v in r.items() if k not in ("kl", "decay")} for r in value.trace]
    info = {
        "engine": value.engine,
        "delta_norm": float(value.delta.norm()),
        "key_norm": float(key.norm()),
    }
    return Outcome({down.name: entry}, trace, info)
