"""The memory limit of the control group that this process runs in (Linux, versions 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterator
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


@dataclass(frozen=True)
class Headroom:
    """limit: bytes of a group; free: of them not in use, or in use by what can be reclaimed."""

    limit: int
    free: int


_PROC, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_group(proc: Path = _PROC, mount: Path = _MOUNT) -> MemoryGroup | None:
    """The group of this process, None where there are no control groups."""
    best: MemoryGroup | None = None
    for group, _ in _groups(proc, mount):
        if best is None or (
            group.limit is not None and (best.limit is None or group.limit < best.limit)
        ):
            best = group
    return best


def memory_headroom(proc: Path = _PROC, mount: Path = _MOUNT) -> Headroom | None:
    """What the tightest of the groups leaves, None where none of them has a limit."""
    best: Headroom | None = None
    for group, folder in _groups(proc, mount):
        if group.limit is None:
            continue
        used = max(0, (group.usage or 0) - _reclaimable(folder / "memory.stat", group.version))
        free = max(0, group.limit - used)
        if best is None or free < best.free:
            best = Headroom(group.limit, free)
    return best


def _reclaimable(stat: Path, version: int) -> int:
    """Bytes of a group that the kernel takes back before it kills: page cache, above all."""
    names = {"active_file", "inactive_file", "slab_reclaimable"}
    if version == 1:  # its plain names leave the groups below out
        names = {"total_active_file", "total_inactive_file"}
    try:
        rows = [line.split() for line in stat.read_text().splitlines()]
        return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in names)
    except (OSError, ValueError):
        return 0


def _groups(proc: Path, mount: Path) -> Iterator[tuple[MemoryGroup, Path]]:
    """The group of this process and those above it, each with its folder."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    unified = None
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            yield from _upwards(1, mount / "memory", path, names)
            return
        if not controllers:
            unified = path
    if unified is None:
        return
    root = mount / "unified" if (mount / "unified").is_dir() else mount
    yield from _upwards(2, root, unified, ("memory.max", "memory.current"))


def _upwards(
    version: int, root: Path, path: str, names: tuple[str, str]
) -> Iterator[tuple[MemoryGroup, Path]]:
    # In a container the path may be the host's, and the mount already the group itself.
    own = root / path.lstrip("/")
    folder = own if own.is_dir() and root.resolve() in own.resolve().parents else root
    while True:
        limit, usage = _number(folder / names[0]), _number(folder / names[1])
        if limit is not None and limit >= _UNLIMITED:
            limit = None
        name = "/" if folder == root else f"/{folder.relative_to(root)}"
        yield MemoryGroup(version, name, limit, usage), folder
        if folder == root:
            return
        folder = folder.parent


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", and where there is no such file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
