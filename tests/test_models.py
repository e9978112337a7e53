"""A wrapped model stays what it was: logits, parameters, records, identity.

The references are Hugging Face models that were never wrapped: the same seed, so the same
weights.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from wrapped import architectures, build, lens, reference, run, some_ids

import driftlens as dl
from driftlens import digests, interventions, models
from driftlens.interventions import pattern_name, values_name, z_name

DOWN = {
    "gemma3": "model.layers.{}.mlp.down_proj.weight",
    "gpt2": "transformer.h.{}.mlp.c_proj.weight",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
    "gptj": "transformer.h.{}.mlp.fc_out.weight",
    "llama": "model.layers.{}.mlp.down_proj.weight",
    "mistral": "model.layers.{}.mlp.down_proj.weight",
    "opt": "model.decoder.layers.{}.fc2.weight",
    "phi": "model.layers.{}.mlp.fc2.weight",
    "qwen2": "model.layers.{}.mlp.down_proj.weight",
    "qwen3": "model.layers.{}.mlp.down_proj.weight",
}


@architectures
def test_logits_and_patterns_are_hugging_faces(architecture: str) -> None:
    ids = some_ids()
    with torch.no_grad():
        expected = reference(architecture)(ids, output_attentions=True)
    model = lens(architecture)
    torch.testing.assert_close(run(model, ids), expected.logits, atol=1e-5, rtol=1e-5)
    names = [pattern_name(layer) for layer in range(model.info.n_layers)]
    seen = model.record(ids, names)
    assert len(expected.attentions) == model.info.n_layers
    for name, attention in zip(names, expected.attentions, strict=True):
        torch.testing.assert_close(seen[name], attention, atol=1e-6, rtol=0)


@architectures
def test_parameters_keep_their_names_and_bits(architecture: str) -> None:
    before = dict(reference(architecture).named_parameters())
    after = lens(architecture).weights.parameters
    assert list(after) == list(before)
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter), name


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gptj", "llama", "phi"])
def test_every_parameter_that_an_edit_can_name_acts_or_is_refused(architecture: str) -> None:
    """Where a bridge computes with copies of a parameter, a change of it would do nothing."""
    model, ids = lens(architecture), some_ids()
    base = run(model, ids)
    refused = []
    for name, parameter in model.weights.parameters.items():
        try:
            ticket = model.weights.push({name: dl.DenseDelta(torch.randn_like(parameter))})
        except dl.EditError:
            refused.append(name)
            continue
        try:
            assert not torch.equal(run(model, ids), base), name
        finally:
            model.weights.pop(ticket)
    assert torch.equal(run(model, ids), base)
    assert all("query_key_value" in name for name in refused)
    assert architecture == "gpt_neox" or not refused


@architectures
def test_a_second_checkpoint_is_compared_parameter_by_parameter(architecture: str) -> None:
    model, other = lens(architecture), build(architecture)
    name = DOWN[architecture].format(1)
    with torch.no_grad():
        dict(other.named_parameters())[name].add_(0.5)
    assert list(dl.Edit.from_checkpoint(model, other).deltas) == [name]


@architectures
def test_info_is_what_the_configuration_says(architecture: str) -> None:
    config, info = reference(architecture).config, lens(architecture).info
    assert info.architecture == type(reference(architecture)).__name__
    assert info.n_layers == config.num_hidden_layers
    assert info.n_heads == config.num_attention_heads
    assert info.n_kv_heads == getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert info.d_model == config.hidden_size
    assert info.d_head == 8
    assert info.d_vocab == tiny.VOCAB
    assert info.n_ctx == config.max_position_embeddings
    assert (info.dtype, info.device, info.prepends_bos) == ("float32", "cpu", False)
    assert info.weights == "as in memory"
    assert info.to_dict()["d_model"] == 32


@architectures
def test_the_down_projection_is_the_right_matrix(architecture: str) -> None:
    model = lens(architecture)
    assert model.info.down_projection == DOWN[architecture].format("{layer}")
    assert model.info.uneditable == ""
    ids = some_ids()
    for layer in range(model.info.n_layers):
        down = model.down_projection(layer)
        assert down.name == DOWN[architecture].format(layer)
        assert down.weight is dict(model.weights.parameters)[down.name]
        assert down.input_first is (architecture == "gpt2")
        assert down.d_mlp == (128 if architecture in ("gpt2", "gptj") else 64)
        key, value = interventions.down_in_name(layer), interventions.down_out_name(layer)
        seen = model.record(ids, [key, value])
        matrix = down.weight if down.input_first else down.weight.T
        # What is left is the bias: the same at every position.
        bias = seen[value] - seen[key] @ matrix.detach()
        assert seen[key].std() > 1e-3
        spread = (bias - bias.mean((0, 1), keepdim=True)).abs().max()
        assert spread < 1e-4 * seen[value].abs().max()


@architectures
def test_logits_at_chosen_positions_are_those_of_the_full_pass(architecture: str) -> None:
    model, ids = lens(architecture), some_ids()
    at = torch.tensor([[10, 0, 3, 3], [5, 10, 1, 0]])
    full = run(model, ids)
    chosen = run(model, ids, at=at)
    assert chosen.shape == (2, 4, tiny.VOCAB)
    for row in range(2):
        torch.testing.assert_close(chosen[row], full[row, at[row]], atol=1e-5, rtol=1e-5)


@architectures
def test_logits_at_single_places_are_those_of_the_full_pass(architecture: str) -> None:
    """Some sequences are read several times, some not at all."""
    model, ids = lens(architecture), some_ids(3)
    rows, positions = torch.tensor([2, 0, 2, 2]), torch.tensor([10, 4, 0, 7])
    found = run(model, ids, at=models.Places(rows, positions))
    assert found.shape == (1, 4, tiny.VOCAB)
    torch.testing.assert_close(found[0], run(model, ids)[rows, positions], atol=1e-5, rtol=1e-5)


def test_positions_are_gathered_also_where_the_unembedding_cannot_be_spared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = lens("llama"), some_ids()
    at = torch.tensor([[10, 2], [0, 7]])
    expected = run(model, ids, at=at)
    places = models.Places(torch.tensor([1, 1]), torch.tensor([7, 0]))
    at_places = run(model, ids, at=places)
    monkeypatch.setattr(model, "gathers_before_unembed", False)
    torch.testing.assert_close(run(model, ids, at=at), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(model, ids, at=places), at_places, atol=1e-5, rtol=1e-5)


@architectures
def test_padding_on_the_right_changes_nothing_on_the_left(architecture: str) -> None:
    model, ids = lens(architecture), some_ids(1, 7)
    padded = model.tokens.pad([ids[0].tolist(), list(range(13))])
    assert padded.shape == (2, 13)
    names = [pattern_name(layer) for layer in range(model.info.n_layers)]
    torch.testing.assert_close(run(model, padded)[0, :7], run(model, ids)[0], atol=1e-5, rtol=1e-5)
    alone, beside = model.record(ids, names), model.record(padded, names)
    for name in names:
        torch.testing.assert_close(beside[name][0, :, :7, :7], alone[name][0], atol=5e-6, rtol=0)
        assert not beside[name][0, :, :7, 7:].any()


def test_recording_may_stop_early() -> None:
    model, ids = lens("llama"), some_ids()
    for layer in range(model.info.n_layers):
        names = [pattern_name(layer), values_name(layer)]
        end = f"blocks.{layer}.hook_resid_post"
        early, late = model.record(ids, names, stop_at=end), model.record(ids, names)
        for name in names:
            assert torch.equal(early[name], late[name])
    above: dict[str, torch.Tensor] = {}
    hooks = models.recording(above, [pattern_name(2)])
    run(model, ids, hooks, stop_at="blocks.1.hook_resid_post")
    assert not above


def test_what_is_not_delivered_is_an_error() -> None:
    name, end = "blocks.2.hook_out", "blocks.0.hook_resid_post"
    with pytest.raises(dl.ModelError, match="did not deliver the activation 'blocks.2.hook_out'"):
        lens("llama").record(some_ids(1, 7), [name], stop_at=end)


def test_what_is_recorded_is_what_the_hooks_leave() -> None:
    model, ids = lens("llama"), some_ids()
    name = "blocks.1.hook_mlp_out"
    seen = model.record(ids, [name], [(name, lambda tensor, hook: torch.zeros_like(tensor))])
    assert not seen[name].any()


def test_a_hook_that_raises_leaves_no_hook_behind() -> None:
    model, ids = lens("gptj"), some_ids()
    before = run(model, ids)

    def disturb(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return tensor + 1

    def fail(tensor: torch.Tensor, hook: Any) -> None:
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError, match="on purpose"):
        run(model, ids, [("blocks.0.hook_mlp_out", disturb), (z_name(1), fail)])
    assert torch.equal(run(model, ids), before)


def test_frozen_parameters_get_their_flags_back() -> None:
    model = lens("llama")
    parameters = list(model.weights.parameters.values())
    parameters[0].requires_grad_(False)
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        with model.frozen():
            assert not any(parameter.requires_grad for parameter in parameters)
        assert [parameter.requires_grad for parameter in parameters] == flags
        with pytest.raises(ArithmeticError), model.frozen():
            raise ArithmeticError
        assert [parameter.requires_grad for parameter in parameters] == flags
    finally:
        parameters[0].requires_grad_(True)


def test_the_identity_is_of_all_that_answers_depend_on() -> None:
    loaded = build("llama")
    plain = dl.load_model(loaded, tiny.tokenizer()).identity()
    assert plain == dl.load_model(loaded, tiny.tokenizer()).identity()
    padded = dl.load_model(loaded, copy.deepcopy(tiny.tokenizer()))
    padded.tokenizer.backend_tokenizer.enable_padding(length=9)
    padded.tokenizer.backend_tokenizer.enable_truncation(5)
    assert plain == padded.identity()
    other = copy.deepcopy(tiny.tokenizer())
    other.add_tokens(["longer"])
    assert plain["device"] == "cpu"
    for found, differs in (
        (dl.load_model(build("llama", 2), tiny.tokenizer()), "model"),
        (dl.load_model(build("llama").double(), tiny.tokenizer()), "dtype"),
        (dl.load_model(loaded, tiny.tokenizer(), prepend_bos=True), "prepends_bos"),
        (dl.load_model(loaded, tiny.tokenizer(), separator=""), "separator"),
        (dl.load_model(loaded, other), "tokenizer"),
        (
            dl.load_model(tiny.hf_model("llama", 0, 12.0, 0.1, rms_norm_eps=0.5), tiny.tokenizer()),
            "configuration",
        ),
    ):
        names = {name for name, value in found.identity().items() if value != plain[name]}
        assert names - {"model"} == {differs} - {"model"}, differs
        assert ("model" in names) == (differs in ("model", "dtype"))
    loaded.config.use_cache = False  # nothing that changes an answer
    loaded.config.architectures = ["LlamaForCausalLM"]
    loaded.config._name_or_path = "elsewhere"
    assert plain == dl.load_model(loaded, tiny.tokenizer()).identity()


def test_the_configuration_is_that_of_the_computation() -> None:
    narrow, wide = (
        dl.load_model(tiny.hf_model("mistral", sliding_window=size), tiny.tokenizer())
        for size in (5, 50)
    )
    assert narrow.fingerprint() == wide.fingerprint()
    assert narrow.identity() != wide.identity()
    assert narrow.configuration() == {**wide.configuration(), "sliding_window": 5}
    nested = {"text_config": {"dtype": "float32", "sliding_window": 5}, "_name_or_path": "here"}
    assert models._of_the_computation(nested) == {"text_config": {"sliding_window": 5}}


def test_the_fingerprint_notices_every_way_of_changing_a_weight() -> None:
    model = dl.load_model(build("llama"), tiny.tokenizer())
    seen = {model.fingerprint()}
    weight = model.down_projection(1).weight
    weight.data[0, 0] += 1  # behind autograd's back
    seen.add(model.fingerprint())
    weight.detach().numpy()[3, 3] += 1
    seen.add(model.fingerprint())
    with torch.no_grad():
        weight[5, 5] += 1
    seen.add(model.fingerprint())
    assert len(seen) == 4
    weight.data[0, 0] -= 1
    weight.data[3, 3] -= 1
    weight.data[5, 5] -= 1
    again = digests.fingerprint(model.weights.parameters)
    assert model.fingerprint() == again


def test_the_fingerprint_is_that_of_the_unedited_weights() -> None:
    model = lens("llama")
    assert model.fingerprint() == dl.load_model(build("llama"), tiny.tokenizer()).fingerprint()
    other = dl.load_model(build("llama", seed=1), tiny.tokenizer())
    assert model.fingerprint() != other.fingerprint()
    down = model.down_projection(1)
    edit = dl.Edit.from_deltas(model, {down.name: torch.ones_like(down.weight)})
    before = model.fingerprint()
    with edit.applied(model):
        assert not torch.equal(down.weight, dict(reference("llama").named_parameters())[down.name])
        assert model.fingerprint() == before
