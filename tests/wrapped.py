"""Small models of several architectures, wrapped, and beside them never wrapped."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tiny
import torch

import driftlens as dl

DELEGATED = {"gptj", "opt"}
"""Where TransformerLens discards an edit of ``hook_pattern``."""

PROMPT = "The Eiffel Tower is located in the city of"

architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


def build(architecture: str, seed: int = 0) -> Any:
    return tiny.hf_model(architecture, seed, scale=12.0, noise=0.1)


@cache
def reference(architecture: str) -> Any:
    """A Hugging Face model that is never wrapped."""
    return build(architecture)


@cache
def lens(architecture: str) -> dl.LensModel:
    return dl.load_model(build(architecture), tiny.tokenizer())


def some_ids(batch: int = 2, length: int = 11) -> torch.Tensor:
    """Random ids, the padding token among them (it must be no mask)."""
    ids = torch.randint(tiny.VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))
    ids[:, 4] = tiny.tokenizer().pad_token_id
    ids[0, 0] = tiny.tokenizer().pad_token_id
    return ids


@torch.no_grad()
def run(model: dl.LensModel, *args: Any, **options: Any) -> torch.Tensor:
    return model.run(*args, **options)
