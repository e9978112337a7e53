"""Attention drift: what each head looks at before and after an edit.

One row of attention is taken for each head: that of the query position under study, the
last token of the prompt unless told otherwise. Drift towards the edited subject is

- ``difference``: attention to the subject's last token, edited minus original;
- ``kl``: KL( original row || edited row ), in nats;
- ``max_head``: change of the *largest* head's attention to that token, by layer (the measure
  that correlates best with specificity failure, paper section 3.3), and ``mean_head``.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int

from driftlens import figures
from driftlens.attention import head_name, row_kl
from driftlens.disk import make_folder, write_atomically
from driftlens.edits import Edit
from driftlens.equality import equal_fields
from driftlens.errors import DataError, RequestError, as_integer, check_count
from driftlens.interventions import Hook, pattern_name
from driftlens.models import LensModel
from driftlens.reuse import Engine, FullPass, choose_engine
from driftlens.tokens import Encoded, Span

PROMPTS_PER_BATCH = 16


@dataclass(frozen=True, eq=False)
class PromptDrift:
    """One prompt's attention rows before and after the edit.

    Args:
        prompt: The text.
        labels: What each token shows.
        subject: Token span of the subject.
        query: Position whose rows these are.
        original: ``[layer, head, key]`` in the original model.
        edited: The same in the edited model.
    """

    prompt: str
    labels: tuple[str, ...]
    subject: Span
    query: int
    original: Float[np.ndarray, "layer head key"]
    edited: Float[np.ndarray, "layer head key"]

    def __eq__(self, other: object) -> bool:
        return equal_fields(self, other)


@dataclass(frozen=True)
class HeadDrift:
    """How far one head drifted, averaged over prompts.

    Args:
        layer: Of the head.
        head: Of the head.
        original: Attention to the subject's last token before the edit.
        edited: The same after it.
        kl: Divergence of the row, in nats.
    """

    layer: int
    head: int
    original: float
    edited: float
    kl: float

    @property
    def name(self) -> str:
        """As the field writes it, ``L9H6``."""
        return head_name(self.layer, self.head)

    @property
    def drift(self) -> float:
        """Edited minus original attention."""
        return self.edited - self.original


@dataclass(frozen=True)
class Drift:
    """Attention before and after an edit, for one prompt or many.

    Arrays are ``[prompt, layer, head]``, attention in probability, divergence in nats.
    ``engine`` says how it was measured: ``"suffix"``, the edited model from the edited layer on,
    or ``"plain"``, both models as a whole; ``None`` if unknown.
    """

    prompts: tuple[PromptDrift, ...]
    model_name: str
    edit_label: str
    engine: Engine | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        n = len(self.prompts)
        heads = ", ".join(f"{head.name} {head.drift:+.3f}" for head in self.top_heads(3))
        what = f"{n} prompt{'s' * (n != 1)}"
        return f"Drift({self.model_name}, {self.edit_label}, {what}; most: {heads})"

    @property
    def original(self) -> Float[np.ndarray, "prompt layer head"]:
        """Attention from the query to the subject's last token, before the edit."""
        return np.stack([p.original[:, :, p.subject.last] for p in self.prompts])

    @property
    def edited(self) -> Float[np.ndarray, "prompt layer head"]:
        """Attention from the query to the subject's last token, after the edit."""
        return np.stack([p.edited[:, :, p.subject.last] for p in self.prompts])

    @property
    def difference(self) -> Float[np.ndarray, "prompt layer head"]:
        """Edited minus original attention to the subject's last token."""
        return self.edited - self.original

    @property
    def original_subject(self) -> Float[np.ndarray, "prompt layer head"]:
        """Attention to all tokens of the subject, before the edit."""
        return np.stack([_mass(p.original, p.subject) for p in self.prompts])

    @property
    def edited_subject(self) -> Float[np.ndarray, "prompt layer head"]:
        """Attention to all tokens of the subject, after the edit."""
        return np.stack([_mass(p.edited, p.subject) for p in self.prompts])

    @property
    def kl(self) -> Float[np.ndarray, "prompt layer head"]:
        """KL( original row || edited row ), in nats."""
        return np.stack([_row_kl(p.original, p.edited) for p in self.prompts])

    @property
    def max_head(self) -> Float[np.ndarray, "prompt layer"]:
        """Change of the largest head's attention to the subject's last token."""
        return self.edited.max(-1) - self.original.max(-1)

    @property
    def mean_head(self) -> Float[np.ndarray, "prompt layer"]:
        """Change of the mean head's attention to the subject's last token."""
        return self.difference.mean(-1)

    def top_heads(self, k: int = 10) -> list[HeadDrift]:
        """The ``k`` heads whose attention to the subject grew most, averaged over prompts.

        Raises:
            RequestError: If ``k`` is negative.
        """
        check_count("k", k)
        original, edited, kl = (a.mean(0) for a in (self.original, self.edited, self.kl))
        flat = np.argsort(-(edited - original), axis=None, kind="stable")[:k]
        return [
            HeadDrift(int(y), int(x), float(original[y, x]), float(edited[y, x]), float(kl[y, x]))
            for y, x in zip(*np.unravel_index(flat, original.shape), strict=True)
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt, layer and head."""
        n_prompts, n_layers, n_heads = self.original.shape
        index = np.indices((n_prompts, n_layers, n_heads)).reshape(3, -1)
        return pd.DataFrame(
            {
                "prompt": [self.prompts[i].prompt for i in index[0]],
                "layer": index[1],
                "head": index[2],
                "name": [
                    head_name(int(y), int(x)) for y, x in zip(index[1], index[2], strict=True)
                ],
                "original": self.original.reshape(-1),
                "edited": self.edited.reshape(-1),
                "difference": self.difference.reshape(-1),
                "original_subject": self.original_subject.reshape(-1),
                "edited_subject": self.edited_subject.reshape(-1),
                "kl": self.kl.reshape(-1),
            }
        )

    def plot(self, cured: Drift | None = None) -> go.Figure:
        """Layer x head maps of attention to the subject: before, after, difference.

        Args:
            cured: Drift of a restricted edit of the same model, on the same rows of the same
                prompts, shown beside it.

        Raises:
            RequestError: If it is of another model, other prompts or rows, or another subject.
        """
        if cured is not None:
            self._check_alike(cured)
        panels = {"original": self.original.mean(0), "edited": self.edited.mean(0)}
        signed = {"edited - original": self.difference.mean(0)}
        if cured is not None:
            name = cured.edit_label if cured.edit_label not in panels else "second edit"
            panels[name] = cured.edited.mean(0)
            signed[f"{name} - original"] = cured.difference.mean(0)
        what = (
            self.prompts[0].prompt
            if len(self.prompts) == 1
            else f"mean over {len(self.prompts)} prompts"
        )
        rows = {p.query - len(p.labels) for p in self.prompts}
        if rows != {-1}:
            one = f"token {self.prompts[0].query}" if len(self.prompts) == 1 else "other tokens"
            what += f" (from {one})"
        return figures.head_maps(
            {**panels, **signed},
            signed=list(signed),
            title=f"Attention to the subject's last token: {what}",
        )

    def _check_alike(self, other: Drift) -> None:
        """Refuse what cannot be shown beside this."""
        for what, first, second in (
            ("prompts", *([p.prompt for p in d.prompts] for d in (self, other))),
            ("subjects", *([p.subject for p in d.prompts] for d in (self, other))),
            ("rows of the prompts", *([p.query for p in d.prompts] for d in (self, other))),
            ("models", self.model_name, other.model_name),
        ):
            if first != second:
                raise RequestError(
                    f"The two drifts are of different {what}.",
                    "Measure both in the same way, on the same model.",
                )
        if self.original.shape != other.original.shape or not np.allclose(
            self.original, other.original, atol=1e-3
        ):
            raise RequestError(
                "The two drifts begin from different attention.",
                "Measure both on the same model, with the same edits applied to it or none.",
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything into one ``.npz`` file, atomically.

        Raises:
            DataError: If the file cannot be written.
        """
        target = Path(path)
        record = {
            "model_name": self.model_name,
            "edit_label": self.edit_label,
            "engine": self.engine,
            "prompts": [
                {
                    "prompt": p.prompt,
                    "labels": list(p.labels),
                    "subject": [p.subject.start, p.subject.end],
                    "query": p.query,
                }
                for p in self.prompts
            ],
        }
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"original_{i}": p.original for i, p in enumerate(self.prompts)}
        arrays |= {f"edited_{i}": p.edited for i, p in enumerate(self.prompts)}
        np.savez_compressed(buffer, record=np.array(json.dumps(record)), **arrays)
        try:
            make_folder(target.parent)
            write_atomically(target, buffer.getvalue())
        except OSError as error:
            raise DataError(
                f"The drift cannot be written to {target}: {error.strerror or error}.",
                "Choose a file that can be written.",
            ) from error
        return target


def load_drift(path: str | os.PathLike[str]) -> Drift:
    """Read what :meth:`Drift.save` wrote.

    Raises:
        DataError: If the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            record: dict[str, Any] = json.loads(str(file["record"]))
            prompts = tuple(
                PromptDrift(
                    p["prompt"],
                    tuple(p["labels"]),
                    Span(*p["subject"]),
                    p["query"],
                    file[f"original_{i}"],
                    file[f"edited_{i}"],
                )
                for i, p in enumerate(record["prompts"])
            )
            engine = record.get("engine")
            return Drift(prompts, record["model_name"], record["edit_label"], engine)
    except Exception as error:  # zipfile, json and numpy each raise types of their own
        raise DataError(f"There is no drift in {path}: {error!r}.") from error


def measure_drift(
    model: LensModel,
    edit: Edit,
    prompts: str | Sequence[str],
    subject: str | Sequence[str] | None = None,
    *,
    query: int = -1,
    occurrence: int = 0,
    label: str | None = None,
) -> Drift:
    """Attention of every head to the subject, in the original and in the edited model.

    Args:
        model: Without the edit applied (edits under study in sequence may be).
        edit: What to compare with.
        prompts: One prompt or many.
        subject: The entity looked at; one for all prompts or one for each. By default the
            subject of the edit.
        query: Position that looks, BOS counted; negative from the end, -1 the last token.
        occurrence: Which occurrence of the subject, 0 the first.
        label: What to call the edited state in plots.

    Raises:
        TokenError: If the subject is not in a prompt.
        RequestError: If the query stands before the subject, so that it cannot see it, or a prompt
            is longer than the model's context.
        EditError: If the edit is not one of this model.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise RequestError("There is no prompt.", "Give at least one.")
    subjects = subjects_of(edit, subject, len(texts))
    edit.check_not_active(model)
    encoded = [model.tokens.encode(text) for text in texts]
    for e in encoded:
        model.check_length(len(e), e.text)
    spans = [
        model.tokens.find_subject(e, s, occurrence) for e, s in zip(encoded, subjects, strict=True)
    ]
    queries = [resolve_query(e, query, span) for e, span in zip(encoded, spans, strict=True)]
    engine = choose_engine(model, None)
    original, edited = _rows(model, edit, encoded, queries, engine)
    return Drift(
        tuple(
            PromptDrift(e.text, tuple(model.tokens.labels(e)), span, q, before, after)
            for e, span, q, before, after in zip(
                encoded, spans, queries, original, edited, strict=True
            )
        ),
        model.info.name,
        label or _label(edit),
        engine,
    )


def attention_patterns(
    model: LensModel, prompt: str, heads: Sequence[tuple[int, int]], edit: Edit | None = None
) -> dict[str, Float[np.ndarray, "query key"]]:
    """Token-to-token attention of some heads, by name, of the original or the edited model.

    Raises:
        ModelError: If a layer does not exist.
        RequestError: If a head does not, or the prompt is too long.
        TokenError: If the prompt is empty.
    """
    for layer, head in heads:
        model.check_head(layer, head)
    encoded = model.tokens.encode(prompt)
    model.check_length(len(encoded), prompt)
    ids = model.tokens.pad([encoded.ids])
    names = {layer: pattern_name(model.check_layer(layer)) for layer, _ in heads}
    with edit.applied(model) if edit is not None else nullcontext():
        seen = model.record(ids, list(names.values()))
    return {head_name(y, x): seen[names[y]][0, x].float().cpu().numpy().copy() for y, x in heads}


def subjects_of(edit: Edit, subject: str | Sequence[str] | None, count: int) -> list[str]:
    """A subject for each prompt.

    Raises:
        RequestError: If none is known, or their number is not that of the prompts.
    """
    if subject is None:
        if edit.request is None:
            known = dict.fromkeys(request.subject for request in edit.requests)
            if known:
                shown = ", ".join(map(repr, list(known)[:5])) + ", ..." * (len(known) > 5)
                raise RequestError(
                    f"The edit is of {len(edit.requests)} facts.",
                    f"Pass subject=..., e.g. one of {shown}.",
                )
            raise RequestError(
                "The edit does not say which subject it is about.", "Pass subject=..."
            )
        subject = edit.request.subject
    subjects = [subject] * count if isinstance(subject, str) else list(subject)
    if len(subjects) != count:
        raise RequestError(f"There are {count} prompts, but {len(subjects)} subjects.")
    return subjects


def resolve_query(encoded: Encoded, query: int, subject: Span) -> int:
    """A query position counted from 0.

    Raises:
        RequestError: If it is no whole number, out of range, or cannot see the subject.
    """
    length, query = len(encoded), as_integer("query", query)
    if not -length <= query < length:
        raise RequestError(
            f"There is no position {query} in {encoded.text!r}, which has {length} tokens."
        )
    position = query % length
    if position < subject.last:
        raise RequestError(
            f"Position {position} of {encoded.text!r} stands before the subject's last token "
            f"({subject.last}) and cannot attend to it.",
            "Choose a later query position.",
        )
    return position


def _rows(
    model: LensModel,
    edit: Edit,
    encoded: Sequence[Encoded],
    queries: Sequence[int],
    engine: Engine,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows ``[layer, head, key]`` of each prompt at its query, original and edited.

    Keys are cut at the prompt's length. What the edit cannot change is computed once.
    """
    reuses = engine == "suffix"
    lowest = edit.lowest_layer(model) if reuses else None
    original: list[np.ndarray] = []
    edited: list[np.ndarray] = []
    for start in range(0, len(encoded), PROMPTS_PER_BATCH):
        batch = encoded[start : start + PROMPTS_PER_BATCH]
        at = torch.tensor(queries[start : start + len(batch)])
        rows = [e.ids for e in batch]
        before: dict[int, torch.Tensor] = {}
        after: dict[int, torch.Tensor] = {}
        if not reuses:
            for store, state in ((before, nullcontext()), (after, edit.applied(model))):
                with state, torch.no_grad():
                    ids = model.tokens.pad(rows)
                    model.run(ids, _taking_rows(model, store, at), stop_at=model.top)
        else:
            kept = [] if lowest is None else [lowest]
            base = FullPass(model, rows, kept, hooks=_taking_rows(model, before, at))
            with edit.applied(model):
                base.rerun(lowest, hooks=_taking_rows(model, after, at))
        for found, rows_of in ((original, before), (edited, {**before, **after})):
            for i, e in enumerate(batch):
                stack = [rows_of[layer][i, :, : len(e)] for layer in range(model.info.n_layers)]
                found.append(torch.stack(stack).numpy())
    return original, edited


def _taking_rows(
    model: LensModel, store: dict[int, torch.Tensor], queries: Int[torch.Tensor, " batch"]
) -> list[Hook]:
    """Hooks that record one attention row of each head, by layer."""

    def take(layer: int) -> Hook:
        def hook_fn(pattern: torch.Tensor, hook: Any) -> None:
            at = queries.to(pattern.device)
            store[layer] = pattern[torch.arange(len(at), device=at.device), :, at].float().cpu()

        return pattern_name(layer), hook_fn

    return [take(layer) for layer in range(model.info.n_layers)]


def _mass(rows: np.ndarray, span: Span) -> np.ndarray:
    return rows[:, :, span.start : span.end].sum(-1)


def _row_kl(original: np.ndarray, edited: np.ndarray) -> np.ndarray:
    return row_kl(torch.from_numpy(original), torch.from_numpy(edited)).numpy()


def _label(edit: Edit) -> str:
    return f"edited with {edit.restriction}" if edit.restriction else "edited"
