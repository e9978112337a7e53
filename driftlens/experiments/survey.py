"""What an edit does to other knowledge, and what brings it back, over many facts.

For each fact: edit it with ROME, and with ROME + SADR with as many steps at most. Then ask

- *relation* prompts: other facts about the edited subject,
- *distractor* prompts: the subject is mentioned, then another subject is asked about,
- *distract neighbourhood* prompts: the edited sentence, then another subject is asked about,

of the original model, the edited one, the edited one with parts of the original restored, and
the one edited with SADR. Only prompts whose answer the original model gives by greedy decoding
are counted, so that there is something to lose; how many those are is reported.

Run it: ``python -m driftlens.experiments.survey --model smollm2-135m``
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import driftlens as dl
from driftlens.assets import asset
from driftlens.bench.units import COVARIANCE, content_digest
from driftlens.cases import Case, Metric
from driftlens.editing.defaults import sadr_gamma
from driftlens.editing.methods import resolve_config
from driftlens.errors import DataError, DriftLensError, RequestError
from driftlens.evaluation import difference
from driftlens.experiments.options import add_model, positive
from driftlens.intervals import bootstrap_interval, with_interval
from driftlens.journal import Journal
from driftlens.readers import read_cases
from driftlens.records import result_json, versions, write_result
from driftlens.scoring import score_details

RESTORATIONS: dict[str, dict[str, Any]] = {
    "pattern": {"exchange": "pattern"},
    "pattern, all rows": {"exchange": "pattern", "queries": "all"},
    "values": {"exchange": "values"},
    "pattern and values": {"exchange": "both"},
}
"""What of the original's attention is put back, in all layers and heads."""


KINDS: dict[Metric, str] = {
    "RS": "relation",
    "distractor": "distractor",
    "DNS": "distract neighbourhood",
}
"""Metrics that ask what the edit must not change, and what their prompts are called."""


@dataclass(frozen=True)
class Probe:
    """One prompt whose answer the edit must not change."""

    kind: str
    prompt: str
    answer: str


def probes_of(case: Case, separator: str) -> list[Probe]:
    """All prompts of a case that the edit must not change, as a benchmark asks them."""
    return [
        Probe(kind, probe.prompt, probe.right)
        for metric, kind in KINDS.items()
        for probe in case.probes((metric,), separator)
    ]


def survey_case(model: dl.LensModel, case: Case, gamma: float) -> dict[str, Any]:
    """Everything measured for one edit."""
    request = case.request
    asked = probes_of(case, model.tokens.separator)
    known = [p for p in asked if _is_known(model, p)]
    edit = dl.edit(model, request, progress=False)
    cured = dl.edit(model, request, penalty=dl.SADR(gamma=gamma), progress=False)
    record: dict[str, Any] = {
        "edit_success": {
            "original": _prob(model, request.text, request.target_new),
            "edited": _prob(model, request.text, request.target_new, edit),
            "sadr": _prob(model, request.text, request.target_new, cured),
        },
        "asked": len(asked),
        "probes": [],
    }
    for probe in known:
        record["probes"].append(
            {
                "kind": probe.kind,
                "prompt": probe.prompt,
                "answer": probe.answer,
                "states": dict(_states(model, edit, cured, probe, request.target_new)),
            }
        )
    return record


def _states(
    model: dl.LensModel, edit: dl.Edit, cured: dl.Edit, probe: Probe, new: str
) -> Iterator[tuple[str, dict[str, float]]]:
    """P(answer) and P(new target) of one prompt in every state."""
    experiment = dl.PatchExperiment(model, edit, probe.prompt, answer=probe.answer, compare=[new])
    yield "original", _pair(experiment.original, new)
    yield "edited", _pair(experiment.edited, new)
    for name, options in RESTORATIONS.items():
        yield f"restored: {name}", _pair(experiment.attention(**options).patched, new)
    mlp = experiment.activation("mlp_out")
    yield "restored: MLP output", _pair(mlp.patched, new)
    with cured.applied(model):
        scores = score_details(model, probe.prompt, [probe.answer, new])
    yield "sadr", {"answer": scores[probe.answer].prob, "target_new": scores[new].prob}


def _pair(readout: dl.Readout, new: str) -> dict[str, float]:
    return {"answer": readout.prob, "target_new": readout[new].prob}


def _is_known(model: dl.LensModel, probe: Probe) -> bool:
    return score_details(model, probe.prompt, [probe.answer])[probe.answer].rank == 0


def _prob(model: dl.LensModel, prompt: str, text: str, edit: dl.Edit | None = None) -> float:
    if edit is None:
        return score_details(model, prompt, [text])[text].prob
    with edit.applied(model):
        return _prob(model, prompt, text)


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Averages by kind of prompt and state, with 95 % intervals by bootstrap over facts.

    ``answer`` and ``target_new`` are mean probabilities, ``beats_target_new`` the share of
    prompts on which the answer is likelier than the new target. ``less_edited`` holds paired
    differences of P(answer): each state less the edited model, on the same prompts.
    """
    kinds = list(dict.fromkeys(p["kind"] for r in records for p in r["probes"]))
    summary: dict[str, Any] = {"facts": len(records), "kinds": {}}
    summary["edit_success"] = {
        state: float(np.mean([r["edit_success"][state] for r in records]))
        for state in ("original", "edited", "sadr")
    }
    for kind in kinds:
        groups = [[p for p in r["probes"] if p["kind"] == kind] for r in records]
        groups = [g for g in groups if g]
        states = list(groups[0][0]["states"])
        summary["kinds"][kind] = {
            "prompts": sum(map(len, groups)),
            "facts": len(groups),
            "states": {
                state: {
                    **_mean_and_interval(groups, state, "answer"),
                    **_mean_and_interval(groups, state, "target_new"),
                    **_mean_and_interval(groups, state, "beats_target_new"),
                }
                for state in states
            },
            "less_edited": {
                state: _less_edited(groups, state)
                for state in states
                if state not in ("original", "edited")
            },
        }
    return summary


def markdown(result: dict[str, Any]) -> str:
    """The mean probability of the answer by state and kind of prompt, as a Markdown table."""
    kinds = result["kinds"]
    heads = [f"{kind} ({content['prompts']} prompts)" for kind, content in kinds.items()]
    lines = [f"| P(answer) | {' | '.join(heads)} |", "|---" * (1 + len(kinds)) + "|"]
    for state in next(iter(kinds.values()))["states"]:
        cells = []
        for content in kinds.values():
            values = content["states"][state]
            cells.append(with_interval(values["answer"], *values["answer_interval"], digits=3))
        lines.append(f"| {state} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paired_markdown(result: dict[str, Any]) -> str:
    """Paired differences of P(answer), each state less the edited model, as a Markdown table."""
    kinds = result["kinds"]
    lines = [f"| less edited | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for state in next(iter(kinds.values()))["less_edited"]:
        found = [content["less_edited"][state] for content in kinds.values()]
        cells = [with_interval(c["value"], c["low"], c["high"], digits=3, sign="+") for c in found]
        lines.append(f"| {state} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _less_edited(groups: Sequence[Sequence[dict[str, Any]]], state: str) -> dict[str, Any]:
    gains = [
        sum(p["states"][state]["answer"] - p["states"]["edited"]["answer"] for p in group)
        for group in groups
    ]
    found = difference(np.array(gains), np.array([len(group) for group in groups]))
    return {name: value for name, value in asdict(found).items() if name != "effect"}


def _mean_and_interval(
    groups: Sequence[Sequence[dict[str, Any]]], state: str, measure: str
) -> dict[str, Any]:
    def value(probe: dict[str, Any]) -> float:
        pair = probe["states"][state]
        if measure == "beats_target_new":
            return float(pair["answer"] > pair["target_new"])
        return float(pair[measure])

    sums = np.array([sum(value(p) for p in g) for g in groups])
    counts = np.array([len(g) for g in groups])
    return {
        measure: float(sums.sum() / counts.sum()),
        f"{measure}_interval": list(bootstrap_interval(sums, counts)),
    }


def run(
    model_name: str,
    cases: Sequence[Case],
    out: Path,
    gamma: float | None,
    device: str | None = None,
) -> None:
    """Survey the cases; each one is written at once, so a stopped run goes on where it was.

    Raises:
        RequestError: If the model answers none of their prompts.
    """
    model = dl.load_model(model_name, device=device)
    gamma = sadr_gamma(model, "rome") if gamma is None else gamma
    key = {
        "model": model_name,
        "fingerprint": model.fingerprint(),
        "config": asdict(resolve_config(model, "rome")),
        "gamma": gamma,
    }
    journal = Journal(out / f"survey-{model_name}.facts.jsonl")
    started = time.monotonic()
    common = {
        **model.identity(), "config": key["config"], "gamma": gamma, "covariance": COVARIANCE,
    }  # fmt: skip
    units = [{**common, "id": case.id, "content": content_digest([case])} for case in cases]
    for unit, case in zip(units, tqdm(cases, desc="facts"), strict=True):
        if unit not in journal:
            journal.add(unit, **survey_case(model, case, gamma))
    found = summarise([journal[unit] for unit in units])
    if not found["kinds"]:
        raise RequestError(
            f"{model_name} answers no prompt of these {len(cases)} facts by greedy decoding.",
            "Give more facts, or another model.",
        )
    result = {
        **key,
        "weights": model.info.weights,
        "method": "rome",
        "command": f"python -m driftlens.experiments.survey --model {model_name} "
        f"--facts {len(cases)} --gamma {gamma}",
        "seconds_of_last_run": round(time.monotonic() - started),
        "versions": versions(),
        **found,
    }
    target = out / f"survey-{model_name}.json"
    write_result(target, result_json(result))


def summarise_again(model_name: str, out: Path) -> None:
    """Write the averages of a finished survey anew, from its journal, without the model.

    Raises:
        DataError: If there is no such survey, or its journal lacks facts.
    """
    target, journal = out / f"survey-{model_name}.json", out / f"survey-{model_name}.facts.jsonl"
    remedy = "Run the survey without --summary-only."
    try:
        result = json.loads(target.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{target} is not there, or damaged.", remedy) from error
    wanted = [result[name] for name in ("fingerprint", "config", "gamma")]
    parts = ("model", "config", "gamma")
    own = [r for r in Journal(journal) if [r["unit"].get(part) for part in parts] == wanted]
    own = own[: result["facts"]]  # units are written in the order of the facts
    if len(own) < result["facts"]:
        raise DataError(f"{journal} has {len(own)} of {result['facts']} facts.", remedy)
    if len({record["unit"]["id"] for record in own}) < len(own):
        raise DataError(f"{journal} holds a fact twice: some are of another setting.", remedy)
    write_result(target, result_json({**result, **summarise(own)}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--facts", type=positive, default=90, help="how many of the shipped facts")
    parser.add_argument("--gamma", type=float, help="of SADR; by default as tuned")
    parser.add_argument("--out", type=Path, default=Path("assets/results"))
    parser.add_argument(
        "--summary-only", action="store_true", help="averages anew, from the journal in --out"
    )
    options = parser.parse_args()
    try:
        if options.summary_only:
            summarise_again(options.model, options.out)
        else:
            facts = read_cases(asset("facts.jsonl"))[: options.facts]
            run(options.model, facts, options.out, options.gamma, options.device)
        result = json.loads((options.out / f"survey-{options.model}.json").read_text("utf-8"))
        sys.stdout.write(f"{markdown(result)}\n\n{paired_markdown(result)}\n")
    except DriftLensError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
