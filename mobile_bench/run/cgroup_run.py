"""Runs a command in a memory cgroup of its own, for measurements under a hard limit.

Linux, as root: a group of the memory controller (version 1) or of the unified hierarchy
(version 2). The child joins the group before it executes, so that every page counts.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A memory cgroup with a limit, swap excluded."""

    def __init__(self, folder: Path, unified: bool) -> None:
        self.folder = folder
        self.unified = unified

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Starts a command inside the group."""
        # The shell joins, then becomes the command: everything that it touches is charged here.
        join = 'echo $$ > "$0" && exec "$@"'
        shell = ["/bin/sh", "-c", join, str(self.folder / "cgroup.procs"), *command]
        return subprocess.Popen(shell, text=True, **options)

    def _number(self, name: str) -> int:
        with suppress(OSError, ValueError):
            return int((self.folder / name).read_text())
        return 0

    def peak(self) -> int:
        """Largest charge so far in bytes, page cache included (0: the kernel does not tell)."""
        return self._number("memory.peak" if self.unified else "memory.max_usage_in_bytes")

    def swapped(self) -> int:
        """Bytes of the group that are in swap now."""
        if self.unified:
            return self._number("memory.swap.current")
        usage, both = "memory.usage_in_bytes", "memory.memsw.usage_in_bytes"
        return max(0, self._number(both) - self._number(usage))

    def kills(self) -> int:
        """Number of processes that the kernel has killed for memory."""
        name = "memory.events" if self.unified else "memory.oom_control"
        with suppress(OSError):
            for line in (self.folder / name).read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
        return 0


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A group limited to `limit` bytes, removed at the end. Raises OSError without the rights."""
    unified = not V1.is_dir()
    folder = (V2 if unified else V1) / f"stoker-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        if unified:
            (folder / "memory.max").write_text(str(limit))
            with suppress(OSError):
                (folder / "memory.swap.max").write_text("0")
        else:
            (folder / "memory.limit_in_bytes").write_text(str(limit))
            with suppress(OSError):  # without swap accounting there is no such file
                (folder / "memory.memsw.limit_in_bytes").write_text(str(limit))
            with suppress(OSError):
                (folder / "memory.swappiness").write_text("0")
        yield MemoryGroup(folder, unified)
    finally:
        for _ in range(100):
            try:
                folder.rmdir()
                break
            except OSError:  # a process of the group is still ending
                time.sleep(0.05)
