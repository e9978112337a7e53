"""Causal patching: put one model's attention into the other and read the answers.

*Restore*: run the edited model with the original's attention. If the lost answer comes back,
the drift was what lost it (paper section 3.4). *Contaminate*: run the original model with the
edited model's attention. If the answer is lost, the drift alone is enough to lose it.

What can be exchanged, for chosen layers, heads and query positions:

- ``pattern``: attention rows, the values staying the running model's own;
- ``values``: the values that these rows read, the rows staying the running model's own;
- ``both``: the heads' whole output.

:func:`patch_activation` exchanges what whole layers write instead (attention output, MLP
output, residual stream; paper section 3.2).

The steps of one experiment:

1. run the original and the edited model, and record the *source*'s attention;
2. choose (layer, head, query) triples, and key columns if not whole rows;
3. run the *target* model with the source's attention there;
4. read probability, log-probability and rank of the answers in all three runs.

An answer of several tokens is read by teacher forcing; each of its tokens is predicted at a
"last token" of its own, and ``queries="last"`` patches all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Bool
from tqdm.auto import tqdm

from driftlens.attention import restore_columns
from driftlens.drift import subjects_of
from driftlens.edits import Edit
from driftlens.errors import EditError, RequestError, check_choice
from driftlens.interventions import (
    Hook,
    Mix,
    attn_out_name,
    mlp_out_name,
    pattern_name,
    replace_activation,
    replace_heads,
    resid_post_name,
    values_name,
)
from driftlens.models import LensModel, recording
from driftlens.patch_places import (
    Columns,
    Queries,
    describe,
    in_words,
    integers,
    layers_in_words,
    positions_of,
    resolve_heads,
    resolve_layers,
    settled,
    sweep_places,
    where_patched,
)
from driftlens.patch_results import AttentionSweep, Direction, Exchange, PatchResult, Readout
from driftlens.reuse import Engine, FullPass, SuffixRunner, budget, choose_engine, in_batches
from driftlens.scoring import ContinuationScore, Question, QuestionBatch, ask, log_probabilities
from driftlens.tokens import Span

Patch = TypeVar("Patch")
Component = Literal["attn_out", "mlp_out", "resid"]


class PatchExperiment:
    """Any number of patches on one prompt; the two unpatched runs are made once.

    Args:
        model: Without the edit applied.
        edit: Which edit.
        prompt: A prompt that the answer is to follow.
        subject: The edited subject, which must be in the prompt; by default that of the edit
            (which then is looked for only if key columns need it).
        answer: The answer whose probability is read, of one token or several.
        direction: ``"restore"`` or ``"contaminate"``.
        compare: Further texts to read; by default the edit's new target (of an edit of several
            facts, that of the one about the subject).
        occurrence: Which occurrence of the subject, 0 the first.
        engine: ``"suffix"`` computes what a patch cannot change once, and runs each patch over
            the rest: the layers from its lowest one up, the positions from its first one on;
            ``"plain"`` runs whole sequences; ``None`` takes the former wherever it is exact.

    Raises:
        RequestError: If an option does not exist.
        TokenError: If the subject is absent.
        EditError: If the edit is not one of this model.
    """

    def __init__(
        self,
        model: LensModel,
        edit: Edit,
        prompt: str,
        subject: str | None = None,
        answer: str = "",
        *,
        direction: Direction = "restore",
        compare: str | Sequence[str] | None = None,
        occurrence: int = 0,
        engine: Engine | None = None,
    ) -> None:
        check_choice("direction", direction, get_args(Direction))
        edit.check_not_active(model)
        self.model = model
        self.edit = edit
        self.prompt = prompt
        self.direction: Direction = direction
        self.engine: Engine = choose_engine(model, engine)
        self.batch = QuestionBatch.of(_questions(model, edit, prompt, subject, answer, compare))
        self._subject = None if subject is None else subjects_of(edit, subject, 1)[0]
        self._occurrence = occurrence
        if self._subject is not None:
            self._span()
        self._ids = self.batch.ids(model)
        self._recorded: dict[str, torch.Tensor] = {}
        """The source's activations; its attention rows from ``_recorded_from`` on."""
        self._recorded_from = self._first_position("last")
        self._runner: tuple[int, SuffixRunner] | None = None
        self._target_pass: FullPass | None = None
        self._around = model.weights.active
        self.original, self.edited = self._baselines()

    # --- patches ---

    def attention(
        self,
        *,
        layers: int | Iterable[int] | None = None,
        heads: Iterable[int | str | tuple[int, int]] | None = None,
        queries: Queries = "last",
        columns: Columns = None,
        exchange: Exchange = "pattern",
    ) -> PatchResult:
        """Exchange attention; the arguments are those of :func:`patch_attention`."""
        queries, columns = settled(queries, "query position"), settled(columns, "key column")
        places = resolve_heads(self.model, layers, heads)
        patched = self._attention([places], queries, columns, exchange)[0]
        what = describe(self.model, places, queries, columns, exchange)
        return self._result(patched, what)

    def activation(
        self,
        component: Component,
        *,
        layers: int | Iterable[int] | None = None,
        queries: Queries = "last",
    ) -> PatchResult:
        """Exchange what layers write; the arguments are those of :func:`patch_activation`."""
        queries = settled(queries, "query position")
        chosen = resolve_layers(self.model, layers)
        patched = self._activation([chosen], component, queries)[0]
        what = f"{component} of {layers_in_words(self.model, chosen)}, {in_words(queries)}"
        return self._result(patched, what)

    def sweep(
        self,
        *,
        window: int | None = None,
        queries: Queries = "last",
        columns: Columns = None,
        exchange: Exchange = "pattern",
        progress: bool = True,
    ) -> AttentionSweep:
        """Every head, layer and window; the arguments are those of :func:`sweep_attention`."""
        queries, columns = settled(queries, "query position"), settled(columns, "key column")
        n_layers, n_heads = self.model.info.n_layers, self.model.info.n_heads
        width = max(1, n_layers // 5) if window is None else window
        if not 1 <= width <= n_layers:
            raise RequestError(f"A window of {width} layers does not fit.", f"Use 1 to {n_layers}.")
        windows = [(first, first + width - 1) for first in range(n_layers - width + 1)]
        places = sweep_places(n_layers, n_heads, windows)
        with tqdm(total=len(places), desc="patching", unit="patch", disable=not progress) as bar:
            readouts = self._many(places, queries, columns, exchange, bar)
        n = n_layers * n_heads
        return AttentionSweep(
            original=self.original,
            edited=self.edited,
            heads=[readouts[y * n_heads : (y + 1) * n_heads] for y in range(n_layers)],
            layers=readouts[n : n + n_layers],
            windows=dict(zip(windows, readouts[n + n_layers : -1], strict=True)),
            everything=readouts[-1],
            direction=self.direction,
            exchange=exchange,
            prompt=self.prompt,
            engine=self.engine,
        )

    def attention_each(
        self,
        sets: Iterable[Iterable[int | str | tuple[int, int]]],
        *,
        queries: Queries = "last",
        columns: Columns = None,
        exchange: Exchange = "pattern",
    ) -> list[PatchResult]:
        """What :meth:`attention` finds for each set of heads, many sets in one pass.

        Raises:
            RequestError: If a set is empty or names a head that does not exist.
        """
        queries, columns = settled(queries, "query position"), settled(columns, "key column")
        places = [resolve_heads(self.model, None, heads) for heads in sets]
        return [
            self._result(readout, describe(self.model, chosen, queries, columns, exchange))
            for chosen, readout in zip(
                places, self._many(places, queries, columns, exchange), strict=True
            )
        ]

    def activation_each(
        self,
        component: Component,
        sets: Iterable[int | Iterable[int]],
        *,
        queries: Queries = "last",
    ) -> list[PatchResult]:
        """What :meth:`activation` finds for each set of layers, many sets in one pass.

        Raises:
            RequestError: If a set is empty.
            ModelError: If a layer is out of range.
        """
        queries = settled(queries, "query position")
        chosen = [resolve_layers(self.model, layers) for layers in sets]
        readouts = self._in_passes(
            chosen, min, lambda chunk: self._activation(chunk, component, queries), queries
        )
        return [
            self._result(
                readout, f"{component} of {layers_in_words(self.model, one)}, {in_words(queries)}"
            )
            for one, readout in zip(chosen, readouts, strict=True)
        ]

    # --- how they are run ---

    def _many(
        self,
        places: Sequence[list[tuple[int, int]]],
        queries: Queries,
        columns: Columns,
        exchange: Exchange,
        bar: tqdm | None = None,
    ) -> list[Readout]:
        """One patch for each list of (layer, head)."""
        return self._in_passes(
            places,
            lambda heads: min(layer for layer, _ in heads),
            lambda chunk: self._attention(chunk, queries, columns, exchange),
            queries,
            bar,
        )

    def _in_passes(
        self,
        patches: Sequence[Patch],
        lowest: Callable[[Patch], int],
        run: Callable[[Sequence[Patch]], Sequence[Readout]],
        queries: Queries,
        bar: tqdm | None = None,
    ) -> list[Readout]:
        """A readout of each patch, in as few passes as memory allows."""
        # Patches that join the pass at the same layer stand together, so that none is early.
        order = sorted(range(len(patches)), key=lambda i: lowest(patches[i]))
        size = self._patches_per_pass(self._first_position(queries))
        found: list[Readout] = []
        for readouts in in_batches([patches[i] for i in order], size, run):
            found += readouts
            if bar is not None:
                bar.update(len(readouts))
        of_patch = dict(zip(order, found, strict=True))
        return [of_patch[i] for i in range(len(patches))]

    def _activation(
        self, patches: Sequence[Sequence[int]], component: Component, queries: Queries
    ) -> list[Readout]:
        """Several patches in one pass, each of some layers and on a copy of the batch, by
        ascending lowest layer."""
        self._check_state()
        check_choice("component", component, get_args(Component))
        layers = sorted({layer for patch in patches for layer in patch})
        name_of = {layer: _NAME_OF[component](layer) for layer in layers}
        missing = [name for name in name_of.values() if name not in self._recorded]
        if missing:
            with self._source():
                self._recorded.update(self.model.record(self._ids, missing))
        rows, width = len(self.batch.rows), self._ids.shape[1]
        where = torch.stack(
            [
                where_patched(self.model, self.batch.row_question(row), width, [0], queries)[0]
                for row in range(rows)
            ]
        )
        start = self._first_position(queries)
        joins = [min(patch) if self._reuses else 0 for patch in patches]
        hooks = []
        for layer, name in name_of.items():
            joined = sum(join <= layer for join in joins)
            here = torch.cat([where & (layer in patch) for patch in patches[:joined]])
            new = self._recorded[name][:, start:].repeat(joined, 1, 1)
            hooks.append(replace_activation(name, here[:, start:], new))
        with self._target(), torch.no_grad():
            logprobs = self._run(hooks, start, joins)
        return [
            self._readout(self.batch.read(logprobs[copy * rows : (copy + 1) * rows]))
            for copy in range(len(patches))
        ]

    def _attention(
        self,
        patches: Sequence[Sequence[tuple[int, int]]],
        queries: Queries,
        columns: Columns,
        exchange: Exchange,
    ) -> list[Readout]:
        """Several patches in one pass, each on a copy of the batch, by ascending lowest layer."""
        self._check_state()
        check_choice("exchange", exchange, get_args(Exchange))
        if columns is not None and exchange != "pattern":
            raise RequestError(
                "Key columns can be chosen for exchange='pattern' only.", "Leave columns out."
            )
        start = self._first_position(queries)
        self._ensure_recorded(start)
        rows, width = len(self.batch.rows), self._ids.shape[1]
        joins = [min(y for y, _ in places) if self._reuses else 0 for places in patches]
        where: dict[int, torch.Tensor] = {}
        for copy, places in enumerate(patches):
            for layer in sorted({y for y, _ in places}):
                heads = [x for y, x in places if y == layer]
                if layer not in where:
                    joined = sum(join <= layer for join in joins)
                    shape = (joined * rows, self.model.info.n_heads, width)
                    where[layer] = torch.zeros(shape, dtype=torch.bool)
                for row in range(rows):
                    question = self.batch.row_question(row)
                    chosen = where_patched(self.model, question, width, heads, queries)
                    where[layer][copy * rows + row] = chosen
        mask = self._column_mask(columns, width)
        with self._target(), torch.no_grad():
            hooks = self._hooks(where, exchange, mask, joins, start)
            logprobs = self._run(hooks, start, joins)
        return [
            self._readout(self.batch.read(logprobs[copy * rows : (copy + 1) * rows]))
            for copy in range(len(patches))
        ]

    def _check_state(self) -> None:
        """Refuse to mix what was computed under other edits with the model as it is now."""
        if self.model.weights.active != self._around:
            raise EditError(
                "Other edits are applied to the model now than when this experiment was made.",
                "Patch under the same ones, or make a new experiment.",
            )

    @property
    def _reuses(self) -> bool:
        return self.engine == "suffix"

    def _first_position(self, queries: Queries) -> int:
        """Where passes start: the first patched position, or the last prompt token before it."""
        if not self._reuses:
            return 0
        questions = [self.batch.row_question(row) for row in range(len(self.batch.rows))]
        return min(p for q in questions for p in (*positions_of(q, queries), len(q.prompt) - 1))

    def _patches_per_pass(self, start: int) -> int:
        """How many patches fit into the memory that a pass may take."""
        info, rows, keys = self.model.info, len(self.batch.rows), self._ids.shape[1]
        answer = self.batch.at().shape[1]
        d_mlp = 4 * info.d_model
        floats = (keys - start) * (14 * info.d_model + 4 * d_mlp + 3 * info.n_heads * keys)
        floats += 4 * keys * (info.n_heads + info.n_kv_heads) * info.d_head
        floats += 3 * answer * info.d_vocab
        return max(1, budget(self.model) // (rows * floats * 4))

    def _run(self, hooks: Sequence[Hook], start: int, joins: Sequence[int]) -> torch.Tensor:
        """The target's log-probabilities where the answers are, ``[copies * rows, answer,
        d_vocab]``."""
        at = self.batch.at().repeat(len(joins), 1)
        if self._reuses:
            logits = self._suffix(start).run(hooks, at - start, joins)
        else:
            logits = self.model.run(self._ids.repeat(len(joins), 1), hooks, at=at)
        return log_probabilities(logits)

    def _suffix(self, start: int) -> SuffixRunner:
        """Passes of the target from a position on."""
        if self._runner is None or self._runner[0] != start:
            assert self._target_pass is not None
            starts = [start] * len(self.batch.rows)
            self._runner = start, SuffixRunner(self._target_pass, starts)
        return self._runner[1]

    def _hooks(
        self,
        where: dict[int, Bool[torch.Tensor, "batch head query"]],
        exchange: Exchange,
        columns: Bool[torch.Tensor, " key"] | None,
        joins: Sequence[int],
        start: int,
    ) -> list[Hook]:
        """Hooks of whole patches, in ascending order of layers.

        Where a patch needs the running model's own attention (values only, key columns) and
        the architecture delivers it too late, it is recorded beforehand, layer by layer, each
        time with the patches of the layers below in place.
        """
        mix = _mixture(exchange, columns)
        hooks: list[Hook] = []
        for layer in sorted(where):
            own = None
            if mix is not None and not self.model.pattern_comes_first:
                own = self._own_pattern(layer, hooks, joins, start)
            rows = self._recorded[pattern_name(layer)][:, :, start - self._recorded_from :]
            hooks += replace_heads(
                layer,
                where[layer][:, :, start:],
                rows,
                None if exchange == "pattern" else self._recorded[values_name(layer)],
                mix,
                own,
                self._suffix(start).past_values(layer) if self._reuses else None,
            )
        return hooks

    def _own_pattern(
        self, layer: int, hooks: Sequence[Hook], joins: Sequence[int], start: int
    ) -> torch.Tensor:
        """The running model's attention in one layer, with the given patches in place."""
        name = pattern_name(layer)
        if not self._reuses:
            ids = self._ids.repeat(len(joins), 1)
            return self.model.record(ids, [name], hooks, stop_at=name)[name]
        store: dict[str, torch.Tensor] = {}
        joined = [join for join in joins if join <= layer]
        self._suffix(start).run([*hooks, *recording(store, [name])], joins=joined, stop_at=name)
        return store[name]

    def _baselines(self) -> tuple[Readout, Readout]:
        """The answers of both models, unpatched, and whatever patches can reuse of these runs.

        What the edit cannot change, the layers below it, is computed once.
        """
        model, at = self.model, self.batch.at()
        every = range(model.info.n_layers)
        lowest = self.edit.lowest_layer(model) if self._reuses else None
        source_is_edited = self.direction == "contaminate"
        taken = _taking(every, self._recorded_from, self._recorded)
        below = _taking(every[:lowest], self._recorded_from, self._recorded)
        if not self._reuses:
            with torch.no_grad():
                original = model.run(self._ids, [] if source_is_edited else taken, at=at)
                with self._applied(True):
                    edited = model.run(self._ids, taken if source_is_edited else [], at=at)
            return self._unpatched(original), self._unpatched(edited)
        shared = [] if lowest is None else every[: lowest + 1]
        before = FullPass(
            model,
            self.batch.rows,
            every if source_is_edited else shared,
            at,
            below if source_is_edited else taken,
        )
        hooks = taken if source_is_edited else []
        enters = [] if source_is_edited else every
        with self._applied(True):
            after = before.rerun(lowest, enters, at, hooks)
        self._target_pass = before if source_is_edited else after
        return self._unpatched(before.logits), self._unpatched(after.logits)

    def _unpatched(self, logits: torch.Tensor) -> Readout:
        return self._readout(self.batch.read(log_probabilities(logits)))

    def _ensure_recorded(self, start: int) -> None:
        """Have the source's attention rows from a position on."""
        if start < self._recorded_from:
            found: dict[str, torch.Tensor] = {}
            hooks = _taking(range(self.model.info.n_layers), start, found)
            with self._source(), torch.no_grad():
                self.model.run(self._ids, hooks, stop_at=self.model.top)
            # Only a whole recording replaces what is there, together with where it starts.
            self._recorded, self._recorded_from = {**self._recorded, **found}, start

    def _applied(self, edited: bool) -> AbstractContextManager[Any]:
        return self.edit.applied(self.model) if edited else nullcontext()

    def _source(self) -> AbstractContextManager[Any]:
        """Inside, the model is the one that activations are taken from."""
        return self._applied(self.direction == "contaminate")

    def _target(self) -> AbstractContextManager[Any]:
        """Inside, the model is the one that is patched."""
        return self._applied(self.direction == "restore")

    def _span(self) -> Span:
        (name,) = subjects_of(self.edit, self._subject, 1)
        encoded = self.model.tokens.encode(self.prompt)
        return self.model.tokens.find_subject(encoded, name, self._occurrence)

    def _column_mask(self, columns: Columns, width: int) -> Bool[torch.Tensor, " key"] | None:
        if columns is None:
            return None
        mask = torch.zeros(width, dtype=torch.bool)
        if isinstance(columns, str):
            check_choice("columns", columns, ("subject_last", "subject"))
            span = self._span()
            mask[span.last if columns == "subject_last" else span.start : span.end] = True
            return mask
        length = len(self.batch.questions[0].prompt)
        for column in integers(columns, "key column"):
            if not -length <= column < length:
                raise RequestError(
                    f"There is no key column {column} in a prompt of {length} tokens."
                )
            mask[column % length] = True
        return mask

    def _readout(self, scores: Sequence[ContinuationScore]) -> Readout:
        texts = [question.text for question in self.batch.questions]
        return Readout(texts[0], dict(zip(texts, scores, strict=True)))

    def _result(self, patched: Readout, what: str) -> PatchResult:
        return PatchResult(
            self.original, self.edited, patched, self.direction, self.prompt, what, self.engine
        )


def patch_attention(
    model: LensModel,
    edit: Edit,
    prompt: str,
    subject: str | None = None,
    answer: str = "",
    *,
    layers: int | Iterable[int] | None = None,
    heads: Iterable[int | str | tuple[int, int]] | None = None,
    queries: Queries = "last",
    columns: Columns = None,
    exchange: Exchange = "pattern",
    direction: Direction = "restore",
    compare: str | Sequence[str] | None = None,
    occurrence: int = 0,
) -> PatchResult:
    """Run one model with the other's attention in chosen places.

    Args:
        model: Without the edit applied.
        edit: Which edit.
        prompt: A prompt that the answer is to follow.
        subject: The edited subject, which must be in the prompt; by default that of the edit
            (which then is looked for only if ``columns`` needs it).
        answer: The answer whose probability is read, of one token or several.
        layers: Layers to patch; ``None`` for all.
        heads: Heads to patch: numbers (in each of the layers), names such as ``"L9H6"`` or
            (layer, head) pairs; ``None`` for all.
        queries: Query positions whose rows are patched: ``"last"`` (where the answer's tokens
            are predicted), ``"all"``, or positions, negative ones from the prompt's end.
        columns: Key positions to restore: the subject's last token, the whole subject, or
            positions. The other columns keep their proportions and are scaled so that the
            row still sums to one; the result says so. ``None`` exchanges whole rows.
        exchange: ``"pattern"``, ``"values"`` or ``"both"``.
        direction: ``"restore"`` or ``"contaminate"``.
        compare: Further texts to read; by default the edit's new target.
        occurrence: Which occurrence of the subject, 0 the first.

    Raises:
        RequestError: If a layer, head, position or option does not exist.
        TokenError: If the subject is absent.
        EditError: If the edit is not one of this model.
    """
    experiment = PatchExperiment(
        model,
        edit,
        prompt,
        subject,
        answer,
        direction=direction,
        compare=compare,
        occurrence=occurrence,
    )
    return experiment.attention(
        layers=layers, heads=heads, queries=queries, columns=columns, exchange=exchange
    )


def patch_activation(
    model: LensModel,
    edit: Edit,
    prompt: str,
    answer: str,
    component: Component,
    *,
    layers: int | Iterable[int] | None = None,
    queries: Queries = "last",
    direction: Direction = "contaminate",
    compare: str | Sequence[str] | None = None,
) -> PatchResult:
    """Run one model with what the other's layers write (paper section 3.2, figure 3).

    Args:
        component: ``"attn_out"`` (what attention adds to the residual stream), ``"mlp_out"``
            (what the MLP adds) or ``"resid"`` (the residual stream after a block).
        layers: Whose; ``None`` for all.
        queries: Positions, as in :func:`patch_attention`.

    The other arguments, and errors, are those of :func:`patch_attention`.
    """
    experiment = PatchExperiment(
        model, edit, prompt, answer=answer, direction=direction, compare=compare
    )
    return experiment.activation(component, layers=layers, queries=queries)


_NAME_OF = {"attn_out": attn_out_name, "mlp_out": mlp_out_name, "resid": resid_post_name}


def sweep_attention(
    model: LensModel,
    edit: Edit,
    prompt: str,
    subject: str | None = None,
    answer: str = "",
    *,
    window: int | None = None,
    queries: Queries = "last",
    columns: Columns = None,
    exchange: Exchange = "pattern",
    direction: Direction = "restore",
    compare: str | Sequence[str] | None = None,
    occurrence: int = 0,
    progress: bool = True,
) -> AttentionSweep:
    """Patch every head, every layer, and every window of layers, one at a time.

    Args:
        window: Number of layers in a sliding window; by default a fifth of the model, the
            share of the paper's windows.
        progress: Whether to show a bar.

    The other arguments, and errors, are those of :func:`patch_attention`.
    """
    experiment = PatchExperiment(
        model,
        edit,
        prompt,
        subject,
        answer,
        direction=direction,
        compare=compare,
        occurrence=occurrence,
    )
    return experiment.sweep(
        window=window, queries=queries, columns=columns, exchange=exchange, progress=progress
    )


def _taking(layers: Iterable[int], start: int, store: dict[str, torch.Tensor]) -> list[Hook]:
    """Hooks that record attention: all values, and the rows from a position on."""

    def keep(name: str, first: int) -> Hook:
        def hook_fn(tensor: torch.Tensor, hook: Any) -> None:
            store[name] = tensor[:, :, first:].clone() if first else tensor

        return name, hook_fn

    return [
        hook for y in layers for hook in (keep(pattern_name(y), start), keep(values_name(y), 0))
    ]


def _mixture(exchange: Exchange, columns: Bool[torch.Tensor, " key"] | None) -> Mix | None:
    """How the running model's own attention counts: not at all, alone, or by column."""
    if exchange == "values":
        return lambda own, source: own
    if columns is None:
        return None
    return lambda own, source: restore_columns(own, source, columns.to(own.device))


def _questions(
    model: LensModel,
    edit: Edit,
    prompt: str,
    subject: str | None,
    answer: str,
    compare: str | Sequence[str] | None,
) -> list[Question]:
    if not answer.strip():
        raise RequestError("There is no answer to read.", 'Pass answer="...".')
    if compare is None:
        request = edit.request_about(subject)
        compare = [] if request is None or request.target_new == answer else [request.target_new]
    elif isinstance(compare, str):
        compare = [compare]
    return [ask(model, prompt, text) for text in dict.fromkeys([answer, *compare])]
