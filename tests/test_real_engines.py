"""The fast ways give what the plain ways give on real models, too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import driftlens as dl
from driftlens.scoring import ask, score_questions

pytestmark = pytest.mark.real

REQUEST = dl.EditRequest("The {} is located in the city of", "Eiffel Tower", "Rome", "Paris")
PROMPT = "The Eiffel Tower is famous. The Great Sphinx of Giza is located in the country of"
CONTEXTS = ["{}", "Yes. {}", "The weather is nice today, and so we travel. {}"]


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def model(request: pytest.FixtureRequest) -> Iterator[dl.LensModel]:
    if request.param == "smollm2-135m":
        yield request.getfixturevalue("smollm2")
    else:
        yield dl.load_model(request.param)


@pytest.fixture(scope="module")
def edits(model: dl.LensModel) -> dict[str, dl.Edit]:
    """One edit by each engine."""
    options: dict[str, Any] = {
        "steps": 6,
        "early_stop_loss": -1.0,
        "context_prompts": CONTEXTS,
        "covariance": "identity",
        "penalty": dl.SADR(gamma=0.05),
        "progress": False,
    }
    return {e: dl.edit(model, REQUEST, engine=e, **options) for e in ("plain", "suffix")}  # type: ignore[arg-type]


def test_edits_are_the_same(edits: dict[str, dl.Edit]) -> None:
    assert {name: made.info["engine"] for name, made in edits.items()} == {
        "plain": "plain",
        "suffix": "suffix",
    }
    (plain,), (fast,) = (edits[e].deltas.values() for e in ("plain", "suffix"))
    difference = (plain.dense() - fast.dense()).norm() / plain.dense().norm()
    assert float(difference) < 1e-5
    for one, other in zip(edits["plain"].trace, edits["suffix"].trace, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["held_heads"] == other["held_heads"]


@pytest.mark.parametrize("direction", ["restore", "contaminate"])
def test_patches_are_the_same(
    model: dl.LensModel, edits: dict[str, dl.Edit], direction: Any
) -> None:
    found = []
    for engine in ("plain", "suffix"):
        experiment = dl.PatchExperiment(
            model,
            edits["suffix"],
            PROMPT,
            answer="Egypt",
            direction=direction,
            engine=engine,  # type: ignore[arg-type]
        )
        last = model.info.n_layers - 1
        found.append(
            [
                experiment.attention(layers=[last, last - 4]),
                experiment.attention(heads=[(last - 2, 1)], columns="subject"),
                experiment.attention(queries=[-1, -4], exchange="both"),
                experiment.activation("attn_out", layers=range(last - 3, last)),
            ]
        )
    for plain, fast in zip(*found, strict=True):
        assert (plain.engine, fast.engine) == ("plain", "suffix")
        for run in ("original", "edited", "patched"):
            expected = getattr(plain, run).logprob
            assert getattr(fast, run).logprob == pytest.approx(expected, abs=1e-3)


def test_a_sweep_is_its_single_patches(model: dl.LensModel, edits: dict[str, dl.Edit]) -> None:
    experiment = dl.PatchExperiment(model, edits["suffix"], PROMPT, answer="Egypt")
    sweep = experiment.sweep(progress=False)
    plain = dl.PatchExperiment(model, edits["suffix"], PROMPT, answer="Egypt", engine="plain")
    for layer in (0, model.info.n_layers // 2, model.info.n_layers - 1):
        single = plain.attention(heads=[(layer, 1)]).patched.logprob
        assert sweep.heads[layer][1].logprob == pytest.approx(single, abs=1e-3)
    assert sweep.everything.logprob == pytest.approx(plain.attention().patched.logprob, abs=1e-3)


def test_scores_are_the_same(model: dl.LensModel) -> None:
    prompts = [PROMPT, REQUEST.text, f"{REQUEST.text} Rome. The Louvre is located in the city of"]
    questions = [ask(model, p, t) for p in prompts for t in ("Paris", "the Roman Empire", "Egypt")]
    plain, packed = (score_questions(model, questions, e) for e in ("plain", "suffix"))
    for one, other in zip(plain, packed, strict=True):
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-3)
