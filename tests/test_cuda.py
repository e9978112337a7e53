"""On a GPU everything is computed that is computed on the CPU, up to the order of its sums."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from wrapped import build

import driftlens as dl
from driftlens.assets import asset
from driftlens.bench import UNEDITED, Arm, run_bench
from driftlens.digests import quick_digest
from driftlens.editing.configs import ValueSearch
from driftlens.editing.methods import METHODS
from driftlens.generation import generate
from driftlens.readers import read_cases

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch computes on"
)
DEVICE = "cuda"
REQUEST = dl.EditRequest("The {} is located in the city of", "Eiffel Tower", "Rome", "Paris")
PROMPT = "The Eiffel Tower is famous. The Louvre is a museum in the city of"
SUBJECT = "Eiffel Tower"
CONTEXTS = ["{}", "Yes. {}"]
ARCHITECTURES = ["gpt2", "gptj", "llama", "gemma3"]
Pair = tuple[dl.LensModel, dl.LensModel]


def edit(model: dl.LensModel, method: str = "rome", penalty: Any = None, **more: Any) -> dl.Edit:
    """In the lowest layers, with random second moments where the editor uses some."""
    several = "layers" in {field.name for field in fields(METHODS[method].config)}
    options: dict[str, Any] = {"layers": (0, 1)} if several else {"layer": 0}
    if METHODS[method].needs_covariance:
        size = model.down_projection(0).d_mlp
        draws = torch.randn(2, 2 * size, size, generator=torch.Generator().manual_seed(0))
        options["covariance"] = {
            layer: dl.KeyCovariance(keys.T @ keys / len(keys), 10**6, layer, "random")
            for layer, keys in enumerate(draws[: 1 + several])
        }
    if issubclass(METHODS[method].config, ValueSearch):
        options["context_prompts"] = CONTEXTS
    if method == "alphaedit":
        options["nullspace_threshold"] = 0.5
    options |= more
    return dl.edit(model, REQUEST, method, penalty=penalty, steps=3, progress=False, **options)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def both(request: pytest.FixtureRequest) -> Pair:
    """The same model on the CPU and on the GPU."""
    here, there = (
        dl.load_model(build(request.param), tiny.tokenizer(), device=device)
        for device in ("cpu", DEVICE)
    )
    return here, there


def test_a_model_is_known_again_on_another_device(both: Pair) -> None:
    here, there = both
    assert there.device.type == DEVICE
    assert there.fingerprint() == here.fingerprint()
    assert there.differences(here.identity()) == []
    parameters = there.weights.parameters
    name, weight = max(parameters.items(), key=lambda item: item[1].numel())
    before = quick_digest(parameters)
    with torch.no_grad():
        last = weight.view(-1)[-4:]
        kept = last.clone()
        last.neg_()
        assert quick_digest(parameters) != before
        assert there.fingerprint() != here.fingerprint(), name
        last.copy_(kept)
    assert quick_digest(parameters) == before
    assert there.fingerprint() == here.fingerprint()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("penalty", [None, dl.SADR(gamma=0.5)], ids=["none", "sadr"])
def test_edits_are_those_of_the_cpu_and_leave_no_trace(
    both: Pair, method: str, penalty: Any
) -> None:
    here, there = both
    expected, found = (edit(model, method, penalty) for model in both)
    assert [*found.deltas] == [*expected.deltas]
    ids = there.tokens.encode(PROMPT).ids
    before = {name: weight.clone() for name, weight in there.weights.parameters.items()}
    answers = []
    for model, made in ((here, expected), (there, found)):
        with made.applied(model), torch.no_grad():
            answers.append(model.run(torch.tensor([ids]))[0].log_softmax(-1).cpu())
    assert torch.allclose(*answers, atol=5e-3)
    assert all(torch.equal(before[name], w) for name, w in there.weights.parameters.items())
    for name, delta in expected.deltas.items():
        if isinstance(delta, dl.LowRankDelta | dl.DenseDelta):
            mine = found.deltas[name].dense().cpu()
            assert float((mine - delta.dense()).norm() / delta.dense().norm()) < 5e-3


def test_drift_and_patches_are_those_of_the_cpu(both: Pair) -> None:
    """Of one edit, carried from the CPU to the GPU."""
    made = edit(both[0], lr=0.5)
    drifts = [dl.measure_drift(m, made, PROMPT, subject=SUBJECT) for m in both]
    expected, found = (one.to_dataframe() for one in drifts)
    assert [*found] == [*expected]
    for column in expected.select_dtypes("number"):
        np.testing.assert_allclose(found[column], expected[column], atol=1e-4, err_msg=column)
    assert expected["difference"].abs().max() > 2e-3
    options: dict[str, Any] = {"subject": SUBJECT, "answer": "Paris", "progress": False}
    sweeps = [dl.sweep_attention(m, made, PROMPT, **options).to_dataframe() for m in both]
    logprobs = [one["logprob"] for one in sweeps]
    np.testing.assert_allclose(*logprobs, atol=1e-3)
    assert np.ptp(logprobs[0]) > 1e-2


def test_a_bench_is_that_of_the_cpu_and_resumes(both: Pair, tmp_path: Path) -> None:
    cases = read_cases(asset("facts.jsonl"))[:2]
    config = dl.FtConfig(layer=1, steps=3, lr=1e-2)
    arms = [
        Arm(UNEDITED),
        Arm("ft", "ft-m", config),
        Arm("ft + sadr", "ft-m", config, (dl.SADR(gamma=0.5),)),
    ]
    results = [
        run_bench(m, cases, arms, tmp_path / str(i), progress=False) for i, m in enumerate(both)
    ]
    for result in results:
        assert result.is_complete
    for arm in results[0].arms:
        for case in cases:
            expected, found = (result.answers(arm)[case.id] for result in results)
            assert [a.metric for a in found] == [a.metric for a in expected]
            for side in ("right", "wrong"):
                ours, theirs = ([getattr(a, side) for a in one] for one in (found, expected))
                assert ours == pytest.approx(theirs, abs=2e-2)
    journal = tmp_path / "1" / "units.jsonl"
    assert f'"device": "{DEVICE}"' in journal.read_text()
    before = journal.read_bytes()
    again = run_bench(both[1], cases, arms, tmp_path / "1", progress=False)
    assert again.is_complete and journal.read_bytes() == before


@pytest.mark.real
@pytest.mark.parametrize("method", ["rome", "memit", "pmet"])
def test_the_real_model_is_edited_and_cured_as_on_the_cpu(
    smollm2: dl.LensModel, method: str
) -> None:
    there = dl.load_model("smollm2-135m", device=DEVICE)
    request = dl.EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    for penalty in (None, dl.SADR(gamma=0.8)):
        found, texts = [], []
        for model in (smollm2, there):
            made = dl.edit(
                model, request, method, penalty=penalty, context_prompts=CONTEXTS,
                covariance="identity", progress=False,
            )  # fmt: skip
            with made.applied(model):
                found.append(dl.score(model, request.text, ["Rome", "Paris"]))
                if penalty is None:
                    texts.append(generate(model, [request.text], 20))
        assert found[1] == pytest.approx(found[0], abs=0.05)
        assert texts[1:] == texts[:1]
