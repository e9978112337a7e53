"""Benchmark runs: units, resuming, failing, results."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import re
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from filelock import FileLock

import driftlens as dl
from driftlens import generation
from driftlens.assets import asset
from driftlens.bench import UNEDITED, Arm, BenchResult, Setting, make_arms, run_bench, units
from driftlens.bench.results import CASES, PLAN, UNITS
from driftlens.bench.units import identity
from driftlens.cases import ALL_METRICS, Case, Cloze, Metric, tuning_split
from driftlens.errors import DataError, EditError, ModelError, RequestError
from driftlens.evaluation import Answer, answers, average, harmonic_mean, rates
from driftlens.journal import Journal
from driftlens.readers import read_cases

QUICK = dl.FtConfig(layer=1, steps=3, lr=1e-2)
ARMS = [
    Arm(UNEDITED),
    Arm("ft", "ft-m", QUICK),
    Arm("ft + sadr", "ft-m", QUICK, (dl.SADR(gamma=0.5),)),
]
SEARCH: dict[str, Any] = {"steps": 3, "context_lengths": (2,), "contexts_per_word": 1}
SEARCHED = [
    Arm(UNEDITED),
    Arm("rome", "rome", dl.RomeConfig(layer=1, **SEARCH)),
    Arm("rome + sadr", "rome", dl.RomeConfig(layer=1, **SEARCH), (dl.SADR(gamma=0.5),)),
    Arm("r-rome", "r-rome", dl.RomeConfig(layer=1, **SEARCH)),  # takes the values of rome
    Arm("memit", "memit", dl.MemitConfig(layers=(0, 1), **SEARCH)),
]
"""Editors whose keys' covariance needs the text that is fetched."""


@pytest.fixture(scope="module")
def model() -> dl.LensModel:
    return dl.load_model(tiny.hf_model("gpt2", 1), tiny.tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Facts with prompts of the main kinds only."""
    return [bare(case) for case in read_cases(asset("facts.jsonl"))[:5]]


def bare(case: Case) -> Case:
    return replace(case, aliases=(), reasoning=(), commonsense=(), references=())


def bench(
    model: dl.LensModel, cases: Any, out: Any, arms: Any = ARMS, **options: Any
) -> BenchResult:
    return run_bench(model, cases, arms, out, cases_at_once=2, progress=False, **options)


@pytest.fixture(scope="module")
def whole(
    model: dl.LensModel, cases: list[Case], tmp_path_factory: pytest.TempPathFactory
) -> BenchResult:
    return bench(model, cases, tmp_path_factory.mktemp("bench") / "whole")


def records(result: BenchResult) -> dict[str, Any]:
    """Everything but times."""
    return {
        arm: {
            case: {k: v for k, v in record.items() if k not in ("seconds", "spent")}
            for case, record in found.items()
        }
        for arm, found in result.records.items()
    }


def test_a_unit_is_an_edit_and_what_was_asked(
    model: dl.LensModel, cases: list[Case], whole: BenchResult
) -> None:
    assert whole.is_complete
    assert whole.arms == ["unedited", "ft", "ft + sadr"]
    assert list(whole.cases.values()) == cases
    for case in cases:
        plain = answers(model, case, tuple(ALL_METRICS))
        assert whole.answers("unedited")[case.id] == plain
        edit = dl.edit(model, case.request, "ft-m", config=QUICK, progress=False)
        with edit.applied(model):
            found = answers(model, case, tuple(ALL_METRICS))
        mine = whole.answers("ft")[case.id]
        assert [a.metric for a in mine] == [a.metric for a in found]
        assert [a.right for a in mine] == pytest.approx([a.right for a in found], abs=1e-5)
        record = whole.records["ft"][case.id]
        assert record["steps"] == len(edit.trace)
        assert record["seconds"] > 0


def test_tables(whole: BenchResult, cases: list[Case]) -> None:
    frame = whole.to_dataframe()
    assert set(frame["metric"]) == {
        "ES", "PS", "NS", "RS", "DNS", "distractor", "distract-relation", "lead-neighbour",
        "lead-relation",
    }  # fmt: skip
    expected = rates(whole.answers("ft").values())
    pooled = frame[frame["arm"] == "ft"].groupby("metric")["success"].mean() * 100
    for metric, rate in expected.items():
        assert pooled[metric] == pytest.approx(rate.value)
    table = whole.table().set_index(["arm", "metric"])
    assert table.loc[("ft", "NS"), "value"] == expected["NS"].value
    five = [expected[m].value for m in ("ES", "PS", "NS", "RS", "DNS")]
    assert table.loc[("ft", "Avg. S"), "value"] == pytest.approx(harmonic_mean(five))
    assert "Avg. S" not in whole.table("prob")["metric"].tolist()
    row = frame[(frame["arm"] == "ft") & (frame["metric"] == "ES")].iloc[0]
    case = whole.cases[row["case"]]
    assert (row["prompt"], row["right_text"]) == (case.request.text, case.request.target_new)
    shown = whole.to_markdown()
    assert shown.count("\n") == 1 + len(ARMS)
    assert "| ft + sadr |" in shown
    assert np.isnan(whole.seconds("unedited"))
    assert whole.compare("ft", "ft")["RS"].value == 0.0
    head, *_ = whole.to_markdown(["ES", "distractor"]).splitlines()
    assert head == "| arm | ES | distractor | seconds |"
    assert whole.compare("ft", "unedited", "prob")["ES"].cases == len(cases)
    for of_arm in (whole.text_rates, whole.seconds, whole.steps):
        with pytest.raises(RequestError, match="no arm 'x'"):
            of_arm("x")
    with pytest.raises(RequestError, match="no arm 'x'"):
        whole.answers("x")


def test_a_summary_holds_paired_differences(whole: BenchResult) -> None:
    assert whole.pairs() == [("ft", UNEDITED), ("ft + sadr", "ft")]
    alone = copy.copy(whole)
    alone.plan = {**whole.plan, "arms": [a for a in whole.plan["arms"] if a["name"] != "ft"]}
    assert alone.pairs() == [("ft + sadr", UNEDITED)]  # nothing else to compare it with
    told = whole.summary()
    for measure in ("exact", "prob", "margin"):
        rows = {(row["arm"], row["metric"]): row["value"] for row in told["magnitudes"][measure]}
        assert rows["ft", "RS"] == pytest.approx(whole.rates("ft", measure)["RS"].value)
    found = told["differences"]
    json.dumps(found, allow_nan=False)
    values = {row["arm"]: row["value"] for row in found if row["metric"] == "RS"}
    table = whole.table().set_index(["arm", "metric"])["value"]
    for arm, other in whole.pairs():
        assert values[arm] == pytest.approx(table[arm, "RS"] - table[other, "RS"])
    assert {row["less"] for row in found} == {UNEDITED, "ft"}
    mean = {row["arm"]: row["value"] for row in found if row["metric"] == "Avg. S"}
    for arm, other in whole.pairs():
        assert mean[arm] == pytest.approx(table[arm, "Avg. S"] - table[other, "Avg. S"])
    for measure, own in told["differences in magnitude"].items():
        table = whole.table(measure).set_index(["arm", "metric"])["value"]
        assert {row["metric"] for row in own} == set(table["ft"].index)
        for row in own:
            place = row["metric"]
            expected = table[row["arm"], place] - table[row["less"], place]
            assert row["value"] == pytest.approx(expected, abs=1e-9)


def test_a_summary_holds_averages_by_case(whole: BenchResult) -> None:
    """Of one case with one prompt that is right, and another with several that are wrong."""
    first, second = list(whole.records["ft"])[:2]
    told = {"metric": "NS", "right_prob": 0.1, "wrong_prob": 0.1, "exact": False}
    right, wrong = ({**told, "right": r, "wrong": -1.0 - r} for r in (0.0, -1.0))
    uneven = copy.copy(whole)
    asked = {first: {"answers": [right]}, second: {"answers": [wrong] * 3}}
    uneven.records = {arm: asked if arm == "ft" else {} for arm in whole.records}
    found = uneven.summary()
    ((pooled,), (by_case,)) = (
        [row["value"] for row in found[name] if row["metric"] == "NS"]
        for name in ("table", "table by case")
    )
    assert (pooled, by_case) == (25.0, 50.0)


def test_avg_s_has_an_interval_over_cases(whole: BenchResult) -> None:
    groups = list(whole.answers("unedited").values())
    found = average(groups)
    assert found is not None
    assert found.low <= found.value <= found.high
    same = average([groups[0]] * 4)
    assert same is not None
    assert same.low == same.high == same.value
    assert average([[a for a in groups[0] if a.metric != "RS"]]) is None
    assert average([]) is None


def test_the_trade_off_is_two_means_with_their_intervals(
    whole: BenchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def won(metric: Metric, *wins: bool) -> list[Answer]:
        return [Answer(metric, -0.5 if win else -2.0, -1.0) for win in wins]

    first = [*won("ES", True), *won("PS", True, False), *won("NS", True), *won("RS", False)]
    groups = {
        "a": [*first, *won("DNS", True, True)],
        "b": [*won("ES", False), *won("PS", True), *won("NS", False), *won("RS", False, True)],
    }
    monkeypatch.setattr(whole, "answers", lambda arm: groups)
    kept = whole.trade_off().set_index("arm")
    assert list(kept.index) == ["ft", "ft + sadr"]  # the unedited model keeps no edit
    row = kept.loc["ft"]
    assert row["edit"] == pytest.approx((50 + 200 / 3) / 2)
    assert row["others"] == pytest.approx((50 + 100 / 3 + 100) / 3)
    # The first case drawn twice, both, or the second twice.
    assert (row["edit_low"], row["edit_high"]) == (50.0, 75.0)
    assert row["others_low"] == pytest.approx((50 + 0 + 100) / 3)  # DNS is not asked in b
    assert row["others_high"] == pytest.approx((100 + 0 + 100) / 3)


def test_time_of_all_units_is_kept(model: dl.LensModel, cases: list[Case], tmp_path: Path) -> None:
    started = time.monotonic()
    found = bench(model, cases[:2], tmp_path)
    passed = time.monotonic() - started
    edits = sum(r.get("seconds", 0) for own in found.records.values() for r in own.values())
    spent = found.seconds_in_all()
    assert spent is not None and edits < spent < passed
    assert bench(model, cases[:2], tmp_path).seconds_in_all() == spent  # of the earlier run
    del found.records["ft"][cases[0].id]["spent"]
    assert found.seconds_in_all() is None


def test_conditions_tell_seconds_and_steps(whole: BenchResult) -> None:
    records = whole.records["ft"].values()
    (arm,) = (arm for arm in whole.conditions() if arm["name"] == "ft")
    assert arm["finished"] == len(records) == 5
    assert arm["seconds_per_edit"] == np.median([record["seconds"] for record in records])
    assert arm["steps_per_edit"] == np.median([record["steps"] for record in records]) == 3
    unedited = whole.conditions()[0]
    assert unedited["seconds_per_edit"] is None and unedited["steps_per_edit"] is None


def test_a_trade_off_of_what_was_asked(
    model: dl.LensModel, cases: list[Case], tmp_path: Path
) -> None:
    neighbours = bench(model, cases[:2], tmp_path / "ns", setting=Setting(metrics=("ES", "NS")))
    kept = neighbours.trade_off().set_index("arm")
    found = neighbours.rates("ft")
    assert kept.loc["ft", "edit"] == found["ES"].value
    assert kept.loc["ft", "others"] == found["NS"].value
    assert tuple(kept.loc["ft", ["edit_of", "others_of"]]) == ("ES", "NS")
    edits = bench(model, cases[:2], tmp_path / "es", setting=Setting(metrics=("ES",)))
    kept = edits.trade_off()
    assert kept["edit"].notna().all()
    assert kept["others"].isna().all()


def test_texts_that_are_written_together_are_those_of_each_case(
    model: dl.LensModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(("ES",), texts=("FL",), text_length=20)
    writing = [
        replace(cases[0], generation=("The Louvre is", "Paris")),
        replace(
            cases[1], generation=(" ".join(["A beginning that is much longer than the text"] * 2),)
        ),
        replace(cases[2], generation=("Mount Fuji is",)),
        cases[3],
    ]
    grace = dl.GraceConfig(layer=1, steps=3, radius=9.0)
    arms = [*ARMS[:2], Arm("grace", "grace", grace)]
    calls: list[int] = []
    together = units.generate_each

    def counted(model: dl.LensModel, groups: Any, *args: Any, **options: Any) -> list[list[str]]:
        calls.append(len(groups))
        return together(model, groups, *args, **options)

    monkeypatch.setattr(units, "generate_each", counted)
    result = run_bench(
        model, writing, arms, tmp_path, cases_at_once=4, setting=setting, progress=False
    )
    assert all(result.left_out(arm.name) == [] for arm in arms)  # its answers are counted
    assert {arm for arm, case, _ in result.failed} == {arm.name for arm in arms}
    assert "| ft (1 without texts) |" in result.to_markdown()
    found = result.records
    assert calls == [3, 3]  # GRACE's adapters are applied one by one
    for arm in arms:
        told = found[arm.name]
        unwritten = told[cases[1].id]
        assert unwritten["error"].startswith("texts: RequestError: The prompt 'A beginning")
        assert "texts" not in unwritten
        assert [answer["metric"] for answer in unwritten["answers"]] == ["ES"]  # all the same
        assert told[cases[3].id]["texts"] == {}
        for case in (writing[0], writing[2]):
            if arm.method is None:
                texts = generation.generate(model, case.generation, 20)
            else:
                edit = dl.edit(model, case.request, arm.method, config=arm.config, progress=False)
                with edit.applied(model):
                    texts = generation.generate(model, case.generation, 20)
            assert told[case.id]["texts"] == {"FL": generation.fluency(texts)}
    # Without the one that cannot be written, the others are written together.
    calls.clear()
    again = run_bench(model, [*writing[:1], *writing[2:]], arms, tmp_path / "three",
                      cases_at_once=4, setting=setting, progress=False).records  # fmt: skip
    assert calls == [2, 2]
    for arm in arms:
        for case in (writing[0], writing[2]):
            texts = again[arm.name][case.id]["texts"]
            assert texts == found[arm.name][case.id]["texts"] != {}


def test_texts_are_told_beside_answers(
    model: dl.LensModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_leads", lambda: ["The Louvre is in Paris."] * 9)
    writing = [
        replace(cases[0], generation=("The Louvre is",), references=("Paris is a city.",)),
        replace(cases[1], generation=("Mount Fuji is",)),
        cases[2],
    ]
    setting = Setting(("ES",), texts=("FL", "reference", "perplexity"), text_length=20)
    found = bench(model, writing, tmp_path, setting=setting)
    told = {arm: {c: r["texts"] for c, r in own.items()} for arm, own in found.records.items()}
    assert [set(texts) for texts in told["ft"].values()] == [
        {"FL", "reference", "perplexity"}, {"FL", "perplexity"}, {"perplexity"}
    ]  # fmt: skip
    edit = dl.edit(model, writing[0].request, "ft-m", config=QUICK, progress=False)
    with edit.applied(model):
        text = generation.generate(model, ["The Louvre is"], 20)
    mine = told["ft"][cases[0].id]
    assert mine["FL"] == pytest.approx(generation.fluency(text))
    assert mine["reference"] == pytest.approx(
        generation.reference_score(text, ["Paris is a city."])
    )
    assert told["unedited"][cases[2].id]["perplexity"] == generation.perplexity(model)
    means = found.text_rates("ft")
    assert means["FL"].value == pytest.approx(
        np.mean([told["ft"][case.id]["FL"] for case in writing[:2]])
    )
    assert (means["FL"].cases, means["FL"].prompts) == (2, 2)
    assert (means["perplexity"].cases, means["perplexity"].prompts) == (3, 24)
    geometric = np.exp(np.mean([np.log(t["perplexity"]) for t in told["ft"].values()]))
    assert means["perplexity"].value == pytest.approx(geometric)
    assert means["perplexity"].low <= geometric <= means["perplexity"].high
    less = found.compare_texts("ft", "unedited")
    of_all = (("FL", 2, float), ("reference", 1, float), ("perplexity", 3, np.log))
    for metric, count, scale in of_all:
        gains = [
            scale(told["ft"][case.id][metric]) - scale(told["unedited"][case.id][metric])
            for case in writing[:count]
        ]
        assert less[metric].value == pytest.approx(np.mean(gains))
        assert less[metric].cases == count
    assert less["FL"].value != 0 != less["perplexity"].value
    assert "| FL | reference | perplexity | seconds |" in found.to_markdown()
    assert {"FL", "perplexity"} <= set(found.table()["metric"])
    # What determines the texts determines the unit.
    others = [
        setting,
        replace(setting, texts=("FL",)),
        replace(setting, text_length=21),
        replace(setting, seed=1),
        Setting(("ES",)),
    ]
    units = [identity(model.identity(), writing[0], ARMS[0], other) for other in others]
    assert all(unit not in units[:i] for i, unit in enumerate(units))
    # Without texts the unit is another one, and nothing is told.
    plain = bench(model, writing, tmp_path, setting=Setting(("ES",)))
    assert plain.text_rates("ft") == plain.compare_texts("ft", "unedited") == {}
    generation._vectorizer.cache_clear()


def test_parquet(whole: BenchResult, tmp_path: Path) -> None:
    whole.to_parquet(tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "rows.parquet"), whole.to_dataframe(), check_dtype=False
    )
    with pytest.raises(DataError, match="cannot be written"):
        whole.to_parquet(tmp_path / "rows.parquet" / "rows.parquet")
    with pytest.raises(RequestError, match="of"):
        whole.to_parquet(tmp_path / "rows.parquet", of="cases")  # type: ignore[arg-type]


def test_a_row_for_each_unit(
    model: dl.LensModel, cases: list[Case], whole: BenchResult, tmp_path: Path
) -> None:
    rows = whole.units_dataframe().set_index(["arm", "case"])
    assert len(rows) == sum(map(len, whole.records.values()))
    for arm, own in whole.records.items():
        for case, record in own.items():
            row = rows.loc[(arm, case)]
            assert row["category"] == whole.cases[case].category
            assert row["spent"] == record["spent"] > 0
            for name in ("seconds", "steps"):
                known = name in record
                assert known == (arm != UNEDITED)
                assert row[name] == record[name] if known else pd.isna(row[name])
    assert rows[["error", "FL", "reference", "perplexity"]].isna().all(axis=None)
    # Of a run that asks nothing but texts, each unit has them.
    writing = [replace(case, generation=("The Louvre is",)) for case in cases[:2]]
    setting = Setting((), texts=("FL",), text_length=8)
    texts = bench(model, writing, tmp_path / "texts", setting=setting)
    assert not len(texts.to_dataframe())
    texts.to_parquet(tmp_path / "units.parquet", of="units")
    kept = pd.read_parquet(tmp_path / "units.parquet").set_index(["arm", "case"])
    for arm in texts.arms:
        found = kept.loc[arm]["FL"]
        assert found.mean() == pytest.approx(texts.text_rates(arm)["FL"].value)


def test_nothing_finished_is_done_again(
    model: dl.LensModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = bench(model, cases[:3], tmp_path)
    before = (tmp_path / UNITS).read_bytes()
    monkeypatch.setattr(units, "edit_each", None)
    monkeypatch.setattr(units, "answers", None)
    assert records(bench(model, cases[:3], tmp_path)) == records(few)
    assert (tmp_path / UNITS).read_bytes() == before


def test_more_cases_and_arms_add_to_it(
    model: dl.LensModel, cases: list[Case], whole: BenchResult, tmp_path: Path
) -> None:
    run_bench(model, cases[:2], ARMS[:2], tmp_path, cases_at_once=2, progress=False)
    finished = (tmp_path / UNITS).read_bytes()
    found = bench(model, cases, tmp_path)
    assert (tmp_path / UNITS).read_bytes().startswith(finished)
    assert len((tmp_path / UNITS).read_bytes().splitlines()) == 15
    # Which cases share passes depends on which there are, and so do the last bits.
    for arm in whole.arms:
        assert set(found.records[arm]) == set(whole.records[arm])
        for case, expected in whole.answers(arm).items():
            for one, other in zip(found.answers(arm)[case], expected, strict=True):
                assert (one.metric, one.exact) == (other.metric, other.exact)
                assert one.right == pytest.approx(other.right, rel=1e-4)
                assert one.wrong == pytest.approx(other.wrong, rel=1e-4)


def test_cases_of_like_length_are_edited_together(model: dl.LensModel) -> None:
    def case(i: int, words: int, subject: str = "Oslo") -> Case:
        prompt = f"A word or two before {'{}'}{' is' * words} in"
        return Case(f"c{i}", dl.EditRequest(prompt, subject, "Rome", "Paris"))

    lengths = [9, 1, 5, 9, 2, 6, 1]
    several = [case(i, words) for i, words in enumerate(lengths)]
    found = units.parts(model, several, 2)
    # By length: 1 1 | 2 5 | 6 9 | 9; in the order of each part's first case.
    names = [[one.id for one in part] for part in found]
    assert names == [["c0", "c5"], ["c1", "c6"], ["c2", "c4"], ["c3"]]
    # What is left of the subject does not count.
    long = replace(several[1].request, prompt=f"{'Once more, ' * 20}{several[1].request.prompt}")
    assert units.parts(model, [*several, replace(several[1], id="c7", request=long)], 3)[1] == (
        several[1], several[6], replace(several[1], id="c7", request=long),
    )  # fmt: skip
    # One that cannot be edited is not lost.
    endless = replace(case(8, 500), id="endless")
    with pytest.raises(RequestError, match="more than the 128"):
        dl.edit(model, endless.request, config=dl.RomeConfig(layer=1), covariance="identity")
    assert sorted(c.id for part in units.parts(model, [*several, endless], 3) for c in part) == [
        *(f"c{i}" for i in range(7)), "endless"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"config": replace(QUICK, lr=2e-2)},
        {"penalties": (dl.SADR(gamma=0.6),)},
        {"method": "ft-l"},
        {"case": {"paraphrases": ("Another question:",)}},
        {"case": {"request": dl.EditRequest("{} is in", "Oslo", "Rome", "Paris")}},
        {"case": {"neighbours": (Cloze("Oslo is in", "Norway"),)}},
        {"setting": Setting(seed=1)},
        {"setting": Setting(metrics=("ES",))},
        {"case": {"relations": ()}},
        {"model": {"model": "other"}},
        {"model": {"tokenizer": "other"}},
        {"model": {"separator": ""}},
    ],
)
def test_what_determines_a_result_is_in_its_identity(
    model: dl.LensModel, cases: list[Case], change: dict[str, Any]
) -> None:
    arm, case, setting = ARMS[2], cases[0], Setting()
    known = model.identity()
    plain = identity(known, case, arm, setting)
    other = identity(
        known | change.get("model", {}),
        replace(case, **change.get("case", {})),
        replace(arm, **{k: v for k, v in change.items() if k in ("config", "penalties", "method")}),
        change.get("setting", setting),
    )
    assert plain != other
    assert plain == identity(known, case, replace(arm, name="renamed"), setting)


def test_what_is_not_asked_is_not_in_an_identity(model: dl.LensModel, cases: list[Case]) -> None:
    known, arm, case = model.identity(), ARMS[2], cases[0]
    assert case.relations and case.category
    other = replace(case, category="another", generation=("Once",))
    assert identity(known, case, arm, Setting()) == identity(known, other, arm, Setting())
    less = replace(case, relations=())
    edit_only = Setting(("ES",))
    assert identity(known, case, arm, edit_only) == identity(known, less, arm, edit_only)
    texts = Setting(("ES",), texts=("FL",))
    assert identity(known, case, arm, texts) != identity(known, other, arm, texts)
    assert identity(known, case, arm, texts) != identity(known, case, arm, edit_only)


def test_units_of_other_versions_are_told(
    model: dl.LensModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from driftlens.bench import run

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bench(model, cases[:1], tmp_path)
        bench(model, cases[:2], tmp_path)
    monkeypatch.setattr(run, "versions", lambda: {"driftlens": "99", "torch": "1"})
    with pytest.warns(
        UserWarning, match=r"6 of the units in .* \(driftlens .*, torch .*and are kept"
    ):
        found = bench(model, cases[:3], tmp_path)
    made = [one["versions"]["driftlens"] for own in found.records.values() for one in own.values()]
    assert made == [dl.__version__, dl.__version__, "99"] * 3


def test_units_of_unknown_versions_are_told(
    model: dl.LensModel, cases: list[Case], tmp_path: Path
) -> None:
    bench(model, cases[:2], tmp_path)
    journal = Journal(tmp_path / UNITS)
    record = {k: v for k, v in next(iter(journal)).items() if k != "versions"}
    journal.add(**record)
    with pytest.warns(UserWarning, match=r"1 of the units in .*by other versions \(unknown\)"):
        bench(model, cases[:2], tmp_path)


def test_a_case_that_fails_does_not_stop_the_others(
    model: dl.LensModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(
        cases[1], request=dl.EditRequest("{} is " + "x " * 300 + "in", "Oslo", "Rome", "Norway")
    )
    mixed = [cases[0], long, *cases[2:]]
    found = bench(model, mixed, tmp_path)
    assert found.is_complete
    assert [(arm, case) for arm, case, _ in found.failed] == [
        (arm, long.id) for arm in ("unedited", "ft", "ft + sadr")
    ]
    assert "more than the 128 of tiny" in found.failed[0][2]
    assert len(found.answers("ft")) == 4
    again: list[str] = []
    asked = units._asked

    def watched(model: Any, case: Case, *args: Any) -> Any:
        again.append(case.id)
        return asked(model, case, *args)

    monkeypatch.setattr(units, "_asked", watched)
    bench(model, mixed, tmp_path)
    assert again == []
    monkeypatch.setattr(units, "edit_each", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a defect is no failed case
        bench(model, mixed, tmp_path, retry_failed=True)
    assert len(BenchResult(tmp_path).failed) == 3


def test_a_case_that_memory_does_not_do_for_is_a_failed_case(
    model: dl.LensModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each, one = units.edit_each, units.edit

    def short(requests: Sequence[dl.EditRequest]) -> None:
        if cases[1].request in requests:
            raise torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 2 GiB.")

    def make_each(model: Any, requests: Any, **options: Any) -> Any:
        short(requests)
        return each(model, requests, **options)

    def make_one(model: Any, request: Any, **options: Any) -> Any:
        short([request])
        return one(model, request, **options)

    monkeypatch.setattr(units, "edit_each", make_each)
    monkeypatch.setattr(units, "edit", make_one)
    found = bench(model, cases, tmp_path)
    why = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert found.failed == [(arm, cases[1].id, why) for arm in ("ft", "ft + sadr")]
    assert found.is_complete
    monkeypatch.undo()
    assert not bench(model, cases, tmp_path, retry_failed=True).failed


def test_changed_weights_end_the_run(
    model: dl.LensModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = model.down_projection(0).weight
    real = units.answers
    second = units.parts(model, cases[:4], 2)[0][1].id

    def harm(model: dl.LensModel, case: Case, metrics: Any) -> Any:
        if case.id == second:
            weight.data[0, 0] += 1.0
        return real(model, case, metrics)

    monkeypatch.setattr(units, "answers", harm)
    kept = weight.data.clone()
    with pytest.raises(ModelError, match="not what they were"):
        bench(model, cases[:4], tmp_path)
    weight.data.copy_(kept)
    assert len((tmp_path / UNITS).read_bytes().splitlines()) == 1  # not what was asked meanwhile
    monkeypatch.setattr(units, "answers", real)
    found = bench(model, cases[:4], tmp_path)
    assert found.is_complete
    undisturbed = bench(model, cases[:4], tmp_path / "undisturbed")
    assert records(found) == records(undisturbed)


def test_an_edit_that_is_left_on_ends_the_run(
    model: dl.LensModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = dl.edit(model, cases[0].request, "ft-m", config=QUICK, progress=False)
    real, left = units.answers, contextlib.ExitStack()

    def leave_on(*args: Any) -> Any:
        found = real(*args)
        left.enter_context(edit.applied(model))
        return found

    monkeypatch.setattr(units, "answers", leave_on)
    try:
        with pytest.raises(ModelError, match="not what they were"):
            bench(model, cases[:2], tmp_path)
    finally:
        left.close()
    assert not (tmp_path / UNITS).exists()


def test_bad_requests(
    model: dl.LensModel, cases: list[Case], whole: BenchResult, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="0 cases"):
        bench(model, [], tmp_path)
    with pytest.raises(RequestError, match="Two cases are called"):
        bench(model, [cases[0], cases[0]], tmp_path)
    with pytest.raises(RequestError, match="Two arms are called 'unedited'"):
        run_bench(model, cases, [ARMS[0], ARMS[0]], tmp_path)
    with pytest.raises(RequestError, match="no penalty 'x'"):
        make_arms(model, ["ft-m"], ["x"])
    for setting, problem in (
        (Setting(()), "Nothing is asked of the cases"),
        (Setting(texts=("FL",)), "No case has beginnings .*with_beginnings adds"),
        (Setting(texts=("perplexity",), text_length=10**6), "Texts of 1000000 tokens are longer"),
    ):
        with pytest.raises(RequestError, match=problem):
            bench(model, cases, tmp_path, setting=setting)
    begun = [replace(cases[0], generation=("The Louvre is",))]
    with pytest.warns(UserWarning, match="No case has references"):
        bench(model, begun, tmp_path / "texts", setting=Setting(texts=("reference",)))
    edit = dl.edit(model, cases[0].request, "ft-m", config=QUICK, progress=False)
    with edit.applied(model), pytest.raises(ModelError, match="An edit is applied"):
        bench(model, cases, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written to"):
        bench(model, cases, tmp_path / "file" / "bench")
    with pytest.raises(DataError, match="holds no results"):
        BenchResult(tmp_path)
    plan = {"arms": [], "units": [], "command": "", "model": {}, "versions": {}}
    for damaged in (
        "{", "[" * 100_000, "[]", "{}", '{"units": 1}', '{"units": [1]}', '{"units": [{}]}',
        json.dumps(plan), json.dumps(plan | {"setting": []}), json.dumps(plan | {"arms": [1]}),
        json.dumps(plan | {"units": [{"arm": "a", "case": "c", "identity": {}}]}),
    ):  # fmt: skip
        (tmp_path / PLAN).write_text(damaged)
        with pytest.raises(DataError, match="is damaged"):
            BenchResult(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"relations": (Cloze("It is", ""),)}, "'x' cannot be kept: relations.0.answer: it is em"),
        ({"paraphrases": ("{} is in",)}, "cannot be kept: paraphrases.0: it holds {}"),
        ({"paraphrases": ("\n\nQ: which city? A:",)}, "kept as it is: its paraphrases would be"),
        ({"id": "x "}, "'x ' cannot be kept as it is: its id would be"),
        ({"request": dl.EditRequest(" {} is in", "It", "Rome", "Paris")}, "its request would be"),
        ({"request": dl.EditRequest("{} is in", "It", "Rome", "Rome")}, "it is the true answer"),
    ],
)
def test_a_case_that_its_file_could_not_hold_is_refused_before_the_work(
    model: dl.LensModel, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    fine = Case("x", dl.EditRequest("{} is in", "It", "Rome", "Paris"))
    with pytest.raises(RequestError, match=re.escape(problem)):
        bench(model, [replace(fine, **change)], tmp_path)
    assert not [*tmp_path.iterdir()]


def test_files_of_different_runs(
    model: dl.LensModel, cases: list[Case], whole: BenchResult, tmp_path: Path
) -> None:
    bench(model, cases[:2], tmp_path)
    (tmp_path / PLAN).write_bytes((whole.folder / PLAN).read_bytes())
    with pytest.raises(DataError, match=f"{cases[2].id} is missing"):
        BenchResult(tmp_path)
    (tmp_path / UNITS).unlink()
    (tmp_path / UNITS).mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        Journal(tmp_path / UNITS)


def test_the_folder_is_free_after_an_interrupt(
    model: dl.LensModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped:
        device = "cpu"

        def run(self, jobs: Any, setting: Setting) -> Any:
            raise KeyboardInterrupt

    # Notebooks keep the last traceback, and with it everything that it refers to.
    with pytest.raises(KeyboardInterrupt) as stopped:
        bench(model, cases[:2], tmp_path, executor=Stopped())
    with FileLock(tmp_path / ".lock").acquire(timeout=0):
        assert stopped.traceback


def test_arms_by_name(model: dl.LensModel) -> None:
    with pytest.warns(UserWarning, match="known to be good"):
        arms = make_arms(model, ["ft-m", "grace"], ["none", "sadr", "key-drift"])
    assert [arm.name for arm in arms] == [
        "unedited", "ft-m", "ft-m + sadr", "ft-m + key-drift", "grace", "grace + sadr",
        "grace + key-drift",
    ]  # fmt: skip
    assert arms[2].penalties == (dl.SADR(gamma=0.01),)


def test_two_runs_at_once_are_refused(
    model: dl.LensModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(*args: Any, **options: Any) -> Any:
        with pytest.raises(DataError, match="Another run is writing"):
            bench(model, cases, tmp_path)
        raise EditError("enough")

    monkeypatch.setattr(units, "edit_each", second)
    monkeypatch.setattr(units, "edit", second)
    found = bench(model, cases[:1], tmp_path)
    assert [reason for _, _, reason in found.failed] == ["EditError: enough"] * 2


# --- killed and damaged -----------------------------------------------------------------------

SCRIPT = """
    # Runs are forked, so that the model is loaded only once.
    import os, random, signal, sys, time
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    import test_bench, tiny
    import driftlens as dl
    from driftlens.assets import asset
    from driftlens.readers import read_cases

    model = dl.load_model(tiny.hf_model("gpt2", 1), tiny.tokenizer(), name="tiny")
    cases = list(read_cases(asset("facts.jsonl"))[:3])
    out, rng, kills, amid, run = {out!r}, random.Random(0), 0, 0, 0

    def start(name):
        child = os.fork()
        if child == 0:
            test_bench.bench(model, cases, out + "/" + name, test_bench.{arms})
            os._exit(0)
        return child

    def finished_units(run):
        path = out + "/killed-" + str(run) + "/" + test_bench.UNITS
        return open(path, "rb").read().count(b"\\n") if os.path.exists(path) else 0

    assert os.waitpid(start("first"), 0)[1] == 0  # covariances are kept
    times = []
    for name in ("undisturbed", "again"):  # the shorter one, if the machine is busy
        began = time.monotonic()
        assert os.waitpid(start(name), 0)[1] == 0
        times.append(time.monotonic() - began)
    whole = min(times)
    while kills < 30:
        child = start("killed-" + str(run))
        time.sleep(rng.uniform(0, whole / 2))
        finished, _ = os.waitpid(child, os.WNOHANG)
        if finished:  # nothing left to disturb: another folder
            run += 1
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        amid += 0 < finished_units(run) < 3 * len(test_bench.{arms})
    for i in range(run + 1):
        assert os.waitpid(start("killed-" + str(i)), 0)[1] == 0
    print("amid", amid, "kills", kills)
"""


@pytest.mark.parametrize("arms", ["ARMS", pytest.param("SEARCHED", marks=pytest.mark.real)])
def test_killed_at_30_random_moments(arms: str, tmp_path: Path) -> None:
    """In the end the units are those of an undisturbed run, each once, to the bit."""
    tests = str(Path(__file__).parent)
    script = textwrap.dedent(SCRIPT.format(tests=tests, out=str(tmp_path), arms=arms))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=900
    )
    told = re.search(r"amid (\d+) kills 30$", done.stdout.strip())
    assert told, done.stderr
    assert int(told[1]) >= 5  # with some units finished and others not
    expected = BenchResult(tmp_path / "undisturbed")
    assert expected.is_complete
    killed = sorted(tmp_path.glob("killed-*"))
    for folder in killed:
        found = BenchResult(folder)
        assert found.is_complete
        assert records(found) == records(expected)
        lines = [line for line in (folder / UNITS).read_bytes().splitlines() if line.strip()]
        whole_lines = []
        for line in lines:
            try:
                whole_lines.append(json.dumps(json.loads(line)["unit"], sort_keys=True))
            except ValueError:
                continue  # cut off by a kill
        assert len(whole_lines) == len(set(whole_lines)) == 3 * len(globals()[arms])
    assert not expected.failed


def test_failures_stand_in_the_table(whole: BenchResult) -> None:
    found = BenchResult(whole.folder)
    assert "failed)" not in found.to_markdown()
    for name in list(found.records["ft"])[:2]:
        found.records["ft"][name] = {"error": "a reason"}
    lines = found.to_markdown().splitlines()
    assert [line for line in lines if line.startswith("| ft (2 failed) | ")]


@pytest.mark.parametrize("seed", range(20))
def test_damaged_files(
    model: dl.LensModel, cases: list[Case], whole: BenchResult, tmp_path: Path, seed: int
) -> None:
    """Cut off, overwritten or removed: what is still whole counts, the rest is done again."""
    rng = random.Random(seed)
    for name in (PLAN, CASES, UNITS):
        content = bytearray((whole.folder / name).read_bytes())
        kind = rng.choice(["cut", "overwritten", "removed", "left"])
        if kind == "cut":
            content = content[: rng.randrange(len(content))]
        elif kind == "overwritten":
            at = rng.randrange(len(content))
            rubbish = rng.randbytes(rng.randrange(1, 200))
            content[at : at + len(rubbish)] = rubbish
        if kind != "removed":
            (tmp_path / name).write_bytes(content)
    found = bench(model, cases, tmp_path)
    assert found.is_complete
    for arm, expected in records(whole).items():
        for case, record in expected.items():
            mine = records(found)[arm][case]
            assert [a["right"] for a in mine["answers"]] == pytest.approx(
                [a["right"] for a in record["answers"]], abs=1e-5
            )


def test_bench_on_the_command_line(
    model: dl.LensModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from driftlens import cli

    monkeypatch.setattr(cli, "_load", lambda name, *options: model)
    plan = tmp_path / "slow.toml"
    plan.write_text('method = "ft-l"\n[config]\nlayer = 1\nsteps = 2\n')
    options = ["bench", "--methods", "", "--config", str(plan), "--cases", "3", "--quiet"]

    notes: list[str] = []

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["driftlens", *options, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (0, None), end.value.code
        told = capsys.readouterr()
        notes.append(told.err)
        return told.out

    shown = run("--out", str(tmp_path / "out"))
    assert notes == [""]
    assert "| slow |" in shown
    result = BenchResult(tmp_path / "out")
    assert result.plan["command"].startswith("driftlens bench --methods")
    assert len(result.cases) == 3
    summary = json.loads(run("--out", str(tmp_path / "out"), "--json", "-"))
    assert {row["arm"] for row in summary["table"]} == {"unedited", "slow"}
    assert [arm["seconds_per_edit"] is None for arm in summary["arms"]] == [True, False]
    assert summary["arms"][1]["config"]["steps"] == 2
    assert summary["failed"] == []
    assert len(summary["cases"]) == 3
    data = tmp_path / "data.jsonl"
    facts = [bare(case) for case in read_cases(asset("facts.jsonl"))]
    tuning, held_back = tuning_split(facts)
    data.write_text(json.dumps(tuning[0].to_record()) + "\n{}\n")
    run("--out", str(tmp_path / "b"), "--data", str(data), "--skip-bad")
    assert notes[-1].splitlines() == [
        "Record 1, prompt: Field required.",
        "1 of the cases are for tuning; --split held-back leaves such out.",
        "There are 1 cases, not 3.",
    ]
    more = ["--out", str(tmp_path / "c"), "--data", str(data), "--skip-bad", "--cases", "1"]
    with pytest.warns(UserWarning, match="No case has references to compare texts with"):
        shown = run(*more, "--metrics", " ES, alias,reasoning", "--texts", "FL,reference")
    assert "No case has anything to ask for alias, reasoning." in notes[-1].splitlines()
    assert "--split held-back" in notes[-1]
    data.write_text(json.dumps(held_back[0].to_record()) + "\n{}\n")
    run(*more, "--metrics", "ES")
    assert "--split held-back" not in notes[-1]
    data.write_text(json.dumps(tuning[0].to_record()) + "\n{}\n")
    run(*more, "--metrics", "ES,alias,reasoning", "--texts", "FL,reference")
    kept = [tmp_path / "answers.parquet", tmp_path / "units.parquet"]
    run(*more, "--metrics", "ES", "--parquet", str(kept[0]), "--units", str(kept[1]))
    found = BenchResult(tmp_path / "c")
    for path, rows in zip(kept, (found.to_dataframe(), found.units_dataframe()), strict=True):
        assert len(rows) and len(pd.read_parquet(path)) == len(rows)
    assert set(found.units_dataframe().columns) == set(pd.read_parquet(kept[1]).columns)
    run(*more, "--metrics", "ES,alias,reasoning", "--texts", "FL,reference")
    texts = [one["texts"] for one in BenchResult(tmp_path / "c").records["slow"].values()]
    assert len(texts) == 1 and texts[0].keys() == {"FL"} and texts[0]["FL"] > 0
    for wrong, message in (
        (["--split", "x"], "no split 'x'"),
        (["--data", str(data)], "Record 1, prompt"),
        (["--cases", "0"], "--cases is 0"),
        (["--penalties", "x", "--methods", "ft-m"], "no penalty 'x'"),
        (["--methods", "x"], "no editor 'x'"),
        (["--metrics", "ES,x"], "no metric 'x'"),
        (["--texts", "x"], "no measure of texts 'x'"),
        (["--executor", "x"], "no executor 'x'"),
        (["--workers", "2"], "Add --executor ray"),
        (["--units", str(tmp_path / "none" / "u.parquet")], "cannot be written to"),
    ):
        monkeypatch.setattr(
            sys, "argv", ["driftlens", *options, "--out", str(tmp_path / "c"), *wrong]
        )
        with pytest.raises(SystemExit, match=message):
            cli.main()


def test_a_case_that_the_cpu_has_no_memory_for_is_a_failed_case(
    model: dl.LensModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = units.answers

    def hungry(model: dl.LensModel, case: Case, metrics: Any) -> Any:
        if case.id == cases[1].id:
            torch.empty(10**16)  # what torch's allocator refuses is no OutOfMemoryError there
        return real(model, case, metrics)

    monkeypatch.setattr(units, "answers", hungry)
    found = bench(model, cases, tmp_path)
    assert found.is_complete
    assert {(arm, case) for arm, case, _ in found.failed} == {
        (arm, cases[1].id) for arm in found.arms
    }
    assert all(found.left_out(arm) == [cases[1].id] for arm in found.arms)
    assert "| ft (1 failed) |" in found.to_markdown()
    assert all("can't allocate memory" in why for *_, why in found.failed)


def test_a_defect_stops_the_run(
    model: dl.LensModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("The size of tensor a must match the size of tensor b.")

    monkeypatch.setattr(units, "answers", broken)
    with pytest.raises(RuntimeError, match="must match"):
        bench(model, cases, tmp_path)


def test_one_condition_written_in_two_ways_is_run_once(
    model: dl.LensModel, cases: list[Case], tmp_path: Path
) -> None:
    def arms(one: Any) -> list[Arm]:
        config = dl.FtConfig(layer=1, steps=2, lr=one)
        return [Arm("ft", "ft-m", config, (dl.SADR(gamma=one),))]

    bench(model, cases[:2], tmp_path, arms(1.0))
    bench(model, cases[:2], tmp_path, arms(1))
    bench(model, cases[:2], tmp_path, arms(np.float64(1)))
    assert len((tmp_path / UNITS).read_text().splitlines()) == 2


def test_defaults_that_are_not_written_out_are_those_of_the_model(
    model: dl.LensModel, cases: list[Case], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="No layers are known"):
        bench(model, cases[:1], tmp_path, [Arm("ft", "ft-m")])
    with pytest.warns(UserWarning, match="No layers are known"):
        (_, arm) = make_arms(model, ["ft-m"], ["none"])
    assert BenchResult(tmp_path).plan["arms"][0]["config"] == json.loads(
        json.dumps(arm.to_dict()["config"])
    )


def test_an_arm_that_no_model_can_run_is_refused_before_anything_is_kept(
    model: dl.LensModel, cases: list[Case], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="99"):
        bench(model, cases, tmp_path, [Arm("ft", "ft-m", replace(QUICK, layer=99))])
    with pytest.raises(RequestError, match="steps is -1"):
        bench(model, cases, tmp_path, [Arm("ft", "ft-m", replace(QUICK, steps=-1))])
    assert not (tmp_path / UNITS).exists()
