"""The family of penalties: their formulas, their gradients, and in every editor."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import driftlens as dl
from driftlens.attention import over_attending_heads, row_divergence, row_kl
from driftlens.editing.family import PENALTIES, as_penalties, penalty_from_dict
from driftlens.editing.methods import METHODS
from driftlens.editing.penalties import ESSENCE, Penalty, PenaltyTerm, Sites
from driftlens.errors import ModelError, RequestError
from driftlens.interventions import block_out_name, pattern_name

REQUEST = dl.EditRequest("{} is located in the city of", "The Eiffel Tower", "New Rome")
LAYERS = (1, 2)
N_CONTEXTS, N_HEADS, N_POS, N_KEYS = 2, 4, 5, 7
SITES = Sites(
    predicting=torch.tensor([[3, 4], [2, 3]]),
    subject=torch.tensor([-6, -5]),
    real=torch.tensor([[True] * 5, [True] * 4 + [False]]),
    layers=LAYERS,
    key_hooks={y: f"keys {y}" for y in LAYERS},
)
VARIANTS: list[Penalty] = [
    dl.SADR(gamma=0.3),
    dl.SADR(gamma=0.3, heads="all"),
    dl.SADR(gamma=0.3, heads="quantile", threshold=0.4),
    dl.SADR(gamma=0.3, heads="mean_std", threshold=-0.5),
    dl.SADR(gamma=0.3, heads="drift", threshold=0.01),
    dl.SADR(gamma=0.3, heads=["L1H0", (2, 3)]),
    dl.SADR(gamma=0.3, heads="all", divergence="reverse_kl"),
    dl.SADR(gamma=0.3, heads="all", divergence="js"),
    dl.SADR(gamma=0.3, heads="all", divergence="l2"),
    dl.SADR(gamma=0.3, heads="all", layers=(2,)),
    dl.SADR(gamma=0.3, heads="all", queries="target"),
    dl.SADR(gamma=0.3, heads="all", queries="all"),
    dl.KeyDrift(weight=0.3),
    dl.KeyDrift(weight=0.3, layers=(1,)),
    dl.HiddenDrift(weight=0.3),
    dl.EssenceKL(weight=0.3),
]


def name_of(penalty: Penalty) -> str:
    return "-".join(str(v) for v in penalty.to_dict().values() if v is not None)


def raw(seed: int) -> dict[str, torch.Tensor]:
    """What the model would compute: scores of rows, keys, hidden states, scores of words."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = N_CONTEXTS + 1
    found = {ESSENCE: random(1, 11)}
    for layer in LAYERS:
        found[pattern_name(layer)] = random(rows, N_HEADS, N_POS, N_KEYS)
        found[f"keys {layer}"] = random(rows, N_POS, 2, 3)
        found[block_out_name(layer)] = random(rows, N_POS, 6)
    return found


def activations(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As distributions, where they are some."""
    return {
        name: tensor.log_softmax(-1) if name == ESSENCE
        else tensor.softmax(-1) if "pattern" in name
        else tensor
        for name, tensor in given.items()
    }  # fmt: skip


BEFORE = activations(raw(0))


# --- formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", VARIANTS, ids=name_of)
def test_the_gradient_is_that_of_finite_differences(penalty: Penalty) -> None:
    start = raw(1)
    names = sorted(start)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        now = activations(dict(zip(names, tensors, strict=True)))
        return penalty(now, BEFORE, SITES).loss

    inputs = [start[name].requires_grad_() for name in names]
    assert gradcheck(loss, inputs, fast_mode=True)
    gradients = torch.autograd.grad(loss(*inputs), inputs, allow_unused=True)
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0


@pytest.mark.parametrize("penalty", VARIANTS, ids=name_of)
def test_a_penalty_looks_at_what_it_names_and_is_zero_where_nothing_changed(
    penalty: Penalty,
) -> None:
    named = {name: BEFORE[name] for name in [*penalty.activations(SITES), ESSENCE]}
    assert float(penalty(named, named, SITES).loss) == 0.0
    for seed in range(5):
        now = activations(raw(seed + 1))
        assert float(penalty({n: now[n] for n in named}, named, SITES).loss) >= 0.0


@pytest.mark.parametrize("penalty", VARIANTS, ids=name_of)
def test_padding_and_other_rows_do_not_count(penalty: Penalty) -> None:
    start = raw(1)
    expected = float(penalty(activations(start), BEFORE, SITES).loss)
    other = raw(2)
    changed = {name: tensor.clone() for name, tensor in start.items()}
    for name, tensor in changed.items():
        if name == ESSENCE:
            continue
        tensor[2] = other[name][2]  # the row of the KL term
        (tensor[1, :, 4] if "pattern" in name else tensor[1, 4])[:] = 3.0  # padding
    assert float(penalty(activations(changed), BEFORE, SITES).loss) == pytest.approx(expected)


@pytest.mark.parametrize("penalty", VARIANTS, ids=name_of)
def test_what_is_watched_counts(penalty: Penalty) -> None:
    """A change at the last prompt token of the first context, in layer 2, changes the loss."""
    start, other = raw(1), raw(2)
    if isinstance(penalty, dl.KeyDrift) and penalty.layers == (1,):
        pytest.skip("watches layer 1 alone")
    before = float(penalty(activations(start), BEFORE, SITES).loss)
    for name, tensor in start.items():
        if name == ESSENCE:
            tensor[0] = other[name][0]
        elif "2" in name:
            at = (0, slice(None), 3) if "pattern" in name else (0, 3)
            tensor[at] = other[name][at]
    assert float(penalty(activations(start), BEFORE, SITES).loss) != pytest.approx(before)


def test_formulas_by_hand() -> None:
    now = activations(raw(1))
    at = [(0, 3), (1, 2)]

    def by_hand(divergence: str, rows: list[list[int]]) -> float:
        total = 0.0
        for layer in LAYERS:
            for context in range(N_CONTEXTS):
                for head in range(N_HEADS):
                    for position in rows[context]:
                        p = BEFORE[pattern_name(layer)][context, head, position].tolist()
                        q = now[pattern_name(layer)][context, head, position].tolist()
                        total += DIVERGENCES[divergence](p, q) / N_CONTEXTS
        return total

    for kind in DIVERGENCES:
        found = dl.SADR(gamma=1.0, heads="all", divergence=kind)(now, BEFORE, SITES)  # type: ignore[arg-type]
        assert float(found.loss) == pytest.approx(by_hand(kind, [[3], [2]]), abs=1e-5)
        assert found.notes == {"held_heads": 8.0}
    rows = {"target": [[3, 4], [2, 3]], "all": [[0, 1, 2, 3, 4], [0, 1, 2, 3]]}
    for queries, chosen in rows.items():
        found = dl.SADR(gamma=1.0, heads="all", queries=queries)(now, BEFORE, SITES)  # type: ignore[arg-type]
        assert float(found.loss) == pytest.approx(by_hand("kl", chosen), abs=1e-5)
    keys = sum(
        math.sqrt(sum(
            float((now[f"keys {y}"][c, p] - BEFORE[f"keys {y}"][c, p]).square().sum())
            for p in range(5 - c)
        )) / N_CONTEXTS
        for y in LAYERS for c in range(N_CONTEXTS)
    )  # fmt: skip
    assert float(dl.KeyDrift(weight=2.0)(now, BEFORE, SITES).loss) == pytest.approx(2 * keys)
    hidden = [
        math.sqrt(sum(
            float((now[block_out_name(y)][c, p] - BEFORE[block_out_name(y)][c, p]).square().sum())
            for c, p in at
        ))
        for y in LAYERS
    ]  # fmt: skip
    there = [
        math.sqrt(sum(float(BEFORE[block_out_name(y)][c, p].square().sum()) for c, p in at))
        for y in LAYERS
    ]
    assert float(dl.HiddenDrift(2.0)(now, BEFORE, SITES).loss) == pytest.approx(2 * sum(hidden))
    found = dl.HiddenDrift(weight=2.0, relative=True)(now, BEFORE, SITES)
    assert float(found.loss) == pytest.approx(
        2 * sum(change / norm for change, norm in zip(hidden, there, strict=True))
    )
    p, q = now[ESSENCE][0].exp(), BEFORE[ESSENCE][0].exp()
    essence = sum(float(a * math.log(a / b)) for a, b in zip(p, q, strict=True))
    assert float(dl.EssenceKL(2.0)(now, BEFORE, SITES).loss) == pytest.approx(2 * essence)


def _kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


DIVERGENCES = {
    "kl": _kl,
    "reverse_kl": lambda p, q: _kl(q, p),
    "js": lambda p, q: sum(
        _kl(x, [(a + b) / 2 for a, b in zip(p, q, strict=True)]) / 2 for x in (p, q)
    ),
    "l2": lambda p, q: sum((a - b) ** 2 for a, b in zip(p, q, strict=True)),
}


@given(st.integers(0, 10_000))
def test_divergences_are_not_negative_and_js_is_bounded_and_symmetric(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (3 * torch.randn(2, 9, generator=generator, dtype=torch.float64)).softmax(-1)
    for kind in DIVERGENCES:
        assert float(row_divergence(p, q, kind)) >= -1e-12  # type: ignore[arg-type]
    js = float(row_divergence(p, q, "js"))
    assert js == pytest.approx(float(row_divergence(q, p, "js")))
    assert js <= math.log(2) + 1e-9
    assert torch.equal(row_divergence(p, q), row_kl(p, q))


def test_head_rules_by_hand() -> None:
    original = torch.tensor([0.1, 0.2, 0.3, 0.4])
    now = torch.tensor([0.35, 0.2, 0.32, 0.45])
    held = {
        ("max", None): [False, False, False, True],
        ("all", None): [True] * 4,
        ("quantile", None): [False, False, False, True],  # above 0.37
        ("mean_std", None): [False, False, False, True],  # above 0.25 + 0.1118
        ("quantile", 0.5): [True, False, True, True],  # above 0.25
        ("quantile", 1.0): [False, False, False, True],
        ("mean_std", 0.0): [True, False, True, True],
        ("mean_std", 0.8): [True, False, False, True],  # above 0.25 + 0.8 * 0.1118
        ("drift", 0.1): [True, False, False, False],
        ("drift", None): [True, False, False, False],
        ("drift", 0.04): [True, False, False, True],
    }
    for (rule, threshold), expected in held.items():
        assert over_attending_heads(now, original, rule, threshold).tolist() == expected


# --- in every editor -------------------------------------------------------------------------


@cache
def lens(architecture: str = "gpt2", dtype: torch.dtype = torch.float64) -> dl.LensModel:
    model = tiny.hf_model(architecture, 1, scale=12.0, noise=0.3).to(dtype)
    return dl.load_model(model, tiny.tokenizer(), name=f"tiny {architecture}")


def options_for(method: str) -> dict[str, Any]:
    common: dict[str, Any] = {"progress": False, "steps": 4}
    if method in ("ft-l", "ft-m"):
        return {**common, "layer": 0, "lr": 0.05, "stop_loss": -1.0}
    if method == "grace":
        return {**common, "layer": 0, "lr": 1.0, "stop_loss": -1.0}
    common |= {"context_prompts": ["{}", "Yes. {}"], "early_stop_loss": -1.0, "lr": 1.0}
    common |= {"covariance": "identity", "clamp_factor": 20.0, "weight_decay": 0.01}
    if method in ("rome", "r-rome"):
        return {**common, "layer": 0}
    if method == "alphaedit":
        size = lens().down_projection(0).d_mlp
        moments = torch.linspace(0.001, 3, size).diag()
        given = {0: dl.KeyCovariance(moments, 10**6, 0, "diagonal")}
        return {**common, "layers": [0], "covariance": given, "nullspace_threshold": 1.5}
    return {**common, "layers": [0]}


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_penalty_works_in_every_editor(method: str, kind: str) -> None:
    weight = "gamma" if kind == "sadr" else "weight"
    more = {"heads": "all"} if kind == "sadr" else {}
    traces = {}
    for engine in ("plain", "suffix"):
        made = [
            dl.edit(
                lens(), REQUEST, method, penalty=PENALTIES[kind](**{weight: strength}, **more),
                engine=engine, **options_for(method),
            )
            for strength in (0.0, 3.0)
        ]  # fmt: skip
        assert [len(edit.trace) for edit in made] == [4, 4]
        for edit in made:
            assert abs(edit.trace[0][kind]) < 1e-12
            assert edit.config["penalties"][0]["penalty"] == kind
        traces[engine] = made[1].trace
        restrained, free = made[1].trace[-1], made[0].trace[-1]
        if (method, kind) == ("grace", "essence-kl"):
            assert restrained[kind] == 0.0  # the adapter does not act there
            assert restrained["loss"] == free["loss"]
        else:
            assert all(record[kind] > 0 for record in made[1].trace[1:])
            assert restrained["delta_norm"] != free["delta_norm"]
    for mine, other in zip(traces["plain"], traces["suffix"], strict=True):
        assert mine[kind] == pytest.approx(other[kind], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("architecture", ["gptj", "gemma3", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_every_penalty_works_on_other_architectures(architecture: str, kind: str) -> None:
    model = lens(architecture, torch.float32)
    penalty = PENALTIES[kind]() if kind != "sadr" else dl.SADR(gamma=5.0, heads="all")
    traces = []
    for engine in ("plain", "suffix"):
        edit = dl.edit(
            model, REQUEST, "rome", penalty=penalty, engine=engine, **options_for("rome")
        )
        traces.append([record[kind] for record in edit.trace])
    assert traces[0][0] == pytest.approx(0.0, abs=1e-6)
    assert all(value >= 0 for value in traces[0])
    assert sum(traces[0]) > 0
    assert traces[1] == pytest.approx(traces[0], rel=5e-3, abs=1e-6)


class Readings(TorchDispatchMode):
    """Counts how often a tensor's value is read, for which a GPU has to finish all it was given."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("divergence", ["kl", "js"])
@pytest.mark.parametrize("queries", ["last_prompt", "target", "all"])
@pytest.mark.parametrize("heads", ["max", "drift", [(1, 0), (5, 3)]])
def test_sadr_of_many_layers_reads_no_more_values_than_of_few(
    heads: Any, queries: Any, divergence: Any
) -> None:
    """And adds up what it is in each layer alone, whatever their shapes."""
    n, sadr = 24, dl.SADR(gamma=0.3, heads=heads, queries=queries, divergence=divergence)
    scores = [raw(seed)[pattern_name(1)] for seed in (1, 0)]
    now, original = (
        {pattern_name(y): (one * (1 + y / n)).softmax(-1) for y in range(1, n + 1)}
        for one in (scores[0].requires_grad_(), scores[1])
    )
    for patterns in (now, original):  # the last layer has fewer heads
        patterns[pattern_name(n)] = patterns[pattern_name(n)][:, :2].contiguous()
    counts, terms = {}, {}
    for layers in ((1,), (1, n), tuple(range(1, n))):
        sites = replace(SITES, layers=layers)
        with Readings() as readings:
            terms[layers] = sadr(now, original, sites)
        counts[layers] = readings.count
    few = {"kl": 3, "js": 5}[divergence]
    assert counts[1,] == counts[tuple(range(1, n))] == few < counts[1, n] < 2 * few
    for layers, term in terms.items():
        alone = [sadr(now, original, replace(SITES, layers=(y,))) for y in layers]
        whole = sum((one.loss for one in alone), start=torch.zeros(()))
        assert float(term.loss.detach()) == pytest.approx(float(whole.detach()))
        ours, theirs = (
            torch.autograd.grad(loss, scores[0], retain_graph=True)[0]
            for loss in (term.loss, whole)
        )
        torch.testing.assert_close(ours, theirs)
        held = sum(one.notes["held_heads"] for one in alone)
        assert term.notes["held_heads"] == pytest.approx(held)
        assert float(term.loss.detach()) > 0


def test_penalties_add_up() -> None:
    penalties = [dl.SADR(0.5, "all"), dl.KeyDrift(0.3), dl.HiddenDrift(0.2), dl.EssenceKL(0.7)]
    edit = dl.edit(lens(), REQUEST, "memit", penalty=penalties, **options_for("memit"))
    for record in edit.trace:
        parts = [record[name] for name in ("nll", "kl", "decay", *PENALTIES)]
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-9)
    assert [p["penalty"] for p in edit.config["penalties"]] == list(PENALTIES)
    names = {trace.name for trace in edit.plot().data}
    assert set(PENALTIES) <= names


def test_fine_tunings_reference_is_the_model_before() -> None:
    """SADR's rows come from the unedited model, whatever the steps so far were."""
    penalty = dl.SADR(gamma=1.0, heads="all")
    edit = dl.edit(lens(), REQUEST, "ft-m", penalty=penalty, **options_for("ft-m"))
    model = lens()
    ids = model.tokens.encode(REQUEST.text).ids
    names = [pattern_name(y) for y in range(1, model.info.n_layers)]
    before = model.record(torch.tensor([ids]), names)
    with edit.applied(model):
        after = model.record(torch.tensor([ids]), names)
    expected = sum(float(row_kl(before[n][0, :, -1], after[n][0, :, -1]).sum()) for n in names)
    # The last record is that of the weights that the edit keeps.
    assert edit.trace[-1]["sadr"] == pytest.approx(expected, rel=1e-4)


WATCHED: list[Penalty] = [
    dl.SADR(gamma=1.0, heads="all", queries="target"),
    dl.SADR(gamma=1.0, heads="all", queries="all"),
    dl.KeyDrift(weight=1.0),
    dl.HiddenDrift(weight=1.0),
    dl.HiddenDrift(weight=1.0, relative=True),
]


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "gpt_neox", "llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("penalty", WATCHED, ids=name_of)
def test_what_is_watched_is_what_the_unwrapped_model_has(
    penalty: Penalty, architecture: str
) -> None:
    """Keys, rows and residual streams of the bare model, before and after, give the last loss."""
    # A cache of a sliding window would not hold all keys.
    changes = {"sliding_window": 64} if architecture == "gemma3" else {}
    bare, wrapped = (
        tiny.hf_model(architecture, 1, scale=12.0, noise=0.3, **changes).double() for _ in range(2)
    )
    model = dl.load_model(wrapped, tiny.tokenizer(), name=architecture)
    edit = dl.edit(model, REQUEST, "ft-m", penalty=penalty, **options_for("ft-m"))
    text = REQUEST.text
    ids = model.tokens.encode(text + " " + REQUEST.target_new).ids
    last, row = len(model.tokens.encode(text).ids) - 1, torch.tensor([ids[:-1]])
    assert row.shape[1] > last + 2, "the target has several tokens"
    before = everything(bare, row)
    parameters = dict(bare.named_parameters())
    with torch.no_grad():
        for delta in edit.deltas.values():
            change = delta.dense()
            same = [p for n, p in parameters.items() if is_edited(n) and p.ndim == change.ndim]
            assert len(same) == 1
            same[0].add_(change if same[0].shape == change.shape else change.T)
    after = everything(bare, row)
    expected = 0.0
    for layer in range(1, model.info.n_layers):
        was, now = before[layer], after[layer]
        if isinstance(penalty, dl.SADR):
            rows = slice(last, None) if penalty.queries == "target" else slice(0, None)
            pairs = zip(was.rows[:, rows].flatten(0, 1).tolist(),
                        now.rows[:, rows].flatten(0, 1).tolist(), strict=True)  # fmt: skip
            expected += sum(
                sum(p * math.log((p + 1e-8) / (q + 1e-8)) for p, q in zip(*pair, strict=True))
                for pair in pairs
            )
        elif isinstance(penalty, dl.KeyDrift):
            expected += float((now.keys - was.keys).norm())
        else:
            change = float((now.stream[last] - was.stream[last]).norm())
            relative = isinstance(penalty, dl.HiddenDrift) and penalty.relative
            expected += change / float(was.stream[last].norm()) if relative else change
    assert expected > 0.01
    assert edit.trace[-1][penalty.kind] == pytest.approx(expected, rel=1e-4)


def is_edited(name: str) -> bool:
    """Whether a parameter belongs to the first layer's down-projection."""
    downs = (".c_proj.", ".fc_out.", ".dense_4h_to_h.", ".down_proj.")
    return "0.mlp" in name and any(down in name for down in downs)


@dataclass
class Layer:
    """What one layer of an unwrapped model has: of one text, without the batch."""

    rows: torch.Tensor  # [head, query, key]
    keys: torch.Tensor  # [kv_head, pos, d_head], as attention uses them
    stream: torch.Tensor  # [pos, d_model], after the layer


@torch.no_grad()
def everything(bare: Any, row: torch.Tensor) -> list[Layer]:
    """All layers of one pass of an unwrapped model."""
    blocks = next(m for m in bare.modules() if isinstance(m, torch.nn.ModuleList))
    streams: list[torch.Tensor] = []

    def look(_: Any, __: Any, out: Any) -> None:
        streams.append((out[0] if isinstance(out, tuple) else out).clone()[0])

    handles = [block.register_forward_hook(look) for block in blocks]
    out = bare(input_ids=row, output_attentions=True, use_cache=True)
    for handle in handles:
        handle.remove()
    keys = [layer.keys[0] for layer in out.past_key_values.layers]
    return [Layer(a[0], k, s) for a, k, s in zip(out.attentions, keys, streams, strict=True)]


def test_a_penalty_of_ones_own() -> None:
    class OnlyOnce(Penalty):
        kind = "mine"

        def activations(self, sites: Sites) -> list[str]:
            return [block_out_name(sites.layers[-1])]

        def __call__(self, now: Any, original: Any, sites: Sites) -> PenaltyTerm:
            name = block_out_name(sites.layers[-1])
            change = sites.at_last_prompt(now[name]) - sites.at_last_prompt(original[name])
            return PenaltyTerm(change.square().sum(), {"mine too": 1.0})

        def to_dict(self) -> dict[str, Any]:
            return {"penalty": "mine"}

    edit = dl.edit(lens(), REQUEST, penalty=OnlyOnce(), **options_for("rome"))
    assert edit.trace[0]["mine"] == 0.0
    assert edit.trace[-1]["mine"] > 0.0
    assert edit.trace[0]["mine too"] == 1.0


# --- checks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", VARIANTS, ids=name_of)
def test_records_can_be_read_back(penalty: Penalty) -> None:
    import json

    record = json.loads(json.dumps(penalty.to_dict()))
    assert penalty_from_dict(record) == penalty
    assert penalty_from_dict(record).to_dict() == penalty.to_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dl.SADR(gamma=-1), "gamma is -1"),
        (lambda: dl.SADR(gamma=float("nan")), "gamma is nan"),
        (lambda: dl.SADR(gamma="much"), "gamma is 'much'"),  # type: ignore[arg-type]
        (lambda: dl.SADR(heads="some"), "SADR's heads is 'some'. Choose one of max, all"),  # type: ignore[arg-type]
        (lambda: dl.SADR(heads=[]), "no head to hold"),
        (lambda: dl.SADR(heads=["9.6"]), "'9.6' is no head"),
        (lambda: dl.SADR(heads=[(1, -2)]), r"\(1, -2\) is no head"),
        (lambda: dl.SADR(divergence="wasserstein"), "SADR's divergence is 'wasserstein'"),  # type: ignore[arg-type]
        (lambda: dl.SADR(queries="first"), "SADR's queries is 'first'"),  # type: ignore[arg-type]
        (lambda: dl.SADR(threshold=0.5), "compares with none"),
        (lambda: dl.SADR(heads="quantile", threshold=1.5), "quantile 1.5 does not exist"),
        (lambda: dl.SADR(heads="drift", threshold=float("nan")), "threshold is nan"),
        (lambda: dl.SADR(heads=5), "SADR's heads are 5"),  # type: ignore[arg-type]
        (lambda: dl.SADR(heads=[("a", "b")]), "is no head"),  # type: ignore[list-item]
        (lambda: dl.SADR(heads=[(True, 1)]), "is no head"),
        (lambda: dl.HiddenDrift(relative="no"), "relative is 'no'"),  # type: ignore[arg-type]
        (lambda: dl.SADR(layers=()), r"layers are \(\)"),
        (lambda: dl.KeyDrift(weight=-2), "weight is -2"),
        (lambda: dl.HiddenDrift(layers=3), "layers are 3"),  # type: ignore[arg-type]
        (lambda: dl.EssenceKL(weight=float("inf")), "weight is inf"),
        (lambda: penalty_from_dict({"penalty": "dropout"}), "no penalty 'dropout'"),
        (lambda: penalty_from_dict({"penalty": "sadr", "gama": 1}), "no field 'gama'"),
        (lambda: as_penalties("sadr"), "'sadr' is no penalty"),  # type: ignore[arg-type]
    ],
)
def test_bad_penalties_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()


def test_a_penalty_must_fit_the_model() -> None:
    for penalty in (dl.SADR(layers=(7,)), dl.KeyDrift(layers=(7,)), dl.HiddenDrift(layers=(7,)),
                    dl.SADR(heads=["L7H0"])):  # fmt: skip
        with pytest.raises(ModelError, match="no layer 7"):
            dl.edit(lens(), REQUEST, penalty=penalty, **options_for("rome"))
    with pytest.raises(RequestError, match="no head L1H9"):
        dl.edit(lens(), REQUEST, penalty=dl.SADR(heads=["L1H9"]), **options_for("rome"))


NUMBERS = [np.float32(0.5), np.float64(0.5), np.int64(2), torch.tensor(0.5), 1, 0.25]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda x: type(x).__name__)
def test_numbers_of_any_type_can_be_kept(number: Any) -> None:
    made = [
        dl.SADR(gamma=number), dl.SADR(heads="drift", threshold=number), dl.KeyDrift(number),
        dl.HiddenDrift(number), dl.EssenceKL(number),
    ]  # fmt: skip
    for penalty in made:
        (value,) = [x for x in json.loads(json.dumps(penalty.to_dict())).values() if x == number]
        assert value == float(number)
    assert made[0] == dl.SADR(gamma=float(number))


@pytest.mark.parametrize("number", ["0.5", None, True, math.nan, -1, torch.ones(2), np.ones(2), 1j])
def test_what_is_no_weight_is_refused(number: Any) -> None:
    with pytest.raises(RequestError, match=r"SADR's gamma is .*Give a number of at least 0"):
        dl.SADR(gamma=number)
