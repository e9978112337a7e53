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
from collections.abc import Iterator, Mapping, Sequence
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
    lines = [f"| data | model | arm | {' | '.join(shown)} |", "|---" * (3 + len(shown)) + "|"]
    arms: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        rate = {name: row[name] for name in ("value", "low", "high", "prompts", "cases")}
        place = (row["data"], row["model"], row["arm"])
        arms.setdefault(place, {})[row["metric"]] = rate
    for place, rates in arms.items():
        lines.append(f"| {' | '.join((*place, *rate_cells(rates, shown)))} |")
    return "\n".join(lines)


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
        if path.name == "table3.json":
            sys.stdout.write(markdown(json.loads(path.read_text("utf-8"))) + "\n")
        sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    main()
