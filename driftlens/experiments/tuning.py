"""The search for each editor's layers and hyperparameters, recorded.

    python -m driftlens.experiments.tuning --data FILE --methods rome

Only cases of the tuning split are used. For each method a few stages follow one another; each
tries some changes of the best configuration of the stage before, which begins with what was
found for a simpler relative (`PARENTS`). Trials without a restriction are judged by edit success
and paraphrase success first (whether they reach 99 and 95, or at least the first), then by what
is left of other knowledge, the mean of NS, RS and DNS, less the points that both are short of. With
``--like MODEL`` steps and strengths begin with that model's, what only chooses the search for a
value is not tried again, and fine-tuning's rate is tried further down.
SADR's gamma is judged by the same, those first that cost no more than one point of ES and four of
PS (or one prompt, where that is more). The last stage and gamma are decided on all cases, the
others on half of them.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import driftlens as dl
from driftlens.bench import Arm, Job, Setting, run_job
from driftlens.bench.units import COVARIANCE, content_digest
from driftlens.cases import METRICS, Case, balanced, tuning_split
from driftlens.editing.configs import ValueSearch
from driftlens.editing.defaults import KNOWN, Values, by_depth
from driftlens.editing.methods import METHODS
from driftlens.editing.outcome import ValueStore
from driftlens.errors import DataError, DriftLensError
from driftlens.evaluation import Answer, rates
from driftlens.experiments.options import arguments
from driftlens.journal import Journal, digest
from driftlens.readers import read_cases
from driftlens.records import data_file

TUNED = {"smollm2-135m": ("llama", 30, 576, 3), "gemma-3-270m": ("gemma3_text", 18, 640, 1)}
"""Models whose values were found like this, and where they stand."""
GAMMAS = (0.05, 0.2, 0.8)
WANTED = {"ES": 99.0, "PS": 95.0}
PARENTS = {
    "r-rome": "rome", "emmet": "rome", "pmet": "memit", "alphaedit": "memit", "ft-l": "ft-m",
}  # fmt: skip
"""Whose best values a search begins with."""
SAME_GAMMA = {"r-rome": "rome", "emmet": "rome", "alphaedit": "memit", "ft-l": "ft-m"}
"""Who searches for a value (or trains) as another does, and takes over its gamma."""

Change = dict[str, Any]

FIRST: Change = {
    # Few contexts and steps: what makes small models' edits cheap.
    "context_lengths": (10,), "contexts_per_word": 1, "weight_decay": 1e-3,
    "clamp_factor": 4.0, "lr": 1.0, "steps": 10,
}  # fmt: skip


def stages(method: str, n_layers: int, is_search_known: bool = False) -> list[list[Change]]:
    """What is tried, beside what is already the best; layers by depth.

    Args:
        method: The editor.
        n_layers: Of the model.
        is_search_known: Whether the search begins with another model's values.
    """

    def depth(*shares: float) -> list[int]:
        return sorted({round(share * (n_layers - 1)) for share in shares})

    def each(name: str, values: Sequence[Any]) -> list[Change]:
        return [{name: value} for value in values]

    search: list[Change] = [
        {"steps": 20}, {"steps": 20, "early_stop_loss": 0.2}, {"steps": 20, "early_stop_loss": 0.5},
        {"lr": 0.5, "steps": 20},
    ]  # fmt: skip
    last = [] if is_search_known else [search]
    if method == "rome":
        return [each("layer", depth(0.1, 0.2, 0.3, 0.4, 0.5)), *last]
    if method == "memit":
        layers = [tuple(range(max(0, y - 2), y + 1)) for y in depth(0.1, 0.2, 0.3, 0.4)]
        weights = each("cov_weight", [3000.0, 500.0, 100.0])
        return [each("layers", layers), weights, each("layers", layers), *last]
    if method == "pmet":
        return [[*search[1:3], {"lr": 0.2, "steps": 30}, {"cov_weight": 500.0}]]
    if method == "emmet":
        return [[{"cov_weight": 100.0}, {"cov_weight": 1e4}]]
    if method == "alphaedit":
        return [each("nullspace_threshold", [0.005, 0.1, 0.5]), each("ridge", [0.1, 1.0])]
    if method == "ft-l":
        return [each("lr", [2e-5, 1e-4, 5e-4] if is_search_known else [5e-4, 5e-3])]
    if method == "ft-m":
        return [
            [{"layer": y, "lr": lr} for y in depth(0.1, 0.3, 0.6, 0.9) for lr in (5e-4, 2e-3)],
            *([each("lr", [2e-5, 1e-4])] if is_search_known else []),
            each("norm_constraint", [2e-3, 5e-3]),
        ]
    if method == "grace":
        return [
            [{"layer": y, "lr": lr} for y in depth(0.5, 0.8) for lr in (0.3, 1.0)],
            each("radius", [4.0, 8.0, 16.0]),
        ]
    return []  # r-ROME keeps ROME's


class Search:
    """Trials of one method on one model, in a journal.

    Args:
        model: The model.
        method: The editor.
        cases: Of the tuning split; half of them decide in all stages but the last.
        out: Folder of the journals.
        store: Values that were found for another method.
        like: The hyperparameters of each method to begin with; their layers are left aside.
        data: The file that the cases are from, for the record.
        retry_failed: Try settings again that failed in an earlier call.
    """

    def __init__(
        self,
        model: dl.LensModel,
        method: str,
        cases: Sequence[Case],
        out: Path,
        store: ValueStore | None = None,
        like: Mapping[str, Values] | None = None,
        data: Path | None = None,
        retry_failed: bool = False,
    ) -> None:
        self.model, self.method, self.cases, self.out = model, method, cases, out
        self.store = ValueStore() if store is None else store
        self.like, self.data, self.retry_failed = like or {}, data, retry_failed
        self.tried: set[str] = set()
        self.journal = Journal(out / f"tuning-{model.info.name}-{method}.jsonl")

    def trial(self, config: Any, gamma: float | None = None, whole: bool = False) -> dict[str, Any]:
        """Rates of one setting on half of the cases, or on all."""
        cases = self.cases if whole else balanced(self.cases, (len(self.cases) + 1) // 2)
        unit = {
            **self.model.identity(), "method": self.method, "config": asdict(config),
            "gamma": gamma, "cases": [case.id for case in cases], "content": content_digest(cases),
            "metrics": METRICS, "seed": Setting().seed, "covariance": COVARIANCE,
        }  # fmt: skip
        if not self.journal.is_finished(unit, self.retry_failed and digest(unit) not in self.tried):
            self.tried.add(digest(unit))
            penalties = () if gamma is None else (dl.SADR(gamma=gamma),)
            arm = Arm(f"{self.method} gamma {gamma}", self.method, config, penalties)
            job = Job(arm, tuple(cases), frozenset(case.id for case in cases))
            found, seconds = [], 0.0
            asked = run_job(self.model, job, Setting(METRICS), self.store)
            for case, record in tqdm(asked, desc=arm.name, total=len(cases), leave=False):
                if "error" in record:
                    self.journal.add(unit, error=f"{case.id}: {record['error']}")
                    return self.journal[unit]
                found.append([Answer(**a) for a in record["answers"]])
                seconds += record["seconds"]
            all_rates = rates(found, draws=1)
            values = {metric: rate.value for metric, rate in all_rates.items()}
            prompts = {metric: rate.prompts for metric, rate in all_rates.items()}
            source = {} if self.data is None else {"data": data_file(self.data)}
            self.journal.add(unit, rates=values, prompts=prompts, seconds=seconds, **source)
        return self.journal[unit]

    def best(self) -> Any:
        """The best configuration of all stages."""
        best = self._first()
        found = stages(self.method, self.model.info.n_layers, bool(self.like))
        for stage in found:
            last = stage is found[-1]
            configs = [best, *(replace(best, **change) for change in stage)]
            best = max(configs, key=lambda config: value_of(self.trial(config, whole=last)))
        return best

    def best_gamma(self, config: Any) -> float:
        """The gamma that keeps most of other knowledge, among those that cost little if any do."""
        relative = SAME_GAMMA.get(self.method)
        if relative is not None:
            search = self._of(relative)
            return search.best_gamma(search.best())
        free = self.trial(config, whole=True)

        def lost(found: dict[str, Any], metric: str, allowed: float) -> bool:
            one = 100.0 / free["prompts"][metric] if metric in free["prompts"] else 0.0
            fall = free["rates"].get(metric, 0.0) - found["rates"].get(metric, 0.0)
            return bool(fall > max(allowed, one) + 1e-6)

        def worth(gamma: float) -> tuple[bool, float]:
            found = self.trial(config, gamma, whole=True)
            if "rates" not in found:
                return False, -math.inf
            is_cheap = not lost(found, "ES", 1.0) and not lost(found, "PS", 4.0)
            return is_cheap, value_of(found)[-1]

        return max(GAMMAS, key=worth)

    def _of(self, method: str) -> Search:
        return Search(
            self.model, method, self.cases, self.out, self.store, self.like, self.data,
            self.retry_failed,
        )  # fmt: skip

    def _first(self) -> Any:
        """Values of the class, layers by depth, and what was found for a relative or elsewhere."""
        kind = METHODS[self.method].config
        names = {item.name for item in fields(kind)}
        start = by_depth(self.model.info.n_layers, self.method)
        if issubclass(kind, ValueSearch) and not self.like:
            start = {**FIRST, **start}
        if self.method in PARENTS:
            parent = self._of(PARENTS[self.method]).best()
            start |= asdict(parent)
            if "layers" in names and "layer" in start:
                start["layers"] = (start["layer"],)
        elsewhere = self.like.get(self.method, {})
        start |= {k: v for k, v in elsewhere.items() if k not in ("layer", "layers")}
        return kind(**{name: value for name, value in start.items() if name in names})


def value_of(trial: dict[str, Any]) -> tuple[bool, bool, float]:
    """What trials are compared by: both successes reached, edit success reached, what is left of
    other knowledge less what both are short of. What no case asks for is not missed."""
    found = trial.get("rates")
    if found is None:
        return False, False, -math.inf
    wanted = {metric: least for metric, least in WANTED.items() if metric in found}
    reached = {metric: found[metric] >= least for metric, least in wanted.items()}
    others = [rate for metric, rate in found.items() if metric not in WANTED]
    short = sum(max(0.0, least - found[metric]) for metric, least in wanted.items())
    left = statistics.fmean(others) if others else 0.0
    return all(reached.values()), reached["ES"], left - short


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Command line."""
    out = Path("assets/results/tuning")
    parser = arguments(__doc__ or "", 24, out)
    parser.add_argument("--like", choices=list(TUNED), help="the model whose values to begin with")
    parser.add_argument("--retry-failed", action="store_true", help="try again what failed")
    options = parser.parse_args()
    try:
        model = dl.load_model(options.model, device=options.device)
        tuning, _ = tuning_split(read_cases(options.data))
        cases = balanced(tuning, options.cases)
        store = ValueStore()
        like = KNOWN[TUNED[options.like]] if options.like else None
        for method in options.methods:
            search = Search(
                model, method, cases, options.out, store, like, options.data, options.retry_failed
            )
            config = search.best()
            found = search.trial(config, whole=True)
            if "rates" not in found:
                raise DataError(f"Every setting of {method} failed, this one by: {found['error']}")
            _say(f"{method}: {json.dumps(asdict(config))}\n  {found['rates']}")
            gamma = search.best_gamma(config)
            target = options.out / f"tuned-{model.info.name}-{method}.toml"
            dl.write_config(target, method, config, [dl.SADR(gamma=gamma)])
            _say(f"  gamma {gamma}; wrote {target}, for --config")
    except DriftLensError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
