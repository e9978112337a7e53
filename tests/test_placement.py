"""Everything runs where the model is: on one device, on several, and in half precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from placement import CPU, FIRST, SECOND, Pretending, place_of, put, spread

import driftlens as dl

REQUEST = dl.EditRequest("The {} is located in the city of", "Eiffel Tower", "Rome", "Paris")
PROMPT = "The Eiffel Tower is famous. The Louvre is located in the city of"
OPTIONS: dict[str, Any] = {
    "layer": 1,
    "steps": 3,
    "early_stop_loss": -1.0,
    "context_prompts": ["{}", "Yes. {}"],
    "progress": False,
}
TEXTS = [*tiny.TEXT, PROMPT] * 3


def everything(model: dl.LensModel, engine: Any = None) -> dict[str, Any]:
    """An edit with its statistics, drift, patches and scores, as plain numbers."""
    covariance = dl.key_covariance(model, 1, TEXTS, cache=False, progress=False)
    made = dl.edit(
        model, REQUEST, penalty=dl.SADR(gamma=1.0), covariance=covariance, engine=engine, **OPTIONS
    )
    experiment = dl.PatchExperiment(model, made, PROMPT, answer="Paris", engine=engine)
    sweep = experiment.sweep(window=2, progress=False)
    columns = experiment.attention(layers=[1, 2], columns=[1, 2], queries=[-1, -3])
    written = experiment.activation("mlp_out", layers=[2])
    drift = dl.measure_drift(model, made, [PROMPT, REQUEST.text])
    with made.applied(model):
        scored = dl.score(model, PROMPT, ["Paris", "Rome of Italy"])
    return {
        "loss": [record["loss"] for record in made.trace],
        "sweep": sweep.to_dataframe()["logprob"].to_numpy(),
        "columns": columns.patched.logprob,
        "written": written.patched.logprob,
        "drift": drift.difference,
        "scores": list(scored.values()),
        "engine": made.info["engine"],
    }


def lens(architecture: str, dtype: torch.dtype | None = None) -> dl.LensModel:
    return dl.load_model(tiny.hf_model(architecture), tokenizer=tiny.tokenizer(), dtype=dtype)


@pytest.mark.parametrize(
    ("architecture", "engine", "n_devices"),
    [("llama", None, 1), ("gpt2", None, 2), ("gptj", None, 2), ("gemma3", None, 2),
     ("llama", "plain", 2)],
)  # fmt: skip
def test_everything_runs_where_the_model_is(architecture: str, engine: Any, n_devices: int) -> None:
    expected = everything(lens(architecture), engine)
    model = lens(architecture)
    half = model.info.n_layers // 2
    others = model.info.n_layers - half
    with Pretending():
        spread(model, [FIRST] * half + [FIRST if n_devices == 1 else SECOND] * others)
        assert model.device == FIRST
        found = everything(model, engine)
    assert found.pop("engine") == expected.pop("engine") == (engine or "suffix")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("method", ["rome", "r-rome"])
def test_an_update_is_solved_on_devices_without_float64(method: str) -> None:
    model = lens("llama")
    size = model.down_projection(1).d_mlp
    keys = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(0))
    covariance = dl.KeyCovariance(keys.T @ keys / len(keys), len(keys), 1, "random")
    expected = dl.edit(model, REQUEST, method, covariance=covariance, **OPTIONS)
    with Pretending(float64=False):
        spread(model, [FIRST] * model.info.n_layers)
        with pytest.raises(TypeError, match="xpu:0 has no float64"):
            model.hf_model.lm_head.weight.double()
        found = dl.edit(model, REQUEST, method, covariance=covariance, **OPTIONS)
        assert model.device == FIRST
        for name, delta in expected.deltas.items():
            np.testing.assert_allclose(found.deltas[name].dense(), delta.dense(), atol=1e-5)
        with found.applied(model):
            dl.score(model, PROMPT, ["Rome"])


def test_tensors_of_different_devices_do_not_meet() -> None:
    with Pretending():
        there, here = put(torch.ones(3), FIRST), torch.ones(3)
        assert there.device == FIRST
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([there, there.to(SECOND)])
        assert (there + here.to(there.device)).device == FIRST
        assert there[torch.tensor([0, 2])].device == FIRST
        assert torch.zeros(2, device=SECOND).device == SECOND
        assert place_of(there.cpu()) == CPU


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", torch.bfloat16), ("gpt2", torch.float16), ("gemma3", torch.bfloat16)],
)
def test_half_precision_is_kept_where_the_model_has_it_and_left_where_it_counts(
    architecture: str, dtype: torch.dtype
) -> None:
    model = lens(architecture, dtype)
    assert all(p.dtype == dtype for p in model.weights.parameters.values())
    covariance = dl.key_covariance(model, 1, TEXTS, cache=False, progress=False)
    assert covariance.matrix is not None
    assert covariance.matrix.dtype == torch.float32
    made = [
        dl.edit(model, REQUEST, covariance=covariance, penalty=dl.SADR(gamma=1.0), engine=engine,
                **OPTIONS)
        for engine in ("suffix", "plain")
    ]  # fmt: skip
    for one in made:
        (delta,) = one.deltas.values()
        assert delta.dense().dtype == torch.float32
        assert np.isfinite([record["loss"] for record in one.trace]).all()
    # The first step is the unedited model: rounding is all that may differ.
    losses = [one.trace[0]["nll"] for one in made]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    sweep = dl.sweep_attention(model, made[0], PROMPT, answer="Paris", progress=False)
    assert sweep.engine == "suffix"
    assert np.isfinite(sweep.to_dataframe()["logprob"]).all()
    with made[0].applied(model):
        assert all(p.dtype == dtype for p in model.weights.parameters.values())
