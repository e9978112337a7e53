"""Hooks that replace what attention heads do, on every architecture alike.

TransformerLens's ``hook_pattern`` can be read on every architecture, but an edit of it is
silently discarded where the bridge delegates attention to the Hugging Face module (GPT-J,
OPT, ...). What acts everywhere is to form the heads' output ourselves,
``z = pattern @ values``, and to return it from ``hook_z``. All interventions go that way, and
:func:`driftlens.models.probe_interventions` shows for each model that they act.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float

from driftlens.attention import mix_heads

Hook = tuple[str, Callable[..., Any]]


def pattern_name(layer: int) -> str:
    """Attention probabilities, ``[batch, head, query, key]``. Read-only on some models."""
    return f"blocks.{layer}.attn.hook_pattern"


def values_name(layer: int) -> str:
    """Values, ``[batch, key, kv_head, d_head]``."""
    return f"blocks.{layer}.attn.hook_v"


def z_name(layer: int) -> str:
    """The heads' outputs before the output projection, ``[batch, query, head, d_head]``."""
    return f"blocks.{layer}.attn.hook_z"


def down_in_name(layer: int) -> str:
    """Input of the MLP's down-projection (the key of the memory), ``[batch, pos, d_mlp]``."""
    return f"blocks.{layer}.mlp.out.hook_in"


def down_out_name(layer: int) -> str:
    """Output of the down-projection itself, before any post-norm, ``[batch, pos, d_model]``."""
    return f"blocks.{layer}.mlp.out.hook_out"


Rows = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
"""Attention ``[batch, head, query, key]`` to use, or a function of the model's own."""


def replace_heads(
    layer: int,
    where: Bool[torch.Tensor, "batch head query"],
    pattern: Rows,
    values: Float[torch.Tensor, "batch key kv_head d_head"] | None = None,
    own_pattern: torch.Tensor | None = None,
    past_values: torch.Tensor | None = None,
) -> list[Hook]:
    """Hooks that recompute the output of chosen heads at chosen query positions.

    Args:
        layer: Which block.
        where: The (head, query) pairs to replace, for each sequence of the batch.
        pattern: Attention to use there, or a function from the model's own attention in this
            very pass to what to use.
        values: Values to use there; ``None`` keeps the model's own. Other heads and query
            positions keep reading the model's own values.
        own_pattern: The model's own attention, for models that deliver it too late for a
            function of it (see ``LensModel.pattern_comes_first``).
        past_values: The model's own values of cached positions, which a pass over the rest
            does not compute.
    """
    seen: dict[str, torch.Tensor] = {}
    hooks: list[Hook] = []

    if values is None:

        def see_values(tensor: torch.Tensor, hook: Any) -> None:
            seen["values"] = (
                tensor if past_values is None else torch.cat([past_values, tensor], dim=1)
            )

        hooks.append((values_name(layer), see_values))
    if callable(pattern) and own_pattern is None:

        def see_pattern(tensor: torch.Tensor, hook: Any) -> None:
            seen["pattern"] = tensor

        hooks.append((pattern_name(layer), see_pattern))

    def write_z(z: torch.Tensor, hook: Any) -> torch.Tensor:
        used_values = seen["values"] if values is None else values.to(z)
        rows = pattern
        if callable(rows):
            rows = rows(seen["pattern"] if own_pattern is None else own_pattern)
        mixed = mix_heads(rows.to(z), used_values)
        chosen = where.to(z.device).transpose(1, 2).unsqueeze(-1)
        return torch.where(chosen, mixed, z)

    hooks.append((z_name(layer), write_z))
    return hooks


def replace_activation(
    name: str,
    where: Bool[torch.Tensor, "batch pos"],
    new: Float[torch.Tensor, "batch pos d_model"],
) -> Hook:
    """A hook that replaces an activation at chosen positions."""

    def write(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(where.to(tensor.device).unsqueeze(-1), new.to(tensor), tensor)

    return name, write
