"""Text to tokens: subjects by characters, targets as in running text, on unlike tokenizers."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from driftlens.editing.contexts import Context
from driftlens.editing.target import build_problem
from driftlens.errors import TokenError
from driftlens.facts import EditRequest
from driftlens.tokens import Span, Tokens

# --- tokenizers -----------------------------------------------------------------------------

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEXT = [*tiny.TEXT, "Rome Romeo Tōkyō, 東京 and the mother tongue's city. " * 3]


def _finish(raw: Tokenizer, **special: str) -> Any:
    special = special or {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def _sentencepiece_bpe(dummy_prefix: bool, bos: bool) -> Any:
    """Spaces are ``▁``; Llama puts one in front of a text, Gemma does not."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL + BYTES, show_progress=False),
    )
    raw.pre_tokenizer = None
    replace = normalizers.Replace(" ", "▁")
    raw.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if dummy_prefix else replace
    )
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return _finish(raw)


def _unigram() -> Any:
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    raw.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    return _finish(raw)


def _wordpiece() -> Any:
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    return _finish(raw)


def _whole_words() -> Any:
    """What stands between spaces is one token, punctuation included."""
    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.train_from_iterator(
        TEXT, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    )
    return _finish(raw)


def _bytes(trim_offsets: bool, normalizer: Any = None) -> Any:
    """Llama 3 has offsets without the leading space, Qwen composes characters (NFC)."""
    raw = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    raw.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if normalizer is not None:
        raw.normalizer = normalizer
    return _finish(raw)


MAKERS = {
    "bytes": tiny.tokenizer,
    "bytes+bos": tiny.bos_tokenizer,
    "bytes, trimmed": lambda: _bytes(trim_offsets=True),
    "bytes, composed": lambda: _bytes(trim_offsets=False, normalizer=normalizers.NFC()),
    "llama": lambda: _sentencepiece_bpe(dummy_prefix=True, bos=True),
    "gemma": lambda: _sentencepiece_bpe(dummy_prefix=False, bos=True),
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "whole words": _whole_words,
}
KINDS = sorted(MAKERS)
BYTE_LEVEL = [kind for kind in KINDS if kind.startswith("bytes")]
LOSSLESS = [*BYTE_LEVEL, "gemma", "llama"]


@cache
def made(kind: str) -> Any:
    return MAKERS[kind]()


@cache
def tokens_of(kind: str) -> Tokens:
    return Tokens(made(kind))


def last_by_raw_tokenizer(kind: str, text: str, start: int, end: int) -> int:
    """The last token that overlaps the characters, by the tokenizer's own tables."""
    encoding = made(kind)(text)
    overlapping = []
    for position in range(len(encoding["input_ids"])):
        characters = encoding.token_to_chars(position)
        if characters is not None and characters.start < end and characters.end > start:
            overlapping.append(position)
    return overlapping[-1]


# --- BOS ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bos_is_prepended_exactly_if_the_tokenizer_does_so(kind: str) -> None:
    text = "The Eiffel Tower is"
    encoded = tokens_of(kind).encode(text)
    assert encoded.ids == made(kind)(text)["input_ids"]
    expected = kind in ("bytes+bos", "llama", "gemma")
    assert tokens_of(kind).prepend_bos is expected
    assert (encoded.ids[0] == made(kind).bos_token_id) is expected
    assert len(encoded) == len(encoded.offsets)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [True, False])
def test_bos_can_be_chosen(kind: str, wanted: bool) -> None:
    encoded = Tokens(made(kind), prepend_bos=wanted).encode("Paris")
    bare = made(kind)("Paris", add_special_tokens=False)["input_ids"]
    assert encoded.ids == [made(kind).bos_token_id] * wanted + bare


def test_bos_that_does_not_exist_is_refused() -> None:
    raw = Tokenizer.from_str(made("bytes").backend_tokenizer.to_str())
    tokenizer = _finish(raw, eos_token="</s>")
    assert Tokens(tokenizer).prepend_bos is False
    with pytest.raises(TokenError, match="no BOS"):
        Tokens(tokenizer, prepend_bos=True)


def test_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(TokenError, match="no character offsets"):
        Tokens(SimpleNamespace(is_fast=False))


# --- texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_empty_text_is_refused(kind: str) -> None:
    with pytest.raises(TokenError, match="empty"):
        tokens_of(kind).encode("")


@pytest.mark.parametrize("white", [" ", "\n", "\t", "\u00a0", "  "])
def test_prompt_that_ends_in_white_space_is_refused(white: str) -> None:
    with pytest.raises(TokenError, match="white space"):
        tokens_of("bytes").encode_prompt("The city of" + white)


def test_text_without_tokens_is_refused() -> None:
    with pytest.raises(TokenError, match="no tokens"):
        tokens_of("whole words").encode("  ")


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_on_the_right(kind: str) -> None:
    tokens = tokens_of(kind)
    padded = tokens.pad([[5, 6, 7], [8], [9, 4]])
    assert padded.tolist() == [[5, 6, 7], [8, *[tokens.pad_id] * 2], [9, 4, tokens.pad_id]]
    assert padded.dtype == torch.long


# --- subjects -------------------------------------------------------------------------------

TWICE = "Rome is old. They say that Rome is in"
DECOMPOSED = "To\u0304kyo\u0304"
SUBJECTS = {
    "at the start": ("The Eiffel Tower is located in", "The Eiffel Tower", 0, 0),
    "in the middle": ("The city of the Eiffel Tower is", "Eiffel Tower", 0, 16),
    "at the end": ("The capital of France", "France", 0, 15),
    "the whole text": ("Charles Babbage", "Charles Babbage", 0, 0),
    "after a bracket": ("(Paris) is located in", "Paris", 0, 1),
    "after a quote": ('The "Louvre" is a museum', "Louvre", 0, 5),
    "after a hyphen": ("The pro-Paris museum is", "Paris", 0, 8),
    "after a line break": ("Yes.\nParis is", "Paris", 0, 5),
    "after two spaces": ("The city  Paris is", "Paris", 0, 10),
    "first of two": (TWICE, "Rome", 0, 0),
    "second of two": (TWICE, "Rome", 1, 27),
    "last of two": (TWICE, "Rome", -1, 27),
    "first from the end": (TWICE, "Rome", -2, 0),
    "not in a longer word before": ("Romeo lives in Rome today", "Rome", 0, 15),
    "not in a longer word after": ("Rome is where Romeo lives", "Rome", -1, 0),
    "not at a word's end": ("The mother and her other", "other", 0, 19),
    "in a longer word only": ("Romeo lives", "Rome", 0, 0),
    "macrons": ("The city of Tōkyō is", "Tōkyō", 0, 12),
    "decomposed macrons": (f"The city of {DECOMPOSED} is", DECOMPOSED, 0, 12),
    "Japanese": ("The city of 東京 is", "東京", 0, 12),
    "Japanese at the start": ("東京 is", "東京", 0, 0),
    "Japanese without spaces": ("これは東京です", "東京", 0, 3),
    "one character at the start": ("東 is", "東", 0, 0),
    "emoji": ("The 🗼 is in", "🗼", 0, 4),
    "joined emoji": ("A 👩\u200d🔬 is", "👩\u200d🔬", 0, 2),
    "Arabic": ("The city of القاهرة is", "القاهرة", 0, 12),
    "Arabic at the start": ("القاهرة is", "القاهرة", 0, 0),
    "before a comma": ("The Eiffel Tower, in Paris", "Eiffel Tower", 0, 4),
    "before a full stop": ("In Paris. The city", "Paris", 0, 3),
    "possessive": ("Charles Babbage's mother tongue is", "Charles Babbage", 0, 0),
    "possessive, typographic": ("Ada Lovelace’s mother tongue", "Ada Lovelace", 0, 0),
    "with an apostrophe": ("It's a Sin is in the city of", "It's a Sin", 0, 0),
    "with punctuation at its end": ("The J. S. Bach Jr. museum", "J. S. Bach Jr.", 0, 4),
    "with a digit": ("Apple A4 was wrote", "Apple A4", 0, 0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SUBJECTS)
def test_subject_is_found(kind: str, case: str) -> None:
    text, subject, occurrence, start = SUBJECTS[case]
    end = start + len(subject)
    assert text[start:end] == subject
    tokens = tokens_of(kind)
    encoded = tokens.encode(text)
    span = tokens.find_subject(encoded, subject, occurrence)
    assert span == tokens.span_of_characters(encoded, start, end)
    assert span.start <= span.last == span.end - 1
    assert span.last == last_by_raw_tokenizer(kind, text, start, end)


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("case", SUBJECTS)
def test_subject_is_complete_with_its_last_token_and_not_before(kind: str, case: str) -> None:
    # Independent of offsets: what the tokens decode to.
    text, subject, occurrence, start = SUBJECTS[case]
    if kind == "bytes, composed" and subject == DECOMPOSED:
        pytest.skip("this tokenizer rewrites the subject")
    tokens = tokens_of(kind)
    encoded = tokens.encode(text)
    span = tokens.find_subject(encoded, subject, occurrence)
    upto = text[: start + len(subject)]
    bos = int(tokens.prepend_bos)

    def decoded(end: int) -> str:
        return str(made(kind).decode(encoded.ids[bos:end]))

    assert decoded(span.end).startswith(upto)
    assert not decoded(span.last).startswith(upto)
    assert subject in made(kind).decode(encoded.ids[span.start : span.end])


def test_punctuation_may_merge_with_the_subject() -> None:
    tokens = tokens_of("whole words")
    encoded = tokens.encode("The Tower, in Paris. Tower")
    assert tokens.find_subject(encoded, "Tower") == Span(1, 2)
    assert tokens.find_subject(encoded, "The Tower") == Span(0, 2)
    assert tokens.find_subject(encoded, "Paris") == Span(3, 4)
    possessive = tokens.encode("The tongue's city")
    assert tokens.find_subject(possessive, "tongue") == Span(1, 2)


@pytest.mark.parametrize("kind", ["bytes", "bytes+bos"])
def test_bos_is_counted(kind: str) -> None:
    encoded = tokens_of(kind).encode("Paris is")
    length = len(made(kind)("Paris", add_special_tokens=False)["input_ids"])
    bos = int(kind == "bytes+bos")
    assert tokens_of(kind).find_subject(encoded, "Paris") == Span(bos, bos + length)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("The Eiffel Tower is", "Louvre"),
        ("The Eiffel Tower is", "eiffel tower"),
        ("The Eiffel Tower is", "Eiffel  Tower"),
        ("Rome", "Romeo"),
        ("Tokyo is", "Tōkyō"),
    ],
)
def test_absent_subject_is_refused(kind: str, text: str, subject: str) -> None:
    with pytest.raises(TokenError, match="is not in"):
        tokens_of(kind).find_subject(tokens_of(kind).encode(text), subject)


@pytest.mark.parametrize("subject", ["", " ", "\n"])
def test_empty_subject_is_refused(subject: str) -> None:
    with pytest.raises(TokenError, match="empty"):
        tokens_of("bytes").find_subject(tokens_of("bytes").encode("Rome is\n old"), subject)


@pytest.mark.parametrize("occurrence", [2, 3, -3, 100])
def test_occurrence_out_of_range_is_refused(occurrence: int) -> None:
    tokens = tokens_of("bytes")
    with pytest.raises(TokenError, match="occurs 2 time"):
        tokens.find_subject(tokens.encode(TWICE), "Rome", occurrence)


def test_characters_without_tokens_are_refused() -> None:
    tokens = tokens_of("whole words")
    with pytest.raises(TokenError, match="No token covers"):
        tokens.span_of_characters(tokens.encode("Paris    Rome"), 6, 8)


characters = st.text(
    st.sampled_from(
        [*"aeiotTRP .,'\n-", "ō", "東", "🗼", "ع", "\u0304", "\u200d", "é", "▁", "\u3000", "Ġ"]
    ),
    max_size=12,
)


@pytest.mark.parametrize("kind", KINDS)
@given(before=characters, subject=characters, after=characters)
def test_span_ends_where_the_subject_does(kind: str, before: str, subject: str, after: str) -> None:
    subject = f"R{subject.strip()}e"
    text = before + subject + after
    start, end = len(before), len(before) + len(subject)
    tokens = tokens_of(kind)
    encoded = tokens.encode(text)
    span = tokens.span_of_characters(encoded, start, end)
    first, last = encoded.offsets[span.last]
    assert first <= end - 1 < last
    assert all(b <= start or a >= end for a, b in encoded.offsets[span.end :])
    assert all(b <= start or a >= end for a, b in encoded.offsets[: span.start])
    assert span.last == last_by_raw_tokenizer(kind, text, start, end)


# --- targets --------------------------------------------------------------------------------

TARGETS = ["Paris", "Rome", "New York", "Tōkyō", "東京", "🗼", "القاهرة", "3", "Paris.", "'s", "a"]
PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "The capital of France is Paris. It",
    "Rome",
    "Is it true?",
    "(1)",
    "東京",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_target_has_the_ids_of_running_text(kind: str, target: str) -> None:
    tokens = tokens_of(kind)
    ids = tokens.target_ids(target)
    assert ids
    for prompt in PROMPTS:
        whole = made(kind)(f"{prompt} {target}")["input_ids"]
        assert whole[-len(ids) :] == ids
        assert tokens.encode_prompt(prompt).ids + ids == whole


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("target", TARGETS)
def test_target_has_its_leading_space_and_no_bos(kind: str, target: str) -> None:
    ids = tokens_of(kind).target_ids(target)
    anchor = made(kind)("a", add_special_tokens=False)["input_ids"]
    assert made(kind).decode(anchor + ids) == f"a {target}"
    assert made(kind).bos_token_id not in ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["Paris", "New York", "東京"])
def test_white_space_around_a_target_does_not_count(kind: str, target: str) -> None:
    tokens = tokens_of(kind)
    for given_as in (f" {target}", f"{target} ", f"  {target}\n"):
        assert tokens.target_ids(given_as) == tokens.target_ids(target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["", " ", "\n\t", "\u00a0"])
def test_empty_target_is_refused(kind: str, target: str) -> None:
    with pytest.raises(TokenError, match="empty"):
        tokens_of(kind).target_ids(target)


def test_target_that_always_merges_is_refused() -> None:
    # Without a separator, whole words are one token with whatever stands before them.
    tokens = Tokens(made("whole words"), separator="")
    with pytest.raises(TokenError, match="cannot be separated"):
        tokens.target_ids("Rome")


@pytest.mark.parametrize("kind", LOSSLESS)
def test_separator_may_be_empty(kind: str) -> None:
    ids = Tokens(made(kind), separator="").target_ids("東京")
    assert made(kind)("これは東京")["input_ids"][-len(ids) :] == ids
    assert made(kind).decode(ids) == "東京"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["Rome", "New York", "Tōkyō", "東京"])
def test_target_is_concatenated_and_never_decoded(
    kind: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = made(kind)
    texts = ["The Eiffel Tower is in", "Yes, and. The Eiffel Tower is in"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]

    def never(*_: Any, **__: Any) -> str:
        raise AssertionError("ids were decoded")

    for name in ("decode", "batch_decode", "convert_tokens_to_string", "_decode"):
        monkeypatch.setattr(tokenizer, name, never)
    tokens = tokens_of(kind)
    ids = tokens.target_ids(target)
    model: Any = SimpleNamespace(tokens=tokens, device="cpu", check_length=lambda n, text: None)
    request = EditRequest("{} is in", "The Eiffel Tower", target)
    problem = build_problem(model, request, [Context(), Context(before="Yes, and. ")])
    assert problem.rows[:2] == [prompt + ids[:-1] for prompt in prompts]
    assert problem.last_prompt == [len(prompt) - 1 for prompt in prompts]
    assert problem.target == ids


# --- labels ---------------------------------------------------------------------------------

LABELLED = [
    "The Eiffel Tower is located in the city of",
    "The city of Tōkyō, or 東京, and the 🗼 there",
    "東 is",
    "القاهرة is the city",
    "a  b   c",
    "one\n\ntwo\tthree",
    "Rome's 'mother' (tongue)",
    f"decomposed {DECOMPOSED} is",
    "A 👩\u200d🔬 is",
]


def shown_text(kind: str, text: str) -> str:
    """All labels in a row, without BOS and without the parts of characters."""
    tokens = tokens_of(kind)
    encoded = tokens.encode(text)
    labels = tokens.labels(encoded)
    assert len(labels) == len(encoded)
    if tokens.prepend_bos:
        assert labels[0] == "<s>"
        labels = labels[1:]
    return "".join(labels).replace("\ufffd", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", LABELLED)
def test_labels_lose_no_text(kind: str, text: str) -> None:
    assert shown_text(kind, text) == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=characters)
def test_labels_lose_no_random_text(kind: str, text: str) -> None:
    text = f"T{text}e"
    assert shown_text(kind, text) == text


@pytest.mark.parametrize("kind", LOSSLESS)
def test_labels_show_leading_spaces_and_parts_of_characters(kind: str) -> None:
    tokens = tokens_of(kind)
    labels = tokens.labels(tokens.encode("The city of 🗼"))
    assert " of" in labels or " o" in labels
    tower = made(kind)("🗼", add_special_tokens=False)["input_ids"]
    parts = 4 if kind not in ("llama",) else len(tower) - 1
    assert labels.count("\ufffd") == parts - 1
    assert sum("🗼" in label for label in labels) == 1


def test_what_is_no_text_is_refused() -> None:
    tokens = Tokens(tiny.tokenizer())
    for wrong, said in (
        (None, "None is no text"),
        (b"a", "is no text"),
        ("a\ud800", "half a char"),
    ):
        for read in (tokens.encode, tokens.encode_prompt, tokens.target_ids):
            with pytest.raises(TokenError, match=said):
                read(wrong)  # type: ignore[arg-type]
