"""What every editor is given besides the facts, and what it returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from driftlens.editing.configs import ValueSearch
from driftlens.editing.contexts import Context
from driftlens.editing.penalties import Penalty
from driftlens.editing.statistics import KeyCovariance
from driftlens.editing.target import (
    Below,
    Descent,
    KlPosition,
    Place,
    Start,
    Token,
    Value,
    ValueProblem,
    build_problem,
    entered,
    optimise_values,
    start,
)
from driftlens.facts import EditRequest
from driftlens.models import LensModel
from driftlens.parameters import DownProjection
from driftlens.reuse import Engine, budget, choose_engine, in_batches
from driftlens.weights import Delta, LowRankDelta

Found = tuple[Start, Value]
"""What was known before a search, and what it found."""

VALUE_BUDGET = 512 * 2**20
"""Bytes that value searches in one pass may keep on the CPU; does not change results."""

PASS_COST = 36
"""What a pass costs on the CPU beside its positions, in positions of rows: with SmolLM2-135M on one
core, shared passes over facts of unlike length took as long as a pass for each fact."""


@dataclass(eq=False)
class NullSpaceState:
    """What AlphaEdit carries from one edit to the next: pass the same object to each.

    Args:
        projections: For each layer, the projection onto the null space of other keys.
        ranks: For each layer, the dimension of that null space.
        key_sums: For each layer, the sum of ``k k^T`` over the keys of all edits so far.
        facts: Number of facts edited so far.
        sources: For each layer, what its projection is of: model, threshold, second moments.
    """

    projections: dict[int, Float[torch.Tensor, "d_mlp d_mlp"]] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    key_sums: dict[int, Float[torch.Tensor, "d_mlp d_mlp"]] = field(default_factory=dict)
    facts: int = 0
    sources: dict[int, dict[str, Any]] = field(default_factory=dict)

    def fresh(self) -> NullSpaceState:
        """A state with these projections and no edit so far."""
        return NullSpaceState(self.projections, self.ranks, sources=self.sources)

    def copy(self) -> NullSpaceState:
        """A state that goes its own way."""
        return NullSpaceState(
            dict(self.projections),
            dict(self.ranks),
            dict(self.key_sums),
            self.facts,
            dict(self.sources),
        )

    def update(self, other: NullSpaceState) -> None:
        """Become another one."""
        vars(self).update(vars(other.copy()))


@dataclass(frozen=True)
class Resources:
    """What every method shares.

    Args:
        contexts: In which values and keys are taken.
        covariances: Second moments of other keys, for each edited layer that needs them.
        penalties: That are added to the loss.
        progress: Whether to show bars.
        engine: How passes are run; ``None``: the fast way wherever it is exact.
        state: What AlphaEdit carries from edit to edit.
        found: Values that are known already.
    """

    contexts: Sequence[Context]
    covariances: Mapping[int, KeyCovariance] = field(default_factory=dict)
    penalties: Sequence[Penalty] = ()
    progress: bool = True
    engine: Engine | None = None
    state: NullSpaceState = field(default_factory=NullSpaceState)
    found: Mapping[EditRequest, Found] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What an editor computed.

    Args:
        deltas: Change of each parameter.
        trace: One record per fact and optimisation step.
        info: Norms, ranks and whatever else is worth keeping.
    """

    deltas: dict[str, Delta]
    trace: list[dict[str, Any]]
    info: dict[str, Any]


def descent_of(config: ValueSearch) -> Descent:
    """The search that a configuration describes."""
    return Descent(
        steps=config.steps,
        lr=config.lr,
        weight_decay=config.weight_decay,
        clamp_factor=config.clamp_factor,
        kl_factor=config.kl_factor,
        stops=Below("loss", config.early_stop_loss),
    )


@dataclass(frozen=True)
class Query:
    """What a method lets the search look for.

    Args:
        layer: The lowest layer to whose outputs a vector is added.
        places: Where vectors are added.
        search: How.
        record: Further hooks whose activations are wanted at the same token.
        token: Where vectors are added.
        kl_position: Where the KL term reads.
    """

    layer: int
    places: tuple[Place, ...]
    search: Descent
    record: tuple[str, ...] = ()
    token: Token = "subject"
    kl_position: KlPosition = "subject"


def find_value(
    model: LensModel,
    request: EditRequest,
    query: Query,
    resources: Resources,
) -> Found:
    """What is known before the search for one fact's values, and what it found.

    Raises:
        TokenError: If the subject cannot be located or the target is empty.
        EditError: If the loss stops being a number.
    """
    return find_values(model, [request], query, resources)[0]


def find_values(
    model: LensModel,
    requests: Sequence[EditRequest],
    query: Query,
    resources: Resources,
) -> list[Found]:
    """The same for many facts: those of like length in shared passes, as far as memory allows.

    Raises:
        TokenError: If a subject cannot be located or a target is empty.
        EditError: If a loss stops being a number.
    """
    room = budget(model, VALUE_BUDGET)
    found = {i: resources.found[r] for i, r in enumerate(requests) if r in resources.found}
    missing = [i for i in range(len(requests)) if i not in found]
    problems = {
        i: build_problem(model, requests[i], resources.contexts, query.kl_position) for i in missing
    }
    engine = choose_engine(model, resources.engine)
    widths = {i: _width(problem, engine, query.token) for i, problem in problems.items()}
    n_rows = len(resources.contexts) + 1

    def fits(count: int, width: int) -> bool:
        row = bytes_of_row(model, query.layer, width, entered(query.places))
        return count * n_rows * row <= room

    ordered = sorted(missing, key=widths.__getitem__)
    # On a GPU a pass of few rows takes about as long as one of many.
    pass_cost = PASS_COST / n_rows if model.device.type == "cpu" else 1e6
    groups = [
        [ordered[k] for k in part]
        for part in group_by_width([widths[i] for i in ordered], pass_cost, fits)
    ]
    with tqdm(total=len(requests), desc="values", unit="fact",
              disable=not resources.progress or len(requests) == 1) as bar:  # fmt: skip
        bar.update(len(found))
        for group in groups:
            started = time.monotonic()
            starts = [
                start(
                    model, requests[i], problems[i], query.layer, query.places, query.record,
                    query.token, engine,
                )
                for i in group
            ]  # fmt: skip
            parts = in_batches(
                starts, len(starts),
                lambda part: optimise_values(
                    part, query.search, resources.penalties, resources.progress
                ),
            )  # fmt: skip
            values = [value for part in parts for value in part]
            share = (time.monotonic() - started) / len(group)
            for i, begun, value in zip(group, starts, values, strict=True):
                found[i] = replace(begun, reused=None), replace(value, seconds=share)
            bar.update(len(group))
    return [found[i] for i in range(len(requests))]


def group_by_width(
    widths: Sequence[int], pass_cost: float, fits: Callable[[int, int], bool]
) -> list[range]:
    """The partition of items into passes that takes the least time.

    In one pass all items are padded to the widest. Its time is taken as what all its positions
    take, and a constant.

    Args:
        widths: Of the items, ascending.
        pass_cost: The constant, in positions.
        fits: Whether a number of items of a width fits into memory; a single one always may.
    """
    best: list[tuple[float, list[range]]] = [(0.0, [])]  # time and passes of the first items
    for end in range(1, len(widths) + 1):
        choices = []
        for first in range(end - 1, -1, -1):
            count, width = end - first, widths[end - 1]
            if count > 1 and not fits(count, width):
                break
            before, parts = best[first]
            choices.append((before + count * width + pass_cost, [*parts, range(first, end)]))
        best.append(min(choices, key=lambda choice: choice[0]))
    return best[-1][1]


@dataclass
class ValueStore:
    """Values that were found before, for editors that search for the same.

    ROME and r-ROME differ in how they write a value into the weights, not in how they search
    for it; so do MEMIT, EMMET and AlphaEdit where their last layers are the same.
    :func:`~driftlens.edit_each` searches once for all that are given the same store.

    Args:
        searches: What was asked, and what was found for each fact.
    """

    searches: list[tuple[Any, list[Found]]] = field(default_factory=list)

    def find_values(
        self,
        model: LensModel,
        requests: Sequence[EditRequest],
        query: Query,
        resources: Resources,
    ) -> list[Found]:
        """As :func:`find_values`; exactly the same facts in the same order are known again.

        Raises:
            TokenError: If a subject cannot be located or a target is empty.
            EditError: If a loss stops being a number.
        """
        if model.weights.is_edited:
            return find_values(model, requests, query, resources)
        asked = (
            model.identity(), tuple(requests), query, tuple(resources.contexts),
            tuple(resources.penalties), choose_engine(model, resources.engine),
        )  # fmt: skip
        for known, found in self.searches:
            if known == asked:
                return found
        found = find_values(model, requests, query, resources)
        self.searches.append((asked, found))
        return found


def _width(problem: ValueProblem, engine: Engine, token: Token) -> int:
    """How many positions of a row a step runs."""
    firsts = [0] * len(problem.rows)
    if engine == "suffix":
        at_subject = token == "subject"
        firsts = problem.subject if at_subject else [*problem.last_prompt, problem.subject[-1]]
    return max(len(row) - first for row, first in zip(problem.rows, firsts, strict=True))


def bytes_of_row(model: LensModel, layer: int, width: int, first: int) -> int:
    """About what one step keeps of one row for its gradient.

    Args:
        layer: Any that can be edited, for the width of MLPs.
        width: Positions that are run.
        first: The layer at which the pass begins.
    """
    per_token = 12 * model.info.d_model + 4 * model.down_projection(layer).d_mlp
    return 4 * (width * (model.info.n_layers - first) * per_token + 4 * model.info.d_vocab)


def outer(
    down: DownProjection,
    left: Float[torch.Tensor, "d_model rank"],
    right: Float[torch.Tensor, "d_mlp rank"],
) -> LowRankDelta:
    """``left @ right.T`` as a change of a down-projection, in its parameter's orientation."""
    left, right = left.float(), right.float()
    return LowRankDelta(right, left) if down.input_first else LowRankDelta(left, right)
