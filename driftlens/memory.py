"""Memory: that does not do, on any device, and what gradients keep of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

CPU_REFUSAL = "can't allocate memory"
"""In the message of torch's own allocator, whose error has no type of its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not do: torch's of a GPU, torch's of the CPU (a plain
    ``RuntimeError``), or Python's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and CPU_REFUSAL in str(error)


def kept_for_gradient(run: Callable[[], Any], without: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that a computation keeps for its gradients, each storage once. What is kept stays until
    the end, so that several steps count together.

    Args:
        run: The computation.
        without: Tensors whose storages do not count, such as a model's weights.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in without}
    saved: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in saved.values())
