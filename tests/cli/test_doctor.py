"""Findings of `stoker doctor`: control groups of both versions, storage, the report."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_core
import pytest
from stoker.runtime.base.cgroup import MemoryGroup, memory_group
from stoker.runtime.base.errors import DeviceError
from stoker.runtime.cli import doctor
from stoker.runtime.cli import main as cli


def groups(root: Path, proc: str, files: dict[str, str]) -> MemoryGroup | None:
    """memory_group() of a made-up tree: path below the mount -> content."""
    (root / "proc").write_text(proc)
    for name, content in files.items():
        path = root / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return memory_group(groups=str(root / "proc"), mounts="", root=str(root / "mount"))


def test_version_2_takes_the_smallest_limit_on_the_way_up(tmp_path: Path) -> None:
    found = groups(
        tmp_path,
        "0::/app.slice/job\n",
        {
            "memory.current": "900\n",
            "app.slice/memory.max": "5000\n",
            "app.slice/memory.current": "800\n",
            "app.slice/job/memory.max": "max\n",
            "app.slice/job/memory.current": "700\n",
        },
    )
    assert found == MemoryGroup(2, "/app.slice", 5000, 800)


def test_version_2_with_a_limit_that_throttles(tmp_path: Path) -> None:
    found = groups(
        tmp_path,
        "0::/job\n",
        {"job/memory.max": "9000\n", "job/memory.high": "4000\n", "job/memory.current": "700\n"},
    )
    assert found == MemoryGroup(2, "/job", 4000, 700)


def test_version_2_without_a_limit(tmp_path: Path) -> None:
    found = groups(
        tmp_path, "0::/job\n", {"job/memory.max": "max\n", "job/memory.current": "700\n"}
    )
    assert found == MemoryGroup(2, "/job", None, 700)


def test_version_2_in_a_container(tmp_path: Path) -> None:
    """The path is the host's or leads out of the mount; the mount is the group itself."""
    for path in ("/docker/abc", "/../../elsewhere", "/"):
        found = groups(
            tmp_path, f"0::{path}\n", {"memory.max": "4096\n", "memory.current": "100\n"}
        )
        assert found == MemoryGroup(2, "/", 4096, 100)


def test_version_1_and_mixed(tmp_path: Path) -> None:
    proc = "5:cpu,cpuacct:/x\n4:memory:/x\n0::/y\n"
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "9000\n",
        "memory/x/memory.limit_in_bytes": "1048576\n",
        "memory/x/memory.usage_in_bytes": "4096\n",
        "unified/y/cgroup.procs": "",
    }
    assert groups(tmp_path, proc, files) == MemoryGroup(1, "/x", 1048576, 4096)
    unlimited = {"memory/x/memory.limit_in_bytes": "9223372036854771712\n"}
    assert groups(tmp_path, proc, unlimited) == MemoryGroup(1, "/x", None, 4096)


def test_no_control_groups(tmp_path: Path) -> None:
    assert memory_group(groups=str(tmp_path / "none")) is None
    assert groups(tmp_path, "4:cpu:/\n", {}) is None


@pytest.mark.skipif(sys.platform == "win32", reason="storage is not measured there")
def test_bandwidth_of_a_scratch_file_and_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_SCRATCH_BYTES", 8 << 20)
    monkeypatch.setattr(doctor, "_SECONDS", 60.0)  # longer than the files last
    scratch = doctor.read_bandwidth(tmp_path)
    if not scratch["direct"]:
        pytest.skip("no direct I/O in the temporary folder")
    assert scratch["probe_bytes"] == 8 << 20
    assert scratch["read_mb_s"] > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "small.gguf").write_bytes(b"x")
    (tmp_path / "large.gguf").write_bytes(os.urandom((9 << 20) + 5))
    model = doctor.read_bandwidth(tmp_path)
    assert model["probe_bytes"] == 9 << 20  # the whole blocks of the larger file


def test_refused_direct_reads_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def read(mode: str, block: int, depth: int, seconds: float) -> dict[str, Any]:
        asked.append(mode)
        return {"reads": len(asked) - 1, "bytes": 4 << 20, "seconds": 0.5}

    file = SimpleNamespace(direct=False, append=lambda nbytes: None, read=read)
    monkeypatch.setattr(
        "stoker.runtime._core.StorageFile", SimpleNamespace(scratch=lambda folder: file)
    )
    found = doctor.examine(tmp_path)
    assert found["storage"]["read_mb_s"] is None  # not measured: the file system is in memory
    assert "in memory" in dict(doctor.lines(found))["storage"]
    found = doctor.examine(tmp_path)
    assert found["storage"]["read_mb_s"] == 8.4
    assert "direct reads are refused here" in dict(doctor.lines(found))["storage"]
    assert asked == ["buffered", "buffered"]


def test_unwritable_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> dict[str, Any]:
        raise DeviceError("/cache: cannot make a scratch file: Permission denied")

    monkeypatch.setattr(doctor, "read_bandwidth", fail)
    found = doctor.examine(tmp_path / "not" / "there")
    assert found["storage"]["error"].endswith("cannot make a scratch file: Permission denied")
    assert ("storage", found["storage"]["error"]) in doctor.lines(found)


def test_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "stoker.runtime._core", fake_core)
    monkeypatch.setenv("STOKER_MODELS", str(tmp_path))
    assert cli.main(["doctor", "--no-storage"]) == 0
    out = capsys.readouterr().out
    assert "scalar (active), fast (not here)" in out
    assert "2 performance of 2 physical, 4 logical" in out
    assert f"{tmp_path}, " in out
    assert cli.main(["doctor", "--no-storage", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["isa"] == [
        {"name": "scalar", "usable": True, "active": True},
        {"name": "fast", "usable": False, "active": False},
    ]
    assert found["memory"]["total"] >= found["memory"]["available"] > 0
    assert found["storage"]["free"] > 0


def test_report_without_the_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stoker.runtime._core", None)
    found = doctor.examine(tmp_path, storage=False)
    assert found["core"].startswith("cannot be loaded")
    assert dict(doctor.lines(found))["core"] == found["core"]


def test_report_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--no-storage", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["core"] == "ok"
    assert [i["usable"] for i in found["isa"] if i["active"]] == [True]
    assert 1 <= found["cpu"]["performance"] <= found["cpu"]["physical"] <= found["cpu"]["logical"]
