"""Quantizes a model larger than memory inside a memory limit, kills it, lets it go on.

    python -m stoker.mobile_bench.checks.export_bench FOLDER --gb 20 --type Q4_K_M --memory-mib 2048

Makes FOLDER/source.gguf (F16, normally distributed weights; reused if it exists with that
size), measures the disk's sequential reading and writing and the quantizer alone, then runs
`stoker export quantize` in a memory cgroup twice: once through, once killed (SIGKILL) at a random
moment and started again. Prints a JSON object; fails if the two files differ. Linux, as root.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...export.writer import gguf_writer
from ...export.writer.gguf_writer import Tensor
from ...runtime import _core
from ..run.cgroup_run import memory_group

_MB = 1_000_000
_N_EMBD, _N_FF = 4096, 14336
_BLOCK = 32 << 20  # bytes of random weights that are repeated, shifted, throughout the file
_TENSORS = (
    ("attn_q", _N_EMBD, _N_EMBD),
    ("attn_k", _N_EMBD, _N_EMBD // 4),
    ("attn_v", _N_EMBD, _N_EMBD // 4),
    ("attn_output", _N_EMBD, _N_EMBD),
    ("ffn_gate", _N_EMBD, _N_FF),
    ("ffn_up", _N_EMBD, _N_FF),
    ("ffn_down", _N_FF, _N_EMBD),
)


def make_source(path: Path, nbytes: int, seed: int = 0) -> int:
    """Writes a llama-shaped F16 GGUF file of about nbytes bytes; returns its size."""
    layer_bytes = sum(2 * cols * rows for _, cols, rows in _TENSORS)
    n_layer = max(1, round(nbytes / layer_bytes))
    tensors = [
        Tensor(f"blk.{layer}.{name}.weight", (cols, rows), 1, 2 * cols * rows)
        for layer in range(n_layer)
        for name, cols, rows in _TENSORS
    ]
    metadata = {
        "general.architecture": gguf_writer.string("llama"),
        "llama.block_count": gguf_writer.u32(n_layer),
        "llama.attention.head_count": gguf_writer.u32(32),
        "llama.attention.head_count_kv": gguf_writer.u32(8),
    }
    plan = gguf_writer.layout(metadata, tensors)
    if path.exists() and path.stat().st_size == plan.size:
        return plan.size
    rng = np.random.default_rng(seed)
    block = (0.02 * rng.standard_normal(_BLOCK // 2, dtype=np.float32)).astype(np.float16)
    with path.open("wb") as file:
        file.write(plan.header)
        while file.tell() < plan.size:
            shift = 2 * int(rng.integers(_BLOCK // 2))
            data = memoryview(np.roll(block, shift // 2).tobytes())
            file.write(data[: plan.size - file.tell()])
        file.flush()
        os.fsync(file.fileno())
    return plan.size


def reading_speed(path: Path, nbytes: int) -> float:
    """MB/s of sequential reading without the page cache."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin, done = time.perf_counter(), 0
        while done < nbytes and (data := file.read(16 << 20)):
            done += len(data)
        seconds = time.perf_counter() - begin
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return done / seconds / _MB


def writing_speed(path: Path, nbytes: int) -> float:
    """MB/s of sequential writing, including the final sync to the disk."""
    data = np.random.default_rng(0).bytes(16 << 20)
    begin, done = time.perf_counter(), 0
    with path.open("wb", buffering=0) as file:
        while done < nbytes:
            done += file.write(data)
        os.fsync(file.fileno())
        seconds = time.perf_counter() - begin
    path.unlink()
    return done / seconds / _MB


def quantizing_speed(type: str, threads: int, least: float = 3.0) -> float:
    """Weights/s quantized from F16 in memory to a tensor type, over at least `least` seconds."""
    rows = 1024
    rng = np.random.default_rng(0)
    x = (0.02 * rng.standard_normal((rows, _N_EMBD))).astype(np.float16)
    done, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < least:
        _core.requantize("F16", x.view(np.uint8), rows, _N_EMBD, type, threads=threads)
        done += x.size
    return done / seconds


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while data := file.read(16 << 20):
            digest.update(data)
    return digest.hexdigest()


def run(command: Sequence[str], limit: int, kill_after: float | None = None) -> dict[str, Any]:
    """Runs a command in a cgroup of `limit` bytes; kill_after: seconds until SIGKILL."""
    with memory_group(limit) as group:
        begin = time.perf_counter()
        process = group.popen(command)
        if kill_after is not None:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        status = process.wait()
        seconds = time.perf_counter() - begin
        found = {
            "status": status,
            "seconds": round(seconds, 2),
            "peak_mib": group.peak() >> 20,  # includes the page cache, which fills the limit
            "killed_for_memory": group.kills(),
        }
    return found


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=20.0)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--memory-mib", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    source, out = folder / "source.gguf", folder / "out.gguf"
    size = make_source(source, int(options.gb * 1e9))
    sample = min(size, 1 << 30)
    found: dict[str, Any] = {
        "source_mb": round(size / _MB),
        "type": options.type,
        "memory_mib": options.memory_mib,
        "threads": options.threads,
        "disk_read_mb_s": round(reading_speed(source, sample)),
        "disk_write_mb_s": round(writing_speed(folder / "disk", sample)),
    }
    from ...export.writer.mixes import file_type

    speed = quantizing_speed(file_type(options.type).type, options.threads)
    found["quantizer_mb_s"] = round(2 * speed / _MB)  # MB of F16 input
    found["quantizer_million_weights_s"] = round(speed / 1e6, 1)
    command = [sys.executable, "-m", "stoker.runtime.cli.main", "export", "quantize", str(source)]
    command += [str(out), "--type", options.type, "--threads", str(options.threads), "--force"]
    limit = options.memory_mib << 20
    whole = found["whole"] = run(command, limit)
    if whole["status"] != 0:
        raise SystemExit(f"export quantize ended with {whole['status']}")
    found["out_mb"] = round(out.stat().st_size / _MB)
    found["mb_s"] = round(size / whole["seconds"] / _MB)
    expected = sha256(out)
    out.unlink()
    moment = random.Random(options.seed).uniform(0.2, 0.9) * whole["seconds"]
    found["killed"] = run(command, limit, moment)
    journal = folder / ".out.gguf.part.json"
    found["on_disk_when_killed"] = (
        json.loads(journal.read_text())["done"] if journal.exists() else 0
    )
    found["resumed"] = run(command, limit)
    found["identical"] = out.exists() and sha256(out) == expected
    found["sha256"] = expected
    print(json.dumps(found, indent=1))
    if not found["identical"]:
        raise SystemExit("the resumed file differs")


if __name__ == "__main__":
    main()
