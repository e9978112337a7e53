"""Many facts in one model: all at once, and one after another.

    python -m driftlens.experiments.many --data FILE --facts 100

For each editor: a batch (where the method takes several facts) and a sequence of the same facts,
and how many of them the model then answers, with paraphrases, neighbours and relations. The
first row is the unedited model's. Each (editor, restriction, way) is written as soon as it is
finished. Prompts that ask for what another of the edits changes are left out.
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
from driftlens.bench import UNEDITED, Arm, make_arms
from driftlens.bench.units import COVARIANCE, content_digest, is_failure, reason
from driftlens.cases import METRICS, Case, balanced, tuning_split, without_edited_facts
from driftlens.editing.methods import METHODS
from driftlens.errors import DriftLensError
from driftlens.evaluation import Answer, answers, rate_cells, rates
from driftlens.experiments.options import arguments
from driftlens.journal import Journal
from driftlens.readers import read_cases
from driftlens.records import data_file, plain, result_json, versions, write_result

CHECKPOINTS = (1, 10, 25, 50, 100, 200, 500, 1000)


def requests(cases: Sequence[Case]) -> list[dl.EditRequest]:
    """The edits of cases."""
    return [case.request for case in cases]


def asked(
    model: dl.LensModel, cases: Sequence[Case], title: str, progress: bool = True
) -> list[list[Answer]]:
    """Answers to each case, of the model as it is now."""
    bar = tqdm(cases, desc=title, leave=False, disable=not progress)
    return [answers(model, case) for case in bar]


def rated(found: Sequence[list[Answer]]) -> dict[str, Any]:
    """Rates of metrics, JSON-ready."""
    return {metric: plain(asdict(rate)) for metric, rate in rates(found).items()}


def _by_case(cases: Sequence[Case], found: Sequence[list[Answer]]) -> dict[str, Any]:
    """Answers to each case, JSON-ready."""
    return {
        case.id: [answer.to_dict() for answer in own]
        for case, own in zip(cases, found, strict=True)
    }


def _counts(cases: Sequence[Case]) -> list[int]:
    """Numbers of facts after which is asked."""
    return [*(n for n in CHECKPOINTS if n < len(cases)), len(cases)]


def unedited(
    model: dl.LensModel, cases: Sequence[Case], arm: Arm, seed: int, progress: bool
) -> dict[str, Any]:
    """No fact; what a sequence is to be compared with after each number of facts."""
    found = asked(model, cases, arm.name, progress)
    checkpoints = {str(n): rated(found[:n]) for n in _counts(cases)}
    return {
        "rates": checkpoints[str(len(cases))],
        "checkpoints": checkpoints,
        "answers": _by_case(cases, found),
    }


def batch(
    model: dl.LensModel, cases: Sequence[Case], arm: Arm, seed: int, progress: bool
) -> dict[str, Any]:
    """All facts at once."""
    edit = dl.edit(model, requests(cases), **arm.edit_options(seed))
    with edit.applied(model):
        found = asked(model, cases, f"{arm.name}, batch", progress)
    return {
        "rates": rated(found),
        "answers": _by_case(cases, found),
        "seconds": edit.info["seconds"],
        "rank": edit.rank,
    }


def sequence(
    model: dl.LensModel, cases: Sequence[Case], arm: Arm, seed: int, progress: bool
) -> dict[str, Any]:
    """One fact after another; those so far are asked about on the way."""
    started, spent = time.monotonic(), 0.0
    checkpoints: dict[str, Any] = {}
    found: list[list[Answer]] = []

    def look(n: int, current: dl.LensModel) -> None:
        nonlocal spent, found
        bar.update()
        if n in _counts(cases):
            begun = time.monotonic()
            found = asked(current, cases[:n], f"{arm.name}, after {n}", progress)
            checkpoints[str(n)] = rated(found)
            spent += time.monotonic() - begun

    with tqdm(desc=arm.name, total=len(cases), disable=not progress, leave=False) as bar:
        try:
            edit = dl.edit_sequence(
                model, requests(cases), after_each=look, **arm.edit_options(seed)
            )
        except Exception as error:
            if not is_failure(error):
                raise
            return {"error": reason(error), "checkpoints": checkpoints}
    return {
        "rates": checkpoints[str(len(cases))],
        "checkpoints": checkpoints,
        "answers": _by_case(cases, found),
        "seconds": time.monotonic() - started - spent,
        "rank": edit.rank,
    }


WAYS = {"batch": batch, "sequence": sequence, UNEDITED: unedited}


def measure(
    model: dl.LensModel,
    cases: Sequence[Case],
    arm: Arm,
    way: str,
    journal: Journal,
    *,
    seed: int = 0,
    retry_failed: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """What is answered after all facts, edited in one of the `WAYS`, or why they cannot be.

    Args:
        model: The unedited model.
        cases: The facts, in order. What asks for another of them is left out
            (:func:`~driftlens.cases.without_edited_facts`).
        arm: The editor and its restrictions.
        way: ``"batch"``, ``"sequence"`` or ``"unedited"``.
        journal: Where the result is kept, and found if it is there already.
        seed: Of the sampled contexts.
        retry_failed: Try again what failed before.
        progress: Whether to show bars.

    Returns:
        ``rates`` of metrics after all facts, ``seconds``, ``rank`` and, of a sequence,
        ``checkpoints``: the rates over the facts so far after some of them; of the unedited
        model the rates over the same facts. ``answers``: those after all facts, by case. Or
        ``error``, with the checkpoints before it. And ``spent``: the seconds that all of it took,
        asking included.
    """
    cases = without_edited_facts(cases)
    unit = {
        **model.identity(), **arm.to_dict(), "way": way, "seed": seed, "covariance": COVARIANCE,
        "cases": [case.id for case in cases], "content": content_digest(cases), "metrics": METRICS,
    }  # fmt: skip
    made_by = versions()
    journal.warn_of_other_versions([unit], made_by)
    if not journal.is_finished(unit, retry_failed):
        started = time.monotonic()
        try:
            record = WAYS[way](model, cases, arm, seed, progress)
        except Exception as error:
            if not is_failure(error):
                raise
            record = {"error": reason(error)}
        journal.add(unit, **record, spent=time.monotonic() - started, versions=made_by)
    return {k: v for k, v in journal[unit].items() if k not in ("unit", "versions")}


def run(
    model: dl.LensModel,
    cases: Sequence[Case],
    methods: Sequence[str],
    out: Path,
    penalties: Sequence[str] = ("none",),
    retry_failed: bool = False,
    data: Path | None = None,
) -> Path:
    """Everything that is not in the journal yet, and a file with what is.

    Args:
        data: The file that the cases are from, for the record; the others are those of
            :func:`measure` and :func:`~driftlens.bench.make_arms`.
    """
    name = model.info.name
    journal = Journal(out / f"many-{name}.jsonl")
    rows = []
    for arm in make_arms(model, methods, penalties):
        for way in _ways(arm):
            found = measure(model, cases, arm, way, journal, retry_failed=retry_failed)
            found.pop("answers", None)  # they stay in the journal
            rows.append({"arm": arm.name, **arm.to_dict(), "way": way, **found})
    result = {
        "model": model.info.to_dict(),
        "fingerprint": model.fingerprint(),
        "versions": versions(),
        "data": None if data is None else data_file(data),
        "cases": [case.id for case in cases],
        "command": f"python -m driftlens.experiments.many --model {name} "
        f"--data {'FILE' if data is None else data.name} --facts {len(cases)} "
        f"--methods {' '.join(methods)} --penalties {' '.join(penalties)}",
        "rows": rows,
    }
    target = out / f"many-{name}.json"
    write_result(target, result_json(result))
    return target


def _ways(arm: Arm) -> tuple[str, ...]:
    if arm.method is None:
        return (UNEDITED,)
    return ("batch", "sequence") if METHODS[arm.method].takes_several else ("sequence",)


def markdown(result: dict[str, Any]) -> str:
    """Success in per cent after all facts, with 95 % intervals over facts."""
    lines = [
        f"| editor | way | {' | '.join(METRICS)} |",
        "|---" * (2 + len(METRICS)) + "|",
    ]
    for row in result["rows"]:
        if "error" in row:
            cells = [row["error"], *[""] * (len(METRICS) - 1)]
        else:
            cells = rate_cells(row["rates"])
        way = "-" if row["way"] == UNEDITED else row["way"]
        lines.append(f"| {row['arm']} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", 100, Path("assets/results"), "facts")
    parser.add_argument("--penalties", nargs="+", default=["none"], help="none, or names")
    parser.add_argument("--retry-failed", action="store_true", help="try again what failed")
    options = parser.parse_args()
    try:
        _, reported = tuning_split(read_cases(options.data))
        cases = balanced(reported, options.facts)
        model = dl.load_model(options.model, device=options.device)
        target = run(
            model, cases, options.methods, options.out, options.penalties, options.retry_failed,
            options.data,
        )  # fmt: skip
    except DriftLensError as error:
        sys.exit(f"Error: {error}")
    sys.stdout.write(markdown(json.loads(target.read_text("utf-8"))) + f"\nwrote {target}\n")


if __name__ == "__main__":
    main()
