"""The search for SADR's settings, editor by editor, and what the best one is worth.

    python -m driftlens.experiments.sadr_search --data FILE --methods rome

Two parts. The search uses cases of the tuning split only. It begins with the editor's own
hyperparameters and `FIRST`, and goes through stages: how long and fast both searches for the value
are (restricted and not, always with the same number of steps at most), gamma, which heads are
held, by which divergence, gamma once more, and in which layers; each stage keeps the best setting
so far.

All settings are judged against the same arm, the editor with its own hyperparameters and without
SADR, paired by case: first by the points that they cost beyond `MAY_COST`, then by what they
gain, the sum of RS and DNS. The check repeats the best setting on held-back cases, once.

Numbers go to ``OUT/sadr-MODEL-METHOD.json``, answers to a folder beside it, from which a stopped
call goes on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd

import driftlens as dl
from driftlens.bench import UNEDITED, Arm, BenchResult, Setting, run_bench
from driftlens.bench.results import ALLOWED
from driftlens.cases import METRICS, Case, Metric, balanced, tuning_split
from driftlens.editing.configs import ValueSearch
from driftlens.editing.methods import METHODS, resolve_config
from driftlens.errors import DriftLensError, RequestError
from driftlens.evaluation import Measure, rate_cells
from driftlens.experiments.options import arguments, positive
from driftlens.readers import read_cases
from driftlens.records import data_file, plain, result_json, versions, write_result

FIRST = dl.SADR(gamma=0.8)
GAINS: tuple[Metric, ...] = ("RS", "DNS")
MAY_COST: dict[Metric, float] = {**ALLOWED, **dict.fromkeys(GAINS, 0.0)}
"""Points that a setting may cost the edit, and nothing of what it is meant to save (but one prompt
in any case): else a stronger edit could pay for DNS with RS."""

MAGNITUDES: tuple[Measure, ...] = ("exact", "prob")
"""What is told beside success, which the search decides by: success hides what it costs to be sure
of the new fact."""


@dataclass(frozen=True)
class Choice:
    """A setting: the editor's hyperparameters, and how SADR holds it.

    Args:
        config: Of the editor, without SADR and with it.
        sadr: The restriction.
    """

    config: ValueSearch
    sadr: dl.SADR

    def arms(self, method: str) -> tuple[Arm, Arm]:
        """The editor without SADR, and with it."""
        plain = f"{method}, {self.config.steps} steps, lr {self.config.lr:g}"
        parts = [f"gamma {self.sadr.gamma:g}", f"heads {self.sadr.heads}", self.sadr.divergence]
        if self.sadr.layers is not None:
            parts.append(f"layers {self.sadr.layers[0]}-{self.sadr.layers[-1]}")
        held = f"{plain}, {', '.join(parts)}"
        return Arm(plain, method, self.config), Arm(held, method, self.config, (self.sadr,))


def stages(best: Choice, n_layers: int) -> Generator[list[Choice], Choice, None]:
    """What is tried, stage by stage; send the best setting after each."""
    config = best.config
    longer = replace(config, steps=config.steps * 3 // 2, lr=2 * config.lr)
    best = yield [best, replace(best, config=longer)]

    def changed(*changes: dict[str, Any]) -> list[Choice]:
        return [replace(best, sadr=replace(best.sadr, **change)) for change in changes]

    def scaled(*factors: float) -> list[Choice]:
        return changed(*({"gamma": factor * best.sadr.gamma} for factor in factors))

    best = yield scaled(0.25, 4.0)
    best = yield changed({"heads": "all"}, {"heads": "drift"})
    best = yield changed({"divergence": "reverse_kl"})
    best = yield scaled(0.25, 0.5, 2.0)  # what is held may have changed
    above = max(config.edited_layers) + 1
    middle = (above + n_layers) // 2
    if middle > above:  # else one half would hold nothing that the edit reaches
        yield changed({"layers": tuple(range(middle))}, {"layers": tuple(range(middle, n_layers))})


def search(
    model: dl.LensModel, method: str, cases: Sequence[Case], out: Path, command: str = ""
) -> tuple[Choice, dict[str, Any]]:
    """The best setting of one editor, and all that were tried, JSON-ready.

    Args:
        model: The unedited model.
        method: The editor.
        cases: Of the tuning split.
        out: Folder of the answers.
        command: How to run this again, for the record.

    Raises:
        RequestError: If the editor does not search for values.
    """
    best = first = Choice(_searched(model, method), FIRST)
    reference = first.arms(method)[0]
    tried: list[Choice] = []
    going = stages(best, model.info.n_layers)
    stage = next(going)
    while True:
        tried += stage
        result = _run(model, method, tried, cases, out, command)
        best = max(tried, key=lambda choice: merit(result, reference, choice.arms(method)[1]))
        try:
            stage = going.send(best)
        except StopIteration:
            break
    told = _told(result, method, tried, reference)
    return best, {"best": best.arms(method)[1].name, **told}


def check(
    model: dl.LensModel,
    method: str,
    choice: Choice,
    cases: Sequence[Case],
    out: Path,
    command: str = "",
) -> dict[str, Any]:
    """What a setting is worth on other cases, beside the unedited model and the editor's own
    hyperparameters, JSON-ready; in `MAGNITUDES`, too."""
    reference = Choice(_searched(model, method), FIRST).arms(method)[0]
    result = _run(model, method, [choice], cases, out, command, reference)
    return _told(result, method, [choice], reference, MAGNITUDES)


def merit(result: BenchResult, reference: Arm, held: Arm) -> tuple[float, float]:
    """What settings are compared by: points beyond what SADR may cost (negative), then the
    points that it gains. A setting under which a case fails is worth nothing."""
    if result.left_out(held.name) or result.left_out(reference.name):
        return -math.inf, -math.inf
    found = result.compare(held.name, reference.name)
    gained = sum(found[metric].value for metric in GAINS if metric in found)
    return -result.excess(held.name, reference.name, MAY_COST), gained


def sentence(told: dict[str, Any]) -> str:
    """What the settings of a record change, for a reader: in points, with relative gains."""
    lines = []
    for name, one in told["settings"].items():
        for other, found in one["less"].items():
            parts = [
                f"{metric} {change['points']}"
                + (f" ({change['relative']})" if "relative" in change else "")
                for metric, change in found.items()
            ]
            lines.append(f"{name} less {other}: {'; '.join(parts)}")
    return "\n".join(lines)


def markdown(record: dict[str, Any], parts: Sequence[str] = ("search", "check")) -> str:
    """Success of all arms of the search and of the check, or of one of them, in per cent with 95 %
    intervals."""
    lines = [f"| cases | setting | {' | '.join(METRICS)} |", "|---" * (2 + len(METRICS)) + "|"]
    for part in parts:
        told = record[part]
        of = f"{len(told['cases'])} {'tuning' if part == 'search' else 'held back'}"
        found: dict[str, dict[str, dict[str, Any]]] = {arm["name"]: {} for arm in told["arms"]}
        for row in told["rows"]:
            found[row["arm"]][row["metric"]] = row
        for arm, rates in found.items():
            lines.append(f"| {of} | {arm} | {' | '.join(rate_cells(rates))} |")
    return "\n".join(lines)


# --- parts ---


def _searched(model: dl.LensModel, method: str) -> ValueSearch:
    config = resolve_config(model, method)
    if not isinstance(config, ValueSearch):
        able = [name for name, known in METHODS.items() if issubclass(known.config, ValueSearch)]
        raise RequestError(
            f"{method} does not search for a value.", f"Choose of {', '.join(able)}."
        )
    return config


def _run(
    model: dl.LensModel,
    method: str,
    choices: Sequence[Choice],
    cases: Sequence[Case],
    out: Path,
    command: str,
    *others: Arm,
) -> BenchResult:
    several = [*others, *(arm for choice in choices for arm in choice.arms(method))]
    arms = {arm.name: arm for arm in several}
    return run_bench(
        model, cases, [Arm(UNEDITED), *arms.values()], out, setting=Setting(METRICS),
        command=command,
    )  # fmt: skip


def _told(
    result: BenchResult,
    method: str,
    choices: Sequence[Choice],
    reference: Arm,
    magnitudes: Sequence[Measure] = (),
) -> dict[str, Any]:
    """Rates of all arms, and what each setting changes: less the reference, and less the same
    search without SADR; of success, and of some other measures."""
    settings: dict[str, Any] = {}
    for choice in choices:
        free, held = choice.arms(method)
        beyond, gained = merit(result, reference, held)
        settings[held.name] = {
            "less": {
                name: _changes(result, held.name, name, magnitudes)
                for name in dict.fromkeys((reference.name, free.name))
            },
            "beyond what is allowed": -beyond,
            "gained": gained,
        }
    rows = [result.table(measure).assign(measure=measure) for measure in magnitudes]
    told = {
        "cases": list(result.cases),
        "arms": result.conditions(),
        "failed": [{"arm": a, "case": c, "reason": r} for a, c, r in result.failed],
        "rows": result.table().to_dict("records"),
        **({"magnitudes": pd.concat(rows).to_dict("records")} if rows else {}),
        "settings": settings,
    }
    return cast("dict[str, Any]", plain(told))


def _changes(
    result: BenchResult, held: str, plain: str, magnitudes: Sequence[Measure]
) -> dict[str, dict[str, Any]]:
    """By metric: points with their interval, of success, and what other measures change by; of
    what should grow, per cent of what there was."""
    found: dict[str, dict[str, Any]] = {}
    for metric, change in result.compare(held, plain).items():
        found[metric] = {"points": str(change), **asdict(change)}
        for measure in magnitudes:
            magnitude = result.compare(held, plain, measure)[metric]
            found[metric][measure] = {
                name: getattr(magnitude, name) for name in ("value", "low", "high")
            }
        growth = result.growth(held, plain, metric) if metric in GAINS else None
        if growth is not None:
            found[metric] |= {"relative": str(growth), "relative_value": growth.value}
    return found


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", 32, Path("assets/results/tuning"))
    parser.set_defaults(methods=["rome"])
    parser.add_argument("--check", type=positive, default=150, help="held-back cases of the check")
    options = parser.parse_args()
    try:
        model = dl.load_model(options.model, device=options.device)
        tuning, held_back = tuning_split(read_cases(options.data))
        for method in options.methods:
            command = (
                f"python -m driftlens.experiments.sadr_search --model {options.model} --data "
                f"{options.data.name} --cases {options.cases} --methods {method} --check "
                f"{options.check}"
            )
            name = f"sadr-{model.info.name}-{method}"
            folder = options.out / name
            best, found = search(
                model, method, balanced(tuning, options.cases), folder / "search", command
            )
            _say(f"{sentence(found)}\nbest: {found['best']}")
            checked = check(
                model, method, best, balanced(held_back, options.check), folder / "check", command
            )
            _say(f"on held-back cases:\n{sentence(checked)}")
            record = {
                "model": model.info.to_dict(),
                "fingerprint": model.fingerprint(),
                "data": data_file(options.data),
                "command": command,
                "versions": versions(),
                "method": method,
                "search": found,
                "check": checked,
            }
            write_result(options.out / f"{name}.json", result_json(record))
            _say(markdown(record))
    except DriftLensError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
