"""One prompt before and after an edit: attention, what brings the answer back, and the page.

:func:`compare` is the whole path in one function; what it returns shows itself in a notebook as the
interactive page, and saves it as one file.
"""

from __future__ import annotations

import html
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from driftlens import __version__
from driftlens.attention import head_name
from driftlens.drift import Drift, attention_patterns, measure_drift, subjects_of
from driftlens.edits import Edit
from driftlens.errors import RequestError
from driftlens.facts import EditRequest
from driftlens.models import LensModel, ModelInfo
from driftlens.patch_places import resolve_heads
from driftlens.patch_results import AttentionSweep, PatchResult, Readout
from driftlens.patching import PatchExperiment
from driftlens.records import write_result
from driftlens.scoring import score_details
from driftlens.viewer import HeadSet, PageData, Restored, State, Sweep, Table, page

HEADS_STORED = 12
"""Heads whose token-to-token attention a page holds by default: those that drifted most."""

PATTERN_BUDGET = 8_000_000
"""Bytes of a page that token-to-token attention may take by default; on long prompts, this leaves
room for fewer heads than 12. A number takes four bytes, a masked one none."""

BEST_HEADS = (2, 3, 5, 10, 20, 50, 100)
"""How many of the heads that recover most alone are restored together."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What an edit did to one prompt.

    Args:
        info: The model.
        edit: The edit.
        cured: The same fact, edited with a restriction.
        prompt: The text whose answer should have stayed.
        answer: That answer.
        target_new: What the edit asks for; empty if it does not say.
        drift: Attention before and after ``edit``.
        cured_drift: Before and after ``cured``.
        restored: The answer with the original attention or activations put back, by what was.
        sweep: The same for single heads, layers and windows.
        best_heads: The same for nested sets: the heads that recover most alone, the best first.
        head_sets: The same for sets of heads that were asked for.
        cured_readout: The answer under ``cured``.
        edit_success: Probability of the new target on the edit prompt: ``original``, ``edited``,
            and what ``restriction`` calls ``cured``; empty if the edit does not say what it
            is about.
        patterns: Token-to-token attention of the heads that drifted most, by head and state, each
            of shape [query, key].
        seconds: Duration.
        request: The edited fact; of several, the one about the subject.
        subject: Whose attention is looked at; ``None`` for that of the edited fact.
        identity: What the model's answers depend on (:meth:`driftlens.LensModel.identity`).
    """

    info: ModelInfo
    edit: Edit
    cured: Edit | None
    prompt: str
    answer: str
    target_new: str
    drift: Drift
    cured_drift: Drift | None
    restored: dict[str, PatchResult]
    sweep: AttentionSweep | None
    best_heads: dict[tuple[str, ...], PatchResult]
    head_sets: dict[tuple[str, ...], PatchResult]
    cured_readout: Readout | None
    edit_success: dict[str, float]
    patterns: dict[str, dict[str, np.ndarray]] = field(repr=False)
    seconds: float
    request: EditRequest | None = None
    subject: str | None = None
    identity: dict[str, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {readout.prob:.3f}" for name, readout in self.readouts().items())
        return f"Comparison({self.info.name}, {self.prompt!r}; P({self.answer!r}): {shown})"

    def readouts(self) -> dict[str, Readout]:
        """What the model answers, by condition: original, edited, restored and cured."""
        pattern = self.restored["attention pattern"]
        found = {"original model": pattern.original, "edited": pattern.edited}
        found |= {f"edited, original {k} restored": r.patched for k, r in self.restored.items()}
        if self.cured_readout is not None:
            found[self._cured_label] = self.cured_readout
        return found

    def target_prob(self, readout: Readout) -> float:
        """Probability of what the edit asks for; ``nan`` if it does not say."""
        return readout[self.target_new].prob if self.target_new else float("nan")

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each condition: ``condition``, probability ``answer``, ``target_new`` (NaN if
        unknown), and ``recovered_share``, the part of the lost probability that is back (NaN if
        nothing was lost)."""
        pattern = self.restored["attention pattern"]
        rows = [
            {
                "condition": name,
                "answer": readout.prob,
                "target_new": self.target_prob(readout),
                "recovered_share": replace(pattern, patched=readout).recovered_share,
            }
            for name, readout in self.readouts().items()
        ]
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """The drift of each head, by layer; with that of the restricted edit, if there is one."""
        return self.drift.plot(self.cured_drift)

    def page_data(
        self,
        title: str = "Attention drift of one knowledge edit",
        notes: Sequence[str] = (),
        facts: Sequence[tuple[str, str]] = (),
        tables: Sequence[Table] = (),
    ) -> PageData:
        """What the page shows.

        Args:
            title: Its heading.
            notes: Paragraphs that follow the summary.
            facts: Labels and values that follow those of the model and the edit.
            tables: Tables that follow those of the heads.
        """
        prompt_drift = self.drift.prompts[0]
        states = [State("original", "Original"), State("edited", "Edited")]
        attention = {"original": self.drift.original[0], "edited": self.drift.edited[0]}
        kl = {"edited": self.drift.kl[0].clip(0)}
        if self.cured_drift is not None:
            states.append(State("cured", self._cured_name))
            attention["cured"] = self.cured_drift.edited[0]
            kl["cured"] = self.cured_drift.kl[0].clip(0)
        return PageData(
            title=title,
            subtitle=self._fact or self.edit.method,
            tokens=prompt_drift.labels,
            bos=self.info.prepends_bos,
            subject_span=(prompt_drift.subject.start, prompt_drift.subject.end),
            query=prompt_drift.query,
            states=states,
            attention=attention,
            kl=kl,
            patterns=self.patterns,
            sweep=self._sweep_shown(),
            restored=self._restored_shown(),
            summary=[*self.summary(), *notes],
            facts=[*self._facts(), *facts, ("Compared in", f"{self.seconds:.0f} s"),
                   ("DriftLens", __version__)],
            answer=self.answer,
            target_new=self.target_new,
            probabilities=[
                (name, readout.prob, self.target_prob(readout))
                for name, readout in self.readouts().items()
            ],
            tables=[*self._head_tables(), *tables],
        )  # fmt: skip

    def html(self, **options: Any) -> str:
        """The page as one self-contained document; `options` are those of :meth:`page_data`."""
        return page(self.page_data(**options))

    def save(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the page, whole or not at all; `options` are those of :meth:`page_data`.

        Raises:
            DataError: If it cannot be written.
        """
        target = Path(path)
        write_result(target, self.html(**options))
        return target

    def _repr_html_(self) -> str:
        """The page in a frame of its own, which can reach neither the notebook nor the network."""
        document = html.escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{document}" sandbox="allow-scripts allow-downloads" '
            f'title="DriftLens: {html.escape(self._fact or self.edit.method, quote=True)}" '
            'style="width: 100%; height: 860px; border: 1px solid #8884"></iframe>'
        )

    def summary(self) -> list[str]:
        """What happened, in sentences computed from the numbers."""
        result, new = self.restored["attention pattern"], self.target_new
        before, after, back = result.original, result.edited, result.patched
        best = max(self.restored.items(), key=lambda item: item[1].patched.prob)
        strongest = ", ".join(f"{h.name} ({h.drift:+.2f})" for h in self.drift.top_heads(3))

        def rival(*readouts: Readout) -> str:
            if not new or new == self.answer:
                return ""
            shown = " to ".join(f"{readout[new].prob:.3f}" for readout in readouts)
            return f", that of “{new}” {'from ' if len(readouts) > 1 else ''}{shown}"

        request = self.request
        edited = f"The model was edited to answer “{new}” to “{request.text}”. " if request else ""
        if self.prompt in [one.text for one in self.edit.requests]:
            asked = f"Asked what was edited (“{self.prompt}”), for the answer “{self.answer}”"
        elif self.edit.requests:
            asked = f"Nothing was said about “{self.prompt}”, whose answer is “{self.answer}”"
        else:
            asked = f"Asked “{self.prompt}”, whose answer is “{self.answer}”"
        share = result.recovered_share
        most = (
            ""
            if np.isnan(share) or best[1].patched.prob <= after.prob
            else f" Of what was restored in all layers, {best[0]} brings back most: "
            f"{best[1].patched.prob:.3f}."
        )
        lines = [
            f"{edited}{asked}: its probability goes from {before.prob:.3f} to {after.prob:.3f}"
            f"{rival(before, after)}.",
            f"The heads whose attention to the subject grew most: {strongest}.",
            f"With the original attention rows of the last token restored in the edited model, the "
            f"answer's probability is {back.prob:.3f} ({_share_in_words(result)}){rival(back)}."
            f"{most}",
        ]
        if self.cured_readout is not None:
            kept = ""
            if self.edit_success:
                kept = (
                    f", while the edit itself has {self.edit_success[self._cured_name]:.3f} "
                    f"(without it {self.edit_success['edited']:.3f})"
                )
            lines.append(
                f"Edited with {self._cured_name} instead, the answer's probability is "
                f"{self.cured_readout.prob:.3f}{kept}."
            )
        return lines

    @property
    def _fact(self) -> str:
        request = self.request
        if request is None:
            return ""
        return f"{request.text} … {request.target_true or '?'} → {request.target_new}"

    @property
    def _cured_name(self) -> str:
        return restriction(self.cured)

    @property
    def _cured_label(self) -> str:
        return f"edited with {self._cured_name}"

    def _facts(self) -> list[tuple[str, str]]:
        info = self.info
        found = [
            ("Model", f"{info.name} ({info.n_layers} layers × {info.n_heads} heads)"),
            ("Weights", info.weights),
            ("Edit", _in_short(self.edit)),
        ]
        if self.cured is not None:
            strengths = [
                ", ".join(f"{name} {p[name]}" for name in ("gamma", "weight") if name in p)
                for p in self.cured.config.get("penalties", [])
            ]
            found.append((self._cured_name, "; ".join([_in_short(self.cured), *strengths])))
        request = self.request
        if request is not None:
            found.append(("Fact", f"{request.text} → {request.target_new}"))
        found.append(("Prompt", self.prompt))
        fit = heads_that_fit(len(self.drift.prompts[0].labels), 2 + (self.cured is not None))
        if len(self.patterns) == fit < HEADS_STORED:
            kept = f"{fit} head{'s' * (fit > 1)}"
            found.append(("Token-to-token", f"kept for {kept}, as the prompt is long"))
        if self.edit_success:
            told = ", ".join(f"{name} {value:.3f}" for name, value in self.edit_success.items())
            found.append(("P(new target) on the edit prompt", told))
        return found

    def _sweep_shown(self) -> Sweep | None:
        if self.sweep is None:
            return None
        shares = zip(self.sweep.windows, self.sweep.window_shares(), strict=True)
        return Sweep(
            heads=self.sweep.head_shares(),
            layers=self.sweep.layer_shares(),
            windows=[(first, last + 1, float(share)) for (first, last), share in shares],
            caption="Edited model with the original attention rows of the last token restored; "
            f"recovered share of the lost probability of {self.answer!r}.",
        )

    def _restored_shown(self) -> Restored | None:
        sweep = self.sweep
        if sweep is None:
            return None

        def pair(readout: Readout) -> tuple[float, float]:
            return readout.prob, self.target_prob(readout)

        def sets(found: dict[tuple[str, ...], PatchResult]) -> list[HeadSet]:
            return [HeadSet(heads, *pair(result.patched)) for heads, result in found.items()]

        return Restored(
            original=pair(sweep.original),
            edited=pair(sweep.edited),
            everything=pair(sweep.everything),
            heads=np.array([[pair(readout) for readout in row] for row in sweep.heads]),
            layers=np.array([pair(readout) for readout in sweep.layers]),
            windows=[
                (first, last + 1, *pair(readout))
                for (first, last), readout in sweep.windows.items()
            ],
            best=sets(self.best_heads),
            asked=sets(self.head_sets),
        )

    def _head_tables(self) -> list[Table]:
        drifted = Table(
            "Heads whose attention to the subject's last token grew most",
            ["head", "original", "edited", "drift", "KL (nats)"],
            [[h.name, h.original, h.edited, h.drift, h.kl] for h in self.drift.top_heads(12)],
        )
        if self.sweep is None:
            return [drifted]
        alone = Table(
            f"Heads that alone, restored, raise P({self.answer}) most",
            ["head", "change of P(answer)"],
            [[name, change] for name, change in self.sweep.top_heads(12)],
        )
        return [drifted, alone]


def compare(
    model: LensModel,
    edit: Edit,
    prompt: str,
    answer: str,
    *,
    cured: Edit | None = None,
    subject: str | None = None,
    heads: int | None = None,
    sweep: bool = True,
    head_sets: Iterable[Iterable[str | tuple[int, int]]] = (),
    progress: bool = True,
) -> Comparison:
    """Everything about one prompt before and after an edit, to look at.

    Args:
        model: The unedited model.
        edit: What is looked at.
        prompt: A text that holds the edited subject, and whose answer the edit should not have
            changed.
        answer: That answer, e.g. ``"Paris"``.
        cured: The same fact edited with a restriction, e.g. ``penalty=dl.SADR()``.
        subject: By default that of the edit; of an edit of several facts, that of one of them.
        heads: How many heads' token-to-token attention to keep, those that drifted most. By
            default 12, on long prompts as many as 8 million bytes allow.
        sweep: Whether to patch each head, layer and window too, and nested sets of the heads that
            recover most alone (2, 3, 5, 10, 20, 50 and 100).
        head_sets: Further sets of heads to restore, each as ``["L9H6", "L10H2"]`` or
            ``[(9, 6), (10, 2)]``; the reader of the page finds their answers there.
        progress: Whether to show a bar.

    Returns:
        Numbers, a figure, and in a notebook the interactive page.

    Raises:
        RequestError: If an argument does not fit, the subject is unknown, or the answer is empty.
        TokenError: If the subject is not in the prompt.
        EditError: If an edit is not one of this model.

    The experiment is that of section 3 of the paper "Revealing and Mitigating Over-Attention in
    Knowledge Editing" (ICLR 2025), on one prompt.
    """
    started = time.monotonic()
    if heads is not None and heads < 1:
        raise RequestError(f"heads is {heads}.", "Keep at least one head's attention.")
    wanted = [
        tuple(head_name(*place) for place in resolve_heads(model, None, names))
        for names in head_sets
    ]
    if wanted and not sweep:
        raise RequestError("head_sets is given with sweep=False.", "Leave sweep on.")
    subject = subjects_of(edit, subject, 1)[0]
    request = edit.request_about(subject)
    new = request.target_new if request is not None else ""

    drift = measure_drift(model, edit, prompt, subject=subject)
    cured_drift = None
    if cured is not None:
        label = f"edited with {restriction(cured)}"
        cured_drift = measure_drift(model, cured, prompt, subject=subject, label=label)

    experiment = PatchExperiment(model, edit, prompt, subject, answer)
    restored = {
        "attention pattern": experiment.attention(),
        "attention pattern of all tokens": experiment.attention(queries="all"),
        "attention values": experiment.attention(exchange="values"),
        "attention pattern and values": experiment.attention(exchange="both"),
        "MLP output": experiment.activation("mlp_out"),
    }
    found = experiment.sweep(progress=progress) if sweep else None
    nested = [] if found is None else _nested_best(model.info, found)
    results = experiment.attention_each([*nested, *wanted]) if nested or wanted else []
    best_heads = dict(zip(nested, results, strict=False))
    asked = dict(zip(wanted, results[len(nested) :], strict=True))

    cured_readout = None
    if cured is not None:
        texts = [answer, new] if new else [answer]
        with cured.applied(model):
            cured_readout = Readout(answer, score_details(model, prompt, texts))

    conditions = {"original": None, "edited": edit}
    if cured is not None:
        conditions["cured"] = cured
    n_stored = heads or heads_that_fit(len(drift.prompts[0].labels), len(conditions))
    stored = [(h.layer, h.head) for h in drift.top_heads(n_stored)]
    by_state = {
        state: attention_patterns(model, prompt, stored, condition)
        for state, condition in conditions.items()
    }
    return Comparison(
        info=model.info,
        identity=model.identity(),
        edit=edit,
        cured=cured,
        prompt=prompt,
        answer=answer,
        target_new=new,
        drift=drift,
        cured_drift=cured_drift,
        restored=restored,
        sweep=found,
        best_heads=best_heads,
        head_sets=asked,
        cured_readout=cured_readout,
        edit_success=_edit_success(model, request, edit, cured),
        patterns={
            name: {state: by_state[state][name] for state in by_state}
            for name in by_state["original"]
        },
        seconds=time.monotonic() - started,
        request=request,
        subject=subject,
    )


def restriction(edit: Edit | None) -> str:
    """The names of an edit's penalties, e.g. ``"SADR"``; ``"second edit"`` if it has none."""
    return "second edit" if edit is None else edit.restriction or "second edit"


def _in_short(edit: Edit) -> str:
    """An edit's method, and where and how long it searched."""
    place = edit.config.get("layer", edit.config.get("layers"))
    layers = "" if place is None else f", layer{'s' * isinstance(place, list)} {place}"
    steps = f", {edit.config['steps']} steps" if "steps" in edit.config else ""
    return f"{edit.method}{layers}{steps}"


def heads_that_fit(tokens: int, states: int) -> int:
    """How many heads' attention a page holds by default."""
    size = 4 * states * tokens * (tokens + 1) // 2
    return max(1, min(HEADS_STORED, PATTERN_BUDGET // size))


def _nested_best(info: ModelInfo, sweep: AttentionSweep) -> list[tuple[str, ...]]:
    """The heads that recover most alone, first few, then more, but not all."""
    sizes = [k for k in BEST_HEADS if k < info.n_layers * info.n_heads]
    ranked = [name for name, _ in sweep.top_heads(max(sizes, default=0))]
    return [tuple(ranked[:k]) for k in sizes]


def _edit_success(
    model: LensModel, request: EditRequest | None, edit: Edit, cured: Edit | None
) -> dict[str, float]:
    """Probability of the new target on the edit prompt, by state."""
    if request is None:
        return {}

    def asked() -> float:
        return score_details(model, request.text, [request.target_new])[request.target_new].prob

    found = {"original": asked()}
    with edit.applied(model):
        found["edited"] = asked()
    if cured is not None:
        with cured.applied(model):
            found[restriction(cured)] = asked()
    return found


def _share_in_words(result: PatchResult) -> str:
    share = result.recovered_share
    return "nothing was lost" if np.isnan(share) else f"{share:.0%} of what was lost"
