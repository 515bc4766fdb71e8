"""The memory limit of the control group that this process runs in (Linux, versions 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # version 1 writes a huge number where there is no limit


@dataclass(frozen=True)
class MemoryGroup:
    """version: 1 or 2; limit: bytes, None where there is none; usage: bytes, None if unknown.

    The limit is the smallest of the group's and its ancestors', usage is that of the group which
    sets it (or of the process's own, where none does).
    """

    version: int
    path: str
    limit: int | None
    usage: int | None


def memory_group(
    proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> MemoryGroup | None:
    """The group of this process, None where there are no control groups."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    unified = None
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            return _smallest(1, mount / "memory", path, names)
        if not controllers:
            unified = path
    if unified is None:
        return None
    root = mount / "unified" if (mount / "unified").is_dir() else mount
    return _smallest(2, root, unified, ("memory.max", "memory.current"))


def _smallest(version: int, root: Path, path: str, names: tuple[str, str]) -> MemoryGroup:
    # In a container the path may be the host's, and the mount already the group itself.
    own = root / path.lstrip("/")
    folder = own if own.is_dir() and root.resolve() in own.resolve().parents else root
    best: MemoryGroup | None = None
    while True:
        limit, usage = _number(folder / names[0]), _number(folder / names[1])
        if limit is not None and limit >= _UNLIMITED:
            limit = None
        name = "/" if folder == root else f"/{folder.relative_to(root)}"
        group = MemoryGroup(version, name, limit, usage)
        if best is None or (limit is not None and (best.limit is None or limit < best.limit)):
            best = group
        if folder == root:
            return best
        folder = folder.parent


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", and where there is no such file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
