"""Brings the machine into the same state before each run: page cache cold, memory touched."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]

_DIRECT_READ = 8 << 20
_DROP = Path("/proc/sys/vm/drop_caches")


def read_directly(path: Path) -> None:
    """Reads the file once past the page cache: disks of virtual machines have caches of their own.

    If direct reads are not possible, it reads through the page cache.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # a file system without direct reads
        descriptor = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(-1, _DIRECT_READ) as buffer:
            if hasattr(os, "readv"):
                while os.readv(descriptor, [buffer]) == _DIRECT_READ:
                    pass
            else:
                while os.read(descriptor, _DIRECT_READ):
                    pass
    finally:
        os.close(descriptor)


def drop_page_cache(files: list[Path]) -> bool:
    """Empties the page cache (Linux, as root), else asks the kernel to drop these files from it.

    Returns whether either was possible.
    """
    if hasattr(os, "sync"):
        os.sync()
    try:
        _DROP.write_text("3\n")
        return True
    except OSError:
        pass
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with suppress(OSError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def touch_memory(nbytes: int) -> None:
    """Touches and frees `nbytes`, at most three quarters of what is available.

    A virtual machine may have given its free memory back to its host: the first touch of each page
    then costs several times what reading it from the disk costs, in whichever run comes first.
    """
    import numpy as np

    np.ones(min(nbytes, psutil.virtual_memory().available * 3 // 4), np.uint8)
