"""Many sequences in one: texts side by side, prefixes that they share only once.

Sequences are packed as trees into rows: a token stands once for all sequences that share it
and everything before it. Each token attends to its own ancestors only, by the rule that the
model's own masks follow (a sliding window stays one), and keeps the position that it has in its
sequence. So each token computes exactly what it would in a pass over its own sequence, no
padding is computed but at the end of a row, and two continuations of one prompt cost one
prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from driftlens.interventions import Hook
from driftlens.models import LensModel
from driftlens.precision import largest_difference
from driftlens.reuse import shown_exact, skipped

ROW = 256
"""Tokens of a row, unless one sequence is longer. Attention costs the square of it."""

LONG_BRANCH = 48
"""Tokens of the longest sequence by which it is shown that packing is exact."""


@dataclass(frozen=True)
class Packed:
    """Sequences packed as trees.

    Args:
        ids: Token ids, padded on the right.
        depth: Position of each token in its own sequence.
        parent: Where the token before it in its sequence stands, -1 for none.
        row: Row of each sequence.
        places: For each sequence, where in its row each of its tokens stands.
        used: Number of tokens in each row, without padding.
    """

    ids: Int[torch.Tensor, "row pos"]
    depth: Int[torch.Tensor, "row pos"]
    parent: Int[torch.Tensor, "row pos"]
    row: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]
    used: tuple[int, ...]

    def rows(self, start: int, end: int) -> Packed:
        """Some of the rows, without padding that none of them needs."""
        widest = max(self.used[start:end])
        return Packed(
            self.ids[start:end, :widest],
            self.depth[start:end, :widest],
            self.parent[start:end, :widest],
            tuple(r - start for r in self.row if start <= r < end),
            tuple(p for r, p in zip(self.row, self.places, strict=True) if start <= r < end),
            self.used[start:end],
        )

    def sees(self) -> Bool[torch.Tensor, "row query key"]:
        """Whether a query may attend to a key: to itself and to its ancestors."""
        rows, width = self.ids.shape
        seen = np.zeros((rows, width, width), dtype=bool)
        for row, parents in enumerate(self.parent.tolist()):
            for node, parent in enumerate(parents):
                if parent >= 0:
                    seen[row, node] = seen[row, parent]
                seen[row, node, node] = True
        return torch.from_numpy(seen)

    @property
    def real(self) -> Bool[torch.Tensor, "row pos"]:
        """Which tokens are no padding."""
        return torch.arange(self.ids.shape[1]) < torch.tensor(self.used)[:, None]


class _Row:
    """One row while it is filled."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def lacks(self, sequence: Sequence[int]) -> bool:
        """Whether some of its tokens do not stand here yet."""
        return len(self._known(sequence)) < len(sequence)

    def _known(self, sequence: Sequence[int]) -> list[int]:
        path: list[int] = []
        node = -1
        for token in sequence:
            found = self._children.get((node, token))
            if found is None:
                break
            path.append(found)
            node = found
        return path

    def add(self, sequence: Sequence[int], share: bool) -> tuple[int, ...]:
        """Where its tokens stand."""
        path = self._known(sequence) if share else []
        for token in sequence[len(path) :]:
            parent = path[-1] if path else -1
            node = len(self.ids)
            if share:
                self._children[parent, token] = node
            self.ids.append(token)
            self.parents.append(parent)
            self.depths.append(len(path))
            path.append(node)
        return tuple(path)


def pack(
    sequences: Sequence[Sequence[int]], pad: int, row: int = ROW, share: bool = True
) -> Packed:
    """Pack sequences into rows.

    Args:
        pad: Id that fills rows up.
        row: About how many tokens a row gets; a longer sequence makes it longer.
        share: Whether equal prefixes stand only once. Where each occurrence of a token counts,
            as in statistics, they must not.
    """
    rows: list[_Row] = [_Row()]
    row_of = [0] * len(sequences)
    places: list[tuple[int, ...]] = [()] * len(sequences)
    if share:
        # Equal prefixes are neighbours in this order, and few are torn apart. Rows are of like
        # length: each is filled until it has its part of all tokens.
        order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
        whole = _Row()
        for i in order:
            whole.add(sequences[i], share)
        part = len(whole.ids) / math.ceil(len(whole.ids) / row)
        for i in order:
            if len(rows[-1].ids) >= part and rows[-1].lacks(sequences[i]):
                rows.append(_Row())
            row_of[i], places[i] = len(rows) - 1, rows[-1].add(sequences[i], share)
    else:
        # The longest first, each into the first row that has room.
        width = max(row, *map(len, sequences))
        for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
            fitting = (n for n, r in enumerate(rows) if len(r.ids) + len(sequences[i]) <= width)
            row_of[i] = next(fitting, len(rows))
            if row_of[i] == len(rows):
                rows.append(_Row())
            places[i] = rows[row_of[i]].add(sequences[i], share)
    widest = max(len(r.ids) for r in rows)

    def table(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([[*getattr(r, name), *[fill] * (widest - len(r.ids))] for r in rows])

    return Packed(
        table("ids", pad),
        table("depths", 0),
        table("parents", -1),
        tuple(row_of),
        tuple(places),
        tuple(len(r.ids) for r in rows),
    )


def run_packed(
    model: LensModel,
    packed: Packed,
    hooks: Sequence[Hook] = (),
    at: Int[torch.Tensor, "row chosen"] | None = None,
    stop_at: str | None = None,
) -> torch.Tensor:
    """One pass; hooks see packed positions.

    Returns:
        Logits ``[row, chosen, d_vocab]``.
    """
    depth, sees = packed.depth.to(model.device), packed.sees()
    rules = _masks(model, int(packed.depth.max()) + 1)
    masks: dict[int, torch.Tensor] = {}

    def mask_of(layer: int) -> torch.Tensor:
        rule = rules[layer]
        if id(rule) not in masks:
            by_depth = depth.to(rule.device)
            own = rule[by_depth[:, :, None], by_depth[:, None, :]]
            hidden = ~sees.to(rule.device)
            masks[id(rule)] = own.masked_fill(hidden, torch.finfo(rule.dtype).min)[:, None]
        return masks[id(rule)]

    with _changing_masks(model, lambda layer, mask: mask_of(layer).to(mask.device)):
        return model.run(packed.ids, hooks, at=at, stop_at=stop_at, position_ids=depth)


def packing_is_exact(model: LensModel) -> bool:
    """Whether packed passes give this model's own logits; shown once for each model.

    Where they do not, the first call warns, and sequences are run padded instead.
    """
    return shown_exact(model, "run packed sequences", _largest_error, "they are run padded")


def _largest_error(model: LensModel) -> tuple[float, float]:
    """Largest difference from plain log-probabilities, and the largest logit.

    One sequence branches off where another goes on for long, so that a model which counts places
    in the row, and not in the sequence, is far off.
    """
    length = min(LONG_BRANCH, model.info.n_ctx)
    ids = (torch.arange(length + 8) * 13 + 7).remainder(model.info.d_vocab).tolist()
    long = ids[:length]
    sequences = [long, [*long[:4], *ids[length:]][:length], ids[3:8][:length], long[:5]]
    packed = pack(sequences, model.tokens.pad_id, row=length + 14)
    worst = scale = 0.0
    with torch.no_grad():
        logits = run_packed(model, packed)
        for i, sequence in enumerate(sequences):
            plain = model.run(torch.tensor([sequence]))[0]
            found = logits[packed.row[i], list(packed.places[i])]
            worst = float(np.maximum(worst, largest_difference(found, plain)))  # NaN counts
            scale = max(scale, float(plain.abs().max()))
    return worst, scale


# --- the model's own masks -----------------------------------------------------------------


def _masks(model: LensModel, length: int) -> list[Float[torch.Tensor, "query key"]]:
    """What each layer adds to its attention scores, for one sequence of some length.

    Layers that use the same mask give the same tensor.
    """
    known = model.memo.get("masks")
    if known is None or len(known[0]) < length:
        # Room for more, but never more positions than the model has.
        longest = min(max(64, 1 << (length - 1).bit_length()), model.info.n_ctx)
        seen: dict[int, torch.Tensor] = {}

        def look(layer: int, mask: torch.Tensor) -> torch.Tensor:
            seen[layer] = mask
            return mask

        ids = torch.zeros(1, max(length, longest), dtype=torch.long)
        with skipped(model, model.info.n_layers), _changing_masks(model, look), torch.no_grad():
            model.run(ids, stop_at=model.top, at=torch.zeros(1, 1, dtype=torch.long))
        distinct = {id(mask): mask[0, 0] for mask in seen.values()}
        known = [distinct[id(seen[layer])] for layer in range(model.info.n_layers)]
        model.memo["masks"] = known
    return list(known)


@contextmanager
def _changing_masks(
    model: LensModel, change: Callable[[int, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Inside, the mask that each block is given is replaced by ``change(layer, mask)``."""

    def changing(layer: int) -> Callable[..., Any]:
        def pre_hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            mask = kwargs.get("attention_mask")
            if isinstance(mask, torch.Tensor):
                return args, {**kwargs, "attention_mask": change(layer, mask)}
            found = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.ndim == 4]
            if len(found) != 1:
                raise RuntimeError("its blocks are given no attention mask")
            new = list(args)
            new[found[0]] = change(layer, args[found[0]])
            return tuple(new), kwargs

        return pre_hook

    handles = [
        block.register_forward_pre_hook(changing(layer), with_kwargs=True)
        for layer, block in enumerate(model.bridge.blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
