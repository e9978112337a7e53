"""Log-probabilities and ranks of whole continuations: one definition for the package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from driftlens.errors import RequestError
from driftlens.models import LensModel

MAX_TOKENS_PER_BATCH = 4096
"""Positions per forward pass; bounds memory, does not change results."""


@dataclass(frozen=True)
class ContinuationScore:
    """How likely a model finds one continuation of a prompt.

    Args:
        text: The continuation.
        token_logprobs: Natural log-probability of each of its tokens, given all before it.
        token_ranks: How many vocabulary items are more likely, for each token.
    """

    text: str
    token_logprobs: tuple[float, ...]
    token_ranks: tuple[int, ...]

    @property
    def logprob(self) -> float:
        """Log-probability of the whole continuation, in nats."""
        return math.fsum(self.token_logprobs)

    @property
    def prob(self) -> float:
        """Probability of the whole continuation."""
        return math.exp(self.logprob)

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token, in nats: the editing benchmarks' score, negated."""
        return self.logprob / len(self.token_logprobs)

    @property
    def rank(self) -> int:
        """Largest rank of its tokens: 0 exactly if greedy decoding gives this continuation."""
        return max(self.token_ranks)


@dataclass(frozen=True)
class Question:
    """A prompt and a continuation as token ids.

    Args:
        text: The continuation as text.
        prompt: Ids of the prompt, BOS included.
        target: Ids of the continuation.
    """

    text: str
    prompt: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        """What the model reads: the last target token is only predicted."""
        return [*self.prompt, *self.target[:-1]]

    @property
    def predicting(self) -> list[int]:
        """Positions at which the target's tokens are predicted."""
        first = len(self.prompt) - 1
        return list(range(first, first + len(self.target)))


def ask(model: LensModel, prompt: str, continuation: str) -> Question:
    """Tokenize a prompt and a continuation.

    Raises:
        TokenError: If either is empty or the prompt ends in white space.
    """
    encoded = model.tokens.encode_prompt(prompt)
    target = model.tokens.target_ids(continuation)
    length = len(encoded) + len(target) - 1
    if length > model.info.n_ctx:
        raise RequestError(
            f"A prompt of {length} tokens exceeds the {model.info.n_ctx} of {model.info.name}.",
            "Shorten it.",
        )
    return Question(continuation, tuple(encoded.ids), tuple(target))


def batch_ids(
    model: LensModel, questions: Sequence[Question]
) -> tuple[Int[torch.Tensor, "batch pos"], Int[torch.Tensor, "batch target"]]:
    """Padded inputs, and the predicting positions (the last one repeated as padding)."""
    ids = model.tokens.pad([q.ids for q in questions], model.device)
    width = max(len(q.target) for q in questions)
    at = [q.predicting + [q.predicting[-1]] * (width - len(q.target)) for q in questions]
    return ids, torch.tensor(at)


def read_scores(
    logits: Float[torch.Tensor, "batch target d_vocab"], questions: Sequence[Question]
) -> list[ContinuationScore]:
    """Scores from the logits at the predicting positions."""
    scores = []
    for row, question in zip(logits, questions, strict=True):
        n = len(question.target)
        logprobs = row[:n].float().log_softmax(-1)
        target = torch.tensor(question.target, device=row.device)
        own = logprobs.gather(-1, target[:, None])
        ranks = (logprobs > own).sum(-1)
        scores.append(
            ContinuationScore(question.text, tuple(own[:, 0].tolist()), tuple(ranks.tolist()))
        )
    return scores


def score_questions(model: LensModel, questions: Sequence[Question]) -> list[ContinuationScore]:
    """Score many questions, batched by length; the order is kept."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].ids))
    found: dict[int, ContinuationScore] = {}
    while order:
        longest = len(questions[order[-1]].ids)
        size = max(1, MAX_TOKENS_PER_BATCH // longest)
        chosen, order = order[-size:], order[:-size]
        batch = [questions[i] for i in chosen]
        ids, at = batch_ids(model, batch)
        with torch.no_grad():
            logits = model.run(ids, at=at)
        found.update(zip(chosen, read_scores(logits, batch), strict=True))
    return [found[i] for i in range(len(questions))]


def score_details(
    model: LensModel, prompt: str, continuations: Sequence[str]
) -> dict[str, ContinuationScore]:
    """Token by token scores of continuations of one prompt.

    Raises:
        RequestError: If there are no continuations.
        TokenError: If a text is empty or the prompt ends in white space.
    """
    if isinstance(continuations, str):
        continuations = [continuations]
    if not continuations:
        raise RequestError("There is nothing to score.", "Give at least one continuation.")
    questions = [ask(model, prompt, text) for text in continuations]
    return dict(zip(continuations, score_questions(model, questions), strict=True))


def score(model: LensModel, prompt: str, continuations: Sequence[str]) -> dict[str, float]:
    """Log-probability (nats) of each whole continuation of a prompt.

    A continuation is separated from the prompt by one space. The model is scored as it is
    now: inside ``with edit.applied(model):`` that is the edited one.

    Raises:
        RequestError: If there are no continuations.
        TokenError: If a text is empty or the prompt ends in white space.
    """
    return {t: s.logprob for t, s in score_details(model, prompt, continuations).items()}
