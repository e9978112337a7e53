"""Patched runs against an oracle that knows nothing of TransformerLens or of our hooks.

The oracle runs two Hugging Face models that were never wrapped: one as it is, one with the
delta added to its weight by hand. While they run, ``torch.nn.functional.softmax`` and the
``torch.matmul`` that follows it in each attention layer are replaced, so that chosen rows,
columns or values are exchanged inside Hugging Face's own attention code.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from oracles import Attention, watched_attention

import driftlens as dl
from driftlens import reuse, weights
from driftlens.interventions import down_out_name, pattern_name, replace_heads, values_name
from driftlens.patch_results import Readout, recovered_share
from driftlens.scoring import ContinuationScore

PROMPT = "The Eiffel Tower is in"
SUBJECT = "Eiffel Tower"
REQUEST = dl.EditRequest("The {} is in", SUBJECT, "Rome", "Paris")
SUBJECT_COLUMNS = {"subject": range(1, 11), "subject_last": range(10, 11)}
LENGTH = 13
ANSWER = "mother"  # four tokens; the edit's "Rome" has another four, "city" one

architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
some_architectures = pytest.mark.parametrize("architecture", ["llama", "gptj"])


# --- two models, with and without the package -------------------------------------------------


def build(architecture: str) -> Any:
    return tiny.hf_model(architecture, scale=12.0, noise=0.1)


@cache
def lens(architecture: str) -> dl.LensModel:
    return dl.load_model(build(architecture), tiny.tokenizer())


def factors(architecture: str) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A rank-two change, larger than the weight itself, of layer 0's down-projection."""
    down = lens(architecture).down_projection(0)
    generator = torch.Generator().manual_seed(5)
    rows, columns = down.weight.shape
    left = torch.randn(rows, 2, generator=generator)
    right = torch.randn(columns, 2, generator=generator)
    size = 1.5 * float(down.weight.detach().norm() / (left @ right.T).norm())
    return down.name, size * left, right


@cache
def an_edit(architecture: str) -> dl.Edit:
    name, left, right = factors(architecture)
    delta = dl.LowRankDelta(left, right)
    return dl.Edit.from_deltas(lens(architecture), {name: delta}, request=REQUEST)


@cache
def reference(architecture: str, edited: bool) -> Any:
    """An unwrapped model; if ``edited``, the delta is added to its weight by hand."""
    model = build(architecture)
    if edited:
        name, left, right = factors(architecture)
        with torch.no_grad():
            dict(model.named_parameters())[name].add_(left @ right.T)
    return model


@cache
@torch.no_grad()
def attention_of(architecture: str, ids: tuple[int, ...], edited: bool) -> Attention:
    """Patterns and values of an unwrapped, unpatched model."""
    seen = Attention()
    with watched_attention(seen, None):
        reference(architecture, edited)(torch.tensor([ids]))
    return seen


@torch.no_grad()
def oracle(
    architecture: str,
    answer: str,
    places: list[tuple[int, int]],
    queries: Any = "last",
    columns: Any = None,
    exchange: str = "pattern",
    direction: str = "restore",
    prompt: str = PROMPT,
) -> Scores:
    """Log-probability and rank of each token of the answer in the patched run."""
    encode = tiny.tokenizer()
    read = encode(prompt)["input_ids"]
    target = encode(f"{prompt} {answer}")["input_ids"][len(read) :]
    ids = torch.tensor([[*read, *target[:-1]]])
    predicting = range(len(read) - 1, len(read) - 1 + len(target))
    rows = {"last": predicting, "all": range(ids.shape[1])}.get(queries, queries) if isinstance(
        queries, str
    ) else [q % len(read) for q in queries]  # fmt: skip
    source = attention_of(architecture, tuple(ids[0].tolist()), direction == "contaminate")
    running = Attention()

    def change(
        layer: int, pattern: torch.Tensor, values: torch.Tensor, own: torch.Tensor
    ) -> torch.Tensor:
        out = own.clone()
        for y, head in places:
            if y != layer:
                continue
            for query in rows:
                row = pattern[0, head, query].clone()
                theirs = source.patterns[layer][0, head, query]
                read_from = values[0, head]
                if exchange in ("values", "both"):
                    read_from = source.values[layer][0, head]
                if exchange in ("pattern", "both") and columns is None:
                    row = theirs
                elif columns is not None:
                    chosen = set(columns)
                    others = [k for k in range(len(row)) if k not in chosen]
                    left = 1.0 - sum(float(theirs[k]) for k in chosen)
                    total = sum(float(row[k]) for k in others)
                    mixed = theirs.clone()
                    for k in others:
                        # A sliding window may leave nothing else to scale.
                        if total > 0:
                            mixed[k] = float(row[k]) * left / total
                    row = mixed
                out[0, head, query] = row @ read_from
        return out

    with watched_attention(running, change):
        logits = reference(architecture, edited=direction == "restore")(ids).logits[0]
    n_layers = lens(architecture).info.n_layers
    assert len(source.patterns) == len(running.patterns) == n_layers
    return scores(logits, list(predicting), target)


Scores = tuple[list[float], list[tuple[int, int]]]
"""Of each token of an answer: log-probability, and lowest and highest rank within rounding."""


def scores(logits: torch.Tensor, predicting: list[int], target: list[int]) -> Scores:
    """From a plain softmax over the whole vocabulary, in double precision."""
    logprobs, ranks = [], []
    for position, token in zip(predicting, target, strict=True):
        shifted = logits[position].double()
        probabilities = (shifted - shifted.max()).exp()
        probabilities /= probabilities.sum()
        own = probabilities[token]
        logprobs.append(float(own.log()))
        more = [int((probabilities > own * factor).sum()) for factor in (1.0001, 0.9999)]
        ranks.append((more[0], more[1] - 1))  # the token itself is above 0.9999 of itself
    return logprobs, ranks


@torch.no_grad()
def plain(architecture: str, answer: str, edited: bool) -> Scores:
    """The same for an unpatched model."""
    read = tiny.tokenizer()(PROMPT)["input_ids"]
    target = tiny.tokenizer()(f"{PROMPT} {answer}")["input_ids"][len(read) :]
    ids = torch.tensor([[*read, *target[:-1]]])
    logits = reference(architecture, edited)(ids).logits[0]
    return scores(logits, [len(read) - 1 + i for i in range(len(target))], target)


def grid(architecture: str, layers: Any = None) -> list[tuple[int, int]]:
    info = lens(architecture).info
    chosen = range(info.n_layers) if layers is None else layers
    return [(y, x) for y in chosen for x in range(info.n_heads)]


@cache
def falling_answer(architecture: str) -> str:
    """An answer that the edit makes less likely."""
    model, edit = lens(architecture), an_edit(architecture)
    words = ["city", "Paris", "of", "the", "in", "is", "E", "Lo"]
    before = dl.score(model, PROMPT, words)
    with edit.applied(model):
        after = dl.score(model, PROMPT, words)
    return max(words, key=lambda word: before[word] - after[word])


def assert_same(found: dl.ContinuationScore, expected: Scores) -> None:
    np.testing.assert_allclose(found.token_logprobs, expected[0], atol=1e-4, rtol=1e-5)
    for rank, (lowest, highest) in zip(found.token_ranks, expected[1], strict=True):
        assert lowest <= rank <= highest


def weights_of(model: dl.LensModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.weights.parameters.items()}


# --- against the oracle ------------------------------------------------------------------------


@architectures
def test_baselines_are_the_two_models(architecture: str) -> None:
    result = dl.patch_attention(
        lens(architecture), an_edit(architecture), PROMPT, answer=ANSWER, compare=["Rome", "city"]
    )
    assert list(result.original.scores) == [ANSWER, "Rome", "city"]
    for text in (ANSWER, "Rome", "city"):
        before, after = (plain(architecture, text, edited) for edited in (False, True))
        assert_same(result.original[text], before)
        assert_same(result.edited[text], after)
        lowest, highest = (max(ranks) for ranks in zip(*before[1], strict=True))
        assert lowest <= result.original[text].rank <= highest
        assert result.original[text].prob == pytest.approx(np.exp(sum(before[0])), rel=1e-3)
    # The edit matters, or nothing below would test anything.
    assert abs(result.original.logprob - result.edited.logprob) > 0.2


CASES: dict[str, dict[str, Any]] = {
    "one head": {"heads": ["L1H2"]},
    "heads of several layers": {"heads": ["L1H0", (2, 3), "L2H1"]},
    "the same head in two layers": {"layers": [1, 2], "heads": [3]},
    "one layer": {"layers": [1]},
    "all layers": {},
    "values of one head": {"heads": ["L1H1"], "exchange": "values"},
    "values of all layers": {"exchange": "values", "queries": "all"},
    "both of one layer": {"layers": [2], "exchange": "both"},
    "both everywhere": {"exchange": "both", "queries": "all"},
    "all queries": {"queries": "all"},
    "chosen queries": {"queries": [-1, -2, 4]},
    "the subject's last column": {"columns": "subject_last"},
    "the subject's columns": {"columns": "subject", "queries": "all", "layers": [1, 2]},
    "chosen columns of one head": {"columns": [0, 5, -1], "heads": ["L2H0"], "queries": [12]},
}


BOTH_WAYS = {"one head", "all layers", "values of all layers", "both of one layer",
             "the subject's columns"}  # fmt: skip


@architectures
@pytest.mark.parametrize(
    ("direction", "case"),
    [("restore", case) for case in CASES]
    + [("contaminate", case) for case in CASES if case in BOTH_WAYS],
)
def test_patched_runs_are_the_oracles(architecture: str, direction: str, case: str) -> None:
    options = CASES[case]
    result = dl.patch_attention(
        lens(architecture), an_edit(architecture), PROMPT, answer=ANSWER, direction=direction,
        compare=["city"], **options,
    )  # fmt: skip
    if "heads" not in options:
        places = grid(architecture, options.get("layers"))
    else:
        named = {"L1H2": (1, 2), "L1H0": (1, 0), "L2H1": (2, 1), "L1H1": (1, 1), "L2H0": (2, 0)}
        places = [
            place
            for head in options["heads"]
            for place in (
                [(y, head) for y in options["layers"]]
                if isinstance(head, int)
                else [named.get(head, head)]
            )
        ]
    columns = options.get("columns")
    if isinstance(columns, str):
        columns = SUBJECT_COLUMNS[columns]
    elif columns is not None:
        columns = [column % LENGTH for column in columns]
    for text in (ANSWER, "city"):
        expected = oracle(
            architecture, text, places, options.get("queries", "last"), columns,
            options.get("exchange", "pattern"), direction,
        )  # fmt: skip
        assert_same(result.patched[text], expected)


@architectures
def test_the_cases_above_are_not_all_the_same(architecture: str) -> None:
    """Patches that did nothing would agree with an oracle that did nothing."""
    start = plain(architecture, ANSWER, edited=True)[0]
    moved = {
        exchange: abs(
            sum(oracle(architecture, ANSWER, grid(architecture), exchange=exchange)[0]) - sum(start)
        )
        for exchange in ("pattern", "values", "both")
    }
    assert min(moved.values()) > 1e-2
    assert len({round(change, 3) for change in moved.values()}) == 3


def test_the_subject_columns_of_this_file_are_right() -> None:
    pieces = [tiny.tokenizer().decode([i]) for i in tiny.tokenizer()(PROMPT)["input_ids"]]
    assert len(pieces) == LENGTH
    assert "".join(pieces[i] for i in SUBJECT_COLUMNS["subject"]).strip() == SUBJECT
    assert pieces[10] == "r"


# --- causality ---------------------------------------------------------------------------------


@architectures
def test_nothing_upstream_of_a_patch_moves(architecture: str) -> None:
    model, edit = lens(architecture), an_edit(architecture)
    ids = torch.tensor([model.tokens.encode(PROMPT).ids])
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.info.n_layers)]
    query, layer = 6, 1
    attention = model.record(ids, [pattern_name(layer), values_name(layer)])
    where = torch.zeros(1, model.info.n_heads, ids.shape[1], dtype=torch.bool)
    where[:, :, query] = True
    rows, values = attention[pattern_name(layer)], attention[values_name(layer)]
    hooks = replace_heads(layer, where, rows, values)
    with edit.applied(model):
        before = model.record(ids, names)
        after = model.record(ids, names, hooks)
    for y, name in enumerate(names):
        if y < layer:
            assert torch.equal(before[name], after[name])
        else:
            assert torch.equal(before[name][:, :query], after[name][:, :query])
            assert not torch.equal(before[name][:, query], after[name][:, query])
    # One position attends to the patched one from the next layer on, and not before.
    assert torch.equal(before[names[layer]][:, query + 1 :], after[names[layer]][:, query + 1 :])
    assert not torch.equal(before[names[-1]][:, query + 1 :], after[names[-1]][:, query + 1 :])


@architectures
@pytest.mark.parametrize("exchange", ["pattern", "values", "both"])
@pytest.mark.parametrize("direction", ["restore", "contaminate"])
def test_patching_a_models_own_attention_in_gives_the_baseline(
    architecture: str, exchange: str, direction: str
) -> None:
    model = lens(architecture)
    name, left, right = factors(architecture)
    nothing = dl.Edit.from_deltas(model, {name: torch.zeros(left.shape[0], right.shape[0])})
    result = dl.patch_attention(
        model, nothing, PROMPT, answer=ANSWER, exchange=exchange, direction=direction,
        queries="all",
    )  # fmt: skip
    assert result.original == result.edited
    np.testing.assert_allclose(
        result.patched[ANSWER].token_logprobs, result.original[ANSWER].token_logprobs, atol=2e-5
    )
    assert np.isnan(result.recovered_share)
    assert np.isnan(result.recovered_share_logprob)


@architectures
def test_layers_below_the_edit_have_nothing_to_exchange(architecture: str) -> None:
    """Layer 0's attention comes before the edited MLP, so both models have the same."""
    result = dl.patch_attention(
        lens(architecture), an_edit(architecture), PROMPT, layers=[0], exchange="both",
        answer=falling_answer(architecture), queries="all",
    )  # fmt: skip
    np.testing.assert_allclose(result.patched.logprob, result.edited.logprob, atol=5e-5)
    assert abs(result.recovered_share) < 1e-3


@architectures
def test_all_residual_streams_of_the_last_layer_are_the_whole_model(architecture: str) -> None:
    model, edit = lens(architecture), an_edit(architecture)
    last = model.info.n_layers - 1
    for direction, source in (("restore", "original"), ("contaminate", "edited")):
        for queries in ("all", "last"):
            result = dl.patch_activation(
                model, edit, PROMPT, falling_answer(architecture), "resid", layers=[last],
                direction=direction, queries=queries,
            )  # fmt: skip
            expected = getattr(result, source)
            for text, score in result.patched.scores.items():
                np.testing.assert_allclose(
                    score.token_logprobs, expected[text].token_logprobs, atol=2e-5
                )
    assert result.recovered_share == pytest.approx(0.0, abs=1e-3)


@architectures
def test_the_residual_stream_after_the_edit_at_all_positions_undoes_it(architecture: str) -> None:
    result = dl.patch_activation(
        lens(architecture), an_edit(architecture), PROMPT, falling_answer(architecture), "resid",
        layers=[0], direction="restore", queries="all",
    )  # fmt: skip
    np.testing.assert_allclose(result.patched.logprob, result.original.logprob, atol=5e-5)
    assert result.recovered_share == pytest.approx(1.0, abs=1e-3)


@architectures
def test_the_edited_mlps_output_is_all_that_the_edit_changes(architecture: str) -> None:
    model, edit = lens(architecture), an_edit(architecture)
    for direction, source in (("restore", "original"), ("contaminate", "edited")):
        result = dl.patch_activation(
            model, edit, PROMPT, ANSWER, "mlp_out", layers=[0], direction=direction, queries="all"
        )
        expected = getattr(result, source)
        np.testing.assert_allclose(result.patched.logprob, expected.logprob, atol=5e-5)
    # Attention of the same layer does not depend on the edit.
    unmoved = dl.patch_activation(
        model, edit, PROMPT, ANSWER, "attn_out", layers=[0], direction="restore", queries="all"
    )
    np.testing.assert_allclose(unmoved.patched.logprob, unmoved.edited.logprob, atol=5e-5)


@architectures
def test_all_that_all_layers_write_is_the_whole_model(architecture: str) -> None:
    """Heads' outputs and MLP outputs of all layers and positions leave nothing of the edit."""
    model, edit = lens(architecture), an_edit(architecture)
    ids = torch.tensor([model.tokens.encode(PROMPT).ids])
    layers = range(model.info.n_layers)
    names = [f(y) for y in layers for f in (pattern_name, values_name, down_out_name)]
    seen = model.record(ids, names)
    where = torch.ones(seen[pattern_name(0)].shape[:3], dtype=torch.bool)
    heads = [
        hook
        for y in layers
        for hook in replace_heads(y, where, seen[pattern_name(y)], seen[values_name(y)])
    ]
    mlps = [(down_out_name(y), lambda tensor, hook, y=y: seen[down_out_name(y)]) for y in layers]
    with torch.no_grad():
        original = model.run(ids)
        with edit.applied(model):
            edited, half, whole = (model.run(ids, hooks) for hooks in ((), heads, [*heads, *mlps]))
    torch.testing.assert_close(whole, original, atol=1e-4, rtol=1e-4)
    assert (edited - original).abs().max() > 0.1
    assert (half - original).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("component", ["attn_out", "mlp_out"])
@pytest.mark.parametrize("direction", ["restore", "contaminate"])
def test_activations_are_exchanged_as_module_outputs_of_an_unwrapped_model(
    component: str, direction: str
) -> None:
    read = tiny.tokenizer()(PROMPT)["input_ids"]
    (token,) = tiny.tokenizer()(f"{PROMPT} city")["input_ids"][len(read) :]
    kept: list[torch.Tensor] = []

    def module(edited: bool) -> Any:
        layer = reference("llama", edited).model.layers[1]
        return layer.self_attn if component == "attn_out" else layer.mlp

    def keep(module: Any, inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    def put(module: Any, inputs: Any, output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        new = own.clone()
        for position in (12, 4):
            new[:, position] = kept[0][:, position]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    restore = direction == "restore"
    with module(not restore).register_forward_hook(keep):
        reference("llama", not restore)(torch.tensor([read]))
    with module(restore).register_forward_hook(put):
        logits = reference("llama", restore)(torch.tensor([read])).logits[0]
    result = dl.patch_activation(
        lens("llama"), an_edit("llama"), PROMPT, "city", component, layers=[1],
        queries=[-1, 4], direction=direction,
    )  # fmt: skip
    assert_same(result.patched["city"], scores(logits, [12], [token]))
    assert abs(result.patched.logprob - (result.edited if restore else result.original).logprob) > 0


# --- sweeps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("gptj", {"direction": "contaminate", "queries": "all"}),
        ("llama", {"exchange": "values", "direction": "contaminate"}),
        ("gptj", {"exchange": "values"}),
        ("llama", {"exchange": "both", "queries": [-1, -3]}),
        ("gptj", {"columns": [2, 10], "direction": "contaminate"}),
        ("llama", {"columns": "subject_last"}),
    ],
    ids=str,
)
def test_the_cells_of_a_sweep_are_single_patches(
    architecture: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, edit = lens(architecture), an_edit(architecture)
    monkeypatch.setattr(reuse, "MEMORY_BUDGET", 5 * 10**5)  # a few patches in each pass
    sweep = dl.sweep_attention(
        model, edit, PROMPT, answer=ANSWER, window=2, progress=False, **options
    )

    def single(**places: Any) -> dl.Readout:
        return dl.patch_attention(model, edit, PROMPT, answer=ANSWER, **places, **options).patched

    def same(found: dl.Readout, expected: dl.Readout) -> None:
        assert list(found.scores) == list(expected.scores) == [ANSWER, "Rome"]
        for text, score in expected.scores.items():
            np.testing.assert_allclose(found[text].token_logprobs, score.token_logprobs, atol=2e-5)
            assert found[text].token_ranks == score.token_ranks

    assert (len(sweep.heads), len(sweep.heads[0]), len(sweep.layers)) == (3, 4, 3)
    for y in range(3):
        same(sweep.layers[y], single(layers=[y]))
        for x in (0, 3 - y):
            same(sweep.heads[y][x], single(heads=[(y, x)]))
    assert list(sweep.windows) == [(0, 1), (1, 2)]
    for (first, last), readout in sweep.windows.items():
        same(readout, single(layers=range(first, last + 1)))
    same(sweep.everything, single())
    baseline = dl.patch_attention(model, edit, PROMPT, answer=ANSWER, **options)
    same(sweep.original, baseline.original)
    same(sweep.edited, baseline.edited)


@some_architectures
@pytest.mark.parametrize("direction", ["restore", "contaminate"])
def test_shares_and_tables_follow_from_the_readouts(architecture: str, direction: str) -> None:
    model, edit, answer = lens(architecture), an_edit(architecture), falling_answer(architecture)
    sweep = dl.sweep_attention(
        model, edit, PROMPT, answer=answer, direction=direction, progress=False
    )
    lost = sweep.original.prob - sweep.edited.prob
    lost_logprob = sweep.original.logprob - sweep.edited.logprob
    assert lost > 0
    heads, layers = sweep.head_shares(), sweep.layer_shares("logprob")
    for y in range(3):
        for x in range(4):
            expected = (sweep.heads[y][x].prob - sweep.edited.prob) / lost
            assert heads[y, x] == pytest.approx(expected)
        expected = (sweep.layers[y].logprob - sweep.edited.logprob) / lost_logprob
        assert layers[y] == pytest.approx(expected)
    assert list(sweep.windows) == [(0, 0), (1, 1), (2, 2)]  # a fifth of three layers, at least one
    np.testing.assert_allclose(sweep.window_shares(), sweep.layer_shares(), atol=1e-3)
    result = dl.patch_attention(model, edit, PROMPT, answer=answer, direction=direction)
    assert sweep.everything_share() == pytest.approx(result.recovered_share, abs=1e-3)
    assert sweep.everything_share("logprob") == pytest.approx(
        result.recovered_share_logprob, abs=1e-3
    )

    best = sweep.top_heads(12)
    shares = {f"L{y}H{x}": heads[y, x] for y in range(3) for x in range(4)}
    ordered = sorted(shares, key=shares.__getitem__, reverse=direction == "restore")
    assert [shares[name] for name, _ in best] == [shares[name] for name in ordered]
    start = (sweep.edited if direction == "restore" else sweep.original).prob
    for name, change in best:
        y, x = map(int, name[1:].split("H"))
        assert change == pytest.approx(sweep.heads[y][x].prob - start, abs=1e-9)

    table = sweep.to_dataframe()
    assert table.groupby("kind").size().to_dict() == {
        "edited": 2, "everything": 2, "head": 24, "layer": 6, "original": 2, "window": 6,
    }  # fmt: skip
    cell = table[(table.kind == "head") & (table.first_layer == 1) & (table["head"] == 2)]
    assert cell[cell.text == answer].prob.item() == sweep.heads[1][2].prob
    assert cell[cell.text == answer].recovered_share.item() == pytest.approx(heads[1, 2])
    assert cell[cell.text == "Rome"].recovered_share.isna().all()

    figure = sweep.plot()
    start = (sweep.edited if direction == "restore" else sweep.original).prob
    np.testing.assert_allclose(
        np.asarray(figure.data[0].z, dtype=float),
        [[r.prob - start for r in row] for row in sweep.heads],
    )
    np.testing.assert_allclose(figure.data[1].y, [r.prob - start for r in sweep.layers])


def test_results_show_what_they_hold() -> None:
    answer = falling_answer("llama")
    result = dl.patch_attention(
        lens("llama"), an_edit("llama"), PROMPT, answer=answer, layers=[1, 2], columns="subject"
    )
    table = result.to_dataframe()
    assert table.run.tolist() == ["original"] * 2 + ["edited"] * 2 + ["patched"] * 2
    for row in table.itertuples():
        score = getattr(result, row.run)[row.text]
        assert (row.prob, row.logprob, row.rank) == (score.prob, score.logprob, score.rank)
    bars = {bar.name: list(bar.y) for bar in result.plot().data}
    assert bars[answer] == [result.original.prob, result.edited.prob, result.patched.prob]
    assert result.what == (
        "attention pattern of all heads of layers 1-2, rows of the last token, "
        "key columns subject (rows renormalised)"
    )
    share = (result.patched.prob - result.edited.prob) / (result.original.prob - result.edited.prob)
    assert result.recovered_share == pytest.approx(share)


def test_shares_are_nan_where_nothing_was_lost() -> None:
    assert recovered_share(0.5, 0.3, 0.4, 1e-5) == pytest.approx(0.5)
    assert recovered_share(0.5, 0.3, 0.6, 1e-5) == pytest.approx(1.5)
    assert np.isnan(recovered_share(0.5, 0.6, 0.55, 1e-5))
    assert np.isnan(recovered_share(0.5, 0.5, 0.5, 1e-5))
    assert np.isnan(recovered_share(0.5, 0.5 - 1e-9, 0.5, 1e-5))
    model, edit = lens("llama"), an_edit("llama")
    words = ["city", "Paris", "of", "the", "in", "is", "E", "Lo"]
    with edit.applied(model):
        after = dl.score(model, PROMPT, words)
    before = dl.score(model, PROMPT, words)
    rising = max(words, key=lambda word: after[word] - before[word])
    assert after[rising] > before[rising]
    sweep = dl.sweep_attention(model, edit, PROMPT, answer=rising, progress=False)
    assert np.isnan(sweep.head_shares()).all()
    assert np.isnan(sweep.layer_shares("logprob")).all()
    assert np.isnan(sweep.everything_share())


@some_architectures
@pytest.mark.parametrize("direction", ["restore", "contaminate"])
def test_patches_of_one_experiment_do_not_see_each_other(architecture: str, direction: str) -> None:
    model, edit = lens(architecture), an_edit(architecture)
    experiment = dl.PatchExperiment(model, edit, PROMPT, answer=ANSWER, direction=direction)
    assert not model.weights.is_edited
    several: list[dict[str, Any]] = [
        {"exchange": "both", "queries": "all"},
        {"columns": "subject", "layers": [1]},
        {"heads": ["L2H3"], "exchange": "values"},
        {},
    ]
    expected = [
        dl.patch_attention(model, edit, PROMPT, answer=ANSWER, direction=direction, **options)
        for options in several
    ]
    written = dl.patch_activation(
        model, edit, PROMPT, ANSWER, "mlp_out", layers=[1], direction=direction
    )
    for index in (0, 1, 2, 3, 2, 1, 0):
        assert experiment.attention(**several[index]) == expected[index]
        assert experiment.activation("mlp_out", layers=[1]) == written
    assert not model.weights.is_edited


@some_architectures
@pytest.mark.parametrize("direction", ["restore", "contaminate"])
def test_a_recording_that_is_interrupted_leaves_the_experiment_as_it_was(
    architecture: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, edit = lens(architecture), an_edit(architecture)

    def new() -> dl.PatchExperiment:
        return dl.PatchExperiment(model, edit, PROMPT, answer="city", direction=direction)

    experiment = new()
    options: list[dict[str, Any]] = [{}, {"exchange": "values"}, {"queries": "all"}]
    expected = [new().attention(**each) for each in options]
    run = dl.LensModel.run

    def interrupted(self: dl.LensModel, ids: Any, hooks: Any = (), *args: Any, **more: Any) -> Any:
        def stop(tensor: torch.Tensor, hook: Any) -> None:
            raise KeyboardInterrupt

        return run(self, ids, [*hooks, ("blocks.1.hook_out", stop)], *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(dl.LensModel, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experiment.attention(queries="all")
    assert [experiment.attention(**each) for each in options] == expected


def test_attention_of_other_positions_than_the_pass_has_is_not_stretched_over_them() -> None:
    model = lens("llama")
    ids = torch.tensor([model.tokens.encode(PROMPT).ids])
    seen = model.record(ids, [pattern_name(1), values_name(1)])
    where = torch.ones(1, model.info.n_heads, 1, dtype=torch.bool)
    hooks = replace_heads(1, where, seen[pattern_name(1)][:, :, -1:], seen[values_name(1)])
    with pytest.raises(AssertionError, match="heads give"), torch.no_grad():
        model.run(ids, hooks)


@pytest.mark.parametrize(
    ("direction", "expected"), [("restore", [1, 1, 1, 1]), ("contaminate", [0, 1, 1, 0])]
)
def test_a_touched_matrix_is_read_once_for_a_patch_and_its_sha_taken_never(
    direction: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, edit = lens("gptj"), an_edit("gptj")
    experiment = dl.PatchExperiment(model, edit, PROMPT, answer=ANSWER, direction=direction)
    read: list[str] = []
    quick = weights.quick_digest
    monkeypatch.setattr(weights, "quick_digest", lambda one: read.extend(one) or quick(one))
    monkeypatch.setattr(weights, "tensor_digest", lambda _: pytest.fail("SHA again"))
    found = []
    for patch in (
        lambda: experiment.attention(),
        lambda: experiment.attention(columns="subject", queries="all"),  # of rows not recorded yet
        lambda: experiment.activation("mlp_out"),
        lambda: experiment.activation("mlp_out"),
    ):
        read.clear()
        patch()
        assert set(read) <= set(edit.deltas)
        found.append(len(read))
    assert found == expected


# --- what is read, and where ---------------------------------------------------------------------


def test_the_new_target_is_compared_by_default() -> None:
    model, edit = lens("llama"), an_edit("llama")
    nameless = dl.Edit.from_deltas(model, edit.deltas)

    def texts(edit: dl.Edit, **options: Any) -> list[str]:
        return list(dl.patch_attention(model, edit, PROMPT, **options).patched.scores)

    assert texts(edit, answer="Paris") == ["Paris", "Rome"]
    assert texts(edit, answer="Rome") == ["Rome"]
    assert texts(edit, answer="Paris", compare=[]) == ["Paris"]
    assert texts(edit, answer="Paris", compare=["city", "Paris"]) == ["Paris", "city"]
    assert texts(nameless, answer="Paris") == ["Paris"]


def test_answers_beside_each_other_do_not_disturb_each_other() -> None:
    model, edit = lens("gptj"), an_edit("gptj")
    options: dict[str, Any] = {"queries": "all", "columns": "subject"}
    together = dl.patch_attention(
        model, edit, PROMPT, answer="city", compare=["mother", "Paris"], **options
    )
    for text in ("city", "mother", "Paris"):
        alone = dl.patch_attention(model, edit, PROMPT, answer=text, compare=[], **options)
        np.testing.assert_allclose(
            together.patched[text].token_logprobs, alone.patched[text].token_logprobs, atol=2e-5
        )


def test_the_subject_is_looked_for_only_if_it_matters() -> None:
    model, edit = lens("llama"), an_edit("llama")
    other = "The Louvre is in"
    dl.patch_attention(model, edit, other, answer="city")
    with pytest.raises(dl.TokenError, match="'Eiffel Tower' is not in"):
        dl.patch_attention(model, edit, other, answer="city", columns="subject")
    with pytest.raises(dl.TokenError, match="'Eiffel' is not in"):
        dl.patch_attention(model, edit, other, "Eiffel", answer="city")
    with pytest.raises(dl.RequestError, match="does not say which subject"):
        dl.patch_attention(
            model, dl.Edit.from_deltas(model, edit.deltas), other, answer="city",
            columns="subject",
        )  # fmt: skip


def test_the_subjects_occurrence_can_be_chosen() -> None:
    model, edit = lens("llama"), an_edit("llama")
    text = "Paris is Paris in"
    pieces = [tiny.tokenizer().decode([i]) for i in tiny.tokenizer()(text)["input_ids"]]
    last_of_second = pieces.index(" Paris")
    found = dl.patch_attention(
        model, edit, text, "Paris", "city", occurrence=1, columns="subject_last"
    )
    expected = dl.patch_attention(model, edit, text, answer="city", columns=[last_of_second])
    assert found.patched == expected.patched
    first = dl.patch_attention(
        model, edit, text, "Paris", "city", occurrence=0, columns="subject_last"
    )
    assert first.patched != found.patched


# --- what is refused -----------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"heads": ["L99H0"]}, dl.ModelError, r"no layer 99.*0 to 2"),
    ({"heads": ["L0H99"]}, dl.RequestError, r"no head L0H99.*0 to 3"),
    ({"heads": ["9.6"]}, dl.RequestError, r"'9.6' is no head.*L9H6"),
    ({"heads": (2, 1)}, dl.RequestError, r"\(2, 1\) may be one head or two.*\[\(2, 1\)\] for L2H1"),
    ({"heads": [4]}, dl.RequestError, r"no head L0H4"),
    ({"heads": [-1]}, dl.RequestError, r"no head"),
    ({"heads": []}, dl.RequestError, r"No head is chosen"),
    ({"layers": [3]}, dl.ModelError, r"no layer 3"),
    ({"layers": [-1]}, dl.ModelError, r"no layer -1"),
    ({"layers": []}, dl.RequestError, r"No layer is chosen"),
    ({"answer": ""}, dl.RequestError, r"no answer to read"),
    ({"answer": "  "}, dl.RequestError, r"no answer to read"),
    ({"compare": [""]}, dl.TokenError, r"target is empty"),
    ({"prompt": "The Eiffel Tower is in "}, dl.TokenError, r"ends in white space"),
    ({"prompt": ""}, dl.TokenError, r"empty"),
    ({"subject": "Louvre"}, dl.TokenError, r"'Louvre' is not in"),
    ({"exchange": "keys"}, dl.RequestError, r"exchange is 'keys'.*pattern, values, both"),
    ({"direction": "forward"}, dl.RequestError, r"direction is 'forward'.*restore, contaminate"),
    ({"queries": [13]}, dl.RequestError, r"no query position 13 in a prompt of 13"),
    ({"queries": [-14]}, dl.RequestError, r"no query position -14"),
    ({"queries": []}, dl.RequestError, r"No query position is chosen"),
    ({"queries": "first"}, dl.RequestError, r"queries is 'first'.*last, all"),
    ({"columns": [13]}, dl.RequestError, r"no key column 13"),
    ({"columns": "first"}, dl.RequestError, r"columns is 'first'.*subject_last, subject"),
    ({"columns": "subject", "exchange": "both"}, dl.RequestError, r"exchange='pattern' only"),
    ({"occurrence": 5, "columns": "subject"}, dl.TokenError, r"no occurrence 5"),
]


@pytest.mark.parametrize(("wrong", "error", "text"), REFUSED, ids=lambda x: str(x)[:40])
def test_wrong_requests_are_refused(
    wrong: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = lens("llama")
    options = {"prompt": PROMPT, "answer": ANSWER, **wrong}
    with pytest.raises(error, match=text):
        dl.patch_attention(model, an_edit("llama"), **options)
    if not {"layers", "heads"} & set(wrong):
        with pytest.raises(error, match=text):
            dl.sweep_attention(model, an_edit("llama"), progress=False, **options)
    assert not model.weights.is_edited


@pytest.mark.parametrize(
    "wrong",
    [{"columns": []}, {"layers": [1.7]}, {"queries": [1.5]}, {"layers": []}],
    ids=str,
)
def test_requests_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(dl.DriftLensError):
        dl.patch_attention(lens("llama"), an_edit("llama"), PROMPT, answer=ANSWER, **wrong)


def test_numbers_of_heads_may_come_from_numpy() -> None:
    model, edit = lens("llama"), an_edit("llama")
    expected = dl.patch_attention(model, edit, PROMPT, answer=ANSWER, layers=[1], heads=[2])
    found = dl.patch_attention(
        model, edit, PROMPT, answer=ANSWER, layers=np.array([1]), heads=np.array([2])
    )
    assert found == expected


def test_positions_may_come_from_numpy_and_be_read_once() -> None:
    experiment = dl.PatchExperiment(lens("llama"), an_edit("llama"), PROMPT, answer=ANSWER)
    expected = experiment.attention(queries=[3], columns=[1])
    assert expected.what.endswith("rows of the positions 3, key columns 1 (rows renormalised)")
    assert experiment.attention(queries=np.int64(3), columns=np.int64(1)) == expected
    assert experiment.attention(queries=3, columns=1) == expected
    once = experiment.attention(queries=iter([3]), columns=iter([1]))
    assert once == expected
    each = experiment.attention_each([["L1H0"], ["L2H3"]], queries=iter([3]), columns=iter([1]))
    alone = [experiment.attention(heads=[name], queries=[3], columns=[1])
             for name in ("L1H0", "L2H3")]  # fmt: skip
    assert [one.what for one in each] == [one.what for one in alone]
    swept = experiment.sweep(queries=iter([3]), progress=False)
    assert swept.heads[1][0] == experiment.attention(heads=["L1H0"], queries=[3]).patched
    written = experiment.activation("mlp_out", queries=iter([3]))
    assert written == experiment.activation("mlp_out", queries=[3])
    of_each = experiment.activation_each("mlp_out", [[0, 1, 2]], queries=iter([3]))
    assert [one.what for one in of_each] == [written.what]


def test_one_text_to_compare_with_is_no_list_of_letters() -> None:
    model, edit = lens("llama"), an_edit("llama")
    found = dl.patch_attention(model, edit, PROMPT, answer=ANSWER, compare="Rome")
    assert found == dl.patch_attention(model, edit, PROMPT, answer=ANSWER, compare=["Rome"])


@pytest.mark.parametrize("window", [0, 4])
def test_windows_that_do_not_fit_are_refused(window: int) -> None:
    with pytest.raises(dl.RequestError, match=rf"window of {window} layers.*1 to 3"):
        dl.sweep_attention(lens("llama"), an_edit("llama"), PROMPT, answer=ANSWER, window=window)


def test_wrong_activations_are_refused() -> None:
    model, edit = lens("llama"), an_edit("llama")
    for wrong, error, text in [
        ({"component": "resid_pre"}, dl.RequestError, r"component is 'resid_pre'.*mlp_out"),
        ({"layers": [7]}, dl.ModelError, "no layer 7"),
        ({"layers": []}, dl.RequestError, "No layer"),
        ({"direction": "back"}, dl.RequestError, "direction is 'back'"),
        ({"queries": [99]}, dl.RequestError, "no query position 99"),
        ({"answer": ""}, dl.RequestError, "no answer"),
    ]:
        options = {"component": "resid", "answer": ANSWER, **wrong}
        with pytest.raises(error, match=text):
            dl.patch_activation(model, edit, PROMPT, **options)
    with pytest.raises(dl.RequestError, match="k is -3"):
        dl.sweep_attention(model, edit, PROMPT, answer="city", progress=False).top_heads(-3)
    with pytest.raises(dl.RequestError, match="measure is 'odds'"):
        dl.sweep_attention(model, edit, PROMPT, answer="city", progress=False).head_shares("odds")


def test_an_edit_of_another_model_is_refused() -> None:
    with pytest.raises(dl.EditError, match="made for"):
        dl.patch_attention(lens("gptj"), an_edit("llama"), PROMPT, answer=ANSWER)


def test_a_prompt_that_is_too_long_is_refused() -> None:
    with pytest.raises(dl.RequestError, match="more than the 128"):
        dl.patch_attention(lens("gpt2"), an_edit("gpt2"), PROMPT + " in Rome" * 60, answer=ANSWER)


def test_an_edit_that_is_applied_already_is_refused() -> None:
    model, edit = lens("llama"), an_edit("llama")
    with edit.applied(model), pytest.raises(dl.DriftLensError):
        dl.patch_attention(model, edit, PROMPT, answer=ANSWER)


def test_an_edit_read_from_disk_that_is_applied_already_is_refused(tmp_path: Path) -> None:
    model, edit = lens("llama"), an_edit("llama")
    again = dl.load_edit(edit.save(tmp_path / "edit"))
    with edit.applied(model), pytest.raises(dl.EditError, match="is applied to the model now"):
        dl.patch_attention(model, again, PROMPT, answer=ANSWER)


def test_what_was_computed_under_other_edits_is_not_mixed_in() -> None:
    model, edit = lens("llama"), an_edit("llama")
    down = model.down_projection(1)
    change = dl.DenseDelta(torch.full(down.weight.shape, 0.05))
    other = dl.Edit.from_deltas(model, {down.name: change})
    outside = dl.PatchExperiment(model, edit, PROMPT, answer=ANSWER)
    with other.applied(model):
        inside = dl.PatchExperiment(model, edit, PROMPT, answer=ANSWER)
        expected = inside.attention()
    for active, experiment in ((edit, outside), (other, outside), (None, inside)):
        with nullcontext() if active is None else active.applied(model):
            for patch in (
                experiment.attention,
                lambda e=experiment: e.activation("mlp_out"),
                lambda e=experiment: e.sweep(progress=False),
            ):
                with pytest.raises(dl.EditError, match="Other edits are applied to the model now"):
                    patch()
    with other.applied(model):  # the same state again
        assert inside.attention() == expected
    assert outside.attention().original == outside.original


# --- the model stays as it was -------------------------------------------------------------------


CALLS: dict[str, Callable[..., Any]] = {
    "patch": lambda model, edit: dl.patch_attention(
        model, edit, PROMPT, answer=ANSWER, columns="subject"
    ),
    "contaminate": lambda model, edit: dl.patch_attention(
        model, edit, PROMPT, answer=ANSWER, direction="contaminate", exchange="values"
    ),
    "activation": lambda model, edit: dl.patch_activation(model, edit, PROMPT, ANSWER, "mlp_out"),
    "sweep": lambda model, edit: dl.sweep_attention(
        model, edit, PROMPT, answer=ANSWER, progress=False
    ),
}


@some_architectures
@pytest.mark.parametrize("call", CALLS)
def test_weights_are_untouched_also_when_any_pass_fails(
    architecture: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, edit = lens(architecture), an_edit(architecture)
    before = weights_of(model)
    run = dl.LensModel.run
    passes, failing = 0, -1
    edited: set[bool] = set()

    def counted(self: dl.LensModel, *args: Any, **options: Any) -> torch.Tensor:
        nonlocal passes
        edited.add(self.weights.is_edited)
        passes += 1
        if passes == failing:
            raise ArithmeticError("on purpose")
        return run(self, *args, **options)

    def assert_untouched() -> None:
        assert not model.weights.is_edited
        for name, parameter in model.weights.parameters.items():
            assert torch.equal(parameter, before[name]), name

    monkeypatch.setattr(dl.LensModel, "run", counted)
    expected = CALLS[call](model, edit)
    assert_untouched()
    assert edited == {True, False}
    total = passes
    assert total >= 3
    for chosen in range(1, total + 1):
        passes, failing = 0, chosen
        with pytest.raises(ArithmeticError, match="on purpose"):
            CALLS[call](model, edit)
        assert_untouched()
    passes, failing = 0, -1
    assert CALLS[call](model, edit) == expected
    assert_untouched()


def test_a_readout_tells_what_it_holds() -> None:
    scores = {
        "Paris": ContinuationScore("Paris", (-1.0, -2.0), (0, 7)),
        "Rome": ContinuationScore("Rome", (-0.5,), (0,)),
    }
    found = Readout("Paris", scores)
    assert repr(found) == "Readout(P('Paris') 0.0498, P('Rome') 0.6065; rank of 'Paris': 7)"
