"""Where edits go and how: the only source of defaults that depend on the model.

Layers and hyperparameters are those of the methods' authors where they published some
(ROME, MEMIT, PMET, AlphaEdit: their repositories; EMMET and Llama 2, Qwen 2.5, Mistral:
EasyEdit; TinyLlama, Llama 2 13B, and MEMIT and PMET on Llama 3: SADR's repository). Those of
the small bundled models come from a recorded search (``driftlens.experiments.tuning``).
"""

from __future__ import annotations

from typing import Any

from driftlens.models import LensModel

Values = dict[str, Any]

_LLAMA_SEARCH: Values = {"steps": 25, "clamp_factor": 4.0, "weight_decay": 1e-3}

_TUNED_SEARCH: Values = {
    "weight_decay": 1e-3, "clamp_factor": 4.0, "context_lengths": (10,), "contexts_per_word": 1
}  # fmt: skip

Kind = tuple[str, int, int, int]
"""Hugging Face model_type, number of layers, width of the residual stream, number of key-value
heads: depth alone would give Qwen 2.5 1.5B the values of the 7B, and without its heads Llama 3 8B
would be Llama 2 7B."""

KNOWN: dict[Kind, dict[str, Values]] = {
    # hyperparameters of each method
    ("gpt2", 24, 1024, 16): {
        "rome": {"layer": 8, "clamp_factor": 3.0},
        "ft": {"layer": 0, "norm_constraint": 2e-3},
    },
    ("gpt2", 36, 1280, 20): {
        "rome": {"layer": 12},
        "ft": {"layer": 0, "norm_constraint": 1e-3},
    },
    ("gpt2", 48, 1600, 25): {
        "rome": {"layer": 17},
        "memit": {"layers": (13, 14, 15, 16, 17), "cov_weight": 20000.0},
        "alphaedit": {"layers": (13, 14, 15, 16, 17)},
        "emmet": {"layers": (17,), "cov_weight": 10000.0},
        "ft": {"layer": 0, "norm_constraint": 5e-4},
    },
    ("gptj", 28, 4096, 16): {
        "rome": {"layer": 5},
        "memit": {"layers": (3, 4, 5, 6, 7, 8), "steps": 25},
        "pmet": {
            "layers": (3, 4, 5, 6, 7, 8),
            "steps": 30,
            "lr": 0.2,
            "kl_factor": 1.0,
            "cov_weight": 6000.0,
        },
        "alphaedit": {"layers": (3, 4, 5, 6, 7, 8), "steps": 25},
        "emmet": {"layers": (5,), "cov_weight": 100000.0, "steps": 25},
        "ft": {"layer": 0, "norm_constraint": 5e-5},
    },
    ("gpt_neox", 44, 6144, 64): {
        "pmet": {
            "layers": (6, 7, 8, 9, 10),
            "steps": 30,
            "clamp_factor": 0.8,
            "kl_factor": 0.8,
        },
    },
    ("llama", 22, 2048, 4): {  # TinyLlama 1.1B
        "rome": {"layer": 4, "clamp_factor": 2.0},
        "memit": {"layers": (3, 4, 5), "clamp_factor": 8.0, "cov_weight": 20000.0},
        "pmet": {"layers": (3, 4, 5), "clamp_factor": 4.0},
    },
    ("llama", 32, 4096, 32): {  # Llama 2 7B
        "rome": {"layer": 5, **_LLAMA_SEARCH},
        "memit": {"layers": (4, 5, 6, 7, 8), **_LLAMA_SEARCH},
        "pmet": {"layers": (4, 5, 6, 7, 8), "clamp_factor": 1.0},
        "emmet": {"layers": (5,), "cov_weight": 100000.0, **_LLAMA_SEARCH},
        "ft": {"layer": 21},
    },
    ("llama", 32, 4096, 8): {  # Llama 3 8B
        "rome": {"layer": 5, **_LLAMA_SEARCH},
        "memit": {"layers": (4, 5, 6, 7, 8), "clamp_factor": 4.0, "weight_decay": 1e-3},
        "pmet": {"layers": (4, 5, 6, 7, 8), "clamp_factor": 4.0},
        "alphaedit": {"layers": (4, 5, 6, 7, 8), "steps": 25, "lr": 0.1},
        "ft": {"layer": 21},
    },
    ("llama", 40, 5120, 40): {  # Llama 2 13B
        "rome": {"layer": 6},
        "memit": {"layers": (5, 6, 7, 8, 9), "clamp_factor": 4.0},
        "pmet": {"layers": (7, 8, 9), "clamp_factor": 4.0},
    },
    ("qwen2", 28, 3584, 4): {  # Qwen 2.5 7B
        "rome": {"layer": 5, **_LLAMA_SEARCH},
        "memit": {"layers": (4, 5, 6, 7, 8), **_LLAMA_SEARCH},
        "alphaedit": {"layers": (4, 5, 6, 7, 8), "ridge": 1.0, **_LLAMA_SEARCH},
        "ft": {"layer": 27},
    },
    ("mistral", 32, 4096, 8): {
        "rome": {"layer": 5, **_LLAMA_SEARCH},
        "memit": {"layers": (4, 5, 6, 7, 8), **_LLAMA_SEARCH},
        "ft": {"layer": 21, "norm_constraint": 5e-5},
    },
    ("llama", 30, 576, 3): {  # SmolLM2-135M: assets/results/tuning
        "rome": {"layer": 6, **_TUNED_SEARCH},
        "memit": {"layers": (4, 5, 6), "cov_weight": 100.0, **_TUNED_SEARCH},
        "pmet": {"layers": (4, 5, 6), "cov_weight": 100.0, **_TUNED_SEARCH, "early_stop_loss": 0.5},
        "emmet": {"layers": (6,), "cov_weight": 10000.0, **_TUNED_SEARCH},
        "alphaedit": {"layers": (4, 5, 6), "nullspace_threshold": 0.1, **_TUNED_SEARCH},
        "ft-m": {"layer": 3, "lr": 2e-3},
        "ft-l": {"layer": 3, "lr": 5e-3},
        "grace": {"layer": 14, "lr": 0.3},
    },
    ("gemma3_text", 18, 640, 1): {  # Gemma 3 270M: assets/results/tuning
        "rome": {"layer": 2, **_TUNED_SEARCH},
        "memit": {"layers": (0, 1, 2), "cov_weight": 3000.0, **_TUNED_SEARCH},
        "pmet": {"layers": (0, 1, 2), "cov_weight": 100.0, **_TUNED_SEARCH, "early_stop_loss": 0.2},
        "emmet": {"layers": (2,), "cov_weight": 100.0, **_TUNED_SEARCH},
        "alphaedit": {"layers": (0, 1, 2), "nullspace_threshold": 0.1, **_TUNED_SEARCH},
        "ft-m": {"layer": 10, "lr": 5e-4},
        "ft-l": {"layer": 10, "lr": 5e-4},
        "grace": {"layer": 8, "lr": 0.3, "radius": 16.0},
    },
}

_SHARES = {"r-rome": "rome", "ft-l": "ft", "ft-m": "ft"}
"""Methods that take another's values where they have none of their own."""


def defaults(model: LensModel, method: str) -> Values:
    """Hyperparameters of a method for a model, as far as they are not those of its class.

    A model for which nobody published any gets layers by depth: a quarter of it for one layer,
    three layers around that for methods that spread over several, two thirds for fine-tuning
    and five sixths for GRACE (:func:`by_depth`); :func:`is_known` tells.
    """
    known = _find(model, method)
    return dict(known) if known is not None else by_depth(model.info.n_layers, method)


def by_depth(n: int, method: str) -> Values:
    """Layers of a model of n layers of which nothing else is known."""
    if method in ("memit", "pmet", "alphaedit"):
        return {"layers": tuple(sorted({max(n // 4 - 1, 0), n // 4, min(n // 4 + 1, n - 1)}))}
    if method == "emmet":
        return {"layers": (n // 4,)}
    if method in ("ft-l", "ft-m"):
        return {"layer": n * 2 // 3}
    return {"layer": n * 5 // 6 if method == "grace" else n // 4}


def is_known(model: LensModel, method: str) -> bool:
    """Whether hyperparameters of this method for this model were published or tuned."""
    return _find(model, method) is not None


SADR_GAMMA = 0.01
"""The released code's strength for ROME on GPT-J."""


GAMMAS: dict[Kind, dict[str, float]] = {
    ("gptj", 28, 4096, 16): {"rome": 0.01, "memit": 0.005, "pmet": 0.08},
    ("llama", 30, 576, 3): {
        "rome": 0.8, "r-rome": 0.8, "memit": 0.2, "pmet": 0.2, "emmet": 0.8, "alphaedit": 0.2,
        "ft-l": 0.05, "ft-m": 0.05, "grace": 0.05,
    },
    ("gemma3_text", 18, 640, 1): {
        "rome": 0.8, "r-rome": 0.8, "memit": 0.8, "pmet": 0.2, "emmet": 0.8, "alphaedit": 0.8,
        "ft-l": 0.05, "ft-m": 0.05, "grace": 0.05,
    },
}  # fmt: skip
"""By model (as in KNOWN) and method."""


def known_gamma(model: LensModel, method: str) -> float | None:
    """SADR's strength for a method on a model, if one was published or tuned."""
    return GAMMAS.get(_kind(model), {}).get(method)


def sadr_gamma(model: LensModel, method: str) -> float:
    """SADR's strength for a method on a model, in nats per nat.

    Published for GPT-J, tuned for SmolLM2-135M and Gemma 3 270M; for others `SADR_GAMMA`.
    """
    found = known_gamma(model, method)
    return SADR_GAMMA if found is None else found


def _kind(model: LensModel) -> Kind:
    info = model.info
    return str(model.hf_model.config.model_type), info.n_layers, info.d_model, info.n_kv_heads


def _find(model: LensModel, method: str) -> Values | None:
    by_method = KNOWN.get(_kind(model), {})
    return by_method.get(method, by_method.get(_SHARES.get(method, "")))
