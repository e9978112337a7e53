"""Cases, their probes, success rates, and the journal of finished work."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import driftlens as dl
from driftlens.assets import asset
from driftlens.bench import Arm, Setting, make_arms, run_bench
from driftlens.cases import (
    ALL_METRICS,
    BEGINNINGS,
    METRICS,
    UNRELATED,
    Case,
    Cloze,
    Commonsense,
    balanced,
    tuning_split,
    with_beginnings,
    without_edited_facts,
)
from driftlens.disk import sync_folder
from driftlens.errors import DataError, RequestError
from driftlens.evaluation import (
    Answer,
    Growth,
    answers,
    average,
    combined,
    compare,
    compare_combined,
    growth,
    harmonic_mean,
    rates,
)
from driftlens.experiments import many, tuning
from driftlens.experiments.paper import TABLE_3
from driftlens.generation import measure_texts
from driftlens.intervals import with_interval
from driftlens.journal import Journal
from driftlens.readers import read_cases
from driftlens.records import write_result
from driftlens.scoring import score_details

DATA = Path(__file__).parent.parent.parent / "shared/data/counterfact_wikidata_dev.json"
RECORD: dict[str, Any] = {
    "requested_rewrite": {
        "prompt": "The Louvre is in the city of",
        "subject": "The Louvre",
        "target_new": "Rome",
        "target_true": "Paris",
    },
    "p-paraphrase": {"prompts": ["Where is The Louvre? In"], "targets": ["Rome"]},
    "l-neighbor": {"prompts": ["The Eiffel Tower is in"], "targets": ["Paris"]},
    "l-relation": {"prompts": ["The Louvre is a"], "targets": ["museum"]},
}


def write(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(list(records)))
    return path


def test_a_record_becomes_a_case(tmp_path: Path) -> None:
    (case,) = read_cases(write(tmp_path / "data.json", RECORD))
    assert case.id == "data-0"
    assert case.request == dl.EditRequest("{} is in the city of", "The Louvre", "Rome", "Paris")
    assert [(p.metric, p.prompt, p.right, p.wrong) for p in case.probes()] == [
        ("ES", "The Louvre is in the city of", "Rome", "Paris"),
        ("PS", "Where is The Louvre? In", "Rome", "Paris"),
        ("NS", "The Eiffel Tower is in", "Paris", "Rome"),
        ("RS", "The Louvre is a", "museum", "Rome"),
        ("DNS", "The Louvre is in the city of Rome. The Eiffel Tower is in", "Paris", "Rome"),
    ]


@pytest.mark.skipif(not DATA.is_file(), reason="the paper's file is not beside the project")
def test_the_papers_file() -> None:
    cases = read_cases(DATA)
    assert len(cases) == 1229
    assert sum(bool(case.neighbours) for case in cases) == 542  # others have an empty list
    for_tuning, reported = tuning_split(cases)
    assert not {c.id for c in for_tuning} & {c.id for c in reported}
    assert len(for_tuning) + len(reported) == 1229
    assert 0.2 < len(for_tuning) / 1229 < 0.3
    chosen = balanced(reported, 60)
    assert len(chosen) == 60
    assert sum(bool(case.neighbours) for case in chosen) == 30
    assert sum(bool(case.relations) for case in chosen) == 30
    # More cases are those and others, so that results can be added to.
    assert {c.id for c in chosen} <= {c.id for c in balanced(reported, 100)}


def about(name: str, **asked: Any) -> Case:
    """A case with nothing but an edit and what is given."""
    request = dl.EditRequest("{} is in", name, "Rome", {"The Louvre": "Paris"}.get(name))
    return Case(name, request, **{k: tuple(v) for k, v in asked.items()})


def test_cases_with_other_prompts_are_chosen_where_the_usual_ones_do_not_do() -> None:
    near, far = [Cloze("The Eiffel Tower is in", "Paris")], [Cloze("The Louvre is a", "museum")]
    usual = [about("a", neighbours=near), about("b", relations=far)]
    others = [about("c", paraphrases=["Where is c? In"]), about("d")]
    cases = [*others, *usual]
    assert {case.id for case in balanced(cases, 2)} == {"a", "b"}
    assert len(balanced(cases, 3)) == 3
    assert {case.id for case in balanced(cases, 9)} == {"a", "b", "c", "d"}
    assert {case.id for case in balanced(others, 9)} == {"c", "d"}


def test_what_another_edit_changes_is_left_out() -> None:
    louvre = about(
        "The Louvre",
        paraphrases=["Where is The Louvre? In"],
        relations=[Cloze("The Louvre is a", "museum"), Cloze("The Louvre stands in", "Paris")],
    )
    kept = Cloze("The Eiffel Tower is in", "Paris")
    other = about(
        "The Kremlin",
        neighbours=[
            kept,
            Cloze("The Louvre is in", "France"),  # its prompt
            Cloze("Where is The Louvre? In", "France"),  # a paraphrase
            Cloze("One can visit The Louvre in", " paris"),  # another wording, by its answer
        ],
        relations=[Cloze("The Kremlin is near The Louvre, which is a", "museum")],
        distractors=[Cloze("The Louvre, once in", "Paris")],
    )
    assert without_edited_facts([louvre, other]) == [
        louvre,  # what its own edit changes is asked
        replace(other, neighbours=(kept,), distractors=()),
    ]
    assert without_edited_facts([other]) == [other]


def test_rates_by_hand() -> None:
    win, loss, tie = Answer("ES", -1.0, -2.0), Answer("ES", -2.0, -1.0), Answer("ES", -1.0, -1.0)
    found = rates([[win, win, loss], [tie], [Answer("NS", -1.0, -3.0)]])
    assert set(found) == {"ES", "NS"}
    assert (found["ES"].value, found["ES"].prompts, found["ES"].cases) == (50.0, 4, 2)
    assert (found["NS"].value, found["NS"].cases) == (100.0, 1)
    assert np.isnan([found["NS"].low, found["NS"].high]).all()  # one case tells nothing of others
    assert str(found["NS"]) == "100.0 [-, -]"
    assert found["ES"].low == 0.0
    assert found["ES"].high == pytest.approx(200 / 3)


def test_prompts_of_one_case_belong_together() -> None:
    """The interval is that of 20 cases, not of 400 prompts."""
    rng = np.random.default_rng(0)
    groups = [[Answer("NS", 1.0 if rng.random() < 0.5 else -1.0, 0.0)] * 20 for _ in range(20)]
    rate = rates(groups)["NS"]
    alone = rates([[a] for group in groups for a in group])["NS"]
    assert rate.value == alone.value
    assert rate.high - rate.low > 3 * (alone.high - alone.low)


def test_the_harmonic_mean_is_the_papers_average() -> None:
    """18 of its 21 rows, and not the three whose printed average does not fit their columns."""
    misfits = {
        ("GPT-J 6B", "rome", False), ("GPT-J 6B", "rome", True), ("Llama-3 8B", "memit", True)
    }  # fmt: skip
    for row in TABLE_3:
        own = harmonic_mean([row.ES, row.PS, row.NS, row.RS, row.DNS])
        fits = own == pytest.approx(row.average, abs=0.0101)
        assert fits == ((row.model, row.editor, row.sadr) not in misfits), row
    assert len(TABLE_3) == 21
    assert harmonic_mean([100.0, 50.0]) == pytest.approx(200 / 3)
    assert harmonic_mean([100.0, 0.0]) == 0.0
    assert harmonic_mean([]) == 0.0


def test_everything_that_is_asked() -> None:
    case = Case(
        "x",
        dl.EditRequest("{} is in", "The Louvre", "Rome", "Paris"),
        neighbours=(Cloze("Notre-Dame is in", "Paris"),),
        relations=(Cloze("The Louvre is a", "museum"),),
        aliases=(Cloze("Le Louvre est à", "Roma"),),
        reasoning=(Cloze("The Louvre's country is", "Italy"),),
        distractors=(Cloze("He saw The Louvre. Berlin is in", "Germany"),),
        commonsense=(Commonsense("To read", "open a book.", "eat it."),),
    )
    probes = {probe.metric: probe for probe in case.probes(ALL_METRICS)}
    assert set(probes) == set(ALL_METRICS) - {"PS"}
    lead = probes["lead-relation"].prompt.removesuffix(" The Louvre is a")
    assert lead in UNRELATED
    asked = {name: (p.prompt, p.right, p.wrong) for name, p in probes.items()}
    assert asked["alias"] == ("Le Louvre est à", "Roma", "Paris")
    assert asked["reasoning"] == ("The Louvre's country is", "Italy", "Paris")
    assert asked["distractor"] == ("He saw The Louvre. Berlin is in", "Germany", "Rome")
    distract = "The Louvre is in Rome. The Louvre is a"
    assert asked["distract-relation"] == (distract, "museum", "Rome")
    assert asked["commonsense"] == ("To read", "open a book.", "eat it.")
    behind = "The Louvre is in Rome. To read"
    assert asked["distract-commonsense"] == (behind, "open a book.", "eat it.")
    assert asked["lead-neighbour"] == (f"{lead} Notre-Dame is in", "Paris", "Rome")
    assert asked["lead-relation"] == (f"{lead} The Louvre is a", "museum", "Rome")
    assert [p.metric for p in case.probes(("DNS", "RS"))] == ["RS", "DNS"]


def test_sentences_are_joined_as_the_model_separates_words() -> None:
    case = Case(
        "x",
        dl.EditRequest("{}位于", "卢浮宫", "罗马", "巴黎"),
        neighbours=(Cloze("圣母院位于", "巴黎"),),
        relations=(Cloze("卢浮宫是", "博物馆"),),
        commonsense=(Commonsense("要读书，", "就打开书。", "就吃掉书。"),),
    )
    about = {p.metric: p.prompt for p in case.probes(tuple(ALL_METRICS), separator="")}
    assert about["DNS"] == "卢浮宫位于罗马.圣母院位于"
    assert about["distract-relation"] == "卢浮宫位于罗马.卢浮宫是"
    assert about["distract-commonsense"] == "卢浮宫位于罗马.要读书，"
    assert about["lead-neighbour"].removesuffix("圣母院位于") in UNRELATED
    assert about["lead-relation"].removesuffix("卢浮宫是") in UNRELATED


def test_what_is_asked_is_joined_as_the_model_separates_words(tmp_path: Path) -> None:
    model = dl.load_model(tiny.hf_model("gpt2"), tiny.tokenizer(), separator="")
    (case,) = read_cases(write(tmp_path / "data.json", RECORD))
    (found,) = answers(model, case, ("DNS",))
    prompt = "The Louvre is in the city ofRome.The Eiffel Tower is in"
    expected = score_details(model, prompt, ["Paris", "Rome"])
    assert found.right == pytest.approx(expected["Paris"].mean_logprob, abs=1e-5)
    assert found.wrong == pytest.approx(expected["Rome"].mean_logprob, abs=1e-5)
    result = run_bench(
        model, [case], [Arm("unedited")], tmp_path / "out",
        setting=Setting(("DNS",)), progress=False,
    )  # fmt: skip
    assert [probe.prompt for probe in result.probes(case)] == [prompt]
    assert set(result.to_dataframe()["prompt"]) == {prompt}


def test_texts_begin_as_the_data_says_or_with_the_subject() -> None:
    request = dl.EditRequest("{} is in", "The {Louvre}", "Rome", "Paris")
    plain = [Case("x", request), Case("y", replace(request, subject="It"))]
    found = with_beginnings(plain)
    assert [case.generation[0] for case in found] == [
        "The {Louvre} is best known for", "It is best known for"
    ]  # fmt: skip
    assert all(len(case.generation) == len(BEGINNINGS) for case in found)
    assert [replace(case, generation=()) for case in found] == plain
    mixed = [plain[0], replace(plain[1], generation=("It is said",))]
    assert with_beginnings(mixed) == mixed


def answer(metric: Any, right: float, wrong: float | None = -1.0, **fields: Any) -> Answer:
    return Answer(metric, right, wrong, **fields)


def test_measures_by_hand() -> None:
    groups = [
        [answer("RS", -0.5, right_prob=0.6, exact=True), answer("RS", -3.0, right_prob=0.05)],
        [answer("RS", -2.0, right_prob=0.1)],
        [answer("reasoning", -0.1, None, right_prob=0.9, exact=True)],
    ]
    assert rates(groups)["RS"].value == pytest.approx(100 / 3)
    assert rates(groups, by="case")["RS"].value == pytest.approx(25.0)
    assert rates(groups, "exact")["RS"].value == pytest.approx(100 / 3)
    assert rates(groups, "prob")["RS"].value == pytest.approx(0.25)
    assert rates(groups, "prob", by="case")["RS"].value == pytest.approx((0.325 + 0.1) / 2)
    assert rates(groups, "margin")["RS"].value == pytest.approx((0.5 - 2.0 - 1.0) / 3)
    # Nothing to compare with: success is the exact match, and there is no margin.
    assert rates(groups)["reasoning"].value == 100.0
    assert "reasoning" not in rates(groups, "margin")
    assert (rates(groups)["RS"].prompts, rates(groups, by="case")["RS"].cases) == (3, 2)


def test_paired_differences_by_hand() -> None:
    good, bad = answer("RS", -0.5), answer("RS", -2.0)
    first = {"a": [good, good], "b": [good], "c": [bad], "only here": [good]}
    second = {"c": [good], "a": [bad, good], "b": [bad], "only there": [bad]}
    found = compare(first, second)["RS"]
    assert found.value == pytest.approx(100 * (1 + 1 - 1) / 4)
    assert (found.better, found.worse, found.cases) == (2, 1, 3)
    of_case = np.array([50.0, 100.0, -100.0])
    assert found.effect == pytest.approx(of_case.mean() / of_case.std(ddof=1))
    assert found.low == -100.0  # only the third case drawn
    assert found.high == 100.0  # only the second
    alike = compare(first, second, by="case")["RS"]
    assert alike.value == pytest.approx(of_case.mean())
    assert (alike.effect, alike.low, alike.high) == (found.effect, -100.0, 100.0)
    with pytest.raises(RequestError, match="by"):
        compare(first, second, by="prompts")  # type: ignore[arg-type]
    same = compare(first, first)["RS"]
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert np.isnan(same.effect)
    with pytest.raises(ValueError, match="same prompts"):
        compare({"a": [good]}, {"a": [good, good]})


def test_relative_growth_by_hand() -> None:
    good, bad = answer("RS", -0.5), answer("RS", -2.0)
    first = {"a": [good, good], "b": [good], "c": [bad], "only here": [good]}
    second = {"c": [good], "a": [bad, good], "b": [bad], "only there": [good]}
    found = growth(first, second, "RS")
    assert found is not None
    # Of the cases that both have: 3 successes less 2, of 2.
    assert found.value == pytest.approx(50.0)
    assert found.low == -100.0  # only the third case drawn
    assert found.high == np.inf  # only the second, of which there was nothing
    assert str(found) == "+50 % [-100, +inf]"
    same = growth(first, first, "RS")
    assert same is not None
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert growth(first, {"b": [bad]}, "RS") is None
    assert growth(first, second, "NS") is None
    assert str(Growth(-0.4, -3.0, 2.0)) == "+0 % [-3, +2]"


@pytest.mark.parametrize(
    ("numbers", "how", "told"),
    [
        ((1.25, 0.5, 2.04), {}, "1.2 [0.5, 2.0]"),
        ((0.4, -0.4, 1.6), {"digits": 0, "sign": "+", "unit": " %"}, "+0 % [-0, +2]"),
        ((-0.04, -0.06, -0.01), {}, "0.0 [-0.1, -0.0]"),
        ((0.125, float("nan"), None), {"digits": 3}, "0.125 [-, -]"),
        ((50.0, 10.0, float("inf")), {"sign": "+"}, "+50.0 [+10.0, +inf]"),
    ],
)
def test_a_number_is_told_with_its_interval(
    numbers: tuple[float | None, ...], how: dict[str, Any], told: str
) -> None:
    assert with_interval(*numbers, **how) == told


def test_a_paired_difference_of_a_mean_of_several_metrics_by_hand() -> None:
    good, bad = answer("RS", -0.5), answer("RS", -2.0)
    yes, no = answer("NS", -0.5), answer("NS", -2.0)
    first = {"a": [good, bad, yes], "b": [good, yes], "only here": [good]}
    second = {"b": [bad, yes], "a": [good, bad, no], "only there": [bad]}
    found = compare_combined(first, second, ["RS", "NS"])
    assert found is not None
    assert found.value == pytest.approx((100 / 3 + 50) / 2)  # 2 of 3 less 1 of 3, 2 of 2 less 1
    # A draw has the first case twice, both, or the second twice: 50, 41.7 and 50.
    assert (found.low, found.high) == (pytest.approx((100 / 3 + 50) / 2), 50.0)
    assert (found.better, found.worse, found.cases) == (2, 0, 2)
    of_case = np.array([(50 - 50 + 100 - 0) / 2, (100 - 0 + 100 - 100) / 2])
    assert np.isnan(found.effect) and of_case.std() == 0
    # Each metric counts alike in a case, whatever the number of its prompts.
    many = compare_combined({"a": [yes, bad, bad, bad]}, {"a": [no, good, good, bad]}, ["RS", "NS"])
    assert many is not None
    assert many.value == pytest.approx((100 - 200 / 3) / 2) and many.better == 1
    uneven = compare_combined(
        {"a": [yes, bad], "b": [good], "c": [yes, good]},
        {"a": [no, bad], "b": [bad], "c": [no, good]}, ["RS", "NS"],
    )  # fmt: skip
    assert uneven is not None
    gains = np.array([50.0, 100.0, 50.0])
    assert uneven.effect == pytest.approx(gains.mean() / gains.std(ddof=1))
    apart = [compare(first, second)[m].value for m in ("RS", "NS")]
    assert found.value == pytest.approx(np.mean(apart))
    assert compare_combined(first, second, ["RS", "PS"]) is None
    # As Avg. S is: 2 / (3/200 + 1/100) less 2 / (3/100 + 1/50), of RS 66.7, NS 100; 33.3, 50.
    harmonic = compare_combined(first, second, ["RS", "NS"], mean=harmonic_mean)
    assert harmonic is not None
    assert harmonic.value == pytest.approx(80 - 40)
    # Without the first case 100 less 0, without the second 66.7 less 0: pseudo-values 2 * 40 less
    # these.
    pseudo = np.array([80 - 100, 80 - 200 / 3])
    assert harmonic.effect == pytest.approx(pseudo.mean() / pseudo.std(ddof=1))
    assert (harmonic.better, harmonic.worse, harmonic.cases) == (1, 1, 2)
    # By case RS is (50 + 100) / 2, before (50 + 0) / 2.
    by_case = compare_combined(first, second, ["RS", "NS"], mean=harmonic_mean, by="case")
    assert by_case is not None
    assert by_case.value == pytest.approx(2 / (1 / 75 + 1 / 100) - 2 / (1 / 25 + 1 / 50))
    # A draw has twice the first case (66.7 less 0), both, or twice the second (100 less 0).
    assert (harmonic.low, harmonic.high) == (pytest.approx(40), pytest.approx(100))


def test_a_mean_of_several_metrics_by_hand() -> None:
    """Case 1 has 1 of 2 relations and its neighbour right, case 2 its relation but no neighbour."""
    good, bad = answer("RS", -0.5), answer("RS", -2.0)
    groups = [[good, bad, answer("NS", -0.5)], [good, answer("NS", -2.0)]]
    found = combined(groups, ["RS", "NS"])
    assert found is not None
    assert found.value == pytest.approx((100 * 2 / 3 + 50) / 2)
    assert (found.prompts, found.cases) == (5, 2)
    # A draw has the first case twice, both, or the second twice: 75, 58.3 and 50.
    assert (found.low, found.high) == (50.0, 75.0)
    of_cases = combined(groups, ["RS", "NS"], by="case")
    assert of_cases is not None
    assert of_cases.value == pytest.approx((75 + 50) / 2)
    highest = combined(groups, ["RS", "NS"], max)
    assert highest is not None
    assert highest.value == pytest.approx(100 * 2 / 3)
    assert combined(groups, ["RS", "PS"]) is None


@pytest.fixture(scope="module")
def model() -> dl.LensModel:
    return dl.load_model(tiny.hf_model("gpt2", 1), tiny.tokenizer(), name="tiny")


def by_hand(model: dl.LensModel, prompt: str, text: str) -> tuple[list[float], bool]:
    """Log-probabilities of a text's tokens behind a prompt, and whether all are the likeliest."""
    ids = model.tokens.encode_prompt(prompt).ids
    target = model.tokens.target_ids(text)
    with torch.no_grad():
        logits = model.hf_model(torch.tensor([[*ids, *target]])).logits[0].double()
    logprobs = logits.log_softmax(-1)[len(ids) - 1 : -1]
    own = [float(row[t]) for row, t in zip(logprobs, target, strict=True)]
    return own, all(int(row.argmax()) == t for row, t in zip(logprobs, target, strict=True))


def check_answers(model: dl.LensModel, case: Case) -> set[str]:
    """Against a scorer that runs each text alone and reads every token by hand."""
    probes = case.probes(ALL_METRICS)
    for probe, found in zip(probes, answers(model, case, ALL_METRICS), strict=True):
        assert found.metric == probe.metric
        right, exact = by_hand(model, probe.prompt, probe.right)
        assert found.right == pytest.approx(np.mean(right), abs=1e-5 * abs(sum(right)) + 1e-5)
        assert found.right_prob == pytest.approx(np.exp(sum(right)), rel=1e-3)
        assert found.exact == exact
        if probe.wrong is None:
            assert found.wrong is None
            assert found.wrong_prob is None
        else:
            wrong, _ = by_hand(model, probe.prompt, probe.wrong)
            assert found.wrong == pytest.approx(np.mean(wrong), abs=1e-5 * abs(sum(wrong)) + 1e-5)
            assert found.wrong_prob == pytest.approx(np.exp(sum(wrong)), rel=1e-3)
    return {probe.metric for probe in probes}


def test_answers_are_scores(model: dl.LensModel, tmp_path: Path) -> None:
    (case,) = read_cases(write(tmp_path / "data.json", RECORD))
    case = replace(case, reasoning=(Cloze("The Louvre's country is", "Italy"),))
    assert "reasoning" in check_answers(model, case)
    check_answers(model, replace(case, request=replace(case.request, target_true=None)))


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_rates_of_a_real_model_are_counted_from_its_logits(name: str) -> None:
    """Avg. S and all that it is made of, over an edited model's answers to four cases; by a plain
    count of what each text alone gives."""
    model = dl.load_model(name)
    cases = read_cases(asset("facts.jsonl"))[:4]

    def mean_logprob(prompt: str, text: str) -> float:
        return float(np.mean(by_hand(model, prompt, text)[0]))

    asked, won = [], {metric: [] for metric in METRICS}  # type: ignore[var-annotated]
    edit = dl.edit(model, cases[0].request, "ft-m", layer=5, steps=5, progress=False)
    with edit.applied(model):
        for case in cases:
            asked.append(answers(model, case))
            old, new = case.request.target_true, case.request.target_new
            assert old is not None
            sentence = f"{case.request.text} {new}."
            questions = {
                "ES": [(case.request.text, new, old)],
                "PS": [(prompt, new, old) for prompt in case.paraphrases],
                "NS": [(prompt, answer, new) for prompt, answer in case.neighbours],
                "RS": [(prompt, answer, new) for prompt, answer in case.relations],
                "DNS": [(f"{sentence} {p}", answer, new) for p, answer in case.neighbours],
            }
            for metric, own in questions.items():
                won[metric] += [mean_logprob(p, a) > mean_logprob(p, b) for p, a, b in own]
    found = rates(asked)
    plain = {metric: 100 * sum(own) / len(own) for metric, own in won.items()}
    assert {metric: found[metric].value for metric in METRICS} == pytest.approx(plain)
    assert len(set(plain.values())) > 1
    average_score = average(asked)
    assert average_score is not None
    expected = 5 / sum(1 / value for value in plain.values()) if all(plain.values()) else 0.0
    assert average_score.value == pytest.approx(expected)


@pytest.mark.real
def test_answers_of_a_real_model_are_scores(smollm2: dl.LensModel) -> None:
    """Everything that can be asked, before an edit and after it."""
    plain = next(case for case in read_cases(asset("facts.jsonl")) if case.distractors)
    case = replace(
        plain,
        aliases=(Cloze(f"{plain.request.subject}, as some call it, is", plain.request.target_new),),
        reasoning=(Cloze("What follows from it is", "a long story"),),
        commonsense=(Commonsense("To read,", "open a book.", "eat a book."),),
    )
    assert check_answers(smollm2, case) == set(ALL_METRICS)
    edit = dl.edit(smollm2, case.request, "ft-m", layer=5, steps=5, progress=False)
    before = answers(smollm2, case)
    with edit.applied(smollm2):
        check_answers(smollm2, case)
        assert answers(smollm2, case) != before


# --- the journal -----------------------------------------------------------------------------


def test_a_journal_remembers(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    journal = Journal(path)
    journal.add({"b": 1, "a": [1, 2]}, value=3.5)
    assert {"a": [1, 2], "b": 1} in journal
    again = Journal(path)
    assert again[{"a": [1, 2], "b": 1}]["value"] == 3.5
    assert {"a": [1, 2], "b": 2} not in again
    assert len(list(again)) == 1


@given(st.integers(0, 200), st.binary(max_size=8))
def test_a_torn_journal_loses_one_record_at_most(cut: int, rubbish: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        journal = Journal(path)
        for i in range(3):
            journal.add(i, text="é" * i)
        whole = path.read_bytes()
        left = whole[: max(0, len(whole) - cut)]
        path.write_bytes(left + rubbish)
        before = {record["unit"] for record in Journal(path)}
        assert set(range(left.count(b"\n"))) <= before <= {0, 1, 2}
        Journal(path).add(7, text="new")
        after = {record["unit"] for record in Journal(path)}
        assert before | {7} <= after


def test_a_record_that_was_overwritten_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.add("a", value=1234)
    journal.add("b", value=5)
    path.write_bytes(path.read_bytes().replace(b"1234", b"1934"))
    assert [record["unit"] for record in Journal(path)] == ["b"]


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        Journal(tmp_path / "file" / "journal.jsonl").add(1)


# --- the experiments -------------------------------------------------------------------------


def test_names_of_new_files_are_safe_on_the_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's name is in its folder: a power cut must not lose either."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))

    def inodes(*paths: Path) -> list[int]:
        return [path.stat().st_ino for path in paths]

    path = tmp_path / "new" / "units.jsonl"
    journal = Journal(path)
    journal.add(1)
    assert synced == inodes(tmp_path, path, path.parent)
    journal.add(2)
    assert synced[3:] == inodes(path)
    synced.clear()
    result = tmp_path / "a" / "deep" / "result.json"
    write_result(result, b"{}")
    assert synced == inodes(tmp_path, tmp_path / "a", result, result.parent)
    synced.clear()
    write_result(result, b"[]")
    assert synced == inodes(result, result.parent)


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="error") if fails else nullcontext():
        sync_folder(tmp_path)


def test_many_facts_at_once_and_in_a_row(
    model: dl.LensModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = json.loads(json.dumps(RECORD).replace("The Louvre", "The Prado"))
    cases = read_cases(write(tmp_path / "data.json", RECORD, other))
    with pytest.warns(UserWarning, match="known to be good"):
        target = many.run(model, cases, ["ft-m", "grace"], tmp_path, data=cases.source)
    result = json.loads(target.read_text())
    digest = hashlib.sha256((tmp_path / "data.json").read_bytes()).hexdigest()
    assert "--model tiny --data data.json --facts 2 --methods ft-m grace" in result["command"]
    assert result["data"] == {"name": "data.json", "sha256": digest}
    assert [(r["method"], r["way"]) for r in result["rows"]] == [
        (None, "unedited"), ("ft-m", "batch"), ("ft-m", "sequence"), ("grace", "sequence")
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["rates"]["ES"]["prompts"] == 2
    assert list(result["rows"][2]["checkpoints"]) == ["1", "2"]
    assert result["rows"][2]["checkpoints"]["2"] == result["rows"][2]["rates"]
    before = [answers(model, case) for case in cases]
    for count, found in result["rows"][0]["checkpoints"].items():
        assert found == many.rated(before[: int(count)])
    assert many.markdown(result).count("\n") == 5
    monkeypatch.setattr(many.dl, "edit", None)  # nothing is edited again
    monkeypatch.setattr(many.dl, "edit_sequence", None)
    with pytest.warns(UserWarning, match="known to be good"):
        again = many.run(model, cases, ["ft-m", "grace"], tmp_path, data=cases.source)
    assert json.loads(again.read_text()) == result


def test_a_batch_that_fails_says_why_and_is_tried_again_if_asked(
    model: dl.LensModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = read_cases(write(tmp_path / "data.json", RECORD))
    journal = Journal(tmp_path / "journal.jsonl")
    arm = make_arms(model, ["ft-m"], ["none"])[1]
    edit = dl.edit

    def failing(*_: Any, **__: Any) -> Any:
        raise dl.EditError("Too many\nfacts.")

    monkeypatch.setattr(dl, "edit", failing)
    found = many.measure(model, cases, arm, "batch", journal, progress=False)
    assert found.pop("spent") >= 0
    assert found == {"error": "EditError: Too many facts."}
    monkeypatch.setattr(dl, "edit", edit)
    assert "error" in many.measure(model, cases, arm, "batch", journal, progress=False)
    again = many.measure(model, cases, arm, "batch", journal, retry_failed=True, progress=False)
    assert again["rates"]["ES"]["prompts"] == 1


def test_tuning_takes_what_works_first() -> None:
    good = {"rates": {"ES": 100.0, "PS": 96.0, "NS": 50.0}}
    better = {"rates": {"ES": 99.0, "PS": 95.0, "NS": 80.0}}
    half = {"rates": {"ES": 99.0, "PS": 94.0, "NS": 99.0}}
    less = {"rates": {"ES": 100.0, "PS": 94.0, "NS": 10.0}}
    weak = {"rates": {"ES": 90.0, "PS": 99.0, "NS": 99.0}}
    awful = {"rates": {"ES": 10.0, "PS": 5.0, "NS": 0.0}}  # yet it is an edit
    broken = {"error": "x"}
    ranked = sorted([good, weak, awful, broken, less, half, better], key=tuning.value_of)
    assert ranked == [broken, awful, weak, less, half, good, better]


def test_tuning_is_recorded(model: dl.LensModel, tmp_path: Path, monkeypatch: Any) -> None:
    other = json.loads(json.dumps(RECORD).replace("The Louvre", "The Prado"))
    cases = read_cases(write(tmp_path / "data.json", RECORD, other))
    found = [[{"lr": 1e-4, "steps": 2}], [{"lr": 5e-2}]]
    monkeypatch.setattr(tuning, "stages", lambda method, n, is_search_known: found)
    monkeypatch.setattr(tuning, "GAMMAS", (0.0, 0.5))
    search = tuning.Search(model, "ft-m", cases, tmp_path, data=cases.source)
    best = search.best()
    assert {trial["data"]["name"] for trial in search.journal} == {"data.json"}
    assert best.lr in (1e-4, 5e-4, 5e-2)
    assert search.best_gamma(best) in (0.0, 0.5)
    lines = (tmp_path / "tuning-tiny-ft-m.jsonl").read_text().splitlines()
    units = [json.loads(line)["unit"] for line in lines]
    assert [(len(unit["cases"]), unit["gamma"]) for unit in units] == [
        (1, None), (1, None), (2, None), (2, None), (2, 0.0), (2, 0.5)
    ]  # fmt: skip
    assert [unit["config"]["steps"] for unit in units[:2]] == [25, 2]
    again = tuning.Search(model, "ft-m", cases, tmp_path)
    assert again.best() == best
    assert len((tmp_path / "tuning-tiny-ft-m.jsonl").read_text().splitlines()) == 6


def test_a_trial_that_failed_is_tried_again_if_asked_for(
    model: dl.LensModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = read_cases(write(tmp_path / "data.json", RECORD))
    config = dl.FtConfig(layer=1, steps=2)
    calls: list[int] = []

    def failing(model: Any, job: Any, *_: Any) -> Any:
        calls.append(1)
        yield job.cases[0], {"error": "OutOfMemoryError: too little"}

    ran = tuning.run_job
    monkeypatch.setattr(tuning, "run_job", failing)
    search = tuning.Search(model, "ft-m", cases, tmp_path)
    assert "too little" in search.trial(config)["error"]
    monkeypatch.setattr(tuning, "run_job", ran)
    kept = tuning.Search(model, "ft-m", cases, tmp_path)
    assert "too little" in kept.trial(config)["error"]
    again = tuning.Search(model, "ft-m", cases, tmp_path, retry_failed=True)
    assert again.trial(config)["rates"]["ES"] >= 0
    # Once in a call: what fails again is not tried for each question that needs it.
    monkeypatch.setattr(tuning, "run_job", failing)
    anew = tuning.Search(model, "ft-m", cases, tmp_path / "anew", retry_failed=True)
    calls.clear()
    for _ in range(2):
        assert "too little" in anew.trial(config)["error"]
    assert len(calls) == 1


def test_what_a_search_found_is_written_for_others_to_take(
    model: dl.LensModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = write(tmp_path / "data.json", RECORD)
    asked: list[str | None] = []
    monkeypatch.setattr(dl, "load_model", lambda name, device: asked.append(device) or model)
    monkeypatch.setattr(tuning, "tuning_split", lambda cases: (cases, []))
    best = dl.FtConfig(layer=1, steps=2)
    monkeypatch.setattr(tuning.Search, "best", lambda self: best)
    monkeypatch.setattr(tuning.Search, "best_gamma", lambda self, config: 0.25)
    options = ["tuning", "--data", str(data), "--methods", "ft-m", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*options, "--device", "cpu"])
    tuning.main()
    assert asked == ["cpu"]
    target = tmp_path / "tuned-tiny-ft-m.toml"
    assert f"gamma 0.25; wrote {target}, for --config" in capsys.readouterr().out
    plan = dl.read_config(target)
    assert (plan.method, plan.penalties) == ("ft-m", (dl.SADR(gamma=0.25),))
    (arm,) = make_arms(model, ["ft-m"], ["sadr"], {"ft-m": plan})[1:]
    assert (arm.config, arm.penalties) == (best, plan.penalties)


@pytest.mark.parametrize(
    ("kept", "chosen"),
    [
        # gamma: ES, PS (of 50 prompts), NS = RS = DNS
        ({0.05: (100, 98, 20), 0.2: (100, 96, 40), 0.5: (100, 94, 60)}, 0.2),
        ({0.05: (99, 98, 50), 0.2: (98, 98, 60), 0.5: (100, 96, 40)}, 0.05),
        ({0.05: (90, 98, 50), 0.2: (98, 98, 60), 0.5: (100, 90, 40)}, 0.2),  # none is cheap
        ({0.05: (90, 98, 50), 0.2: (70, 98, 60), 0.5: (100, 90, 40)}, 0.05),
    ],
)
def test_gamma_is_the_best_that_costs_little(
    model: dl.LensModel, tmp_path: Path, monkeypatch: Any,
    kept: dict[float, tuple[float, float, float]], chosen: float | None,
) -> None:  # fmt: skip
    def trial(self: Any, config: Any, gamma: float | None = None, whole: bool = False) -> Any:
        assert whole
        es, ps, rest = (100, 100, 10) if gamma is None else kept[gamma]
        found = {"ES": es, "PS": ps, "NS": rest, "RS": rest, "DNS": rest}
        return {"rates": found, "prompts": {"ES": 100, "PS": 50}}

    monkeypatch.setattr(tuning.Search, "trial", trial)
    monkeypatch.setattr(tuning, "GAMMAS", tuple(kept))
    search = tuning.Search(model, "ft-m", [], tmp_path)
    assert search.best_gamma(dl.FtConfig(layer=1)) == chosen


def test_a_search_begins_with_what_its_relative_found(
    model: dl.LensModel, tmp_path: Path, monkeypatch: Any
) -> None:
    found: list[Any] = []

    def trial(self: tuning.Search, config: Any, whole: bool) -> dict[str, Any]:
        found.append(config)
        wanted = getattr(config, "layer", None) == 1 or getattr(config, "cov_weight", 0) == 100.0
        return {"rates": {"ES": 100.0 if wanted else 50.0, "PS": 100.0, "NS": 100.0}}

    monkeypatch.setattr(tuning.Search, "trial", trial)
    best = tuning.Search(model, "emmet", [], tmp_path).best()
    assert isinstance(best, dl.EmmetConfig)
    assert best.layers == (1,)  # where ROME was best
    assert best.cov_weight == 100.0
    assert best.lr == tuning.FIRST["lr"]
    assert {type(config) for config in found} == {dl.RomeConfig, dl.EmmetConfig}


@pytest.mark.parametrize("method", ["rome", "r-rome", "memit", "pmet", "emmet", "alphaedit",
                                    "ft-l", "ft-m", "grace"])  # fmt: skip
def test_every_method_has_valid_trials(method: str) -> None:

    from driftlens.editing.configs import checked
    from driftlens.editing.methods import METHODS

    kind = METHODS[method].config
    where = {"layer": 1} if "layer" in kind.__dataclass_fields__ else {"layers": (1,)}
    config = checked(kind, where, method)
    for change in itertools.chain(*tuning.stages(method, 18)):
        found = replace(config, **change)
        checked(kind, {n: getattr(found, n) for n in kind.__dataclass_fields__}, method)


# --- names that do not exist -----------------------------------------------------------------

YES = Answer("RS", -1.0, -2.0, 0.4, 0.1, True)
MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "a measure": (lambda: rates([[YES]], "logit_diff"), "measure is 'logit_diff'. Choose one of s"),
    "a measure of pairs": (lambda: compare({"a": [YES]}, {"a": [YES]}, "logprob"), "'logprob'"),
    "averaging": (lambda: rates([[YES]], by="cases"), "by is 'cases'. Choose one of prompt, case."),
    "averaging of a mean": (lambda: average([[YES]], by="cases"), "by is 'cases'"),
    "a metric": (lambda: growth({"a": [YES]}, {"a": [YES]}, "rs"), "A metric is 'rs'"),
    "a metric of a mean": (lambda: combined([[YES]], ["RS", "NSS"]), "A metric is 'NSS'"),
    "a metric of a run": (lambda: Setting(metrics=("es",)), "A metric is 'es'. Choose one of ES"),
    "letters": (lambda: Setting(metrics="ES"), "A metric is 'E'"),
    "a metric of texts": (lambda: Setting(texts=("fluency",)), "Choose one of FL, reference, "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_name_that_does_not_exist_is_refused(mistake: str) -> None:
    make, said = MISTAKES[mistake]
    with pytest.raises(RequestError, match=re.escape(said)):
        make()


def test_a_metric_that_does_not_exist_is_not_asked(model: dl.LensModel, tmp_path: Path) -> None:
    (case,) = read_cases(write(tmp_path / "data.json", RECORD))
    with pytest.raises(RequestError, match="A metric is 'NSS'. Choose one of ES, "):
        answers(model, case, ["ES", "NSS"])
    with pytest.raises(RequestError, match="A metric is 'fluency'"):
        measure_texts(model, case, ["fluency"])
