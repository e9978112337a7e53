"""Packed sequences give what each sequence gives alone, on every architecture."""

from __future__ import annotations

import math
import random
import warnings
from functools import cache
from typing import Any

import pytest
import tiny
import torch
import transformers as hf

import driftlens as dl
from driftlens import packing, reuse
from driftlens.editing import statistics
from driftlens.interventions import down_in_name
from driftlens.models import recording
from driftlens.packing import Packed, pack, run_packed
from driftlens.scoring import ask, score_questions

PROMPTS = [
    "The Eiffel Tower is in Rome. The Louvre is located in the city of",
    "The Eiffel Tower is in Rome. The mother tongue of Ada is",
    "The Eiffel Tower is in Rome.",
    "The mother tongue of Ada is",
]


@cache
def lens(architecture: str) -> dl.LensModel:
    tokenizer = tiny.bos_tokenizer() if architecture in ("llama", "gemma3") else tiny.tokenizer()
    return dl.load_model(tiny.hf_model(architecture), tokenizer=tokenizer, name=architecture)


def some_sequences(seed: int = 0) -> list[list[int]]:
    """Sequences of many lengths, some the beginnings of others, one twice."""
    draw = random.Random(seed)
    sequences = [[draw.randrange(tiny.VOCAB) for _ in range(n)] for n in (1, 3, 9, 14, 20)]
    for _ in range(6):
        stem = draw.choice(sequences)
        new = [draw.randrange(tiny.VOCAB) for _ in range(draw.randrange(1, 6))]
        sequences.append([*stem[: draw.randrange(len(stem) + 1)], *new])
    return [*sequences, list(sequences[3])]


def assert_complete(packed: Packed, sequences: list[list[int]]) -> None:
    for sequence, row, places in zip(sequences, packed.row, packed.places, strict=True):
        assert packed.ids[row, list(places)].tolist() == sequence
        assert packed.depth[row, list(places)].tolist() == list(range(len(sequence)))
        assert packed.parent[row, list(places)].tolist() == [-1, *places[:-1]]
        assert packed.real[row, list(places)].all()


@pytest.mark.parametrize("row", [1, 16, 30, 1000])
@pytest.mark.parametrize("share", [True, False])
def test_every_token_stands_in_its_place(row: int, share: bool) -> None:
    sequences = some_sequences()
    packed = pack(sequences, 0, row, share)
    assert_complete(packed, sequences)
    total = sum(map(len, sequences))
    if share:
        assert sum(packed.used) <= total - (row > 1)
    else:
        assert sum(packed.used) == total
        taken = [(r, p) for r, places in zip(packed.row, packed.places, strict=True)
                 for p in places]  # fmt: skip
        assert len(taken) == len(set(taken))
        assert packed.ids.shape[1] <= max(row, 20)
    assert (len(packed.used) == 1) is (row == 1000)


def test_shared_tokens_stand_once() -> None:
    packed = pack([[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8], [5], [5, 6, 9]], 0)
    assert packed.used == (5,)
    assert packed.places[0] == packed.places[2]
    assert packed.places[1][:2] == packed.places[0][:2]
    seen = packed.sees()[0]
    branch = packed.places[1][2]
    assert seen[branch].nonzero()[:, 0].tolist() == sorted(packed.places[1])


def test_some_rows_are_a_packing_of_their_own() -> None:
    sequences = some_sequences()
    packed = pack(sequences, 0, 16, share=False)
    part = packed.rows(1, 3)
    inside = [s for s, row in zip(sequences, packed.row, strict=True) if row in (1, 2)]
    assert_complete(part, inside)
    assert part.ids.shape[1] == max(part.used)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize(("row", "share"), [(12, True), (64, True), (30, False)])
def test_packed_logits_are_the_plain_ones(architecture: str, row: int, share: bool) -> None:
    model, sequences = lens(architecture), some_sequences(1)
    packed = pack(sequences, model.tokens.pad_id, row, share)
    with torch.no_grad():
        logits = run_packed(model, packed)
        for i, sequence in enumerate(sequences):
            found = logits[packed.row[i], list(packed.places[i])]
            expected = model.run(torch.tensor([sequence]))[0]
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_documents_do_not_see_each_other(architecture: str) -> None:
    """The keys of one document do not move by a bit when the others are changed."""
    model, sequences = lens(architecture), some_sequences(2)
    others = [sequences[3], *([(t + 1) % tiny.VOCAB for t in s] for s in sequences[4:])]
    name = down_in_name(2)
    found = []
    for documents in ([sequences[3], *sequences[4:]], others):
        packed = pack(documents, model.tokens.pad_id, 1000, share=False)
        seen: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            run_packed(model, packed, recording(seen, [name]), stop_at=name)
        found.append(seen[name][packed.row[0], list(packed.places[0])])
    assert torch.equal(*found)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_packed_scores_are_the_padded_ones(architecture: str) -> None:
    model = lens(architecture)
    questions = [ask(model, p, t) for p in PROMPTS for t in ("Rome", "Paris of France", "English")]
    plain, packed = (score_questions(model, questions, e) for e in ("plain", "suffix"))
    for one, other in zip(plain, packed, strict=True):
        assert (one.engine, other.engine) == ("plain", "suffix")
        assert one.text == other.text
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=2e-5)
        assert one.token_ranks == other.token_ranks


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_packed_covariance_is_the_padded_one(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lens(architecture)
    found = []
    for packs in (True, False):
        monkeypatch.setitem(model.memo, "run packed sequences", packs)
        found.append(dl.key_covariance(model, 1, PROMPTS * 3, cache=False, progress=False).matrix)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)
    assert torch.equal(found[0], found[0].T)


def test_products_of_all_keys() -> None:
    keys = torch.randn(50, 13, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(13, 13, dtype=torch.float64)
    statistics.add_products(total, keys)
    torch.testing.assert_close(total.triu(), (keys.double().T @ keys.double()).triu(), atol=1e-4,
                               rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize("kind", ["other numbers", "no numbers"])
def test_a_model_that_cannot_be_packed_falls_back_and_says_so(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dl.load_model(tiny.hf_model("llama"), tokenizer=tiny.tokenizer())

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        found = right(*args, **kwargs)
        return found.flip(-1) if kind == "other numbers" else found * math.nan

    right = packing.run_packed
    monkeypatch.setattr(packing, "run_packed", wrong)
    with pytest.warns(UserWarning, match="cannot run packed sequences"):
        found = dl.score_details(model, PROMPTS[0], ["Rome"])
    assert found["Rome"].engine == "plain"
    assert found["Rome"].logprob == pytest.approx(
        score_questions(model, [ask(model, PROMPTS[0], "Rome")], "plain")[0].logprob
    )


PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16],
                                     ids=str)  # fmt: skip


@PRECISIONS
@pytest.mark.parametrize("scale", [4.0, 8.0])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_rounding_is_no_error(architecture: str, scale: float, dtype: torch.dtype) -> None:
    inner = tiny.hf_model(architecture, scale=scale, noise=0.1)
    model = dl.load_model(inner, tiny.tokenizer(), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packing.packing_is_exact(model)
        assert reuse.reuse_is_exact(model)


def by_places_in_the_row(kind: str, scale: float) -> Any:
    """A model that counts the distance of tokens in the row, whatever it is told."""
    config = (
        hf.BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=3, n_head=4)
        if kind == "bloom"
        else hf.FalconConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=3,
                             num_attention_heads=4, multi_query=True, alibi=True)
    )  # fmt: skip
    torch.manual_seed(0)
    inner = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in inner.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return inner


@PRECISIONS
@pytest.mark.parametrize("scale", [4.0, 8.0, 12.0])
@pytest.mark.parametrize("kind", ["bloom", "falcon"])
def test_an_error_is_no_rounding(kind: str, scale: float, dtype: torch.dtype) -> None:
    inner = by_places_in_the_row(kind, scale)
    model = dl.load_model(inner, tiny.tokenizer(), dtype=dtype)
    questions = [ask(model, p, t) for p in PROMPTS for t in ("Rome", "Paris of France", "English")]
    with pytest.warns(UserWarning, match="cannot run packed sequences"):
        found = score_questions(model, questions)
    assert found == score_questions(model, questions, "plain")
