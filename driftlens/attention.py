"""Attention rows: what they are, how far two of them are apart, which heads over-attend.

Everything here is a pure function of tensors. One *row* is what one head does at one
query position: a probability distribution over key positions.

Shape glossary, used in every signature of the package:

======== ==================================================================
axis     meaning
======== ==================================================================
batch    independent sequences
layer    transformer block, 0 at the bottom
head     query head (under grouped-query attention: ``n_heads``, not kv heads)
query    position that looks
key      position that is looked at
pos      position in a sequence
d_head   width of one head's values
d_model  width of the residual stream
d_mlp    width of the MLP's hidden layer, the input of the down-projection
======== ==================================================================

Divergences are in nats, attention in probability.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float

HeadRule = Literal["max", "all"]

EPSILON = 1e-8
"""Added to both rows before the logarithm, as in the paper's code (1e-7 in half precision)."""


def epsilon_for(dtype: torch.dtype) -> float:
    """The constant that keeps ``log(0)`` away; large enough to exist in ``dtype``."""
    return 1e-7 if dtype in (torch.float16, torch.bfloat16) else EPSILON


def row_kl(
    original: Float[torch.Tensor, "*batch key"],
    edited: Float[torch.Tensor, "*batch key"],
) -> Float[torch.Tensor, "*batch"]:
    """KL( original || edited ) of attention rows, in nats (paper section 4, equation 5).

    A constant of 1e-8 is added to both rows and they are not renormalised afterwards,
    as in the paper's released code; masked keys (zero in both) contribute nothing.
    """
    eps = epsilon_for(original.dtype)
    p, q = original + eps, edited + eps
    return (p * (p.log() - q.log())).sum(-1)


def over_attending_heads(
    now: Float[torch.Tensor, "*batch head"],
    original: Float[torch.Tensor, "*batch head"],
    rule: HeadRule = "max",
) -> Bool[torch.Tensor, "*batch head"]:
    """Which heads attend to the subject too much, and are to be held.

    Args:
        now: Attention of each head of one layer, from the last prompt token to the last
            subject token, in the model that is being edited.
        original: The same in the unedited model.
        rule: ``"max"``: heads that now exceed the *largest* original attention of any head
            of their layer (the paper's rule, strict). ``"all"``: every head.
    """
    if rule == "all":
        return torch.ones_like(now, dtype=torch.bool)
    return now > original.max(dim=-1, keepdim=True).values


def mix_heads(
    pattern: Float[torch.Tensor, "batch head query key"],
    values: Float[torch.Tensor, "batch key kv_head d_head"],
) -> Float[torch.Tensor, "batch query head d_head"]:
    """What heads pass on: each row's weighted sum of the values, before the output projection.

    Under grouped-query attention head ``h`` reads kv head ``h // (n_heads // n_kv_heads)``.
    """
    groups = pattern.shape[1] // values.shape[2]
    per_head = repeat(values, "b k kv d -> b k (kv g) d", g=groups)
    return torch.einsum("bhqk,bkhd->bqhd", pattern.to(per_head.dtype), per_head)


def restore_columns(
    row: Float[torch.Tensor, "*batch key"],
    original: Float[torch.Tensor, "*batch key"],
    columns: Bool[torch.Tensor, "*#batch key"],
) -> Float[torch.Tensor, "*batch key"]:
    """``row`` with the attention to some keys set back to ``original``'s, renormalised.

    The chosen columns get exactly the original attention. The others are scaled by one
    common factor so that the row keeps its total; where they hold nothing to scale, they
    get the original's values.
    """
    kept = row.masked_fill(columns, 0.0)
    restored = original.masked_fill(~columns, 0.0)
    left = row.sum(-1, keepdim=True) - restored.sum(-1, keepdim=True)
    mass = kept.sum(-1, keepdim=True)
    fallback = original.masked_fill(columns, 0.0)
    scaled = torch.where(mass > 0, kept * (left / mass.clamp_min(1e-30)), fallback)
    return restored + scaled


def head_name(layer: int, head: int) -> str:
    """A head as the field writes it: ``L9H6``."""
    return f"L{layer}H{head}"
