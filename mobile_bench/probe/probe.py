"""The probe: measures what this device can do, in under a minute, into a DeviceProfile."""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...offload.plan.device_profile import (
    VERSION,
    DeviceProfile,
    FormatSpeed,
    MemoryRead,
    Peak,
    device_id,
)
from . import storage as probe_storage
from .cpu import about_platform, caches, core_kinds, model_name
from .noise import NoiseWatch
from .power import power

if TYPE_CHECKING:
    from ...runtime.base.progress import Progress

# Formats that models come in; `stoker bench-kernels` measures the others.
FORMATS = ("Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")
_LEAST_MEMORY = 256 << 20  # bytes, at least four times any of today's caches
_MOST_MEMORY = 1 << 30
_COLS = 2048  # columns of the matrices; a multiple of every block
_TILE_ROWS = 512
_PROMPT = 512  # tokens


def probe(
    folder: Path | None = None, *, quick: bool = False, progress: Progress | None = None
) -> DeviceProfile:
    """Measures this machine in under 60 seconds; quick: in under 10, coarser.

    folder: where the storage is measured (the model cache if None), with a scratch file that is
    always removed. What cannot be measured is left out, and storage["error"] says why. Raises
    OptionError if `folder` is no folder, ImportError without the core.
    """
    import psutil  # type: ignore[import-untyped, unused-ignore]

    from ... import __version__
    from ...models import cache
    from ...runtime._core import active_isa, cpu, isas
    from ...runtime.base.cgroup import memory_group
    from ...runtime.base.errors import OptionError

    if folder is not None and not folder.is_dir():
        raise OptionError(f"{folder}: expected a folder to measure the storage of")
    begin, started = datetime.now(timezone.utc), time.monotonic()
    watch = NoiseWatch()
    told, kinds = cpu(), core_kinds()
    usable = [name for name, executes in isas() if executes]
    memory = psutil.virtual_memory()
    group = memory_group()
    limit = None if group is None else group.limit
    model = model_name(told["model"], kinds)
    counts = thread_counts(told["physical"], told["performance"], told["quota"], quick=quick)
    held = caches()
    room = min(memory.available, limit or memory.available) // 8
    memory_reads = read_memory(counts, memory_bytes(held, room), progress)
    peaks = measure_peaks(usable, counts, progress)
    formats = measure_formats(active_isa(), memory_bytes(held, room) // 4, quick, progress)
    storage, storage_reads = probe_storage.measure(
        folder or cache.directory(),
        probe_storage.QUICK if quick else probe_storage.FULL,
        progress,
    )
    return {
        "kind": "profile",
        "version": VERSION,
        "id": device_id(told["model"], told["physical"], memory.total, usable[-1]),
        "name": f"{model}, {told['physical']} cores, {round(memory.total / 1e9)} GB",
        "time": begin.isoformat(timespec="seconds"),
        "quick": quick,
        "stoker": __version__,
        "platform": about_platform(),
        "cpu": {
            "model": model,
            "logical": told["logical"],
            "physical": told["physical"],
            "performance": told["performance"],
            "quota": told["quota"] or None,
            "kinds": kinds,
            "caches": held,
        },
        "isa": {"active": active_isa(), "usable": usable},
        "memory": {
            "total": memory.total,
            "available": memory.available,
            "limit": limit,
            "swap": psutil.swap_memory().total,
            "page": mmap.PAGESIZE,
        },
        "memory_reads": memory_reads,
        "peaks": peaks,
        "formats": formats,
        "storage": storage,
        "storage_reads": storage_reads,
        # Read at the end, when the device is as warm as it got.
        "power": power(),
        "noise": watch.finish(),
        "seconds": round(time.monotonic() - started, 1),
    }


def thread_counts(physical: int, performance: int, quota: int, *, quick: bool = False) -> list[int]:
    """Thread counts to measure with: 1 to 8, then powers of 2 up to the physical cores.

    quota: CPUs that the control group grants, 0: all. quick: only 1, the performance cores, all.
    """
    most = min(physical, quota) if quota > 0 else physical
    found = {1, min(performance, most), most}
    if not quick:
        found |= set(range(1, min(most, 8) + 1))
        found |= {1 << i for i in range(most.bit_length()) if 1 << i <= most}
    return sorted(found)


def memory_bytes(held: Sequence[dict[str, Any]], room: int) -> int:
    """Bytes to read: more than the caches hold, as far as `room` allows."""
    last = max((c["bytes"] * c["count"] for c in held), default=0)
    return max(1 << 20, min(max(_LEAST_MEMORY, 4 * last), _MOST_MEMORY, room))


def read_memory(
    counts: Sequence[int], nbytes: int, progress: Progress | None = None
) -> list[MemoryRead]:
    """Memory read bandwidth for each number of threads."""
    from ...runtime._core import read_bandwidth

    found: list[MemoryRead] = []
    for i, threads in enumerate(counts):
        if progress is not None:
            progress("memory", i, len(counts))
        found.append({"threads": threads, "bytes_s": read_bandwidth(threads, nbytes)})
    if progress is not None:
        progress("memory", len(counts), len(counts))
    return found


def measure_peaks(
    usable: Sequence[str], counts: Sequence[int], progress: Progress | None = None
) -> list[Peak]:
    """int8 and float32 peaks of every usable ISA on one thread and on all."""
    from ...runtime._core import float32_peak, int8_peak

    kinds: tuple[Literal["int8", "float32"], ...] = ("int8", "float32")
    jobs = [
        (isa, threads, kind)
        for isa in usable
        for threads in sorted({counts[0], counts[-1]})
        for kind in kinds
    ]
    found: list[Peak] = []
    for i, (isa, threads, kind) in enumerate(jobs):
        if progress is not None:
            progress("arithmetic", i, len(jobs))
        ops = int8_peak(isa, threads) if kind == "int8" else float32_peak(isa, threads)
        found.append({"kind": kind, "isa": isa, "threads": threads, "ops_s": ops})
    if progress is not None:
        progress("arithmetic", len(jobs), len(jobs))
    return found


def measure_formats(
    isa: str, nbytes: int, quick: bool = False, progress: Progress | None = None
) -> list[FormatSpeed]:
    """Kernel speeds on one thread: for one token (a matrix of about nbytes) and for a prompt."""
    from ...runtime._core import formats, kernel_speed

    known = {row["name"]: row for row in formats()}
    found: list[FormatSpeed] = []
    for i, name in enumerate(FORMATS):
        if progress is not None:
            progress("kernels", i, len(FORMATS))
        row_bytes = _COLS // known[name]["block"] * known[name]["bytes"]
        rows = max(64, nbytes // row_bytes // 64 * 64)
        seconds = 0.06 if quick else 0.25
        row = kernel_speed(name, isa, rows, _COLS, 1, seconds=seconds)
        tile = kernel_speed(name, isa, _TILE_ROWS, _COLS, _PROMPT, seconds=seconds)
        found.append(
            {
                "format": name,
                "isa": isa,
                "row_weights_s": rows * _COLS / row,
                "tile_ops_s": 2 * _TILE_ROWS * _COLS * _PROMPT / tile,
            }
        )
    if progress is not None:
        progress("kernels", len(FORMATS), len(FORMATS))
    return found
