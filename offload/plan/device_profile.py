"""Device profiles: measured speeds of a device as a versioned JSON object, which the planner reads.

Rates are per second, sizes are bytes; an operation is a multiplication or an addition (a
multiply-add is two).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal, TypedDict

from ...runtime.base.arguments import shown
from ...runtime.base.errors import OptionError
from ...runtime.files.json_text import parse
from ...runtime.files.output_file import check_output
from ...runtime.files.whole_file import read_whole_text

VERSION = 1


class MemoryRead(TypedDict):
    """A measurement of reading memory that no cache holds."""

    threads: int
    bytes_s: float


class Peak(TypedDict):
    """A measurement of arithmetic on registers."""

    kind: Literal["int8", "float32"]
    isa: str
    threads: int
    ops_s: float


class FormatSpeed(TypedDict):
    """Speeds of a matrix in a weight format on one ISA and thread, its block layout included."""

    format: str
    isa: str
    row_weights_s: float  # one token: weights a second, the matrix in memory
    tile_ops_s: float  # a prompt of 512 tokens


class StorageSpread(TypedDict, total=False):
    """The optional keys of a StorageRead."""

    range: list[float]  # the slowest and the fastest of the rounds, bytes a second


class StorageRead(StorageSpread):
    """Reads at random, aligned offsets of a file that is not in memory; medians of short rounds.

    "mapped" copies for the first time out of a fresh map, with the system's own read-ahead.
    """

    mode: Literal["direct", "buffered", "mapped"]
    block: int
    depth: int  # reads in flight at a time
    bytes_s: float


class ProfileExtras(TypedDict, total=False):
    """The optional keys of a DeviceProfile."""

    noise: dict[str, Any]  # noise during the measurement: NoiseWatch.finish
    seconds: float  # duration of the probe


class DeviceProfile(ProfileExtras):
    """A device; values that the system does not tell are `None`."""

    kind: Literal["profile"]
    version: int
    id: str  # the hardware's, see device_id
    name: str  # for display: "AMD EPYC, 2 cores, 24 GB"
    time: str  # ISO 8601, UTC
    quick: bool
    stoker: str
    platform: dict[str, Any]  # system, release, machine, python, virtual, product
    cpu: dict[str, Any]  # model, logical, physical, performance, quota, kinds, caches: probe_cpu
    isa: dict[str, Any]  # active, usable
    # Its keys are total, available, limit (of the cgroup), swap, page; optionally fresh_bytes_s
    # (fresh_memory.py).
    memory: dict[str, Any]
    memory_reads: list[MemoryRead]
    peaks: list[Peak]
    formats: list[FormatSpeed]
    # Its keys are path, filesystem, device, ... of probe_storage.about; scratch (bytes measured
    # on), direct (whether the file system supports it), error (why reads are missing).
    storage: dict[str, Any]
    storage_reads: list[StorageRead]  # empty if storage["error"] says why
    power: dict[str, Any]  # battery, temperatures, energy (its source), ...: probe_power


def device_id(cpu: str, cores: int, memory: int, isa: str) -> str:
    """Returns 12 hex digits that stay the same from probe to probe of a machine.

    memory: bytes; rounded to a GB, since the amount that systems report changes with their version.
    """
    text = f"{cpu}|{cores}|{round(memory / 1e9)}|{isa}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def current_id() -> str:
    """Returns device_id of this machine. Raises ImportError if the core cannot be loaded."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    from ...runtime._core import cpu, isas

    found = cpu()
    best = [name for name, usable in isas() if usable][-1]
    return device_id(found["model"], found["physical"], psutil.virtual_memory().total, best)


def default_path() -> Path:
    """Returns where `stoker probe` saves this machine's profile and the planner looks for it.

    It is device.json in STOKER_CACHE, else in stoker/ of the user's cache (XDG_CACHE_HOME,
    ~/.cache; %LOCALAPPDATA% on Windows).
    """
    if cache := os.environ.get("STOKER_CACHE"):
        return Path(cache).expanduser() / "device.json"
    base = os.environ.get("XDG_CACHE_HOME")
    if not base and sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "stoker" / "device.json"


def load(path: Path) -> DeviceProfile:
    """Reads a profile. Raises OptionError if it is none, or of another version."""
    try:
        profile = parse(read_whole_text(path))
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise OptionError(f"{path}: expected a device profile (JSON)") from None
    return check(profile, str(path))


def check(profile: Any, where: str) -> DeviceProfile:
    """Returns the object itself if it is a profile. Raises OptionError beginning with `where`."""
    if not isinstance(profile, dict) or profile.get("kind") != "profile":
        raise OptionError(f"{where}: expected a device profile, as `stoker probe` writes it")
    if profile.get("version") != VERSION:
        found = profile.get("version")
        raise OptionError(f"{where}: expected version {VERSION} of a device profile, found {found}")
    missing = sorted(DeviceProfile.__required_keys__ - profile.keys())
    if missing:
        raise OptionError(f"{where}: the device profile lacks {', '.join(missing)}")
    for key in ("platform", "cpu", "isa", "memory", "storage", "power"):
        if not isinstance(profile[key], dict):
            raise OptionError(f"{where}: expected an object as {key} of a device profile")
    for key, facts in _FACTS.items():
        for fact in facts:
            value = profile[key].get(fact)
            if value is not None and not _is_amount(value, 0, _MOST):
                raise OptionError(
                    f"{where}: {key}.{fact} of the device profile: expected a number from 0 on, "
                    f"found {shown(value)}"
                )
    for name, word in (("id", profile["id"]), ("isa.active", profile["isa"].get("active", ""))):
        if not isinstance(word, str):
            raise OptionError(f"{where}: expected a word as {name} of a device profile")
    for key, row in _ROWS.items():
        if not isinstance(profile[key], list):
            raise OptionError(f"{where}: expected a list as {key} of a device profile")
        for i, found in enumerate(profile[key]):
            if problem := _row_problem(row, found):
                raise OptionError(f"{where}: {key}[{i}] of the device profile: {problem}")
    return profile  # type: ignore[return-value]


_ROWS: dict[str, Any] = {
    "memory_reads": MemoryRead,
    "peaks": Peak,
    "formats": FormatSpeed,
    "storage_reads": StorageRead,
}
# Forecasts use these facts if the system told them.
_FACTS = {
    "cpu": ("logical", "physical", "performance"),
    "memory": ("total", "available", "limit", "fresh_bytes_s"),
}
_MOST = 1e18  # bytes, or operations a second: far beyond any device
_COUNTS = ("threads", "block", "depth")
_RATES = ("bytes_s", "ops_s", "row_weights_s", "tile_ops_s")


def _row_problem(row: Any, found: Any) -> str | None:
    if not isinstance(found, dict):
        return "expected an object"
    for key in sorted(row.__required_keys__):
        value = found.get(key)
        if key in _COUNTS:
            good = isinstance(value, int) and _is_amount(value, 1, _MOST)
            expected = "a positive whole number"
        elif key in _RATES:
            good, expected = _is_amount(value, 1, _MOST), "a positive number"
        else:
            good, expected = isinstance(value, str), "a word"
        if not good:
            return f"{key}: expected {expected}, found {shown(value)}"
    return None


def _is_amount(value: object, low: float, high: float) -> bool:
    """Returns whether a value of JSON is a number of low to high."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def save(profile: DeviceProfile, path: Path) -> None:
    """Writes a profile, which appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(profile, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
