"""Jobs of a sweep on a Ray cluster.

Which job goes where is decided here rather than by Ray, because times are measured: while a
measurement runs, nothing else of the sweep runs on its machine (raylets with one host name are one
machine), and it takes all CPUs of its node so that other users of the cluster stay away, too.
Perplexities and width searches run side by side, as many as their threads allow.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ...runtime.base.errors import DeviceError, OptionError
from .jobs import Job, Outcome, Task, failed, perform
from .sweep import Finished, Started

_CONNECT_S = 10.0  # time for a cluster to answer
_POLL_S = 0.5  # time between two looks at the cluster
_PATIENCE_S = 60.0  # wait for a node that can run a job, while no other job runs
_SUSPECT_S = 5.0  # time without jobs for a node on which one has died
_DEVICE = "device"  # label, and prefix of the custom resource, that names a device


@dataclass(frozen=True)
class Node:
    """A raylet that jobs can run on."""

    id: str
    host: str
    cpus: int
    devices: frozenset[str]

    def does(self, job: Job) -> bool:
        """True if the job may run here."""
        return job.device is None or job.device in self.devices

    def cpus_for(self, job: Job) -> int:
        """CPUs of this node that the job takes."""
        if job.alone or job.threads is None:
            return self.cpus
        return min(job.threads, self.cpus)


@dataclass(frozen=True)
class _Running:
    index: int
    attempt: int
    job: Job
    node: Node
    cpus: int
    began: float


def nodes_of(rows: Iterable[Any]) -> list[Node]:
    """The nodes among the rows of ray.nodes() that are alive and have a CPU."""
    found = []
    for row in rows:
        cpus = int(row.get("Resources", {}).get("CPU", 0))
        if not row.get("Alive") or cpus < 1:
            continue
        named = {
            name.partition(":")[2] for name in row["Resources"] if name.startswith(f"{_DEVICE}:")
        }
        label = (row.get("Labels") or {}).get(_DEVICE)
        devices = frozenset(named | ({label} if label else set()))
        host = row.get("NodeManagerHostname") or row["NodeManagerAddress"]
        found.append(Node(row["NodeID"], host, cpus, devices))
    return found


def placed(
    pending: Sequence[Job], nodes: Sequence[Node], running: Iterable[tuple[Job, Node]]
) -> Iterator[tuple[int, Node]]:
    """(index, node) of each pending job that can begin now.

    A job that has to wait keeps later jobs off the machines that it waits for: otherwise
    small jobs would keep a measurement from ever finding its machine idle.
    """
    busy: dict[str, list[Job]] = {}
    free = {node.id: node.cpus for node in nodes}
    for job, node in running:
        busy.setdefault(node.host, []).append(job)
        if node.id in free:
            free[node.id] -= node.cpus_for(job)
    waited_for: set[str] = set()  # hosts
    for index, job in enumerate(pending):
        able = [node for node in nodes if node.does(job)]
        for node in sorted(able, key=lambda n: (len(busy.get(n.host, [])), -free[n.id], n.id)):
            there = busy.get(node.host, [])
            fits = not there if job.alone else free[node.id] >= node.cpus_for(job)
            if fits and node.host not in waited_for and not any(other.alone for other in there):
                busy.setdefault(node.host, []).append(job)
                free[node.id] -= node.cpus_for(job)
                yield index, node
                break
        else:
            waited_for |= {node.host for node in able}


class OnRay:
    """Carries out tasks on a cluster. Jobs whose worker or node dies are repeated elsewhere."""

    def __init__(
        self,
        address: str,
        *,
        retries: int = 2,
        timeout: float | None = None,
        say: Callable[[str], None] | None = None,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """address: HOST:PORT, ray://HOST:PORT, "auto" (the cluster that this machine belongs to),
        "local" or "local:CPUS" (a cluster on this machine for the duration of the sweep).

        retries: for a job whose worker or node died. timeout: seconds per job. say: receives
        messages for the user. patience_s: how long jobs wait for a node that can run them.
        """
        self._address, self._retries, self._timeout = address, retries, timeout
        self._say = say or (lambda _: None)
        self._patience_s = patience_s
        try:
            self._ray: Any = import_module("ray")
        except ImportError:
            raise OptionError("--ray needs Ray: pip install 'stoker[sweep]'") from None

    def run(self, tasks: Sequence[Task], finished: Finished, started: Started) -> None:
        """Carries out every task. Raises OptionError if there is no such cluster."""
        with self._joined():
            _Sweeping(self, self._ray, tasks, finished, started).loop()

    @contextmanager
    def _joined(self) -> Iterator[None]:
        ray = self._ray
        if ray.is_initialized():  # initialised by the program that calls us
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        kind, _, cpus = self._address.partition(":")
        if kind == "local":
            if cpus and not (cpus.isdecimal() and 0 < int(cpus) < 10_000):
                raise OptionError(f"--ray: expected local:CPUS, found {self._address}")
            arguments |= {"address": "local", "include_dashboard": False}
            arguments |= {"num_cpus": int(cpus)} if cpus else {}
        else:
            arguments["address"] = self._address
            _check_answers(self._address)
        try:
            ray.init(**arguments)
        except (ConnectionError, ImportError, ValueError, RuntimeError, TimeoutError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            hint = ""
            if kind not in ("local", "auto"):
                hint = " (does the cluster ask for a token? then set RAY_AUTH_MODE=token)"
            raise OptionError(f"--ray {self._address}: {lines[0]}{hint}") from None
        try:
            yield
        finally:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises OptionError if nobody listens; Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not (port.isdecimal() and int(port) < 1 << 16):
        forms = "HOST:PORT, ray://HOST:PORT, auto, local or local:CPUS"
        raise OptionError(f"--ray: expected {forms}, found {address}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise OptionError(f"--ray {address}: {error.strerror or error}") from None


class _Sweeping:
    """One call of `OnRay.run`."""

    def __init__(
        self,
        settings: OnRay,
        ray: Any,
        tasks: Sequence[Task],
        finished: Finished,
        started: Started,
    ) -> None:
        self._retries, self._timeout = settings._retries, settings._timeout
        self._say, self._patience_s = settings._say, settings._patience_s
        self._ray, self._tasks = ray, tasks
        self._finished, self._started = finished, started
        self._jobs = [Job(**task["job"]) for task in tasks]
        self._pending = deque((index, 1) for index in range(len(tasks)))
        self._running: dict[Any, _Running] = {}
        self._suspects: dict[str, float] = {}  # node -> end of its time without jobs
        self._idle_since: float | None = None
        self._texts: dict[str, Any] = {}  # sha256 -> reference
        affinity = import_module("ray.util.scheduling_strategies")
        self._affinity: Any = affinity.NodeAffinitySchedulingStrategy
        self._perform: Any = ray.remote(_perform)

    def loop(self) -> None:
        """Runs until everything is done. Ctrl-C ends the running jobs."""
        try:
            while self._pending or self._running:
                nodes = self._nodes()
                self._place(nodes)
                if self._running:
                    self._idle_since = None
                    self._collect()
                else:
                    self._wait(nodes)
        except BaseException:
            for reference in self._running:
                with suppress(Exception):
                    self._ray.cancel(reference, force=True)
            raise

    def _nodes(self) -> list[Node]:
        try:
            return nodes_of(self._ray.nodes())
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise DeviceError(f"the Ray cluster does not answer: {lines[0]}") from None

    def _place(self, nodes: Sequence[Node]) -> None:
        now = time.monotonic()
        trusted = [n for n in nodes if self._suspects.get(n.id, 0.0) <= now]
        pending = list(self._pending)
        beginning = placed(
            [self._jobs[index] for index, _ in pending],
            trusted,
            [(r.job, r.node) for r in self._running.values()],
        )
        for at, node in list(beginning):
            index, attempt = pending[at]
            self._pending.remove(pending[at])
            self._submit(index, attempt, node)

    def _submit(self, index: int, attempt: int, node: Node) -> None:
        from ... import __version__

        task, job = self._tasks[index], self._jobs[index]
        text: Any = None
        if task["text"] is not None and job.text is not None:
            if job.text not in self._texts:
                self._texts[job.text] = self._ray.put(task["text"])
            text = self._texts[job.text]
        cpus = node.cpus_for(job)
        call = self._perform.options(
            num_cpus=cpus,
            max_retries=0,  # we resend a job to a node that fits then
            scheduling_strategy=self._affinity(node.id, soft=False),
        )
        reference = call.remote(task | {"text": None}, text, __version__)
        running = _Running(index, attempt, job, node, cpus, time.monotonic())
        self._running[reference] = running
        self._started(index, node.host)

    def _collect(self) -> None:
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
        for reference in ready:
            running = self._running.pop(reference)
            outcome = self._outcome(reference, running)
            if outcome is None:
                self._pending.appendleft((running.index, running.attempt + 1))
            else:
                self._finished(running.index, outcome, running.attempt)
        if self._timeout is None:
            return
        late = time.monotonic() - self._timeout
        for reference in [r for r, running in self._running.items() if running.began < late]:
            running = self._running.pop(reference)
            self._ray.cancel(reference, force=True)
            outcome = failed(f"not done within {self._timeout:g} s", node=running.node.host)
            self._finished(running.index, outcome, running.attempt)

    def _outcome(self, reference: Any, running: _Running) -> Outcome | None:
        """The outcome of a task, None if it is to be repeated."""
        errors = self._ray.exceptions
        host = running.node.host
        try:
            outcome: Outcome = self._ray.get(reference)
            return outcome
        except errors.RayTaskError as error:
            text = str(error)
            if "No module named 'stoker" in text:
                return failed(f"stoker is not installed on {host}", node=host)
            lines = text.strip().splitlines()
            return failed(f"on {host}: {lines[-1] if lines else error!r}", node=host)
        except errors.RayError as error:  # the worker or node died, or memory ran out
            self._suspects[running.node.id] = time.monotonic() + _SUSPECT_S
            lines = str(error).strip().splitlines() or [type(error).__name__]
            if running.attempt <= self._retries:
                label = running.job.label()
                self._say(f"{label}: its worker on {host} died, it is done again")
                return None
            return failed(
                f"its worker died, {running.attempt} times; the last on {host}: {lines[0]}",
                node=host,
            )

    def _wait(self, nodes: Sequence[Node]) -> None:
        """Waits while nothing runs or can begin; gives up on jobs that no node can do."""
        now = time.monotonic()
        lacking = [
            (i, a) for i, a in self._pending if not any(n.does(self._jobs[i]) for n in nodes)
        ]
        if self._idle_since is None:
            self._idle_since = now
            for what in sorted({_wanted(self._jobs[i]) for i, _ in lacking}):
                self._say(f"waiting for {what} to join the cluster")
        elif lacking and now - self._idle_since > self._patience_s:
            if not nodes:  # not a job's fault, so no result is written
                raise DeviceError("the Ray cluster has no node with a CPU")
            for index, attempt in lacking:
                self._pending.remove((index, attempt))
                what = _wanted(self._jobs[index])
                self._finished(index, failed(f"the cluster has not got {what}"), attempt)
            self._idle_since = None
        time.sleep(_POLL_S)


def _wanted(job: Job) -> str:
    if job.device is None:
        return "a node with a CPU"
    return f"a node with the resource {_DEVICE}:{job.device} or the label {_DEVICE}={job.device}"


def _perform(task: Task, text: str | None, version: str) -> Outcome:
    """Carries out a task on a worker."""
    from ... import __version__

    if __version__ != version:
        return failed(f"expected stoker {version} on the node, found {__version__}")
    task["text"] = text
    return perform(task)
