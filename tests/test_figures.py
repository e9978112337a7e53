"""Charts of rates: what is drawn is what was measured."""

from __future__ import annotations

import pandas as pd
import pytest

from driftlens import figures
from driftlens.editing.methods import METHODS

RATES = pd.DataFrame(
    [
        ("rome", "ES", 90.0, 80.0, 95.0),
        ("rome", "RS", 30.0, 20.0, 45.0),
        ("rome + sadr", "ES", 88.0, 79.0, 93.0),
        ("<b>memit</b>", "RS", 40.0, 30.0, 50.0),
    ],
    columns=["arm", "metric", "value", "low", "high"],
)


def test_bars_are_values_with_their_intervals() -> None:
    figure = figures.rate_bars(RATES, ["RS", "ES"], title="T", unit="points", top=110)
    plain, held, other = figure.data
    assert [plain.name, held.name, other.name] == [
        "rome", "rome + sadr", "&lt;b&gt;memit&lt;/b&gt;",
    ]  # fmt: skip
    assert list(plain.x) == ["RS", "ES"]
    assert list(plain.y) == [30.0, 90.0]
    assert list(plain.error_y.array) == [15.0, 5.0]
    assert list(plain.error_y.arrayminus) == [10.0, 10.0]
    assert pd.isna(held.y[0]) and held.y[1] == 88.0  # not asked: no bar
    # An editor keeps its colour, restricted or not, and only the restricted one is hatched.
    assert plain.marker.color == held.marker.color != other.marker.color
    assert (plain.marker.pattern.shape, held.marker.pattern.shape) == ("", "/")
    assert figure.layout.yaxis.title.text == "points"
    assert tuple(figure.layout.yaxis.range) == (0, 110)
    assert figures.rate_bars(RATES, ["ES"], title="T", top=None).layout.yaxis.range is None


def test_every_editor_has_a_colour_of_its_own() -> None:
    arms = ["unedited", *METHODS]
    rows = pd.DataFrame([(arm, "ES", 50.0, 40.0, 60.0) for arm in arms], columns=RATES.columns)
    bars = figures.rate_bars(rows, ["ES"], title="T").data
    assert len({bar.marker.color for bar in bars}) == len(arms)


def test_trade_offs_join_what_differs_in_its_number() -> None:
    kept = pd.DataFrame(
        [
            ("rome", 97.0, 95.0, 98.0, 50.0, 40.0, 55.0),
            ("rome, gamma 0.2", 96.0, 93.0, 97.0, 55.0, 50.0, 65.0),
            ("rome, gamma 0.8", 90.0, 85.0, 96.0, 60.0, 52.0, 64.0),
            ("rome, KL 4", 91.0, 90.0, 92.0, 51.0, 50.0, 52.0),
        ],
        columns=["arm", "edit", "edit_low", "edit_high", "others", "others_low", "others_high"],
    ).assign(edit_of="ES, PS", others_of="NS, RS")
    figure = figures.trade_off(kept, title="T")
    plain, gamma, kl = figure.data
    assert [plain.name, gamma.name, kl.name] == ["rome", "rome, gamma", "rome, KL"]
    assert (list(gamma.x), list(gamma.y)) == ([96.0, 90.0], [55.0, 60.0])
    assert list(gamma.text) == ["rome, gamma 0.2", "rome, gamma 0.8"]
    assert list(gamma.error_x.array) == [1.0, 6.0]
    assert list(gamma.error_x.arrayminus) == [3.0, 5.0]
    assert list(gamma.error_y.array) == [10.0, 4.0]
    assert list(gamma.error_y.arrayminus) == [5.0, 8.0]
    assert "lines" in gamma.mode
    assert figure.layout.xaxis.title.text == "mean of ES, PS, %"
    assert figure.layout.yaxis.title.text == "mean of NS, RS, %"


@pytest.mark.parametrize("name", ["value", "others"])
def test_intervals_are_lengths_and_not_ends(name: str) -> None:
    ends = ("low", "high") if name == "value" else ("others_low", "others_high")
    frame = pd.DataFrame({name: [5.0, 7.0], ends[0]: [4.0, 7.0], ends[1]: [8.0, 7.5]})
    bars = figures.interval(frame, name)
    assert list(bars["array"]) == [3.0, 0.5]
    assert list(bars["arrayminus"]) == [1.0, 0.0]


def test_windows_have_intervals_and_a_panel_for_each_kind() -> None:
    rows = pd.DataFrame(
        [
            ("relation", "pattern", "0-3", 0.1, 0.0, 0.3),
            ("relation", "pattern", "2-5", 0.2, 0.1, 0.25),
            ("relation", "pattern", "all", 0.9, 0.8, 1.0),
            ("relation", "values", "0-3", 0.4, 0.3, 0.5),
            ("<i>other</i>", "values", "0-3", -0.1, -0.2, 0.1),
        ],
        columns=["kind", "patched", "layers", "change", "low", "high"],
    )
    figure = figures.window_lines(rows, "change", title="T")
    pattern, values, other = figure.data
    assert (list(pattern.x), list(pattern.y)) == (["0-3", "2-5"], [0.1, 0.2])
    assert list(pattern.error_y.array) == pytest.approx([0.2, 0.05])
    assert list(pattern.error_y.arrayminus) == pytest.approx([0.1, 0.1])
    assert values.line.color == other.line.color != pattern.line.color
    assert (values.xaxis, other.xaxis) == ("x", "x2")
    assert (values.showlegend, other.showlegend) == (True, False)
    assert figure.layout.xaxis.type == "category"  # 2-5 is not a date
    assert [note.text for note in figure.layout.annotations] == [
        "relation", "&lt;i&gt;other&lt;/i&gt;",
    ]  # fmt: skip


def test_a_line_and_its_interval_lie_on_its_own_points() -> None:
    points = pd.DataFrame(
        {"kind": ["a", "a", "b"], "x": [0.0, 1.0, 5.0], "y": [1.0, 2.0, 7.0], "text": ["<", "", ""]}
    )
    lines = pd.DataFrame(
        {"kind": "a", "x": [0.0, 1.0], "y": [1.0, 2.0], "low": [0.5, 1.0], "high": [1.5, 3.0]}
    )
    figure = figures.fitted_scatter(points, lines, "drift", "fall", title="T")
    band, line, dots, *_, alone = figure.data
    assert (list(band.x), list(band.y)) == ([0.0, 1.0, 1.0, 0.0], [1.5, 3.0, 1.0, 0.5])
    assert (list(line.x), list(line.y)) == ([0.0, 1.0], [1.0, 2.0])
    assert (list(dots.x), list(dots.y)) == ([0.0, 1.0], [1.0, 2.0])
    assert dots.text[0] == "&lt;"
    assert (alone.xaxis, list(alone.x), list(alone.y)) == ("x2", [5.0], [7.0])
    assert [len(trace.x) for trace in figure.data[3:5]] == [0, 0]  # b has no line
    assert figure.layout.xaxis2.title.text == "drift"
