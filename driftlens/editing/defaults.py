"""Where edits go and how: the only source of defaults.

Layers and hyperparameters are those of the methods' authors where they published some
(ROME: gpt2-medium/large/xl, gpt-j; EasyEdit: Llama 2/3, Qwen 2.5, Mistral; SADR: TinyLlama).
For SmolLM2-135M and Gemma 3 270M they are reasonable but not yet tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from driftlens.models import LensModel

_ROME: list[tuple[str, int, dict[str, Any]]] = [
    # (Hugging Face model_type, number of layers, hyperparameters)
    ("gpt2", 24, {"layer": 8, "clamp_factor": 3.0}),
    ("gpt2", 36, {"layer": 12, "clamp_factor": 4.0}),
    ("gpt2", 48, {"layer": 17, "clamp_factor": 4.0}),
    ("gptj", 28, {"layer": 5, "clamp_factor": 4.0}),
    ("llama", 22, {"layer": 4, "clamp_factor": 2.0}),  # TinyLlama 1.1B
    ("llama", 30, {"layer": 8, "clamp_factor": 4.0}),  # SmolLM2-135M
    ("llama", 32, {"layer": 5, "steps": 25, "weight_decay": 1e-3}),  # Llama 2 7B, 3 8B
    ("llama", 40, {"layer": 6, "clamp_factor": 4.0}),  # Llama 2 13B
    ("qwen2", 28, {"layer": 5, "steps": 25, "weight_decay": 1e-3}),  # Qwen 2.5 7B
    ("mistral", 32, {"layer": 5, "steps": 25, "weight_decay": 1e-3}),
    ("gemma3_text", 18, {"layer": 5, "clamp_factor": 4.0}),  # Gemma 3 270M
]


def rome_defaults(model: LensModel) -> dict[str, Any]:
    """Hyperparameters of ROME for a model.

    A model that nobody tuned gets a layer at a quarter of its depth, as on average over the
    models above; :func:`is_known` tells.
    """
    known = _find(model)
    return dict(known) if known is not None else {"layer": model.info.n_layers // 4}


def is_known(model: LensModel) -> bool:
    """Whether hyperparameters for this model were published or chosen."""
    return _find(model) is not None


def _find(model: LensModel) -> dict[str, Any] | None:
    kind = str(model.hf_model.config.model_type)
    for model_type, n_layers, values in _ROME:
        if (kind, model.info.n_layers) == (model_type, n_layers):
            return values
    return None


DEFAULTS: dict[str, Callable[[LensModel], dict[str, Any]]] = {"rome": rome_defaults}
