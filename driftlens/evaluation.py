"""How well an edit did on a case; measures over many cases with intervals; paired comparisons.

Prompts of one case belong together: every interval is a bootstrap over cases.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from driftlens.cases import ALL_METRICS, METRICS, Case, Metric
from driftlens.errors import check_choice
from driftlens.intervals import bootstrap_interval, ends, with_interval
from driftlens.models import LensModel
from driftlens.scoring import ContinuationScore, ask, score_questions

Measure = Literal["success", "exact", "prob", "margin"]

MEASURES: dict[Measure, str] = {
    "success": "share of prompts on which the right answer is likelier than the wrong one, in %",
    "exact": "share of prompts whose right answer greedy decoding gives, in %",
    "prob": "mean probability of the right answer",
    "margin": "mean log-probability per token of the right answer, less the wrong one's (nats)",
}
"""What is told of a metric, by name; the benchmarks' comparison first, then magnitudes."""

Averaging = Literal["prompt", "case"]


@dataclass(frozen=True)
class Answer:
    """What the model answered to one probe.

    Args:
        metric: What it counts for.
        right: Mean log-probability per token of the answer that should be likelier (nats).
        wrong: That of the other; ``None`` where there is none.
        right_prob: Probability of the whole right answer.
        wrong_prob: That of the other.
        exact: Whether greedy decoding gives the right answer.
    """

    metric: Metric
    right: float
    wrong: float | None
    right_prob: float = float("nan")
    wrong_prob: float | None = None
    exact: bool = False

    @property
    def success(self) -> bool:
        """Whether the right one is likelier, strictly; with no other one, whether it is given."""
        return self.exact if self.wrong is None else self.right > self.wrong

    def value(self, measure: Measure) -> float | None:
        """One of `MEASURES` of this prompt; ``None`` where it is not defined.

        Raises:
            RequestError: If there is no such measure.
        """
        if measure == "success":
            return 100.0 * self.success
        if measure == "exact":
            return 100.0 * self.exact
        if measure == "prob":
            return self.right_prob
        check_choice("measure", measure, MEASURES)
        return None if self.wrong is None else self.right - self.wrong

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return asdict(self)


Asked = Mapping[str, Sequence[Answer]]
"""What a model answered, by the case's id."""


def answers(model: LensModel, case: Case, metrics: Collection[Metric] = METRICS) -> list[Answer]:
    """Ask about a case, of the model as it is now.

    Args:
        metrics: What to ask, of `ALL_METRICS`.
    """
    probes = case.probes(metrics, model.tokens.separator)
    asked = [(p.prompt, text) for p in probes for text in (p.right, p.wrong) if text is not None]
    questions = [ask(model, prompt, text) for prompt, text in asked]
    scores = dict(zip(asked, score_questions(model, questions), strict=True))
    found = []
    for probe in probes:
        right = scores[probe.prompt, probe.right]
        wrong = None if probe.wrong is None else scores[probe.prompt, probe.wrong]
        found.append(_answer(probe.metric, right, wrong))
    return found


def _answer(metric: Metric, right: ContinuationScore, wrong: ContinuationScore | None) -> Answer:
    return Answer(
        metric,
        right.mean_logprob,
        None if wrong is None else wrong.mean_logprob,
        right.prob,
        None if wrong is None else wrong.prob,
        right.rank == 0,
    )


@dataclass(frozen=True)
class Rate:
    """A measure over cases.

    Args:
        value: The mean, of prompts or of cases.
        low: Lower end of the 95 % interval, by bootstrap over cases; ``nan`` of one case.
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
        return with_interval(self.value, self.low, self.high)


def rates(
    cases: Iterable[Sequence[Answer]],
    measure: Measure = "success",
    by: Averaging = "prompt",
    draws: int = 2000,
    seed: int = 0,
) -> dict[Metric, Rate]:
    """A measure of each metric over cases; metrics without a prompt are left out.

    Args:
        cases: The answers of each case.
        measure: One of `MEASURES`.
        by: ``"prompt"`` pools the prompts of all cases, as the SADR paper does; ``"case"``
            averages each case first, as ROME's and MEMIT's papers do.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        RequestError: If there is no such measure, or ``by`` is another.
    """
    check_choice("by", by, get_args(Averaging))
    groups = list(cases)
    found: dict[Metric, Rate] = {}
    for metric in ALL_METRICS:
        sums, counts = _sums(groups, metric, measure)
        asked = counts > 0
        if not asked.any():
            continue
        prompts, of_cases = int(counts.sum()), int(asked.sum())
        sums, counts = sums[asked], counts[asked]
        if by == "case":
            sums, counts = sums / counts, np.ones_like(counts)
        low, high = bootstrap_interval(sums, counts, draws, seed)
        value = float(sums.sum() / counts.sum())
        found[metric] = Rate(value, low, high, prompts, of_cases)
    return found


def _sums(
    groups: Sequence[Sequence[Answer]], metric: Metric, measure: Measure
) -> tuple[np.ndarray, np.ndarray]:
    """For each case, the sum over its prompts and their number."""
    check_choice("A metric", metric, ALL_METRICS)
    of_case = [
        [v for a in group if a.metric == metric and (v := a.value(measure)) is not None]
        for group in groups
    ]
    return (
        np.array([sum(values) for values in of_case], dtype=float),
        np.array([len(values) for values in of_case], dtype=float),
    )


def average(
    cases: Iterable[Sequence[Answer]],
    by: Averaging = "prompt",
    draws: int = 2000,
    seed: int = 0,
) -> Rate | None:
    """Avg. S: the harmonic mean of the success of ES, PS, NS, RS and DNS (paper, table 3).

    The interval is a bootstrap over cases of all metrics together. ``None`` where a metric has
    no prompt.

    Args:
        cases: The answers of each case.
        by: As for :func:`rates`.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    return combined(cases, METRICS, harmonic_mean, by, draws, seed)


def combined(
    cases: Iterable[Sequence[Answer]],
    metrics: Sequence[Metric],
    mean: Callable[[Sequence[float]], float] = statistics.fmean,
    by: Averaging = "prompt",
    draws: int = 2000,
    seed: int = 0,
) -> Rate | None:
    """A mean of the success of several metrics; the interval is that of all together.

    Args:
        cases: The answers of each case.
        metrics: Which; ``None`` is returned where one has no prompt.
        mean: Of the metrics' values, in per cent.
        by: As for :func:`rates`.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    groups = list(cases)
    found = _combined(groups, metrics, mean, by, draws, seed)
    if found is None:
        return None
    value, spread, prompts = found
    return Rate(value, *ends(spread, len(groups)), prompts, len(groups))


def _combined(
    groups: Sequence[Sequence[Answer]],
    metrics: Sequence[Metric],
    mean: Callable[[Sequence[float]], float],
    by: Averaging,
    draws: int,
    seed: int,
) -> tuple[float, np.ndarray, int] | None:
    """A mean of several metrics, the same in each draw of cases, and the number of prompts."""
    check_choice("by", by, get_args(Averaging))
    chosen = np.random.default_rng(seed).integers(0, max(len(groups), 1), (draws, len(groups)))
    values, means, prompts = [], [], 0
    for metric in metrics:
        sums, counts = _sums(groups, metric, "success")
        if not counts.any():
            return None
        prompts += int(counts.sum())
        sums, counts = _weighted(sums, counts, by)
        values.append(float(sums.sum() / counts.sum()))
        drawn = counts[chosen].sum(1)
        # A draw without a prompt of some metric tells nothing of it: the value of all.
        means.append(np.where(drawn > 0, sums[chosen].sum(1) / np.maximum(drawn, 1), values[-1]))
    return mean(values), np.array([mean(column) for column in np.array(means).T.tolist()]), prompts


def _weighted(sums: np.ndarray, counts: np.ndarray, by: Averaging) -> tuple[np.ndarray, np.ndarray]:
    """Of each case what counts: its prompts, or the case itself."""
    if by == "prompt":
        return sums, counts
    asked = counts > 0
    return np.divide(sums, counts, where=asked, out=sums.copy()), asked.astype(float)


def _without_each(
    groups: Sequence[Sequence[Answer]],
    metrics: Sequence[Metric],
    mean: Callable[[Sequence[float]], float],
    by: Averaging,
) -> np.ndarray:
    """A mean of several metrics over all cases but one, for each; a metric that only this one has
    keeps its value."""
    values = []
    for metric in metrics:
        sums, counts = _weighted(*_sums(groups, metric, "success"), by)
        left = counts.sum() - counts
        whole = np.full(len(groups), sums.sum() / counts.sum())
        values.append(np.divide(sums.sum() - sums, left, where=left > 0, out=whole))
    return np.array([mean(column) for column in np.array(values).T.tolist()])


@dataclass(frozen=True)
class Difference:
    """A measure under one condition less that under another, on the same cases.

    Args:
        value: Difference of the means over prompts.
        low: Lower end of the 95 % interval, by bootstrap over cases; ``nan`` of one case.
        high: Its upper end.
        effect: Mean difference of a case over the standard deviation of such differences
            (Cohen's d for paired samples); ``nan`` where that is 0.
        better: Number of cases in which the first is larger.
        worse: Number of cases in which it is smaller.
        cases: Number of cases compared.
    """

    value: float
    low: float
    high: float
    effect: float
    better: int
    worse: int
    cases: int

    def __str__(self) -> str:
        return with_interval(self.value, self.low, self.high, sign="+")


def compare(
    first: Mapping[str, Sequence[Answer]],
    second: Mapping[str, Sequence[Answer]],
    measure: Measure = "success",
    draws: int = 2000,
    seed: int = 0,
    by: Averaging = "prompt",
) -> dict[Metric, Difference]:
    """Paired differences of each metric over the cases that both have.

    Args:
        first: Answers by the case's id.
        second: The same under the other condition.
        measure: One of `MEASURES`.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
        by: As for :func:`rates`.
    """
    check_choice("by", by, get_args(Averaging))
    common = [name for name in first if name in second]
    found: dict[Metric, Difference] = {}
    for metric in ALL_METRICS:
        sums, counts = _sums([first[name] for name in common], metric, measure)
        others, other_counts = _sums([second[name] for name in common], metric, measure)
        if not np.array_equal(counts, other_counts):
            raise ValueError(f"Not the same prompts were asked for {metric}.")
        asked = counts > 0
        if not asked.any():
            continue
        gains, of = _weighted((sums - others)[asked], counts[asked], by)
        found[metric] = difference(gains, of, draws, seed)
    return found


def compare_combined(
    first: Mapping[str, Sequence[Answer]],
    second: Mapping[str, Sequence[Answer]],
    metrics: Sequence[Metric],
    draws: int = 2000,
    seed: int = 0,
    mean: Callable[[Sequence[float]], float] = statistics.fmean,
    by: Averaging = "prompt",
) -> Difference | None:
    """The paired difference of a mean of several metrics' success over the cases that both have.

    Effect size, and which cases are better or worse: of the arithmetic mean, by each case's own
    mean over the metrics that it was asked; of another one, which no case has alone, by jackknife
    pseudo-values.

    Args:
        first: Answers by the case's id.
        second: The same under the other condition.
        metrics: Which; ``None`` is returned where one has no prompt.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
        mean: Of the metrics' values, in per cent; with :func:`harmonic_mean` and the five main
            metrics that of Avg. S.
        by: As for :func:`rates`.
    """
    common = [name for name in first if name in second]
    several = [[side[name] for name in common] for side in (first, second)]
    found, other = (_combined(g, metrics, mean, by, draws, seed) for g in several)
    if found is None or other is None:
        return None
    low, high = ends(found[1] - other[1], len(common))
    if mean is not statistics.fmean:
        without = [_without_each(group, metrics, mean, by) for group in several]
        n, value = len(common), found[0] - other[0]
        return _difference(value, low, high, n * value - (n - 1) * (without[0] - without[1]))
    gains, asked = np.zeros(len(common)), np.zeros(len(common))
    for metric in metrics:  # of each case, the mean over those that it has
        (sums, counts), (others, _) = (_sums(group, metric, "success") for group in several)
        gains += np.divide(sums - others, counts, out=np.zeros_like(sums), where=counts > 0)
        asked += counts > 0
    of_case = gains[asked > 0] / asked[asked > 0]
    return _difference(found[0] - other[0], low, high, of_case)


@dataclass(frozen=True)
class Growth:
    """What one condition gives more than another, in per cent of what the other gives.

    Args:
        value: Of the sums over all prompts.
        low: Lower end of the 95 % interval, by bootstrap over cases; ``nan`` of one case.
        high: Its upper end; infinite if the other condition gives nothing in too many draws.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return with_interval(self.value, self.low, self.high, digits=0, sign="+", unit=" %")


def growth(
    first: Mapping[str, Sequence[Answer]],
    second: Mapping[str, Sequence[Answer]],
    metric: Metric,
    measure: Measure = "success",
    draws: int = 2000,
    seed: int = 0,
) -> Growth | None:
    """The relative change of a metric over the cases that both have, from the second to the first.

    Args:
        first: Answers by the case's id.
        second: The same under the other condition.
        metric: Which of `ALL_METRICS`.
        measure: One of `MEASURES` that is never negative.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        ``None`` if the second gives nothing, so that there is nothing to relate to.
    """
    common = [name for name in first if name in second]
    sums, _ = _sums([first[name] for name in common], metric, measure)
    others, _ = _sums([second[name] for name in common], metric, measure)
    if not others.sum() > 0:
        return None
    chosen = np.random.default_rng(seed).integers(0, len(common), size=(draws, len(common)))
    gains, of = (sums - others)[chosen].sum(1), others[chosen].sum(1)
    ratios = np.divide(gains, of, out=np.where(gains > 0, np.inf, 0.0), where=of > 0)
    low, high = ends(ratios, len(common), "nearest")
    return Growth(100 * float((sums.sum() - others.sum()) / others.sum()), 100 * low, 100 * high)


def difference(
    gains: np.ndarray, counts: np.ndarray, draws: int = 2000, seed: int = 0
) -> Difference:
    """A paired difference over prompts.

    Args:
        gains: For each case, the sum over its prompts of one condition less the other.
        counts: Number of each case's prompts, at least 1.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    low, high = bootstrap_interval(gains, counts, draws, seed)
    return _difference(float(gains.sum() / counts.sum()), low, high, gains / counts)


def _difference(value: float, low: float, high: float, of_case: np.ndarray) -> Difference:
    """With what the differences of the cases tell."""
    spread = float(of_case.std(ddof=1)) if len(of_case) > 1 else 0.0
    return Difference(
        value,
        low,
        high,
        float(of_case.mean()) / spread if spread > 0 else float("nan"),
        int((of_case > 0).sum()),
        int((of_case < 0).sum()),
        len(of_case),
    )


def rate_cells(
    found: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = METRICS
) -> list[str]:
    """Cells of a table, one for each metric, from rates as records."""
    return [
        with_interval(*(found[metric][end] for end in ("value", "low", "high")))
        if metric in found
        else "-"
        for metric in metrics
    ]


def with_failures(arm: str, failed: int, without_texts: int = 0) -> str:
    """An arm for a table, with the number of its cases that the rates are without, and of those
    that only what is told of texts is without."""
    counts = {"failed": failed, "without texts": without_texts}
    told = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
    return f"{arm} ({told})" if told else arm


def harmonic_mean(values: Iterable[float]) -> float:
    """Of rates in per cent; 0 if any is 0 (the paper's Avg. S, over ES, PS, NS, RS and DNS)."""
    numbers = list(values)
    if not numbers or min(numbers) <= 0:
        return 0.0
    return len(numbers) / sum(1 / value for value in numbers)
