"""Penalties that restrict an edit while its value is optimised.

A penalty names the activations that it looks at, and turns what they are now and what they
were before the edit into a loss. The optimiser records them in the pass that is running
anyway, adds all penalties up, and keeps each one's value in the trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int

from driftlens.attention import HeadRule, over_attending_heads, row_kl
from driftlens.errors import RequestError
from driftlens.interventions import pattern_name


@dataclass(frozen=True)
class Sites:
    """Where in the optimiser's batch a penalty has to look.

    Args:
        last_prompt: For each context, the query position of the last prompt token, where the
            target's first token is predicted.
        subject: For each context, the key position of the subject's last token, counted from
            the end (negative).
        layers: Layers that the edit can influence.
    """

    last_prompt: Int[torch.Tensor, " context"]
    subject: Int[torch.Tensor, " context"]
    layers: tuple[int, ...]

    @property
    def contexts(self) -> Int[torch.Tensor, " context"]:
        """Row of each context in the batch."""
        return torch.arange(len(self.last_prompt), device=self.last_prompt.device)


@dataclass(frozen=True)
class PenaltyTerm:
    """One penalty at one step: its weighted loss (nats), and what to note in the trace."""

    loss: torch.Tensor
    notes: dict[str, float]


@runtime_checkable
class Penalty(Protocol):
    """What the optimiser needs of a penalty."""

    @property
    def name(self) -> str:
        """Column of the trace."""
        ...

    def activations(self, sites: Sites) -> list[str]:
        """Names of the hooks whose tensors it looks at."""
        ...

    def __call__(
        self, now: Mapping[str, torch.Tensor], original: Mapping[str, torch.Tensor], sites: Sites
    ) -> PenaltyTerm:
        """The loss, from the activations now and in the unedited model."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What goes into an edit's record."""
        ...


@dataclass(frozen=True)
class SADR:
    """Selective attention drift restriction (paper section 4, equation 6).

    ``gamma * mean over contexts of the sum over layers and held heads of
    KL( original row || row now )``, for the row of the last prompt token. A head is held at a
    step if it then attends to the subject's last token more than the rule allows; which heads
    are held is decided anew at each step, and no gradient flows through the decision.

    Args:
        gamma: Weight of the summed KL, in units of the loss (nats per nat). The released
            code's flag 100 for ROME on GPT-J is ``gamma=0.01`` here: it scales by 1e-4.
        heads: ``"max"``: heads above the largest original attention of their layer (the
            paper); ``"all"``: every head (the paper's ablation, figure 6).
        layers: Layers to restrict; ``None`` for all.
    """

    gamma: float = 0.01
    heads: HeadRule = "max"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.gamma >= 0 or self.gamma == float("inf"):
            raise RequestError(f"SADR's gamma is {self.gamma}.", "Give a number of at least 0.")
        if self.heads not in get_args(HeadRule):
            raise RequestError(
                f"SADR knows no head-selection rule {self.heads!r}.",
                f"Choose one of {', '.join(get_args(HeadRule))}.",
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def name(self) -> str:
        """Column of the trace."""
        return "sadr"

    def activations(self, sites: Sites) -> list[str]:
        """Attention patterns of the restricted layers that the edit can influence."""
        return [pattern_name(layer) for layer in self._layers(sites)]

    def _layers(self, sites: Sites) -> list[int]:
        return [x for x in sites.layers if self.layers is None or x in self.layers]

    def __call__(
        self, now: Mapping[str, torch.Tensor], original: Mapping[str, torch.Tensor], sites: Sites
    ) -> PenaltyTerm:
        """The loss, with the mean number of heads held per context as ``held_heads``."""
        total = torch.zeros((), device=sites.last_prompt.device)
        held = 0.0
        for layer in self._layers(sites):
            rows = _rows(now[pattern_name(layer)], sites)
            before = _rows(original[pattern_name(layer)], sites)
            mask = over_attending_heads(
                _at_subject(rows.detach(), sites), _at_subject(before, sites), self.heads
            )
            divergence = row_kl(before, rows)
            total = total + (divergence * mask).sum(-1).mean().to(total.device)
            held += float(mask.sum()) / mask.shape[0]
        return PenaltyTerm(self.gamma * total, {"held_heads": held})

    def to_dict(self) -> dict[str, Any]:
        """What goes into an edit's record."""
        return {"penalty": "sadr", **asdict(self)}


def _rows(
    pattern: Float[torch.Tensor, "batch head query key"], sites: Sites
) -> Float[torch.Tensor, "context head key"]:
    """Attention rows of the last prompt tokens, in float32 or better."""
    rows = pattern[sites.contexts.to(pattern.device), :, sites.last_prompt.to(pattern.device)]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _at_subject(
    rows: Float[torch.Tensor, "context head key"], sites: Sites
) -> Float[torch.Tensor, "context head"]:
    return rows[sites.contexts.to(rows.device), :, sites.subject.to(rows.device)]


def as_penalties(given: Penalty | Sequence[Penalty] | None) -> tuple[Penalty, ...]:
    """One penalty, several, or none, as a tuple.

    Raises:
        RequestError: If something else was given.
    """
    if given is None:
        return ()
    penalties = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for penalty in penalties:
        if not callable(penalty) or not hasattr(penalty, "activations"):
            raise RequestError(
                f"{penalty!r} is no penalty.", "Give an object such as driftlens.SADR(gamma=0.05)."
            )
    return penalties
