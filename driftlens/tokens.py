"""Text to tokens and back: the only caller of the tokenizer.

Three decisions live here and nowhere else:

1. *BOS as the model was trained*: it is prepended exactly if the tokenizer does so itself.
2. *The subject's position* is found by character offsets on the whole rendered text, never
   by tokenizing pieces and adding their lengths.
3. *A target* is tokenized as it appears in running text, with its leading space; its ids are
   concatenated to the prompt's and never decoded again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int

from driftlens.errors import TokenError
from driftlens.facts import occurrences
from driftlens.journal import digest


@dataclass(frozen=True)
class Span:
    """Token positions ``start <= pos < end`` in one sequence, BOS counted."""

    start: int
    end: int

    @property
    def last(self) -> int:
        """Position of the last token of the span."""
        return self.end - 1


@dataclass(frozen=True)
class Encoded:
    """A tokenized text.

    Args:
        text: The text as it was given.
        ids: Token ids, with BOS where the model was trained with it.
        offsets: For each token, the characters ``[start, end)`` of ``text`` that it covers;
            ``(0, 0)`` for BOS.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)


class Tokens:
    """A tokenizer with its decisions made.

    Args:
        tokenizer: A Hugging Face *fast* tokenizer (character offsets are needed).
        prepend_bos: Whether texts start with BOS. ``None`` asks the tokenizer what it does
            by default, which is what its model was trained with.
        separator: What stands between a prompt and its target; a space, unless the language
            writes without.

    Attributes:
        d_vocab: How many ids the model has an embedding for; ``None`` if that is not known.

    Raises:
        TokenError: If the tokenizer gives no character offsets.
    """

    def __init__(
        self, tokenizer: Any, prepend_bos: bool | None = None, separator: str = " "
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenError(
                f"{type(tokenizer).__name__} gives no character offsets.",
                "Load the fast version of the tokenizer (use_fast=True).",
            )
        self.tokenizer = tokenizer
        self.separator = separator
        self.d_vocab: int | None = None
        self.prepend_bos = _adds_bos(tokenizer) if prepend_bos is None else prepend_bos
        if self.prepend_bos and tokenizer.bos_token_id is None:
            raise TokenError(
                "prepend_bos=True, but the tokenizer has no BOS token.",
                "Leave prepend_bos out, or set tokenizer.bos_token.",
            )

    @cached_property
    def digest(self) -> str:
        """Of the tokenizer, 16 hexadecimal digits; how it pads and truncates does not matter."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return digest({k: v for k, v in state.items() if k not in ("padding", "truncation")})

    @property
    def pad_id(self) -> int:
        """An id for padding on the right, where causal attention never looks."""
        for value in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(value, int) and self._is_known(value):
                return value
        return 0

    def _is_known(self, token: int) -> bool:
        return self.d_vocab is None or 0 <= token < self.d_vocab

    def encode(self, text: str) -> Encoded:
        """Tokenize a text.

        Raises:
            TokenError: If the text is empty, gives no token, or one that the model does not know.
        """
        _check_characters(text)
        if not text:
            raise TokenError("The text is empty.", "Give at least one character.")
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(out["input_ids"])
        offsets = [(int(start), int(end)) for start, end in out["offset_mapping"]]
        if not ids:
            raise TokenError(f"The text {text!r} gives no tokens.")
        if self.prepend_bos:
            ids = [int(self.tokenizer.bos_token_id), *ids]
            offsets = [(0, 0), *offsets]
        self._check_known(ids, text)
        return Encoded(text, ids, offsets)

    def _check_known(self, ids: Sequence[int], text: str) -> None:
        unknown = [token for token in ids if not self._is_known(token)]
        if unknown:
            raise TokenError(
                f"The tokenizer gives {text!r} the id {unknown[0]}, and the model has "
                f"{self.d_vocab} embeddings.",
                "Load the tokenizer that belongs to the model.",
            )

    def encode_prompt(self, text: str) -> Encoded:
        """Tokenize a text that a target is to follow.

        Raises:
            TokenError: If it is empty or ends in white space, which would be tokenized apart
                from the target and change what the model is asked.
        """
        _check_characters(text)
        if text != text.rstrip():
            raise TokenError(
                f"The prompt {text!r} ends in white space.",
                "Remove it: an answer brings its own leading space.",
            )
        return self.encode(text)

    def target_ids(self, target: str) -> list[int]:
        """The ids of a target as it follows a prompt, leading space included, without BOS.

        The target is tokenized behind a short anchor whose own tokens are then dropped, so
        that tokenizers which add a word-boundary mark of their own at the start of a text
        (SentencePiece) give the same ids as in running text.

        Raises:
            TokenError: If the target is empty, or gives a token that the model does not know.
        """
        _check_characters(target)
        word = target.strip()
        if not word:
            raise TokenError("The target is empty.", "Give at least one visible character.")
        for anchor in ("a", ".", "1", "x"):
            before = self.tokenizer(anchor, add_special_tokens=False)["input_ids"]
            whole = self.tokenizer(anchor + self.separator + word, add_special_tokens=False)[
                "input_ids"
            ]
            if len(whole) > len(before) and list(whole[: len(before)]) == list(before):
                found = [int(i) for i in whole[len(before) :]]
                self._check_known(found, target)
                return found
        raise TokenError(
            f"The target {target!r} cannot be separated from the text before it.",
            "Its first characters merge with any preceding token in this tokenizer.",
        )

    def span_of_characters(self, encoded: Encoded, start: int, end: int) -> Span:
        """The tokens that overlap the characters ``[start, end)``.

        Raises:
            TokenError: If no token does.
        """
        touching = [
            position
            for position, (first, last) in enumerate(encoded.offsets)
            if first < end and last > start and last > first
        ]
        if not touching:
            raise TokenError(
                f"No token covers the characters {start}:{end} of {encoded.text!r}.",
                "The tokenizer drops them; choose another subject.",
            )
        return Span(touching[0], touching[-1] + 1)

    def find_subject(self, encoded: Encoded, subject: str, occurrence: int = 0) -> Span:
        """The tokens of one occurrence of the subject.

        Occurrences are counted from 0 in reading order; a negative number counts from the
        end. Those inside a longer word count only if there are no others
        (:func:`driftlens.facts.occurrences`).

        Raises:
            TokenError: If the subject is empty, absent, or does not occur that often.
        """
        if not subject.strip():
            raise TokenError("The subject is empty.", "Name the entity whose fact is edited.")
        starts = occurrences(encoded.text, subject)
        if not starts:
            raise TokenError(
                f"The subject {subject!r} is not in {encoded.text!r}.",
                "Check its spelling and capitals; it must stand there letter for letter.",
            )
        if not -len(starts) <= occurrence < len(starts):
            raise TokenError(
                f"The subject {subject!r} occurs {len(starts)} time(s) in {encoded.text!r}, "
                f"so there is no occurrence {occurrence}.",
                f"Choose one of 0 to {len(starts) - 1}.",
            )
        start = starts[occurrence]
        return self.span_of_characters(encoded, start, start + len(subject))

    def labels(self, encoded: Encoded) -> list[str]:
        """What each token shows of the text, leading white space included.

        A token that is a part of one character (byte-level vocabularies) shows ``U+FFFD``;
        BOS and other special tokens show their name. Put together, the labels without these
        are the text.
        """
        labels: list[str] = []
        shown = 0
        special = set(self.tokenizer.all_special_ids)
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            if end <= start:
                # Some tokenizers trim a token that is only a space to nothing; the next
                # token's label then shows the space.
                name = self.tokenizer.convert_ids_to_tokens(token) if token in special else ""
                labels.append(str(name))
                continue
            labels.append(encoded.text[shown:end] if end > shown else "\ufffd")
            shown = max(shown, end)
        return labels

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids as text, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def pad(
        self, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> Int[torch.Tensor, "batch pos"]:
        """Rows of ids, padded on the right to the longest."""
        width = max(len(row) for row in rows)
        return torch.tensor(
            [[*row, *[self.pad_id] * (width - len(row))] for row in rows], device=device
        )


def _check_characters(text: str) -> None:
    if not isinstance(text, str):
        raise TokenError(f"{text!r} is no text.", "Give a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenError(
            f"{text!r} holds half a character (a lone surrogate) at {error.start}.",
            "Read it with its own encoding.",
        ) from error


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer starts a text with BOS when nobody tells it to."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
