"""Tables of a device profile: facts, storage, memory, arithmetic, weight formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .quantities import BYTES, BYTES_S, OPS_S, WEIGHTS_S, Unit, number, quantity, unit_of
from .setups import Device, at, finite
from .tables import EMPTY, Cell, Row, Table

_MODES = ("direct", "buffered", "mapped")


def _records(value: object, *numbers: str) -> list[dict[str, Any]]:
    """The objects of a list that have all these numbers."""
    found = value if isinstance(value, list) else []
    return [r for r in found if isinstance(r, dict) and all(at(r, n) is not None for n in numbers)]


def _block(nbytes: float) -> str:
    """A block size in binary units, such as 4 KiB."""
    for name, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:g} {name}"
    return f"{nbytes:g} B"


def facts(profile: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of a device's facts; what the system does not tell is left out."""
    cpu, memory, isa = (_dict(profile.get(key)) for key in ("cpu", "memory", "isa"))
    platform, storage, power = (_dict(profile.get(key)) for key in ("platform", "storage", "power"))
    system = " ".join(str(platform[k]) for k in ("system", "release", "machine") if platform.get(k))
    out = [("processor", str(cpu.get("model") or "")), ("cores", _cores(cpu))]
    out.append(("caches", _caches(cpu.get("caches"))))
    out.append(("instruction sets", _isas(isa)))
    out.append(("memory", _memory(memory)))
    out.append(("memory, reads", _best(profile.get("memory_reads"))))
    out.append(("storage", ", ".join(str(storage[k]) for k in _STORAGE if storage.get(k))))
    out.append(("storage, reads", _best(profile.get("storage_reads"))))
    out.append(("int8 peak", _peak(profile.get("peaks"), "int8")))
    out.append(("float32 peak", _peak(profile.get("peaks"), "float32")))
    out.append(("system", system))
    if platform.get("virtual"):
        virtual = platform["virtual"]
        out.append(("virtual machine", virtual if isinstance(virtual, str) else "yes"))
    out.append(("power", _power(power)))
    time = str(profile.get("time") or "")[:16].replace("T", " ")
    probed = f"{time} UTC{', quick' if profile.get('quick') else ''}"
    out.append(("probed", f"{probed}, stoker {profile.get('stoker', '?')}"))
    return [(what, finding) for what, finding in out if finding]


_STORAGE = ("device", "filesystem", "path")


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _cores(cpu: dict[str, Any]) -> str:
    parts = []
    if at(cpu, "physical") is not None:
        parts.append(f"{cpu['physical']:g} physical")
    if at(cpu, "logical") is not None:
        parts.append(f"{cpu['logical']:g} logical")
    if at(cpu, "performance") is not None and cpu.get("performance") != cpu.get("physical"):
        parts.append(f"{cpu['performance']:g} performance")
    if at(cpu, "quota"):
        parts.append(f"quota {cpu['quota']:g}")
    return ", ".join(parts)


def _caches(found: object) -> str:
    """Caches in words, from a list of objects or an object of sizes by level."""
    parts = []
    if isinstance(found, dict):
        parts = [f"{k} {_block(v)}" for k, v in found.items() if finite(v) is not None]
    for one in _records(found, "level"):
        nbytes = at(one, "bytes") or at(one, "size") or at(one, "nbytes")
        kind = str(one.get("type") or one.get("kind") or "")
        if nbytes and not kind.lower().startswith("instr"):
            parts.append(f"L{one['level']:g} {_block(nbytes)}")
    return ", ".join(dict.fromkeys(parts))


def _isas(isa: dict[str, Any]) -> str:
    usable = isa.get("usable")
    names = [str(n) for n in usable] if isinstance(usable, list) else []
    active = str(isa.get("active") or "")
    return f"{active} (of {', '.join(names)})" if len(names) > 1 and active else active


def _memory(memory: dict[str, Any]) -> str:
    total, limit = at(memory, "total"), at(memory, "limit")
    parts = [] if total is None else [quantity(total, BYTES)]
    if limit:
        parts.append(f"limited to {quantity(limit, BYTES)}")
    return ", ".join(parts)


def _best(found: object) -> str:
    """The best of the bandwidths, with its unit."""
    speeds = [r["bytes_s"] for r in _records(found, "bytes_s")]
    return quantity(max(speeds), BYTES_S) if speeds else ""


def _peak(found: object, kind: str) -> str:
    """The best peak of one thread and of all threads, in words."""
    those = [r for r in _records(found, "ops_s", "threads") if r.get("kind") == kind]
    if not those:
        return ""
    best = max(those, key=lambda r: r["ops_s"])
    one = [r["ops_s"] for r in those if r["threads"] == 1]
    text = f"{quantity(best['ops_s'], OPS_S)} ({best.get('isa')}, {best['threads']:g} threads)"
    return f"{text}, one thread {quantity(max(one), OPS_S)}" if one else text


def _power(power: dict[str, Any]) -> str:
    parts = []
    energy, battery = power.get("energy"), power.get("battery")
    if energy:
        parts.append(f"energy from {energy.get('source') if isinstance(energy, dict) else energy}")
    if isinstance(battery, dict):
        percent = at(battery, "percent")
        parts.append("battery" if percent is None else f"battery {percent:g} %")
    temperatures = _dict(power.get("temperatures"))
    degrees = [t for t in map(finite, temperatures.values()) if t is not None]
    if degrees:
        parts.append(f"up to {max(degrees):.0f} °C")
    return ", ".join(parts)


def _heat_table(
    caption: str,
    corner: tuple[str, ...],
    columns: Sequence[str],
    rows: Sequence[tuple[str, str, Sequence[float | None]]],
    *,
    unit: Unit,
) -> Table:
    """A table whose values are shaded by their share of the greatest."""
    most = max(v for _, _, values in rows for v in values if v is not None)
    return Table(
        caption,
        corner,
        tuple(columns),
        tuple(
            Row(
                group,
                head,
                tuple(
                    EMPTY
                    if v is None
                    else Cell(
                        _plain(v / unit.factor), heat=round(100 * (v / most)) if most > 0 else 0
                    )
                    for v in values
                ),
            )
            for group, head, values in rows
        ),
    )


def _plain(value: float) -> str:
    return number(value, digits=3 if value >= 1 else 2)


def storage_table(profile: dict[str, Any]) -> Table | None:
    """Storage bandwidth by mode, block and depth: a heat table."""
    found = _records(profile.get("storage_reads"), "block", "depth", "bytes_s")
    if not found:
        return None
    depths = sorted({r["depth"] for r in found})
    speeds = {(str(r.get("mode")), r["block"], r["depth"]): float(r["bytes_s"]) for r in found}
    modes = sorted({key[0] for key in speeds}, key=_mode_order)
    unit = unit_of(speeds.values(), BYTES_S)
    rows = [
        (mode, _block(block), [speeds.get((mode, block, depth)) for depth in depths])
        for mode in modes
        for block in sorted({key[1] for key in speeds if key[0] == mode})
    ]
    columns = [f"{depth:g}" for depth in depths]
    caption = f"Storage, {unit.name}: random reads by block and by how many are under way"
    return _heat_table(caption, ("mode", "block"), columns, rows, unit=unit)


def _mode_order(mode: str) -> tuple[int, str]:
    return (_MODES.index(mode) if mode in _MODES else len(_MODES), mode)


def memory_table(profile: dict[str, Any]) -> Table | None:
    """Memory bandwidth by threads."""
    found = {int(r["threads"]): r for r in _records(profile.get("memory_reads"), *_MEMORY)}
    if not found:
        return None
    threads = sorted(found)
    speeds = [float(found[n]["bytes_s"]) for n in threads]
    unit = unit_of([max(speeds)], BYTES_S)
    return _heat_table(
        f"Memory, {unit.name}: reads by threads",
        ("threads",),
        [str(n) for n in threads],
        [("", "read", speeds)],
        unit=unit,
    )


_MEMORY = ("threads", "bytes_s")


def peak_table(profile: dict[str, Any]) -> Table | None:
    """Arithmetic peaks by kind, ISA and threads."""
    found = _records(profile.get("peaks"), "threads", "ops_s")
    if not found:
        return None
    threads = sorted({r["threads"] for r in found})
    speeds = {(str(r.get("kind")), str(r.get("isa")), r["threads"]): r["ops_s"] for r in found}
    unit = unit_of([max(speeds.values())], OPS_S)
    kinds = dict.fromkeys(kind for kind, _, _ in speeds)
    pairs = [(k, isa) for k in kinds for isa in dict.fromkeys(i for o, i, _ in speeds if o == k)]
    return _heat_table(
        f"Arithmetic, {unit.name}: peak out of registers by threads",
        ("kind", "ISA"),
        [f"{n:g}" for n in threads],
        [(k, isa, [speeds.get((k, isa, n)) for n in threads]) for k, isa in pairs],
        unit=unit,
    )


def format_table(profile: dict[str, Any]) -> Table | None:
    """Matrix products by weight format, on one thread."""
    found = _records(profile.get("formats"), "row_weights_s", "tile_ops_s")
    if not found:
        return None
    rows_unit = unit_of([max(r["row_weights_s"] for r in found)], WEIGHTS_S)
    tiles_unit = unit_of([max(r["tile_ops_s"] for r in found)], OPS_S)
    return Table(
        "Weight formats, one thread: a token out of memory, a prompt of 512 tokens",
        ("format", "ISA"),
        (f"token, {rows_unit.name}", f"prompt, {tiles_unit.name}"),
        tuple(
            Row(
                str(r.get("format")),
                str(r.get("isa")),
                (
                    Cell(number(r["row_weights_s"], rows_unit)),
                    Cell(number(r["tile_ops_s"], tiles_unit)),
                ),
            )
            for r in found
        ),
    )


def device_tables(profile: dict[str, Any]) -> list[Table]:
    """All tables of a device profile."""
    made: list[Callable[[dict[str, Any]], Table | None]] = [
        storage_table,
        memory_table,
        peak_table,
        format_table,
    ]
    return [table for table in (make(profile) for make in made) if table is not None]


def facts_table(devices: Sequence[Device]) -> Table | None:
    """Facts of several devices side by side."""
    profiled = [device for device in devices if device.profile]
    if len(profiled) < 2:
        return None
    found = [dict(facts(device.profile or {})) for device in profiled]
    keys = dict.fromkeys(key for one in found for key in one)
    rows = tuple(Row("", key, tuple(Cell(one.get(key, "")) for one in found)) for key in keys)
    heads = tuple(device.name for device in profiled)
    return Table("The devices", ("",), heads, rows, words=True)
