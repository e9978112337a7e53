"""The fast way gives what the plain way gives: for edits and for patches, on every architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import tiny
import torch

import driftlens as dl
from driftlens.interventions import pattern_name
from driftlens.models import recording
from driftlens.reuse import (
    Engine,
    FullPass,
    SuffixRunner,
    budget,
    in_batches,
    reuse_is_exact,
)
from driftlens.scoring import log_probabilities

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
    down = model.down_projection(1)
    left, right = (torch.randn(size, 1, generator=generator) for size in down.weight.shape)
    return dl.Edit.from_deltas(
        model,
        {down.name: dl.LowRankDelta(left * 0.3, right)},
        request=dl.EditRequest("{} is located in the city of", SUBJECT, "Rome", "Paris"),
    )


def by_engine(architecture: str, direction: Any) -> Iterator[tuple[str, dl.PatchExperiment]]:
    """The same experiment with each engine."""
    for engine in get_args(Engine):
        yield (
            engine,
            dl.PatchExperiment(
                lens(architecture),
                some_edit(architecture),
                PROMPT,
                SUBJECT,
                "Paris of France",
                direction=direction,
                engine=engine,
            ),
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
    assert max(one["sadr"] for one in plain.trace) > 0
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
        ("restore", {"queries": [4, -3]}),
        ("contaminate", {"queries": "all", "exchange": "both"}),
        ("restore", {"queries": 20, "exchange": "values"}),
    ],
    ids=str,
)
def test_patches_are_the_same(architecture: str, direction: Any, options: dict[str, Any]):
    found = []
    for engine, experiment in by_engine(architecture, direction):
        sweep = experiment.sweep(window=2, progress=False, **options)
        assert sweep.engine == engine
        found.append(sweep.to_dataframe())
    fast, plain = found
    assert (plain["logprob"] - fast["logprob"]).abs().max() < 1e-4
    moved = plain["logprob"][plain["kind"] != "original"]
    assert moved.max() - moved.min() > 1e-4  # the patches do something


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize(
    ("component", "direction", "queries"),
    [("attn_out", "restore", [5, -2]), ("mlp_out", "contaminate", "last"),
     ("resid", "restore", "last")],
    ids=str,
)  # fmt: skip
def test_patches_of_activations_are_the_same(
    architecture: str, direction: Any, component: Any, queries: Any
):
    found = []
    for engine, experiment in by_engine(architecture, direction):
        result = experiment.activation(component, layers=[1, 2], queries=queries)
        assert result.engine == engine
        found.append(result.to_dataframe()["logprob"])
    assert (found[0] - found[1]).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_patches_that_share_a_pass_are_those_of_single_calls(
    architecture: str, monkeypatch: pytest.MonkeyPatch
):
    """Sets in any order, overlapping, of one layer or several."""
    sets: list[Any] = [[2], [0, 2], range(3), 1, [1, 2]]
    heads = [[(layer, head) for layer in (0, 2)] for head in range(4)]
    for _, experiment in by_engine(architecture, "contaminate"):
        for queries in ("last", "all"):
            component: Any = "attn_out" if queries == "all" else "mlp_out"
            runs: list[Any] = []
            ran = experiment._run
            with monkeypatch.context() as patch:
                patch.setattr(
                    experiment, "_run", lambda *a, ran=ran, to=runs: to.append(a) or ran(*a)
                )
                many = experiment.activation_each(component, sets, queries=queries)
                assert len(runs) == 1
                many += experiment.attention_each(heads, queries=queries, exchange="both")
                assert len(runs) == 2
            one = [experiment.activation(component, layers=s, queries=queries) for s in sets]
            one += [experiment.attention(heads=h, queries=queries, exchange="both") for h in heads]
            assert [found.what for found in many] == [found.what for found in one]
            logprobs = torch.tensor([found.patched.logprob for found in one])
            together = torch.tensor([found.patched.logprob for found in many])
            assert (logprobs - together).abs().max() < 1e-4
            assert logprobs[: len(sets)].max() - logprobs[: len(sets)].min() > 1e-3


def test_a_patch_of_several_layers_reaches_each_of_them():
    experiment = dict(by_engine("llama", "contaminate"))["suffix"]
    model = experiment.model
    names = [f"blocks.{layer}.hook_mlp_out" for layer in (1, 2)]
    ids = experiment.batch.ids(model)
    with experiment.edit.applied(model):
        source = model.record(ids, names)

    def exchanged(name: str) -> Any:
        return name, lambda own, hook: torch.cat([own[:, :start], source[name][:, start:]], dim=1)

    start = len(experiment.batch.questions[0].prompt) - 1  # all from there on predict the answer
    with torch.no_grad():
        logits = model.run(ids, [exchanged(name) for name in names], at=experiment.batch.at())
    (expected, *_) = experiment.batch.read(log_probabilities(logits))
    both = experiment.activation("mlp_out", layers=[1, 2]).patched.logprob
    assert both == pytest.approx(expected.logprob, abs=1e-4)
    for layer in (1, 2):
        alone = experiment.activation("mlp_out", layers=[layer]).patched.logprob
        assert abs(alone - both) > 1e-3


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_an_edited_pass_over_the_originals_lower_layers_is_the_edited_pass(architecture: str):
    model, edit = lens(architecture), some_edit(architecture)
    rows = [model.tokens.encode(text).ids for text in (PROMPT, "The Louvre is")]
    at = torch.tensor([[len(row) - 1, 1] for row in rows])
    assert edit.lowest_layer(model) == 1
    before = FullPass(model, rows, [1], at)
    below: dict[str, torch.Tensor] = {}
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    with edit.applied(model):
        after = before.rerun(1, [2], at, recording(below, names))
        whole = FullPass(model, rows, [1, 2], at)
    torch.testing.assert_close(after.logits, whole.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.entering[2][0], whole.entering[2][0], atol=1e-5, rtol=1e-5)
    for one, other in zip(after.cache.layers, whole.cache.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-5)
    assert float((after.logits - before.logits).abs().max()) > 1e-3
    assert list(below) == names[1:]  # the layer below was not run


def test_a_suffix_pass_reads_less_than_the_whole_sequence():
    model = lens("llama")
    rows = [model.tokens.encode(text).ids for text in (PROMPT, "The Louvre is")]
    starts = [len(rows[0]) - 2, 1]
    base = FullPass(model, rows, enters=[1])
    runner = SuffixRunner(base, starts)
    assert (runner.n_rows, runner.width) == (2, max(2, len(rows[1]) - 1))
    with torch.no_grad():
        logits = runner.run(joins=[1])
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
    experiment = dl.PatchExperiment(model, edit, PROMPT, SUBJECT, "Paris")  # says it no more
    assert experiment.sweep(progress=False).engine == "plain"
    assert experiment.attention(heads=["L1H0"]).engine == "plain"
    assert dl.measure_drift(model, edit, PROMPT, SUBJECT).engine == "plain"


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


def test_a_full_memory_is_no_answer_to_what_a_model_can(monkeypatch: pytest.MonkeyPatch):
    model = dl.load_model(tiny.hf_model("llama"), tokenizer=tiny.tokenizer())

    def full(self: SuffixRunner, *args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(SuffixRunner, "run", full)
        with pytest.raises(torch.OutOfMemoryError):
            reuse_is_exact(model)
    assert reuse_is_exact(model)  # it is asked again, and not what was said while memory was full


def test_what_torch_holds_of_a_gpu_for_later_is_free(monkeypatch: pytest.MonkeyPatch):
    gib = 2**30
    for name, value in {
        "mem_get_info": (2 * gib, 80 * gib), "memory_reserved": 70 * gib,
        "memory_allocated": 8 * gib,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert budget(on_gpu) == 16 * gib
    assert budget(on_gpu, on_cpu=20 * gib) == 20 * gib


def refused_by_the_gpu() -> None:
    raise torch.OutOfMemoryError("too much")


def refused_by_the_cpu() -> None:
    torch.empty(10**16)  # whose error is a plain RuntimeError


@pytest.mark.parametrize("refused", [refused_by_the_gpu, refused_by_the_cpu])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(refused: Callable[[], None]):
    sizes: list[int] = []

    def run(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > 3:
            refused()
        return [item * item for item in items]

    found = [x for part in in_batches(range(20), 16, run) for x in part]
    assert found == [i * i for i in range(20)]
    assert sizes[:4] == [16, 8, 4, 2]
    assert max(sizes[3:]) == 2

    def never(items: Sequence[int]) -> list[int]:
        refused()
        return []

    with pytest.raises(RuntimeError, match="too much|allocate memory"):
        list(in_batches([1, 2], 2, never))


def test_a_defect_in_a_batch_is_not_taken_for_a_full_memory():
    sizes: list[int] = []

    def broken(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(range(4), 4, broken))
    assert sizes == [4]


def test_a_sweep_survives_a_full_memory(monkeypatch: pytest.MonkeyPatch):
    model, edit = lens("llama"), some_edit("llama")
    expected = dl.sweep_attention(model, edit, PROMPT, answer="Paris", progress=False)
    run, refused = SuffixRunner.run, 0

    def small(self: SuffixRunner, hooks: Any = (), at: Any = None, joins: Any = (0,), **o: Any):
        nonlocal refused
        if len(joins) > 4:
            refused += 1
            raise torch.OutOfMemoryError("too much")
        return run(self, hooks, at, joins, **o)

    monkeypatch.setattr(SuffixRunner, "run", small)
    found = dl.sweep_attention(model, edit, PROMPT, answer="Paris", progress=False)
    assert refused
    gap = found.to_dataframe()["logprob"] - expected.to_dataframe()["logprob"]
    assert gap.abs().max() < 1e-5


def test_a_patch_joins_at_its_own_layer_and_starts_at_its_own_position():
    model, edit = lens("llama"), some_edit("llama")
    experiment = dl.PatchExperiment(model, edit, PROMPT, answer="Paris", compare=[])
    rows = len(experiment.batch.rows)
    seen: dict[str, tuple[int, ...]] = {}
    names = [pattern_name(y) for y in range(3)]

    def look(tensor: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = tuple(tensor.shape)

    with model.bridge.hooks(fwd_hooks=[(name, look) for name in names]):
        experiment.sweep(window=1, progress=False)
    # Each layer brings its heads, itself and its window; the first also everything at once.
    heads = model.info.n_heads
    copies = [heads + 3, 2 * heads + 5, 3 * heads + 7]
    assert [seen[name][0] for name in names] == [rows * n for n in copies]
    answer = len(model.tokens.target_ids("Paris"))
    assert {shape[2] for shape in seen.values()} == {answer}  # the last token, and the answer's
