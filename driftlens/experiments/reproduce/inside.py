"""Experiments that look inside: substitution, correlation with drift, patching.

For each case ROME's edit is made once, and everything is measured on prompts that the edit should
leave alone and that hold its subject: relations, and neighbours behind the edited sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

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
from driftlens.evaluation import bootstrap_interval
from driftlens.experiments.reproduce.finding import Failure, Finding, Study
from driftlens.journal import Journal
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
Measure = Callable[[LensModel, Edit, Probe], dict[str, Any]]


def fig3(study: Study) -> Finding:
    """Contaminating substitution: the original model with what one kind of component of the
    edited one writes at the last token, in windows of layers."""
    windows = _windows(study.model.info.n_layers, study.quick)

    def measure(model: LensModel, made: Edit, probe: Probe) -> dict[str, Any]:
        experiment = PatchExperiment(
            model, made, probe.prompt, answer=probe.right, direction="contaminate"
        )
        return _baselines(experiment, made) | {
            "patched": {
                component: _by_span(windows, experiment.activation_each(component, windows), made)
                for component in COMPONENTS
            }
        }

    prompts, failed = _measured(study, "fig3", measure)
    rows = _window_rows(prompts, COMPONENTS, from_state="original")
    worst = rows.loc[rows.groupby(["kind", "patched"])["change of P(answer)"].idxmin()]
    words = [
        f"{row['kind']}, {row['patched']}: P(answer) {row['change of P(answer)']:+.3f} and P(new "
        f"target) {row['change of P(new target)']:+.3f} in layers {row['layers']}"
        for row in worst.to_dict("records")
    ]
    text = (
        f"Into the original model, the windows of {len(windows[0])} layers that cost most: "
        f"{'; '.join(words)}."
    )
    title = "Contaminating substitution, by component and window"
    paper = (
        "GPT-J, windows of 6 layers: attention output costs 3.74 points of P(answer), MLP output "
        "4.59, the residual stream 5.26 (figure 3)."
    )
    figure = figures.window_lines(rows, "change of P(answer)", title=title)
    return Finding("fig3", title, rows, figure, text, paper, _rome(study), failed)


def fig4(study: Study) -> Finding:
    """Correlation of drift with damage, prompt by prompt (table 2 and figure 4)."""

    def measure(model: LensModel, made: Edit, probe: Probe) -> dict[str, Any]:
        experiment = PatchExperiment(model, made, probe.prompt, answer=probe.right)
        drift = measure_drift(model, made, probe.prompt)
        return _baselines(experiment, made) | {
            "drift": {
                "max head": float(drift.max_head.mean()),
                "mean head": float(drift.mean_head.mean()),
                "row KL": float(drift.kl.mean()),
            }
        }

    prompts, failed = _measured(study, "fig4", measure)
    rows = pd.DataFrame(_correlations(prompts, study.seed))
    known = rows.dropna(subset="pearson")
    strongest = known.loc[known.groupby(["kind", "damage"], sort=False)["pearson"].idxmax()]
    words = [
        f"{row.kind}, {row.damage}: {row.drift}, Pearson {row.pearson:.2f} "
        f"[{row.pearson_low:.2f}, {row.pearson_high:.2f}], Spearman {row.spearman:.2f}"
        for row in strongest.itertuples()
    ]
    text = (
        "Drift of the last token, averaged over layers, against damage; the measure that "
        f"correlates best: {'; '.join(words)}."
    )
    paper = (
        "The largest head correlates best: Pearson 0.49 on distract neighbourhood, 0.62 on "
        "relation (table 2)."
    )
    title = "Attention drift against damage, prompt by prompt"
    return Finding(
        "fig4", title, rows, _scatter(prompts, title, study.seed), text, paper, _rome(study), failed
    )


def fig5(study: Study) -> Finding:
    """Patching the drift: the edited model with the original's attention at the last token, in
    windows of layers and per head; patterns, values, or both."""
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
            patched[exchange]["all"] = _pair(everything.patched, made)
        found: dict[str, Any] = {**_baselines(experiment, made), "patched": patched}
        if not study.quick:
            alone = experiment.attention_each([[(y, x)] for y in layers for x in heads])
            probs = np.array([one.patched.prob for one in alone])
            found["heads"] = probs.reshape(info.n_layers, info.n_heads).tolist()
        return found

    prompts, failed = _measured(study, "fig5", measure)
    rows = _window_rows(prompts, EXCHANGES, from_state="edited")
    words = []
    for kind in dict.fromkeys(rows["kind"]):
        own = rows[rows["kind"] == kind]
        lost, low = (float(own[name].iloc[0]) for name in ("lost P(answer)", "lost low"))
        whole = own[own["layers"] == "all"].set_index("patched")["change of P(answer)"]
        windowed = own[(own["layers"] != "all") & (own["patched"] == "pattern")]
        best = windowed.loc[windowed["change of P(answer)"].idxmax()]
        rise = 100 * best["change of P(answer)"] / best["P(answer) unpatched"]
        shares = ", ".join(f"{what} {_share(gain, lost, low)}" for what, gain in whole.items())
        words.append(
            f"{kind}: of {lost:.3f} that P(answer) lost, all layers bring back {shares}; the best "
            f"window of patterns, layers {best['layers']}, "
            f"{_share(best['change of P(answer)'], lost, low)}, which raises P(answer) by "
            f"{rise:.1f} % relative"
        )
    best_heads = _best_heads(prompts)
    told = f" Single heads that bring back most: {best_heads}." if best_heads else ""
    title = "Original attention restored in the edited model"
    paper = (
        "P(answer) rises by 28.6 % to 739 % relative with original attention rows in windows of "
        "10 layers (figure 5)."
    )
    text = f"{'. '.join(words)}.{told}"
    figure = figures.window_lines(rows, "change of P(answer)", title=title)
    return Finding("fig5", title, rows, figure, text, paper, _rome(study), failed)


# --- measuring ---


def _measured(
    study: Study, name: str, measure: Measure
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """A record for each prompt, and the cases that failed; each finished case is kept at once.

    Raises:
        RequestError: If no case has a prompt of these kinds, or each one failed.
    """
    journal = Journal(study.out / f"{name}.prompts.jsonl")
    units = _units(study)
    bar = tqdm(study.cases, desc=name, unit="case", disable=not study.progress)
    for unit, case in zip(units, bar, strict=True):
        if not journal.is_finished(unit, study.retry_failed):
            try:
                found = list(_of_case(study, case, measure))
            except DriftLensError as error:
                journal.add(unit, error=f"{type(error).__name__}: {error}")
                continue
            journal.add(unit, prompts=found)
    records = [journal[unit] for unit in units]
    prompts = [prompt for record in records for prompt in record.get("prompts", ())]
    failed = [
        ("rome", case.id, record["error"])
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
    return prompts, failed


def _rome(study: Study) -> list[dict[str, Any]]:
    """The editor, for the record."""
    return [{"name": arm.name, **arm.to_dict()} for arm in study.arms(("rome",))[1:]]


def _units(study: Study) -> list[dict[str, Any]]:
    """What determines the record of each case."""
    common = {
        **study.model.identity(),
        "covariance": COVARIANCE,
        "config": asdict(resolve_config(study.model, "rome")),
        "seed": study.seed,
        "quick": study.quick,
        "per_kind": PER_KIND,
    }
    return [{**common, "case": case.to_record()} for case in study.cases]


def _of_case(study: Study, case: Case, measure: Measure) -> Iterator[dict[str, Any]]:
    for metric, kind in KINDS.items():
        about = [p for p in case.probes((metric,)) if case.request.subject in p.prompt]
        for probe in about[:PER_KIND]:
            measured = measure(study.model, study.rome(case), probe)
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
    width = max(1, n_layers // 5)
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
    """Mean changes of P(answer) and P(new target), with intervals by bootstrap over cases."""
    rows = []
    for kind in dict.fromkeys(p["kind"] for p in prompts):
        own = [p for p in prompts if p["kind"] == kind]
        lost = [p["original"]["answer"] - p["edited"]["answer"] for p in own]
        lost_low, lost_high = _interval(own, lost)
        for what in kinds:
            for span in own[0]["patched"][what]:
                answer = [p["patched"][what][span]["answer"] - p[from_state]["answer"] for p in own]
                new = [p["patched"][what][span]["new"] - p[from_state]["new"] for p in own]
                low, high = _interval(own, answer)
                rows.append(
                    {
                        "kind": kind,
                        "patched": what,
                        "layers": span,
                        "prompts": len(own),
                        "P(answer) unpatched": float(
                            np.mean([p[from_state]["answer"] for p in own])
                        ),
                        "change of P(answer)": float(np.mean(answer)),
                        "change of P(new target)": float(np.mean(new)),
                        "low": low,
                        "high": high,
                        "lost P(answer)": float(np.mean(lost)),
                        "lost low": lost_low,
                        "lost high": lost_high,
                    }
                )
    return pd.DataFrame(rows)


def _interval(prompts: Sequence[dict[str, Any]], values: Sequence[float]) -> tuple[float, float]:
    frame = pd.DataFrame({"case": [p["case"] for p in prompts], "value": values})
    grouped = frame.groupby("case", sort=False)["value"]
    return bootstrap_interval(grouped.sum().to_numpy(), grouped.count().to_numpy(dtype=float))


def _correlations(prompts: Sequence[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    for kind in dict.fromkeys(p["kind"] for p in prompts):
        own = [p for p in prompts if p["kind"] == kind]
        for damage, values in _damages(own).items():
            for drift in DRIFTS:
                x = np.array([p["drift"][drift] for p in own])
                yield {
                    "kind": kind,
                    "damage": damage,
                    "drift": drift,
                    "prompts": len(own),
                    **_correlation(x, values, [p["case"] for p in own], seed),
                }


def _damages(prompts: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    fall = [p["original"]["answer"] - p["edited"]["answer"] for p in prompts]
    rise = [p["edited"]["new"] - p["original"]["new"] for p in prompts]
    return {"fall of P(answer)": np.array(fall), "rise of P(new target)": np.array(rise)}


def _correlation(
    x: np.ndarray, y: np.ndarray, cases: Sequence[str], seed: int, draws: int = 2000
) -> dict[str, float]:
    """Pearson and Spearman, with 95 % intervals by bootstrap over cases; not a number where one
    of the two does not vary."""
    weights = _draws(cases, seed, draws)
    found: dict[str, float] = {}
    for name, values in (
        ("pearson", (x, y)),
        ("spearman", (_ranks(x, weights), _ranks(y, weights))),
    ):
        value, *drawn = _pearson(*values, weights)
        finite = [one for one in drawn if np.isfinite(one)] or [float("nan")]
        low, high = np.quantile(finite, [0.025, 0.975])
        found |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


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


def _share(gain: float, lost: float, low: float) -> str:
    """In per cent of what was lost, unless its interval holds 0."""
    return f"{100 * gain / lost:.0f} %" if low > 0 else f"{gain:+.3f}"


def _best_heads(prompts: Sequence[dict[str, Any]], k: int = 5) -> str:
    with_heads = [p for p in prompts if "heads" in p]
    if not with_heads:
        return ""
    gains = np.mean([np.array(p["heads"]) - p["edited"]["answer"] for p in with_heads], axis=0)
    best = np.argsort(-gains, axis=None, kind="stable")[:k]
    places = zip(*np.unravel_index(best, gains.shape), strict=True)
    return ", ".join(f"{head_name(int(y), int(x))} {gains[y, x]:+.3f}" for y, x in places)


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
