"""The only loader of models: what they are made of, and proof that interventions act on them."""

from __future__ import annotations

import copy
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from jaxtyping import Float, Int
from safetensors import SafetensorError
from transformer_lens.model_bridge import TransformerBridge

from driftlens import bundled
from driftlens.attention import head_name
from driftlens.codebook import Codebook
from driftlens.errors import ModelError, RequestError
from driftlens.interventions import (
    Hook,
    block_out_name,
    down_out_name,
    keys_name,
    mlp_out_name,
    pattern_name,
    replace_heads,
    rotated_keys_name,
    values_name,
    z_name,
)
from driftlens.journal import digest
from driftlens.precision import in_float32
from driftlens.tokens import Tokens
from driftlens.weights import WeightStack, fingerprint, quick_digest

_BRIDGE = "_driftlens_bridge"
_WEIGHTS = "_driftlens_weights"
"""Attributes of a wrapped module. Wrapping happens in place, so a module is wrapped only once,
and all handles on it share one account of its active edits."""


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


@dataclass(frozen=True)
class DownProjection:
    """The MLP matrix of one layer that turns keys into values.

    Args:
        name: Parameter name.
        weight: ``[d_model, d_mlp]``, or ``[d_mlp, d_model]`` if ``input_first``.
        input_first: Whether rows are inputs (GPT-2's ``Conv1D``) rather than outputs.
        bias: Name of its bias, if it has one.
    """

    name: str
    weight: torch.nn.Parameter
    input_first: bool
    bias: str | None = None

    @property
    def d_mlp(self) -> int:
        """Width of the keys."""
        return int(self.weight.shape[0 if self.input_first else 1])


class LensModel:
    """A language model that can be looked into, intervened on and edited.

    Made by :func:`load_model`. ``bridge`` is TransformerLens's ``TransformerBridge`` (the
    successor of ``HookedTransformer``) over raw weights, ``tokenizer`` the tokenizer that was
    given, ``info`` what was found.
    """

    def __init__(
        self, bridge: TransformerBridge, tokens: Tokens, info: ModelInfo, hf_model: Any
    ) -> None:
        self.bridge = bridge
        self.tokens = tokens
        self.info = info
        self.hf_model = hf_model
        self.weights: WeightStack = _shared(
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
        found = _down_projection(self.bridge, self.weights.parameters, layer)
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
            _write_checkpoint(target, self.weights.parameters, self.hf_model, self.tokenizer)
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
        options.setdefault("use_cache", "past_key_values" in options)
        try:
            with self.bridge.hooks(fwd_hooks=hooks):
                logits = self.bridge(ids.to(self.device), return_type="logits", **options)
        except _Stopped:
            return torch.empty(ids.shape[0], 0, self.info.d_vocab)
        if at is not None and not self.gathers_before_unembed:
            logits = _gather(logits, at)
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
        dtype: Of the weights; by default the checkpoint's own (float32 for GGUF).
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
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ModelError(f"dtype is {dtype!r}.", "Give one of torch's, e.g. torch.float16.")
    if revision is not None and not _is_hub_name(source):
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
            hf_model, found, weights = _read(str(source), dtype, revision)
            tokenizer = tokenizer if tokenizer is not None else found
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


def _move(hf_model: Any, device: Any, dtype: torch.dtype | None) -> None:
    """Put a model in memory elsewhere, or into another precision; not one that is loaded already,
    as whoever did so would not know."""
    first = next(iter(hf_model.parameters()))
    elsewhere = device is not None and torch.empty(0, device=device).device != first.device
    if _WEIGHTS in vars(hf_model) and (elsewhere or dtype not in (None, first.dtype)):
        raise ModelError(
            f"The model in memory is loaded already, on {first.device} in {first.dtype}.",
            "Leave device and dtype out, or pass another copy of the model.",
        )
    hf_model.to(device=device, dtype=dtype)


# --- reading -------------------------------------------------------------------------------


def _check_device(device: str | torch.device | None) -> None:
    if device is None:
        return
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ModelError(
            f"There is no device {str(device)!r} here: {str(error).splitlines()[0]}",
            "Leave it out for the CPU.",
        ) from error


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


def _is_hub_name(source: Any) -> bool:
    if not isinstance(source, str) or source in bundled.BUNDLED_MODELS:
        return False
    try:
        return not bundled.expanded(source).exists()
    except OSError:  # too long for a path
        return True


def _read(source: str, dtype: torch.dtype | None, revision: str | None) -> tuple[Any, Any, str]:
    """Model, tokenizer and a word on the weights, from a name or a path."""
    if source in bundled.BUNDLED_MODELS:
        return _read_gguf(bundled.fetch(source), dtype)
    if _is_hub_name(source):
        return _read_hub_or_folder(source, False, dtype, revision)
    path = bundled.expanded(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{source} is a file, but no .gguf file.",
                "Give the folder with the safetensors and config.json, or a .gguf file.",
            )
        return _read_gguf(path, dtype)
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) > 1:
            raise ModelError(f"{source} holds {len(ggufs)} .gguf files.", "Give one of them.")
        if ggufs:
            return _read_gguf(ggufs[0], dtype)
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{source} is no model folder: it has neither config.json nor a .gguf file."
            )
    return _read_hub_or_folder(str(path), True, dtype, revision)


def _read_hub_or_folder(
    source: str, local: bool, dtype: torch.dtype | None, revision: str | None
) -> tuple[Any, Any, str]:
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"local_files_only": local}
    if revision is not None:
        options["revision"] = revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, _ = read_weights(source, dtype=dtype or "auto", **options)
    except ModelError:
        raise
    except Exception as error:  # damaged files make the readers raise errors of many types
        raise ModelError(
            f"The model {source!r} cannot be loaded: {first_line(error)}",
            f"Bundled names are {', '.join(bundled.BUNDLED_MODELS)}; otherwise give a hub name "
            "(with network) or a local folder with model and tokenizer.",
        ) from error
    return model, tokenizer, f"{'folder' if local else 'hub'} {source}"


def read_weights(source: str, **options: Any) -> tuple[Any, list[str]]:
    """A Hugging Face model with all of its weights, and the names of what a checkpoint holds
    beside them.

    Args:
        source: A hub name or a folder.
        options: Of ``from_pretrained``, which raises errors of many types.

    Raises:
        ModelError: If weights are missing, in whose place there would be random numbers.
    """
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager", output_loading_info=True, **options
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} of the model's weights, the first {missing[0]!r}.",
            "Give a complete checkpoint of the model that its config.json describes.",
        )
    return model, sorted(found["unexpected_keys"])


def first_line(error: Exception) -> str:
    """What an error says, in a line; its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _read_gguf(path: Path, dtype: torch.dtype | None) -> tuple[Any, Any, str]:
    """Model and tokenizer of a GGUF file.

    Reading a GGUF file takes transformers most of a minute, so what it gives is kept in the
    cache as a folder with float32 safetensors, which holds the same bits.
    """
    from transformers import AutoTokenizer

    try:
        key = f"{path.stem}-{_content_digest(path)}"
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    folder = bundled.cache_dir() / "dequantised" / key
    try:
        if folder.is_dir():
            kind = (folder / QUANTISATION_FILE).read_text(encoding="utf-8")
            model, _ = read_weights(str(folder), dtype=torch.float32, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        else:
            kind = _gguf_quantisation(path)
            model, _ = read_weights(
                str(path.parent), gguf_file=path.name, dtype=torch.float32, local_files_only=True
            )
            tokenizer = AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=path.name, local_files_only=True
            )
            _keep_dequantised(folder, model, tokenizer, kind)
    except Exception as error:  # a damaged file makes the reader raise errors of many types
        raise ModelError(
            f"The GGUF file {path} cannot be loaded: {error}",
            "Check that it is complete and that transformers reads its architecture; "
            f"remove {folder} if it exists.",
        ) from error
    if dtype is not None:
        model = model.to(dtype)
    return model, tokenizer, f"GGUF {kind}, dequantised to {str(model.dtype).split('.')[-1]}"


def _content_digest(path: Path) -> str:
    """Of a file: 128 bits, read at the speed of the disk; not cryptographic."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found.update(block)
    return found.hexdigest()


QUANTISATION_FILE = "gguf_quantisation.txt"


def _keep_dequantised(folder: Path, model: Any, tokenizer: Any, kind: str) -> None:
    """Put a folder that transformers can load into the cache, whole or not at all."""
    parameters = named_parameters(model)
    # The cache only saves time: a full or read-only disk must not stop the work, and another
    # process may have put the same folder there first.
    with suppress(Exception):
        _write_checkpoint(folder, parameters, model, tokenizer, {QUANTISATION_FILE: kind})


def _write_checkpoint(
    folder: Path,
    parameters: Mapping[str, torch.Tensor],
    model: Any,
    tokenizer: Any,
    more: Mapping[str, str] | None = None,
) -> None:
    """A folder that transformers can load, whole or not at all.

    Args:
        folder: That is not there yet, or empty.
        parameters: By Hugging Face name.
        model: Whose configuration it is.
        tokenizer: Of the model.
        more: Further files, by name.
    """
    from safetensors.torch import save_file

    staging = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    config.dtype = next(iter(tensors.values())).dtype
    try:
        staging.mkdir(parents=True)
        save_file(tensors, str(staging / "model.safetensors"), metadata={"format": "pt"})
        config.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        for name, text in (more or {}).items():
            (staging / name).write_text(text, encoding="utf-8")
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _gguf_quantisation(path: Path) -> str:
    """The file's own word for its quantisation, e.g. ``Q4_1``."""
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(str(path)).get_field("general.file_type")
    if field is None:
        return "of unstated quantisation"
    return LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_").removeprefix("ALL_")


# --- wrapping ------------------------------------------------------------------------------


def _wrap(hf_model: Any, tokens: Tokens) -> TransformerBridge:
    """A bridge over a model in memory, without network and without touching its tokenizer."""
    known = vars(hf_model).get(_BRIDGE)
    if known is not None:
        return known
    if not hf_model.config.architectures:
        hf_model.config.architectures = [type(hf_model).__name__]
    if any("_original_component" in name for name, _ in hf_model.named_modules()):
        raise ModelError(
            "The model is wrapped by a TransformerBridge already.",
            "Pass that bridge instead of the model inside it.",
        )
    try:
        bridge = TransformerBridge.boot_transformers(
            "model-in-memory",
            hf_model=hf_model,
            tokenizer=_placeholder_tokenizer(),
            device=str(next(hf_model.parameters()).device),
            dtype=next(hf_model.parameters()).dtype,
        )
    except Exception as error:
        raise ModelError(
            f"TransformerLens cannot wrap {type(hf_model).__name__}: {error}"
        ) from error
    # The bridge's own set-up would load the tokenizer anew from its name, and so from the
    # network, if it does not prepend BOS. So the real one is put in afterwards.
    bridge._tokenizer = tokens.tokenizer
    bridge.cfg.tokenizer_prepends_bos = tokens.prepend_bos
    bridge.cfg.default_prepend_bos = tokens.prepend_bos
    return _shared(hf_model, _BRIDGE, lambda: bridge)


def _shared(hf_model: torch.nn.Module, name: str, make: Callable[[], Any]) -> Any:
    """What is kept on a module itself, so that it lives exactly as long as the module does."""
    # Not setattr: the module would register a bridge as one of its own children.
    if name not in vars(hf_model):
        vars(hf_model)[name] = make()
    return vars(hf_model)[name]


def _make_stack(hf_model: torch.nn.Module, bridge: TransformerBridge) -> WeightStack:
    parameters = named_parameters(hf_model)
    owner = {
        id(parameter): module
        for module in hf_model.modules()
        for parameter in module._parameters.values()
    }
    owners = {name: owner[id(parameter)] for name, parameter in parameters.items()}
    return WeightStack(parameters, _unused_parameters(bridge, parameters), owners)


def _placeholder_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def named_parameters(
    hf_model: torch.nn.Module, aliases: bool = False
) -> dict[str, torch.nn.Parameter]:
    """Parameters under Hugging Face's names, whether or not a bridge is around the modules.

    Args:
        aliases: Whether a tied parameter is listed under each of its names, or only the first.
    """
    found: dict[str, torch.nn.Parameter] = {}
    seen: set[int] = set()

    def walk(module: torch.nn.Module, prefix: str) -> None:
        # A bridge holds the module that it wraps, and beside it parts of its own, which may be
        # copies (the split of a joint query-key-value matrix). Only the former has HF's names.
        inner = module._modules.get("_original_component")
        if inner is not None:
            walk(inner, prefix)
            return
        for name, parameter in module._parameters.items():
            if parameter is not None and (aliases or id(parameter) not in seen):
                seen.add(id(parameter))
                found[prefix + name] = parameter
        for name, child in module._modules.items():
            if child is not None:
                walk(child, f"{prefix}{name}.")

    walk(hf_model, "")
    return found


def _unused_parameters(
    bridge: TransformerBridge, parameters: dict[str, torch.nn.Parameter]
) -> set[str]:
    """Joint query-key-value parameters that the bridge has copied apart and no longer reads."""
    unused: set[str] = set()
    for block in bridge.blocks:
        attn = getattr(block, "attn", None)
        joint, query = (getattr(attn, name, None) for name in ("qkv", "q"))
        for kind in ("weight", "bias"):
            whole, part = (
                getattr(getattr(x, "original_component", None), kind, None) for x in (joint, query)
            )
            if whole is None or part is None:
                continue
            if whole.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
                unused |= {name for name, p in parameters.items() if p is whole}
    return unused


def _down_projection(
    bridge: TransformerBridge, parameters: dict[str, torch.nn.Parameter], layer: int
) -> DownProjection | str:
    """The down-projection of a layer, or the reason why there is none."""
    from transformers.pytorch_utils import Conv1D

    out = getattr(getattr(bridge.blocks[layer], "mlp", None), "out", None)
    linear = getattr(out, "original_component", None)
    if linear is None:
        return "its MLP is not one pair of matrices (a mixture of experts?)"
    weight = getattr(linear, "weight", None)
    names = [name for name, parameter in parameters.items() if parameter is weight]
    if not names or weight is None or weight.ndim != 2:
        return "its weight is no plain matrix (quantised in memory?)"
    if not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}"
    bias = getattr(linear, "bias", None)
    biases = [name for name, parameter in parameters.items() if parameter is bias]
    return DownProjection(names[0], weight, isinstance(linear, Conv1D), *biases[:1])


def _inspect(
    bridge: TransformerBridge, hf_model: Any, tokens: Tokens, name: str, weights: str
) -> ModelInfo:
    cfg = bridge.cfg
    if not hasattr(bridge, "blocks"):
        raise ModelError(f"{name} has no stack of transformer blocks that TransformerLens knows.")
    first = next(hf_model.parameters())
    parameters = named_parameters(hf_model)
    downs = [_down_projection(bridge, parameters, layer) for layer in range(len(bridge.blocks))]
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


# --- proof that interventions act ----------------------------------------------------------

PROBE_LENGTH = 6
PROBE_ROWS = 24
"""Sequences per probing pass: bounds the memory of the probe."""


def probe_interventions(model: LensModel) -> None:
    """Show on every layer that interventions act, or refuse the model.

    For each layer: replacing every attention row by itself must leave the logits where they
    are, replacing it by a uniform causal row must move them, and adding to the
    down-projection's output must move them. This also proves that the recorded pattern and
    values are what the model really computes with. Sets ``model.pattern_comes_first``,
    ``model.gathers_before_unembed`` and ``model.writes_directly`` (the layers whose
    down-projection's output reaches the residual stream unchanged, without a norm in between).

    Raises:
        ModelError: Naming the layer and what does not act.
    """
    n_layers = model.info.n_layers
    ids = (torch.arange(PROBE_LENGTH) * 13 + 7).remainder(model.info.d_vocab)[None]
    names = [f(layer) for layer in range(n_layers) for f in (values_name, z_name, pattern_name)]
    order: list[str] = []
    store: dict[str, torch.Tensor] = {}

    def noting(name: str, hook_fn: Any) -> Hook:
        def noted(tensor: torch.Tensor, hook: Any) -> None:
            order.append(name)
            hook_fn(tensor, hook)

        return name, noted

    try:
        with torch.no_grad():
            downs = [y for y in range(n_layers) if _has_down(model, y)]
            around = recording(store, _around_down(downs))
            base = model.run(ids, [*around, *(noting(n, fn) for n, fn in recording(store, names))])
    except Exception as error:
        raise ModelError(
            f"{model.info.name} cannot be intervened on: a probing pass failed ({error})."
        ) from error
    for name in names:
        if name not in store:
            raise ModelError(f"{model.info.name} cannot be studied: it has no {name!r}.")
    model.pattern_comes_first = all(
        order.index(pattern_name(layer)) < order.index(z_name(layer)) for layer in range(n_layers)
    )
    _probe_gathering(model, ids, base)

    cases: list[tuple[int, str]] = []
    for layer in range(n_layers):
        cases += [(layer, "self"), (layer, "uniform")]
        if layer in downs:
            cases.append((layer, "down"))
    moved: dict[tuple[int, str], float] = {}
    direct: set[int] = set()
    for start in range(0, len(cases), PROBE_ROWS):
        batch = cases[start : start + PROBE_ROWS]
        hooks: list[Hook] = []
        seen: dict[str, torch.Tensor] = {}
        for row, (layer, kind) in enumerate(batch):
            hooks += _probe_hooks(store, len(batch), row, layer, kind)
        pushes = {row: layer for row, (layer, kind) in enumerate(batch) if kind == "down"}
        hooks += recording(seen, _around_down(list(pushes.values())))
        with torch.no_grad():
            logits = model.run(ids.expand(len(batch), -1), hooks)
        for row, layer in pushes.items():
            names = [name for name in _around_down([layer]) if name in seen]
            before, after = ({name: told[name][i] for name in names}
                             for told, i in ((store, 0), (seen, row)))  # fmt: skip
            if _arrives(before, after, layer):
                direct.add(layer)
        for row, case in enumerate(batch):
            moved[case] = float((logits[row] - base[0]).abs().max())
    model.writes_directly = frozenset(direct)
    _judge_probe(model, base, moved)


def _has_down(model: LensModel, layer: int) -> bool:
    found = _down_projection(model.bridge, model.weights.parameters, layer)
    return isinstance(found, DownProjection)


def _around_down(layers: Iterable[int]) -> list[str]:
    """Hooks at the down-projection's output, at what the MLP adds to the residual stream, and at
    the stream after the layer."""
    return [
        name(layer) for name in (down_out_name, mlp_out_name, block_out_name) for layer in layers
    ]


def _arrives(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], layer: int
) -> bool:
    """Whether what was added to a down-projection's output arrived in the residual stream as it
    was. A stream that is far larger rounds it; then nothing may stand between the projection and
    what the MLP adds, either.

    Args:
        before: Activations of one sequence.
        after: The same with something added.
        layer: Of both.
    """
    down, mlp, block = _around_down([layer])
    pushed, moved = (in_float32(after[name]) - in_float32(before[name]) for name in (down, block))
    if pushed.shape != moved.shape:
        return False
    error = (pushed - moved).abs()
    allowed = relative_tolerance(before[down].dtype) * pushed.abs().max()
    if error.max() <= allowed:
        return True
    eps = torch.finfo(before[block].dtype).eps
    rounding = 2 * eps * (in_float32(before[block]).abs() + in_float32(after[block]).abs())
    added = before.get(mlp)
    is_bare = added is not None and torch.equal(added.reshape(pushed.shape), before[down])
    return is_bare and bool((error <= allowed + rounding).all())


def _probe_gathering(model: LensModel, ids: torch.Tensor, base: torch.Tensor) -> None:
    """Whether hidden states can be gathered before the unembedding on this model."""
    last = PROBE_LENGTH - 1
    ways = (
        torch.tensor([[last, 1]]),
        Places(torch.zeros(3, dtype=torch.long), torch.tensor([1, last, 1])),
    )
    tolerance = relative_tolerance(base.dtype) * float(base.abs().max())
    try:
        with torch.no_grad():
            same = all(
                torch.allclose(model.run(ids, at=at), _gather(base, at), atol=tolerance, rtol=0)
                for at in ways
            )
    except Exception:
        same = False
    model.gathers_before_unembed = bool(same)


def _probe_hooks(
    store: dict[str, torch.Tensor], rows: int, row: int, layer: int, kind: str
) -> list[Hook]:
    """One kind of intervention on one layer, in one row of a batch of equal sequences."""
    if kind == "down":

        def push(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
            tensor = tensor.clone()
            tensor[row] = (
                tensor[row]
                + tensor[row].abs().mean()
                + 1e-3
                * torch.arange(tensor.shape[-1], device=tensor.device).remainder(7).to(tensor)
            )
            return tensor

        return [(down_out_name(layer), push)]
    own = store[pattern_name(layer)]
    pattern = own
    if kind == "uniform":
        allowed = torch.ones_like(own).tril()
        pattern = allowed / allowed.sum(-1, keepdim=True)
    where = torch.zeros(rows, own.shape[1], own.shape[2], dtype=torch.bool)
    where[row] = True
    return replace_heads(layer, where, pattern.expand(rows, -1, -1, -1))


def _judge_probe(model: LensModel, base: torch.Tensor, moved: dict[tuple[int, str], float]) -> None:
    scale = float(base.abs().max())
    tolerance = relative_tolerance(base.dtype) * scale
    what = {
        "uniform": "replacing its attention pattern does not move the logits",
        "down": "adding to its down-projection's output does not move the logits",
    }
    for (layer, kind), change in moved.items():
        if kind == "self":
            if not change <= tolerance:
                raise ModelError(
                    f"{model.info.name}, layer {layer}: replacing the attention pattern by "
                    f"itself moves the logits by {change:.2g}, so the recorded pattern and values "
                    "are not what the model computes with.",
                    "This model cannot be patched.",
                )
        elif not change > 10 * moved[layer, "self"] + 1e-7 * scale:
            raise ModelError(
                f"{model.info.name}, layer {layer}: {what[kind]} (they move by {change:.2g}).",
                "Interventions on this model would silently do nothing.",
            )


def relative_tolerance(dtype: torch.dtype) -> float:
    """Relative error that rounding alone may cause in logits."""
    return 2e-4 if dtype in (torch.float32, torch.float64) else 5e-2


class _Stopped(Exception):
    """Ends a pass whose rest nobody needs."""


def _stop(tensor: torch.Tensor, hook: Any) -> None:
    raise _Stopped


def _gather(
    tensor: Float[torch.Tensor, "batch pos d"], at: Int[torch.Tensor, "batch chosen"] | Places
) -> torch.Tensor:
    if isinstance(at, Places):
        return tensor[at.rows.to(tensor.device), at.positions.to(tensor.device)][None]
    index = at.to(tensor.device).unsqueeze(-1).expand(-1, -1, tensor.shape[-1])
    return tensor.gather(1, index)


def _gather_hook(at: Int[torch.Tensor, "batch chosen"] | Places) -> Any:
    def keep_chosen(hidden: Float[torch.Tensor, "batch pos d_model"], hook: Any) -> torch.Tensor:
        return _gather(hidden, at)

    return keep_chosen
