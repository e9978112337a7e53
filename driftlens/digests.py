"""Digests of weights: one that names them anywhere, and a quick one to notice a change by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xxhash

THREADS = 8
"""That hash tensors at once; hashlib lets other threads run meanwhile."""
WORDS = 1 << 20
"""64-bit words of a tensor that share one sum."""
SUMMED = frozenset({"cuda"})
"""Kinds of devices whose tensors are summed where they lie, instead of being copied."""
STEP, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""Constants of SplitMix64 (Steele et al., 2014), as signed numbers."""


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes; the same on every device."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters."""
    names = sorted(parameters)
    with ThreadPoolExecutor(min(THREADS, torch.get_num_threads())) as pool:
        digests = pool.map(tensor_digest, [parameters[name] for name in names])
        told = "".join(f"{name}:{one};" for name, one in zip(names, digests, strict=True))
    return hashlib.sha256(told.encode()).hexdigest()


def quick_digest(parameters: Mapping[str, torch.Tensor]) -> str:
    """The same content in a hash that is read at the speed of memory, to notice any change by.

    Not cryptographic: for telling one state of a process's own memory from another. Tensors on
    the CPU give 128 bits in all; those on a GPU are not copied, and give 64 for each 8 MB.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(parameters):
        tensor = parameters[name]
        digest.update(f"{name}:{tensor.dtype}{tuple(tensor.shape)};".encode())
        digest.update(device_sums(tensor) if tensor.device.type in SUMMED else _bytes_of(tensor))
    return digest.hexdigest()


def device_sums(tensor: torch.Tensor) -> bytes:
    """Sums of a tensor's bits, made where it lies: its 64-bit words, each scrambled together with
    its place, modulo 2^64. Sums of integers depend on no order."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    parts = [flat[:whole], torch.nn.functional.pad(flat[whole:], (0, whole + 8 - flat.numel()))]
    sums = [
        _scrambled(words).sum()
        for part in parts
        for words in _aligned(part).view(torch.int64).split(WORDS)
    ]
    found: bytes = torch.stack(sums).cpu().numpy().tobytes()
    return found


def _scrambled(words: torch.Tensor) -> torch.Tensor:
    """SplitMix64 of each word and its place: one to one, and every bit moves about half of them, so
    that changes of several words (as of the signs of a column) do not cancel."""
    mixed = torch.arange(1, len(words) + 1, device=words.device) * STEP + words
    mixed = (mixed ^ _shifted(mixed, 30)) * FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * SECOND
    return mixed ^ _shifted(mixed, 31)


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros from the left: torch's own shift repeats the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _aligned(part: torch.Tensor) -> torch.Tensor:
    """The same bytes where a 64-bit word may begin."""
    return part.clone() if part.storage_offset() % 8 else part


def _bytes_of(tensor: torch.Tensor) -> Any:
    """A view, not a copy: an embedding can be half of a model."""
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy()
