"""`stoker bench`: what a run records, budgets, other engines, failures, resuming, Ctrl-C."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from offload_models import TinyMixture
from stoker.mobile_bench.run import measure, preparation, records
from stoker.mobile_bench.run.case import Case, options_of
from stoker.mobile_bench.run.measure import run_case
from stoker.mobile_bench.run.prompt_ids import prompt_ids
from stoker.mobile_bench.run.roofline import rooflines
from stoker.mobile_bench.run.run_table import ratio_table
from stoker.mobile_bench.run.series import Baseline, Series, cases, missing, parse_baselines
from stoker.mobile_bench.run.worker_process import WorkerError, WorkerProcess
from stoker.offload.plan.device_profile import current_id
from stoker.runtime.base.errors import ModelFileError, OptionError
from tiny_models import WIDE, make

# llama-cpp-python as far as a worker uses it, computed by stoker; $FAKE_LLAMA says how it fails.
FAKE_LLAMA = """
import os, signal, time
from types import SimpleNamespace
import numpy as np
from stoker.runtime._core import Engine, GgufFile
__version__ = "0.0-fake"
llama_cpp = SimpleNamespace(llama_model_default_params=lambda: SimpleNamespace())
def llama_get_logits_ith(context, i):
    assert i == -1
    return np.ctypeslib.as_ctypes(context.logits())
class Llama:
    def __init__(self, path, n_ctx, n_threads, n_threads_batch, n_batch, verbose, **options):
        if os.environ.get("FAKE_LLAMA") == "refuses":
            raise ValueError("Failed to load model\\nfrom file")
        if options:
            assert options == {"use_mmap": True}
            assert llama_cpp.llama_model_default_params().use_extra_bufts is False
        self.engine = Engine(GgufFile(path), threads=n_threads, context=n_ctx)
        self._ctx = SimpleNamespace(ctx=self.engine.sequence())
    def n_vocab(self):
        return self.engine.config["n_vocab"]
    def reset(self):
        self._ctx.ctx.truncate(0)
    def eval(self, tokens):
        how = os.environ.get("FAKE_LLAMA")
        if how == "dies" or how == "dies later" and len(tokens) > 64:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hangs":
            time.sleep(600)
        self._ctx.ctx.eval(tokens)
"""


@pytest.fixture(autouse=True)
def device(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved profile of this device, so that nothing is probed."""
    folder = tmp_path_factory.mktemp("cache")
    lists = ("memory_reads", "peaks", "formats", "storage_reads")
    names = records.DeviceProfile.__required_keys__
    profile: dict[str, Any] = {k: [] if k in lists else {} for k in names}
    profile |= {
        "time": "",
        "quick": True,
        "stoker": "",
        "kind": "profile",
        "version": 1,
        "id": current_id(),
        "name": "test device",
    }
    (folder / "device.json").write_text(json.dumps(profile))
    monkeypatch.setenv("STOKER_CACHE", str(folder))
    monkeypatch.setattr(measure, "virtual", lambda: False)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "dense.gguf"
    make(path, "llama", context=2048)
    return path


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of 12 experts, 3 of them used, with a few MB of experts."""
    wide = {**WIDE, "n_expert": 12, "n_expert_used": 3}
    return TinyMixture("mixtral", "F32", overrides=wide).write(tmp_path_factory.mktemp("mixture"))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Python that has the module above."""
    package = tmp_path / "baseline" / "llama_cpp.py"
    package.parent.mkdir()
    package.write_text(FAKE_LLAMA)
    python = tmp_path / "python"
    paths = os.pathsep.join([str(package.parent), *filter(None, sys.path)])
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{paths}" exec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


@pytest.fixture
def no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disallows memory cgroups: tiny budgets hold only what stoker itself counts."""
    monkeypatch.setattr(measure, "groups_allowed", lambda: False)


def small(model: Path, **values: Any) -> Case:
    return Case(str(model), **{"threads": 1, "prompts": (4, 64, 80), "tokens": 8, **values})


def tight(model: Path) -> int:
    """A budget that leaves most of the mixture's experts in the file."""
    refused = run_case(small(model, memory=1))
    least = re.search(r"expected at least (\d+) bytes", refused["error"] or "")
    assert least, refused["error"]
    # The size of the worker's process differs a little from run to run.
    return int(least[1]) + (1 << 20)


def bench(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stoker.runtime.cli.main", "bench", *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


QUICK = ("--prompts", "4,70", "--tokens", "4", "--repeats", "2", "--threads", "1")


def test_resident_run(dense: Path) -> None:
    run = run_case(small(dense, repeat=3), run="r", command="c")
    assert run["error"] is None and run["engine"] == "stoker" and run["repeat"] == 3
    assert (run["run"], run["command"], run["device"]) == ("r", "c", current_id())
    assert [p["tokens"] for p in run["prompts"]] == [4, 64, 80]
    assert all(p["ttft_s"] > 0 and p["tok_s"] == p["tokens"] / p["ttft_s"] for p in run["prompts"])
    d = run["decode"]
    assert d is not None and d["tokens"] == len(d["token_s"]) == 8
    assert d["tok_s"] == pytest.approx(8 / sum(d["token_s"]), rel=0.1)
    assert min(d["token_s"]) * 1e3 <= d["token_ms"]["p50"] + 1e-3
    assert d["token_ms"]["p50"] <= d["token_ms"]["p95"] <= d["token_ms"]["p99"]
    assert d["hit_rate"] is d["bytes_token"] is d["layer_hits"] is run["memory"] is None
    assert len(run["token_ids"]) == 9
    assert run["load_cold_s"] and run["load_warm_s"] and run["peak_bytes"] > 10 << 20
    assert run["plan"] and run["plan"]["threads"] == 1 and run["context"] == 81
    assert run["model"]["name"] == "dense.gguf" and run["model"]["n_expert"] == 0
    assert {"steal", "busy", "throttled", "reference_spread", "noisy"} <= run["noise"].keys()
    json.dumps(run)


def test_peak_of_the_group(dense: Path) -> None:
    if not measure.groups_allowed():
        pytest.skip("memory cgroups need Linux and root")
    run = run_case(small(dense, memory=400 << 20))
    assert run["error"] is None
    assert run["limit"] == 400 << 20 and run["memory"] == int(0.95 * (400 << 20))
    # Libraries that another process has loaded are charged to that process.
    assert run["group_peak_bytes"] is not None and 1 << 20 < run["group_peak_bytes"] <= 400 << 20
    assert not list(Path("/sys/fs/cgroup").glob(f"**/stoker-{os.getpid()}-*"))


@pytest.mark.usefixtures("no_groups")
def test_run_under_a_budget(mixture: Path) -> None:
    whole = run_case(small(mixture))
    budget = tight(mixture)
    run = run_case(small(mixture, memory=budget))
    assert run["error"] is None and run["memory"] == budget and run["limit"] is None
    d, flash = run["decode"], run["flash"]
    assert d is not None and flash is not None and run["plan"] is not None
    assert run["plan"]["slots"] < run["plan"]["experts"]
    assert d["hit_rate"] is not None and 0 < d["hit_rate"] < 1
    assert d["layer_hits"] is not None and len(d["layer_hits"]) == run["model"]["n_layer"]
    assert d["hit_rate"] == pytest.approx(sum(d["layer_hits"]) / len(d["layer_hits"]), abs=1e-3)
    assert d["stall_s"] is not None and d["compute_s"] is not None
    assert d["stall_s"] + d["compute_s"] == pytest.approx(d["seconds"] / d["tokens"])
    assert d["bytes_token"] and 0 < flash["belady_bytes"] <= d["bytes_token"]
    assert flash["bytes_s"] > 0
    # The budget changes no bit of what is computed.
    assert run["tokens_sha256"] == whole["tokens_sha256"] is not None
    lru = run_case(small(mixture, memory=budget, options=options_of(policy="lru", prefetch="off")))
    assert lru["options"] == {"policy": "lru", "prefetch": "off"}
    assert lru["tokens_sha256"] == whole["tokens_sha256"]
    roofs = rooflines([whole, run])
    assert [r["memory"] for r in roofs] == [budget]
    assert roofs[0]["read_bytes"] == flash["belady_bytes"]
    assert roofs[0]["limit_s"] == max(
        roofs[0]["compute_s"], flash["belady_bytes"] / flash["bytes_s"]
    )
    assert rooflines([run]) == []  # there is no resident run to give the computation time


@pytest.mark.usefixtures("no_groups")
def test_all_experts_fit_the_budget(mixture: Path) -> None:
    run = run_case(small(mixture, memory=1 << 30))
    assert run["error"] is None and run["decode"] is not None
    assert run["tokens_sha256"] is not None


def test_impossible_budget_is_a_record(dense: Path) -> None:
    run = run_case(small(dense, memory=20 << 20))
    assert run["error"] is not None and "memory" in run["error"] and "\n" not in run["error"]
    assert run["decode"] is None and run["prompts"] == [] and run["tokens_sha256"] is None


def test_context_bounds_the_prompts(dense: Path) -> None:
    run = run_case(small(dense, context=70, prompts=(4, 70, 71), tokens=50))
    assert [p["tokens"] for p in run["prompts"]] == [4, 70]
    assert run["decode"] is not None and run["decode"]["tokens"] == 70 - 35
    assert any("71" in note for note in run["notes"])


def test_other_engine_gets_the_same_tokens(dense: Path, llama: Path) -> None:
    own = run_case(small(dense))
    other = run_case(small(dense, engine="llama-cpp", python=str(llama)))
    assert other["error"] is None and other["engine_version"] == "0.0-fake"
    assert other["token_ids"] == own["token_ids"] and other["plan"] is None
    lines = "\n".join(ratio_table([own, other]))
    assert "9 of 9" in lines and "decode tok/s" in lines and "prompt tok/s, 80 tokens" in lines


@pytest.mark.parametrize(
    ("how", "said"),
    [("dies", "killed"), ("refuses", "Failed to load model from file"), ("hangs", "no answer")],
)
def test_engine_that_fails_is_a_record(
    dense: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: str
) -> None:
    monkeypatch.setenv("FAKE_LLAMA", how)
    monkeypatch.setattr(measure, "HANGS_S", 5.0)
    run = run_case(small(dense, engine="llama-cpp", python=str(llama), time_limit_s=1.0))
    assert run["error"] is not None and said in run["error"]
    assert run["decode"] is None and run["load_cold_s"] is None


def test_prompt_that_kills_is_noted(
    dense: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA", "dies later")
    run = run_case(small(dense, engine="llama-cpp", python=str(llama)))
    assert run["error"] is None and run["decode"] is not None
    assert [p["tokens"] for p in run["prompts"]] == [4, 64]
    assert any(note.startswith("prompts of 80 tokens: killed") for note in run["notes"])


def test_time_limit_leaves_out(dense: Path) -> None:
    run = run_case(small(dense, time_limit_s=1e-6))
    assert run["error"] is None and run["decode"] is not None
    assert run["decode"]["tokens"] == 1
    assert [p["tokens"] for p in run["prompts"]] == [64]
    assert sum("time limit" in note for note in run["notes"]) == 2


@pytest.mark.usefixtures("no_groups")
def test_no_limit_for_engines_without_budgets(dense: Path) -> None:
    run = run_case(small(dense, engine="llama-cpp", memory=1 << 30))
    assert run["error"] is not None and "cgroup" in run["error"]


def test_missing_engine_and_model(dense: Path, tmp_path: Path) -> None:
    run = run_case(small(dense, engine="llama-cpp", python=str(tmp_path / "none")))
    assert run["error"] is not None and "none" in run["error"]
    with pytest.raises(ModelFileError, match="no such model"):
        run_case(small(tmp_path / "none.gguf"))


@pytest.mark.parametrize(
    "values",
    [
        {"memory": 0},
        {"engine": "tflite"},
        {"tokens": 0},
        {"prompts": (16, 0)},
        {"threads": -1},
        {"time_limit_s": 0.0},
    ],
)
def test_bad_cases(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected"):
        Case("model.gguf", **values)


def test_worker_says_what_is_wrong(dense: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    with (
        pytest.raises(WorkerError, match=r"broken\.gguf"),
        WorkerProcess("stoker", broken, threads=1, context=64) as worker,
    ):
        worker.ask("load")
    with WorkerProcess("stoker", dense, threads=1, context=64) as worker:
        assert worker.ask("encode", text="hello", n=2)["tokens"]
        assert worker.ask("flash", nbytes=1, seeds=1) == {"bytes_s": None}
        assert worker.ask("record") == {"recording": False}
        with pytest.raises(WorkerError, match="unknown command"):
            worker.ask("answer")


def test_onnx_form_of_a_model(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from stoker.export.to_onnx import gguf_to_onnx

    file = tmp_path / "dense.onnx"
    gguf_to_onnx(dense, file)
    own = run_case(small(dense))
    other = run_case(small(file, engine="onnx", text_model=str(dense)))
    assert other["error"] is None, other["error"]
    assert other["token_ids"][0] == own["token_ids"][0]
    assert other["engine"] == "onnx" and other["model"]["name"] == "dense.onnx"
    # Without the other file, the tokenizer that came with the graph makes the prompt.
    assert prompt_ids(file, 16) == prompt_ids(dense, 16)
    (baseline,) = parse_baselines(f"onnx={file}", dense, "")
    made = cases(Series(dense, baselines=(baseline,), repeats=1))
    assert [(c.engine, c.text_model) for c in made] == [("stoker", ""), ("onnx", str(dense))]


def test_prompt_of_an_unknown_tokenizer(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "odd.gguf"
    out = gguf.GGUFWriter(str(path), "odd")
    out.add_tokenizer_model("unheard of")
    import numpy as np

    out.add_tensor("token_embd.weight", np.zeros((50, 32), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    ids = prompt_ids(path, 300)
    assert len(ids) == 300 and set(ids) == set(range(50))


def test_page_cache_without_root(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_DROP", Path("/proc/none"))
    if hasattr(os, "posix_fadvise"):
        assert preparation.drop_page_cache([dense])
        monkeypatch.delattr(os, "posix_fadvise")
    assert not preparation.drop_page_cache([dense])
    run = run_case(small(dense))
    assert run["error"] is None and any("page cache" in note for note in run["notes"])


def test_reads_of_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(9 << 20))
    preparation.read_directly(path)
    with pytest.raises(FileNotFoundError):
        preparation.read_directly(tmp_path / "none")


# A series


def test_order_of_a_series(dense: Path) -> None:
    series = Series(
        dense,
        memory=("resident", "500MB", "auto"),
        threads=(1, 2),
        baselines=(Baseline("llama-cpp"),),
        repeats=3,
    )
    made = cases(series)
    first, second, third = ([c for c in made if c.repeat == r] for r in range(3))
    assert len(first) == 8  # auto is resident here, so it is measured once
    assert [(c.memory, c.threads, c.engine) for c in first[:4]] == [
        (None, 1, "stoker"),
        (None, 1, "llama-cpp"),
        (None, 2, "stoker"),
        (None, 2, "llama-cpp"),
    ]
    assert [c.key for c in second] == [c.key for c in reversed(first)]
    assert [c.key for c in third] == [c.key for c in first]
    assert len({c.key for c in first}) == len(first)
    done = [{"case": c.key, "repeat": c.repeat} for c in made[:11]]
    assert missing(made, done) == made[11:]  # type: ignore[arg-type]
    assert replace(made[0], python="x", repeat=7, time_limit_s=1.0).key == made[0].key
    assert replace(made[0], tokens=7).key != made[0].key


def test_slow_engine_gets_fewer_tokens(dense: Path) -> None:
    size = dense.stat().st_size
    series = Series(dense, memory=(f"{size}B",), baselines=(Baseline("llama-cpp"),), repeats=1)
    own, other = cases(series)
    assert (own.tokens, other.tokens) == (128, series.slow_tokens)
    assert other.time_limit_s == 2 * series.slow_time_limit_s  # in the first repeat
    later = cases(replace(series, repeats=2))[2]
    assert (later.engine, later.time_limit_s) == ("llama-cpp", series.slow_time_limit_s)
    assert later.key == other.key
    assert own.context == other.context


@pytest.mark.parametrize(
    ("against", "said"),
    [
        ("gpt", "expected stoker, llama-cpp, onnx"),
        ("stoker", "already"),
        ("onnx", "another form"),
        ("onnx=none.onnx", "no such file"),
    ],
)
def test_bad_baselines(dense: Path, against: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        list(parse_baselines(against, dense, ""))


def test_command_and_resume(mixture: Path, llama: Path, tmp_path: Path) -> None:
    results, table = tmp_path / "r.jsonl", tmp_path / "r.csv"
    arguments = (mixture, *QUICK, "--memory", "resident,1KB", "--json", results, "--csv", table)
    arguments += ("--against", "llama-cpp", "--baseline-python", llama)
    done = bench(*arguments)
    assert done.returncode == 0, done.stderr
    found = records.read(results)
    assert [p["name"] for p in found["profiles"]] == ["test device"]
    runs = found["runs"]
    assert len(runs) == 8 and len({r["run"] for r in runs}) == 1
    good = [r for r in runs if r["error"] is None]
    assert {(r["engine"], r["memory"]) for r in good} == {("stoker", None), ("llama-cpp", None)}
    assert len({r["tokens_sha256"] for r in good}) == 1
    assert all(r["command"].startswith("stoker bench ") for r in runs)
    for said in ("TTFT", "decode tok/s", "same tokens", "5 of 5", "0 MB, stoker, 1 threads: "):
        assert said in done.stdout, done.stdout
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 8 and float(rows[0]["decode_tok_s"]) > 0 and rows[0]["ttft_s_70"]

    refused = bench(*arguments)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    # An interruption leaves it like this: two lines missing, the last of the others cut off.
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:6]) + lines[6][:40])
    resumed = bench(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    again = records.read(results)["runs"]
    assert again[:5] == runs[:5] and len(again) == 8
    assert [(r["case"], r["repeat"]) for r in again] == [(r["case"], r["repeat"]) for r in runs]
    assert "1/3 repeat" in resumed.stderr and "4/" not in resumed.stderr
    nothing = bench(*arguments, "--resume")
    assert nothing.returncode == 0 and records.read(results)["runs"] == again
    assert "same tokens" in nothing.stdout


def test_results_of_another_device(dense: Path, tmp_path: Path, device: Path) -> None:
    profile = json.loads((device / "device.json").read_text())
    results = tmp_path / "r.jsonl"
    records.write(results, [{**profile, "id": "0" * 12, "name": "a phone"}])
    refused = bench(dense, *QUICK, "--json", results, "--resume")
    assert refused.returncode == 2 and "a phone" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompts", "a"), "prompts: expected numbers"),
        (("--memory", "many"), "memory must be"),
        (("--resume",), "--json"),
        (("--repeats", "0"), "repeats"),
        (("--json", "/nowhere/r.jsonl"), "/nowhere/r.jsonl"),
        (("--against", "gpt"), "against"),
    ],
)
def test_bad_usage(dense: Path, arguments: tuple[str, ...], said: str) -> None:
    done = bench(dense, *arguments)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""


def test_nothing_worked(dense: Path, tmp_path: Path) -> None:
    done = bench(dense, *QUICK, "--memory", "1KB")
    assert done.returncode == 1 and "memory" in done.stdout
    missing_model = bench(tmp_path / "none.gguf")
    assert missing_model.returncode == 2 and "none.gguf" in missing_model.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_keeps_what_was_measured(
    dense: Path, tmp_path: Path, number: signal.Signals
) -> None:
    results, table = tmp_path / "r.jsonl", tmp_path / "r.csv"
    line = [sys.executable, "-m", "stoker.runtime.cli.main", "bench", dense, "--json", results]
    line += ["--csv", table]
    process = subprocess.Popen(
        [*map(str, line), *QUICK, "--repeats", "500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: results.exists() and results.read_text().count("\n") > 2, process)
    started = psutil.Process(process.pid)
    wait_for(lambda: bool(started.children()), process)
    workers = started.children()
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert len(list(csv.DictReader(table.open()))) == len(records.read(results)["runs"])
    assert "interrupted after" in err and "--resume" in err and "TTFT" in out
    assert records.read(results)["runs"]
    assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]


def wait_for(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def test_compare_measures_both_engines(dense: Path, llama: Path) -> None:
    from stoker.mobile_bench.checks import compare

    pythons = {"stoker": sys.executable, "llama-cpp": str(llama)}
    found = compare.measure(dense, pythons, threads=1, repeats=1)
    assert set(found[0]) == {"stoker", "llama-cpp"}
    assert all(found[0][e][f] > 0 for e in found[0] for f in compare.FIGURES)
