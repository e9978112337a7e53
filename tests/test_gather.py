"""Findings of several models in one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from driftlens.errors import DataError
from driftlens.experiments import gather


def finding(folder: Path, model: str, name: str = "table3", **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    rates = {"value": 50.0, "low": 40.0, "high": 60.0, "prompts": 4, "cases": 2}
    record = {
        "name": name, "title": "T", "text": f"What {model} does.", "paper": "P",
        "model": {"name": model}, "fingerprint": "f", "data": "facts", "cases": ["a", "b"],
        "quick": False, "seed": 0, "command": "driftlens reproduce table3",
        "seconds_of_last_run": 3,
        "versions": {"torch": "2"}, "arms": [{"name": "rome", "config": {"layer": 1}}],
        "failed": [{"arm": "rome", "case": "b", "reason": "R"}],
        "rows": [{"arm": "rome", "metric": metric, **rates} for metric in ("ES", "RS", "Avg. S")],
        **changes,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(record))
    figure = go.Figure(go.Bar(x=[f"bar of {model}"], y=[1]))
    (folder / f"{name}.figure.json").write_text(figure.to_json())
    return folder


def test_rows_of_all_models_with_how_they_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = finding(tmp_path / "one", "small", differences=[{"arm": "rome", "value": 2.0}])
    other = finding(finding(tmp_path / "other", "large"), "large", "fig6")
    elsewhere = finding(tmp_path / "elsewhere", "small", data="theirs")
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(
        sys, "argv", ["gather", *map(str, (one, other, elsewhere)), "--out", str(out)]
    )
    gather.main()
    table = json.loads((out / "table3.json").read_text())
    assert [run["model"]["name"] for run in table["runs"]] == ["small", "large", "small"]
    assert [run["data"] for run in table["runs"]] == ["facts", "facts", "theirs"]
    assert [run["text"] for run in table["runs"]][:2] == ["What small does.", "What large does."]
    assert table["runs"][0]["arms"][0]["config"] == {"layer": 1}
    assert table["runs"][0]["failed"][0]["case"] == "b"
    assert table["runs"][0]["differences"] == [{"arm": "rome", "value": 2.0}]
    assert table["runs"][1]["probabilities"] == []
    assert [(row["model"], row["data"], row["metric"]) for row in table["rows"]] == [
        (*place, metric)
        for place in (("small", "facts"), ("large", "facts"), ("small", "theirs"))
        for metric in ("ES", "RS", "Avg. S")
    ]
    assert len(json.loads((out / "fig6.json").read_text())["runs"]) == 1
    shown = capsys.readouterr().out
    cell = "50.0 [40.0, 60.0]"
    assert f"| facts | large | rome | {cell} | {cell} | - | - | {cell} | - |" in shown
    assert f"| theirs | small | rome | {cell} |" in shown


def test_what_cannot_be_gathered_is_said(tmp_path: Path) -> None:
    one = finding(tmp_path / "one", "small")
    with pytest.raises(DataError, match="holds no results"):
        gather.gather([one, tmp_path], tmp_path)
    with pytest.raises(DataError, match="of one model on the same data"):
        gather.gather([one, finding(tmp_path / "again", "small")], tmp_path)
    with pytest.raises(DataError, match="quick run"):
        gather.gather([finding(tmp_path / "quick", "large", quick=True)], tmp_path)
    (one / "table3.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        gather.gather([one], tmp_path)
    (one / "table3.json").write_text(json.dumps({"quick": False}))
    with pytest.raises(DataError, match="is damaged"):
        gather.gather([one], tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_a_page_shows_all_that_was_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = finding(finding(tmp_path / "one", "small"), "small", "fig6")
    other = finding(tmp_path / "other", "large", text="What <large> does.")
    (other / "table3.figure.json").unlink()
    shown = tmp_path / "page.html"
    options = ["gather", str(one), str(other), "--out", str(tmp_path), "--page", str(shown)]
    monkeypatch.setattr(sys, "argv", options)
    gather.main()
    assert f"wrote {shown}" in capsys.readouterr().out
    text = shown.read_text()
    places = [text.index(f'<section id="{name}"') for name in ("table3-0", "table3-1", "fig6-0")]
    assert places == sorted(places)
    assert "T: large, facts" in text and "What &lt;large&gt; does." in text
    assert text.count("bar of small") == 2 and "bar of large" not in text
    assert "2 cases: driftlens reproduce table3" in text and text.count("The paper: P") == 2
    shown.unlink()
    monkeypatch.setattr(sys, "argv", [*options[:1], *options[3:]])
    gather.main()
    again = shown.read_text().replace(f"--out {tmp_path}", f"{one} {other} --out {tmp_path}")
    assert again == text
    (tmp_path / "fig6.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"Error: .*fig6\.json is damaged"):
        gather.main()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no gathered results"):
        gather.page(tmp_path / "empty", "gather")
    monkeypatch.setattr(sys, "argv", ["gather"])
    with pytest.raises(SystemExit):
        gather.main()
    assert "give folders to gather, or --page" in capsys.readouterr().err


def test_tables_of_what_is_inside() -> None:
    window = {
        "model": "small", "data": "facts", "kind": "relation", "prompts": 7, "low": -0.02,
        "high": 0.031, "change of P(new target)": 0.5, "new low": 0.25, "new high": 0.75,
        "lost P(answer)": 0.2, "lost low": 0.15, "lost high": 0.25,
        "share, %": 30.4, "share low": -5.0, "share high": 60.0,
    }  # fmt: skip
    rows = [
        {**window, "patched": what, "layers": layers, "change of P(answer)": change}
        for what in ("pattern", "values")
        for layers, change in (("0-1", -0.01), ("1-2", 0.012), ("all", 0.05))
    ]
    rows[2] |= {"share, %": None}
    table = gather.restored_markdown({"rows": rows}).splitlines()
    assert table[0] == (
        "| data | model | prompts | number | P(answer) lost | pattern | values | best window of "
        "patterns |"
    )
    assert table[2:] == [
        "| facts | small | relation | 7 | 0.200 [0.150, 0.250] | +5.0 [-2.0, +3.1] points | "
        "30 % [-5, 60] | 1-2: 30 % [-5, 60] |"
    ]
    table = gather.substituted_markdown({"rows": rows}).splitlines()
    assert table[0] == "| data | model | prompts | component | layers | P(answer) | P(new target) |"
    assert table[2:] == [
        f"| facts | small | relation | {what} | 0-1 | -1.0 [-2.0, +3.1] | +50.0 [+25.0, +75.0] |"
        for what in ("pattern", "values")
    ]
    correlations = [
        {"data": "facts", "model": "small", "kind": "relation", "damage": "fall",
         "prompts": 7, "drift": drift,
         "pearson": r, "pearson_low": None, "pearson_high": 0.5}
        for drift, r in (("max head", 0.254), ("row KL", None))
    ]  # fmt: skip
    table = gather.correlated_markdown({"rows": correlations}).splitlines()
    assert table[0] == "| data | model | prompts | damage | number | max head | row KL |"
    assert table[2:] == ["| facts | small | relation | fall | 7 | 0.25 [-, 0.50] | - [-, 0.50] |"]
