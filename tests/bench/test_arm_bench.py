"""stoker-bench, cross-built for aarch64 and run under qemu-user; speed is not tested.

The program is built by mobile_bench/native/build_arm.sh in build/aarch64 (STOKER_ARM_BUILD
names another folder), in which `make neon` has built most of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from offload_models import MIXTURES, ROOT
from stoker.mobile_bench.run import records
from stoker.models.locate import locate
from stoker.offload.plan import device_profile
from stoker.runtime import _core
from stoker.runtime.base import errors
from tiny_models import some_tokens

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="qemu-user runs on Linux"),
    pytest.mark.timeout(1200),  # in an empty build folder it compiles the core
]
QEMU = "qemu-aarch64"
TOKENS = 6


@pytest.fixture(scope="session")
def build() -> Path:
    """The folder with the aarch64 programs."""
    for tool in (QEMU, "aarch64-linux-gnu-g++", "cmake"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    folder = Path(os.environ.get("STOKER_ARM_BUILD") or ROOT / "build" / "aarch64")
    subprocess.run(
        [
            "bash",
            ROOT / "mobile_bench" / "native" / "build_arm.sh",
            "stoker-bench",
            "kernel_instructions",
        ],
        check=True,
        env={**os.environ, "STOKER_ARM_BUILD": str(folder)},
        stdout=subprocess.DEVNULL,
    )
    return folder


def emulated(program: Path, *arguments: object, cpu: str = "max", **environment: str) -> Any:
    return subprocess.run(
        [QEMU, "-cpu", cpu, program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
        check=False,
    )


def measured(build: Path, model: Path, tmp_path: Path, *arguments: object) -> records.Results:
    out = tmp_path / "results.jsonl"
    out.unlink(missing_ok=True)
    fast = ("--profile", "facts", "--threads", 2, "--tokens", TOKENS, "--out", out)
    done = emulated(build / "stoker-bench", model, *fast, *arguments)
    assert out.is_file(), done.stderr
    return records.read(out)


def greedy(model: Path, prompt: list[int]) -> list[int]:
    """Greedy tokens from this machine's build: the one after the prompt and TOKENS more."""
    engine = _core.Engine(_core.GgufFile(str(model)), threads=2, context=len(prompt) + TOKENS + 1)
    sequence = engine.sequence()
    sampler = _core.Sampler(engine.config["n_vocab"])
    sequence.eval(prompt)
    tokens = [sequence.sample(sampler)]
    for _ in range(TOKENS):
        sequence.eval(tokens[-1:])
        tokens.append(sequence.sample(sampler))
    return tokens


def least_budget(results: records.Results) -> int:
    refused = results["runs"][-1]["error"]
    assert refused is not None
    found = re.search(r"memory: expected at least (\d+) bytes", refused)
    assert found, refused
    return int(found[1])


def test_is_one_static_program(build: Path) -> None:
    header = subprocess.run(
        ["aarch64-linux-gnu-readelf", "-hlW", build / "stoker-bench"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "AArch64" in header
    assert "INTERP" not in header and "DYNAMIC" not in header


@pytest.mark.parametrize(
    ("cpu", "isas"),
    [
        ("cortex-a53", ["scalar"]),
        ("cortex-a76", ["scalar", "neon"]),
        ("max", ["scalar", "neon", "i8mm"]),
    ],
)
def test_finds_what_the_processor_executes(build: Path, cpu: str, isas: list[str]) -> None:
    done = emulated(build / "kernel_instructions", "--isas", cpu=cpu)
    assert done.stdout.split() == isas, done.stderr


def test_smollm2_gives_the_tokens_of_this_machine(build: Path, tmp_path: Path) -> None:
    try:
        model = locate("smollm2")
    except errors.StokerError:
        pytest.skip("smollm2 is not downloaded")
    prompt = [504, 3575, 282, 4649, 314]
    ids = tmp_path / "ids.txt"
    ids.write_text(json.dumps(prompt))
    found = measured(build, model, tmp_path, "--ids-file", ids, "--prompts", 5)
    (run,) = found["runs"]
    assert run["error"] is None
    assert run["token_ids"] == greedy(model, prompt)
    assert run["plan"] is not None and run["plan"]["isa"] == "i8mm"


@pytest.mark.parametrize("name", ["smallthinker-sigmoid", "k-quants", "qwen3moe-shards"])
def test_a_mixture_under_a_budget_gives_the_same_tokens(
    build: Path, tmp_path: Path, name: str
) -> None:
    model = MIXTURES[name].write(tmp_path / name)
    prompt = [int(i) for i in some_tokens(12)]
    given = ("--ids", ",".join(map(str, prompt)), "--prompts", "none")
    least = least_budget(measured(build, model, tmp_path, *given, "--memory", "1MB"))
    # The emulator's own memory counts as the process's, and grows: the budgets leave room for that.
    budgets = f"none,{least + (1 << 18)},{least + (24 << 20)}"
    resident, tight, wide = measured(build, model, tmp_path, *given, "--memory", budgets)["runs"]
    expected = greedy(model, prompt)
    for run in (resident, tight, wide):
        assert run["error"] is None
        assert run["token_ids"] == expected
    assert resident["decode"] is not None and resident["decode"]["bytes_token"] is None
    assert tight["plan"] is not None and tight["decode"] is not None
    assert tight["plan"]["slots"] < tight["plan"]["experts"]
    assert tight["decode"]["bytes_token"] is not None and tight["decode"]["bytes_token"] > 0


def test_results_are_those_of_stoker_bench(build: Path, tmp_path: Path) -> None:
    model = MIXTURES["smallthinker"].write(tmp_path / "m")
    device = tmp_path / "device.json"
    found = measured(
        build, model, tmp_path,
        "--prompts", "8,20", "--repeat", 2, "--memory", "none,1GiB", "--device", device,
        "--policy", "lru", "--load-twice",
    )  # fmt: skip
    (profile,), runs = found["profiles"], found["runs"]
    assert device_profile.load(device) == profile
    assert profile["isa"] == {"active": "i8mm", "usable": ["scalar", "neon", "i8mm"]}
    assert profile["platform"]["machine"] == "aarch64"
    assert [(run["repeat"], run["memory"]) for run in runs] == [
        (0, None), (0, 1 << 30), (1, None), (1, 1 << 30),
    ]  # fmt: skip
    assert len({run["run"] for run in runs}) == 1
    for run in runs:
        assert not records.Run.__required_keys__ - run.keys()
        assert run["error"] is None and run["device"] == profile["id"]
        assert run["options"] == {"policy": "lru", "ids": "random"}
        assert run["model"]["architecture"] == "smallthinker"
        assert [p["tokens"] for p in run["prompts"]] == [8, 20]
        assert run["load_warm_s"] is not None
        decode, ids = run["decode"], run["token_ids"]
        assert decode is not None and len(decode["token_s"]) == decode["tokens"] == TOKENS
        assert decode["seconds"] == pytest.approx(sum(decode["token_s"]))
        assert run["tokens_sha256"] == hashlib.sha256(repr(ids).encode()).hexdigest()
    memory = 256 << 20  # of the Python process, more than it needs
    engine = _core.Engine(_core.GgufFile(str(model)), memory=1 << 30, process_bytes=memory)
    assert runs[0]["plan"] is not None and runs[1]["plan"] is not None
    assert runs[1]["plan"].keys() == engine.plan.keys()
    assert runs[1]["plan"]["work"] == engine.plan["work"]
    assert len(runs[1]["decode"]["layer_hits"]) == engine.config["n_layer"]  # type: ignore[index, arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a model"),
        (["absent.gguf"], "absent.gguf: no such file"),
        (["{model}", "{model}"], "expected one model"),
        (["{model}", "--speed", "9"], "--speed: no such option"),
        (["{model}", "--profile", "facts", "--tokens"], "--tokens: expected a value"),
        (["{model}", "--tokens", "0"], "--tokens: expected a number from 1 to"),
        (["{model}", "--ids", "1,two"], "--ids: expected a number .*'two'"),
        (["{model}", "--ids-file", "absent.txt"], "absent.txt: cannot be read"),
        (["{model}", "--memory", "lots"], "--memory: expected bytes .*'lots'"),
        (["{model}", "--precision", "low"], "--precision: expected fast, balanced, high"),
        (["{model}", "--out", "/absent/x.jsonl"], "/absent/x.jsonl: cannot be written"),
    ],
)
def test_refusals(build: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    model = MIXTURES["smallthinker"].write(tmp_path)
    given = [a.format(model=model) for a in arguments]
    done = emulated(build / "stoker-bench", "--profile", "facts", *given)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ids", "999999"], "token"),
        (["--policy", "magic"], "policy"),
        (["--memory", "2MB"], "memory: expected at least"),
        (["--context", "99999999"], "context: expected 1 to"),
    ],
)
def test_a_run_that_fails_is_a_result(
    build: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    model = MIXTURES["smallthinker"].write(tmp_path)
    if "--policy" in arguments:
        arguments = [*arguments, "--memory", "1GB"]
    done = emulated(build / "stoker-bench", model, "--profile", "facts", *arguments)
    assert done.returncode == 1
    profile, run = (json.loads(line) for line in done.stdout.splitlines())
    assert profile["kind"] == "profile" and run["kind"] == "run"
    assert message in run["error"]
    assert run["decode"] is None and run["prompts"] == [] and run["tokens_sha256"] is None


def test_isas_agree_bit_for_bit(build: Path) -> None:
    """One kernel program gives the same hash on all ISAs; instruction_counts.py relies on that."""
    hashes = {
        emulated(build / "kernel_instructions", "Q4_K", isa, 20, 512, 5, 1).stdout
        for isa in ("scalar", "neon", "i8mm")
    }
    assert len(hashes) == 1 and re.fullmatch(r"[0-9a-f]{16}\n", hashes.pop())


STAND_IN = """#!/bin/bash
# What adb, ssh and scp are asked, done here: `there` is a folder of this machine, and its processor
# an emulated one.
echo "$(basename "$0") $*" >>"$STAND_IN_LOG"
run() { bash -c "${1//.\\/stoker-bench/qemu-aarch64 ./stoker-bench}"; }
case $(basename "$0") in
  ssh) run "$2" ;;
  scp) cp "${2#board:}" "${3#board:}" ;;
  adb)
    if [ "$1" = -s ]; then shift 2; fi
    case $1 in
      push | pull) cp "$2" "$3" && echo "$2: 1 file" ;;
      shell) shift; run "$*" ;;
    esac ;;
esac
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment in which adb, ssh and scp stay on this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("adb", "ssh", "scp"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "STAND_IN_LOG": str(tmp_path / "log"),
    }


def on_device(environment: dict[str, str], *arguments: object) -> Any:
    return subprocess.run(
        ["bash", ROOT / "mobile_bench" / "native" / "run_android.sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        cwd=Path(environment["STAND_IN_LOG"]).parent,
        check=False,
    )


@pytest.mark.parametrize(
    "reach", [[], ["--serial", "R58N"], ["--ssh", "board"]], ids=["adb", "serial", "ssh"]
)
def test_a_device_is_measured(
    build: Path, tmp_path: Path, stand_ins: dict[str, str], reach: list[str]
) -> None:
    model = MIXTURES["qwen3moe-shards"].write(tmp_path / "my model")
    there, out = tmp_path / "there's one", tmp_path / "results" / "phone.jsonl"
    report = tmp_path / "report.html"
    given = [
        model, *reach, "--dir", there, "--out", out, "--report", report, "--prompt", 9,
        "--python", sys.executable, "--binary", build / "stoker-bench", "--with", "nice -n 1",
    ]  # fmt: skip
    ours = ["--", "--prompts", 9, "--tokens", TOKENS, "--profile", "facts", "--memory", "none,1GiB"]
    done = on_device(stand_ins, *given, *ours)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    assert "stoker report" in report.read_text()
    (first, second), (profile,) = (records.read(out)[k] for k in ("runs", "profiles"))
    assert profile["platform"]["machine"] == "aarch64"
    assert first["token_ids"] == second["token_ids"] and second["memory"] == 1 << 30
    from stoker.mobile_bench.run.prompt_ids import prompt_ids

    assert first["token_ids"] == greedy(model, list(prompt_ids(model, 9)))
    log = (tmp_path / "log").read_text().splitlines()
    assert {line.split()[0] for line in log} == ({"ssh", "scp"} if "--ssh" in reach else {"adb"})
    assert all(" -s R58N " in line for line in log) == ("--serial" in reach)
    shards = sorted(p.name for p in model.parent.glob("*.gguf"))
    assert len(shards) > 1
    assert sorted(p.name for p in there.iterdir()) == [*shards, "stoker-bench"]
    # On a second run the model is there already, results are appended, and nothing is left behind.
    before = len(log)
    again = on_device(stand_ins, *given, "--remove", *ours)
    assert again.returncode == 0, again.stderr
    log = (tmp_path / "log").read_text().splitlines()[before:]
    assert not [line for line in log if "push" in line and ".gguf" in line]
    assert f"{shards[0]}: there already" in again.stderr
    assert len(records.read(out)["runs"]) == 4
    assert not there.exists()


def test_a_run_that_fails_on_the_device(
    build: Path, tmp_path: Path, stand_ins: dict[str, str]
) -> None:
    model = MIXTURES["smallthinker"].write(tmp_path)
    out = tmp_path / "phone.jsonl"
    given = [model, "--dir", tmp_path / "there", "--out", out, "--python", sys.executable]
    given += ["--binary", build / "stoker-bench", "--prompt", 9]
    done = on_device(stand_ins, *given, "--", "--memory", "2MB", "--profile", "facts")
    assert done.returncode == 1
    assert "memory: expected at least" in str(records.read(out)["runs"][0]["error"])
    done = on_device(stand_ins, *given, "--", "--memory", "much")
    assert done.returncode == 2
    assert "--memory: expected bytes" in done.stderr and "no results" in done.stderr


def test_a_dry_run_does_nothing(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    done = on_device(stand_ins, model, "--dry-run", "--report", "r.html", "--", "--tokens", 5)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "log").exists() and not (tmp_path / "results").exists()
    steps = ("build_arm.sh", "prompt_ids", "mkdir", "push", "./stoker-bench", "pull", "report")
    places = [done.stdout.index(step) for step in steps]
    assert places == sorted(places)
    assert "'\\''--tokens'\\'' '\\''5'\\''" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.gguf"], "absent.gguf: no such file"),
        (["{model}", "{model}"], "expected one model"),
        (["{model}", "--sped", "1"], "--sped: no such option"),
        (["{model}", "--out"], "--out: expected a value"),
        (["{model}", "--prompt", "0"], "--prompt: expected a number of tokens"),
        (["{model}", "--ssh", "a", "--serial", "b"], "give --ssh or --serial, not both"),
        (["{model}", "--ids", "none.txt"], "none.txt: no such file"),
    ],
)
def test_a_device_cannot_be_measured_so(
    tmp_path: Path, stand_ins: dict[str, str], arguments: list[str], message: str
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    done = on_device(stand_ins, *(a.format(model=model) for a in arguments))
    assert done.returncode == 2
    assert f"run_android: {message}" in done.stderr


def test_neon_kernels_take_few_instructions(build: Path) -> None:
    """At most 1.3 times the AVX2 kernels', and the same bits."""
    folder = Path(os.environ.get("STOKER_X86_BUILD") or ROOT / "build" / "dev")
    x86 = folder / "kernel_instructions"
    if not x86.is_file() or shutil.which("qemu-x86_64") is None:
        pytest.skip(f"no {x86} (cmake -DSTOKER_BENCH=ON), or no qemu-x86_64")
    program = ROOT / "mobile_bench" / "checks" / "instruction_counts.py"
    arm = build / "kernel_instructions"
    done = subprocess.run(
        [sys.executable, program, "--json", "--x86", x86, "--arm", arm],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert {c["isa"] for c in counts} == {"avx2", "neon", "i8mm"}
    assert all(0.05 < c["instructions"] < 2 for c in counts)
    assert all(c["ratio"] <= 1.3 for c in counts), counts
