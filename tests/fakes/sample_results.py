"""Results as `stoker bench` writes them, made up from a simple model of a device.

Deterministic: the same arguments give the same records. None of it was measured.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.mobile_bench.report import report

GB = 1_000_000_000
MB = 1_000_000


@dataclass(frozen=True)
class SampleDevice:
    name: str
    cores: int
    memory: int  # bytes
    isa: str
    memory_s: float  # bytes per second, one thread
    flash_s: float  # bytes per second at its best
    int8_s: float  # operations per second, one thread
    system: str = "Linux"

    @property
    def id(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()[:12]


LAPTOP = SampleDevice("Sample laptop, 8 cores, 16 GB", 8, 16 * GB, "avx2", 14.2e9, 3.1e9, 180e9)
PHONE = SampleDevice(
    "Sample phone, 8 cores, 8 GB", 8, 8 * GB, "neon", 9.1e9, 1.4e9, 60e9, "Android"
)
BOARD = SampleDevice("Sample board, 4 cores, 4 GB", 4, 4 * GB, "neon", 4.4e9, 0.35e9, 22e9)


@dataclass(frozen=True)
class SampleModel:
    name: str
    nbytes: int
    token_bytes: int  # weights that a token uses
    expert_bytes: int  # the experts' share of token_bytes
    layers: int = 30
    experts: int = 64
    used: int = 4
    kind: str = "Q4_0"

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "nbytes": self.nbytes,
            "architecture": "llama",
            "type": self.kind,
            "n_layer": self.layers,
            "n_expert": self.experts,
            "n_expert_used": self.used,
        }


UP64 = SampleModel("smollm2-135m-64-experts.gguf", 2_919_567_776, 250 * MB, 178 * MB)
SMOLLM2 = SampleModel("SmolLM2-135M-Instruct.Q4_1.gguf", 98 * MB, 98 * MB, 0, 30, 0, 0, "Q4_1")

PROMPTS = (16, 64, 256, 512, 1024, 2048)
_SLOWER = {"stoker": 1.0, "llama-cpp": 1.04, "onnx": 1.3}
_VERSIONS = {"stoker": "0.1.0", "llama-cpp": "0.3.36", "onnx": "1.23.2"}


def profile(device: SampleDevice, *, quick: bool = False) -> dict[str, Any]:
    """A device profile."""
    rng = random.Random(device.name)
    reads = []
    for mode, best in (("direct", 1.0), ("buffered", 0.7), ("mapped", 0.45)):
        for block in (4096, 16384, 65536, 262144, 1 << 20, 4 << 20):
            for depth in (1, 2, 4, 8, 16, 32) if mode != "mapped" else (1, 4):
                latency = 80e-6 + block / (device.flash_s * 0.8)
                speed = min(block * depth / latency, device.flash_s) * best
                speed *= rng.uniform(0.97, 1.03)
                reads.append({"mode": mode, "block": block, "depth": depth, "bytes_s": speed})
    isas = ["scalar", "avx2", "avx512"] if device.isa.startswith("avx") else ["scalar", "neon"]
    speeds = dict(zip(isas, (0.08, 1.0, 1.7), strict=False))
    threads = sorted({1, 2, device.cores // 2, device.cores})
    return {
        "kind": "profile",
        "version": 1,
        "id": device.id,
        "name": device.name,
        "time": "2026-11-21T19:02:11Z",
        "quick": quick,
        "stoker": "0.1.0",
        "platform": {
            "system": device.system,
            "release": "6.8.0",
            "machine": "x86_64" if device.isa.startswith("avx") else "aarch64",
            "python": "3.11.2",
            "virtual": None,
        },
        "cpu": {
            "model": device.name.split(",")[0],
            "logical": device.cores,
            "physical": device.cores,
            "performance": device.cores // 2,
            "kinds": [],
            "caches": [
                {"level": 1, "type": "data", "bytes": 32 << 10},
                {"level": 2, "type": "unified", "bytes": 1 << 20},
            ],
            "quota": None,
        },
        "isa": {"active": device.isa, "usable": isas},
        "memory": {"total": device.memory, "available": device.memory * 3 // 4, "limit": None},
        "memory_reads": [
            {"threads": n, "bytes_s": device.memory_s * n / (1 + 0.35 * (n - 1))} for n in threads
        ],
        "peaks": [
            {"kind": kind, "isa": isa, "threads": n, "ops_s": device.int8_s * share * speed * n}
            for kind, share in (("int8", 1.0), ("float32", 0.3))
            for isa, speed in speeds.items()
            for n in (1, device.cores)
        ],
        "formats": [
            {
                "format": form,
                "isa": device.isa,
                "row_weights_s": device.memory_s * 0.8 / bits * 8,
                "tile_ops_s": device.int8_s * share,
            }
            for form, bits, share in (("Q4_0", 4.5, 0.8), ("Q4_K", 4.5, 0.7), ("Q8_0", 8.5, 0.9))
        ],
        "storage": {"path": "/data", "filesystem": "ext4", "device": "nvme0n1"},
        "storage_reads": reads,
        "power": {"battery": None, "temperatures": {}, "energy": None},
    }


def hit_rate(share: float) -> float:
    """Hit rate of a cache that holds a share of the experts."""
    return min(1.0, 1 - (1 - share) ** 2.6 * 0.9)


def run(
    device: SampleDevice,
    model: SampleModel,
    *,
    engine: str = "stoker",
    memory: int | None = None,
    repeat: int = 0,
    threads: int = 4,
    faster: float = 1.0,
    tokens: int = 128,
    prompts: tuple[int, ...] = PROMPTS,
    command: str = "stoker bench up64.gguf --memory 500MB,1GB,2GB --against llama-cpp",
    series: str = "a1b2c3d4",
) -> dict[str, Any]:
    """One repeat of one engine in one configuration; faster: speed-up of stoker's own times."""
    rng = random.Random(f"{device.name}{model.name}{engine}{memory}{repeat}{threads}")
    wobble = rng.uniform(0.985, 1.015) / faster
    bandwidth = device.memory_s * threads / (1 + 0.35 * (threads - 1))
    compute = model.token_bytes / bandwidth * 1.15 * _SLOWER[engine] * wobble
    bounded = memory is not None and model.experts > 0
    share, hits, read, stall = 1.0, 1.0, 0.0, 0.0
    if bounded and memory is not None:
        held = max(memory * 0.95 - 260 * MB, 0) / (model.nbytes - 160 * MB)
        share = min(held, 1.0)
        hits = hit_rate(share)
        read = (1 - hits) * model.expert_bytes
        stall = max(read / device.flash_s - compute * 0.3, 0) * wobble
        if engine != "stoker":
            read *= 2.4
            stall = read / (device.flash_s * 0.22) * wobble
    token = compute + stall
    times = [
        token * rng.lognormvariate(0, 0.10 if bounded else 0.02) * (1.7 if n < 4 and bounded else 1)
        for n in range(tokens)
    ]
    total = sum(times)
    ordered = sorted(times)
    answers = []
    for length in prompts:
        waves = -(-length // 512)
        flash = model.nbytes * (1 - share) * min(1, length / 48) * waves / device.flash_s
        arithmetic = length * model.token_bytes * 3.6 / (device.int8_s * threads * 0.8)
        ttft = max(arithmetic * _SLOWER[engine], flash * (1 if engine == "stoker" else 4)) + token
        ttft *= wobble
        answers.append({"tokens": length, "ttft_s": ttft, "tok_s": length / ttft})
    peak = int((min(memory or model.nbytes * 1.05, model.nbytes * 1.05)) * 0.97)
    stoker = engine == "stoker"
    return {
        "kind": "run",
        "version": 1,
        "run": series,
        "time": f"2026-11-21T20:{10 + repeat:02d}:00Z",
        "command": command,
        "device": device.id,
        "model": model.facts,
        "engine": engine,
        "engine_version": _VERSIONS[engine],
        "repeat": repeat,
        "threads": threads,
        "context": 2176,
        "memory": None if memory is None else memory * 95 // 100,
        "limit": memory,
        "options": {},
        "plan": None,
        "load_cold_s": min(memory or model.nbytes, model.nbytes) / device.flash_s * wobble,
        "load_warm_s": min(memory or model.nbytes, model.nbytes) / bandwidth * 2 * wobble,
        "prompts": answers,
        "decode": {
            "tokens": tokens,
            "seconds": total,
            "tok_s": tokens / total,
            "token_ms": {
                "p50": ordered[tokens // 2] * 1e3,
                "p95": ordered[int(tokens * 0.95)] * 1e3,
                "p99": ordered[int(tokens * 0.99)] * 1e3,
            },
            "token_s": times,
            "bytes_token": read if stoker and bounded else None,
            "hit_rate": hits if stoker and bounded else None,
            "layer_hits": [
                min(1.0, hits + 0.12 * (layer / model.layers - 0.4) * (1 - hits) * 4)
                + rng.uniform(-0.01, 0) * (hits < 1)
                for layer in range(model.layers)
            ]
            if stoker and bounded
            else None,
            "stall_s": stall if stoker and bounded else None,
            "compute_s": compute if stoker and bounded else None,
        },
        "peak_bytes": peak,
        "group_peak_bytes": None if memory is None else memory,
        "energy": {"source": "rapl", "joules": total * 14.0, "joules_token": total * 14.0 / tokens},
        "noise": {
            "steal": 0.0,
            "busy": 0.01,
            "throttled": 0,
            "clock": None,
            "reference_s": [0.0101, 0.0103],
            "reference_spread": 0.02,
            "noisy": [],
        },
        "tokens_sha256": hashlib.sha256(model.name.encode()).hexdigest() if stoker else "f" * 64,
        "error": None,
        "case": hashlib.sha256(f"{model.name}{engine}{memory}{threads}".encode()).hexdigest()[:12],
        "token_ids": [],
        "flash": {
            "bytes_s": device.flash_s * wobble,
            "belady_misses": read * 0.6 / 1.5e6,
            "belady_bytes": read * 0.6,
        }
        if stoker and bounded
        else None,
        "notes": [],
    }


def roofline(
    device: SampleDevice, model: SampleModel, memory: int | None, threads: int = 4
) -> dict[str, Any]:
    """The roofline of a configuration."""
    bandwidth = device.memory_s * threads / (1 + 0.35 * (threads - 1))
    compute = model.token_bytes / bandwidth * 1.15
    held = 1.0 if memory is None else min(max(memory - 240 * MB, 0) / (model.nbytes - 160 * MB), 1)
    read = (1 - hit_rate(held)) * model.expert_bytes * 0.8 if memory else 0.0
    return {
        "kind": "roofline",
        "run": "a1b2c3d4",
        "device": device.id,
        "model": model.name,
        "memory": memory,
        "threads": threads,
        "compute_s": compute,
        "bytes_s": device.flash_s,
        "read_bytes": read,
        "limit_s": max(compute, read / device.flash_s),
    }


BUDGETS = (500 * MB, GB, 2 * GB, None)


def results(
    device: SampleDevice = LAPTOP,
    *,
    engines: tuple[str, ...] = ("stoker", "llama-cpp"),
    budgets: tuple[int | None, ...] = BUDGETS,
    repeats: int = 3,
    dense: bool = True,
    faster: float = 1.0,
) -> list[dict[str, Any]]:
    """The lines of a whole file: profile, mixture over budgets, dense model, rooflines."""
    lines: list[dict[str, Any]] = [profile(device)]
    for repeat in range(repeats):
        for memory in budgets:
            for engine in engines:
                speed = faster if engine == "stoker" else 1.0
                lines.append(
                    run(device, UP64, engine=engine, memory=memory, repeat=repeat, faster=speed)
                )
        if dense:
            for engine in (*engines, "onnx"):
                lines.append(
                    run(
                        device,
                        SMOLLM2,
                        engine=engine,
                        repeat=repeat,
                        command="stoker bench smollm2 --against llama-cpp,onnx",
                        series="b2c3d4e5",
                    )
                )
    lines += [roofline(device, UP64, memory) for memory in budgets]
    return lines


def failed(line: dict[str, Any], error: str) -> dict[str, Any]:
    """The run, changed to one that died."""
    return line | {
        "load_cold_s": None,
        "load_warm_s": None,
        "prompts": [],
        "decode": None,
        "peak_bytes": 0,
        "group_peak_bytes": None,
        "energy": None,
        "tokens_sha256": None,
        "error": error,
    }


def put(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Writes a file of results."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def everything(tmp_path: Path) -> report.Report:
    """Three devices, one of them a profile alone, a noisy and a failed run, and earlier results."""
    lines = results()
    lines[1]["noise"]["noisy"] = ["throttled 3 times"]
    lines[2] = failed(lines[2], "killed: it needs more memory than its cgroup's limit")
    files = [
        put(tmp_path / "laptop.jsonl", lines),
        put(tmp_path / "phone.jsonl", results(PHONE, engines=("stoker",))),
    ]
    board = tmp_path / "board.json"
    board.write_text(json.dumps(profile(BOARD), indent=1), encoding="utf-8")
    old = put(tmp_path / "old.jsonl", results(faster=1.2))
    return report.build([*files, board], against=old)
