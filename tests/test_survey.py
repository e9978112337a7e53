"""The shipped facts, and the survey over them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

import driftlens as dl
from driftlens.assets import asset, survey_result
from driftlens.cases import Case
from driftlens.demo import survey_tables
from driftlens.errors import DataError, RequestError
from driftlens.experiments import survey
from driftlens.journal import Journal
from driftlens.readers import read_cases


@pytest.fixture(scope="module")
def facts() -> Sequence[Case]:
    return read_cases(asset("facts.jsonl"))


def test_facts_are_well_formed(facts: Sequence[Case]):
    assert len(facts) == 180
    for case in facts:
        request = case.request
        assert request.target_true != request.target_new
        assert len(case.relations) >= 3
        assert len(case.paraphrases) >= 2
        assert case.neighbours and case.distractors
        for query in [*case.relations, *case.distractors]:
            assert request.subject in query.prompt
        for query in [*case.relations, *case.distractors, *case.neighbours]:
            assert query.answer != request.target_new
    whole = [case for case in facts if case.reasoning]
    assert {case.category for case in whole} == {case.category for case in facts}
    card = (Path(__file__).parent.parent / "assets/facts.md").read_text("utf-8")
    assert f"for {len(whole)} of the facts, of all categories" in card
    for case in facts:
        subject, new = case.request.subject, case.request.target_new
        parts = (case.aliases, case.reasoning, case.commonsense, case.references)
        assert len({bool(part) for part in parts}) == 1  # all four or none
        for alias in case.aliases:
            assert alias.answer == new and subject not in alias.prompt
        for query in case.reasoning:
            assert query.prompt.count(subject) == 1
            assert query.answer != case.request.target_true
            assert not re.search(rf"\b{re.escape(query.answer)}\b", query.prompt)
        for text in case.references:
            assert subject in text
        for choice in case.commonsense:
            assert choice.right != choice.wrong


def record(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "edit_success": {"original": 0.0, "edited": 1.0, "sadr": 0.5},
        "probes": [
            {"kind": "relation", "states": {"edited": {"answer": a, "target_new": b}}}
            for a, b in pairs
        ],
    }


def test_averages_are_over_prompts_and_intervals_over_facts():
    records = [record([(0.1, 0.2), (0.3, 0.0)]), record([(0.8, 0.1)]), record([])]
    summary = survey.summarise(records)
    values = summary["kinds"]["relation"]["states"]["edited"]
    assert summary["facts"] == 3
    assert summary["kinds"]["relation"]["facts"] == 2
    assert summary["kinds"]["relation"]["prompts"] == 3
    assert values["answer"] == pytest.approx(0.4)
    assert values["beats_target_new"] == pytest.approx(2 / 3)
    low, high = values["answer_interval"]
    assert low == pytest.approx(0.2)  # only the first fact drawn
    assert high == pytest.approx(0.8)  # only the second
    assert len(survey_tables(summary)) == 1


def test_differences_are_paired_within_each_prompt():
    records = [record([(0.1, 0.2), (0.3, 0.0)]), record([(0.8, 0.1)])]
    for case, gains in zip(records, ([0.2, 0.0], [0.1]), strict=True):
        for probe, gain in zip(case["probes"], gains, strict=True):
            states = probe["states"]
            states["sadr"] = {**states["edited"], "answer": states["edited"]["answer"] + gain}
    content = survey.summarise(records)["kinds"]["relation"]
    found = content["less_edited"]["sadr"]
    gap = content["states"]["sadr"]["answer"] - content["states"]["edited"]["answer"]
    assert found["value"] == pytest.approx(gap)
    # Both facts gain 0.1 on average, whatever is drawn; the answers themselves differ widely.
    assert [found[end] for end in ("low", "high")] == pytest.approx([0.1, 0.1])
    assert (found["better"], found["worse"], found["cases"]) == (2, 0, 2)


def test_survey_runs_resumes_and_counts_only_what_is_known(
    facts: Sequence[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = dl.load_model(tiny.hf_model("llama"), tokenizer=tiny.tokenizer(), name="tiny")
    monkeypatch.setattr(dl, "load_model", lambda name, device: model)
    real = dl.edit
    made: list[str] = []

    def quick_edit(model: dl.LensModel, request: dl.EditRequest, **options: Any) -> dl.Edit:
        made.append(request.subject)
        return real(model, request, covariance="identity", steps=2, layer=1, **options)

    monkeypatch.setattr(dl, "edit", quick_edit)
    monkeypatch.setattr(survey, "_is_known", lambda model, probe: probe.kind == "relation")
    survey.run("tiny", facts[:1], tmp_path, 0.05)
    survey.run("tiny", facts[:2], tmp_path, 0.05)
    assert made == [facts[0].request.subject] * 2 + [facts[1].request.subject] * 2
    result = json.loads((tmp_path / "survey-tiny.json").read_text())
    assert result["facts"] == 2
    assert list(result["kinds"]) == ["relation"]
    states = result["kinds"]["relation"]["states"]
    assert {"original", "edited", "sadr", "restored: pattern", "restored: values"} <= set(states)
    assert "--facts 2" in result["command"]
    # The same file from the journal alone, which must hold every fact.
    (tmp_path / "survey-tiny.json").write_text(json.dumps({**result, "kinds": {}}))
    survey.summarise_again("tiny", tmp_path)
    assert json.loads((tmp_path / "survey-tiny.json").read_text()) == result
    journal = tmp_path / "survey-tiny.facts.jsonl"
    kept = list(Journal(journal))
    journal.unlink()
    for unit in ({**kept[0]["unit"], "content": "reworded since"}, *(r["unit"] for r in kept)):
        Journal(journal).add(unit, **{name: kept[0][name] for name in ("edit_success", "probes")})
    with pytest.raises(DataError, match="holds a fact twice"):
        survey.summarise_again("tiny", tmp_path)
    (tmp_path / "survey-tiny.json").write_text(json.dumps({**result, "gamma": 0.1}))
    with pytest.raises(DataError, match=r"0 of 2 facts"):
        survey.summarise_again("tiny", tmp_path)
    with pytest.raises(DataError, match="not there"):
        survey.summarise_again("another", tmp_path)


def test_a_survey_of_nothing_leaves_what_is_there(
    facts: Sequence[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    model = dl.load_model(tiny.hf_model("llama"), tokenizer=tiny.tokenizer(), name="tiny")
    monkeypatch.setattr(dl, "load_model", lambda name, device: model)
    monkeypatch.setattr(dl, "edit", functools.partial(dl.edit, covariance="identity", steps=2,
                                                      layer=1))  # fmt: skip
    monkeypatch.setattr(survey, "_is_known", lambda model, probe: False)
    there = tmp_path / "survey-tiny.json"
    there.write_text("what was measured before")
    with pytest.raises(RequestError, match="tiny answers no prompt of these 1 facts"):
        survey.run("tiny", facts[:1], tmp_path, 0.05)
    for number in ("0", "-3", "many"):
        monkeypatch.setattr("sys.argv", ["survey", "--facts", number, "--out", str(tmp_path)])
        with pytest.raises(SystemExit):
            survey.main()
        assert f"--facts: '{number}' is not a positive integer" in capsys.readouterr().err
    assert there.read_text() == "what was measured before"


def test_the_survey_of_the_bundled_model_is_shipped():
    result = survey_result("smollm2-135m")
    assert result is not None
    assert result["facts"] >= 20
    assert result["weights"].startswith("GGUF Q4_1")
    assert survey_result("no-such-model") is None


def test_the_shipped_averages_are_those_of_the_shipped_journal(tmp_path: Path):
    for name in ("survey-smollm2-135m.json", "survey-smollm2-135m.facts.jsonl"):
        (tmp_path / name).write_bytes(asset(f"results/{name}").read_bytes())
    survey.summarise_again("smollm2-135m", tmp_path)
    texts = [asset("results/survey-smollm2-135m.json"), tmp_path / "survey-smollm2-135m.json"]
    first, second = (  # the last bits of a sum differ from machine to machine
        json.loads(text.read_text("utf-8"), parse_float=lambda v: round(float(v), 9))
        for text in texts
    )
    assert first == second
