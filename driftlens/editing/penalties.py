"""What a penalty is: a restriction of an edit while its vector or weights are optimised.

A penalty names the activations that it looks at, and turns what they are now and what they
were before the edit into a loss. The optimiser records them in the pass that is running
anyway, adds all penalties up, and keeps each one's value in the trace.

To add one: a frozen dataclass derived from :class:`Penalty` in a module of its own
(``sadr.py``, ``rivals.py``), and its entry in ``family.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int

from driftlens.errors import RequestError, as_number
from driftlens.models import LensModel
from driftlens.precision import in_float32

ESSENCE = "essence"
"""Under this name a penalty finds the log-probabilities ``[essence, d_vocab]`` at the subject in
"{subject} is a", one row for each fact that is edited."""


@dataclass(frozen=True)
class Sites:
    """Where in the optimiser's batch a penalty has to look.

    The contexts are the first rows of the batch. Query positions are counted from where the
    pass starts, key positions from the end, so that both fit a pass over cached prefixes.

    Args:
        predicting: For each context, the query positions at which the target's tokens are
            predicted; the first is the last prompt token.
        subject: For each context, the key position of the subject's last token, counted from
            the end (negative).
        real: For each context, which query positions are no padding.
        layers: Layers whose attention the edit can influence: those above the edited one.
        key_hooks: For each of these layers, the hook that delivers the keys as attention uses
            them, ``[batch, pos, kv_head, d_head]``.
    """

    predicting: Int[torch.Tensor, "context target"]
    subject: Int[torch.Tensor, " context"]
    real: Bool[torch.Tensor, "context pos"]
    layers: tuple[int, ...]
    key_hooks: Mapping[int, str]

    @property
    def last_prompt(self) -> Int[torch.Tensor, " context"]:
        """For each context, the query position of the last prompt token."""
        return self.predicting[:, 0]

    @property
    def contexts(self) -> Int[torch.Tensor, " context"]:
        """Row of each context in the batch."""
        return torch.arange(len(self.predicting), device=self.predicting.device)

    def chosen(self, layers: tuple[int, ...] | None) -> list[int]:
        """Those of the given layers that the edit can influence; ``None`` for all of them.

        Raises:
            RequestError: If there is none, so that nothing would be held.
        """
        found = [layer for layer in self.layers if layers is None or layer in layers]
        if not found:
            named = "any layer" if layers is None else f"layers {', '.join(map(str, layers))}"
            reached = f"{self.layers[0]} and above" if self.layers else "none"
            raise RequestError(
                f"A penalty cannot act in {named}: of the layers above the edited one (here "
                f"{reached}) it holds none.",
                "Restrict other layers, edit a lower one, or leave the penalty out.",
            )
        return found

    def at_last_prompt(
        self, activation: Float[torch.Tensor, "batch pos ..."]
    ) -> Float[torch.Tensor, "context ..."]:
        """An activation at the last prompt token of each context, in float32 or better."""
        at = self.last_prompt.to(activation.device)
        return in_float32(activation[self.contexts.to(activation.device), at])


@dataclass(frozen=True)
class PenaltyTerm:
    """One penalty at one step: its weighted loss, and what to note in the trace."""

    loss: torch.Tensor
    notes: dict[str, float]


class Penalty(ABC):
    """What the optimisers need of a penalty. Before the first step its loss must be zero."""

    kind: ClassVar[str]
    """Its name in the trace, in configuration files and on the command line."""

    def check(self, model: LensModel) -> None:
        """Refuse a model that it does not fit: one without the layers that it names.

        Raises:
            ModelError: If it names a layer that the model does not have.
            RequestError: If it names anything else that the model does not have.
        """
        for layer in getattr(self, "layers", None) or ():
            model.check_layer(layer)

    @abstractmethod
    def activations(self, sites: Sites) -> list[str]:
        """Names of the hooks whose tensors it looks at."""

    @abstractmethod
    def __call__(
        self, now: Mapping[str, torch.Tensor], original: Mapping[str, torch.Tensor], sites: Sites
    ) -> PenaltyTerm:
        """The loss, from the activations now and before this edit."""

    def to_dict(self) -> dict[str, Any]:
        """What goes into an edit's record, and what a configuration file holds."""
        return {"penalty": self.kind, **asdict(self)}  # type: ignore[call-overload]


def check_weight(name: str, value: Any) -> float:
    """A weight of any number type as Python's own, which files can hold.

    Raises:
        RequestError: If it is not a finite number of at least 0.
    """
    found = as_number(name, value, "Give a number of at least 0.")
    if not 0 <= found < float("inf"):
        raise RequestError(f"{name} is {value!r}.", "Give a number of at least 0.")
    return found


def check_layers(what: str, layers: Any) -> tuple[int, ...] | None:
    """Layers as a tuple, ``None`` for all.

    Raises:
        RequestError: If they are not whole numbers, or none is given.
    """
    if layers is None:
        return None
    try:
        found = tuple(layers)
    except TypeError:
        found = ()
    if not found or not all(isinstance(y, Integral) and not isinstance(y, bool) for y in found):
        raise RequestError(
            f"{what}'s layers are {layers!r}.", "Give a list of layers, or none for all."
        )
    return tuple(map(int, found))
