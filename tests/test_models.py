"""Loading and wrapping: the model stays what it was, and interventions on it act.

The references are Hugging Face models that were never wrapped: the same seed, so the same
weights.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge

import driftlens as dl
from driftlens import (
    bundled,
    checkpoints,
    interventions,
    loading,
    models,
    probing,
    weights,
)
from driftlens.errors import first_line
from driftlens.interventions import pattern_name, replace_heads, values_name, z_name
from driftlens.tokens import Tokens

PROMPT = "The Eiffel Tower is located in the city of"
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
DELEGATED = {"gptj", "opt"}
"""Where TransformerLens discards an edit of ``hook_pattern``."""

architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


def build(architecture: str, seed: int = 0) -> Any:
    return tiny.hf_model(architecture, seed, scale=12.0, noise=0.1)


@cache
def reference(architecture: str) -> Any:
    """A Hugging Face model that is never wrapped."""
    return build(architecture)


@cache
def lens(architecture: str) -> dl.LensModel:
    return dl.load_model(build(architecture), tiny.tokenizer())


def some_ids(batch: int = 2, length: int = 11) -> torch.Tensor:
    """Random ids, the padding token among them (it must be no mask)."""
    ids = torch.randint(tiny.VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))
    ids[:, 4] = tiny.tokenizer().pad_token_id
    ids[0, 0] = tiny.tokenizer().pad_token_id
    return ids


@torch.no_grad()
def run(model: dl.LensModel, *args: Any, **options: Any) -> torch.Tensor:
    return model.run(*args, **options)


# --- the same model as before ----------------------------------------------------------------


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
    again = weights.fingerprint(model.weights.parameters)
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


# --- where a model comes from ----------------------------------------------------------------


def test_the_tokenizer_is_the_one_that_was_given() -> None:
    assert lens("llama").tokenizer is tiny.tokenizer()
    model = dl.load_model(build("llama"), tiny.bos_tokenizer())
    assert model.tokenizer is tiny.bos_tokenizer()
    assert model.info.prepends_bos
    assert model.tokens.encode(PROMPT).ids[0] == tiny.bos_tokenizer().bos_token_id
    without = dl.load_model(build("llama"), tiny.bos_tokenizer(), prepend_bos=False)
    assert not without.info.prepends_bos
    assert without.tokens.encode(PROMPT).ids == lens("llama").tokens.encode(PROMPT).ids


def test_a_model_may_be_loaded_twice() -> None:
    inner = build("llama")
    first = dl.load_model(inner, tiny.tokenizer())
    second = dl.load_model(inner, tiny.tokenizer(), name="again")
    assert second.bridge is first.bridge
    assert second.info.name == "again"
    ids = some_ids()
    assert torch.equal(run(first, ids), run(second, ids))
    torch.testing.assert_close(run(first, ids), reference("llama")(ids).logits, atol=1e-5, rtol=0)


def test_edits_through_two_handles_of_one_model_leave_its_weights_alone() -> None:
    inner = build("llama")
    first, second = (dl.load_model(inner, tiny.tokenizer()) for _ in range(2))
    down = first.down_projection(1)
    before = down.weight.detach().clone()
    deltas = {down.name: dl.DenseDelta(torch.ones_like(before))}
    ticket = first.weights.push(deltas)
    other = second.weights.push(deltas)
    first.weights.pop(ticket)
    second.weights.pop(other)
    assert torch.equal(down.weight, before)


def test_a_model_is_released_with_its_last_handle() -> None:
    inner = build("llama")
    watch = weakref.ref(inner)
    model = dl.load_model(inner, tiny.tokenizer(), probe=False)
    del inner, model
    gc.collect()
    assert watch() is None


def boot(inner: Any) -> TransformerBridge:
    """A bridge as a user of TransformerLens makes one; without network it needs some tokenizer."""
    words = loading._placeholder_tokenizer()
    return TransformerBridge.boot_transformers(
        "mine", hf_model=inner, tokenizer=words, device="cpu", dtype=torch.float32
    )


def test_a_bridge_can_be_loaded_as_it_is() -> None:
    bridge = boot(build("gptj"))
    model = dl.load_model(bridge, tiny.tokenizer())
    assert model.bridge is bridge
    assert model.info.name == "mine"
    assert model.tokenizer is tiny.tokenizer()
    ids = some_ids()
    torch.testing.assert_close(run(model, ids), reference("gptj")(ids).logits, atol=1e-5, rtol=0)
    assert list(model.weights.parameters) == [n for n, _ in reference("gptj").named_parameters()]
    assert dl.load_model(bridge).tokenizer is bridge.tokenizer


def test_the_inside_of_a_foreign_bridge_is_refused() -> None:
    bridge = boot(build("llama"))
    with pytest.raises(dl.ModelError, match=r"wrapped by a TransformerBridge already.*Pass that"):
        dl.load_model(bridge.original_model, tiny.tokenizer())


def test_a_bridge_with_processed_weights_is_refused() -> None:
    bridge = boot(build("llama"))
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(dl.ModelError, match=r"compatibility mode.*Boot it anew"):
        dl.load_model(bridge, tiny.tokenizer())


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_a_folder_with_safetensors(architecture: str, tmp_path: Path) -> None:
    reference(architecture).save_pretrained(tmp_path)
    tiny.bos_tokenizer().save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    model = dl.load_model(tmp_path)
    assert model.info.weights == f"folder {tmp_path}"
    assert model.info.name == str(tmp_path)
    assert model.info.prepends_bos
    ids = some_ids()
    expected = reference(architecture)(ids, output_attentions=True)
    torch.testing.assert_close(run(model, ids), expected.logits, atol=1e-5, rtol=1e-5)
    seen = model.record(ids, [pattern_name(0)])[pattern_name(0)]
    torch.testing.assert_close(seen, expected.attentions[0], atol=1e-6, rtol=0)
    assert model.fingerprint() == lens(architecture).fingerprint()
    again = dl.load_model(str(tmp_path), tiny.tokenizer(), name="mine", dtype=torch.bfloat16)
    assert (again.info.name, again.info.dtype) == ("mine", "bfloat16")
    assert again.tokenizer is tiny.tokenizer()


def test_another_file_of_the_same_name_size_and_time_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIFTLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "_gguf_quantisation", lambda path: "Q4_0")
    from_pretrained = hf.AutoModelForCausalLM.from_pretrained
    read: list[str] = []

    def reading(folder: str, **options: Any) -> Any:
        if "gguf_file" not in options:
            return from_pretrained(folder, **options)
        read.append(Path(folder).name)
        return build("llama", seed=len(read)), {"missing_keys": [], "unexpected_keys": []}

    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", reading)
    monkeypatch.setattr(
        hf.AutoTokenizer, "from_pretrained", lambda *args, **options: tiny.tokenizer()
    )
    files = [tmp_path / name / "model.gguf" for name in ("one", "other")]
    for content, file in enumerate(files):
        file.parent.mkdir()
        file.write_bytes(bytes([content] * 9))
        os.utime(file, (1, 1))
    found = [dl.load_model(file).fingerprint() for file in (files[0], files[1], files[0])]
    assert read == ["one", "other"]  # the third one is in the cache
    assert found[0] == found[2] != found[1]


def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"x")

    def refusing(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints, "_content_digest", refusing)
    with pytest.raises(dl.ModelError, match=r"model.gguf cannot be read: Permission denied"):
        dl.load_model(path)


@pytest.mark.parametrize("source", ["smollm2-135m", "folder", "memory"])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(source: str, tmp_path: Path) -> None:
    given: Any = {"folder": tmp_path, "memory": reference("llama")}.get(source, source)
    with pytest.raises(
        dl.ModelError, match=r"A revision names a version on the hub, and \S+ is not.*Leave"
    ):
        dl.load_model(given, tiny.tokenizer(), revision="main")


def test_attention_is_switched_to_eager() -> None:
    inner = hf.AutoModelForCausalLM.from_config(
        tiny.CONFIGS["llama"](), attn_implementation="sdpa"
    ).eval()
    inner.load_state_dict(reference("llama").state_dict())
    model, ids = dl.load_model(inner, tiny.tokenizer()), some_ids()
    expected = reference("llama")(ids, output_attentions=True)
    torch.testing.assert_close(run(model, ids), expected.logits, atol=1e-5, rtol=1e-5)
    seen = model.record(ids, [pattern_name(2)])[pattern_name(2)]
    torch.testing.assert_close(seen, expected.attentions[2], atol=1e-6, rtol=0)


def test_a_model_in_training_mode_is_put_into_evaluation_mode() -> None:
    inner = build("gpt2").train()
    model, ids = dl.load_model(inner, tiny.tokenizer()), some_ids()
    assert not inner.training
    torch.testing.assert_close(run(model, ids), reference("gpt2")(ids).logits, atol=1e-5, rtol=0)


@architectures
def test_a_checkpoint_is_the_model_as_it_is_now(architecture: str, tmp_path: Path) -> None:
    model = dl.load_model(build(architecture), tiny.tokenizer())
    ids = some_ids()
    down = model.down_projection(1)
    change = dl.DenseDelta(torch.full(down.weight.shape, 0.01))
    edit = dl.Edit.from_deltas(model, {down.name: change})
    model.hf_model.config.dtype = "float16"  # of the file that it is from, say
    with edit.applied(model):
        expected = run(model, ids)
        folder = model.save_checkpoint(tmp_path / "deep" / "edited")
        other = model.save_checkpoint(str(tmp_path / "again"))
    assert [path.name for path in folder.parent.iterdir()] == ["edited"]  # nothing half written
    again = dl.load_model(folder)
    assert torch.equal(run(again, ids), expected)
    assert again.info.dtype == model.info.dtype
    assert again.tokens.encode(PROMPT).ids == model.tokens.encode(PROMPT).ids
    found = dl.Edit.from_checkpoint(model, other)
    assert list(found.deltas) == [down.name]
    plain = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lens("llama")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(dl.ModelError, match="is there already. Choose a new folder"):
            model.save_checkpoint(taken)
    assert (tmp_path / "file").read_text() == "mine"

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with small_files(1000), pytest.raises(dl.ModelError, match="cannot be written to .*new: "):
        model.save_checkpoint(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(dl.ModelError, match="cannot be written to .*new: No space left on device"):
        model.save_checkpoint(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """No file may be larger, as if the disk were full."""
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# --- what is no whole checkpoint of a model ---------------------------------------------------


def saved(folder: Path, architecture: str = "llama") -> Path:
    build(architecture).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one")
    assert dl.load_model(folder).fingerprint() == lens("llama").fingerprint()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    missing = "model.layers.1.mlp.down_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != missing}, file, {"format": "pt"})
    with pytest.raises(
        dl.ModelError, match=f"lacks 1 of the model's weights, the first '{missing}'"
    ):
        dl.load_model(folder)
    save_file({f"x.{k}": v for k, v in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(dl.ModelError, match=f"lacks {len(tensors)} of the model's weights"):
        dl.load_model(folder)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    changed = {**config, "num_hidden_layers": config["num_hidden_layers"] + 1}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(dl.ModelError, match="Give a complete checkpoint"):
        dl.load_model(folder)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_tied_weights_are_not_missing(architecture: str, tmp_path: Path) -> None:
    found = dl.load_model(saved(tmp_path, architecture))
    assert found.fingerprint() == lens(architecture).fingerprint()


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    with pytest.raises(dl.ModelError, match="cannot be loaded: "):
        dl.load_model(folder)
    file.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_attention_heads": 5}, {"intermediate_size": 7}, {"hidden_size": "wide"}):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(dl.ModelError, match="cannot be loaded: "):
            dl.load_model(folder)


def test_names_that_are_no_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "mine")
    assert dl.load_model("~/mine").fingerprint() == lens("llama").fingerprint()
    with pytest.raises(dl.EditError, match="so there is no edit"):
        dl.Edit.from_checkpoint(lens("llama"), "~/mine")
    monkeypatch.setattr(
        hf.AutoTokenizer, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("no"))
    )
    for name in ("~no-such-user/x", "x" * 300):
        with pytest.raises(dl.ModelError, match="cannot be loaded: no"):
            dl.load_model(name)
    with pytest.raises(dl.ModelError, match="dtype is 'float16'. Give one of torch's"):
        dl.load_model(tmp_path, dtype="float16")  # type: ignore[arg-type]
    monkeypatch.setenv("DRIFTLENS_CACHE", "~no-such-user/x")
    assert bundled.cache_dir() == Path("~no-such-user/x").absolute()


def test_a_model_that_is_loaded_is_not_moved(tmp_path: Path) -> None:
    hf_model = build("llama")
    model = dl.load_model(hf_model, tiny.tokenizer())
    with pytest.raises(dl.ModelError, match="loaded already, on cpu in torch.float32"):
        dl.load_model(hf_model, tiny.tokenizer(), dtype=torch.bfloat16)
    with pytest.raises(dl.ModelError, match="loaded already"):
        dl.load_model(hf_model, tiny.tokenizer(), device="meta")
    bridge = model.bridge
    with pytest.raises(dl.ModelError, match="loaded already"):
        dl.load_model(bridge, tiny.tokenizer(), dtype=torch.float16)
    again = dl.load_model(hf_model, tiny.tokenizer(), dtype=torch.float32, device="cpu")
    assert again.fingerprint() == model.fingerprint()
    assert {p.dtype for p in hf_model.parameters()} == {torch.float32}


def test_a_token_without_an_embedding_is_no_padding() -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = dl.load_model(build("llama"), tokenizer)
    assert tokenizer.pad_token_id >= model.info.d_vocab > model.tokens.pad_id
    prompts = ["The Louvre is in", "Rome is"]
    assert [dl.score(model, p, ["Paris", "Rome, Italy"]) for p in prompts] == [
        dl.score(lens("llama"), p, ["Paris", "Rome, Italy"]) for p in prompts
    ]
    begun = Tokens(tokenizer, prepend_bos=True)
    begun.d_vocab = tokenizer.bos_token_id
    with pytest.raises(dl.TokenError, match=f"the id {tokenizer.bos_token_id}, and the model has"):
        begun.encode("a")
    for text in ("a [PAD] b", "[PAD]"):
        with pytest.raises(dl.TokenError, match=f"gives .* the id {tokenizer.pad_token_id}, and"):
            model.tokens.encode(text)
        with pytest.raises(dl.TokenError, match="embeddings. Load the tokenizer that belongs"):
            model.tokens.target_ids(text)


def test_a_checkpoint_holds_no_adapter(tmp_path: Path) -> None:
    model = lens("llama")
    request = dl.EditRequest("{} is in", "The Eiffel Tower", "Rome")
    edit = dl.edit(model, request, "grace", layer=1, steps=1, progress=False)
    with edit.applied(model), pytest.raises(dl.ModelError, match="holds weights only. Keep the"):
        model.save_checkpoint(tmp_path / "edited")


# --- what is refused -------------------------------------------------------------------------


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(dl.ModelError, match=r"'no/such-model' cannot be loaded.*smollm2-135m"):
        dl.load_model("no/such-model")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(dl.ModelError, match=r"neither config.json nor a .gguf file"):
        dl.load_model(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    reference("llama").save_pretrained(tmp_path)
    with pytest.raises(dl.DriftLensError, match=r"tokenizer|cannot be loaded"):
        dl.load_model(tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    with pytest.raises(dl.ModelError, match=r"no .gguf file.*Give the folder"):
        dl.load_model(path)


def test_a_damaged_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(dl.ModelError, match=r"cannot be loaded.*complete"):
        dl.load_model(path)


def test_a_folder_with_several_ggufs_is_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(dl.ModelError, match=r"holds 2 .gguf files.*Give one"):
        dl.load_model(tmp_path)


def test_a_model_in_memory_needs_a_tokenizer() -> None:
    with pytest.raises(dl.ModelError, match="needs its tokenizer"):
        dl.load_model(build("llama"))


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class SlowTokenizer:
        is_fast = False

    inner = build("llama")
    with pytest.raises(dl.TokenError, match=r"SlowTokenizer gives no character offsets.*fast"):
        dl.load_model(inner, SlowTokenizer())
    # A refused model is not half wrapped.
    assert not any("_original_component" in name for name, _ in inner.named_modules())


def test_bos_cannot_be_prepended_where_there_is_none() -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.bos_token = None
    with pytest.raises(dl.TokenError, match="no BOS token"):
        dl.load_model(build("llama"), tokenizer, prepend_bos=True)


def test_something_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(dl.ModelError, match="no Hugging Face model"):
        dl.load_model(torch.nn.Linear(2, 2), tiny.tokenizer())


@pytest.mark.parametrize("layer", [-1, 3, 99, 1.0, "1", None])
def test_layers_out_of_range_are_refused(layer: Any) -> None:
    model = lens("llama")
    with pytest.raises(dl.ModelError, match=r"There is no layer.*Choose one of 0 to 2"):
        model.check_layer(layer)
    with pytest.raises(dl.ModelError, match="There is no layer"):
        model.down_projection(layer)


def test_layers_and_heads_may_be_of_any_integer_type() -> None:
    model = lens("llama")
    layer = model.check_layer(np.int64(2))
    assert layer == 2 and type(layer) is int
    model.check_head(np.int32(2), np.int64(3))


@pytest.mark.parametrize("head", [-1, 4, 1.0, "1"])
def test_heads_out_of_range_are_refused(head: Any) -> None:
    with pytest.raises(dl.RequestError, match=r"has no head L1H.*Heads are 0 to 3"):
        lens("llama").check_head(1, head)
    with pytest.raises(dl.ModelError, match="There is no layer 3"):
        lens("llama").check_head(3, 0)


def test_a_mixture_of_experts_can_be_studied_but_not_edited() -> None:
    config = hf.MixtralConfig(**tiny._SHARED, num_key_value_heads=2, num_local_experts=4)
    torch.manual_seed(0)
    inner = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = some_ids()
    with torch.no_grad():
        expected = inner(ids, output_attentions=True)
    model = dl.load_model(inner, tiny.tokenizer())
    torch.testing.assert_close(run(model, ids), expected.logits, atol=1e-5, rtol=1e-5)
    seen = model.record(ids, [pattern_name(1)])[pattern_name(1)]
    torch.testing.assert_close(seen, expected.attentions[1], atol=1e-6, rtol=0)
    assert model.info.down_projection == ""
    assert "mixture of experts" in model.info.uneditable
    assert "mixture of experts" in repr(model)
    with pytest.raises(dl.ModelError, match=r"no editable down-projection in layer 1.*experts"):
        model.down_projection(1)
    request = dl.EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome")
    with pytest.raises(dl.ModelError, match="no editable down-projection"):
        dl.edit(model, request, layer=1, context_prompts=["{}"], covariance="identity")


# --- the probe -------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("\nfirst\nsecond"), "first"),
        (ValueError(), "ValueError"),
        (OSError(" "), "OSError"),
    ],
)
def test_an_error_is_told_in_a_line(error: Exception, told: str):
    assert first_line(error) == told
