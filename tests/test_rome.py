"""ROME and SADR against plain implementations of their own, written here from the papers.

The plain versions use nothing of the package: an unwrapped Hugging Face model, its raw
tokenizer, forward hooks, torch.optim.Adam, an explicit inverse of C, loops over contexts,
layers and heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import driftlens as dl
from driftlens.attention import row_kl
from driftlens.editing import contexts as contexts_module
from driftlens.editing.contexts import SEED_WORDS, Context, parse_contexts, sample_contexts
from driftlens.editing.penalties import Sites
from driftlens.errors import DataError, DriftLensError, EditError, ModelError, RequestError
from driftlens.interventions import pattern_name

ARCHITECTURES = ["gpt2", "gptj", "llama", "gemma3"]
ENGINES = ["plain", "suffix"]
LAYER = 1
CONTEXTS = ["{}", "Yes. {}", "The Louvre, and the city of Paris. {}", "I. {}"]
REQUEST = dl.EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome")
SETTINGS: dict[str, Any] = {
    "layer": LAYER,
    "steps": 6,
    "lr": 0.3,
    "weight_decay": 0.4,
    "clamp_factor": 3.0,
    "kl_factor": 0.2,
    "early_stop_loss": -1.0,
}

STRONG = {**SETTINGS, "lr": 3.0, "clamp_factor": 40.0, "weight_decay": 0.01}
"""Moves the random models' attention by much."""


# --- the plain implementation ---------------------------------------------------------------


@dataclass
class Plain:
    """What the plain ROME found."""

    delta: torch.Tensor
    update: torch.Tensor
    trace: list[dict[str, float]] = field(default_factory=list)


def layers_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def down_of(model: Any, layer: int) -> Any:
    mlp = layers_of(model)[layer].mlp
    return next(getattr(mlp, n) for n in ("c_proj", "fc_out", "down_proj") if hasattr(mlp, n))


@contextmanager
def hooked(module: Any, function: Any) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


def plain_rome(
    model: Any,
    tokenizer: Any,
    request: dl.EditRequest,
    templates: list[str],
    covariance: np.ndarray,
    layer: int,
    steps: int,
    lr: float,
    weight_decay: float,
    clamp_factor: float,
    kl_factor: float,
    early_stop_loss: float = -1.0,
    gamma: float | None = None,
    heads: str = "max",
) -> Plain:
    """ROME with SADR, one context at a time, whole sequences, no padding."""
    down = down_of(model, layer)
    prompt = request.prompt.replace("{}", request.subject)

    def position(text: str) -> int:
        upto = text[: text.rindex(request.subject) + len(request.subject)]
        return len(tokenizer(upto)["input_ids"]) - 1

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    bare = ids_of(prompt)
    target = ids_of(f"{prompt} {request.target_new}")[len(bare) :]
    texts = [template.replace("{}", prompt) for template in templates]

    def keys_and_outputs(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        seen = {}

        def look(module: Any, args: Any, out: torch.Tensor) -> None:
            seen["key"], seen["out"] = args[0][0, position(text)], out[0, position(text)]

        with torch.no_grad(), hooked(down, look):
            model(torch.tensor([ids_of(text)]))
        return seen["key"], seen["out"]

    plain_key, initial = keys_and_outputs(prompt)
    mean_key = torch.stack([keys_and_outputs(text)[0] for text in texts]).mean(0)

    delta = torch.zeros_like(initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=lr)

    def passed(ids: list[int], at: int, attention: bool = False) -> Any:
        def add(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[0, at] = out[0, at] + delta
            return out

        with hooked(down, add):
            return model(torch.tensor([ids]), output_attentions=attention)

    essence_ids, essence_at = ids_of(f"{request.subject} is a"), position(request.subject)
    first_essence: torch.Tensor | None = None
    first_attention: list[Any] = []
    trace: list[dict[str, float]] = []
    for step in range(steps):
        nll, sadr, held = torch.zeros(()), torch.zeros(()), 0
        for number, text in enumerate(texts):
            ids = ids_of(text)
            last, subject = len(ids) - 1, position(text)
            out = passed([*ids, *target[:-1]], subject, attention=gamma is not None)
            logprobs = torch.log_softmax(out.logits[0], -1)
            own = [logprobs[last + i, token] for i, token in enumerate(target)]
            nll = nll - sum(own) / len(target) / len(texts)
            if gamma is None:
                continue
            if step == 0:
                first_attention.append([a.detach() for a in out.attentions])
            for now, before in zip(out.attentions, first_attention[number], strict=True):
                largest = max(float(before[0, h, last, subject]) for h in range(before.shape[1]))
                for head in range(now.shape[1]):
                    if heads == "max" and not now[0, head, last, subject].item() > largest:
                        continue
                    # Layers that the edit cannot reach are held without any effect.
                    held += int(not torch.equal(now, before) or step == 0)
                    p, q = before[0, head, last] + 1e-8, now[0, head, last] + 1e-8
                    sadr = sadr + gamma * (p * (p / q).log()).sum() / len(texts)
        essence = torch.log_softmax(passed(essence_ids, essence_at).logits[0, essence_at], -1)
        if first_essence is None:
            first_essence = essence.detach()
        kl = kl_factor * (essence.exp() * (essence - first_essence)).sum()
        decay = weight_decay * delta.norm() / initial.norm() ** 2
        loss = nll + kl + decay + sadr
        trace.append(
            {
                "loss": float(loss.detach()),
                "nll": float(nll.detach()),
                "kl": float(kl.detach()),
                "decay": float(decay.detach()),
                "sadr": float(sadr.detach()),
                "held_heads": held / len(texts),
                "delta_norm": float(delta.detach().norm()),
            }
        )
        if float(loss.detach()) < early_stop_loss or step == steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            limit = clamp_factor * initial.norm()
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    direction = torch.tensor(np.linalg.inv(covariance)) @ mean_key.double()
    direction = direction / direction.norm()
    left = delta.detach().double() / (plain_key.double() @ direction)
    return Plain(delta.detach(), torch.outer(left, direction), trace)


# --- the two side by side -------------------------------------------------------------------


def random_model(architecture: str, dtype: torch.dtype = torch.float64) -> Any:
    """In double precision Adam amplifies no rounding, so agreement is sharp."""
    seed = 1 if architecture == "gemma3" else 0  # with seed 0 no head is ever held
    return tiny.hf_model(architecture, seed, scale=12.0, noise=0.3).to(dtype)


@cache
def plain_model(architecture: str, dtype: torch.dtype = torch.float64) -> Any:
    return random_model(architecture, dtype).requires_grad_(False)


@cache
def lens(
    architecture: str = "gpt2", bos: bool = False, dtype: torch.dtype = torch.float64
) -> dl.LensModel:
    tokenizer = tiny.bos_tokenizer() if bos else tiny.tokenizer()
    model = random_model(architecture, dtype)
    return dl.load_model(model, tokenizer, name=f"tiny {architecture}")


def dtype_for(architecture: str, engine: str) -> torch.dtype:
    """Half of what Llama and Gemma compute is in single precision anyway."""
    single = engine == "suffix" and architecture in ("llama", "gemma3")
    return torch.float32 if single else torch.float64


def random_covariance(size: int, seed: int = 0) -> np.ndarray:
    """Symmetric, positive definite, far from the identity."""
    samples = np.random.default_rng(seed).standard_normal((3 * size, size))
    samples *= np.linspace(0.3, 3, size)
    return samples.T @ samples / len(samples)


@pytest.fixture
def covariance_file(tmp_path: Path) -> Any:
    def write(model: dl.LensModel, **more: Any) -> tuple[Path, np.ndarray]:
        matrix = random_covariance(model.down_projection(LAYER).d_mlp)
        path = tmp_path / "covariance.npz"
        np.savez(path, cov=matrix, count=np.int64(100_000), **more)
        return path, matrix

    return write


@cache
def expected_for(
    architecture: str,
    dtype: torch.dtype,
    target: str,
    strong: bool = False,
    gamma: float | None = None,
    heads: str = "max",
) -> Plain:
    """The plain result, remembered for the tests that share it."""
    return plain_rome(
        plain_model(architecture, dtype),
        tiny.tokenizer(),
        dl.EditRequest(REQUEST.prompt, REQUEST.subject, target),
        CONTEXTS,
        random_covariance(lens(architecture, dtype=dtype).down_projection(LAYER).d_mlp),
        **(STRONG if strong else SETTINGS),
        gamma=gamma,
        heads=heads,
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def weight_change(model: dl.LensModel, edit: dl.Edit) -> torch.Tensor:
    """The change as ``[d_model, d_mlp]``."""
    site = model.down_projection(LAYER)
    assert list(edit.deltas) == [site.name]
    dense = edit.deltas[site.name].dense()
    return dense.T if site.input_first else dense


def run_edit(model: dl.LensModel, request: dl.EditRequest = REQUEST, **changed: Any) -> dl.Edit:
    options = {
        **SETTINGS,
        "context_prompts": CONTEXTS,
        "covariance": "identity",
        "progress": False,
        **changed,
    }
    return dl.edit(model, request, **options)


def assert_same_trace(found: list[dict[str, Any]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for mine, plain in zip(found, expected, strict=True):
        for name in ("loss", "nll", "kl", "decay", "delta_norm"):
            assert mine[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("target", ["in", "New York"])
def test_rome_is_the_plain_one(
    architecture: str, target: str, engine: str, covariance_file: Any
) -> None:
    dtype = dtype_for(architecture, engine)
    model = lens(architecture, dtype=dtype)
    path, _ = covariance_file(model)
    request = dl.EditRequest(REQUEST.prompt, REQUEST.subject, target)
    expected = expected_for(architecture, dtype, target)
    edit = run_edit(model, request, covariance=path, engine=engine)
    assert edit.info["engine"] == engine
    assert relative(weight_change(model, edit), expected.update) < 1e-4
    assert_same_trace(edit.trace, expected.trace)
    assert edit.rank == 1


def test_target_lengths_of_the_tests_differ() -> None:
    lengths = [len(lens().tokens.target_ids(text)) for text in ("in", "Rome", "New York")]
    assert lengths[0] == 1 < lengths[1] < lengths[2]
    rows = [len(lens().tokens.encode(text.replace("{}", REQUEST.text))) for text in CONTEXTS]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("prompt", ["The capital of {}", "In the city of {} there is a"])
@pytest.mark.parametrize("bos", [False, True])
def test_rome_is_the_plain_one_wherever_the_subject_stands(
    prompt: str, bos: bool, covariance_file: Any
) -> None:
    # At the prompt's end the subject's last token is the last prompt token.
    model = lens("llama", bos)
    path, matrix = covariance_file(model)
    request = dl.EditRequest(prompt, "France", "English")
    tokenizer = tiny.bos_tokenizer() if bos else tiny.tokenizer()
    expected = plain_rome(
        plain_model("llama"), tokenizer, request, CONTEXTS, matrix, **SETTINGS, gamma=0.3
    )
    edit = run_edit(model, request, covariance=path, penalty=dl.SADR(gamma=0.3))
    assert relative(weight_change(model, edit), expected.update) < 1e-4
    assert_same_trace(edit.trace, expected.trace)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_rome_in_single_precision_is_the_plain_one(architecture: str, covariance_file: Any) -> None:
    model = lens(architecture, dtype=torch.float32)
    path, _ = covariance_file(model)
    expected = expected_for(architecture, torch.float32, "in")
    request = dl.EditRequest(REQUEST.prompt, REQUEST.subject, "in")
    edit = run_edit(model, request, covariance=path)
    assert relative(weight_change(model, edit), expected.update) < 1e-4
    assert {delta.dense().dtype for delta in edit.deltas.values()} == {torch.float32}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_suffix_engine_works_in_double_precision(architecture: str) -> None:
    # is -inf, and a row of nothing but -inf gives NaN.
    model = lens(architecture)
    edits = [run_edit(model, engine=engine) for engine in ENGINES]
    assert relative(weight_change(model, edits[1]), weight_change(model, edits[0])) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("heads", ["max", "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sadr_is_the_plain_one(
    architecture: str, heads: str, engine: str, covariance_file: Any
) -> None:
    dtype = dtype_for(architecture, "suffix")
    model = lens(architecture, dtype=dtype)
    path, _ = covariance_file(model)
    request = dl.EditRequest(REQUEST.prompt, REQUEST.subject, "New York")
    gamma = 0.5
    expected = expected_for(architecture, dtype, "New York", True, gamma, heads)
    penalty = dl.SADR(gamma=gamma, heads=heads)  # type: ignore[arg-type]
    common = {**STRONG, "covariance": path, "engine": engine}
    edit = run_edit(model, request, penalty=penalty, **common)
    assert edit.info["engine"] == engine
    assert relative(weight_change(model, edit), expected.update) < 1e-4
    assert_same_trace(edit.trace, expected.trace)
    for mine, plain in zip(edit.trace, expected.trace, strict=True):
        assert mine["sadr"] == pytest.approx(plain["sadr"], rel=1e-4, abs=1e-6)

    # It must have done something, or the comparison shows nothing.
    assert edit.trace[0]["sadr"] == 0.0
    assert all(record["sadr"] >= 0 for record in edit.trace)
    assert max(record["sadr"] for record in edit.trace) > 1e-3
    without = run_edit(model, request, **common)
    assert relative(weight_change(model, edit), weight_change(model, without)) > 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_held_heads_are_counted(architecture: str, covariance_file: Any) -> None:
    dtype = dtype_for(architecture, "suffix")
    model = lens(architecture, dtype=dtype)
    path, _ = covariance_file(model)
    above = model.info.n_layers - 1 - LAYER
    request = dl.EditRequest(REQUEST.prompt, REQUEST.subject, "New York")
    for heads in ("max", "all"):
        penalty = dl.SADR(gamma=0.5, heads=heads)  # type: ignore[arg-type]
        edit = run_edit(model, request, penalty=penalty, **{**STRONG, "covariance": path})
        counts = [record["held_heads"] for record in edit.trace]
        if heads == "all":
            assert counts == [above * model.info.n_heads] * len(counts)
            continue
        expected = expected_for(architecture, dtype, "New York", True, 0.5)
        assert counts == [record["held_heads"] for record in expected.trace]
        assert counts[0] == 0 < max(counts)


def test_gamma_of_zero_is_no_penalty() -> None:
    model = lens()
    with_zero = run_edit(model, penalty=dl.SADR(gamma=0.0))
    without = run_edit(model)
    assert torch.equal(weight_change(model, with_zero), weight_change(model, without))
    assert {record["sadr"] for record in with_zero.trace} == {0.0}
    assert all("sadr" not in record for record in without.trace)


def test_penalty_keeps_attention_where_it_was() -> None:
    drifts = []
    for gamma in (1e-6, 10.0, 1000.0):
        penalty = dl.SADR(gamma=gamma, heads="all")
        edit = run_edit(lens(), penalty=penalty, **{**STRONG, "lr": 0.1, "steps": 30})
        drifts.append(edit.trace[-1]["sadr"] / gamma)
    assert drifts[0] > 1000 * drifts[1]
    assert drifts[1] > 2 * drifts[2]


def test_restricted_layers() -> None:
    model = lens()
    edit = run_edit(model, penalty=dl.SADR(gamma=0.5, layers=(0, 2)))
    same = run_edit(model, penalty=dl.SADR(gamma=0.5))  # the edit of layer 1 reaches layer 2 only
    assert torch.equal(weight_change(model, edit), weight_change(model, same))


@pytest.mark.parametrize("penalty", [dl.SADR, dl.KeyDrift, dl.HiddenDrift])
def test_a_penalty_that_cannot_act_is_refused(penalty: Any) -> None:
    with pytest.raises(dl.RequestError, match=r"act in layers 0, 1: .* \(here 2 and above\)"):
        run_edit(lens(), penalty=penalty(layers=(0, 1)))
    with pytest.raises(dl.RequestError, match=r"SADR cannot hold L0H1, L1H3: .* \(it reaches 2\)"):
        run_edit(lens(), penalty=dl.SADR(heads=["L0H1", "L1H3"]))
    with pytest.raises(dl.RequestError, match=r"act in any layer: .* \(here none\) it holds none"):
        run_edit(lens(), layer=2, penalty=penalty())


def test_penalties_add_up() -> None:
    model = lens()
    twice = run_edit(model, penalty=[dl.SADR(gamma=0.2), dl.SADR(gamma=0.3)])
    once = run_edit(model, penalty=dl.SADR(gamma=0.5))
    assert relative(weight_change(model, twice), weight_change(model, once)) < 1e-6


# --- the pieces -----------------------------------------------------------------------------


def sites_and_rows(seed: int, contexts: int = 3, heads: int = 4, width: int = 6) -> Any:
    """Random attention of two layers, in double precision, and where to look."""
    generator = torch.Generator().manual_seed(seed)
    shape = (contexts + 1, heads, width, width)
    scores = {
        layer: torch.randn(shape, generator=generator, dtype=torch.float64) for layer in (2, 3)
    }
    sites = Sites(
        predicting=torch.tensor([[5], [4], [3]]),
        subject=torch.tensor([-5, -4, -6]),
        real=torch.ones(3, 6, dtype=torch.bool),
        layers=(2, 3),
        key_hooks={},
    )
    original = {pattern_name(layer): s.softmax(-1) for layer, s in scores.items()}
    return sites, scores, original


@pytest.mark.parametrize("heads", ["max", "all"])
def test_gradient_is_that_of_finite_differences(heads: str) -> None:
    sites, scores, original = sites_and_rows(seed=0)
    penalty = dl.SADR(gamma=0.7, heads=heads)  # type: ignore[arg-type]
    move = torch.Generator().manual_seed(100)
    moved = {
        layer: (s + torch.randn(s.shape, generator=move, dtype=torch.float64)).requires_grad_()
        for layer, s in scores.items()
    }

    def loss() -> torch.Tensor:
        now = {pattern_name(layer): s.softmax(-1) for layer, s in moved.items()}
        return penalty(now, original, sites).loss

    loss().backward()
    step = 1e-6
    checked = 0
    for s in moved.values():
        assert s.grad is not None
        for context, query in enumerate(sites.last_prompt.tolist()):
            for head in range(s.shape[1]):
                for key in range(s.shape[3]):
                    index = (context, head, query, key)
                    with torch.no_grad():
                        s[index] += step
                        up = float(loss())
                        s[index] -= 2 * step
                        down = float(loss())
                        s[index] += step
                    assert float(s.grad[index]) == pytest.approx((up - down) / 2 / step, abs=1e-7)
                    checked += int(s.grad[index] != 0)
        # Nothing but the rows of the last prompt tokens counts, and not the KL prompt.
        rest = s.grad.clone()
        rest[torch.arange(3), :, sites.last_prompt] = 0
        assert not rest.any()
    assert checked > (20 if heads == "all" else 5)


def test_mask_is_strict_and_of_the_same_layer_and_context() -> None:
    sites, _, original = sites_and_rows(0)
    penalty = dl.SADR(gamma=1.0)
    unmoved = penalty(original, original, sites)
    assert unmoved.notes == {"held_heads": 0.0}  # equal to the largest is not above it
    assert float(unmoved.loss) == 0.0

    name = pattern_name(2)
    rows = original[name][0, :, 5]
    subject = 1  # key -5 of 6
    top = int(rows[:, subject].argmax())
    lowest = int(rows[:, subject].argmin())
    for head, amount, held in [
        (top, 1e-9, True),
        (lowest, 1e-9, False),
        (lowest, float(rows[top, subject] - rows[lowest, subject]) + 1e-9, True),
        (lowest, float(rows[top, subject] - rows[lowest, subject]) - 1e-9, False),
    ]:
        now = {key: value.clone() for key, value in original.items()}
        now[name][0, head, 5, subject] += amount
        term = penalty(now, original, sites)
        assert term.notes["held_heads"] == pytest.approx(int(held) / 3)
        expected = row_kl(rows[head], now[name][0, head, 5]) / 3 if held else 0.0
        assert float(term.loss) == pytest.approx(float(expected), abs=1e-15)
        other_context = {key: value.clone() for key, value in original.items()}
        other_context[name][3, head, 5, subject] += 0.5  # the KL prompt's row
        assert float(penalty(other_context, original, sites).loss) == 0.0


def test_row_divergence_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 5, 7, generator=generator, dtype=torch.float64)
    scores[..., 5:] = -torch.inf  # masked keys
    p, q = scores.softmax(-1)
    for row in range(5):
        expected = sum(
            (float(a) + 1e-8) * np.log((float(a) + 1e-8) / (float(b) + 1e-8))
            for a, b in zip(p[row], q[row], strict=True)
        )
        assert float(row_kl(p, q)[row]) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"gamma": float("inf")}, "gamma"),
    ],
)
def test_penalty_that_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        dl.SADR(**arguments)


# --- what the edit does ---------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_edited_layer_answers_the_value(architecture: str, covariance_file: Any) -> None:
    # W' k + b = v* = h_0 + delta, with k and outputs recorded while the edit is applied.
    model = lens(architecture)
    path, _ = covariance_file(model)
    request = dl.EditRequest(REQUEST.prompt, REQUEST.subject, "New York")
    edit = run_edit(model, request, covariance=path, engine="plain")
    plain = plain_model(architecture)
    expected = expected_for(architecture, torch.float64, "New York")
    ids = torch.tensor([tiny.tokenizer()(REQUEST.text)["input_ids"]])
    at = len(tiny.tokenizer()(REQUEST.subject)["input_ids"]) - 1
    names = [f"blocks.{LAYER}.mlp.out.hook_in", f"blocks.{LAYER}.mlp.out.hook_out"]
    key, before = (model.record(ids, names)[name][0, at] for name in names)
    with edit.applied(model):
        key_inside, inside = (model.record(ids, names)[name][0, at] for name in names)
        weight = model.down_projection(LAYER).weight.detach().clone()
    if model.down_projection(LAYER).input_first:
        weight = weight.T
    bias = getattr(down_of(plain, LAYER), "bias", None)
    recomputed = weight @ key_inside + (0 if bias is None else bias)
    assert torch.equal(key, key_inside)
    assert relative(recomputed, before + expected.delta) < 1e-5
    assert relative(inside, before + expected.delta) < 1e-5
    assert float(expected.delta.norm()) == pytest.approx(edit.info["delta_norm"], rel=1e-5)


def test_edited_model_scores_what_the_trace_says() -> None:
    # The last pass has the final delta. Other positions' keys overlap with the edit's direction,
    # so this is exact only where the subject is all that the model reads.
    model = lens()
    request = dl.EditRequest("{}", "E", "in")
    assert len(model.tokens.encode(request.text)) == len(model.tokens.target_ids("in")) == 1
    edit = run_edit(model, request, **{**STRONG, "steps": 20}, context_prompts=["{}"])
    assert edit.trace[-1]["nll"] < edit.trace[0]["nll"] - 0.3
    for record, applied in ((edit.trace[0], False), (edit.trace[-1], True)):
        with edit.applied(model) if applied else nullcontext():
            score = dl.score_details(model, "E", ["in"])["in"]
        assert -score.mean_logprob == pytest.approx(record["nll"], rel=1e-5)
        assert score.prob == pytest.approx(record["target_prob"], rel=1e-5)


def test_edit_can_be_made_on_top_of_another() -> None:
    model = lens()
    first = run_edit(model)
    other = dl.EditRequest("The capital of {} is", "France", "Rome")
    with first.applied(model):
        second = run_edit(model, other)
        with second.applied(model):
            assert model.weights.is_edited
    fresh = dl.load_model(random_model("gpt2"), tiny.tokenizer())
    with torch.no_grad():
        fresh.down_projection(LAYER).weight.add_(next(iter(first.deltas.values())).dense())
    alone = run_edit(fresh, other)
    assert relative(weight_change(fresh, alone), weight_change(model, second)) < 1e-6


# --- the loop -------------------------------------------------------------------------------


@contextmanager
def counted(model: dl.LensModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts full passes with gradient, and updates."""
    counts = {"passes": 0, "updates": 0}
    run, adam = model.run, torch.optim.Adam.step

    def counting_run(*args: Any, **kwargs: Any) -> Any:
        counts["passes"] += int(torch.is_grad_enabled())
        return run(*args, **kwargs)

    def counting_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts["updates"] += 1
        return adam(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "run", counting_run)
        patch.setattr(torch.optim.Adam, "step", counting_step)
        yield counts


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_are_passes_and_updates_are_one_less(
    steps: int, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lens()
    if steps == 1:  # without any update delta is 0
        with counted(model, monkeypatch) as counts:
            edit = run_edit(model, steps=1, engine=engine)
        assert not weight_change(model, edit).any()
    else:
        with counted(model, monkeypatch) as counts:
            edit = run_edit(model, steps=steps, engine=engine)
    assert counts == {"passes": steps, "updates": steps - 1}
    assert [record["step"] for record in edit.trace] == list(range(steps))


def test_trace_columns() -> None:
    columns = {"step", "loss", "nll", "kl", "decay", "target_prob", "target_is_greedy"}
    columns |= {"delta_norm"}
    edit = run_edit(lens())
    assert all(set(record) == columns for record in edit.trace)
    held = run_edit(lens(), penalty=dl.SADR(gamma=0.5))
    assert all(set(record) == columns | {"sadr", "held_heads"} for record in held.trace)
    for record in held.trace:
        parts = [record[name] for name in ("nll", "kl", "decay", "sadr")]
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-9)
        assert 0 <= record["target_prob"] <= 1
        assert record["kl"] >= -1e-12
    table = held.to_dataframe()
    assert list(table["step"]) == list(range(6))
    assert set(table.columns) == columns | {"sadr", "held_heads"}


def test_first_step_is_the_unedited_model() -> None:
    model = lens()
    first = run_edit(model).trace[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-12)
    assert first["decay"] == 0.0
    assert first["delta_norm"] == 0.0
    texts = [template.replace("{}", REQUEST.text) for template in CONTEXTS]
    scores = [dl.score_details(model, text, ["Rome"])["Rome"] for text in texts]
    assert first["nll"] == pytest.approx(np.mean([-s.mean_logprob for s in scores]), rel=1e-5)
    assert first["target_prob"] == pytest.approx(np.mean([s.prob for s in scores]), rel=1e-5)


def test_early_stop() -> None:
    model = lens()
    common: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0}
    losses = [record["loss"] for record in run_edit(model, steps=6, **common).trace]
    limit = (losses[3] + min(losses[:3])) / 2
    assert losses[3] < limit < min(losses[:3])
    stopped = run_edit(model, steps=6, early_stop_loss=limit, **common)
    assert [record["loss"] for record in stopped.trace] == losses[:4]
    cut = run_edit(model, steps=4, **common)
    assert torch.equal(weight_change(model, stopped), weight_change(model, cut))
    at_once = run_edit(model, steps=6, early_stop_loss=1e9, **common)
    assert len(at_once.trace) == 1
    assert not weight_change(model, at_once).any()


def test_delta_stays_in_its_ball() -> None:
    model = lens()
    ids = torch.tensor([tiny.tokenizer()(REQUEST.text)["input_ids"]])
    at = len(tiny.tokenizer()(REQUEST.subject)["input_ids"]) - 1
    name = f"blocks.{LAYER}.mlp.out.hook_out"
    norm = float(model.record(ids, [name])[name][0, at].norm())
    edit = run_edit(model, clamp_factor=0.05, lr=2.0)
    norms = [record["delta_norm"] for record in edit.trace]
    assert max(norms) <= 0.05 * norm * (1 + 1e-6)
    assert norms[-1] == pytest.approx(0.05 * norm, rel=1e-6)
    free = run_edit(model, clamp_factor=1e6, lr=2.0)
    assert free.trace[-1]["delta_norm"] > 0.05 * norm


def test_same_edit_twice_is_the_same_edit() -> None:
    model = lens()
    edits = [run_edit(model, penalty=dl.SADR(gamma=0.5)) for _ in range(2)]
    assert torch.equal(weight_change(model, edits[0]), weight_change(model, edits[1]))
    assert edits[0].trace == edits[1].trace


# --- contexts -------------------------------------------------------------------------------


@cache
def sampling_model() -> dl.LensModel:
    return dl.load_model(tiny.hf_model("gpt2"), tiny.bos_tokenizer(), probe=False)


def forget(model: dl.LensModel) -> None:
    model.memo.clear()


def test_contexts_are_twenty_one() -> None:
    model = sampling_model()
    found = sample_contexts(model)
    assert len(found) == 21
    assert found[0].is_plain
    assert all(context.before.endswith(". ") and not context.after for context in found[1:])
    words = [word for _ in range(2) for word in SEED_WORDS for _ in range(2)]
    for context, word in zip(found[1:], words, strict=True):
        assert context.before.startswith(word)
    assert len(set(found)) > 15


def test_contexts_have_their_lengths_without_bos(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sampling_model()
    rows: list[list[int]] = []

    def decode(ids: list[int], **options: Any) -> str:
        rows.append(list(ids))
        return "x"

    forget(model)
    with monkeypatch.context() as patch:
        patch.setattr(model.tokenizer, "decode", decode)
        sample_contexts(model)
    forget(model)
    lengths = [len(row) - 1 for row in rows]
    first_words = [len(tiny.tokenizer()(word)["input_ids"]) for word in SEED_WORDS for _ in "ab"]
    assert lengths == [max(5, n) for n in first_words] + [max(10, n) for n in first_words]
    assert {row[0] for row in rows} == {0}


def test_contexts_are_continuations_from_the_five_most_likely() -> None:
    model = sampling_model()
    plain = tiny.hf_model("gpt2")
    tokenizer = tiny.bos_tokenizer()
    rows: list[list[int]] = []
    original = contexts_module._sentence
    try:
        contexts_module._sentence = lambda m, row: rows.append(list(row)) or original(m, row)
        forget(model)
        sample_contexts(model)
    finally:
        contexts_module._sentence = original
    assert len(rows) == 20
    with torch.no_grad():
        for row in rows:
            start = next(
                len(tokenizer(word)["input_ids"])
                for word in sorted(SEED_WORDS, key=len, reverse=True)
                if row[: len(tokenizer(word)["input_ids"])] == tokenizer(word)["input_ids"]
            )
            top = plain(torch.tensor([row])).logits[0].topk(5).indices.tolist()
            assert all(row[i] in top[i - 1] for i in range(start, len(row)))


def test_a_seed_is_a_whole_number_of_any_type() -> None:
    model = lens("llama")
    options: dict[str, Any] = {
        "layer": LAYER, "steps": 2, "covariance": "identity", "progress": False,
        "contexts_per_word": 1, "context_lengths": (4,),
    }  # fmt: skip
    made = [dl.edit(model, REQUEST, seed=seed, **options) for seed in (3, np.int64(3))]
    assert made[0].config == made[1].config
    assert type(made[1].config["seed"]) is int
    for function in (dl.edit, dl.edit_each, dl.edit_sequence):
        facts = REQUEST if function is dl.edit else [REQUEST]
        with pytest.raises(dl.DriftLensError, match=r"seed is 1.5. Give a whole number"):
            list(function(model, facts, seed=1.5, **options))


def test_contexts_depend_on_their_seed_alone() -> None:
    model = sampling_model()
    found = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        forget(model)
        before = torch.get_rng_state()
        found.append(sample_contexts(model, seed=3))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]
    assert sample_contexts(model, seed=4) != found[0]
    assert sample_contexts(model, seed=3) == found[0]


def test_contexts_are_of_the_unedited_model() -> None:
    model = sampling_model()
    name = model.down_projection(LAYER).name
    ruin = 1e3 * torch.ones(model.weights.parameters[name].shape)
    edit = dl.Edit.from_deltas(model, {name: ruin.tril()})
    forget(model)
    with edit.applied(model):
        inside = sample_contexts(model)
        assert tuple(inside) != contexts_module._sample(model, (5, 10), 2, 0)
    forget(model)
    assert sample_contexts(model) == inside


def test_edit_reads_and_changes_no_global_random_state() -> None:
    model = sampling_model()
    found = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002
        forget(model)
        before = torch.get_rng_state()
        edit = run_edit(model, context_prompts=None, steps=2, penalty=dl.SADR())
        assert torch.equal(torch.get_rng_state(), before)
        found.append(edit)
    assert found[0].config["contexts"] == found[1].config["contexts"]
    assert len(found[0].config["contexts"]) == 21
    assert torch.equal(weight_change(model, found[0]), weight_change(model, found[1]))
    other = run_edit(model, context_prompts=None, steps=2, seed=1)
    assert other.config["contexts"] != found[0].config["contexts"]


def test_remembered_contexts_cannot_be_spoiled() -> None:
    model = sampling_model()
    first = sample_contexts(model)
    first.clear()
    assert len(sample_contexts(model)) == 21


@pytest.mark.parametrize("text", ["{0} {} }{ ", "{x!r:>{y}}", "\n\n{}\n\n"])
def test_generated_braces_are_harmless(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = sampling_model()
    forget(model)
    with monkeypatch.context() as patch:
        patch.setattr(model.tokenizer, "decode", lambda ids, **options: text)
        contexts = sample_contexts(model)
        edit = run_edit(model, context_prompts=None, steps=1)
    forget(model)
    expected = text.replace("\n\n", " ") + ". "
    assert contexts == [Context()] + [Context(before=expected)] * 20
    edit.save(tmp_path)
    assert dl.load_edit(tmp_path, model).config["contexts"][1] == [expected, ""]


def test_generated_text_is_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sampling_model()
    forget(model)
    with monkeypatch.context() as patch:
        patch.setattr(model.tokenizer, "decode", lambda ids, **options: "ﬁne\n\nＡ é")
        contexts = sample_contexts(model)
    forget(model)
    assert contexts[1].before == "fine A e\u0301. "


def test_contexts_of_ones_own() -> None:
    assert parse_contexts(["{}", "Yes. {}", "{} No", "a } { b {}"]) == [
        Context(),
        Context(before="Yes. "),
        Context(after=" No"),
        Context(before="a } { b "),
    ]
    edit = run_edit(lens(), context_prompts=["{}", "So: {}"])
    assert edit.config["contexts"] == [["", ""], ["So: ", ""]]
    alone = run_edit(lens(), context_prompts=["{}"])
    assert not torch.equal(weight_change(lens(), edit), weight_change(lens(), alone))


@pytest.mark.parametrize("given", [[], (), "{}", ["no slot"], ["{}", "{} and {}"], [""], ["{0}"]])
def test_contexts_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(RequestError):
        run_edit(lens(), context_prompts=given)


# --- the model is left alone ----------------------------------------------------------------


def state_of(model: dl.LensModel) -> dict[str, Any]:
    return {
        name: (id(p), p.data_ptr(), p.requires_grad, p.detach().clone().view(torch.int32))
        for name, p in model.hf_model.named_parameters()
    }


def assert_same_state(model: dl.LensModel, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, (*flags, weights) in before.items():
        assert list(after[name][:-1]) == flags
        assert torch.equal(after[name][-1], weights)
    assert all(p.grad is None for p in model.hf_model.parameters())
    assert not model.weights.is_edited
    assert not model.hf_model.training


@pytest.fixture
def flagged() -> Iterator[dl.LensModel]:
    """A model of which some parameters are frozen by its owner."""
    model = lens("llama", dtype=torch.float32)
    for number, parameter in enumerate(model.hf_model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    yield model
    for parameter in model.hf_model.parameters():
        parameter.requires_grad_(True)


@pytest.mark.parametrize("engine", ENGINES)
def test_model_is_as_before_after_an_edit(flagged: dl.LensModel, engine: str) -> None:
    before = state_of(flagged)
    hooks = sum(len(m._forward_hooks) for m in flagged.hf_model.modules())
    ids = torch.tensor([[5, 70, 33, 8]])
    with torch.no_grad():
        logits = flagged.run(ids)
    run_edit(flagged, penalty=dl.SADR(gamma=0.5), engine=engine)
    assert_same_state(flagged, before)
    assert sum(len(m._forward_hooks) for m in flagged.hf_model.modules()) == hooks
    with torch.no_grad():
        assert torch.equal(flagged.run(ids), logits)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_model_is_as_before_after_an_exception(
    flagged: dl.LensModel,
    engine: str,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = state_of(flagged)
    ids = torch.tensor([[5, 70, 33, 8]])
    with torch.no_grad():
        logits = flagged.run(ids)
    calls = []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return original(self, *args)

    original = dl.SADR.__call__
    with monkeypatch.context() as patch:
        patch.setattr(dl.SADR, "__call__", failing)
        with pytest.raises(error):
            run_edit(flagged, penalty=dl.SADR(gamma=0.5), engine=engine)
    assert_same_state(flagged, before)
    with torch.no_grad():
        assert torch.equal(flagged.run(ids), logits)


def test_exception_inside_a_hook_leaves_nothing(
    flagged: dl.LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(flagged)
    ids = torch.tensor([[5, 70, 33, 8]])
    with torch.no_grad():
        logits = flagged.run(ids)
    head = flagged.hf_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("inside")))
    try:
        with pytest.raises((RuntimeError, DriftLensError)):
            run_edit(flagged, engine="suffix")
    finally:
        handle.remove()
    assert_same_state(flagged, before)
    with torch.no_grad():
        assert torch.equal(flagged.run(ids), logits)


def test_edit_outside_of_no_grad_and_inside_gives_the_same() -> None:
    with torch.no_grad():
        inside = run_edit(lens())
    assert torch.equal(weight_change(lens(), inside), weight_change(lens(), run_edit(lens())))


# --- wrong inputs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"method": "romeo"}, RequestError, "no editor"),
        ({"learning_rate": 0.1}, RequestError, "no hyperparameter 'learning_rate'"),
        ({"steps": 0}, RequestError, "steps"),
        ({"steps": -1}, RequestError, "steps"),
        ({"lr": -1.0}, RequestError, "lr"),
        ({"lr": 0.0}, RequestError, "lr"),
        ({"lr": float("nan")}, RequestError, "lr"),
        ({"lr": float("inf")}, RequestError, "lr"),
        ({"clamp_factor": 0.0}, RequestError, "clamp_factor"),
        ({"weight_decay": -0.1}, RequestError, "weight_decay"),
        ({"kl_factor": -1.0}, RequestError, "kl_factor"),
        ({"layer": 3}, ModelError, "no layer 3"),
        ({"layer": -1}, ModelError, "no layer -1"),
        ({"context_prompts": ["{} {}"]}, RequestError, "2 slots"),
        ({"covariance": 3}, EditError, "covariance cannot be int"),
        ({"covariance": torch.eye(64)}, EditError, r"a bare Tensor.*Wrap it: KeyCovariance\("),
        ({"covariance": np.eye(64)}, EditError, r"a bare ndarray.*Wrap it: KeyCovariance\("),
        ({"covariance": {LAYER: torch.eye(64)}}, EditError, "a bare Tensor.*Wrap it"),
        ({"covariance": ["A text.", 3]}, EditError, "One of the texts is of type int. Give str"),
        ({"covariance": "absent.npz"}, DataError, "cannot be read"),
    ],
)
def test_wrong_input_is_refused(
    changed: dict[str, Any], error: type[DriftLensError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_edit(lens(), **changed)


def test_covariance_of_another_size_or_layer_is_refused(
    covariance_file: Any, tmp_path: Path
) -> None:
    model = lens()
    small = tmp_path / "small.npz"
    np.savez(small, cov=np.eye(64), count=np.int64(1000))
    with pytest.raises(EditError, match="of size 64"):
        run_edit(model, covariance=small)
    path, matrix = covariance_file(model, layer=np.int64(2))
    with pytest.raises(DataError, match="of layer 2"):
        run_edit(model, covariance=path)
    given = dl.KeyCovariance(torch.tensor(matrix), 1000, 2, "test")
    with pytest.raises(EditError, match="of layer 2"):
        run_edit(model, covariance=given)


def test_covariance_that_has_no_inverse_is_refused() -> None:
    model = lens()
    size = model.down_projection(LAYER).d_mlp
    few = dl.KeyCovariance(torch.eye(size), size - 1, LAYER, "few tokens")
    with pytest.raises(EditError, match="fewer than"):
        run_edit(model, covariance=few)


def test_singular_covariance_is_refused() -> None:
    model = lens()
    size = model.down_projection(LAYER).d_mlp
    singular = dl.KeyCovariance(torch.zeros(size, size), 10 * size, LAYER, "zeros")
    with pytest.raises(EditError, match="singular"):
        run_edit(model, covariance=singular)


def test_applied_edit_needs_a_covariance() -> None:
    model = lens()
    first = run_edit(model)
    with first.applied(model), pytest.raises(RequestError, match="An edit is applied now"):
        run_edit(model, covariance=None)
    assert not model.weights.is_edited


def test_layer_that_nobody_tuned_is_announced() -> None:
    options = {k: v for k, v in SETTINGS.items() if k != "layer"}
    common: dict[str, Any] = {"context_prompts": ["{}"], "covariance": "identity"}
    with pytest.warns(UserWarning, match="No layers are known"):
        edit = dl.edit(lens(), REQUEST, **options, **common, progress=False)
    assert edit.config["layer"] == 0


def test_configuration_is_recorded() -> None:
    config = dl.RomeConfig(**SETTINGS)
    edit = run_edit(lens(), config=config, steps=3)
    for name, value in {**SETTINGS, "steps": 3}.items():
        assert edit.config[name] == value
    identity = {"source": "identity", "tokens": 0, "layer": None}
    assert edit.config["covariance"] == {str(LAYER): identity}
    assert edit.config["penalties"] == []
    assert edit.config["dtype"] == "float64"
    assert edit.requests == (REQUEST,)
