"""An edit: a change of weights and how it came about."""

from __future__ import annotations

import json
import math
import os
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from driftlens import figures
from driftlens.bundled import expanded
from driftlens.checkpoints import read_weights
from driftlens.codebook import Codebook
from driftlens.disk import make_folder, write_both
from driftlens.errors import DataError, EditError, ModelError, first_line
from driftlens.facts import EditRequest
from driftlens.journal import CHECKSUM, digest
from driftlens.models import LensModel
from driftlens.parameters import named_parameters
from driftlens.weights import RESET, Delta, DenseDelta, LowRankDelta, WeightStack, scaled

FORMAT = 2
WEIGHTS_FILE = "edit.safetensors"
RECORD_FILE = "edit.json"


@dataclass(frozen=True)
class Edit:
    """A weight delta that can be switched on and off, and its history.

    Args:
        deltas: Change of each touched parameter, by Hugging Face parameter name.
        method: Which editor made it (``"rome"``, ``"external"``, ...).
        model_name: The model that it was made for.
        fingerprint: SHA-256 of that model's unedited weights.
        base_digests: SHA-256 of each touched parameter before the change.
        requests: The facts that it changes; empty if unknown.
        config: Hyperparameters, penalties, contexts and covariance, JSON-ready.
        trace: One record per optimisation step: loss terms, heads held, norms.
        info: Anything else worth keeping, e.g. seconds.
    """

    deltas: dict[str, Delta]
    method: str
    model_name: str
    fingerprint: str
    base_digests: dict[str, str]
    requests: tuple[EditRequest, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    trace: list[dict[str, Any]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    _known_good: weakref.WeakKeyDictionary[WeightStack, Any] = field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False, compare=False
    )
    """In which state a model's weights were found to be the right ones."""

    @property
    def request(self) -> EditRequest | None:
        """The fact, if it is exactly one."""
        return self.requests[0] if len(self.requests) == 1 else None

    def request_about(self, subject: str | None = None) -> EditRequest | None:
        """The fact if it is exactly one, or the only one of several with this subject."""
        about = [r for r in self.requests if r.subject == subject]
        return self.request or (about[0] if len(about) == 1 else None)

    @property
    def rank(self) -> int:
        """Largest rank of its deltas; 0 if it is an adapter and changes no weight."""
        return max(delta.rank for delta in self.deltas.values())

    def __repr__(self) -> str:
        facts = _few([f"{r.text!r} -> {r.target_new!r}" for r in self.requests]) or "unknown"
        touched = _few([f"{name} ({_described(delta)})" for name, delta in self.deltas.items()])
        times = f", times {self.info['factor']:.3g}" if "factor" in self.info else ""
        return f"Edit({self.method} of {self.model_name}: {facts}; changes {touched}{times})"

    @contextmanager
    def applied(self, model: LensModel) -> Iterator[LensModel]:
        """Inside, ``model`` is the edited one; afterwards its weights are as before, to the bit.

        May be nested, also with itself, and left in any order.

        Raises:
            EditError: If the edit was made for other weights.
        """
        self.check_fits(model)
        ticket = model.weights.push(self.deltas)
        try:
            yield model
        finally:
            model.weights.pop(ticket)

    def scaled(self, factor: float) -> Edit:
        """The same edit with its change of the weights times a number: 0 is the original model, 1
        the edited one, and what lies between them a mean of both (as weights of fine-tuned models
        are averaged with the original's; Wortsman et al. 2022, arXiv:2109.01903).

        Its trace and configuration are still those of the search; ``info["factor"]`` says how much
        of the change is left.

        Raises:
            EditError: If the number is not finite, or the edit is an adapter.
        """
        if not math.isfinite(factor):
            raise EditError(f"An edit cannot be scaled by {factor}.", "Give a finite number.")
        deltas = {name: scaled(delta, factor) for name, delta in self.deltas.items()}
        left = factor * self.info.get("factor", 1.0)
        return replace(self, deltas=deltas, info={**self.info, "factor": left})

    def lowest_layer(self, model: LensModel) -> int | None:
        """The lowest layer whose weights it changes; ``None`` if it changes any outside them."""
        layers = [model.layer_of(name) for name in self.deltas]
        return None if None in layers else min(layer for layer in layers if layer is not None)

    def check_not_active(self, model: LensModel) -> None:
        """Refuse a model to which this very edit is applied now.

        Raises:
            EditError: If it is: "original" would then mean the edited model.
        """
        if model.weights.is_active(self.deltas.values()):
            raise EditError(
                "This edit is applied to the model now, so that there is no original to compare.",
                f"Measure outside of `with edit.applied(model)`; {RESET}.",
            )

    def check_fits(self, model: LensModel) -> None:
        """Refuse a model other than the one that the edit was made for.

        The touched parameters must have the bits that they had when the edit was made: in
        the model without edits, or, for an edit made on top of others, in the model as it is
        now. All others must have the bits of the unedited model. These are read when the edit
        meets the model, and again when torch has counted that one of them was written to, which
        it does not for what goes through ``parameter.data``.

        Raises:
            EditError: Naming the parameter that differs.
        """
        stack = model.weights
        for name, before in self.base_digests.items():
            if name not in stack.parameters:
                raise EditError(
                    f"This edit was made for {self.model_name} and changes {name!r}, which "
                    f"{model.info.name} does not have."
                )
            if before not in stack.digests(name):
                raise EditError(
                    f"This edit was made for other weights of {name!r} than {model.info.name} has.",
                    "Load the model it was made for; an edit made on top of another one needs "
                    "that one applied first.",
                )
        state = stack.revision()
        if self._known_good.get(stack) != state:
            if self.fingerprint and model.fingerprint() != self.fingerprint:
                raise EditError(
                    f"This edit was made for {self.model_name} with other weights than "
                    f"{model.info.name} has.",
                    "Load the model that it was made for.",
                )
            self._known_good[stack] = state

    @property
    def restriction(self) -> str:
        """Names of the penalties that it was made with, e.g. ``"SADR"``; empty if with none."""
        kinds = [str(p.get("penalty", "penalty")) for p in self.config.get("penalties", [])]
        return " + ".join("SADR" if kind == "sadr" else kind for kind in kinds)

    def to_dataframe(self) -> pd.DataFrame:
        """The optimisation trace, one row per step (and fact, if there are several); in nats."""
        return pd.DataFrame(self.trace)

    def plot(self) -> go.Figure:
        """Loss terms, target probability and heads held, by step."""
        facts = _few([f"{r.text} -> {r.target_new}" for r in self.requests])
        return figures.edit_trace(
            self.trace, title=facts or "edit", subtitle=f"{self.method}, {self.model_name}"
        )

    # --- on disk ---------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``edit.safetensors`` and ``edit.json`` into a folder.

        Raises:
            EditError: If the folder cannot be written; an earlier edit in it stays whole.
        """
        from safetensors.torch import save as to_bytes

        tensors: dict[str, torch.Tensor] = {}
        kinds: dict[str, Any] = {}
        for name, delta in self.deltas.items():
            kinds[name] = _KINDS[type(delta)]
            if isinstance(delta, Codebook):
                kinds[name] = {
                    "kind": kinds[name],
                    "labels": list(delta.labels),
                    "input_first": delta.input_first,
                }
            for field_name, tensor in delta.tensors().items():
                # A copy, as the file format refuses tensors that share memory.
                tensors[f"{name}|{field_name}"] = tensor.detach().cpu().contiguous().clone()
        data = to_bytes(tensors)
        record = {
            "format": FORMAT,
            "method": self.method,
            "model_name": self.model_name,
            "fingerprint": self.fingerprint,
            "base_digests": self.base_digests,
            "deltas": kinds,
            "tensors_sha256": _sha256(data),
            "requests": [request.to_dict() for request in self.requests],
            "config": self.config,
            "trace": self.trace,
            "info": self.info,
        }
        record = json.loads(json.dumps(record))  # as it is read
        text = json.dumps({**record, CHECKSUM: digest(record)}, indent=1).encode()
        path = Path(folder)
        try:
            make_folder(path)
            write_both(path / WEIGHTS_FILE, data, path / RECORD_FILE, text)
        except OSError as error:
            raise EditError(
                f"The edit cannot be written to {path}: {error.strerror or error}.",
                "Choose a folder that can be written to and has space.",
            ) from error
        return path

    # --- from outside ----------------------------------------------------------------------

    @classmethod
    def from_deltas(
        cls,
        model: LensModel,
        deltas: Mapping[str, torch.Tensor | Delta],
        *,
        request: EditRequest | Sequence[EditRequest] | None = None,
        method: str = "external",
    ) -> Edit:
        """Wrap weight deltas that were made elsewhere.

        Args:
            model: The model that they change.
            deltas: Tensors or numpy arrays of the parameters' shapes, or low-rank deltas, by
                Hugging Face parameter name; they are copied.
            request: The fact or facts that they edit, if known.
            method: What to call the editor.

        Raises:
            EditError: If there is no delta, one is something else, a name is unknown, a shape does
                not fit, a value is not finite, or what was edited is no request.
        """
        if not deltas:
            raise EditError("There is no weight delta.", "Give at least one changed parameter.")
        wrapped = {name: _as_delta(name, given) for name, given in deltas.items()}
        return _from_outside(model, wrapped, request, method)

    @classmethod
    def from_checkpoint(
        cls,
        model: LensModel,
        other: Any,
        *,
        request: EditRequest | Sequence[EditRequest] | None = None,
    ) -> Edit:
        """The difference between a second checkpoint of the same model and ``model``.

        Args:
            model: The original.
            other: An edited copy: a Hugging Face model, a :class:`LensModel`, a state dict, or a
                folder with safetensors.
            request: The fact or facts that were edited, if known.

        Raises:
            EditError: If the checkpoints have other parameters, or do not differ.
        """
        if model.weights.is_edited:
            raise EditError(
                "An edit is applied to the model now.",
                "Compare the checkpoint with the model outside of `with edit.applied(model)`; "
                f"{RESET}.",
            )
        state = _state_of(other)
        _check_tied(model, state)
        _check_names(model, state)
        deltas: dict[str, Delta] = {}
        for name in model.weights.parameters:
            original = model.weights.original(name)
            if name not in state:
                raise EditError(f"The second checkpoint has no parameter {name!r}.")
            new = state[name].to(original.device)
            if new.shape != original.shape:
                raise EditError(f"{name!r} has another shape in the second checkpoint.")
            if not torch.equal(new.to(original.dtype), original):
                wide = torch.promote_types(original.dtype, torch.float32)
                deltas[name] = DenseDelta((new.to(wide) - original.to(wide)).detach())
        if not deltas:
            raise EditError("The two checkpoints have the same weights, so there is no edit.")
        return _from_outside(model, deltas, request, "checkpoint")


def _from_outside(
    model: LensModel,
    deltas: dict[str, Delta],
    request: EditRequest | Sequence[EditRequest] | None,
    method: str,
) -> Edit:
    """An edit of deltas that no editor here made."""
    several = request if isinstance(request, Iterable) else [request]
    requests = () if request is None else tuple(several)
    if not all(isinstance(one, EditRequest) for one in requests):
        raise EditError(f"{request!r} is no EditRequest.", "Give one, or a list of them.")
    weights = model.weights
    ticket = weights.push(deltas)
    try:
        for name, delta in deltas.items():
            # In the weights' own dtype, as half precision may end where a delta goes on.
            new, old = weights.parameters[name], weights.original(name)
            lost = torch.isfinite(old) & ~torch.isfinite(new)
            if lost.any() or not all(torch.isfinite(x).all() for x in delta.tensors().values()):
                raise EditError(f"The delta for {name!r} is not finite in {new.dtype}.")
    finally:
        weights.pop(ticket)
    return make_edit(model, deltas, method=method, requests=requests)


def _as_delta(name: str, given: Any) -> Delta:
    """A change of one parameter, from what other code bases keep, in memory of its own."""
    if isinstance(given, LowRankDelta | DenseDelta | Codebook):
        numbers = given.tensors()
        for tensor in numbers.values():
            _check_real(name, tensor)
        if len({tensor.dtype for tensor in numbers.values()}) > 1:
            raise EditError(f"The delta for {name!r} mixes dtypes.", "Give its tensors one dtype.")
    if isinstance(given, LowRankDelta):
        sides = given.left, given.right
        if any(side.ndim != 2 for side in sides) or sides[0].shape[1] != sides[1].shape[1]:
            raise EditError(
                f"The sides of the delta for {name!r} have shapes {tuple(sides[0].shape)} and "
                f"{tuple(sides[1].shape)}, not [rows, rank] and [columns, rank].",
                "Of a rank-one update u v^T, give LowRankDelta(left=u[:, None], right=v[:, None]).",
            )
        return LowRankDelta(*(side.detach().clone() for side in sides))
    if isinstance(given, Codebook):
        entries = {len(tensor) for tensor in given.tensors().values()} | {len(given.labels)}
        if len(entries) > 1:
            raise EditError(
                f"The codebook for {name!r} has {len(given.keys)} keys, {len(given.values)} "
                f"values, {len(given.radii)} radii and {len(given.labels)} labels.",
                "Give as many of each.",
            )
        keys, values, radii = (own.detach().clone() for own in numbers.values())
        return Codebook(keys, values, radii, given.labels, given.input_first)
    if isinstance(given, DenseDelta):
        given = given.tensor
    if isinstance(given, np.ndarray) and given.dtype.kind == "f":
        native = given.dtype.newbyteorder("=")
        return DenseDelta(torch.from_numpy(np.array(given, dtype=native, order="C")))
    _check_real(name, given)
    return DenseDelta(given.detach().clone())


def _check_real(name: str, given: Any) -> None:
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        has_dtype = isinstance(given, torch.Tensor | np.ndarray)
        kind = given.dtype if has_dtype else type(given).__name__
        raise EditError(
            f"The delta for {name!r} is {kind}, not a tensor of real numbers.",
            "Give a tensor of the parameter's shape, or LowRankDelta(left=u[:, None], "
            "right=v[:, None]) for a rank-one update u v^T.",
        )


def make_edit(model: LensModel, deltas: dict[str, Delta], **fields: Any) -> Edit:
    """An edit of the model as it is now (other edits may be applied)."""
    edit = Edit(
        deltas=deltas,
        model_name=model.info.name,
        fingerprint=model.fingerprint(),
        base_digests={name: [*model.weights.digests(name)][-1] for name in deltas},
        **fields,
    )
    edit._known_good[model.weights] = model.weights.revision()
    return edit


def load_edit(folder: str | os.PathLike[str], model: LensModel | None = None) -> Edit:
    """Read an edit that :meth:`Edit.save` wrote.

    Args:
        folder: The folder.
        model: If given, the edit is checked against it at once; otherwise when applied.

    Raises:
        DataError: If files are missing or damaged.
        EditError: If the edit was made for another model.
    """
    from safetensors.torch import load as from_bytes

    path = Path(folder)
    try:
        record = json.loads((path / RECORD_FILE).read_text(encoding="utf-8"))
        data = (path / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise DataError(
            f"There is no edit in {path}: {error.strerror or error}.",
            f"An edit is a folder with {RECORD_FILE} and {WEIGHTS_FILE}, written by Edit.save().",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path / RECORD_FILE} is damaged: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(
            f"{path / RECORD_FILE} is not an edit of format {FORMAT}.",
            "Make the edit again with this version, and save it.",
        )
    if record.pop(CHECKSUM, None) != digest(record):
        raise DataError(
            f"{path / RECORD_FILE} is not what was saved.",
            "Save the edit again; one with other contents is made by Edit.from_deltas.",
        )
    if record.get("tensors_sha256") != _sha256(data):
        raise DataError(
            f"{path / WEIGHTS_FILE} does not belong to {RECORD_FILE}, or is damaged.",
            "Save the edit again.",
        )
    try:
        if not all(isinstance(record[name], dict) for name in ("base_digests", "deltas")):
            raise TypeError("base_digests or deltas is no table")
        if set(record["base_digests"]) != set(record["deltas"]):
            raise TypeError("base_digests and deltas name different parameters")
        tensors = from_bytes(data)
        deltas = {name: _delta_from(kind, name, tensors) for name, kind in record["deltas"].items()}
        edit = Edit(
            deltas=deltas,
            method=record["method"],
            model_name=record["model_name"],
            fingerprint=record["fingerprint"],
            base_digests=record["base_digests"],
            requests=tuple(EditRequest(**fields) for fields in record["requests"]),
            config=record["config"],
            trace=record["trace"],
            info=record["info"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path / RECORD_FILE} lacks or misnames a field: {error}.") from error
    if model is not None:
        edit.check_fits(model)
    return edit


_KINDS: dict[type[Any], str] = {
    LowRankDelta: "low-rank",
    DenseDelta: "dense",
    Codebook: "codebook",
}


def _delta_from(kind: Any, name: str, tensors: Mapping[str, torch.Tensor]) -> Delta:
    """A delta from its record and its tensors.

    Raises:
        KeyError: If a tensor is missing.
        TypeError: If the record is not one of a delta.
    """
    if kind == "low-rank":
        return LowRankDelta(tensors[f"{name}|left"], tensors[f"{name}|right"])
    if kind == "dense":
        return DenseDelta(tensors[f"{name}|dense"])
    if not isinstance(kind, dict) or kind.get("kind") != "codebook":
        raise TypeError(f"{kind!r} is no kind of delta")
    labels = kind["labels"]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TypeError("labels are no texts")
    keys, values, radii = (tensors[f"{name}|{field}"] for field in ("keys", "values", "radii"))
    return Codebook(keys, values, radii, tuple(labels), bool(kind["input_first"]))


def _described(delta: Delta) -> str:
    return f"rank {delta.rank}" if isinstance(delta, LowRankDelta) else _KINDS[type(delta)]


def _few(names: Sequence[str], shown: int = 3) -> str:
    """The first names, and how many more there are."""
    more = [f"and {len(names) - shown} more"] if len(names) > shown else []
    return "; ".join([*names[:shown], *more])


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _check_tied(model: LensModel, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse a checkpoint in which parameters differ that are one and the same in the model."""
    first_name: dict[int, str] = {}
    for name, parameter in named_parameters(model.hf_model, aliases=True).items():
        tied = first_name.setdefault(id(parameter), name)
        if name == tied:
            continue
        if name in state and tied in state and not torch.equal(state[name], state[tied]):
            raise EditError(
                f"{name!r} and {tied!r} are one parameter in {model.info.name}, but differ in the "
                "second checkpoint.",
                "Such a change is not one of this model.",
            )


_COMPUTED = (
    r"rotary_emb\.inv_freq$", r"(attn|attention)\.(masked_)?bias$", r"decoder\.version$"
)  # fmt: skip
"""Names of what older releases of transformers saved, and newer ones compute."""


def _check_names(model: LensModel, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse a checkpoint with weights that the model has no place for; what is computed from the
    configuration (masks, rotations), and so in some checkpoints, is none."""
    computed = [*(getattr(model.hf_model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    computed += _COMPUTED
    known = {*named_parameters(model.hf_model, aliases=True)}
    buffers = (name for name, _ in model.hf_model.named_buffers())
    known |= {  # a bridge has biases where the model has none
        name.replace("_original_component.", "") for name in buffers if not name.endswith("bias")
    }
    for name in state:
        if name not in known and not any(re.search(pattern, name) for pattern in computed):
            raise EditError(
                f"The second checkpoint has {name!r}, which {model.info.name} does not have.",
                "Merge adapters into the weights before, and take a checkpoint of the same model.",
            )


def _state_of(other: Any) -> dict[str, torch.Tensor]:
    if isinstance(other, LensModel):
        if any(isinstance(delta, Codebook) for delta in other.weights.active):
            raise EditError(
                "An adapter is applied to the second model, and no weight holds it.",
                "Take the edit that made it.",
            )
        return dict(other.weights.parameters)
    if isinstance(other, torch.nn.Module):
        return dict(named_parameters(other, aliases=True))
    if isinstance(other, Mapping):
        for name, value in other.items():
            if not isinstance(value, torch.Tensor | np.ndarray):
                raise EditError(
                    f"{name!r} in the second checkpoint is {type(value).__name__}, no tensor.",
                    "Give the state dict alone.",
                )
        return {name: torch.as_tensor(value) for name, value in other.items()}
    try:
        folder = str(expanded(other))
        model, more = read_weights(folder, dtype="auto", local_files_only=True)
    except ModelError as error:
        raise EditError(f"The second checkpoint: {error.problem}", error.remedy) from error
    except Exception as error:  # damaged files make the reader raise errors of many types
        raise EditError(
            f"The second checkpoint {other} cannot be loaded: {first_line(error)}",
            "Give a folder that transformers can load.",
        ) from error
    parameters = named_parameters(model)
    return {**parameters, **{name: torch.empty(0) for name in more}}
