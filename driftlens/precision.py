"""Half precision is for storing weights; what is decided or optimised is computed in more."""

from __future__ import annotations

import torch


def in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
