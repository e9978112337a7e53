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
from itertools import chain, islice
from typing import Any

import torch
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer
from transformers import GenerationConfig, LogitsProcessorList

from driftlens.cases import TEXT_METRICS, Case, TextMetric, check_metrics
from driftlens.editing.statistics import wikipedia_leads
from driftlens.edits import Edit
from driftlens.errors import ModelError, RequestError, as_integer
from driftlens.models import LensModel
from driftlens.reuse import budget, in_batches
from driftlens.side_by_side import side_by_side

N_GRAMS = {2: 2 / 3, 3: 4 / 3}
"""Lengths of n-grams, and the weights of their entropies in the mean."""

MEMORY_BUDGET = 2**30
"""Bytes of keys and values that texts may have which are written at once on the CPU."""

Rows = list[list[int]]
"""Token ids of some prompts."""

PERPLEXITY_TEXTS = 8
"""How many of the Wikipedia leads perplexity is taken over: the last, which come in no
covariance of the default size."""


def generate(
    model: LensModel, prompts: Sequence[str], length: int = 100, top_k: int = 5, seed: int = 0
) -> list[str]:
    """What the model, as it is now, writes on from each prompt, with the prompt.

    Args:
        prompts: Beginnings; a string is one.
        length: Tokens of a text, the prompt's included. An end token does not end it, and is left
            out, as in ROME's code: else texts that end early would have a low fluency.
        top_k: From how many of the likeliest tokens each is sampled.
        seed: Of the sampling; the global random state is neither used nor changed.

    Raises:
        RequestError: If there is no prompt, one leaves no room to write, texts are to be longer
            than the model's context, or ``top_k`` is not at least 1.
        ModelError: If the model's logits are not finite.
    """
    return generate_each(model, [_texts_of(prompts)], length=length, top_k=top_k, seed=seed)[0]


def generate_each(
    model: LensModel,
    groups: Sequence[Sequence[str]],
    edits: Sequence[Edit | None] | None = None,
    length: int = 100,
    top_k: int = 5,
    seed: int = 0,
) -> list[list[str]]:
    """The same for several groups of prompts at once, each written on by a model with its own edit.

    A group's texts are those that it would have alone, but for the last bits of the logits. Reading
    the weights is most of the work, and is done once for all.

    Args:
        groups: Beginnings; a string is a group of one.
        edits: Of each group; ``None`` is the model as it is now.
        length: As in :func:`generate`.
        top_k: As there.
        seed: Of the sampling, which begins anew with each group.

    Raises:
        RequestError: If a group has no prompt, one leaves no room to write, texts are to be longer
            than the model's context, ``top_k`` is not at least 1, or there is not one edit for each
            group.
        EditError: If an edit was made for other weights, or can only be applied to the whole model
            (:func:`~driftlens.side_by_side.fits_beside_others`).
        ModelError: If a model's logits are not finite.
    """
    if isinstance(groups, str):
        raise RequestError(
            f"The groups of prompts are one text, {groups[:60]!r}.", "Give a list of groups."
        )
    if not groups or not all(groups):
        raise RequestError("There is no prompt to write on from.", "Give at least one.")
    groups = [_texts_of(group) for group in groups]
    length, top_k, seed = (as_integer(*given) for given in
                           (("length", length), ("top_k", top_k), ("seed", seed)))  # fmt: skip
    if top_k < 1:
        raise RequestError(f"top_k is {top_k}.", "Give at least 1.")
    if edits is not None and len(edits) != len(groups):
        raise RequestError(
            f"There are {len(edits)} edits for {len(groups)} groups of prompts.",
            "Give one for each group, None where there is none.",
        )
    if length > model.info.n_ctx:
        raise RequestError(
            f"Texts of {length} tokens are longer than the {model.info.n_ctx} of "
            f"{model.info.name}.",
            "Give a smaller length.",
        )
    rows = [[model.tokens.encode(prompt).ids for prompt in group] for group in groups]
    for row, prompt in zip(chain(*rows), chain(*groups), strict=True):
        if len(row) >= length:
            raise RequestError(
                f"The prompt {prompt[:60]!r} has {len(row)} tokens, and the text {length}.",
                "Give a shorter prompt, or a larger length.",
            )
    pairs = [*zip(rows, [None] * len(groups) if edits is None else edits, strict=True)]

    def run(pairs: Sequence[tuple[Rows, Edit | None]]) -> list[list[str]]:
        sampler = _Sampler([len(own) for own, _ in pairs], top_k, seed)
        return _write_on(model, [own for own, _ in pairs], [e for _, e in pairs], sampler, length)

    per_text = 2 * 4 * length * model.info.n_layers * model.info.n_kv_heads * model.info.d_head
    size = budget(model, MEMORY_BUDGET) // (per_text * max(map(len, groups)))
    return [texts for part in in_batches(pairs, max(size, 1), run) for texts in part]


def _write_on(
    model: LensModel,
    groups: Sequence[Rows],
    edits: Sequence[Edit | None],
    sampler: _Sampler,
    length: int,
) -> list[list[str]]:
    """One batch of texts.

    All are written on token by token until the last is long enough. Where the longest would leave
    the model's context by then, it is left out as soon as it is long enough itself.
    """
    written = [*chain(*groups)]
    group_of = [i for i, rows in enumerate(groups) for _ in rows]
    while going := [i for i, ids in enumerate(written) if len(ids) < length]:
        lengths = [len(written[i]) for i in going]
        steps = min(length - min(lengths), model.info.n_ctx + 1 - max(lengths))
        counts = Counter(group_of[i] for i in going)
        sampler.going = going
        with (
            torch.no_grad(),
            side_by_side(model, edits, [counts[i] for i in range(len(groups))]),
            _plainly(model),
        ):
            new = _continued(model, [written[i] for i in going], sampler, steps)
        for i, ids in zip(going, new, strict=True):
            written[i] = (written[i] + ids)[:length]
    texts = iter(model.tokens.decode(_text(model, ids)) for ids in written)
    return [list(islice(texts, len(group))) for group in groups]


def _continued(model: LensModel, rows: Rows, sampler: _Sampler, steps: int) -> Rows:
    """So many tokens that come after each row."""
    pad, width = model.tokens.pad_id, max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    written = model.hf_model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), pad_token_id=pad,
        max_new_tokens=steps, logits_processor=LogitsProcessorList([sampler]),
    )  # fmt: skip
    return [out[width:].tolist() for out in written]


class _Sampler:
    """Samples, and leaves the sampled token as the likeliest, so that each group of rows has a
    random state of its own: adding Gumbel noise to the logits and taking the largest is sampling.

    ``going`` are the rows that are still written on; the others draw noise all the same, so that a
    text does not depend on when others end.
    """

    def __init__(self, counts: Sequence[int], top_k: int, seed: int) -> None:
        self.top_k = top_k
        self.going = [*range(sum(counts))]
        self.groups = [(count, torch.Generator().manual_seed(seed)) for count in counts]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        likeliest = scores.float().topk(min(self.top_k, scores.shape[-1]))
        if not likeliest.values.isfinite().all():
            raise ModelError(
                "What the model says next is not finite.",
                "Look at the edit's norm. (In float64, prompts of different lengths fail on some "
                "models: load it in float32.)",
            )
        kept = likeliest.values.shape[-1]
        noise = torch.cat([
            -torch.empty(count, kept).exponential_(generator=generator).log()
            for count, generator in self.groups
        ])[self.going]  # fmt: skip
        chosen = (likeliest.values + noise.to(scores.device)).argmax(-1, keepdim=True)
        chosen = likeliest.indices.gather(-1, chosen)
        return torch.full_like(scores, -math.inf).scatter(-1, chosen, 0.0)


@contextmanager
def _plainly(model: LensModel) -> Iterator[None]:
    """Inside, the likeliest token is written after what :class:`_Sampler` does, and no token ends a
    text, whatever a checkpoint's own generation settings say. (Arguments could not say so: a
    checkpoint's settings stand in for those that are ``None``.)"""
    kept = model.hf_model.generation_config
    model.hf_model.generation_config = GenerationConfig(do_sample=False, num_beams=1)
    try:
        yield
    finally:
        model.hf_model.generation_config = kept


def _texts_of(given: str | Sequence[str]) -> list[str]:
    """Texts, of which a string is one and no list of letters."""
    return [given] if isinstance(given, str) else list(given)


def _text(model: LensModel, ids: Sequence[int]) -> list[int]:
    """Without the tokens that begin and end texts."""
    special = set(model.tokenizer.all_special_ids)
    return [token for token in ids if token not in special]


def are_written(case: Case, metrics: Collection[TextMetric]) -> bool:
    """Whether measures of a case need texts that the model writes."""
    wanted = "FL" in metrics or ("reference" in metrics and bool(case.references))
    return wanted and bool(case.generation)


def measure_texts(
    model: LensModel,
    case: Case,
    metrics: Collection[TextMetric] = tuple(TEXT_METRICS),
    length: int = 100,
    seed: int = 0,
    written: Sequence[str] | None = None,
) -> dict[TextMetric, float]:
    """Measures of text of the model as it is now; those that the case has nothing for are left
    out.

    Args:
        case: Its ``generation`` prompts are written on from.
        metrics: Of `TEXT_METRICS`.
        length: Tokens of a text.
        seed: Of the sampling.
        written: The texts, if they have been written already (:func:`generate_each`).
    """
    check_metrics(metrics, TEXT_METRICS)
    found: dict[TextMetric, float] = {}
    if written is None and are_written(case, metrics):
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
    """FL: the mean n-gram entropy of texts, times 100; a string is one text.

    Raises:
        RequestError: If there is no text.
    """
    if not texts:
        raise RequestError("There is no text.", "Give at least one.")
    texts = _texts_of(texts)
    return 100 * sum(map(ngram_entropy, texts)) / len(texts)


def reference_score(texts: Sequence[str], references: Sequence[str]) -> float:
    """RS in ROME's paper: how much texts, all together, are like reference texts; in per cent. A
    string is one text.

    The cosine of their TF-IDF vectors; inverse document frequencies are those of the bundled
    Wikipedia leads.

    Raises:
        RequestError: If there is no text, or no reference.
    """
    if not texts or not references:
        raise RequestError("There is no text to compare.", "Give texts and references.")
    both = _vectorizer().transform([" ".join(_texts_of(given)) for given in (texts, references)])
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
        texts: A string is one; by default the last of the bundled Wikipedia leads.
        tokens: Of each text, at most.

    Raises:
        RequestError: If no text has two tokens.
    """
    texts = _leads()[-PERPLEXITY_TEXTS:] if texts is None else _texts_of(texts)
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
