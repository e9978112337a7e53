"""Experiments that compare editors and restrictions by what is answered afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from driftlens import figures
from driftlens.bench import UNEDITED, Arm, BenchResult
from driftlens.bench.results import ALLOWED, KEPT
from driftlens.cases import METRICS, Metric
from driftlens.editing.configs import ValueSearch
from driftlens.editing.methods import METHODS
from driftlens.editing.rivals import EssenceKL, HiddenDrift, KeyDrift
from driftlens.editing.sadr import SADR
from driftlens.evaluation import Answer, Asked, Difference, compare, growth, rates
from driftlens.experiments.paper import TABLE_3, Row
from driftlens.experiments.reproduce.finding import Finding, Study

PAPERS = ("rome", "memit", "pmet")
"""The editors of the paper."""

STOPS = ("early_stop_loss", "greedy_stop_kl")
"""Hyperparameters at which a search stops early; negative ones never do."""

PAIRED = "Differences in points, paired by case."

CONTROLS: dict[Metric, dict[Metric, str]] = {
    "NS": {"DNS": "the edited sentence", "lead-neighbour": "an unrelated one"},
    "RS": {"distract-relation": "the edited sentence", "lead-relation": "an unrelated one"},
}
"""Prompts, and the same ones behind a sentence."""


def table1(study: Study) -> Finding:
    """Specificity failure: how much other knowledge each editor breaks, and how much of that the
    context alone would have broken."""
    arms = study.arms(PAPERS[:1] if study.quick else tuple(METHODS))
    result = study.bench(arms)
    rows = result.table()
    points = [
        f"{arm} ({_list(_rate(result, arm, metric) for metric in ('ES', 'PS'))}): "
        f"{_changes(result.compare(arm, UNEDITED), ('RS', 'DNS', 'NS'))}."
        for arm in result.arms[1:]
    ]
    text = "Edited less unedited on the same prompts, in points."
    contexts = [
        f"{base} by {change} behind {what}"
        for base, controls in CONTROLS.items()
        for metric, what in controls.items()
        if (change := _between(result, UNEDITED, metric, base)) is not None
    ]
    if contexts:
        points.append(
            f"The context alone changes, on the unedited model, {_list(contexts)}: that is no "
            "damage of an edit, and no part of the differences above."
        )
    shown = ("ES", "PS", "NS", "lead-neighbour", "DNS", "RS", "lead-relation", "distract-relation")
    figure = figures.rate_bars(
        rows, [m for m in shown if m in set(rows["metric"])], title="Specificity failure"
    )
    title = "Specificity failure of each editor"
    return _finding("table1", title, result, rows, figure, text, points, _paper_failures())


def table3(study: Study) -> Finding:
    """The main table: each editor without and with SADR."""
    methods = PAPERS[:1] if study.quick else PAPERS
    arms = study.arms(methods, ("none", "sadr"))
    result = study.bench(arms)
    rows = _with_parts(study, result.table())
    text = f"{PAIRED}{study.untuned(methods)}"
    points = [_gain(result, method, f"{method} + sadr") for method in methods]
    figure = figures.rate_bars(rows, [*METRICS, "Avg. S"], title="Editors without and with SADR")
    title = "Editors without and with SADR"
    return _finding("table3", title, result, rows, figure, text, points, _paper_gains())


def fluency(study: Study) -> Finding:
    """The main table's last column (FL): the entropy of what is written after each edit, without
    and with SADR."""
    methods = PAPERS[:1] if study.quick else PAPERS
    result = study.texts(study.arms(methods, ("none", "sadr")))
    rows = _with_parts(study, result.table())
    pairs = [pair for m in methods for pair in ((m, UNEDITED), (f"{m} + sadr", m))]
    points = [
        f"{arm} less {other}: FL {found['FL']}." if found else f"{arm}: nothing to compare."
        for arm, other in pairs
        for found in (result.compare_texts(arm, other),)
    ]
    text = (
        "FL is the entropy of a text's bigrams and trigrams in bits, times 100; it falls where a "
        f"model repeats itself. Differences are paired by case.{study.untuned(methods)}"
    )
    title = "Fluency of texts, without and with SADR"
    less = [
        {"arm": arm, "metric": "FL", "value": own.value, "low": own.low, "high": own.high}
        for arm in result.arms
        if arm != UNEDITED and (own := result.compare_texts(arm, UNEDITED).get("FL"))
    ]
    figure = figures.rate_bars(
        pd.DataFrame(less, columns=["arm", "metric", "value", "low", "high"]), ["FL"],
        title="Fluency of texts less the unedited model's", unit="bits, times 100", top=None,
    )  # fmt: skip
    found = _finding("fluency", title, result, rows, figure, text, points, _paper_fluency())
    return replace(found, cases=[*result.cases.values()])


def fig6(study: Study) -> Finding:
    """Selective against blanket restriction: which heads are held, over gamma."""
    gammas = _gammas(study, study.method)
    rules: dict[str, dict[str, Any]] = {"selected heads": {}, "all heads": {"heads": "all"}}
    arms = _restricted_arms(
        study,
        {
            f"{rule}, gamma {gamma:g}": (SADR(gamma=gamma, **options),)
            for rule, options in rules.items()
            for gamma in gammas
        },
    )
    result = study.bench(arms)
    rows = result.table()
    points = []
    for gamma in gammas:
        selected, every = (f"{rule}, gamma {gamma:g}" for rule in rules)
        points.append(f"At gamma {gamma:g}: {_changes(result.compare(selected, every))}.")
    blanket = [f"all heads, gamma {gamma:g}" for gamma in gammas]
    points += [_at_no_higher_price(result, f"selected heads, gamma {g:g}", blanket) for g in gammas]
    text = (
        "Selected heads less all heads, in points. At one gamma, holding all heads is the larger "
        "penalty; so for each setting of selected heads, the setting of all heads that keeps most "
        "of those that cost no more of ES and PS (one prompt in any case), chosen on the same "
        f"cases.{study.untuned([study.method])}"
    )
    figure = figures.trade_off(result.trade_off(), title="Selective and blanket restriction")
    paper = "Restricting all heads costs edit success and helps less, at every gamma (figure 6)."
    title = "Selective against blanket restriction"
    return _finding("fig6", title, result, rows, figure, text, points, paper)


def fig7(study: Study) -> Finding:
    """Trade-offs: gamma against learning rate and KL weight, with exactly the same number of steps,
    and against fewer steps."""
    methods = ("rome",) if study.quick else ("rome", "memit")
    arms = [Arm(UNEDITED)]
    for method in methods:
        config = _unstopped(study.config(method))
        found: dict[str, Arm] = {"": Arm(method, method, config)}
        for gamma in _gammas(study, method)[-2:]:
            name = f"gamma {gamma:g}"
            found[name] = Arm(f"{method}, {name}", method, config, (SADR(gamma=gamma),))
        for name, change in list(_weaker(config).items())[: 1 if study.quick else None]:
            found[name] = Arm(f"{method}, {name}", method, replace(config, **change))
        arms += found.values()
    result = study.bench(arms)
    rows = result.table()
    kept = result.trade_off()
    text = (
        "No search stops early. What the best setting of each kind gains in the mean of what "
        f"should be left alone, in points, of those that cost at most {ALLOWED['ES']:g} point of "
        f"ES and {ALLOWED['PS']:g} of PS (one prompt in any case), chosen on the same cases. For "
        "each gamma, what the setting of another kind keeps more that keeps most of those that "
        f"cost no more of ES and PS.{study.untuned(methods)}"
    )
    points = [point for method in methods for point in _trade_offs(result, method)]
    figure = figures.trade_off(kept, title="What restrictions cost, and what they keep")
    paper = "Varying gamma dominates varying steps, learning rate or KL weight (figure 7, GPT-J)."
    title = "Trade-offs: gamma, steps, learning rate, KL"
    return _finding("fig7", title, result, rows, figure, text, points, paper)


def _weaker(config: ValueSearch) -> dict[str, dict[str, Any]]:
    """Other ways than SADR to hold an edit back, from the editor's own hyperparameters: a quarter
    and half of the steps, two fifths of the learning rate, 16 times the KL weight; without those
    that change nothing."""
    steps = [config.steps // 4, config.steps // 2]
    lr, kl = config.lr * 0.4, config.kl_factor * 16
    return {
        **{f"steps {n}": {"steps": n} for n in steps if n},
        f"lr {lr:g}": {"lr": lr},
        **({f"KL {kl:g}": {"kl_factor": kl}} if kl else {}),
    }


def rules(study: Study) -> Finding:
    """Open question: how heads are selected, and what divergence holds them."""
    gamma = study.sadr(study.method).gamma
    options: dict[str, dict[str, Any]] = {
        "max (the paper's)": {},
        "all heads": {"heads": "all"},
        **{f"quantile {q:g}": {"heads": "quantile", "threshold": q} for q in (0.9, 0.5)},
        **{f"mean + {k:g} std": {"heads": "mean_std", "threshold": k} for k in (1.0, 2.0)},
        **{f"drift {d:g}": {"heads": "drift", "threshold": d} for d in (0.05, 0.01)},
        "reverse KL": {"divergence": "reverse_kl"},
        "JS": {"divergence": "js"},
        "all rows": {"queries": "all"},
    }
    if study.quick:
        options = dict(list(options.items())[:2])
    arms = {name: (SADR(gamma=gamma, **chosen),) for name, chosen in options.items()}
    return _comparison(study, "rules", "How heads are selected and held", arms)


def rivals(study: Study) -> Finding:
    """Open question: what else could be restricted, with the same number of steps at most."""
    arms: dict[str, tuple[Any, ...]] = {"SADR": (study.sadr(study.method),)}
    for weight in (0.01,) if study.quick else (0.003, 0.01, 0.03):
        arms[f"keys {weight:g}"] = (KeyDrift(weight=weight),)
    for weight in () if study.quick else (0.1, 0.3, 1.0):
        arms[f"hidden state {weight:g}"] = (HiddenDrift(weight=weight, relative=True),)
    for weight in () if study.quick else (0.25, 1.0):
        arms[f"essence KL {weight:g}"] = (EssenceKL(weight=weight),)
    return _comparison(study, "rivals", "What else could be restricted", arms)


def steps(study: Study) -> Finding:
    """Open question: whether SADR keeps more because its searches stop later. Its term counts
    towards the loss at which a search stops; here none stops early, so that all are as long."""
    methods = PAPERS[:1] if study.quick else PAPERS
    arms = [Arm(UNEDITED)]
    for method in methods:
        config = study.config(method)
        whole = _unstopped(config)
        held = (study.sadr(method),)
        arms.append(Arm(method, method, config))
        arms.append(Arm(f"{method}, all steps", method, whole))
        arms.append(Arm(f"{method} + sadr, all steps", method, whole, held))
    result = study.bench(arms)
    points = []
    for method in methods:
        plain, held_back = f"{method}, all steps", f"{method} + sadr, all steps"
        points.append(_gain(result, plain, held_back))
        points.append(
            f"{plain} less {method}: {_changes(result.compare(plain, method))}."
            f"{_steps(result, plain, method)}"
        )
    text = f"Searches without early stop. {PAIRED}{study.untuned(methods)}"
    title = "Without and with SADR, at exactly equal steps"
    rows = result.table()
    figure = figures.rate_bars(rows, [*METRICS, "Avg. S"], title=title)
    paper = "The paper's scripts give SADR more steps than the editor without it has."
    return _finding("steps", title, result, rows, figure, text, points, paper)


# --- parts ---


def _with_parts(study: Study, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of arms with their model, editor and penalty."""
    rows.insert(1, "method", [arm.split(" + ")[0] for arm in rows["arm"]])
    rows.insert(2, "penalty", ["sadr" if arm.endswith("sadr") else "none" for arm in rows["arm"]])
    rows.insert(0, "model", study.model.info.name)
    return rows


def _unstopped(config: ValueSearch) -> ValueSearch:
    """The same hyperparameters, for a search that takes all of its steps."""
    stops: dict[str, Any] = {name: -1.0 for name in STOPS if hasattr(config, name)}
    return replace(config, **stops)


def _restricted_arms(study: Study, penalties: Mapping[str, tuple[Any, ...]]) -> list[Arm]:
    method = study.method
    config = study.config(method)
    plain = [Arm(UNEDITED), Arm(method, method, config)]
    return [*plain, *(Arm(name, method, config, p) for name, p in penalties.items())]


def _comparison(
    study: Study, name: str, title: str, penalties: Mapping[str, tuple[Any, ...]]
) -> Finding:
    """An editor under several restrictions, told by their paired gains and their steps."""
    result = study.bench(_restricted_arms(study, penalties))
    first, *others = penalties
    points = [_gain(result, study.method, first) + _steps(result, first, study.method)]
    for arm in others:
        points.append(
            f"{arm} less {first}: {_changes(result.compare(arm, first))}."
            + _steps(result, arm, study.method)
        )
    tuned = f" Only the strength of {first} was tuned."
    best = _best_at_no_higher_price(result, first, others)
    cheap = f"{best} keeps most (chosen on the same cases)" if best else "there is none"
    cheap += _left_out(result, others)
    text = (
        f"{PAIRED}{study.untuned([study.method]) or tuned} Of the others that cost no more of ES "
        f"and PS than {first} (one prompt in any case), {cheap}."
    )
    paper = "The paper does not report this; its reviewers ask for it."
    figure = figures.trade_off(result.trade_off(), title=title)
    return _finding(name, title, result, result.table(), figure, text, points, paper)


def _finding(
    name: str,
    title: str,
    result: BenchResult,
    rows: pd.DataFrame,
    figure: go.Figure,
    text: str,
    points: Sequence[str],
    paper: str,
) -> Finding:
    """What a bench told, with its configurations and failures."""
    return Finding(
        name, title, rows, figure, text, paper, points, result.conditions(), result.failed,
        differences=result.differences(), probabilities=result.table("prob"),
        greedy=result.table("exact"), seconds=result.seconds_in_all(),
    )  # fmt: skip


def _gammas(study: Study, method: str) -> tuple[float, ...]:
    """Around the strength that is taken for the model and the editor."""
    taken = study.sadr(method).gamma
    return tuple(
        taken * factor for factor in ((0.25,) if study.quick else (1 / 16, 0.25, 1.0, 4.0))
    )


def _rate(result: BenchResult, arm: str, metric: Metric) -> str:
    """A metric of an arm; nothing if it was not asked."""
    found = result.rates(arm)
    return f"{metric} {found[metric].value:.1f}" if metric in found else ""


def _changes(found: Mapping[Metric, Difference], metrics: Sequence[Metric] = METRICS) -> str:
    """Paired differences in points, with their intervals."""
    return _list(f"{metric} {found[metric]}" for metric in metrics if metric in found)


def _between(result: BenchResult, arm: str, metric: Metric, base: Metric) -> Difference | None:
    """What a metric has more than another on the same prompts in other surroundings."""
    answers = result.answers(arm)

    def only(name: Metric) -> dict[str, list[Answer]]:
        return {
            case: [replace(answer, metric=base) for answer in own if answer.metric == name]
            for case, own in answers.items()
        }

    asked = {answer.metric for own in answers.values() for answer in own}
    return compare(only(metric), only(base))[base] if {metric, base} <= asked else None


def _at_no_higher_price(result: BenchResult, arm: str, others: Sequence[str]) -> str:
    """Of other arms that cost the edit no more than one does, what the one that keeps most keeps
    more."""
    best = _best_at_no_higher_price(result, arm, others)
    if best is None:
        return f"None of the others costs as little as {arm}{_left_out(result, others)}."
    return f"{best} less {arm}: {_changes(result.compare(best, arm))}."


def _with_failures(result: BenchResult) -> set[str]:
    """Arms under which a case failed."""
    return {arm for arm in result.arms if result.left_out(arm)}


def _left_out(result: BenchResult, others: Sequence[str]) -> str:
    """Those of which a case failed, in brackets."""
    failed = _with_failures(result)
    names = [name for name in others if name in failed]
    return f" (left out, as cases failed: {', '.join(names)})" if names else ""


def _best_at_no_higher_price(result: BenchResult, arm: str, others: Sequence[str]) -> str | None:
    """Of other arms that cost the edit no more than one does, the one that keeps most. Arms with
    failures are not to be chosen for the cases that are left."""
    failed = _with_failures(result)
    kept = {
        other: found
        for other in others
        if other not in failed
        and (found := result.compare_kept(other, arm)) is not None
        and not result.excess(other, arm, dict.fromkeys(ALLOWED, 0.0))
    }
    return max(kept, key=lambda other: kept[other].value, default=None)


def _steps(result: BenchResult, arm: str, plain: str) -> str:
    """How long the search of an edit is, and that of another one. (Not in seconds: units may come
    from an earlier run, on a machine that was busier then.)"""
    steps, before = result.steps(arm), result.steps(plain)
    if not math.isfinite(steps + before):
        return ""
    return f" Its searches take {steps:g} steps in the median ({before:g} for {plain})."


def _list(parts: Iterable[str]) -> str:
    return ", ".join(part for part in parts if part) or "nothing to compare"


def _gain(result: BenchResult, plain: str, held: str) -> str:
    """What a restriction changes, paired by case, in a sentence."""
    return f"{held} less {plain}: {gains(result.answers(plain), result.answers(held))}."


def gains(plain: Asked, held: Asked) -> str:
    """What one condition has more than another, paired by case, in points; of RS and DNS in per
    cent, too."""
    found, before = compare(held, plain), rates(plain.values())
    parts = []
    for metric in METRICS:
        if metric not in found:
            continue
        share = ""
        if metric in ("RS", "DNS") and before[metric].low > 0:  # else a share of next to nothing
            more = growth(held, plain, metric)
            share = "" if more is None else f", {more} relative"
        parts.append(f"{metric} {found[metric]}{share}")
    return "; ".join(parts) or "nothing to compare"


def _paper_failures() -> str:
    """What the paper's own editors break, from its table 3."""
    found = [
        f"{plain.model} {plain.editor}: RS {before.RS:.1f} to {plain.RS:.1f}, DNS "
        f"{before.DNS:.1f} to {plain.DNS:.1f}, NS {before.NS:.1f} to {plain.NS:.1f}"
        for before, plain, _ in _paper_rows()
    ]
    return f"{'; '.join(found)} (table 3)."


def _paper_gains() -> str:
    """The paper's own gains, from its table 3."""
    found = [
        f"{plain.model} {plain.editor}: RS {plain.RS:.1f} to {held.RS:.1f}, DNS {plain.DNS:.1f} "
        f"to {held.DNS:.1f}, ES {plain.ES:.1f} to {held.ES:.1f}, PS {plain.PS:.1f} to {held.PS:.1f}"
        for _, plain, held in _paper_rows()
    ]
    return f"{'; '.join(found)} (table 3)."


def _paper_fluency() -> str:
    """The paper's own fluency, from its table 3."""
    told: dict[str, list[str]] = {}
    for before, plain, held in _paper_rows():
        parts = told.setdefault(before.model, [f"unedited {before.FL:.1f}"])
        parts.append(f"{plain.editor} {plain.FL:.1f}, with SADR {held.FL:.1f}")
    found = [f"{model}: {'; '.join(parts)}" for model, parts in told.items()]
    return f"{'. '.join(found)} (table 3)."


def _paper_rows() -> Iterator[tuple[Row, Row, Row]]:
    """Of each of the paper's models and editors: before the edit, without SADR and with it."""
    rows = {(row.model, row.editor, row.sadr): row for row in TABLE_3}
    for model in dict.fromkeys(row.model for row in TABLE_3):
        for editor in PAPERS:
            yield rows[model, "none", False], rows[model, editor, False], rows[model, editor, True]


def _trade_offs(result: BenchResult, method: str) -> list[str]:
    """The best setting of each kind, and each gamma against the others."""
    points = [_best_of_each_kind(result, method)]
    if any(metric in result.rates(method) for metric in KEPT["others"]):
        varied = [arm for arm in result.arms if arm.startswith(f"{method}, ")]
        held = [arm for arm in varied if arm.startswith(f"{method}, gamma ")]
        others = [arm for arm in varied if arm not in held]
        points += [_at_no_higher_price(result, arm, others) for arm in held]
    return points


def _best_of_each_kind(result: BenchResult, method: str) -> str:
    """For each thing that was varied, its best setting among those that cost the edit little; and
    gamma's less the others'."""
    asked = [metric for metric in KEPT["others"] if metric in result.rates(method)]
    if not asked:
        return f"{method}: nothing to compare."
    failed = _with_failures(result)  # not to be chosen for the cases that are left
    kinds: dict[str, list[str]] = {}
    for arm in result.arms:
        if arm.startswith(f"{method},"):
            kinds.setdefault(arm.split(", ")[1].split()[0], []).append(arm)
    best: dict[str, str] = {}
    parts = []
    for kind, arms in kinds.items():
        less = {
            arm: found
            for arm in arms
            if arm not in failed and (found := result.compare_kept(arm, method))
        }
        cheap = [arm for arm in less if result.excess(arm, method) == 0]
        if not cheap:
            parts.append(f"none of {len(arms)} settings of {kind}")
            continue
        best[kind] = max(cheap, key=lambda arm: less[arm].value)
        parts.append(
            f"{best[kind].split(', ')[1]} (of {len(arms)}) {less[best[kind]]} "
            f"({_list(_rate(result, best[kind], metric) for metric in KEPT['edit'])})"
        )
    text = (
        f"{method} ({_list(_rate(result, method, metric) for metric in KEPT['edit'])}), mean of "
        f"{', '.join(asked)}: {'; '.join(parts)}."
    )
    rivals = [
        f"{kind} {found}" for kind in best
        if kind != "gamma" and "gamma" in best
        and (found := result.compare_kept(best["gamma"], best[kind]))
    ]  # fmt: skip
    return f"{text} Gamma's less that of {', '.join(rivals)}." if rivals else text
