"""Half precision is for storing weights; what is decided or optimised is computed in more."""

from __future__ import annotations

import torch


def in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def relative_tolerance(dtype: torch.dtype) -> float:
    """Relative error that rounding alone may cause in what one layer computes."""
    return 2e-4 if dtype in (torch.float32, torch.float64) else 5e-2


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Between the log-probabilities that logits give, in nats; NaN if one is none.

    What all logits of a position have in common says nothing, and may be far larger than the rest.
    """
    both = (in_float32(logits).log_softmax(-1) for logits in (found, expected))
    return float((next(both) - next(both)).abs().max())
