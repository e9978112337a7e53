"""Edited models side by side say what each says alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import tiny
import torch

import driftlens as dl
from driftlens import generation
from driftlens.errors import EditError, ModelError, RequestError
from driftlens.side_by_side import fits_beside_others, side_by_side
from driftlens.weights import DenseDelta, LowRankDelta

PROMPTS = ["The Eiffel Tower is", "Ada Lovelace", "The Louvre, in the city of Paris, is"]
REQUEST = dl.EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome")


def loaded(
    architecture: str, dtype: torch.dtype = torch.float32, scale: float = 4.0
) -> dl.LensModel:
    hf = tiny.hf_model(architecture, 1, scale=scale, noise=0.3).to(dtype)
    return dl.load_model(hf, tiny.tokenizer(), name="tiny")


def low_rank(model: dl.LensModel, layer: int, seed: int, rank: int = 1) -> dl.Edit:
    """A random change of a layer's down-projection that is large enough to be heard."""
    name = model.info.down_projection.format(layer=layer)
    weight = model.weights.parameters[name]
    random = torch.Generator().manual_seed(seed)
    sides = (torch.randn(n, rank, generator=random).to(weight) / 4 for n in weight.shape)
    return dl.Edit.from_deltas(model, {name: LowRankDelta(*sides)})


def dense(model: dl.LensModel) -> dl.Edit:
    return dl.edit(model, REQUEST, "ft-m", layer=1, steps=6, lr=0.05, progress=False)


def logits(model: dl.LensModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.hf_model(ids).logits


def test_where_an_adapter_speaks_nothing_is_heard_beside_it() -> None:
    model = loaded("llama")
    adapter = dl.edit(model, REQUEST, "grace", layer=1, steps=2, lr=0.5, progress=False)
    own, elsewhere = low_rank(model, 1, 1), low_rank(model, 0, 1)
    with adapter.applied(model):
        assert not fits_beside_others(model, own)
        assert fits_beside_others(model, elsewhere)
        with pytest.raises(EditError, match="cannot be heard"), side_by_side(model, [own], [1]):
            pass
    assert fits_beside_others(model, own)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3", "gpt_neox", "qwen2"])
def test_each_row_is_heard_as_under_its_own_edit(architecture: str) -> None:
    model = loaded(architecture, dtype=torch.float64)
    two_layers = {**low_rank(model, 0, 2, rank=3).deltas, **low_rank(model, 2, 3).deltas}
    edits = [low_rank(model, 1, 1), None, dense(model), dl.Edit.from_deltas(model, two_layers)]
    ids = torch.randint(5, tiny.VOCAB, (7, 6), generator=torch.Generator().manual_seed(0))
    counts = [2, 1, 3, 1]
    with side_by_side(model, edits, counts):
        together = logits(model, ids)
    plain, start = logits(model, ids), 0
    for edit, count in zip(edits, counts, strict=True):
        own = slice(start, start + count)
        start += count
        if edit is None:
            assert torch.allclose(together[own], plain[own], rtol=1e-9)
            continue
        with edit.applied(model):
            assert torch.allclose(together[own], logits(model, ids)[own], rtol=1e-9)
        assert not torch.allclose(together[own], plain[own], rtol=1e-2)


def test_nothing_stays_behind() -> None:
    model = loaded("llama")
    ids = torch.randint(5, tiny.VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    before = logits(model, ids)
    with side_by_side(model, [low_rank(model, 1, 1)], [2]):
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(KeyError), side_by_side(model, [low_rank(model, 1, 1)], [2]):
        raise KeyError
    assert torch.equal(logits(model, ids), before)
    assert not model.weights.is_edited


def test_what_cannot_be_heard_in_some_rows_only_is_refused() -> None:
    model = loaded("llama")
    options: Mapping[str, Any] = {"layer": 1, "steps": 3, "lr": 1.0, "progress": False}
    grace = dl.edit(model, REQUEST, "grace", radius=0.5, **options)
    embedding = torch.ones_like(model.weights.parameters["model.embed_tokens.weight"])
    norm = torch.ones_like(model.weights.parameters["model.layers.0.input_layernorm.weight"])
    others = [
        grace,
        dl.Edit.from_deltas(model, {"model.embed_tokens.weight": embedding}),
        dl.Edit.from_deltas(model, {"model.layers.0.input_layernorm.weight": norm}),
    ]
    for edit in others:
        assert not fits_beside_others(model, edit)
        with pytest.raises(EditError, match="some rows only"), side_by_side(model, [edit], [1]):
            pass
    assert fits_beside_others(model, low_rank(model, 1, 1))
    # An edited weight in half precision is rounded; what a row hears would not be.
    half = loaded("llama", dtype=torch.bfloat16)
    assert not fits_beside_others(half, low_rank(half, 1, 1))
    # An edit of another model.
    other = dl.load_model(tiny.hf_model("llama", 2), tiny.tokenizer(), name="other")
    with pytest.raises(EditError, match="other"), side_by_side(other, [low_rank(model, 1, 1)], [1]):
        pass


def test_another_number_of_rows_is_refused() -> None:
    model = loaded("llama")
    ids = torch.full((3, 4), 7)
    with side_by_side(model, [low_rank(model, 1, 1)], [2]), pytest.raises(EditError, match="rows"):
        logits(model, ids)


@pytest.mark.parametrize(
    ("top_k", "memory", "batches"), [(1, 2**30, [4]), (5, 2**30, [4]), (5, 1, [1] * 4)]
)
def test_texts_of_several_edits_are_those_of_each(
    top_k: int, memory: int, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MEMORY_BUDGET", memory)
    write_on, written = generation._write_on, []

    def counted(model: dl.LensModel, groups: Any, *args: Any) -> list[list[str]]:
        written.append(len(groups))
        return write_on(model, groups, *args)

    monkeypatch.setattr(generation, "_write_on", counted)
    model = loaded("llama")
    groups = [PROMPTS[:2], PROMPTS[:1], PROMPTS, PROMPTS[1:]]
    edits = [low_rank(model, 1, 1), None, dense(model), low_rank(model, 0, 2)]
    found = generation.generate_each(model, groups, edits, length=30, top_k=top_k, seed=3)
    assert written == batches
    for group, edit, texts in zip(groups, edits, found, strict=True):
        if edit is None:
            assert texts == generation.generate(model, group, 30, top_k, seed=3)
            continue
        with edit.applied(model):
            assert texts == generation.generate(model, group, 30, top_k, seed=3)
    assert len({texts[0] for texts in found}) == 4


def test_logits_that_are_not_finite_write_nothing() -> None:
    model = loaded("llama")
    edit = low_rank(model, 1, 1)
    ((name, delta),) = edit.deltas.items()
    edit.deltas[name] = DenseDelta(torch.full(delta.shape, torch.nan))
    with pytest.raises(ModelError, match="not finite"):
        generation.generate_each(model, [PROMPTS[:1]] * 2, [None, edit], length=20)


def test_a_group_without_a_prompt_is_refused() -> None:
    model = loaded("llama")
    for groups in ([], [PROMPTS, []]):
        with pytest.raises(RequestError, match="no prompt"):
            generation.generate_each(model, groups)


def test_tokens_are_sampled_as_often_as_they_are_likely() -> None:
    model = loaded("gpt2", scale=30.0)
    own, count = model.tokens.encode(PROMPTS[1]).ids, 4000
    likeliest = model.run(torch.tensor([own]))[0, -1].topk(3)
    texts = generation.generate(model, [PROMPTS[1]] * count, length=len(own) + 1, top_k=3)
    found = [texts.count(model.tokens.decode([*own, i])) for i in likeliest.indices.tolist()]
    assert sum(found) == count
    expected = likeliest.values.softmax(-1)
    assert expected.min() > 0.05 and expected.max() > 0.6
    error = (expected * (1 - expected) / count).sqrt()
    assert (torch.tensor(found) / count - expected).abs().le(4 * error).all()
