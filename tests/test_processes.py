"""The process around a model: forks, limits of threads and groups, exits, closed streams."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import stoker
import typer
from control_groups import group, inside
from offload_models import MEBIBYTE, TinyMixture, named_minimum
from stoker.mobile_bench.cgroup_run import memory_group
from stoker.runtime import _core, cli, memory
from stoker.runtime.cgroup import Headroom
from tiny_models import make

posix = pytest.mark.skipif(sys.platform == "win32", reason="forks, groups and streams of POSIX")
PROMPT = "the cat sat"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", context=4096)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyMixture("mixtral").write(tmp_path_factory.mktemp("mixture"))


def load(path: Path, budget: bool) -> stoker.Model:
    """In memory, or with experts on flash."""
    if not budget:
        return stoker.load(path, threads=2)
    with pytest.raises(stoker.BudgetError) as refused:
        stoker.load(path, threads=2, memory=1)
    return stoker.load(path, threads=2, memory=named_minimum(refused.value) + MEBIBYTE)


def answer(model: stoker.Model) -> str:
    return model.generate(PROMPT, temperature=0, max_tokens=8).read()


# Forks.

_INHERITED: list[stoker.Model] = []  # what a forked child finds


def _child(how: str, path: Path, results: Any) -> None:
    try:
        model = stoker.load(path, threads=2) if how == "own" else _INHERITED[0]
        results.put(("answer", answer(model)))
    except stoker.StokerError as error:
        results.put((type(error).__name__, str(error)))


def in_child(start: str, how: str, path: Path) -> tuple[str, str]:
    """What a child process says: (answer, text) or (an error's name, message)."""
    context = multiprocessing.get_context(start)
    results = context.Queue()
    child = context.Process(target=_child, args=(how, path, results))
    child.start()
    try:
        said: tuple[str, str] = results.get(timeout=120)
        child.join(timeout=120)
        assert child.exitcode == 0  # it ends, threads of a parent or not
        return said
    except queue.Empty:
        raise AssertionError(f"{start}, {how}: the child says nothing") from None
    finally:
        child.kill()
        child.join()


@contextmanager
def generating(model: stoker.Model) -> Iterator[None]:
    """While another thread is in the middle of long generations."""
    stop, begun = threading.Event(), threading.Event()

    def work() -> None:
        session = model.session() if model._engine.survives_fork else None
        while not stop.is_set():
            begin = session.generate if session is not None else model.generate
            for _ in begin(PROMPT, temperature=0, max_tokens=400, ignore_eos=True):
                begun.set()
                if stop.is_set():
                    break
            if session is not None:
                session.reset()

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    try:
        yield
    finally:
        stop.set()
        thread.join()


@posix
@pytest.mark.parametrize("budget", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("when", ["before", "after", "during"])
@pytest.mark.parametrize("start", ["fork", "forkserver", "spawn"])
def test_fork(tiny: Path, mixture: Path, start: str, when: str, budget: bool) -> None:
    path = mixture if budget else tiny
    expected = answer(stoker.load(path, threads=2))
    how = "inherited" if start == "fork" and when != "before" else "own"
    if when == "before":
        assert in_child(start, how, path) == ("answer", expected)
        return
    model = load(path, budget)
    _INHERITED[:] = [model]
    try:
        assert answer(model) == expected
        if when == "after":
            found = in_child(start, how, path)
        else:
            with generating(model):
                found = in_child(start, how, path)
        assert answer(model) == expected  # the parent goes on
    finally:
        _INHERITED.clear()
    if how == "own" or (when == "after" and not budget):
        assert found == ("answer", expected)
    elif found[0] != "answer" or budget:  # caught between two evaluations, a child may succeed
        assert found[0] == "OptionError" and "was loaded before this process was forked" in found[1]
        assert "load" in found[1]
    else:
        assert found[1] == expected


@posix
def test_a_forked_child_exits_and_loads_anew(mixture: Path) -> None:
    model = load(mixture, True)
    expected = answer(model)
    child = os.fork()
    if child == 0:  # pragma: no cover (another process)
        code = 1
        try:
            try:
                answer(model)
            except stoker.OptionError:
                del model  # takes nothing apart that waits for threads
                code = 0 if answer(load(mixture, True)) == expected else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, 9)
            raise AssertionError("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status) == 0
    assert answer(model) == expected


def test_a_model_is_not_sent_to_another_process(tiny: Path) -> None:
    import copy
    import pickle

    model = stoker.load(tiny)
    answer = model.generate(PROMPT, max_tokens=4)
    next(answer)
    for send in (pickle.dumps, copy.copy, copy.deepcopy):
        for what in (model, model.session(), answer):
            with pytest.raises(stoker.OptionError, match="cannot be copied or sent"):
                send(what)


def test_options_are_sent_to_another_process() -> None:
    import copy
    import dataclasses
    import pickle

    for options in (
        stoker.GenerationOptions(logit_bias={3: -1.5}, stop=["x"], seed=2),
        stoker.LoadOptions(threads=2, memory="2GiB"),
    ):
        assert pickle.loads(pickle.dumps(options)) == copy.deepcopy(options) == options
        assert type(options)(**dataclasses.asdict(options)) == options
    frozen: Any = stoker.GenerationOptions(logit_bias={3: -1.5}).logit_bias
    with pytest.raises(TypeError):
        frozen[3] = 1.0
    with pytest.raises(TypeError):
        frozen.update({4: 1.0})


# The interpreter's end.

_DAEMON = """
import sys, threading, time, stoker
model = stoker.load(sys.argv[1], threads=2)
started = threading.Event()
def work():
    while True:
        {work}
        started.set()
threading.Thread(target=work, daemon=True).start()
assert started.wait(60)
time.sleep({pause})
"""


@pytest.mark.parametrize("pause", [0, 0.01, 0.05])
@pytest.mark.parametrize(
    "work",
    [
        "for c in model.generate('a', max_tokens=300, ignore_eos=True): started.set()",
        "model.logits([1] * 500)",
        "stoker.load(sys.argv[1])",
        "model.session()",
    ],
    ids=["generate", "logits", "load", "session"],
)
def test_exit_while_a_daemon_thread_works(tiny: Path, work: str, pause: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DAEMON.format(work=work, pause=pause), str(tiny)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_handler_at_exit_may_still_generate(tiny: Path) -> None:
    """Registered before the core closes its gate, called after it."""
    code = (
        "import atexit, sys\n"
        "held = []\n"
        "atexit.register(lambda: print(held[0].generate('a', max_tokens=3, seed=1).read()))\n"
        "import stoker\n"
        "held.append(stoker.load(sys.argv[1], threads=2))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() and done.stderr == ""


# Limits of control groups.


_PLAN = "import sys, stoker; print(stoker.load(sys.argv[1]).plan['threads'])"


@posix
def test_threads_follow_a_quota(tiny: Path) -> None:
    every = _core.cpu()["performance"]
    for quota, threads in ((100_000, 1), (50_000, 1), (150_000, min(2, every))):
        settings = {
            "cpu.cfs_period_us": "100000",
            "cpu.cfs_quota_us": str(quota),
            "cpu.max": f"{quota} 100000",
        }
        with group("cpu", settings) as folder:
            done = inside(folder, sys.executable, "-c", _PLAN, str(tiny))
        assert (done.stdout, done.stderr) == (f"{threads}\n", ""), quota


@posix
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("budget", [False, True], ids=["resident", "offloaded"])
def test_fewer_threads_than_wanted(tiny: Path, mixture: Path, limit: int, budget: bool) -> None:
    path = mixture if budget else tiny
    expected = answer(stoker.load(path))
    arguments = [
        "-m", "stoker.runtime.cli", "run", str(path), PROMPT, "--raw",
        "-n", "8", "--temperature", "0", "-t", "8",
    ]  # fmt: skip
    if budget:
        with pytest.raises(stoker.BudgetError) as refused:
            stoker.load(path, threads=8, memory=1)
        arguments += ["--memory", str(named_minimum(refused.value) + 64 * MEBIBYTE)]
    with group("pids", {"pids.max": str(limit)}) as folder:
        done = inside(folder, sys.executable, *arguments)
    if done.returncode == 0:
        assert done.stdout == expected + ("" if expected.endswith("\n") else "\n")
    else:  # a mixture's flash needs one thread besides the caller
        assert budget and limit < 3 and done.returncode == 1
        assert re.fullmatch(r"stoker: error: expected a thread .*\n", done.stderr)


def groups(root: Path, lines: str, mounts: Sequence[str], files: dict[str, str]) -> dict[str, str]:
    """A made-up system: its /proc/self/cgroup, the mounts "root point type options", its files."""
    (root / "cgroup").write_text(lines)
    rows = []
    for mount in mounts:
        top, point, kind, options = mount.split()
        rows.append(f"31 23 0:28 {top} {root / point} rw,nosuid shared:9 - {kind} cgroup {options}")
    (root / "mountinfo").write_text("\n".join(rows) + "\n")
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return {
        "groups": str(root / "cgroup"),
        "mounts": str(root / "mountinfo"),
        "root": str(root / "nowhere"),
    }


def test_quota_of_version_2(tmp_path: Path) -> None:
    """The tightest on the way up; the group's own says nothing."""
    at = groups(
        tmp_path,
        "0::/app.slice/job\n",
        ["/ unified cgroup2 rw"],
        {
            "unified/cpu.stat": "",
            "unified/app.slice/cpu.max": "350000 100000\n",
            "unified/app.slice/job/cpu.max": "max 100000\n",
        },
    )
    assert _core.cpu_quota(**at) == 4
    assert [path for _, path, _ in _core.control_groups("cpu", **at)] == [
        "/app.slice/job",
        "/app.slice",
        "/",
    ]


def test_quota_of_version_1_with_joined_controllers(tmp_path: Path) -> None:
    at = groups(
        tmp_path,
        "5:cpuset:/other\n4:cpu,cpuacct:/a/b\n0::/\n",
        ["/ cpuset cgroup rw,cpuset", "/ both cgroup rw,cpu,cpuacct"],
        {
            "both/cpu.cfs_quota_us": "-1\n",
            "both/cpu.cfs_period_us": "100000\n",
            "both/a/cpu.cfs_quota_us": "50000\n",
            "both/a/cpu.cfs_period_us": "100000\n",
            "both/a/b/cpu.cfs_quota_us": "-1\n",
        },
    )
    assert _core.cpu_quota(**at) == 1


def test_groups_inside_a_container(tmp_path: Path) -> None:
    """The path is the host's, the mount begins at the container's group; the job is below it."""
    at = groups(
        tmp_path,
        "4:cpu:/docker/ab c/job\n",
        ["/docker/ab\\040c point cgroup rw,cpu"],
        {
            "point/cpu.cfs_quota_us": "400000\n",
            "point/cpu.cfs_period_us": "100000\n",
            "point/job/cpu.cfs_quota_us": "200000\n",
            "point/job/cpu.cfs_period_us": "100000\n",
        },
    )
    assert _core.control_groups("cpu", **at) == [
        (1, "/job", str(tmp_path / "point/job")),
        (1, "/", str(tmp_path / "point")),
    ]
    assert _core.cpu_quota(**at) == 2


@pytest.mark.parametrize("path", ["/../../elsewhere", "/gone", "/"])
def test_groups_of_a_namespace(tmp_path: Path, path: str) -> None:
    at = groups(
        tmp_path, f"0::{path}\n", ["/ point cgroup2 rw"], {"point/cpu.max": "100000 50000\n"}
    )
    assert _core.control_groups("cpu", **at) == [(2, "/", str(tmp_path / "point"))]
    assert _core.cpu_quota(**at) == 2


def test_a_quota_that_is_none(tmp_path: Path) -> None:
    for text in ("max 100000\n", "garbage\n", "", "0 0\n", "-5 100000\n"):
        at = groups(tmp_path, "0::/\n", ["/ point cgroup2 rw"], {"point/cpu.max": text})
        assert _core.cpu_quota(**at) == 0
    assert _core.cpu_quota(groups=str(tmp_path / "none")) == 0


# Budgets beyond the group's limit, and at the least.


def test_a_budget_above_the_groups_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 100 << 20)
    monkeypatch.setattr(memory, "memory_headroom", lambda: Headroom(1000 << 20, 890 << 20))
    assert memory.budget("900MiB") == 900 << 20
    assert memory.budget("1000MiB") == 1000 << 20  # ten of page tables are ours
    assert not caplog.records
    assert memory.budget(2000 << 20) == 1000 << 20
    assert "is more than the control group of this process allows" in caplog.text
    monkeypatch.setattr(memory, "memory_headroom", lambda: Headroom(1000 << 20, 400 << 20))
    assert memory.budget("900MiB") == 500 << 20  # another process has the other half
    monkeypatch.setattr(memory, "memory_headroom", lambda: None)
    assert memory.budget("900GiB") == 900 << 30


@posix
def test_a_budget_above_the_limit_is_cut_and_survives(mixture: Path) -> None:
    code = (
        "import sys, stoker\n"
        "model = stoker.load(sys.argv[1], threads=1, memory='1GiB')\n"
        "model.generate('a', max_tokens=4).read()\n"
        "print(model.plan['memory'])\n"
    )
    limit = 160 << 20
    try:
        with memory_group(limit) as limited:
            running = limited.popen(
                [sys.executable, "-c", code, str(mixture)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            out, err = running.communicate(timeout=120)
            kills = limited.kills()
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    assert running.returncode == 0 and kills == 0
    assert int(out) <= limit
    assert re.fullmatch(r"stoker: memory 1GiB is more than .*\n", err)


@pytest.mark.parametrize("kind", ["offloaded", "streamed"])
def test_the_least_budget_works(mixture: Path, tiny: Path, kind: str) -> None:
    """What a BudgetError names is enough in the next process, whose size differs a little."""
    path = mixture if kind == "offloaded" else tiny
    arguments = [sys.executable, "-m", "stoker.runtime.cli", "run", str(path), "a", "-n", "2"]
    for _ in range(5):
        refused = subprocess.run(
            [*arguments, "--memory", "1"], capture_output=True, text=True, check=False
        )
        named = re.search(r"at least (\d+) bytes", refused.stderr)
        assert refused.returncode == 2 and named is not None
        done = subprocess.run(
            [*arguments, "--memory", named[1]], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


# Closed streams.

_EVERY_COMMAND = """
import io, json, os, sys
from stoker.runtime.cli import main
report = os.fdopen(int(sys.argv[1]), "w")
found = {}
for line in json.loads(sys.argv[2]):
    try:
        found[" ".join(line)] = main(line)
    except BaseException as error:
        found[" ".join(line)] = repr(error)
json.dump(found, report)
report.close()
"""


def every_command(tiny: Path) -> list[list[str]]:
    def walk(command: Any, name: list[str]) -> Iterator[list[str]]:
        if hasattr(command, "commands"):
            for part, inner in command.commands.items():
                yield from walk(inner, [*name, part])
        else:
            yield name

    lines = [[*name, "--help"] for name in walk(typer.main.get_command(cli.app), [])]
    assert len(lines) > 20
    return [
        *lines,
        [],
        ["--version"],
        ["run", str(tiny), "Hi", "-n", "3", "--stats", "--plan"],
        ["run", str(tiny), "Hi", "-n", "3", "--json"],
        ["run", str(tiny), "-", "-n", "3"],
        ["run", str(tiny), "-n", "3"],
        ["chat", str(tiny)],
        ["inspect", str(tiny)],
        ["doctor", "--no-storage"],
        ["perplexity", str(tiny), str(Path(__file__)), "--context", "32", "--max-chunks", "2"],
        ["pull", "list"],
        ["plan", str(tiny), "--memory", "1GB"],
        ["run", "no such model", "Hi"],
        ["run", str(tiny), "Hi", "--temperature", "-1"],
        ["no-command"],
    ]


@posix
@pytest.mark.parametrize("closed", [0, 1, 2, (0, 1, 2)], ids=["stdin", "stdout", "stderr", "all"])
def test_closed_streams(tiny: Path, tmp_path: Path, closed: int | tuple[int, ...]) -> None:
    gone = (closed,) if isinstance(closed, int) else closed
    read, write = os.pipe()
    shut = " ".join(f"{n}{'<' if n == 0 else '>'}&-" for n in gone)
    lines = every_command(tiny)
    running = subprocess.Popen(
        ["/bin/sh", "-c", f'exec "$@" {shut}', "sh", sys.executable, "-c", _EVERY_COMMAND,
         str(write), json.dumps(lines)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[write],
        cwd=tmp_path,
    )  # fmt: skip
    os.close(write)
    out, err = running.communicate(timeout=300)
    with os.fdopen(read) as report:
        found = json.loads(report.read())
    assert len(found) == len(lines)
    for line, code in found.items():
        good = (0,) if "--help" in line else (0, 1, 2)
        assert code in good, line
    assert found[" ".join(["run", str(tiny), "Hi", "-n", "3", "--json"])] == 0
    assert "internal error" not in err and "Traceback" not in err
    for n, text in ((1, out), (2, err)):
        assert (n in gone) == (text == ""), n
    assert list(tmp_path.iterdir()) == []  # nothing took a stream's place


@posix
@pytest.mark.parametrize("command", ["run", "chat"])
@pytest.mark.parametrize("given", [None, b"", b"Hi \xff\n"], ids=["closed", "empty", "no UTF-8"])
def test_standard_input_that_says_nothing(tiny: Path, command: str, given: bytes | None) -> None:
    closed = "<&-" if given is None else ""
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "stoker.runtime.cli",
         command, str(tiny), "-n", "3"],
        input=given,
        capture_output=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == b""
    line = {
        (True, "run"): b"give a prompt, - for stdin, or --file",
        (True, "chat"): b"standard input: expected messages, found none",
        (False, "run"): b"-: expected UTF-8 text, found byte 3 not to be",
        (False, "chat"): b"standard input: expected UTF-8 text, found byte 3 not to be",
    }[not given, command]
    assert done.stderr == b"stoker: error: " + line + b"\n"


@posix
def test_devices_are_not_replaced(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    """A result takes its name when it is complete, by a rename that no device would survive."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    results = tmp_path / "results.jsonl"
    results.write_text("{}\n")
    for line in (
        ["export", "quantize", str(tiny), str(pipe), "--type", "Q8_0", "--force"],
        ["export", "gguf", str(tmp_path), str(pipe), "--force"],
        ["export", "upcycle", str(tiny), str(pipe), "--experts", "4", "--used", "2", "--force"],
        ["export", "onnx", str(tiny), str(pipe), "--force"],
        ["export", "tflite", str(tiny), str(pipe), "--force"],
        ["export", "quantize-onnx", str(tiny), str(pipe), "--dynamic", "--force"],
        ["export", "imatrix", str(tiny), str(pipe), "--text", str(results), "--force"],
        ["report", str(results), "-o", str(pipe)],
        ["probe", "--quick", "--out", str(pipe)],
        ["bench", str(tiny), "--json", str(pipe), "--force"],
        ["run", str(tiny), "hi", "--trace", str(pipe), "-n", "2"],
    ):
        assert cli.main(line) in (1, 2), line
        assert pipe.is_fifo(), line
        message = capsys.readouterr().err
        assert message.startswith("stoker: error:") and "internal" not in message, line


@posix
@pytest.mark.parametrize("number", [1, 2])
def test_a_full_disk(tiny: Path, number: int) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    with full.open("w") as where:
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        streams["stdout" if number == 1 else "stderr"] = where
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "stoker.runtime.cli",
                "run",
                str(tiny),
                "Hi",
                "-n",
                "3",
                "--stats",
            ],
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=120,
            check=False,
            **streams,
        )
    assert done.returncode == 1
    if number == 1:
        assert re.fullmatch(r"stoker: error: .*No space left on device\n", done.stderr)
