"""Proof that interventions act on a model, on every layer of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from driftlens.errors import ModelError
from driftlens.interventions import (
    Hook,
    block_out_name,
    down_out_name,
    mlp_out_name,
    pattern_name,
    replace_heads,
    values_name,
    z_name,
)
from driftlens.models import LensModel, Places, gather, recording
from driftlens.parameters import DownProjection, find_down_projection
from driftlens.precision import in_float32, largest_difference, relative_tolerance

PROBE_LENGTH = 6
PROBE_ROWS = 24
"""Sequences per probing pass: bounds the memory of the probe."""

ROUNDING_LENGTH = 48
"""Longest of the sequences whose rounding is measured."""


def probe_interventions(model: LensModel) -> None:
    """Show on every layer that interventions act, or refuse the model.

    For each layer: replacing every attention row by itself must leave the logits where they
    are, replacing it by a uniform causal row must move them, and adding to the
    down-projection's output must move them. This also proves that the recorded pattern and
    values are what the model really computes with. Sets ``model.pattern_comes_first``,
    ``model.gathers_before_unembed`` and ``model.writes_directly`` (the layers whose
    down-projection's output reaches the residual stream unchanged, without a norm in between).

    Raises:
        ModelError: Naming the layer and what does not act; or if the logits are not finite.
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
            base = model.run(ids, [noting(n, fn) for n, fn in recording(store, names)])
    except Exception as error:
        raise ModelError(
            f"{model.info.name} cannot be intervened on: a probing pass failed ({error})."
        ) from error
    _check_finite(model, base)
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
        # The last row is left alone; the kernels that compute it are those of the other rows.
        quiet = len(batch)
        for row, (layer, kind) in enumerate(batch):
            hooks += _probe_hooks(store, quiet + 1, row, layer, kind)
        pushes = {row: layer for row, (layer, kind) in enumerate(batch) if kind == "down"}
        hooks += recording(seen, _around_down(list(pushes.values())))
        with torch.no_grad():
            logits = model.run(ids.expand(quiet + 1, -1), hooks)
        for row, layer in pushes.items():
            names = [name for name in _around_down([layer]) if name in seen]
            before, after = ({name: seen[name][i] for name in names} for i in (quiet, row))
            if _arrives(before, after, layer):
                direct.add(layer)
        for row, case in enumerate(batch):
            moved[case] = largest_difference(logits[row], logits[quiet])
    model.writes_directly = frozenset(direct)
    _judge_probe(model, base, moved)


def _check_finite(model: LensModel, base: torch.Tensor) -> None:
    """Refuse a model whose own logits are not finite, be it only on longer texts."""
    if base.isfinite().all() and math.isfinite(allowed_by_rounding(model, float(base.abs().max()))):
        return
    in_half = torch.finfo(base.dtype).bits < 32
    raise ModelError(
        f"The logits of {model.info.name} in {model.info.dtype} are not finite.",
        "Load it in bfloat16 or float32." if in_half else "Check its weights.",
    )


def allowed_by_rounding(model: LensModel, scale: float) -> float:
    """How far two ways of computing the same may differ in log-probabilities, in nats.

    Args:
        model: In half precision it is measured how far its own passes differ, once; a last bit of
            the largest logit is always allowed.
        scale: The largest logit.
    """
    dtype = getattr(torch, model.info.dtype)
    if dtype in (torch.float32, torch.float64):
        return relative_tolerance(dtype) * scale
    if "rounding" not in model.memo:
        model.memo["rounding"] = _rounding(model)
    return max(4 * model.memo["rounding"], 2 * torch.finfo(dtype).eps * scale)


def _rounding(model: LensModel) -> float:
    """Largest difference between sequences alone and side by side, padded, in nats."""
    length = min(ROUNDING_LENGTH, model.info.n_ctx)
    ids = (torch.arange(length) * 13 + 7).remainder(model.info.d_vocab).tolist()
    rows = [ids, ids[3:8], ids[:5]]
    with torch.no_grad():
        padded = model.run(model.tokens.pad(rows, model.device))
        return max(
            largest_difference(model.run(torch.tensor([row])), padded[i : i + 1, : len(row)])
            for i, row in enumerate(rows)
        )


def _has_down(model: LensModel, layer: int) -> bool:
    found = find_down_projection(model.bridge, model.weights.parameters, layer)
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
    allowed = allowed_by_rounding(model, float(base.abs().max()))
    try:
        with torch.no_grad():
            same = all(
                largest_difference(model.run(ids, at=at), gather(base, at)) <= allowed
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
            # Not the same everywhere: a layer norm takes the mean away.
            steps = torch.arange(tensor.shape[-1], device=tensor.device).remainder(7).to(tensor)
            tensor[row] += (tensor[row].abs().mean() + 1e-3) * (1 + steps / 7)
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
    allowed = allowed_by_rounding(model, scale)
    what = {
        "uniform": "replacing its attention pattern does not move the logits",
        "down": "adding to its down-projection's output does not move the logits",
    }
    for (layer, kind), change in moved.items():
        if kind == "self":
            if not change <= allowed:
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
