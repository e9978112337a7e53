"""Finished units of work, one JSON line each, so that a stopped run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from driftlens.disk import make_folder, sync_folder
from driftlens.errors import DataError

CHECKSUM = "sha256"


class Journal:
    """An append-only file of records; the unit of each is its identity.

    Each record is a line with a checksum, so that a damaged file loses damaged records only.

    Args:
        path: The file; made at the first record.

    Raises:
        DataError: If the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._records = {
            self._key(record["unit"]): record for record in self._read() if "unit" in record
        }

    def __contains__(self, unit: Any) -> bool:
        return self._key(unit) in self._records

    def __getitem__(self, unit: Any) -> dict[str, Any]:
        return self._records[self._key(unit)]

    def is_finished(self, unit: Any, retry_failed: bool = False) -> bool:
        """Whether a unit need not be done: it has a record, and not one of a failure that is to be
        tried again."""
        return unit in self and not (retry_failed and "error" in self[unit])

    def warn_of_other_versions(
        self, units: Iterable[Any], made_by: Mapping[str, str], stacklevel: int = 2
    ) -> None:
        """Warn of finished units of other versions: what the code does is in no unit's identity.

        Args:
            units: Those of a run.
            made_by: Their ``versions``, were they made now; what one of both does not tell is not
                compared.
            stacklevel: Of the warning, from here.
        """

        def changed(versions: Mapping[str, str]) -> list[str]:
            return [
                f"{name} {value}"
                for name, value in versions.items()
                if value != made_by.get(name, value)
            ]

        made = [self[unit].get("versions", {}) for unit in units if unit in self]
        others = [versions for versions in made if not versions or changed(versions)]
        if not others:
            return
        warnings.warn(
            f"{len(others)} of the units in {self.path} were made by other versions "
            f"({', '.join(changed(others[0])) or 'unknown'}), and are kept. Choose another folder "
            "to make all anew.",
            stacklevel=stacklevel + 1,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records.values())

    def add(self, unit: Any, **fields: Any) -> dict[str, Any]:
        """Write a record at once.

        Raises:
            DataError: If the file cannot be written; what was in it stays.
        """
        record = json.loads(json.dumps({"unit": unit, **fields}))
        line = json.dumps({**record, CHECKSUM: digest(record)}) + "\n"  # ASCII: of any text
        try:
            is_new = not self.path.exists()
            make_folder(self.path.parent)
            # A line that was cut off must not swallow the next one.
            starts = b"" if self._ends_whole() else b"\n"
            with self.path.open("ab") as file:
                file.write(starts + line.encode())
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                sync_folder(self.path.parent)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written: {error.strerror or error}.",
                "Free some space or choose another folder; what was finished is kept.",
            ) from error
        self._records[self._key(unit)] = record
        return self[unit]

    def _ends_whole(self) -> bool:
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def _read(self) -> Iterator[dict[str, Any]]:
        """Whole records; what was cut off or overwritten is left out."""
        if not self.path.exists():
            return
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and record.pop(CHECKSUM, None) == digest(record):
                yield record

    @staticmethod
    def _key(unit: Any) -> str:
        return json.dumps(unit, sort_keys=True, ensure_ascii=False)


def total(records: Iterable[Mapping[str, Any]], field: str) -> float | None:
    """The sum of a number over records; ``None`` if some do not have it."""
    try:
        return float(sum(record[field] for record in records))
    except KeyError:
        return None


def digest(value: Any) -> str:
    """Of anything that can be written as JSON, 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
