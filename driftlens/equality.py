"""Equality of records that hold arrays or tensors."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch


def equal_fields(first: Any, second: object) -> bool:
    """Whether two dataclass instances are of one type and hold the same in every field that
    counts for comparison; arrays and tensors are the same if their numbers are."""
    names = [field.name for field in fields(first) if field.compare]
    return type(first) is type(second) and all(
        _equal(getattr(first, name), getattr(second, name)) for name in names
    )


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first is second or torch.equal(first.cpu(), second.cpu())
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second, equal_nan=True)
    return bool(first == second)
