"""`stoker doctor`: shows this machine's instruction sets, cores, memory, limits and storage."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.cgroup import memory_group
from ..base.errors import DeviceError
from ..terminal.options import (
    Json,
)

_BLOCK = 1 << 20  # bytes of one read
_READERS = 4
_SECONDS = 0.5
_SCRATCH_BYTES = 64 << 20  # bytes written for the measurement if there is no model yet


def doctor(
    *,
    as_json: Json = False,
    storage: Annotated[bool, typer.Option(help="Measure the storage (half a second).")] = True,
) -> None:
    """Show what this machine offers.

    Instruction sets, cores, memory and its limit, storage.

    \b
    stoker doctor
    stoker doctor --no-storage --json
    """
    from ...models import cache

    found = examine(cache.directory(), storage=storage)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    rows = lines(found)
    width = max(len(what) for what, _ in rows)
    for what, finding in rows:
        typer.echo(f"{what:{width}}  {finding}")


def examine(cache: Path, *, storage: bool = True) -> dict[str, Any]:
    """Returns all findings for JSON. cache: the folder of models; storage: measure its reads."""
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
    from ... import __version__

    return __version__


def _core() -> dict[str, Any]:
    try:
        from .._core import active_isa, cpu, isas
    except ImportError as error:
        return {"core": f"cannot be loaded: {error}", "isa": [], "cpu": {}}
    active = active_isa()
    found = [{"name": name, "usable": usable, "active": name == active} for name, usable in isas()]
    return {"core": "ok", "isa": found, "cpu": cpu()}


def _memory() -> dict[str, int] | None:
    """Returns memory sizes in bytes; None if the system does not tell, as without /proc."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    try:
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    except (OSError, NotImplementedError):
        return None
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
    from ...mobile_bench.probe.storage import existing

    folder = existing(cache)
    found: dict[str, Any] = {"cache": str(cache), "free": shutil.disk_usage(folder).free}
    if measure:
        try:
            found |= read_bandwidth(folder)
        except (DeviceError, ImportError, OSError) as error:
            found["error"] = f"the storage could not be measured: {error}"
    return found


def read_bandwidth(folder: Path) -> dict[str, Any]:
    """Measures read bandwidth of the storage under `folder`, past the page cache if that works.

    It reads random blocks of 1 MiB, four at a time, of the largest model file there (or of a
    scratch file); `stoker probe` measures more. Returns read_mb_s (10^6 bytes a second, None if all
    of the file was in memory), direct, probe_bytes. Raises DeviceError, OSError.
    """
    from .._core import StorageFile

    models = sorted(folder.glob("*.gguf"), key=lambda path: path.stat().st_size)
    if models and models[-1].stat().st_size >= _SCRATCH_BYTES:
        file = StorageFile(str(models[-1]))
    else:
        file = StorageFile.scratch(str(folder))
        file.append(_SCRATCH_BYTES)
    found = file.read("direct" if file.direct else "buffered", _BLOCK, _READERS, _SECONDS)
    return {
        "read_mb_s": round(found["bytes"] / found["seconds"] / 1e6, 1) if found["reads"] else None,
        "direct": file.direct,
        "probe_bytes": found["bytes"],
    }


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (name, finding) rows for display."""
    from ..base.display import size

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
    if memory is None:
        rows.append(("memory", "this system does not tell"))
    else:
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
                f"{storage['read_mb_s']:.0f} MB/s ({how}; 1 MiB blocks, {_READERS} at a time; "
                "stoker probe measures more)",
            )
        )
    elif "read_mb_s" in storage:
        rows.append(("storage", "cannot be measured: its files are in memory"))
    return rows
