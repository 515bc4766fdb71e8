"""Energy that the machine has used, from RAPL counters or a battery that discharges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_JOULES_PER_MICROWATT_HOUR = 0.0036


@dataclass(frozen=True)
class Counter:
    """joules: falls or rises with use; limit_j: the value at which it wraps to 0, 0: never."""

    joules: Callable[[], float]
    limit_j: float


class EnergyMeter:
    """Joules used since construction. `source`: "rapl" or "battery", None if neither is readable.

    RAPL counts packages and their memory, whoever uses them; it needs root on most systems. A
    battery shows the whole device's consumption in coarse steps, and only while it discharges.
    """

    def __init__(self, folder: Path = Path("/sys/class")) -> None:
        self.source: str | None = None
        self._counters = _rapl(folder / "powercap")
        if self._counters:
            self.source = "rapl"
        else:
            self._counters = _battery(folder / "power_supply")
            if self._counters:
                self.source = "battery"
        self._start = self._values()

    def _values(self) -> list[float]:
        try:
            return [c.joules() for c in self._counters]
        except (OSError, ValueError):
            self.source = None
            return []

    def joules(self) -> float | None:
        """Joules used so far; None without a source, or if its steps were too coarse to see any."""
        if self.source is None:
            return None
        values = self._values()
        if len(values) != len(self._start):
            return None
        used = 0.0
        for counter, now, start in zip(self._counters, values, self._start, strict=True):
            gained = now - start if self.source == "rapl" else start - now
            if gained < 0 and counter.limit_j:
                gained += counter.limit_j
            used += gained
        return used if used > 0 else None

    def reading(self, tokens: int) -> dict[str, Any] | None:
        """A Run's `energy`: source, joules, joules_token."""
        joules = self.joules()
        if joules is None:
            return None
        return {"source": self.source, "joules": joules, "joules_token": joules / max(tokens, 1)}


def _number(path: Path) -> float:
    return float(path.read_text())


def _rapl(folder: Path) -> list[Counter]:
    """Counters of packages, and of memory if it is counted apart from them."""
    found = []
    for zone in sorted(folder.glob("intel-rapl:*")) if folder.is_dir() else []:
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            limit = _number(zone / "max_energy_range_uj") / 1e6
            found.append(_scaled(zone / "energy_uj", 1e-6, limit))
        except (OSError, ValueError):
            continue
    return found


def _battery(folder: Path) -> list[Counter]:
    for supply in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            if (supply / "type").read_text().strip() != "Battery":
                continue
            if (supply / "status").read_text().strip() != "Discharging":
                continue
        except OSError:
            continue
        counter = _stored(supply)
        if counter is not None:
            return [counter]
    return []


def _stored(supply: Path) -> Counter | None:
    """A counter of what a battery holds: energy, or charge times voltage."""
    try:
        if (supply / "energy_now").exists():  # uWh
            return _scaled(supply / "energy_now", _JOULES_PER_MICROWATT_HOUR)
        for name in ("charge_now", "charge_counter"):  # uAh
            if (supply / name).exists():
                volts = _number(supply / "voltage_now") / 1e6
                return _scaled(supply / name, volts * _JOULES_PER_MICROWATT_HOUR)
    except (OSError, ValueError):
        pass
    return None


def _scaled(file: Path, joules: float, limit_j: float = 0.0) -> Counter:
    """A counter from a file in units of `joules`. Raises OSError, ValueError if unreadable."""
    _number(file)
    return Counter(lambda: _number(file) * joules, limit_j)
