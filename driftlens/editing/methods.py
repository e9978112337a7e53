"""``edit`` and ``edit_sequence``: one function for all editors.

To add an editor: write its algorithm in a module of its own, as a function
``(model, request or requests, config, resources) -> Outcome``, its configuration in
``configs.py``, its defaults in ``defaults.py``, and an entry in METHODS here.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from driftlens.editing.alphaedit import alphaedit
from driftlens.editing.configs import (
    AlphaEditConfig,
    EditConfig,
    EmmetConfig,
    FtConfig,
    GraceConfig,
    MemitConfig,
    PmetConfig,
    RomeConfig,
    ValueSearch,
    checked,
)
from driftlens.editing.contexts import Context, parse_contexts, sample_contexts
from driftlens.editing.defaults import defaults, is_known
from driftlens.editing.emmet import emmet
from driftlens.editing.family import as_penalties
from driftlens.editing.fine_tuning import ft_each, ft_l, ft_m
from driftlens.editing.grace import grace, grace_query
from driftlens.editing.memit import memit, residual_query
from driftlens.editing.outcome import NullSpaceState, Outcome, Query, Resources, ValueStore
from driftlens.editing.penalties import Penalty
from driftlens.editing.pmet import pmet, pmet_query
from driftlens.editing.rome import r_rome, rome, rome_query
from driftlens.editing.statistics import resolve_covariances
from driftlens.editing.target import build_problem
from driftlens.edits import Edit, make_edit
from driftlens.errors import EditError, RequestError, as_integer
from driftlens.facts import EditRequest
from driftlens.models import LensModel
from driftlens.reuse import Engine
from driftlens.weights import RESET, Delta, combined


@dataclass(frozen=True)
class Method:
    """An editor.

    Args:
        title: Its name and where it was published.
        config: Its configuration.
        run: Its function; of one fact, or of a list of facts if it takes several.
        takes_several: Whether it edits many facts at once.
        needs_covariance: Whether it needs second moments of other keys.
        query: What it searches values of, if it does.
        each: Its function for several facts, each on its own, if it shares passes otherwise.
    """

    title: str
    config: type[EditConfig]
    run: Callable[[LensModel, Any, Any, Resources], Outcome]
    takes_several: bool = False
    needs_covariance: bool = True
    query: Callable[[LensModel, Any], Query] | None = None
    each: Callable[[LensModel, Sequence[EditRequest], Any, Resources], list[Outcome]] | None = None


METHODS: dict[str, Method] = {
    "rome": Method("ROME (Meng et al., NeurIPS 2022)", RomeConfig, rome, query=rome_query),
    "r-rome": Method("r-ROME (Gupta et al., 2024)", RomeConfig, r_rome, query=rome_query),
    "memit": Method(
        "MEMIT (Meng et al., ICLR 2023)", MemitConfig, memit,
        takes_several=True, query=residual_query,
    ),
    "pmet": Method(
        "PMET (Li et al., AAAI 2024)", PmetConfig, pmet, takes_several=True, query=pmet_query
    ),
    "emmet": Method(
        "EMMET (Gupta et al., 2024)", EmmetConfig, emmet, takes_several=True, query=residual_query
    ),
    "alphaedit": Method(
        "AlphaEdit (Fang et al., ICLR 2025)", AlphaEditConfig, alphaedit,
        takes_several=True, query=residual_query,
    ),
    "ft-l": Method(
        "FT-L: fine-tuning (Meng et al., 2022)", FtConfig, ft_l,
        takes_several=True, needs_covariance=False, each=partial(ft_each, teacher_forced=False),
    ),
    "ft-m": Method(
        "FT-M: fine-tuning (Zhang et al., 2024)", FtConfig, ft_m,
        takes_several=True, needs_covariance=False, each=partial(ft_each, teacher_forced=True),
    ),
    "grace": Method(
        "GRACE (Hartvigsen et al., NeurIPS 2023)", GraceConfig, grace,
        needs_covariance=False, query=grace_query,
    ),
}  # fmt: skip


def edit(
    model: LensModel,
    request: EditRequest | Sequence[EditRequest],
    method: str = "rome",
    *,
    config: EditConfig | None = None,
    penalty: Penalty | Sequence[Penalty] | None = None,
    context_prompts: Sequence[str] | None = None,
    covariance: Any = None,
    seed: int = 0,
    progress: bool = True,
    engine: Engine | None = None,
    state: NullSpaceState | None = None,
    **overrides: Any,
) -> Edit:
    """Edit one fact, or many at once.

    The model itself is left unchanged: the returned edit is switched on by
    ``with edit.applied(model):``.

    Args:
        model: From :func:`~driftlens.load_model`. If an edit is applied to it now, the new
            one is made on top of that.
        request: The fact; or several, for MEMIT, PMET, EMMET, AlphaEdit and fine-tuning.
        method: One of ``"rome"``, ``"r-rome"``, ``"memit"``, ``"pmet"``, ``"emmet"``,
            ``"alphaedit"``, ``"ft-l"``, ``"ft-m"``, ``"grace"``; ``driftlens methods`` lists
            them with their hyperparameters.
        config: All hyperparameters; by default those for this model.
        penalty: A restriction such as ``SADR(gamma=0.05)``, or several; they add up.
        context_prompts: Templates with one ``{}`` for the prompt, e.g. ``["{}", "Yes. {}"]``;
            by default the prompt alone and sentences that the model writes itself, as many as
            ``context_lengths`` and ``contexts_per_word`` say (for ROME 20, on the bundled models 5;
            5 for MEMIT and its relatives; fine-tuning and GRACE use none).
        covariance: Second moments of the edited layers' keys: ``None`` (over 100,000 tokens of
            Wikipedia leads, computed once and cached), ``"identity"``, a path to an
            ``.npz``, a :class:`~driftlens.editing.statistics.KeyCovariance`, texts (of which the
            first 100,000 tokens count;
            ``driftlens.editing.statistics.key_covariances`` takes more), or a mapping of
            layers to paths or covariances.
        seed: Of the sampled contexts.
        progress: Whether to show bars.
        engine: ``"suffix"`` reuses at every step what the edit cannot change, ``"plain"`` runs
            whole sequences; ``None`` takes the former wherever it is exact. The edit's
            ``info["engine"]`` says which it was.
        state: For AlphaEdit: pass the same object to one edit after another; it then protects
            the facts of the earlier ones.
        overrides: Single hyperparameters, e.g. ``layer=8, steps=40``.

    Raises:
        RequestError: On an unknown method or hyperparameter, a value out of range, several facts
            for a method that takes one, or a prompt that is longer than the model's context.
        ModelError: If a layer is out of range or cannot be edited.
        TokenError: If subject or target cannot be tokenized.
        EditError: If the edit cannot be computed.
    """
    started = time.monotonic()
    requests = _requests(request)
    seed = as_integer("seed", seed)
    chosen = resolve_config(model, method, config, overrides)
    if len(requests) > 1 and not METHODS[method].takes_several:
        raise RequestError(
            f"{method} edits one fact at a time, and {len(requests)} are given.",
            "Use edit_sequence, or one of "
            f"{', '.join(name for name, m in METHODS.items() if m.takes_several)}.",
        )
    resources = _resources(
        model, method, chosen, penalty, context_prompts, covariance, seed, progress, engine, state
    )
    outcome = _run(model, requests, method, chosen, resources)
    return make_edit(
        model,
        outcome.deltas,
        method=method,
        requests=requests,
        config=_record(model, chosen, resources, seed),
        trace=outcome.trace,
        info={**outcome.info, "seconds": time.monotonic() - started},
    )


def edit_each(
    model: LensModel,
    requests: Sequence[EditRequest],
    method: str = "rome",
    *,
    config: EditConfig | None = None,
    penalty: Penalty | Sequence[Penalty] | None = None,
    context_prompts: Sequence[str] | None = None,
    covariance: Any = None,
    seed: int = 0,
    progress: bool = True,
    engine: Engine | None = None,
    store: ValueStore | None = None,
    **overrides: Any,
) -> Iterator[Edit]:
    """Edit facts independently of one another: an edit of the given model for each.

    The same as calling :func:`edit` for each fact, but values of many facts are searched in
    shared passes, which takes less time. An edit's ``info["seconds"]`` is its share of that.

    Args:
        requests: The facts; their edits come in this order, once all values are found.
        store: Pass the same one again to edit the same facts with an editor that searches for
            the same values: it then takes those that were found.

    The others are those of :func:`edit`. AlphaEdit treats each fact as the first one.

    Raises:
        RequestError: As :func:`edit`.
        ModelError: As :func:`edit`.
        TokenError: If any subject or target cannot be tokenized.
        EditError: If an edit cannot be computed, or the edits that are applied to the model
            change between two of them.
    """
    facts = _requests(requests)
    seed = as_integer("seed", seed)
    chosen = resolve_config(model, method, config, overrides)
    state = NullSpaceState() if method == "alphaedit" else None
    resources = _resources(
        model, method, chosen, penalty, context_prompts, covariance, seed, progress, engine, state
    )
    known, around = ValueStore() if store is None else store, model.weights.active
    found = _outcomes_of_each(model, facts, method, chosen, resources, known)
    for request, (outcome, seconds) in zip(facts, found, strict=True):
        yield make_edit(
            model,
            outcome.deltas,
            method=method,
            requests=(request,),
            config=_record(model, chosen, resources, seed),
            trace=outcome.trace,
            info={**outcome.info, "seconds": seconds},
        )
        if model.weights.active != around:
            raise EditError(
                "Other edits are applied to the model than when the first of these was made.",
                "Apply them when all are made: edits = list(edit_each(...)).",
            )


def _outcomes_of_each(
    model: LensModel,
    facts: Sequence[EditRequest],
    method: str,
    config: EditConfig,
    resources: Resources,
    store: ValueStore,
) -> Iterator[tuple[Outcome, float]]:
    """What each fact's edit is on its own, and its share of the seconds."""
    entry, started = METHODS[method], time.monotonic()
    if entry.each is not None:
        outcomes = entry.each(model, facts, config, resources)
        share = (time.monotonic() - started) / len(facts)
        yield from ((outcome, share) for outcome in outcomes)
        return
    searched: Sequence[Any] = [None] * len(facts)
    if entry.query is not None:
        searched = store.find_values(model, facts, entry.query(model, config), resources)
    for request, value in zip(facts, searched, strict=True):
        started = time.monotonic()
        known = {} if value is None else {request: value}
        own = replace(resources, found=known, state=resources.state.fresh())
        outcome = _run(model, (request,), method, config, own)
        before = 0.0 if value is None else value[1].seconds
        yield outcome, before + time.monotonic() - started


def edit_sequence(
    model: LensModel,
    requests: Sequence[EditRequest],
    method: str = "rome",
    *,
    config: EditConfig | None = None,
    penalty: Penalty | Sequence[Penalty] | None = None,
    context_prompts: Sequence[str] | None = None,
    covariance: Any = None,
    seed: int = 0,
    progress: bool = True,
    engine: Engine | None = None,
    state: NullSpaceState | None = None,
    after_each: Callable[[int, LensModel], None] | None = None,
    **overrides: Any,
) -> Edit:
    """Edit facts one after another, each on top of those before.

    Contexts and second moments are those of the model as it is given. What is returned is one
    edit that does what all of them do together; its trace has a column ``fact``.

    Args:
        requests: The facts, in order.
        state: For AlphaEdit; by default a fresh one that all edits of the sequence share. It is
            changed only if all of them succeed.
        after_each: Called with the number of edits so far and the model, while these are
            applied; e.g. to score it.

    The others are those of :func:`edit`.

    Raises:
        RequestError: As :func:`edit`.
        ModelError: As :func:`edit`.
        TokenError: If any subject or target cannot be tokenized; before the first edit.
        EditError: If an edit cannot be computed, with its number.
    """
    started = time.monotonic()
    facts = _requests(requests)
    seed = as_integer("seed", seed)
    chosen = resolve_config(model, method, config, overrides)
    for request in facts:
        build_problem(model, request, [Context()])
    resources = _resources(
        model, method, chosen, penalty, context_prompts, covariance, seed, progress, engine, state
    )
    lasting, resources = resources.state, replace(resources, state=resources.state.copy())
    deltas: dict[str, Delta] = {}
    trace: list[dict[str, Any]] = []
    infos: list[dict[str, Any]] = []
    ticket: int | None = None
    try:
        for i, request in enumerate(tqdm(facts, desc=method, unit="fact", disable=not progress)):
            try:
                outcome = _run(model, (request,), method, chosen, resources)
            except EditError as error:
                raise EditError(
                    f"Edit {i} of {len(facts)}: {error.problem}", error.remedy
                ) from error
            for name, delta in outcome.deltas.items():
                deltas[name] = combined(deltas[name], delta) if name in deltas else delta
            trace += [{**record, "fact": i} for record in outcome.trace]
            infos.append(outcome.info)
            if ticket is not None:
                model.weights.pop(ticket)
            ticket = model.weights.push(deltas)
            if after_each is not None:
                after_each(i + 1, model)
    finally:
        if ticket is not None:
            model.weights.pop(ticket)
    lasting.update(resources.state)
    return make_edit(
        model,
        deltas,
        method=method,
        requests=facts,
        config=_record(model, chosen, resources, seed),
        trace=trace,
        info={
            "engine": infos[-1]["engine"],
            "sequence": infos,
            "seconds": time.monotonic() - started,
        },
    )


def config_of(method: str) -> type[EditConfig]:
    """The kind of an editor's configuration.

    Raises:
        RequestError: On an unknown method.
    """
    if method not in METHODS:
        raise RequestError(
            f"There is no editor {method!r}.", f"Choose one of {', '.join(METHODS)}."
        )
    return METHODS[method].config


def resolve_config(
    model: LensModel,
    method: str,
    config: EditConfig | None = None,
    overrides: dict[str, Any] | None = None,
) -> Any:
    """The configuration that is used: given, or the model's defaults, with overrides.

    Raises:
        RequestError: On an unknown method or hyperparameter, or a value out of range.
        ModelError: If a layer is out of range or cannot be edited.
    """
    kind, overrides = config_of(method), dict(overrides or {})
    if config is None:
        if not {"layer", "layers"} & set(overrides) and not is_known(model, method):
            warnings.warn(
                f"No layers are known to be good for {method} on {model.info.name}; taking some "
                f"by its depth. Pass layer=... (or layers=...) to choose.",
                stacklevel=3,
            )
        values = defaults(model, method)
    elif type(config) is kind:
        values = {item.name: getattr(config, item.name) for item in fields(config)}
    else:
        raise RequestError(
            f"The configuration is a {type(config).__name__}, and {method} needs a {kind.__name__}."
        )
    found = checked(kind, {**values, **overrides}, method)
    for layer in found.edited_layers:
        model.down_projection(layer)
    return found


def _requests(given: EditRequest | Sequence[EditRequest]) -> tuple[EditRequest, ...]:
    requests = (given,) if isinstance(given, EditRequest) else given
    if not isinstance(requests, (list, tuple)):
        raise RequestError(
            f"request must be an EditRequest or a list of them, not {type(given).__name__}."
        )
    for request in requests:
        if not isinstance(request, EditRequest):
            raise RequestError(f"request must be an EditRequest, not {type(request).__name__}.")
        if request.target_new == request.target_true:
            raise RequestError(
                f"{request.target_new!r} is the true answer to {request.text!r}, too: nothing "
                "would be edited.",
                "Give another new target.",
            )
    if not requests:
        raise RequestError("There is no fact to edit.", "Give at least one EditRequest.")
    return tuple(requests)


def _resources(
    model: LensModel,
    method: str,
    config: EditConfig,
    penalty: Penalty | Sequence[Penalty] | None,
    context_prompts: Sequence[str] | None,
    covariance: Any,
    seed: int,
    progress: bool,
    engine: Engine | None,
    state: NullSpaceState | None,
) -> Resources:
    """Everything that an editor needs besides the facts, checked."""
    penalties = as_penalties(penalty)
    for item in penalties:
        item.check(model)
    if state is not None and method != "alphaedit":
        raise RequestError(f"{method} carries no state from edit to edit.", "Leave state out.")
    if covariance is not None and not METHODS[method].needs_covariance:
        raise RequestError(f"{method} uses no second moments of keys.", "Leave covariance out.")
    for layer in config.edited_layers:
        if method != "grace" and model.weights.is_adapted(model.down_projection(layer).name):
            raise EditError(
                f"An adapter is applied beside layer {layer}'s down-projection, and replaces what "
                "a change of that matrix would do.",
                "Edit another layer, or outside of `with edit.applied(model)`.",
            )
    contexts = [Context()]
    if isinstance(config, ValueSearch):
        contexts = (
            parse_contexts(context_prompts)
            if context_prompts is not None
            else sample_contexts(
                model, lengths=config.context_lengths, per_word=config.contexts_per_word, seed=seed
            )
        )
    elif context_prompts is not None:
        raise RequestError(f"{method} uses no contexts.", "Leave context_prompts out.")
    state = NullSpaceState() if state is None else state
    layers = [
        layer
        for layer in config.edited_layers
        if layer not in state.projections or covariance is not None
    ]
    covariances = {}
    if METHODS[method].needs_covariance and layers:
        if model.weights.is_edited and covariance is None:
            raise RequestError(
                "An edit is applied now, and the covariance is that of the unedited model.",
                "Compute it before with key_covariances(model, layers), and pass it as covariance; "
                f"{RESET}.",
            )
        covariances = resolve_covariances(model, layers, covariance, progress=progress)
    return Resources(contexts, covariances, penalties, progress, engine, state)


def _run(
    model: LensModel,
    requests: tuple[EditRequest, ...],
    method: str,
    config: EditConfig,
    resources: Resources,
) -> Outcome:
    entry = METHODS[method]
    facts = requests if entry.takes_several else requests[0]
    return entry.run(model, facts, config, resources)


def _record(
    model: LensModel, config: EditConfig, resources: Resources, seed: int
) -> dict[str, Any]:
    """What an edit remembers of how it was made, JSON-ready."""
    record = {
        **asdict(config),
        "penalties": [p.to_dict() for p in resources.penalties],
        "contexts": [[c.before, c.after] for c in resources.contexts],
        "covariance": {str(y): c.to_dict() for y, c in resources.covariances.items()},
        "seed": seed,
        "prepends_bos": model.info.prepends_bos,
        "dtype": model.info.dtype,
    }
    found: dict[str, Any] = json.loads(json.dumps(record))
    return found
