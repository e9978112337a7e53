"""Texts: written as a plain loop writes them, and measured as counted by hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import nltk.tokenize as nltk
import pytest
import tiny
import torch

import driftlens as dl
from driftlens import generation
from driftlens.cases import Case
from driftlens.errors import RequestError

PROMPTS = ["The Eiffel Tower is", "Ada Lovelace", "The Louvre, in the city of Paris, is"]
REQUEST = dl.EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome")


def loaded(architecture: str, scale: float = 12.0) -> dl.LensModel:
    return dl.load_model(
        tiny.hf_model(architecture, 1, scale=scale, noise=0.3), tiny.tokenizer(), name="tiny"
    )


def written_plainly(model: dl.LensModel, prompt: str, length: int) -> str:
    ids = model.tokens.encode(prompt).ids
    while len(ids) < length:
        best = int(model.run(torch.tensor([ids]))[0, -1].argmax())
        ids.append(best)
    return model.tokens.decode([i for i in ids if i not in model.tokenizer.all_special_ids])


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3", "gpt_neox"])
def test_the_likeliest_text_is_that_of_a_plain_loop(architecture: str) -> None:
    model = loaded(architecture)
    texts = generation.generate(model, PROMPTS, length=24, top_k=1)
    assert texts == [written_plainly(model, prompt, 24) for prompt in PROMPTS]
    edit = dl.edit(model, REQUEST, "ft-m", layer=1, steps=6, lr=0.05, progress=False)
    with edit.applied(model):
        edited = generation.generate(model, PROMPTS, length=24, top_k=1)
        assert edited == [written_plainly(model, prompt, 24) for prompt in PROMPTS]
    assert edited != texts
    assert generation.generate(model, PROMPTS, length=24, top_k=1) == texts


def test_an_adapter_is_heard_in_texts() -> None:
    model = loaded("llama")
    edit = dl.edit(
        model, REQUEST, "grace", layer=1, steps=30, lr=1.0, radius=0.5, progress=False
    )  # fmt: skip
    prompts = [REQUEST.text, *PROMPTS]
    with edit.applied(model):
        texts = generation.generate(model, prompts, length=24, top_k=1)
        assert texts == [written_plainly(model, prompt, 24) for prompt in prompts]
    assert texts[0] != generation.generate(model, prompts, length=24, top_k=1)[0]


def test_sampling_depends_on_its_seed_alone() -> None:
    model = loaded("gpt2", scale=2.0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generation.generate(model, PROMPTS, length=30)
    assert torch.equal(torch.rand(3), expected)
    assert generation.generate(model, PROMPTS, length=30) == first
    assert generation.generate(model, PROMPTS, length=30, seed=1) != first
    for text, prompt in zip(first, PROMPTS, strict=True):
        assert text.startswith(prompt)
        assert len(model.tokens.encode(text)) <= 31


def test_only_the_likeliest_tokens_are_sampled() -> None:
    model = loaded("gpt2", scale=2.0)
    text = generation.generate(model, [PROMPTS[0]], length=40, top_k=2, seed=3)[0]
    ids, start = model.tokens.encode(text).ids, len(model.tokens.encode(PROMPTS[0]))
    logits = model.run(torch.tensor([ids]))[0]
    ranks = [int((logits[i - 1] > logits[i - 1, ids[i]]).sum()) for i in range(start, len(ids))]
    assert max(ranks) <= 1
    assert 1 in ranks


def test_settings_of_a_checkpoint_do_not_matter() -> None:
    model = loaded("gpt2", scale=2.0)
    text = generation.generate(model, PROMPTS, length=30)
    settings = {
        "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "temperature": 9.0, "top_p": 0.01,
        "min_p": 0.9, "typical_p": 0.01, "num_beams": 2, "min_new_tokens": 20,
        "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "suppress_tokens": [*range(30, 90)],
        "guidance_scale": 3.0, "max_time": 1e-9, "prompt_lookup_num_tokens": 3,
        "return_dict_in_generate": True, "num_return_sequences": 2, "stop_strings": ["e"],
        "exponential_decay_length_penalty": (2, 5.0), "forced_eos_token_id": 5,
        "bad_words_ids": [[i] for i in range(30, 90)], "sequence_bias": [[[40], 50.0]],
    }  # fmt: skip
    for name, value in settings.items():
        kept = getattr(model.hf_model.generation_config, name)
        setattr(model.hf_model.generation_config, name, value)
        assert generation.generate(model, PROMPTS, length=30) == text, name
        assert getattr(model.hf_model.generation_config, name) == value
        setattr(model.hf_model.generation_config, name, kept)


def test_settings_of_a_checkpoint_are_there_again_after_an_error() -> None:
    model = loaded("gpt2")
    kept = model.hf_model.generation_config
    model.hf_model.lm_head.weight.data[3] = math.nan
    with pytest.raises(dl.ModelError, match="not finite"):
        generation.generate(model, PROMPTS, length=30)
    assert model.hf_model.generation_config is kept


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_a_long_prompt_beside_a_short_one_does_not_leave_the_context(architecture: str) -> None:
    """Both models have an embedding for each position of the context, and for no other."""
    model = loaded(architecture)
    prompts = [PROMPTS[1], " ".join(PROMPTS), " ".join(PROMPTS * 2)]
    lengths = [len(model.tokens.encode(prompt)) for prompt in prompts]
    n_ctx = model.info.n_ctx
    assert lengths == sorted(lengths) and lengths[-1] < n_ctx < n_ctx - lengths[0] + lengths[1]
    texts = generation.generate(model, prompts, length=n_ctx, top_k=1)
    assert texts == [written_plainly(model, prompt, n_ctx) for prompt in prompts]
    if architecture == "opt":  # its edits cannot be heard in some rows only
        return
    edit = dl.edit(model, REQUEST, "ft-m", layer=1, steps=6, lr=0.05, progress=False)
    groups, edits = [prompts[2:], prompts[:2], prompts], [edit, None, edit]
    found = generation.generate_each(model, groups, edits, length=n_ctx, top_k=1)
    assert found[1] == texts[:2]
    with edit.applied(model):
        expected = [written_plainly(model, prompt, n_ctx) for prompt in prompts]
    assert [found[0], found[2]] == [expected[2:], expected]


def test_a_text_does_not_depend_on_when_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama", scale=2.0)
    expected = generation.generate(model, PROMPTS, length=40, seed=2)
    monkeypatch.setattr(model, "info", replace(model.info, n_ctx=40))
    assert generation.generate(model, PROMPTS, length=40, seed=2) == expected


def test_one_string_is_one_text() -> None:
    model = loaded("gpt2")
    text = generation.generate(model, PROMPTS[:1], length=24)
    assert generation.generate(model, PROMPTS[0], length=24) == text
    assert generation.generate_each(model, PROMPTS[:2], length=24)[0] == text
    assert generation.fluency("a b a b a b") == generation.fluency(["a b a b a b"])
    assert generation.reference_score("war and peace", "peace and war") == pytest.approx(100)
    assert generation.perplexity(model, PROMPTS[0]) == generation.perplexity(model, PROMPTS[:1])
    with pytest.raises(RequestError, match="are one text, 'Ada Lovelace'. Give a list of groups"):
        generation.generate_each(model, PROMPTS[1], length=24)


def test_an_end_token_does_not_end_a_text() -> None:
    model = loaded("gpt2", scale=2.0)
    config = model.hf_model.generation_config
    text = generation.generate(model, PROMPTS[:1], length=30)
    own = model.tokens.encode(PROMPTS[0]).ids
    written = model.tokens.encode(text[0]).ids[len(own) :]
    kept, config.eos_token_id = config.eos_token_id, written[3]
    try:
        assert generation.generate(model, PROMPTS[:1], length=30) == text
        assert config.eos_token_id == written[3]
    finally:
        config.eos_token_id = kept
    # What is left out is no word of the text.
    special = model.tokenizer.all_special_ids[0]
    assert generation._text(model, [special, *own, special, *written]) == [*own, *written]


def test_bad_requests_for_texts() -> None:
    model = loaded("gpt2")
    with pytest.raises(RequestError, match="no prompt"):
        generation.generate(model, [])
    with pytest.raises(RequestError, match="tokens, and the text 3"):
        generation.generate(model, PROMPTS, length=3)
    with pytest.raises(RequestError, match="^Texts of 129 tokens are longer than the 128 of "):
        generation.generate(model, PROMPTS, length=129)
    for top_k in (0, -1):
        with pytest.raises(RequestError, match=f"top_k is {top_k}. Give at least 1"):
            generation.generate(model, PROMPTS, length=30, top_k=top_k)
    for name in ("top_k", "length", "seed"):
        with pytest.raises(RequestError, match=f"{name} is 30.5. Give a whole number"):
            generation.generate(model, PROMPTS, **{name: 30.5})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="There are 2 edits for 3 groups of prompts. Give one"):
        generation.generate_each(model, [PROMPTS] * 3, [None] * 2, length=30)
    with pytest.raises(RequestError, match="no text"):
        generation.fluency([])
    with pytest.raises(RequestError, match="no text to compare"):
        generation.reference_score(["a"], [])
    with pytest.raises(RequestError, match="two tokens"):
        generation.perplexity(model, ["a"])


def test_entropy_by_hand() -> None:
    # a b a b a b: 2-grams ab x 3, ba x 2; 3-grams aba x 2, bab x 2.
    two = -(3 / 5 * math.log2(3 / 5) + 2 / 5 * math.log2(2 / 5))
    assert generation.ngram_entropy("a b a b a b") == pytest.approx((2 / 3 * two + 4 / 3 * 1) / 2)
    assert generation.ngram_entropy("a a a a a") == 0
    assert generation.ngram_entropy("") == 0
    assert generation.ngram_entropy("one") == 0
    # Words are tokenized as nltk does: the full stop is a word, and so is n't.
    assert generation.ngram_entropy("I don't.") == generation.ngram_entropy("1 2 3 4")
    # A full stop is a word of its own after each sentence, not only after the last.
    assert generation.ngram_entropy("It is. She was.") == generation.ngram_entropy("1 2 3 4 5 3")
    assert generation.fluency(["a b a b a b", "a a a"]) == pytest.approx(
        50 * generation.ngram_entropy("a b a b a b")
    )


def test_reference_score_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_leads", lambda: ["red car", "red house", "red red tree"])
    generation._vectorizer.cache_clear()
    try:
        # idf as scikit-learn smooths it: ln((1 + n) / (1 + df)) + 1.
        common, rare = math.log(4 / 4) + 1, math.log(4 / 2) + 1
        found = generation.reference_score(["red car", "red"], ["car house unheard"])
        first, second = (2 * common, rare, 0.0), (0.0, rare, rare)
        expected = sum(a * b for a, b in zip(first, second, strict=True))
        expected /= math.dist(first, (0, 0, 0)) * math.dist(second, (0, 0, 0))
        assert found == pytest.approx(100 * expected)
        assert generation.reference_score(["red car"], ["car red"]) == pytest.approx(100)
        assert generation.reference_score(["tree"], ["car"]) == 0
    finally:
        generation._vectorizer.cache_clear()


def test_perplexity_is_that_of_the_tokens_one_by_one() -> None:
    model = loaded("gpt2")
    losses = []
    for text in PROMPTS:
        ids = model.tokens.encode(text).ids[:5]
        for i in range(1, len(ids)):
            logprobs = model.run(torch.tensor([ids[:i]]))[0, -1].log_softmax(-1)
            losses.append(-logprobs[ids[i]].item())
    expected = math.exp(sum(losses) / len(losses))
    assert generation.perplexity(model, PROMPTS, tokens=5) == pytest.approx(expected, rel=1e-4)


@pytest.mark.real
def test_texts_of_a_real_model(smollm2: dl.LensModel) -> None:
    texts = generation.generate(smollm2, PROMPTS, length=24, top_k=1)
    assert texts == [written_plainly(smollm2, prompt, 24) for prompt in PROMPTS]
    losses = []
    for text in generation._leads()[-generation.PERPLEXITY_TEXTS :]:
        ids = smollm2.tokens.encode(text).ids[:64]
        with torch.no_grad():
            logprobs = smollm2.hf_model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
    case = Case("x", REQUEST, generation=(PROMPTS[0],), references=("The Colosseum is in Rome.",))
    told = generation.measure_texts(smollm2, case, length=24)
    assert told["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    text = generation.generate(smollm2, case.generation, 24)
    assert min(told["FL"] / 100, told["reference"]) > 1
    assert told["FL"] == pytest.approx(100 * plain_entropy(*text))
    assert told["reference"] == pytest.approx(100 * plain_likeness(*text, *case.references))


def plain_entropy(text: str) -> float:
    """As EasyEdit and ROME's authors define it, counted one by one."""
    words = nltk.NLTKWordTokenizer().tokenize(text)
    entropies = []
    for n in (2, 3):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        shares = [grams.count(gram) / len(grams) for gram in set(grams)]
        entropies.append(-sum(share * math.log2(share) for share in shares))
    return (entropies[0] * 2 / 3 + entropies[1] * 4 / 3) / 2


def plain_likeness(text: str, reference: str) -> float:
    """Cosine of TF-IDF vectors, smoothed as scikit-learn does by default."""
    split = re.compile(r"\b\w\w+\b").findall
    leads = [set(split(lead.lower())) for lead in generation._leads()]

    def vector(of: str) -> dict[str, float]:
        words = split(of.lower())
        seen = {word: sum(word in lead for lead in leads) for word in set(words)}
        return {
            word: words.count(word) * (math.log((1 + len(leads)) / (1 + count)) + 1)
            for word, count in seen.items()
            if count
        }

    one, other = vector(text), vector(reference)
    product = sum(value * other.get(word, 0.0) for word, value in one.items())
    return product / (math.hypot(*one.values()) * math.hypot(*other.values()))


def test_a_case_without_anything_to_write_from_is_told_nothing() -> None:
    model = loaded("gpt2")
    case = Case("one", REQUEST)
    assert generation.measure_texts(model, case, ("FL", "reference")) == {}
    asked = Case("two", REQUEST, generation=("The Eiffel Tower is",))
    found = generation.measure_texts(model, asked, ("FL", "reference"), length=20)
    text = generation.generate(model, asked.generation, 20)
    assert found == {"FL": generation.fluency(text)}
