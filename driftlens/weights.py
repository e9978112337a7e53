"""Weight deltas, and switching them on and off without losing a bit.

The model is never copied. While deltas are active only the touched parameters are kept
aside; whenever the set of active deltas changes, each touched parameter is written anew as
``original + sum of active deltas``, and when none is left the original bits are copied back.
So deltas may be switched off in any order, and an exception loses nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from jaxtyping import Float

from driftlens.codebook import Codebook
from driftlens.equality import equal_fields
from driftlens.errors import EditError
from driftlens.precision import in_float32


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
        """The change as a full matrix."""
        return self.left @ self.right.T


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


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes; the same on every device."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        digest.update(f"{name}:{tensor_digest(parameters[name])};".encode())
    return digest.hexdigest()


def quick_digest(parameters: Mapping[str, torch.Tensor]) -> str:
    """The same content in a hash that is read at the speed of memory, to notice any change by.

    128 bits, not cryptographic: for telling one state of a process's own memory from another.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(parameters):
        tensor = parameters[name]
        digest.update(f"{name}:{tensor.dtype}{tuple(tensor.shape)};".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> Any:
    """A view, not a copy: an embedding can be half of a model."""
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy()


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
        self.parameters = dict(parameters)
        self.unused = frozenset(unused)
        self._owners = dict(owners or {})
        self._adapters: dict[int, list[Any]] = {}
        self._active: dict[int, dict[str, Delta]] = {}
        self._originals: dict[str, torch.Tensor] = {}
        self._tickets = itertools.count()

    @property
    def is_edited(self) -> bool:
        """Whether any delta is active now."""
        return bool(self._active)

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
        return self._originals.get(name, self.parameters[name])

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
        self._switch_on(ticket, deltas)
        return ticket

    def _switch_on(self, ticket: int, deltas: Mapping[str, Delta]) -> None:
        changes = [name for name, delta in deltas.items() if not isinstance(delta, Codebook)]
        new = {n: self.parameters[n].detach().clone() for n in changes if n not in self._originals}
        self._originals.update(new)
        self._active[ticket] = dict(deltas)
        try:
            self._write(changes)
            self._adapters[ticket] = [
                delta.install(self.owner(name))
                for name, delta in deltas.items()
                if isinstance(delta, Codebook)
            ]
        except BaseException:
            self.pop(ticket)
            raise

    def pop(self, ticket: int) -> None:
        """Switch the deltas of one ticket off; a ticket that is off already is ignored."""
        for handle in self._adapters.pop(ticket, []):
            handle.remove()
        deltas = self._active.pop(ticket, {})
        self._write(n for n, delta in deltas.items() if not isinstance(delta, Codebook))

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """All deltas that are active now are off while the block runs, and on again after it."""
        active = dict(self._active)
        for ticket in active:
            self.pop(ticket)
        try:
            yield
        finally:
            for ticket, deltas in active.items():
                self._switch_on(ticket, deltas)

    def _write(self, names: Iterable[str]) -> None:
        """Bring parameters into line with the active deltas."""
        with torch.no_grad():
            for name in names:
                parameter, original = self.parameters[name], self._originals[name]
                active = [
                    delta
                    for group in self._active.values()
                    if not isinstance(delta := group.get(name), Codebook | None)
                ]
                if active:
                    parameter.copy_(_sum(original, active))
                else:
                    parameter.copy_(original)
                    del self._originals[name]


def _sum(original: torch.Tensor, deltas: Sequence[LowRankDelta | DenseDelta]) -> torch.Tensor:
    """``original`` plus deltas, added in float32 or better and rounded once."""
    total = in_float32(original)
    for delta in deltas:
        total = total + delta.dense().to(total)
    return total.to(original.dtype)
