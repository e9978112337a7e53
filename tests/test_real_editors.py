"""The editors' identities and effects on a real model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import driftlens as dl
from driftlens.editing.alphaedit import null_space_right, project
from driftlens.editing.configs import EmmetConfig
from driftlens.editing.contexts import Context
from driftlens.editing.emmet import equality_right
from driftlens.editing.methods import METHODS
from driftlens.editing.outcome import NullSpaceState
from driftlens.editing.spreading import Facts
from driftlens.editing.statistics import wikipedia_leads
from driftlens.interventions import down_in_name, down_out_name

pytestmark = pytest.mark.real

LAYERS = (6, 7, 8)
REQUEST = dl.EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
OTHERS = [
    dl.EditRequest("The mother tongue of {} is", "Marie Curie", "Spanish", "Polish"),
    dl.EditRequest("{} was founded in the country of", "Toyota", "Italy", "Japan"),
]
CONTEXTS = ["{}", "Yes. {}", "The weather was fine that day. {}"]
COMMON: dict[str, Any] = {"steps": 8, "context_prompts": CONTEXTS, "progress": False}


@cache
def moments(model: dl.LensModel) -> dict[int, dl.KeyCovariance]:
    return dl.key_covariances(
        model, LAYERS, wikipedia_leads(), max_tokens=6000, cache=False, progress=False
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def options_for(method: str, model: dl.LensModel) -> dict[str, Any]:
    if method in ("ft-l", "ft-m"):
        return {"layer": 20, "steps": 10, "progress": False}
    if method == "grace":
        return {"layer": 20, "steps": 10, "progress": False}
    if method in ("rome", "r-rome"):
        return {"layer": 8, "covariance": moments(model)[8], **COMMON}
    more: dict[str, Any] = {"clamp_factor": 4.0}
    if method == "alphaedit":
        more |= {"nullspace_threshold": 0.02, "ridge": 0.1}
    return {"layers": LAYERS, "covariance": moments(model), **COMMON, **more}


def test_every_layer_writes_to_the_residual_stream_in_half_precision_too(
    smollm2: dl.LensModel,
) -> None:
    assert smollm2.writes_directly == set(range(30))
    half = dl.load_model("smollm2-135m", dtype=torch.bfloat16)
    assert half.writes_directly == set(range(30))
    options = {**COMMON, "layers": (12, 13), "covariance": "identity", "cov_weight": 1.0}
    edit = dl.edit(half, REQUEST, method="memit", **options)
    assert edit.rank == 1


def test_the_identities_of_the_solves_on_real_keys(smollm2: dl.LensModel) -> None:
    covariance = moments(smollm2)[8]
    assert covariance.matrix is not None
    facts = Facts(smollm2, [REQUEST, *OTHERS], [Context(), Context("Yes. ")])
    keys = facts.keys(8)
    config = EmmetConfig(layers=(8,), cov_weight=50.0, key_weight=0.1)
    memit = covariance.solve_with(keys, 5.0)
    assert relative(equality_right(keys, covariance, config), memit) < 1e-8
    explicit = torch.linalg.inv(5.0 * covariance.matrix.double() + keys.T @ keys) @ keys.T
    assert relative(memit, explicit) < 1e-6
    solved = covariance.solve(keys[0])
    rome = (solved / (keys[0] @ solved))[:, None]
    exact = EmmetConfig(layers=(8,), key_weight=0.0)
    assert relative(equality_right(keys[:1], covariance, exact), rome) < 1e-8
    # C^-1 is large here, so that lambda has to be small before the limit is reached.
    errors = [relative(covariance.solve_with(keys[:1], w), rome) for w in (1e-1, 1e-3, 1e-5)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_alphaedits_null_space_of_real_keys(smollm2: dl.LensModel) -> None:
    state = NullSpaceState()
    project(state, 8, moments(smollm2)[8], 0.02)
    p = state.projections[8]
    assert 0 < state.ranks[8] < len(p)
    keys = Facts(smollm2, [REQUEST, *OTHERS], [Context()]).keys(8)
    earlier = keys[1:].T @ keys[1:]
    eye = torch.eye(len(p), dtype=torch.float64)
    explicit = torch.linalg.solve(p @ (keys.T @ keys + earlier) + 0.3 * eye, p @ keys.T)
    found = null_space_right(keys, p, earlier, 0.3)
    assert relative(found, explicit) < 1e-4
    assert float((found.T @ (eye - p)).abs().max()) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_every_editor_edits_and_sadr_starts_at_zero(method: str, smollm2: dl.LensModel) -> None:
    before = smollm2.fingerprint()
    edit = dl.edit(
        smollm2, REQUEST, method, penalty=dl.SADR(gamma=0.05), **options_for(method, smollm2)
    )
    assert edit.trace[0]["sadr"] == 0.0
    assert edit.trace[0]["held_heads"] == 0.0
    assert all(record["sadr"] >= 0.0 for record in edit.trace)
    free = dl.score_details(smollm2, REQUEST.text, ["Rome"])["Rome"].prob
    with edit.applied(smollm2):
        edited = dl.score_details(smollm2, REQUEST.text, ["Rome"])["Rome"].prob
    assert edited > 5 * free
    assert smollm2.fingerprint() == before


@pytest.mark.parametrize("method", ["rome", "emmet"])
def test_the_edited_matrix_says_the_value(method: str, smollm2: dl.LensModel) -> None:
    options = {**options_for("rome", smollm2), "context_prompts": ["{}"]}
    if method == "emmet":
        del options["layer"]
        options |= {"layers": [8], "key_weight": 0.0, "clamp_factor": 4.0}
    edit = dl.edit(smollm2, REQUEST, method, **options)
    ids = torch.tensor([smollm2.tokens.encode(REQUEST.text).ids])
    at = len(smollm2.tokens.encode(REQUEST.subject).ids) - 1
    names = [down_in_name(8), down_out_name(8)]
    key, before = (smollm2.record(ids, names)[name][0, at] for name in names)
    with edit.applied(smollm2):
        inside, after = (smollm2.record(ids, names)[name][0, at] for name in names)
    assert torch.equal(key, inside)
    assert float((after - before).norm()) == pytest.approx(edit.trace[-1]["delta_norm"], rel=1e-4)


def test_a_batch_and_a_sequence_keep_all_their_facts(smollm2: dl.LensModel) -> None:
    requests = [REQUEST, *OTHERS]
    options = options_for("memit", smollm2)
    batch = dl.edit(smollm2, requests, "memit", **options)
    row = dl.edit_sequence(smollm2, requests, "memit", **options)
    for edit in (batch, row):
        assert edit.rank == 3
        for request in requests:
            new, true = request.target_new, str(request.target_true)
            with edit.applied(smollm2):
                scores = dl.score_details(smollm2, request.text, [new, true])
            assert scores[new].mean_logprob > scores[true].mean_logprob
