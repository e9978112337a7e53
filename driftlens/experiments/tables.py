"""What experiments found, as Markdown: a table, or what the numbers say.

Each function takes a file that :func:`~driftlens.experiments.gather.gather` wrote; to add one, name
it in TABLES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from driftlens.cases import METRICS
from driftlens.evaluation import rate_cells
from driftlens.intervals import with_interval


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
    lines = [(*place, *cells) for place, cells in _successes(record, shown)]
    return _table(["data", "model", "arm", *shown], lines)


def fluent_markdown(record: Mapping[str, Any]) -> str:
    """Table 3: success, and fluency (bits, times 100) where it was measured."""
    measured = any(row["metric"] == "FL" for row in record["rows"])
    return markdown(record, ("Avg. S", *METRICS, *(["FL"] if measured else [])))


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
    """Figure 4: Pearson's correlation of measures of drift with damage."""
    lines = [
        (*place, str(rows[0]["prompts"]), *(_pearson(row) for row in rows))
        for place, rows in _by(record, "data", "model", "kind", "damage")
    ]
    drifts = list(dict.fromkeys(row["drift"] for row in record["rows"]))
    return _table(["data", "model", "prompts", "damage", "number", *drifts], lines)


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


def controlled_markdown(record: Mapping[str, Any]) -> str:
    """Table 1: success with the controls, the same prompts behind another sentence."""
    behind = ("lead-neighbour", "DNS", "RS", "lead-relation", "distract-relation")
    return markdown(record, ("ES", "PS", "NS", *behind))


def restricted_markdown(record: Mapping[str, Any]) -> str:
    """Success under restrictions, and the median of the steps that searches take."""
    shown = (*METRICS, "Avg. S")
    steps: dict[tuple[str, ...], float | None] = {
        (run["data"], run["model"]["name"], arm["name"]): arm["steps_per_edit"]
        for run in record["runs"]
        for arm in run["arms"]
    }
    lines = [
        (*place, *cells, "-" if (found := steps[place]) is None else f"{found:g}")
        for place, cells in _successes(record, shown)
    ]
    return _table(["data", "model", "arm", *shown, "steps"], lines)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "table1": controlled_markdown,
    "table3": fluent_markdown,
    "fig3": substituted_markdown,
    "fig4": correlated_markdown,
    "fig5": restored_markdown,
    "fig6": restricted_markdown,
    "fig7": restricted_markdown,
    "rules": restricted_markdown,
    "rivals": restricted_markdown,
}
"""Results as a table for a text."""


def _successes(
    record: Mapping[str, Any], shown: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """By data, model and arm: some metrics in per cent, each with its interval."""
    for place, rows in _by(record, "data", "model", "arm"):
        yield place, rate_cells({row["metric"]: row for row in rows}, shown)


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


def _pearson(row: Mapping[str, Any]) -> str:
    return with_interval(row["pearson"], row["pearson_low"], row["pearson_high"], digits=2)


def _points(row: Mapping[str, Any], of: str = "P(answer)") -> str:
    ends = ("low", "high") if of == "P(answer)" else ("new low", "new high")
    return with_interval(*(100 * row[name] for name in (f"change of {of}", *ends)), sign="+")


def _share(row: Mapping[str, Any]) -> str:
    """In per cent of what was lost, or in points where that is not sure to be anything."""
    if row["share, %"] is None:
        return f"{_points(row)} points"
    return with_interval(row["share, %"], row["share low"], row["share high"], digits=0, unit=" %")
