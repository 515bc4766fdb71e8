"""Memory sizes and budgets: "2GiB", "60%" or "auto" become bytes that this machine can give."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from . import arguments
from .cgroup import memory_headroom
from .errors import OptionError

AUTO = "auto"
# The shares that "auto" leaves to others: of the machine, for the system and other programs; of a
# control group, for page tables and the page cache, which are charged to it as well.
MACHINE_MARGIN = 0.10
GROUP_MARGIN = 0.05
# The assumed resident bytes of a process with the core, where the system does not tell.
_TYPICAL_PROCESS = 128 << 20
# Besides a process's memory, a group is charged for its page tables and the like: at most this
# share of the limit. Only usage beyond that is attributed to other processes.
_OVERHEAD = 0.05

_PAGE = 4096  # bytes; a group's limit is rounded to whole pages

_LOG = logging.getLogger("stoker")

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("b", 1000), ("ib", 1024))
}


def byte_count(text: str) -> int:
    """Returns the bytes that "500MB", "1.5GiB" or "123" name. Raises OptionError."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise OptionError(f"expected bytes such as 500MB or 1.5GiB, found {text[:40]!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def check_memory(value: object) -> int | float | None:
    """Returns what a memory option says: bytes, a share of what is available, or None for auto.

    Raises OptionError.
    """
    if isinstance(value, str):
        value = arguments.text("memory", value)
        text = value.strip().lower()
        if text == AUTO:
            return None
        if text.endswith("%"):
            return _share(value)
        try:
            number = byte_count(text)
        except OptionError:
            raise _refusal(value) from None
    else:
        try:
            number = arguments.integer("memory", value, None, None)
        except OptionError:
            raise _refusal(value) from None
    if number < 1:
        raise OptionError(f"memory must be at least 1 byte, not {arguments.shown(number)}")
    if number >= 1 << 62:
        raise OptionError(f"memory must be below 2^62 bytes, not {arguments.shown(number)}")
    return number


def plain_memory(value: object) -> int | str:
    """Returns the option itself, as a plain integer or string. Raises OptionError."""
    named = check_memory(value)
    if named is None:
        return AUTO
    return arguments.text("memory", value) if isinstance(value, str) else int(named)


def _refusal(value: object) -> OptionError:
    return OptionError(
        f"memory must be bytes, 500MB, 2GiB, 60% or auto, not {arguments.shown(value)}"
    )


def _share(value: str) -> float:
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?)\s*%", value.strip())
    if match is None or not 0 < float(match[1]) <= 100:
        raise OptionError(f"memory must be above 0% and at most 100%, not {value[:40]!r}")
    return float(match[1]) / 100


def budget(value: object) -> int:
    """Returns the bytes that a memory option names on this machine, for the whole process.

    Bytes beyond what the process's control group allows are cut to that, with a warning in the log
    "stoker". Raises OptionError, also where the memory of the machine is unknown.
    """
    named = check_memory(value)
    if isinstance(named, int):
        allowed = _allowed_by_group()
        if allowed is None or named < allowed + _PAGE:
            return named
        _LOG.warning(
            "stoker: memory %s is more than the control group of this process allows: "
            "%d bytes instead of %d",
            value,
            allowed,
            named,
        )
        return allowed
    available = available_memory()
    if available is None:
        raise OptionError(f"memory {value}: this system does not tell what it has; name bytes")
    return int(available if named is None else available * named)


def available_memory() -> int | None:
    """Returns the bytes that this whole process may grow to, less a margin for others.

    They are the smaller of what the system calls available and what the control groups leave (their
    limit less what is in use and cannot be reclaimed: page cache can). What this process holds
    already counts as its own. None where the system tells neither.
    """
    own = anonymous_bytes()
    limits = []
    machine = _machine_available()
    if machine is not None:
        limits.append((machine + own) * (1 - MACHINE_MARGIN))
    headroom = memory_headroom()
    if headroom is not None:
        limits.append(headroom.limit * (1 - GROUP_MARGIN) - (headroom.limit - headroom.free) + own)
    return max(0, int(min(limits))) if limits else None


def _allowed_by_group() -> int | None:
    """Returns the bytes of the tightest control group that no other process holds, or None."""
    headroom = memory_headroom()
    if headroom is None:
        return None
    others = headroom.limit - headroom.free - anonymous_bytes()
    if others <= headroom.limit * _OVERHEAD:
        return headroom.limit
    return max(1, headroom.limit - others)


def _machine_available() -> int | None:
    if sys.platform.startswith("linux"):  # without psutil, whose import takes longer than the rest
        return _kib(Path("/proc/meminfo"), "MemAvailable:")
    try:
        import psutil  # type: ignore[import-untyped, unused-ignore]

        return int(psutil.virtual_memory().available)
    except (ImportError, OSError, NotImplementedError):
        return None


def _kib(path: Path, key: str) -> int | None:
    """Returns the bytes of a "key: number kB" line of a file of /proc."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def process_bytes() -> int:
    """Returns the resident bytes of this process now, with the interpreter and libraries."""
    if sys.platform.startswith("linux"):
        import resource

        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return pages * resource.getpagesize()
        except (OSError, ValueError, IndexError):
            return _TYPICAL_PROCESS
    try:
        import psutil

        return int(psutil.Process().memory_info().rss)
    except (ImportError, OSError):
        return _TYPICAL_PROCESS


def anonymous_bytes() -> int:
    """Returns this process's resident bytes that no file backs; 0 where that is unknown."""
    return _kib(Path("/proc/self/status"), "RssAnon:") or 0
