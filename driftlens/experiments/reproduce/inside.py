"""Experiments that look inside: substitution, correlation with drift, patching.

For each case one edit is made, ROME's unless the study names another editor, and everything is
measured on prompts that the edit should leave alone and that hold its subject: relations, and
neighbours behind the edited sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from driftlens import figures
from driftlens.cases import Probe
from driftlens.edits import Edit
from driftlens.experiments.reproduce.finding import Finding, Study
from driftlens.experiments.reproduce.measuring import (
    DRIFTS,
    EXCHANGES,
    Pair,
    baselines,
    case_draws,
    drifts,
    interval_of,
    is_ahead,
    measured,
    pair,
    share_of,
    with_lengths,
)
from driftlens.intervals import ends, with_interval
from driftlens.models import LensModel
from driftlens.patch_results import PatchResult
from driftlens.patching import Component, PatchExperiment

COMPONENTS: tuple[Component, ...] = ("attn_out", "mlp_out", "resid")


def fig3(study: Study) -> Finding:
    """Contaminating substitution: the original model with what one kind of component of the
    edited one writes at the last token, in windows of layers."""
    windows = _windows(study.model.info.n_layers, study.quick)

    def measure(model: LensModel, made: Edit, probe: Probe) -> dict[str, Any]:
        experiment = PatchExperiment(
            model, made, probe.prompt, answer=probe.right, direction="contaminate"
        )
        return baselines(experiment, made) | {
            "patched": {
                component: _by_span(windows, experiment.activation_each(component, windows), made)
                for component in COMPONENTS
            }
        }

    prompts, failed, seconds = measured(study, "fig3", measure)
    rows = _window_rows(with_lengths(study, prompts), COMPONENTS, from_state="original")
    worst = rows.loc[rows.groupby(["kind", "patched"], sort=False)["change of P(answer)"].idxmin()]
    points = [
        f"{row['kind']}, {row['patched']}: P(answer) {_points(row)}, P(new target) "
        f"{_points(row, 'P(new target)')} in layers {row['layers']}."
        for row in worst.to_dict("records")
    ]
    text = (
        f"Into the original model, of all windows of {len(windows[0])} layers the one with the "
        "lowest P(answer), chosen on the same prompts; changes in points."
    )
    title = "Contaminating substitution, by component and window"
    paper = (
        "GPT-J, windows of 6 layers: attention output costs 3.74 points of P(answer), MLP output "
        "4.59, the residual stream 5.26 (figure 3)."
    )
    figure = figures.window_lines(rows, "change of P(answer)", title=title)
    return Finding(
        "fig3", title, rows, figure, text, paper, points, study.editors, failed, seconds=seconds
    )


def fig4(study: Study) -> Finding:
    """Correlation of drift with damage, prompt by prompt (table 2 and figure 4)."""
    prompts, failed, seconds = drifts(study)
    rows = pd.DataFrame(_correlations(prompts, study.seed))
    points = [
        f"{kind}: the largest head's attention to the subject changes by {_drift_level(own)}."
        for kind, own in rows.groupby("kind", sort=False)
    ]
    points += [
        f"{kind}, {damage}: {_told_correlations(own)}."
        for (kind, damage), own in rows.groupby(["kind", "damage"], sort=False)
    ]
    text = (
        "Drift of the last token, averaged over layers, against damage, prompt by prompt: "
        "Pearson's correlation, and by rank Spearman's. Where there is little drift, there is "
        "little to correlate."
    )
    paper = (
        "The largest head correlates best: Pearson 0.49 on distract neighbourhood, 0.62 on "
        "relation (table 2)."
    )
    title = "Attention drift against damage, prompt by prompt"
    figure = _scatter(prompts, title, study.seed)
    return Finding(
        "fig4", title, rows, figure, text, paper, points, study.editors, failed, seconds=seconds
    )


def fig5(study: Study) -> Finding:
    """Patching the drift: the edited model with the original's attention at the last token, in
    windows of layers; patterns, values, or both."""
    info = study.model.info
    layers, heads = range(info.n_layers), range(info.n_heads)
    windows = _windows(info.n_layers, study.quick)
    sets = [[(y, x) for y in window for x in heads] for window in (*windows, layers)]

    def measure(model: LensModel, made: Edit, probe: Probe) -> dict[str, Any]:
        experiment = PatchExperiment(model, made, probe.prompt, answer=probe.right)
        patched = {}
        for exchange in EXCHANGES:
            *windowed, everything = experiment.attention_each(sets, exchange=exchange)
            patched[exchange] = _by_span(windows, windowed, made)
            patched[exchange]["all"] = pair(everything.patched, made)
        return baselines(experiment, made) | {"patched": patched}

    prompts, failed, seconds = measured(study, "fig5", measure)
    rows = _window_rows(with_lengths(study, prompts), EXCHANGES, from_state="edited")
    points = [_told_of_restoring(own) for _, own in rows.groupby("kind", sort=False)]
    title = "Original attention restored in the edited model"
    paper = (
        "P(answer) rises by 28.6 % to 739 % relative with original attention rows in windows of "
        "10 layers (figure 5)."
    )
    text = (
        "What the original attention at the last token brings back, in per cent of what P(answer) "
        "lost where that is sure to be something, else in points."
    )
    figure = figures.window_lines(rows, "change of P(answer)", title=title)
    return Finding(
        "fig5", title, rows, figure, text, paper, points, study.editors, failed, seconds=seconds
    )


# --- parts ---


def _windows(n_layers: int, quick: bool) -> list[list[int]]:
    """Windows of a fifth of the layers, each half of one further up; as wide as those of figure 3
    in the paper (6 of 28 layers; its figure 5 has 10)."""
    width = max(1, round(n_layers / 5))
    step = width if quick else max(1, width // 2)
    last = n_layers - width  # whatever the step, the uppermost layers are in a window, too
    return [list(range(y, y + width)) for y in sorted({*range(0, last, step), last})]


def _by_span(
    windows: Sequence[Sequence[int]], found: Sequence[PatchResult], made: Edit
) -> dict[str, Pair]:
    return {_span(w): pair(one.patched, made) for w, one in zip(windows, found, strict=True)}


def _span(window: Sequence[int]) -> str:
    return f"{window[0]}-{window[-1]}"


# --- telling ---


def _window_rows(
    prompts: Sequence[dict[str, Any]], kinds: Sequence[str], from_state: str
) -> pd.DataFrame:
    """Mean changes of P(answer) and P(new target), and how often the answer is the likelier of
    the two per token, with intervals by bootstrap over cases; of a restored model also the share
    of what P(answer) lost."""
    rows = []
    for kind in dict.fromkeys(p["kind"] for p in prompts):
        own = [p for p in prompts if p["kind"] == kind]
        cases = [p["case"] for p in own]
        lost = np.array([p["original"]["answer"] - p["edited"]["answer"] for p in own])
        lost_low, lost_high = interval_of(cases, lost)
        before = {name: np.array([p[from_state][name] for p in own]) for name in ("answer", "new")}
        ahead = {
            state: [is_ahead(p[state], p["tokens"]) for p in own]
            for state in ("original", "edited")
        }
        for what in kinds:
            for span in own[0]["patched"][what]:
                found = [p["patched"][what][span] for p in own]
                answer = np.array([one["answer"] for one in found]) - before["answer"]
                new = np.array([one["new"] for one in found]) - before["new"]
                likelier = np.array(
                    [is_ahead(one, p["tokens"]) for one, p in zip(found, own, strict=True)]
                )
                low, high = interval_of(cases, answer)
                new_low, new_high = interval_of(cases, new)
                ahead_low, ahead_high = interval_of(cases, likelier)
                row = {
                    "kind": kind,
                    "patched": what,
                    "layers": span,
                    "prompts": len(own),
                    "P(answer) unpatched": float(before["answer"].mean()),
                    "change of P(answer)": float(answer.mean()),
                    "low": low,
                    "high": high,
                    "change of P(new target)": float(new.mean()),
                    "new low": new_low,
                    "new high": new_high,
                    "answer likelier, %": float(likelier.mean()),
                    "likelier low": ahead_low,
                    "likelier high": ahead_high,
                    "likelier original, %": float(np.mean(ahead["original"])),
                    "likelier edited, %": float(np.mean(ahead["edited"])),
                    "lost P(answer)": float(lost.mean()),
                    "lost low": lost_low,
                    "lost high": lost_high,
                }
                if from_state == "edited":
                    row |= share_of(cases, answer, lost)
                rows.append(row)
    return pd.DataFrame(rows)


def _correlations(prompts: Sequence[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Of each measure of drift with each damage, and how much less than the largest head's."""
    for kind in dict.fromkeys(p["kind"] for p in prompts):
        own = [p for p in prompts if p["kind"] == kind]
        cases = [p["case"] for p in own]
        weights, n_cases = case_draws(cases, seed, 2000), len(set(cases))
        sizes = {drift: np.array([p["drift"][drift] for p in own]) for drift in DRIFTS}
        means = {drift: (size.mean(), *interval_of(cases, size)) for drift, size in sizes.items()}
        for damage, y in _damages(own).items():
            drawn = {drift: _correlation(size, y, weights) for drift, size in sizes.items()}
            for drift, found in drawn.items():
                mean, low, high = means[drift]
                less = found["pearson"] - drawn["max head"]["pearson"]
                yield {
                    "kind": kind,
                    "damage": damage,
                    "drift": drift,
                    "prompts": len(own),
                    "mean": float(mean),
                    "mean_low": low,
                    "mean_high": high,
                    **_with_interval("pearson", found["pearson"], n_cases),
                    **_with_interval("spearman", found["spearman"], n_cases),
                    **_with_interval("less_max_head", less, n_cases),
                }


def _damages(prompts: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    fall = [p["original"]["answer"] - p["edited"]["answer"] for p in prompts]
    rise = [p["edited"]["new"] - p["original"]["new"] for p in prompts]
    return {"fall of P(answer)": np.array(fall), "rise of P(new target)": np.array(rise)}


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Pearson and Spearman, over all prompts and in each draw."""
    ranks = _ranks(x, weights), _ranks(y, weights)
    return {"pearson": _pearson(x, y, weights), "spearman": _pearson(*ranks, weights)}


def _with_interval(name: str, values: np.ndarray, cases: int) -> dict[str, float]:
    """The first value, and a 95 % interval of the others; without a number where one of the two
    that are correlated does not vary, or there is one case only."""
    drawn = values[1:][np.isfinite(values[1:])]
    varies = len(drawn) > 0 and (np.ptp(drawn) > 1e-9 or name == "less_max_head")
    low, high = ends(drawn, cases) if varies else (float("nan"),) * 2
    return {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}


def _told_correlations(rows: pd.DataFrame) -> str:
    """The largest head's first, as in the paper; the others' beside it. Pearson's, then
    Spearman's."""
    parts = []
    for row in rows.to_dict("records"):
        if not np.isfinite(row["pearson"]):
            continue
        part = f"{row['drift']} {_correlated(row, 'pearson')}"
        if row["drift"] != "max head" and np.isfinite(row["less_max_head"]):
            part += f" ({_correlated(row, 'less_max_head', '+')} less max head)"
        if np.isfinite(row["spearman"]):
            part += f", by rank {_correlated(row, 'spearman')}"
        parts.append(part)
    return "; ".join(parts) or "no correlation can be told"


def _drift_level(rows: pd.DataFrame) -> str:
    """Of the largest head, its mean over prompts."""
    row = rows[rows["drift"] == "max head"].iloc[0]
    return with_interval(row["mean"], row["mean_low"], row["mean_high"], digits=3, sign="+")


def _correlated(row: Mapping[Any, Any], name: str, sign: Literal["", "+"] = "") -> str:
    """A correlation with its interval, or a difference of two."""
    return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], digits=2, sign=sign)


def _line(
    x: np.ndarray, y: np.ndarray, cases: Sequence[str], seed: int, draws: int = 2000
) -> pd.DataFrame:
    """The least-squares line at 50 places, columns ``x``, ``y`` and its 95 % interval ``low``,
    ``high`` by bootstrap over cases; no rows where ``x`` does not vary."""
    weights = case_draws(cases, seed, draws)
    total = weights.sum(-1)
    x_mean, y_mean = (weights @ x) / total, (weights @ y) / total
    spread = (weights @ x**2) / total - x_mean**2
    varies = spread > 1e-12 * max(float(np.abs(x).max()) ** 2, 1e-300)
    if not varies[0]:
        return pd.DataFrame(columns=["x", "y", "low", "high"])
    common = (weights @ (x * y)) / total - x_mean * y_mean
    slope = (common[varies] / spread[varies])[:, None]
    at = np.linspace(x.min(), x.max(), 50)
    lines = y_mean[varies, None] + slope * (at - x_mean[varies, None])
    low, high = np.quantile(lines[1:], [0.025, 0.975], axis=0)
    return pd.DataFrame({"x": at, "y": lines[0], "low": low, "high": high})


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks in each draw, ``[draw, prompt]``; equal values share the mean of theirs."""
    _, group = np.unique(values, return_inverse=True)
    of_group = weights @ np.eye(group.max() + 1)[group]
    ranks = of_group.cumsum(-1) - (of_group - 1) / 2
    return np.asarray(ranks[:, group])


def _pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlation in each draw; not a number where one of the two does not vary."""
    x, y = (v / (np.abs(v).max() or 1.0) for v in (x, y))
    total = weights.sum(-1, keepdims=True)
    x = x - (weights * x).sum(-1, keepdims=True) / total
    y = y - (weights * y).sum(-1, keepdims=True) / total
    spread = np.sqrt((weights * x**2).sum(-1) * (weights * y**2).sum(-1))
    products = (weights * x * y).sum(-1)
    return np.divide(products, spread, out=np.full_like(products, np.nan), where=spread > 1e-12)


def _points(row: Mapping[Any, Any], of: str = "P(answer)") -> str:
    """A change of a probability in points, with its interval."""
    ends = ("low", "high") if of == "P(answer)" else ("new low", "new high")
    return with_interval(
        *(100 * row[name] for name in (f"change of {of}", *ends)), digits=2, sign="+"
    )


def _told_of_restoring(rows: pd.DataFrame) -> str:
    """What restored attention brings back on prompts of one kind."""
    first = rows.iloc[0]
    whole = rows[rows["layers"] == "all"].to_dict("records")
    windowed = rows[(rows["layers"] != "all") & (rows["patched"] == "pattern")]
    best = max(windowed.to_dict("records"), key=lambda row: row["change of P(answer)"])
    lost = with_interval(first["lost P(answer)"], first["lost low"], first["lost high"], digits=3)
    all_layers = ", ".join(f"{_restored(row)} {_brought_back(row)}" for row in whole)
    told = (
        f"{first['kind']}: P(answer) lost {lost}; of that all layers bring back {all_layers}; the "
        f"best window of patterns, layers {best['layers']}, chosen on the same prompts, "
        f"{_brought_back(best)}"
    )
    if best["P(answer) unpatched"] > 0:
        rise = 100 * best["change of P(answer)"] / best["P(answer) unpatched"]
        told += f", a change of P(answer) by {rise:+.1f} % relative"
    patterns = next(row for row in whole if row["patched"] == "pattern")
    return (
        f"{told}; the answer is likelier per token than the new target on "
        f"{patterns['likelier original, %']:.0f} % of the prompts in the original model, on "
        f"{patterns['likelier edited, %']:.0f} % in the edited one, and on "
        f"{patterns['answer likelier, %']:.0f} % with all patterns restored."
    )


def _restored(row: Mapping[Any, Any]) -> str:
    """Both together give the last token all that it reads: a control of the method."""
    return "both (the control)" if row["patched"] == "both" else str(row["patched"])


def _brought_back(row: Mapping[Any, Any]) -> str:
    """In per cent of what was lost if that is sure to be something, else in points."""
    if np.isnan(row["share, %"]):
        return f"{_points(row)} points"
    return with_interval(row["share, %"], row["share low"], row["share high"], digits=0, unit=" %")


def _scatter(prompts: Sequence[dict[str, Any]], title: str, seed: int) -> go.Figure:
    """Drift of the largest head against the fall of P(answer), a point for each prompt."""
    points, lines = [], []
    for kind in dict.fromkeys(p["kind"] for p in prompts):
        own = [p for p in prompts if p["kind"] == kind]
        x, y = np.array([p["drift"]["max head"] for p in own]), _damages(own)["fall of P(answer)"]
        texts = [p["prompt"] for p in own]
        points.append(pd.DataFrame({"kind": kind, "x": x, "y": y, "text": texts}))
        lines.append(_line(x, y, [p["case"] for p in own], seed).assign(kind=kind))
    return figures.fitted_scatter(
        pd.concat(points), pd.concat(lines), DRIFTS["max head"], "fall of P(answer)", title=title
    )
