"""What a model knows of the shipped facts before any edit.

    python -m driftlens.experiments.known --model smollm2-135m

For each fact: the probability of the true answer to the prompt that is edited, whether greedy
decoding gives it, and of which of its other prompts greedy decoding gives the answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import driftlens as dl
from driftlens.assets import asset
from driftlens.cases import Case
from driftlens.errors import DataError, DriftLensError
from driftlens.experiments.options import add_model
from driftlens.readers import read_cases
from driftlens.records import data_file, result_json, versions, write_result
from driftlens.scoring import ask, score_questions

KINDS = ("paraphrases", "neighbours", "relations", "distractors")


def known(model: dl.LensModel, case: Case) -> dict[str, Any]:
    """What the model, as it is now, knows of a case: of each of `KINDS` how many prompts it is
    asked, of how many it knows the answer, and of which it does not.

    Raises:
        DataError: If the case does not say what is true now.
    """
    request = case.request
    if request.target_true is None:
        raise DataError(f"Case {case.id} has no target_true.", "Say what is true before the edit.")
    asked = {"fact": [(request.text, request.target_true)]}
    asked["paraphrases"] = [(prompt, request.target_true) for prompt in case.paraphrases]
    asked |= {kind: [tuple(query) for query in getattr(case, kind)] for kind in KINDS[1:]}
    flat = [(kind, prompt, answer) for kind, pairs in asked.items() for prompt, answer in pairs]
    scores = score_questions(model, [ask(model, prompt, answer) for _, prompt, answer in flat])
    unknown: dict[str, list[str]] = {kind: [] for kind in asked}
    for (kind, prompt, _), found in zip(flat, scores, strict=True):
        if found.rank > 0:
            unknown[kind].append(prompt)
    return {
        "id": case.id,
        "category": case.category,
        "prob": scores[0].prob,
        "known": not unknown["fact"],
        **{
            kind: {
                "known": len(asked[kind]) - len(unknown[kind]),
                "asked": len(asked[kind]),
                "unknown": unknown[kind],
            }
            for kind in KINDS
        },
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many facts and other prompts are known."""
    return {
        "facts": {"known": sum(row["known"] for row in rows), "asked": len(rows)},
        **{
            kind: {part: sum(row[kind][part] for row in rows) for part in ("known", "asked")}
            for kind in KINDS
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--out", type=Path, default=Path("assets/results"))
    options = parser.parse_args()
    try:
        model = dl.load_model(options.model, device=options.device)
        rows = [known(model, case) for case in tqdm(read_cases(asset("facts.jsonl")), unit="fact")]
        summary = summarise(rows)
        result = {
            "model": model.info.to_dict(),
            "fingerprint": model.fingerprint(),
            "data": data_file(asset("facts.jsonl")),
            "versions": versions(),
            "command": f"python -m driftlens.experiments.known --model {options.model}",
            "summary": summary,
            "facts": rows,
        }
        target = options.out / f"known-{options.model}.json"
        write_result(target, result_json(result))
    except DriftLensError as error:
        sys.exit(f"Error: {error}")
    for kind, counts in summary.items():
        sys.stdout.write(f"{kind}: {counts['known']} of {counts['asked']}\n")
    sys.stdout.write(f"wrote {target}\n")


if __name__ == "__main__":
    main()
