"""Conditions of a benchmark: an editor with its hyperparameters and restrictions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from driftlens.editing.config_files import EditPlan
from driftlens.editing.configs import EditConfig, checked
from driftlens.editing.defaults import known_gamma, sadr_gamma
from driftlens.editing.family import PENALTIES, penalty_from_dict
from driftlens.editing.methods import config_of, resolve_config
from driftlens.editing.penalties import Penalty
from driftlens.editing.sadr import SADR
from driftlens.errors import RequestError
from driftlens.models import LensModel

UNEDITED = "unedited"
"""The arm that leaves the model as it is."""


@dataclass(frozen=True)
class Arm:
    """One condition: an editor with its hyperparameters and restrictions.

    Args:
        name: How tables call it; each arm of a run has its own.
        method: The editor; ``None`` leaves the model unedited.
        config: Its hyperparameters.
        penalties: Its restrictions.
    """

    name: str
    method: str | None = None
    config: EditConfig | None = None
    penalties: tuple[Penalty, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What determines results, JSON-ready; the name does not."""
        return {
            "method": self.method,
            "config": None if self.config is None else asdict(self.config),
            "penalties": [penalty.to_dict() for penalty in self.penalties],
        }

    def settled(self, model: LensModel) -> Arm:
        """This arm with the hyperparameters that its edits take on a model, all of their own types:
        ``lr=1`` and ``lr=1.0`` are one condition, and no hyperparameters are the model's defaults.

        Raises:
            RequestError: If the method or a hyperparameter is unknown, or a value out of range.
            ModelError: If a layer is out of range or cannot be edited.
        """
        if self.method is None:
            return self
        return replace(self, config=resolve_config(model, self.method, self.config))

    def edit_options(self, seed: int) -> dict[str, Any]:
        """Arguments of :func:`~driftlens.edit` and its like that make this arm's edits.

        Args:
            seed: Of the sampled contexts.
        """
        return {
            "method": self.method, "config": self.config, "penalty": self.penalties, "seed": seed,
            "progress": False,
        }  # fmt: skip


def arm_from_dict(record: Mapping[str, Any]) -> Arm:
    """An arm from what :meth:`Arm.to_dict` gives, and its ``name``.

    Raises:
        RequestError: If the method, a penalty or a field is unknown.
    """
    method, config = record["method"], record["config"]
    return Arm(
        str(record["name"]),
        method,
        None if method is None else checked(config_of(method), config, method),
        tuple(penalty_from_dict(penalty) for penalty in record["penalties"]),
    )


def make_arms(
    model: LensModel,
    methods: Sequence[str],
    penalties: Sequence[str] = ("none", "sadr"),
    plans: Mapping[str, EditPlan] | None = None,
) -> list[Arm]:
    """Each editor with each restriction, after the unedited model.

    Args:
        model: Its defaults are taken.
        methods: Names of editors.
        penalties: Names of penalties, or ``"none"``; SADR with the gamma that is known for the
            model and each editor (a warning where none is), the others as their classes have it.
        plans: By editor, hyperparameters to take instead of the model's, and SADR of one's own
            (:func:`~driftlens.read_config`).

    Raises:
        RequestError: On an unknown name or hyperparameter.
    """
    arms, plans = [Arm(UNEDITED)], plans or {}
    for method in methods:
        config = planned_config(model, method, plans)
        for name in penalties:
            if name != "none" and name not in PENALTIES:
                raise RequestError(
                    f"There is no penalty {name!r}.",
                    f"Choose none, or some of {', '.join(PENALTIES)}.",
                )
            if name == "none":
                arms.append(Arm(method, method, config))
                continue
            is_sadr = name == SADR.kind
            held = planned_sadr(model, method, plans) if is_sadr else PENALTIES[name]()
            arms.append(Arm(f"{method} + {name}", method, config, (held,)))
    return arms


def planned_config(model: LensModel, method: str, plans: Mapping[str, EditPlan]) -> EditConfig:
    """The hyperparameters of an editor: the model's, or those of its plan."""
    plan = plans.get(method)
    found: EditConfig = resolve_config(model, method, None, None if plan is None else plan.config)
    return found


def planned_sadr(model: LensModel, method: str, plans: Mapping[str, EditPlan]) -> SADR:
    """SADR of an editor: its plan's, or with the model's gamma; a warning if none is known."""
    own = sadr_of(plans.get(method))
    if own is not None:
        return own
    gamma = sadr_gamma(model, method)
    if known_gamma(model, method) is None:
        warnings.warn(
            f"No gamma of SADR is known for {method} on {model.info.name}; {gamma:g} is taken, "
            "GPT-J's, which may be too small to do anything. Search for one (python -m "
            "driftlens.experiments.tuning), and give it in a configuration of your own.",
            stacklevel=4,
        )
    return SADR(gamma=gamma)


def sadr_of(plan: EditPlan | None) -> SADR | None:
    """SADR in a plan, if it has one."""
    held = () if plan is None else plan.penalties
    return next((penalty for penalty in held if isinstance(penalty, SADR)), None)
