"""A prompt before and after an edit: the numbers are those of the single calls, and it shows
itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from browsing import Browser, browser, chromium

import driftlens as dl
from driftlens.comparison import (
    BEST_HEADS,
    HEADS_STORED,
    PATTERN_BUDGET,
    heads_that_fit,
    restriction,
)
from driftlens.errors import DataError, RequestError, TokenError
from driftlens.patching import PatchExperiment

__all__ = ["browser", "chromium"]  # fixtures

REQUEST = dl.EditRequest("{} is located in", "The Louvre", "E", "the")
PROMPT = "The Louvre is located in Rome. Berlin is located in"


@pytest.fixture(scope="module")
def model() -> dl.LensModel:
    return dl.load_model(
        tiny.hf_model("llama", 1, scale=5.0, noise=0.3), tiny.tokenizer(), name="tiny"
    )


def make(model: dl.LensModel, penalty: dl.Penalty | None = None) -> dl.Edit:
    return dl.edit(
        model, REQUEST, "rome", penalty=penalty, layer=1, steps=12, covariance="identity",
        context_prompts=["{}"], progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def edit(model: dl.LensModel) -> dl.Edit:
    return make(model)


@pytest.fixture(scope="module")
def answer(model: dl.LensModel, edit: dl.Edit) -> str:
    """Of some likely answers, the one that loses most by the edit."""
    texts = [tiny.likely(model, PROMPT, rank) for rank in range(12)]
    before = dl.score(model, PROMPT, texts)
    with edit.applied(model):
        after = dl.score(model, PROMPT, texts)
    return min(texts, key=lambda text: after[text] - before[text])


@pytest.fixture(scope="module")
def cured(model: dl.LensModel) -> dl.Edit:
    return make(model, dl.SADR(gamma=5.0))


@pytest.fixture(scope="module")
def found(model: dl.LensModel, edit: dl.Edit, cured: dl.Edit, answer: str) -> dl.Comparison:
    return dl.compare(model, edit, PROMPT, answer, cured=cured, progress=False)


def test_numbers_are_those_of_the_single_calls(
    model: dl.LensModel, edit: dl.Edit, cured: dl.Edit, found: dl.Comparison, answer: str
) -> None:
    table = found.to_dataframe().set_index("condition")
    original = dl.score_details(model, PROMPT, [answer, "E"])
    for name, one in (("original model", None), ("edited", edit), ("edited with SADR", cured)):
        if one is None:
            scores = original
        else:
            with one.applied(model):
                scores = dl.score_details(model, PROMPT, [answer, "E"])
        row = table.loc[name]
        assert row["answer"] == pytest.approx(scores[answer].prob, rel=1e-4)
        assert row["target_new"] == pytest.approx(scores["E"].prob, rel=1e-4)
    for what, name in (("pattern", "attention pattern"), ("values", "attention values")):
        patched = dl.patch_attention(model, edit, PROMPT, answer=answer, exchange=what)  # type: ignore[arg-type]
        row = table.loc[f"edited, original {name} restored"]
        assert row["answer"] == pytest.approx(patched.patched.prob, rel=1e-4)
        assert row["recovered_share"] == pytest.approx(patched.recovered_share, rel=1e-2)
    assert table.loc["edited"]["recovered_share"] == 0
    assert table.loc["original model"]["recovered_share"] == 1
    drift = dl.measure_drift(model, edit, PROMPT)
    assert np.array_equal(found.drift.difference, drift.difference)
    assert list(found.patterns) == [h.name for h in drift.top_heads(HEADS_STORED)]
    assert len(found.plot().data) > 3
    for states in found.patterns.values():
        assert set(states) == {"original", "edited", "cured"}
    with edit.applied(model):
        asked = dl.score_details(model, REQUEST.text, ["E"])["E"].prob
    assert found.edit_success["edited"] == pytest.approx(asked)
    assert set(found.edit_success) == {"original", "edited", "SADR"}
    facts = dict(found.page_data().facts)
    assert facts["SADR"].startswith(f"{facts['Edit']}; gamma ")


def test_sets_of_heads_on_the_page_equal_an_independent_run(
    model: dl.LensModel, edit: dl.Edit, answer: str
) -> None:
    """Each set by a patch of its own, over whole sequences."""
    asked = [["L1H0", "L0H1"], [(1, 1)], ["L0H0", "L0H1", "L0H2"]]
    found = dl.compare(model, edit, PROMPT, answer, head_sets=asked, progress=False)
    shown = found.page_data().restored
    assert shown is not None and found.sweep is not None
    plain = PatchExperiment(model, edit, PROMPT, answer=answer, engine="plain")

    def pair(result: dl.PatchResult) -> tuple[float, float]:
        return result.patched.prob, result.patched["E"].prob

    n_layers, n_heads = model.info.n_layers, model.info.n_heads
    alone = np.array(
        [[pair(plain.attention(heads=[(y, x)])) for x in range(n_heads)] for y in range(n_layers)]
    )
    np.testing.assert_allclose(shown.heads, alone, rtol=1e-4)
    order = np.argsort(-alone[:, :, 0], axis=None)
    sizes = [k for k in BEST_HEADS if k < n_layers * n_heads]
    assert [len(best.heads) for best in shown.best] == sizes and len(sizes) > 1
    for best in shown.best:
        gained = [alone[divmod(int(i), n_heads)][0] for i in order[: len(best.heads)]]
        places = [tuple(map(int, re.findall(r"\d+", name))) for name in best.heads]
        assert [alone[place][0] for place in places] == pytest.approx(gained, rel=1e-4)
    for one in [*shown.best, *shown.asked]:
        wanted = pair(plain.attention(heads=one.heads))
        assert (one.answer, one.target_new) == pytest.approx(wanted, rel=1e-4)
    assert [set(one.heads) for one in shown.asked] == [
        {"L0H1", "L1H0"}, {"L1H1"}, {"L0H0", "L0H1", "L0H2"},
    ]  # fmt: skip
    for layer in range(n_layers):
        np.testing.assert_allclose(
            shown.layers[layer], pair(plain.attention(layers=layer)), rtol=1e-4
        )
    start, end, *values = shown.windows[-1]
    assert values == pytest.approx(pair(plain.attention(layers=range(start, end))), rel=1e-4)
    assert shown.everything == pytest.approx(pair(plain.attention()), rel=1e-4)
    assert shown.edited == pytest.approx((plain.edited.prob, plain.edited["E"].prob), rel=1e-4)
    assert shown.original == pytest.approx(
        (plain.original.prob, plain.original["E"].prob), rel=1e-4
    )
    loaded = json.loads(re.findall(r'id="data">(.*?)</script>', found.html())[0])["restored"]
    for entry, one in zip(
        loaded["best"] + loaded["asked"], [*shown.best, *shown.asked], strict=True
    ):
        assert entry[0] == list(one.heads)
        assert entry[1:] == [float(f"{one.answer:.5g}"), float(f"{one.target_new:.5g}")]


def test_long_prompts_keep_fewer_heads() -> None:
    assert heads_that_fit(tokens=32, states=3) == heads_that_fit(128, 3) == HEADS_STORED
    fit = heads_that_fit(512, 3)
    assert fit * 4 * 3 * 512 * 513 // 2 <= PATTERN_BUDGET < (fit + 1) * 4 * 3 * 512 * 513 // 2
    assert heads_that_fit(20_000, 3) == 1


def test_a_page_says_that_it_keeps_fewer_heads(
    monkeypatch: pytest.MonkeyPatch, model: dl.LensModel, edit: dl.Edit, answer: str
) -> None:
    size = len(model.tokens.encode(PROMPT).ids)
    monkeypatch.setattr("driftlens.comparison.PATTERN_BUDGET", 2 * 4 * 2 * size * (size + 1) // 2)
    found = dl.compare(model, edit, PROMPT, answer, sweep=False, progress=False)
    assert len(found.patterns) == 2
    said = ("Token-to-token", "kept for 2 heads, as the prompt is long")
    assert said in found.page_data().facts
    more = dl.compare(model, edit, PROMPT, answer, heads=3, sweep=False, progress=False)
    assert len(more.patterns) == 3 and said[0] not in dict(more.page_data().facts)


def test_an_edit_alone_and_one_that_says_nothing(
    model: dl.LensModel, edit: dl.Edit, answer: str
) -> None:
    alone = dl.compare(model, edit, PROMPT, answer, heads=2, sweep=False, progress=False)
    for part in (alone.cured, alone.cured_drift, alone.cured_readout, alone.sweep):
        assert part is None
    assert len(alone.patterns) == 2
    assert "SADR" not in " ".join(alone.summary())
    for values in alone.patterns.values():  # of its own, not a view into those of all heads
        assert all(array.base is None for array in values.values())
    assert [state.id for state in alone.page_data().states] == ["original", "edited"]
    silent = dl.Edit.from_deltas(model, edit.deltas)
    with pytest.raises(RequestError, match="Pass subject="):
        dl.compare(model, silent, PROMPT, answer, progress=False)
    other = dl.compare(
        model, silent, PROMPT, answer, subject="The Louvre", cured=edit, progress=False
    )
    table = other.to_dataframe().set_index("condition")
    assert table["target_new"].isna().all()
    assert table.loc["edited"]["answer"] == pytest.approx(
        alone.to_dataframe().set_index("condition").loc["edited"]["answer"], rel=1e-4
    )
    assert "edited with second edit" in table.index
    assert other.edit_success == {}
    assert "Berlin" in other.html()


def test_only_what_is_true_is_said(model: dl.LensModel, edit: dl.Edit, answer: str) -> None:
    def said(prompt: str, answer: str) -> str:
        found = dl.compare(model, edit, prompt, answer, sweep=False, progress=False)
        return " ".join(found.summary())

    new = REQUEST.target_new
    usual, asked = said(PROMPT, answer), said(REQUEST.text, answer)
    assert f"Nothing was said about “{PROMPT}”, whose answer is “{answer}”" in usual
    assert "Nothing was said" not in asked
    assert (
        f"to answer “{new}” to “{REQUEST.text}”. Asked what was edited (“{REQUEST.text}”)" in asked
    )
    twice = replace(edit, requests=(REQUEST, replace(REQUEST, target_new="Oslo")))
    silent = dl.Edit.from_deltas(model, edit.deltas)
    for one, first in (
        (twice, "Asked what was edited (“"),
        (silent, f"Asked “{REQUEST.text}”, whose"),
    ):
        found = dl.compare(
            model, one, REQUEST.text, answer, subject=REQUEST.subject, sweep=False, progress=False
        )
        assert found.summary()[0].startswith(first)
    assert f", that of “{new}” from " in usual
    gained = said(REQUEST.text, new)
    assert "that of" not in gained
    assert "nothing was lost" in gained and "brings back most" not in gained


def test_an_edit_of_several_facts_is_looked_at_by_subject(
    model: dl.LensModel, edit: dl.Edit, answer: str
) -> None:
    other = dl.EditRequest("{} is in", "The Prado", "Oslo")
    both = replace(edit, requests=(REQUEST, other))
    with pytest.raises(RequestError, match="of 2 facts. Pass subject=..., e.g. one of 'The"):
        dl.compare(model, both, PROMPT, answer, progress=False)
    found, alone = (
        dl.compare(model, one, PROMPT, answer, subject=REQUEST.subject, sweep=False, progress=False)
        for one in (both, edit)
    )
    assert found.request == REQUEST
    assert found.target_new == REQUEST.target_new
    assert found.to_dataframe().equals(alone.to_dataframe())
    assert found.edit_success == alone.edit_success
    assert found.summary() == alone.summary()
    twice = replace(edit, requests=(REQUEST, replace(REQUEST, target_new="Oslo")))
    assert twice.request_about(REQUEST.subject) is None


def test_it_says_what_it_is_in_a_line(found: dl.Comparison, answer: str) -> None:
    after = found.readouts()["edited"].prob
    assert repr(found).startswith(f"Comparison(tiny, {PROMPT!r}; P({answer!r}): original model ")
    assert f", edited {after:.3f}," in repr(found)
    assert len(repr(found)) < 500
    head = found.drift.top_heads(1)[0]
    assert repr(found.drift).startswith(
        f"Drift(tiny, edited, 1 prompt; most: {head.name} {head.drift:+.3f}, "
    )


def test_bad_requests(
    model: dl.LensModel, edit: dl.Edit, found: dl.Comparison, answer: str, tmp_path: Path
) -> None:
    with pytest.raises(TokenError, match="The Louvre"):
        dl.compare(model, edit, "Berlin is located in", answer, progress=False)
    with pytest.raises(RequestError, match="no answer"):
        dl.compare(model, edit, PROMPT, "", progress=False)
    with pytest.raises(RequestError, match="has no head L0H99"):
        dl.compare(model, edit, PROMPT, answer, head_sets=[["L0H99"]], progress=False)
    with pytest.raises(RequestError, match="sweep=False"):
        dl.compare(model, edit, PROMPT, answer, sweep=False, head_sets=[["L0H0"]], progress=False)
    with pytest.raises(RequestError, match="heads is 0"):
        dl.compare(model, edit, PROMPT, answer, heads=0, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        found.save(tmp_path / "file" / "page.html")


def test_restrictions_are_named(edit: dl.Edit, cured: dl.Edit, model: dl.LensModel) -> None:
    assert restriction(None) == restriction(edit) == "second edit"
    assert restriction(cured) == "SADR"
    assert restriction(make(model, dl.KeyDrift(weight=1.0))) == dl.KeyDrift.kind


def test_the_page_is_one_file(found: dl.Comparison, tmp_path: Path) -> None:
    path = found.save(tmp_path / "page.html", notes=["A note."], facts=[("Who", "me")])
    text = path.read_text("utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "A note." in text
    assert text != found.html()


@pytest.mark.browser
def test_it_shows_itself_inside_a_notebook(found: dl.Comparison, browser: Browser) -> None:
    """The frame works though it may reach nothing, and its content cannot end it."""
    frame = found._repr_html_()
    assert len(re.findall("<iframe|</iframe>", frame)) == 2
    browser.open_html(f"<!doctype html><title>notebook</title><div>{frame}<p id=after>x</p></div>")
    assert browser.find("#after").location["y"] > 800
    browser.driver.switch_to.frame(browser.find("iframe"))
    try:
        assert browser.text("#title") == "Attention drift of one knowledge edit"
        n_layers, n_heads = found.info.n_layers, found.info.n_heads
        assert len(browser.all("#overview-map .cell")) == n_layers * n_heads
        name = next(iter(found.patterns))
        assert browser.text("#head-heading").startswith(f"Head {name},")
        other = list(found.patterns)[1]
        layer, head = map(int, re.findall(r"\d+", other))
        browser.js("arguments[0].click()", browser.cell(layer, head))
        assert browser.text("#head-heading").startswith(f"Head {other},")
        outside = browser.js(
            "try { return parent.document.title } catch (error) { return error.name }"
        )
        assert outside == "SecurityError"
    finally:
        browser.driver.switch_to.default_content()
