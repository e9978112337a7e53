"""SADR's rivals: what else an edit could be restricted by, for comparison.

The paper's code has the first two as options that are off by default; the third is what its
reviewers ask about: more of the KL term that ROME has anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from driftlens.editing.penalties import (
    ESSENCE,
    Penalty,
    PenaltyTerm,
    Sites,
    check_layers,
    check_weight,
)
from driftlens.errors import RequestError
from driftlens.interventions import block_out_name
from driftlens.precision import in_float32


@dataclass(frozen=True)
class KeyDrift(Penalty):
    """Holds the keys that attention compares with its queries.

    ``weight * mean over contexts of the sum over layers of |K - K0|``, the Frobenius norm over
    all heads and all tokens of the context, target included. The paper's code sums over
    contexts and scales by 1e-4: its ``attn_K_loss_weight`` of ``w`` with ``n`` contexts is a
    weight of ``w * n * 1e-4`` here.

    Args:
        weight: Weight of the norm, in nats per unit of the keys.
        layers: Layers to restrict; ``None`` for all.
    """

    kind: ClassVar[str] = "key-drift"

    weight: float = 0.01
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", check_weight("KeyDrift's weight", self.weight))
        object.__setattr__(self, "layers", check_layers("KeyDrift", self.layers))

    def activations(self, sites: Sites) -> list[str]:
        """Keys of the restricted layers that the edit can influence."""
        return [sites.key_hooks[layer] for layer in sites.chosen(self.layers)]

    def __call__(
        self, now: Mapping[str, torch.Tensor], original: Mapping[str, torch.Tensor], sites: Sites
    ) -> PenaltyTerm:
        """The loss."""
        n = len(sites.predicting)
        total = torch.zeros((), device=sites.predicting.device)
        for name in self.activations(sites):
            change = in_float32(now[name][:n]) - in_float32(original[name][:n])
            change = change.flatten(2) * sites.real.to(change.device)[..., None]
            total = total + change.flatten(1).norm(dim=1).mean().to(total.device)
        return PenaltyTerm(self.weight * total, {})


@dataclass(frozen=True)
class HiddenDrift(Penalty):
    """Holds the residual stream at the last prompt token.

    ``weight * sum over layers of |H - H0|``, the Frobenius norm over the contexts and the
    residual stream after each layer, as in the paper's code (``last_hid_restrain_weight``,
    which it scales by 1e-3). How large a residual stream is differs much between models, and
    between the layers of one; ``relative`` divides each layer's norm by that of what was there,
    ``|H - H0| / |H0|``, so that a weight means about the same in all of them.

    Args:
        weight: Weight of the norm, in nats per unit of the residual stream; if relative, in nats.
        layers: Layers after which it is restricted; ``None`` for all above the edited one.
        relative: Whether changes are shares of what was there.
    """

    kind: ClassVar[str] = "hidden-drift"

    weight: float = 0.001
    layers: tuple[int, ...] | None = None
    relative: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", check_weight("HiddenDrift's weight", self.weight))
        object.__setattr__(self, "layers", check_layers("HiddenDrift", self.layers))
        if not isinstance(self.relative, bool):
            raise RequestError(f"relative is {self.relative!r}.", "Give True or False.")

    def activations(self, sites: Sites) -> list[str]:
        """Outputs of the restricted layers above the edited one."""
        return [block_out_name(layer) for layer in sites.chosen(self.layers)]

    def __call__(
        self, now: Mapping[str, torch.Tensor], original: Mapping[str, torch.Tensor], sites: Sites
    ) -> PenaltyTerm:
        """The loss."""
        total = torch.zeros((), device=sites.predicting.device)
        for name in self.activations(sites):
            before = sites.at_last_prompt(original[name])
            change = (sites.at_last_prompt(now[name]) - before).norm()
            total = total + (change / before.norm() if self.relative else change).to(total.device)
        return PenaltyTerm(self.weight * total, {})


@dataclass(frozen=True)
class EssenceKL(Penalty):
    """Holds what the model says about the subject as such.

    ``weight * mean over edited facts of KL( P || P0 )`` at the subject's last token in
    "{subject} is a" (or where the editor's ``kl_position`` says): the term that ROME's own
    ``kl_factor`` weighs, for methods that have no such factor, and as a rival of SADR. With GRACE
    it is zero: its search changes nothing but the last prompt token.

    Args:
        weight: Weight of the divergence (nats per nat).
    """

    kind: ClassVar[str] = "essence-kl"

    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", check_weight("EssenceKL's weight", self.weight))

    def activations(self, sites: Sites) -> list[str]:
        """None: the optimisers deliver these log-probabilities by themselves."""
        return []

    def __call__(
        self, now: Mapping[str, torch.Tensor], original: Mapping[str, torch.Tensor], sites: Sites
    ) -> PenaltyTerm:
        """The loss."""
        logprobs = now[ESSENCE]
        divergence = (logprobs.exp() * (logprobs - original[ESSENCE])).sum(-1).mean()
        return PenaltyTerm(self.weight * divergence, {})
