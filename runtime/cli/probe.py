"""`stoker probe`: measures this device's speeds, for display and for the planner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files.output_file import check_output
from ..terminal.options import Json

if TYPE_CHECKING:
    from ...offload.plan.device_profile import DeviceProfile


def probe(
    *,
    path: Annotated[
        Path | None,
        typer.Option(help="Folder whose storage is measured [default: where models are kept]."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The profile to write [default: where stoker looks]."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="In 10 seconds instead of 60.")] = False,
    as_json: Json = False,
) -> None:
    """Measure this device, and save its profile.

    Processor, memory and its bandwidth, arithmetic, kernels, storage by block size and depth,
    battery and heat. stoker plan forecasts with the profile; take it along to forecast for this
    device elsewhere. Writes a scratch file of 1 GiB (--quick: 256 MiB) and removes it.

    \b
    stoker probe
    stoker probe --quick --json
    stoker probe --path /mnt/models --out laptop.json
    stoker plan mixture.gguf --memory 1GiB --device laptop.json
    """
    from ...mobile_bench.probe.probe import probe as measure
    from ...offload.plan import device_profile
    from ..terminal.terminal import stage_progress

    if out is not None:
        check_output(out)
    with stage_progress() as progress:
        profile = measure(path, quick=quick, progress=progress)
    # The profile is shown before it is saved, so that it is not lost if saving fails.
    typer.echo(json.dumps(profile, indent=2) if as_json else as_table(profile))
    target = out or device_profile.default_path()
    device_profile.save(profile, target)
    if not as_json:
        typer.echo(f"\n{profile.get('seconds', 0):.0f} seconds, saved as {target}")
    for reason in profile.get("noise", {}).get("noisy", []):
        typer.echo(f"noisy: {reason}", err=True)


def as_table(profile: DeviceProfile) -> str:
    """Returns the profile as tables for display."""
    from ..base.display import aligned

    rows = _facts(profile)
    width = max(len(what) for what, _ in rows)
    parts = ["\n".join(f"{what:{width}}  {found}" for what, found in rows)]
    for table in (_arithmetic(profile), _formats(profile), *_storage(profile)):
        if len(table) > 1:
            parts.append("\n".join(aligned(table, left=1)))
    return "\n\n".join(parts)


def _facts(profile: DeviceProfile) -> list[tuple[str, str]]:
    from ..base.display import size

    cpu, memory, power, storage = (profile[k] for k in ("cpu", "memory", "power", "storage"))
    platform = profile["platform"]
    virtual = ", a virtual machine" if platform["virtual"] else ""
    rows = [
        ("device", f"{profile['name']} ({profile['id']})"),
        ("system", f"{platform['system']} {platform['release']}{virtual}"),
        ("processor", cpu["model"]),
        (
            "cores",
            f"{cpu['performance']} performance of {cpu['physical']} physical, "
            f"{cpu['logical']} logical" + (f", quota of {cpu['quota']}" if cpu["quota"] else ""),
        ),
    ]
    if platform["product"]:
        rows.insert(1, ("product", platform["product"]))
    if len(cpu["kinds"]) > 1:
        rows += [("", _kind(kind)) for kind in cpu["kinds"]]
    if cpu["caches"]:
        rows.append(
            (
                "caches",
                ", ".join(f"{c['count']}x L{c['level']} {size(c['bytes'])}" for c in cpu["caches"]),
            )
        )
    isa = profile["isa"]
    rows.append(
        (
            "instruction sets",
            ", ".join(i + (" (active)" if i == isa["active"] else "") for i in isa["usable"]),
        )
    )
    limit = "no limit" if memory["limit"] is None else f"limit {size(memory['limit'])}"
    rows.append(
        ("memory", f"{size(memory['available'])} available of {size(memory['total'])}, {limit}")
    )
    speeds = ", ".join(
        f"{r['bytes_s'] / 1e9:.1f} GB/s on {r['threads']}" for r in profile["memory_reads"]
    )
    rows.append(("memory read", f"{speeds} threads"))
    disk = ", ".join(str(storage[k]) for k in ("filesystem", "device", "model") if storage.get(k))
    rows.append(("storage", f"{storage['path']}" + (f" ({disk})" if disk else "")))
    if "error" in storage:
        rows.append(("", storage["error"]))
    battery = power["battery"]
    if battery is not None:
        watts = "" if battery["watts"] is None else f", {battery['watts']:.1f} W"
        rows.append(("battery", f"{battery['percent']}%, {battery['status']}{watts}"))
    if power["temperatures"]:
        hottest = max(power["temperatures"], key=lambda zone: power["temperatures"][zone])
        rows.append(("heat", f"{power['temperatures'][hottest]:.0f} °C ({hottest})"))
    rows.append(("energy", power["energy"] or "not readable"))
    return rows


def _kind(kind: dict[str, object]) -> str:
    facts = [f"{kind['cores']}x {kind['name'] or 'core'}", f"CPUs {kind['cpus']}"]
    if kind["capacity"] is not None:
        facts.append(f"capacity {kind['capacity']}")
    if isinstance(kind["max_hz"], int):
        facts.append(f"{kind['max_hz'] / 1e9:.2f} GHz")
    return ", ".join(facts)


def _arithmetic(profile: DeviceProfile) -> list[list[str]]:
    counts = sorted({p["threads"] for p in profile["peaks"]})
    of = {(p["isa"], p["kind"], p["threads"]): p["ops_s"] for p in profile["peaks"]}
    rows = [["peak, GOP/s", *(f"{kind} x{n}" for kind in ("int8", "float32") for n in counts)]]
    for isa in profile["isa"]["usable"]:
        cells = [of.get((isa, kind, n)) for kind in ("int8", "float32") for n in counts]
        rows.append([isa, *("-" if c is None else f"{c / 1e9:.0f}" for c in cells)])
    return rows


def _formats(profile: DeviceProfile) -> list[list[str]]:
    isa = profile["isa"]["active"]
    rows = [[f"{isa}, 1 thread", "one token, Gweights/s", "prompt, GOP/s"]]
    for f in profile["formats"]:
        rows.append(
            [f["format"], f"{f['row_weights_s'] / 1e9:.1f}", f"{f['tile_ops_s'] / 1e9:.0f}"]
        )
    return rows


def _storage(profile: DeviceProfile) -> list[list[list[str]]]:
    from ..base.display import size

    tables = []
    of = {(r["mode"], r["block"], r["depth"]): r["bytes_s"] for r in profile["storage_reads"]}
    for mode in dict.fromkeys(r["mode"] for r in profile["storage_reads"]):
        blocks = sorted({b for m, b, _ in of if m == mode})
        depths = sorted({d for m, _, d in of if m == mode})
        table = [[f"{mode} reads, MB/s", *(f"depth {d}" for d in depths)]]
        for block in blocks:
            cells = [of.get((mode, block, d)) for d in depths]
            table.append([size(block), *("-" if c is None else _rate(c) for c in cells)])
        tables.append(table)
    return tables


def _rate(bytes_s: float) -> str:
    return f"{bytes_s / 1e6:.1f}" if bytes_s < 1e7 else f"{bytes_s / 1e6:.0f}"
