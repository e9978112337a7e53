"""Charts: functions from arrays to plotly figures, without side effects.

Layers are on the y axis with layer 0 at the bottom, heads on the x axis. Attention uses one
sequential scale for all states; signed quantities a diverging, colour-blind-safe scale that
is symmetric around 0.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "responsive": True,
}
"""How figures are shown and written: no cloud button."""


class Figure(go.Figure):  # type: ignore[misc]
    """A plotly figure that is shown and written with `CONFIG` unless told otherwise."""

    def show(self, *args: Any, **kwargs: Any) -> None:
        """As of any figure, without the cloud button."""
        pio.show(self, *args, **{"config": dict(CONFIG), **kwargs})

    def to_html(self, *args: Any, **kwargs: Any) -> str:
        """As of any figure, without the cloud button."""
        return pio.to_html(self, *args, **(kwargs if args else {"config": dict(CONFIG), **kwargs}))

    def write_html(self, *args: Any, **kwargs: Any) -> None:
        """As of any figure, without the cloud button."""
        pio.write_html(
            self, *args, **(kwargs if len(args) > 1 else {"config": dict(CONFIG), **kwargs})
        )

    def _ipython_display_(self) -> None:
        self.show()


SEQUENTIAL = "Cividis"
DIVERGING = "PuOr_r"
COLOURS = [
    "#3b4cc0", "#b35806", "#1b7837", "#762a83", "#666666", "#d01c8b",
    "#1fa8c9", "#c9a400", "#a50026", "#7fbc41", "#000000",
]  # fmt: skip
"""Enough for the unedited model and every editor."""
HATCHINGS = ("/", "\\", "x", ".", "-", "|", "+")
"""One for each restriction."""
PANEL_TITLE = 30
"""Characters of a line above a panel."""
LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"family": "Inter, Helvetica Neue, Arial, sans-serif", "size": 13},
    "margin": {"l": 60, "r": 20, "t": 70, "b": 55},
}


def head_maps(
    panels: Mapping[str, np.ndarray],
    *,
    title: str,
    signed: Sequence[str] = (),
    unit: str = "attention probability",
    signed_unit: str = "change of attention",
    limit: float | None = None,
) -> go.Figure:
    """Layer x head maps side by side.

    Args:
        panels: Title of each panel and its ``[layer, head]`` values; NaN stays blank.
        signed: Titles of the panels that show signed values.
        unit: Of the others, for the colour bar.
        signed_unit: Of the signed ones.
        limit: Top of the common sequential scale; by default the largest value.
    """
    names = list(panels)
    plain = [np.asarray(panels[n], dtype=float) for n in names if n not in signed]
    diverging = [np.asarray(panels[n], dtype=float) for n in signed if n in panels]
    wrapped = [textwrap.wrap(name, PANEL_TITLE) or [""] for name in names]
    titles = ["<br>".join(map(_as_text, lines)) for lines in wrapped]
    fig = make_subplots(cols=len(names), subplot_titles=titles, horizontal_spacing=0.06)
    for column, name in enumerate(names, start=1):
        values = np.asarray(panels[name], dtype=float)
        axis = "coloraxis2" if name in signed else "coloraxis"
        layers, heads = values.shape
        labels = [[f"L{y}H{x}" for x in range(heads)] for y in range(layers)]
        fig.add_heatmap(
            z=values,
            x=list(range(heads)),
            y=list(range(layers)),
            text=labels,
            coloraxis=axis,
            hovertemplate="%{text}: %{z:.4f}<extra>" + _in_template(name) + "</extra>",
            xgap=0.5,
            ygap=0.5,
            row=1,
            col=column,
        )
        fig.update_xaxes(title_text="head", dtick=_tick(heads), showgrid=False, row=1, col=column)
        fig.update_yaxes(showgrid=False, dtick=_tick(layers), row=1, col=column)
    fig.update_yaxes(title_text="layer", row=1, col=1)
    layout: dict[str, Any] = dict(LAYOUT)
    if plain:
        top = limit if limit is not None else _largest(plain)
        layout["coloraxis"] = {
            "colorscale": SEQUENTIAL,
            "cmin": 0.0,
            "cmax": top,
            "colorbar": {"title": {"text": unit, "side": "right"}, "x": 1.01, "len": 0.95},
        }
    if diverging:
        top = _largest([np.abs(d) for d in diverging])
        layout["coloraxis2"] = {
            "colorscale": DIVERGING,
            "cmin": -top,
            "cmax": top,
            "colorbar": {
                "title": {"text": signed_unit, "side": "right"},
                "x": 1.13 if plain else 1.01,
                "len": 0.95,
            },
        }
    room = 30 + 18 * (max(map(len, wrapped)) - 1)
    fig.update_layout({**layout, **_header(title, 300 * len(names) + 240, room=room)})
    return Figure(fig)


def sweep_chart(
    heads: np.ndarray,
    layers: np.ndarray,
    windows: Sequence[tuple[int, int]],
    window_values: np.ndarray,
    *,
    everything: float,
    title: str,
    subtitle: str = "",
    unit: str,
) -> go.Figure:
    """A patch sweep: each head as a map, each layer and each window of layers as lines.

    Args:
        heads: ``[layer, head]``.
        layers: ``[layer]``.
        windows: First and last layer of each window, inclusive.
        window_values: One value for each window.
        everything: The value with all layers and heads patched at once.
        unit: Of all values.
    """
    unit = _as_text(unit)
    fig = make_subplots(
        cols=2,
        column_widths=[0.42, 0.58],
        horizontal_spacing=0.2,
        subplot_titles=["one head at a time", "one layer, or a window of layers, at a time"],
    )
    n_layers, n_heads = heads.shape
    top = _largest([np.abs(heads)])
    fig.add_heatmap(
        z=heads,
        text=[[f"L{y}H{x}" for x in range(n_heads)] for y in range(n_layers)],
        hovertemplate="%{text}: %{z:.4f}<extra></extra>",
        colorscale=DIVERGING,
        zmin=-top,
        zmax=top,
        xgap=0.5,
        ygap=0.5,
        colorbar={"title": {"text": unit, "side": "right"}, "x": 0.37, "len": 0.95},
        row=1,
        col=1,
    )
    fig.add_scatter(
        x=list(range(n_layers)), y=layers, mode="lines+markers", name="one layer",
        line={"color": COLOURS[0]}, row=1, col=2,
    )  # fmt: skip
    if windows:
        width = windows[0][1] - windows[0][0] + 1
        fig.add_scatter(
            x=[(first + last) / 2 for first, last in windows],
            y=window_values,
            mode="lines+markers",
            name=f"{width} layers around",
            line={"color": COLOURS[1]},
            customdata=[f"layers {first}-{last}" for first, last in windows],
            hovertemplate="%{customdata}: %{y:.4f}<extra></extra>",
            row=1,
            col=2,
        )
    if np.isfinite(everything):
        fig.add_hline(
            y=everything, line={"dash": "dot", "color": "#666666"},
            annotation_text="all layers", row=1, col=2,
        )  # fmt: skip
    fig.update_xaxes(title_text="head", dtick=_tick(n_heads), showgrid=False, row=1, col=1)
    fig.update_yaxes(title_text="layer", dtick=_tick(n_layers), showgrid=False, row=1, col=1)
    fig.update_xaxes(title_text="layer (centre of the window)", row=1, col=2)
    fig.update_yaxes(title_text=unit, row=1, col=2)
    legend = {"orientation": "h", "y": -0.15, "x": 0.5}
    fig.update_layout({**LAYOUT, "legend": legend, **_header(title, 1080, subtitle)})
    return Figure(fig)


def edit_trace(trace: Sequence[Mapping[str, Any]], *, title: str, subtitle: str = "") -> go.Figure:
    """Loss terms, probability of the target and heads held, by optimisation step.

    A trace of several facts (column ``fact``) is drawn as the mean over the facts that were
    still being optimised at a step, with each fact's probability as a thin line.
    """
    facts = list(dict.fromkeys(record.get("fact", 0) for record in trace))
    mean = _mean_by_step(trace)
    second = [name for name in ("target_prob", "held_heads") if mean and name in mean[0]]
    fig = make_subplots(
        rows=1 + len(second), shared_xaxes=True, vertical_spacing=0.06,
        row_heights=[0.6, *[0.4 / max(1, len(second))] * len(second)],
    )  # fmt: skip
    skipped = {"step", "fact", "delta_norm", "target_is_greedy", *second}
    names = [name for name in (mean[0] if mean else {}) if name not in skipped]
    steps = [record["step"] for record in mean]
    drawn = "lines" if len(steps) > 1 else "markers"  # a line of one point is nothing to see
    for index, name in enumerate(names):
        fig.add_scatter(
            x=steps, y=[record[name] for record in mean], name=name, mode=drawn,
            line={"color": COLOURS[index % len(COLOURS)], "width": 3 if name == "loss" else 1.5},
            row=1, col=1,
        )  # fmt: skip
    fig.update_yaxes(title_text="loss (nats)", row=1, col=1)
    titles = {"target_prob": "P(target)", "held_heads": "heads held"}
    for row, name in enumerate(second, start=2):
        for fact in facts[:MOST_LINES] if len(facts) > 1 and name == "target_prob" else []:
            own = [record for record in trace if record["fact"] == fact]
            fig.add_scatter(
                x=[record["step"] for record in own], y=[record[name] for record in own],
                name=f"fact {fact}", mode="lines", showlegend=False,
                line={"color": "#bbbbbb", "width": 0.7}, row=row, col=1,
            )  # fmt: skip
        fig.add_scatter(
            x=steps, y=[record[name] for record in mean], name=titles[name], mode=drawn,
            line={"color": "#333333"}, showlegend=False, row=row, col=1,
        )  # fmt: skip
        fig.update_yaxes(title_text=titles[name], rangemode="tozero", row=row, col=1)
    fig.update_xaxes(title_text="step", row=1 + len(second), col=1)
    if len(facts) > 1:
        shown = f", {MOST_LINES} of them as lines" if len(facts) > MOST_LINES else ""
        subtitle = f"{subtitle}; mean over {len(facts)} facts while optimised{shown}".lstrip("; ")
    fig.update_layout({**LAYOUT, **_header(title, 760, subtitle)})
    return Figure(fig)


MOST_LINES = 100
"""Of single facts in one panel."""


def _mean_by_step(trace: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Over the records of each step."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for record in trace:
        by_step.setdefault(record["step"], []).append(record)
    return [
        {name: float(np.mean([record[name] for record in records])) for name in records[0]}
        for _, records in sorted(by_step.items())
    ]


def probability_bars(
    groups: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    subtitle: str = "",
    unit: str = "probability",
) -> go.Figure:
    """Grouped bars: for each state (x axis), the probability of each answer."""
    answers = list(dict.fromkeys(answer for bars in groups.values() for answer in bars))
    fig = Figure()
    for index, answer in enumerate(answers):
        fig.add_bar(
            x=list(groups),
            y=[bars.get(answer, float("nan")) for bars in groups.values()],
            name=_as_text(answer),
            marker_color=COLOURS[index % len(COLOURS)],
            hovertemplate="%{x}: %{y:.4f}<extra>%{fullData.name}</extra>",
        )
    fig.update_yaxes(title_text=unit, rangemode="tozero")
    fig.update_layout({**LAYOUT, "barmode": "group", **_header(title, 620, subtitle)})
    return fig


def rate_bars(
    rows: pd.DataFrame,
    metrics: Sequence[str],
    *,
    title: str,
    unit: str = "%",
    top: float | None = 104,
    separator: str = " + ",
) -> go.Figure:
    """Values of metrics with their intervals: a colour for each editor, a hatching for each
    restriction.

    Args:
        rows: Columns ``arm``, ``metric``, ``value``, ``low`` and ``high``.
        metrics: Those to show, in order.
        unit: Of the values.
        top: Of the axis; ``None`` leaves it to the values.
        separator: What comes between an editor and its restriction in an arm's name.
    """
    fig = Figure()
    parts = {arm: str(arm).partition(separator) for arm in rows["arm"]}
    editors = list(dict.fromkeys(editor for editor, *_ in parts.values()))
    restrictions = list(dict.fromkeys(held for *_, held in parts.values() if held))
    for arm, own in rows.groupby("arm", sort=False):
        editor, _, held = parts[arm]
        index = editors.index(editor)
        found = own.set_index("metric").reindex(list(metrics))
        fig.add_bar(
            x=list(metrics),
            y=found["value"],
            name=_as_text(str(arm)),
            marker_color=COLOURS[index % len(COLOURS)],
            marker_pattern_shape=(
                HATCHINGS[restrictions.index(held) % len(HATCHINGS)] if held else ""
            ),
            error_y=interval(found),
            hovertemplate="%{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
        )
    fig.update_yaxes(title_text=unit, range=None if top is None else [0, top])
    width = max(620, 26 * len(metrics) * rows["arm"].nunique())
    fig.update_layout({**LAYOUT, "barmode": "group", **_header(title, min(width, 1080))})
    return fig


def trade_off(kept: pd.DataFrame, *, title: str) -> go.Figure:
    """What each arm keeps of the edit (x) and of other knowledge (y), with 95 % intervals.

    Arms whose names differ in a number at their end only, such as ``"gamma 0.2"`` and
    ``"gamma 0.8"``, are joined by a line.

    Args:
        kept: Columns ``arm``, ``edit``, ``others``, and each of these two with ``_low`` and
            ``_high``, in %, and with ``_of``, the metrics that it is a mean of.
    """
    fig = Figure()
    kinds = _kinds(kept["arm"])
    for index, kind in enumerate(dict.fromkeys(kinds)):
        own = kept[kinds == kind]
        fig.add_scatter(
            x=own["edit"],
            y=own["others"],
            error_x=interval(own, "edit"),
            error_y=interval(own, "others"),
            text=[_as_text(arm) for arm in own["arm"]],
            name=_as_text(kind),
            mode="lines+markers",
            marker={"size": 10, "color": COLOURS[index % len(COLOURS)]},
            line={"width": 1},
            hovertemplate="%{text}<br>edit %{x:.1f}, other knowledge %{y:.1f}<extra></extra>",
        )
    of_edit, of_others = (
        " / ".join(kept[f"{name}_of"].dropna().unique()) for name in ("edit", "others")
    )
    fig.update_xaxes(title_text=f"mean of {of_edit}, %")
    fig.update_yaxes(title_text=f"mean of {of_others}, %")
    fig.update_layout({**LAYOUT, **_header(title, 760)})
    return fig


def window_lines(rows: pd.DataFrame, name: str, *, title: str) -> go.Figure:
    """Changes by window of layers with their intervals, a panel for each kind of prompt and a
    line for each thing that was patched.

    Args:
        rows: Columns ``kind``, ``patched``, ``layers`` (such as ``"3-8"``; ``"all"`` is left
            out), ``low``, ``high``, and the change.
        name: Column of the change, and title of its axis.
    """
    shown = rows[rows["layers"] != "all"].rename(columns={name: "value"})
    kinds, patched = (list(dict.fromkeys(shown[column])) for column in ("kind", "patched"))
    names = [_as_text(str(kind)) for kind in kinds]
    fig = make_subplots(1, max(1, len(kinds)), subplot_titles=names, shared_yaxes=True)
    for (kind, what), own in shown.groupby(["kind", "patched"], sort=False):
        fig.add_scatter(
            row=1,
            col=kinds.index(kind) + 1,
            x=own["layers"],
            y=own["value"],
            error_y=interval(own),
            name=_as_text(str(what)),
            legendgroup=str(what),
            showlegend=kind == kinds[0],
            mode="lines+markers",
            line={"color": COLOURS[patched.index(what) % len(COLOURS)]},
            hovertemplate="layers %{x}: %{y:+.3f}<extra>%{fullData.name}</extra>",
        )
    fig.update_xaxes(title_text="layers", type="category", tickangle=-60)
    fig.update_yaxes(title_text=name, col=1)
    fig.update_layout({**LAYOUT, **_header(title, 460 * max(2, len(kinds)), room=50)})
    return Figure(fig)


def fitted_scatter(
    points: pd.DataFrame, lines: pd.DataFrame, x_title: str, y_title: str, *, title: str
) -> go.Figure:
    """Points with a line and its interval, a panel for each kind.

    Args:
        points: Columns ``kind``, ``x``, ``y`` and ``text``, which is shown at the pointer.
        lines: Columns ``kind``, ``x``, ``y``, and the interval's ``low`` and ``high``; kinds that
            have none get no line.
        x_title: Of all x axes, with units.
        y_title: Of the y axis.
    """
    kinds = list(dict.fromkeys(points["kind"]))
    names = [_as_text(str(kind)) for kind in kinds]
    fig = make_subplots(1, max(1, len(kinds)), subplot_titles=names, shared_yaxes=True)
    for column, kind in enumerate(kinds, 1):
        own, line = points[points["kind"] == kind], lines[lines["kind"] == kind]
        colour = COLOURS[(column - 1) % len(COLOURS)]
        common = {"row": 1, "col": column, "showlegend": False}
        fig.add_scatter(
            x=[*line["x"], *line["x"][::-1]],
            y=[*line["high"], *line["low"][::-1]],
            name="95 % interval",
            fill="toself",
            fillcolor=colour,
            opacity=0.2,
            line={"width": 0},
            hoverinfo="skip",
            **common,
        )
        fig.add_scatter(
            x=line["x"], y=line["y"], name="least squares", mode="lines",
            line={"color": colour}, hoverinfo="skip", **common,
        )  # fmt: skip
        fig.add_scatter(
            x=own["x"],
            y=own["y"],
            text=[_as_text(text) for text in own["text"]],
            name=names[column - 1],
            mode="markers",
            marker={"color": colour, "opacity": 0.6},
            hovertemplate="%{text}<br>%{x:.3f}, %{y:.3f}<extra></extra>",
            **common,
        )
    fig.update_xaxes(title_text=x_title)
    fig.update_yaxes(title_text=y_title, col=1)
    fig.update_layout({**LAYOUT, **_header(title, 460 * max(2, len(kinds)), room=50)})
    return Figure(fig)


def interval(rates: pd.DataFrame, name: str = "value") -> dict[str, Any]:
    """Error bars of a trace from columns of values, and of the lower and upper ends: ``value``,
    ``low`` and ``high``, or ``NAME``, ``NAME_low`` and ``NAME_high``."""
    low, high = ("low", "high") if name == "value" else (f"{name}_low", f"{name}_high")
    value = rates[name].astype(float)  # of a file, what is no number is None
    return {
        "array": rates[high].astype(float) - value,
        "arrayminus": value - rates[low].astype(float),
        "thickness": 1,
        "width": 2,
    }


def _as_text(text: str) -> str:
    """A text that a chart shows as it is, not as markup (quotes are none there)."""
    return html.escape(text, quote=False)


def _in_template(text: str) -> str:
    """The same in a template of hover texts, where ``%{`` begins a variable."""
    return _as_text(text).replace("%{", "%\u200b{")


def _header(title: str, width: int, subtitle: str = "", room: int = 30) -> dict[str, Any]:
    """Layout of a title that is wrapped to the figure's width, shown as text and not as markup.

    Args:
        room: Pixels between the title and the plot, e.g. for titles of panels.
    """
    lines = textwrap.wrap(title, max(20, width // 9)) or [""]
    small = textwrap.wrap(subtitle, max(20, width // 7))
    text = "<br>".join(_as_text(line) for line in lines)
    text += "".join(f"<br><sub>{_as_text(line)}</sub>" for line in small)
    top = 24 * len(lines) + 20 * len(small) + room
    height = 440 + top
    return {
        "title": {"text": text, "y": 1 - 26 / height, "yref": "container", "yanchor": "top"},
        "margin": {**LAYOUT["margin"], "t": top + 16},
        "width": width,
        "height": height,
    }


def _largest(arrays: Sequence[np.ndarray]) -> float:
    """The largest finite value, or 1 where there is none to show."""
    finite = [a[np.isfinite(a)] for a in arrays]
    top = max((float(f.max()) for f in finite if f.size), default=0.0)
    return top if top > 0 else 1.0


def _tick(count: int) -> int:
    return max(1, round(count / 12))


def _kinds(arms: pd.Series) -> pd.Series:
    """What arms of a series have in common, their names without their numbers; the whole name of
    one that is in no series."""
    stems = arms.str.replace(r" [-+]?\d+(\.\d+)?(e[-+]?\d+)?$", "", regex=True)
    return stems.where(stems.duplicated(keep=False), arms)
