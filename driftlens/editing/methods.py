"""``edit``: one function for all editors.

To add an editor: write its algorithm in a module of its own, a configuration and a function
``(model, request, config, resources) -> (deltas, trace, info)`` here, and an entry in METHODS.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from driftlens.editing.contexts import Context, parse_contexts, sample_contexts
from driftlens.editing.defaults import DEFAULTS, is_known
from driftlens.editing.penalties import Penalty, as_penalties
from driftlens.editing.rome import as_delta, rome_update
from driftlens.editing.statistics import KeyCovariance, resolve_covariance
from driftlens.editing.target import ValueSearch
from driftlens.edits import Edit, make_edit
from driftlens.errors import RequestError
from driftlens.facts import EditRequest
from driftlens.models import LensModel
from driftlens.reuse import Engine
from driftlens.weights import Delta


@dataclass(frozen=True)
class RomeConfig(ValueSearch):
    """Hyperparameters of ROME: those of the value search, and the layer.

    Args:
        layer: Whose down-projection is edited.
    """

    layer: int = field(kw_only=True)


@dataclass(frozen=True)
class Resources:
    """What every method shares."""

    contexts: list[Context]
    covariance: KeyCovariance
    penalties: tuple[Penalty, ...]
    progress: bool
    engine: Engine | None


Outcome = tuple[dict[str, Delta], list[dict[str, Any]], dict[str, Any]]


def _rome(
    model: LensModel, request: EditRequest, config: RomeConfig, resources: Resources
) -> Outcome:
    down = model.down_projection(config.layer)
    update = rome_update(
        model,
        request,
        config.layer,
        config,
        resources.contexts,
        resources.covariance,
        resources.penalties,
        resources.progress,
        resources.engine,
    )
    info = {
        "engine": update.value.engine,
        "key_alignment": update.alignment,
        "delta_norm": float(update.value.delta.norm()),
        "update_norm": float(update.left_output.norm()),
    }
    return {down.name: as_delta(update, down.input_first)}, update.value.trace, info


@dataclass(frozen=True)
class Method:
    """An editor: its configuration and its function."""

    config: type[RomeConfig]
    run: Callable[[LensModel, EditRequest, Any, Resources], Outcome]


METHODS: dict[str, Method] = {"rome": Method(RomeConfig, _rome)}


def edit(
    model: LensModel,
    request: EditRequest,
    method: str = "rome",
    *,
    config: RomeConfig | None = None,
    penalty: Penalty | Sequence[Penalty] | None = None,
    context_prompts: Sequence[str] | None = None,
    covariance: Any = None,
    seed: int = 0,
    progress: bool = True,
    engine: Engine | None = None,
    **overrides: Any,
) -> Edit:
    """Edit one fact.

    The model itself is left unchanged: the returned edit is switched on by
    ``with edit.applied(model):``.

    Args:
        model: From :func:`~driftlens.load_model`. If an edit is applied to it now, the new
            one is made on top of that.
        request: The fact.
        method: ``"rome"``.
        config: All hyperparameters; by default those for this model.
        penalty: A restriction such as ``SADR(gamma=0.05)``, or several; they add up.
        context_prompts: Templates with one ``{}`` for the prompt, e.g. ``["{}", "Yes. {}"]``;
            by default the prompt alone and 20 sentences that the model writes itself.
        covariance: Second moments of the layer's keys: ``None`` (over 100,000 tokens of
            Wikipedia leads, computed once and cached), ``"identity"``, a path to an
            ``.npz``, a :class:`~driftlens.editing.statistics.KeyCovariance`, or texts.
        seed: Of the sampled contexts.
        progress: Whether to show bars.
        engine: ``"suffix"`` reuses at every step what the edit cannot change, ``"plain"`` runs
            whole sequences; ``None`` takes the former wherever it is exact. The edit's
            ``info["engine"]`` says which it was.
        overrides: Single hyperparameters, e.g. ``layer=8, steps=40``.

    Raises:
        RequestError: On an unknown method or hyperparameter, or a value out of range.
        ModelError: If the layer is out of range or cannot be edited.
        TokenError: If subject or target cannot be tokenized.
        EditError: If the edit cannot be computed.
    """
    started = time.monotonic()
    if not isinstance(request, EditRequest):
        raise RequestError(
            f"request must be an EditRequest, not {type(request).__name__}.",
            "Edit several facts one after another, each with a call of its own.",
        )
    chosen = resolve_config(model, method, config, overrides)
    model.down_projection(chosen.layer)
    penalties = as_penalties(penalty)
    contexts = (
        sample_contexts(model, seed=seed)
        if context_prompts is None
        else parse_contexts(context_prompts)
    )
    if model.weights.is_edited and covariance is None:
        raise RequestError(
            "An edit is applied now, and the covariance is that of the unedited model.",
            "Compute it before with key_covariance(model, layer), and pass it as covariance.",
        )
    statistics = resolve_covariance(model, chosen.layer, covariance, progress=progress)
    resources = Resources(contexts, statistics, penalties, progress, engine)
    deltas, trace, info = METHODS[method].run(model, request, chosen, resources)
    return make_edit(
        model,
        deltas,
        method=method,
        requests=(request,),
        config={
            **asdict(chosen),
            "penalties": [p.to_dict() for p in penalties],
            "contexts": [[c.before, c.after] for c in contexts],
            "covariance": statistics.to_dict(),
            "seed": seed,
            "prepends_bos": model.info.prepends_bos,
            "dtype": model.info.dtype,
        },
        trace=trace,
        info={**info, "seconds": time.monotonic() - started},
    )


def resolve_config(
    model: LensModel, method: str, config: RomeConfig | None, overrides: dict[str, Any]
) -> RomeConfig:
    """The configuration that is used: given, or the model's defaults, with overrides.

    Raises:
        RequestError: On an unknown method or hyperparameter, or a value out of range.
    """
    if method not in METHODS:
        raise RequestError(
            f"There is no editor {method!r}.", f"Choose one of {', '.join(sorted(METHODS))}."
        )
    kind = METHODS[method].config
    known = [item.name for item in fields(kind)]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise RequestError(
            f"{method} has no hyperparameter {unknown[0]!r}.", f"It has {', '.join(known)}."
        )
    if config is None:
        if "layer" not in overrides and not is_known(model):
            warnings.warn(
                f"No layer is known to be good for {method} on {model.info.name}; taking one at a "
                "quarter of its depth. Pass layer=... to choose.",
                stacklevel=3,
            )
        config = kind(**DEFAULTS[method](model))
    config = replace(config, **overrides)
    _check_config(model, config)
    return config


def _check_config(model: LensModel, config: RomeConfig) -> None:
    model.check_layer(config.layer)
    if not isinstance(config.steps, int) or config.steps < 1:
        raise RequestError(f"steps is {config.steps!r}.", "Give a whole number of at least 1.")
    for name in ("lr", "clamp_factor"):
        if not 0 < getattr(config, name) < float("inf"):
            raise RequestError(f"{name} is {getattr(config, name)!r}.", "Give a positive number.")
    if config.early_stop_loss != config.early_stop_loss:
        raise RequestError("early_stop_loss is NaN.", "Give a number; a negative one never stops.")
    for name in ("weight_decay", "kl_factor"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise RequestError(
                f"{name} is {getattr(config, name)!r}.", "Give a number of at least 0."
            )
