"""One job of a sweep: its description, its key, and its execution wherever it was sent.

    python -m stoker.mobile_bench.sweep.jobs < TASK

carries out one task (JSON) and writes its outcome (JSON) to standard output.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ...runtime.base.errors import ModelFileError, OptionError, StokerError
from ...runtime.base.memory import AUTO

if TYPE_CHECKING:
    from ...offload.plan.device_profile import DeviceProfile
    from ..run.records import Perplexity, Run, Width

Kind = Literal["measure", "perplexity", "bitwidth"]
KINDS: tuple[Kind, ...] = ("measure", "perplexity", "bitwidth")
RESIDENT = "resident"  # as a budget: everything in memory

_KEY_VERSION = 1  # version of a key's content


@dataclass(frozen=True)
class Job:
    """One measurement, perplexity or width search, with everything that decides its result.

    model: a path, a name of the catalogue, or hf:owner/name/file.gguf. type: the file type that it
    is quantized to first, None: as it is. memory: a budget as `--memory` takes it, or "resident".
    threads: None for the machine's default. device: the one that must run it, None: any. text:
    sha256 of the text that it needs. settings: those of its kind; see spec.py.
    """

    kind: Kind
    model: str
    type: str | None = None
    memory: str = RESIDENT
    threads: int | None = None
    repeat: int = 0
    device: str | None = None
    text: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def key(self, digest: str | None) -> str:
        """16 hex digits, the same wherever and whenever they are computed.

        digest: content_digest of the model, which then counts in place of its name; None if the
        model is not here.
        """
        from ... import __version__

        values = asdict(self)
        if digest is not None:
            values["model"] = digest
        text = json.dumps([_KEY_VERSION, __version__, values], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def alone(self) -> bool:
        """True if nothing else may run on the machine, because times are measured."""
        return self.kind == "measure"

    def label(self) -> str:
        """A one-line description of the job for people."""
        words = [self.kind, Path(self.model).name]
        if self.type is not None:
            words.append(self.type)
        if self.kind == "bitwidth":
            words.append(f"{self.settings['bits']:g} bits")
        engine = self.settings.get("engine", "stoker")
        words += [engine] if engine != "stoker" else []
        usual = RESIDENT if self.alone else AUTO
        words += [self.memory] if self.memory != usual else []
        words += [_threads(self.threads)] if self.threads is not None else []
        words += [f"on {self.device}"] if self.device is not None else []
        words += [f"#{self.repeat + 1}"] if self.alone else []
        return " ".join(words)


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"


class Task(TypedDict):
    """A job as it is sent to where it runs; JSON."""

    job: dict[str, Any]
    key: str
    digest: str | None  # of the model's content, if the sender knows it
    text: str | None  # the text itself
    folder: str | None  # of quantized models; None: cache.default_folder()
    run: str  # id that joins the records of one command
    command: str
    keep: bool  # keep the file that a width search makes
    download: bool  # fetch a named model that is not there


class Outcome(TypedDict):
    """Result of a task; JSON."""

    error: str | None
    results: list[Run | Perplexity | Width]
    profile: DeviceProfile | None
    node: str  # the host's name
    seconds: float


def failed(message: str, *, node: str = "", seconds: float = 0.0) -> Outcome:
    """The outcome of a task that failed."""
    text = " ".join(message.split())
    return {"error": text, "results": [], "profile": None, "node": node, "seconds": seconds}


def perform(task: Task) -> Outcome:
    """Carries out a task here. Any failure becomes the outcome's `error`."""
    from . import cache as sweep_cache

    start = time.perf_counter()
    host = socket.gethostname()
    profile: DeviceProfile | None = None
    results: list[Any] = []
    error: str | None = None
    try:
        job = Job(**task["job"])
        folder = Path(task["folder"]) if task["folder"] else sweep_cache.default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        model, name = _model(job, task, folder)
        profile = _profile(job, task["run"])
        device = "" if profile is None else profile["id"]
        if job.kind == "measure":
            results = [_measure(job, task, model, device)]
        elif job.kind == "perplexity":
            results = [_perplexity(job, task, model, device)]
        else:
            results = [_search_widths(job, task, model, device, folder)]
        for result in results:
            result["model"]["name"] = name
        error = next((r["error"] for r in results if r.get("error")), None)
    except (StokerError, OSError, MemoryError) as problem:
        error = str(problem) or type(problem).__name__
    except Exception as problem:  # a bug of ours must not end the sweep either
        error = f"internal error: {type(problem).__name__}: {problem}"
    return {
        "error": None if error is None else " ".join(error.split()),
        "results": results,
        "profile": profile,
        "node": host,
        "seconds": time.perf_counter() - start,
    }


def _model(job: Job, task: Task, folder: Path) -> tuple[Path, str]:
    """The job's model file on this machine, in the job's type; and its name."""
    from ...models.locate import locate
    from .cache import content_digest, quantized

    try:
        path = locate(job.model, download=task["download"])
    except ModelFileError as error:
        raise ModelFileError(
            f"{error} on {socket.gethostname()} (a job's model is a path that exists where the job "
            "runs, or a name of the catalogue)"
        ) from None
    digest = task["digest"]
    if digest is not None or job.type is not None:
        found = content_digest(path, folder)
        if digest is not None and found != digest:
            raise ModelFileError(
                f"{path} on {socket.gethostname()}: expected the file of that name where the sweep "
                f"was started, sha256 {digest[:12]}..., found {found[:12]}..."
            )
        if job.type is not None:
            made = quantized(path, found, job.type, folder, job.threads)
            return made, f"{path.stem}-{job.type}{path.suffix}"
    return path.absolute(), path.name


def _text(task: Task) -> str:
    text = task["text"]
    if text is None:
        raise OptionError("the job came without its text")
    return text


def _measure(job: Job, task: Task, model: Path, device: str) -> Run:
    from ..run.case import Case, options_of
    from ..run.measure import run_case
    from .cache import measuring

    s = job.settings
    case = Case(
        model=str(model),
        engine=s["engine"],
        memory=_budget(job.memory, model, s["context"]),
        threads=job.threads or 0,
        context=s["context"],
        prompts=tuple(s["prompts"]),
        tokens=s["tokens"],
        options=options_of(**s["options"]),
        time_limit_s=s["time_limit"],
        python=s["python"],
        repeat=job.repeat,
    )
    with measuring():
        return run_case(case, run=task["run"], command=task["command"], device=device)


def _perplexity(job: Job, task: Task, model: Path, device: str) -> Perplexity:
    from ...runtime.load import load

    s = job.settings
    memory = AUTO if job.memory == RESIDENT else job.memory
    loaded = load(model, threads=job.threads, context=s["context"], memory=memory, **s["options"])
    found = loaded.perplexity(
        _text(task), context=s["context"], stride=s["stride"], max_chunks=s["chunks"]
    )
    return {
        "kind": "perplexity",
        "device": device,
        "model": _about(model),
        "text": job.text or "",
        "context": s["context"],
        "stride": s["stride"],
        "ppl": found.ppl,
        "nll": found.nll,
        "tokens": found.tokens,
        "standard_error": found.error,
    }


def _search_widths(job: Job, task: Task, model: Path, device: str, folder: Path) -> Width:
    from ...export.bitwidth import Search, adapt
    from .cache import held

    s = job.settings
    # A search that was killed resumes from the files beside the one that it makes.
    out = folder / f"{model.stem}-{s['bits']:g}bits-{task['key']}.gguf"
    memory = None if job.memory in (AUTO, RESIDENT) else job.memory
    with held(out):
        found = adapt(
            model,
            out,
            _text(task),
            bits=s["bits"],
            types=s["types"],
            curve=s["curve"],
            search=Search(s["tokens"], s["window"], s["steps"], s["seed"], memory),
            threads=job.threads,
            force=True,
        )
        if not task["keep"]:
            out.unlink()
    assert found.made is not None
    return {
        "kind": "width",
        "device": device,
        "model": _about(model),
        "text": job.text or "",
        "bits": s["bits"],
        "source": asdict(found.source),
        "made": asdict(found.made),
        "points": [asdict(p) for p in found.points],
        "types": [
            {"part": part, "type": type, "matrices": n}
            for (part, type), n in sorted(found.types.items())
        ],
        "path": str(out) if task["keep"] else None,
    }


def _about(model: Path) -> dict[str, Any]:
    """Name, size and architecture of a model, as in runs."""
    from ...runtime._core import GgufFile

    file = GgufFile(str(model))
    architecture = file.get("general.architecture")
    return {"name": model.name, "nbytes": file.nbytes, "architecture": architecture}


def _budget(memory: str, model: Path, context: int) -> int | None:
    """Bytes of a budget on this machine, None for everything in memory."""
    from ...offload.plan.planned import resident_bytes
    from ...runtime._core import GgufFile
    from ...runtime.base.memory import available_memory, budget, check_memory, process_bytes

    if memory == RESIDENT:
        return None
    if check_memory(memory) is None:
        limit = available_memory()
        if (
            limit is None
            or resident_bytes(GgufFile(str(model)), process_bytes(), context=context or 0) <= limit
        ):
            return None
    return budget(memory)


def _profile(job: Job, run: str) -> DeviceProfile | None:
    """This machine's profile: the one that `stoker probe` has saved, or, for timed jobs, a quick
    one, probed once per sweep. None if there is none and other jobs may be running.
    """
    from ...offload.plan import device_profile
    from ..probe.this_device import this_device
    from .cache import measuring

    if device_profile.default_path().is_file():
        return device_profile.load(device_profile.default_path())
    if not job.alone:
        return None
    found = Path(tempfile.gettempdir()) / f"stoker-sweep-{run}.json"
    with measuring():
        if not found.exists():
            device_profile.save(this_device(), found)
    return device_profile.load(found)


def _end_with_parent() -> None:
    """Makes the death of the sweep interrupt its job, as Ctrl-C would (Linux)."""
    if sys.platform != "linux":
        return
    import ctypes

    parent = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGINT))
    if os.getppid() != parent:  # the sweep died meanwhile
        os.kill(os.getpid(), signal.SIGINT)


def main() -> None:
    """Carries out the task on standard input."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have disabled it
    _end_with_parent()
    # Prints of libraries must not get into the JSON.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    task: Task = json.load(sys.stdin)
    json.dump(perform(task), out)
    out.close()


if __name__ == "__main__":
    main()
