"""What experiments found, as Markdown: a table, or what the numbers say.

Each function takes a file that :func:`~driftlens.experiments.gather.gather` wrote; to add one, name
it in TABLES.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from driftlens.attention import head_name
from driftlens.cases import METRICS
from driftlens.evaluation import rate_cells, with_failures
from driftlens.experiments.paper import TABLE_3
from driftlens.intervals import with_interval

NAMED_HEADS = 3
"""How many heads a table names."""


def told_markdown(record: Mapping[str, Any]) -> str:
    """What the numbers say, run by run."""
    parts = []
    for run in record["runs"]:
        place = f"*{run['model']['name']}, {run['data']}, {len(run['cases'])} cases.*"
        parts.append(f"{place} {run['text']}")
        if run["points"]:
            parts.append("\n".join(f"- {point}" for point in run["points"]))
    return "\n\n".join(parts)


def markdown(record: Mapping[str, Any], shown: Sequence[str] = ("Avg. S", *METRICS)) -> str:
    """Success by data, model and arm, in per cent with 95 % intervals, of a file that was
    written."""
    lines = [cells for _, cells in _successes(record, shown)]
    return _table(["data", "model", "arm", *shown], lines)


def main_markdown(record: Mapping[str, Any]) -> str:
    """Table 3: success; and, where it was measured, the median of the steps that searches take, and
    the edited prompt's new target otherwise than by success: how often greedy decoding gives it, in
    per cent, and its mean probability. Below it what the paper reports of its first model, without
    intervals."""
    shown = ("Avg. S", *METRICS)
    more = {
        "steps": _steps(record),
        "ES greedy": _of_edited_prompts(record, "greedy", 1),
        "P(new target)": _of_edited_prompts(record, "probabilities", 3),
    }
    more = {name: found for name, found in more.items() if found}
    lines = [
        [*cells, *(found.get(place, "-") for found in more.values())]
        for place, cells in _successes(record, shown)
    ]
    for row in TABLE_3:
        if row.model == TABLE_3[0].model:
            arm = "unedited" if row.editor == "none" else row.editor + " + sadr" * row.sadr
            values = (row.average, *(getattr(row, metric) for metric in METRICS))
            rates = [f"{value:.1f}" for value in values]
            lines.append(["the paper's table", row.model, arm, *rates, *("-" for _ in more)])
    return _table(["data", "model", "arm", *shown, *more], lines)


def fluent_markdown(record: Mapping[str, Any]) -> str:
    """Fluency of texts, in bits times 100."""
    return markdown(record, ("FL",))


def substituted_markdown(record: Mapping[str, Any]) -> str:
    """Figure 3: of each component, the window that costs P(answer) most, in points."""
    lines = []
    for place, rows in _by(record, "data", "model", "kind", "patched"):
        worst = min(rows, key=lambda row: row["change of P(answer)"])
        lines.append((*place, worst["layers"], _points(worst), _points(worst, "P(new target)")))
    return _table(
        ["data", "model", "prompts", "component", "layers", "P(answer)", "P(new target)"], lines
    )


def correlated_markdown(record: Mapping[str, Any]) -> str:
    """Figure 4: Pearson's and Spearman's correlation of measures of drift with damage, and how much
    there is of the first of them."""
    lines = [
        (*place, str(rows[0]["prompts"]), _mean(rows[0]), *(_correlations(row) for row in rows))
        for place, rows in _by(record, "data", "model", "kind", "damage")
    ]
    drifts = list(dict.fromkeys(row["drift"] for row in record["rows"]))
    head = ["data", "model", "prompts", "damage", "number", f"mean drift ({drifts[0]})"]
    return _table([*head, *drifts], lines)


def restored_markdown(record: Mapping[str, Any]) -> str:
    """Figure 5: what original attention at the last token brings back, in per cent of what
    P(answer) lost, all layers and the best window of patterns; and how often the answer is likelier
    than the new target."""
    lines = []
    for place, rows in _by(record, "data", "model", "kind"):
        whole = [row for row in rows if row["layers"] == "all"]
        windows = [r for r in rows if r["layers"] != "all" and r["patched"] == "pattern"]
        best = max(windows, key=lambda row: row["change of P(answer)"])
        likelier = [rows[0][f"likelier {state}, %"] for state in ("original", "edited")]
        likelier += [row["answer likelier, %"] for row in whole[:2]]
        lost = (rows[0][f"lost {end}"] for end in ("P(answer)", "low", "high"))
        lines.append(
            (
                *place,
                str(rows[0]["prompts"]),
                with_interval(*lost, digits=3),
                *(_share(row) for row in whole),
                f"{best['layers']}: {_share(best)}",
                f"{' / '.join(f'{share:.0f}' for share in likelier)} %",
            )
        )
    what = list(dict.fromkeys(row["patched"] for row in record["rows"]))
    head = [
        "data",
        "model",
        "prompts",
        "number",
        "P(answer) lost",
        *what,
        "best window of patterns",
        f"answer likelier: original / edited / {' / '.join(what[:2])}",
    ]
    return _table(head, lines)


def single_heads_markdown(record: Mapping[str, Any]) -> str:
    """What P(answer) lost, the heads whose original pattern, or values, bring back most of it, in
    points, and those that drift most to the subject."""
    exchanges = [what for what in ("pattern", "values") if what in record["rows"][0]]
    lines = []
    for place, rows in _by(record, "data", "model", "kind"):
        best = [_best_heads(rows, what, 100, 2) for what in exchanges]
        drift = _best_heads(rows, "drift", 1, 3)
        ends = (rows[0][f"lost {end}"] for end in ("P(answer)", "low", "high"))
        lost = with_interval(*_times(100, ends), digits=2)
        lines.append((*place, str(rows[0]["prompts"]), lost, *best, drift))
    head = ["data", "model", "prompts", "number", "P(answer) lost", *exchanges]
    return _table([*head, "drift to the subject"], lines)


def controlled_markdown(record: Mapping[str, Any]) -> str:
    """Table 1: success with the controls, the same prompts behind another sentence."""
    behind = ("lead-neighbour", "DNS", "RS", "lead-relation", "distract-relation")
    return markdown(record, ("ES", "PS", "NS", *behind))


def restricted_markdown(record: Mapping[str, Any]) -> str:
    """Success under restrictions, and the median of the steps that searches take."""
    shown, steps = (*METRICS, "Avg. S"), _steps(record)
    lines = [[*cells, steps[place]] for place, cells in _successes(record, shown)]
    return _table(["data", "model", "arm", *shown, "steps"], lines)


def cured_markdown(record: Mapping[str, Any]) -> str:
    """What SADR takes off drift and damage, in per cent of both."""
    lines = [
        (*place, str(rows[0]["prompts"]), *(_taken_off(row) for row in rows))
        for place, rows in _by(record, "data", "model", "kind", "method")
    ]
    measures = list(dict.fromkeys(row["measure"] for row in record["rows"]))
    return _table(["data", "model", "prompts", "editor", "number", *measures], lines)


def equally_strong_markdown(record: Mapping[str, Any]) -> str:
    """Success without and with SADR, as edits are made and at equal strength, with what SADR has
    more; P(new target) on the edited prompt, and the drift of the largest head."""
    largest = "drift, max head: "
    metrics = dict.fromkeys(row["metric"] for row in record["rows"])
    kinds = [m.removeprefix(largest) for m in metrics if m.startswith(largest)]
    lines = []
    for place, rows in _by(record, "data", "model", "method", "compared"):
        of = {row["metric"]: row for row in rows}
        cells = [_with_more(of.get(metric), 1) for metric in METRICS]
        prob = " / ".join(f"{of['ES'][f'P {side}']:.3f}" for side in ("without", "with"))
        drift = [_with_more(of.get(largest + kind), 3) for kind in kinds]
        lines.append((*place, prob, *cells, *drift))
    head = ["data", "model", "editor", "compared", "P(new target)", *METRICS]
    return _table([*head, *(f"drift, {kind}" for kind in kinds)], lines)


def _with_more(row: Mapping[str, Any] | None, digits: int) -> str:
    """Without and with SADR, and what it has more; nothing of what was not measured."""
    if row is None:
        return "-"
    sides = " / ".join(f"{row[side]:.{digits}f}" for side in ("without", "with"))
    ends = (row[end] for end in ("value", "low", "high"))
    return f"{sides}, {with_interval(*ends, digits=digits, sign='+')}"


def costs_markdown(record: Mapping[str, Any]) -> str:
    """Steps and time of edits, and memory of a step, without and with SADR, and what it adds."""
    quantities = list(dict.fromkeys(row["quantity"] for row in record["rows"]))
    lines = []
    for place, rows in _by(record, "data", "model", "method"):
        own = {row["quantity"]: row for row in rows}
        steps = " / ".join(f"{rows[0][f'steps {side}']:g}" for side in ("without", "with"))
        lines.append(
            (*place, str(rows[0]["cases"]), steps, *(_added(own[name]) for name in quantities))
        )
    return _table(["data", "model", "editor", "cases", "steps", *quantities], lines)


def _added(row: Mapping[str, Any]) -> str:
    """Without and with SADR, and what it adds, in per cent."""
    sides = " / ".join(f"{row[side]:.3g}" for side in ("without", "with"))
    more = with_interval(row["value"], row["low"], row["high"], sign="+", unit=" %")
    return f"{sides} {row['unit']}, {more}"


def sequence_markdown(record: Mapping[str, Any]) -> str:
    """Success after some of the edits of a sequence: few, half of the looks, and all."""
    lines = []
    for place, rows in _by(record, "data", "model"):
        looks = list(dict.fromkeys(row["facts"] for row in rows))
        shown = dict.fromkeys((looks[min(1, len(looks) - 1)], looks[len(looks) // 2], looks[-1]))
        for count in shown:
            own = [row for row in rows if row["facts"] == count]
            for (arm,), of_arm in _by({"rows": own}, "arm"):
                cells = rate_cells({row["metric"]: row for row in of_arm})
                lines.append((*place, str(count), arm, *cells))
    return _table(["data", "model", "facts", "arm", *METRICS], lines)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "table1": controlled_markdown,
    "table3": main_markdown,
    "fluency": fluent_markdown,
    "fig3": substituted_markdown,
    "fig4": correlated_markdown,
    "fig5": restored_markdown,
    "heads": single_heads_markdown,
    "fig6": restricted_markdown,
    "fig7": restricted_markdown,
    "steps": restricted_markdown,
    "strength": equally_strong_markdown,
    "cure": cured_markdown,
    "cost": costs_markdown,
    "rules": restricted_markdown,
    "rivals": restricted_markdown,
    "sequential": sequence_markdown,
}
"""Results as a table for a text."""


def _steps(record: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """By data, model and arm, the median of the steps that searches take."""
    return {
        (run["data"], run["model"]["name"], arm["name"]): (
            "-" if arm["steps_per_edit"] is None else f"{arm['steps_per_edit']:g}"
        )
        for run in record["runs"]
        for arm in run["arms"]
        if "steps_per_edit" in arm
    }


def _of_edited_prompts(
    record: Mapping[str, Any], measured: str, digits: int
) -> dict[tuple[str, ...], str]:
    """By data, model and arm, a measure of the new target on the edited prompt."""
    return {
        (run["data"], run["model"]["name"], row["arm"]): with_interval(
            row["value"], row["low"], row["high"], digits=digits
        )
        for run in record["runs"]
        for row in run[measured]
        if row["metric"] == "ES"
    }


def _successes(
    record: Mapping[str, Any], shown: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """By data, model and arm, a line: these, with how many cases failed, and some metrics in per
    cent, each with its interval."""
    failed = {
        (run["data"], run["model"]["name"], one["arm"], one["case"])
        for run in record["runs"]
        for one in run["failed"]
    }
    of_arm: Counter[tuple[str, ...]] = Counter(one[:3] for one in failed)
    for place, rows in _by(record, "data", "model", "arm"):
        data, model, arm = place
        cells = rate_cells({row["metric"]: row for row in rows}, shown)
        yield place, [data, model, with_failures(arm, of_arm[place]), *cells]


def _by(
    record: Mapping[str, Any], *names: str
) -> Iterator[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """Rows that agree in some columns, in the order of the first of each."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    yield from found.items()


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])


def _mean(row: Mapping[str, Any]) -> str:
    return with_interval(row["mean"], row["mean_low"], row["mean_high"], digits=3, sign="+")


def _correlations(row: Mapping[str, Any]) -> str:
    """Pearson's, then Spearman's."""
    return "; ".join(
        with_interval(row[kind], row[f"{kind}_low"], row[f"{kind}_high"], digits=2)
        for kind in ("pearson", "spearman")
    )


def _points(row: Mapping[str, Any], of: str = "P(answer)") -> str:
    ends = ("low", "high") if of == "P(answer)" else ("new low", "new high")
    found = (row[name] for name in (f"change of {of}", *ends))
    return with_interval(*_times(100, found), sign="+")


def _taken_off(row: Mapping[str, Any]) -> str:
    """In per cent, or without and with SADR where the edit does nothing for sure."""
    if row["taken off, %"] is None:
        return f"{row['without']:.3g}, {row['with']:.3g}"
    return with_interval(row["taken off, %"], row["low"], row["high"], digits=0, unit=" %")


def _best_heads(rows: Sequence[Mapping[str, Any]], what: str, unit: float, digits: int) -> str:
    """The heads with the largest values, which are given in a unit, with their intervals."""
    told = []
    for row in sorted(rows, key=lambda row: row[what], reverse=True)[:NAMED_HEADS]:
        found = _times(unit, (row[end] for end in (what, f"{what} low", f"{what} high")))
        name = head_name(row["layer"], row["head"])
        told.append(f"{name} {with_interval(*found, digits=digits, sign='+')}")
    return "; ".join(told)


def _times(unit: float, values: Iterable[float | None]) -> Iterator[float | None]:
    """Values in a unit; what is not known stays so."""
    return (None if value is None else unit * value for value in values)


def _share(row: Mapping[str, Any]) -> str:
    """In per cent of what was lost, or in points where that is not sure to be anything."""
    if row["share, %"] is None:
        return f"{_points(row)} points"
    return with_interval(row["share, %"], row["share low"], row["share high"], digits=0, unit=" %")
