"""The page as a widget: what it asks of Python is what Python computes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import tiny

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
    with pytest.raises(RequestError, match="The comparison is of tiny1, the model is tiny2"):
        module.widget(load(2), found)


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
    (message,) = sent
    assert message["kind"] == "restored"
    assert message["heads"] == ["L0H1", "L2H0"]
    assert message["answer"] == pytest.approx(wanted.prob, rel=1e-5)
    assert message["target"] == pytest.approx(wanted["E"].prob, rel=1e-5)
    live._handle_custom_msg({"kind": "restore", "heads": ["L99H0"]}, [])
    assert sent[1]["kind"] == "failed"
    assert "99" in sent[1]["problem"]
    live._handle_custom_msg({"kind": "something else"}, [])
    assert len(sent) == 2
    assert live.restore([(0, 1)]).patched.prob == sent[2]["answer"]
