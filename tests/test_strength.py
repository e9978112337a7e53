"""Edits that are scaled, and made as strong as another one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import driftlens as dl
from driftlens.errors import EditError, RequestError
from driftlens.strength import target_prob, weakened

REQUEST = dl.EditRequest("{} is in the city of", "The Eiffel Tower", "Rome", "Paris")


@pytest.fixture(scope="module")
def model() -> dl.LensModel:
    return dl.load_model(
        tiny.hf_model("llama", 1, scale=5.0, noise=0.3), tiny.tokenizer(), name="tiny"
    )


@pytest.fixture(scope="module")
def edit(model: dl.LensModel) -> dl.Edit:
    """Steps of two matrices along the gradient of the new target's log-probability."""
    new = tiny.likely(model, REQUEST.text, 4)
    weights = [model.weights.parameters[down(layer)] for layer in (0, 1)]
    ids = model.tokens.encode(REQUEST.text).ids
    with torch.enable_grad():
        logits = model.hf_model(torch.tensor([ids])).logits[0, -1]
        (target,) = model.tokens.target_ids(new)
        gradients = torch.autograd.grad(logits.log_softmax(-1)[target], weights)
    deltas = {down(i): 2.0 * gradient / gradient.norm() for i, gradient in enumerate(gradients)}
    return dl.Edit.from_deltas(model, deltas, request=replace(REQUEST, target_new=new))


def down(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj.weight"


@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.3, 1.0, 2.0])
def test_a_scaled_edit_changes_weights_by_so_much(model: dl.LensModel, factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {down(layer): model.weights.parameters[down(layer)] for layer in (0, 1)}
    rows, columns = weights[down(0)].shape
    left, right = (torch.randn(n, 2, generator=generator) for n in (rows, columns))
    dense = torch.randn(rows, columns, generator=generator)
    edit = dl.Edit.from_deltas(
        model, {down(0): dl.LowRankDelta(left, right), down(1): dense}, request=REQUEST
    )
    before = {name: weight.detach().double() for name, weight in weights.items()}
    expected = {down(0): left.double() @ right.double().T, down(1): dense.double()}
    scaled = edit.scaled(factor)
    with scaled.applied(model):
        for name, weight in model.weights.parameters.items():
            if name in expected:
                found = weight.detach().double()
                torch.testing.assert_close(
                    found, before[name] + factor * expected[name], atol=1e-5, rtol=1e-5
                )
    for name, weight in weights.items():
        assert torch.equal(weight.detach().double(), before[name])
    assert scaled.requests == edit.requests
    assert scaled.info["factor"] == factor
    assert scaled.scaled(0.5).info["factor"] == pytest.approx(0.5 * factor)
    assert "factor" not in edit.info
    assert f"times {factor:.3g}" in repr(scaled)
    assert "times" not in repr(edit)


def test_a_scaled_edit_is_kept(model: dl.LensModel, edit: dl.Edit, tmp_path: Path) -> None:
    half = edit.scaled(0.5)
    half.save(tmp_path)
    again = dl.load_edit(tmp_path)
    assert again.info["factor"] == 0.5
    assert again.deltas == half.deltas
    assert again.deltas != edit.deltas


def test_a_scaled_edit_in_half_precision(model: dl.LensModel) -> None:
    """Small factors are scaled in float32, not rounded to nothing."""
    rows, columns = model.weights.parameters[down(0)].shape
    left = torch.full((rows, 1), 1e-4, dtype=torch.float16)
    right = torch.ones(columns, 1, dtype=torch.float16)
    edit = dl.Edit.from_deltas(
        model, {down(0): dl.LowRankDelta(left, right), down(1): left @ right.T}
    )
    for delta in edit.scaled(1e-4).deltas.values():
        found = delta.dense().double()
        torch.testing.assert_close(found, torch.full_like(found, 1e-8), rtol=1e-2, atol=0)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_an_edit_is_scaled_by_a_number(edit: dl.Edit, factor: float) -> None:
    with pytest.raises(EditError, match="cannot be scaled by"):
        edit.scaled(factor)


def test_an_adapter_is_not_scaled(model: dl.LensModel) -> None:
    edit = dl.edit(model, REQUEST, method="grace", config=dl.GraceConfig(layer=1, steps=2))
    with pytest.raises(EditError, match="An adapter cannot be made larger"):
        edit.scaled(0.5)
    with pytest.raises(EditError, match="An adapter cannot be made larger"):
        weakened(model, edit, target_prob(model, edit) / 2)


def test_the_strength_is_the_new_targets_probability(model: dl.LensModel, edit: dl.Edit) -> None:
    new = edit.requests[0].target_new
    before = math.exp(dl.score(model, REQUEST.text, [new])[new])
    with edit.applied(model):
        after = math.exp(dl.score(model, REQUEST.text, [new])[new])
    assert after > 1.5 * before
    assert target_prob(model, edit) == pytest.approx(after, rel=1e-5)
    assert target_prob(model, edit.scaled(0.0)) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("tolerance", [0.01, 1e-4])
def test_a_weakened_edit_is_as_strong_as_is_said(
    model: dl.LensModel, edit: dl.Edit, share: float, tolerance: float
) -> None:
    """The factor is that at which a fine grid of scaled edits crosses the probability."""
    whole, none = target_prob(model, edit), target_prob(model, edit.scaled(0.0))
    assert whole > 5 * none  # else the test shows nothing
    prob = none + share * (whole - none)
    found = weakened(model, edit, prob, tolerance=tolerance)
    assert target_prob(model, found) == pytest.approx(prob, rel=tolerance)
    grid = np.linspace(0, 1, 101)
    probs = np.array([target_prob(model, edit.scaled(factor)) for factor in grid])
    above = probs >= prob
    crossings = [(grid[i], grid[i + 1]) for i in range(100) if above[i] != above[i + 1]]
    assert any(low - 0.02 <= found.info["factor"] <= high + 0.02 for low, high in crossings)


def test_an_edit_that_is_as_strong_stays(model: dl.LensModel, edit: dl.Edit) -> None:
    whole = target_prob(model, edit)
    assert weakened(model, edit, whole) is edit
    assert weakened(model, edit, whole * 1.005) is edit
    assert weakened(model, edit, whole * 0.98) is not edit


def test_nothing_is_left_where_the_original_is_as_strong(
    model: dl.LensModel, edit: dl.Edit
) -> None:
    found = weakened(model, edit, target_prob(model, edit.scaled(0.0)) / 2)
    assert found.info["factor"] == 0.0
    with found.applied(model):
        assert all(not delta.dense().any() for delta in found.deltas.values())


def test_what_cannot_be_weakened(model: dl.LensModel, edit: dl.Edit) -> None:
    with pytest.raises(RequestError, match=r"less than .*Weaken the stronger one"):
        weakened(model, edit, min(1.0, target_prob(model, edit) * 1.5))
    for prob, tolerance in ((0.0, 0.01), (-1.0, 0.01), (math.nan, 0.01), (0.1, 0.0)):
        with pytest.raises(RequestError, match="Give positive numbers"):
            weakened(model, edit, prob, tolerance=tolerance)
    unknown = dl.Edit.from_deltas(model, {down(0): torch.ones_like(edit_weight(model))})
    with pytest.raises(EditError, match="is not of one known fact"):
        target_prob(model, unknown)


def edit_weight(model: dl.LensModel) -> torch.Tensor:
    return model.weights.parameters[down(0)].detach()
