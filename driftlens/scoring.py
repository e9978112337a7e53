"""Log-probabilities and ranks of whole continuations: one definition for the package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int

from driftlens.errors import RequestError
from driftlens.models import LensModel
from driftlens.packing import ROW, pack, packing_is_exact, run_packed
from driftlens.precision import in_float32
from driftlens.reuse import Engine, budget, check_engine, in_batches

MAX_TOKENS_PER_BATCH = 4096
"""Positions per forward pass; bounds memory, does not change results."""


@dataclass(frozen=True)
class ContinuationScore:
    """How likely a model finds one continuation of a prompt.

    Args:
        text: The continuation.
        token_logprobs: Natural log-probability of each of its tokens, given all before it.
        token_ranks: How many vocabulary items greedy decoding prefers, for each token: more
            likely ones, and equally likely ones with a smaller id. All of them where the logits
            are not numbers.
        engine: How it was found: ``"suffix"``, prefixes that several texts share run once;
            ``"plain"``, padded batches; ``None`` if from another pass, e.g. a patched one.
    """

    text: str
    token_logprobs: tuple[float, ...]
    token_ranks: tuple[int, ...]
    engine: Engine | None = field(default=None, compare=False)

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
        """Log-probability per token, in nats; the editing benchmarks' score is its negative."""
        return self.logprob / len(self.token_logprobs)

    @property
    def rank(self) -> int:
        """Largest rank of its tokens; 0 exactly if greedy decoding gives this continuation."""
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
        RequestError: If they are longer than the model's context.
        TokenError: If either is empty or the prompt ends in white space.
    """
    encoded = model.tokens.encode_prompt(prompt)
    target = model.tokens.target_ids(continuation)
    model.check_length(len(encoded) + len(target) - 1, prompt + continuation)
    return Question(continuation, tuple(encoded.ids), tuple(target))


@dataclass(frozen=True)
class QuestionBatch:
    """Questions as one batch, in which equal inputs stand only once.

    Args:
        questions: The questions.
        rows: The different inputs.
        row_of: For each question, which row is its input.
    """

    questions: tuple[Question, ...]
    rows: tuple[tuple[int, ...], ...]
    row_of: tuple[int, ...]

    @classmethod
    def of(cls, questions: Sequence[Question]) -> QuestionBatch:
        """Questions that differ only in a one-token target share a row."""
        # Equal inputs may still be read at other positions: "of New" + "York", "of" + "New York".
        inputs = [(tuple(q.ids), len(q.prompt)) for q in questions]
        distinct = list(dict.fromkeys(inputs))
        return cls(
            tuple(questions),
            tuple(ids for ids, _ in distinct),
            tuple(distinct.index(i) for i in inputs),
        )

    def row_question(self, row: int) -> Question:
        """The first question of a row; all of them predict at the same positions."""
        return self.questions[self.row_of.index(row)]

    def ids(self, model: LensModel) -> Int[torch.Tensor, "row pos"]:
        """Inputs, padded on the right."""
        return model.tokens.pad(self.rows, model.device)

    def at(self) -> Int[torch.Tensor, "row target"]:
        """Predicting positions of each row, the last one repeated as padding."""
        positions = [self.row_question(row).predicting for row in range(len(self.rows))]
        width = max(map(len, positions))
        return torch.tensor([p + [p[-1]] * (width - len(p)) for p in positions])

    def read(self, logprobs: Float[torch.Tensor, "row target d_vocab"]) -> list[ContinuationScore]:
        """Scores of the questions from the log-probabilities at the predicting positions."""
        return [
            read_score(logprobs[row], question)
            for row, question in zip(self.row_of, self.questions, strict=True)
        ]


def log_probabilities(
    logits: Float[torch.Tensor, "*batch d_vocab"],
) -> Float[torch.Tensor, "*batch d_vocab"]:
    """Natural log-probabilities, in float32 or better."""
    return in_float32(logits).log_softmax(-1)


def read_score(
    logprobs: Float[torch.Tensor, "target d_vocab"], question: Question
) -> ContinuationScore:
    """One question's score from the log-probabilities at its predicting positions."""
    logprobs = logprobs[: len(question.target)]
    target = torch.tensor(question.target, device=logprobs.device)
    own = logprobs.gather(-1, target[:, None])
    lower = torch.arange(logprobs.shape[-1], device=logprobs.device) < target[:, None]
    ahead = ~(logprobs <= own) | ((logprobs == own) & lower)  # not a number: not known to be behind
    ranks = ahead.sum(-1)
    return ContinuationScore(question.text, tuple(own[:, 0].tolist()), tuple(ranks.tolist()))


def score_questions(
    model: LensModel, questions: Sequence[Question], engine: Engine | None = None
) -> list[ContinuationScore]:
    """Score many questions; the order is kept.

    Args:
        engine: ``"suffix"`` runs each prefix that questions share once, ``"plain"`` pads
            batches of like length; ``None`` takes the former wherever it is exact.
    """
    check_engine(engine)
    packs = engine == "suffix" or (engine is None and packing_is_exact(model))
    used: Engine = "suffix" if packs else "plain"
    found = (_score_packed if packs else _score_padded)(model, questions)
    return [replace(score, engine=used) for score in found]


def _score_packed(model: LensModel, questions: Sequence[Question]) -> list[ContinuationScore]:
    """All inputs as trees, the unembedding only where something is predicted."""
    if not questions:
        return []
    packed = pack([q.ids for q in questions], model.tokens.pad_id, min(ROW, MAX_TOKENS_PER_BATCH))
    predicting: list[list[int]] = [[] for _ in packed.used]
    for q, row, places in zip(questions, packed.row, packed.places, strict=True):
        predicting[row] += [places[p] for p in q.predicting]
    predicting = [sorted(set(places)) for places in predicting]
    widest = max(map(len, predicting))
    room = budget(model) // (12 * model.info.d_vocab * widest)
    size = max(1, min(MAX_TOKENS_PER_BATCH // packed.ids.shape[1], room))

    def run(rows: Sequence[int]) -> list[tuple[int, ContinuationScore]]:
        part = packed.rows(rows[0], rows[-1] + 1)
        chosen = [predicting[r] + predicting[r][-1:] * (widest - len(predicting[r])) for r in rows]
        with torch.no_grad():
            logprobs = log_probabilities(run_packed(model, part, at=torch.tensor(chosen)))
        found = []
        for i, q in enumerate(questions):
            if packed.row[i] in rows:
                row = packed.row[i]
                index = [predicting[row].index(packed.places[i][p]) for p in q.predicting]
                found.append((i, read_score(logprobs[row - rows[0], index], q)))
        return found

    scores = dict(pair for part in in_batches(range(len(packed.used)), size, run) for pair in part)
    return [scores[i] for i in range(len(questions))]


def _score_padded(model: LensModel, questions: Sequence[Question]) -> list[ContinuationScore]:
    """Batches of like length, padded on the right."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].ids))
    found: dict[int, ContinuationScore] = {}
    while order:
        longest = len(questions[order[-1]].ids)
        size = max(1, MAX_TOKENS_PER_BATCH // longest)
        chosen, order = order[-size:], order[:-size]
        batch = QuestionBatch.of([questions[i] for i in chosen])
        with torch.no_grad():
            logits = model.run(batch.ids(model), at=batch.at())
        found.update(zip(chosen, batch.read(log_probabilities(logits)), strict=True))
    return [found[i] for i in range(len(questions))]


def score_details(
    model: LensModel, prompt: str, continuations: Sequence[str]
) -> dict[str, ContinuationScore]:
    """Token by token scores of continuations of one prompt.

    Raises:
        RequestError: If there are no continuations, or one is too long for the model's context.
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

    A continuation is separated from the prompt by the model's ``separator``, a space by default.
    The model is scored as it is now: inside ``with edit.applied(model):`` that is the edited one.

    Raises:
        RequestError: If there are no continuations, or one is too long for the model's context.
        TokenError: If a text is empty or the prompt ends in white space.
    """
    return {t: s.logprob for t, s in score_details(model, prompt, continuations).items()}
