"""Plots of a model's results on one device, and of devices beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .axes import (
    BOTTOM,
    DASHES,
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Line,
    axes_of,
    budget_axis,
    draw,
    in_words,
    log_seconds,
    log_seconds_below,
    places_of,
    room_name,
    row_axis,
    scale,
    short,
    tick,
    ticks_of,
    y_title,
)
from .quantities import SECONDS, Spread, budget, number, quantity, unit_of
from .setups import REFERENCE, Device, Measured, ModelResults, at
from .svg import (
    INK,
    ON_WAIT,
    PAPER,
    QUIET,
    WAIT,
    WAIT_TEXT,
    Plot,
    drawing,
    element,
    engine_colour,
    engine_marker,
    figure,
)


def model_plots(model: ModelResults, name: str) -> list[Plot]:
    """All plots that a model's results allow. name: prefix of their ids in the page."""
    with drawing():
        plots = [
            speed_plot(model, f"{name}-speed"),
            split_plot(model, f"{name}-split"),
            latency_plot(model, f"{name}-latency"),
            *prompt_plots(model, f"{name}-ttft"),
            hit_plot(model, f"{name}-hits"),
        ]
    return [plot for plot in plots if plot is not None]


def _labels(setups: Iterable[Measured]) -> list[str]:
    return list(dict.fromkeys(one.label for one in setups))


def _rooms(setups: Iterable[Measured]) -> list[int | None]:
    """Budgets from small to large, everything in memory last."""
    return sorted({one.setup.room for one in setups}, key=lambda r: math.inf if r is None else r)


def speed_plot(model: ModelResults, name: str) -> Plot | None:
    """Decode tok/s against the budget, with the roofline and the other engines."""
    shown = [one for one in model.measured if one.of_run("decode", "tok_s")]
    rooms = _rooms(shown)
    if not shown:
        return None
    if len(rooms) == 1:
        return _speed_bars(model, shown, name)
    places = places_of(rooms)
    lines = _lines_by_room(shown, places)
    limit = _limit_line(model, shown, places)
    drawn = figure(WIDTH, HEIGHT)
    axes = axes_of(drawn)
    every = [v for line in (*lines, *limit) for _, y in line.points for v in y.values]
    scale(axes, every)
    budget_axis(axes, places, WIDTH - LEFT - RIGHT)
    y_title(axes, "tok/s")
    draw(axes, [*limit, *lines])
    caption = "Decode speed against memory"
    alt = in_words([*lines, *limit], lambda x: room_name(places, x), "tok/s")
    return Plot(caption, alt, element(drawn, name, caption, alt))


def _lines_by_room(shown: Sequence[Measured], places: dict[int | None, float]) -> list[Line]:
    lines = []
    used: dict[str, int] = {}
    for label in _labels(shown):
        those = [one for one in shown if one.label == label]
        engine = those[0].setup.engine
        points: dict[float, Spread] = {}
        for one in those:
            speed = one.of_run("decode", "tok_s")
            if speed is not None:
                points.setdefault(places[one.setup.room], speed)
        dash = DASHES[used.get(engine, 0) % len(DASHES)]
        used[engine] = used.get(engine, 0) + 1
        lines.append(
            Line(
                short(label),
                tuple(sorted(points.items(), key=lambda p: p[0])),
                engine_colour(engine),
                engine_marker(engine),
                dash,
            )
        )
    return lines


def _limit_line(
    model: ModelResults, shown: Sequence[Measured], places: dict[int | None, float]
) -> list[Line]:
    """The roofline of the reference engine's first number of threads."""
    points = {}
    threads = next((one.setup.threads for one in shown if one.setup.engine == REFERENCE), None)
    for one in shown:
        line = model.roofline(one.setup)
        seconds = at(line, "limit_s")
        if one.setup.engine == REFERENCE and one.setup.threads == threads and seconds:
            points[places[one.setup.room]] = Spread((1 / seconds,))
    if not points:
        return []
    return [Line("limit", tuple(sorted(points.items())), QUIET, "", (0, (3, 2)))]


def _speed_bars(model: ModelResults, shown: Sequence[Measured], name: str) -> Plot:
    """Decode tok/s with only one budget: a bar for each setup."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    rows = [(one.label, one.setup.engine, one.of_run("decode", "tok_s")) for one in shown]
    found = [(label, engine, speed) for label, engine, speed in rows if speed is not None]
    height = 46 + 24 * len(found)
    drawn = figure(WIDTH, height)
    axes = axes_of(drawn, left=104, right=56, top=10, bottom=BOTTOM)
    high = max(speed.high for _, _, speed in found)
    for n, (_label, engine, speed) in enumerate(found):
        colour = engine_colour(engine)
        axes.barh(n, speed.median, height=0.5, color=colour, alpha=0.85, linewidth=0)
        axes.plot([speed.low, speed.high], [n, n], color=INK, linewidth=1.2)
        axes.annotate(
            number(speed.median),
            (speed.high, n),
            xytext=(6, 0),
            textcoords="offset points",
            va="center_baseline",
        )
    axes.set_xlim(0, high * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: tick(v)))
    row_axis(axes, [(short(label, 18), engine_colour(engine)) for label, engine, _ in found])
    axes.set_xlabel(f"tok/s ({budget(found[0] and shown[0].setup.room)})")
    caption = "Decode speed"
    alt = "; ".join(f"{label}: {number(speed.median)} tok/s" for label, _, speed in found) + "."
    return Plot(caption, alt, element(drawn, name, caption, alt))


def split_plot(model: ModelResults, name: str) -> Plot | None:
    """Time per token of the reference engine, split into its parts, by budget."""
    rows: list[tuple[str, float, float]] = []
    several = len({one.label for one in model.measured if one.setup.engine == REFERENCE}) > 1
    for one in model.measured:
        compute, stall = one.of_run("decode", "compute_s"), one.of_run("decode", "stall_s")
        if compute is not None and stall is not None:
            text = budget(one.setup.room)
            if several:
                text = f"{text}, {one.extra}"
            rows.append((text, compute.median, stall.median))
    if not rows:
        return None
    unit = unit_of([a + b for _, a, b in rows], SECONDS)
    drawn = figure(WIDTH, 66 + 26 * len(rows))
    axes = axes_of(drawn, left=104 if several else 74, right=46, bottom=BOTTOM)
    high = max(a + b for _, a, b in rows) / unit.factor
    axes.set_xlim(0, high)
    for n, (_, computing, waiting) in enumerate(rows):
        a, b = computing / unit.factor, waiting / unit.factor
        axes.barh(n, a, height=0.56, color=engine_colour(REFERENCE), linewidth=0)
        axes.barh(n, b, left=a, height=0.56, color=WAIT, linewidth=0)
        for value, middle, colour in ((a, a / 2, PAPER), (b, a + b / 2, ON_WAIT)):
            if value > high * 0.09:
                text = number(value)
                axes.text(middle, n, text, color=colour, ha="center", va="center_baseline")
        axes.annotate(
            number(a + b),
            (a + b, n),
            xytext=(5, 0),
            textcoords="offset points",
            color=INK,
            va="center_baseline",
        )
    row_axis(axes, [(short(text, 18), QUIET) for text, _, _ in rows])
    axes.set_xlabel(f"{unit.name} a token, mean")
    left = 0.0
    for text, colour in (("computing", engine_colour(REFERENCE)), ("waiting for flash", WAIT_TEXT)):
        axes.annotate(
            text,
            (0, 1),
            xycoords="axes fraction",
            xytext=(left, 10),
            textcoords="offset points",
            color=colour,
            va="center",
        )
        left += 76
    caption = "Where the time of a token goes"
    alt = "; ".join(
        f"{text}: {quantity(a, SECONDS)} computing, {quantity(b, SECONDS)} waiting"
        for text, a, b in rows
    )
    return Plot(caption, alt + ".", element(drawn, name, caption, alt + "."))


def prompt_plots(model: ModelResults, name: str) -> list[Plot]:
    """TTFT against prompt length: a panel for each budget, the same axes in all."""
    shown = [one for one in model.measured if len(one.prompt_lengths) > 1]
    every = [
        v
        for one in shown
        for n in one.prompt_lengths
        for v in (one.of_prompt(n, "ttft_s") or Spread((math.nan,))).values
        if v > 0
    ]
    if not every:
        return []
    lengths = sorted({n for one in shown for n in one.prompt_lengths})
    plots = []
    for panel, room in enumerate(_rooms(shown)):
        lines = _prompt_lines([one for one in shown if one.setup.room == room])
        if not lines:
            continue
        drawn = figure(WIDTH, HEIGHT - 40)
        axes = axes_of(drawn)
        axes.set_xscale("log")
        axes.set_xlim(lengths[0] / 1.1, lengths[-1] * 1.1)
        ticks_of(axes, lengths)
        log_seconds(axes, min(every), max(every))
        axes.set_xlabel("tokens of the prompt")
        y_title(axes, "time to first token")
        draw(axes, lines)
        caption = f"TTFT, {budget(room)}"
        alt = in_words(lines, lambda x: f"{x:,.0f} tokens", "s")
        plots.append(Plot(caption, alt, element(drawn, f"{name}{panel}", caption, alt)))
    return plots


def _prompt_lines(setups: Sequence[Measured]) -> list[Line]:
    lines: list[Line] = []
    used: dict[str, int] = {}
    for one in setups:
        found = [(float(n), one.of_prompt(n, "ttft_s")) for n in one.prompt_lengths]
        points = tuple((n, y) for n, y in found if y is not None and y.low > 0)
        if not points:
            continue
        engine = one.setup.engine
        dash = DASHES[used.get(engine, 0) % len(DASHES)]
        used[engine] = used.get(engine, 0) + 1
        lines.append(
            Line(short(one.label), points, engine_colour(engine), engine_marker(engine), dash)
        )
    return lines


def hit_plot(model: ModelResults, name: str) -> Plot | None:
    """Hit rate of the expert cache by layer, a line for each budget."""
    rows = [
        (one, one.layer_hits)
        for one in model.measured
        if one.setup.engine == REFERENCE and any(h is not None for h in one.layer_hits)
    ]
    if not rows:
        return None
    several = len({one.label for one, _ in rows}) > 1
    lines = []
    for n, (one, hits) in enumerate(rows):
        text = budget(one.setup.room)
        points = tuple((float(i), Spread((h * 100,))) for i, h in enumerate(hits) if h is not None)
        lines.append(
            Line(
                short(f"{text}, {one.extra}" if several else text),
                points,
                engine_colour(REFERENCE),
                "",
                DASHES[n % len(DASHES)] if several else "-",
                0.45 + 0.55 * (n + 1) / len(rows),
            )
        )
    drawn = figure(WIDTH, HEIGHT)
    axes = axes_of(drawn)
    axes.set_ylim(0, 100)
    axes.set_xlim(0, max(len(hits) for _, hits in rows) - 1 or 1)
    axes.set_yticks(range(0, 101, 25))
    axes.set_xlabel("layer")
    y_title(axes, "hits of the expert cache, %")
    draw(axes, lines)
    caption = "Hit rate by layer"
    alt = "; ".join(
        f"{line.label}: {number(min(y.median for _, y in line.points))} to "
        f"{number(max(y.median for _, y in line.points))} %"
        for line in lines
    )
    return Plot(caption, alt + ".", element(drawn, name, caption, alt + "."))


def latency_plot(model: ModelResults, name: str) -> Plot | None:
    """Latency of single tokens: the middle half, 5 to 95%, the median, p99 and the longest."""
    rows = []
    for one in model.measured:
        times = sorted(t for repeat in one.token_seconds for t in repeat if t > 0)
        if len(times) > 7:
            rows.append((one, times))
    if not rows:
        return None
    drawn = figure(WIDTH, 52 + 19 * len(rows))
    axes = axes_of(drawn, left=142, right=16, top=10, bottom=BOTTOM)
    axes.set_xscale("log")
    axes.set_xlim(min(t[0] for _, t in rows) / 1.1, max(t[-1] for _, t in rows) * 1.1)
    log_seconds_below(axes, min(t[0] for _, t in rows), max(t[-1] for _, t in rows))
    for n, (one, times) in enumerate(rows):
        colour = engine_colour(one.setup.engine)
        p5, p25, p50, p75, p95, p99 = (_quantile(times, q) for q in (5, 25, 50, 75, 95, 99))
        axes.plot([p5, p95], [n, n], color=colour, linewidth=1.1, solid_capstyle="butt")
        axes.plot([p25, p75], [n, n], color=colour, linewidth=7, solid_capstyle="butt")
        axes.plot([p50], [n], "|", color=PAPER, markersize=7, markeredgewidth=2)
        axes.plot([p99], [n], "|", color=colour, markersize=8, markeredgewidth=1.4)
        axes.plot([times[-1]], [n], "o", color=colour, markersize=2.6)
    row_axis(axes, [("", INK) for _ in rows])
    last = ""
    for n, (one, _) in enumerate(rows):
        text = "all" if one.setup.room is None else budget(one.setup.room)
        for x, part, colour in (
            (4, "" if text == last else text, QUIET),
            (52, short(one.label, 18), engine_colour(one.setup.engine)),
        ):
            axes.annotate(
                part,
                (x, n),
                xycoords=("figure points", "data"),
                color=colour,
                va="center_baseline",
            )
        last = text
    axes.set_xlabel("bar p25\N{EN DASH}p75, line p5\N{EN DASH}p95, | p99, \N{BULLET} longest")
    caption = "Latency of single tokens"
    alt = "; ".join(
        f"{budget(one.setup.room)}, {one.label}: median {quantity(_quantile(times, 50), SECONDS)}, "
        f"p99 {quantity(_quantile(times, 99), SECONDS)}"
        for one, times in rows
    )
    return Plot(caption, alt + ".", element(drawn, name, caption, alt + "."))


def _quantile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of sorted values, interpolated between neighbours."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def device_plots(devices: Sequence[Device], name: str) -> list[Plot]:
    """Decode speed of the reference engine against the budget, a line for each device."""
    keys = list(dict.fromkeys(model.key for device in devices for model in device.models))
    with drawing():
        plots = [_device_plot(devices, key, f"{name}-{n}") for n, key in enumerate(keys)]
    return [plot for plot in plots if plot is not None]


def _brief(device: Device, devices: Sequence[Device]) -> str:
    """The device's name, cut at the first comma if that still tells it from the others."""
    names = [one.name.split(",")[0] for one in devices]
    brief = device.name.split(",")[0]
    return brief if names.count(brief) == 1 else device.name


def _device_plot(devices: Sequence[Device], key: str, name: str) -> Plot | None:
    found: list[tuple[str, dict[int | None, Spread]]] = []
    title = ""
    for device in devices:
        for model in device.models:
            if model.key != key:
                continue
            title = model.name
            speeds: dict[int | None, Spread] = {}
            for one in model.measured:
                speed = one.of_run("decode", "tok_s")
                if one.setup.engine == REFERENCE and speed is not None:
                    speeds.setdefault(one.setup.room, speed)
            if speeds:
                found.append((_brief(device, devices), speeds))
    rooms = sorted(
        {room for _, speeds in found for room in speeds},
        key=lambda room: math.inf if room is None else room,
    )
    if len(found) < 2 or len(rooms) < 2:
        return None
    places = places_of(rooms)
    lines = [
        Line(
            short(device, 15),
            tuple(sorted(((places[room], s) for room, s in speeds.items()), key=lambda p: p[0])),
            engine_colour(REFERENCE),
            "osD^v"[n % 5],
            DASHES[n % len(DASHES)],
        )
        for n, (device, speeds) in enumerate(found)
    ]
    drawn = figure(WIDTH, HEIGHT)
    axes = axes_of(drawn)
    scale(axes, [v for line in lines for _, y in line.points for v in y.values])
    budget_axis(axes, places, WIDTH - LEFT - RIGHT)
    y_title(axes, "stoker, tok/s")
    draw(axes, lines)
    caption = f"Decode speed against memory, {title}"
    alt = in_words(lines, lambda x: room_name(places, x), "tok/s")
    return Plot(caption, alt, element(drawn, name, caption, alt))
