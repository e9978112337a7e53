"""Hooks that replace what attention heads do, on every architecture alike.

TransformerLens's ``hook_pattern`` can be read on every architecture, but an edit of it is
silently discarded where the bridge delegates attention to the Hugging Face module (GPT-J,
OPT, ...). What acts everywhere is to form the heads' output ourselves,
``z = pattern @ values``, and to return it from ``hook_z``. All interventions go that way, and
:func:`driftlens.probing.probe_interventions` shows for each model that they act.
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


def keys_name(layer: int) -> str:
    """Keys before any rotation, ``[batch, key, kv_head, d_head]``."""
    return f"blocks.{layer}.attn.hook_k"


def rotated_keys_name(layer: int) -> str:
    """Keys after norm and rotation, ``[batch, key, kv_head, d_head]``; not on every model."""
    return f"blocks.{layer}.attn.hook_rot_k"


def z_name(layer: int) -> str:
    """The heads' outputs before the output projection, ``[batch, query, head, d_head]``."""
    return f"blocks.{layer}.attn.hook_z"


def block_in_name(layer: int) -> str:
    """The residual stream that enters a block, ``[batch, pos, d_model]``."""
    return f"blocks.{layer}.hook_in"


def block_out_name(layer: int) -> str:
    """The residual stream that leaves a block, ``[batch, pos, d_model]``."""
    return f"blocks.{layer}.hook_out"


def attention_out_name(layer: int) -> str:
    """Output of the attention's output projection, before any post-norm,
    ``[batch, pos, d_model]``."""
    return f"blocks.{layer}.attn.hook_out"


def down_in_name(layer: int) -> str:
    """Input of the MLP's down-projection (the key of the memory), ``[batch, pos, d_mlp]``."""
    return f"blocks.{layer}.mlp.out.hook_in"


def attn_out_name(layer: int) -> str:
    """What a layer's attention adds to the residual stream, after any post-norm,
    ``[batch, pos, d_model]``."""
    return f"blocks.{layer}.hook_attn_out"


def resid_post_name(layer: int) -> str:
    """The residual stream after a layer, ``[batch, pos, d_model]``; can be intervened on."""
    return f"blocks.{layer}.hook_resid_post"


def mlp_out_name(layer: int) -> str:
    """What a layer's MLP adds to the residual stream, after any post-norm,
    ``[batch, pos, d_model]``."""
    return f"blocks.{layer}.hook_mlp_out"


def down_out_name(layer: int) -> str:
    """Output of the down-projection itself, before any post-norm, ``[batch, pos, d_model]``."""
    return f"blocks.{layer}.mlp.out.hook_out"


Mix = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The attention to use, from the model's own and what was given, both ``[batch, head, query,
key]``."""


def replace_heads(
    layer: int,
    where: Bool[torch.Tensor, "batch head query"],
    pattern: Float[torch.Tensor, "source head query key"],
    values: Float[torch.Tensor, "source key kv_head d_head"] | None = None,
    mix: Mix | None = None,
    own_pattern: torch.Tensor | None = None,
    past_values: torch.Tensor | None = None,
) -> list[Hook]:
    """Hooks that recompute the output of chosen heads at chosen query positions.

    What is to be used may be given for fewer sequences than the batch has; they are then
    repeated: sequence ``i`` of the batch uses number ``i % source``.

    Args:
        layer: Which block.
        where: The (head, query) pairs to replace, for each sequence of the batch.
        pattern: Attention to use there.
        values: Values to use there; ``None`` keeps the model's own. Other heads and query
            positions keep reading the model's own values.
        mix: What to use instead, of the model's own attention in this very pass and ``pattern``.
        own_pattern: The model's own attention, for models that deliver it too late for ``mix``
            (see ``LensModel.pattern_comes_first``).
        past_values: The model's own values of cached positions, ``[source, key, kv_head,
            d_head]``, which a pass over the rest does not compute.
    """
    seen: dict[str, torch.Tensor] = {}
    hooks: list[Hook] = []
    # Only the touched sequences are computed: in a sweep they are few.
    touched = where.flatten(1).any(1).nonzero()[:, 0]

    def of_touched(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[touched.to(tensor.device) % tensor.shape[0]]

    if values is None:

        def see_values(tensor: torch.Tensor, hook: Any) -> None:
            own = of_touched(tensor)
            if past_values is not None:
                own = torch.cat([of_touched(past_values).to(own), own], dim=1)
            seen["values"] = own

        hooks.append((values_name(layer), see_values))
    if mix is not None and own_pattern is None:

        def see_pattern(tensor: torch.Tensor, hook: Any) -> None:
            seen["pattern"] = of_touched(tensor)

        hooks.append((pattern_name(layer), see_pattern))

    def write_z(z: torch.Tensor, hook: Any) -> torch.Tensor:
        used_values = seen["values"] if values is None else of_touched(values).to(z)
        rows = of_touched(pattern)
        if mix is not None:
            own = seen["pattern"] if own_pattern is None else of_touched(own_pattern)
            rows = mix(own, rows.to(own))
        mixed = mix_heads(rows.to(z), used_values)
        at = touched.to(z.device)
        kept = z[at]
        # One recorded row would otherwise be taken for the rows of all positions.
        assert mixed.shape == kept.shape, f"heads give {mixed.shape}, not {kept.shape}"
        chosen = where[touched].to(z.device).transpose(1, 2).unsqueeze(-1)
        new = torch.where(chosen, mixed, kept)
        return new if len(at) == len(z) else z.index_copy(0, at, new)

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
