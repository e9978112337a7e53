"""Where a patch acts: layers, heads, query positions and key columns, resolved and in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from operator import index
from typing import Any, Literal

import torch
from jaxtyping import Bool

from driftlens.attention import head_name, parse_head
from driftlens.errors import RequestError, check_choice
from driftlens.models import LensModel
from driftlens.patch_results import Exchange
from driftlens.scoring import Question

Queries = Literal["last", "all"] | int | Iterable[int]
Columns = Literal["subject_last", "subject"] | int | Iterable[int] | None


def resolve_heads(
    model: LensModel,
    layers: int | Iterable[int] | None,
    heads: Iterable[int | str | tuple[int, int]] | int | str | None,
) -> list[tuple[int, int]]:
    """The (layer, head) pairs that are meant.

    Raises:
        RequestError: If a head does not exist, lies outside the chosen layers, is written in an
            unknown way, or may be meant as a head of every layer or as one of a single layer.
        ModelError: If a layer is out of range.
    """
    chosen = list(range(model.info.n_layers)) if layers is None else integers(layers, "layer")
    wanted = [model.check_layer(layer) for layer in chosen]
    if heads is None:
        return [(y, x) for y in sorted(set(wanted)) for x in range(model.info.n_heads)]
    if (
        layers is None
        and isinstance(heads, tuple)
        and len(heads) == 2
        and all(isinstance(part, Integral) for part in heads)
    ):
        first, second = integers(heads, "head")
        raise RequestError(
            f"({first}, {second}) may be one head or two heads of every layer.",
            f"Write [({first}, {second})] for {head_name(first, second)}, or [{first}, {second}] "
            "for these heads of every layer.",
        )
    found: list[tuple[int, int]] = []
    for head in [heads] if isinstance(heads, (int, Integral, str)) else heads:
        if isinstance(head, str):
            found.append(parse_head(head))
        elif isinstance(head, Integral):
            found += [(y, int(head)) for y in wanted]
        else:
            pair = integers(head, "head")
            if len(pair) != 2:
                raise RequestError(f"{head!r} is no head.", "Write it as (layer, head).")
            found.append((pair[0], pair[1]))
    for y, x in found:
        model.check_layer(y)
        if y not in wanted:
            raise RequestError(
                f"The head {head_name(y, x)} is not in the chosen layers.", "Leave layers out."
            )
        model.check_head(y, x)
    if not found:
        raise RequestError("No head is chosen.", "Name at least one, or leave heads out.")
    return sorted(set(found))


def resolve_layers(model: LensModel, layers: int | Iterable[int] | None) -> list[int]:
    """The layers that are meant, ascending."""
    return sorted({layer for layer, _ in resolve_heads(model, layers, None)})


def integers(values: Any, what: str) -> list[int]:
    """One integer or several (of any integer type) as a list.

    Raises:
        RequestError: If there is none, or one is not a whole number.
    """
    try:
        found = [index(value) for value in ([values] if isinstance(values, Integral) else values)]
    except TypeError as error:
        raise RequestError(f"{values!r} is not a {what} or a list of them.") from error
    if not found:
        raise RequestError(f"No {what} is chosen.", "Name at least one, or leave it out.")
    return found


def settled(places: Any, what: str) -> Any:
    """Positions in a form that can be read more than once: a word, none, or a list of integers."""
    return places if places is None or isinstance(places, str) else integers(places, what)


def where_patched(
    model: LensModel, question: Question, width: int, heads: Sequence[int], queries: Queries
) -> Bool[torch.Tensor, "head query"]:
    """The (head, query) pairs to patch in one layer of one sequence."""
    where = torch.zeros(model.info.n_heads, width, dtype=torch.bool)
    positions = torch.tensor(positions_of(question, queries))
    where[torch.tensor(heads)[:, None], positions] = True
    return where


def positions_of(question: Question, queries: Queries) -> list[int]:
    """The query positions that are meant in one sequence: prompt and answer without its last token.

    Raises:
        RequestError: If a position lies outside the prompt.
    """
    length = len(question.prompt)
    if isinstance(queries, str):
        check_choice("queries", queries, ("last", "all"))
        return question.predicting if queries == "last" else list(range(len(question.ids)))
    positions = []
    for query in integers(queries, "query position"):
        if not -length <= query < length:
            raise RequestError(
                f"There is no query position {query} in a prompt of {length} tokens."
            )
        positions.append(query % length)
    return positions


def sweep_places(
    n_layers: int, n_heads: int, windows: Sequence[tuple[int, int]]
) -> list[list[tuple[int, int]]]:
    """The (layer, head) pairs of each patch of a sweep, in the order of the result."""
    one_head = [[(y, x)] for y in range(n_layers) for x in range(n_heads)]
    whole = [[(y, x) for x in range(n_heads)] for y in range(n_layers)]
    several = [[p for y in range(a, b + 1) for p in whole[y]] for a, b in windows]
    return [*one_head, *whole, *several, [p for row in whole for p in row]]


def describe(
    model: LensModel,
    places: Sequence[tuple[int, int]],
    queries: Queries,
    columns: Columns,
    exchange: Exchange,
) -> str:
    """What a patch of attention exchanges, in words."""
    layers = sorted({y for y, _ in places})
    if len(places) == len(layers) * model.info.n_heads:
        where = f"all heads of {layers_in_words(model, layers)}"
    else:
        where = ", ".join(head_name(y, x) for y, x in places)
    words = f"attention {exchange} of {where}, {in_words(queries)}"
    if columns is not None:
        words += f", key columns {_listed(columns)} (rows renormalised)"
    return words


def layers_in_words(model: LensModel, layers: Sequence[int]) -> str:
    """Layers, ascending, in as few words as say which."""
    if len(layers) == model.info.n_layers:
        return "all layers"
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {list(layers)}"


def in_words(queries: Queries) -> str:
    """Query positions in words."""
    if isinstance(queries, str):
        return {"last": "rows of the last token", "all": "rows of all tokens"}[queries]
    return f"rows of the positions {_listed(queries)}"


def _listed(places: Any) -> str:
    return places if isinstance(places, str) else ", ".join(map(str, places))
