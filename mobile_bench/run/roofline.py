"""The least time per token: computation, or reading what even the best cache misses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .records import Roofline, Run


def rooflines(runs: Sequence[Run]) -> list[Roofline]:
    """One roofline for each budget and number of threads of a mixture that was also run with
    everything in memory, with the same threads.

    Computation is the time per token of that resident run; reading is what a cache that knows the
    future would have missed on the same routing, at the bandwidth of random experts in the series.
    """
    own = [r for r in runs if r["engine"] == "stoker" and r["decode"] is not None]
    found: list[Roofline] = []
    # All budgets share one disk, so the bandwidth is that of the whole series.
    speeds = [flash["bytes_s"] for r in own if (flash := r.get("flash")) and flash["bytes_s"]]
    if not speeds:
        return found
    bandwidth = statistics.median(speeds)
    groups: dict[tuple[str, int | None, int], list[Run]] = {}
    for r in own:
        groups.setdefault((r["model"]["name"], r["memory"], r["threads"]), []).append(r)
    for (model, memory, threads), held in groups.items():
        reads = [flash["belady_bytes"] for r in held if (flash := r.get("flash"))]
        resident = groups.get((model, None, threads))
        if memory is None or not reads or not resident:
            continue
        compute = statistics.median(token_seconds(r) for r in resident)
        read = statistics.median(reads)
        found.append(
            {
                "kind": "roofline",
                "run": held[0]["run"],
                "device": held[0]["device"],
                "model": model,
                "memory": memory,
                "threads": threads,
                "compute_s": compute,
                "bytes_s": bandwidth,
                "read_bytes": read,
                "limit_s": max(compute, read / bandwidth),
            }
        )
    return found


def token_seconds(run: Run) -> float:
    """Mean seconds of a decoded token of a run that has any."""
    assert run["decode"] is not None
    return run["decode"]["seconds"] / run["decode"]["tokens"]
