"""A stand-in for stoker.runtime._core with a byte-level model that recites a given text.

After the last <|answer|> token the model says `Engine.story`, a byte a token, then ends; so what
it says depends on every token before it, and characters of several bytes are split. It is for
tests that decide what a model says; what real models compute is tested elsewhere.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from stoker.runtime.base.errors import Cancelled, ContextLengthError, OptionError

USER, ANSWER, END = 256, 257, 258
N_VOCAB = 259
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|answer|>' if m.role == 'assistant' else '<|user|>' }}{{ m.content }}"
    "{{ '<|end|>' if m.role == 'assistant' else '' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|answer|>' }}{% endif %}"
)


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    names = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [names[b] for b in range(256)]


METADATA: dict[str, Any] = {
    "general.architecture": "recital",
    "general.name": "the reciting model",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*byte_symbols(), "<|user|>", "<|answer|>", "<|end|>"],
    "tokenizer.ggml.token_type": [1] * 256 + [3] * 3,
    "tokenizer.ggml.merges": [],
    "tokenizer.ggml.eos_token_id": END,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE,
}


class GgufFile:
    def __init__(self, path: str) -> None:
        self.path = path
        self.metadata = dict(METADATA)
        self.nbytes = 1 << 20
        self.tensors: list[Any] = []
        self.unknown_metadata: list[str] = []

    def get(self, key: str) -> Any:
        return self.metadata.get(key)


def plan(
    file: GgufFile,
    *,
    threads: int = 0,
    context: int = 0,
    kv_type: str = "f16",
    precision: str = "balanced",
    **offloading: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {"architecture": "recital", "n_vocab": N_VOCAB, "n_embd": 2}
    found = {
        "threads": threads or 1,
        "isa": "scalar",
        "context": context or 4096,
        "chunk": 64,
        "kv_type": kv_type,
        "precision": precision,
        "kv_bytes": 1 << 16,
        "scratch_bytes": 1 << 16,
        "weight_bytes": 1 << 20,
        "kinds": {"other": 1 << 20},
        "token_bytes": 1 << 20,
    }
    return config, found


class Engine:
    story = b"the story"
    delay = 0.0  # seconds per evaluation
    # (text, n): the answer to a question with that text stops after n bytes and never ends.
    stuck: tuple[str, int] | None = None
    offload: dict[str, Any] | None = None  # None: all experts are in memory
    stream: dict[str, Any] | None = None
    survives_fork = True
    budgets: list[dict[str, Any]] = []  # noqa: RUF012 (further arguments of each load)

    def __init__(
        self,
        file: GgufFile,
        *,
        threads: int = 0,
        context: int = 0,
        kv_type: str = "f16",
        precision: str = "balanced",
        **offloading: Any,
    ) -> None:
        self.evaluating = threading.Event()  # set when an evaluation begins
        self.go_on = threading.Event()  # evaluations end only while it is set
        self.go_on.set()
        self.budgets.append(offloading)
        self.context = context or 4096
        self.config, self.plan = plan(
            file, threads=threads, context=context, kv_type=kv_type, precision=precision
        )

    def sequence(self) -> EngineSequence:
        return EngineSequence(self)


class EngineSequence:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.context = engine.context
        self.tokens: list[int] = []
        self.evaluated: list[int] = []  # of each call: how many tokens
        self.decoded = 0  # tokens
        self._has_logits = False
        self._cancelled = threading.Event()

    @property
    def position(self) -> int:
        return len(self.tokens)

    @property
    def stats(self) -> dict[str, Any]:
        return {
            "decode_tokens": self.decoded,
            "decode_bytes": 1000 * self.decoded,
            "experts": None,
            "stream": None,
        }

    def decode(self, token: int, sampler: Sampler) -> int:
        self.eval([token], "decode")
        return self.sample(sampler)

    def eval(self, tokens: Sequence[int], phase: str = "prompt") -> None:
        if not len(tokens):
            raise OptionError("expected at least 1 token, found none")
        if len(self.tokens) + len(tokens) > self.context:
            raise ContextLengthError("the core's own check")
        self._has_logits = False
        until = math.inf if self._stuck(tokens) else time.monotonic() + self.engine.delay
        self.engine.evaluating.set()
        while True:  # like the core, look for a cancellation before and during the work
            if self._cancelled.is_set():
                self._cancelled.clear()
                raise Cancelled("the session was cancelled")
            if time.monotonic() >= until and self.engine.go_on.is_set():
                break
            time.sleep(0.001)
        self.tokens += tokens
        self.evaluated.append(len(tokens))
        self.decoded += len(tokens) if phase == "decode" else 0
        self._has_logits = True

    def logits(self) -> npt.NDArray[np.float32]:
        if not self._has_logits:
            raise OptionError("no logits: evaluate at least one token first")
        out = np.zeros(N_VOCAB, np.float32)
        out[self._next()] = 10
        return out

    def _next(self) -> int:
        if ANSWER not in self.tokens:
            return END
        said = self.tokens[::-1].index(ANSWER)
        return self.engine.story[said] if said < len(self.engine.story) else END

    def _stuck(self, tokens: Sequence[int]) -> bool:
        if self.engine.stuck is None or len(tokens) > 1 or ANSWER not in self.tokens:
            return False
        text, n = self.engine.stuck
        said = self.tokens[::-1].index(ANSWER)
        question = self.tokens[: len(self.tokens) - said - 1]
        if USER in question:
            question = question[len(question) - question[::-1].index(USER) :]
        return said >= n and text in bytes(t for t in question if t < 256).decode()

    def sample(self, sampler: Sampler) -> int:
        return sampler.sample(self.logits())

    def truncate(self, position: int) -> None:
        if not 0 <= position <= len(self.tokens):
            raise OptionError("truncate: out of range")
        if position < len(self.tokens):
            self._has_logits = False
        del self.tokens[position:]

    def cancel(self) -> None:
        self._cancelled.set()

    def forget_cancel(self) -> None:
        self._cancelled.clear()

    def eval_all(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        rows = []
        for token in tokens:
            self.eval([token])
            rows.append(self.logits())
        return np.stack(rows)

    def eval_hidden(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        self.eval(tokens)
        return np.array([[token, 1] for token in tokens], np.float32)

    def eval_nll(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """Returns t / 100 nats for token t, wherever it stands."""
        self.eval(list(tokens))
        return np.asarray(tokens[1:], np.float64) / 100


class Sampler:
    """Takes the argmax after the bias; keeps its arguments for the test."""

    made: list[Sampler] = []  # noqa: RUF012 (a log shared on purpose)

    def __init__(self, n_vocab: int, **options: Any) -> None:
        self.options = options
        self.accepted: list[int] = []
        self.logprob = float("nan")
        self.top_logprobs: list[tuple[int, float]] = []
        self.made.append(self)

    @property
    def history(self) -> int:
        penalties = (("repetition", 1.0), ("frequency", 0.0), ("presence", 0.0))
        on = any(self.options[f"{name}_penalty"] != off for name, off in penalties)
        return int(self.options["penalty_window"]) if on else 0

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        plain = logits - np.log(np.exp(logits).sum())
        biased = logits.copy()
        for token, bias in (self.options["logit_bias"] or {}).items():
            biased[token] += bias
        token = int(biased.argmax())
        self.logprob = float(plain[token])
        best = np.argsort(-plain, kind="stable")[: self.options["logprobs"]]
        self.top_logprobs = [(int(t), float(plain[t])) for t in best]
        return token

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def policies() -> list[tuple[str, str]]:
    return [("lru", "the oldest"), ("lfu", "the rarest")]


def predictors() -> list[tuple[str, str]]:
    return [("none", "nothing"), ("next_gate", "the next router")]


def io_backends() -> list[tuple[str, str]]:
    return [("pread_pool", "readers"), ("null", "none")]


def control_groups(controller: str, **files: str) -> list[tuple[int, str, str]]:
    return []


def read_bandwidth(threads: int, nbytes: int) -> float:
    return 1e10 * threads


def isas() -> list[tuple[str, bool]]:
    return [("scalar", True), ("fast", False)]


def active_isa() -> str:
    return "scalar"


def cpu() -> dict[str, Any]:
    return {"model": "Test", "logical": 4, "physical": 2, "performance": 2, "features": []}


def install() -> None:
    """Makes this module the core of stoker in this process."""
    sys.modules["stoker.runtime._core"] = sys.modules[__name__]
