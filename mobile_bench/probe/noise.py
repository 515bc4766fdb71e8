"""What else the machine did while something was measured on it, and whether that matters."""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from ...runtime._core import control_groups

# A measurement beyond one of these is called noisy.
STEAL = 0.02  # share of all cores' time, taken by the host of a virtual machine
BUSY = 0.05  # share of all cores' time, used by other processes
REFERENCE = 0.15  # relative change of the reference loop's time
SLOW_CLOCK = 0.8  # share of the highest frequency
_PIECES, _PIECE_BYTES = 9, 4 << 20
_CPUS = Path("/sys/devices/system/cpu")


def reference_s() -> float:
    """Seconds that a fixed computation takes now: the median of short pieces."""
    data = bytes(_PIECE_BYTES)
    times = []
    for _ in range(_PIECES):
        start = time.perf_counter()
        hashlib.sha256(data).digest()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class NoiseWatch:
    """Watches the machine from construction to `finish`; our child processes count as our own.

    Only children that have been waited for count: call `finish` after that.
    """

    def __init__(self, cpus: Path = _CPUS) -> None:
        self._cpus = cpus
        self._reference = reference_s()
        self._throttles = throttle_count(cpus)
        self._times = psutil.cpu_times()
        self._own = _own_seconds()

    def finish(self) -> dict[str, Any]:
        """steal, busy: shares of all cores' time; throttled: how often, None if unknown.

        clock: the fastest core's current over its highest frequency, None if unknown; reference_s:
        the loop's time before and after; reference_spread: how much it changed; noisy: the reasons,
        for people, to distrust this measurement, empty if there are none.
        """
        now, own = psutil.cpu_times(), _own_seconds() - self._own
        gained = {k: getattr(now, k) - getattr(self._times, k) for k in now._fields}
        for inside in ("guest", "guest_nice"):  # already in user and nice
            gained.pop(inside, None)
        total = sum(gained.values())
        worked = sum(gained.get(k, 0.0) for k in ("user", "nice", "system"))
        busy = None
        if sys.platform != "win32" and total > 0:  # Windows does not count children
            busy = max(0.0, worked - own) / total
        throttles = throttle_count(self._cpus)
        throttled = None
        if throttles is not None and self._throttles is not None:
            throttled = throttles - self._throttles
        reference = [self._reference, reference_s()]
        found = {
            "steal": gained.get("steal", 0.0) / total if total > 0 else 0.0,
            "busy": busy,
            "throttled": throttled,
            "clock": clock_share(self._cpus),
            "reference_s": reference,
            "reference_spread": max(reference) / min(reference) - 1,
        }
        return found | {"noisy": reasons(found)}


def reasons(noise: dict[str, Any]) -> list[str]:
    """Why a measurement is to be distrusted, from what `NoiseWatch.finish` found."""
    found = []
    if noise["steal"] > STEAL:
        found.append(f"the host took {noise['steal']:.0%} of the CPU time")
    if noise["busy"] is not None and noise["busy"] > BUSY:
        found.append(f"other processes used {noise['busy']:.0%} of the CPU time")
    if noise["throttled"]:
        found.append(f"throttled {noise['throttled']} times")
    if noise["clock"] is not None and noise["clock"] < SLOW_CLOCK:
        found.append(f"the clock was at {noise['clock']:.0%} of its highest")
    if noise["reference_spread"] > REFERENCE:
        found.append(f"the machine's speed changed by {noise['reference_spread']:.0%}")
    return found


def drift(noises: Sequence[dict[str, Any]]) -> float:
    """How much the reference loop's time differed over a series: (largest - smallest) / median."""
    times = [statistics.median(n["reference_s"]) for n in noises if n.get("reference_s")]
    return (max(times) - min(times)) / statistics.median(times) if len(times) > 1 else 0.0


def throttle_count(cpus: Path = _CPUS) -> int | None:
    """How often the cores have been slowed down for heat or by a quota; None if unknown."""
    counts: list[int] = []
    patterns = ("core_throttle_count", "package_throttle_count")
    files = [f for p in patterns for f in cpus.glob(f"cpu[0-9]*/thermal_throttle/{p}")]
    for file in files:
        try:
            counts.append(int(file.read_text()))
        except (OSError, ValueError):
            continue
    for _, _, folder in control_groups("cpu"):
        try:
            rows = dict(line.split() for line in Path(folder, "cpu.stat").read_text().splitlines())
            counts.append(int(rows["nr_throttled"]))
        except (OSError, ValueError, KeyError):
            continue
    return sum(counts) if counts else None


def clock_share(cpus: Path = _CPUS) -> float | None:
    """The current over the highest frequency; None if unknown.

    The core with the largest ratio counts: idle ones lower their clocks.
    """
    shares = []
    for folder in cpus.glob("cpu[0-9]*/cpufreq"):
        try:
            now = int((folder / "scaling_cur_freq").read_text())
            shares.append(now / int((folder / "cpuinfo_max_freq").read_text()))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return max(shares, default=None)


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
