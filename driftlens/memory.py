"""Memory that does not do, on any device."""

from __future__ import annotations

import torch

CPU_REFUSAL = "can't allocate memory"
"""In the message of torch's own allocator, whose error has no type of its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not do: torch's of a GPU, torch's of the CPU (a plain
    ``RuntimeError``), or Python's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and CPU_REFUSAL in str(error)
