"""Axes and lines of the report's plots: margins, scales, ticks, labels at the ends of lines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .quantities import Spread, budget, number
from .svg import FONT, PAPER, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 380.0, 250.0  # points
LEFT, RIGHT, TOP, BOTTOM = 40.0, 98.0, 26.0, 36.0  # margins; the line labels are on the right
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)))


@dataclass(frozen=True)
class Line:
    """A line with a label at its end. points: (x, repeats of y)."""

    label: str
    points: tuple[tuple[float, Spread], ...]
    colour: str
    marker: str = ""
    dash: Any = "-"
    alpha: float = 1.0


def axes_of(
    drawn: Figure,
    *,
    left: float = LEFT,
    right: float = RIGHT,
    top: float = TOP,
    bottom: float = BOTTOM,
) -> Axes:
    """Adds axes between margins, which are in points."""
    width, height = drawn.get_size_inches() * 72
    return drawn.add_axes(
        (
            left / width,
            bottom / height,
            (width - left - right) / width,
            (height - top - bottom) / height,
        )
    )


def y_title(axes: Axes, text: str) -> None:
    """Writes the y axis's quantity above it, horizontally."""
    axes.annotate(
        text,
        (0, 1),
        xycoords=("figure points", "axes fraction"),
        xytext=(4, 13),
        textcoords="offset points",
        color=QUIET,
        va="center",
    )


def spread_apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as possible to the wanted ones, at least `gap` apart, in the same order."""
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    # Pool neighbours that are too near, and centre each pool on the mean of its wanted places.
    pools: list[list[int]] = []

    def start(pool: list[int]) -> float:
        middle = statistics.fmean(wanted[n] for n in pool)
        first = middle - gap * (len(pool) - 1) / 2
        return max(low, min(first, high - gap * (len(pool) - 1)))

    for n in order:
        pools.append([n])
        while len(pools) > 1 and start(pools[-1]) < start(pools[-2]) + gap * len(pools[-2]):
            pools[-2:] = [pools[-2] + pools[-1]]
    places = [0.0] * len(wanted)
    for pool in pools:
        for rank, n in enumerate(pool):
            places[n] = start(pool) + gap * rank
    return places


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Draws labels to the right of the axes, level with (x, y) as far as they do not collide."""
    if not ends:
        return
    assert axes.figure is not None
    box = axes.get_window_extent()
    scale = 72 / axes.figure.dpi
    low, high = box.y0 * scale, box.y1 * scale
    wanted = [axes.transData.transform((x, y))[1] * scale for x, y, _, _ in ends]
    places = spread_apart(wanted, FONT + 2.5, low, high + 8)
    for (_, _, text, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            text,
            (1, place),
            xycoords=("axes fraction", "figure points"),
            xytext=(9, 0),
            textcoords="offset points",
            color=colour,
            va="center_baseline",
        )


def draw(axes: Axes, lines: Iterable[Line]) -> None:
    """Draws medians as lines, least to greatest as whiskers, labels at the right ends."""
    ends = []
    for line in lines:
        xs = [x for x, _ in line.points]
        ys = [y.median for _, y in line.points]
        axes.plot(
            xs,
            ys,
            color=line.colour,
            marker=line.marker or None,
            linestyle=line.dash,
            alpha=line.alpha,
            markeredgecolor=PAPER,
            markeredgewidth=0.8,
            clip_on=False,
            zorder=3,
        )
        for x, y in line.points:
            if y.n > 1 and y.high > y.low:
                axes.plot(
                    [x, x],
                    [y.low, y.high],
                    color=line.colour,
                    linewidth=1.1,
                    alpha=line.alpha,
                    clip_on=False,
                    zorder=2,
                )
        ends.append((xs[-1], ys[-1], line.label, line.colour))
    label_ends(axes, ends)


def scale(axes: Axes, values: Sequence[float]) -> None:
    """Scales y from 0, or logarithmically if the values differ by more than 20 times."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    if low > 0 and high / low > 20:
        axes.set_yscale("log")
        decades = math.log10(high / low)
        steps = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.7 else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(low / 1.25, high * 1.25)
    else:
        axes.set_ylim(0, high * 1.08 or 1)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: tick(v)))


def tick(value: float) -> str:
    """A number as a tick's label: 0.5, 10, 20,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def in_words(lines: Sequence[Line], x_name: Callable[[float], str], unit: str) -> str:
    """Description of a plot in words."""
    parts = []
    for line in lines:
        values = ", ".join(f"{x_name(x)} {number(y.median)} {unit}" for x, y in line.points)
        parts.append(f"{line.label}: {values}")
    return "; ".join(parts) + "."


def places_of(rooms: Sequence[int | None]) -> dict[int | None, float]:
    """Positions of budgets on a logarithmic axis (MB); "all in memory" comes after a gap."""
    bounded = [room / 1e6 for room in rooms if room is not None]
    out: dict[int | None, float] = {room: room / 1e6 for room in rooms if room is not None}
    if None in rooms:
        span = max(bounded) / min(bounded) if len(bounded) > 1 else 2.0
        out[None] = max(bounded, default=1.0) * max(span ** (1 / 3), 1.5)
    return out


def budget_axis(axes: Axes, places: dict[int | None, float], width: float) -> None:
    """Sets ticks at the budgets; of those whose labels would touch, only the first."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    low, high = min(places.values()), max(places.values())
    span = math.log(high / low) or 1.0
    axes.set_xlim(low / math.exp(span * 0.05), high * math.exp(span * 0.05))
    ticks, labels, last = [], [], -math.inf
    for room, place in places.items():
        at_point = math.log(place / low) / span * width
        text = "all" if room is None else budget(room)
        if at_point - last < 46 and room is not None:
            text = ""
        if text:
            last = at_point
        ticks.append(place)
        labels.append(text)
    axes.set_xticks(ticks, labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("memory" if None not in places else "memory (all: everything in memory)")


def room_name(places: dict[int | None, float], x: float) -> str:
    """Name of the budget at position x."""
    return budget(next(room for room, place in places.items() if place == x))


def short(text: str, most: int = 18) -> str:
    """A label shortened to fit its margin."""
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def row_axis(axes: Axes, rows: Sequence[tuple[str, str]]) -> None:
    """Sets the y axis to rows from top to bottom, each with its name on the left."""
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_yticks(range(len(rows)), [text for text, _ in rows])
    for tick, (_, colour) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(colour)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")


def ticks_of(axes: Axes, values: Sequence[int]) -> None:
    """Sets ticks of a logarithmic x axis at these values, as far as their labels have room."""
    from matplotlib.ticker import NullLocator

    kept: list[int] = []
    for value in values:
        if not kept or value / kept[-1] >= 1.9:
            kept.append(value)
    axes.set_xticks(kept, [f"{value:,}" for value in kept])
    axes.xaxis.set_minor_locator(NullLocator())


def log_seconds(axes: Axes, low: float, high: float) -> None:
    """Sets a logarithmic y axis of times, with ticks in the units that suit them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(low / 1.3, high * 1.3)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 30 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: tick_seconds(v)))


def tick_seconds(seconds: float) -> str:
    """A time as a tick's label: 100 ms."""
    for factor, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor * 0.999:
            return f"{seconds / factor:.3g} {name}"
    return f"{seconds * 1e6:.2g} µs"


def log_seconds_below(axes: Axes, low: float, high: float) -> None:
    """Sets ticks of a logarithmic x axis of times, in the units that suit them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    steps = (1.0,) if high / low > 100 else (1.0, 3.0) if high / low > 15 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: tick_seconds(v)))
