"""Half precision is for storing weights; what is decided or optimised is computed in more."""

from __future__ import annotations

import torch


def in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def relative_tolerance(dtype: torch.dtype) -> float:
    """Relative error that rounding alone may cause in logits."""
    return 2e-4 if dtype in (torch.float32, torch.float64) else 5e-2
