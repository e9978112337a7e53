"""The search for each editor's layers and hyperparameters, recorded.

    python -m driftlens.experiments.tuning --data FILE --methods rome

Only cases of the tuning split are used. For each method a few stages follow one another; each
tries all combinations of some values, from the best of the stage before. Trials without a
restriction are judged by edit success and paraphrase success first (they should reach 99 and
95), then by the harmonic mean of all rates; SADR's gamma by the harmonic mean of NS, RS and DNS
among those that cost no more than one point of ES and four of PS.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import driftlens as dl
from driftlens.cases import Case, balanced, read_merged, tuning_split
from driftlens.editing.methods import resolve_config
from driftlens.errors import DriftLensError
from driftlens.evaluation import Answer, harmonic_mean, rates
from driftlens.experiments.editors import arguments, edit_cases
from driftlens.journal import Journal

GAMMAS = (0.01, 0.05, 0.2, 0.8)
WANTED = {"ES": 99.0, "PS": 95.0}
Stage = dict[str, Sequence[Any]]


def stages(method: str, n_layers: int) -> list[Stage]:
    """What is tried; layers by depth."""

    def depth(*shares: float) -> list[int]:
        return sorted({round(share * (n_layers - 1)) for share in shares})

    one = depth(0.1, 0.2, 0.3, 0.4, 0.5)
    several = [tuple(range(max(0, y - 2), y + 1)) for y in depth(0.2, 0.3, 0.4, 0.5)]
    if method in ("rome", "r-rome"):
        return [
            {"layer": one},
            {"clamp_factor": [2.0, 4.0, 8.0], "weight_decay": [1e-3, 0.5]},
            {"steps": [20, 40]},
        ]
    if method in ("ft-l", "ft-m"):
        return [
            {"layer": depth(0.1, 0.3, 0.5, 0.7, 0.9), "lr": [5e-4, 2e-3]},
            {"norm_constraint": [None, 5e-4, 2e-3], "steps": [25, 50]},
        ]
    if method == "grace":
        return [
            {"layer": depth(0.5, 0.7, 0.9), "lr": [0.3, 1.0]},
            {"radius": [1.0, 4.0, 16.0]},
        ]
    search: Stage = {"clamp_factor": [0.75, 2.0, 4.0], "weight_decay": [1e-3, 0.5]}
    if method == "memit":
        return [{"layers": several, "clamp_factor": [4.0]}, search,
                {"cov_weight": [500.0, 3000.0, 15000.0], "steps": [20, 40]}]  # fmt: skip
    if method == "pmet":
        return [{"layers": several, "clamp_factor": [4.0]}, search,
                {"cov_weight": [500.0, 3000.0, 15000.0], "steps": [20, 40]}]  # fmt: skip
    if method == "emmet":
        return [{"layers": [(y,) for y in one], "clamp_factor": [4.0]}, search,
                {"cov_weight": [100.0, 1e4], "steps": [20, 40]}]  # fmt: skip
    return [{"layers": several, "clamp_factor": [4.0]}, search,
            {"nullspace_threshold": [0.005, 0.02, 0.1], "ridge": [0.1, 1.0, 10.0]}]  # fmt: skip


class Search:
    """Trials of one method on one model, in a journal."""

    def __init__(self, model: dl.LensModel, method: str, cases: Sequence[Case], out: Path) -> None:
        self.model, self.method, self.cases = model, method, cases
        self.journal = Journal(out / f"tuning-{model.info.name}-{method}.jsonl")

    def trial(self, config: Any, gamma: float | None = None) -> dict[str, Any]:
        """Rates of one setting on all cases."""
        unit = {
            "config": asdict(config),
            "gamma": gamma,
            "cases": [case.id for case in self.cases],
        }
        if unit not in self.journal:
            penalties = [] if gamma is None else [dl.SADR(gamma=gamma)]
            found, seconds = [], 0.0
            edited = edit_cases(self.model, self.cases, self.method, config, penalties)
            shown = f"{self.method} gamma {gamma}"
            for case, record in tqdm(edited, desc=shown, total=len(self.cases), leave=False):
                if "error" in record:
                    self.journal.add(unit, error=f"{case.id}: {record['error']}")
                    return self.journal[unit]
                found.append([Answer(**a) for a in record["answers"]])
                seconds += record["seconds"]
            values = {metric: rate.value for metric, rate in rates(found, draws=1).items()}
            self.journal.add(unit, rates=values, seconds=seconds)
        return self.journal[unit]

    def best(self, start: Any) -> Any:
        """The best configuration of all stages, from a first one."""
        best = start
        for stage in stages(self.method, self.model.info.n_layers):
            tried = [(self.trial(config), config) for config in self._around(best, stage)]
            best = max(tried, key=lambda pair: value_of(pair[0]))[1]
        return best

    def best_gamma(self, config: Any) -> float:
        """The gamma that keeps most of other knowledge, among those that cost little."""
        free = self.trial(config)["rates"]

        def worth(gamma: float) -> tuple[bool, float]:
            found = self.trial(config, gamma).get("rates")
            if found is None:
                return False, 0.0
            cheap = free["ES"] - found["ES"] <= 1.0 and free["PS"] - found["PS"] <= 4.0
            kept = harmonic_mean(found[m] for m in ("NS", "RS", "DNS"))
            return cheap, kept if cheap else -(free["ES"] - found["ES"])

        return max(GAMMAS, key=worth)

    def _around(self, config: Any, stage: Stage) -> Iterator[Any]:
        for values in itertools.product(*stage.values()):
            yield replace(config, **dict(zip(stage, values, strict=True)))


def value_of(trial: dict[str, Any]) -> tuple[float, float]:
    """What trials are compared by."""
    found = trial.get("rates")
    if found is None:
        return -1.0, 0.0
    reached = sum(min(found[m], wanted) for m, wanted in WANTED.items())
    return reached, harmonic_mean(found.values())


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Command line."""
    out = Path("assets/results/tuning")
    options = arguments(__doc__ or "", 16, out).parse_args()
    try:
        model = dl.load_model(options.model)
        tuning, _ = tuning_split(read_merged(options.data))
        cases = balanced(tuning, options.cases)
        for method in options.methods:
            search = Search(model, method, cases, options.out)
            config = search.best(resolve_config(model, method))
            gamma = search.best_gamma(config)
            free, held = search.trial(config), search.trial(config, gamma)
            _say(f"{method}: {json.dumps(asdict(config))}")
            _say(f"  without {free['rates']}")
            _say(f"  SADR {gamma}: {held['rates']}")
    except DriftLensError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
