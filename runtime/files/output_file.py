"""Checks of an output path before the work begins, so that it does not fail at its end."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..base.errors import OptionError

# This is the longest name of a hidden part file that is made beside an output file.
_PART = "..{}.gguf.part.json"


def check_output(
    out: Path, inputs: Iterable[str | os.PathLike[str]] = (), *, force: bool = True
) -> None:
    """Refuses (OptionError) a file that cannot or should not be made.

    A result is written beside its name and renamed when it is complete, so that it would replace a
    device or a pipe of that name. inputs: the files that it is made from; `out` must be none of
    them. force: an existing file may be replaced.
    """
    mode = None
    try:
        with suppress(FileNotFoundError):
            out.with_name(_PART.format(out.name)).stat()  # raises if the name is too long
        with suppress(FileNotFoundError):
            mode = out.stat().st_mode
    except (OSError, ValueError) as error:
        raise OptionError(f"{out}: {getattr(error, 'strerror', None) or error}") from None
    if mode is not None:
        if stat.S_ISDIR(mode):
            raise OptionError(f"{out}: expected the name of a file, found a directory")
        if not stat.S_ISREG(mode):
            raise OptionError(f"{out}: expected the name of a file, found a device, pipe or socket")
        if any(os.path.samefile(out, source) for source in inputs if os.path.exists(source)):
            raise OptionError(f"{out}: expected another file than what it is made from")
        if not force:
            raise OptionError(f"{out} exists: choose another name, or replace it with --force")
    if not out.absolute().parent.is_dir():
        raise OptionError(f"{out}: no such directory: {out.absolute().parent}")
