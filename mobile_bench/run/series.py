"""A series: every engine under every budget and number of threads, repeated and interleaved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...offload.plan.planned import resident_bytes
from ...runtime.base.errors import OptionError
from ...runtime.base.memory import available_memory, budget, check_memory, process_bytes
from .case import DECODE_PROMPT, ENGINES, PROMPTS, TIME_LIMIT_S, TOKENS, Case, Engine
from .measure import default_threads
from .model_summary import summary
from .records import Run

RESIDENT = "resident"
SLOW_TOKENS = 4
SLOW_TIME_LIMIT_S = 25.0
_PROCESS = 128 << 20  # least bytes that an engine takes beside the weights


@dataclass(frozen=True)
class Baseline:
    """An engine to compare with. model: its file of the same model, "" for the same file; python:
    the interpreter that has the engine, "" for this one."""

    engine: Engine
    model: str = ""
    python: str = ""


@dataclass(frozen=True)
class Series:
    """Configurations that one `stoker bench` measures.

    memory: for each, a size ("500MB"), a share of what the machine can give ("60%"), "auto"
        (resident if it fits, else what the machine can give) or "resident". threads: for each,
        0 for the physical performance cores. tokens, prompts, context, options, time_limit_s: as in
        Case.
    slow_tokens, slow_time_limit_s: for engines with a limit smaller than the model and no expert
        cache, which read most of the file for every token. The first repeat has twice the time, so
        that longer prompts are measured at least once.
    """

    model: Path
    memory: tuple[str, ...] = ("auto",)
    threads: tuple[int, ...] = (0,)
    baselines: tuple[Baseline, ...] = ()
    repeats: int = 3
    prompts: tuple[int, ...] = PROMPTS
    tokens: int = TOKENS
    context: int = 0
    options: tuple[tuple[str, Any], ...] = field(default=())
    time_limit_s: float = TIME_LIMIT_S
    slow_tokens: int = SLOW_TOKENS
    slow_time_limit_s: float = SLOW_TIME_LIMIT_S

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise OptionError(f"repeats: expected at least 1, found {self.repeats}")
        for value in self.memory:
            if value != RESIDENT:
                check_memory(value)


def cases(series: Series) -> list[Case]:
    """All runs in the order in which they are best measured.

    A repeat has all configurations, the engines of each side by side; every second repeat is in
    reverse order, so that a drift of the machine's speed favours nobody. Raises ModelFileError,
    OptionError.
    """
    model = summary(series.model)
    once: dict[str, Case] = {}  # by key, as two budgets may mean the same
    for memory in series.memory:
        for threads in series.threads:
            for engine in (_own(series), *series.baselines):
                case = _case(series, model, memory, threads, engine)
                once.setdefault(case.key, case)
    found: list[Case] = []
    for repeat in range(series.repeats):
        order = list(once.values())
        if repeat % 2:
            order.reverse()
        found += [_repeated(case, repeat) for case in order]
    return found


def _repeated(case: Case, repeat: int) -> Case:
    longer = 2 if repeat == 0 and _slow(case) else 1
    return dataclasses.replace(case, repeat=repeat, time_limit_s=longer * case.time_limit_s)


def missing(wanted: Iterable[Case], runs: Iterable[Run]) -> list[Case]:
    """Cases that no run has measured. A failed run counts as measured: it would fail again."""
    have = {(run.get("case"), run["repeat"]) for run in runs}
    return [case for case in wanted if (case.key, case.repeat) not in have]


def _own(series: Series) -> Baseline:
    onnx = series.model.suffix.lower() in (".onnx", ".ort")
    return Baseline("onnx" if onnx else "stoker")


def _case(
    series: Series, model: dict[str, Any], memory: str, threads: int, engine: Baseline
) -> Case:
    limit = _bytes(series, memory)
    path = str(engine.model or series.model)
    context = series.context or _context(series, model["context"])
    case = Case(
        model=path,
        engine=engine.engine,
        memory=limit,
        threads=threads or default_threads(),
        context=context,
        prompts=series.prompts,
        tokens=series.tokens,
        options=series.options if engine.engine == "stoker" else (),
        text_model=str(series.model) if engine.model else "",
        time_limit_s=series.time_limit_s,
        python=engine.python,
    )
    if not _slow(case):
        return case
    tokens, time_limit_s = min(series.tokens, series.slow_tokens), series.slow_time_limit_s
    return dataclasses.replace(case, tokens=tokens, time_limit_s=time_limit_s)


def _slow(case: Case) -> bool:
    """Whether the engine reads the file again and again because its limit is too small for it."""
    if case.engine != "llama-cpp" or case.memory is None:
        return False
    nbytes: int = summary(Path(case.model))["nbytes"]
    return case.memory < nbytes + _PROCESS


def _context(series: Series, trained: int) -> int:
    """Context in tokens, the same for all engines, however many tokens each decodes."""
    needed = max(*series.prompts, DECODE_PROMPT + series.tokens) + 1
    return min(needed, trained) if trained else needed


def _bytes(series: Series, memory: str) -> int | None:
    if memory == RESIDENT:
        return None
    if memory == "auto" and series.model.suffix.lower() == ".gguf":
        from ...runtime._core import GgufFile

        available = available_memory()
        needed = resident_bytes(
            GgufFile(str(series.model)), process_bytes(), context=series.context or 0
        )
        return None if available is None or needed <= available else available
    if memory == "auto":
        return None
    return budget(memory)


def parse_baselines(text: str, model: Path, python: str) -> Iterator[Baseline]:
    """ "llama-cpp,onnx=FILE.onnx" -> baselines. python: one with llama-cpp-python, "" for this one.

    Raises OptionError.
    """
    own = _own(Series(model)).engine
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, file = part.partition("=")
        if name not in ENGINES:
            raise OptionError(f"against: expected {', '.join(ENGINES)}, found {name!r}")
        if name == own:
            raise OptionError(f"against: {model.name} runs on {own} already")
        native = ".onnx" if name == "onnx" else ".gguf"
        if not file and model.suffix.lower() != native:
            beside = model.with_suffix(native)
            if not beside.is_file():
                raise OptionError(
                    f"against {name}: expected {name}=FILE{native}, another form of {model.name}"
                )
            file = str(beside)
        if file and not Path(file).is_file():
            raise OptionError(f"against {name}: {file}: no such file")
        yield Baseline(name, file, python if name == "llama-cpp" else "")
