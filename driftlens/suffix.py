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
        prefixes, suffixes, prefix_mask = [], [], []
        for row, start in zip(rows, starts, strict=True):
            gap = self.prefix_width - start
            prefixes.append([pad] * gap + list(row[:start]))
            prefix_mask.append([0] * gap + [1] * start)
            suffixes.append(list(row[start:]) + [pad] * (width - len(row) + start))
        self.ids = torch.tensor(suffixes, device=device)
        mask = torch.tensor(prefix_mask, device=device, dtype=torch.long).reshape(len(rows), -1)
        self._mask = torch.cat([mask, torch.ones_like(self.ids)], dim=1)
        self._positions = (self._mask.cumsum(-1) - 1).clamp_min(0)
        self._cache = self._run_prefix(torch.tensor(prefixes, device=device, dtype=torch.long))
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

    def _run_prefix(self, ids: torch.Tensor) -> Any:
        """Keys and values left of the start positions; ``None`` if there is nothing there."""
        if self.prefix_width == 0:
            return None
        with torch.no_grad():
            _, cache = self.model.run_with_kv_cache(
                ids,
                attention_mask=self._mask[:, : self.prefix_width],
                position_ids=self._positions[:, : self.prefix_width],
            )
        return cache

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
            position_ids=self._positions[:, self.prefix_width :].repeat(copies, 1),
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
