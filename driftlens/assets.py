"""Files that come with the project: facts and measured results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from driftlens.errors import DataError


def asset(name: str) -> Path:
    """Path of a shipped file, e.g. ``facts.jsonl``.

    Raises:
        DataError: If there is no such file.
    """
    inside = Path(__file__).parent / "assets" / name
    beside = Path(__file__).parent.parent / "assets" / name
    for path in (inside, beside):
        if path.is_file():
            return path
    raise DataError(f"DriftLens ships no file {name!r}.", "Install it again.")


def survey_result(model_name: str) -> dict[str, Any] | None:
    """The measured averages over the shipped facts for a model, or ``None``."""
    try:
        path = asset(f"results/survey-{model_name}.json")
    except DataError:
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
