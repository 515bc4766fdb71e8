"""Commands in control groups that have limits."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def group(controller: str, settings: dict[str, str]) -> Iterator[Path]:
    """A control group below a new one, which has the limits; skips the test if not allowed.

    settings: names of version 1, or "cpu.max" and the like of version 2.
    """
    v1 = Path("/sys/fs/cgroup") / controller
    top = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"stoker-test-{os.getpid()}"
    own = top / "nested"
    try:
        top.mkdir()
        for name, value in settings.items():
            if name.endswith(".max") == (not v1.is_dir() or controller == "pids"):
                (top / name).write_text(value)
        own.mkdir()
    except OSError as error:
        if top.is_dir():
            top.rmdir()
        pytest.skip(f"control groups cannot be made here: {error}")
    try:
        yield own
    finally:
        for folder in (own, top):
            for _ in range(100):
                try:
                    folder.rmdir()
                    break
                except OSError:
                    time.sleep(0.05)


def joining(folder: Path, *command: str) -> list[str]:
    """A command line that joins the group and then becomes the command."""
    join = 'echo $$ > "$0" && exec "$@"'
    return ["/bin/sh", "-c", join, str(folder / "cgroup.procs"), *command]


def inside(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        joining(folder, *command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
