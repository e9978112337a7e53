"""Files that are there whole or not at all, whatever stops the program or the machine."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from itertools import takewhile
from pathlib import Path

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
"""What file systems say whose folders cannot be synced."""


def make_folder(folder: Path) -> None:
    """A folder, with those that it is in, whose names survive a power cut; none that are there
    already.

    Raises:
        OSError: If it cannot be made.
    """
    missing = list(takewhile(lambda one: not one.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        sync_folder(one.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all; its folder must be there.

    Raises:
        OSError: If it cannot be written. If only the folder cannot be synced, the file is there
            already, though a power cut may lose it.
    """
    staging = _stage(path, data)
    try:
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_both(first: Path, first_data: bytes, second: Path, second_data: bytes) -> None:
    """Write two files that belong together; if that fails, what was there before stays.

    Raises:
        OSError: As :func:`write_atomically`.
    """
    staged = [_stage(first, first_data)]
    kept: Path | None = None
    try:
        staged.append(_stage(second, second_data))
        if first.exists():
            kept = first.with_name(f".{first.name}.{os.getpid()}-{secrets.token_hex(4)}.kept")
            shutil.copy2(first, kept)
        os.replace(staged[0], first)
        try:
            os.replace(staged[1], second)
        except BaseException:
            if kept is not None:
                kept.rename(first)
            else:
                first.unlink()
            raise
    finally:
        for path in (*staged, kept):
            if path is not None:
                path.unlink(missing_ok=True)
    for folder in {first.parent, second.parent}:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut, where folders can be synced."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # it may be written to, not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def _stage(path: Path, data: bytes) -> Path:
    """The data in a file of its own beside ``path``, safely on the disk."""
    # Not tempfile: its files are readable by their owner alone, and stay so when renamed.
    staging = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with staging.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    return staging
