"""Editors' configurations as TOML files.

    method = "memit"

    [config]
    layers = [4, 5, 6]
    steps = 25

    [[penalties]]
    penalty = "sadr"
    gamma = 0.2

Hyperparameters that are left out take the model's defaults, fields of penalties those of their
classes; ``"none"`` stands for no value.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from driftlens.disk import write_atomically
from driftlens.editing.configs import EditConfig
from driftlens.editing.family import penalty_from_dict
from driftlens.editing.penalties import Penalty
from driftlens.errors import DataError

NONE = "none"


@dataclass(frozen=True)
class EditPlan:
    """What a file tells of how to edit.

    Args:
        method: The editor; ``None`` if the file leaves it open.
        config: The hyperparameters that it gives.
        penalties: The restrictions.
    """

    method: str | None
    config: dict[str, Any]
    penalties: tuple[Penalty, ...]

    def to_dict(self) -> dict[str, Any]:
        """What it gives, JSON-ready."""
        return {
            "method": self.method,
            "config": self.config,
            "penalties": [penalty.to_dict() for penalty in self.penalties],
        }


def read_config(path: str | os.PathLike[str]) -> EditPlan:
    """Read a TOML file.

    Raises:
        DataError: If it is missing, no TOML, or holds something else.
        RequestError: If a penalty is unknown or a value out of range.
    """
    try:
        content = tomllib.loads(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise DataError(
            f"The configuration {path} cannot be read: {error.strerror or error}.",
            "Give a TOML file.",
        ) from error
    except ValueError as error:  # no TOML, or no text
        raise DataError(f"The configuration {path} is no TOML: {error}.") from error
    unknown = sorted(set(content) - {"method", "config", "penalties"})
    if unknown:
        raise DataError(
            f"The configuration {path} has an unknown entry {unknown[0]!r}.",
            "It may have method, [config] and [[penalties]].",
        )
    method, config = content.get("method"), content.get("config", {})
    penalties = content.get("penalties", [])
    if method is not None and not isinstance(method, str):
        raise DataError(f"The method in {path} is {method!r}.", "Give a name.")
    if not isinstance(config, dict):
        raise DataError(f"config in {path} is {config!r}.", "Give a table: [config].")
    if not isinstance(penalties, list) or not all(isinstance(p, dict) for p in penalties):
        raise DataError(f"penalties in {path} are {penalties!r}.", "Give tables: [[penalties]].")
    return EditPlan(
        method,
        _without_none_names(config),
        tuple(penalty_from_dict(_without_none_names(record)) for record in penalties),
    )


def write_config(
    path: str | os.PathLike[str],
    method: str,
    config: EditConfig,
    penalties: Sequence[Penalty] = (),
) -> None:
    """Write a TOML file that :func:`read_config` reads back.

    Raises:
        DataError: If it cannot be written.
    """
    content: dict[str, Any] = {"method": method, "config": _with_none_names(asdict(config))}
    if penalties:
        content["penalties"] = [_with_none_names(penalty.to_dict()) for penalty in penalties]
    try:
        write_atomically(Path(path), tomli_w.dumps(content).encode())
    except OSError as error:
        raise DataError(
            f"The configuration cannot be written to {path}: {error.strerror or error}.",
            "Choose a file that can be written.",
        ) from error


def _with_none_names(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: NONE if value is None else value for name, value in values.items()}


def _without_none_names(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value == NONE else value for name, value in values.items()}
