"""The fast way gives what the plain way gives: for edits and for patches, on every architecture."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tiny
import torch

import driftlens as dl
from driftlens.suffix import SuffixRunner

SUBJECT = "The Eiffel Tower"
PROMPT = "I saw the city. The Eiffel Tower is famous. The Louvre is located in the city of"


@cache
def lens(architecture: str) -> dl.LensModel:
    tokenizer = tiny.bos_tokenizer() if architecture in ("llama", "gemma3") else tiny.tokenizer()
    return dl.load_model(tiny.hf_model(architecture), tokenizer=tokenizer, name=architecture)


@cache
def wide_lens() -> dl.LensModel:
    inner = tiny.hf_model("mistral", sliding_window=12)
    return dl.load_model(inner, tokenizer=tiny.tokenizer(), name="mistral")


@cache
def some_edit(architecture: str) -> dl.Edit:
    model = lens(architecture)
    generator = torch.Generator().manual_seed(3)
    down = model.down_projection(0)
    left, right = (torch.randn(size, 1, generator=generator) for size in down.weight.shape)
    return dl.Edit.from_deltas(
        model,
        {down.name: dl.LowRankDelta(left * 0.3, right)},
        request=dl.EditRequest("{} is located in the city of", SUBJECT, "Rome", "Paris"),
    )


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize(
    ("subject", "prompt", "target"),
    [
        (SUBJECT, "{} is located in the city of", "Rome"),
        ("Ada", "{} is located in the city of", "Charles Babbage"),  # at the very start
        (SUBJECT, "In the city of France, near {}", "Rome"),  # subject last
    ],
)
def test_edits_are_the_same(architecture: str, subject: str, prompt: str, target: str):
    # A window of five would hide the subject from where the target is predicted; the gradient
    # would be rounding noise, which Adam turns into steps as large as any.
    model = wide_lens() if architecture == "mistral" else lens(architecture)
    request = dl.EditRequest(prompt, subject, target)
    options: dict[str, Any] = {
        "layer": 1,
        "steps": 6,
        "lr": 0.02,
        "clamp_factor": 100.0,
        "covariance": "identity",
        "penalty": dl.SADR(gamma=5.0, heads="all"),
        "progress": False,
    }
    plain, fast = (dl.edit(model, request, engine=e, **options) for e in ("plain", "suffix"))
    assert (plain.info["engine"], fast.info["engine"]) == ("plain", "suffix")
    (before,), (after,) = plain.deltas.values(), fast.deltas.values()
    difference = (before.dense() - after.dense()).norm() / before.dense().norm()
    assert float(difference) < 1e-4
    for one, other in zip(plain.trace, fast.trace, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["sadr"] == pytest.approx(other["sadr"], rel=1e-2, abs=1e-5)
    assert dl.edit(model, request, **options).info["engine"] == "suffix"


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize(
    ("direction", "options"),
    [
        ("restore", {}),
        ("restore", {"exchange": "values"}),
        ("restore", {"exchange": "both"}),
        ("restore", {"columns": [0, 3, -1]}),
        ("contaminate", {"columns": "subject_last"}),
    ],
    ids=str,
)
def test_patches_are_the_same(architecture: str, direction: Any, options: dict[str, Any]):
    model, edit = lens(architecture), some_edit(architecture)
    found = []
    for engine in ("plain", "suffix"):
        experiment = dl.PatchExperiment(
            model,
            edit,
            PROMPT,
            SUBJECT,
            "Paris of France",
            direction=direction,
            engine=engine,  # type: ignore[arg-type]
        )
        sweep = experiment.sweep(window=2, progress=False, **options)
        assert sweep.engine == engine
        found.append(sweep.to_dataframe())
    plain, fast = found
    assert (plain["logprob"] - fast["logprob"]).abs().max() < 1e-4
    moved = plain["logprob"][plain["kind"] != "original"]
    assert moved.max() - moved.min() > 1e-4  # the patches do something


def test_a_suffix_pass_reads_less_than_the_whole_sequence():
    model = lens("llama")
    rows = [model.tokens.encode(text).ids for text in (PROMPT, "The Louvre is")]
    starts = [len(rows[0]) - 2, 1]
    runner = SuffixRunner(model, rows, starts, first_layer=1)
    assert runner.ids.shape[1] == max(2, len(rows[1]) - 1)
    with torch.no_grad():
        logits = runner.run()
        for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
            whole = model.run(torch.tensor([ids]))[0, start:]
            torch.testing.assert_close(logits[row, : len(whole)], whole, atol=1e-4, rtol=1e-4)
    assert "forward" not in vars(model.bridge.blocks[0])


def test_a_model_that_cannot_reuse_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch):
    model = dl.load_model(tiny.hf_model("llama"), tokenizer=tiny.tokenizer())
    edit = dl.Edit.from_deltas(
        model, {model.down_projection(0).name: torch.randn(32, 64)}, request=None
    )

    def broken(self: SuffixRunner, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no cache here")

    monkeypatch.setattr(SuffixRunner, "run", broken)
    request = dl.EditRequest("{} is located in the city of", SUBJECT, "Rome")
    with pytest.warns(UserWarning, match="no cache here"):
        made = dl.edit(model, request, layer=1, steps=2, covariance="identity", progress=False)
    assert made.info["engine"] == "plain"
    experiment = dl.PatchExperiment(model, edit, PROMPT, SUBJECT, "Paris")
    with pytest.warns(UserWarning, match="no cache here"):
        sweep = experiment.sweep(progress=False)
    assert sweep.engine == "plain"


def test_wrong_logits_are_noticed(monkeypatch: pytest.MonkeyPatch):
    model = dl.load_model(tiny.hf_model("llama"), tokenizer=tiny.tokenizer())
    right = SuffixRunner.run

    def wrong(self: SuffixRunner, *args: Any, **kwargs: Any) -> torch.Tensor:
        return right(self, *args, **kwargs).flip(-1)

    monkeypatch.setattr(SuffixRunner, "run", wrong)
    request = dl.EditRequest("{} is located in the city of", SUBJECT, "Rome")
    with pytest.warns(UserWarning, match="differ"):
        made = dl.edit(model, request, layer=1, steps=2, covariance="identity", progress=False)
    assert made.info["engine"] == "plain"
