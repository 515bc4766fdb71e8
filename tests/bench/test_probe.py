"""The probe: what it reads of a system, what it measures, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stoker.mobile_bench.checks import probe_check
from stoker.mobile_bench.probe import cpu as probe_cpu
from stoker.mobile_bench.probe import power as probe_power
from stoker.mobile_bench.probe import probe
from stoker.mobile_bench.probe import storage as probe_storage
from stoker.offload.plan import device_profile
from stoker.runtime._core import StorageFile, active_isa, float32_peak, int8_peak, isas
from stoker.runtime.base.errors import DeviceError, OptionError
from stoker.runtime.cli import main as cli

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own files")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="storage is not measured there")
TINY = probe_storage.Effort(
    scratch=64 << 20,
    write_s=60,
    blocks=(4 << 10, 1 << 20),
    depths=(1, 3),
    rounds=2,
    slice_s=0.01,
    total_s=600,
)


def tree(root: Path, files: dict[str, Any]) -> Path:
    """A made-up file system."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def arm_phone(root: Path) -> Path:
    cpu = "sys/devices/system/cpu"
    files: dict[str, Any] = {f"{cpu}/online": "0-7"}
    info = []
    for i, (capacity, khz, part) in enumerate(
        [(250, 1_800_000, "0xd05")] * 4
        + [(820, 2_400_000, "0xd0d")] * 3
        + [(1024, 2_800_000, "0xd0d")]
    ):
        files[f"{cpu}/cpu{i}/cpu_capacity"] = capacity
        files[f"{cpu}/cpu{i}/cpufreq/cpuinfo_max_freq"] = khz
        files[f"{cpu}/cpu{i}/topology/thread_siblings_list"] = i
        info.append(f"processor\t: {i}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n")
    files["proc/cpuinfo"] = "\n".join(info)
    return tree(root, files)


def test_core_kinds_of_a_phone(tmp_path: Path) -> None:
    found = probe_cpu.core_kinds(arm_phone(tmp_path))
    assert [(k["cpus"], k["cores"], k["capacity"], k["max_hz"], k["name"]) for k in found] == [
        ("7", 1, 1024, 2_800_000_000, "Cortex-A77"),
        ("4-6", 3, 820, 2_400_000_000, "Cortex-A77"),
        ("0-3", 4, 250, 1_800_000_000, "Cortex-A55"),
    ]
    assert probe_cpu.model_name("aarch64", found, tmp_path) == (
        "1x Cortex-A77, 3x Cortex-A77, 4x Cortex-A55"
    )
    tree(tmp_path, {"sys/devices/soc0/machine": "SM8250"})
    assert probe_cpu.model_name("aarch64", found, tmp_path).startswith("SM8250 (1x Cortex-A77")
    assert probe_cpu.model_name("AMD EPYC", found, tmp_path) == "AMD EPYC"


def test_core_kinds_of_a_laptop(tmp_path: Path) -> None:
    """Two performance cores with two threads each, one with a higher clock; four small cores."""
    cpu = "sys/devices/system/cpu"
    files: dict[str, Any] = {
        f"{cpu}/online": "0-7",
        "sys/devices/cpu_core/cpus": "0-3",
        "sys/devices/cpu_atom/cpus": "4-7",
    }
    for i in range(8):
        siblings = f"{i // 2 * 2}-{i // 2 * 2 + 1}" if i < 4 else str(i)
        files[f"{cpu}/cpu{i}/topology/thread_siblings_list"] = siblings
        files[f"{cpu}/cpu{i}/cpufreq/cpuinfo_max_freq"] = [4_700_000, 4_900_000, 3_600_000][
            0 if i < 2 else 1 if i < 4 else 2
        ]
    found = probe_cpu.core_kinds(tree(tmp_path, files))
    assert [(k["name"], k["cpus"], k["cores"], k["max_hz"]) for k in found] == [
        ("cpu_core", "0-3", 2, 4_900_000_000),
        ("cpu_atom", "4-7", 4, 3_600_000_000),
    ]


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert probe_cpu.core_kinds(tmp_path) == []
    assert probe_cpu.caches(tmp_path) == []
    assert probe_cpu.virtual(tmp_path) is None
    assert probe_power.temperatures(tmp_path) == {}
    assert probe_power.battery(tmp_path / "none") is None
    found = probe_power.power(tmp_path)
    assert (found["battery"], found["energy"], found["governor"], found["clock"]) == (None,) * 4


def test_caches(tmp_path: Path) -> None:
    files: dict[str, Any] = {}
    for cpu in range(4):
        for index, (level, kind, size, shared) in enumerate(
            [
                (1, "Data", "48K", str(cpu)),
                (1, "Instruction", "32K", str(cpu)),
                (2, "Unified", "2M", f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}"),
                (3, "Unified", "33792K", "0-3"),
            ]
        ):
            folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            files |= {
                f"{folder}/level": level,
                f"{folder}/type": kind,
                f"{folder}/size": size,
                f"{folder}/shared_cpu_list": shared,
                f"{folder}/coherency_line_size": 64,
            }
    found = probe_cpu.caches(tree(tmp_path, files))
    assert [(c["level"], c["bytes"], c["count"], c["shared"], c["line"]) for c in found] == [
        (1, 48 << 10, 4, 1, 64),
        (2, 2 << 20, 2, 2, 64),
        (3, 33 << 20, 1, 4, 64),
    ]


@given(st.sets(st.integers(0, 300)))
def test_lists_of_cpus(cpus: set[int]) -> None:
    assert probe_cpu.cpu_set(probe_cpu.cpu_list(cpus)) == sorted(cpus)
    assert probe_cpu.cpu_set("0-x") == []


def test_virtual_machines(tmp_path: Path) -> None:
    assert probe_cpu.virtual(tree(tmp_path, {"proc/cpuinfo": "flags\t: fpu sse2"})) is False
    assert probe_cpu.virtual(tree(tmp_path, {"proc/cpuinfo": "flags\t: fpu hypervisor"})) is True


def test_battery_and_heat(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "sys/class/power_supply/AC/type": "Mains",
            "sys/class/power_supply/BAT0/type": "Battery",
            "sys/class/power_supply/BAT0/capacity": 81,
            "sys/class/power_supply/BAT0/status": "Discharging",
            "sys/class/power_supply/BAT0/current_now": -1_500_000,
            "sys/class/power_supply/BAT0/voltage_now": 4_000_000,
            "sys/class/power_supply/A_mouse/type": "Battery",
            "sys/class/power_supply/A_mouse/scope": "Device",
            "sys/class/power_supply/A_mouse/capacity": 7,
            "sys/class/thermal/thermal_zone0/type": "cpu",
            "sys/class/thermal/thermal_zone0/temp": 41_000,
            "sys/class/thermal/thermal_zone1/type": "cpu",
            "sys/class/thermal/thermal_zone1/temp": 43_500,
            "sys/class/thermal/thermal_zone2/type": "off",
            "sys/class/thermal/thermal_zone2/temp": -274_000,
        },
    )
    found = probe_power.power(root)
    assert found["battery"] == {"percent": 81, "status": "Discharging", "watts": 6.0}
    assert found["temperatures"] == {"cpu": 43.5}


@LINUX
def test_file_system_of_a_folder(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    folder = tmp_path / "with space"
    folder.mkdir()
    mount = str(folder).replace(" ", "\\040")
    root = tree(
        tmp_path / "root",
        {
            "proc/self/mountinfo": f"1 0 {number} / / rw - ext4 /dev/a rw\n"
            f"2 1 {number} / {mount} rw shared:1 - f2fs /dev/b rw\n"
            "3 1 0:99 / / rw - tmpfs none rw\nshort",
            f"sys/dev/block/{number}/queue/rotational": 0,
            f"sys/dev/block/{number}/queue/read_ahead_kb": 128,
            f"sys/dev/block/{number}/device/model": "FLASH 1 ",
        },
    )
    found = probe_storage.about(folder, root)
    assert (found["filesystem"], found["device"]) == ("f2fs", "/dev/b")
    assert (found["rotational"], found["read_ahead"], found["model"]) == (False, 131072, "FLASH 1")
    assert probe_storage.about(tmp_path, root)["device"] == "/dev/a"


def test_numbers_of_threads() -> None:
    assert probe.thread_counts(2, 2, 0) == [1, 2]
    assert probe.thread_counts(6, 4, 0) == [1, 2, 3, 4, 5, 6]
    assert probe.thread_counts(12, 6, 0) == [1, 2, 3, 4, 5, 6, 7, 8, 12]
    assert probe.thread_counts(96, 96, 0) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 96]
    assert probe.thread_counts(12, 4, 0, quick=True) == [1, 4, 12]
    assert probe.thread_counts(12, 6, 2) == [1, 2]


def test_bytes_of_memory_to_read() -> None:
    assert probe.memory_bytes([], 8 << 30) == 256 << 20
    caches = [{"bytes": 96 << 20, "count": 2}]
    assert probe.memory_bytes(caches, 8 << 30) == 768 << 20  # four times the caches
    assert probe.memory_bytes(caches, 100 << 20) == 100 << 20  # a small device
    assert probe.memory_bytes([{"bytes": 1 << 30, "count": 1}], 8 << 30) == 1 << 30


def test_peaks_of_every_usable_isa() -> None:
    usable = [name for name, executes in isas() if executes]
    found = probe.measure_peaks(usable, [1])
    assert [(p["isa"], p["kind"], p["threads"]) for p in found] == [
        (isa, kind, 1) for isa in usable for kind in ("int8", "float32")
    ]
    assert all(p["ops_s"] > 0 for p in found)
    for peak in (int8_peak, float32_peak):
        with pytest.raises(OptionError):
            peak("mmx", 1)
        with pytest.raises(OptionError):
            peak(active_isa(), 0)


def io_bytes() -> int:
    """Bytes that were fetched from storage for this process."""
    rows = Path("/proc/self/io").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("read_bytes"))


@LINUX
def test_no_read_comes_out_of_memory(tmp_path: Path) -> None:
    if probe_storage.about(tmp_path)["filesystem"] in (None, "tmpfs", "overlay"):
        pytest.skip("the temporary folder is not on a disk of its own")
    file = StorageFile.scratch(str(tmp_path))
    file.append(16 << 20)
    for mode in ("direct", "buffered", "mapped"):
        if mode == "direct" and not file.direct:
            continue
        before = io_bytes()
        found = file.read(mode, 64 << 10, 4, 60.0)
        assert found["bytes"] == found["reads"] * (64 << 10) > 0
        assert io_bytes() - before >= found["bytes"], mode


@POSIX
def test_storage_points(tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    storage, reads = probe_storage.measure(
        tmp_path / "not" / "there", TINY, lambda *a: told.append(a)
    )
    if "tmpfs" in str(storage.get("error")):
        pytest.skip("the temporary folder is in memory")
    assert storage["path"] == str(tmp_path)
    assert storage["scratch"] == TINY.scratch
    direct = {(r["block"], r["depth"]) for r in reads if r["mode"] == "direct"}
    assert direct == (
        {(b, d) for b in TINY.blocks for d in TINY.depths} if storage["direct"] else set()
    )
    for r in reads:
        assert 0 < r["range"][0] <= r["bytes_s"] <= r["range"][1]
    assert list(tmp_path.iterdir()) == []
    assert {what for what, _, _ in told} == {"scratch file", "storage"}
    assert told[-1][1] == told[-1][2]


class FakeFile:
    """Stand-in for a StorageFile that counts its calls."""

    direct = True
    nbytes = 0

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    def append(self, nbytes: int) -> None:
        self.nbytes += nbytes

    def read(self, mode: str, block: int, depth: int, seconds: float, seed: int) -> dict[str, Any]:
        self.asked.append((mode, block, depth))
        if mode == "buffered":
            raise DeviceError("disk: cannot read: Input/output error")
        return {"reads": 0 if mode == "mapped" else 5, "bytes": 5 * block, "seconds": 1.0}


def fake_scratch(monkeypatch: pytest.MonkeyPatch, free: int = 1 << 40) -> FakeFile:
    file = FakeFile()
    monkeypatch.setattr(
        "stoker.runtime._core.StorageFile", SimpleNamespace(scratch=lambda folder: file)
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    return file


def not_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_storage, "_IN_MEMORY", ())


def test_failing_reads_leave_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_in_memory(monkeypatch)
    fake_scratch(monkeypatch)
    storage, reads = probe_storage.measure(tmp_path, TINY)
    assert storage["error"] == "disk: cannot read: Input/output error"
    assert {r["mode"] for r in reads} == {"direct"}  # no mapped reads: everything was in memory
    assert all(r["bytes_s"] == 5 * r["block"] for r in reads)


def test_time_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_in_memory(monkeypatch)
    file = fake_scratch(monkeypatch)
    clock = iter(range(0, 100_000, 10))  # ten seconds between two looks
    effort = probe_storage.Effort(1 << 30, 55, (4096,), (1,), 1, 0.1, 15)
    storage, reads = probe_storage.measure(tmp_path, effort, clock=lambda: next(clock))
    assert storage["scratch"] < effort.scratch
    assert file.asked == [("direct", 4096, 1)]
    assert len(reads) == 1


def test_too_slow_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_in_memory(monkeypatch)
    fake_scratch(monkeypatch)
    clock = iter(range(0, 100_000, 1000))
    storage, reads = probe_storage.measure(tmp_path, TINY, clock=lambda: next(clock))
    assert "too slow to measure" in storage["error"]
    assert reads == []


def test_short_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_in_memory(monkeypatch)
    fake_scratch(monkeypatch, free=1 << 30)
    file = probe_storage.scratch(tmp_path, probe_storage.FULL)
    assert file.nbytes == 256 << 20  # a quarter of what is free
    fake_scratch(monkeypatch, free=100 << 20)
    storage, reads = probe_storage.measure(tmp_path, TINY)
    assert storage["error"] == f"{tmp_path}: expected 256.0 MiB of free space, found 100.0 MiB"
    assert reads == []


@LINUX
def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    storage, reads = probe_storage.measure(Path("/proc/self"), TINY)
    assert "cannot make a scratch file" in storage["error"]
    assert reads == []
    monkeypatch.setattr(probe_storage, "about", lambda folder: {"filesystem": "tmpfs"})
    storage, reads = probe_storage.measure(tmp_path, TINY)
    assert "which is memory" in storage["error"]


@POSIX
def test_impossible_reads(tmp_path: Path) -> None:
    file = StorageFile.scratch(str(tmp_path))
    file.append(1 << 20)
    for mode, block, depth in [
        ("async", 4096, 1),
        ("buffered", 100, 1),
        ("buffered", 2 << 20, 1),
        ("buffered", 4096, 0),
    ]:
        with pytest.raises(OptionError):
            file.read(mode, block, depth, 0.1)
    with pytest.raises(DeviceError, match="not there"):
        StorageFile(str(tmp_path / "not there"))


def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_storage, "QUICK", TINY)
    monkeypatch.setattr(probe, "FORMATS", ("Q4_0",))
    monkeypatch.setattr(probe, "memory_bytes", lambda held, room: 4 << 20)


@POSIX
def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_probe(monkeypatch)
    folder, out = tmp_path / "storage", tmp_path / "device.json"
    folder.mkdir()
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    assert cli.main(["probe", "--quick", "--path", str(folder)]) == 0
    printed = capsys.readouterr()
    assert all(line.startswith("noisy: ") for line in printed.err.splitlines())
    profile = device_profile.load(device_profile.default_path())
    assert device_profile.default_path() == tmp_path / "cache" / "device.json"
    assert profile["name"] in printed.out
    assert "one token, Gweights/s" in printed.out
    assert profile["id"] == device_profile.current_id()
    assert profile["quick"] is True
    assert profile["isa"]["active"] in profile["isa"]["usable"]
    assert profile["memory_reads"][0]["threads"] == 1
    assert [f["format"] for f in profile["formats"]] == ["Q4_0"]
    assert profile["noise"]["noisy"] == [line[7:] for line in printed.err.splitlines()]
    assert list(folder.iterdir()) == []

    assert cli.main(["probe", "--quick", "--json", "--path", str(folder), "-o", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == device_profile.load(out)


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--path", str(tmp_path / "none")]) == 2
    assert "expected a folder" in capsys.readouterr().err
    for out, said in (
        (tmp_path, "expected the name of a file, found a directory"),
        (tmp_path / "none" / "device.json", "device.json: no such directory"),
    ):
        assert cli.main(["probe", "--quick", "--out", str(out)]) == 2
        assert said in capsys.readouterr().err


@POSIX
def test_interruption_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while the scratch file is there: it has no name, and no profile appears."""
    out = tmp_path / "device.json"
    code = (
        "import sys\n"
        "from stoker.mobile_bench.probe import probe, storage as probe_storage\n"
        "from stoker.runtime.cli import main as cli\n"
        "probe.read_memory = probe.measure_peaks = probe.measure_formats = lambda *a: []\n"
        "real = probe_storage._points\n"
        "def points(*a):\n"
        "    print('measuring', flush=True)\n"
        "    while True: real(*a)\n"
        "probe_storage._points = points\n"
        "probe_storage._IN_MEMORY = ()\n"
        "sys.exit(cli.main(['probe', '--quick', '--path', sys.argv[1], '-o', sys.argv[2]]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "measuring\n"
    assert list(tmp_path.iterdir()) == []
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == ""
    assert list(tmp_path.iterdir()) == []


def profile() -> dict[str, Any]:
    found = dict.fromkeys(device_profile.DeviceProfile.__required_keys__, "x")
    return found | {
        "kind": "profile",
        "version": device_profile.VERSION,
        **{key: {} for key in ("platform", "cpu", "isa", "memory", "storage", "power")},
        "memory_reads": [{"threads": 1, "bytes_s": 1e10}],
        "peaks": [{"kind": "int8", "isa": "avx2", "threads": 1, "ops_s": 1e11}],
        "formats": [{"format": "Q4_0", "isa": "avx2", "row_weights_s": 1e9, "tile_ops_s": 1e11}],
        "storage_reads": [{"mode": "direct", "block": 4096, "depth": 1, "bytes_s": 1e7}],
    }


def test_profiles_are_saved_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "device.json"
    device_profile.save(profile(), path)  # type: ignore[arg-type]
    assert device_profile.load(path) == profile()
    with pytest.raises(TypeError):
        device_profile.save({"kind": object()}, path)  # type: ignore[typeddict-item]
    assert device_profile.load(path) == profile()
    assert [p.name for p in path.parent.iterdir()] == ["device.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "run"}, "expected a device profile, as"),
        ({"version": 99}, "expected version 1 of a device profile, found 99"),
        ({"cpu": []}, "expected an object as cpu"),
        ({"peaks": {}}, "expected a list as peaks"),
        ({"peaks": [3]}, r"peaks\[0\] of the device profile: expected an object"),
        ({"memory_reads": [{"threads": 1}]}, r"memory_reads\[0\].*bytes_s: expected a positive"),
        ({"memory_reads": [{"threads": 0, "bytes_s": 1}]}, "threads: expected a positive whole"),
        ({"storage_reads": [{"mode": 3, "block": 1, "depth": 1, "bytes_s": 1}]}, "a word, found 3"),
    ],
)
def test_what_is_no_profile(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "device.json"
    path.write_text(json.dumps(profile() | change))
    with pytest.raises(OptionError, match=message) as error:
        device_profile.load(path)
    assert str(error.value).startswith(str(path))


def test_files_that_are_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    with pytest.raises(OptionError, match="No such file"):
        device_profile.load(path)
    path.write_bytes(b"\xff\x00")
    with pytest.raises(OptionError, match="JSON"):
        device_profile.load(path)
    whole = profile()
    del whole["formats"]
    path.write_text(json.dumps(whole))
    with pytest.raises(OptionError, match="lacks formats"):
        device_profile.load(path)


def test_the_same_machine_keeps_its_id() -> None:
    one = device_profile.device_id("AMD EPYC", 2, 25_270_000_000, "avx512")
    assert one == device_profile.device_id("AMD EPYC", 2, 25_300_000_000, "avx512")
    assert one != device_profile.device_id("AMD EPYC", 4, 25_270_000_000, "avx512")
    assert len(one) == 12


def test_ratios_are_of_pairs() -> None:
    order: list[str] = []
    ours, theirs = iter([10.0, 40.0, 90.0]), iter([10.0, 50.0, 100.0])

    def mine(_: int) -> float:
        order.append("ours")
        return next(ours)

    def other(_: int) -> float:
        order.append("theirs")
        return next(theirs)

    found = probe_check.in_turns(mine, other, 3)
    assert found["ratio"] == 0.9  # the median of 1, 0.8 and 0.9
    assert (found["ours_median"], found["theirs_median"]) == (40.0, 50.0)
    assert found["standard_error"] == pytest.approx(0.0815, abs=0.001)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_as_many_pairs_as_the_noise_asks_for() -> None:
    assert len(probe_check.in_turns(lambda i: 1.0, lambda i: 1.0, 50)["ours"]) == 7
    noisy = probe_check.in_turns(lambda i: 1.0 + i % 3, lambda i: 1.0, 50)
    assert len(noisy["ours"]) == 50
    one = probe_check.in_turns(lambda i: 1.0, lambda i: 2.0, 1)
    assert (one["ratio"], one["standard_error"]) == (0.5, None)


def test_huge_pages_are_given_back(tmp_path: Path) -> None:
    setting = tmp_path / "nr_hugepages"
    with probe_check.reserved_pages(tmp_path) as enough:
        assert not enough
    setting.write_text("3\n")
    with pytest.raises(KeyboardInterrupt), probe_check.reserved_pages(tmp_path) as enough:
        assert enough
        assert int(setting.read_text()) > 3
        raise KeyboardInterrupt
    assert int(setting.read_text()) == 3


@POSIX
def test_nothing_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    out = tmp_path / "check.json"
    monkeypatch.setattr(sys, "argv", ["probe_check", "--json", str(out), "--path", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        probe_check.main()
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert "no C compiler is installed (cc, or CC): memory is not compared\n" in err
    assert "fio is not installed: storage is not compared\n" in err
    found = json.loads(out.read_text())
    assert found["memory"] == found["storage"] == []
    assert found["worst"] is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_read_loop() -> None:
    rows = probe_check.compare_memory([1, 3], 4 << 20, 1, lambda line: None)
    assert [row["threads"] for row in rows] == [1, 3]
    assert all(row["ratio"] > 0 for row in rows)


@LINUX
@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_reads_the_unnamed_file(tmp_path: Path) -> None:
    file = StorageFile.scratch(str(tmp_path))
    file.append(16 << 20)
    if not file.direct:
        pytest.skip("no direct I/O in the temporary folder")
    assert probe_check.fio_speed(file, 65536, 2, 0.1) > 0
    assert file.read("direct", 65536, 2, 60.0, huge_pages=False)["reads"] == 256
    with pytest.raises(probe_check.Missing, match="fio failed"):
        probe_check.fio_speed(file, 1, 2, 0.1)
