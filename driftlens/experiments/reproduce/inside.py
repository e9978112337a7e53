"""Experiments that look inside: substitution, correlation with drift, patching.

For each case one edit is made, ROME's unless the study names another editor, and everything is
measured on prompts that the edit should leave alone and that hold its subject: relations, and
neighbours behind the edited sentence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from tqdm.auto import tqdm

from driftlens import figures
from driftlens.attention import head_name
from driftlens.bench.units import COVARIANCE
from driftlens.cases import Case, Metric, Probe
from driftlens.drift import measure_drift
from driftlens.editing.methods import resolve_config
from driftlens.edits import Edit
from driftlens.errors import DriftLensError, RequestError
from driftlens.experiments.reproduce.finding import Failure, Finding, Study
from driftlens.intervals import bootstrap_interval, with_interval
from driftlens.journal import Journal, total
from driftlens.models import LensModel
from driftlens.patching import Component, Exchange, PatchExperiment, PatchResult, Readout

KINDS: dict[Metric, str] = {"RS": "relation", "DNS": "distract neighbourhood"}
COMPONENTS: tuple[Component, ...] = ("attn_out", "mlp_out", "resid")
EXCHANGES: tuple[Exchange, ...] = ("pattern", "values", "both")
DRIFTS = {
    "max head": "change of the largest head's attention to the subject",
    "mean head": "change of the mean head's attention to the subject",
    "row KL": "KL between the rows, mean over heads",
}
PER_KIND = 3
"""Prompts of each kind that are taken of a case."""

Pair = dict[str, float]
Measure = Callable[[LensModel, Edit, Probe, bool], dict[str, Any]]
"""What is measured on a prompt; the last argument tells the first one of its kind and case."""


def fig3(study: Study) -> Finding:
    """Contaminating substitution: the original model with what one kind of component of the
    edited one writes at the last token, in windows of layers."""
    windows = _windows(study.model.info.n_layers, study.quick)

    def measure(model: LensModel, made: Edit, probe: Probe, is_first: bool) -> dict[str, Any]:
        experiment = PatchExperiment(
            model, made, probe.prompt, answer=probe.right, direction="contaminate"
        )
        return _baselines(experiment, made) | {
            "patched": {
                component: _by_span(windows, experiment.activation_each(component, windows), made)
                for component in COMPONENTS
            }
        }

    prompts, failed, seconds = _measured(study, "fig3", measure)
    rows = _window_rows(_with_lengths(study, prompts), COMPONENTS, from_state="original")
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
        "fig3", title, rows, figure, text, paper, points, _editor(study), failed, seconds=seconds
    )


def fig4(study: Study) -> Finding:
    """Correlation of drift with damage, prompt by prompt (table 2 and figure 4)."""

    def measure(model: LensModel, made: Edit, probe: Probe, is_first: bool) -> dict[str, Any]:
        experiment = PatchExperiment(model, made, probe.prompt, answer=probe.right)
        drift = measure_drift(model, made, probe.prompt)
        return _baselines(experiment, made) | {
            "drift": {
                "max head": float(drift.max_head.mean()),
                "mean head": float(drift.mean_head.mean()),
                "row KL": float(drift.kl.mean()),
            }
        }

    prompts, failed, seconds = _measured(study, "fig4", measure)
    rows = pd.DataFrame(_correlations(prompts, study.seed))
    points = [
        f"{kind}, {damage}: {_told_correlations(own)}."
        for (kind, damage), own in rows.groupby(["kind", "damage"], sort=False)
    ]
    text = (
        "Drift of the last token, averaged over layers, against damage, Pearson's correlation, "
        "prompt by prompt."
    )
    paper = (
        "The largest head correlates best: Pearson 0.49 on distract neighbourhood, 0.62 on "
        "relation (table 2)."
    )
    title = "Attention drift against damage, prompt by prompt"
    figure = _scatter(prompts, title, study.seed)
    return Finding(
        "fig4", title, rows, figure, text, paper, points, _editor(study), failed, seconds=seconds
    )


def fig5(study: Study) -> Finding:
    """Patching the drift: the edited model with the original's attention at the last token, in
    windows of layers and, on the first prompt of each kind and case, per head; patterns, values, or
    both."""
    info = study.model.info
    layers, heads = range(info.n_layers), range(info.n_heads)
    windows = _windows(info.n_layers, study.quick)
    sets = [[(y, x) for y in window for x in heads] for window in (*windows, layers)]

    def measure(model: LensModel, made: Edit, probe: Probe, is_first: bool) -> dict[str, Any]:
        experiment = PatchExperiment(model, made, probe.prompt, answer=probe.right)
        patched = {}
        for exchange in EXCHANGES:
            *windowed, everything = experiment.attention_each(sets, exchange=exchange)
            patched[exchange] = _by_span(windows, windowed, made)
            patched[exchange]["all"] = _pair(everything.patched, made)
        found: dict[str, Any] = {**_baselines(experiment, made), "patched": patched}
        if is_first and not study.quick:
            alone = experiment.attention_each([[(y, x)] for y in layers for x in heads])
            probs = np.array([one.patched.prob for one in alone])
            found["heads"] = probs.reshape(info.n_layers, info.n_heads).tolist()
        return found

    prompts, failed, seconds = _measured(study, "fig5", measure)
    rows = _window_rows(_with_lengths(study, prompts), EXCHANGES, from_state="edited")
    points = [_told_of_restoring(own) for _, own in rows.groupby("kind", sort=False)]
    points += _best_heads(prompts)
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
        "fig5", title, rows, figure, text, paper, points, _editor(study), failed, seconds=seconds
    )


# --- measuring ---


def _measured(
    study: Study, name: str, measure: Measure
) -> tuple[list[dict[str, Any]], list[Failure], float | None]:
    """A record for each prompt, the cases that failed, and the seconds that all took, if that was
    kept; each finished case is kept at once.

    Raises:
        RequestError: If no case has a prompt of these kinds, or each one failed.
    """
    journal = Journal(study.out / f"{name}.prompts.jsonl")
    units = _units(study)
    bar = tqdm(study.cases, desc=name, unit="case", disable=not study.progress)
    for unit, case in zip(units, bar, strict=True):
        if not journal.is_finished(unit, study.retry_failed):
            started = time.monotonic()
            try:
                found: dict[str, Any] = {"prompts": list(_of_case(study, case, measure))}
            except DriftLensError as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            journal.add(unit, **found, seconds=time.monotonic() - started)
    records = [journal[unit] for unit in units]
    prompts = [prompt for record in records for prompt in record.get("prompts", ())]
    failed = [
        (study.method, case.id, record["error"])
        for case, record in zip(study.cases, records, strict=True)
        if "error" in record
    ]
    if not prompts:
        if failed:
            raise RequestError(
                f"{len(failed)} of {len(records)} cases failed, the first, {failed[0][1]}: "
                f"{failed[0][2]}",
                "Give other cases; the others have no relation and no neighbour.",
            )
        raise RequestError(
            f"None of the {len(study.cases)} cases has a relation, or a neighbour.",
            "Give other cases, or more of them.",
        )
    return prompts, failed, total(records, "seconds")


def _editor(study: Study) -> list[dict[str, Any]]:
    """The editor, for the record."""
    return [{"name": arm.name, **arm.to_dict()} for arm in study.arms((study.method,))[1:]]


def _units(study: Study) -> list[dict[str, Any]]:
    """What determines the record of each case."""
    common = {
        **study.model.identity(),
        "covariance": COVARIANCE,
        "method": study.method,
        "config": asdict(resolve_config(study.model, study.method)),
        "seed": study.seed,
        "quick": study.quick,
        "per_kind": PER_KIND,
    }
    return [{**common, "case": case.to_record()} for case in study.cases]


def _of_case(study: Study, case: Case, measure: Measure) -> Iterator[dict[str, Any]]:
    for metric, kind in KINDS.items():
        about = [p for p in case.probes((metric,)) if case.request.subject in p.prompt]
        for probe in about[:PER_KIND]:
            measured = measure(study.model, study.edit(case), probe, probe is about[0])
            yield {"case": case.id, "kind": kind, "prompt": probe.prompt, **measured}


def _baselines(experiment: PatchExperiment, made: Edit) -> dict[str, Pair]:
    return {
        "original": _pair(experiment.original, made),
        "edited": _pair(experiment.edited, made),
    }


def _pair(readout: Readout, made: Edit) -> Pair:
    return {"answer": readout.prob, "new": readout[made.requests[0].target_new].prob}


def _windows(n_layers: int, quick: bool) -> list[list[int]]:
    """Windows of a fifth of the layers, as wide as the paper's; each half of one further up."""
    width = max(1, round(n_layers / 5))
    step = width if quick else max(1, width // 2)
    last = n_layers - width  # whatever the step, the uppermost layers are in a window, too
    return [list(range(y, y + width)) for y in sorted({*range(0, last, step), last})]


def _by_span(
    windows: Sequence[Sequence[int]], found: Sequence[PatchResult], made: Edit
) -> dict[str, Pair]:
    return {_span(w): _pair(one.patched, made) for w, one in zip(windows, found, strict=True)}


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
        lost_low, lost_high = _interval(cases, lost)
        before = {name: np.array([p[from_state][name] for p in own]) for name in ("answer", "new")}
        ahead = {
            state: [_is_ahead(p[state], p["tokens"]) for p in own]
            for state in ("original", "edited")
        }
        for what in kinds:
            for span in own[0]["patched"][what]:
                found = [p["patched"][what][span] for p in own]
                answer = np.array([one["answer"] for one in found]) - before["answer"]
                new = np.array([one["new"] for one in found]) - before["new"]
                is_ahead = np.array(
                    [_is_ahead(one, p["tokens"]) for one, p in zip(found, own, strict=True)]
                )
                low, high = _interval(cases, answer)
                new_low, new_high = _interval(cases, new)
                ahead_low, ahead_high = _interval(cases, is_ahead)
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
                    "answer likelier, %": float(is_ahead.mean()),
                    "likelier low": ahead_low,
                    "likelier high": ahead_high,
                    "likelier original, %": float(np.mean(ahead["original"])),
                    "likelier edited, %": float(np.mean(ahead["edited"])),
                    "lost P(answer)": float(lost.mean()),
                    "lost low": lost_low,
                    "lost high": lost_high,
                }
                if from_state == "edited":
                    row |= _share(cases, answer, lost)
                rows.append(row)
    return pd.DataFrame(rows)


def _with_lengths(study: Study, prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The prompts with the numbers of tokens of the answer and of the new target."""

    def count(text: str) -> int:
        return len(study.model.tokens.target_ids(text))

    found = {
        (case.id, probe.prompt): {
            "answer": count(probe.right), "new": count(case.request.target_new)
        }
        for case in study.cases
        for probe in case.probes(tuple(KINDS))
    }  # fmt: skip
    return [{**p, "tokens": found[p["case"], p["prompt"]]} for p in prompts]


def _is_ahead(pair: Pair, tokens: Mapping[str, int]) -> float:
    """100 if the answer is likelier than the new target per token, as RS and DNS ask, else 0."""
    least = np.finfo(float).tiny
    answer, new = (math.log(max(pair[of], least)) / tokens[of] for of in ("answer", "new"))
    return 100.0 * (answer > new)


def _interval(cases: Sequence[str], values: np.ndarray) -> tuple[float, float]:
    sums, counts = _by_case(cases, values)
    return bootstrap_interval(sums, counts)


def _by_case(cases: Sequence[str], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each case, the sum over its prompts and their number."""
    frame = pd.DataFrame({"case": list(cases), "value": values})
    grouped = frame.groupby("case", sort=False)["value"]
    return grouped.sum().to_numpy(), grouped.count().to_numpy(dtype=float)


def _share(cases: Sequence[str], gains: np.ndarray, lost: np.ndarray) -> dict[str, float]:
    """What is brought back, in per cent of what was lost, with a 95 % interval by bootstrap over
    cases; not a number unless something was surely lost."""
    if not _interval(cases, lost)[0] > 0:
        return dict.fromkeys(("share, %", "share low", "share high"), float("nan"))
    # A mean over prompts of which each counts as much as it lost.
    low, high = bootstrap_interval(_by_case(cases, gains)[0], _by_case(cases, lost)[0])
    return {
        "share, %": 100 * float(gains.sum() / lost.sum()),
        "share low": 100 * low,
        "share high": 100 * high,
    }


def _correlations(prompts: Sequence[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Of each measure of drift with each damage, and how much less than the largest head's."""
    for kind in dict.fromkeys(p["kind"] for p in prompts):
        own = [p for p in prompts if p["kind"] == kind]
        weights = _draws([p["case"] for p in own], seed, 2000)
        for damage, y in _damages(own).items():
            drawn = {
                drift: _correlation(np.array([p["drift"][drift] for p in own]), y, weights)
                for drift in DRIFTS
            }
            for drift, found in drawn.items():
                less = found["pearson"] - drawn["max head"]["pearson"]
                yield {
                    "kind": kind,
                    "damage": damage,
                    "drift": drift,
                    "prompts": len(own),
                    **_with_interval("pearson", found["pearson"]),
                    **_with_interval("spearman", found["spearman"]),
                    **_with_interval("less_max_head", less),
                }


def _damages(prompts: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    fall = [p["original"]["answer"] - p["edited"]["answer"] for p in prompts]
    rise = [p["edited"]["new"] - p["original"]["new"] for p in prompts]
    return {"fall of P(answer)": np.array(fall), "rise of P(new target)": np.array(rise)}


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Pearson and Spearman, over all prompts and in each draw."""
    ranks = _ranks(x, weights), _ranks(y, weights)
    return {"pearson": _pearson(x, y, weights), "spearman": _pearson(*ranks, weights)}


def _with_interval(name: str, values: np.ndarray) -> dict[str, float]:
    """The first value, and a 95 % interval of the others; without a number where one of the two
    that are correlated does not vary, or there is one case only."""
    drawn = values[1:][np.isfinite(values[1:])]
    varies = len(drawn) > 0 and (np.ptp(drawn) > 1e-9 or name == "less_max_head")
    low, high = np.quantile(drawn, [0.025, 0.975]) if varies else (float("nan"),) * 2
    return {name: float(values[0]), f"{name}_low": float(low), f"{name}_high": float(high)}


def _told_correlations(rows: pd.DataFrame) -> str:
    """The largest head's first, as in the paper; the others' beside it."""
    parts = []
    for row in rows.to_dict("records"):
        if not np.isfinite(row["pearson"]):
            continue
        part = f"{row['drift']} {_correlated(row, 'pearson')}"
        if row["drift"] != "max head" and np.isfinite(row["less_max_head"]):
            part += f" ({_correlated(row, 'less_max_head', '+')} less max head)"
        parts.append(part)
    return ", ".join(parts) or "no correlation can be told"


def _correlated(row: Mapping[Any, Any], name: str, sign: Literal["", "+"] = "") -> str:
    """A correlation with its interval, or a difference of two."""
    return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], digits=2, sign=sign)


def _draws(cases: Sequence[str], seed: int, draws: int) -> np.ndarray:
    """How often each prompt counts, ``[1 + draw, prompt]``: first once, then, in each draw of the
    bootstrap, as often as its case."""
    names = list(dict.fromkeys(cases))
    of_prompt = np.array([names.index(case) for case in cases])
    chosen = np.random.default_rng(seed).integers(0, len(names), (draws, len(names)))
    times = np.stack([np.bincount(row, minlength=len(names)) for row in chosen]).astype(float)
    return np.concatenate([np.ones((1, len(cases))), times[:, of_prompt]])


def _line(
    x: np.ndarray, y: np.ndarray, cases: Sequence[str], seed: int, draws: int = 2000
) -> pd.DataFrame:
    """The least-squares line at 50 places, columns ``x``, ``y`` and its 95 % interval ``low``,
    ``high`` by bootstrap over cases; no rows where ``x`` does not vary."""
    weights = _draws(cases, seed, draws)
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


def _best_heads(prompts: Sequence[dict[str, Any]], k: int = 5) -> list[str]:
    """Which heads bring back most, for each kind of prompts, in points; asked of the first prompt
    of each case."""
    firsts = list({(p["kind"], p["case"]): p for p in reversed(prompts)}.values())[::-1]
    told = []
    for kind in dict.fromkeys(p["kind"] for p in firsts if "heads" in p):
        own = [p for p in firsts if p["kind"] == kind]
        gains = np.mean([np.array(p["heads"]) - p["edited"]["answer"] for p in own], axis=0)
        best = np.argsort(-gains, axis=None, kind="stable")[:k]
        places = zip(*np.unravel_index(best, gains.shape), strict=True)
        heads = ", ".join(
            f"{head_name(int(y), int(x))} {100 * gains[y, x]:+.2f}" for y, x in places
        )
        told.append(f"{kind}: single heads that bring back most, in points: {heads}.")
    return told


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
