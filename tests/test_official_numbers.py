"""Numbers of the paper's released code on SmolLM2-135M: the update of ROME, and the scores.

The reference files are not a part of the package. They are looked for beside the
repository, in ``../shared/data``, or in the folder that ``DRIFTLENS_REFERENCE_DATA`` names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import driftlens as dl
from driftlens.scoring import Question, ask, score_questions

pytestmark = pytest.mark.real

LAYER = 8
N_CASES = 20


def reference_file(name: str) -> Path:
    """A reference file, or the test is skipped."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    path = Path(os.environ.get("DRIFTLENS_REFERENCE_DATA") or beside) / name
    if not path.is_file():
        pytest.skip(f"no reference file {path}; set DRIFTLENS_REFERENCE_DATA to its folder")
    return path


@pytest.fixture(scope="module")
def model() -> dl.LensModel:
    return dl.load_model("smollm2-135m")


def relative_error(found: Any, expected: Any) -> float:
    """Length of the difference over the length of what was expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# --- the update -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "penalty"),
    [("f0_w0", None), ("f0_w100", dl.SADR(gamma=0.01))],
    ids=["rome", "rome+sadr"],
)
def test_update_is_that_of_the_released_code(
    model: dl.LensModel, run: str, penalty: dl.SADR | None
) -> None:
    expected = np.load(reference_file("reference_rome_smollm2.npz"), allow_pickle=False)
    covariance = reference_file("reference_covariance_smollm2_layer8.npz")
    assert int(expected["layer"]) == LAYER
    prompt, subject, target = (str(text) for text in expected["fact"])
    edit = dl.edit(
        model,
        dl.EditRequest(prompt, subject, target),
        layer=LAYER,
        steps=int(expected["steps"]),
        lr=float(expected["lr"]),
        weight_decay=float(expected["v_weight_decay"]),
        clamp_factor=float(expected["clamp"]),
        kl_factor=float(expected["kl_factor"]),
        early_stop_loss=float(expected["early_stop"]),
        context_prompts=[str(text) for text in expected["contexts"]],
        covariance=covariance,
        penalty=penalty,
        progress=False,
    )
    (delta,) = edit.deltas.values()
    outer = np.outer(expected[f"{run}_v"], expected[f"{run}_u"])
    assert relative_error(delta.dense(), outer) < 1e-4
    assert relative_error(delta.left[:, 0], expected[f"{run}_v"]) < 1e-4
    assert relative_error(delta.right[:, 0], expected[f"{run}_u"]) < 1e-4

    assert len(edit.trace) == int(expected["steps"])
    last = edit.trace[-1]
    total, nll, kl, decay, attention, key = expected[f"{run}_loss"]
    found = [last["loss"], last["nll"], last["kl"], last["decay"], last.get("sadr", 0.0), 0.0]
    # A log-probability is a difference of float32 logits of about 20, known to 1e-6 each.
    np.testing.assert_allclose(found, [total, nll, kl, decay, attention, key], rtol=1e-4, atol=5e-6)
    assert last["target_prob"] == pytest.approx(float(expected[f"{run}_prob"]), rel=1e-4)


# --- the scores -----------------------------------------------------------------------------


def question(model: dl.LensModel, prompt: str, target: str) -> Question:
    """As :func:`ask`, but a target keeps white space at its end.

    A few answers in the data end in a space, and the released code scores it as a token;
    DriftLens drops it.
    """
    asked = ask(model, prompt, target)
    if target == target.rstrip():
        return asked
    ids = model.tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
    assert tuple(ids[: len(asked.target)]) == asked.target
    return Question(target, asked.prompt, tuple(ids))


def questions_of(model: dl.LensModel, record: dict[str, Any]) -> dict[str, list[Question]]:
    """All questions that the released evaluation asks about one record.

    Where the edit is to show (``rewrite``, ``p-``) the new object is right and the true one
    wrong; where nothing is to change (``l-``) the record's own answer is right and the new
    object wrong. ``o-commonsense`` brings both answers. With ``_aft_edit_text`` the edited
    fact stands in front as a sentence.
    """
    rewrite = record["requested_rewrite"]
    new, true = rewrite["target_new"], rewrite["target_true"]
    sentence = f"{rewrite['prompt']} {new}. "
    asked: dict[str, list[Question]] = {}
    for kind, content in record.items():
        if kind in ("requested_rewrite", "generation"):
            continue
        if kind == "o-commonsense":
            triples = [(content["prompts"], content["right"], content["wrong"])]
        else:
            wrong = new if kind.startswith("l-") else true
            pairs = zip(content["prompts"], content["targets"], strict=True)
            triples = [(prompt, right, wrong) for prompt, right in pairs]
        fronts = {"": ""}
        if kind.startswith(("l-", "o-")):
            fronts["_aft_edit_text"] = sentence
        for suffix, front in fronts.items():
            for side, index in (("right", 1), ("wrong", 2)):
                asked[f"{kind}{suffix}-{side}"] = [
                    question(model, front + triple[0], triple[index]) for triple in triples
                ]
    return {key: questions for key, questions in asked.items() if questions}


def test_scores_are_those_of_the_released_code(model: dl.LensModel) -> None:
    expected = json.loads(reference_file("reference_scores_smollm2.json").read_text("utf-8"))
    data = json.loads(reference_file("counterfact_wikidata_dev.json").read_text("utf-8"))
    by_fact = {
        (r["requested_rewrite"]["subject"], r["requested_rewrite"]["prompt"]): r for r in data
    }
    records = expected["records"]
    assert len(records) == N_CASES
    asked: list[Question] = []
    wanted: list[tuple[str, str, float]] = []
    for record in records:
        questions = questions_of(model, by_fact[record["subject"], record["prompt"]])
        assert set(questions) == set(record["scores"])
        for key, scores in record["scores"].items():
            assert len(questions[key]) == len(scores)
            asked += questions[key]
            wanted += [(record["prompt"], key, score) for score in scores]
    found = [-score.mean_logprob for score in score_questions(model, asked)]
    wrong = [
        (prompt, key, score, mine)
        for (prompt, key, score), mine in zip(wanted, found, strict=True)
        if not abs(score - mine) <= 1e-4
    ]
    assert not wrong, f"{len(wrong)} of {len(found)} scores differ, e.g. {wrong[:5]}"


# --- the positions ---------------------------------------------------------------------------


def test_positions_are_those_of_the_released_code(model: dl.LensModel) -> None:
    from driftlens.editing.contexts import parse_contexts
    from driftlens.editing.target import build_problem

    expected = np.load(reference_file("reference_rome_smollm2.npz"), allow_pickle=False)
    contexts = parse_contexts([str(text) for text in expected["contexts"]])
    request = dl.EditRequest(*(str(text) for text in expected["fact"]))
    problem = build_problem(model, request, contexts)
    assert problem.target == expected["f0_w0_target_ids"].tolist()
    assert problem.subject == expected["f0_w0_lookup_idxs"].tolist()
    assert problem.last_prompt == expected["f0_w0_predict_idxs"].tolist()
