"""Facts about the processor: core kinds, caches, and whether it is a virtual one."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_ROOT = Path("/")
# MIDR_EL1: implementer, part -> name (the vendors' reference manuals).
_ARM_PARTS = {
    0x41: {
        0xD03: "Cortex-A53",
        0xD04: "Cortex-A35",
        0xD05: "Cortex-A55",
        0xD06: "Cortex-A65",
        0xD07: "Cortex-A57",
        0xD08: "Cortex-A72",
        0xD09: "Cortex-A73",
        0xD0A: "Cortex-A75",
        0xD0B: "Cortex-A76",
        0xD0C: "Neoverse-N1",
        0xD0D: "Cortex-A77",
        0xD0E: "Cortex-A76AE",
        0xD40: "Neoverse-V1",
        0xD41: "Cortex-A78",
        0xD42: "Cortex-A78AE",
        0xD44: "Cortex-X1",
        0xD46: "Cortex-A510",
        0xD47: "Cortex-A710",
        0xD48: "Cortex-X2",
        0xD49: "Neoverse-N2",
        0xD4B: "Cortex-A78C",
        0xD4C: "Cortex-X1C",
        0xD4D: "Cortex-A715",
        0xD4E: "Cortex-X3",
        0xD4F: "Neoverse-V2",
        0xD80: "Cortex-A520",
        0xD81: "Cortex-A720",
        0xD82: "Cortex-X4",
        0xD84: "Neoverse-V3",
        0xD85: "Cortex-X925",
        0xD87: "Cortex-A725",
        0xD8E: "Neoverse-N3",
    },
    0x51: {
        0x001: "Oryon",
        0x800: "Kryo 2xx Gold",
        0x801: "Kryo 2xx Silver",
        0x802: "Kryo 3xx Gold",
        0x803: "Kryo 3xx Silver",
        0x804: "Kryo 4xx Gold",
        0x805: "Kryo 4xx Silver",
    },
}


def text(path: Path) -> str | None:
    """The file's text without its last newline (or NUL); None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rstrip("\n\0 ")
    except OSError:
        return None


def number(path: Path) -> int | None:
    """The number in a file; None if there is none."""
    try:
        return int(text(path) or "")
    except ValueError:
        return None


def cpu_set(listed: str) -> list[int]:
    """The kernel's list of CPUs, "0-3,8": [0, 1, 2, 3, 8]. Empty if it is malformed."""
    found: list[int] = []
    for part in listed.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            return []
        found += range(int(first), int(last or first) + 1)
    return found


def cpu_list(cpus: Iterable[int]) -> str:
    """The inverse of cpu_set: [0, 1, 2, 3, 8] -> "0-3,8"."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def core_kinds(root: Path = _ROOT) -> list[dict[str, Any]]:
    """Kinds of cores, the fastest first; empty if the system does not tell.

    Each: cpus ("0-3"), cores (CPUs of one core count once), capacity (of 1024; None if all are
    alike), max_hz (None if unknown), name (of the design, if known).
    """
    folder = root / "sys/devices/system/cpu"
    online = cpu_set(text(folder / "online") or "")
    parts = _parts(root)
    intel = {
        kind: set(cpu_set(text(root / f"sys/devices/{kind}/cpus") or ""))
        for kind in ("cpu_core", "cpu_atom")
    }
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cpu in online:
        own = folder / f"cpu{cpu}"
        capacity = number(own / "cpu_capacity")
        khz = number(own / "cpufreq/cpuinfo_max_freq")
        name = parts.get(cpu) or next((k for k, cpus in intel.items() if cpu in cpus), None)
        # Cores of one kind differ by some percent in peak clock on desktops.
        clock = None if khz is None else round(khz / 1e5)
        key = (capacity, None if name in intel else clock, name)
        kind = kinds.setdefault(
            key, {"cpus": [], "cores": set(), "capacity": capacity, "max_hz": None, "name": name}
        )
        kind["cpus"].append(cpu)
        kind["cores"].add(text(own / "topology/thread_siblings_list") or str(cpu))
        kind["max_hz"] = max(kind["max_hz"] or 0, (khz or 0) * 1000) or None
    found = [
        kind | {"cpus": cpu_list(kind["cpus"]), "cores": len(kind["cores"])}
        for kind in kinds.values()
    ]
    return sorted(
        found, key=lambda k: (k["capacity"] or 0, k["name"] != "cpu_atom", k["max_hz"] or 0)
    )[::-1]


def _parts(root: Path) -> dict[int, str]:
    """CPU -> name of its ARM design."""
    found: dict[int, str] = {}
    cpu, implementer = -1, 0
    for line in (text(root / "proc/cpuinfo") or "").splitlines():
        field, _, value = (part.strip() for part in line.partition(":"))
        try:
            if field == "processor":
                cpu = int(value)
            elif field == "CPU implementer":
                implementer = int(value, 0)
            elif field == "CPU part":
                names = _ARM_PARTS.get(implementer, {})
                found[cpu] = names.get(
                    int(value, 0), f"ARM {implementer:#04x}:{int(value, 0):#05x}"
                )
        except ValueError:
            continue
    return found


def caches(root: Path = _ROOT) -> list[dict[str, Any]]:
    """Data caches, the nearest first; empty if the system does not tell.

    Each: level, bytes (of one), count (how many of these there are), shared (CPUs that share one),
    line (bytes of a line, None if unknown).
    """
    seen: dict[tuple[int, str], tuple[int, int | None]] = {}  # (level, CPUs) -> bytes, line
    for index in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        level, nbytes = number(index / "level"), _nbytes(text(index / "size") or "")
        shared = text(index / "shared_cpu_list")
        if level is None or nbytes is None or not shared:
            continue
        if text(index / "type") == "Instruction":
            continue
        seen[level, shared] = (nbytes, number(index / "coherency_line_size"))
    groups: dict[tuple[int, int, int], dict[str, Any]] = {}
    for (level, shared), (nbytes, line) in seen.items():
        cpus = len(cpu_set(shared))
        row = {"level": level, "bytes": nbytes, "count": 0, "shared": cpus, "line": line}
        groups.setdefault((level, -nbytes, cpus), row)["count"] += 1
    return [groups[key] for key in sorted(groups)]


def _nbytes(size: str) -> int | None:
    """The kernel's "512K" in bytes."""
    found = re.fullmatch(r"(\d+)([KMG]?)", size)
    if found is None:
        return None
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]


def model_name(told: str, kinds: list[dict[str, Any]], root: Path = _ROOT) -> str:
    """A processor's name for people: the one it reports, else the designs of its cores.

    told: the "model" of _core.cpu(), "aarch64" if the processor reports none. Result, for example:
    "4x Cortex-A78, 4x Cortex-A55".
    """
    if told != "aarch64":
        return told
    names = [f"{k['cores']}x {k['name']}" for k in kinds if k["name"]]
    chip = text(root / "sys/devices/soc0/machine")
    return " ".join([chip, f"({', '.join(names)})"]) if chip and names else ", ".join(names) or told


def product(root: Path = _ROOT) -> str | None:
    """The product name of the device; None if nothing tells."""
    if "ANDROID_ROOT" in os.environ and (names := _android_product()):
        return names
    board = text(root / "proc/device-tree/model")
    if board:
        return board
    folder = root / "sys/class/dmi/id"
    words = [text(folder / "sys_vendor"), text(folder / "product_name")]
    return " ".join(word for word in words if word) or None


def _android_product() -> str:
    def told(what: str) -> str:
        command = ["getprop", f"ro.product.{what}"]
        return subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=5
        ).stdout.strip()

    try:
        return f"{told('manufacturer')} {told('model')}".strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def virtual(root: Path = _ROOT) -> bool | None:
    """Whether a hypervisor runs below; None if unknown."""
    if text(root / "sys/hypervisor/type"):
        return True
    for line in (text(root / "proc/cpuinfo") or "").splitlines():
        field, _, value = line.partition(":")
        if field.strip() == "flags":
            return "hypervisor" in value.split()
    return None


def about_platform(root: Path = _ROOT) -> dict[str, Any]:
    """system, release, machine, python, virtual, product: the DeviceProfile's platform."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "virtual": virtual(root),
        "product": product(root),
    }
