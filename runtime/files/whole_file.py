"""Reading of whole files up to a largest size, because a device such as /dev/zero never ends."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import BinaryIO

MOST_TEXT = 256 << 20  # largest text in bytes: a model would read it for days
MOST_DATA = 2 << 30  # largest file of measured or learnt data in bytes
_BLOCK = 1 << 16  # bytes of a first read if the size is unknown


def read_whole(path: str | os.PathLike[str], most: int = MOST_DATA) -> bytes:
    """Reads the bytes of a file. Raises OSError, also (EFBIG) if there are more than `most`."""
    with open(path, "rb") as file:
        return _read(file, os.fspath(path), most)


def read_stdin(most: int = MOST_TEXT) -> bytes:
    """Reads stdin to its end. Raises OSError as read_whole does."""
    return _read(sys.stdin.buffer, "stdin", most)


def read_whole_text(path: Path, most: int = MOST_TEXT) -> str:
    """Reads the UTF-8 text of a file. Raises OSError, UnicodeDecodeError."""
    return read_whole(path, most).decode("utf-8")


def _read(file: BinaryIO, name: str, most: int) -> bytes:
    try:
        block = os.fstat(file.fileno()).st_size + 1  # a file of that size is read at once
    except OSError:  # the stream has no file descriptor
        block = 0
    block = min(max(block, _BLOCK), most + 1)
    data = file.read(block)
    while len(data) <= most and (more := file.read(min(len(data) + 1, most + 1 - len(data)))):
        data += more  # each read at most doubles the data
    if len(data) > most:
        raise OSError(errno.EFBIG, f"expected at most {most >> 20} MiB, found more", name)
    return data
