"""Figures derived by `stoker bench`: medians, ratios, tables, noise, energy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stoker.mobile_bench.probe.energy import EnergyMeter
from stoker.mobile_bench.probe.noise import clock_share, drift, reasons, throttle_count
from stoker.mobile_bench.run.measure import decode_of, expected_s
from stoker.mobile_bench.run.records import Run
from stoker.mobile_bench.run.run_table import as_csv, as_text, ratio_table


def test_decode_figures() -> None:
    counters = {"decode_hits": 6, "decode_late": 1, "decode_misses": 1, "decode_bytes": 400}
    d = decode_of([0.1, 0.3, 0.2, 0.4], {**counters, "decode_stall_s": 0.2})
    assert d["tok_s"] == pytest.approx(4.0)
    assert d["token_ms"] == pytest.approx({"p50": 300.0, "p95": 400.0, "p99": 400.0})
    assert (d["bytes_token"], d["hit_rate"]) == (100, 0.75)
    assert (d["stall_s"], d["compute_s"]) == pytest.approx((0.05, 0.2))


def test_expected_time_of_a_prompt() -> None:
    assert expected_s(128, {64: 2.0}) == 4.0
    assert expected_s(256, {16: 4.0, 64: 5.0}) == pytest.approx(9.0)
    assert expected_s(16, {64: 2.0}) == 2.0


def runs_of(engine: str, speeds: list[float], **values: Any) -> list[Run]:
    made = []
    for repeat, speed in enumerate(speeds):
        run: Any = {
            "run": "r", "time": "", "command": "", "device": "d", "engine": engine,
            "engine_version": "1", "repeat": repeat, "threads": 2, "context": 64, "limit": None,
            "memory": None, "options": {}, "plan": None, "load_cold_s": 1.0, "load_warm_s": 1.0,
            "prompts": [], "peak_bytes": 1000, "group_peak_bytes": None, "energy": None,
            "noise": {}, "tokens_sha256": None, "error": None, "model": {"name": "m"},
            "decode": decode_of([1 / speed] * 10, None),
        }  # fmt: skip
        made.append(run | values)
    return made


def test_ratios_are_taken_within_a_repeat() -> None:
    # The machine halves its speed each time: the medians of the engines would not meet.
    own, other = runs_of("stoker", [80, 40, 20]), runs_of("llama-cpp", [40, 10, 10])
    line = next(x for x in ratio_table([*own, *other[:2]]) if "decode" in x)
    assert line.endswith("3.00 (2.00 to 4.00) x")
    dead: Any = {"error": "killed", "decode": None, "load_cold_s": None, "peak_bytes": 0}
    lines = ratio_table([*own, *runs_of("llama-cpp", [1.0], **dead)])
    assert not any("decode" in x for x in lines)
    elsewhere = runs_of("llama-cpp", [40], memory=5)
    assert ratio_table([*own, *elsewhere]) == []


def test_tables_tell_noise_and_failures() -> None:
    noise = {"reference_s": [1.0, 1.0], "noisy": ["other processes used 40% of the CPU time"]}
    runs = runs_of("stoker", [10, 20], noise=noise)
    calm = {"reference_s": [2.0, 2.0], "noisy": []}
    runs += runs_of("stoker", [5], noise=calm, memory=10**9, limit=None)
    runs += runs_of("onnx", [1], error="killed", decode=None, noise=calm)
    text = as_text(runs, [])
    assert "NOISY: 2 of 4 runs" in text and "40%" in text
    assert "resident, onnx, 2 threads: killed" in text and "1 GB" in text
    assert "15.0 (10.0 to 20.0)" in text
    assert "varied by 67%" in text
    assert as_csv([]) == "" and as_csv(runs).count("\n") == 5


def test_reasons_for_distrust() -> None:
    calm: dict[str, Any] = {
        "steal": 0.0, "busy": 0.01, "throttled": 0, "clock": None, "reference_spread": 0.02,
    }  # fmt: skip
    assert reasons(calm) == []
    for change in (
        {"steal": 0.1},
        {"busy": 0.5},
        {"throttled": 3},
        {"clock": 0.5},
        {"reference_spread": 0.5},
    ):
        assert len(reasons(calm | change)) == 1
    assert reasons(calm | {"busy": None, "throttled": None}) == []
    assert drift([{"reference_s": [1.0, 1.0]}, {"reference_s": [1.5, 1.5]}]) == 0.4
    assert drift([{"reference_s": [1.0]}]) == 0.0


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def test_clocks_and_throttling(tmp_path: Path) -> None:
    assert clock_share(tmp_path) is None
    before = throttle_count(tmp_path) or 0  # the count of this process's own group
    for cpu, clock in ((0, 1000), (1, 1800)):
        write(tmp_path / f"cpu{cpu}/cpufreq/scaling_cur_freq", clock)
        write(tmp_path / f"cpu{cpu}/cpufreq/cpuinfo_max_freq", 2000)
        write(tmp_path / f"cpu{cpu}/thermal_throttle/core_throttle_count", 5)
    write(tmp_path / "cpufreq/scaling_cur_freq", "not a core")
    assert clock_share(tmp_path) == 0.9
    assert throttle_count(tmp_path) == before + 10


def test_energy_of_packages(tmp_path: Path) -> None:
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram"}
    for zone, name in names.items():
        write(tmp_path / f"powercap/{zone}/name", name)
        write(tmp_path / f"powercap/{zone}/energy_uj", 9_000_000)
        write(tmp_path / f"powercap/{zone}/max_energy_range_uj", 10_000_000)
    meter = EnergyMeter(tmp_path)
    assert meter.source == "rapl" and meter.joules() is None
    write(tmp_path / "powercap/intel-rapl:0/energy_uj", 2_000_000)  # the counter has wrapped
    write(tmp_path / "powercap/intel-rapl:0:0/energy_uj", 9_900_000)  # already in the package
    write(tmp_path / "powercap/intel-rapl:0:1/energy_uj", 9_500_000)
    assert meter.joules() == pytest.approx(3.5)
    assert meter.reading(7) == {"source": "rapl", "joules": pytest.approx(3.5), "joules_token": 0.5}
    (tmp_path / "powercap/intel-rapl:0/energy_uj").unlink()
    assert meter.joules() is None


@pytest.mark.parametrize(
    ("files", "later", "joules"),
    [
        ({"energy_now": 1_000_000}, {"energy_now": 999_000}, 3.6),
        ({"charge_now": 1_000_000, "voltage_now": 5_000_000}, {"charge_now": 999_000}, 18.0),
        ({"charge_counter": 500, "voltage_now": 4_000_000}, {"charge_counter": 400}, 1.44),
    ],
)
def test_energy_of_a_battery(
    tmp_path: Path, files: dict[str, int], later: dict[str, int], joules: float
) -> None:
    supply = tmp_path / "power_supply/BAT0"
    for name, value in {"type": "Battery", "status": "Discharging", **files}.items():
        write(supply / name, value)
    meter = EnergyMeter(tmp_path)
    assert meter.source == "battery"
    for name, value in later.items():
        write(supply / name, value)
    assert meter.joules() == pytest.approx(joules)
    write(supply / "status", "Charging")
    assert EnergyMeter(tmp_path).source is None
    assert EnergyMeter(tmp_path / "none").reading(3) is None
