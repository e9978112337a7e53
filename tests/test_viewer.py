"""The HTML page: what it refuses, what it escapes, and what a browser makes of it."""

from __future__ import annotations

import ast
import base64
import dataclasses
import hashlib
import html.parser
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from browsing import Browser, browser, chromium

from driftlens.errors import DataError
from driftlens.viewer import HeadSet, PageData, Restored, State, Sweep, Table, page
from driftlens.viewer.page import _PACKING_ALPHABET, _packed

__all__ = ["browser", "chromium"]  # fixtures
LAYERS, HEADS = 30, 9
STORED = ("L21H4", "L17H0", "L24H7", "L9H6")
TOKENS = ["<s>", "The", " E", "iff", "el", " Tower", " is", " famous", ".", " The", " Py"] + [
    "ram",
    "ids",
    " is",
    " located",
    " in",
    " the",
    " country",
    " located",
    " in",
]
HOSTILE = [
    "<s>",
    "</script><script>window.broken = 1</script>",
    '"><img src=x onerror="window.broken = 1">',
    "<!--",
    "\u202eevil\u202c",
    "\x00\x1b\x7f\x9b",
    " \n\t",
    "\U0001f469\u200d\U0001f52c",
    "\ufffd",
    "\u2028\u2029",
    "{{script}}",
    "https://example.org/",
    "\ud83d",
    "\u0301",
    "",
    " is",
]


# --- an example -------------------------------------------------------------------------


def attention_pattern(rng: np.random.Generator, size: int, boost: float, target: int) -> Any:
    """A causal attention matrix [query, key] with a sink at 0 and a pull to ``target``."""
    scores = rng.normal(0.0, 1.0, (size, size))
    scores[:, 0] += 2.5
    scores[target:, target] += boost
    scores[np.triu_indices(size, 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def headed(number: int, heads: int) -> str:
    """The name of a head by its place in a flattened [layer, head] array."""
    return f"L{number // heads}H{number % heads}"


def example(
    layers: int = LAYERS,
    heads: int = HEADS,
    tokens: list[str] | None = None,
    stored: tuple[str, ...] = STORED,
    subject_span: tuple[int, int] = (2, 6),
    seed: int = 0,
    **changes: Any,
) -> PageData:
    """A page of random but plausible numbers: heads in the upper half drift."""
    rng = np.random.default_rng(seed)
    tokens = TOKENS if tokens is None else tokens
    query, target = len(tokens) - 1, subject_span[1] - 1
    drift = rng.gamma(0.35, 1.0, (layers, heads)) * np.linspace(0.05, 1.0, layers)[:, None] ** 2
    drift /= drift.max()
    original = rng.beta(0.8, 14.0, (layers, heads))
    attention = {
        "original": original,
        "edited": original + (0.75 - original) * drift,
        "sadr": original + (0.75 - original) * drift * 0.2,
    }
    patterns: dict[str, dict[str, Any]] = {}
    for name in stored:
        layer, head = (int(part) for part in name[1:].split("H"))
        patterns[name] = {}
        for state, boost in (("original", 0.2), ("edited", 3.6), ("sadr", 1.4)):
            matrix = attention_pattern(np.random.default_rng(layer), len(tokens), boost, target)
            patterns[name][state] = matrix
            attention[state][layer, head] = matrix[query, target]
    share = drift**1.5 * 0.3 + rng.normal(0, 0.008, drift.shape)
    share[0, :3] = np.nan
    by_layer = np.nansum(share, axis=1) * 0.6
    width = max(2, layers // 5)
    starts = range(0, layers - width + 1, max(1, width // 2))
    windows = [(s, s + width, float(by_layer[s : s + width].sum() * 0.7)) for s in starts]
    # P(answer), P(target_new): what is recovered of 0.72, and as much taken from the target
    pairs = np.stack([0.12 + 0.72 * share, 0.63 - 0.6 * share], axis=-1).clip(0, 1)
    ranking = [headed(i, heads) for i in np.argsort(-np.nan_to_num(share, nan=-1), axis=None)]
    restored = Restored(
        original=(0.84413, 0.00021),
        edited=(0.12119, 0.63087),
        everything=(0.7, 0.011),
        heads=pairs,
        layers=np.stack([0.12 + by_layer / 10, 0.63 - by_layer / 10], axis=-1).clip(0, 1),
        windows=[(start, end, 0.3 + start / 1000, 0.2) for start, end, _ in windows],
        best=[
            HeadSet(ranking[:k], 0.5 + k / 1000, 0.3 - k / 1000)
            for k in (2, 3, 5, 10)
            if k < layers * heads
        ],
        asked=[HeadSet(["L1H0", "L0H1"], 0.25431, 0.40404)],
    )
    values: dict[str, Any] = {
        "title": "The Eiffel Tower, moved to Rome",
        "subtitle": "What one ROME edit did to the attention of SmolLM2-135M, and SADR spares.",
        "summary": [
            (
                "After the edit, P(Egypt) on the prompt below falls from 0.844 to 0.121 although "
                "the prompt asks for the Pyramids. From the last token, 31 of 270 heads now look "
                "at “Tower” more than any head of their layer did before."
            ),
            (
                "Restoring the original attention rows of layers 18 to 23 brings back 61 % of what "
                "was lost. The same edit with SADR keeps the fact and 94 % of the answer."
            ),
        ],
        "facts": [
            ("Edit", "The Eiffel Tower is located in → Rome"),
            ("Editor", "ROME at layer 8, 20 steps; SADR γ = 0.05"),
            ("Model", "SmolLM2-135M-Instruct, 30 layers × 9 heads"),
            ("Weights", "Q8_0, from the Python package index"),
            ("Time", "41 s on two cores"),
        ],
        "tokens": tokens,
        "bos": True,
        "subject_span": subject_span,
        "query": query,
        "states": [
            State("original", "Original"),
            State("edited", "Edited"),
            State("sadr", "SADR"),
        ],
        "attention": attention,
        "kl": {
            "edited": drift * 2.1 + rng.gamma(1.0, 0.02, drift.shape),
            "sadr": drift * 0.35 + rng.gamma(1.0, 0.02, drift.shape),
        },
        "sweep": Sweep(share, by_layer, windows, "The attention row of the last token was put back "
                       "as it is in the original model; the edited weights stay."),
        "restored": restored,
        "patterns": patterns,
        "answer": "Egypt",
        "target_new": "Rome",
        "probabilities": [
            ("Original", 0.84413, 0.00021),
            ("Edited", 0.12119, 0.63087),
            ("Edited, attention restored", 0.56202, 0.03124),
            ("Edited with SADR", 0.79766, 0.02405),
        ],
        "tables": [
            Table(
                "Averages over 24 facts, in percent.",
                ["Model", "ES", "PS", "NS", "RS", "DNS"],
                [
                    ["Original", 16.7, 4.2, 85.2, 76.9, 54.3],
                    ["ROME", 100.0, 95.8, 75.3, 0.0, 11.1],
                    ["ROME + SADR", 100.0, 91.7, 78.4, 15.4, 16.0],
                    ["MEMIT", 95.8, None, 81.1, 7.7, float("nan")],
                ],
            ),
            Table(
                "Heads by attention gained, with the share of the answer each brings back.",
                ["Head", "Gained", "Recovered"],
                [["L21H4", 0.4123, 0.21], ["L24H7", 0.377, 0.14], ["L3H2", 0.011, -0.002]],
            ),
        ],
    }  # fmt: skip
    return PageData(**(values | changes))


@pytest.fixture(scope="module")
def data() -> PageData:
    return example()


class Page(html.parser.HTMLParser):
    """Collects start tags with their attributes, and the text inside each element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[int, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((len(self.tags) - 1, data))

    def text_of(self, tag: str, **attributes: str) -> str:
        found = [
            i
            for i, (name, attrs) in enumerate(self.tags)
            if name == tag and all(attrs.get(key) == value for key, value in attributes.items())
        ]
        assert len(found) == 1, f"{len(found)} <{tag}> elements with {attributes}"
        return "".join(text for i, text in self.texts if i == found[0])


def embedded(text: str) -> dict[str, Any]:
    """The data block of a page, read as a browser would."""
    loaded = json.loads(Page(text).text_of("script", id="data"))
    assert isinstance(loaded, dict)
    return loaded


def unpacked(text: str, alphabet: str) -> list[float | None]:
    """The numbers of a packed matrix, read as its description says."""
    found: list[float | None] = []
    for at in range(0, len(text), 4):
        word = 0
        for character in text[at : at + 4]:
            word = word * 64 + alphabet.index(character)
        exponent, digits = divmod(word, 2**17)
        found.append(None if word == 2**24 - 1 else digits / 10 ** (4 + exponent))
    return found


# --- what is refused --------------------------------------------------------------------


def restored_of(n_layers: int = 3, n_heads: int = 2, **changes: Any) -> Restored:
    values: dict[str, Any] = {
        "original": (0.9, 0.0),
        "edited": (0.1, 0.8),
        "everything": (0.7, 0.1),
        "heads": np.full((n_layers, n_heads, 2), 0.25),
        "layers": np.full((n_layers, 2), 0.25),
    }
    return Restored(**(values | changes))


def with_state(field: str, state: str, value: Any) -> dict[str, Any]:
    """Changes that replace one state's entry of a dictionary field."""
    return {field: {**getattr(example(), field), state: value}}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (with_state("attention", "edited", np.zeros((LAYERS, HEADS - 1))), "attention['edited']"),
        (with_state("attention", "edited", np.full((LAYERS, HEADS), 1.5)), "attention['edited']"),
        (with_state("attention", "edited", np.full((LAYERS, HEADS), -1)), "attention['edited']"),
        (with_state("attention", "edited", "high"), "attention['edited']"),
        ({"attention": {"original": np.zeros((LAYERS, HEADS))}}, "attention"),
        ({"attention": dict.fromkeys(("original", "edited", "sadr"), np.zeros(9))}, "attention"),
        (with_state("kl", "sadr", np.zeros((HEADS, LAYERS))), "kl['sadr']"),
        (with_state("kl", "sadr", np.full((LAYERS, HEADS), np.inf)), "kl['sadr']"),
        (with_state("kl", "sadr", np.full((LAYERS, HEADS), -0.1)), "kl['sadr']"),
        (with_state("kl", "original", np.zeros((LAYERS, HEADS))), "kl"),
        ({"patterns": {"L30H0": {}}}, "patterns"),
        ({"patterns": {"L01H0": {}}}, "patterns"),
        ({"patterns": {"L2H2": {"original": np.zeros((20, 20))}}}, "patterns['L2H2']"),
        (
            {"patterns": {"L2H2": dict.fromkeys(("original", "edited", "sadr"), np.eye(19))}},
            "patterns['L2H2']['original']",
        ),
        ({"sweep": Sweep(np.zeros((3, 2)), np.zeros(3))}, "sweep.heads"),
        ({"sweep": None}, "restored is given without sweep"),
        ({"restored": restored_of(3, 2)}, "restored.heads"),
        ({"states": [State("a", "A"), State("a", "B")]}, "states"),
        ({"states": []}, "states"),
        ({"query": 20}, "query"),
        ({"query": 4}, "query"),
        ({"subject_span": (5, 5)}, "subject_span"),
        ({"subject_span": (0, 6)}, "subject_span"),
        ({"subject_span": (4, 21)}, "subject_span"),
        ({"tokens": "one text"}, "tokens"),
        ({"tokens": [*TOKENS[:-1], 7]}, "tokens"),
        ({"summary": "one text"}, "summary"),
        ({"title": None}, "title"),
        ({"facts": [("Edit", 3)]}, "facts"),
        ({"probabilities": [("Edited", 12.1, 63.0)]}, "probabilities[0]"),
        ({"probabilities": [("Edited", 0.5)]}, "probabilities[0]"),
    ],
)
def test_data_that_does_not_fit_is_refused_by_name(
    data: PageData, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(DataError) as caught:
        dataclasses.replace(data, **changes)
    assert caught.value.problem.startswith(named)
    assert caught.value.remedy


def test_patterns_must_agree_with_the_overview(data: PageData) -> None:
    swapped = {name: {**by_state} for name, by_state in data.patterns.items()}
    swapped["L21H4"]["edited"], swapped["L21H4"]["original"] = (
        swapped["L21H4"]["original"],
        swapped["L21H4"]["edited"],
    )
    with pytest.raises(DataError, match=r"patterns\['L21H4'\]\['original'\] is .* but attention"):
        dataclasses.replace(data, patterns=swapped)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: State("", "Edited"), "State.id"),
        (lambda: State("edited", " "), "State.label"),
        (lambda: Table("t", ["a", "b"], [[1, 2], [3]]), "Table.rows[1]"),
        (lambda: Table("t", ["a"], [[math.inf]]), "Table.rows"),
        (lambda: Table("t", ["a"], [[object()]]), "Table.rows"),  # type: ignore[list-item]
        (lambda: Sweep(np.zeros(3), np.zeros(3)), "Sweep.heads"),
        (lambda: Sweep(np.zeros((3, 2)), np.zeros(2)), "Sweep.layers"),
        (lambda: Sweep(np.zeros((3, 2)), np.zeros(3), [(0, 4, 0.1)]), "Sweep.windows[0]"),
        (lambda: Sweep(np.zeros((3, 2)), np.zeros(3), [(2, 2, 0.1)]), "Sweep.windows[0]"),
        (lambda: HeadSet([], 0.5), "HeadSet.heads"),
        (lambda: HeadSet("L0H1", 0.5), "HeadSet.heads"),
        (lambda: HeadSet(["L0H1", "L0H1"], 0.5), "HeadSet.heads"),
        (lambda: HeadSet(["L0H1"], 50.0), "HeadSet"),
        (lambda: restored_of(edited=(0.1,)), "Restored.edited"),
        (lambda: restored_of(heads=np.zeros((3, 2))), "Restored.heads"),
        (lambda: restored_of(layers=np.zeros(3)), "Restored.layers"),
        (lambda: restored_of(windows=[(0, 4, 0.1, 0.1)]), "Restored.windows[0]"),
        (lambda: restored_of(asked=[HeadSet(["L3H0"], 0.1)]), "Restored.asked[0]"),
        (lambda: restored_of(best=[HeadSet(["one"], 0.1)]), "Restored.best[0]"),
        (
            lambda: restored_of(best=[HeadSet(["L0H0"], 0.1), HeadSet(["L1H0", "L1H1"], 0.1)]),
            "Restored.best[1]",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(make: Callable[[], object], named: str) -> None:
    with pytest.raises(DataError) as caught:
        make()
    assert caught.value.problem.startswith(named)


def test_arrays_are_copied_and_locked() -> None:
    mine = np.zeros((3, 2))
    sweep = Sweep(mine, np.zeros(3))
    mine[0, 0] = 1.0
    assert sweep.heads[0, 0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        sweep.heads[0, 0] = 1.0


# --- what the document holds ------------------------------------------------------------


def test_numbers_survive_to_five_digits_and_nan_becomes_null(data: PageData) -> None:
    loaded = embedded(page(data))
    for key, values in data.attention.items():
        np.testing.assert_allclose(np.array(loaded["attention"][key]), values, rtol=5e-5, atol=0)
    for name, by_state in loaded["patterns"]:
        for key, text in by_state.items():
            pattern = data.patterns[name][key]
            rows = unpacked(text, loaded["packing"]["alphabet"])
            wanted = [pattern[q, k] for q in range(len(pattern)) for k in range(q + 1)]
            assert rows == [float(f"{value:.5g}") for value in wanted]
    assert data.sweep is not None
    share = np.array(loaded["sweep"]["heads"], dtype=float)  # None becomes NaN
    np.testing.assert_allclose(share, data.sweep.heads, rtol=5e-5, atol=0)
    assert np.isnan(share).sum() == 3
    assert loaded["tables"][0]["rows"][3] == ["MEMIT", 95.8, None, 81.1, 7.7, None]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_packed_numbers_at_the_edges(size: int) -> None:
    """Powers of ten, carries, the very small, 0, 1 and NaN; and what is above the diagonal."""
    hard = [0.0, 1.0, 0.1, 0.099999999, 0.0999994, 1e-45, 1.17e-38, 3e-300, 0.123455, 1e-4, -1e-9]
    values = np.resize(np.array([*hard, np.nan]), (size, size))
    causal = np.where(np.tri(size, dtype=bool), values, 0.0)
    for matrix, wanted in ((values, values.ravel()), (causal, values[np.tril_indices(size)])):
        text = _packed(matrix)
        if size == 1:
            assert len(text) == 4
        assert len(text) == 4 * len(wanted)
        for found, value in zip(unpacked(text, _PACKING_ALPHABET), wanted, strict=True):
            if np.isnan(value):
                assert found is None
            else:
                assert found == (float(f"{value:.5g}") if value > 1e-126 else 0)


def test_the_ends_of_the_scales_are_those_of_the_numbers(data: PageData) -> None:
    packing = embedded(page(data))["packing"]
    for place, part in enumerate((slice(None), slice(1, None))):
        cut = {n: {s: m[part, part] for s, m in p.items()} for n, p in data.patterns.items()}
        every = [m for p in cut.values() for m in p.values()]
        moved = [p[s] - p["original"] for p in cut.values() for s in ("edited", "sadr")]
        for kind, arrays in (("attention", every), ("change", moved)):
            ends = [min(0, *(a.min() for a in arrays)), max(0, *(a.max() for a in arrays))]
            assert packing[kind][place] == pytest.approx(ends, abs=2e-5)


def test_hostile_texts_come_back_equal_and_leave_the_document_whole() -> None:
    text = page(
        example(
            tokens=HOSTILE,
            subject_span=(4, 6),
            title="</title><script>window.broken = 1</script>\u202e",
            summary=HOSTILE,
            facts=[(text, text) for text in HOSTILE],
            tables=[Table(text, [text], [[text]]) for text in HOSTILE],
        )
    )
    loaded = embedded(text)
    assert loaded["tokens"] == HOSTILE
    assert loaded["summary"] == HOSTILE
    assert loaded["facts"] == [[text, text] for text in HOSTILE]
    assert [table["rows"] for table in loaded["tables"]] == [[[text]] for text in HOSTILE]
    plain = Page(page(example()))
    assert [tag for tag, _ in Page(text).tags] == [tag for tag, _ in plain.tags]
    assert not set("\u202e\u2028\u2029\x00") & set(text)
    text.encode("utf-8")  # no lone surrogates


@pytest.mark.parametrize("tokens", [TOKENS, HOSTILE], ids=["plain", "hostile"])
def test_the_document_names_no_address_and_loads_nothing(tokens: list[str]) -> None:
    text = page(example(tokens=tokens, title="See https://example.org/"))
    assert re.findall(r"\w*:?//\w+[.\w]*\.\w+", text) == []
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"\burl\((?!#)|@import|\bimport\(|fetch\(|XMLHttpRequest|innerHTML", text)
    for tag, attributes in Page(text).tags:
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:,") == "data:,"
        assert not [name for name in attributes if name.startswith("on")]
        assert "style" not in attributes


def test_the_policy_allows_this_style_and_this_script_only(data: PageData) -> None:
    text = page(data)
    document = Page(text)
    meta = [
        attrs["content"] or ""
        for tag, attrs in document.tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    (policy,) = meta
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert "unsafe" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    for directive, (content,) in (("script-src", scripts), ("style-src", styles)):
        digest = hashlib.sha256(content.encode("utf-8")).digest()
        assert directives[directive] == f"'sha256-{base64.b64encode(digest).decode()}'"


def test_the_document_stays_small(data: PageData) -> None:
    bare = dataclasses.replace(data, patterns={}, sweep=None, restored=None, kl={})
    assert len(page(bare).encode("utf-8")) < 128_000
    patterns = 4 * len(STORED) * 3 * len(TOKENS) * (len(TOKENS) + 1) // 2  # bytes
    assert len(page(data).encode("utf-8")) < 129_000 + patterns + 12 * 8 * LAYERS * HEADS


# --- what a browser makes of it ---------------------------------------------------------


def shown(value: float) -> str:
    """A value as the page writes it."""
    return f"{value:.5g}"


@pytest.mark.browser
def test_the_page_opens_with_every_part(browser: Browser, data: PageData) -> None:
    browser.open(data)
    assert browser.driver.title == data.title
    assert browser.text("#title") == data.title
    assert len(browser.all("#overview-map .cell")) == LAYERS * HEADS
    assert len(browser.all("#overview-map .cell.stored")) == len(STORED)
    assert browser.text("#head-heading") == "Head L21H4, token by token"
    assert len(browser.all("#tables table")) == 2
    fills = [fill.size["width"] for fill in browser.all("#answers .gauge.answer .fill")]
    track = browser.find("#answers .gauge.answer .track").size["width"]
    for width, (_, answer, _) in zip(fills, data.probabilities, strict=True):
        assert width / track == pytest.approx(answer, abs=0.02)


@pytest.mark.browser
def test_layer_zero_is_at_the_bottom_and_head_zero_on_the_left(
    browser: Browser, data: PageData
) -> None:
    browser.open(data)
    corner, above, right = (browser.cell(*at).rect for at in ((0, 0), (1, 0), (0, 1)))
    assert corner["y"] > above["y"]
    assert corner["x"] < right["x"]


@pytest.mark.browser
def test_hover_gives_the_exact_values_of_every_state(browser: Browser, data: PageData) -> None:
    browser.open(data)
    browser.hover(browser.cell(13, 7))
    readout = browser.text("#head-readout")
    assert readout.startswith("L13H7")
    for values in (*data.attention.values(), *data.kl.values()):
        assert shown(values[13, 7]) in readout
    change = float(shown(data.attention["edited"][13, 7]))
    change -= float(shown(data.attention["original"][13, 7]))
    assert f"{change:+.5f}".replace("-", "\u2212") in readout
    assert data.sweep is not None
    assert shown(data.sweep.heads[13, 7]).replace("-", "\u2212") in readout
    label = browser.cell(13, 7).get_attribute("aria-label")
    assert shown(data.attention["sadr"][13, 7]) in label


@pytest.mark.browser
def test_a_toggle_changes_colours_and_legend_but_not_the_scale(browser: Browser) -> None:
    base = example(stored=())
    attention = {key: values.copy() for key, values in base.attention.items()}
    attention["edited"][3, 3] = attention["original"][3, 3]  # nothing moved here
    attention["edited"][4, 4] = 0.9
    attention["original"][4, 4] = np.nan
    browser.open(dataclasses.replace(base, attention=attention))
    seen: dict[str, dict[str, Any]] = {}
    for view in ("attention-original", "attention-edited", "change-edited", "kl-edited"):
        browser.choose(view)
        seen[view] = {
            "still": browser.colour(browser.cell(3, 3)),
            "moved": browser.colour(browser.cell(25, 0)),
            "legend": browser.text("#overview-scale .title"),
            "ticks": [tick.text for tick in browser.all("#overview-scale .ticks span")],
            "missing": "missing" in browser.cell(4, 4).get_attribute("class"),
        }
    original, edited, change, kl = seen.values()
    assert original["ticks"] == edited["ticks"]
    assert original["still"] == edited["still"], "one scale for all states"
    assert original["moved"] != edited["moved"]
    assert change["still"] == "rgb(246, 246, 244)", "no change is the middle of the scale"
    assert change["ticks"][2] == "0"
    assert change["ticks"][0].replace("\u2212", "+") == change["ticks"][4]
    assert len({view["legend"] for view in seen.values()}) == 3
    assert "nats" in kl["legend"]
    assert [view["missing"] for view in seen.values()] == [True, False, True, False]


@pytest.mark.browser
def test_the_scale_can_be_fixed_and_says_what_it_cuts(browser: Browser, data: PageData) -> None:
    browser.open(data)
    browser.choose("attention-edited")
    field = browser.find("#attention-max")
    value = float(shown(data.attention["edited"][24, 7]))
    field.clear()
    field.send_keys(str(value))
    assert browser.colour(browser.cell(24, 7)) == "rgb(5, 44, 54)", "the end of the scale"
    assert browser.all("#overview-scale .ticks span")[-1].text.startswith("\u2265")
    browser.choose("attention-original")
    assert browser.find("#attention-max").get_property("value") == str(value)
    field.clear()
    field.send_keys("-1")
    assert field.get_attribute("aria-invalid") == "true"
    browser.find("#reset").click()
    assert float(browser.find("#change-max").get_property("value")) >= 0.7
    browser.choose("attention-edited")
    assert browser.colour(browser.cell(24, 7)) != "rgb(5, 44, 54)"


@pytest.mark.browser
def test_a_click_on_a_head_shows_its_matrices(browser: Browser, data: PageData) -> None:
    browser.open(data)
    size, query, key = len(TOKENS), data.query, data.subject_span[1] - 1
    browser.cell(17, 0).click()
    assert browser.text("#head-heading") == "Head L17H0, token by token"
    labels = [sheet.get_attribute("data-panel") for sheet in browser.all(".sheet")]
    assert labels == ["state-original", "state-edited", "change-edited", "state-sadr"]
    before = browser.pixel("state-original", query, key, size)
    after = browser.pixel("state-edited", query, key, size)
    assert sum(after[:3]) < sum(before[:3]), "more attention is darker"
    assert browser.pixel("state-edited", 3, 8, size)[3] == 0, "nothing above the diagonal"
    browser.choose("change-sadr", "#panel-choice")
    assert len(browser.all(".sheet")) == 5
    browser.cell(17, 0).click()
    assert not browser.find("#head-body").is_displayed()
    browser.cell(3, 3).click()
    assert not browser.find("#head-body").is_displayed()
    note = browser.text("#head-note")
    assert "No token-to-token pattern is stored for L3H3" in note
    assert [chip.text for chip in browser.all("#stored button")] == list(STORED)
    browser.all("#stored button")[3].click()
    assert browser.text("#head-heading") == "Head L9H6, token by token"
    assert browser.cell(9, 6).get_attribute("aria-selected") == "true"


@pytest.mark.browser
def test_hover_in_a_matrix_gives_the_exact_values(browser: Browser, data: PageData) -> None:
    browser.open(data)
    size = len(TOKENS)
    for query, key in ((15, 5), (18, 14)):  # two of the repeated tokens
        browser.hover_matrix("change-edited", query, key, size)
        readout = browser.text("#cell-readout")
        assert f"({query})" in readout
        assert f"({key})" in readout
        for state in ("original", "edited", "sadr"):
            assert shown(data.patterns["L21H4"][state][query, key]) in readout
        lit = [label.get_attribute("data-position") for label in browser.all(".query-labels .on")]
        assert lit == [str(query)]
        assert browser.all("[data-strip] .from")[0].get_attribute("data-position") == str(query)
    browser.all('[data-strip="state-edited"] .tok')[12].click()  # a token pins its row
    browser.hover(browser.find("h1"))
    assert browser.text("#cell-readout").count("pinned") == 1
    browser.unfold("#row-details")
    rows = [row.text.split() for row in browser.all("#row-table tbody tr")]
    assert len(rows) == 13
    assert float(rows[5][3]) == float(shown(data.patterns["L21H4"]["edited"][12, 5]))


@pytest.mark.browser
def test_marks_of_subject_and_row_and_hiding_bos(browser: Browser, data: PageData) -> None:
    browser.open(data)
    keys = ".panel:nth-child(2) .key-labels .lab"
    subject = [lab.get_attribute("data-position") for lab in browser.all(f"{keys}.subject")]
    assert subject == ["2", "3", "4", "5"]
    assert [lab.text.split()[0] for lab in browser.all(".query-labels .query")] == [
        "\u25b8\u00b7in"
    ]
    assert len(browser.all(keys)) == len(TOKENS)
    before = float(browser.find("#pattern-max").get_property("value"))
    browser.js("arguments[0].click()", browser.find("#hide-first"))
    assert browser.all(keys)[0].get_attribute("data-position") == "1"
    rest = max(p[state][1:, 1:].max() for p in data.patterns.values() for state in p)
    assert rest <= float(browser.find("#pattern-max").get_property("value")) <= before
    browser.find("#reset").click()
    assert len(browser.all(keys)) == len(TOKENS)


@pytest.mark.browser
def test_the_keyboard_alone_is_enough(browser: Browser, data: PageData) -> None:
    browser.open(data)
    for _ in range(30):
        browser.press("TAB")
        if "cell" in (browser.focused().get_attribute("class") or "").split():
            break
    else:
        pytest.fail("Tab never reached the map")
    assert browser.focused().get_attribute("data-layer") == str(LAYERS - 1)
    browser.press("ARROW_UP", "ARROW_LEFT")  # already in the corner
    browser.press(*["ARROW_DOWN"] * 5, *["ARROW_RIGHT"] * 7)
    assert browser.text("#head-readout").startswith("L24H7")
    outline = browser.js("return getComputedStyle(arguments[0]).outlineStyle", browser.focused())
    assert outline == "solid"
    browser.press("ENTER")
    assert browser.text("#head-heading") == "Head L24H7, token by token"
    for _ in range(60):
        browser.press("TAB")
        if browser.focused().get_attribute("id") == "panels":
            break
    else:
        pytest.fail("Tab never reached the matrices")
    browser.press("ARROW_UP", "ARROW_LEFT")
    pattern = data.patterns["L24H7"]["edited"]
    assert shown(pattern[data.query - 1, data.subject_span[1] - 2]) in browser.text("#cell-readout")
    browser.press("ENTER", "ESCAPE")
    assert "(19)" in browser.text("#cell-readout")
    browser.press("ESCAPE")
    assert browser.text("#head-heading") == "One head, token by token"
    assert browser.all('[aria-selected="true"]') == []


@pytest.mark.browser
def test_arrow_keys_scroll_to_the_cell(browser: Browser) -> None:
    long = example(tokens=["<s>", *[f" w{i}" for i in range(59)]], stored=("L21H4",))
    browser.open(long, width=390)
    inside = """
        const box = document.getElementById("panels");
        const spot = box.querySelector(".cross.spot").getBoundingClientRect();
        const {left, right} = box.getBoundingClientRect();
        const labels = box.querySelector(".query-labels").getBoundingClientRect().right;
        return spot.left >= Math.max(left, labels) - 1 && spot.right <= right + 1
            && spot.top >= -1 && spot.bottom <= innerHeight + 1;
    """
    browser.js("document.getElementById('panels').focus()")
    browser.press(*["ARROW_RIGHT"] * 40)
    assert browser.js(inside)
    assert browser.js("return document.getElementById('panels').scrollLeft") > 0
    browser.press(*["ARROW_LEFT"] * 59)
    assert browser.js(inside)
    browser.press(*["ARROW_UP"] * 59)
    assert browser.js(inside)


@pytest.mark.browser
def test_of_nothing_there_is_no_share(browser: Browser) -> None:
    none = np.full((LAYERS, HEADS), np.nan)
    sweep = Sweep(none, none[:, 0], [(0, 6, math.nan)])
    known = restored_of(LAYERS, HEADS, original=(0.1, 0.0), edited=(0.2, 0.5),
                        windows=[(0, 6, 0.3, 0.2)])  # fmt: skip
    said = "undefined, as nothing was lost"
    for restored, expected in ((known, said), (replace(known, edited=(0.05, 0.5)), "not computed")):
        browser.open(example(sweep=sweep, restored=restored))
        browser.hover(browser.cell(3, 2))
        assert f"Restoring this head alone recovers: {expected}" in browser.text("#head-readout")
        label = browser.cell(3, 2, "#sweep-map").get_attribute("aria-label")
        assert label == f"Layer 3, head 2: recovered share {expected}"
        assert expected in browser.text("#sweep-table")


@pytest.mark.browser
def test_hostile_texts_are_inert_and_visible(browser: Browser) -> None:
    browser.open(
        example(
            tokens=HOSTILE,
            subject_span=(4, 6),
            title=HOSTILE[1],
            subtitle=HOSTILE[4],
            summary=HOSTILE,
            facts=[(text, text) for text in HOSTILE],
            tables=[Table(text, [text], [[text]]) for text in HOSTILE],
            answer=HOSTILE[2],
            target_new=HOSTILE[4],
            states=[State(key, HOSTILE[2]) for key in ("original", "edited", "sadr")],
        )
    )
    browser.choose("one", "#layouts")
    for place in ((2, 2), (4, 4)):
        browser.js("arguments[0].focus()", browser.cell(*place, "#sweep-map"))
        browser.press(" ")
    code = browser.text("#restore-readout code")
    assert code.startswith("dl.patch_attention(model, edit, prompt, answer=")
    assert ast.literal_eval(code.split("answer=")[1].split(", heads=")[0]) == HOSTILE[2]
    assert "\u27e8U+202E\u27e9evil" in browser.text("#best-key")
    assert browser.js("return window.broken") is None
    assert browser.all("img") == []
    assert browser.driver.title == HOSTILE[1]
    tokens = [token.text for token in browser.all("#prompt .tok")]
    assert len(tokens) == len(HOSTILE)
    assert tokens[1] == HOSTILE[1]
    assert tokens[4] == "\u27e8U+202E\u27e9evil\u27e8U+202C\u27e9"
    assert tokens[5].startswith("\u27e8U+0000\u27e9\u27e8U+001B\u27e9")
    assert tokens[6] == "\u00b7\u21b5\u21e5"
    assert tokens[7] == "\U0001f469\u27e8U+200D\u27e9\U0001f52c"
    assert tokens[8] == "\ufffd"
    assert tokens[10] == "{{script}}"
    assert tokens[14:] == ["\u27e8empty\u27e9", "\u00b7is"]
    body = browser.js(
        "document.querySelectorAll('script').forEach((s) => s.remove());"
        "return document.body.textContent"
    )
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\x00\x1b]", body)


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 390, 820, 1280])
@pytest.mark.parametrize("kind", ["plain", "wide", "hostile"])
def test_the_body_never_scrolls_sideways(browser: Browser, kind: str, width: int) -> None:
    shapes: dict[str, dict[str, Any]] = {
        "plain": {},
        "wide": {"layers": 48, "heads": 25},
        "hostile": {"tokens": HOSTILE, "subject_span": (4, 6), "title": "x" * 300},
    }
    browser.open(example(**shapes[kind]), width=width)
    assert browser.js("return document.documentElement.scrollWidth") <= width
    for place in ((0, 1), (1, 1)):
        browser.js("arguments[0].focus()", browser.cell(*place, "#sweep-map"))
        browser.press(" ")
    assert browser.all("#restore-readout code")
    assert browser.js("return document.documentElement.scrollWidth") <= width
    for box in ("#overview-map", "#panels", "#best-chart", "#restore-readout code", "#best-sets"):
        right = browser.js("return arguments[0].getBoundingClientRect().right", browser.find(box))
        assert right <= width


@pytest.mark.browser
def test_a_long_prompt_is_cut_to_a_window_that_says_so(browser: Browser) -> None:
    tokens = ["<s>", *[f" word{i % 7}" for i in range(98)], " in"]
    data = example(tokens=tokens, subject_span=(5, 8), stored=("L21H4",))
    browser.open(data)
    assert "100 tokens; 64 are shown" in browser.text("#window")
    queries = [lab.get_attribute("data-position") for lab in browser.all(".query-labels .lab")]
    keys = browser.all(".panel:nth-child(2) .key-labels .lab")
    assert queries == [str(i) for i in range(36, 100)]
    assert [lab.get_attribute("data-position") for lab in keys][:8] == [str(i) for i in range(8)]
    boxes = [lab.rect for lab in keys]
    for left, right in itertools.pairwise(boxes):
        assert left["x"] + left["width"] <= right["x"] + 0.5, "labels overlap"
    assert shown(data.patterns["L21H4"]["edited"][99, 7]) in browser.text("#cell-readout")
    slider = browser.find("[data-window=firstKey]")
    slider.send_keys("\ue010")  # End
    assert browser.all(".panel:nth-child(2) .key-labels .lab")[-1].get_attribute(
        "data-position"
    ) == str(99)


@pytest.mark.browser
@pytest.mark.parametrize("size", [128, 512])
def test_very_long_prompts_open_and_every_cell_can_be_read(browser: Browser, size: int) -> None:
    tokens = ["<s>", *[f" w{i}" for i in range(size - 2)], " in"]
    data = example(tokens=tokens, subject_span=(5, 8), stored=("L21H4", "L9H6"))
    browser.open(data)
    assert f"{size} tokens; 64 are shown" in browser.text("#window")
    assert len(browser.all(".sheet")) == 1
    pattern = data.patterns["L21H4"]["edited"]
    assert shown(pattern[size - 1, 7]) in browser.text("#cell-readout")
    for field in ("firstQuery", "firstKey"):
        browser.js(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
            browser.find(f"[data-window={field}]"), size // 2,
        )  # fmt: skip
    row, column = size // 2 + 40, size // 2 + 3
    browser.hover_matrix("state-edited", 40, 3, 64)
    assert f"({row})" in browser.text("#cell-readout")
    assert shown(pattern[row, column]) in browser.text("#cell-readout")
    browser.press("4")
    assert shown(data.patterns["L21H4"]["sadr"][row, column]) in browser.text("#cell-readout")


@pytest.mark.browser
def test_the_sweep_shows_heads_layers_and_windows(browser: Browser, data: PageData) -> None:
    browser.open(data)
    assert data.sweep is not None
    assert len(browser.all("#sweep-map .cell.missing")) == 3
    assert len(browser.all("#layer-chart .mark")) == LAYERS
    assert len(browser.all("#window-chart .span")) == len(data.sweep.windows)
    tops = [float(bar.get_attribute("height")) for bar in browser.all("#layer-chart .mark")]
    assert int(np.argmax(tops)) == int(np.argmax(np.abs(data.sweep.layers)))
    browser.hover(browser.all("#layer-chart .hit")[25])
    assert "layer 25." in browser.text("#chart-readout")
    assert shown(data.sweep.layers[25]) in browser.text("#chart-readout")
    start, end, share = data.sweep.windows[-1]
    browser.unfold("#sweep details")
    table = browser.text("#sweep-table")
    assert f"layers {start}\u2013{end - 1}{shown(share)}" in table
    browser.hover(browser.cell(25, 0, "#sweep-map"))
    assert "linked" in browser.cell(25, 0).get_attribute("class").split()


@pytest.mark.browser
def test_dark_and_light(browser: Browser, data: PageData) -> None:
    browser.open(data, scheme="dark")
    dark = browser.colour(browser.find("body")), browser.colour(browser.cell(25, 0))
    browser.find("#theme").click()
    light = browser.colour(browser.find("body")), browser.colour(browser.cell(25, 0))
    assert dark[0] == "rgb(21, 24, 27)"
    assert light[0] == "rgb(253, 253, 252)"
    assert dark[1] != light[1]
    browser.switch_media("light")
    browser.switch_media("dark")
    assert browser.colour(browser.find("body")) == light[0], "the button outranks the system"


@pytest.mark.browser
def test_one_state_and_nothing_else_is_a_page_too(browser: Browser) -> None:
    tokens = ["The", " Tower", " is"]
    bare = PageData(
        title="Bare",
        subtitle="",
        tokens=tokens,
        subject_span=(0, 2),
        query=2,
        states=[State("original", "Original")],
        attention={"original": np.full((2, 3), 0.5)},
    )
    browser.open(bare)
    assert len(browser.all("#overview-map .cell")) == 6
    assert browser.text("#head-note") == "No token-to-token patterns are stored in this page."
    for absent in ("#answers", "#sweep", "#tables", "#head-body"):
        assert not browser.find(absent).is_displayed()
    browser.cell(1, 1).click()
    assert "0.5" in browser.text("#head-readout")


@pytest.mark.browser
def test_matrices_are_switched_in_place(browser: Browser, data: PageData) -> None:
    """The same node, cell, pin and scale: only what differs between two states moves."""
    browser.open(data)
    size, query, key = len(TOKENS), 15, 5
    browser.choose("one", "#layouts")
    sheet = browser.find(".sheet")
    assert sheet.get_attribute("data-panel") == "state-edited"
    browser.hover_matrix("state-edited", query, key, size)
    browser.driver.execute_script("arguments[0].click()", browser.all(".query-labels .lab")[15])
    browser.hover(browser.find("h1"))
    assert "pinned" in browser.text("#cell-readout")
    here, colours, spot = sheet.rect, {}, browser.find(".cross.spot").rect
    ticks = [[tick.text for tick in browser.all("#pattern-scales .ticks span")]]
    order = ["state-original", "state-edited", "change-edited", "state-sadr", "change-sadr"]
    for number, panel in enumerate(order, start=1):
        browser.press(str(number))
        assert browser.all(".sheet") == [sheet]
        assert sheet.get_attribute("data-panel") == panel
        assert (sheet.rect, browser.find(".cross.spot").rect) == (here, spot)
        colours[panel] = browser.pixel(panel, query, key, size)
        ticks.append([tick.text for tick in browser.all("#pattern-scales .ticks span")])
        assert "pinned" in browser.text("#cell-readout")
        checked = browser.find("#panel-buttons input:checked").get_attribute("value")
        assert checked == panel
    assert ticks.count(ticks[0]) == len(ticks), "one scale whatever is shown"
    assert len({tuple(colour) for colour in colours.values()}) == 5
    title = browser.text(".panel:nth-child(2) h3")
    assert title == "SADR \u2212 Original"
    browser.press("6", "0")
    assert sheet.get_attribute("data-panel") == "change-sadr"
    # Typing a number, or with the keys switched off, switches nothing.
    browser.find("#pattern-max").send_keys("1")
    assert sheet.get_attribute("data-panel") == "change-sadr"
    browser.js("arguments[0].click()", browser.find("#number-keys"))
    browser.find("#panels").send_keys("1")
    assert sheet.get_attribute("data-panel") == "change-sadr"
    browser.js("arguments[0].click()", browser.find("#number-keys"))
    browser.choose("beside", "#layouts")
    assert len(browser.all(".sheet")) == 4
    browser.find("#panels").send_keys("5")
    assert len(browser.all(".sheet")) == 5
    browser.choose("state-original", "#panel-buttons")
    assert len(browser.all(".sheet")) == 4


@pytest.mark.browser
def test_one_matrix_stands_alone_where_several_do_not_fit(browser: Browser) -> None:
    long = example(tokens=["<s>", *[f" w{i}" for i in range(59)]], stored=("L21H4",))
    for width, data, layout in ((390, example(), "one"), (1280, example(), "beside"),
                                (1280, long, "one")):  # fmt: skip
        browser.open(data, width=width)
        assert browser.find("#layouts input:checked").get_attribute("value") == layout
        assert (len(browser.all(".sheet")) == 1) == (layout == "one")


@pytest.mark.browser
def test_heads_are_chosen_and_their_answers_read(browser: Browser, data: PageData) -> None:
    browser.open(data)
    restored = data.restored
    assert restored is not None
    readout = lambda: browser.text("#restore-readout")  # noqa: E731
    assert readout() == "No head is chosen."
    place = browser.cell(25, 0, "#sweep-map")
    browser.js(
        "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true, shiftKey: true}))",
        place,
    )
    one = restored.heads[25, 0]
    assert readout() == f"L25H0 restored: P(Egypt) {shown(one[0])}, P(Rome) {shown(one[1])}"
    assert "chosen" in place.get_attribute("class").split()
    assert place.get_attribute("aria-label").endswith(", chosen")
    assert browser.text("#head-heading") == "Head L21H4, token by token", "not opened as well"
    browser.js("arguments[0].focus()", place)
    browser.press("ARROW_RIGHT", " ")
    assert readout().startswith("2 heads restored: not computed.")
    wanted = 'dl.patch_attention(model, edit, prompt, answer="Egypt", heads=["L25H0", "L25H1"])'
    assert [code.text for code in browser.all("#restore-readout code")] == [
        wanted,
        'dl.compare(..., head_sets=[["L25H0", "L25H1"]])',
    ]
    compile(wanted, "page", "eval")
    browser.js("arguments[0].click()", browser.find("#click-chooses"))
    place.click()  # chosen before, so it is left out now
    chosen = [chip.text for chip in browser.all("#chosen-heads button")]
    assert chosen == ["L25H1 \u00d7", "Choose none"]
    buttons = browser.all("#best-sets button")
    assert [button.text for button in buttons] == ["1", "2", "3", "5", "10", "all"]
    for button, best in zip(buttons[1:5], restored.best, strict=True):
        button.click()
        assert shown(best.answer) in readout()
        assert shown(best.target_new) in readout()
        assert len(browser.all("#sweep-map .cell.chosen")) == len(best.heads)
        assert button.get_attribute("aria-pressed") == "true"
    for name in restored.best[3].heads:
        layer, head = map(int, re.findall(r"\d+", name))
        assert "chosen" in browser.cell(layer, head, "#sweep-map").get_attribute("class").split()
    buttons[5].click()
    assert shown(restored.everything[0]) in readout()
    assert "and 246 more" in browser.text("#chosen-heads")
    browser.find("#asked-sets button").click()
    assert shown(restored.asked[0].answer) in readout()
    assert len(browser.all("#sweep-map .cell.chosen")) == 2
    browser.unfold("#sweep details")
    rows = browser.all("#sweep-table button")
    browser.js("arguments[0].click()", rows[-1])
    assert shown(restored.layers[LAYERS - 1][0]) in readout()
    assert len(browser.all("#sweep-map .cell.chosen")) == HEADS
    browser.js("arguments[0].click()", rows[0])
    start, end, answer, target = restored.windows[0]
    assert shown(answer) in readout() and shown(target) in readout()
    assert len(browser.all("#sweep-map .cell.chosen")) == (end - start) * HEADS
    browser.find("#chosen-heads .clear").click()
    assert readout() == "No head is chosen."
    buttons[2].click()
    browser.find("#reset").click()
    assert browser.all("#sweep-map .cell.chosen") == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 820])
def test_the_map_stays_under_the_pointer(browser: Browser, data: PageData, width: int) -> None:
    """On a narrow screen the values stand above the map; they must not push it around."""
    browser.open(data, width=width)
    top = browser.js("return arguments[0].getBoundingClientRect().top + scrollY",
                     browser.find("#overview-map"))  # fmt: skip
    tags = set()
    for layer, head in ((21, 4), (13, 7), (29, 8), (9, 6), (0, 0), (25, 1)):
        cell = browser.cell(layer, head)
        browser.js("arguments[0].focus({preventScroll: true})", cell)
        tags.add(len(browser.all("#head-readout .tag")))
        assert browser.text("#head-readout").startswith(f"L{layer}H{head}")
        now = browser.js("return arguments[0].getBoundingClientRect().top + scrollY",
                         browser.find("#overview-map"))  # fmt: skip
        assert now == top
    browser.choose("one", "#layouts")
    tops = set()
    for query, key in ((19, 5), (10, 2), (3, 9), (18, 14), (7, 7)):
        browser.hover_matrix("state-edited", query, key, len(TOKENS))
        assert f"({query})" in browser.text("#cell-readout")
        tops.add(browser.js("return arguments[0].getBoundingClientRect().top + scrollY",
                            browser.find("#panels")))  # fmt: skip
    assert len(tops) == 1, "nor may the numbers of a cell push the matrix"
    assert len(tags) > 1, "heads of whom more and less is said"


@pytest.mark.browser
def test_the_chart_of_the_best_heads(browser: Browser, data: PageData) -> None:
    browser.open(data)
    assert data.restored is not None
    for kind, place, edited in (("answer", "cy", 0.12119), ("target", "y", 0.63087)):
        dots = browser.all(f"#best-chart .dot.{kind}")
        assert len(dots) == 7  # 0, 1, 2, 3, 5, 10 and all
        half = 0.0 if kind == "answer" else 3.5
        heights = [float(dot.get_attribute(place)) + half for dot in dots]
        value = lambda y: (152 - y) / 142  # noqa: E731
        assert value(heights[0]) == pytest.approx(edited, abs=1e-4)
        index = 0 if kind == "answer" else 1
        assert value(heights[-1]) == pytest.approx(data.restored.everything[index], abs=1e-4)
    browser.hover(browser.all("#best-chart .choose")[3])
    browser.all("#best-chart .choose")[3].click()
    assert "3 heads restored" in browser.text("#restore-readout")


@pytest.mark.browser
@pytest.mark.parametrize(
    ("width", "scheme", "layout", "button"),
    [(390, "light", "one", 3), (390, "dark", "beside", 4),
     (1280, "light", "beside", 4), (1280, "dark", "one", 3)],
)  # fmt: skip
def test_nothing_keeps_people_out(
    browser: Browser, width: int, scheme: str, layout: str, button: int
) -> None:
    """axe-core finds nothing serious, with a head opened, heads chosen and the tables unfolded."""
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    axe = (resources.files("axe_playwright_python") / "axe.min.js").read_text("utf-8")
    browser.open(example(), width=width, scheme=scheme)
    browser.cell(17, 0).click()
    browser.js("for (const part of document.querySelectorAll('details')) part.open = true")
    browser.choose(layout, "#layouts")
    browser.js("arguments[0].click()", browser.all("#best-sets button")[button])
    browser.js(axe)
    found = browser.driver.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {resultTypes: ['violations']}).then(done)"
    )
    assert len(found["passes"]) > 20, "axe looked"
    grave = [
        (rule["id"], [node["html"][:160] for node in rule["nodes"][:3]])
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
    ]
    assert grave == []


@pytest.mark.browser
def test_pictures_can_be_saved(browser: Browser, data: PageData, tmp_path: Path) -> None:
    browser.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    browser.open(data)
    for name, kind in itertools.product(("overview", "pattern", "sweep"), ("png", "svg")):
        browser.js("arguments[0].click()", browser.find(f"#{name}-{kind}"))
    stems = ("driftlens-change-edited", "driftlens-L21H4", "driftlens-recovered")
    wanted = {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    browser.wait(lambda: wanted <= {path.name for path in tmp_path.iterdir()})
    for stem in stems:
        content = (tmp_path / f"{stem}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
        assert min(width, height) > 600
        drawn = ElementTree.fromstring((tmp_path / f"{stem}.svg").read_text("utf-8"))
        assert {part.tag.split("}")[1] for part in drawn.iter()} <= VECTORS
        assert (2 * int(drawn.get("width", 0)), 2 * int(drawn.get("height", 0))) == (width, height)
    rects = f"{SVG}rect"
    drawn = ElementTree.parse(tmp_path / f"{stems[0]}.svg").getroot()
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert texts[0] == "Change: Edited \u2212 Original. Layers by heads."
    fills = [rect.get("fill") for rect in drawn.iter(rects)]
    for layer, head in ((25, 0), (3, 3), (29, 8)):  # background first, then layer by layer
        assert fills[1 + layer * HEADS + head] == browser.colour(browser.cell(layer, head))
    assert len(fills) == 1 + LAYERS * HEADS + 1
    drawn = ElementTree.parse(tmp_path / f"{stems[1]}.svg").getroot()
    size = len(TOKENS)
    fills = [rect.get("fill") for rect in drawn.iter(rects)]
    assert len(fills) == 1 + 4 * size * (size + 1) // 2 + 2, "four matrices and two scales"
    colour = browser.pixel("state-original", 1, 0, size)
    assert fills[2] == f"rgb({colour[0]}, {colour[1]}, {colour[2]})"
    # It opens on its own, in the colours it was saved in.
    browser.open_html((tmp_path / f"{stems[0]}.svg").read_text("utf-8"), suffix=".svg")
    assert browser.js("return document.documentElement.localName") == "svg"
    assert browser.js("return document.querySelectorAll('text').length") == len(texts)


@pytest.mark.browser
def test_marks_are_in_saved_pictures(browser: Browser, data: PageData, tmp_path: Path) -> None:
    """Heads that over-attend, while they are marked, and heads that are chosen."""
    browser.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    browser.open(data)

    def saved(name: str, stem: str) -> tuple[list[ElementTree.Element], int, list[str | None]]:
        path = tmp_path / f"driftlens-{stem}.svg"
        path.unlink(missing_ok=True)
        browser.js("arguments[0].click()", browser.find(f"#{name}-svg"))
        browser.wait(lambda: path.exists())
        drawn = ElementTree.fromstring(path.read_text("utf-8"))
        lines = sum(1 for _ in drawn.iter(f"{SVG}line"))
        texts = [text.text for text in drawn.iter(f"{SVG}text")]
        return list(drawn.iter(f"{SVG}path")), lines, texts

    over = "return document.querySelectorAll('#overview-map .cell.over').length"
    said = "Corner: more than any head of its layer in Original."
    marked = browser.js(over)
    corners, _, texts = saved("overview", "change-edited")
    assert len(corners) == marked > 0
    assert said in texts
    assert {corner.get("fill") for corner in corners} <= {"#ffffff", "#1b1e22"}
    browser.js("arguments[0].click()", browser.find("#mark-over"))
    assert browser.js(over) == 0
    corners, _, texts = saved("overview", "change-edited")
    assert corners == []
    assert said not in texts
    _, lines, texts = saved("sweep", "recovered")
    assert "Frame: a chosen head." not in texts
    browser.js("arguments[0].click()", browser.find("#best-sets button:nth-of-type(2)"))
    chosen = browser.js("return document.querySelectorAll('#sweep-map .cell.chosen').length")
    _, more, texts = saved("sweep", "recovered")
    assert more - lines == 4 * chosen > 0
    assert "Frame: a chosen head." in texts


VECTORS = {"svg", "title", "defs", "linearGradient", "stop", "rect", "line", "path", "text"}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.browser
def test_pictures_of_hostile_texts_and_of_one_matrix(browser: Browser, tmp_path: Path) -> None:
    browser.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    states = [State(key, HOSTILE[2]) for key in ("original", "edited", "sadr")]
    browser.open(example(tokens=HOSTILE, subject_span=(4, 6), states=states), scheme="dark")
    browser.choose("one", "#layouts")
    browser.js("arguments[0].click()", browser.find("#pattern-svg"))
    path = tmp_path / "driftlens-L21H4-state-edited.svg"
    browser.wait(lambda: path.exists())
    drawn = ElementTree.fromstring(path.read_text("utf-8"))
    assert {part.tag.split("}")[1] for part in drawn.iter()} <= VECTORS
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert "</script><scri\u2026" in texts
    assert "\u27e8U+202E\u27e9evil\u27e8U\u2026" in texts
    assert "\ufffd" in texts
    assert HOSTILE[2] in texts
    rects = [rect.get("fill") for rect in drawn.iter(f"{SVG}rect")]
    assert rects[0] == "#15181b", "the colours of the dark theme"
    assert len(rects) == 1 + len(HOSTILE) * (len(HOSTILE) + 1) // 2 + 1


@pytest.mark.browser
def test_on_paper_everything_is_there_and_dark_on_white(browser: Browser, data: PageData) -> None:
    browser.open(data, scheme="dark")
    assert not browser.find("#view-name").is_displayed()
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    on_paper = {"media": "print", "features": dark}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", on_paper)
    try:
        browser.js("window.dispatchEvent(new Event('beforeprint'))")
        assert browser.colour(browser.find("body")) == "rgb(253, 253, 252)"
        assert browser.find("#view-name").is_displayed()
        shown = browser.text("#view-name")
        assert "Edited" in shown and "Original" in shown  # what is shown is not on a button alone
        right = browser.js("return document.documentElement.clientWidth")
        panels = browser.all(".panel")
        assert len(panels) > 3
        for panel in panels:
            assert panel.rect["x"] + panel.rect["width"] <= right
        browser.js("window.dispatchEvent(new Event('afterprint'))")
        assert browser.js("return document.documentElement.dataset.theme") == "dark"
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.browser
def test_what_is_not_known_has_no_column_and_what_is_true_is_written(browser: Browser) -> None:
    told = [("original", 0.9, float("nan")), ("edited", 0.1, float("nan"))]
    table = Table("T", ["head", "held"], [["L0H0", True], ["L1H1", np.bool_(False)]])
    browser.open(example(target_new="", probabilities=told, tables=[table]))
    headings = [cell.text for cell in browser.all("#answers-table thead th")]
    assert len(headings) == 1 and headings[0].startswith("P(")
    assert len(browser.all("#answers-table tbody tr:first-child td")) == 1
    cells = [cell.text for cell in browser.all("#tables-body tbody td")]
    assert cells[1::2] == ["True", "False"]
    browser.open(example(probabilities=told))
    assert len(browser.all("#answers-table thead th")) == 2


@pytest.mark.browser
def test_escape_in_a_field_closes_no_head(browser: Browser, data: PageData) -> None:
    browser.open(data)
    assert browser.find("#head-body").is_displayed()
    browser.find("#overview-scale input").click()
    browser.press("ESCAPE")
    assert browser.find("#head-body").is_displayed()
    browser.find("#theme").click()
    browser.press("ESCAPE")
    assert not browser.find("#head-body").is_displayed()
