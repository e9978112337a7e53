"""Many facts in one model: all at once, and one after another.

    python -m driftlens.experiments.many --data FILE --facts 100

For each editor: a batch (where the method takes several facts) and a sequence of the same facts,
and how many of them the model then answers, with paraphrases, neighbours and relations. Each
(method, way) is written as soon as it is finished.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import driftlens as dl
from driftlens.cases import METRICS, Case, balanced, tuning_split
from driftlens.editing.methods import METHODS, resolve_config
from driftlens.errors import DriftLensError
from driftlens.evaluation import answers, rate_cells, rates
from driftlens.experiments.options import arguments
from driftlens.journal import Journal
from driftlens.readers import read_cases
from driftlens.records import write_result

CHECKPOINTS = (1, 10, 25, 50, 100, 200, 500, 1000)


def asked(model: dl.LensModel, cases: Sequence[Case], title: str) -> dict[str, Any]:
    """Rates over cases, of the model as it is now."""
    found = rates([answers(model, case) for case in tqdm(cases, desc=title, leave=False)])
    return {metric: asdict(rate) for metric, rate in found.items()}


def batch(model: dl.LensModel, cases: Sequence[Case], method: str, config: Any) -> dict[str, Any]:
    """All facts at once."""
    edit = dl.edit(model, [case.request for case in cases], method, config=config, progress=False)
    with edit.applied(model):
        found = asked(model, cases, f"{method}, batch")
    return {"rates": found, "seconds": edit.info["seconds"], "rank": edit.rank}


def sequence(
    model: dl.LensModel, cases: Sequence[Case], method: str, config: Any
) -> dict[str, Any]:
    """One fact after another, asked about on the way."""
    started, spent = time.monotonic(), 0.0
    checkpoints: dict[str, Any] = {}

    def look(n: int, current: dl.LensModel) -> None:
        nonlocal spent
        if n in CHECKPOINTS or n == len(cases):
            begun = time.monotonic()
            checkpoints[str(n)] = asked(current, cases[:n], f"{method}, after {n}")
            spent += time.monotonic() - begun

    edit = dl.edit_sequence(
        model, [case.request for case in cases], method, config=config, after_each=look,
        progress=False,
    )  # fmt: skip
    return {
        "rates": checkpoints[str(len(cases))],
        "checkpoints": checkpoints,
        "seconds": time.monotonic() - started - spent,
        "rank": edit.rank,
    }


def run(model_name: str, cases: Sequence[Case], methods: Sequence[str], out: Path) -> Path:
    """Everything that is not in the journal yet, and a file with what is."""
    model = dl.load_model(model_name)
    fingerprint = model.fingerprint()
    journal = Journal(out / f"many-{model_name}.jsonl")
    rows = []
    for method in methods:
        config = resolve_config(model, method)
        ways = {"sequence": sequence}
        if METHODS[method].takes_several:
            ways = {"batch": batch, **ways}
        for way, function in ways.items():
            unit = {
                "model": fingerprint[:16], "method": method, "way": way,
                "config": asdict(config), "cases": [case.id for case in cases],
            }  # fmt: skip
            if unit not in journal:
                try:
                    record = function(model, cases, method, config)
                except DriftLensError as error:
                    record = {"error": str(error)}
                journal.add(unit, **record)
            found = {k: v for k, v in journal[unit].items() if k != "unit"}
            rows.append({"method": method, "way": way, "config": unit["config"], **found})
    result = {
        "model": model.info.to_dict(),
        "cases": [case.id for case in cases],
        "command": f"python -m driftlens.experiments.many --model {model_name} --data FILE "
        f"--facts {len(cases)} --methods {' '.join(methods)}",
        "rows": rows,
    }
    target = out / f"many-{model_name}.json"
    write_result(target, json.dumps(result, indent=1) + "\n")
    return target


def markdown(result: dict[str, Any]) -> str:
    """Success in per cent after all facts, with 95 % intervals over facts, and seconds."""
    lines = [f"| editor | way | {' | '.join(METRICS)} | seconds |", "|---" * 8 + "|"]
    for row in result["rows"]:
        if "error" in row:
            lines.append(f"| {row['method']} | {row['way']} | {row['error']} |" + " |" * 5)
            continue
        cells = rate_cells(row["rates"])
        lines.append(
            f"| {row['method']} | {row['way']} | {' | '.join(cells)} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    options = arguments(__doc__ or "", 100, Path("assets/results"), "facts").parse_args()
    try:
        _, reported = tuning_split(read_cases(options.data))
        cases = balanced(reported, options.facts)
        target = run(options.model, cases, options.methods, options.out)
    except DriftLensError as error:
        sys.exit(f"Error: {error}")
    sys.stdout.write(markdown(json.loads(target.read_text("utf-8"))) + f"\nwrote {target}\n")


if __name__ == "__main__":
    main()
