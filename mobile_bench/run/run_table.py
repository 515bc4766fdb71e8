"""A series of runs as tables for people, and as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ...runtime.base.display import aligned
from ..probe.noise import REFERENCE, drift
from .records import Roofline, Run

OWN = "stoker"
# (figure, function that takes it from a run, whether more is better)
_COMPARED: tuple[tuple[str, Callable[[Run], dict[str, float]], bool], ...] = (
    ("decode tok/s", lambda r: {"": r["decode"]["tok_s"]} if r["decode"] else {}, True),
    (
        "prompt tok/s",
        lambda r: {f"{p['tokens']} tokens": p["tok_s"] for p in r["prompts"]},
        True,
    ),
    ("cold load", lambda r: {"": r["load_cold_s"]} if r["load_cold_s"] else {}, False),
    ("peak memory", lambda r: {"": float(r["peak_bytes"])} if r["peak_bytes"] else {}, False),
)

Setup = tuple[str, int | None, int | None, int, str]


def setup_of(run: Run) -> Setup:
    """The key that a configuration's repeats share: engine, limit, budget, threads, options."""
    options = ",".join(f"{k}={v}" for k, v in run["options"].items())
    return (run["engine"], run["limit"], run["memory"], run["threads"], options)


def grouped(runs: Sequence[Run]) -> dict[Setup, list[Run]]:
    """The repeats of each configuration, in order of first appearance."""
    found: dict[Setup, list[Run]] = {}
    for run in sorted(runs, key=lambda r: r["repeat"]):
        found.setdefault(setup_of(run), []).append(run)
    return found


def memory_name(run: Run) -> str:
    """The name of the run's limit, or of its budget if it has no limit."""
    nbytes = run["limit"] or run["memory"]
    return "resident" if nbytes is None else mb(nbytes)


def mb(nbytes: float) -> str:
    """Bytes for people, in decimal units, as limits are named."""
    return f"{nbytes / 1e9:g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Median and (smallest to largest)."""
    if not values:
        return "-"
    middle = format(statistics.median(values), form)
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):{form}} to {max(values):{form}})"


def median(values: Sequence[float | None], form: str, scale: float = 1.0) -> str:
    """Formatted median of the known values, times `scale`; "-" if none is known."""
    known = [v * scale for v in values if v is not None]
    return format(statistics.median(known), form) if known else "-"


def as_text(runs: Sequence[Run], rooflines: Sequence[Roofline]) -> str:
    """All tables as text."""
    parts = [decode_table(runs, rooflines), prompt_table(runs), ratio_table(runs), remarks(runs)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def decode_table(runs: Sequence[Run], rooflines: Sequence[Roofline]) -> list[str]:
    """The decode table, one line per configuration: load, decode, flash, memory, energy."""
    limits = {(r["memory"], r["threads"]): r["limit_s"] for r in rooflines}
    head = ["memory", "engine", "threads", "decode tok/s", "p50", "p95", "p99 ms", "roofline"]
    head += ["MB read", "hits", "wait ms", "load cold", "warm s", "peak MB", "group", "J/token"]
    rows = [head]
    dead = []
    for held in grouped(runs).values():
        first = held[0]
        good = [r for r in held if r["decode"] is not None]
        name = [memory_name(first), first["engine"], str(first["threads"])]
        if not good:
            dead.append(f"{name[0]}, {name[1]}, {name[2]} threads: {first['error']}")
            continue
        decodes = [r["decode"] for r in good if r["decode"] is not None]
        speeds = [d["tok_s"] for d in decodes]
        limit = limits.get((first["memory"], first["threads"]))
        share = "-" if limit is None else f"{limit * statistics.median(speeds):.0%}"
        energy = [(r["energy"] or {}).get("joules_token") for r in good]
        rows.append(
            [
                *name,
                spread(speeds, ".2f" if statistics.median(speeds) < 10 else ".1f"),
                *(median([d["token_ms"][q] for d in decodes], ".1f") for q in ("p50", "p95")),
                median([d["token_ms"]["p99"] for d in decodes], ".1f"),
                share,
                median([d["bytes_token"] for d in decodes], ".1f", 1e-6),
                median([d["hit_rate"] for d in decodes], ".1%"),
                median([d["stall_s"] for d in decodes], ".1f", 1e3),
                median([r["load_cold_s"] for r in good], ".2f"),
                median([r["load_warm_s"] for r in good], ".2f"),
                median([r["peak_bytes"] for r in good], ".0f", 1e-6),
                median([r["group_peak_bytes"] for r in good], ".0f", 1e-6),
                median(energy, ".2f"),
            ]
        )
    return _without_empty(rows, 2) + dead


def prompt_table(runs: Sequence[Run]) -> list[str]:
    """Time to the first token, seconds, by the length of the prompt."""
    lengths = sorted({p["tokens"] for r in runs for p in r["prompts"]})
    rows = [["TTFT, s", "engine", "threads", *(f"{n} tokens" for n in lengths)]]
    for held in grouped(runs).values():
        times = [
            [p["ttft_s"] for r in held for p in r["prompts"] if p["tokens"] == n] for n in lengths
        ]
        if any(times):
            first = held[0]
            name = [memory_name(first), first["engine"], str(first["threads"])]
            rows.append([*name, *(spread(t, ".2f") for t in times)])
    return aligned(rows, left=2) if len(rows) > 1 else []


def ratio_table(runs: Sequence[Run]) -> list[str]:
    """Each other engine against stoker: ratios within a repeat, above 1 in stoker's favour."""
    pairs: dict[tuple[str, str], dict[int, tuple[Run, Run]]] = {}
    engine = OWN if any(r["engine"] == OWN for r in runs) else (runs[0]["engine"] if runs else "")
    for other in runs:
        for own in runs:
            if own["engine"] == engine != other["engine"] and _place(own) == _place(other):
                name = f"{memory_name(own)}, {own['threads']} threads"
                pairs.setdefault((name, other["engine"]), {})[own["repeat"]] = (own, other)
    rows = [[f"{engine} against", "", "figure", "ratio"]]
    for (name, against), held in pairs.items():
        for what, take, more in _COMPARED:
            ratios: dict[str, list[float]] = {}
            for own, other in held.values():
                a, b = take(own), take(other)
                for key in a.keys() & b.keys():
                    ratios.setdefault(key, []).append(a[key] / b[key] if more else b[key] / a[key])
            for key in sorted(ratios, key=lambda k: (len(k), k)):
                figure = f"{what}, {key}" if key else what
                rows.append([against, name, figure, spread(ratios[key], ".2f") + " x"])
        rows.append([against, name, "same tokens", _agreement(list(held.values()))])
    return aligned(rows, left=3) if len(rows) > 1 else []


def _place(run: Run) -> tuple[int, int | None, int | None, int]:
    """The key that a pair of runs has in common."""
    return (run["repeat"], run["limit"], run["memory"], run["threads"])


def _agreement(pairs: list[tuple[Run, Run]]) -> str:
    """Text that says how many leading greedy tokens of two engines agree."""
    counts = []
    for a, b in pairs:
        ids = list(zip(a.get("token_ids", []), b.get("token_ids", []), strict=False))
        if ids:
            same = next((i for i, (x, y) in enumerate(ids) if x != y), len(ids))
            counts.append((same, len(ids)))
    if not counts:
        return "-"
    same, of = min(counts)
    return f"{same} of {of}"


def remarks(runs: Sequence[Run]) -> list[str]:
    """What figures mean and lack, and whether the machine was too noisy to trust them."""
    found = []
    if any(run["limit"] is not None for run in runs):
        found.append("memory: of each run's own cgroup, page cache included; stoker's budget: 95%")
    notes: dict[str, list[int]] = {}
    for run in runs:
        where = f"{memory_name(run)}, {run['engine']}, {run['threads']} threads"
        for note in run.get("notes", []):
            notes.setdefault(f"{where}: not measured: {note}", []).append(run["repeat"] + 1)
    for note, repeats in notes.items():
        found.append(f"{note} (repeat {', '.join(map(str, repeats))})")
    measured = [r for r in runs if r["noise"]]
    noisy = [r for r in measured if r["noise"]["noisy"]]
    if noisy:
        found.append(f"NOISY: {len(noisy)} of {len(measured)} runs:")
        found += [
            f"  {r['engine']}, {memory_name(r)}, repeat {r['repeat'] + 1}: "
            + "; ".join(r["noise"]["noisy"])
            for r in noisy
        ]
    elif measured:
        found.append("noise: none that matters (steal, other processes, throttling, clock)")
    change = drift([r["noise"] for r in measured])
    if change > REFERENCE:
        found.append(f"the machine's speed (a reference loop) varied by {change:.0%} over the runs")
    return found


def _without_empty(rows: list[list[str]], left: int) -> list[str]:
    """Aligned rows without the columns in which nobody has a value."""
    if len(rows) < 2:
        return []
    used = [i for i in range(len(rows[0])) if any(row[i] != "-" for row in rows[1:])]
    return aligned([[row[i] for i in used] for row in rows], left=left)


def as_csv(runs: Sequence[Run]) -> str:
    """CSV with one line per run, and a column for each prompt length."""
    lengths = sorted({p["tokens"] for r in runs for p in r["prompts"]})
    rows = [_cells(run, lengths) for run in runs]
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _cells(run: Run, lengths: list[int]) -> dict[str, Any]:
    decode: Any = run["decode"] or {}
    noise, energy = run["noise"], run["energy"] or {}
    cells: dict[str, Any] = {
        "run": run["run"],
        "time": run["time"],
        "device": run["device"],
        "model": run["model"]["name"],
        "engine": run["engine"],
        "engine_version": run["engine_version"],
        "repeat": run["repeat"],
        "threads": run["threads"],
        "context": run["context"],
        "limit": run["limit"],
        "memory": run["memory"],
        "load_cold_s": run["load_cold_s"],
        "load_warm_s": run["load_warm_s"],
        "decode_tokens": decode.get("tokens"),
        "decode_tok_s": decode.get("tok_s"),
    }
    cells |= {f"token_ms_{q}": decode.get("token_ms", {}).get(q) for q in ("p50", "p95", "p99")}
    for name in ("bytes_token", "hit_rate", "stall_s", "compute_s"):
        cells[name] = decode.get(name)
    times = {p["tokens"]: p["ttft_s"] for p in run["prompts"]}
    cells |= {f"ttft_s_{n}": times.get(n) for n in lengths}
    cells |= {
        "peak_bytes": run["peak_bytes"],
        "group_peak_bytes": run["group_peak_bytes"],
        "joules_token": energy.get("joules_token"),
        "steal": noise.get("steal"),
        "busy": noise.get("busy"),
        "throttled": noise.get("throttled"),
        "noisy": "; ".join(noise.get("noisy", [])),
        "error": run["error"],
        "notes": "; ".join(run.get("notes", [])),
    }
    return cells
