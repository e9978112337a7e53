"""Every editor, with and without SADR, on the same cases: one table.

    python -m driftlens.experiments.editors --data FILE --cases 60

Cases are those of the paper's file that no hyperparameter was chosen on (``--data`` names it;
it is not part of the project). Each (method, restriction, case) is written as soon as it is
finished, and a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import driftlens as dl
from driftlens.cases import METRICS, Case, balanced, tuning_split
from driftlens.editing.defaults import sadr_gamma
from driftlens.editing.methods import METHODS, resolve_config
from driftlens.edits import write_atomically
from driftlens.errors import DriftLensError
from driftlens.evaluation import Answer, answers, rate_cells, rates
from driftlens.journal import Journal
from driftlens.readers import read_cases


def edit_cases(
    model: dl.LensModel,
    cases: Sequence[Case],
    method: str,
    config: Any,
    penalties: Sequence[dl.Penalty] = (),
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Edit cases one by one from the same model, ask everything, and undo it.

    Values of several cases are searched in shared passes. A case that cannot be edited gets a
    record with its ``error``.
    """
    options: dict[str, Any] = {"config": config, "penalty": list(penalties), "progress": False}

    def record(case: Case, edit: dl.Edit) -> dict[str, Any]:
        with edit.applied(model):
            found = answers(model, case)
        return {
            "answers": [answer.to_dict() for answer in found],
            "seconds": edit.info["seconds"],
            "steps": len(edit.trace),
            "target_prob": edit.trace[-1]["target_prob"],
        }

    for first in range(0, len(cases), CASES_AT_ONCE):
        part = cases[first : first + CASES_AT_ONCE]
        try:
            edits = list(dl.edit_each(model, [case.request for case in part], method, **options))
        except DriftLensError:  # one of them: find out which
            edits = []
        for i, case in enumerate(part):
            try:
                made = edits[i] if edits else dl.edit(model, case.request, method, **options)
                yield case, record(case, made)
            except DriftLensError as error:
                yield case, {"error": str(error)}


CASES_AT_ONCE = 16


def run(model_name: str, cases: Sequence[Case], methods: Sequence[str], out: Path) -> Path:
    """Everything that is not in the journal yet, and the table of what is."""
    model = dl.load_model(model_name)
    fingerprint = model.fingerprint()
    journal = Journal(out / f"editors-{model_name}.cases.jsonl")
    configs = {method: resolve_config(model, method) for method in methods}
    gammas = {method: sadr_gamma(model, method) for method in methods}
    arms: list[tuple[str, tuple[dl.Penalty, ...]]] = []
    for method in methods:
        arms += [(method, ()), (method, (dl.SADR(gamma=gammas[method]),))]

    def unit(case: Case, method: str, penalties: Sequence[dl.Penalty] = ()) -> dict[str, Any]:
        identity = {"model": fingerprint[:16], "method": method, "case": case.id}
        if method == "none":
            return identity
        held = [penalty.to_dict() for penalty in penalties]
        return {**identity, "config": asdict(configs[method]), "penalties": held}

    for case in tqdm(cases, desc="unedited"):
        if unit(case, "none") not in journal:
            found = [answer.to_dict() for answer in answers(model, case)]
            journal.add(unit(case, "none"), answers=found)
    # Part by part of the cases, so that a stopped run has something of every method.
    for first in tqdm(range(0, len(cases), CASES_AT_ONCE), desc="parts of the cases"):
        part = cases[first : first + CASES_AT_ONCE]
        for method, penalties in tqdm(arms, desc="editors", leave=False):
            missing = [case for case in part if unit(case, method, penalties) not in journal]
            for case, record in edit_cases(model, missing, method, configs[method], penalties):
                journal.add(unit(case, method, penalties), **record)
            if model.fingerprint() != fingerprint:
                raise SystemExit("The model's weights are not what they were before.")
    rows = [_row("none", "none", [journal[unit(case, "none")] for case in cases])]
    for method, penalties in arms:
        records = [journal[unit(case, method, penalties)] for case in cases]
        rows.append(_row(method, "sadr" if penalties else "none", records))
    result = {
        "model": model.info.to_dict(),
        "fingerprint": fingerprint,
        "cases": [case.id for case in cases],
        "configs": {method: asdict(config) for method, config in configs.items()},
        "sadr_gamma": gammas,
        "command": f"python -m driftlens.experiments.editors --model {model_name} "
        f"--data FILE --cases {len(cases)}",
        "versions": {
            "driftlens": dl.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "rows": rows,
    }
    target = out / f"editors-{model_name}.json"
    write_atomically(target, (json.dumps(result, indent=1) + "\n").encode())
    return target


def _row(method: str, restriction: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    finished = [record for record in records if "answers" in record]
    found = rates([[Answer(**a) for a in record["answers"]] for record in finished])
    row: dict[str, Any] = {
        "method": method,
        "restriction": restriction,
        "cases": len(finished),
        "failed": [record["error"] for record in records if "error" in record],
        "rates": {metric: asdict(rate) for metric, rate in found.items()},
    }
    seconds = [record["seconds"] for record in finished if "seconds" in record]
    if seconds:
        row["seconds_per_edit"] = float(np.median(seconds))
    return row


def markdown(result: dict[str, Any]) -> str:
    """Success in per cent with 95 % intervals, and median seconds per edit."""
    lines = [
        f"| editor | SADR | {' | '.join(METRICS)} | seconds |",
        "|---" * (3 + len(METRICS)) + "|",
    ]
    for row in result["rows"]:
        cells = rate_cells(row["rates"])
        seconds = f"{row['seconds_per_edit']:.1f}" if "seconds_per_edit" in row else "-"
        gamma = result["sadr_gamma"].get(row["method"]) if row["restriction"] == "sadr" else "-"
        lines.append(f"| {row['method']} | {gamma} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def arguments(
    description: str, cases: int, out: Path, counted: str = "cases"
) -> argparse.ArgumentParser:
    """What the experiments on the paper's cases have in common.

    Args:
        cases: How many cases by default.
        out: Where results go by default.
        counted: What the option for their number is called.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="the paper's merged file")
    parser.add_argument(f"--{counted}", type=int, default=cases)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path, default=out)
    return parser


def main() -> None:
    """Command line."""
    started = time.monotonic()
    options = arguments(__doc__ or "", 60, Path("assets/results")).parse_args()
    try:
        _, reported = tuning_split(read_cases(options.data))
        cases = balanced(reported, options.cases)
        target = run(options.model, cases, options.methods, options.out)
    except DriftLensError as error:
        sys.exit(f"Error: {error}")
    sys.stdout.write(markdown(json.loads(target.read_text("utf-8"))) + "\n")
    sys.stdout.write(f"wrote {target} ({time.monotonic() - started:.0f} s)" + "\n")


if __name__ == "__main__":
    main()
