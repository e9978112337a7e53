"""Weight deltas, and switching them on and off without losing a bit.

The model is never copied. While deltas are active only the touched parameters are kept
aside; whenever the set of active deltas changes, each touched parameter is written anew as
``original + sum of active deltas``, and when none is left the original bits are copied back.
So deltas may be switched off in any order, and an exception loses nothing.

Which deltas are active is decided first, and then the model is brought into line with it. If that
is interrupted, what is left to do stays known, and is done before the model is used again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from driftlens.codebook import Codebook
from driftlens.digests import quick_digest, tensor_digest
from driftlens.equality import equal_fields
from driftlens.errors import EditError
from driftlens.precision import in_float32

RESET = "if an interruption left it on, model.weights.reset() switches it off"
"""The remedy's last words where an edit that is applied is in the way."""


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """A change of one weight matrix, ``left @ right.T``, in the parameter's own orientation.

    Args:
        left: ``[rows, rank]``.
        right: ``[columns, rank]``.
    """

    left: Float[torch.Tensor, "rows rank"]
    right: Float[torch.Tensor, "columns rank"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter that it changes."""
        return (self.left.shape[0], self.right.shape[0])

    @property
    def rank(self) -> int:
        """Number of outer products."""
        return int(self.left.shape[1])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its numbers, by field."""
        return {"left": self.left, "right": self.right}

    def __eq__(self, other: object) -> bool:
        return equal_fields(self, other)

    def dense(self) -> Float[torch.Tensor, "rows columns"]:
        """The change as a full matrix, in float32 or better: small factors have tiny products."""
        return in_float32(self.left) @ in_float32(self.right).T


@dataclass(frozen=True, eq=False)
class DenseDelta:
    """A change of one parameter of any shape, stored as it is."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter that it changes."""
        return tuple(self.tensor.shape)

    @property
    def rank(self) -> int:
        """The numerical rank of a matrix; 1 for a vector."""
        if self.tensor.ndim != 2:
            return 1
        return int(torch.linalg.matrix_rank(self.tensor.float()))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its numbers, by field."""
        return {"dense": self.tensor}

    def __eq__(self, other: object) -> bool:
        return equal_fields(self, other)

    def dense(self) -> torch.Tensor:
        """The change itself."""
        return self.tensor


Delta = LowRankDelta | DenseDelta | Codebook
"""A change of one parameter, or an adapter that works beside it."""


def combined(first: Delta, second: Delta) -> Delta:
    """One change that does what two do one after another.

    Raises:
        EditError: If one is an adapter and the other changes a weight.
    """
    if isinstance(first, Codebook) and isinstance(second, Codebook):
        return first.with_entries(second)
    if isinstance(first, Codebook) or isinstance(second, Codebook):
        raise EditError("An adapter and a change of weights cannot become one delta.")
    if (
        isinstance(first, LowRankDelta)
        and isinstance(second, LowRankDelta)
        and first.rank + second.rank < min(first.shape)
    ):
        return LowRankDelta(
            torch.cat([first.left, second.left], dim=1),
            torch.cat([first.right, second.right], dim=1),
        )
    return DenseDelta(first.dense() + second.dense())


def scaled(delta: Delta, factor: float) -> Delta:
    """A change of weights times a number.

    Raises:
        EditError: If it is an adapter, which is not a sum.
    """
    if isinstance(delta, Codebook):
        raise EditError(
            "An adapter cannot be made larger or smaller.", "Scale edits that change weights."
        )
    if isinstance(delta, LowRankDelta):
        return LowRankDelta(in_float32(delta.left) * factor, delta.right)
    return DenseDelta(in_float32(delta.tensor) * factor)


class WeightStack:
    """The parameters of one model and the deltas that are active on them.

    Args:
        parameters: Live parameters by name; they are changed in place.
        unused: Names of parameters that the model does not compute with, so that a change of
            them would do nothing.
        owners: The module of each parameter, beside which adapters work.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        unused: Iterable[str] = (),
        owners: Mapping[str, torch.nn.Module] | None = None,
    ) -> None:
        self.unused = frozenset(unused)
        self._parameters = dict(parameters)
        self._owners = dict(owners or {})
        self._active: dict[int, dict[str, Delta]] = {}
        self._originals: dict[str, torch.Tensor] = {}
        self._adapters: dict[tuple[int, str], Any] = {}
        self._behind: set[str] = set()
        """Names of what may not be as the active deltas say."""
        self._own_writes: Counter[str] = Counter()
        self._digests: dict[tuple[str, int], tuple[str, str]] = {}
        self._tickets = itertools.count()

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Live parameters by name, as the active deltas make them."""
        self.settle()
        return self._parameters

    @property
    def is_edited(self) -> bool:
        """Whether any delta is active now, or one that is not has yet to be taken back."""
        return bool(self._active or self._behind)

    @property
    def active(self) -> tuple[Delta, ...]:
        """The deltas that are active now, in the order in which they were switched on."""
        return tuple(delta for group in self._active.values() for delta in group.values())

    def is_active(self, deltas: Iterable[Delta]) -> bool:
        """Whether any of these deltas, or one with the same numbers, is active now."""
        return any(delta == other for delta in deltas for other in self.active)

    def is_adapted(self, name: str) -> bool:
        """Whether an adapter is active beside the module that a parameter belongs to."""
        beside = [
            self.owner(other)
            for group in self._active.values()
            for other, delta in group.items()
            if isinstance(delta, Codebook)
        ]
        return any(self.owner(name) is module for module in beside)

    def original(self, name: str) -> torch.Tensor:
        """A parameter as it is without any active delta."""
        return self._originals.get(name, self._parameters[name])

    def digests(self, name: str) -> Iterator[str]:
        """SHA-256 of a parameter without any active delta; then, if there is one, with them.

        Computed anew only for other bits than the last time, which a faster hash of all of them
        tells: what goes through ``parameter.data`` must be noticed, too.
        """
        parameter, original = self.parameters[name], self.original(name)
        tensors = [original] if original is parameter else [original, parameter]
        for place, tensor in enumerate(tensors):
            bits = quick_digest({name: tensor})
            known, digest = self._digests.get((name, place), ("", ""))
            if known != bits:
                digest = tensor_digest(tensor)
                self._digests[name, place] = bits, digest
            yield digest

    def revision(self) -> tuple[tuple[int, int], ...]:
        """Something that is another when anybody else has written to a parameter, or moved it.

        Torch counts what is done to a tensor in place, but not what goes through ``parameter.data``
        or numpy, and nothing for tensors made in inference mode. It takes about a microsecond for
        each parameter.
        """
        return tuple(
            (parameter.data_ptr(), _writes(parameter) - self._own_writes[name])
            for name, parameter in self.parameters.items()
        )

    def owner(self, name: str) -> torch.nn.Module:
        """The module that a parameter belongs to."""
        return self._owners[name]

    def push(self, deltas: Mapping[str, Delta]) -> int:
        """Switch deltas on; the returned ticket switches them off again.

        Raises:
            EditError: If a name or a shape does not fit. Nothing is changed then.
        """
        for name, delta in deltas.items():
            if name not in self.parameters:
                raise EditError(
                    f"The model has no parameter {name!r}.",
                    "Names are those of the Hugging Face model's named_parameters().",
                )
            if name in self.unused:
                raise EditError(
                    f"TransformerLens computes with copies of parts of {name!r}, so a change of it "
                    "would do nothing.",
                    "Deltas of this model's other parameters can be applied.",
                )
            shape = tuple(self.parameters[name].shape)
            if delta.shape != shape:
                raise EditError(f"The delta for {name!r} has shape {delta.shape}, not {shape}.")
        ticket = next(self._tickets)
        try:
            self._activate({**self._active, ticket: dict(deltas)})
        except BaseException:
            self.pop(ticket)
            raise
        return ticket

    def pop(self, ticket: int) -> None:
        """Switch the deltas of one ticket off; a ticket that is off already is ignored."""
        others = {own: group for own, group in self._active.items() if own != ticket}
        try:
            self._activate(others)
        except BaseException:
            # Whoever stops this gets the weights back all the same; a second stop leaves them to
            # the next use of the model.
            self._activate(others)
            raise

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """All deltas that are active now are off while the block runs, and on again after it."""
        active = self._active
        try:
            self._activate({})
            yield
        finally:
            self._activate({**active, **self._active})

    def reset(self) -> None:
        """Switch all deltas off, whoever switched them on.

        For what an interruption at the wrong moment has left on; inside of
        ``with edit.applied(model)`` the rest of the block runs on the unedited model.
        """
        self._activate({})

    def settle(self) -> None:
        """Bring the model into line with the active deltas, where an interruption kept it back.

        Every pass and every look at :attr:`parameters` begins with this, so that none meets
        weights that are neither edited nor restored.
        """
        if not self._behind:
            return
        with torch.no_grad():
            for name in sorted(self._behind):
                self._write(name)
                self._install(name)
                self._behind.discard(name)

    def _activate(self, active: dict[int, dict[str, Delta]]) -> None:
        """Make these the active deltas."""
        either = {**self._active, **active}
        for ticket in self._active.keys() ^ active.keys():
            self._behind.update(either[ticket])
        self._active = active
        self.settle()

    def _write(self, name: str) -> None:
        """Bring one parameter into line."""
        parameter = self._parameters[name]
        changes = [
            delta
            for group in self._active.values()
            if not isinstance(delta := group.get(name), Codebook | None)
        ]
        writes = _writes(parameter)
        if changes:
            if name not in self._originals:
                self._originals[name] = parameter.detach().clone()
            parameter.copy_(_sum(self._originals[name], changes))
        elif name in self._originals:
            parameter.copy_(self._originals[name])
            del self._originals[name]
        self._own_writes[name] += _writes(parameter) - writes

    def _install(self, name: str) -> None:
        """Have those adapters beside a parameter's module that are active, and no others."""
        wanted = {
            (ticket, name): delta
            for ticket, group in self._active.items()
            if isinstance(delta := group.get(name), Codebook)
        }
        for key in [key for key in self._adapters if key[1] == name and key not in wanted]:
            self._adapters[key].remove()
            del self._adapters[key]
        for key, delta in wanted.items():
            if key not in self._adapters:
                self._adapters[key] = delta.install(self.owner(name))


def _writes(parameter: torch.nn.Parameter) -> int:
    """How often torch counted that it was written to."""
    return 0 if parameter.is_inference() else parameter._version


def _sum(original: torch.Tensor, deltas: Sequence[LowRankDelta | DenseDelta]) -> torch.Tensor:
    """``original`` plus deltas, added in float32 or better and rounded once."""
    total = in_float32(original)
    for delta in deltas:
        total = total + delta.dense().to(total)
    return total.to(original.dtype)
