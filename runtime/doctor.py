"""What this machine offers to stoker: instruction sets, cores, memory, limits, storage."""

from __future__ import annotations

import mmap
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from .cgroup import memory_group

_BLOCK = 1 << 20  # bytes of one read
_READERS = 4
_PROBE_BYTES = 256 << 20  # read of an existing model file at most
_SCRATCH_BYTES = 64 << 20  # written for the probe where there is no model yet


def examine(cache: Path, *, storage: bool = True) -> dict[str, Any]:
    """All findings, ready for JSON. cache: where models are kept; storage: measure its reads."""
    return {
        "stoker": _version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_core(),
        "memory": _memory(),
        "cgroup": _cgroup(),
        "storage": _storage(cache, storage),
    }


def _version() -> str:
    from .. import __version__

    return __version__


def _core() -> dict[str, Any]:
    try:
        from ._core import active_isa, cpu, isas
    except ImportError as error:
        return {"core": f"cannot be loaded: {error}", "isa": [], "cpu": {}}
    active = active_isa()
    found = [{"name": name, "usable": usable, "active": name == active} for name, usable in isas()]
    return {"core": "ok", "isa": found, "cpu": cpu()}


def _memory() -> dict[str, int]:
    import psutil  # type: ignore[import-untyped, unused-ignore]

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {
        "total": memory.total,
        "available": memory.available,
        "swap_total": swap.total,
        "swap_used": swap.used,
    }


def _cgroup() -> dict[str, Any] | None:
    group = memory_group()
    if group is None:
        return None
    return {
        "version": group.version,
        "path": group.path,
        "limit": group.limit,
        "usage": group.usage,
    }


def _storage(cache: Path, measure: bool) -> dict[str, Any]:
    import shutil

    existing = cache
    while not existing.exists():
        existing = existing.parent
    found: dict[str, Any] = {"cache": str(cache), "free": shutil.disk_usage(existing).free}
    if measure:
        try:
            found |= read_bandwidth(existing)
        except OSError as error:
            found["error"] = f"the storage could not be measured: {error.strerror or error}"
    return found


def read_bandwidth(folder: Path) -> dict[str, Any]:
    """Steady read bandwidth of the storage under `folder`, past the page cache where that works.

    Reads the largest model file there (or a scratch file) twice with four readers of 1 MiB blocks
    and reports the second pass: on virtual disks the first warms a cache of the host.
    Returns read_mb_s (10^6 bytes a second, None where it cannot be measured), first_read_mb_s,
    direct, probe_bytes. Raises OSError.
    """
    models = sorted(folder.glob("*.gguf"), key=lambda path: path.stat().st_size)
    if models and models[-1].stat().st_size >= _SCRATCH_BYTES:
        return _measure(models[-1])
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".stoker-probe-") as scratch:
        block = os.urandom(_BLOCK)
        for _ in range(_SCRATCH_BYTES // _BLOCK):
            scratch.write(block)
        scratch.flush()
        os.fsync(scratch.fileno())
        return _measure(Path(scratch.name))


def _measure(path: Path) -> dict[str, Any]:
    total = min(path.stat().st_size, _PROBE_BYTES) // _BLOCK * _BLOCK
    descriptor, direct = _open_direct(path)
    if descriptor is None:
        return {"read_mb_s": None, "first_read_mb_s": None, "direct": False, "probe_bytes": 0}
    try:
        speeds = [total / _read_all(descriptor, total, direct) / 1e6 for _ in range(2)]
    finally:
        os.close(descriptor)
    return {
        "read_mb_s": round(speeds[1], 1),
        "first_read_mb_s": round(speeds[0], 1),
        "direct": direct,
        "probe_bytes": total,
    }


def _open_direct(path: Path) -> tuple[int | None, bool]:
    """A descriptor whose reads go past the page cache, and whether they really do."""
    if sys.platform == "win32":
        return None, False  # needs FILE_FLAG_NO_BUFFERING, which os.open does not offer
    if sys.platform == "darwin":
        import fcntl

        descriptor = os.open(path, os.O_RDONLY)
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        return descriptor, True
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.preadv(descriptor, [mmap.mmap(-1, _BLOCK)], 0)
    except OSError:  # a filesystem without direct reads (tmpfs, some FUSE)
        return os.open(path, os.O_RDONLY), False
    return descriptor, True


def _read_all(descriptor: int, total: int, direct: bool) -> float:
    """Seconds to read `total` bytes from the beginning with several readers."""
    if not direct and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    failures: list[OSError] = []

    def read(first: int) -> None:
        buffer = mmap.mmap(-1, _BLOCK)  # page-aligned, as direct reads need it
        try:
            for offset in range(first * _BLOCK, total, _READERS * _BLOCK):
                if os.preadv(descriptor, [buffer], offset) != _BLOCK:
                    raise OSError(f"short read at byte {offset}")
        except OSError as error:
            failures.append(error)

    readers = [threading.Thread(target=read, args=(i,)) for i in range(_READERS)]
    begin = time.perf_counter()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - begin


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, finding) rows for people."""
    from .terminal import size

    rows = [
        ("stoker", f"{found['stoker']} on Python {found['python']}, {found['platform']}"),
        ("core", found["core"]),
    ]
    cpu = found["cpu"]
    if cpu:
        rows.append(("CPU", cpu["model"] or "unknown"))
        rows.append(
            (
                "cores",
                f"{cpu['performance']} performance of {cpu['physical']} physical, "
                f"{cpu['logical']} logical",
            )
        )
    if found["isa"]:
        marks = {(True, True): "active", (True, False): "usable", (False, False): "not here"}
        names = [f"{i['name']} ({marks[i['usable'], i['active']]})" for i in found["isa"]]
        rows.append(("instruction sets", ", ".join(names)))
    memory = found["memory"]
    swap = f", swap {size(memory['swap_total'])}" if memory["swap_total"] else ", no swap"
    rows.append(
        ("memory", f"{size(memory['available'])} available of {size(memory['total'])}{swap}")
    )
    group = found["cgroup"]
    if group is None:
        rows.append(("memory limit", "no control groups here"))
    else:
        limit = "no limit" if group["limit"] is None else f"limit {size(group['limit'])}"
        usage = "" if group["usage"] is None else f", {size(group['usage'])} used"
        rows.append(
            ("memory limit", f"{limit}{usage} (cgroup v{group['version']} {group['path']})")
        )
    storage = found["storage"]
    rows.append(("model cache", f"{storage['cache']}, {size(storage['free'])} free"))
    if "error" in storage:
        rows.append(("storage", storage["error"]))
    elif storage.get("read_mb_s") is not None:
        how = "direct" if storage["direct"] else "buffered: direct reads are refused here"
        rows.append(
            (
                "storage",
                f"{storage['read_mb_s']:.0f} MB/s ({how}; 1 MiB blocks, second pass; "
                f"first pass {storage['first_read_mb_s']:.0f} MB/s)",
            )
        )
    elif "read_mb_s" in storage:
        rows.append(("storage", "cannot be measured on this system"))
    return rows
