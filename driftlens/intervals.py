"""Intervals of 95 %: by bootstrap over groups of prompts, and told to a reader."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np


def bootstrap_interval(
    sums: np.ndarray, counts: np.ndarray, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a mean over prompts, by bootstrap over the groups that they belong to; not a
    number if there is one group only, which tells nothing of others.

    Args:
        sums: Of each group's prompts.
        counts: Number of each group's prompts.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    chosen = np.random.default_rng(seed).integers(0, len(counts), size=(draws, len(counts)))
    means = sums[chosen].sum(1) / counts[chosen].sum(1)
    return ends(means, len(counts))


def median_interval(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a median, by bootstrap; not a number of one value.

    Args:
        values: One of each case.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    chosen = np.random.default_rng(seed).integers(0, len(values), size=(draws, len(values)))
    return ends(np.median(values[chosen], axis=1), len(values))


def ends(
    drawn: np.ndarray, groups: int, method: Literal["linear", "nearest"] = "linear"
) -> tuple[float, float]:
    """95 % interval of what was found in each draw of a bootstrap; not a number if fewer than two
    groups were drawn from.

    Args:
        drawn: A number for each draw.
        groups: That were drawn from.
        method: Of the quantiles; ``"nearest"`` where draws may be infinite.
    """
    if groups < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [0.025, 0.975], method=method)
    return float(low), float(high)


def with_interval(
    value: float | None,
    low: float | None,
    high: float | None,
    *,
    digits: int = 1,
    sign: Literal["", "+"] = "",
    unit: str = "",
) -> str:
    """A number and its interval for a reader, as ``1.5 [0.9, 2.2]``.

    A number that is rounded to zero has no minus, but an end has: ``0.1 [-0.0, 0.2]`` says that
    the interval begins below zero.

    Args:
        value: The number; ``None`` or not a number is told as ``-``, and so are the ends.
        low: Lower end of the interval.
        high: Its upper end.
        digits: Decimals.
        sign: ``"+"`` gives numbers that are not negative a sign too.
        unit: Behind the number, in front of the interval.
    """
    own = _fixed(value, f"{sign}z.{digits}f")
    return f"{own}{unit} [{_fixed(low, f'{sign}.{digits}f')}, {_fixed(high, f'{sign}.{digits}f')}]"


def _fixed(number: float | None, form: str) -> str:
    return "-" if number is None or math.isnan(number) else format(number, form)
