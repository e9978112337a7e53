"""The page as a widget: what it asks of Python is what Python computes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import tiny
import torch
from browsing import Browser, browser, chromium  # noqa: F401

import driftlens as dl
from driftlens.errors import RequestError
from driftlens.viewer import widget as module

PROMPT = "The Louvre is located in Rome. Berlin is located in"


def load(seed: int = 1) -> dl.LensModel:
    return dl.load_model(tiny.hf_model("llama", seed), tiny.tokenizer(), name=f"tiny{seed}")


@pytest.fixture(scope="module")
def model() -> dl.LensModel:
    return load()


@pytest.fixture(scope="module")
def found(model: dl.LensModel) -> dl.Comparison:
    request = dl.EditRequest("{} is located in", "The Louvre", "E", "the")
    edit = dl.edit(
        model, request, "rome", layer=1, steps=3, covariance="identity",
        context_prompts=["{}"], progress=False,
    )  # fmt: skip
    return dl.compare(model, edit, PROMPT, "the", sweep=False, progress=False)


def test_without_anywidget_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, model: dl.LensModel, found: dl.Comparison
) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    module._widget_class.cache_clear()
    with pytest.raises(RequestError, match="anywidget>=0.9"):
        module.widget(model, found)


def test_another_model_is_refused(found: dl.Comparison) -> None:
    with pytest.raises(RequestError, match="tiny2 differs.* compared, tiny1, in weights. Pass"):
        module.widget(load(2), found)
    begun = dl.load_model(tiny.hf_model("llama", 1), tiny.bos_tokenizer(), name="tiny1")
    with pytest.raises(RequestError, match="compared, tiny1, in prepends_bos, tokenizer."):
        module.widget(begun, found)


def test_the_same_model_from_elsewhere_is_the_one_that_was_compared(
    found: dl.Comparison, tmp_path: Path
) -> None:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    load().save_checkpoint(tmp_path / "elsewhere")
    elsewhere = dl.load_model(tmp_path / "elsewhere", tiny.tokenizer())
    assert elsewhere.info != found.info
    live = module.widget(elsewhere, found)
    wanted = dl.patch_attention(load(), found.edit, PROMPT, answer="the", heads=["L0H1"])
    assert live.restore(["L0H1"]).patched.prob == pytest.approx(wanted.patched.prob, rel=1e-6)


def test_what_the_page_asks_is_computed_and_sent(
    monkeypatch: pytest.MonkeyPatch, model: dl.LensModel, found: dl.Comparison
) -> None:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    module._widget_class.cache_clear()
    live = module.widget(model, found, title="Mine")
    assert "Mine" in live.document
    assert (live.opened, live.selected) == ("", [])
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(live, "send", sent.append)
    heads = ["L2H0", "L0H1"]
    live._handle_custom_msg({"kind": "restore", "heads": heads}, [])
    wanted = dl.patch_attention(model, found.edit, PROMPT, answer="the", heads=heads).patched
    assert sent == []
    (message,) = live.answers
    assert message["heads"] == ["L0H1", "L2H0"]
    assert message["answer"] == pytest.approx(wanted.prob, rel=1e-5)
    assert message["target"] == pytest.approx(wanted["E"].prob, rel=1e-5)
    live._handle_custom_msg({"kind": "restore", "heads": ["L99H0"]}, [])
    assert sent[0]["kind"] == "failed"
    assert "99" in sent[0]["problem"]
    live._handle_custom_msg({"kind": "something else"}, [])
    assert len(sent) == 1
    assert live.selected == []
    prob = live.restore([(0, 1)]).patched.prob
    assert live.answers[1:] == [{"heads": ["L0H1"], "answer": prob, "target": ANY}]
    assert live.selected == ["L0H1"]  # a page that is shown later begins with it
    assert sent[1:] == [{"kind": "choose", "heads": ["L0H1"]}]
    live.restore(["L0H1"])
    assert len(live.answers) == 2


def test_whatever_goes_wrong_is_told_to_the_page(
    monkeypatch: pytest.MonkeyPatch, model: dl.LensModel, found: dl.Comparison
) -> None:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    live = module.widget(model, found)
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(live, "send", sent.append)

    def full(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(module.PatchExperiment, "attention", full)
    with pytest.raises(MemoryError):
        live._asked(live, {"kind": "restore", "heads": ["L0H1"]}, [])
    assert sent == [{"kind": "failed", "heads": ["L0H1"], "problem": "MemoryError"}]


def test_other_edits_than_those_compared_are_refused(
    model: dl.LensModel, found: dl.Comparison
) -> None:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    name = model.down_projection(2).name
    change = 0.3 * torch.randn(model.weights.parameters[name].shape)
    other = dl.Edit.from_deltas(model, {name: change})
    live = module.widget(model, found)
    fresh = module.widget(model, found)
    before = live.restore(["L0H1"]).patched.prob
    with other.applied(model):
        inside = dl.compare(model, found.edit, PROMPT, "the", sweep=False, progress=False)
        for one in (live, fresh):
            with pytest.raises(
                RequestError, match="not as it was when it was compared: the answer"
            ):
                one.restore(["L0H1"])
        own = module.widget(model, inside)
        wanted = dl.patch_attention(model, found.edit, PROMPT, answer="the", heads=["L0H1"])
        assert own.restore(["L0H1"]).patched.prob == wanted.patched.prob != before
    with pytest.raises(RequestError, match="not as it was"):
        own.restore(["L0H1"])
    for one in (live, fresh):  # both work again
        assert one.restore(["L0H1"]).patched.prob == before


def test_an_edit_of_several_facts_is_restored(model: dl.LensModel, found: dl.Comparison) -> None:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    request = found.edit.requests[0]
    both = replace(found.edit, requests=(request, replace(request, target_new="Oslo")))
    several = dl.compare(
        model, both, PROMPT, "the", subject=request.subject, sweep=False, progress=False
    )
    live = module.widget(model, several)
    wanted = module.widget(model, found).restore(["L0H1"])
    assert live.restore(["L0H1"]).patched.prob == wanted.patched.prob


HOST = """<!DOCTYPE html><title>A notebook</title><body><script>
const state = STATE, handlers = {};
window.sent = [];
const model = {
  get: (name) => state[name],
  set: (name, value) => { state[name] = value; },
  save_changes: () => {},
  on: (event, handle) => { (handlers[event] ??= []).push(handle); },
  off: () => {},
  send: (message) => { window.sent.push(message); },
};
window.state = state;
window.fire = (event, message) => (handlers[event] ?? []).forEach((handle) => handle(message));
SCRIPT
render({ model, el: document.body });
</script>"""


@pytest.mark.browser
def test_a_page_in_a_host(model: dl.LensModel, found: dl.Comparison, browser: Browser) -> None:  # noqa: F811
    whole = dl.compare(model, found.edit, PROMPT, "the", progress=False)
    first = {"heads": ["L0H1", "L2H0"], "answer": 0.25, "target": 0.5}
    other = list(whole.patterns)[1]  # not the one that a page opens by itself
    state = {
        "document": whole.html(),
        "opened": other,
        "selected": first["heads"],
        "answers": [first],
    }
    script = (resources.files("driftlens.viewer") / "widget.js").read_text("utf-8")
    text = HOST.replace("STATE", json.dumps(state).replace("<", "\\u003c"))
    browser.open_html(text.replace("SCRIPT", script.replace("export default { render };", "")))

    def told(*parts: str) -> None:
        browser.driver.switch_to.frame(browser.find("iframe"))
        try:
            browser.wait(lambda: all(p in browser.text("#restore-readout") for p in parts))
        finally:
            browser.driver.switch_to.default_content()

    def in_page(script: str) -> Any:
        browser.driver.switch_to.frame(browser.find("iframe"))
        try:
            return browser.js(script)
        finally:
            browser.driver.switch_to.default_content()

    told("2 heads restored", "0.25", "0.5")  # restored before the page was there
    browser.wait(lambda: browser.js("return state.opened") == other)
    assert browser.js("return state.selected") == first["heads"]
    browser.js(
        "state.answers = [...state.answers, arguments[0]]; fire('change:answers');"
        "fire('msg:custom', {kind: 'choose', heads: arguments[0].heads})",
        {"heads": ["L0H1", "L1H0"], "answer": 0.75, "target": 0.125},
    )
    told("2 heads restored", "0.75", "0.125")
    browser.wait(lambda: browser.js("return state.selected") == ["L0H1", "L1H0"])

    ask = "document.querySelector('#restore-readout .ask').click()"
    browser.js("fire('msg:custom', {kind: 'choose', heads: ['L1H1', 'L2H1']})")
    told("not computed", "Restore them now")
    in_page(ask)
    told("Computing")
    assert in_page("return document.activeElement.id") == "restore-readout"
    asked = {"kind": "restore", "heads": ["L1H1", "L2H1"]}
    browser.wait(lambda: browser.js("return sent") == [asked])
    browser.js("fire('msg:custom', {kind: 'failed', heads: ['L1H1', 'L2H1'], problem: 'No room.'})")
    told("Restore them now", "No room.")
    in_page(ask)
    told("Computing")
    in_page("document.getElementById('reset').click()")  # and nobody answers
    browser.js("fire('msg:custom', {kind: 'choose', heads: ['L1H1', 'L2H1']})")
    told("Restore them now")
