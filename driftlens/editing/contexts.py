"""Contexts that a subject's key and value are averaged over.

A context is the text before and after the place where the filled-in prompt goes. Generated
text never passes through ``str.format``: it may contain braces of its own.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from driftlens.errors import RequestError
from driftlens.facts import split_template
from driftlens.models import LensModel

SEED_WORDS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5


@dataclass(frozen=True)
class Context:
    """Text around a prompt; ``Context()`` is the prompt alone."""

    before: str = ""
    after: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether the prompt stands alone."""
        return not self.before and not self.after


def parse_contexts(templates: Sequence[str]) -> list[Context]:
    """Contexts from templates with one ``{}`` for the prompt, e.g. ``"Yes. {}"``.

    Raises:
        RequestError: If there is none, or one has not exactly one slot.
    """
    if isinstance(templates, str) or not templates:
        raise RequestError(
            "context_prompts must be a list of at least one template.",
            'The prompt alone is ["{}"].',
        )
    return [Context(*split_template(template, "context prompt")) for template in templates]


def sample_contexts(
    model: LensModel,
    lengths: Sequence[int] = (5, 10),
    per_word: int = 2,
    seed: int = 0,
) -> list[Context]:
    """The prompt alone, and sentences that the model writes itself, each followed by the prompt.

    For each of the words *The, Therefore, Because, I, You* and each length, ``per_word``
    continuations are sampled from the five most likely tokens at temperature 1; the defaults
    give the 21 contexts of ROME as EasyEdit and the SADR paper use them.

    Args:
        model: Edits that are applied to it are off meanwhile, so that a fact has the same contexts
            whatever was edited before.
        lengths: Tokens of a sentence, its first word included, BOS not.
        per_word: Sentences for each word and length.
        seed: Of a generator of its own; the global random state is neither read nor changed.
    """
    key = ("contexts", model.fingerprint(), tuple(lengths), per_word, seed)
    if key not in model.memo:
        with model.weights.suspended():
            model.memo[key] = _sample(model, lengths, per_word, seed)
    return list(model.memo[key])


def _sample(
    model: LensModel, lengths: Sequence[int], per_word: int, seed: int
) -> tuple[Context, ...]:
    generator = torch.Generator().manual_seed(seed)
    wanted = [(word, length) for length in lengths for word in SEED_WORDS for _ in range(per_word)]
    rows = [model.tokens.encode(word).ids for word, _ in wanted]
    bos = int(model.tokens.prepend_bos)
    open_rows = {i for i, (_, length) in enumerate(wanted) if len(rows[i]) - bos < length}
    while open_rows:
        chosen = sorted(open_rows)
        ids = model.tokens.pad([rows[i] for i in chosen])
        at = torch.tensor([[len(rows[i]) - 1] for i in chosen])
        with torch.no_grad():
            logits = model.run(ids, at=at)[:, 0].float().cpu()
        top = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
        draws = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
        for i, token in zip(chosen, top.indices.gather(-1, draws)[:, 0].tolist(), strict=True):
            rows[i].append(token)
            if len(rows[i]) - bos >= wanted[i][1]:
                open_rows.discard(i)
    return (Context(), *(Context(before=_sentence(model, row)) for row in rows))


def _sentence(model: LensModel, ids: list[int]) -> str:
    text = model.tokens.decode(ids)
    text = unicodedata.normalize("NFKD", text).replace("\n\n", " ")
    return f"{text}. "
