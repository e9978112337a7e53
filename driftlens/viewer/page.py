"""One HTML page that shows what an edit did to the attention of a model.

:class:`PageData` holds everything that the page shows and checks itself when it is
made. :func:`page` turns it into one HTML document that needs no server, no network
and no other file:

1. the numbers go into a JSON block, rounded to five significant digits, with every
   character escaped that HTML or JavaScript could misread;
2. ``page.css`` and the scripts in ``js/`` are put into ``page.html``, all package data;
3. a content security policy allows exactly that style and that script, by hash, and
   nothing else, so that even a hostile token can neither run nor load anything.

Axes used below: ``layer`` and ``head`` of the model; ``query`` (the token that
attends) and ``key`` (the token attended to), both positions in the prompt.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftlens.errors import DataError

FloatArray = NDArray[np.floating[Any]]
Cell = str | int | float | None

SIGNIFICANT_DIGITS = 5
"""Digits kept of every number in the page."""

SCRIPTS = (
    "basics",  # the data, elements, texts and numbers
    "colour",  # palettes and scales
    "views",  # what can be looked at, and what the reader is looking at
    "map",  # a layer x head map, used twice
    "overview",
    "patterns",  # token-to-token numbers, and which of them are shown
    "head",  # the matrices of one head
    "sweep",  # what brings the answer back
    "restore",  # several heads at once
    "host",  # what a notebook widget is told and asked
    "texts",  # texts and plain tables
    "drawing",  # one description for screen, PNG and SVG
    "pictures",  # what is saved
    "start",
)
"""The scripts of the page in ``js/``, in their order: they are one program, cut by part."""

_PACKING_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
"""Six bits each: base64url, none of whose characters need escaping in JSON, HTML or JavaScript."""

_PROBABILITY_SLACK = 1e-2
"""How far half-precision rounding may push a probability out of [0, 1]."""

_AGREEMENT = 5e-3
"""How far ``patterns`` and ``attention`` may differ where they say the same thing."""

_HEAD_NAME = re.compile(r"L(0|[1-9][0-9]*)H(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class State:
    """One condition of the model: original, edited, edited with SADR, ...

    Args:
        id: Key of this state in the dictionaries of :class:`PageData`.
        label: What the reader sees. Keep it short: it is printed on buttons.
    """

    id: str
    label: str

    def __post_init__(self) -> None:
        for name, value in (("id", self.id), ("label", self.label)):
            if not _text(f"State.{name}", value).strip():
                raise DataError(f"State.{name} is empty.", "Give every state an id and a label.")


@dataclass(frozen=True)
class Table:
    """A plain table, such as averages over many facts.

    Args:
        caption: What the table shows, with units.
        columns: One heading per column.
        rows: Rows of texts and numbers; ``None`` and NaN both show as "n/a".
            A text like ``L9H6`` becomes a button that opens that head.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def __post_init__(self) -> None:
        _text("Table.caption", self.caption)
        columns = tuple(_text("Table.columns", name) for name in self.columns)
        rows = tuple(tuple(_cell(cell) for cell in row) for row in self.rows)
        for number, row in enumerate(rows):
            if len(row) != len(columns):
                raise DataError(
                    f"Table.rows[{number}] of {self.caption!r} has {len(row)} cells, "
                    f"expected {len(columns)}.",
                    "Give every row one cell per column; use None for a missing value.",
                )
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "rows", rows)


@dataclass(frozen=True, eq=False)
class Sweep:
    """What restoring the original attention brings back of the answer.

    Every value is the recovered share of the lost probability: 0 is the edited model,
    1 the original one; below 0 it got worse. NaN where nothing was lost.

    Args:
        heads: One head restored at a time, shape [layer, head].
        layers: All heads of one layer restored, shape [layer].
        windows: ``(start, end, share)``: the layers ``range(start, end)`` restored.
        caption: What exactly was restored, and on which prompts.
    """

    heads: FloatArray
    layers: FloatArray
    windows: Sequence[tuple[int, int, float]] = ()
    caption: str = ""

    def __post_init__(self) -> None:
        heads = _array("Sweep.heads", self.heads, None)
        if heads.ndim != 2:
            raise DataError(
                f"Sweep.heads has shape {heads.shape}, expected [layer, head].",
                "Pass one share per layer and head.",
            )
        layers = _array("Sweep.layers", self.layers, heads.shape[:1])
        windows = []
        for number, (start, end, share) in enumerate(self.windows):
            name = f"Sweep.windows[{number}]"
            _check_window(name, start, end, len(layers), "(start, end, share)")
            windows.append((int(start), int(end), float(_array(name, share, ()))))
        _text("Sweep.caption", self.caption)
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "windows", tuple(windows))


@dataclass(frozen=True)
class HeadSet:
    """The answers with the original attention of some heads restored, all at once.

    Args:
        heads: Names such as ``"L9H6"``.
        answer: Probability of the true answer.
        target_new: Probability of the edit's target; NaN if it is unknown.
    """

    heads: Sequence[str]
    answer: float
    target_new: float = math.nan

    def __post_init__(self) -> None:
        heads = tuple(_text("HeadSet.heads", h) for h in _no_bare_text("HeadSet.heads", self.heads))
        if not heads or len(set(heads)) != len(heads):
            raise DataError(f"HeadSet.heads is {heads}.", "Name each head once, at least one.")
        values = _array("HeadSet", [self.answer, self.target_new], (2,), bounds=(0.0, 1.0))
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "answer", float(values[0]))
        object.__setattr__(self, "target_new", float(values[1]))


@dataclass(frozen=True, eq=False)
class Restored:
    """The probabilities behind a :class:`Sweep`, and those of sets of heads.

    Every pair is (P(answer), P(target_new)) of the edited model with the original attention of
    some heads put back; NaN where it was not computed.

    Args:
        original: The original model.
        edited: The edited model, nothing restored.
        everything: All heads of all layers restored.
        heads: One head restored at a time, shape [layer, head, 2].
        layers: All heads of one layer restored, shape [layer, 2].
        windows: ``(start, end, P(answer), P(target_new))``: the layers ``range(start, end)``.
        best: Nested sets: the heads that recover most alone, and more and more of them. Each
            lists its heads with the best first, and begins with those of the set before.
        asked: Any further sets.
    """

    original: tuple[float, float]
    edited: tuple[float, float]
    everything: tuple[float, float]
    heads: FloatArray
    layers: FloatArray
    windows: Sequence[tuple[int, int, float, float]] = ()
    best: Sequence[HeadSet] = ()
    asked: Sequence[HeadSet] = ()

    def __post_init__(self) -> None:
        for name in ("original", "edited", "everything"):
            pair = _array(f"Restored.{name}", getattr(self, name), (2,), bounds=(0.0, 1.0))
            object.__setattr__(self, name, tuple(pair.tolist()))
        heads = _array("Restored.heads", self.heads, None, bounds=(0.0, 1.0))
        if heads.ndim != 3 or heads.shape[2] != 2:
            raise DataError(
                f"Restored.heads has shape {heads.shape}, expected [layer, head, 2].",
                "Pass P(answer) and P(target_new) per layer and head.",
            )
        layers = _array("Restored.layers", self.layers, (heads.shape[0], 2), bounds=(0.0, 1.0))
        windows = []
        for number, (start, end, *values) in enumerate(self.windows):
            name = f"Restored.windows[{number}]"
            _check_window(name, start, end, len(layers), "(start, end, P, P)")
            answer, target_new = _array(name, values, (2,), bounds=(0.0, 1.0)).tolist()
            windows.append((int(start), int(end), answer, target_new))
        for kind in ("best", "asked"):
            sets = tuple(getattr(self, kind))
            for number, chosen in enumerate(sets):
                for head in chosen.heads:
                    _check_head(f"Restored.{kind}[{number}]", head, heads.shape[:2])
            object.__setattr__(self, kind, sets)
        for number, (fewer, more) in enumerate(pairwise(self.best)):
            if len(more.heads) <= len(fewer.heads) or more.heads[: len(fewer.heads)] != fewer.heads:
                raise DataError(
                    f"Restored.best[{number + 1}] does not begin with the heads of the set before "
                    "and add some.",
                    "Pass nested sets, the smallest first.",
                )
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "windows", tuple(windows))


@dataclass(frozen=True, eq=False)
class PageData:
    """Everything that the page shows. Arrays may hold NaN for "not computed".

    Args:
        title: Heading of the page.
        subtitle: One line below it.
        tokens: The prompt under study, one text per token.
        subject_span: Half-open token range of the subject in ``tokens``.
        query: Position of the row under study, usually the last token.
        states: The conditions compared. The first is the reference that the others
            are subtracted from: the original model.
        attention: Per state, the attention probability from ``query`` to the last
            token of the subject, shape [layer, head].
        bos: True if the first token is a beginning-of-sequence token.
        summary: Paragraphs in plain text.
        facts: ``(label, value)`` pairs: the edit, the model, the time taken, ...
        kl: Per state other than the reference, KL(reference || state) of the
            attention row of ``query`` in nats, shape [layer, head].
        patterns: Per head name such as ``"L9H6"`` and per state, the attention
            probabilities, shape [query, key]. The first one is shown when the page opens.
        sweep: What causal patching brings back, if it was run.
        restored: The probabilities behind the sweep, and those of sets of heads, so that the
            reader can choose heads; only with ``sweep``.
        answer: The true answer, as the reader should see it.
        target_new: The answer that the edit asks for.
        probabilities: ``(label, P(answer), P(target_new))`` on the prompt under study.
        tables: Further tables, shown last.

    Raises:
        DataError: If a shape, a key, a position or a value does not fit. The message
            names the field.
    """

    title: str
    subtitle: str
    tokens: Sequence[str]
    subject_span: tuple[int, int]
    query: int
    states: Sequence[State]
    attention: Mapping[str, FloatArray]
    bos: bool = False
    summary: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    kl: Mapping[str, FloatArray] = field(default_factory=dict)
    patterns: Mapping[str, Mapping[str, FloatArray]] = field(default_factory=dict)
    sweep: Sweep | None = None
    restored: Restored | None = None
    answer: str = ""
    target_new: str = ""
    probabilities: Sequence[tuple[str, float, float]] = ()
    tables: Sequence[Table] = ()

    def __post_init__(self) -> None:
        self._check_texts()
        self._check_positions()
        self._check_heads()
        self._check_patterns()

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers and of heads per layer."""
        layers, heads = self.attention[self.states[0].id].shape
        return layers, heads

    def _check_texts(self) -> None:
        """Check every text, and the probabilities, which are texts with numbers."""
        for name in ("title", "subtitle", "answer", "target_new"):
            _text(name, getattr(self, name))
        summary = tuple(_text("summary", part) for part in _no_bare_text("summary", self.summary))
        facts = tuple((_text("facts", label), _text("facts", value)) for label, value in self.facts)
        probabilities = []
        for number, (label, *values) in enumerate(self.probabilities):
            name = f"probabilities[{number}]"
            answer, target_new = _array(name, values, (2,), bounds=(0.0, 1.0)).tolist()
            probabilities.append((_text(name, label), answer, target_new))
        object.__setattr__(self, "summary", summary)
        object.__setattr__(self, "facts", facts)
        object.__setattr__(self, "probabilities", tuple(probabilities))
        object.__setattr__(self, "tables", tuple(self.tables))

    def _check_positions(self) -> None:
        """Check the tokens, and the positions that point into them."""
        tokens = tuple(_text("tokens", token) for token in _no_bare_text("tokens", self.tokens))
        start, end = (int(position) for position in self.subject_span)
        if not 0 <= start < end <= len(tokens):
            raise DataError(
                f"subject_span is ({start}, {end}) in a prompt of {len(tokens)} tokens.",
                "Give the half-open token range of the subject.",
            )
        if self.bos and start == 0:
            raise DataError(
                f"subject_span is ({start}, {end}), but bos says that token 0 is the BOS token.",
                "Count the BOS token in subject_span, or pass bos=False.",
            )
        if not end - 1 <= self.query < len(tokens):
            raise DataError(
                f"query is {self.query}; the subject ends at token {end - 1} and the prompt "
                f"at {len(tokens) - 1}.",
                "The row under study must not come before the subject's last token.",
            )
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "subject_span", (start, end))
        object.__setattr__(self, "query", int(self.query))

    def _check_heads(self) -> None:
        """Check the states and everything with axes [layer, head]."""
        states = tuple(self.states)
        ids = [state.id for state in states]
        if not ids or len(set(ids)) != len(ids):
            raise DataError(
                f"states has the ids {ids}.", "Give at least one state, each with its own id."
            )
        _same_keys("attention", self.attention, ids)
        shape = np.shape(self.attention[ids[0]])
        if len(shape) != 2 or 0 in shape:
            raise DataError(
                f"attention[{ids[0]!r}] has shape {shape}, expected [layer, head].",
                "Pass one probability per layer and head.",
            )
        attention = {
            key: _array(f"attention[{key!r}]", self.attention[key], shape, bounds=(0.0, 1.0))
            for key in ids
        }
        strangers = sorted(set(self.kl) - set(ids[1:]))
        if strangers:
            raise DataError(
                f"kl has the keys {strangers}, expected some of {ids[1:]}.",
                "The reference, which is the first state, has no divergence from itself.",
            )
        kl = {
            key: _array(f"kl[{key!r}]", self.kl[key], shape, bounds=(0.0, math.inf))
            for key in ids[1:]
            if key in self.kl
        }
        if self.sweep is not None and self.sweep.heads.shape != shape:
            raise DataError(
                f"sweep.heads has shape {self.sweep.heads.shape}, expected {shape} as attention.",
                "Pass the sweep of the same model.",
            )
        if self.restored is not None and self.sweep is None:
            raise DataError("restored is given without sweep.", "Pass the sweep of the same run.")
        if self.restored is not None and self.restored.heads.shape[:2] != shape:
            raise DataError(
                f"restored.heads has shape {self.restored.heads.shape}, expected {(*shape, 2)}.",
                "Pass the sweep of the same model.",
            )
        object.__setattr__(self, "states", states)
        object.__setattr__(self, "attention", attention)
        object.__setattr__(self, "kl", kl)

    def _check_patterns(self) -> None:
        """Check names, shapes, and that patterns and attention tell the same story."""
        layers, heads = self.shape
        ids = [state.id for state in self.states]
        size = len(self.tokens)
        key_position = self.subject_span[1] - 1
        patterns: dict[str, dict[str, FloatArray]] = {}
        for name, by_state in self.patterns.items():
            layer, head = _check_head("patterns", name, (layers, heads))
            _same_keys(f"patterns[{name!r}]", by_state, ids)
            patterns[name] = {}
            for key in ids:
                label = f"patterns[{name!r}][{key!r}]"
                pattern = _array(label, by_state[key], (size, size), bounds=(0.0, 1.0))
                seen = float(pattern[self.query, key_position])
                said = float(self.attention[key][layer, head])
                if abs(seen - said) > _AGREEMENT:  # False if either is NaN
                    raise DataError(
                        f"{label} is {seen:.5g} from token {self.query} to token {key_position}, "
                        f"but attention[{key!r}] says {said:.5g} for {name}.",
                        "Take both from one forward pass, with axes [query, key].",
                    )
                patterns[name][key] = pattern
        object.__setattr__(self, "patterns", patterns)


def page(data: PageData) -> str:
    """Return the page as one HTML document that loads nothing from anywhere.

    Args:
        data: What to show.

    Returns:
        The document. Write it with ``encoding="utf-8"`` and ``newline="\\n"``.
    """
    style, script = _resource("page.css"), _script()
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(_visible(data.title)).replace("/", "&#47;"),
        "style": style,
        "script": script,
        "data": _json(_payload(data)),
    }
    # One pass, so that a text such as "{{script}}" in the data stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _resource("page.html"))


def _payload(data: PageData) -> dict[str, Any]:
    """The page's data as plain lists and dictionaries, numbers rounded."""
    sweep = data.sweep
    return {
        "title": data.title,
        "subtitle": data.subtitle,
        "summary": list(data.summary),
        "facts": [list(fact) for fact in data.facts],
        "states": [{"id": state.id, "label": state.label} for state in data.states],
        "tokens": list(data.tokens),
        "bos": bool(data.bos),
        "subject": list(data.subject_span),
        "query": data.query,
        "attention": {key: _rounded(values) for key, values in data.attention.items()},
        "kl": {key: _rounded(values) for key, values in data.kl.items()},
        # Lists of pairs, not objects: JSON.parse would lose an order of integer-like keys.
        "patterns": [
            [name, {key: _packed(values) for key, values in by_state.items()}]
            for name, by_state in data.patterns.items()
        ],
        "packing": {"alphabet": _PACKING_ALPHABET} | _extents(data),
        "sweep": None
        if sweep is None
        else {
            "heads": _rounded(sweep.heads),
            "layers": _rounded(sweep.layers),
            "windows": [[start, end, _rounded(share)] for start, end, share in sweep.windows],
            "caption": sweep.caption,
        },
        "restored": None if data.restored is None else _restored_payload(data.restored),
        "answer": data.answer,
        "targetNew": data.target_new,
        "probabilities": [
            [label, _rounded(answer), _rounded(target_new)]
            for label, answer, target_new in data.probabilities
        ],
        "tables": [
            {
                "caption": table.caption,
                "columns": list(table.columns),
                "rows": [[_rounded_cell(cell) for cell in row] for row in table.rows],
            }
            for table in data.tables
        ],
    }


def _restored_payload(restored: Restored) -> dict[str, Any]:
    """The same, rounded; sets as [heads, P(answer), P(target_new)]."""

    def sets(chosen: Sequence[HeadSet]) -> list[Any]:
        return [[list(s.heads), _rounded(s.answer), _rounded(s.target_new)] for s in chosen]

    return {
        "original": _rounded(list(restored.original)),
        "edited": _rounded(list(restored.edited)),
        "everything": _rounded(list(restored.everything)),
        "heads": _rounded(restored.heads),
        "layers": _rounded(restored.layers),
        "windows": [[start, end, *_rounded(pair)] for start, end, *pair in restored.windows],
        "best": sets(restored.best),
        "asked": sets(restored.asked),
    }


def _json(value: Any) -> str:
    """JSON that is safe inside a script element and free of anything like an address."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII only
    # None of these occurs in JSON outside a string, so each may be written as an escape.
    for character in "<>&/":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _rounded(value: Any) -> Any:
    """Nested lists of numbers to five significant digits, NaN as None."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if math.isnan(value):
        return None
    short = float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    return int(short) if short == 0 or short == 1 else short


def _decimal(values: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Probabilities as m / 10^(4 + e): m is 0 or has five digits, e lies in 0 to 126.

    What is smaller than 10^-126, or below 0 by rounding, becomes 0; NaN becomes 0 too.
    """
    known = np.where(values > 1e-126, values, 1.0)
    e = np.clip(-np.floor(np.log10(known)).astype(np.int64), 0, 126)
    scaled = known * 10.0 ** (4 + e)
    m = np.rint(scaled).astype(np.int64)
    # So close to the middle of two digits that the product's own rounding could decide.
    for at in np.flatnonzero(np.abs(np.abs(scaled - np.floor(scaled)) - 0.5) < 1e-6):
        digits, exponent = f"{known.flat[at]:.4e}".split("e")
        m.flat[at] = round(float(digits) * 10.0 ** (int(exponent) + 4 + e.flat[at]))
    carried = (m > 99_999) & (e > 0)  # 0.0999996 rounds to 0.10000
    m, e = np.where(carried, 10_000, m), np.where(carried, e - 1, e)
    return np.where(values > 1e-126, m, 0), np.where(values > 1e-126, e, 0)


def _packed(matrix: FloatArray) -> str:
    """An attention matrix to five significant digits, four characters a number.

    A number is a word of 24 bits: e in the upper 7, m in the lower 17 (see :func:`_decimal`);
    all ones for NaN. Only the lower triangle is kept, row by row, if nothing is above it.
    """
    upper = np.triu_indices(len(matrix), 1)
    causal = not np.any(matrix[upper])  # NaN counts as something
    values = matrix[np.tril_indices(len(matrix))] if causal else matrix.ravel()
    m, e = _decimal(values)
    words = np.where(np.isnan(values), 0xFFFFFF, e << 17 | m)
    sextets = words[:, None] >> np.array([18, 12, 6, 0]) & 63
    alphabet = np.frombuffer(_PACKING_ALPHABET.encode("ascii"), dtype=np.uint8)
    return alphabet[sextets].tobytes().decode("ascii")


def _extents(data: PageData) -> dict[str, list[list[float]]]:
    """Lowest and highest of all stored attention and of its changes, with and without token 0.

    The page would have to unpack every matrix for these; 0 is always among the numbers.
    """
    reference, *others = [state.id for state in data.states]
    found = {"attention": [[0.0, 0.0], [0.0, 0.0]], "change": [[0.0, 0.0], [0.0, 0.0]]}

    def include(kind: str, values: FloatArray) -> None:
        for place, part in enumerate((values, values[1:, 1:])):
            if part.size and not np.isnan(part).all():
                low, high = found[kind][place]
                found[kind][place] = [
                    min(low, float(np.nanmin(part))),
                    max(high, float(np.nanmax(part))),
                ]

    def as_shown(values: FloatArray) -> FloatArray:
        m, e = _decimal(values)
        return np.where(np.isnan(values), np.nan, m / 10.0 ** (4 + e))

    for by_state in data.patterns.values():
        before = as_shown(by_state[reference])
        include("attention", before)
        for key in others:
            after = as_shown(by_state[key])
            include("attention", after)
            include("change", after - before)
    return found


def _rounded_cell(cell: Cell) -> Cell:
    """A table cell for JSON: counts stay whole, measurements are rounded."""
    if not isinstance(cell, float):
        return cell
    rounded: Cell = _rounded(cell)
    return rounded


def _resource(name: str) -> str:
    """A text file of this package, with line ends as the HTML parser sees them."""
    text = (resources.files("driftlens.viewer") / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _script() -> str:
    """All scripts as one program, in a scope of its own."""
    parts = "\n".join(_resource(f"js/{name}.js") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n\n{parts}}})();'


def _hash(text: str) -> str:
    """The source expression that allows exactly this inline text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _visible(text: str) -> str:
    """Control, format and bidi characters as U+XXXX, as ``js/`` does for the body."""
    return "".join(
        f"⟨U+{ord(character):04X}⟩"
        if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
        else character
        for character in text
    )


def _text(name: str, value: object) -> str:
    """Return ``value`` if it is a text."""
    if not isinstance(value, str):
        raise DataError(f"{name} holds {value!r}, a {type(value).__name__}.", "Pass a text there.")
    return value


def _no_bare_text(name: str, values: Sequence[str]) -> Sequence[str]:
    """Refuse a text where a list of texts is meant: it would fall apart into letters."""
    if isinstance(values, str):
        raise DataError(f"{name} is one text, {values!r}.", "Pass a list of texts.")
    return values


def _cell(value: Cell) -> Cell:
    """Return a table cell as a plain Python value."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return str(value)
    if not isinstance(value, str | int | float | None):
        raise DataError(
            f"Table.rows holds {value!r}, a {type(value).__name__}.",
            "Use texts, numbers and None.",
        )
    if isinstance(value, float) and math.isinf(value):
        raise DataError("Table.rows holds an infinite number.", "Use None for a missing value.")
    return value


def _check_window(name: str, start: int, end: int, layers: int, form: str) -> None:
    if not 0 <= start < end <= layers:
        raise DataError(
            f"{name} covers layers range({start}, {end}) of {layers}.",
            f"Give windows as {form} with the end excluded.",
        )


def _check_head(name: str, head: str, shape: Sequence[int]) -> tuple[int, int]:
    """The layer and the number of a head such as ``"L9H6"`` that the model has."""
    match = _HEAD_NAME.fullmatch(head)
    if not match or int(match[1]) >= shape[0] or int(match[2]) >= shape[1]:
        raise DataError(
            f"{name} names the head {head!r}; the model has {shape[0]} layers of {shape[1]} heads.",
            "Name heads like 'L9H6', counted from 0.",
        )
    return int(match[1]), int(match[2])


def _same_keys(name: str, values: Mapping[str, object], ids: Sequence[str]) -> None:
    """Check that a dictionary has one entry per state and no other."""
    if set(values) != set(ids):
        raise DataError(
            f"{name} has the keys {sorted(values)}, expected {sorted(ids)}.",
            "Pass one array per state.",
        )


def _array(
    name: str,
    value: object,
    shape: tuple[int, ...] | None,
    bounds: tuple[float, float] | None = None,
) -> NDArray[np.float64]:
    """Return a read-only float64 copy, or say what is wrong with ``name``."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is not an array of numbers: {error}.", "Pass floats.") from error
    if shape is not None and array.shape != tuple(shape):
        raise DataError(
            f"{name} has shape {array.shape}, expected {tuple(shape)}.",
            "Check the order of the axes and that all arrays come from one model and prompt.",
        )
    if np.isinf(array).any():
        raise DataError(f"{name} holds infinite values.", "Use NaN for values not computed.")
    if bounds is not None and array.size and not np.isnan(array).all():
        low, high = float(np.nanmin(array)), float(np.nanmax(array))
        if low < bounds[0] - _PROBABILITY_SLACK or high > bounds[1] + _PROBABILITY_SLACK:
            raise DataError(
                f"{name} runs from {low:.5g} to {high:.5g}, outside [{bounds[0]:g}, "
                f"{bounds[1]:g}].",
                "Pass probabilities, not logits or percent; divergences in nats.",
            )
    array.setflags(write=False)
    return array
