"""The probe: interventions act, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from wrapped import DELEGATED, architectures, build, lens, run, some_ids

import driftlens as dl
from driftlens import probing
from driftlens.interventions import pattern_name, replace_heads, z_name


def discarding(*args: Any, **options: Any) -> list[Any]:
    """``replace_heads``, but what it returns from the last hook is dropped."""
    *others, (name, write) = replace_heads(*args, **options)

    def forget(tensor: torch.Tensor, hook: Any) -> None:
        write(tensor, hook)

    return [*others, (name, forget)]


def through_the_pattern(
    layer: int, where: torch.Tensor, pattern: Any, values: Any = None, own_pattern: Any = None
) -> list[Any]:
    """``replace_heads`` as one would write it first: by editing ``hook_pattern``."""

    def write(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(where.unsqueeze(-1), pattern, tensor)

    return [(pattern_name(layer), write)]


@architectures
def test_the_probe_refuses_interventions_that_are_discarded(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "replace_heads", discarding)
    with pytest.raises(dl.ModelError, match=r"layer 0: replacing its attention pattern does not "
                       r"move the logits.*silently do nothing"):  # fmt: skip
        dl.load_model(build(architecture), tiny.tokenizer())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["gptj", "opt", "llama", "gpt2"])
def test_the_probe_finds_where_editing_the_pattern_hook_does_nothing(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "replace_heads", through_the_pattern)
    if architecture in DELEGATED:
        with pytest.raises(dl.ModelError, match="does not move the logits"):
            dl.load_model(build(architecture), tiny.tokenizer())
    else:
        dl.load_model(build(architecture), tiny.tokenizer())


def blunting(store: dict[str, torch.Tensor], names: Any) -> list[Any]:
    """``recording``, but of one layer's patterns that are a tenth too uniform."""

    def keep(name: str) -> Callable[..., None]:
        def hook_fn(tensor: torch.Tensor, hook: Any) -> None:
            if name == pattern_name(2):
                causal = torch.ones_like(tensor).tril()
                tensor = 0.9 * tensor + 0.1 * causal / causal.sum(-1, keepdim=True)
            store[name] = tensor

        return hook_fn

    return [(name, keep(name)) for name in names]


@architectures
def test_the_probe_refuses_patterns_that_are_not_the_models(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "recording", blunting)
    with pytest.raises(dl.ModelError, match="layer 2: replacing the attention pattern by itself "
                       "moves the logits"):  # fmt: skip
        dl.load_model(build(architecture), tiny.tokenizer())


def in_a_large_stream(inner: Any, dtype: torch.dtype) -> dl.LensModel:
    """A model whose residual stream is so large that it rounds what layers add."""
    inner.get_input_embeddings().weight.data *= 30 if dtype == torch.bfloat16 else 3e4
    return dl.load_model(inner.to(dtype), tiny.tokenizer())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gptj", "gemma3"])
def test_a_large_residual_stream_is_no_norm(architecture: str, dtype: torch.dtype) -> None:
    model = in_a_large_stream(build(architecture), dtype)
    every = frozenset(range(model.info.n_layers))
    assert model.writes_directly == (frozenset() if architecture == "gemma3" else every)


@pytest.mark.parametrize(("dtype", "remedy"), [
    (torch.float16, "in float16 are not finite. Load it in bfloat16 or float32."),
    (torch.float32, "in float32 are not finite. Check its weights."),
], ids=str)  # fmt: skip
def test_logits_that_are_not_finite_are_not_the_fault_of_interventions(
    dtype: torch.dtype, remedy: str
) -> None:
    inner = build("llama")
    inner.lm_head.weight.data[7] = 1e6 if dtype == torch.float16 else torch.nan
    with pytest.raises(dl.ModelError, match=remedy):
        dl.load_model(inner, tiny.tokenizer(), dtype=dtype)


def test_logits_that_are_not_finite_on_longer_texts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(model: dl.LensModel, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        logits = plain(model, ids, *args, **options)
        return logits * torch.nan if ids.shape[1] > probing.PROBE_LENGTH else logits

    plain = dl.LensModel.run
    monkeypatch.setattr(dl.LensModel, "run", overflowing)
    with pytest.raises(dl.ModelError, match="in float16 are not finite"):
        dl.load_model(build("llama"), tiny.tokenizer(), dtype=torch.float16)
    dl.load_model(build("llama"), tiny.tokenizer())


def test_without_the_proof_the_model_is_known_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def objecting(*_: object) -> None:
        raise dl.ModelError("It does not act.")

    proven = {architecture: lens(architecture) for architecture in ("gpt2", "gemma3", "gptj")}
    monkeypatch.setattr(probing, "_judge_probe", objecting)
    for architecture, known in proven.items():
        found = dl.load_model(build(architecture), tiny.tokenizer(), probe=False)
        assert found.writes_directly == known.writes_directly
        assert found.pattern_comes_first == known.pattern_comes_first
        with pytest.raises(dl.ModelError, match="does not act"):
            dl.load_model(build(architecture), tiny.tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("multiplier", "direct"), [(1.0, {0, 1, 2}), (0.22, set())])
def test_what_is_scaled_before_the_residual_stream_does_not_arrive_as_it_was(
    multiplier: float, direct: set[int], dtype: torch.dtype
) -> None:
    config = hf.GraniteConfig(**tiny._SHARED, num_key_value_heads=2, residual_multiplier=multiplier)
    torch.manual_seed(0)
    inner = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert dl.load_model(inner.to(dtype), tiny.tokenizer()).writes_directly == direct


def test_kernels_that_round_single_sequences_otherwise_hide_no_layer() -> None:
    """As on CPUs whose matrix products differ in the last bits between one row and several."""
    inner = tiny.hf_model("llama", 1, scale=5.0, noise=0.3)
    embedding = inner.get_input_embeddings()
    embedding.register_forward_hook(lambda _module, _args, out: out * (1 + 1e-3 * (len(out) == 1)))
    found = dl.load_model(inner, tiny.tokenizer())
    assert found.writes_directly == set(range(found.info.n_layers))


@pytest.mark.parametrize(
    ("mlp", "moved", "stream", "arrives"),
    [
        (1.0, 1.0, 3e7, True),  # the stream rounds what arrives
        (1.0, 0.2, 1.0, False),  # scaled on the way into the stream
        (0.5, 1.0, 3e7, False),  # something stands before it, and the stream hides what it does
        (0.5, 1.0, 1.0, True),  # arrives to the last bit, whatever the MLP's own hook shows
    ],
)
def test_what_arrives_in_the_residual_stream(
    mlp: float, moved: float, stream: float, arrives: bool
) -> None:
    pushed = torch.linspace(0.1, 1.0, 8)
    down, added, block = probing._around_down([0])
    before = {down: torch.ones(8), added: mlp * torch.ones(8), block: torch.full((8,), stream)}
    after = {
        down: before[down] + pushed,
        added: before[added],
        block: before[block] + moved * pushed,
    }
    assert probing._arrives(before, after, 0) is arrives


def test_the_probe_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "recording", blunting)
    dl.load_model(build("llama"), tiny.tokenizer(), probe=False)


def test_the_probe_refuses_a_down_projection_that_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A hook whose edits TransformerLens discards on this architecture stands in for it.
    monkeypatch.setattr(probing, "down_out_name", pattern_name)
    with pytest.raises(dl.ModelError, match="down-projection's output does not move the logits"):
        dl.load_model(build("gptj"), tiny.tokenizer())


def test_a_model_without_attention_is_refused() -> None:
    config = hf.MambaConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(dl.ModelError, match=r"cannot be intervened on|cannot be wrapped"):
        dl.load_model(hf.MambaForCausalLM(config), tiny.tokenizer())


def test_the_probe_knows_which_architectures_deliver_the_pattern_late() -> None:
    late = {a for a in tiny.ARCHITECTURES if not lens(a).pattern_comes_first}
    assert late == DELEGATED
    assert all(lens(a).gathers_before_unembed for a in tiny.ARCHITECTURES)


def uniform(pattern: torch.Tensor) -> torch.Tensor:
    causal = torch.ones_like(pattern).tril()
    return causal / causal.sum(-1, keepdim=True)


@pytest.mark.filterwarnings("ignore")
@architectures
def test_why_heads_are_replaced_by_their_output_and_not_by_their_pattern(
    architecture: str,
) -> None:
    """An edit of ``hook_pattern`` is discarded on some architectures; ours acts on all."""
    model, ids = lens(architecture), some_ids()
    base = run(model, ids)
    name = pattern_name(1)
    seen = model.record(ids, [name])[name]
    everywhere = torch.ones(seen.shape[:3], dtype=torch.bool)
    by_pattern = run(model, ids, [(name, lambda tensor, hook: uniform(tensor))])
    by_output = run(model, ids, replace_heads(1, everywhere, uniform(seen)))
    assert (by_output - base).abs().max() > 0.05
    if architecture in DELEGATED:
        assert torch.equal(by_pattern, base)
    else:
        torch.testing.assert_close(by_pattern, by_output, atol=1e-4, rtol=1e-4)


@architectures
def test_replacing_heads_leaves_other_heads_and_positions_alone(architecture: str) -> None:
    model, ids = lens(architecture), some_ids()
    names = [pattern_name(1), z_name(1)]
    seen = model.record(ids, names)
    where = torch.zeros(seen[names[0]].shape[:3], dtype=torch.bool)
    where[0, 2, 6] = where[1, 0, 3] = True
    hooks = replace_heads(1, where, uniform(seen[names[0]]))
    left = model.record(ids, [z_name(1)], hooks)[z_name(1)]
    changed = (left != seen[names[1]]).any(-1).nonzero().tolist()
    assert changed == [[0, 6, 2], [1, 3, 0]]
