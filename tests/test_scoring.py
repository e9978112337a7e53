"""Scores against a plain log-softmax over the whole vocabulary."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import tiny
import torch

import driftlens as dl
from driftlens import scoring
from driftlens.errors import RequestError, TokenError
from driftlens.scoring import ContinuationScore, Question, ask, score_details, score_questions

PROMPT = "The Eiffel Tower is located in the city of"
TARGETS = ["Paris", "Rome", "New York", "in", "東京", "the capital of France, which is Paris."]
KINDS = [("gpt2", False), ("llama", True), ("gemma3", False)]


def tokenizer_of(bos: bool) -> Any:
    return tiny.bos_tokenizer() if bos else tiny.tokenizer()


@cache
def lens(architecture: str = "gpt2", bos: bool = False) -> dl.LensModel:
    return dl.load_model(tiny.hf_model(architecture), tokenizer_of(bos))


@cache
def plain_model(architecture: str) -> Any:
    return tiny.hf_model(architecture)


def plain_score(architecture: str, prompt: list[int], target: list[int]) -> tuple[Any, Any]:
    """Log-probabilities and ranks of the target's tokens, each from a pass of its own."""
    logprobs, ranks = [], []
    for number, token in enumerate(target):
        with torch.no_grad():
            logits = plain_model(architecture)(torch.tensor([prompt + target[:number]])).logits
        row = torch.log_softmax(logits[0, -1].double(), -1)
        logprobs.append(float(row[token]))
        ranks.append(sum(1 for other in row.tolist() if other > float(row[token])))
    return logprobs, ranks


@cache
def remembered_score(prompt: tuple[int, ...], target: tuple[int, ...]) -> tuple[Any, Any]:
    return plain_score("gpt2", list(prompt), list(target))


@pytest.mark.parametrize(("architecture", "bos"), KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_score_is_the_log_softmax_on_the_concatenated_ids(
    architecture: str, bos: bool, target: str
) -> None:
    tokenizer = tokenizer_of(bos)
    prompt = tokenizer(PROMPT)["input_ids"]
    ids = tokenizer(f"{PROMPT} {target}")["input_ids"][len(prompt) :]
    logprobs, ranks = plain_score(architecture, prompt, ids)
    found = score_details(lens(architecture, bos), PROMPT, [target])[target]
    assert found.text == target
    assert found.token_logprobs == pytest.approx(logprobs, abs=1e-5)
    assert list(found.token_ranks) == ranks
    assert found.logprob == pytest.approx(sum(logprobs), abs=1e-4)
    assert found.mean_logprob == pytest.approx(sum(logprobs) / len(ids), abs=1e-5)
    assert found.prob == pytest.approx(math.exp(sum(logprobs)), rel=1e-4)
    assert found.rank == max(ranks)
    assert dl.score(lens(architecture, bos), PROMPT, [target]) == {target: found.logprob}


def questions() -> list[Question]:
    """Prompts and targets of many lengths, in no order of length."""
    prompts = [PROMPT, "Rome", "The capital of France is", "In", f"Yes. {PROMPT}", "Ada Lovelace"]
    return [ask(lens(), prompt, target) for target in TARGETS for prompt in prompts]


@pytest.mark.parametrize("limit", [1, 30, 64, 4096])
def test_batches_do_not_change_scores_or_order(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MAX_TOKENS_PER_BATCH", limit)
    asked = questions()
    assert len({len(q.ids) for q in asked}) > 8
    score_questions(lens(), asked)  # looks at the model once
    sizes: list[int] = []
    run = lens().run

    def counting(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(ids.numel())
        assert not torch.is_grad_enabled()
        return run(ids, *args, **kwargs)

    monkeypatch.setattr(lens(), "run", counting)
    found = score_questions(lens(), asked)
    longest = max(len(q.ids) for q in asked)
    assert all(size <= limit + longest for size in sizes)
    assert (len(sizes) == 1) is (limit == 4096)
    assert [score.text for score in found] == [q.text for q in asked]
    for score, question in zip(found, asked, strict=True):
        logprobs, ranks = remembered_score(question.prompt, question.target)
        assert score.token_logprobs == pytest.approx(logprobs, abs=1e-5)
        assert list(score.token_ranks) == ranks


@pytest.mark.parametrize(("architecture", "bos"), KINDS)
def test_rank_is_zero_exactly_for_the_greedy_continuation(architecture: str, bos: bool) -> None:
    model = lens(architecture, bos)
    prompt = ask(model, PROMPT, "Paris").prompt
    greedy: list[int] = []
    for _ in range(4):
        with torch.no_grad():
            logits = plain_model(architecture)(torch.tensor([[*prompt, *greedy]])).logits
        greedy.append(int(logits[0, -1].argmax()))
    rivals = []
    for place in range(4):
        for token in (0, 17, 255):
            if token != greedy[place]:
                rivals.append((*greedy[:place], token, *greedy[place + 1 :]))
    asked = [Question("", prompt, target) for target in [tuple(greedy), *rivals]]
    found = score_questions(model, asked)
    assert found[0].rank == 0
    assert found[0].token_ranks == (0, 0, 0, 0)
    assert all(score.rank > 0 for score in found[1:])


@pytest.mark.parametrize(("architecture", "bos"), KINDS)
def test_probabilities_of_all_tokens_sum_to_one(architecture: str, bos: bool) -> None:
    model = lens(architecture, bos)
    prompt = ask(model, PROMPT, "Paris").prompt
    vocabulary = range(model.info.d_vocab)
    found = score_questions(model, [Question("", prompt, (token,)) for token in vocabulary])
    assert sum(score.prob for score in found) == pytest.approx(1.0, abs=1e-5)
    # Without ties, ranks are a permutation.
    assert sorted(score.rank for score in found) == list(vocabulary)


def test_of_equally_likely_tokens_one_is_the_greedy_one() -> None:
    logprobs = torch.tensor([[-2.0, -1.0, -3.0, -1.0, -1.0]])
    ranks = [scoring.read_score(logprobs, Question("", (0,), (token,))).rank for token in range(5)]
    assert ranks[int(logprobs.argmax())] == 0
    assert ranks == [3, 0, 4, 1, 2]


def test_logits_that_are_no_numbers_rank_last() -> None:
    nothing = torch.full((1, 5), math.nan)
    assert scoring.read_score(nothing, Question("", (0,), (0,))).rank == 5
    some = torch.tensor([[math.nan, -1.0, -2.0]])
    assert scoring.read_score(some, Question("", (0,), (1,))).rank == 1


def test_chain_rule() -> None:
    # All continuations of two tokens share what their first token takes.
    model = lens()
    prompt = ask(model, PROMPT, "Paris").prompt
    pairs = [Question("", prompt, (7, token)) for token in range(model.info.d_vocab)]
    (first,) = score_questions(model, [Question("", prompt, (7,))])
    total = sum(score.prob for score in score_questions(model, pairs))
    assert total == pytest.approx(first.prob, rel=1e-4)


def test_question_reads_all_but_the_last_target_token() -> None:
    question = Question("", (1, 2, 3), (4, 5))
    assert question.ids == [1, 2, 3, 4]
    assert question.predicting == [2, 3]
    single = Question("", (1,), (9,))
    assert (single.ids, single.predicting) == ([1], [0])


@pytest.mark.parametrize("bos", [False, True])
def test_ask_concatenates(bos: bool) -> None:
    question = ask(lens("gpt2", bos), PROMPT, "New York")
    whole = tokenizer_of(bos)(f"{PROMPT} New York")["input_ids"]
    assert [*question.prompt, *question.target] == whole
    assert question.text == "New York"


def test_score_is_that_of_the_model_as_it_is_now() -> None:
    model = lens()
    before = dl.score(model, PROMPT, TARGETS)
    name = model.down_projection(1).name
    delta = torch.randn(model.weights.parameters[name].shape)
    changed = tiny.hf_model("gpt2")
    with torch.no_grad():
        dict(changed.named_parameters())[name].add_(delta)
    expected = dl.score(dl.load_model(changed, tiny.tokenizer(), probe=False), PROMPT, TARGETS)
    with dl.Edit.from_deltas(model, {name: delta}).applied(model):
        inside = dl.score(model, PROMPT, TARGETS)
    assert inside == pytest.approx(expected, abs=1e-4)
    assert max(abs(inside[t] - before[t]) for t in TARGETS) > 0.1
    assert dl.score(model, PROMPT, TARGETS) == before


def test_keys_are_the_continuations_as_given() -> None:
    found = score_details(lens(), PROMPT, ["Rome", " Rome", "Paris"])
    assert list(found) == ["Rome", " Rome", "Paris"]
    assert found["Rome"].token_logprobs == found[" Rome"].token_logprobs


def test_same_ids_with_another_boundary_are_another_question() -> None:
    model = lens()
    new_york = ask(model, PROMPT, "New York")
    boundary = len(model.tokens.target_ids("New"))
    later = Question(
        "York",
        (*new_york.prompt, *new_york.target[:boundary]),
        new_york.target[boundary:],
    )
    assert later.ids == new_york.ids
    longer = ask(model, "Rome", "the capital of France")
    for asked in ([later, new_york], [new_york, later], [longer, later, new_york]):
        found = score_questions(model, asked)
        for score, question in zip(found, asked, strict=True):
            logprobs, _ = remembered_score(question.prompt, question.target)
            assert score.token_logprobs == pytest.approx(logprobs, abs=1e-5)


def test_no_questions_have_no_scores() -> None:
    assert score_questions(lens(), []) == []


def test_score_of_several_tokens() -> None:
    score = ContinuationScore("x", (-1.0, -2.0), (0, 7))
    assert (score.logprob, score.mean_logprob, score.rank) == (-3.0, -1.5, 7)
    assert score.prob == pytest.approx(math.exp(-3))


@pytest.mark.parametrize(
    ("prompt", "targets", "error"),
    [
        (PROMPT, [], RequestError),
        (PROMPT, [""], TokenError),
        (PROMPT, ["Paris", "  "], TokenError),
        ("", ["Paris"], TokenError),
        (PROMPT + " ", ["Paris"], TokenError),
        (PROMPT + "\n", ["Paris"], TokenError),
        ("Paris " * 200 + "is", ["Rome"], RequestError),
    ],
)
def test_wrong_input_is_refused(prompt: str, targets: list[str], error: type[Exception]) -> None:
    with pytest.raises(error):
        score_details(lens(), prompt, targets)


def test_longest_question_fits_exactly() -> None:
    model = lens()
    limit = model.info.n_ctx
    length = len(ask(model, "a" * 20, "in").ids)
    fitting = "a" * 20 + " a" * 300
    while length != limit:
        fitting = fitting[:-1].rstrip()
        try:
            length = len(ask(model, fitting, "in").ids)
        except RequestError:
            continue
        assert length <= limit
        break
    assert length == limit
    found = score_details(model, fitting, ["in"])["in"]
    logprobs, _ = plain_score(
        "gpt2", model.tokens.encode(fitting).ids, model.tokens.target_ids("in")
    )
    assert found.token_logprobs == pytest.approx(logprobs, abs=1e-5)
