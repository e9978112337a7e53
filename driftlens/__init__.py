"""DriftLens: see, prove and cure attention drift in knowledge editing.

The whole path in one place::

    model  = load_model("smollm2-135m")                    # models.py
    edit   = edit(model, EditRequest(...))                 # editing/methods.py
    drift  = measure_drift(model, edit, prompt)            # drift.py
    sweep  = sweep_attention(model, edit, prompt, ...)     # patching.py
    cured  = edit(model, request, penalty=SADR(gamma=...)) # editing/penalties.py
"""

from driftlens.drift import Drift, load_drift, measure_drift
from driftlens.editing.methods import RomeConfig, edit
from driftlens.editing.penalties import SADR
from driftlens.editing.statistics import KeyCovariance, key_covariance, load_covariance
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
from driftlens.models import LensModel, ModelInfo, load_model
from driftlens.patching import (
    AttentionSweep,
    PatchResult,
    Readout,
    patch_activation,
    patch_attention,
    sweep_attention,
)
from driftlens.scoring import ContinuationScore, score, score_details
from driftlens.weights import DenseDelta, LowRankDelta

__version__ = "0.1.0"

__all__ = [
    "SADR",
    "AttentionSweep",
    "ContinuationScore",
    "DataError",
    "DenseDelta",
    "DownloadError",
    "Drift",
    "DriftLensError",
    "Edit",
    "EditError",
    "EditRequest",
    "KeyCovariance",
    "LensModel",
    "LowRankDelta",
    "ModelError",
    "ModelInfo",
    "PatchResult",
    "Readout",
    "RequestError",
    "RomeConfig",
    "TokenError",
    "edit",
    "key_covariance",
    "load_covariance",
    "load_drift",
    "load_edit",
    "load_model",
    "measure_drift",
    "patch_activation",
    "patch_attention",
    "score",
    "score_details",
    "sweep_attention",
]
