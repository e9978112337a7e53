"""Charts of rates: what is drawn is what was measured."""

from __future__ import annotations

import numpy as np
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


def test_every_restriction_has_a_hatching_of_its_own() -> None:
    arms = [f"{editor} + {held}" for editor in ("rome", "memit")
            for held in ("sadr", "key-drift", "sadr + key-drift")]  # fmt: skip
    rows = pd.DataFrame([(arm, "ES", 50.0, 40.0, 60.0) for arm in arms], columns=RATES.columns)
    shapes = [bar.marker.pattern.shape for bar in figures.rate_bars(rows, ["ES"], title="T").data]
    assert len(set(shapes[:3])) == 3
    assert shapes[3:] == shapes[:3]


def test_what_ends_in_a_word_with_a_number_is_no_series() -> None:
    names = pd.Series(["plan 4-6", "plan 7-9", "plan 2nd", "keys 0.003", "keys 1e-2", "rome at 8"])
    assert figures._kinds(names).tolist() == [*names[:3], "keys", "keys", names[5]]


def test_titles_of_panels_are_no_wider_than_panels() -> None:
    name = "edited with SADR + KEY-DRIFT - original"
    figure = figures.head_maps({"original": np.zeros((2, 2)), name: np.zeros((2, 2))}, title="T")
    titles = [note.text for note in figure.layout.annotations]
    assert titles == ["original", "edited with SADR + KEY-DRIFT -<br>original"]
    assert name in figure.data[1].hovertemplate
    alone = figures.head_maps({"original": np.zeros((2, 2))}, title="T")
    assert figure.layout.margin.t == alone.layout.margin.t + 18  # of the second line


def test_texts_are_no_markup() -> None:
    name = '<i>a</i> & "b" %{z}'
    shown = '&lt;i&gt;a&lt;/i&gt; &amp; "b" %{z}'
    figure = figures.head_maps({name: np.zeros((2, 2))}, title=name)
    assert figure.layout.title.text == figure.layout.annotations[0].text == shown
    assert "%{z}" not in figure.data[0].hovertemplate.partition("<extra>")[2]
    swept = figures.sweep_chart(
        np.zeros((2, 2)), np.zeros(2), [], np.zeros(0), everything=0.0, title=name, unit=name
    )
    assert swept.layout.yaxis2.title.text == swept.data[0].colorbar.title.text == shown
    bars = figures.probability_bars({"edited": {name: 0.5}}, title="T")
    assert bars.data[0].name == shown


def test_a_trace_of_one_step_can_be_seen() -> None:
    steps = [{"step": i, "loss": 1.0, "nll": 1.0, "target_prob": 0.5} for i in range(2)]
    for length, mode in ((1, "markers"), (2, "lines")):
        drawn = figures.edit_trace(steps[:length], title="T")
        assert {line.mode for line in drawn.data} == {mode}


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
    # One alone is no series: its number is a part of its name.
    assert [plain.name, gamma.name, kl.name] == ["rome", "rome, gamma", "rome, KL 4"]
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
