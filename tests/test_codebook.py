"""GRACE's adapter."""

from __future__ import annotations

import pytest
import tiny
import torch

import driftlens as dl
from driftlens.codebook import Codebook
from driftlens.errors import EditError
from driftlens.weights import DenseDelta, LowRankDelta, combined

REQUEST = dl.EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome")
OTHER = dl.EditRequest("The mother tongue of {} is", "Ada Lovelace", "French")


def book(*entries: tuple[list[float], float, float, str]) -> Codebook:
    keys, values, radii, labels = zip(*entries, strict=True)
    return Codebook(
        torch.tensor(keys), torch.tensor(values)[:, None], torch.tensor(radii), tuple(labels)
    )


def test_only_inputs_within_the_radius_of_the_nearest_key_are_answered() -> None:
    adapter = book(([0.0, 0.0], 1.0, 0.5, "a"), ([3.0, 0.0], 2.0, 1.0, "b"))
    inputs = torch.tensor([[[0.0, 0.4], [0.0, 0.6], [2.1, 0.0], [9.0, 9.0], [0.5, 0.0]]])
    outputs = torch.full((1, 5, 1), -1.0)
    assert adapter(inputs, outputs)[0, :, 0].tolist() == [1.0, -1.0, 2.0, -1.0, 1.0]
    assert adapter(inputs[0], outputs[0]).shape == (5, 1)


def test_a_new_entry_far_away_is_added_as_it_is() -> None:
    both = book(([0.0, 0.0], 1.0, 0.5, "a")).with_entries(book(([3.0, 0.0], 2.0, 1.0, "b")))
    assert both.radii.tolist() == [0.5, 1.0]
    assert both.labels == ("a", "b")


def test_balls_with_different_labels_halve_the_distance() -> None:
    both = book(([0.0, 0.0], 1.0, 2.0, "a")).with_entries(book(([2.0, 0.0], 2.0, 2.0, "b")))
    assert both.radii.tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    assert both.radii[0] < 1.0  # the point between has one answer
    assert both.keys.shape == (2, 2)


def test_a_ball_that_was_small_stays_small() -> None:
    both = book(([0.0, 0.0], 1.0, 0.1, "a")).with_entries(book(([2.0, 0.0], 2.0, 3.0, "b")))
    assert both.radii.tolist() == pytest.approx([0.1, 1.0])


def test_a_ball_with_the_same_label_grows_instead() -> None:
    both = book(([0.0, 0.0], 1.0, 1.0, "a")).with_entries(book(([1.5, 0.0], 2.0, 1.0, "a")))
    assert both.radii.tolist() == [1.5]
    assert both.labels == ("a",)
    assert both.values.tolist() == [[2.0]]  # what was trained for the new fact is not lost


def test_a_key_that_is_there_already_gets_the_new_value() -> None:
    first = book(([3.0, 0.0], 1.0, 0.5, "a"), ([0.0, 0.0], 9.0, 0.5, "c"))
    both = first.with_entries(book(([3.0, 1e-6], 2.0, 0.2, "b")))
    assert both.labels == ("b", "c")
    assert both.radii.tolist() == [0.5, 0.5]
    assert both.values[:, 0].tolist() == [2.0, 9.0]
    again = both.with_entries(book(([3.0, 0.0], 3.0, 0.2, "b")))
    assert again.values[:, 0].tolist() == [3.0, 9.0]


@pytest.fixture(scope="module")
def model() -> dl.LensModel:
    return dl.load_model(
        tiny.hf_model("llama", 1, scale=12.0, noise=0.3), tiny.tokenizer(), name="tiny"
    )


@pytest.fixture(scope="module")
def edit(model: dl.LensModel) -> dl.Edit:
    return dl.edit(model, REQUEST, "grace", layer=1, steps=30, lr=0.5, radius=0.01, progress=False)


def test_no_weight_changes_and_other_texts_keep_every_bit(
    model: dl.LensModel, edit: dl.Edit
) -> None:
    ids = torch.tensor([model.tokens.encode("The Louvre is a museum in Paris").ids])
    prompt = torch.tensor([model.tokens.encode(REQUEST.text).ids])
    with torch.no_grad():
        before, of_prompt = model.run(ids), model.run(prompt)
        with edit.applied(model):
            assert model.weights.is_edited
            assert all(
                torch.equal(model.weights.original(n), p)
                for n, p in model.weights.parameters.items()
            )
            assert torch.equal(model.run(ids), before)
            with model.weights.suspended():
                assert torch.equal(model.run(prompt), of_prompt)
            changed = (model.run(prompt) != of_prompt).any(-1)[0]
        assert torch.equal(model.run(prompt), of_prompt)
    # Only from the key's own token on: nothing to the left of it moves.
    assert changed.tolist() == [False] * (len(changed) - 1) + [True]
    assert not model.weights.is_edited
    assert edit.rank == 0


def test_the_adapter_says_what_was_trained(model: dl.LensModel, edit: dl.Edit) -> None:
    with edit.applied(model):
        scores = dl.score_details(model, REQUEST.text, ["Rome"])
    assert scores["Rome"].prob == pytest.approx(edit.trace[-1]["target_prob"], rel=1e-4)
    assert edit.trace[-1]["target_prob"] > 5 * edit.trace[0]["target_prob"]


def test_switching_off_in_any_order(model: dl.LensModel, edit: dl.Edit) -> None:
    other = dl.edit(model, OTHER, "grace", layer=1, steps=5, radius=0.01, progress=False)
    plain = dl.score(model, REQUEST.text, ["Rome"])
    first, second = edit.applied(model), other.applied(model)
    first.__enter__()
    alone = dl.score(model, REQUEST.text, ["Rome"])
    second.__enter__()
    assert dl.score(model, REQUEST.text, ["Rome"]) == alone
    first.__exit__(None, None, None)
    assert dl.score(model, REQUEST.text, ["Rome"]) == plain
    second.__exit__(None, None, None)
    assert not model.weights.is_edited


def test_an_adapter_beside_a_weight_edit(model: dl.LensModel, edit: dl.Edit) -> None:
    rome = dl.edit(
        model, OTHER, "rome", layer=1, covariance="identity", context_prompts=["{}"], steps=4,
        progress=False,
    )  # fmt: skip
    before = model.fingerprint()
    with edit.applied(model), rome.applied(model):
        with rome.applied(model):
            pass
        assert model.weights.is_edited
    assert model.fingerprint() == before
    assert not model.weights.is_edited


def test_a_wrong_shape_is_refused(model: dl.LensModel) -> None:
    name = model.down_projection(1).name
    wrong = Codebook.single(torch.zeros(3), torch.zeros(32), 1.0, "x")
    with pytest.raises(EditError, match="shape"):
        dl.Edit.from_deltas(model, {name: wrong})
    d_mlp = model.down_projection(1).d_mlp
    bad = Codebook.single(torch.full((d_mlp,), torch.nan), torch.zeros(32), 1.0, "x")
    with pytest.raises(EditError, match="not finite"):
        dl.Edit.from_deltas(model, {name: bad})


def test_combining_deltas() -> None:
    low = LowRankDelta(torch.randn(5, 2), torch.randn(6, 2))
    other = LowRankDelta(torch.randn(5, 2), torch.randn(6, 2))
    dense = DenseDelta(torch.randn(5, 6))
    both = combined(low, other)
    assert isinstance(both, LowRankDelta)
    assert both.rank == 4
    torch.testing.assert_close(both.dense(), low.dense() + other.dense())
    full = combined(both, low)
    assert isinstance(full, DenseDelta)  # rank 6 of at most 5 would be larger than the matrix
    torch.testing.assert_close(full.dense(), 2 * low.dense() + other.dense())
    torch.testing.assert_close(combined(dense, low).dense(), dense.dense() + low.dense())
    adapter = Codebook.single(torch.zeros(6), torch.zeros(5), 1.0, "x")
    with pytest.raises(EditError, match="cannot become one"):
        combined(dense, adapter)
