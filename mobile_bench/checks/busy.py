"""What stoker keeps of its decode speed beside other programs that never rest.

    python -m stoker.mobile_bench.checks.busy MODEL[=MEMORY] ... [--spinners 1,2] [--repeats 5]
        [--seconds 3] [--text FILE] [--threads N] [--json]

For each model (a name or a file; MEMORY: a budget, else everything is in memory) a session decodes
forced real text. Periods without and with N spinning processes take turns, `--repeats` of each;
a period begins half a second after the spinners. The share kept is the median of the ratios of
neighbouring periods. Beside it stands the fair share, which the scheduler of the system would give
to as many runnable threads as stoker has: threads * cores / (threads + spinners), at most the
cores, over the threads that run undisturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import stoker
from stoker.mobile_bench.checks.compare import spread

TEXT = (
    "The ship had been at sea for forty days when the captain saw, far to the north, a line of "
    "white that was neither cloud nor ice. He called the mate, who had sailed these waters before "
    "any of them was born, and asked him what it might be. "
)
_SETTLE_S = 0.5  # the system moves threads to other cores meanwhile


@contextmanager
def spinning(n: int) -> Iterator[None]:
    """Runs n processes that compute all the time."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(n)]
    try:
        time.sleep(_SETTLE_S)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Decoder:
    """A sequence that decodes the same text over and over."""

    def __init__(self, model: stoker.Model, text: str) -> None:
        self._ids = model.tokenizer.encode(text)[: model.session().context - 1]
        self._sequence = model.engine.sequence()
        self._start = min(32, len(self._ids) // 2)
        self._sequence.eval(self._ids[: self._start])

    def rate(self, seconds: float) -> float:
        """Tokens a second of so many seconds of decoding."""
        sequence, n = self._sequence, 0
        begin = time.perf_counter()
        while (took := time.perf_counter() - begin) < seconds:
            if sequence.position == len(self._ids):
                sequence.truncate(self._start)
            sequence.eval([self._ids[sequence.position]], "decode")
            n += 1
        return n / took


def fair_share(threads: int, spinners: int) -> float:
    """The share of its speed that a program of so many threads keeps where all get the same."""
    cores = len(os.sched_getaffinity(0))
    undisturbed = min(threads, cores)
    return min(1.0, threads * cores / (threads + spinners) / undisturbed)


def measure(
    name: str, memory: str | None, spinners: list[int], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One line for each number of spinners."""
    loading: dict[str, Any] = {} if memory is None else {"memory": memory}
    if options.threads:
        loading["threads"] = options.threads
    model = stoker.load(name, context=2048, **loading)
    text = TEXT * 40 if options.text is None else Path(options.text).read_text(encoding="utf-8")
    decoder = Decoder(model, text)
    decoder.rate(options.seconds)
    for n in spinners:
        alone, beside = [], []
        for _ in range(options.repeats):
            alone.append(decoder.rate(options.seconds))
            with spinning(n):
                beside.append(decoder.rate(options.seconds))
        ratios = [b / a for a, b in zip(alone, beside, strict=True)]
        threads = int(model.plan["threads"])
        yield {
            "model": Path(name).name,
            "memory": memory or "resident",
            "threads": threads,
            "spinners": n,
            "alone_tok_s": statistics.median(alone),
            "beside_tok_s": statistics.median(beside),
            "kept": statistics.median(ratios),
            "ratios": ratios,
            "fair": fair_share(threads, n),
        }


def main() -> int:
    """Runs the program. Returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL[=MEMORY]")
    parser.add_argument("--spinners", default="1,2", help="numbers of processes, by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a period")
    parser.add_argument("--text", help="UTF-8 text to decode")
    parser.add_argument("--threads", type=int, default=0, help="0: as stoker chooses")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    options = parser.parse_args()
    spinners = [int(n) for n in options.spinners.split(",")]
    if not options.json:
        print("model\tmemory\tthreads\tspinners\talone tok/s\tbeside tok/s\tkept\tfair")
    for given in options.models:
        name, _, memory = given.partition("=")
        for line in measure(name, memory or None, spinners, options):
            if options.json:
                print(json.dumps(line), flush=True)
                continue
            print(
                f"{line['model']}\t{line['memory']}\t{line['threads']}\t{line['spinners']}\t"
                f"{line['alone_tok_s']:.1f}\t{line['beside_tok_s']:.1f}\t"
                f"{spread(line['ratios'], digits=2)}\t{line['fair']:.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
