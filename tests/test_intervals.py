"""Intervals, and numbers that JSON has none of."""

import json
import math

import numpy as np
import pytest

from driftlens.evaluation import Answer, average, compare, compare_combined, growth
from driftlens.intervals import bootstrap_interval, ends
from driftlens.records import plain, result_json


def test_the_ends_of_what_was_drawn() -> None:
    drawn = np.arange(1000.0)
    assert ends(drawn, 2) == pytest.approx((24.975, 974.025))
    assert ends(np.array([1.0, np.inf, np.inf]), 2, "nearest") == (1.0, math.inf)
    assert np.isnan(ends(drawn, 1)).all()
    assert np.isnan(bootstrap_interval(np.array([3.0]), np.array([4.0]))).all()
    low, high = bootstrap_interval(np.array([0.0, 4.0]), np.array([4.0, 4.0]))
    assert (low, high) == (0.0, 1.0)


def test_one_case_has_no_interval() -> None:
    both = ("ES", "PS", "NS", "RS", "DNS")
    won = [Answer(metric, -1.0, -2.0) for metric in both]  # type: ignore[arg-type]
    half = [*won, *(Answer(metric, -2.0, -1.0) for metric in both)]  # type: ignore[arg-type]
    lost = [Answer(metric, -2.0, -1.0) for metric in both for _ in range(2)]  # type: ignore[arg-type]
    for names, is_sure in ((["a"], False), (["a", "b"], True)):
        first, second = dict.fromkeys(names, half), dict.fromkeys(names, lost)
        less = compare(first, second)["RS"]
        whole = average(first.values())
        apart = compare_combined(first, second, ["NS", "RS"])
        grown = growth(first, first, "RS")
        assert whole is not None and apart is not None and grown is not None
        assert (less.value, whole.value, apart.value, grown.value) == (50.0, 50.0, 50.0, 0.0)
        for found in (less, whole, apart, grown):
            assert np.isfinite([found.low, found.high]).all() == is_sure


def test_plain_json() -> None:
    value = {"a": (1, 2.5, float("nan")), "b": [{"c": float("inf")}, None, "NaN", True]}
    assert plain(value) == {"a": [1, 2.5, None], "b": [{"c": None}, None, "NaN", True]}
    assert plain(np.float64("nan")) is None
    text = result_json(value)
    assert json.loads(text, parse_constant=pytest.fail) == plain(value)
    assert text.endswith("}\n")
