"""Handles closed standard streams, with which services and windowed programs start children."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO, Any


def open_closed_streams() -> None:
    """Opens the null device in place of each of stdin, stdout and stderr that is closed.

    Otherwise the next file that is opened takes the stream's number, and what a library prints
    goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is not None and not stream.closed:
            continue
        opened = os.open(os.devnull, os.O_RDWR)
        if opened > number and not _is_open(number):
            os.dup2(opened, number)
            os.close(opened)
            opened = number
        os.set_inheritable(opened, True)  # as the standard streams of a new process are
        mode = "r" if name == "stdin" else "w"
        setattr(sys, name, _text_stream(opened, mode))


def abandon_output() -> None:
    """Sends stdout's unwritten data to the null device, so that it cannot fail again at exit."""
    with suppress(OSError, ValueError):  # a host program's stream may have no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _text_stream(number: int, mode: str) -> IO[Any]:
    return os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
