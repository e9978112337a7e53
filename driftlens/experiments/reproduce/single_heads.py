"""Single heads: what the original attention of each brings back, and where they drift."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from driftlens import figures
from driftlens.attention import head_name
from driftlens.cases import Probe
from driftlens.drift import measure_drift
from driftlens.edits import Edit
from driftlens.experiments.reproduce.finding import Finding, Study
from driftlens.experiments.reproduce.measuring import (
    EXCHANGES,
    baselines,
    case_draws,
    interval_of,
    measured,
)
from driftlens.intervals import ends, with_interval
from driftlens.models import LensModel
from driftlens.patching import PatchExperiment

TOLD = 5
"""How many heads are named."""


def heads(study: Study) -> Finding:
    """Patching head by head: the edited model with the original's attention of one head at the last
    token, its pattern, its values, or both; and each head's drift to the subject. Of each case, the
    first prompt of each kind."""
    info = study.model.info
    every = [[(y, x)] for y in range(info.n_layers) for x in range(info.n_heads)]
    exchanges = EXCHANGES[:1] if study.quick else EXCHANGES

    def by_head(values: Sequence[float]) -> list[list[float]]:
        return np.reshape(values, (info.n_layers, info.n_heads)).tolist()

    def measure(model: LensModel, made: Edit, probe: Probe) -> dict[str, Any]:
        experiment = PatchExperiment(model, made, probe.prompt, answer=probe.right)
        edited = experiment.edited.prob
        found: dict[str, Any] = {
            exchange: by_head(
                [
                    one.patched.prob - edited
                    for one in experiment.attention_each(every, exchange=exchange)
                ]
            )
            for exchange in exchanges
        }
        drift = measure_drift(model, made, probe.prompt).difference[0]
        return baselines(experiment, made) | {"heads": found | {"drift": drift.tolist()}}

    # Each head is a pass of its own, so that a quick look takes two cases.
    asked = replace(study, cases=study.cases[:2]) if study.quick else study
    prompts, failed, seconds = measured(asked, "heads", measure, per_kind=1)
    kinds = {
        kind: [p for p in prompts if p["kind"] == kind]
        for kind in dict.fromkeys(p["kind"] for p in prompts)
    }
    rows = pd.DataFrame([row for kind, own in kinds.items() for row in _rows(kind, own)])
    points = [point for kind, own in kinds.items() for point in _told(kind, own, rows, study.seed)]
    shown = {
        f"{kind}: {exchange}": 100 * _grid(own, exchange).mean(0)
        for kind, own in kinds.items()
        for exchange in exchanges[:2]  # both is about their sum
    }
    text = (
        "What the original attention of one head at the last token brings back in the edited "
        "model, in points of P(answer), in the mean over the first prompt of each kind and case. "
        "The heads that are named were chosen on the same prompts."
    )
    title = "One head's original attention restored"
    figure = figures.head_maps(
        shown, title=title, signed=list(shown), signed_unit="change of P(answer), points"
    )
    paper = (
        "Heads in the middle and upper layers attend far more to the subject's last token after an "
        "edit (section 3)."
    )
    return Finding(
        "heads", title, rows, figure, text, paper, points, study.editors, failed, seconds=seconds,
        cases=asked.cases,
    )  # fmt: skip


def _grid(prompts: Sequence[dict[str, Any]], what: str) -> np.ndarray:
    """``[prompt, layer, head]``"""
    return np.array([p["heads"][what] for p in prompts])


def _rows(kind: str, prompts: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each head, the mean of what it brings back and of its drift, with intervals, beside what
    P(answer) lost."""
    cases = [p["case"] for p in prompts]
    lost = np.array([p["original"]["answer"] - p["edited"]["answer"] for p in prompts])
    low, high = interval_of(cases, lost)
    common = {"lost P(answer)": float(lost.mean()), "lost low": low, "lost high": high}
    common |= {"prompts": len(prompts)}
    grids = {what: _grid(prompts, what) for what in prompts[0]["heads"]}
    _, n_layers, n_heads = grids["drift"].shape
    for layer in range(n_layers):
        for head in range(n_heads):
            row: dict[str, Any] = {"kind": kind, "layer": layer, "head": head}
            for what, grid in grids.items():
                own = grid[:, layer, head]
                row[what] = float(own.mean())
                row[f"{what} low"], row[f"{what} high"] = interval_of(cases, own)
            yield row | common


def _told(
    kind: str, prompts: Sequence[dict[str, Any]], rows: pd.DataFrame, seed: int
) -> Iterator[str]:
    """The heads that bring back most, and whether those that drift do."""
    own = rows[rows["kind"] == kind]
    names = ("lost P(answer)", "lost low", "lost high")
    lost = with_interval(*(100 * own.iloc[0][name] for name in names), digits=2)
    yield f"{kind}: P(answer) lost {lost} points."
    exchanges = [what for what in prompts[0]["heads"] if what != "drift"]
    for exchange in exchanges:
        best = own.nlargest(TOLD, exchange).to_dict("records")
        named = ", ".join(f"{_name(row)} {_points(row, exchange)}" for row in best)
        yield f"{kind}, {exchange}: {named}."
        if found := _chosen_on_others(prompts, exchange):
            yield f"{kind}, {exchange}, chosen on half of the cases, on the others: {found}."
    cases, drift = [p["case"] for p in prompts], _grid(prompts, "drift")
    if not np.any(drift):
        yield f"{kind}: no head drifts."
        return
    most = own.nlargest(TOLD, "drift").to_dict("records")
    named = ", ".join(
        f"{_name(row)} "
        + with_interval(row["drift"], row["drift low"], row["drift high"], digits=3, sign="+")
        for row in most
    )
    yield f"{kind}, drift to the subject: {named}."
    for name, by_rank in (("Pearson", False), ("Spearman", True)):
        told = [
            f"{exchange} {with_interval(*found, digits=2)}"
            for exchange in exchanges
            for found in (_correlation(cases, drift, _grid(prompts, exchange), seed, by_rank),)
        ]
        yield (
            f"{kind}: over heads, mean drift goes with what is brought back at ({name}) "
            f"{', '.join(told)}."
        )


def _chosen_on_others(prompts: Sequence[dict[str, Any]], what: str) -> str:
    """The heads that bring back most on every second case, and what they bring back on the rest;
    nothing of one case."""
    names = list(dict.fromkeys(p["case"] for p in prompts))
    if len(names) < 2:
        return ""
    choosing = set(names[::2])
    chosen = _grid([p for p in prompts if p["case"] in choosing], what).mean(0)
    rest = [p for p in prompts if p["case"] not in choosing]
    cases, asked = [p["case"] for p in rest], _grid(rest, what)
    told = []
    for place in np.argsort(-chosen, axis=None, kind="stable")[:TOLD]:
        layer, head = np.unravel_index(place, chosen.shape)
        own = 100 * asked[:, layer, head]
        found = with_interval(float(own.mean()), *interval_of(cases, own), digits=2, sign="+")
        told.append(f"{head_name(int(layer), int(head))} {found}")
    return ", ".join(told)


def _correlation(
    cases: Sequence[str], drift: np.ndarray, gained: np.ndarray, seed: int, by_rank: bool
) -> tuple[float, float, float]:
    """The correlation over heads of two means over prompts, with its interval by bootstrap over
    cases; of heads that the edit can reach, not a number where there is none.

    Means of resampled cases are noisier than those of all, and noise correlates with nothing: the
    interval lies lower than the value, and need not hold it.

    Args:
        cases: Of each prompt.
        drift: ``[prompt, layer, head]``
        gained: The same.
        seed: Of the bootstrap.
        by_rank: Spearman's, which asks all heads alike, instead of Pearson's, which is that of the
            few heads that stand out.
    """
    reached = np.abs(drift).max(0) > 0
    if not reached.any():
        return (float("nan"),) * 3
    weights = case_draws(cases, seed, 2000)
    of_weights = weights / weights.sum(-1, keepdims=True)
    means = [of_weights @ values[:, reached] for values in (drift, gained)]
    if by_rank:
        means = [pd.DataFrame(mean).rank(axis=1).to_numpy() for mean in means]
    x, y = (mean - mean.mean(-1, keepdims=True) for mean in means)
    spread = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    found = np.divide((x * y).sum(-1), spread, out=np.full(len(x), np.nan), where=spread > 0)
    drawn = found[1:][np.isfinite(found[1:])]
    if not len(drawn):
        return (float("nan"),) * 3
    return (float(found[0]), *ends(drawn, len(set(cases))))


def _name(row: dict[Any, Any]) -> str:
    return head_name(int(row["layer"]), int(row["head"]))


def _points(row: dict[Any, Any], what: str) -> str:
    found = (100 * row[name] for name in (what, f"{what} low", f"{what} high"))
    return with_interval(*found, digits=2, sign="+")
