"""Storage: how fast random blocks are read, by block size, depth and way of reading."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...offload.plan.device_profile import StorageRead
from ...runtime.base.display import size
from ...runtime.base.errors import DeviceError
from .cpu import number, text

if TYPE_CHECKING:
    from ...runtime._core import StorageFile
    from ...runtime.base.progress import Progress

MODES = ("direct", "buffered", "mapped")
_PIECE = 16 << 20  # bytes of the scratch file between two looks at the clock
_LEAST = 64 << 20  # bytes of the smallest scratch file worth measuring
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_ROOT = Path("/")


@dataclass(frozen=True)
class Effort:
    """How long to measure. scratch: bytes of the file; write_s: the longest to write it.

    Each point is measured `rounds` times for slice_s; none is begun after total_s.
    """

    scratch: int
    write_s: float
    blocks: tuple[int, ...]
    depths: tuple[int, ...]
    rounds: int
    slice_s: float
    total_s: float


FULL = Effort(
    scratch=1 << 30,
    write_s=10,
    blocks=(4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20),
    depths=(1, 4, 16),
    rounds=3,
    slice_s=0.1,
    total_s=28,
)
QUICK = Effort(
    scratch=256 << 20,
    write_s=1.5,
    blocks=(4 << 10, 64 << 10, 1 << 20),
    depths=(1, 4, 16),
    rounds=1,
    slice_s=0.05,
    total_s=2.5,
)


def existing(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    folder = folder.expanduser().absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def about(folder: Path, root: Path = _ROOT) -> dict[str, Any]:
    """The file system of an existing folder and its device; None if unknown.

    path, filesystem, mount, free (bytes), device, model, rotational, read_ahead (bytes).
    """
    found: dict[str, Any] = {
        "path": str(folder),
        "filesystem": None,
        "mount": None,
        "free": shutil.disk_usage(folder).free,
        "device": None,
        "model": None,
        "rotational": None,
        "read_ahead": None,
    }
    status = folder.stat()
    if not hasattr(os, "major"):  # Windows
        return found
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    # id parent device root mount options [tags] - filesystem source options: proc(5)
    for line in (text(root / "proc/self/mountinfo") or "").splitlines():
        fields = line.split()
        if len(fields) < 10 or fields[2] != device or "-" not in fields:
            continue
        mount = Path(_unescaped(fields[4]))
        # If the device has several mounts, take the innermost one that contains the folder.
        if folder.is_relative_to(mount) and len(str(mount)) >= len(found["mount"] or ""):
            rest = fields[fields.index("-") + 1 :]
            found |= {"mount": str(mount), "filesystem": rest[0], "device": rest[1]}
    block = root / "sys/dev/block" / device
    for queue in (block / "queue", block / ".." / "queue"):  # a disk's, a partition's disk's
        if number(queue / "rotational") is not None:
            found["rotational"] = number(queue / "rotational") == 1
            kilobytes = number(queue / "read_ahead_kb")
            found["read_ahead"] = None if kilobytes is None else kilobytes << 10
            found["model"] = text(queue.parent / "device" / "model")
            break
    return found


def _unescaped(field: str) -> str:
    """A path of mountinfo, whose spaces are written as \\040."""
    return field.encode().decode("unicode_escape") if "\\" in field else field


def measure(
    folder: Path,
    effort: Effort,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, Any], list[StorageRead]]:
    """The DeviceProfile's storage and storage_reads, measured on a scratch file.

    The file is in `folder` or its nearest existing parent, and has no name: its space is free again
    however this ends. If it fails, storage["error"] says why and there are no reads.
    """
    folder = existing(folder)
    try:
        found = about(folder)
    except OSError as error:
        return {"path": str(folder), "error": f"{folder}: {error.strerror or error}"}, []
    try:
        if found["filesystem"] in _IN_MEMORY:
            raise DeviceError(
                f"{folder}: expected a folder on storage, found {found['filesystem']}, which is "
                "memory; --path names another"
            )
        file = scratch(folder, effort, progress, clock)
    except DeviceError as error:
        return found | {"error": str(error)}, []
    found |= {"scratch": file.nbytes, "direct": file.direct}
    reads, errors = _points(file, effort, progress, clock)
    if errors:
        found["error"] = "; ".join(errors)
    return found, reads


def scratch(
    folder: Path,
    effort: Effort,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> StorageFile:
    """A file of pseudo-random bytes in `folder`, without a name.

    It is shorter than effort.scratch if a quarter of the free space or effort.write_s do not
    suffice. Raises DeviceError.
    """
    from ...runtime._core import StorageFile

    free = shutil.disk_usage(folder).free
    total = min(effort.scratch, free // 4) // _PIECE * _PIECE
    if total < _LEAST:
        raise DeviceError(
            f"{folder}: expected {size(4 * _LEAST)} of free space, found {size(free)}"
        )
    file = StorageFile.scratch(str(folder))
    begin = clock()
    while file.nbytes < total:
        if progress is not None:
            progress("scratch file", file.nbytes, total)
        if clock() > begin + effort.write_s and file.nbytes >= _LEAST:
            break
        if clock() > begin + 2 * effort.write_s:
            raise DeviceError(f"{folder}: too slow to measure: {size(file.nbytes)} written")
        file.append(_PIECE)
    if progress is not None:
        progress("scratch file", total, total)
    return file


def _points(
    file: StorageFile, effort: Effort, progress: Progress | None, clock: Callable[[], float]
) -> tuple[list[StorageRead], list[str]]:
    """The reads (medians of the rounds), and messages about what failed."""
    modes = [mode for mode in MODES if mode != "direct" or file.direct]
    errors = [] if file.direct else ["the file system refuses direct I/O"]
    points = [(m, b, d) for m in modes for b in effort.blocks for d in effort.depths]
    speeds: dict[tuple[str, int, int], list[float]] = {point: [] for point in points}
    end = clock() + effort.total_s
    # Measured in rounds, so that a drift of the device spreads over all points.
    for turn in range(effort.rounds):
        for i, (mode, block, depth) in enumerate(points):
            if clock() > end:
                break
            if progress is not None:
                progress("storage", turn * len(points) + i, effort.rounds * len(points))
            try:
                found = file.read(mode, block, depth, effort.slice_s, seed=turn * len(points) + i)
            except DeviceError as error:
                if str(error) not in errors:
                    errors.append(str(error))
                continue
            if found["reads"] > 0:
                speeds[mode, block, depth].append(found["bytes"] / found["seconds"])
    if progress is not None:
        progress("storage", effort.rounds * len(points), effort.rounds * len(points))
    reads = [
        {
            "mode": mode,
            "block": block,
            "depth": depth,
            "bytes_s": statistics.median(of),
            "range": [min(of), max(of)],
        }
        for (mode, block, depth), of in speeds.items()
        if of
    ]
    return cast(list[StorageRead], reads), errors
