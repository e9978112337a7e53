"""Where a model comes from, and what is refused."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from transformer_lens.model_bridge import TransformerBridge
from wrapped import PROMPT, build, lens, reference, run, some_ids

import driftlens as dl
from driftlens import checkpoints, loading
from driftlens.interventions import pattern_name
from driftlens.parameters import cast


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


@pytest.mark.parametrize("at", ["begin", "end"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_model_whose_wrapping_was_interrupted_is_loaded_anew(
    stop: type[BaseException], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = TransformerBridge.boot_transformers

    def stopping(*args: Any, **options: Any) -> Any:
        if at == "end":
            boot(*args, **options)
        raise stop("stopped")

    inner = build("llama")
    monkeypatch.setattr(TransformerBridge, "boot_transformers", stopping)
    with pytest.raises(dl.ModelError if stop is RuntimeError else stop, match="stopped"):
        dl.load_model(inner, tiny.tokenizer())
    monkeypatch.undo()
    if at == "begin":  # nothing was done to it
        ids = some_ids()
        found = run(dl.load_model(inner, tiny.tokenizer()), ids)
        assert torch.equal(found, run(lens("llama"), ids))
        return
    with pytest.raises(dl.ModelError, match="Wrapping this LlamaForCausalLM was interrupted.*anew"):
        dl.load_model(inner, tiny.tokenizer())


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


ROTATING = {"head_dim": 64, "max_position_embeddings": 2048}


def in_half_precision(way: str, folder: Path, architecture: str, **changes: Any) -> dl.LensModel:
    """A model of a checkpoint, in bfloat16, by one of the ways to load it."""
    inner = tiny.hf_model(architecture, scale=12.0, noise=0.1, **changes)
    if way == "memory":
        return dl.load_model(inner, tiny.tokenizer(), dtype=torch.bfloat16)
    if way == "bridge":
        inner.config.architectures = [type(inner).__name__]
        return dl.load_model(boot(inner), tiny.tokenizer(), dtype=torch.bfloat16)
    source = folder / "model.gguf" if way.startswith("GGUF") else folder
    if way == "GGUF, kept":
        dl.load_model(source)
    return dl.load_model(source, dtype=torch.bfloat16)


@pytest.mark.parametrize("way", ["folder", "GGUF", "GGUF, kept", "memory", "bridge"])
@pytest.mark.parametrize(
    ("architecture", "changes"), [("llama", ROTATING), ("gemma3", {}), ("gptj", {})]
)
def test_precision_is_that_of_the_weights_and_not_of_the_rotation(
    way: str,
    architecture: str,
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DRIFTLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "_gguf_quantisation", lambda path: "Q4_0")
    folder = tmp_path / "folder"
    tiny.hf_model(architecture, scale=12.0, noise=0.1, **changes).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    from_pretrained = hf.AutoModelForCausalLM.from_pretrained

    def reading(folder: str, **options: Any) -> Any:
        options.pop("gguf_file", None)  # a tiny one is none that transformers reads
        return from_pretrained(folder, **options)

    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", reading)
    tokenizer_of = hf.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        hf.AutoTokenizer,
        "from_pretrained",
        lambda folder, gguf_file=None, **options: tokenizer_of(folder, **options),
    )
    expected = from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    if way.startswith("GGUF"):
        (folder / "model.gguf").write_bytes(b"x")
    model = in_half_precision(way, folder, architecture, **changes)
    found = {n.replace("_original_component.", ""): b for n, b in model.hf_model.named_buffers()}
    for name, buffer in expected.named_buffers():
        if buffer.is_floating_point():
            assert torch.finfo(found[name].dtype).eps <= torch.finfo(buffer.dtype).eps, name
            assert torch.equal(found[name].to(buffer.dtype), buffer), name
    assert {p.dtype for p in model.weights.parameters.values()} == {torch.bfloat16}
    ids = torch.randint(tiny.VOCAB, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pattern = expected(ids, output_attentions=True).attentions[0]
    seen = model.record(ids, [pattern_name(0)])[pattern_name(0)]
    torch.testing.assert_close(seen, pattern, atol=2**-8, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_an_architecture_keeps_in_float32_stays_there(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    config = hf.Glm4MoeConfig(**tiny._SHARED, num_key_value_heads=2, n_routed_experts=4,
                              moe_intermediate_size=16, first_k_dense_replace=1)  # fmt: skip
    inner = hf.AutoModelForCausalLM.from_config(config)
    inner.save_pretrained(tmp_path)
    expected = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    cast(inner, dtype)
    found = inner.state_dict()
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}


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
