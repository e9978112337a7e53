"""DriftLens: see, prove and cure attention drift in knowledge editing.

The whole path in one place::

    model  = load_model("smollm2-135m")                    # loading.py
    edit   = edit(model, EditRequest(...))                 # editing/methods.py
    drift  = measure_drift(model, edit, prompt)            # drift.py
    sweep  = sweep_attention(model, edit, prompt, ...)     # patching.py
    cured  = edit(model, request, penalty=SADR(gamma=...)) # editing/sadr.py

Public names are imported at first use, so that ``import driftlens`` and the command line's
``--help`` do not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from driftlens.codebook import Codebook
    from driftlens.comparison import Comparison, compare
    from driftlens.drift import Drift, load_drift, measure_drift
    from driftlens.editing.config_files import EditPlan, read_config, write_config
    from driftlens.editing.configs import (
        AlphaEditConfig,
        EmmetConfig,
        FtConfig,
        GraceConfig,
        MemitConfig,
        PmetConfig,
        RomeConfig,
    )
    from driftlens.editing.methods import edit, edit_each, edit_sequence
    from driftlens.editing.outcome import NullSpaceState, ValueStore
    from driftlens.editing.penalties import Penalty, PenaltyTerm, Sites
    from driftlens.editing.rivals import EssenceKL, HiddenDrift, KeyDrift
    from driftlens.editing.sadr import SADR
    from driftlens.editing.statistics import (
        KeyCovariance,
        key_covariance,
        key_covariances,
        load_covariance,
    )
    from driftlens.edits import Edit, load_edit
    from driftlens.errors import (
        DataError,
        DownloadError,
        DriftLensError,
        EditError,
        ModelError,
        RequestError,
        TokenError,
    )
    from driftlens.facts import EditRequest
    from driftlens.loading import load_model
    from driftlens.models import LensModel, ModelInfo
    from driftlens.patch_results import AttentionSweep, PatchResult, Readout
    from driftlens.patching import (
        PatchExperiment,
        patch_activation,
        patch_attention,
        sweep_attention,
    )
    from driftlens.scoring import ContinuationScore, score, score_details
    from driftlens.strength import target_prob, weakened
    from driftlens.weights import DenseDelta, LowRankDelta

_HOME = {
    "Drift": "drift",
    "load_drift": "drift",
    "measure_drift": "drift",
    "Codebook": "codebook",
    "Comparison": "comparison",
    "compare": "comparison",
    "EditPlan": "editing.config_files",
    "read_config": "editing.config_files",
    "write_config": "editing.config_files",
    "AlphaEditConfig": "editing.configs",
    "EmmetConfig": "editing.configs",
    "FtConfig": "editing.configs",
    "GraceConfig": "editing.configs",
    "MemitConfig": "editing.configs",
    "PmetConfig": "editing.configs",
    "RomeConfig": "editing.configs",
    "edit": "editing.methods",
    "edit_each": "editing.methods",
    "edit_sequence": "editing.methods",
    "NullSpaceState": "editing.outcome",
    "ValueStore": "editing.outcome",
    "Penalty": "editing.penalties",
    "PenaltyTerm": "editing.penalties",
    "Sites": "editing.penalties",
    "EssenceKL": "editing.rivals",
    "HiddenDrift": "editing.rivals",
    "KeyDrift": "editing.rivals",
    "SADR": "editing.sadr",
    "KeyCovariance": "editing.statistics",
    "key_covariance": "editing.statistics",
    "key_covariances": "editing.statistics",
    "load_covariance": "editing.statistics",
    "Edit": "edits",
    "load_edit": "edits",
    "DataError": "errors",
    "DownloadError": "errors",
    "DriftLensError": "errors",
    "EditError": "errors",
    "ModelError": "errors",
    "RequestError": "errors",
    "TokenError": "errors",
    "EditRequest": "facts",
    "LensModel": "models",
    "ModelInfo": "models",
    "load_model": "loading",
    "AttentionSweep": "patch_results",
    "PatchExperiment": "patching",
    "PatchResult": "patch_results",
    "Readout": "patch_results",
    "patch_activation": "patching",
    "patch_attention": "patching",
    "sweep_attention": "patching",
    "ContinuationScore": "scoring",
    "score": "scoring",
    "score_details": "scoring",
    "target_prob": "strength",
    "weakened": "strength",
    "DenseDelta": "weights",
    "LowRankDelta": "weights",
}

__all__ = [
    "SADR",
    "AlphaEditConfig",
    "AttentionSweep",
    "Codebook",
    "Comparison",
    "ContinuationScore",
    "DataError",
    "DenseDelta",
    "DownloadError",
    "Drift",
    "DriftLensError",
    "Edit",
    "EditError",
    "EditPlan",
    "EditRequest",
    "EmmetConfig",
    "EssenceKL",
    "FtConfig",
    "GraceConfig",
    "HiddenDrift",
    "KeyCovariance",
    "KeyDrift",
    "LensModel",
    "LowRankDelta",
    "MemitConfig",
    "ModelError",
    "ModelInfo",
    "NullSpaceState",
    "PatchExperiment",
    "PatchResult",
    "Penalty",
    "PenaltyTerm",
    "PmetConfig",
    "Readout",
    "RequestError",
    "RomeConfig",
    "Sites",
    "TokenError",
    "ValueStore",
    "compare",
    "edit",
    "edit_each",
    "edit_sequence",
    "key_covariance",
    "key_covariances",
    "load_covariance",
    "load_drift",
    "load_edit",
    "load_model",
    "measure_drift",
    "patch_activation",
    "patch_attention",
    "read_config",
    "score",
    "score_details",
    "sweep_attention",
    "target_prob",
    "weakened",
    "write_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'driftlens' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"driftlens.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
