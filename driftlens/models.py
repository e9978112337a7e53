"""The model that everything works on: looked into, intervened on, edited."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from transformer_lens.model_bridge import TransformerBridge

from driftlens.attention import head_name
from driftlens.checkpoints import write_checkpoint
from driftlens.codebook import Codebook
from driftlens.digests import fingerprint, quick_digest
from driftlens.errors import ModelError, RequestError, first_line
from driftlens.interventions import Hook, keys_name, rotated_keys_name
from driftlens.journal import digest
from driftlens.parameters import (
    DownProjection,
    find_down_projection,
    named_parameters,
    unused_parameters,
)
from driftlens.tokens import Tokens
from driftlens.weights import WeightStack

_WEIGHTS = "_driftlens_weights"
"""Attribute of a wrapped module: all handles on it share one account of its active edits."""


@dataclass(frozen=True)
class ModelInfo:
    """What was found when a model was loaded.

    Args:
        name: How the model was asked for.
        architecture: Hugging Face class name.
        n_layers: Number of transformer blocks.
        n_heads: Query heads per layer.
        n_kv_heads: Key/value heads per layer (fewer under grouped-query attention).
        d_head: Width of a head's values.
        d_model: Width of the residual stream.
        d_vocab: Number of rows of the unembedding.
        n_ctx: Longest sequence that the model was made for.
        dtype: Of the weights, e.g. ``"float32"``.
        device: Of the first parameter.
        weights: Where the weights come from, with their quantisation.
        prepends_bos: Whether texts start with BOS.
        down_projection: Parameter that edits write to, with ``{layer}`` for the layer, or
            ``""`` if there is none.
        uneditable: Why there is none.
    """

    name: str
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_vocab: int
    n_ctx: int
    dtype: str
    device: str
    weights: str
    prepends_bos: bool
    down_projection: str
    uneditable: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return asdict(self)


class Places(NamedTuple):
    """Single positions of single sequences.

    Args:
        rows: Which sequences.
        positions: Where in them.
    """

    rows: Int[torch.Tensor, " places"]
    positions: Int[torch.Tensor, " places"]


class LensModel:
    """A language model that can be looked into, intervened on and edited.

    Made by :func:`load_model`. ``bridge`` is TransformerLens's ``TransformerBridge`` (the
    successor of ``HookedTransformer``) over raw weights, ``tokenizer`` the tokenizer that was
    given, ``info`` what was found, ``weights`` the account of the edits that are applied.
    """

    def __init__(
        self, bridge: TransformerBridge, tokens: Tokens, info: ModelInfo, hf_model: Any
    ) -> None:
        self.bridge = bridge
        self.tokens = tokens
        self.info = info
        self.hf_model = hf_model
        self.weights: WeightStack = kept_on(
            hf_model, _WEIGHTS, lambda: _make_stack(hf_model, bridge)
        )
        self.pattern_comes_first = True
        self.gathers_before_unembed = True
        self.writes_directly: frozenset[int] = frozenset()
        self.memo: dict[Any, Any] = {}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was given or found."""
        return self.tokens.tokenizer

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return next(self.hf_model.parameters()).device

    @property
    def top(self) -> str | None:
        """The hook before the unembedding, where passes end that need no logits."""
        return "unembed.hook_in" if self.gathers_before_unembed else None

    def __repr__(self) -> str:
        i = self.info
        editable = i.down_projection or f"none ({i.uneditable})"
        return (
            f"LensModel({i.name}: {i.architecture}, {i.n_layers} layers x {i.n_heads} heads "
            f"({i.n_kv_heads} kv), d_model {i.d_model}, {i.dtype} on {i.device}; "
            f"weights: {i.weights}; edits write to: {editable})"
        )

    def check_layer(self, layer: int) -> int:
        """The layer itself if it exists.

        Args:
            layer: Of any integer type.

        Raises:
            ModelError: If it is out of range.
        """
        if not isinstance(layer, Integral) or not 0 <= layer < self.info.n_layers:
            raise ModelError(
                f"There is no layer {layer!r} in {self.info.name}.",
                f"Choose one of 0 to {self.info.n_layers - 1}.",
            )
        return int(layer)

    def check_head(self, layer: int, head: int) -> None:
        """Refuse a head that does not exist.

        Raises:
            ModelError: If the layer is out of range.
            RequestError: If the head is.
        """
        self.check_layer(layer)
        if not isinstance(head, Integral) or not 0 <= head < self.info.n_heads:
            raise RequestError(
                f"{self.info.name} has no head {head_name(layer, head)}.",
                f"Heads are 0 to {self.info.n_heads - 1}.",
            )

    def check_length(self, length: int, text: str) -> None:
        """Refuse a text that is longer than the model's context.

        Raises:
            RequestError: If it is.
        """
        if length > self.info.n_ctx:
            raise RequestError(
                f"{text[:60]!r} has {length} tokens, more than the {self.info.n_ctx} of "
                f"{self.info.name}.",
                "Shorten it.",
            )

    def down_projection(self, layer: int) -> DownProjection:
        """The matrix that a locate-then-edit method writes to.

        Raises:
            ModelError: If the layer is out of range or has no single such matrix.
        """
        self.check_layer(layer)
        found = find_down_projection(self.bridge, self.weights.parameters, layer)
        if isinstance(found, str):
            raise ModelError(
                f"{self.info.name} has no editable down-projection in layer {layer}: {found}."
            )
        return found

    def layer_of(self, name: str) -> int | None:
        """The layer that a parameter belongs to; ``None`` if it belongs to none."""
        if "layer of" not in self.memo:
            self.memo["layer of"] = {
                id(parameter): layer
                for layer, block in enumerate(self.bridge.blocks)
                for parameter in block.parameters()
            }
        found: int | None = self.memo["layer of"].get(id(self.weights.parameters.get(name)))
        return found

    def key_hook(self, layer: int) -> str:
        """The hook with a layer's keys as attention compares them, ``[batch, pos, kv_head,
        d_head]``; where TransformerLens does not deliver them after the rotation, those before
        it, whose differences are of the same length."""
        if "rotated keys" not in self.memo:
            names = [rotated_keys_name(y) for y in range(self.info.n_layers)]
            seen: dict[str, torch.Tensor] = {}
            known = [name for name in names if name in self.bridge.hook_dict]
            with torch.no_grad():
                self.run(torch.tensor([[0]]), recording(seen, known), stop_at=self.top)
            self.memo["rotated keys"] = frozenset(seen)
        rotated = rotated_keys_name(layer)
        return rotated if rotated in self.memo["rotated keys"] else keys_name(layer)

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """In what this model differs from one with such an :meth:`identity`; devices may."""
        own = self.identity()
        return [name for name in own if name != "device" and own[name] != identity.get(name)]

    def fingerprint(self) -> str:
        """SHA-256 of the weights without any active edit; computed anew only if they changed."""
        stack = self.weights
        originals = {name: stack.original(name) for name in stack.parameters}
        state = quick_digest(originals)
        known: tuple[str, str] = self.memo.get("fingerprint", ("", ""))
        if known[0] != state:
            known = self.memo["fingerprint"] = (state, fingerprint(originals))
        return known[1]

    def save_checkpoint(self, folder: str | os.PathLike[str]) -> Path:
        """Write the model as it is now, edits that are applied included, into a new folder that
        transformers loads: weights as safetensors, configuration, tokenizer.

        Use it instead of ``save_pretrained`` of the Hugging Face model, whose modules carry other
        names once it is wrapped.

        Raises:
            ModelError: If an adapter is applied, which no weight holds; or the folder is not
                empty, or cannot be written.
        """
        if any(isinstance(delta, Codebook) for delta in self.weights.active):
            raise ModelError(
                "An adapter is applied, and a checkpoint holds weights only.",
                "Keep the edit with edit.save(folder).",
            )
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ModelError(f"{target} is there already.", "Choose a new folder.")
        try:
            write_checkpoint(target, self.weights.parameters, self.hf_model, self.tokenizer)
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or first_line(error)
            raise ModelError(
                f"The model cannot be written to {target}: {why}.",
                "Choose a folder that can be written to and has space.",
            ) from error
        return target

    def configuration(self) -> dict[str, Any]:
        """What Hugging Face's configuration says of the computation beside the weights (window of
        attention, rotation, soft caps, ...), where it differs from the defaults; JSON-ready."""
        found: dict[str, Any] = json.loads(
            json.dumps(_of_the_computation(self.hf_model.config.to_diff_dict()), default=str)
        )
        return found

    def identity(self) -> dict[str, Any]:
        """Everything about the model that determines what it answers, JSON-ready."""
        return {
            "model": self.fingerprint(), "configuration": digest(self.configuration()),
            "dtype": self.info.dtype, "device": self.device.type,
            "prepends_bos": self.info.prepends_bos, "separator": self.tokens.separator,
            "tokenizer": self.tokens.digest,
        }  # fmt: skip

    def run(
        self,
        ids: Int[torch.Tensor, "batch pos"],
        hooks: Sequence[Hook] = (),
        at: Int[torch.Tensor, "runs chosen"] | Places | None = None,
        stop_at: str | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """One forward pass.

        Args:
            ids: Token ids, padded on the right; causal attention never looks there, so no
                mask is needed.
            hooks: (hook name, function) pairs, active during this pass only.
            at: Positions whose logits are wanted, for each sequence (``runs`` is more than
                ``batch`` if hooks let copies join), or single ones; ``None`` for all. The
                unembedding, the most expensive matrix of small models, runs only there.
            stop_at: Name of a hook at which the pass ends, after all other hooks there.
            options: Passed on to the model, e.g. ``position_ids`` and ``past_key_values``.

        Returns:
            Logits ``[batch, chosen or pos, d_vocab]``, with no position if stopped;
            ``[1, places, d_vocab]`` of single positions.
        """
        hooks = list(hooks)
        if at is not None and self.gathers_before_unembed:
            hooks.append(("unembed.hook_in", _gather_hook(at)))
        if stop_at is not None:
            hooks.append((stop_at, _stop))
        self.weights.settle()
        options.setdefault("use_cache", "past_key_values" in options)
        try:
            with self.bridge.hooks(fwd_hooks=hooks):
                logits = self.bridge(ids.to(self.device), return_type="logits", **options)
        except _Stopped:
            return torch.empty(ids.shape[0], 0, self.info.d_vocab)
        if at is not None and not self.gathers_before_unembed:
            logits = gather(logits, at)
        return logits

    def record(
        self,
        ids: Int[torch.Tensor, "batch pos"],
        names: Sequence[str],
        hooks: Sequence[Hook] = (),
        stop_at: str | None = None,
    ) -> dict[str, torch.Tensor]:
        """Activations by hook name, from one pass without gradients.

        ``hooks`` act in the same pass; what is recorded is what they leave. The pass ends at
        the hook ``stop_at``, by default before the unembedding.

        Raises:
            ModelError: If the model does not deliver one of them.
        """
        store: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            self.run(ids, [*hooks, *recording(store, names)], stop_at=stop_at or self.top)
        missing = [name for name in names if name not in store]
        if missing:
            raise ModelError(f"{self.info.name} did not deliver the activation {missing[0]!r}.")
        return store

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No parameter collects gradients inside; flags are restored."""
        flags = [(p, p.requires_grad) for p in self.hf_model.parameters()]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def recording(store: dict[str, torch.Tensor], names: Sequence[str]) -> list[Hook]:
    """Hooks that put activations into ``store``."""

    def keep(name: str) -> Hook:
        def hook_fn(tensor: torch.Tensor, hook: Any) -> None:
            store[name] = tensor

        return name, hook_fn

    return [keep(name) for name in names]


_BESIDE_THE_COMPUTATION = re.compile(
    r"_.*|.*_token_id|(torch_)?dtype|transformers_version|architectures|use_cache"
    r"|initializer_range|quantization_config"
)
"""Names in a configuration that say where a model is from, how it is kept or trained, or what its
special tokens are."""


def _of_the_computation(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _of_the_computation(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if not _BESIDE_THE_COMPUTATION.fullmatch(str(name))
    }


def kept_on(hf_model: torch.nn.Module, name: str, make: Callable[[], Any]) -> Any:
    """What is kept on a module itself, so that it lives exactly as long as the module does."""
    # Not setattr: the module would register a bridge as one of its own children.
    if name not in vars(hf_model):
        vars(hf_model)[name] = make()
    return vars(hf_model)[name]


def is_loaded(hf_model: torch.nn.Module) -> bool:
    """Whether a :class:`LensModel` has been made of this module."""
    return _WEIGHTS in vars(hf_model)


def _make_stack(hf_model: torch.nn.Module, bridge: TransformerBridge) -> WeightStack:
    parameters = named_parameters(hf_model)
    owner = {
        id(parameter): module
        for module in hf_model.modules()
        for parameter in module._parameters.values()
    }
    owners = {name: owner[id(parameter)] for name, parameter in parameters.items()}
    return WeightStack(parameters, unused_parameters(bridge, parameters), owners)


class _Stopped(Exception):
    """Ends a pass whose rest nobody needs."""


def _stop(tensor: torch.Tensor, hook: Any) -> None:
    raise _Stopped


def gather(
    tensor: Float[torch.Tensor, "batch pos d"], at: Int[torch.Tensor, "batch chosen"] | Places
) -> torch.Tensor:
    """``tensor`` at chosen positions only: ``[batch, chosen, d]``, or ``[1, places, d]``."""
    if isinstance(at, Places):
        return tensor[at.rows.to(tensor.device), at.positions.to(tensor.device)][None]
    index = at.to(tensor.device).unsqueeze(-1).expand(-1, -1, tensor.shape[-1])
    return tensor.gather(1, index)


def _gather_hook(at: Int[torch.Tensor, "batch chosen"] | Places) -> Any:
    def keep_chosen(hidden: Float[torch.Tensor, "batch pos d_model"], hook: Any) -> torch.Tensor:
        return gather(hidden, at)

    return keep_chosen
