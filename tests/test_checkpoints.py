"""Checkpoints: what is written, and what is no whole one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from wrapped import PROMPT, architectures, build, lens, run, some_ids

import driftlens as dl
from driftlens import bundled
from driftlens.tokens import Tokens


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
    for dtype in ("float16", torch.int8):
        with pytest.raises(dl.ModelError, match=f"dtype is {dtype!r}. Give one of torch's"):
            dl.load_model(tmp_path, dtype=dtype)  # type: ignore[arg-type]
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
