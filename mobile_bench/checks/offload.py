"""What each part of expert offloading is worth, on one model inside one memory limit.

    python -m stoker.mobile_bench.checks.offload MODEL [--limit 1GB] [--repeats 3]
        [--baseline-python PY]

Lines, each with one part more than the one before: memory-mapped reads, direct reads on demand,
with a cache (each policy), with overlap of reads and computation, with each predictor, and with the
controller that decides while running (the default). `--lines all,resident,llama_cpp` also runs the
model without a limit, and llama-cpp-python on its memory map inside the limit.

Linux, as root: every run is a process in a memory cgroup of its own with the stated limit (swap
excluded), after the page cache was dropped; the expert cache is empty at start. Before the first
run the file is read once directly, because disks of virtual machines have caches of their own; and
before each run, twice the memory that it will use is touched and freed (`prepare`). Repeats are
interleaved. The limit time of a token is the larger of its computation time (a resident run in this
series) and the bytes that an optimal cache (Belady) of as many slots would have missed on the same
routing, over the bandwidth that reading random experts reaches in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from stoker.mobile_bench.checks.compare import spread
from stoker.mobile_bench.run import routing_trace
from stoker.mobile_bench.run.cgroup_run import MemoryGroup, memory_group
from stoker.mobile_bench.run.preparation import drop_page_cache, read_directly, touch_memory
from stoker.mobile_bench.run.prompt_ids import prompt_ids
from stoker.mobile_bench.run.worker_process import WorkerError, WorkerProcess
from stoker.runtime.base.errors import DeviceError

LLAMA = {"use_mmap": True, "repack": False}


def lines() -> dict[str, dict[str, Any]]:
    """Name -> engine options, in the order of the table."""
    from stoker.runtime import _core

    demand = {"predictor": "none", "prefetch": "off"}
    policy = "reuse"
    table: dict[str, dict[str, Any]] = {
        "memory-mapped": {**demand, "io": "mmap", "cache": False, "overlap": False},
        "direct reads on demand": {**demand, "cache": False, "overlap": False},
    }
    for name, _ in _core.policies():
        table[f"+ cache, {name}"] = {**demand, "policy": name, "overlap": False}
    table[f"+ overlap ({policy})"] = {**demand, "policy": policy}
    for name, _ in _core.predictors():
        if name in ("none", "oracle", "linear", "path"):  # the last three need a recording
            continue
        table[f"+ prefetch, {name}"] = {"predictor": name, "prefetch": "on", "policy": policy}
    table["+ controller (default)"] = {}
    return table


def prepare(nbytes: int) -> None:
    """Drops the page cache; touches and frees twice `nbytes` (see preparation.py)."""
    drop_page_cache([])
    touch_memory(2 * nbytes)


def run(
    python: str, engine: str, model: Path, task: dict[str, Any], group: MemoryGroup | None
) -> dict[str, Any]:
    """Runs one worker: prompt, n greedy tokens. Returns {"error": ...} if it died.

    task: prompt [ids], n, context, threads, engine (options), trace (record the routing).
    """
    try:
        with WorkerProcess(
            engine,
            model,
            threads=task["threads"],
            context=task["context"],
            options=task["engine"],
            python=python,
            group=group,
        ) as worker:
            result = answers(worker, task)
    except (WorkerError, DeviceError) as error:
        result = {"error": str(error)}
    if group:
        result["cgroup"] = {"peak": group.peak(), "kills": group.kills(), "swap": group.swapped()}
    return result


def answers(worker: WorkerProcess, task: dict[str, Any]) -> dict[str, Any]:
    """A worker's measurements: seconds; for stoker also the plan, the expert store's decode
    counters, the disk's bandwidth, and for a traced run the misses per token of an ideal cache."""
    loaded = worker.ask("load")
    trace = task.get("trace") and worker.ask("record")["recording"]
    prompt = worker.ask("prompt", tokens=task["prompt"])
    decoded = worker.ask("decode", n=task["n"])
    result: dict[str, Any] = {
        "peak_rss": worker.ask("memory")["peak_bytes"],
        "load_s": loaded["seconds"],
        "prompt_s": prompt["seconds"],
        "decode_s": sum(decoded["token_s"]),
        "token_s": decoded["token_s"],
        "tokens": [prompt["token"], *decoded["tokens"]],
    }
    if loaded["plan"] is not None:
        result["plan"] = loaded["plan"]
    if decoded["counters"] is not None:
        counters = dict(decoded["counters"])
        result["prefetch"], result["io"] = counters.pop("prefetch"), counters.pop("io")
        result["decode"] = counters
        result["flash_bandwidth"] = worker.ask("flash", nbytes=512 << 20, seeds=5)["bytes_s"]
    if trace:
        with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
            file = Path(folder) / "routing.npz"
            worker.ask("routing", path=str(file))
            result["belady_misses"] = routing_trace.belady_misses(
                routing_trace.load(file), loaded["config"], loaded["plan"]["slots"], task["n"]
            )
    return result


def roofline(records: dict[str, list[dict[str, Any]]], n: int) -> dict[str, float]:
    """Seconds per token: computation alone, optimal reading, and the larger of them."""
    traced = records["+ controller (default)"][0]
    plan = traced["plan"]
    misses = traced["belady_misses"]
    unit = plan["slot_bytes"] / plan["slots"]
    bandwidth = statistics.median(
        r["flash_bandwidth"] for runs in records.values() for r in runs if "flash_bandwidth" in r
    )
    compute = statistics.median(r["decode_s"] / n for r in records["resident"] if "decode_s" in r)
    read = misses * unit / bandwidth
    return {
        "compute_s": compute,
        "belady_misses": misses,
        "belady_bytes": misses * unit,
        "flash_bandwidth": bandwidth,
        "read_s": read,
        "limit_s": max(compute, read),
    }


def speed(run: dict[str, Any]) -> float:
    """Decoded tokens per second, 0 if the run died."""
    return len(run["token_s"]) / run["decode_s"] if "decode_s" in run else 0.0


def report(result: dict[str, Any]) -> str:
    """The results as a tab-separated table."""
    limit = result["roofline"]["limit_s"]
    rows = ["line\tdecode tok/s\tof the roofline\tprompt s\thits\tMB a token\tstall ms\tpeak MB"]
    for name, runs in result["records"].items():
        good = [r for r in runs if "decode_s" in r]
        if not good:
            rows.append(f"{name}\t{runs[0]['error']}")
            continue
        n = len(good[0]["token_s"])
        speeds = [speed(r) for r in good]
        cells = [name, spread(speeds), f"{limit * statistics.median(speeds):.0%}"]
        cells.append(f"{statistics.median(r['prompt_s'] for r in good):.2f}")
        if "decode" in good[0]:
            d = [r["decode"] for r in good]
            used = [x["decode_hits"] + x["decode_late"] + x["decode_misses"] for x in d]
            hits = [x["decode_hits"] / u for x, u in zip(d, used, strict=True)]
            cells.append(f"{statistics.median(hits):.1%}")
            cells.append(f"{statistics.median(x['decode_bytes'] for x in d) / n / 1e6:.1f}")
            cells.append(f"{1e3 * statistics.median(x['decode_stall_s'] for x in d) / n:.1f}")
        else:
            cells += ["", "", ""]
        peaks = [r["cgroup"]["peak"] if "cgroup" in r else r["peak_rss"] for r in good]
        cells.append(f"{max(peaks) / 1e6:.0f}")
        rows.append("\t".join(cells))
    r = result["roofline"]
    rows.append(
        f"roofline: {1 / limit:.1f} tok/s = the slower of computation "
        f"({r['compute_s'] * 1e3:.1f} ms) and reading ({r['read_s'] * 1e3:.1f} ms: "
        f"{r['belady_misses']:.1f} misses, {r['belady_bytes'] / 1e6:.1f} MB a token "
        f"at {r['flash_bandwidth'] / 1e6:.0f} MB/s)"
    )
    return "\n".join(rows)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a mixture-of-experts GGUF file")
    parser.add_argument("--limit", default="1GB", help="of the cgroup")
    parser.add_argument("--memory", help="stoker's budget; default: the limit less 5%%")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lines", default="all", help="all, or names (parts of them) with commas")
    parser.add_argument("--baseline-python", help="a Python with llama-cpp-python: one more line")
    parser.add_argument("--slow-tokens", type=int, default=16, help="of lines without a cache")
    parser.add_argument("--json", type=Path, help="also write all records to this file")
    options = parser.parse_args()

    from stoker.models.locate import locate
    from stoker.runtime import _core
    from stoker.runtime.base.memory import byte_count

    model = locate(options.model, download=False)
    limit = byte_count(options.limit)
    budget = byte_count(options.memory) if options.memory else limit * 95 // 100
    prompt = list(prompt_ids(model, options.prompt_tokens))
    wanted = options.lines.split(",")
    table = {
        name: {**engine, "memory": budget}
        for name, engine in lines().items()
        if "all" in wanted or "default" in name or any(w in name for w in wanted)
    }
    table["resident"] = {}
    task = {"prompt": prompt, "context": options.context, "threads": options.threads}
    read_directly(model)
    records: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(options.repeats):
        for name, engine in table.items():
            prepare(model.stat().st_size + limit if name == "resident" else limit)
            trace = repeat == 0 and "default" in name
            # Without a cache every token takes seconds.
            n = options.slow_tokens if engine.get("cache") is False else options.tokens
            this = {**task, "n": n, "engine": engine, "trace": trace}
            with nullcontext() if name == "resident" else memory_group(limit) as group:
                result = run(sys.executable, "stoker", model, this, group)
            records.setdefault(name, []).append(result)
            print(f"repeat {repeat + 1}: {name}: {speed(result):.2f} tok/s", file=sys.stderr)
        if options.baseline_python:
            prepare(limit)
            this = {**task, "n": options.slow_tokens, "engine": LLAMA}
            with memory_group(limit) as group:
                result = run(options.baseline_python, "llama-cpp", model, this, group)
            records.setdefault("llama-cpp-python, memory-mapped", []).append(result)
            print(f"repeat {repeat + 1}: {speed(result):.2f} tok/s on llama.cpp", file=sys.stderr)
    summary = {
        "model": model.name,
        "limit": limit,
        "budget": budget,
        "n": options.tokens,
        "prompt_tokens": len(prompt),
        "cpu": _core.cpu(),
        "roofline": roofline(records, options.tokens),
        "records": records,
    }
    print(
        f"{model.name} in {limit / 1e6:.0f} MB, budget {budget / 1e6:.0f} MB, "
        f"{options.repeats} repeats"
    )
    print(report(summary))
    if options.json:
        for runs in records.values():
            for r in runs:
                r.pop("tokens", None)
                times = sorted(r.pop("token_s", []))
                if times:
                    r["token_ms"] = {q: 1e3 * times[len(times) * q // 100] for q in (50, 95, 99)}
        options.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
