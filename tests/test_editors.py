"""Every editor against a plain version, against the others where the maths says so, and alone."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any

import plain_editors as plain
import pytest
import tiny
import torch

import driftlens as dl
import driftlens.editing.outcome as outcome
from driftlens.editing import fine_tuning, methods, spreading
from driftlens.editing.alphaedit import null_space_right, project
from driftlens.editing.configs import EmmetConfig
from driftlens.editing.emmet import equality_right
from driftlens.editing.methods import METHODS
from driftlens.editing.outcome import NullSpaceState
from driftlens.editing.penalties import PenaltyTerm
from driftlens.editing.spreading import PostNorm
from driftlens.editing.statistics import KeyCovariance
from driftlens.errors import EditError, ModelError, RequestError
from driftlens.interventions import block_out_name, down_in_name, down_out_name
from driftlens.weights import WeightStack

ARCHITECTURES = ["gpt2", "llama", "gemma3"]
TEMPLATES = ["{}", "Yes. {}", "The Louvre, and the city of Paris. {}", "I. {}"]
REQUESTS = [
    dl.EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome"),
    dl.EditRequest("The mother tongue of {} is", "Ada Lovelace", "the French"),
    dl.EditRequest("{} is in", "The Louvre", "Paris"),
]
FACTS = [plain.Fact(r.prompt, r.subject, r.target_new) for r in REQUESTS]
SEARCH: dict[str, Any] = {
    "steps": 5,
    "lr": 0.3,
    "weight_decay": 0.4,
    "clamp_factor": 1.5,
    "kl_factor": 0.2,
}
LAYERS = (0, 1)
SHARED: dict[str, Any] = {"progress": False}
VALUES: dict[str, Any] = {
    **SEARCH, **SHARED, "early_stop_loss": -1.0, "context_prompts": TEMPLATES
}  # fmt: skip
LOCATED: dict[str, dict[str, Any]] = {
    "rome": {"layer": 1, **VALUES, "covariance": "identity"},
    "r-rome": {"layer": 1, **VALUES, "covariance": "identity"},
    "memit": {"layers": LAYERS, **VALUES, "covariance": "identity", "cov_weight": 0.5},
    "pmet": {"layers": LAYERS, **VALUES, "covariance": "identity", "cov_weight": 0.5},
    "emmet": {"layers": LAYERS, **VALUES, "covariance": "identity", "cov_weight": 0.5},
    "alphaedit": {"layers": LAYERS, **VALUES, "ridge": 0.1, "nullspace_threshold": 0.5},
    "ft-l": {"layer": 1, "steps": 5, "lr": 0.01, **SHARED},
    "ft-m": {"layer": 1, "steps": 5, "lr": 0.01, **SHARED},
    "grace": {"layer": 1, "steps": 5, "lr": 0.3, "stop_loss": -1.0, **SHARED},
}
SEVERAL = [name for name, method in METHODS.items() if method.takes_several]


@cache
def raw(architecture: str, dtype: torch.dtype = torch.float64) -> Any:
    return tiny.hf_model(architecture, 1, scale=12.0, noise=0.3).to(dtype).requires_grad_(False)


@cache
def lens(architecture: str = "llama", dtype: torch.dtype = torch.float64) -> dl.LensModel:
    model = tiny.hf_model(architecture, 1, scale=12.0, noise=0.3).to(dtype)
    return dl.load_model(model, tiny.tokenizer(), name=f"tiny {architecture}")


def moments(size: int, seed: int) -> torch.Tensor:
    """Symmetric, positive definite, far from the identity, with a few small directions."""
    samples = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed)).double()
    samples = samples * torch.linspace(0.05, 3, size, dtype=torch.float64)
    return samples.T @ samples / len(samples)


def given_moments(model: dl.LensModel, layers: Sequence[int]) -> dict[int, KeyCovariance]:
    return {
        y: KeyCovariance(moments(model.down_projection(y).d_mlp, y), 10**6, y, "random")
        for y in layers
    }


def options_for(method: str, model: dl.LensModel) -> dict[str, Any]:
    options = dict(LOCATED[method])
    if method == "alphaedit":
        options["covariance"] = given_moments(model, LAYERS)
    return options


def change_of(model: dl.LensModel, edit: dl.Edit, layer: int) -> torch.Tensor:
    """The change of a down-projection as ``[d_model, d_mlp]``."""
    down = model.down_projection(layer)
    dense = edit.deltas[down.name].dense()
    return dense.T if down.input_first else dense


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def engine_dtype(architecture: str, engine: str) -> torch.dtype:
    single = engine == "suffix" and architecture != "gpt2"
    return torch.float32 if single else torch.float64


# --- against plain versions ------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["plain", "suffix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["memit", "pmet"])
def test_memit_and_pmet_are_the_plain_ones(method: str, architecture: str, engine: str) -> None:
    dtype = engine_dtype(architecture, engine)
    model = lens(architecture, dtype)
    given = given_moments(model, LAYERS)
    edit = dl.edit(
        model, REQUESTS, method, layers=LAYERS, covariance=given, cov_weight=0.7,
        engine=engine, **VALUES,
    )  # fmt: skip
    expected = plain.plain_memit(
        raw(architecture, dtype), tiny.tokenizer(), FACTS, TEMPLATES, LAYERS,
        {y: moment.matrix.double() for y, moment in given.items()}, 0.7,
        plain.Search(**SEARCH, pmet=method == "pmet"),
    )  # fmt: skip
    assert edit.info["engine"] == engine
    for layer in LAYERS:
        assert relative(change_of(model, edit, layer), expected[layer]) < 1e-4
        assert expected[layer].norm() > 1e-3
    assert len(edit.to_dataframe()) == sum(record["fact"] >= 0 for record in edit.trace)
    assert sorted({record["fact"] for record in edit.trace}) == [0, 1, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_alphaedit_is_the_plain_one_in_sequence(architecture: str) -> None:
    model = lens(architecture)
    given = given_moments(model, LAYERS)
    matrices = {y: moment.matrix.double() for y, moment in given.items()}
    options = {
        "layers": LAYERS, "covariance": given, "nullspace_threshold": 0.5, "ridge": 0.1, **VALUES
    }  # fmt: skip
    batches = [FACTS[:2], FACTS[2:]]
    expected = plain.plain_alphaedit(
        raw(architecture), tiny.tokenizer(), batches, TEMPLATES, LAYERS, matrices, 0.5, 0.1,
        plain.Search(**SEARCH),
    )  # fmt: skip
    state = NullSpaceState()
    first = dl.edit(model, REQUESTS[:2], "alphaedit", state=state, **options)
    assert (state.facts, sorted(state.key_sums)) == (2, list(LAYERS))
    with first.applied(model):
        second = dl.edit(model, REQUESTS[2:], "alphaedit", state=state, **options)
    assert (state.facts, second.info["earlier_facts"]) == (3, 2)
    without = dl.edit(model, REQUESTS[2:], "alphaedit", **options)
    for layer in LAYERS:
        assert relative(change_of(model, first, layer), expected[0][layer]) < 1e-4
        assert relative(change_of(model, second, layer), expected[1][layer]) < 1e-4
        # The earlier edit's keys count: without them something else comes out.
        assert relative(change_of(model, without, layer), expected[1][layer]) > 1e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["ft-l", "ft-m"])
@pytest.mark.parametrize("norm_constraint", [None, 0.015])
def test_fine_tuning_is_the_plain_one(
    method: str, architecture: str, norm_constraint: float | None
) -> None:
    model = lens(architecture)
    numbers: dict[str, Any] = {
        "steps": 6, "lr": 0.01, "stop_loss": 1e-3, "weight_decay": 0.3,
        "norm_constraint": norm_constraint,
    }  # fmt: skip
    expected = plain.plain_fine_tuning(
        raw(architecture), tiny.tokenizer(), FACTS, 1, teacher_forced=method == "ft-m", **numbers
    )
    down = model.down_projection(1)
    for engine in ("plain", "suffix"):
        edit = dl.edit(model, REQUESTS, method, layer=1, engine=engine, progress=False, **numbers)
        names = [down.name, *([down.bias] if down.bias else [])]
        assert list(edit.deltas) == names
        for name, change in zip(names, expected, strict=True):
            assert relative(edit.deltas[name].dense(), change) < 1e-4
        limit = max(float(delta.dense().abs().max()) for delta in edit.deltas.values())
        assert norm_constraint is None or limit <= norm_constraint * (1 + 1e-6)


def test_fine_tuning_can_leave_the_bias_alone() -> None:
    edit = dl.edit(lens("gpt2"), REQUESTS[0], "ft-m", train_bias=False, **LOCATED["ft-m"])
    assert list(edit.deltas) == [lens("gpt2").down_projection(1).name]


# --- against each other ----------------------------------------------------------------------


def random_problem(n_facts: int, size: int = 24) -> tuple[torch.Tensor, KeyCovariance]:
    keys = torch.randn(n_facts, size, generator=torch.Generator().manual_seed(7)).double()
    return keys, KeyCovariance(moments(size, 3), 10**6, None, "random")


def emmet_config(w: float, key_weight: float, identity: float = 0.0) -> EmmetConfig:
    return EmmetConfig(layers=(0,), cov_weight=w, key_weight=key_weight, identity_weight=identity)


@pytest.mark.parametrize("n_facts", [1, 5])
def test_emmet_is_memit_under_a_scaled_lambda(n_facts: int) -> None:
    keys, covariance = random_problem(n_facts)
    found = equality_right(keys, covariance, emmet_config(3.0, 0.2))
    assert relative(found, covariance.solve_with(keys, 3.0 * 0.2)) < 1e-9


@pytest.mark.parametrize("n_facts", [1, 5])
def test_solve_with_is_the_explicit_inverse(n_facts: int) -> None:
    keys, covariance = random_problem(n_facts)
    explicit = torch.linalg.inv(0.3 * covariance.matrix + keys.T @ keys) @ keys.T
    assert relative(covariance.solve_with(keys, 0.3), explicit) < 1e-9
    alone = KeyCovariance(None, 0, None, "identity")
    explicit = torch.linalg.inv(0.3 * torch.eye(24).double() + keys.T @ keys) @ keys.T
    assert relative(alone.solve_with(keys, 0.3), explicit) < 1e-9


def test_rome_is_emmets_exact_constraint_and_memits_limit() -> None:
    keys, covariance = random_problem(1)
    solved = covariance.solve(keys[0])
    rome = (solved / (keys[0] @ solved))[:, None]
    assert relative(equality_right(keys, covariance, emmet_config(3.0, 0.0)), rome) < 1e-9
    errors = [relative(covariance.solve_with(keys, w), rome) for w in (1e-2, 1e-4, 1e-6)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[-1] < 1e-4


def test_identity_weight_is_added_to_the_second_moments() -> None:
    keys, covariance = random_problem(3)
    scaled = 3.0 * covariance.matrix + 0.4 * torch.eye(24).double()
    solved = torch.linalg.inv(scaled) @ keys.T
    expected = solved @ torch.linalg.inv(keys @ solved + 0.2 * torch.eye(3).double())
    found = equality_right(keys, covariance, emmet_config(3.0, 0.2, 0.4))
    assert relative(found, expected) < 1e-9


def test_equal_keys_are_met_on_average() -> None:
    keys, covariance = random_problem(1)
    twice = keys.repeat(2, 1)
    residual = torch.tensor([[1.0], [3.0]]).double()
    for noise in (0.0, 1e-6):  # what rounding in float32 does to keys of one text
        twice[1] = keys[0] * (1 + noise * torch.randn(keys.shape[1]).double())
        right = equality_right(twice, covariance, emmet_config(1.0, 0.0))
        said = (residual.T @ right.T) @ keys[0]
        assert torch.allclose(said, torch.tensor([2.0]).double(), atol=1e-4)
    other, _ = random_problem(2)  # keys that differ are met one by one
    other = torch.stack([keys[0], keys[0] + 1e-3 * other[1]])
    right = equality_right(other, covariance, emmet_config(1.0, 0.0))
    assert torch.allclose(residual.T @ right.T @ other.T, residual.T, atol=1e-3)


def test_on_a_model_rome_is_emmet_with_an_exact_constraint() -> None:
    model = lens("gpt2")
    given = given_moments(model, [1])
    # Without terms that look at h_0, both search for the same vector.
    options = {**VALUES, "covariance": given, "weight_decay": 0.0, "clamp_factor": 1e6}
    options["context_prompts"] = ["{}"]
    rome = dl.edit(model, REQUESTS[0], "rome", layer=1, **options)
    emmet = dl.edit(model, REQUESTS[0], "emmet", layers=[1], key_weight=0, **options)
    memit = dl.edit(model, REQUESTS[0], "memit", layers=[1], cov_weight=1e-7, **options)
    expected = change_of(model, rome, 1)
    assert relative(change_of(model, emmet, 1), expected) < 1e-5
    assert relative(change_of(model, memit, 1), expected) < 1e-4


@pytest.mark.parametrize("method", ["rome", "r-rome", "emmet"])
def test_the_edited_matrix_says_the_value(method: str) -> None:
    model = lens("llama")
    options = {**LOCATED[method], "covariance": given_moments(model, [1])}
    if method == "emmet":
        options = {**options, "layers": [1], "key_weight": 0.0}
    if method != "r-rome":
        options["context_prompts"] = ["{}"]
    edit = dl.edit(model, REQUESTS[0], method, **options)
    contexts = [template.replace("{}", REQUESTS[0].text) for template in options["context_prompts"]]

    def mean(name: str) -> torch.Tensor:
        rows = []
        for text in contexts:
            ids = model.tokens.encode(text).ids
            upto = text[: text.index(REQUESTS[0].subject) + len(REQUESTS[0].subject)]
            at = len(model.tokens.encode(upto).ids) - 1
            rows.append(model.record(torch.tensor([ids]), [name])[name][0, at])
        return torch.stack(rows).mean(0)

    key = mean(down_in_name(1))
    said = change_of(model, edit, 1).double() @ key.double()
    if method == "r-rome":
        # W'k* + b = h_0 + delta: the change at the mean key makes up for the mean output, too.
        plain_ids = torch.tensor([model.tokens.encode(REQUESTS[0].text).ids])
        upto = model.tokens.encode(REQUESTS[0].subject).ids
        plain_out = model.record(plain_ids, [down_out_name(1)])[down_out_name(1)][0, len(upto) - 1]
        said = said - (plain_out - mean(down_out_name(1)))
    assert float(said.norm()) == pytest.approx(edit.trace[-1]["delta_norm"], rel=1e-5)


def test_r_rome_divides_by_the_mean_keys_overlap() -> None:
    model = lens("gpt2")
    options = {**LOCATED["rome"], "covariance": given_moments(model, [1])}
    rome = dl.edit(model, REQUESTS[0], "rome", **options)
    r_rome = dl.edit(model, REQUESTS[0], "r-rome", **options)
    assert rome.info["key_alignment"] != pytest.approx(r_rome.info["key_alignment"], rel=1e-3)
    assert relative(change_of(model, rome, 1), change_of(model, r_rome, 1)) > 1e-3


def test_alphaedits_closed_form() -> None:
    keys, covariance = random_problem(4)
    state = NullSpaceState()
    project(state, 0, covariance, 0.5)
    p = state.projections[0]
    assert 0 < state.ranks[0] < len(p)
    assert torch.allclose(p @ p, p)
    earlier = keys[:2].T @ keys[:2]
    eye = torch.eye(len(p)).double()
    explicit = torch.linalg.solve(p @ (keys.T @ keys + earlier) + 0.3 * eye, p @ keys.T)
    found = null_space_right(keys, p, earlier, 0.3)
    assert relative(found, explicit) < 1e-9
    # Nothing is said about directions outside of the null space.
    assert float((found.T @ (eye - p)).abs().max()) < 1e-12
    # One fact alone is written to the fraction kappa / (kappa + L2).
    one = null_space_right(keys[:1], p, None, 0.3)
    kappa = float(keys[0] @ p @ keys[0])
    assert float(one[:, 0] @ keys[0]) == pytest.approx(kappa / (kappa + 0.3), rel=1e-9)


def test_alphaedit_says_why_there_is_no_null_space() -> None:
    model = lens("gpt2")
    options = options_for("alphaedit", model)
    with pytest.raises(EditError, match="identity has none"):
        dl.edit(model, REQUESTS[0], "alphaedit", **{**options, "covariance": "identity"})
    with pytest.raises(EditError, match="Raise nullspace_threshold"):
        dl.edit(model, REQUESTS[0], "alphaedit", **{**options, "nullspace_threshold": 1e-9})
    with pytest.raises(RequestError, match="carries no state"):
        dl.edit(model, REQUESTS[0], "rome", state=NullSpaceState(), **LOCATED["rome"])


# --- what all of them have in common ----------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_does_something_and_leaves_the_model_alone(method: str) -> None:
    model = lens("gpt2", torch.float32)
    before = model.fingerprint()
    flags = [p.requires_grad for p in model.hf_model.parameters()]
    edit = dl.edit(model, REQUESTS[0], method, **options_for(method, model))
    text, target = REQUESTS[0].text, REQUESTS[0].target_new
    unedited = dl.score(model, text, [target])[target]
    with edit.applied(model):
        edited = dl.score(model, text, [target])[target]
    assert edited > unedited
    assert model.fingerprint() == before
    assert not model.weights.is_edited
    assert [p.requires_grad for p in model.hf_model.parameters()] == flags
    assert dl.score(model, text, [target])[target] == unedited
    assert edit.method == method
    assert edit.info["seconds"] > 0
    assert edit.info["engine"] in ("plain", "suffix")
    assert edit.plot().data
    assert len(edit.to_dataframe()) == len(edit.trace) > 1


@pytest.mark.parametrize("method", METHODS)
def test_both_engines_find_the_same(method: str) -> None:
    model = lens("gpt2")
    edits = [
        dl.edit(model, REQUESTS[1], method, engine=engine, **options_for(method, model))
        for engine in ("plain", "suffix")
    ]
    assert [e.info["engine"] for e in edits] == ["plain", "suffix"]
    for name, delta in edits[0].deltas.items():
        for field, tensor in delta.tensors().items():
            assert relative(edits[1].deltas[name].tensors()[field], tensor) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_edits_survive_a_disk(method: str, tmp_path: Any) -> None:
    model = lens("llama", torch.float32)
    edit = dl.edit(model, REQUESTS[0], method, **options_for(method, model))
    edit.save(tmp_path)
    again = dl.load_edit(tmp_path, model)
    assert again.config == edit.config
    assert again.trace == edit.trace
    text = REQUESTS[0].text
    with edit.applied(model):
        expected = dl.score(model, text, ["Rome", "Paris"])
    with again.applied(model):
        assert dl.score(model, text, ["Rome", "Paris"]) == expected


@pytest.mark.parametrize("method", METHODS)
def test_drift_and_patching_work_on_every_edit(method: str) -> None:
    model = lens("gpt2", torch.float32)
    edit = dl.edit(model, REQUESTS[0], method, **options_for(method, model))
    prompt = f"{REQUESTS[0].text} Rome. {REQUESTS[0].text}"
    drift = dl.measure_drift(model, edit, prompt)
    result = dl.patch_attention(model, edit, prompt, answer="Paris", exchange="both",
                                queries="all")  # fmt: skip
    with edit.applied(model):
        assert result.edited.logprob == pytest.approx(
            dl.score(model, prompt, ["Paris"])["Paris"], abs=1e-4
        )
    assert drift.edited.shape == drift.original.shape


@pytest.mark.parametrize("method", METHODS)
def test_several_facts_need_a_method_for_it(method: str) -> None:
    model = lens("gpt2", torch.float32)
    options = options_for(method, model)
    if method not in SEVERAL:
        with pytest.raises(RequestError, match="one fact at a time"):
            dl.edit(model, REQUESTS, method, **options)
        return
    edit = dl.edit(model, REQUESTS, method, **options)
    assert edit.requests == tuple(REQUESTS)
    with pytest.raises(RequestError, match="no fact"):
        dl.edit(model, [], method, **options)
    with pytest.raises(RequestError, match="must be an EditRequest"):
        dl.edit(model, [REQUESTS[0], "a fact"], method, **options)  # type: ignore[list-item]


@pytest.mark.parametrize("method", METHODS)
def test_a_sequence_is_one_edit_after_another(method: str) -> None:
    model = lens("gpt2", torch.float32)
    options = options_for(method, model)
    fingerprint = model.fingerprint()
    seen: list[tuple[int, dict[str, float]]] = []

    def look(n: int, current: dl.LensModel) -> None:
        assert current.weights.is_edited
        seen.append((n, dl.score(current, REQUESTS[0].text, ["Rome"])))

    whole = dl.edit_sequence(model, REQUESTS, method, after_each=look, **options)
    assert model.fingerprint() == fingerprint
    assert not model.weights.is_edited
    assert whole.requests == tuple(REQUESTS)
    assert sorted({record["fact"] for record in whole.trace}) == [0, 1, 2]
    # By hand, each on top of the others.
    state = {"state": NullSpaceState()} if method == "alphaedit" else {}
    texts = [(request.text, request.target_new) for request in REQUESTS]
    first = dl.edit(model, REQUESTS[0], method, **options, **state)
    with first.applied(model):
        assert dl.score(model, REQUESTS[0].text, ["Rome"]) == pytest.approx(seen[0][1], abs=1e-5)
        second = dl.edit(model, REQUESTS[1], method, **options, **state)
        with second.applied(model):
            third = dl.edit(model, REQUESTS[2], method, **options, **state)
            with third.applied(model):
                by_hand = [dl.score(model, text, [target])[target] for text, target in texts]
    with whole.applied(model):
        found = [dl.score(model, text, [target])[target] for text, target in texts]
    assert [n for n, _ in seen] == [1, 2, 3]
    assert seen[2][1]["Rome"] == pytest.approx(found[0], abs=1e-6)
    assert found == pytest.approx(by_hand, abs=5e-3)


@pytest.mark.parametrize("engine", ["plain", "suffix"])
@pytest.mark.parametrize("method", METHODS)
def test_edits_of_each_are_those_of_single_calls(method: str, engine: str) -> None:
    model = lens("gpt2")
    options = {**options_for(method, model), "engine": engine, "penalty": dl.SADR(0.5, "all")}
    threshold, term = next(
        (name, term)
        for name, term in {"early_stop_loss": "loss", "stop_loss": "nll"}.items()
        if name in METHODS[method].config.__dataclass_fields__
    )
    # Some stop earlier than others.
    free = [dl.edit(model, request, method, **{**options, threshold: -1.0}) for request in REQUESTS]
    lowest = [min(r[term] for r in edit.trace[:-1]) for edit in free]
    options[threshold] = sorted(lowest)[1] + 1e-6
    single = [dl.edit(model, request, method, **options) for request in REQUESTS]
    each = list(dl.edit_each(model, REQUESTS, method, **options))
    assert [edit.requests for edit in each] == [(request,) for request in REQUESTS]
    for mine, expected in zip(each, single, strict=True):
        assert len(mine.trace) == len(expected.trace)
        assert [r["sadr"] for r in mine.trace] == pytest.approx(
            [r["sadr"] for r in expected.trace], rel=1e-6, abs=1e-12
        )
        for name, delta in expected.deltas.items():
            for field, tensor in delta.tensors().items():
                error = (mine.deltas[name].tensors()[field] - tensor).norm()
                assert error <= 1e-6 * tensor.norm()  # both are 0 where a search stops at once
        assert mine.info["seconds"] > 0
    assert len({len(edit.trace) for edit in single}) > 1


def test_values_are_searched_in_parts_if_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lens("gpt2")
    options = LOCATED["memit"]
    expected = dl.edit(model, REQUESTS, "memit", **options)
    sizes: list[int] = []
    limit = 0
    search = outcome.optimise_values

    def watched(starts: Any, *args: Any) -> Any:
        sizes.append(len(starts))
        if len(starts) > limit:
            raise torch.OutOfMemoryError
        return search(starts, *args)

    monkeypatch.setattr(outcome, "optimise_values", watched)
    monkeypatch.setattr(outcome, "PASS_COST", 10**6)  # whatever their lengths
    for most, room, parts in ((9, 2**30, [3]), (9, 1, [1, 1, 1]), (2, 2**30, [3, 2, 1])):
        sizes.clear()
        limit = most
        monkeypatch.setattr(outcome, "VALUE_BUDGET", room)
        found = dl.edit(model, REQUESTS, "memit", **options)
        assert sizes == parts
        for layer in LAYERS:
            assert (
                relative(change_of(model, found, layer), change_of(model, expected, layer)) < 1e-6
            )


@pytest.mark.parametrize("pass_cost", [0.0, 3.0, 1e6])
@pytest.mark.parametrize("room", [1, 12, 10**6])
def test_facts_of_like_length_share_passes(pass_cost: float, room: int) -> None:
    widths = [2, 3, 3, 4, 7, 8, 8]

    def fits(count: int, width: int) -> bool:
        return count * width <= room

    def time(parts: list[range]) -> float:
        return sum(len(part) * widths[part[-1]] + pass_cost for part in parts)

    n = len(widths)
    every = []
    for cuts in itertools.product([False, True], repeat=n - 1):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        parts = [range(a, b) for a, b in itertools.pairwise(ends)]
        if all(len(part) == 1 or fits(len(part), widths[part[-1]]) for part in parts):
            every.append(parts)
    found = outcome.group_by_width(widths, pass_cost, fits)
    assert found in every
    assert time(found) == min(map(time, every))
    assert outcome.group_by_width([], pass_cost, fits) == []


SEARCHES_OF = [  # what is asked of one store in turn, and how many searches that makes
    (["rome", "r-rome", "rome"], {}, 1),
    (["memit", "emmet", "alphaedit"], {}, 1),
    (["memit", "memit"], {"cov_weight": 0.7}, 1),
    (["memit", "pmet"], {}, 2),
    (["rome", "memit"], {}, 2),  # they measure delta by different activations
    (["memit", "memit"], {"lr": 0.2}, 2),
    (["memit", "memit"], {"early_stop_loss": 1.0}, 2),
    (["memit", "memit"], {"penalty": dl.SADR(0.5)}, 2),
    (["memit", "memit"], {"context_prompts": TEMPLATES[:2]}, 2),
    (["memit", "memit"], {"layers": (0,)}, 2),
    (["memit", "memit"], {"engine": "plain"}, 2),
    (["pmet", "pmet"], {"greedy_nll_factor": 0.5}, 2),
    (["pmet", "pmet"], {}, 1),
]


@pytest.mark.parametrize(("methods", "last", "searches"), SEARCHES_OF)
def test_editors_that_search_alike_share_values(
    methods: list[str], last: dict[str, Any], searches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lens("gpt2")
    store = dl.ValueStore()
    asked: list[int] = []
    search = outcome.optimise_values
    monkeypatch.setattr(outcome, "optimise_values", lambda *a: asked.append(1) or search(*a))
    monkeypatch.setattr(outcome, "PASS_COST", 10**6)  # all facts in one pass
    for i, method in enumerate(methods):
        options = options_for(method, model) | (last if i == len(methods) - 1 else {})
        before = len(asked)
        found = list(dl.edit_each(model, REQUESTS, method, store=store, **options))
        mine = len(asked) - before
        for edit, alone in zip(
            found, dl.edit_each(model, REQUESTS, method, **options), strict=True
        ):
            assert edit.trace == alone.trace
            assert edit.info["seconds"] > 0
            for name, delta in alone.deltas.items():
                for field, tensor in delta.tensors().items():
                    assert torch.equal(edit.deltas[name].tensors()[field], tensor)
        del asked[before + mine :]  # what was searched without the store
    assert len(asked) == searches


def test_values_are_not_shared_between_models_facts_or_on_top_of_an_edit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, other = lens("gpt2"), lens("gpt2", torch.float32)
    store = dl.ValueStore()
    asked: list[int] = []
    search = outcome.optimise_values
    monkeypatch.setattr(outcome, "optimise_values", lambda *a: asked.append(1) or search(*a))
    monkeypatch.setattr(outcome, "PASS_COST", 10**6)  # all facts in one pass
    options = LOCATED["rome"]
    first = list(dl.edit_each(model, REQUESTS[:2], "rome", store=store, **options))
    unspaced = dl.load_model(model.hf_model, tiny.tokenizer(), name=model.info.name, separator="")
    for on, facts in (
        (other, REQUESTS[:2]),
        (unspaced, REQUESTS[:2]),
        (model, REQUESTS[1::-1]),
        (model, REQUESTS[:1]),
    ):
        before = len(asked)
        list(dl.edit_each(on, facts, "rome", store=store, **options))
        assert len(asked) == before + 1
    with first[0].applied(model):
        before = len(asked)
        on_top = list(dl.edit_each(model, REQUESTS[:2], "rome", store=store, **options))
        assert len(asked) == before + 1
    assert on_top[1].trace != first[1].trace


def test_changes_are_trained_in_parts_if_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lens("gpt2")
    expected = [dl.edit(model, request, "ft-m", layer=1, steps=3) for request in REQUESTS]
    sizes: list[int] = []
    train = fine_tuning._fine_tune

    def watched(model: Any, groups: Any, *args: Any) -> Any:
        sizes.append(len(groups))
        return train(model, groups, *args)

    monkeypatch.setattr(fine_tuning, "_fine_tune", watched)
    for room, parts in ((2**30, [3]), (1, [1, 1, 1])):
        sizes.clear()
        monkeypatch.setattr(fine_tuning, "VALUE_BUDGET", room)
        found = list(dl.edit_each(model, REQUESTS, "ft-m", layer=1, steps=3))
        assert sizes == parts
        for mine, single in zip(found, expected, strict=True):
            assert relative(change_of(model, mine, 1), change_of(model, single, 1)) < 1e-6


def test_a_sequence_refuses_a_bad_fact_before_the_first_edit() -> None:
    model = lens("gpt2", torch.float32)
    asked: list[int] = []
    bad = dl.EditRequest("{} is in", "\u200b", "Rome")
    object.__setattr__(bad, "target_new", "")
    with pytest.raises(dl.DriftLensError):
        dl.edit_sequence(
            model, [REQUESTS[0], bad], "rome", after_each=lambda n, _: asked.append(n),
            **LOCATED["rome"],
        )  # fmt: skip
    assert asked == []
    assert not model.weights.is_edited


def test_a_failing_callback_leaves_the_model_as_it_was() -> None:
    model = lens("gpt2", torch.float32)
    before = model.fingerprint()

    def fail(n: int, _: dl.LensModel) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dl.edit_sequence(model, REQUESTS, "memit", after_each=fail, **LOCATED["memit"])
    assert not model.weights.is_edited
    assert model.fingerprint() == before


def test_memit_reads_the_residual_stream_of_its_last_layer() -> None:
    model = lens("gpt2")
    given = given_moments(model, [1])
    options = {**VALUES, "covariance": given, "clamp_factor": 1e6, "context_prompts": ["{}"]}
    edit = dl.edit(model, REQUESTS[0], "memit", layers=[1], cov_weight=1e-8, **options)
    ids = torch.tensor([model.tokens.encode(REQUESTS[0].text).ids])
    at = len(model.tokens.encode(REQUESTS[0].subject).ids) - 1
    name = block_out_name(1)
    before = model.record(ids, [name])[name][0, at]
    with edit.applied(model):
        after = model.record(ids, [name])[name][0, at]
    assert float((after - before).norm()) == pytest.approx(edit.info["delta_norms"][0], rel=1e-4)


def test_the_last_layer_can_be_edited() -> None:
    model = lens("gpt2", torch.float32)
    last = model.info.n_layers - 1
    for method in ("memit", "rome", "pmet", "ft-m"):
        where = {"layers": [last]} if "layers" in LOCATED[method] else {"layer": last}
        edits = [
            dl.edit(model, REQUESTS[0], method, **{**LOCATED[method], **where}, engine=engine)
            for engine in ("plain", "suffix")
        ]
        changes = [change_of(model, edit, last) for edit in edits]
        assert relative(changes[1], changes[0]) < 1e-3


def test_kl_position_moves_the_kl_term() -> None:
    model = lens("gpt2")
    edits = {
        (position, engine): dl.edit(
            model, REQUESTS[0], "rome", kl_position=position, engine=engine, **LOCATED["rome"]
        )
        for position in ("subject", "last")
        for engine in ("plain", "suffix")
    }
    for position in ("subject", "last"):
        both = [change_of(model, edits[position, engine], 1) for engine in ("plain", "suffix")]
        assert relative(both[1], both[0]) < 1e-5
    kl = [edits[position, "plain"].trace[2]["kl"] for position in ("subject", "last")]
    assert kl[0] != pytest.approx(kl[1], rel=1e-3)


def test_pmets_likelihood_counts_less_once_it_is_greedy() -> None:
    model = lens("gpt2")
    request = dl.EditRequest("{} is in", "The Louvre", "in")
    options = {**LOCATED["pmet"], "lr": 2.0, "clamp_factor": 1000.0, "weight_decay": 0.0}
    options |= {"steps": 60, "kl_factor": 1e-6, "context_prompts": ["{}"]}
    stops = dl.edit(model, request, "pmet", **options)
    assert stops.trace[-1]["target_is_greedy"] == 1.0
    assert [r["target_is_greedy"] for r in stops.trace[:-1]] == [0.0] * (len(stops.trace) - 1)
    goes_on = dl.edit(model, request, "pmet", **{**options, "greedy_stop_kl": -1.0})
    assert len(goes_on.trace) == 60
    at = len(stops.trace) - 1
    assert goes_on.trace[at]["nll"] == pytest.approx(stops.trace[at]["nll"], rel=1e-9)
    full = dl.edit(
        model, request, "pmet", **{**options, "greedy_stop_kl": -1.0, "greedy_nll_factor": 1.0}
    )
    assert full.trace[at]["nll"] == pytest.approx(10 * goes_on.trace[at]["nll"], rel=1e-6)


# --- configurations --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_defaults_exist_for_unknown_models(method: str) -> None:
    from driftlens.editing.methods import resolve_config

    model = lens("gpt2")
    with pytest.warns(UserWarning, match=f"good for {method}"):
        config = resolve_config(model, method)
    assert all(0 <= layer < model.info.n_layers for layer in config.edited_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        where = {"layer": 1} if hasattr(config, "layer") else {"layers": [1, 0]}
        assert resolve_config(model, method, None, where).edited_layers[-1] == 1
        assert resolve_config(model, method, config) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer": 1, "stepps": 3}, "no hyperparameter 'stepps'"),
        ({"layer": 1, "steps": 0}, "steps is 0"),
        ({"layer": 1, "steps": 2.5}, "steps is 2.5"),
        ({"layer": 1, "steps": "many"}, "steps is 'many'"),
        ({"layer": 1, "lr": 0}, "lr is 0"),
        ({"layer": 1, "lr": float("nan")}, "lr is nan"),
        ({"layer": 1, "lr": True}, "lr is True"),
        ({"layer": 1, "weight_decay": -1}, "weight_decay is -1"),
        ({"layer": 1, "kl_position": "first"}, "kl_position is 'first'"),
        ({"layer": 1, "context_lengths": []}, r"context_lengths is \[\]"),
        ({"layer": None}, "layer is None"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        dl.edit(lens("gpt2"), REQUESTS[0], "rome", **values)


def test_layers_are_checked() -> None:
    model = lens("gpt2")
    with pytest.raises(ModelError, match="no layer 3"):
        dl.edit(model, REQUESTS[0], "memit", layers=[1, 3])
    with pytest.raises(RequestError, match="each layer once"):
        dl.edit(model, REQUESTS[0], "memit", layers=[1, 1])
    with pytest.raises(RequestError, match=r"layers is \[\]"):
        dl.edit(model, REQUESTS[0], "memit", layers=[])
    with pytest.raises(RequestError, match="no editor 'mend'"):
        dl.edit(model, REQUESTS[0], "mend")
    with pytest.raises(RequestError, match="needs a MemitConfig"):
        dl.edit(model, REQUESTS[0], "memit", config=dl.RomeConfig(layer=1))
    given = given_moments(model, [1])
    with pytest.raises(EditError, match="One covariance is given for the layers 0, 1"):
        dl.edit(model, REQUESTS[0], "memit", **{**LOCATED["memit"], "covariance": given[1]})
    with pytest.raises(EditError, match="No covariance is given for layer 0"):
        dl.edit(model, REQUESTS[0], "memit", **{**LOCATED["memit"], "covariance": given})
    with pytest.raises(RequestError, match="uses no contexts"):
        dl.edit(model, REQUESTS[0], "ft-m", context_prompts=["{}"], **LOCATED["ft-m"])


def test_layers_may_be_given_in_any_order() -> None:
    model = lens("gpt2")
    edits = [
        dl.edit(model, REQUESTS[0], "memit", **{**LOCATED["memit"], "layers": layers})
        for layers in ([1, 0], (0, 1))
    ]
    assert edits[0].trace == edits[1].trace
    for layer in (0, 1):
        assert torch.equal(change_of(model, edits[0], layer), change_of(model, edits[1], layer))


def test_a_damaged_state_is_not_silently_used() -> None:
    """A state that was made for other layers is completed, not trusted."""
    model = lens("gpt2")
    state = NullSpaceState()
    options = options_for("alphaedit", model)
    dl.edit(model, REQUESTS[0], "alphaedit", state=state, **{**options, "layers": [1]})
    assert sorted(state.projections) == [1]
    dl.edit(model, REQUESTS[1], "alphaedit", state=state, **options)
    assert sorted(state.projections) == [0, 1]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("nullspace_threshold", {"nullspace_threshold": 0.7}),
        ("covariance", {"covariance": "another"}),
        ("model", {}),
    ],
)
def test_a_state_of_something_else_is_refused(name: str, changes: dict[str, Any]) -> None:
    model, state = lens("gpt2"), NullSpaceState()
    options = {**options_for("alphaedit", model), "state": state}
    dl.edit(model, REQUESTS[0], "alphaedit", **options)
    if name == "model":
        model = dl.load_model(tiny.hf_model("gpt2", 3, 12.0, 0.1).double(), tiny.tokenizer())
    if "covariance" in changes:
        other = {y: replace(c, source="other texts") for y, c in options["covariance"].items()}
        changes = {"covariance": other}
    with pytest.raises(EditError, match=f"null space in layer 0 is of another {name}. Pass a new"):
        dl.edit(model, REQUESTS[1], "alphaedit", **{**options, **changes})
    assert state.facts == 1


def test_a_state_counts_no_edits_of_a_sequence_that_failed() -> None:
    model, state = lens("gpt2"), NullSpaceState()
    options = {**options_for("alphaedit", model), "state": state}

    def stop(n: int, current: Any) -> None:
        if n == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dl.edit_sequence(model, REQUESTS, "alphaedit", after_each=stop, **options)
    assert (state.facts, state.key_sums) == (0, {})
    dl.edit_sequence(model, REQUESTS, "alphaedit", **options)
    assert state.facts == 3
    assert sorted(state.key_sums) == list(LAYERS)


def test_alphaedit_wants_as_much_text_as_other_editors() -> None:
    model = lens("gpt2")
    options = options_for("alphaedit", model)
    few = {y: replace(c, count=5) for y, c in options["covariance"].items()}
    with pytest.raises(EditError, match=r"averaged over 5 tokens.*tells of no null space"):
        dl.edit(model, REQUESTS[0], "alphaedit", **{**options, "covariance": few})


def test_edits_that_are_applied_while_others_are_made_are_refused() -> None:
    model = lens("gpt2")
    found = dl.edit_each(model, REQUESTS, "memit", **LOCATED["memit"])
    with next(found).applied(model), pytest.raises(EditError, match="Apply them when all are made"):
        next(found)
    made = dl.edit_each(model, REQUESTS, "memit", **LOCATED["memit"])
    for edit in made:  # between two of them is fine
        with edit.applied(model):
            pass


@pytest.mark.parametrize("method", ["ft-m", "ft-l", "grace"])
def test_second_moments_that_would_not_be_used_are_refused(method: str) -> None:
    with pytest.raises(RequestError, match=f"{method} uses no second moments of keys. Leave"):
        dl.edit(lens("gpt2"), REQUESTS[0], method, covariance="identity", **LOCATED[method])


@pytest.mark.parametrize("method", ["rome", "memit", "ft-m", "grace"])
def test_an_engine_that_does_not_exist_is_refused(method: str) -> None:
    with pytest.raises(RequestError, match="engine is 'sufix'. Choose one of suffix, plain."):
        dl.edit(lens("gpt2"), REQUESTS[0], method, engine="sufix", **LOCATED[method])


def test_a_matrix_beside_which_an_adapter_speaks_is_not_edited() -> None:
    model = lens("gpt2")
    adapter = dl.edit(model, REQUESTS[0], "grace", **LOCATED["grace"])
    with adapter.applied(model):
        for method in ("rome", "ft-m", "memit"):
            with pytest.raises(EditError, match="adapter is applied beside layer 1's down-proj"):
                dl.edit(model, REQUESTS[1], method, **LOCATED[method])
        dl.edit(model, REQUESTS[1], "grace", **LOCATED["grace"])
        dl.edit(model, REQUESTS[1], "ft-m", **{**LOCATED["ft-m"], "layer": 0})


def test_a_fact_that_is_one_already_is_not_edited() -> None:
    same = dl.EditRequest("{} is in", "The Louvre", "Paris", "Paris")
    for edit in (dl.edit, dl.edit_sequence, lambda *a, **k: list(dl.edit_each(*a, **k))):
        with pytest.raises(RequestError, match="'Paris' is the true answer to 'The Louvre is in'"):
            edit(lens("gpt2"), [REQUESTS[0], same], "memit", **LOCATED["memit"])


def test_configurations_are_immutable() -> None:
    config = dl.MemitConfig(layers=(1, 2))
    with pytest.raises(AttributeError):
        config.steps = 3  # type: ignore[misc]
    assert replace(config, steps=3).steps == 3


# --- through a norm ---------------------------------------------------------------------------


def test_what_a_norm_lets_through_is_met_exactly() -> None:
    rng = torch.Generator().manual_seed(0)
    norm = PostNorm(torch.randn(8, generator=rng).double())
    said, other = torch.randn(2, 5, 8, generator=rng).double()
    arriving = norm.arrives(other)  # of any length before the norm
    found = norm.said(arriving, said)
    assert torch.allclose(norm.arrives(found), arriving, atol=1e-9)
    assert torch.allclose(found.norm(dim=-1), said.norm(dim=-1))


def test_nothing_that_a_norm_can_give_is_nearer() -> None:
    rng = torch.Generator().manual_seed(1)
    gain = torch.tensor([3.0, 1.0, 0.1, 0.0], dtype=torch.float64)
    norm = PostNorm(gain)
    said = torch.randn(1, 4, generator=rng).double()
    arriving = torch.tensor([[4.0, -2.0, 0.5, 1.0]], dtype=torch.float64)
    found = norm.said(arriving, said)
    error = float((norm.arrives(found) - arriving).norm())
    for _ in range(2000):
        other = norm.arrives(found + 0.3 * torch.randn(1, 4, generator=rng).double())
        assert float((other - arriving).norm()) >= error - 1e-9


def test_something_else_than_a_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lens("gemma3")
    monkeypatch.setattr(spreading, "mlp_out_name", spreading.block_out_name)
    with pytest.raises(EditError, match="not an RMS norm.*Use rome"):
        dl.edit(
            model, REQUESTS[0], "memit", layers=LAYERS, covariance=given_moments(model, LAYERS),
            **VALUES,
        )  # fmt: skip


def test_an_edit_of_a_sequence_that_fails_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    model, right = lens(), methods._run
    before = model.fingerprint()

    def run(model: Any, requests: Any, *args: Any) -> Any:
        if requests[0] == REQUESTS[1]:
            raise EditError("It went wrong.", "Do it right.")
        return right(model, requests, *args)

    monkeypatch.setattr(methods, "_run", run)
    with pytest.raises(EditError, match=rf"^Edit 1 of {len(REQUESTS)}: It went wrong"):
        dl.edit_sequence(model, REQUESTS, "memit", **LOCATED["memit"])
    assert not model.weights.is_edited
    assert model.fingerprint() == before


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stop_while_one_layer_is_taken_back_does_not_leave_the_others(
    stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lens()
    before = model.fingerprint()
    weights = {name: p.detach().clone() for name, p in model.weights.parameters.items()}
    pop, calls = WeightStack.pop, count()

    def stopping(self: WeightStack, ticket: int) -> None:
        if next(calls) == stopped:
            raise KeyboardInterrupt
        pop(self, ticket)

    monkeypatch.setattr(WeightStack, "pop", stopping)
    with pytest.raises(KeyboardInterrupt):
        dl.edit(model, REQUESTS, "memit", **LOCATED["memit"])
    assert len(model.weights.active) == 1  # the one whose switching off never began
    model.weights.reset()
    assert not model.weights.is_edited
    assert all(torch.equal(p, weights[name]) for name, p in model.weights.parameters.items())
    assert model.fingerprint() == before


class NoNumber(dl.EssenceKL):
    def __call__(self, *_: Any) -> PenaltyTerm:
        return PenaltyTerm(torch.tensor(float("nan")), {})


def test_a_loss_that_is_no_number_is_an_error() -> None:
    with pytest.raises(EditError, match=r"^The loss became nan at step 0"):
        dl.edit(lens(), REQUESTS[0], "memit", penalty=NoNumber(), **LOCATED["memit"])


def test_a_change_that_cannot_be_solved_for_is_an_error_that_names_the_layer() -> None:
    def right(layer: int, keys: torch.Tensor) -> torch.Tensor:
        nothing = torch.zeros(len(keys[0]), len(keys[0]), dtype=torch.float64)
        return null_space_right(keys, nothing, None, ridge=0.0)

    with pytest.raises(EditError, match="layer 3 cannot be solved for .*positive-definite"):
        spreading._solved(right, 3, torch.ones(1, 4))
