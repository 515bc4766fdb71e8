"""Sweeps: results that outlive failures and kills, and the same results on a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_models import WIDE, make

pytest.importorskip("yaml", reason="a sweep's specification needs pyyaml")

from stoker.export.quantize import quantize
from stoker.mobile_bench.run import records
from stoker.mobile_bench.sweep import cache as sweep_cache
from stoker.mobile_bench.sweep import spec as sweep_spec
from stoker.mobile_bench.sweep.jobs import Job
from stoker.mobile_bench.sweep.ray import Node, OnRay, nodes_of, placed
from stoker.mobile_bench.sweep.sweep import InProcess, Summary, sweep
from stoker.offload.plan import device_profile
from stoker.offload.plan.device_profile import DeviceProfile
from stoker.runtime.base.errors import DeviceError, OptionError

TEXT = "the more of the words that you hear in the night, the less is it that they say. " * 60
MIXTURE: dict[str, Any] = {**WIDE, "n_expert": 4, "n_layer": 2, "n_ff_expert": 256}
NODE_ID = "0123456789ab"

WIDTHS = """
  - kind: bitwidth
    models: mixture.gguf
    bits: [4.5, 5.5]
    types: [Q4_K, Q6_K, Q8_0]
    text: text.txt
    tokens: 128
    window: 64
    steps: 12
    threads: 1"""
PERPLEXITIES = """
  - kind: perplexity
    models: [dense.gguf, mixture.gguf]
    types: [as-is, Q8_0, Q4_0]
    text: text.txt
    context: 64
    threads: 1"""
SPEEDS = """
  - models: dense.gguf
    types: [as-is, Q8_0]
    threads: [1, 2]
    prompts: [16]
    tokens: 8"""
SIX = "jobs:" + PERPLEXITIES
# The results of these jobs do not depend on time or host.
TWELVE = "jobs:" + WIDTHS + PERPLEXITIES + SPEEDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a text, and a cache with a device profile."""
    path = tmp_path_factory.mktemp("sweep")
    make(path / "dense.gguf", "llama", quant="F16")
    make(path / "mixture.gguf", "llama-moe", quant="F16", **MIXTURE)
    (path / "text.txt").write_text(TEXT)
    empty: dict[str, Any] = {key: {} for key in DeviceProfile.__required_keys__}
    lists = ("memory_reads", "peaks", "formats", "storage_reads")
    profile: Any = empty | {key: [] for key in lists}
    profile |= {"kind": "profile", "version": 1, "id": NODE_ID, "name": "test", "quick": True}
    profile |= {"time": "2026-01-01T00:00:00+00:00", "stoker": "0"}
    device_profile.save(profile, path / "cache" / "device.json")
    return path


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STOKER_CACHE", str(folder / "cache"))
    return folder / "cache"


def spec_of(folder: Path, text: str, name: str = "spec.yaml") -> sweep_spec.Spec:
    (folder / name).write_text(text)
    return sweep_spec.load(folder / name)


def comparable(out: Path) -> dict[str, Any]:
    """All fields of a file of results that are not times, by job."""
    found = {}
    for job in records.read(out)["jobs"]:
        results: list[Any] = []
        for result in job["results"]:
            if result["kind"] == "run":
                kept = ("device", "model", "engine", "repeat", "threads", "context", "memory")
                run = {key: result[key] for key in (*kept, "tokens_sha256", "error")}  # type: ignore[literal-required]
                results.append(run | {"prompts": [p["tokens"] for p in result["prompts"]]})
            else:
                results.append(result)
        found[job["key"]] = (job["job"], job["error"], results)
    return found


def cli(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stoker.runtime.cli.main", "sweep", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, **pipes)


def wait_for(found: Callable[[], Any], of: subprocess.Popen[str] | None = None) -> Any:
    """Waits until `found` gives something true; of: a process that must not end before."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if value := found():
            return value
        if of is not None and of.poll() is not None:
            raise AssertionError(f"it has ended: {of.communicate()}")
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def job_processes(parent: int, words: str = "sweep.jobs") -> list[psutil.Process]:
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if words in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


# ---- in process


def test_quantized_once_and_found_by_content(folder: Path, tmp_path: Path) -> None:
    source, cache = folder / "dense.gguf", tmp_path / "cache"
    cache.mkdir()
    digest = sweep_cache.content_digest(source, cache)
    made = sweep_cache.quantized(source, digest, "Q8_0", cache, 1)
    quantize(source, tmp_path / "plain.gguf", type="Q8_0")
    assert made.read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    before = made.stat()
    again = sweep_cache.quantized(folder / "other-name.gguf", digest, "Q8_0", cache, 1)
    assert again == made and made.stat().st_mtime_ns == before.st_mtime_ns
    assert sweep_cache.quantized(source, digest, "Q4_0", cache, 1) != made


@pytest.fixture(scope="module")
def twelve(folder: Path) -> Iterator[tuple[Path, Summary]]:
    """The results of the twelve jobs, run one after the other here."""
    os.environ["STOKER_CACHE"] = str(folder / "cache")
    out = folder / "here.jsonl"
    yield out, sweep(spec_of(folder, TWELVE, "twelve.yaml"), out, InProcess())


def test_twelve_jobs(folder: Path, twelve: tuple[Path, Summary]) -> None:
    out, summary = twelve
    assert (summary.jobs, summary.done, summary.reused, summary.failures) == (12, 12, 0, [])
    found = records.read(out)
    assert [p["id"] for p in found["profiles"]] == [NODE_ID]
    assert len(found["runs"]) == 4 and len(found["perplexities"]) == 6
    assert {r["model"]["name"] for r in found["runs"]} == {"dense.gguf", "dense-Q8_0.gguf"}
    assert [w["made"]["bits"] for w in found["widths"]] == sorted(
        w["made"]["bits"] for w in found["widths"]
    )
    assert all(w["made"]["bits"] <= w["bits"] for w in found["widths"])
    assert sum(t["matrices"] for t in found["widths"][0]["types"]) == 2 * 3 * 4
    assert all(r["device"] == NODE_ID and r["decode"] is not None for r in found["runs"])
    by_type: dict[str, set[str | None]] = {}
    for job in found["jobs"]:
        for r in job["results"]:
            if r["kind"] == "run":
                by_type.setdefault(job["job"]["type"] or "", set()).add(r["tokens_sha256"])
    assert all(len(hashes) == 1 and None not in hashes for hashes in by_type.values())
    first = next(p["ppl"] for p in found["perplexities"] if p["model"]["name"] == "dense.gguf")
    import stoker

    assert stoker.load(folder / "dense.gguf").perplexity(TEXT, context=64).ppl == first
    # The searches have left nothing behind, and only whole models are in the cache.
    left = [p.name for p in (folder / "cache" / "quantized").iterdir() if p.is_file()]
    assert [n for n in left if not n.endswith(".sweep")] and not [
        n for n in left if "bits" in n and not n.endswith(".sweep")
    ]


class Spy:
    """A watcher that records which jobs were begun."""

    def __init__(self, begun: Callable[[Job], None] | None = None) -> None:
        self.jobs: list[Job] = []
        self._begun = begun

    def started(self, job: Job, where: str) -> None:
        self.jobs.append(job)
        if self._begun is not None:
            self._begun(job)

    def finished(self, *_: object) -> None:
        pass


def test_what_is_in_the_file_is_not_run_again(folder: Path, twelve: tuple[Path, Summary]) -> None:
    out = folder / "again.jsonl"
    content = twelve[0].read_bytes()
    out.write_bytes(content)
    spec = spec_of(folder, TWELVE, "twelve.yaml")
    spy = Spy()
    summary = sweep(spec, out, InProcess(), watcher=spy)
    assert not spy.jobs and (summary.done, summary.reused) == (0, 12)
    assert out.read_bytes() == content
    # A file that ends in the middle of a line loses two jobs, and nothing else.
    lines = content.splitlines(keepends=True)
    cut = b"".join(lines[:-1])
    out.write_bytes(b"".join(lines[:-2]) + lines[-2][: len(lines[-2]) // 2])
    summary = sweep(spec, out, InProcess(), watcher=spy)
    assert len(spy.jobs) == 2 and (summary.done, summary.reused) == (2, 10)
    assert comparable(out) == comparable(twelve[0])
    # A whole line that lacks nothing but its end stays.
    out.write_bytes(cut.removesuffix(b"\n"))
    assert sweep(spec, out, InProcess()).done == 1
    assert comparable(out) == comparable(twelve[0])


@pytest.mark.parametrize("content", ["notes of mine", '{"kind": "poem"}\n', "[]\n{}\n", '{"a": 1}'])
def test_another_file_is_left_alone(folder: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "notes.txt"
    out.write_text(content)
    with pytest.raises(OptionError, match=r"notes\.txt"):
        sweep(spec_of(folder, TWELVE, "twelve.yaml"), out, InProcess())
    assert out.read_text() == content


FAILING = """
jobs:
  - kind: perplexity
    models: [nowhere.gguf, text.txt, dense.gguf]
    text: text.txt
    context: 64
    threads: 1
  - models: mixture.gguf
    memory: 1MB
    prompts: 16
    tokens: 2
"""


def test_a_failing_job_does_not_stop_the_rest(folder: Path, tmp_path: Path) -> None:
    (folder / "failing.yaml").write_text(FAILING)
    out = tmp_path / "out.jsonl"
    process = cli("failing.yaml", "--out", str(out), cwd=folder)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "4 jobs, 4 run now, 0 were there, 3 failed" in said
    assert "nowhere.gguf: no such file" in said and errors.count("error: ") == 3
    jobs = {Path(j["job"]["model"]).name: j for j in records.read(out)["jobs"]}
    assert "a path that exists where the job runs" in (jobs["nowhere.gguf"]["error"] or "")
    assert jobs["text.txt"]["error"] and jobs["mixture.gguf"]["error"]
    assert jobs["dense.gguf"]["error"] is None
    # Failed jobs are results, too, until they are asked for again.
    process = cli("failing.yaml", "--out", str(out), "--json", cwd=folder)
    summary = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == 1
    assert (summary["done"], summary["reused"], len(summary["failed"])) == (0, 4, 3)
    make(folder / "nowhere.gguf", "llama")
    try:
        spec = sweep_spec.load(folder / "failing.yaml")
        spy = Spy()
        # The model is here now, so its key has changed with its content.
        assert len(sweep(spec, out, InProcess(), watcher=spy).failures) == 2
        assert [Path(job.model).name for job in spy.jobs] == ["nowhere.gguf"]
        summary_again = sweep(spec, out, InProcess(), retry_failed=True, watcher=spy)
        assert len(spy.jobs) == 3 and len(summary_again.failures) == 2
    finally:
        (folder / "nowhere.gguf").unlink()
    assert len(records.read(out)["jobs"]) == 5


def test_retried_where_its_process_was_killed(folder: Path, tmp_path: Path) -> None:
    spec = spec_of(folder, TWELVE, "twelve.yaml")
    spec = replace(spec, jobs=spec.jobs[:1])
    kills = iter([True, False])

    def kill(_: Job) -> None:
        def now() -> None:
            for process in wait_for(lambda: job_processes(os.getpid())):
                process.kill()

        if next(kills):
            threading.Thread(target=now).start()

    summary = sweep(spec, tmp_path / "out.jsonl", InProcess(), watcher=Spy(kill))
    (job,) = records.read(tmp_path / "out.jsonl")["jobs"]
    assert not summary.failures and job["attempts"] == 2


def test_given_up_where_it_dies_each_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    spec = spec_of(folder, TWELVE, "twelve.yaml")
    spec = replace(spec, jobs=spec.jobs[:2])
    summary = sweep(spec, tmp_path / "out.jsonl", InProcess(retries=1))
    assert len(summary.failures) == 2
    assert summary.failures[0]["error"] == "the job's process ended with exit code 1"
    assert summary.failures[0]["attempts"] == 2


def test_timeout(folder: Path, tmp_path: Path) -> None:
    spec = spec_of(folder, TWELVE, "twelve.yaml")
    spec = replace(spec, jobs=spec.jobs[:1])
    summary = sweep(spec, tmp_path / "out.jsonl", InProcess(timeout=0.5))
    assert [f["error"] for f in summary.failures] == ["not done within 0.5 s"]
    assert not job_processes(os.getpid())


def test_interrupted_results_are_kept(folder: Path, tmp_path: Path) -> None:
    (folder / "six.yaml").write_text(SIX)
    out = tmp_path / "out.jsonl"
    process = cli("six.yaml", "--out", str(out), cwd=folder)
    wait_for(lambda: out.exists() and out.read_bytes().count(b'"kind": "job"') >= 1, process)
    wait_for(lambda: job_processes(process.pid), process)
    running = job_processes(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors and "the same command goes on from here" in errors
    assert not [p for p in running if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    n = len(records.read(out)["jobs"])
    assert 1 <= n < 6
    spy = Spy()
    sweep(sweep_spec.load(folder / "six.yaml"), out, InProcess(), watcher=spy)
    assert len(spy.jobs) == 6 - n and len(records.read(out)["jobs"]) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="a death signal of the parent")
def test_a_killed_sweep_takes_its_job_with_it(folder: Path, tmp_path: Path) -> None:
    (folder / "twelve.yaml").write_text(TWELVE)
    process = cli("twelve.yaml", "--out", str(tmp_path / "out.jsonl"), cwd=folder)
    running = wait_for(lambda: job_processes(process.pid), process)
    time.sleep(1)
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(running, timeout=30)
    assert not alive


def test_one_sweep_a_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    spec = spec_of(folder, TWELVE, "twelve.yaml")

    class Second(InProcess):
        def run(self, *_: Any) -> None:
            with pytest.raises(OptionError, match="another sweep is writing"):
                sweep(spec, out, InProcess())

    sweep(spec, out, Second())


def test_dry_run_and_devices(folder: Path, tmp_path: Path, twelve: tuple[Path, Summary]) -> None:
    process = cli("twelve.yaml", "--dry-run", "--out", str(twelve[0]), cwd=folder)
    said, _ = process.communicate(timeout=60)
    assert said.count("  done    ") == 12 and said.endswith("12 jobs, 0 to do\n")
    out = tmp_path / "new.jsonl"
    process = cli("twelve.yaml", "--dry-run", "--json", "--out", str(out), cwd=folder)
    rows = json.loads(process.communicate(timeout=60)[0])
    assert {row["key"] for row in rows} == set(comparable(twelve[0])) and not out.exists()
    (folder / "bound.yaml").write_text("jobs:\n  - models: dense.gguf\n    device: [laptop, phone]")
    process = cli("bound.yaml", "--dry-run", cwd=folder)
    assert "jobs are bound to devices (laptop)" in process.communicate(timeout=60)[1]
    assert process.returncode == 2
    process = cli("bound.yaml", "--dry-run", "--device", "phone", cwd=folder)
    said, errors = process.communicate(timeout=60)
    assert "on phone" in said and "1 jobs, 1 to do" in said and "1 jobs are of other" in errors


# ---- on a cluster


MEASURE = Job("measure", "m")
SEARCH = Job("bitwidth", "m", threads=1)
A1, A2 = Node("1", "a", 2, frozenset()), Node("2", "a", 2, frozenset())
B = Node("3", "b", 2, frozenset({"laptop"}))


@pytest.mark.parametrize(
    ("pending", "nodes", "running", "expected"),
    [
        # There is one measurement per machine, however many raylets it has.
        ([MEASURE] * 3, [A1, A2, B], [], ["1", "3"]),
        ([MEASURE], [A1, A2], [(MEASURE, A1)], []),
        ([MEASURE], [A1, A2], [(SEARCH, A1)], []),
        ([SEARCH], [A1, A2], [(MEASURE, A1)], []),
        # Searches run side by side, as many as there are CPUs, spread over machines.
        ([SEARCH] * 7, [A1, B], [], ["1", "3", "1", "3"]),
        ([replace(SEARCH, threads=None)] * 3, [A1, B], [], ["1", "3"]),
        ([replace(SEARCH, threads=64)], [A1], [], ["1"]),
        # Later jobs do not overtake a waiting measurement on the machine that it waits for.
        ([MEASURE, SEARCH], [A1], [(SEARCH, A1)], []),
        ([MEASURE, SEARCH], [A1, B], [(SEARCH, A1)], ["3", "1"]),
        ([MEASURE, MEASURE, SEARCH], [A1, B], [(SEARCH, A1)], ["3"]),
        # Jobs that are bound to a device run only there.
        ([replace(MEASURE, device="laptop")] * 2, [A1, B], [], ["3"]),
        ([replace(MEASURE, device="phone"), SEARCH], [A1], [], [None, "1"]),
        ([MEASURE], [], [], []),
        # A node has left while one of its jobs is still counted.
        ([SEARCH], [A1], [(SEARCH, B)], ["1"]),
    ],
)
def test_placement(
    pending: Sequence[Job],
    nodes: Sequence[Node],
    running: Sequence[tuple[Job, Node]],
    expected: Sequence[str | None],
) -> None:
    found: list[str | None] = [None] * len(pending)
    for index, node in placed(pending, nodes, running):
        found[index] = node.id
    assert found == [*expected, *[None] * (len(pending) - len(expected))]


def test_nodes_of_a_cluster() -> None:
    def row(id: str, cpus: float, **more: Any) -> Mapping[str, Any]:
        resources = {"CPU": cpus, **more.pop("extra", {})} if cpus else {}
        return {"NodeID": id, "Alive": True, "NodeManagerAddress": "10.0.0.1", **more} | {
            "Resources": resources
        }

    found = nodes_of(
        [
            row("head", 0),
            row("dead", 4, Alive=False),
            row("one", 4, NodeManagerHostname="x", extra={"device:laptop": 1.0, "memory": 9.0}),
            row("two", 2, Labels={"device": "phone", "zone": "b"}),
        ]
    )
    assert found == [
        Node("one", "x", 4, frozenset({"laptop"})),
        Node("two", "10.0.0.1", 2, frozenset({"phone"})),
    ]


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Any]:
    """A head without CPUs and two nodes of one CPU each."""
    pytest.importorskip("ray", reason="needs Ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["STOKER_CACHE"] = str(folder / "cache")  # for the nodes
    from ray.cluster_utils import Cluster

    patience = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False, "_system_config": patience}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.add_node(num_cpus=1)
        made.add_node(num_cpus=1, resources={"device:laptop": 1})
        yield made
    finally:
        made.shutdown()


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def busy(node: Any) -> list[psutil.Process]:
    """The node's workers that carry out a job."""
    return job_processes(raylet(node), "ray::_perform")


def test_devices_and_errors_on_a_cluster(cluster: Any, folder: Path, tmp_path: Path) -> None:
    spec = spec_of(
        folder,
        """
        jobs:
          - kind: perplexity
            models: [dense.gguf, /no/such/model.gguf]
            text: text.txt
            context: 64
            device: [laptop, phone]
        """,
    )
    said: list[str] = []
    runner = OnRay(cluster.address, say=said.append, patience_s=1)
    summary = sweep(spec, tmp_path / "out.jsonl", runner)
    errors = {
        (Path(r["job"]["model"]).name, r["job"]["device"]): r["error"] for r in summary.failures
    }
    assert len(errors) == 3
    assert "a path that exists where the job runs" in (errors["model.gguf", "laptop"] or "")
    for name in ("dense.gguf", "model.gguf"):
        assert "device:phone" in (errors[name, "phone"] or "")
    assert any("device:phone" in text for text in said)


@pytest.mark.skipif(sys.platform != "linux", reason="finds a node's workers by their names")
def test_a_cluster_that_loses_a_worker_gives_the_same(
    cluster: Any, folder: Path, twelve: tuple[Path, Summary]
) -> None:
    spec = spec_of(folder, TWELVE, "twelve.yaml")
    spec = replace(spec, cache=folder / "cluster-cache")  # everything is quantized again
    out = folder / "cluster.jsonl"
    first, second = sorted(cluster.worker_nodes, key=raylet)
    killed: list[str] = []

    def kill() -> None:
        # Both nodes search widths: one loses its worker process, then the other node goes away.
        wait_for(lambda: busy(first) and busy(second))
        time.sleep(1)
        for process in wait_for(lambda: busy(first)):
            process.kill()
        killed.append("worker")
        wait_for(lambda: busy(second))
        cluster.remove_node(second, allow_graceful=False)
        killed.append("node")

    thread = threading.Thread(target=kill)
    thread.start()
    said: list[str] = []
    summary = sweep(spec, out, OnRay(cluster.address, retries=3, say=said.append))
    thread.join()
    assert killed == ["worker", "node"]
    assert (summary.jobs, summary.done, summary.failures) == (12, 12, [])
    assert comparable(out) == comparable(twelve[0])
    found = records.read(out)
    assert [p["id"] for p in found["profiles"]] == [NODE_ID]
    assert sum(job["attempts"] - 1 for job in found["jobs"]) == len(said) >= 1
    assert len(out.read_text().splitlines()) == 1 + 12  # a job is written once, however often tried


def test_a_cluster_without_nodes(cluster: Any, folder: Path, tmp_path: Path) -> None:
    """No job fails because there are no nodes. This must be the cluster's last test."""
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)
    spec = spec_of(folder, SIX)
    with pytest.raises(DeviceError, match="no node with a CPU"):
        sweep(spec, tmp_path / "out.jsonl", OnRay(cluster.address, patience_s=1))
    assert not records.read(tmp_path / "out.jsonl")["jobs"]


def test_no_cluster(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray")
    spec = spec_of(folder, TWELVE, "twelve.yaml")
    with pytest.raises(OptionError, match=r"--ray 127\.0\.0\.1:1: "):
        sweep(spec, tmp_path / "out.jsonl", OnRay("127.0.0.1:1"))
    with pytest.raises(OptionError, match="expected local:CPUS"):
        sweep(spec, tmp_path / "out.jsonl", OnRay("local:many"))
