"""What is checked at run time in the tests: the shapes and types of tensors.

Wrong arguments of users are refused by the package's own errors, which tests must be able to
see; so functions whose annotations name no tensor are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype

TENSORS = ("Float[", "Int[", "Bool[")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    annotations = getattr(function, "__annotations__", {})
    if any(name in str(value) for value in annotations.values() for name in TENSORS):
        return beartype(function)
    return function
