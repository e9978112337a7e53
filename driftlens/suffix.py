"""Forward passes that reuse everything an intervention cannot change.

An intervention at position ``start`` of layer ``first_layer`` changes nothing to the left of
that position and nothing below that layer. So sequences are aligned at their start positions,
the keys and values left of it are computed once, and so is what enters ``first_layer``; each
further pass runs only the layers from there up, on the positions from there on.

Aligned layout of a batch, for two sequences with start ``s`` (``.`` is padding)::

    . a b c | s d e .        the part left of the bar is the cached prefix, of width P
    a b c d | s e f g        the part right of it is the suffix, of width S

Queries are counted from the bar: the start position is query 0 in every sequence. Keys are
counted from the right edge, because sliding-window layers keep only the last of them: the
start position is key ``-S`` in every sequence and layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Int

from driftlens.interventions import Hook
from driftlens.models import LensModel

Engine = Literal["suffix", "plain"]
"""``suffix`` reuses what an intervention cannot change; ``plain`` runs whole sequences."""


class SuffixRunner:
    """Passes over one batch of sequences from ``first_layer`` and their start positions on.

    Made inside ``model.frozen()`` or ``torch.no_grad()``, with the model in the state (edits
    applied or not) in which the passes are to run.

    Args:
        model: The model.
        rows: Token ids of each sequence.
        starts: First position of each sequence that may change.
        first_layer: Lowest layer that may change.
    """

    def __init__(
        self,
        model: LensModel,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
        first_layer: int,
    ) -> None:
        self.model = model
        self.first_layer = first_layer
        self.prefix_width = max(starts)
        device, pad = model.device, model.tokens.pad_id
        width = max(len(row) - start for row, start in zip(rows, starts, strict=True))
        suffixes = [
            [*row[start:], *[pad] * (width - len(row) + start)]
            for row, start in zip(rows, starts, strict=True)
        ]
        self.ids = torch.tensor(suffixes, device=device)
        start_of = torch.tensor(list(starts), device=device)[:, None]
        gap = self.prefix_width - start_of
        self._mask = (torch.arange(self.prefix_width + width, device=device) >= gap).long()
        self._positions = start_of + torch.arange(width, device=device)
        self._cache = self._run_prefixes([list(r[:s]) for r, s in zip(rows, starts, strict=True)])
        self._entering, self._tuples = self._run_lower_layers()

    @property
    def key_position(self) -> int:
        """Where the start positions stand among the keys, counted from the end."""
        return -int(self.ids.shape[1])

    def past_values(self, layer: int, copies: int = 1) -> torch.Tensor | None:
        """Cached values left of the suffix, ``[copies * batch, key, kv_head, d_head]``."""
        if self._cache is None:
            return None
        values: torch.Tensor = self._cache.layers[layer].values
        return values.transpose(1, 2).repeat(copies, 1, 1, 1)

    def run(
        self,
        hooks: Sequence[Hook] = (),
        at: Int[torch.Tensor, "batch chosen"] | None = None,
        copies: int = 1,
        stop_after: int | None = None,
    ) -> torch.Tensor:
        """One pass; ``at`` and the query axes that hooks see are counted from the start.

        Args:
            copies: How many times the batch is repeated, e.g. to try as many patches at once.

        Returns:
            Logits ``[copies * batch, chosen, d_vocab]``.
        """
        entering = self._entering.repeat(copies, 1, 1)

        def enter(hidden: torch.Tensor, hook: Any) -> torch.Tensor:
            return entering

        with self._lower_layers_skipped():
            hooks = [(f"blocks.{self.first_layer}.hook_in", enter), *hooks]
            return self._forward(hooks, at, stop_after, copies)

    def _run_prefixes(self, prefixes: Sequence[list[int]]) -> Any:
        """Keys and values left of the start positions; ``None`` if there is nothing there.

        Prefixes of one length are run together and without padding, because a padding position
        would see no key at all. Their keys are then aligned on the right, behind zeros.
        """
        if self.prefix_width == 0:
            return None
        caches: list[tuple[list[int], Any]] = []
        for length in sorted({len(prefix) for prefix in prefixes} - {0}):
            rows = [i for i, prefix in enumerate(prefixes) if len(prefix) == length]
            ids = torch.tensor([prefixes[i] for i in rows], device=self.ids.device)
            with torch.no_grad():
                _, cache = self.model.run_with_kv_cache(ids)
            caches.append((rows, cache))
        # The longest prefix's cache knows how much has been read, also in sliding windows.
        whole = copy.copy(caches[-1][1])
        whole.layers = [copy.copy(layer) for layer in whole.layers]
        for index, layer in enumerate(whole.layers):
            for name in ("keys", "values"):
                longest = getattr(layer, name)
                aligned = longest.new_zeros(len(prefixes), *longest.shape[1:])
                for rows, cache in caches:
                    part = getattr(cache.layers[index], name)
                    aligned[rows, :, longest.shape[2] - part.shape[2] :] = part
                setattr(layer, name, aligned)
        return whole

    def _run_lower_layers(self) -> tuple[torch.Tensor, list[bool]]:
        """What enters the first layer, and which blocks return tuples."""
        seen: dict[str, torch.Tensor] = {}
        returns_tuple = [False] * self.first_layer

        def keep(hidden: torch.Tensor, hook: Any) -> None:
            seen["entering"] = hidden.detach()

        handles = []
        for layer in range(self.first_layer):

            def note(module: Any, args: Any, out: Any, layer: int = layer) -> None:
                returns_tuple[layer] = isinstance(out, tuple)

            handles.append(self.model.bridge.blocks[layer].register_forward_hook(note))
        try:
            with torch.no_grad():
                hook: Hook = (f"blocks.{self.first_layer}.hook_in", keep)
                self._forward([hook], torch.zeros_like(self.ids[:, :1]), self.first_layer)
        finally:
            for handle in handles:
                handle.remove()
        return seen["entering"], returns_tuple

    def _forward(
        self,
        hooks: Sequence[Hook],
        at: torch.Tensor | None,
        stop_after: int | None = None,
        copies: int = 1,
    ) -> torch.Tensor:
        options: dict[str, Any] = {}
        if self._cache is not None:
            options["attention_mask"] = self._mask.repeat(copies, 1)
            options["past_key_values"] = _copy(self._cache, copies)
        return self.model.run(
            self.ids.repeat(copies, 1),
            hooks,
            at=at,
            stop_after=stop_after,
            position_ids=self._positions.repeat(copies, 1),
            **options,
        )

    @contextmanager
    def _lower_layers_skipped(self) -> Iterator[None]:
        """Inside, blocks below the first layer hand on what they get."""
        blocks = [self.model.bridge.blocks[layer] for layer in range(self.first_layer)]
        try:
            for block, returns_tuple in zip(blocks, self._tuples, strict=True):
                # An attribute of the instance hides the class's method; deleting it undoes that.
                block.__dict__["forward"] = _hand_on_tuple if returns_tuple else _hand_on
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)


def _hand_on(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden


def _hand_on_tuple(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return hidden, None


def _copy(cache: Any, copies: int) -> Any:
    """A cache that can be extended without extending the original."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    if copies > 1:
        for layer in new.layers:
            layer.keys = layer.keys.repeat(copies, 1, 1, 1)
            layer.values = layer.values.repeat(copies, 1, 1, 1)
    return new
