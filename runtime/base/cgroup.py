"""The memory limit of the control group that this process runs in (Linux, versions 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # version 1 writes a huge number where there is no limit


@dataclass(frozen=True)
class MemoryGroup:
    """A control group with its memory limit and usage.

    version: 1 or 2; limit: bytes, None where there is none; usage: bytes, None if unknown.
    """

    version: int
    path: str
    limit: int | None
    usage: int | None


@dataclass(frozen=True)
class Headroom:
    """The limit of a group, and how many of these bytes are unused or can be reclaimed (free)."""

    limit: int
    free: int


def memory_group(**files: str) -> MemoryGroup | None:
    """Returns the group with the smallest limit, of this process's own and those above it.

    Without a limit it is the process's own; without control groups it is None.
    files: where to look, as _core.control_groups takes them.
    """
    best: MemoryGroup | None = None
    for group, _ in _groups(files):
        if best is None or (
            group.limit is not None and (best.limit is None or group.limit < best.limit)
        ):
            best = group
    return best


def memory_headroom(**files: str) -> Headroom | None:
    """Returns what the group with the least free bytes leaves; None where none has a limit."""
    best: Headroom | None = None
    for group, folder in _groups(files):
        if group.limit is None:
            continue
        used = max(0, (group.usage or 0) - _reclaimable(folder / "memory.stat", group.version))
        free = max(0, group.limit - used)
        if best is None or free < best.free:
            best = Headroom(group.limit, free)
    return best


def _reclaimable(stat: Path, version: int) -> int:
    """Returns the bytes that the kernel reclaims before it kills: page cache, above all."""
    names = {"active_file", "inactive_file", "slab_reclaimable"}
    if version == 1:  # the names without total_ exclude the groups below
        names = {"total_active_file", "total_inactive_file"}
    try:
        rows = [line.split() for line in stat.read_text().splitlines()]
        return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in names)
    except (OSError, ValueError):
        return 0


def _groups(files: Mapping[str, str]) -> Iterator[tuple[MemoryGroup, Path]]:
    """Yields the group of this process and those above it, each with its folder."""
    try:
        from .._core import control_groups
    except ImportError:  # for `stoker doctor`, which says why the core is missing
        return
    for version, path, folder in control_groups("memory", **files):
        # Above "memory.high" the kernel throttles a process until it hardly runs.
        bounds, used = ["memory.limit_in_bytes"], "memory.usage_in_bytes"
        if version == 2:
            bounds, used = ["memory.max", "memory.high"], "memory.current"
        limits = [_number(Path(folder) / name) for name in bounds]
        limit = min((n for n in limits if n is not None and n < _UNLIMITED), default=None)
        yield MemoryGroup(version, path, limit, _number(Path(folder) / used)), Path(folder)


def _number(path: Path) -> int | None:
    """Returns the number in a file; None for "max", and where there is no such file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
