"""One configuration to measure: an engine, a model, its limits and what it is asked to do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...runtime.base.errors import OptionError

Engine = Literal["stoker", "llama-cpp", "onnx"]
ENGINES: tuple[Engine, ...] = ("stoker", "llama-cpp", "onnx")
PROMPTS = (16, 64, 256, 512, 1024, 2048)  # tokens
DECODE_PROMPT = 64  # tokens before those that are decoded
TOKENS = 128
TIME_LIMIT_S = 60.0
BUDGET_SHARE = 0.95  # stoker's budget / cgroup limit; the rest: page tables, page cache
_NOT_IN_KEY = ("python", "repeat", "time_limit_s")


@dataclass(frozen=True)
class Case:
    """What one run does; picklable and hashable. `measure.run_case` carries it out.

    model: path of a GGUF or ONNX file (the first one of a sharded model).
    memory: bytes that the process may take, None for everything in memory. If memory cgroups
        are allowed (Linux, as root) it is the limit of the run's own cgroup, and stoker's budget is
        BUDGET_SHARE of it; elsewhere it is stoker's budget, and other engines cannot be limited.
    threads: 0 for the physical performance cores. context: 0 for as much as the case needs.
    prompts: lengths in tokens, each evaluated at an empty KV cache (and an empty expert cache);
        those that the context cannot hold are left out. tokens: greedy ones after a prompt of
        DECODE_PROMPT.
    text_model: the model whose tokenizer makes the prompt, "" for this one, so that two files of a
        model get the same tokens.
    options: of stoker's Engine (policy, predictor, prefetch, io, readers, precision, kv_type, ...)
        as sorted pairs; see `options_of`.
    time_limit_s: parts that would not end before it are left out and noted; a run that hangs is
        killed.
    python: the interpreter that has the engine, "" for this one. repeat: counted from 0.
    """

    model: str
    engine: Engine = "stoker"
    memory: int | None = None
    threads: int = 0
    context: int = 0
    prompts: tuple[int, ...] = PROMPTS
    tokens: int = TOKENS
    options: tuple[tuple[str, Any], ...] = field(default=())
    text_model: str = ""
    time_limit_s: float = TIME_LIMIT_S
    python: str = ""
    repeat: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise OptionError(f"engine: expected {', '.join(ENGINES)}, found {self.engine!r}")
        if self.memory is not None and self.memory < 1:
            raise OptionError(f"memory: expected at least 1 byte, found {self.memory}")
        for name, low in (("threads", 0), ("context", 0), ("tokens", 1), ("repeat", 0)):
            if getattr(self, name) < low:
                raise OptionError(f"{name}: expected at least {low}, found {getattr(self, name)}")
        if any(n < 1 for n in self.prompts):
            raise OptionError(f"prompts: expected lengths of at least 1, found {min(self.prompts)}")
        if self.time_limit_s <= 0:
            raise OptionError(f"time limit: expected more than 0 s, found {self.time_limit_s:g}")

    @property
    def key(self) -> str:
        """12 hex digits that two cases share if only repeat, time limit and interpreter differ."""
        values = {k: v for k, v in asdict(self).items() if k not in _NOT_IN_KEY}
        for name in ("model", "text_model"):
            values[name] = Path(values[name]).name
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]

    @property
    def needed_context(self) -> int:
        """Tokens of context: `context`, or as many as the longest prompt and decode take."""
        return self.context or max(*self.prompts, DECODE_PROMPT + self.tokens) + 1


def options_of(**options: Any) -> tuple[tuple[str, Any], ...]:
    """Options as `Case.options` holds them; those that are None are left out."""
    return tuple(sorted((k, v) for k, v in options.items() if v is not None))
