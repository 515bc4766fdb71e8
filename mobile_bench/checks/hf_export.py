"""How fast `stoker export gguf` is under a memory limit, and whether it survives being killed.

    python -m stoker.mobile_bench.checks.hf_export DIR OUT [--type Q4_K_M] [--memory 2e9]
        [--kills 1]

Linux, as root. DIR is a Hugging Face folder (synthetic_hf.py writes one of any size).
Measures the speed of the disk (O_DIRECT, 16 MB at a time) and of the quantizer (in memory, all
cores), then converts in a memory cgroup without swap, with a cold page cache; then again for each
kill: SIGKILL at a random moment (drawn with --seed), the same command again, and the sha256 must
be the same. One JSON line on stdout. OUT is removed at the end.

Fields: bytes and seconds of the whole run, in_mb_s (of the folder's bytes), disk_read_mb_s,
disk_write_mb_s, disk_mb_s (reading, then writing at these speeds: the bound of a copy),
quantizer_mb_s (source bytes, null for float types), peak (the cgroup's, with page cache), rss (the
process's), kills (each: share done when killed, seconds to finish after it, same).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from stoker.export.writer import mixes
from stoker.mobile_bench.run.cgroup_run import memory_group
from stoker.runtime import _core

_BLOCK = 16 << 20
_PROBE_BYTES = 1 << 30
_COMMAND = "from stoker.runtime.cli.main import main; main()"


def disk_read(shards: list[Path]) -> float:
    """MB/s of direct reads."""
    buffer, done, start = mmap.mmap(-1, _BLOCK), 0, time.perf_counter()
    for shard in shards:
        fd = os.open(shard, os.O_RDONLY | os.O_DIRECT)
        try:
            at = 0
            while done < _PROBE_BYTES and (n := os.preadv(fd, [buffer], at)) == _BLOCK:
                at, done = at + n, done + n
        finally:
            os.close(fd)
    return done / 1e6 / (time.perf_counter() - start)


def disk_write(path: Path) -> float:
    """MB/s of direct writes of random bytes to a new file, which is removed."""
    buffer = mmap.mmap(-1, _BLOCK)
    buffer[:] = np.random.default_rng(0).bytes(_BLOCK)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    try:
        start = time.perf_counter()
        for at in range(0, _PROBE_BYTES, _BLOCK):
            os.pwrite(fd, buffer, at)
        os.fsync(fd)
        return _PROBE_BYTES / 1e6 / (time.perf_counter() - start)
    finally:
        os.close(fd)
        path.unlink()


def quantizer(type: str) -> float:
    """MB/s of BF16 source bytes that the type's quantizer takes, in memory, on all cores."""
    rows, cols = 1024, 4096
    values = np.random.default_rng(0).standard_normal((rows, cols), dtype=np.float32) * 0.02
    data = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    start = time.perf_counter()
    _core.requantize("BF16", data.reshape(-1), rows, cols, type, None, os.cpu_count() or 1)
    return data.nbytes / 1e6 / (time.perf_counter() - start)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_BLOCK):
            digest.update(data)
    return digest.hexdigest()


def cold(shards: list[Path]) -> None:
    """Drops the shards from the page cache."""
    for shard in shards:
        fd = os.open(shard, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def convert(options: argparse.Namespace, kill_after: float | None = None) -> dict[str, Any]:
    """Runs the conversion in its own cgroup; kill_after: seconds until SIGKILL."""
    command = [sys.executable, "-c", _COMMAND, "export", "gguf"]
    command += [str(options.folder), str(options.out)]
    if options.type is not None:
        command += ["--type", options.type]
    with memory_group(int(options.memory)) as group:
        start = time.perf_counter()
        process = group.popen(command)
        if kill_after is not None:
            with suppress(Exception):  # the time is up
                process.wait(kill_after)
            process.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return {
            "rc": process.returncode,
            "seconds": round(time.perf_counter() - start, 1),
            "peak": group.peak(),
            "rss": usage.ru_maxrss * 1024,
            "oom_kills": group.kills(),
        }


def killed(options: argparse.Namespace, whole: dict[str, Any], moment: float) -> dict[str, Any]:
    """Kills a run at the share `moment` of the whole run's time, then repeats it to the end."""
    options.out.unlink(missing_ok=True)
    first = convert(options, kill_after=moment * whole["seconds"])
    left = sorted(p.name for p in options.out.parent.glob(f".{options.out.name}*"))
    assert not options.out.exists(), "a killed run has left a file under its name"
    second = convert(options)
    return {
        "moment": round(moment, 2),
        "killed_rc": first["rc"],
        "left": left,
        "seconds_after": second["seconds"],
        "peak": second["peak"],
        "same": second["rc"] == 0 and sha256(options.out) == whole["sha256"],
        "left_at_the_end": sorted(p.name for p in options.out.parent.glob(f".{options.out.name}*")),
    }


def main() -> None:
    """Measures and prints a JSON line."""
    parser = argparse.ArgumentParser(description="export gguf under a memory limit")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type")
    parser.add_argument("--memory", type=float, default=2e9)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shards = sorted(options.folder.glob("*.safetensors"))
    if not shards or options.out.exists():
        sys.exit(f"error: expected shards in {options.folder}, and no {options.out}")
    read, write = disk_read(shards), disk_write(options.out.with_name(".probe"))
    tensor_type = None if options.type is None else mixes.file_type(options.type).type
    speed = None if tensor_type in (None, "F32", "F16", "BF16") else quantizer(str(tensor_type))
    cold(shards)
    whole = convert(options)
    source = sum(shard.stat().st_size for shard in shards)
    try:
        if whole["rc"] != 0:
            sys.exit(f"error: expected exit code 0, found {whole}")
        size = options.out.stat().st_size
        whole["sha256"] = sha256(options.out)
        draw = random.Random(options.seed)
        kills = [killed(options, whole, draw.uniform(0.15, 0.85)) for _ in range(options.kills)]
    finally:
        options.out.unlink(missing_ok=True)
    record = {
        "type": options.type,
        "memory": int(options.memory),
        "source_bytes": source,
        "bytes": size,
        **whole,
        "in_mb_s": round(source / 1e6 / whole["seconds"]),
        "disk_read_mb_s": round(read),
        "disk_write_mb_s": round(write),
        "disk_mb_s": round(source / (source / read + size / write)),
        "quantizer_mb_s": None if speed is None else round(speed, 1),
        "kills": kills,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
