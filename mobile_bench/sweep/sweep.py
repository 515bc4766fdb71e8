"""Sweeps: many jobs, one after the other here or on a Ray cluster, into one file of results.

The file is the state: a job whose result is in it is not run again, so that the same call resumes
after any interruption. Each job is one line, written when it is done.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, Protocol

from ...runtime.base.errors import OptionError, StokerError
from ..run import records
from ..run.records import JobResult
from .cache import content_digest, default_folder
from .jobs import Job, Outcome, Task, failed
from .spec import Spec

_GRACE_S = 10.0  # time for a job to end itself after Ctrl-C
_MODULE = f"{__package__}.jobs"

# Called with (index of the task, its outcome, attempts that it took).
Finished = Callable[[int, Outcome, int], None]
# Called with (index of the task, host on which it has begun).
Started = Callable[[int, str], None]


class Runner(Protocol):
    """Interface that carries out tasks: `InProcess`, or ray.OnRay."""

    def run(self, tasks: Sequence[Task], finished: Finished, started: Started) -> None:
        """Carries out every task; `finished` is called once for each, in any order."""


@dataclass(frozen=True)
class Planned:
    """A job with its key. digest: of its model's content if the model is here."""

    job: Job
    key: str
    digest: str | None
    keep: bool
    known: JobResult | None  # its result in the file of results

    def pending(self, *, retry_failed: bool) -> bool:
        """True if it is still to be done."""
        return self.known is None or (retry_failed and self.known["error"] is not None)


@dataclass(frozen=True)
class Summary:
    """Result of a call of `sweep`. failures: of all the sweep's jobs, earlier calls' included."""

    out: Path
    jobs: int
    done: int
    reused: int
    failures: Sequence[JobResult]


class Watcher(Protocol):
    """Interface that is told about progress."""

    def started(self, job: Job, where: str) -> None:
        """A job has begun, on a host."""

    def finished(self, job: Job, result: JobResult, done: int, of: int) -> None:
        """A job has ended, `done` of `of` in this call."""


class Unwatched:
    """A watcher that does nothing."""

    def started(self, job: Job, where: str) -> None:
        """A job has begun."""

    def finished(self, job: Job, result: JobResult, done: int, of: int) -> None:
        """A job has ended."""


def plan(spec: Spec, out: Path | None) -> list[Planned]:
    """The jobs of a sweep, each once, with their results that are already in `out`.

    Raises OptionError if `out` is no file of results.
    """
    known: dict[str, JobResult] = {}
    if out is not None and out.exists():
        known = {result["key"]: result for result in records.read(out)["jobs"]}
    folder = spec.cache or default_folder()
    digests = {model: _digest(model, folder) for model in {job.model for job in spec.jobs}}
    found: dict[str, Planned] = {}
    for index, job in enumerate(spec.jobs):
        key = job.key(digests[job.model])
        if key not in found:
            keep = index in spec.keep
            found[key] = Planned(job, key, digests[job.model], keep, known.get(key))
    return list(found.values())


def sweep(
    spec: Spec,
    out: Path,
    runner: Runner,
    *,
    retry_failed: bool = False,
    command: str = "",
    watcher: Watcher | None = None,
) -> Summary:
    """Runs the jobs that are not yet in `out`, and appends each result as it comes.

    Raises OptionError if `out` is no file of results, or another sweep writes it; an error of
    the runner (a cluster that cannot be reached). A job that fails is a result with an `error`.
    """
    watcher = watcher or Unwatched()
    with _appended(out) as file:
        planned = plan(spec, out)
        pending = [p for p in planned if p.pending(retry_failed=retry_failed)]
        results = {p.key: p.known for p in planned if p.known is not None and p not in pending}
        reused = len(results)
        devices = {profile["id"] for profile in records.read(out)["profiles"]}
        run = uuid.uuid4().hex[:12]
        tasks = [_task(p, spec, run, command) for p in pending]

        def finished(index: int, outcome: Outcome, attempts: int) -> None:
            lines: list[Any] = []
            profile = outcome["profile"]
            if profile is not None and profile["id"] not in devices:
                devices.add(profile["id"])
                lines.append(profile)
            result = _result(pending[index], run, outcome, attempts)
            lines.append(result)
            # A single write, so that a kill cuts off at most the end of a line.
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
            results[result["key"]] = result
            watcher.finished(pending[index].job, result, len(results) - reused, len(pending))

        if tasks:
            runner.run(tasks, finished, lambda i, where: watcher.started(pending[i].job, where))
    failures = [result for result in results.values() if result["error"] is not None]
    return Summary(out, len(planned), len(results) - reused, reused, failures)


def _task(planned: Planned, spec: Spec, run: str, command: str) -> Task:
    job = planned.job
    return {
        "job": asdict(job),
        "key": planned.key,
        "digest": planned.digest,
        "text": None if job.text is None else spec.texts[job.text],
        "folder": None if spec.cache is None else str(spec.cache),
        "run": run,
        "command": command,
        "keep": planned.keep,
        "download": True,
    }


def _result(planned: Planned, run: str, outcome: Outcome, attempts: int) -> JobResult:
    return {
        "kind": "job",
        "version": records.VERSION,
        "key": planned.key,
        "run": run,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "job": asdict(planned.job),
        "node": outcome["node"],
        "attempts": attempts,
        "seconds": round(outcome["seconds"], 3),
        "error": outcome["error"],
        "results": outcome["results"],
    }


def _digest(model: str, folder: Path) -> str | None:
    """sha256 of a model that is here or in the catalogue, else None."""
    from ...models import catalogue
    from ...models.locate import locate

    try:
        return content_digest(locate(model), folder)
    except (StokerError, OSError):
        entry = None if os.path.exists(model) else catalogue.find(model)
        return None if entry is None else entry.sha256


@contextmanager
def _appended(out: Path) -> Iterator[IO[str]]:
    """Opens the file of results to append: locked against other sweeps, a cut-off line removed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("a+", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{out}: {error.strerror}") from None
    with file:
        if not _try_lock(file):
            raise OptionError(f"{out}: another sweep is writing this file")
        records.read(out)  # raises if it is something else, which must stay as it is
        records.mend(out)
        yield file


def _try_lock(file: IO[str]) -> bool:
    if sys.platform == "win32":
        return True  # Windows locks would keep readers out as well
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class InProcess:
    """Runs one job after the other on this machine, each in its own process."""

    def __init__(self, *, retries: int = 2, timeout: float | None = None) -> None:
        """retries: for a job whose process died. timeout: seconds per job."""
        self._retries, self._timeout = retries, timeout

    def run(self, tasks: Sequence[Task], finished: Finished, started: Started) -> None:
        """Carries out the tasks in their order."""
        for index, task in enumerate(tasks):
            started(index, "here")
            attempts, died = 0, True
            while died and attempts <= self._retries:
                outcome, died = self._attempt(task)
                attempts += 1
            finished(index, outcome, attempts)

    def _attempt(self, task: Task) -> tuple[Outcome, bool]:
        """The outcome of a task, and whether its process died."""
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", _MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # we pass on Ctrl-C ourselves
            )
            try:
                answer, _ = process.communicate(json.dumps(task), timeout=self._timeout)
            except subprocess.TimeoutExpired:
                _end(process)
                return failed(f"not done within {self._timeout:g} s"), False
            except BaseException:
                _end(process)
                raise
            if process.returncode == 0:
                with suppress(ValueError):
                    outcome: Outcome = json.loads(answer)
                    return outcome, False
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
        code = process.returncode
        reason = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                reason = signal.Signals(-code).name
        last = f": {said[-1]}" if said else ""
        return failed(f"the job's process ended with {reason}{last}"), True


def _end(process: subprocess.Popen[str]) -> None:
    """Asks a job to end, and kills it if it does not."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    except KeyboardInterrupt:
        process.kill()
        process.communicate()
        raise
