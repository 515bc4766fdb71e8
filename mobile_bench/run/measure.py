"""Measures configurations, each run in a process of its own: `measure` a series, `run_case` one."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from ...runtime.base.errors import StokerError
from ..probe.cpu import virtual
from ..probe.energy import EnergyMeter
from ..probe.noise import NoiseWatch
from . import routing_trace
from .case import BUDGET_SHARE, DECODE_PROMPT, Case
from .cgroup_run import MemoryGroup, memory_group
from .model_summary import files_of, summary
from .preparation import drop_page_cache, read_directly, touch_memory
from .prompt_ids import PromptError, prompt_ids
from .records import VERSION, Decode, Flash, Prompt, Run
from .worker_process import WorkerError, WorkerProcess

LOAD_LIMIT_S = 900.0
# A run that has not answered after HANGS times its time limit, at least HANGS_S, is killed.
HANGS, HANGS_S = 4.0, 60.0
FLASH_BYTES, FLASH_SEEDS = 256 << 20, 3
_TOUCHED = 2.0  # memory touched before a run / memory that it will take
_UNITS = (50, 95, 99)


def run_case(case: Case, *, run: str = "", command: str = "", device: str = "") -> Run:
    """Measures one configuration, in its own process (and memory cgroup if allowed).

    run: the id that joins the results of one command; command: its command line; device:
    DeviceProfile.id, determined if "". A run that fails is a Run with `error`. Raises
    ModelFileError if there is no such model, OSError.
    """
    path = Path(case.model)
    model = summary(path)
    if not device:
        from ...offload.plan.device_profile import current_id

        device = current_id()
    limit, budget = limits(case)
    record: Run = {
        "kind": "run",
        "version": VERSION,
        "run": run,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "device": device,
        "model": {k: v for k, v in model.items() if k != "context"},
        "engine": case.engine,
        "engine_version": "",
        "repeat": case.repeat,
        "threads": case.threads or default_threads(),
        "context": min(case.needed_context, model["context"] or case.needed_context),
        "memory": budget,
        "limit": limit,
        "options": dict(case.options),
        "plan": None,
        "load_cold_s": None,
        "load_warm_s": None,
        "prompts": [],
        "decode": None,
        "peak_bytes": 0,
        "group_peak_bytes": None,
        "energy": None,
        "noise": {},
        "tokens_sha256": None,
        "error": None,
        "case": case.key,
        "token_ids": [],
        "flash": None,
        "notes": [],
    }
    if limit is None and case.memory is not None and case.engine == "llama-cpp":
        record["error"] = "llama.cpp keeps no budget, and no memory cgroup is allowed here"
        return record
    measurement = _Measurement(case, path, record, model)
    try:
        measurement.carry_out()
    except (WorkerError, PromptError, StokerError) as error:
        blank: Any = {"prompts": [], "decode": None, "load_cold_s": None, "load_warm_s": None}
        record.update(blank | {"energy": None, "tokens_sha256": None, "token_ids": []})
        record["error"] = str(error)
    return record


def measure(
    cases: Iterable[Case],
    *,
    run: str = "",
    command: str = "",
    device: str = "",
    started: Callable[[Case], None] | None = None,
) -> Iterator[Run]:
    """Measures cases in their order (series.py makes them); yields each as soon as it is done.

    started: called before each case. Raises what `run_case` raises; a failed run is yielded too.
    """
    read: set[str] = set()
    for case in cases:
        if case.model not in read:
            summary(Path(case.model))
            for file in files_of(Path(case.model)):
                read_directly(file)
            read.add(case.model)
        if started is not None:
            started(case)
        yield run_case(case, run=run, command=command, device=device)


def limits(case: Case) -> tuple[int | None, int | None]:
    """(limit of the run's own cgroup, budget) in bytes; None: no limit, everything in memory."""
    if case.memory is None:
        return None, None
    if groups_allowed():
        return case.memory, int(case.memory * BUDGET_SHARE)
    return None, case.memory


@lru_cache(maxsize=1)
def groups_allowed() -> bool:
    """Whether this process may make memory cgroups."""
    try:
        with memory_group(1 << 30):
            return True
    except OSError:
        return False


def default_threads() -> int:
    """The number of physical performance cores."""
    from ...runtime._core import cpu

    return int(cpu()["performance"]) or 1


@contextmanager
def _group(limit: int | None) -> Iterator[MemoryGroup | None]:
    """A cgroup of the limit; without a limit one as large as the machine, which tells the peak."""
    if not groups_allowed():
        yield None
        return
    with memory_group(limit or int(psutil.virtual_memory().total)) as group:
        yield group


class _Measurement:
    """One run, which fills in its record."""

    def __init__(self, case: Case, path: Path, record: Run, model: dict[str, Any]) -> None:
        self.case, self.path, self.record, self.model = case, path, record, model
        context = record["context"]
        # Tokens before the decoded ones; in a small context both parts get about half.
        self.first = min(DECODE_PROMPT, max(1, context - case.tokens, context // 2))
        self.n = min(case.tokens, context - self.first)
        self.prompts = sorted(n for n in set(case.prompts) if n <= context)
        left_out = sorted(set(case.prompts) - set(self.prompts))
        if left_out:
            self._note(f"prompts of {_listed(left_out)} tokens: the context is {context}")
        self.ids: list[int] = []
        self.deadline = 0.0
        self.patience_s = max(HANGS * case.time_limit_s, HANGS_S)

    def carry_out(self) -> None:
        """Carries out the run. Raises WorkerError, PromptError."""
        longest = max([self.first, *self.prompts])
        self.ids = list(prompt_ids(Path(self.case.text_model or self.path), longest))
        needed = self.record["limit"] or self.record["memory"] or int(self.model["nbytes"])
        if not drop_page_cache(files_of(self.path)):
            self._note("the page cache could not be emptied: the cold load may be a warm one")
        if virtual():
            touch_memory(int(needed * _TOUCHED))
        watch = NoiseWatch()
        try:
            with _group(self.record["limit"]) as group:
                try:
                    self._in(group)
                finally:
                    if group is not None:
                        self.record["group_peak_bytes"] = group.peak() or None
            with _group(self.record["limit"]) as group, self._worker(group) as worker:
                loaded = self._ask(worker, "load", timeout_s=LOAD_LIMIT_S)
                self.record["load_warm_s"] = loaded["seconds"]
        finally:
            self.record["noise"] = watch.finish()

    def _worker(self, group: MemoryGroup | None) -> WorkerProcess:
        r = self.record
        return WorkerProcess(
            self.case.engine,
            self.path,
            threads=r["threads"],
            context=r["context"],
            options=self._options(),
            python=self.case.python,
            group=group,
        )

    def _options(self) -> dict[str, Any]:
        options = dict(self.case.options)
        budget = self.record["memory"]
        if budget is None:
            return options
        if self.case.engine == "llama-cpp":
            # llama.cpp uses its memory map: repacked weights could not be dropped (worker.py).
            return {"use_mmap": True, "repack": False, **options}
        return {**options, "memory": budget}

    def _in(self, group: MemoryGroup | None) -> None:
        r = self.record
        with self._worker(group) as worker:
            loaded = self._ask(worker, "load", timeout_s=LOAD_LIMIT_S)
            r["load_cold_s"], r["plan"] = loaded["seconds"], loaded["plan"]
            r["engine_version"] = loaded["version"]
            self.deadline = time.monotonic() + self.case.time_limit_s
            records = self.case.engine == "stoker" and r["memory"] is not None
            if records:
                records = self._ask(worker, "record")["recording"]
            times = {self.first: self._prompt(worker, self.first)}
            decoded = self._decode(worker)
            if records:
                self._trace(worker, loaded["config"], len(decoded["token_s"]))
            for n in self.prompts:
                if n not in times and not self._timed(worker, n, times):
                    break
            r["prompts"] = [
                Prompt(tokens=n, ttft_s=times[n], tok_s=n / times[n])
                for n in self.prompts
                if n in times
            ]
            with self._noted("memory"):
                r["peak_bytes"] = self._ask(worker, "memory")["peak_bytes"]
            if group is not None:
                r["group_peak_bytes"] = group.peak() or None
            if records and r["flash"] is not None:
                with self._noted("flash bandwidth"):
                    flash = self._ask(worker, "flash", nbytes=FLASH_BYTES, seeds=FLASH_SEEDS)
                    r["flash"]["bytes_s"] = flash["bytes_s"]

    def _prompt(self, worker: WorkerProcess, n: int) -> float:
        found = self._ask(worker, "prompt", tokens=self.ids[:n], cold=True)
        if not self.record["token_ids"]:
            self.record["token_ids"] = [found["token"]]
        return float(found["seconds"])

    def _timed(self, worker: WorkerProcess, n: int, times: dict[int, float]) -> bool:
        """Adds a prompt's time to `times` unless it would take too long or kills the worker."""
        rest = [k for k in self.prompts if k >= n and k not in times]
        if expected_s(n, times) > self._left():
            limit = f"the time limit of {self.case.time_limit_s:g} s"
            self._note(f"prompts of {_listed(rest)} tokens: {limit}")
            return False
        try:
            times[n] = self._prompt(worker, n)
        except WorkerError as error:
            self._note(f"prompts of {_listed(rest)} tokens: {error}")
            return False
        return True

    def _left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def _decode(self, worker: WorkerProcess) -> dict[str, Any]:
        left = self._left()
        energy = EnergyMeter()
        found = self._ask(worker, "decode", n=self.n, limit_s=left)
        times = found["token_s"]
        self.record["energy"] = energy.reading(len(times))
        if len(times) < self.n:
            limit = f"the time limit of {self.case.time_limit_s:g} s"
            self._note(f"decode: {len(times)} of {self.n} tokens: {limit}")
        ids = self.record["token_ids"] = self.record["token_ids"] + found["tokens"]
        self.record["tokens_sha256"] = hashlib.sha256(repr(ids).encode()).hexdigest()
        self.record["decode"] = decode_of(times, found["counters"])
        return found

    def _trace(self, worker: WorkerProcess, config: dict[str, Any], n: int) -> None:
        """Records hits by layer and what an optimal cache would have read; n: tokens decoded."""
        r = self.record
        with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
            file = Path(folder) / "routing.npz"
            self._ask(worker, "routing", path=str(file))
            routing = routing_trace.load(file)
        if not len(routing["evaluation"]):  # all experts fit, so none was requested
            return
        assert r["decode"] is not None and r["plan"] is not None
        r["decode"]["layer_hits"] = routing_trace.layer_hits(routing, config["n_layer"], n)
        slots = r["plan"]["slots"]
        misses = routing_trace.belady_misses(routing, config, slots, n)
        unit = r["plan"]["slot_bytes"] / slots
        r["flash"] = Flash(bytes_s=0.0, belady_misses=misses, belady_bytes=misses * unit)

    @contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        """Notes the death of a worker that has already done what matters."""
        try:
            yield
        except WorkerError as error:
            self._note(f"{what}: {error}")

    def _ask(
        self, worker: WorkerProcess, do: str, *, timeout_s: float | None = None, **arguments: Any
    ) -> dict[str, Any]:
        return worker.ask(do, timeout_s=timeout_s or self.patience_s, **arguments)

    def _note(self, text: str) -> None:
        self.record["notes"].append(text)


def expected_s(n: int, times: dict[int, float]) -> float:
    """Seconds that a prompt of n tokens will take, extrapolated from shorter ones.

    times: tokens -> seconds. A straight line through the two longest; with only one, the same time
    per token.
    """
    known = sorted(k for k in times if k <= n)
    if not known:
        return min(times.values())
    last = known[-1]
    if len(known) < 2:
        return times[last] * n / last
    before = known[-2]
    slope = max(0.0, (times[last] - times[before]) / (last - before))
    return times[last] + slope * (n - last)


def decode_of(token_s: list[float], counters: dict[str, Any] | None) -> Decode:
    """A Decode record. token_s: seconds of each token; counters: increase of the read counters."""
    n, seconds = len(token_s), sum(token_s)
    ordered = sorted(token_s)
    found: Decode = {
        "tokens": n,
        "seconds": seconds,
        "tok_s": n / seconds,
        "token_ms": {f"p{q}": 1e3 * ordered[min(n - 1, n * q // 100)] for q in _UNITS},
        "token_s": [round(s, 7) for s in token_s],
        "bytes_token": None,
        "hit_rate": None,
        "layer_hits": None,
        "stall_s": None,
        "compute_s": None,
    }
    if counters is not None:
        uses = sum(counters.get(f"decode_{kind}", 0) for kind in ("hits", "late", "misses"))
        stall = counters["decode_stall_s"] / n
        found["bytes_token"] = counters["decode_bytes"] / n
        found["hit_rate"] = counters["decode_hits"] / uses if uses else None
        found["stall_s"], found["compute_s"] = stall, max(0.0, seconds / n - stall)
    return found


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
