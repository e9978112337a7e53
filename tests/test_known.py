"""What a model knows before an edit is what its greedy decoding gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

import driftlens as dl
from driftlens.assets import asset
from driftlens.cases import Case, Cloze, without_edited_facts
from driftlens.errors import DataError
from driftlens.experiments import known
from driftlens.readers import read_cases
from driftlens.records import data_file
from driftlens.scoring import ContinuationScore


@pytest.fixture(scope="module")
def model() -> dl.LensModel:
    return dl.load_model(tiny.hf_model("gpt2", 1), tiny.tokenizer(), name="tiny")


def decoded(model: dl.LensModel, prompt: str, count: int) -> str:
    ids = model.tokens.encode(prompt).ids
    start = len(ids)
    for _ in range(count):
        ids = [*ids, int(model.run(torch.tensor([ids]))[0, -1].argmax())]
    return model.tokens.decode(ids[start:])


def test_known_is_what_greedy_decoding_gives(model: dl.LensModel) -> None:
    prompts = ["The Louvre is in", "Mount Fuji is", "Paris"]
    answers = [decoded(model, prompt, 1).strip() for prompt in prompts]
    usable = [(p, a) for p, a in zip(prompts, answers, strict=True) if a]
    assert usable
    prompt, answer = usable[0]
    case = Case(
        "one",
        dl.EditRequest("{} is", "The Louvre", "Rome", "Oslo"),
        paraphrases=("Go to The Louvre in",),
        neighbours=(Cloze(prompt, answer), Cloze(prompt, f"{answer} {answer}x")),
        relations=(Cloze(prompt, answer),),
    )
    found = known.known(model, case)
    expected = model.tokens.target_ids(answer)
    is_given = decoded(model, prompt, len(expected)) == model.tokens.decode(expected)
    not_given = [] if is_given else [prompt]
    assert found["relations"] == {"known": int(is_given), "asked": 1, "unknown": not_given}
    wrong = [*not_given, prompt]
    assert found["neighbours"] == {"known": int(is_given), "asked": 2, "unknown": wrong}
    assert found["distractors"] == {"known": 0, "asked": 0, "unknown": []}
    oslo = model.tokens.target_ids("Oslo")
    says_so = decoded(model, "Go to The Louvre in", len(oslo)) == model.tokens.decode(oslo)
    left = [] if says_so else ["Go to The Louvre in"]
    assert found["paraphrases"] == {"known": int(says_so), "asked": 1, "unknown": left}
    assert found["prob"] == pytest.approx(
        dl.score_details(model, "The Louvre is", ["Oslo"])["Oslo"].prob
    )
    with pytest.raises(DataError, match="no target_true"):
        known.known(model, Case("two", dl.EditRequest("{} is", "The Louvre", "Rome")))


def test_the_second_likeliest_answer_is_not_known(
    model: dl.LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ("First", "Second", "Third")
    case = Case("one", dl.EditRequest("{} is", "The Louvre", "Rome", "Oslo"), paraphrases=prompts)
    ranks = [0, 0, 1, 2]  # of the fact, then of its paraphrases
    scores = [ContinuationScore("Oslo", (-1.0,), (rank,)) for rank in ranks]
    monkeypatch.setattr(known, "score_questions", lambda model, asked: scores)
    found = known.known(model, case)
    assert found["known"]
    assert found["paraphrases"] == {"known": 1, "asked": 3, "unknown": ["Second", "Third"]}


def test_the_data_card_shows_what_was_measured() -> None:
    card = (Path(__file__).parent.parent / "assets" / "facts.md").read_text("utf-8")
    for name, title in (("smollm2-135m", "SmolLM2-135M"), ("gemma-3-270m", "Gemma 3 270M")):
        summary = json.loads(asset(f"results/known-{name}.json").read_text("utf-8"))["summary"]
        cells = [f"{summary[k]['known']} of {summary[k]['asked']}" for k in ("facts", *known.KINDS)]
        assert f"| {title} | {' | '.join(cells)} |" in card


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_what_was_recorded_is_what_the_model_knows(name: str) -> None:
    record = json.loads(asset(f"results/known-{name}.json").read_text("utf-8"))
    assert record["data"] == data_file(asset("facts.jsonl"))
    model = dl.load_model(name)
    facts = read_cases(asset("facts.jsonl"))
    assert [row["id"] for row in record["facts"]] == [case.id for case in facts]
    for case, row in list(zip(facts, record["facts"], strict=True))[::30]:
        found = known.known(model, case)
        assert found.pop("prob") == pytest.approx(row["prob"], rel=1e-3)
        assert found.items() <= row.items()


def test_the_data_card_says_how_many_prompts_ask_for_other_edits() -> None:
    card = " ".join((Path(__file__).parent.parent / "assets/facts.md").read_text("utf-8").split())
    facts = read_cases(asset("facts.jsonl"))
    whole, left = (
        (sum(len(case.neighbours) for case in some), sum(len(case.relations) for case in some))
        for some in (facts, without_edited_facts(facts))
    )
    said = "of all {} it leaves out {} of {} neighbours, and {} of {} relations."
    left_out = whole[0] - left[0], whole[0], whole[1] - left[1], whole[1]
    assert said.format(len(facts), *left_out) in card


def test_command(model: dl.LensModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(dl, "load_model", lambda name, device: model)
    shipped = list(read_cases(asset("facts.jsonl"))[:3])
    monkeypatch.setattr(known, "read_cases", lambda path: shipped)
    monkeypatch.setattr(sys, "argv", ["known", "--model", "tiny", "--out", str(tmp_path)])
    known.main()
    result = json.loads((tmp_path / "known-tiny.json").read_text())
    assert [row["id"] for row in result["facts"]] == [case.id for case in shipped]
    assert result["summary"]["facts"]["asked"] == 3
    assert result["summary"]["relations"]["asked"] == sum(len(c.relations) for c in shipped)
    assert "facts: " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["known", "--out", str(tmp_path / "known-tiny.json")])
    with pytest.raises(SystemExit, match="cannot be written"):
        known.main()
