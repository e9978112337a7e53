"""The main job end to end: on a tiny model what it writes, on the real one what it shows."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import tiny

import driftlens as dl
from driftlens.assets import survey_result
from driftlens.demo import EIFFEL, Demo, averages, demo_json, demo_page, run_demo


@pytest.fixture(scope="module")
def demo() -> Demo:
    model = dl.load_model(tiny.hf_model("llama"), tokenizer=tiny.tokenizer(), name="tiny")
    with pytest.warns(UserWarning, match="No layers are known"):
        return run_demo(model, EIFFEL, covariance="identity", progress=False)


def test_json_has_what_it_promises(demo: Demo):
    numbers = json.loads(json.dumps(demo_json(demo), allow_nan=False))
    assert numbers["request"]["target_new"] == "Rome"
    assert numbers["distractor"]["answer"] == "Paris"
    for state in ("original", "edited", "restored", "sadr"):
        assert set(numbers["probabilities"][state]) == {"answer", "target_new"}
    assert {"edited", "sadr"} <= set(numbers["edit_success"])
    assert re.fullmatch(r"L\d+H\d+", numbers["top_heads"][0]["name"])
    drifts = [head["drift"] for head in numbers["top_heads"]]
    assert drifts == sorted(drifts, reverse=True)
    assert numbers["averages"] is None  # nobody measured any of this model
    assert numbers["seconds"] > 0


def test_numbers_agree_with_the_single_calls(demo: Demo):
    numbers = demo_json(demo)
    score = dl.score(demo.model, EIFFEL.prompt, ["Paris"])["Paris"]
    assert math.log(numbers["probabilities"]["original"]["answer"]) == pytest.approx(score)
    with demo.comparison.edit.applied(demo.model):
        score = dl.score(demo.model, EIFFEL.prompt, ["Paris"])["Paris"]
    assert math.log(numbers["probabilities"]["edited"]["answer"]) == pytest.approx(score)
    patched = dl.patch_attention(
        demo.model, demo.comparison.edit, EIFFEL.prompt, answer="Paris"
    ).patched
    assert numbers["probabilities"]["restored"]["answer"] == pytest.approx(patched.prob)
    assert demo.comparison.cured is not None
    assert demo.comparison.edit.config["steps"] == demo.comparison.cured.config["steps"]


def test_averages_are_of_this_model_and_name_their_gamma(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
):
    survey = survey_result("smollm2-135m")
    assert survey is not None
    monkeypatch.setattr("driftlens.demo.survey_result", lambda name: survey)
    assert averages(demo.model) is None  # of the same name, but other weights
    own = {**survey, "fingerprint": demo.model.fingerprint()}
    monkeypatch.setattr("driftlens.demo.survey_result", lambda name: own)
    assert demo_json(demo)["averages"] == own
    assert ">sadr, gamma 0.8<" in demo_page(demo) or '"sadr, gamma 0.8"' in demo_page(demo)


def test_page_is_self_contained(demo: Demo):
    html = demo_page(demo)
    assert "http://" not in html
    assert "https://" not in html
    assert "Notre-Dame" in html
    assert demo.comparison.drift.top_heads(1)[0].name in html


@pytest.mark.real
def test_demo_shows_the_phenomenon(smollm2: dl.LensModel, tmp_path: Path):
    found = run_demo(smollm2, EIFFEL, progress=False)
    numbers = demo_json(found)
    states = numbers["probabilities"]
    assert states["original"]["answer"] > 0.8
    assert states["edited"]["answer"] < 0.2
    assert states["edited"]["target_new"] > 0.5
    assert states["restored"]["answer"] > 0.6
    # All that the last token reads from elsewhere: only the edited matrix at that token is left.
    assert found.comparison.restored["attention pattern and values"].recovered_share > 0.95
    assert numbers["edit_success"]["edited"] > 0.9
    assert numbers["edit_success"]["sadr"] > 0.9
    assert numbers["averages"]["facts"] > 0
    assert "Averages" in demo_page(found)
