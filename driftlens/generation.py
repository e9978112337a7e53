"""Text that a model writes, and measures of it: fluency, reference score, perplexity.

Fluency and reference score are those of ROME's paper (appendix) and code; what is written is
sampled from the five most likely tokens at temperature 1, as there.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer

from driftlens.cases import TEXT_METRICS, Case, TextMetric
from driftlens.editing.statistics import wikipedia_leads
from driftlens.errors import RequestError
from driftlens.models import LensModel

PLAIN: dict[str, Any] = {
    "num_beams": 1, "top_p": 1.0, "typical_p": 1.0, "min_p": 0.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "temperature": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}  # fmt: skip
"""Sampling as it is defined, whatever a checkpoint's own generation settings say."""

N_GRAMS = {2: 2 / 3, 3: 4 / 3}
"""Lengths of n-grams, and the weights of their entropies in the mean."""

PERPLEXITY_TEXTS = 8
"""How many of the Wikipedia leads perplexity is taken over: the last, which come in no
covariance of the default size."""


def generate(
    model: LensModel, prompts: Sequence[str], length: int = 100, top_k: int = 5, seed: int = 0
) -> list[str]:
    """What the model, as it is now, writes on from each prompt, with the prompt.

    Args:
        prompts: Beginnings.
        length: Tokens of a text, the prompt's included. An end token does not end it, and is left
            out, as in ROME's code: else texts that end early would have a low fluency.
        top_k: From how many of the likeliest tokens each is sampled.
        seed: Of the sampling; the global random state is not changed.

    Raises:
        RequestError: If there is no prompt, or one leaves no room to write.
    """
    if not prompts:
        raise RequestError("There is no prompt to write on from.", "Give at least one.")
    rows = [model.tokens.encode(prompt).ids for prompt in prompts]
    for row, prompt in zip(rows, prompts, strict=True):
        if len(row) >= length:
            raise RequestError(
                f"The prompt {prompt[:60]!r} has {len(row)} tokens, and the text {length}.",
                "Give a shorter prompt, or a larger length.",
            )
        model.check_length(length, prompt)
    width, pad = max(map(len, rows)), model.tokens.pad_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), _without_end(model):
        torch.manual_seed(seed)
        written = model.hf_model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True, top_k=top_k,
            max_new_tokens=length - min(map(len, rows)), pad_token_id=pad, **PLAIN,
        )  # fmt: skip
    return [
        model.tokens.decode(_text(model, out[width - len(row) :].tolist()[:length]))
        for row, out in zip(rows, written, strict=True)
    ]


@contextmanager
def _without_end(model: LensModel) -> Iterator[None]:
    """No token ends a text. (A generation argument of ``None`` would mean the checkpoint's.)"""
    config = model.hf_model.generation_config
    kept, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = kept


def _text(model: LensModel, ids: Sequence[int]) -> list[int]:
    """Without the tokens that begin and end texts."""
    special = set(model.tokenizer.all_special_ids)
    return [token for token in ids if token not in special]


def measure_texts(
    model: LensModel,
    case: Case,
    metrics: Collection[TextMetric] = tuple(TEXT_METRICS),
    length: int = 100,
    seed: int = 0,
) -> dict[TextMetric, float]:
    """Measures of text of the model as it is now; those that the case has nothing for are left
    out.

    Args:
        case: Its ``generation`` prompts are written on from.
        metrics: Of `TEXT_METRICS`.
        length: Tokens of a text.
        seed: Of the sampling.
    """
    found: dict[TextMetric, float] = {}
    written: list[str] = []
    if case.generation and ("FL" in metrics or ("reference" in metrics and case.references)):
        written = generate(model, case.generation, length, seed=seed)
    if written and "FL" in metrics:
        found["FL"] = fluency(written)
    if written and "reference" in metrics and case.references:
        found["reference"] = reference_score(written, case.references)
    if "perplexity" in metrics:
        found["perplexity"] = perplexity(model)
    return found


def ngram_entropy(text: str) -> float:
    """Mean of the weighted entropies of a text's 2- and 3-grams of words, in bits.

    ``(2/3 H_2 + 4/3 H_3) / 2``; text that repeats itself has little. 0 where there is none. Words
    are those of ``nltk.word_tokenize``, sentence by sentence, but for abbreviations: sentences are
    split by Punkt without its English training, which would have to be downloaded.
    """
    tokenize = NLTKWordTokenizer().tokenize
    words = [word for part in PunktSentenceTokenizer().tokenize(text) for word in tokenize(part)]
    total = 0.0
    for n, weight in N_GRAMS.items():
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        everything = sum(counts.values())
        total += weight * sum(
            -count / everything * math.log2(count / everything) for count in counts.values()
        )
    return total / len(N_GRAMS)


def fluency(texts: Sequence[str]) -> float:
    """FL: the mean n-gram entropy of texts, times 100.

    Raises:
        RequestError: If there is no text.
    """
    if not texts:
        raise RequestError("There is no text.", "Give at least one.")
    return 100 * sum(map(ngram_entropy, texts)) / len(texts)


def reference_score(texts: Sequence[str], references: Sequence[str]) -> float:
    """RS in ROME's paper: how much texts, all together, are like reference texts; in per cent.

    The cosine of their TF-IDF vectors; inverse document frequencies are those of the bundled
    Wikipedia leads.

    Raises:
        RequestError: If there is no text, or no reference.
    """
    if not texts or not references:
        raise RequestError("There is no text to compare.", "Give texts and references.")
    both = _vectorizer().transform([" ".join(texts), " ".join(references)])
    return 100 * float((both[0] @ both[1].T).toarray()[0, 0])


@functools.cache
def _leads() -> list[str]:
    return wikipedia_leads()


@functools.cache
def _vectorizer() -> Any:
    # It takes a second to import.
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer().fit(_leads())


def perplexity(model: LensModel, texts: Sequence[str] | None = None, tokens: int = 64) -> float:
    """Perplexity of the model, as it is now, over texts: exp of the mean loss of their tokens.

    Args:
        texts: By default the last of the bundled Wikipedia leads.
        tokens: Of each text, at most.

    Raises:
        RequestError: If no text has two tokens.
    """
    texts = _leads()[-PERPLEXITY_TEXTS:] if texts is None else texts
    total, counted = 0.0, 0
    for text in texts:
        ids = model.tokens.encode(text).ids[:tokens]
        if len(ids) < 2:
            continue
        with torch.no_grad():
            logits = model.run(torch.tensor([ids]))[0, :-1].float()
        total += float(
            torch.nn.functional.cross_entropy(
                logits, torch.tensor(ids[1:], device=logits.device), reduction="sum"
            )
        )
        counted += len(ids) - 1
    if not counted:
        raise RequestError("No text has two tokens.", "Give longer texts.")
    return math.exp(min(total / counted, 700.0))
