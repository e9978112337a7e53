"""How well an edit did on a case, and rates over many cases with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from driftlens.cases import METRICS, Case, Metric
from driftlens.models import LensModel
from driftlens.scoring import ask, score_questions


@dataclass(frozen=True)
class Answer:
    """What the model answered to one probe.

    Args:
        metric: What it counts for.
        right: Mean log-probability per token of the answer that should be likelier (nats).
        wrong: That of the other.
    """

    metric: Metric
    right: float
    wrong: float

    @property
    def success(self) -> bool:
        """Whether the right one is likelier, strictly."""
        return self.right > self.wrong

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return asdict(self)


def answers(model: LensModel, case: Case) -> list[Answer]:
    """Ask everything about a case, of the model as it is now."""
    probes = case.probes()
    questions = [ask(model, p.prompt, text) for p in probes for text in (p.right, p.wrong)]
    scores = [score.mean_logprob for score in score_questions(model, questions)]
    return [
        Answer(probe.metric, scores[2 * i], scores[2 * i + 1]) for i, probe in enumerate(probes)
    ]


@dataclass(frozen=True)
class Rate:
    """Share of successes, in per cent.

    Args:
        value: Pooled over the prompts of all cases.
        low: Lower end of the 95 % interval, by bootstrap over cases.
        high: Its upper end.
        prompts: Number of prompts.
        cases: Number of cases that have any.
    """

    value: float
    low: float
    high: float
    prompts: int
    cases: int

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def rates(
    cases: Iterable[Sequence[Answer]], draws: int = 2000, seed: int = 0
) -> dict[Metric, Rate]:
    """Success of each metric over cases; metrics without a prompt are left out.

    Args:
        cases: The answers of each case.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    groups = list(cases)
    found: dict[Metric, Rate] = {}
    for metric in METRICS:
        of_case = [[a.success for a in group if a.metric == metric] for group in groups]
        of_case = [wins for wins in of_case if wins]
        if not of_case:
            continue
        wins, counts = (np.array([f(g) for g in of_case], dtype=float) for f in (sum, len))
        low, high = bootstrap_interval(wins, counts, draws, seed)
        found[metric] = Rate(
            100 * float(wins.sum() / counts.sum()),
            100 * low,
            100 * high,
            int(counts.sum()),
            len(counts),
        )
    return found


def bootstrap_interval(
    sums: np.ndarray, counts: np.ndarray, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a mean over prompts, by bootstrap over the groups that they belong to.

    Args:
        sums: Of each group's prompts.
        counts: Number of each group's prompts.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    chosen = np.random.default_rng(seed).integers(0, len(counts), size=(draws, len(counts)))
    means = sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def rate_cells(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Cells of a table, one for each metric, from rates as records."""
    return [str(Rate(**found[metric])) if metric in found else "-" for metric in METRICS]


def harmonic_mean(values: Iterable[float]) -> float:
    """Of rates in per cent; 0 if any is 0 (the paper's Avg. S, over ES, PS, NS, RS and DNS)."""
    numbers = list(values)
    if not numbers or min(numbers) <= 0:
        return 0.0
    return len(numbers) / sum(1 / value for value in numbers)
