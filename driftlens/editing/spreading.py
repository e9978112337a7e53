"""A change that several layers share, ascending: the frame of MEMIT and its relatives.

For each layer the editors need the keys of all facts and what the model says now, with the
layers below already edited; and each changes one down-projection by ``R X^T``, where R is the
residual that the layer is to contribute and X says how it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from driftlens.editing.configs import ValueSearch
from driftlens.editing.contexts import Context
from driftlens.editing.outcome import Outcome, Query, Resources, find_values, outer
from driftlens.editing.target import subject_in_context
from driftlens.errors import EditError, first_line
from driftlens.facts import EditRequest
from driftlens.interventions import (
    block_out_name,
    down_in_name,
    down_out_name,
    mlp_out_name,
)
from driftlens.models import LensModel
from driftlens.reuse import in_batches
from driftlens.weights import Delta

TOKENS_PER_BATCH = 4096

FIT = 1e-2
"""How far (relative) what passes a norm may be from what an RMS norm makes of it."""
BISECTIONS = 60
TINY = 1e-12
"""Of squared gains: a unit with less than that has no say."""


def spread(
    model: LensModel,
    requests: Sequence[EditRequest],
    query: Query,
    config: ValueSearch,
    resources: Resources,
    right: Callable[[int, Float[torch.Tensor, "fact d_mlp"]], torch.Tensor],
    share: Callable[[int], float] = float,
    afterwards: Callable[[Facts], None] | None = None,
    in_stream: bool = True,
) -> Outcome:
    """MEMIT's two steps, with any way of writing residuals.

    Args:
        query: What values are searched of; the first of its places is what the layers change.
            Its layer is the last of the edited ones.
        right: X of a layer, ``[d_mlp, fact]``, from its keys; its change is then ``R X^T``.
        share: What a residual is divided by, given how many layers are left.
        afterwards: Called with the facts while the whole change is applied.
        in_stream: Whether the layers' contributions add up in the residual stream; otherwise a
            residual is written as it is.
    """
    # 1. What is wanted of the last layer.
    found = find_values(model, requests, query, resources)
    wanted = torch.stack([b.initial[0].double() + v.deltas[0].double() for b, v in found])
    facts = Facts(model, requests, resources.contexts)
    aim = StreamAim(facts, query, wanted) if in_stream else PlaceAim(facts, query, wanted)

    # 2. Layer by layer.
    with spreading(model, config.edited_layers, resources.progress) as change:
        for layer, left in change.layers():
            keys = facts.keys(layer)
            change.write(layer, aim.residual(layer, share(left)), _solved(right, layer, keys))
        if afterwards is not None:
            afterwards(facts)
    norms = [[float(delta.norm()) for delta in value.deltas] for _, value in found]
    info = {
        "engine": found[-1][1].engine,
        "delta_norms": [own if len(own) > 1 else own[0] for own in norms],
        "layers": change.info,
    }
    trace = [{"fact": i, **record} for i, (_, v) in enumerate(found) for record in v.trace]
    return Outcome(change.deltas, trace, info)


def _solved(
    right: Callable[[int, Float[torch.Tensor, "fact d_mlp"]], torch.Tensor],
    layer: int,
    keys: Float[torch.Tensor, "fact d_mlp"],
) -> torch.Tensor:
    """What keys are written by; a system without a solution is an error of the edit."""
    try:
        return right(layer, keys)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise EditError(
            f"The change of layer {layer} cannot be solved for ({first_line(error)}).",
            "Facts whose keys are equal or not finite do that, and weights of second moments or "
            "of the null space that are too small.",
        ) from error


class Facts:
    """Facts as token ids in contexts, and the activations at their subjects.

    Args:
        requests: The facts.
        contexts: In which keys are taken. The prompt alone counts half, the others share the
            other half, as in MEMIT's code.
    """

    def __init__(
        self, model: LensModel, requests: Sequence[EditRequest], contexts: Sequence[Context]
    ) -> None:
        self.model = model
        self.n_facts = len(requests)
        plain = [subject_in_context(model, request, Context()) for request in requests]
        self._plain = plain
        self._located = [
            subject_in_context(model, request, context)
            for request in requests
            for context in contexts
        ]
        is_plain = torch.tensor([context.is_plain for context in contexts])
        weights = torch.zeros(len(contexts), dtype=torch.float64)
        for kind in (is_plain, ~is_plain):
            if kind.any():
                weights[kind] = 1.0 / kind.sum()
        self._weights = weights / weights.sum()

    def keys(self, layer: int) -> Float[torch.Tensor, "fact d_mlp"]:
        """The facts' keys in a layer, averaged over the contexts, in float64."""
        found = self._read(self._located, down_in_name(layer))
        per_fact = found.reshape(self.n_facts, len(self._weights), -1)
        return torch.einsum("c,fcd->fd", self._weights.to(found.device), per_fact)

    def now(self, name: str) -> Float[torch.Tensor, "fact width"]:
        """An activation at the subjects of the prompts alone, in float64."""
        return self._read(self._plain, name)

    def norm_after(self, layer: int) -> PostNorm:
        """The norm that a layer's down-projection writes through, from what passes it.

        Raises:
            EditError: If something else is there.
        """
        ids, _ = max(self._plain, key=lambda row: len(row[0]))
        names = (down_out_name(layer), mlp_out_name(layer))
        seen = self.model.record(self.model.tokens.pad([ids]), names, stop_at=names[1])
        said, arrived = (seen[name][0].double() for name in names)
        normed = said / _rms(said)
        norm = PostNorm((arrived * normed).sum(0) / normed.square().sum(0))
        error = (norm.arrives(said) - arrived).norm() / arrived.norm()
        if not error < FIT:
            raise EditError(
                f"Between layer {layer}'s down-projection and the residual stream of "
                f"{self.model.info.name} is something that is not an RMS norm.",
                "Use rome, r-rome, pmet, ft-l, ft-m or grace.",
            )
        return norm

    def _read(
        self, located: Sequence[tuple[list[int], int]], name: str
    ) -> Float[torch.Tensor, "row width"]:
        """An activation at one position of each row."""
        order = sorted(range(len(located)), key=lambda i: -len(located[i][0]))
        size = max(1, TOKENS_PER_BATCH // len(located[order[0]][0]))

        def run(chosen: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
            ids = self.model.tokens.pad([located[i][0] for i in chosen])
            seen = self.model.record(ids, [name], stop_at=name)[name]
            rows = seen[torch.arange(len(chosen)), [located[i][1] for i in chosen]]
            return list(zip(chosen, rows.double(), strict=True))

        found = dict(pair for part in in_batches(order, size, run) for pair in part)
        return torch.stack([found[i] for i in range(len(located))])


class PlaceAim:
    """Residuals of the activation whose values were searched, written as they are (PMET)."""

    def __init__(
        self, facts: Facts, query: Query, wanted: Float[torch.Tensor, "fact width"]
    ) -> None:
        self._facts, self._name, self._wanted = facts, query.places[0].name, wanted

    def residual(self, layer: int, share: float) -> Float[torch.Tensor, "fact width"]:
        """What a layer's down-projection is to say more."""
        return (self._wanted - self._facts.now(self._name)) / share


class StreamAim:
    """Residuals of the residual stream after the last edited layer (MEMIT).

    Where a norm stands between a down-projection and the stream, values are searched at the
    down-projection's output, so that the norm lets them through; and what a layer is to
    contribute is asked of its down-projection as what the norm turns into it.
    """

    def __init__(
        self, facts: Facts, query: Query, wanted: Float[torch.Tensor, "fact width"]
    ) -> None:
        self._facts, self._top = facts, query.layer
        self._wanted = wanted
        if query.layer not in facts.model.writes_directly:
            norm = facts.norm_after(query.layer)
            said = facts.now(down_out_name(query.layer))
            self._wanted = self._now() - norm.arrives(said) + norm.arrives(wanted)

    def residual(self, layer: int, share: float) -> Float[torch.Tensor, "fact width"]:
        """What a layer's down-projection is to say more."""
        residual = (self._wanted - self._now()) / share
        if layer in self._facts.model.writes_directly:
            return residual
        norm, said = self._facts.norm_after(layer), self._facts.now(down_out_name(layer))
        return norm.said(norm.arrives(said) + residual, said) - said

    def _now(self) -> Float[torch.Tensor, "fact width"]:
        return self._facts.now(block_out_name(self._top))


@dataclass(frozen=True)
class PostNorm:
    """The RMS norm between a down-projection and the residual stream.

    Args:
        gain: What it multiplies each unit by.
    """

    gain: Float[torch.Tensor, " width"]

    def arrives(self, said: Float[torch.Tensor, "fact width"]) -> Float[torch.Tensor, "fact width"]:
        """What reaches the stream of what a down-projection says."""
        return self.gain * said / _rms(said)

    def said(
        self,
        arriving: Float[torch.Tensor, "fact width"],
        before: Float[torch.Tensor, "fact width"],
    ) -> Float[torch.Tensor, "fact width"]:
        """What to say for something to arrive as nearly as the norm lets it, of the length of
        what was said before.

        The norm fixes the length of what it multiplies by the gain: among vectors of that length
        the nearest is ``gain * arriving / (gain^2 + m)``, for the m >= 0 that gives the length.
        """
        low, high = torch.zeros_like(_rms(arriving)), (self.gain * arriving).square().mean(-1)
        high = high.sqrt()[..., None]  # there the length is at most 1
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            is_long = _rms(self._nearest(arriving, middle)) > 1
            low, high = torch.where(is_long, middle, low), torch.where(is_long, high, middle)
        nearest = self._nearest(arriving, high)
        return nearest * (_rms(before) / _rms(nearest))

    def _nearest(
        self, arriving: Float[torch.Tensor, "fact width"], m: Float[torch.Tensor, "fact 1"]
    ) -> Float[torch.Tensor, "fact width"]:
        return self.gain * arriving / (self.gain.square() + m).clamp_min(TINY)


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


class Spreading:
    """The changes so far, applied while the next one is computed; ``applied`` takes them back."""

    def __init__(
        self, model: LensModel, layers: Sequence[int], progress: bool, applied: ExitStack
    ) -> None:
        self._model = model
        self._layers = layers
        self._progress = progress
        self._applied = applied
        self.deltas: dict[str, Delta] = {}
        self.info: dict[str, dict[str, Any]] = {}

    def layers(self) -> Iterator[tuple[int, int]]:
        """Each layer, and how many are left with it."""
        bar = tqdm(self._layers, desc="spreading over layers", disable=not self._progress,
                   leave=False)  # fmt: skip
        for index, layer in enumerate(bar):
            yield layer, len(self._layers) - index

    def write(
        self,
        layer: int,
        residual: Float[torch.Tensor, "fact d_model"],
        right: Float[torch.Tensor, "d_mlp fact"],
    ) -> None:
        """Add ``residual^T right^T`` to a layer's down-projection, at once.

        Raises:
            EditError: If it is not finite.
        """
        down = self._model.down_projection(layer)
        right = right.to(residual.device)
        delta = outer(down, residual.T, right)
        gram = (residual @ residual.T) * (right.T @ right)
        norm = float(gram.sum().clamp_min(0).sqrt())
        if not torch.isfinite(torch.tensor(norm)):
            raise EditError(
                f"The change of layer {layer} is not finite.", "Use other facts or more text."
            )
        weights = self._model.weights
        self._applied.callback(weights.pop, weights.push({down.name: delta}))
        self.deltas[down.name] = delta
        self.info[str(layer)] = {"norm": norm, "rank": delta.rank}


@contextmanager
def spreading(model: LensModel, layers: Sequence[int], progress: bool) -> Iterator[Spreading]:
    """Inside, changes are applied as they are written; afterwards none is."""
    with ExitStack() as applied:
        yield Spreading(model, layers, progress, applied)
