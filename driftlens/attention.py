"""Attention rows: what they are, how far two of them are apart, which heads over-attend.

Everything here is a pure function of tensors. One *row* is what one head does at one
query position: a probability distribution over key positions. Where heads have a learned sink
(GPT-OSS), which takes a share and is no key, that share is counted as one more key.

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

import re
from typing import Literal, get_args

import torch
from einops import repeat
from jaxtyping import Bool, Float

from driftlens.errors import RequestError, check_choice
from driftlens.precision import in_float32

HeadRule = Literal["max", "all", "quantile", "mean_std", "drift"]
Divergence = Literal["kl", "reverse_kl", "js", "l2"]

EPSILON = 1e-8
"""Added to both rows before the logarithm, as in the paper's code, which keeps ``log(0)`` away.
Rows in half precision are compared in float32, which can hold it."""

SINK = 0.02
"""What is missing of 1 in a row, and more than rounding in half precision, is a sink's share."""


def with_sinks(
    *rows: Float[torch.Tensor, "*batch key"],
) -> tuple[Float[torch.Tensor, "*batch all"], ...]:
    """The same rows, with the share of sinks as one more key if any of them has one."""
    shares = [(1 - row.sum(-1, keepdim=True)).clamp_min(0.0) for row in rows]
    if not any(float(share.detach().max()) > SINK for share in shares if share.numel()):
        return rows
    return tuple(torch.cat([row, share], -1) for row, share in zip(rows, shares, strict=True))


def row_kl(
    original: Float[torch.Tensor, "*batch key"],
    edited: Float[torch.Tensor, "*batch key"],
) -> Float[torch.Tensor, "*batch"]:
    """KL( original || edited ) of attention rows, in nats (paper section 4, equation 5).

    A constant of 1e-8 is added to both rows and they are not renormalised afterwards,
    as in the paper's released code; masked keys (zero in both) contribute nothing. The result is in
    float32 or better: in half precision it would be rounding.
    """
    original, edited = with_sinks(in_float32(original), in_float32(edited))
    p, q = original + EPSILON, edited + EPSILON
    return (p * (p.log() - q.log())).sum(-1)


def row_js(
    original: Float[torch.Tensor, "*batch key"],
    edited: Float[torch.Tensor, "*batch key"],
) -> Float[torch.Tensor, "*batch"]:
    """Jensen-Shannon divergence of attention rows, in nats: at most log 2."""
    original, edited = in_float32(original), in_float32(edited)
    middle = (original + edited) / 2
    return (row_kl(original, middle) + row_kl(edited, middle)) / 2


def row_divergence(
    original: Float[torch.Tensor, "*batch key"],
    edited: Float[torch.Tensor, "*batch key"],
    kind: Divergence = "kl",
) -> Float[torch.Tensor, "*batch"]:
    """How far attention rows are apart.

    Args:
        original: Rows before.
        edited: Rows now.
        kind: ``"kl"``: KL( original || edited ), the paper's; ``"reverse_kl"``:
            KL( edited || original ); ``"js"``: Jensen-Shannon; all in nats. ``"l2"``: the sum
            of squared differences.

    Returns:
        In float32 or better.
    """
    if kind == "kl":
        return row_kl(original, edited)
    if kind == "reverse_kl":
        return row_kl(edited, original)
    if kind == "js":
        return row_js(original, edited)
    check_choice("kind", kind, get_args(Divergence))
    original, edited = with_sinks(in_float32(original), in_float32(edited))
    return (original - edited).square().sum(-1)


def over_attending_heads(
    now: Float[torch.Tensor, "*batch head"],
    original: Float[torch.Tensor, "*batch head"],
    rule: HeadRule = "max",
    threshold: float | None = None,
) -> Bool[torch.Tensor, "*batch head"]:
    """Which heads attend to the subject too much, and are to be held.

    Args:
        now: Attention of each head of one layer, from the last prompt token to the last
            subject token, in the model that is being edited.
        original: The same before the edit.
        rule: Which heads are held; all comparisons are strict. ``"max"``: those that now exceed
            the *largest* original attention of any head of their layer (the paper's rule).
            ``"quantile"``: those that exceed that quantile of their layer's original attention.
            ``"mean_std"``: those that exceed its mean by so many standard deviations (of the
            heads, not of a sample). ``"drift"``: those whose own attention has grown by more
            than that. ``"all"``: every head.
        threshold: The quantile (0 to 1), the number of deviations, or the growth; ``None``
            takes :data:`THRESHOLDS`. ``"max"`` and ``"all"`` have none.
    """
    if rule == "all":
        return torch.ones_like(now, dtype=torch.bool)
    if threshold is None:
        threshold = THRESHOLDS.get(rule, 0.0)
    if rule == "max":
        limit = original.amax(dim=-1, keepdim=True)
    elif rule == "quantile":
        limit = original.quantile(threshold, dim=-1, keepdim=True)
    elif rule == "mean_std":
        spread = original.std(dim=-1, keepdim=True, correction=0)
        limit = original.mean(dim=-1, keepdim=True) + threshold * spread
    else:
        check_choice("rule", rule, get_args(HeadRule))
        limit = original + threshold
    return now > limit


THRESHOLDS: dict[str, float] = {"quantile": 0.9, "mean_std": 1.0, "drift": 0.05}
"""What the rules compare with if nothing is given."""


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
    common factor so that the row keeps its total, sinks included; where they hold nothing to
    scale, they get the original's values. Computed in float32 or better, and given as it came.
    """
    n_keys, dtype = row.shape[-1], torch.promote_types(row.dtype, original.dtype)
    row, original = with_sinks(in_float32(row), in_float32(original))
    if row.shape[-1] > n_keys:
        columns = torch.nn.functional.pad(columns, (0, 1))
    kept = row.masked_fill(columns, 0.0)
    restored = original.masked_fill(~columns, 0.0)
    # Two rows of the same total may differ in the last bits; no attention is negative.
    left = (row.sum(-1, keepdim=True) - restored.sum(-1, keepdim=True)).clamp_min(0.0)
    mass = kept.sum(-1, keepdim=True)
    fallback = original.masked_fill(columns, 0.0)
    scaled = torch.where(mass > 0, kept * (left / mass.clamp_min(1e-30)), fallback)
    return (restored + scaled)[..., :n_keys].to(dtype)


def head_name(layer: int, head: int) -> str:
    """A head as the field writes it: ``L9H6``."""
    return f"L{layer}H{head}"


def parse_head(name: str) -> tuple[int, int]:
    """Layer and head from ``L9H6``.

    Raises:
        RequestError: If it is written otherwise.
    """
    match = re.fullmatch(r"L(\d+)H(\d+)", name)
    if match is None:
        raise RequestError(f"{name!r} is no head.", 'Write it like "L9H6".')
    return int(match[1]), int(match[2])
