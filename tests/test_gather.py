"""Findings of several models in one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from driftlens.errors import DataError
from driftlens.experiments import gather, tables


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
    assert f"wrote {out / 'fig6.json'}" in capsys.readouterr().out
    main = tables.main_markdown(table).splitlines()
    assert main[:-7] == tables.markdown(table).splitlines()
    assert main[-7] == (
        "| the paper's table | GPT-J 6B | unedited | 34.4 | 20.9 | 17.7 | 82.4 | 79.7 | 62.0 |"
    )
    assert main[-5].startswith("| the paper's table | GPT-J 6B | rome + sadr | 57.7 | 99.8 |")
    cell, shown = "50.0 [40.0, 60.0]", tables.markdown(table)
    assert f"| facts | large | rome (1 failed) | {cell} | {cell} | - | - | {cell} | - |" in shown
    assert f"| theirs | small | rome (1 failed) | {cell} |" in shown


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


def test_what_was_gathered_before_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    small, large = (finding(tmp_path / name, name) for name in ("small", "large"))
    gather.gather([small], out)
    gather.gather([large], out)
    one_by_one = (out / "table3.json").read_text()
    (out / "table3.json").unlink()
    gather.gather([small, large], out)
    assert (out / "table3.json").read_text() == one_by_one
    # Of the same model and data, the new one counts; the others keep their places.
    rows = [{"arm": "memit"}]
    gather.gather([finding(small, "small", text="Another.", rows=rows, paper="It says.")], out)
    table = json.loads((out / "table3.json").read_text())
    assert [run["text"] for run in table["runs"]] == ["Another.", "What large does."]
    assert [row["arm"] for row in table["rows"]] == ["memit", *["rome"] * 3]
    assert table["paper"] == "It says."
    gather.gather([finding(large, "large", paper="It says more.")], out)
    assert json.loads((out / "table3.json").read_text())["paper"] == "It says more."
    (out / "table3.json").write_text(json.dumps({"runs": []}))
    with pytest.raises(DataError, match=r"table3\.json is damaged.*gather all of its results"):
        gather.gather([large], out)


def test_texts_are_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(tables.TABLES, "sequential")  # what has no table is told
    one = finding(
        finding(tmp_path / "one", "small"), "small", "sequential", points=["One.", "Two."]
    )
    other = finding(
        finding(tmp_path / "other", "large"), "large", "sequential", command="another",
        seconds_in_all=5400,
    )  # fmt: skip
    text = tmp_path / "text.md"
    before = "Before.\n\n<!-- gathered {} -->\nold\n<!-- end -->\n\nAfter.\n"
    text.write_text(before.format("table3") + before.format("sequential"))
    options = ["gather", str(one), str(other), "--out", str(tmp_path), "--into", str(text)]
    monkeypatch.setattr(sys, "argv", options)
    gather.main()
    assert f"wrote {text}" in capsys.readouterr().out
    table = tables.main_markdown(json.loads((tmp_path / "table3.json").read_text()))
    expected = (
        "Before.\n\n<!-- gathered table3 -->\n\n" + table + "\n\n"
        "    driftlens reproduce table3\n\n<!-- end -->\n\nAfter.\n"
        "Before.\n\n<!-- gathered sequential -->\n\n"
        "*small, facts, 2 cases.* What small does.\n\n- One.\n- Two.\n\n"
        "*large, facts, 2 cases.* What large does.\n\n"
        "    driftlens reproduce table3\n    another  # sequential: 1.5 hours of work\n\n"
        "<!-- end -->\n\nAfter.\n"
    )
    assert text.read_text() == expected
    monkeypatch.setattr(sys, "argv", [*options[:1], *options[3:]])
    gather.main()
    assert text.read_text() == expected
    with pytest.raises(DataError, match="holds no gathered fig5"):
        gather.fill(before.format("fig5"), tmp_path)
    # A place without an end must not swallow what follows.
    for damaged in (
        before.format("table3").replace("<!-- end -->\n", "") + before.format("sequential"),
        before.format("sequential").replace("<!-- end -->\n", ""),
        "No place.\n",
    ):
        with pytest.raises(DataError, match="Write a line <!-- end --> below each"):
            gather.fill(damaged, tmp_path)
    monkeypatch.setattr(sys, "argv", [*options[:1], *options[3:-1], str(tmp_path / "none.md")])
    with pytest.raises(SystemExit, match=r"Error: .*none\.md cannot be read"):
        gather.main()


def test_a_page_shows_all_that_was_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = finding(finding(tmp_path / "one", "small"), "small", "fig6")
    other = finding(
        tmp_path / "other", "large", text="What <large> does.", points=["A <point>."],
        seconds_in_all=100,
    )  # fmt: skip
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
    assert "<li>A &lt;point&gt;.</li>" in text
    assert text.count("bar of small") == 2 and "bar of large" not in text
    assert "2 cases: driftlens reproduce table3" in text
    assert "2 cases, 2 minutes of work: driftlens reproduce table3" in text
    assert text.count("The paper: P") == 2
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


def test_fluency_has_a_table_of_its_own(tmp_path: Path) -> None:
    rate = {"arm": "rome", "value": 612.3, "low": 600.0, "high": 620.0, "prompts": 2, "cases": 2}
    one = finding(tmp_path / "one", "small", "fluency", rows=[{"metric": "FL", **rate}])
    gather.gather([one], tmp_path)
    table = tables.TABLES["fluency"](json.loads((tmp_path / "fluency.json").read_text()))
    assert table.splitlines()[0] == "| data | model | arm | FL |"
    assert table.endswith("| small | rome (1 failed) | 612.3 [600.0, 620.0] |")


def test_the_main_table_has_steps_and_the_strength_of_edits_where_they_are_known(
    tmp_path: Path,
) -> None:
    rate = {"value": 50.0, "low": 40.0, "high": 60.0, "prompts": 4, "cases": 2}
    rows = [{"arm": name, "metric": "RS", **rate} for name in ("unedited", "rome")]
    arms = [{"name": "unedited", "steps_per_edit": None}, {"name": "rome", "steps_per_edit": 19.5}]
    probs = [
        {"arm": name, "metric": metric, **rate, "value": value, "low": value, "high": None}
        for name in ("unedited", "rome")
        for metric, value in (("ES", 0.25), ("PS", 0.75))
    ]
    greedy = [{**row, "value": 100 * row["value"]} for row in probs]
    new = finding(
        tmp_path / "new", "small", arms=arms, rows=rows, probabilities=probs, greedy=greedy
    )
    old = finding(tmp_path / "old", "large", rows=rows[1:])
    gather.gather([new, old], tmp_path)
    table = tables.TABLES["table3"](json.loads((tmp_path / "table3.json").read_text())).splitlines()
    assert table[0].endswith("| DNS | steps | ES greedy | P(new target) |")
    ends = [line.rpartition(" 50.0 [40.0, 60.0] | - | ")[2] for line in table[2:-7]]
    told = "25.0 [0.2, -] | 0.250 [0.250, -] |"
    assert ends == [f"- | {told}", f"19.5 | {told}", "- | - | - |"]


def test_restricted_edits_have_the_steps_that_they_take(tmp_path: Path) -> None:
    arms = [
        {"name": name, "steps_per_edit": steps} for name, steps in (("rome", 19.5), ("no", None))
    ]
    rate = {"value": 50.0, "low": 40.0, "high": 60.0, "prompts": 4, "cases": 2}
    rows = [{"arm": name, "metric": "RS", **rate} for name in ("rome", "no")]
    small = finding(tmp_path / "one", "small", "fig6", arms=arms, rows=rows)
    other = [{"name": "rome", "steps_per_edit": 20.0}]
    large = finding(tmp_path / "other", "large", "fig6", arms=other, rows=rows[:1])
    gather.gather([small, large], tmp_path)
    record = json.loads((tmp_path / "fig6.json").read_text())
    table = tables.TABLES["fig6"](record).splitlines()
    assert table[0] == "| data | model | arm | ES | PS | NS | RS | DNS | Avg. S | steps |"
    start, cells = "| facts | {} | {} |", " - | - | - | 50.0 [40.0, 60.0] | - | - | {} |"
    assert table[2:] == [
        start.format(model, arm) + cells.format(steps)
        for model, arm, steps in (
            ("small", "rome (1 failed)", "19.5"),
            ("small", "no", "-"),
            ("large", "rome (1 failed)", "20"),
        )
    ]


def test_a_sequence_is_shown_after_few_some_and_all_facts() -> None:
    def row(model: str, arm: str, facts: int, value: float) -> dict[str, Any]:
        return {
            "data": "d", "model": model, "arm": arm, "facts": facts, "metric": "RS",
            "value": value, "low": 0.0 if facts > 1 else None, "high": 99.0 if facts > 1 else None,
        }  # fmt: skip

    looks = (1, 10, 25, 50, 100, 150)
    rows = [row("small", arm, n, n / 10) for arm in ("unedited", "rome") for n in looks]
    rows += [row("large", "rome", 1, 50.0)]
    table = tables.TABLES["sequential"]({"rows": rows}).splitlines()
    assert table[0] == "| data | model | facts | arm | ES | PS | NS | RS | DNS |"
    assert table[2:] == [
        *(
            f"| d | small | {n} | {arm} | - | - | - | {n / 10:.1f} [0.0, 99.0] | - |"
            for n in (10, 50, 150)
            for arm in ("unedited", "rome")
        ),
        "| d | large | 1 | rome | - | - | - | 50.0 [-, -] | - |",
    ]


def test_tables_of_what_is_inside() -> None:
    window = {
        "model": "small", "data": "facts", "kind": "relation", "prompts": 7, "low": -0.02,
        "high": 0.031, "change of P(new target)": 0.5, "new low": 0.25, "new high": 0.75,
        "lost P(answer)": 0.2, "lost low": 0.15, "lost high": 0.25,
        "share, %": 30.4, "share low": -5.0, "share high": 60.0,
        "likelier original, %": 90.4, "likelier edited, %": 12.0, "answer likelier, %": 55.0,
    }  # fmt: skip
    rows = [
        {**window, "patched": what, "layers": layers, "change of P(answer)": change}
        for what in ("pattern", "values")
        for layers, change in (("0-1", -0.01), ("1-2", 0.012), ("all", 0.05))
    ]
    rows[2] |= {"share, %": None}
    alone = {**rows[0], "low": None, "high": None, "new low": None, "new high": None}
    table = tables.substituted_markdown({"rows": [alone]}).splitlines()  # of one case
    assert table[2].endswith(" | -1.0 [-, -] | +50.0 [-, -] |")
    rows[5] |= {"answer likelier, %": 40.0}
    table = tables.restored_markdown({"rows": rows}).splitlines()
    assert table[0] == (
        "| data | model | prompts | number | P(answer) lost | pattern | values | best window of "
        "patterns | answer likelier: original / edited / pattern / values |"
    )
    assert table[2:] == [
        "| facts | small | relation | 7 | 0.200 [0.150, 0.250] | +5.0 [-2.0, +3.1] points | "
        "30 % [-5, 60] | 1-2: 30 % [-5, 60] | 90 / 12 / 55 / 40 % |"
    ]
    heads = [
        {"data": "facts", "model": "small", "kind": "relation", "prompts": 7, "layer": layer,
         "head": head, "pattern": 0.01 * layer, "pattern low": -0.02, "pattern high": None,
         "values": 0.002 * head, "values low": 0.0, "values high": 0.5,
         "lost P(answer)": 0.05, "lost low": 0.025, "lost high": None,
         "drift": -0.1 * layer - 0.0125 * head, "drift low": -0.5, "drift high": 0.25}
        for layer in range(2) for head in range(3)
    ]  # fmt: skip
    table = tables.single_heads_markdown({"rows": heads}).splitlines()
    assert table[0] == (
        "| data | model | prompts | number | P(answer) lost | pattern | values | drift to the "
        "subject |"
    )
    assert table[2:] == [
        "| facts | small | relation | 7 | 5.00 [2.50, -] | "
        "L1H0 +1.00 [-2.00, -]; L1H1 +1.00 [-2.00, -]; L1H2 +1.00 [-2.00, -] | "
        "L0H2 +0.40 [+0.00, +50.00]; L1H2 +0.40 [+0.00, +50.00]; L0H1 +0.20 [+0.00, +50.00] | "
        "L0H0 +0.000 [-0.500, +0.250]; L0H1 -0.013 [-0.500, +0.250]; "
        "L0H2 -0.025 [-0.500, +0.250] |"
    ]
    only = [{key: value for key, value in row.items() if "values" not in key} for row in heads]
    assert "| P(answer) lost | pattern | drift to the" in tables.single_heads_markdown(
        {"rows": only}
    )
    table = tables.substituted_markdown({"rows": rows}).splitlines()
    assert table[0] == "| data | model | prompts | component | layers | P(answer) | P(new target) |"
    assert table[2:] == [
        f"| facts | small | relation | {what} | 0-1 | -1.0 [-2.0, +3.1] | +50.0 [+25.0, +75.0] |"
        for what in ("pattern", "values")
    ]
    correlations = [
        {"data": "facts", "model": "small", "kind": "relation", "damage": "fall",
         "prompts": 7, "drift": drift, "mean": 0.0125, "mean_low": -0.1, "mean_high": None,
         "pearson": r, "pearson_low": None, "pearson_high": 0.5,
         "spearman": -0.5, "spearman_low": -1.0, "spearman_high": 0.25}
        for drift, r in (("max head", 0.254), ("row KL", None))
    ]  # fmt: skip
    table = tables.correlated_markdown({"rows": correlations}).splitlines()
    assert table[0] == (
        "| data | model | prompts | damage | number | mean drift (max head) | max head | row KL |"
    )
    assert table[2:] == [
        "| facts | small | relation | fall | 7 | +0.013 [-0.100, -] | "
        "0.25 [-, 0.50]; -0.50 [-1.00, 0.25] | - [-, 0.50]; -0.50 [-1.00, 0.25] |"
    ]
