"""Forward passes that reuse everything an intervention cannot change.

An intervention at position ``start`` of layer ``layer`` changes nothing to the left of that
position and nothing below that layer. So one whole pass is kept (:class:`FullPass`): the keys
and values of all positions, and what entered the layers. Later passes run only the layers
from ``layer`` up, on the positions from ``start`` on (:class:`SuffixRunner`), or, where the
weights of a layer were changed, all positions from that layer up (:meth:`FullPass.rerun`).

Sequences of one batch are aligned at their start positions (``.`` is padding)::

    . a b c | s d e .        the part left of the bar is the cached prefix, of width P
    a b c d | s e f g        the part right of it is the suffix, of width S

Queries are counted from the bar: the start position is query 0 in every sequence. Keys are
counted from the left, padding included: the start position is key P in every sequence.

Many interventions on one batch run together, each on a copy of it. A copy whose lowest
touched layer is ``l`` joins the pass at layer ``l``, so that no copy runs a layer that its
intervention cannot change.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

from driftlens.errors import check_choice
from driftlens.interventions import Hook, block_in_name
from driftlens.memory import is_out_of_memory
from driftlens.models import LensModel, Places
from driftlens.precision import largest_difference
from driftlens.probing import allowed_by_rounding

Engine = Literal["suffix", "plain"]
"""``suffix`` reuses what an intervention cannot change; ``plain`` runs whole sequences."""

Item = TypeVar("Item")
Found = TypeVar("Found")


class FullPass:
    """A pass over whole sequences, without gradients, and what later passes need of it.

    Args:
        model: The model, in the state (edits applied or not) that is meant.
        rows: Token ids of each sequence.
        enters: Layers whose input is kept.
        at: Positions whose logits are wanted, for each sequence; ``None`` for none.
        hooks: Active during this pass.
        below: A pass whose layers below the given one are taken over (see :meth:`rerun`).

    Attributes:
        logits: ``[row, chosen, d_vocab]``, or no position if ``at`` is ``None``.
    """

    def __init__(
        self,
        model: LensModel,
        rows: Sequence[Sequence[int]],
        enters: Iterable[int] = (),
        at: Int[torch.Tensor, "row chosen"] | None = None,
        hooks: Sequence[Hook] = (),
        *,
        below: tuple[FullPass, int] | None = None,
    ) -> None:
        self.model = model
        self.rows = [list(row) for row in rows]
        self.ids = model.tokens.pad(self.rows, model.device)
        # Without a configuration the cache keeps all keys, those of sliding windows too.
        self.cache = DynamicCache()
        base, layer = below or (None, 0)
        kept = {} if base is None else base.entering
        self.entering: dict[int, Float[torch.Tensor, "row pos d_model"]] = {
            index: hidden for index, hidden in kept.items() if index <= layer
        }
        inputs = {} if base is None else {layer: lambda hidden: kept[layer]}
        new = [index for index in enters if index not in self.entering]
        stop_at = model.top if at is None else None
        with skipped(model, layer), _replacing(model, inputs), torch.no_grad():
            # Padding on the right is seen by no real position.
            self.logits = model.run(
                self.ids,
                [*_keeping(self.entering, new), *hooks],
                at=at,
                stop_at=stop_at,
                past_key_values=self.cache,
            )
        if base is not None:
            self.cache.layers[:layer] = base.cache.layers[:layer]

    def rerun(
        self,
        layer: int | None,
        enters: Iterable[int] = (),
        at: Int[torch.Tensor, "row chosen"] | None = None,
        hooks: Sequence[Hook] = (),
    ) -> FullPass:
        """The same sequences, after the weights of ``layer`` and above may have changed.

        Layers below are not run: hooks on them see nothing, and what is kept of them is this
        pass's. Its input of ``layer`` must have been kept. ``None``: anything may have changed,
        and everything is run.
        """
        below = None if layer is None else (self, layer)
        return FullPass(self.model, self.rows, enters, at, hooks, below=below)


class SuffixRunner:
    """Passes over the sequences of a :class:`FullPass` from their start positions on.

    Args:
        base: The whole pass, which must have kept what entered the layers to start at.
        starts: First position of each sequence that may change.
        rows: Which of the sequences; ``None`` for all.
    """

    def __init__(
        self, base: FullPass, starts: Sequence[int], rows: Sequence[int] | None = None
    ) -> None:
        self.model = base.model
        chosen = list(range(len(base.rows))) if rows is None else list(rows)
        device = base.ids.device
        self.n_rows = len(chosen)
        self.prefix_width = max(starts)
        lengths = [len(base.rows[row]) for row in chosen]
        self.width = max(n - start for n, start in zip(lengths, starts, strict=True))
        index = torch.tensor(chosen, device=device)
        start_of = torch.tensor(list(starts), device=device)[:, None]
        suffix = start_of + torch.arange(self.width, device=device)
        inside = suffix.clamp(max=base.ids.shape[1] - 1)
        self._entering = {
            layer: hidden[index.to(hidden.device)[:, None], inside.to(hidden.device)]
            for layer, hidden in base.entering.items()
        }
        prefix = start_of + torch.arange(-self.prefix_width, 0, device=device)
        self._cache = [_cut(layer, index, prefix.clamp(min=0)) for layer in base.cache.layers]
        # Sequences that start at the same position differ only in what enters.
        self._same = len(set(starts)) == 1
        rows_of_inputs = slice(0, 1) if self._same else slice(None)
        self._ids = base.ids[index[:, None], inside][rows_of_inputs]
        self._positions = suffix[rows_of_inputs]
        self._mask = torch.cat([prefix >= 0, torch.ones_like(suffix, dtype=torch.bool)], dim=1)
        self._mask = self._mask[rows_of_inputs].long()

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept for the passes."""
        kept = [*self._entering.values(), *(x for pair in self._cache for x in pair)]
        return sum(x.numel() * x.element_size() for x in kept)

    def past_values(self, layer: int) -> Float[torch.Tensor, "row key kv_head d_head"] | None:
        """Values left of the suffix."""
        if not self.prefix_width:
            return None
        return self._cache[layer][1].transpose(1, 2)

    def run(
        self,
        hooks: Sequence[Hook] = (),
        at: Int[torch.Tensor, "batch chosen"] | Places | None = None,
        joins: Sequence[int] = (0,),
        stop_at: str | None = None,
    ) -> torch.Tensor:
        """One pass; ``at`` and the query axes that hooks see are counted from the start.

        Args:
            joins: For each copy of the batch, in ascending order, the layer at which it joins
                the pass; hooks on a layer see the copies that have joined, one after another.
            stop_at: Name of a hook at which the pass ends.

        Returns:
            Logits ``[copies * rows, chosen, d_vocab]``, or ``[1, places, d_vocab]``.
        """
        if list(joins) != sorted(joins) or (len(joins) > 1 and not self._same):
            raise ValueError("Copies join in ascending order and start at one position.")
        inputs = {
            layer: _joined(self._entering[layer].repeat(copies, 1, 1), first=layer == joins[0])
            for layer, copies in Counter(joins).items()
        }
        options: dict[str, Any] = {"position_ids": self._positions}
        if self.prefix_width:
            options["past_key_values"] = self._extendable(joins)
            options["attention_mask"] = self._mask
        with skipped(self.model, joins[0]), _replacing(self.model, inputs):
            return self.model.run(self._ids, hooks, at=at, stop_at=stop_at, **options)

    def _extendable(self, joins: Sequence[int]) -> DynamicCache:
        """A cache with room for every copy in every layer."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._cache):
            copies = max(1, sum(join <= layer for join in joins))
            if self.n_rows == 1:
                shape = (copies, *keys.shape[1:])
                keys, values = keys.expand(shape), values.expand(shape)
            elif copies > 1:
                keys, values = (x.repeat(copies, 1, 1, 1) for x in (keys, values))
            cache.layers.append(_Prefix(keys, values))
        return cache


class SideBySide(SuffixRunner):
    """Several runners as one, their sequences one after another, aligned at their starts.

    Args:
        runners: Of one model, with the same layers to enter at.
        prefix_width: Of the whole, at least the widest one's.
        width: Of the suffix of the whole, at least the widest one's.
    """

    def __init__(self, runners: Sequence[SuffixRunner], prefix_width: int, width: int) -> None:
        self.model = runners[0].model
        self.n_rows = sum(runner.n_rows for runner in runners)
        self.prefix_width, self.width = prefix_width, width
        self._same = False

        def on_the_right(tensor: torch.Tensor, rows: int) -> torch.Tensor:
            """Whole width, by repeating what stands last: no real position sees it."""
            tensor = tensor.expand(rows, *tensor.shape[1:])
            more = tensor[:, -1:].expand(-1, width - tensor.shape[1], *tensor.shape[2:])
            return torch.cat([tensor, more], dim=1)

        def on_the_left(tensor: torch.Tensor) -> torch.Tensor:
            return pad(tensor, (0, 0, prefix_width - tensor.shape[-2], 0))

        self._entering = {
            layer: torch.cat([on_the_right(r._entering[layer], r.n_rows) for r in runners])
            for layer in runners[0]._entering
        }
        self._cache = [
            (torch.cat([on_the_left(keys) for keys, _ in layer]),
             torch.cat([on_the_left(values) for _, values in layer]))
            for layer in zip(*(runner._cache for runner in runners), strict=True)
        ]  # fmt: skip
        self._ids = torch.cat([on_the_right(r._ids, r.n_rows) for r in runners])
        self._positions = torch.cat([on_the_right(r._positions, r.n_rows) for r in runners])
        masks = [r._mask.expand(r.n_rows, -1) for r in runners]
        masks = [pad(m, (prefix_width - r.prefix_width, 0)) for m, r in zip(masks, runners,
                                                                          strict=True)]  # fmt: skip
        self._mask = torch.cat([pad(m, (0, prefix_width + width - m.shape[1]), value=1)
                                for m in masks])  # fmt: skip


class SharedPasses:
    """Passes over the sequences of several tasks, of which some may be finished by then.

    Widths are those of all tasks together, and stay as they are when some are finished, so that
    what was recorded in the first pass can be compared with what later ones give.

    Args:
        model: The model.
        rows: Token ids of each task's sequences.
        runners: Each task's, whose suffixes are run; ``None`` runs whole sequences.
        enters: The layer at which suffixes begin.
    """

    def __init__(
        self,
        model: LensModel,
        rows: Sequence[Sequence[Sequence[int]]],
        runners: Sequence[SuffixRunner] | None,
        enters: int,
    ) -> None:
        self.model, self._rows, self._runners, self._enters = model, rows, runners, enters
        if runners is None:
            self.width = max(len(row) for task in rows for row in task)
        else:
            self._prefix_width = max(runner.prefix_width for runner in runners)
            self.width = max(runner.width for runner in runners)
        self._passes: SuffixRunner | torch.Tensor | None = None
        self._chosen: list[int] = []

    def run(
        self, chosen: Sequence[int], hooks: Sequence[Hook], at: Places
    ) -> Float[torch.Tensor, "1 places d_vocab"]:
        """One pass over the sequences of the chosen tasks, one task after another."""
        if self._passes is None or list(chosen) != self._chosen:
            self._chosen = list(chosen)
            self._passes = self._over(self._chosen)
        if isinstance(self._passes, SuffixRunner):
            return self._passes.run(hooks, at, joins=[self._enters])
        return self.model.run(self._passes, hooks, at=at)

    def _over(self, chosen: Sequence[int]) -> SuffixRunner | torch.Tensor:
        if self._runners is not None:
            runners = [self._runners[i] for i in chosen]
            if len(self._rows) == 1:
                return runners[0]
            return SideBySide(runners, self._prefix_width, self.width)
        rows = [row for i in chosen for row in self._rows[i]]
        ids = self.model.tokens.pad(rows, self.model.device)
        return pad(ids, (0, self.width - ids.shape[1]))


def reuse_is_exact(model: LensModel) -> bool:
    """Whether reused passes give this model's own logits; shown once for each model.

    Where they do not, the first call warns and everything runs whole sequences.
    """
    return shown_exact(model, "reuse cached passes", _largest_error, "whole sequences are run")


def shown_exact(
    model: LensModel,
    ability: str,
    largest_error: Callable[[LensModel], tuple[float, float]],
    otherwise: str,
) -> bool:
    """Whether a fast way gives this model's own logits; tried once for each model.

    Args:
        ability: What the model would have to be able to do, in words.
        largest_error: Gives the largest difference from plain log-probabilities, and the largest
            logit.
        otherwise: What is done instead, for the warning.

    Raises:
        Exception: Torch's or Python's, if memory does not do for the trial, which says nothing
            about the model; it is tried again when asked again.
    """
    if ability not in model.memo:
        try:
            worst, scale = largest_error(model)
            exact = worst <= allowed_by_rounding(model, scale)
            reason = f"its log-probabilities would differ by {worst:.2g}"
        except Exception as error:
            if is_out_of_memory(error):
                raise
            exact, reason = False, f"{type(error).__name__}: {error}"
        if not exact:
            warnings.warn(
                f"{model.info.name} cannot {ability} ({reason}); {otherwise} instead, which is "
                "slower and gives the same result.",
                stacklevel=4,
            )
        model.memo[ability] = exact
    return bool(model.memo[ability])


def check_engine(asked: Engine | None) -> None:
    """Refuse an engine that there is not; ``None`` leaves the choice open.

    Raises:
        RequestError: If there is no such engine.
    """
    if asked is not None:
        check_choice("engine", asked, get_args(Engine))


def choose_engine(model: LensModel, asked: Engine | None) -> Engine:
    """The engine that was asked for, or the fast one if it is exact on this model.

    Raises:
        RequestError: If there is no such engine.
    """
    check_engine(asked)
    return asked or ("suffix" if reuse_is_exact(model) else "plain")


def _largest_error(model: LensModel) -> tuple[float, float]:
    """Largest difference from plain log-probabilities, and the largest logit, over several small
    passes."""
    ids = (torch.arange(9) * 13 + 7).remainder(model.info.d_vocab).tolist()
    rows = [ids[:7], ids[3:8]]
    middle = model.info.n_layers // 2
    worst = scale = 0.0

    def compare(found: torch.Tensor, expected: torch.Tensor) -> None:
        nonlocal worst, scale
        worst = float(np.maximum(worst, largest_difference(found, expected)))  # NaN counts
        scale = max(scale, float(expected.abs().max()))

    with torch.no_grad():
        plain = model.run(model.tokens.pad(rows, model.device))
        base = FullPass(model, rows, enters=range(model.info.n_layers))
        ragged = SuffixRunner(base, [4, 1]).run(joins=[middle])
        compare(ragged[0, :3], plain[0, 4:7])
        compare(ragged[1], plain[1, 1:5])
        joined = SuffixRunner(base, [6], rows=[0]).run(joins=[0, middle, model.info.n_layers - 1])
        compare(joined[:, 0], plain[:1, 6].expand(3, -1))
        again = base.rerun(middle, at=torch.tensor([[6], [4]])).logits
        compare(again[:, 0], torch.stack([plain[0, 6], plain[1, 4]]))
    return worst, scale


def in_batches(
    items: Sequence[Item], size: int, run: Callable[[Sequence[Item]], Sequence[Found]]
) -> Iterator[Sequence[Found]]:
    """``run`` over ``items`` in batches; a batch that does not fit into memory is halved.

    Raises:
        Exception: Torch's or Python's for memory that does not do, if a single item does not fit.
    """
    start = 0
    while start < len(items):
        try:
            found = run(items[start : start + size])
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size = (size + 1) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield found
        start += size


MEMORY_BUDGET = 128 * 2**20
"""Bytes that the batch of one pass may take on the CPU; does not change results."""


def budget(model: LensModel, on_cpu: int = MEMORY_BUDGET) -> int:
    """Bytes that the batch of one pass may take: on a GPU, a quarter of what is free.

    What torch holds of the GPU for tensors to come is as free as what nobody holds.
    """
    if model.device.type == "cuda":
        held = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        return max(on_cpu, (torch.cuda.mem_get_info(model.device)[0] + held) // 4)
    return on_cpu


# --- parts ---------------------------------------------------------------------------------


def _keeping(store: dict[int, torch.Tensor], layers: Iterable[int]) -> list[Hook]:
    def keep(layer: int) -> Hook:
        def hook_fn(hidden: torch.Tensor, hook: Any) -> None:
            store[layer] = hidden.detach()

        return block_in_name(layer), hook_fn

    return [keep(layer) for layer in sorted(set(layers))]


def _joined(new: torch.Tensor, first: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda hidden: new if first else torch.cat([hidden, new.to(hidden.device)])


@contextmanager
def _replacing(
    model: LensModel, inputs: Mapping[int, Callable[[torch.Tensor], torch.Tensor]]
) -> Iterator[None]:
    """Inside, what enters some blocks is replaced before the block looks at it.

    TransformerLens's ``hook_in`` comes too late where the number of sequences changes: some
    blocks have read it by then.
    """

    def replacing(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
        def pre_hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        return pre_hook

    handles = [
        model.bridge.blocks[layer].register_forward_pre_hook(replacing(change), with_kwargs=True)
        for layer, change in inputs.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Prefix(DynamicLayer):  # type: ignore[misc]
    """Keys and values to the left, which one pass reads and does not keep its own with."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values; those of the pass are forgotten when its layer is done."""
        keys = torch.cat([self.keys, key_states], dim=-2)
        return keys, torch.cat([self.values, value_states], dim=-2)


def _cut(
    layer: Any, rows: Int[torch.Tensor, " row"], positions: Int[torch.Tensor, "row prefix"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[row, kv_head, prefix, d_head]`` at chosen positions of a cached layer."""
    index = rows.to(layer.keys.device)[:, None], positions.to(layer.keys.device)
    keys, values = (x.transpose(1, 2)[index].transpose(1, 2) for x in (layer.keys, layer.values))
    return keys, values


@contextmanager
def skipped(model: LensModel, upto: int) -> Iterator[None]:
    """Inside, blocks below a layer hand on what they get."""
    blocks = [model.bridge.blocks[layer] for layer in range(upto)]
    returns_tuples = _returns_tuples(model) if blocks else False
    try:
        for block in blocks:
            # An attribute of the instance hides the class's method; deleting it undoes that.
            block.__dict__["forward"] = _hand_on_tuple if returns_tuples else _hand_on
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _returns_tuples(model: LensModel) -> bool:
    """Whether this model's blocks return tuples; looked at once."""
    if "blocks return tuples" not in model.memo:
        seen: dict[str, bool] = {}

        def note(module: Any, args: Any, out: Any) -> None:
            seen["tuple"] = isinstance(out, tuple)

        handle = model.bridge.blocks[0].register_forward_hook(note)
        try:
            with torch.no_grad():
                model.run(torch.tensor([[0]]), at=torch.tensor([[0]]))
        finally:
            handle.remove()
        model.memo["blocks return tuples"] = seen["tuple"]
    return bool(model.memo["blocks return tuples"])


def _hand_on(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden


def _hand_on_tuple(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return hidden, None
