"""Digests of weights: one that names them anywhere, and a quick one to notice a change by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import xxhash

THREADS = 8
"""That hash tensors at once; hashlib lets other threads run meanwhile."""
WORDS = 1 << 20
"""64-bit words of a tensor that share one sum."""


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes; the same on every device."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters."""
    names = sorted(parameters)
    with ThreadPoolExecutor(min(THREADS, max(1, torch.get_num_threads()))) as pool:
        digests = pool.map(tensor_digest, [parameters[name] for name in names])
        told = "".join(f"{name}:{one};" for name, one in zip(names, digests, strict=True))
    return hashlib.sha256(told.encode()).hexdigest()


def quick_digest(parameters: Mapping[str, torch.Tensor]) -> str:
    """The same content in a hash that is read at the speed of memory, to notice any change by.

    Not cryptographic: for telling one state of a process's own memory from another. Tensors on
    the CPU give 128 bits in all; others are not copied to it, and give 64 for each 8 MB.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(parameters):
        tensor = parameters[name]
        digest.update(f"{name}:{tensor.dtype}{tuple(tensor.shape)};".encode())
        digest.update(_bytes_of(tensor) if tensor.device.type == "cpu" else device_sums(tensor))
    return digest.hexdigest()


def device_sums(tensor: torch.Tensor) -> bytes:
    """Sums of a tensor's bits, made where it lies: its 64-bit words, each times an odd number of
    its own, modulo 2^64. Sums of integers depend on no order, and any one word's change shows."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    parts = [flat[:whole], torch.nn.functional.pad(flat[whole:], (0, whole + 8 - flat.numel()))]
    factors = _factors(tensor.device)
    sums = [
        (words * factors[: len(words)]).sum()
        for part in parts
        for words in _aligned(part).view(torch.int64).split(WORDS)
    ]
    found: bytes = torch.stack(sums).cpu().numpy().tobytes()
    return found


@cache
def _factors(device: torch.device) -> torch.Tensor:
    """Odd numbers, the same in every process."""
    drawn = torch.randint(
        -(2**63), 2**63 - 1, (WORDS,), generator=torch.Generator().manual_seed(0), dtype=torch.int64
    )
    return (drawn | 1).to(device)


def _aligned(part: torch.Tensor) -> torch.Tensor:
    """The same bytes where a 64-bit word may begin."""
    return part.clone() if part.storage_offset() % 8 or part.data_ptr() % 8 else part


def _bytes_of(tensor: torch.Tensor) -> Any:
    """A view, not a copy: an embedding can be half of a model."""
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy()
