"""Finds a model file from what a user typed: a path, a catalogue name, or hf:repo/file."""

from __future__ import annotations

import difflib
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..runtime.base import arguments
from ..runtime.base.errors import DownloadError, ModelFileError, OptionError
from ..runtime.base.progress import Progress
from . import cache, catalogue, hub


def locate(
    spec: str,
    *,
    download: bool = False,
    progress: Progress | None = None,
    waiting: Callable[[], None] | None = None,
) -> Path:
    """The file that `spec` means, downloaded if `download` allows it.

    A file that exists comes before a name. progress, waiting: see models/pull.py.
    Raises ModelFileError if there is no such file or name, DownloadError if it is not in
    the cache (or could not be fetched), OptionError for a malformed "hf:".
    """
    spec = arguments.path("model", spec)
    if spec.startswith("hf:"):
        file = hub.parse(spec)
        path = hub.cached(file)
        if path is not None:
            return path
        if not download:
            raise DownloadError(_not_cached(str(file)))
        return fetch(spec, progress=progress, waiting=waiting)
    path = _file(spec)
    if path is not None:
        return path
    entry = catalogue.find(spec)
    if entry is None:
        raise ModelFileError(f"{spec}: no such file" + _suggestion(spec))
    path = cache.cached(entry)
    if path is not None:
        return path
    if not download:
        raise DownloadError(_not_cached(entry.name))
    return fetch(spec, progress=progress, waiting=waiting)


def fetch(
    spec: str,
    *,
    progress: Progress | None = None,
    waiting: Callable[[], None] | None = None,
) -> Path:
    """Downloads a catalogue model or hf: file, the latter also if the hub has a newer one.

    Raises DownloadError, OptionError for any other name.
    """
    from .pull import pull

    if spec.startswith("hf:"):
        return hub.pull(hub.parse(spec), progress=progress, waiting=waiting)
    entry = catalogue.find(spec)
    if entry is None:
        names = ", ".join(entry.name for entry in catalogue.entries())
        raise OptionError(f"{spec}: expected hf:owner/name/file.gguf or one of {names}")
    return pull(entry, progress=progress, waiting=waiting)


def _file(spec: str) -> Path | None:
    """The file of this path, None if there is none. Raises ModelFileError."""
    path = Path(spec)
    with suppress(RuntimeError):  # "~name" of an unknown user is an ordinary name
        path = path.expanduser()
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelFileError(f"{spec}: {error.strerror or error}") from None
    if not stat.S_ISREG(mode):  # reading a pipe, say, would wait for a writer
        found = "a directory" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise ModelFileError(f"{spec}: expected a GGUF file, found {found}")
    return path


def _not_cached(name: str) -> str:
    return f"{name} is not downloaded yet: run `stoker pull {name}` or load with download=True"


def _suggestion(spec: str) -> str:
    if "/" in spec or spec.endswith(".gguf"):
        return ""
    names = [name for e in catalogue.entries() for name in (e.name, *e.aliases)]
    close = difflib.get_close_matches(spec.lower(), names, n=1)
    if close:
        return f" and no model of that name; did you mean {close[0]}?"
    return " and no model of that name (`stoker pull list` shows those there are)"
