"""What `driftlens reproduce` found on several models and data, as one file for each experiment.

    python -m driftlens.experiments.gather results/smollm2-135m results/gemma-3-270m

Each ``NAME.json`` then holds ``rows``, with model and data in each, and ``runs``: how each was
made, with which configurations, what its numbers say, and its figure. What was gathered before
stays, unless it is of the same model and data. ``--page PAGE.html`` shows all that has been
gathered, and ``--into TEXT.md`` writes it into a text, between lines like these:

    <!-- gathered fig5 -->
    <!-- end -->
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.io as pio

from driftlens.documents import Section, TableOf, document
from driftlens.errors import DataError, DriftLensError
from driftlens.experiments.reproduce import EXPERIMENTS
from driftlens.experiments.tables import TABLES, told_markdown
from driftlens.records import write_result

Place = tuple[str, str]
"""Model and data."""

OF_RUN = (
    "model", "data", "fingerprint", "command", "seed", "versions", "seconds_of_last_run",
    "text", "arms", "cases", "failed", "figure",
)  # fmt: skip
MORE: dict[str, Any] = {
    "points": [], "differences": [], "probabilities": [], "greedy": [], "seconds_in_all": None,
    "content": None,
}  # fmt: skip
"""What not all results hold, and what stands for it."""

START = re.compile(r"<!-- gathered (\w+) -->\n")
BLOCK = re.compile(rf"({START.pattern})(?:(?!<!-- gathered ).)*?(?=<!-- end -->)", re.DOTALL)
"""A place in a text for what was gathered, up to its end."""


def gather(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write one file for each experiment that is in any of the folders; what such a file holds of
    other models and data stays in it.

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
        new = {_place(record): record for record in records}
        if len(new) < len(records):
            raise DataError(
                f"Two results of {name} are of one model on the same data.", "Give each once."
            )
        target = out / f"{name}.json"
        kept = _apart(_gathered(target)) if target.is_file() else []
        both = {_place(record): record for record in kept} | new
        merged = _merged([*both.values()]) | {n: records[0][n] for n in ("title", "paper")}
        write_result(target, json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
        written.append(target)
    return written


def _place(record: Mapping[str, Any]) -> Place:
    return record["model"]["name"], record["data"]


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
    return {
        **{name: first[name] for name in ("name", "title", "paper")},
        "runs": [
            {name: record[name] for name in OF_RUN}
            | {name: record.get(name, otherwise) for name, otherwise in MORE.items()}
            for record in records
        ],
        "rows": [
            {"model": record["model"]["name"], "data": record["data"], **row}
            for record in records
            for row in record["rows"]
        ],
    }


def _apart(gathered: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results that were merged."""
    common = {name: gathered[name] for name in ("name", "title", "paper")}
    return [{**common, **run, "rows": _rows_of(gathered, run)} for run in gathered["runs"]]


def _rows_of(gathered: Mapping[str, Any], run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run's own rows, without model and data."""
    return [
        {name: value for name, value in row.items() if name not in ("model", "data")}
        for row in gathered["rows"]
        if (row["model"], row["data"]) == _place(run)
    ]


def _gathered(path: Path) -> dict[str, Any]:
    """A file that :func:`gather` wrote."""
    try:
        return _merged(_apart(json.loads(path.read_text("utf-8"))))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path} is damaged.", "Delete it, and gather all of its results again."
        ) from error


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
    sections = [section for path in there for section in _sections(_gathered(path))]
    return document(
        "The paper's experiments",
        ["What each command below found, beside what the paper reports."],
        command,
        sections,
    )


def _sections(gathered: Mapping[str, Any]) -> Iterator[Section]:
    """One for each run of an experiment."""
    for number, run in enumerate(gathered["runs"]):
        own = pd.DataFrame(_rows_of(gathered, run))
        yield Section(
            f"{gathered['name']}-{number}",
            f"{gathered['title']}: {run['model']['name']}, {run['data']}",
            texts=[f"{len(run['cases'])} cases{_spent(run, ', ')}: {run['command']}", run["text"]],
            points=run["points"],
            figures=[] if run["figure"] is None else [pio.from_json(json.dumps(run["figure"]))],
            tables=[TableOf("Numbers", own, folded=True)],
            aside="" if number else f"The paper: {gathered['paper']}",
        )


def _spent(run: Mapping[str, Any], before: str) -> str:
    """How long all that was measured took, behind something; nothing where that is not known."""
    seconds = run["seconds_in_all"]
    if seconds is None:
        return ""
    minutes = seconds / 60
    if minutes >= 90:
        return f"{before}{minutes / 60:.1f} hours of work"
    return f"{before}{max(1, round(minutes))} minute{'s' * (minutes >= 1.5)} of work"


def fill(text: str, folder: Path) -> str:
    """A text with what has been gathered in its places: a table, or what the numbers say, and the
    commands, with the time that each took.

    Args:
        text: Markdown with lines like ``<!-- gathered fig5 -->`` and ``<!-- end -->``.
        folder: That :func:`gather` wrote to.

    Raises:
        DataError: If there is no place, one has no end, what it names has not been gathered, or a
            file is damaged.
    """
    starts, whole = START.findall(text), [match[2] for match in BLOCK.finditer(text)]
    if not starts or starts != whole:
        missing = next((name for name in starts if name not in whole), "fig5")
        raise DataError(
            f"The text has {len(starts)} lines like <!-- gathered {missing} -->, and {len(whole)} "
            "with an end.",
            "Write a line <!-- end --> below each.",
        )

    def block(match: re.Match[str]) -> str:
        name = match[2]
        path = folder / f"{name}.json"
        if not path.is_file():
            raise DataError(f"{folder} holds no gathered {name}.", "Gather it first.")
        record = _gathered(path)
        commands = dict.fromkeys(
            f"    {run['command']}{_spent(run, f'  # {name}: ')}" for run in record["runs"]
        )
        shown = TABLES.get(name, told_markdown)(record)
        return "\n".join([match[1], shown, "", *commands, "", ""])

    return BLOCK.sub(block, text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("assets/results"))
    parser.add_argument("--page", type=Path, help="HTML file with all that has been gathered.")
    parser.add_argument("--into", type=Path, nargs="+", default=[], help="Texts to write it into.")
    options = parser.parse_args()
    if not options.folders and options.page is None and not options.into:
        parser.error("give folders to gather, or --page, or --into")
    command = f"python -m driftlens.experiments.gather {shlex.join(sys.argv[1:])}"
    try:
        written = gather(options.folders, options.out)
        if options.page is not None:
            write_result(options.page, page(options.out, command))
            written.append(options.page)
        for path in options.into:
            write_result(path, fill(_text(path), options.out))
            written.append(path)
    except DriftLensError as error:
        sys.exit(f"Error: {error}")
    for path in written:
        sys.stdout.write(f"wrote {path}\n")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.", "Give a text in UTF-8.") from error


if __name__ == "__main__":
    main()
