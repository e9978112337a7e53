"""What all files of results have in common: versions, data, plain JSON, being written whole."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from driftlens import __version__
from driftlens.disk import make_folder, write_atomically
from driftlens.errors import DataError

LIBRARIES = ("transformers", "transformer-lens", "nltk", "scikit-learn")
"""That results depend on, besides torch."""


@cache
def code_digest() -> str:
    """Of the package's own source files, 16 hexadecimal digits: versions between two releases
    differ by nothing else."""
    found = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of what a result depends on besides the model and what is asked: the code, the libraries that
    compute or tell of texts, and how exact torch's products of float32 are."""
    return {
        "driftlens": __version__,
        "code": code_digest(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def data_file(path: Path) -> dict[str, str]:
    """Which file of data a result is about: its name, and the SHA-256 of what is in it.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return {"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def plain(value: Any) -> Any:
    """A result as JSON has it: what is no finite number is ``None``, tuples are lists."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def result_json(value: Any) -> str:
    """The text of a file of results; see :func:`plain`."""
    return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_result(path: Path, data: str | bytes) -> None:
    """Write a file so that it is there whole or not at all; its folder is made if need be.

    Raises:
        DataError: If it cannot be written.
    """
    try:
        make_folder(path.parent)
        write_atomically(path, data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written to: {error.strerror or error}.",
            "Free some space or choose another place.",
        ) from error
