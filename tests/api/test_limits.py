"""Limits of a process: quotas and thread limits of control groups, extreme budgets."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import stoker
from control_groups import group, inside
from offload_models import MEBIBYTE, named_minimum
from stoker.mobile_bench.run.cgroup_run import memory_group
from stoker.runtime import _core
from stoker.runtime.base import memory
from stoker.runtime.base.cgroup import Headroom

posix = pytest.mark.skipif(sys.platform == "win32", reason="control groups of Linux")
PROMPT = "the cat sat"


def answer(model: stoker.Model) -> str:
    return model.generate(PROMPT, temperature=0, max_tokens=8).read()


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
        "-m", "stoker.runtime.cli.main", "run", str(path), PROMPT, "--raw",
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
    else:  # reading a mixture from flash needs one thread besides the caller
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
    """The tightest quota on the way up counts; the group itself has none."""
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


# Budgets beyond the group's limit, and the least budget.


def test_a_budget_above_the_groups_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 100 << 20)
    monkeypatch.setattr(memory, "memory_headroom", lambda: Headroom(1000 << 20, 890 << 20))
    assert memory.budget("900MiB") == 900 << 20
    assert memory.budget("1000MiB") == 1000 << 20  # 10 MiB are our own page tables
    assert not caplog.records
    assert memory.budget(2000 << 20) == 1000 << 20
    assert "is more than the control group of this process allows" in caplog.text
    monkeypatch.setattr(memory, "memory_headroom", lambda: Headroom(1000 << 20, 400 << 20))
    assert memory.budget("900MiB") == 500 << 20  # another process uses the rest
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
    """The budget that a BudgetError names suffices in the next process, of slightly other size."""
    path = mixture if kind == "offloaded" else tiny
    arguments = [sys.executable, "-m", "stoker.runtime.cli.main", "run", str(path), "a", "-n", "2"]
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
