"""Battery, heat and the source of energy figures, as far as the system shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cpu import number, text
from .energy import EnergyMeter
from .noise import clock_share, throttle_count

_ROOT = Path("/")


def power(root: Path = _ROOT) -> dict[str, Any]:
    """The current state, as the DeviceProfile's `power`.

    battery: None, or percent, status ("Discharging"), watts (None if unknown); temperatures: zone
    -> degrees C; energy: "rapl", "battery" or None; governor: the CPU clock's; clock: share of the
    highest frequency; throttled: events since boot. None if unknown.
    """
    cpus = root / "sys/devices/system/cpu"
    return {
        "battery": battery(root / "sys/class/power_supply"),
        "temperatures": temperatures(root / "sys/class/thermal"),
        "energy": EnergyMeter(root / "sys/class").source,
        "governor": text(cpus / "cpu0/cpufreq/scaling_governor"),
        "clock": clock_share(cpus),
        "throttled": throttle_count(cpus),
    }


def battery(folder: Path) -> dict[str, Any] | None:
    """The first battery of the system's power supplies; None if there is none."""
    try:
        supplies = sorted(folder.iterdir())
    except OSError:
        return None
    for supply in supplies:
        # A mouse has a battery, too; its scope is "Device".
        if text(supply / "type") != "Battery" or text(supply / "scope") == "Device":
            continue
        watts = number(supply / "power_now")
        if watts is None:
            amperes, volts = number(supply / "current_now"), number(supply / "voltage_now")
            watts = None if amperes is None or volts is None else round(amperes * volts / 1e6)
        return {
            "percent": number(supply / "capacity"),
            "status": text(supply / "status"),
            "watts": None if watts is None else abs(watts) / 1e6,
        }
    return None


def temperatures(folder: Path) -> dict[str, float]:
    """Zone -> degrees C; the hottest of zones with the same name."""
    found: dict[str, float] = {}
    for zone in sorted(folder.glob("thermal_zone[0-9]*")):
        thousandths, name = number(zone / "temp"), text(zone / "type") or zone.name
        # Sensors that are switched off report 0 or less, or nonsense.
        if thousandths is not None and 0 < thousandths < 150_000:
            found[name] = max(found.get(name, 0.0), thousandths / 1000)
    return found
