"""The same file through stoker and llama-cpp-python, interleaved in one run.

    python -m stoker.mobile_bench.checks.compare MODEL [--repeats 7] [--baseline-python PYTHON]

Each repeat measures both engines, one after the other and in alternating order, each in a process
of its own: time to the first token of a 16-token prompt from a cold process (page cache warm), a
512-token prompt, and 128 greedy tokens. Ratios are taken within a repeat, so that a drift of the
machine's speed cancels; medians and the spread (minimum to maximum) are printed. Decode is related
to the memory bandwidth and prefill to the int8 peak, both measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stoker.mobile_bench.run.baseline import install_baseline
from stoker.mobile_bench.run.prompt_ids import prompt_ids
from stoker.mobile_bench.run.worker_process import WorkerProcess

ENGINES = ("stoker", "llama-cpp")
FIRST, PROMPT, DECODE = 16, 512, 128
CONTEXT = 1024


def worker(python: str, engine: str, model: Path, threads: int) -> WorkerProcess:
    """A worker with the model, everything in memory."""
    return WorkerProcess(engine, model, threads=threads, context=CONTEXT, python=python)


def first_token(python: str, engine: str, model: Path, threads: int, tokens: list[int]) -> float:
    """Seconds from starting a process to its first token."""
    start = time.perf_counter()
    with worker(python, engine, model, threads) as process:
        process.ask("prompt", tokens=tokens)
        return time.perf_counter() - start


def measure(model: Path, pythons: dict[str, str], threads: int, repeats: int) -> list[dict]:  # type: ignore[type-arg]
    """One record per repeat: {engine: {first_s, prefill_tok_s, decode_tok_s, peak_bytes}}."""
    tokens = list(prompt_ids(model, PROMPT))
    records = []
    for repeat in range(repeats + 1):  # the first one warms the page cache and is not counted
        record: dict[str, dict[str, float]] = {}
        for name in ENGINES if repeat % 2 else reversed(ENGINES):
            python = pythons[name]
            first = first_token(python, name, model, threads, tokens[:FIRST])
            with worker(python, name, model, threads) as process:
                process.ask("prompt", tokens=tokens)
                prefill = process.ask("prompt", tokens=tokens)["seconds"]
                process.ask("prompt", tokens=tokens[:FIRST])
                process.ask("decode", n=8)
                process.ask("prompt", tokens=tokens[:FIRST])
                decode = sum(process.ask("decode", n=DECODE)["token_s"])
                peak = process.ask("memory")["peak_bytes"]
            record[name] = {
                "first_s": first,
                "prefill_tok_s": PROMPT / prefill,
                "decode_tok_s": DECODE / decode,
                "peak_bytes": peak,
            }
        if repeat:
            records.append(record)
        print(f"repeat {repeat}/{repeats}", file=sys.stderr)
    return records


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Median and (minimum to maximum)."""
    m, low, high = (f(values) * scale for f in (statistics.median, min, max))
    return f"{m:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


# figure -> (title, factor to the printed unit, digits, whether more is better)
FIGURES = {
    "first_s": ("TTFT, 16 tokens, cold process, ms", 1e3, 0, False),
    "prefill_tok_s": (f"prefill of {PROMPT} tokens, tok/s", 1.0, 0, True),
    "decode_tok_s": (f"decode of {DECODE} tokens, tok/s", 1.0, 1, True),
    "peak_bytes": ("peak memory, MB", 1e-6, 0, False),
}


def report(result: dict[str, Any]) -> str:
    """The records as a tab-separated table; ratios above 1 are in stoker's favour."""
    lines = ["figure\tstoker\tllama-cpp-python\tratio"]
    for key, (title, scale, digits, more) in FIGURES.items():
        ours, theirs = ([r[name][key] for r in result["records"]] for name in ENGINES)
        ratios = [a / b if more else b / a for a, b in zip(ours, theirs, strict=True)]
        cells = [spread(ours, scale, digits), spread(theirs, scale, digits), spread(ratios, 1, 2)]
        lines.append("\t".join([title, *cells]))
    for name in ENGINES:
        records = result["records"]
        gbs = statistics.median(r[name]["decode_tok_s"] for r in records) * result["token_bytes"]
        gops = statistics.median(r[name]["prefill_tok_s"] for r in records) * result["layer_ops"]
        lines.append(
            f"{name}: decode {gbs / 1e9:.1f} GB/s, {gbs / result['bandwidth']:.0%} of "
            f"{result['bandwidth'] / 1e9:.1f} GB/s; prefill {gops / 1e9:.0f} GOP/s, "
            f"{gops / result['peak']:.0%} of {result['peak'] / 1e9:.0f} GOP/s"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a GGUF file or a catalogue name")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: the physical cores")
    parser.add_argument("--json", type=Path, help="also write all records to this file")
    parser.add_argument("--baseline-python", help="a Python that has llama-cpp-python")
    parser.add_argument(
        "--install-baseline", action="store_true", help="build one in the user cache, 5 minutes"
    )
    options = parser.parse_args()

    from stoker.models.locate import locate
    from stoker.runtime import _core

    baseline = options.baseline_python or sys.executable
    if options.install_baseline:
        baseline = install_baseline()
    model = locate(options.model, download=True)
    engine = _core.Engine(_core.GgufFile(str(model)), threads=options.threads)
    plan = engine.plan
    threads = int(plan["threads"])
    result: dict[str, Any] = {
        "model": model.name,
        "threads": threads,
        "isa": plan["isa"],
        "cpu": _core.cpu(),
        "token_bytes": plan["token_bytes"],
        "layer_ops": 2 * plan["layer_macs"],
        "bandwidth": _core.read_bandwidth(threads, int(plan["token_bytes"])),
        "peak": _core.int8_peak(plan["isa"], threads),
    }
    del engine
    pythons = {"stoker": sys.executable, "llama-cpp": baseline}
    result["records"] = measure(model, pythons, threads, options.repeats)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['model']}, {threads} threads, {result['isa']}, {options.repeats} repeats")
    print(report(result))


if __name__ == "__main__":
    main()
