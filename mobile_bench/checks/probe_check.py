"""Compares the probe's figures with fio's and with those of a STREAM-like loop, in one run.

Storage: the same unnamed file, block, depth and direct I/O; fio with its psync engine, one thread
per concurrent read, into huge pages if they can be had (root), as the probe does it. Memory: the
same number of bytes and threads; the loop is C, compiled here. The two take turns, and each pair
gives one ratio; as many pairs as the noise asks for, five to ten minutes in all on a noisy disk.

    python -m stoker.mobile_bench.checks.probe_check --json FILE
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...offload.plan.device_profile import current_id
from ..probe import storage as probe_storage
from ..probe.cpu import caches
from ..probe.noise import NoiseWatch
from ..probe.probe import memory_bytes

if TYPE_CHECKING:
    from ...runtime._core import StorageFile

POINTS = (  # (bytes of a block, depth)
    (4 << 10, 1),
    (4 << 10, 16),
    (64 << 10, 4),
    (256 << 10, 4),
    (1 << 20, 1),
    (1 << 20, 4),
    (4 << 20, 16),
)
WITHIN = 0.1  # allowed difference, as a share of the other's figure
_LEAST_PAIRS = 7
_HUGE_PAGES = 64  # pages of 2 MiB: 16 threads with 4 MiB each, rounded up
_PASSES = 5  # passes over the memory; the best counts, as in STREAM

# Sums an array, one part per thread, and prints the bytes per second of the best pass.
_READ_LOOP = r"""
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

// As wide as any machine's registers, and four sums: loads must not wait for additions.
typedef uint64_t wide __attribute__((vector_size(64), aligned(8)));

static uint64_t *data, sums[1024];
static double begun[1024], ended[1024];
static size_t words;
static int threads;
static pthread_barrier_t barrier;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *part(void *which) {
  size_t t = (size_t)which, begin = words * t / threads, end = words * (t + 1) / threads;
  for (size_t i = begin; i < end; ++i) data[i] = i;
  for (int pass = 0; pass < PASSES; ++pass) {
    pthread_barrier_wait(&barrier);
    wide sum[4] = {{0}};
    begun[t] = now();
    for (size_t i = begin; i + 32 <= end; i += 32) {
      for (int j = 0; j < 4; ++j) sum[j] += *(const wide *)(data + i + 8 * j);
    }
    ended[t] = now();
    sum[0] += sum[1] + sum[2] + sum[3];
    for (int j = 0; j < 8; ++j) sums[t] += sum[0][j];
    pthread_barrier_wait(&barrier);
  }
  return 0;
}

int main(int argc, char **argv) {
  pthread_t pool[1024];
  double best = 0;
  uint64_t sum = 0;
  if (argc != 3) return 2;
  threads = atoi(argv[1]);
  words = strtoull(argv[2], 0, 10) / 8;
  if (threads < 1 || threads > 1024 || !(data = malloc(8 * words))) return 2;
  pthread_barrier_init(&barrier, 0, threads + 1);
  for (int t = 0; t < threads; ++t) {
    if (pthread_create(&pool[t], 0, part, (void *)(size_t)t) != 0) return 2;
  }
  for (int pass = 0; pass < PASSES; ++pass) {
    // The readers' own clocks: this thread may get a core only after they have gone on.
    pthread_barrier_wait(&barrier);
    pthread_barrier_wait(&barrier);
    double first = begun[0], last = ended[0];
    for (int t = 1; t < threads; ++t) {
      if (begun[t] < first) first = begun[t];
      if (ended[t] > last) last = ended[t];
    }
    double rate = 8.0 * (double)words / (last - first);
    if (rate > best) best = rate;
  }
  for (int t = 0; t < threads; ++t) {
    pthread_join(pool[t], 0);
    sum += sums[t];
  }
  printf("%.0f %llu\n", best, (unsigned long long)sum);
  return 0;
}
"""


class Missing(Exception):
    """A program to compare with is missing or does not work. The message is one line."""


def fio_speed(
    file: StorageFile, block: int, depth: int, seconds: float, huge_pages: bool = False
) -> float:
    """Bytes per second that fio reads from the file. Raises Missing."""
    command = [
        "fio",
        "--name=check",
        # The file has no name; another process reaches it through our descriptor.
        f"--filename=/proc/{os.getpid()}/fd/{file.descriptor}",
        f"--size={file.nbytes}",
        f"--bs={block}",
        f"--numjobs={depth}",
        f"--runtime={round(seconds * 1000)}ms",
        "--time_based",
        "--readonly",
        "--rw=randread",
        "--randrepeat=0",
        "--direct=1",
        "--ioengine=psync",
        "--thread",
        f"--iomem={'mmaphuge' if huge_pages else 'malloc'}",
        "--group_reporting",
        "--output-format=json",
    ]
    try:
        ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        found = json.loads(ran.stdout[ran.stdout.index("{") :])
        return float(found["jobs"][0]["read"]["bw_bytes"])
    except FileNotFoundError:
        raise Missing("fio is not installed: storage is not compared") from None
    except (subprocess.SubprocessError, ValueError, LookupError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise Missing(f"fio failed: {' '.join(said.split())[:200]}") from None


@contextmanager
def reserved_pages(folder: Path = Path("/proc/sys/vm")) -> Iterator[bool]:
    """Sets huge pages aside, which takes root; yields whether fio can have them, as the probe has.

    Without them both read into small pages, which is another speed on some disks.
    """
    setting = folder / "nr_hugepages"
    before = None
    try:
        before = int(setting.read_text())
        setting.write_text(str(before + _HUGE_PAGES))
        enough = int(setting.read_text()) >= before + _HUGE_PAGES
    except (OSError, ValueError):
        enough = False
    try:
        yield enough
    finally:
        if before is not None:
            with suppress(OSError):
                setting.write_text(str(before))


class ReadLoop:
    """The C loop, compiled into a folder that goes away with it. Raises Missing."""

    def __init__(self) -> None:
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            raise Missing("no C compiler is installed (cc, or CC): memory is not compared")
        self._folder = tempfile.TemporaryDirectory(prefix="probe-check-")
        folder = Path(self._folder.name)
        self._program = folder / "read_loop"
        source = folder / "read_loop.c"
        source.write_text(_READ_LOOP, encoding="utf-8")
        options = ["-O3", f"-DPASSES={_PASSES}", "-pthread"]
        native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
        self.command = [compiler, *options, native, str(source), "-o", str(self._program)]
        try:
            ran = subprocess.run(
                self.command, check=False, capture_output=True, text=True, timeout=120
            )
        except OSError as error:
            raise Missing(f"{compiler}: {error.strerror}: memory is not compared") from None
        if ran.returncode != 0:
            raise Missing(f"{compiler} failed: {' '.join(ran.stderr.split())[:200]}")

    def speed(self, threads: int, nbytes: int) -> float:
        """Bytes per second that the loop reads. Raises Missing."""
        try:
            ran = subprocess.run(
                [str(self._program), str(threads), str(nbytes)],
                check=True,
                capture_output=True,
                text=True,
                timeout=600,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Missing(f"the read loop failed: {error}") from None
        return float(ran.stdout.split()[0])


def in_turns(
    ours: Callable[[int], float], theirs: Callable[[int], float], repeats: int
) -> dict[str, Any]:
    """Measures both in turns, in alternating order. The ratio is the median of the pairs' ratios.

    Ends when the ratio is known to within a third of WITHIN (its standard error), after
    _LEAST_PAIRS at the earliest and `repeats` pairs at the latest: the disk of a virtual machine
    can change by a factor of two from one second to the next.
    """
    pairs: list[tuple[float, float]] = []
    while len(pairs) < repeats:
        i = len(pairs)
        if i % 2 == 0:
            mine = ours(i)
            pairs.append((mine, theirs(i)))
        else:
            other = theirs(i)
            pairs.append((ours(i), other))
        error = standard_error(pairs)
        if len(pairs) >= _LEAST_PAIRS and error is not None and error < WITHIN / 3:
            break
    return {
        "ours": [a for a, _ in pairs],
        "theirs": [b for _, b in pairs],
        "ours_median": statistics.median(a for a, _ in pairs),
        "theirs_median": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "standard_error": standard_error(pairs),
    }


def standard_error(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Relative standard error of the median of the pairs' ratios; None for fewer than two pairs."""
    if len(pairs) < 2:
        return None
    logs = [math.log(a / b) for a, b in pairs]
    # A median's error is 1.25 times a mean's if the values are normally distributed.
    return 1.2533 * statistics.stdev(logs) / math.sqrt(len(logs))


def compare_storage(
    file: StorageFile, repeats: int, seconds: float, say: Callable[[str], None], huge_pages: bool
) -> list[dict[str, Any]]:
    """One row per point: block, depth, and the result of in_turns, bytes/s. Raises Missing."""
    rows = []
    for block, depth in POINTS:

        def ours(i: int, block: int = block, depth: int = depth) -> float:
            found = file.read("direct", block, depth, seconds, 1000 + i, huge_pages)
            return float(found["bytes"] / found["seconds"])

        def theirs(_: int, block: int = block, depth: int = depth) -> float:
            return fio_speed(file, block, depth, seconds, huge_pages)

        row = {"block": block, "depth": depth} | in_turns(ours, theirs, repeats)
        say(_line(f"{block >> 10} KiB x {depth}", row, "fio"))
        rows.append(row)
    return rows


def compare_memory(
    counts: list[int], nbytes: int, repeats: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row for each number of threads. Raises Missing."""
    from ...runtime._core import read_bandwidth

    loop = ReadLoop()
    rows = []
    for threads in counts:

        def ours(_: int, threads: int = threads) -> float:
            return read_bandwidth(threads, nbytes)

        def theirs(_: int, threads: int = threads) -> float:
            return loop.speed(threads, nbytes)

        row = {"threads": threads, "bytes": nbytes} | in_turns(ours, theirs, repeats)
        say(_line(f"memory, {threads} threads", row, "loop"))
        rows.append(row)
    return rows


def _line(what: str, row: dict[str, Any], other: str) -> str:
    error = row["standard_error"]
    spread = "" if error is None else f"+- {error:.3f}"
    mark = "" if abs(row["ratio"] - 1) <= WITHIN else "  <- apart"
    return (
        f"{what:20} ours {row['ours_median'] / 1e6:9.1f} MB/s   {other} "
        f"{row['theirs_median'] / 1e6:9.1f} MB/s   ratio {row['ratio']:.3f} "
        f"{spread} ({len(row['ours'])} pairs){mark}"
    )


def _version(command: list[str]) -> str | None:
    try:
        ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
        return ran.stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def check(folder: Path, repeats: int, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """The comparison as one JSON object; what could not be compared is in "missing"."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    from ...runtime._core import cpu

    watch = NoiseWatch()
    huge_pages: bool | None = None
    missing: list[str] = []
    storage: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    room = psutil.virtual_memory().available // 8
    try:
        counts = sorted({1, cpu()["physical"]})
        memory = compare_memory(counts, memory_bytes(caches(), room), repeats, say)
    except Missing as error:
        missing.append(str(error))
    try:
        if shutil.which("fio") is None:
            raise Missing("fio is not installed: storage is not compared")
        effort = replace(probe_storage.FULL, write_s=60)
        file = probe_storage.scratch(probe_storage.existing(folder), effort)
        if not file.direct:
            raise Missing(f"{folder}: the file system refuses direct I/O: storage is not compared")
        # One pass over all of it brings the layers below into their steady state.
        file.read("direct", 1 << 20, 4, 30)
        with reserved_pages() as huge_pages:
            say(f"storage, into {'huge' if huge_pages else 'small'} pages")
            storage = compare_storage(file, repeats, seconds, say, huge_pages)
    except Missing as error:
        missing.append(str(error))
    ratios = [row["ratio"] for row in (*memory, *storage)]
    return {
        "kind": "probe_check",
        "version": 1,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m stoker.mobile_bench.checks.probe_check", *sys.argv[1:]]),
        "device": current_id(),
        "fio": _version(["fio", "--version"]),
        "compiler": _version([os.environ.get("CC", "cc"), "--version"]),
        "huge_pages": huge_pages,
        "repeats": repeats,
        "seconds": seconds,
        "memory": memory,
        "storage": storage,
        "missing": missing,
        "worst": max((abs(ratio - 1) for ratio in ratios), default=None),
        "noise": watch.finish(),
    }


def main() -> None:
    """Prints the table; exit code 1 if a ratio is more than 10% from 1 or nothing was compared."""
    from ...models import cache
    from ...runtime.base.errors import StokerError

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here, too")
    parser.add_argument("--path", type=Path, help="folder to measure the storage of")
    parser.add_argument("--repeats", type=int, default=25, help="pairs of a point at most")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a storage measurement")
    options = parser.parse_args()
    if options.repeats < 1 or not 0.01 <= options.seconds <= 60:
        parser.error("expected at least 1 repeat and 0.01 to 60 seconds")
    try:
        found = check(
            options.path or cache.directory(),
            options.repeats,
            options.seconds,
            lambda line: print(line, flush=True),
        )
    except (StokerError, OSError) as error:
        sys.exit(f"probe_check: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    for line in (*found["missing"], *(f"noisy: {reason}" for reason in found["noise"]["noisy"])):
        print(f"probe_check: {line}", file=sys.stderr)
    if found["worst"] is not None:
        print(f"worst: {found['worst']:.1%} apart")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if found["worst"] is not None and found["worst"] <= WITHIN else 1)


if __name__ == "__main__":
    main()
