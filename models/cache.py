"""The cache directory of downloaded models, and locks against concurrent pulls."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..runtime.base.errors import OptionError
from .catalogue import Entry


def directory() -> Path:
    """The directory of catalogue models.

    STOKER_MODELS, else models/ in STOKER_CACHE, else stoker/models/ in the user's cache
    (XDG_CACHE_HOME, ~/.cache; %LOCALAPPDATA% on Windows). Raises OptionError if the home directory
    is unknown.
    """
    if models := os.environ.get("STOKER_MODELS"):
        return _expanded("STOKER_MODELS", models)
    if cache := os.environ.get("STOKER_CACHE"):
        return _expanded("STOKER_CACHE", cache) / "models"
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "stoker" / "models"
    if sys.platform == "win32" and (cache := os.environ.get("LOCALAPPDATA")):
        return Path(cache) / "stoker" / "models"
    try:
        return Path.home() / ".cache" / "stoker" / "models"
    except RuntimeError:
        raise OptionError(
            "this user has no home directory: name a folder for models in STOKER_MODELS"
        ) from None


def _expanded(variable: str, folder: str) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise OptionError(
            f"{variable} must be a folder, not {folder!r}: there is no such user"
        ) from None


def cached(entry: Entry) -> Path | None:
    """The entry's file in the cache, None if it is absent or has another size."""
    path = directory() / entry.file
    try:
        return path if path.stat().st_size == entry.size else None
    except OSError:
        return None


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds an exclusive lock on `path` (made if absent, and left) between processes.

    waiting: called once if another process holds it. The system drops the lock of a process that
    dies.
    """
    with path.open("ab") as file:
        told = False
        while not _try_lock(file):
            if waiting is not None and not told:
                waiting()
            told = True
            time.sleep(0.2)
        yield  # closing the file releases the lock


def _try_lock(file: BinaryIO) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
