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
from dataclasses import dataclass
from numbers import Integral
from operator import index
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from tqdm.auto import tqdm

from driftlens import figures
from driftlens.attention import head_name, parse_head, restore_columns
from driftlens.drift import subjects_of
from driftlens.edits import Edit
from driftlens.errors import EditError, RequestError, check_choice, check_count
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
from driftlens.reuse import Engine, FullPass, SuffixRunner, budget, choose_engine, in_batches
from driftlens.scoring import ContinuationScore, Question, QuestionBatch, ask, log_probabilities
from driftlens.tokens import Span

Patch = TypeVar("Patch")
Direction = Literal["restore", "contaminate"]
Exchange = Literal["pattern", "values", "both"]
Component = Literal["attn_out", "mlp_out", "resid"]
Measure = Literal["prob", "logprob"]
Queries = Literal["last", "all"] | int | Iterable[int]
Columns = Literal["subject_last", "subject"] | int | Iterable[int] | None


# --- results -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readout:
    """How likely a model finds the answer, and what it is compared with.

    Args:
        answer: The answer under study.
        scores: Score of each text that was asked for, the answer among them.
    """

    answer: str
    scores: dict[str, ContinuationScore]

    def __getitem__(self, text: str) -> ContinuationScore:
        return self.scores[text]

    @property
    def prob(self) -> float:
        """Probability of the whole answer."""
        return self.scores[self.answer].prob

    @property
    def logprob(self) -> float:
        """Log-probability of the whole answer, in nats."""
        return self.scores[self.answer].logprob

    @property
    def rank(self) -> int:
        """0 exactly if greedy decoding gives the answer."""
        return self.scores[self.answer].rank

    def __repr__(self) -> str:
        told = ", ".join(f"P({text!r}) {score.prob:.4f}" for text, score in self.scores.items())
        return f"Readout({told}; rank of {self.answer!r}: {self.rank})"


ROUNDING = 1e-5
"""A fall of less than this (relative, or in nats) is rounding, not loss."""


def recovered_share(original: float, edited: float, patched: float, noise: float) -> float:
    """Where a patched run lies between the edited (0) and the original (1) one.

    NaN where the edit lost no more than ``noise``, so that there was nothing to recover.
    """
    lost = original - edited
    return (patched - edited) / lost if lost > noise else float("nan")


def _share(original: Readout, edited: Readout, patched: Readout, measure: Measure) -> float:
    check_choice("measure", measure, get_args(Measure))
    before, after, now = (float(getattr(run, measure)) for run in (original, edited, patched))
    noise = ROUNDING * (before if measure == "prob" else 1.0)
    return recovered_share(before, after, now, noise)


@dataclass(frozen=True)
class PatchResult:
    """One patching experiment.

    Args:
        original: The unedited model.
        edited: The edited model.
        patched: The patched run.
        direction: ``"restore"``: the edited model with the original's activations;
            ``"contaminate"``: the reverse.
        prompt: The prompt.
        what: What was exchanged, in words.
        engine: ``"suffix"``: the patched pass ran only what the patch can change; ``"plain"``:
            the whole sequence.
    """

    original: Readout
    edited: Readout
    patched: Readout
    direction: Direction
    prompt: str
    what: str
    engine: Engine = "plain"

    @property
    def recovered_share(self) -> float:
        """Share of the answer's lost probability that the patched run has.

        0: the patched run is like the edited model, 1: like the original. When restoring, it
        is the share that comes back; when contaminating, one minus it is the share that the
        patch alone loses. NaN where the edit lost nothing.
        """
        return _share(self.original, self.edited, self.patched, "prob")

    @property
    def recovered_share_logprob(self) -> float:
        """The same in log-probability."""
        return _share(self.original, self.edited, self.patched, "logprob")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per run and text."""
        return pd.DataFrame(
            [
                {
                    "run": run,
                    "text": text,
                    "prob": score.prob,
                    "logprob": score.logprob,
                    "rank": score.rank,
                }
                for run in ("original", "edited", "patched")
                for text, score in getattr(self, run).scores.items()
            ]
        )

    def plot(self) -> go.Figure:
        """Bars of the answers' probabilities in the three runs."""
        return figures.probability_bars(
            {
                run: {text: s.prob for text, s in getattr(self, run).scores.items()}
                for run in ("original", "edited", "patched")
            },
            title=self.prompt,
            subtitle=f"{self.direction}: {self.what}",
        )

    def __repr__(self) -> str:
        runs = ", ".join(
            f"{run} {getattr(self, run).prob:.4f}" for run in ("original", "edited", "patched")
        )
        return (
            f"PatchResult(P({self.original.answer!r}): {runs}; recovered share "
            f"{self.recovered_share:.2f}; {self.direction} {self.what})"
        )


@dataclass(frozen=True)
class AttentionSweep:
    """One patch for each head, each layer, each window of layers, and all at once.

    Args:
        original: The unedited model.
        edited: The edited model.
        heads: Readouts ``[layer][head]``.
        layers: Readouts ``[layer]``.
        windows: Readouts by (first layer, last layer), inclusive.
        everything: All layers and heads at once.
        direction: As in :class:`PatchResult`.
        exchange: What was exchanged.
        prompt: The prompt.
        engine: ``"suffix"``: each patch ran only what it can change; ``"plain"``: each was a
            pass over the whole sequence.
    """

    original: Readout
    edited: Readout
    heads: list[list[Readout]]
    layers: list[Readout]
    windows: dict[tuple[int, int], Readout]
    everything: Readout
    direction: Direction
    exchange: Exchange
    prompt: str
    engine: Engine = "plain"

    def _share(self, patched: Readout, measure: Measure) -> float:
        return _share(self.original, self.edited, patched, measure)

    def head_shares(self, measure: Measure = "prob") -> Float[np.ndarray, "layer head"]:
        """Recovered share of the answer's lost probability, for each head."""
        return np.array([[self._share(r, measure) for r in row] for row in self.heads])

    def layer_shares(self, measure: Measure = "prob") -> Float[np.ndarray, " layer"]:
        """The same for each layer."""
        return np.array([self._share(r, measure) for r in self.layers])

    def window_shares(self, measure: Measure = "prob") -> Float[np.ndarray, " window"]:
        """The same for each window."""
        return np.array([self._share(r, measure) for r in self.windows.values()])

    def everything_share(self, measure: Measure = "prob") -> float:
        """The same with all layers and heads at once."""
        return self._share(self.everything, measure)

    def top_heads(self, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` heads that alone bring most of the answer's probability back.

        Pairs of name and change of P(answer) against the run that was patched.

        Raises:
            RequestError: If ``k`` is negative.
        """
        check_count("k", k)
        start = self.edited.prob if self.direction == "restore" else self.original.prob
        sign = 1.0 if self.direction == "restore" else -1.0
        changes = [
            (head_name(y, x), readout.prob - start)
            for y, row in enumerate(self.heads)
            for x, readout in enumerate(row)
        ]
        return sorted(changes, key=lambda pair: -sign * pair[1])[:k]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per patch and text; ``kind`` is original, edited, head, layer,
        window or everything."""
        rows: list[dict[str, Any]] = []

        def add(kind: str, first: Any, last: Any, head: Any, readout: Readout) -> None:
            for text, s in readout.scores.items():
                share = self._share(readout, "prob") if text == readout.answer else float("nan")
                rows.append(
                    {
                        "kind": kind,
                        "first_layer": first,
                        "last_layer": last,
                        "head": head,
                        "text": text,
                        "prob": s.prob,
                        "logprob": s.logprob,
                        "rank": s.rank,
                        "recovered_share": share,
                    }
                )

        add("original", None, None, None, self.original)
        add("edited", None, None, None, self.edited)
        for y, row in enumerate(self.heads):
            for x, readout in enumerate(row):
                add("head", y, y, x, readout)
        for y, readout in enumerate(self.layers):
            add("layer", y, y, None, readout)
        for (first, last), readout in self.windows.items():
            add("window", first, last, None, readout)
        add("everything", 0, len(self.layers) - 1, None, self.everything)
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Change of P(answer) by head (map), by layer and by window (lines)."""
        start = self.edited.prob if self.direction == "restore" else self.original.prob
        answer = self.original.answer
        return figures.sweep_chart(
            np.array([[r.prob - start for r in row] for row in self.heads]),
            np.array([r.prob - start for r in self.layers]),
            list(self.windows),
            np.array([r.prob - start for r in self.windows.values()]),
            everything=self.everything.prob - start,
            title=f"{self.direction.capitalize()} attention ({self.exchange}): {self.prompt}",
            subtitle=f"P({answer}): original {self.original.prob:.4f}, edited "
            f"{self.edited.prob:.4f}, all layers patched {self.everything.prob:.4f}",
            unit=f"change of P({answer})",
        )

    def __repr__(self) -> str:
        best = ", ".join(f"{name} {change:+.4f}" for name, change in self.top_heads(3))
        return (
            f"AttentionSweep({self.direction} {self.exchange}: P({self.original.answer!r}) "
            f"original {self.original.prob:.4f}, edited {self.edited.prob:.4f}, everything patched "
            f"{self.everything.prob:.4f}; best heads {best})"
        )


# --- experiments ---------------------------------------------------------------------------


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
        queries, columns = _settled(queries, "query position"), _settled(columns, "key column")
        places = resolve_heads(self.model, layers, heads)
        patched = self._attention([places], queries, columns, exchange)[0]
        what = _describe(self.model, places, queries, columns, exchange)
        return self._result(patched, what)

    def activation(
        self,
        component: Component,
        *,
        layers: int | Iterable[int] | None = None,
        queries: Queries = "last",
    ) -> PatchResult:
        """Exchange what layers write; the arguments are those of :func:`patch_activation`."""
        queries = _settled(queries, "query position")
        chosen = _layers(self.model, layers)
        patched = self._activation([chosen], component, queries)[0]
        what = f"{component} of {_layers_in_words(self.model, chosen)}, {_in_words(queries)}"
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
        queries, columns = _settled(queries, "query position"), _settled(columns, "key column")
        n_layers, n_heads = self.model.info.n_layers, self.model.info.n_heads
        width = max(1, n_layers // 5) if window is None else window
        if not 1 <= width <= n_layers:
            raise RequestError(f"A window of {width} layers does not fit.", f"Use 1 to {n_layers}.")
        windows = [(first, first + width - 1) for first in range(n_layers - width + 1)]
        places = _sweep_places(n_layers, n_heads, windows)
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
        queries, columns = _settled(queries, "query position"), _settled(columns, "key column")
        places = [resolve_heads(self.model, None, heads) for heads in sets]
        return [
            self._result(readout, _describe(self.model, chosen, queries, columns, exchange))
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
        queries = _settled(queries, "query position")
        chosen = [_layers(self.model, layers) for layers in sets]
        readouts = self._in_passes(
            chosen, min, lambda chunk: self._activation(chunk, component, queries), queries
        )
        return [
            self._result(
                readout, f"{component} of {_layers_in_words(self.model, one)}, {_in_words(queries)}"
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
                _where(self.model, self.batch.row_question(row), width, [0], queries)[0]
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
                    chosen = _where(self.model, question, width, heads, queries)
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
        return min(p for q in questions for p in (*_positions(q, queries), len(q.prompt) - 1))

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
        """Log-probabilities where the answers are, ``[copies * rows, answer, d_vocab]``."""
        at = self.batch.at().repeat(len(joins), 1)
        with self._target(), torch.no_grad():
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
        taken = self._taking(every, self._recorded_from)
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
            self._taking(every[:lowest], self._recorded_from) if source_is_edited else taken,
        )
        hooks = taken if source_is_edited else []
        enters = [] if source_is_edited else every
        with self._applied(True):
            after = before.rerun(lowest, enters, at, hooks)
        self._target_pass = before if source_is_edited else after
        return self._unpatched(before.logits), self._unpatched(after.logits)

    def _unpatched(self, logits: torch.Tensor) -> Readout:
        return self._readout(self.batch.read(log_probabilities(logits)))

    def _taking(self, layers: Iterable[int], start: int) -> list[Hook]:
        """Hooks that record attention: all values, and the rows from a position on."""

        def keep(name: str, first: int) -> Hook:
            def hook_fn(tensor: torch.Tensor, hook: Any) -> None:
                self._recorded[name] = tensor[:, :, first:].clone() if first else tensor

            return name, hook_fn

        return [
            hook for y in layers for hook in (keep(pattern_name(y), start), keep(values_name(y), 0))
        ]

    def _ensure_recorded(self, start: int) -> None:
        """Have the source's attention rows from a position on."""
        if start < self._recorded_from:
            hooks = self._taking(range(self.model.info.n_layers), start)
            with self._source(), torch.no_grad():
                self.model.run(self._ids, hooks, stop_at=self.model.top)
            self._recorded_from = start

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
        for column in _integers(columns, "key column"):
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


def _sweep_places(
    n_layers: int, n_heads: int, windows: Sequence[tuple[int, int]]
) -> list[list[tuple[int, int]]]:
    """The (layer, head) pairs of each patch of a sweep, in the order of the result."""
    one_head = [[(y, x)] for y in range(n_layers) for x in range(n_heads)]
    whole = [[(y, x) for x in range(n_heads)] for y in range(n_layers)]
    several = [[p for y in range(a, b + 1) for p in whole[y]] for a, b in windows]
    return [*one_head, *whole, *several, [p for row in whole for p in row]]


def _mixture(exchange: Exchange, columns: Bool[torch.Tensor, " key"] | None) -> Mix | None:
    """How the running model's own attention counts: not at all, alone, or by column."""
    if exchange == "values":
        return lambda own, source: own
    if columns is None:
        return None
    return lambda own, source: restore_columns(own, source, columns.to(own.device))


# --- resolving what was asked for ----------------------------------------------------------


def resolve_heads(
    model: LensModel,
    layers: int | Iterable[int] | None,
    heads: Iterable[int | str | tuple[int, int]] | int | str | None,
) -> list[tuple[int, int]]:
    """The (layer, head) pairs that are meant.

    Raises:
        RequestError: If a head does not exist, lies outside the chosen layers, or is written
            in an unknown way.
        ModelError: If a layer is out of range.
    """
    chosen = list(range(model.info.n_layers)) if layers is None else _integers(layers, "layer")
    wanted = [model.check_layer(layer) for layer in chosen]
    if heads is None:
        return [(y, x) for y in sorted(set(wanted)) for x in range(model.info.n_heads)]
    found: list[tuple[int, int]] = []
    for head in [heads] if isinstance(heads, (int, Integral, str)) else heads:
        if isinstance(head, str):
            found.append(parse_head(head))
        elif isinstance(head, Integral):
            found += [(y, int(head)) for y in wanted]
        else:
            pair = _integers(head, "head")
            if len(pair) != 2:
                raise RequestError(f"{head!r} is no head.", "Write it as (layer, head).")
            found.append((pair[0], pair[1]))
    for y, x in found:
        model.check_layer(y)
        if y not in wanted:
            raise RequestError(
                f"The head {head_name(y, x)} is not in the chosen layers.", "Leave layers out."
            )
        model.check_head(y, x)
    if not found:
        raise RequestError("No head is chosen.", "Name at least one, or leave heads out.")
    return sorted(set(found))


def _layers(model: LensModel, layers: int | Iterable[int] | None) -> list[int]:
    """The layers that are meant, ascending."""
    return sorted({layer for layer, _ in resolve_heads(model, layers, None)})


def _integers(values: Any, what: str) -> list[int]:
    """One integer or several (of any integer type) as a list.

    Raises:
        RequestError: If there is none, or one is not a whole number.
    """
    try:
        found = [index(value) for value in ([values] if isinstance(values, Integral) else values)]
    except TypeError as error:
        raise RequestError(f"{values!r} is not a {what} or a list of them.") from error
    if not found:
        raise RequestError(f"No {what} is chosen.", "Name at least one, or leave it out.")
    return found


def _settled(places: Any, what: str) -> Any:
    """Positions in a form that can be read more than once: a word, none, or a list of integers."""
    return places if places is None or isinstance(places, str) else _integers(places, what)


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


def _where(
    model: LensModel, question: Question, width: int, heads: Sequence[int], queries: Queries
) -> Bool[torch.Tensor, "head query"]:
    """The (head, query) pairs to patch in one layer of one sequence."""
    where = torch.zeros(model.info.n_heads, width, dtype=torch.bool)
    positions = torch.tensor(_positions(question, queries))
    where[torch.tensor(heads)[:, None], positions] = True
    return where


def _positions(question: Question, queries: Queries) -> list[int]:
    length = len(question.prompt)
    if isinstance(queries, str):
        check_choice("queries", queries, ("last", "all"))
        return question.predicting if queries == "last" else list(range(len(question.ids)))
    positions = []
    for query in _integers(queries, "query position"):
        if not -length <= query < length:
            raise RequestError(
                f"There is no query position {query} in a prompt of {length} tokens."
            )
        positions.append(query % length)
    return positions


# --- in words ------------------------------------------------------------------------------


def _describe(
    model: LensModel,
    places: Sequence[tuple[int, int]],
    queries: Queries,
    columns: Columns,
    exchange: Exchange,
) -> str:
    layers = sorted({y for y, _ in places})
    if len(places) == len(layers) * model.info.n_heads:
        where = f"all heads of {_layers_in_words(model, layers)}"
    else:
        where = ", ".join(head_name(y, x) for y, x in places)
    words = f"attention {exchange} of {where}, {_in_words(queries)}"
    if columns is not None:
        words += f", key columns {_listed(columns)} (rows renormalised)"
    return words


def _layers_in_words(model: LensModel, layers: Sequence[int]) -> str:
    if len(layers) == model.info.n_layers:
        return "all layers"
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {list(layers)}"


def _in_words(queries: Queries) -> str:
    if isinstance(queries, str):
        return {"last": "rows of the last token", "all": "rows of all tokens"}[queries]
    return f"rows of the positions {_listed(queries)}"


def _listed(places: Any) -> str:
    return places if isinstance(places, str) else ", ".join(map(str, places))
