"""Numbers for people: three significant digits, units that suit a whole column, spreads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

ALL = "all in memory"


@dataclass(frozen=True)
class Unit:
    """A unit and its size in base units."""

    name: str
    factor: float


ONE = Unit("", 1.0)
PERCENT = Unit("%", 0.01)
SECONDS = (Unit("s", 1.0), Unit("ms", 1e-3), Unit("µs", 1e-6))
BYTES = (Unit("GB", 1e9), Unit("MB", 1e6), Unit("kB", 1e3), Unit("B", 1.0))
BYTES_S = (Unit("GB/s", 1e9), Unit("MB/s", 1e6), Unit("kB/s", 1e3))
RATE = (Unit("tok/s", 1.0),)
JOULES = (Unit("J", 1.0), Unit("mJ", 1e-3))
OPS_S = (Unit("Top/s", 1e12), Unit("Gop/s", 1e9), Unit("Mop/s", 1e6))
WEIGHTS_S = (Unit("G weights/s", 1e9), Unit("M weights/s", 1e6))
SHARE = (PERCENT,)


@dataclass(frozen=True)
class Spread:
    """Repeats of one quantity, in base units; never empty."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """The number of repeats."""
        return len(self.values)

    @property
    def median(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The least of the repeats."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The greatest of the repeats."""
        return max(self.values)


def spread(values: Iterable[float | None]) -> Spread | None:
    """The Spread of the values that were measured; None if none was."""
    found = tuple(v for v in values if v is not None)
    return Spread(found) if found else None


def unit_of(values: Iterable[float], units: tuple[Unit, ...]) -> Unit:
    """The largest unit in which a value is at least 1 and none is below a hundredth."""
    sizes = [abs(v) for v in values if v]
    if not sizes:
        return units[0]
    most, least = max(sizes), min(sizes)
    for unit in units:
        if most >= unit.factor and least >= unit.factor / 100:
            return unit
    return next((unit for unit in units if most >= unit.factor), units[-1])


def decimals(value: float, digits: int = 3) -> int:
    """How many decimals show `digits` significant digits of the value, at most 4."""
    if value == 0 or not math.isfinite(value):
        return 0
    rounded = float(f"{value:.{digits - 1}e}")
    return min(max(digits - 1 - math.floor(math.log10(abs(rounded))), 0), 4)


def number(value: float, unit: Unit = ONE, digits: int = 3) -> str:
    """The value in the unit, without its name: 1,234, 12.3, 0.0123."""
    scaled = value / unit.factor
    return f"{scaled:,.{decimals(scaled, digits)}f}"


def quantity(value: float, units: tuple[Unit, ...], digits: int = 3) -> str:
    """The value with the unit that suits it: 12.3 MB."""
    unit = unit_of([value], units)
    return f"{number(value, unit, digits)}{'' if unit is PERCENT else ' '}{unit.name}"


def between(found: Spread, unit: Unit = ONE) -> str:
    """The least and the greatest, as exact as the median; "" if that shows no difference."""
    if found.n < 2:
        return ""
    places = decimals(found.median / unit.factor)
    low, high = (f"{v / unit.factor:,.{places}f}" for v in (found.low, found.high))
    return "" if low == high else f"{low}\N{EN DASH}{high}"


def budget(nbytes: int | None) -> str:
    """A budget as people ask for it: 500 MB, 1 GiB, all in memory."""
    if nbytes is None:
        return ALL
    for names, base in ((("GB", "MB"), 1000), (("GiB", "MiB"), 1024)):
        for name, power in zip(names, (3, 2), strict=True):
            scaled = nbytes / base**power
            if scaled >= 1 and math.isclose(scaled * 100, round(scaled * 100), abs_tol=1e-9):
                return f"{scaled:g} {name}"
    return quantity(nbytes, BYTES)
