"""What `driftlens reproduce` found on several models and data, as one file for each experiment.

    python -m driftlens.experiments.gather results/smollm2-135m results/gemma-3-270m

Each ``NAME.json`` then holds ``rows``, with model and data in each, and ``runs``: how each was
made, with which configurations, what its numbers say, and its figure. ``--page PAGE.html`` shows
all that has been gathered; without folders, that is all that is done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.io as pio

from driftlens.cases import METRICS
from driftlens.documents import Section, TableOf, document
from driftlens.errors import DataError, DriftLensError
from driftlens.evaluation import rate_cells
from driftlens.experiments.reproduce import EXPERIMENTS
from driftlens.records import write_result

MORE = ("differences", "probabilities")
"""What results of experiments that compare arms hold."""


def gather(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write one file for each experiment that is in any of the folders.

    Args:
        folders: That `driftlens reproduce` wrote to, each with another model or other data.
        out: Where the files go.

    Raises:
        DataError: If a folder has no results, a file is damaged or of a quick run, two are of one
            model and data, or nothing can be written.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        there = [name for name in EXPERIMENTS if (folder / f"{name}.json").is_file()]
        if not there:
            raise DataError(
                f"{folder} holds no results.", "Give the folder that `driftlens reproduce` wrote."
            )
        for name in there:
            found.setdefault(name, []).append(_read(folder / f"{name}.json"))
    written = []
    for name, records in found.items():
        made_of = [(record["model"]["name"], record["data"]) for record in records]
        if len(set(made_of)) < len(made_of):
            raise DataError(
                f"Two results of {name} are of one model on the same data.", "Give each once."
            )
        written.append(out / f"{name}.json")
        write_result(written[-1], json.dumps(_merged(records), indent=1, ensure_ascii=False) + "\n")
    return written


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if record["quick"]:
            raise DataError(f"{path} is of a quick run.", "Run the experiment without --quick.")
        drawn = path.with_suffix(".figure.json")
        record["figure"] = json.loads(drawn.read_text("utf-8")) if drawn.is_file() else None
        _merged([record])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged.", "Run the experiment again.") from error
    return record


def _merged(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = records[0]
    of_run = (
        "model", "data", "fingerprint", "command", "seed", "versions", "seconds_of_last_run",
        "text", "arms", "cases", "failed", "figure",
    )  # fmt: skip
    return {
        **{name: first[name] for name in ("name", "title", "paper")},
        "runs": [
            {**{name: record[name] for name in of_run}, **{n: record.get(n, []) for n in MORE}}
            for record in records
        ],
        "rows": [
            {"model": record["model"]["name"], "data": record["data"], **row}
            for record in records
            for row in record["rows"]
        ],
    }


def page(folder: Path, command: str) -> str:
    """HTML of all that has been gathered in a folder: figures, what they say, and numbers.

    Args:
        folder: That :func:`gather` wrote to.
        command: How to make the page again.

    Raises:
        DataError: If nothing has been, or a file is damaged.
    """
    there = [path for name in EXPERIMENTS if (path := folder / f"{name}.json").is_file()]
    if not there:
        raise DataError(f"{folder} holds no gathered results.", "Gather some first.")
    sections: list[Section] = []
    for path in there:
        try:
            sections += _sections(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged.", "Gather the results again.") from error
    return document(
        "The paper's experiments",
        ["What each command below found, beside what the paper reports."],
        command,
        sections,
    )


def _sections(gathered: Mapping[str, Any]) -> Iterator[Section]:
    """One for each run of an experiment."""
    rows = pd.DataFrame(gathered["rows"])
    for number, run in enumerate(gathered["runs"]):
        model = run["model"]["name"]
        own = rows[(rows["model"] == model) & (rows["data"] == run["data"])]
        yield Section(
            f"{gathered['name']}-{number}",
            f"{gathered['title']}: {model}, {run['data']}",
            texts=[run["text"], f"{len(run['cases'])} cases: {run['command']}"],
            figures=[] if run["figure"] is None else [pio.from_json(json.dumps(run["figure"]))],
            tables=[TableOf("Numbers", own.drop(columns=["model", "data"]), folded=True)],
            aside="" if number else f"The paper: {gathered['paper']}",
        )


def markdown(record: Mapping[str, Any]) -> str:
    """Success by data, model and arm, in per cent with 95 % intervals, of a file that was
    written."""
    shown = ("Avg. S", *METRICS)
    arms: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        rate = {name: row[name] for name in ("value", "low", "high", "prompts", "cases")}
        place = (row["data"], row["model"], row["arm"])
        arms.setdefault(place, {})[row["metric"]] = rate
    lines = [(*place, *rate_cells(rates, shown)) for place, rates in arms.items()]
    return _table(["data", "model", "arm", *shown], lines)


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
        (*place, str(rows[0]["prompts"]), *(_cell(row, "pearson", 2) for row in rows))
        for place, rows in _by(record, "data", "model", "kind", "damage")
    ]
    drifts = list(dict.fromkeys(row["drift"] for row in record["rows"]))
    return _table(["data", "model", "prompts", "damage", "number", *drifts], lines)


def restored_markdown(record: Mapping[str, Any]) -> str:
    """Figure 5: what original attention at the last token brings back, in per cent of what
    P(answer) lost, all layers and the best window of patterns."""
    lines = []
    for place, rows in _by(record, "data", "model", "kind"):
        whole = [row for row in rows if row["layers"] == "all"]
        windows = [r for r in rows if r["layers"] != "all" and r["patched"] == "pattern"]
        best = max(windows, key=lambda row: row["change of P(answer)"])
        lost = (_fixed(rows[0][f"lost {end}"], 3) for end in ("P(answer)", "low", "high"))
        lines.append(
            (
                *place,
                str(rows[0]["prompts"]),
                "{} [{}, {}]".format(*lost),
                *(_share(row) for row in whole),
                f"{best['layers']}: {_share(best)}",
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
    ]
    return _table(head, lines)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "table3": markdown,
    "fig3": substituted_markdown,
    "fig4": correlated_markdown,
    "fig5": restored_markdown,
}
"""Results as a table for a text."""


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


def _fixed(value: float | None, digits: int, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _cell(row: Mapping[str, Any], name: str, digits: int) -> str:
    """A number with its interval, if there is one."""
    value, low, high = (_fixed(row[f"{name}{end}"], digits) for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def _points(row: Mapping[str, Any], of: str = "P(answer)") -> str:
    ends = ("low", "high") if of == "P(answer)" else ("new low", "new high")
    found = (_fixed(100 * row[name], 1, "+") for name in (f"change of {of}", *ends))
    return "{} [{}, {}]".format(*found)


def _share(row: Mapping[str, Any]) -> str:
    """In per cent of what was lost, or in points where that is not sure to be anything."""
    if row["share, %"] is None:
        return f"{_points(row)} points"
    found = (_fixed(row[name], 0) for name in ("share, %", "share low", "share high"))
    return "{} % [{}, {}]".format(*found)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("assets/results"))
    parser.add_argument("--page", type=Path, help="HTML file with all that has been gathered.")
    options = parser.parse_args()
    if not options.folders and options.page is None:
        parser.error("give folders to gather, or --page, or both")
    command = " ".join(["python -m driftlens.experiments.gather", *sys.argv[1:]])
    try:
        written = gather(options.folders, options.out)
        if options.page is not None:
            write_result(options.page, page(options.out, command))
            written.append(options.page)
    except DriftLensError as error:
        sys.exit(f"Error: {error}")
    for path in written:
        if path.stem in TABLES and path.suffix == ".json":
            sys.stdout.write(TABLES[path.stem](json.loads(path.read_text("utf-8"))) + "\n")
        sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    main()
