"""Evaluations that several threads ask for at once, in common forward passes.

There is no thread of its own: of the threads that wait, one leads. It takes what all of them want,
evaluates it, and hands leadership on when its own part is done; alone, it is as if there were no
scheduler. A step is one forward pass of all decode rows, then one of waiting prompts; while
something decodes, the prompts' part is as long as keeps the gap between two tokens below
`MOST_SLOWDOWN` times that of decoding alone, by what the passes before have taken.

What comes out does not depend on who meets whom: rows have the bits that they have alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._core import Sampler
    from .backends.engine import Engine, EngineSequence

MOST_SLOWDOWN = 2.2
LEAST_PROMPT = 4  # rows of a prompt in a step, however slow they are
MOST_ROWS = 256  # sequences that decode in one forward pass
# How long a leader waits for those that decoded in one of the last steps and may ask again.
_GRACE_SHARE, _MOST_GRACE_S = 0.1, 0.002
_RECENT = 3  # steps
_DECAY = 0.9  # of what passes took, for each later one


class PromptTime:
    """Seconds of a prompt's forward pass by its rows: a line through the last passes."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """Learns from a pass."""
        for name, value in zip(
            ("_n", "_x", "_y", "_xx", "_xy"),
            (1, rows, seconds, rows * rows, rows * seconds),
            strict=True,
        ):
            setattr(self, name, _DECAY * getattr(self, name) + value)

    def rows(self, seconds: float) -> int:
        """How many rows take that long, LEAST_PROMPT at least."""
        if self._n == 0:
            return 2 * LEAST_PROMPT
        spread = self._n * self._xx - self._x * self._x
        if spread > 1e-6 * self._n * self._xx:
            slope = max(0.0, (self._n * self._xy - self._x * self._y) / spread)
        else:
            slope = 0.0  # all were of one length
        fixed = (self._y - slope * self._x) / self._n
        if slope <= 0 or fixed < 0:  # nothing is known of other lengths: in proportion
            slope, fixed = self._y / self._x, 0.0
        return max(LEAST_PROMPT, int((seconds - fixed) / slope))


@dataclass(eq=False)
class Request:
    """What one thread waits for: tokens of a sequence evaluated, or a token chosen.

    sampler: of a decode step, whose one token was chosen before; None: a prompt's tokens.
    """

    sequence: EngineSequence
    tokens: Sequence[int]
    sampler: Sampler | None = None
    chosen: int | None = None
    error: BaseException | None = None
    done: bool = False
    leads: bool = False  # its thread is to lead now
    wake: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.wake.acquire()
        self._start = self.sequence.position

    @property
    def left(self) -> Sequence[int]:
        """The prompt's tokens that are not evaluated yet."""
        return self.tokens[self.sequence.position - self._start :]


class Scheduler:
    """The scheduler of one engine. Any thread may call it."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Any = engine
        self._together = hasattr(engine, "decode")  # other backends take one sequence at a time
        # Rows of a forward pass at most: one chunk, which is evaluated whole or not at all.
        self._chunk = int(self._engine.plan["chunk"]) if self._together else 1
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._waiting: list[Request] = []
        self._led = False
        self._passing: list[Request] = []  # in the forward pass that goes on
        self._decoded: dict[int, int] = {}  # id of a sequence -> the step in which it decoded last
        self._steps = 0
        self._decode_s: dict[int, float] = {}  # by rows
        self._prompt_time = PromptTime()
        self.passes = 0  # forward passes so far, and
        self.rows = 0  # rows of decode passes
        self.shared = 0  # decode passes of several sequences

    def decode(self, sequence: EngineSequence, token: int, sampler: Sampler) -> int:
        """Evaluates a token that was chosen before; returns the next. Raises BudgetError, ..."""
        alone = False
        try:
            with self._lock:
                alone = not self._led
                self._led = True
            if alone:
                # A thread that comes meanwhile waits for this pass, and leads the next.
                self.passes += 1
                self.rows += 1
                self._decoded[id(sequence)] = self._steps
                return sequence.decode(token, sampler)
        finally:
            if alone:
                with self._lock:
                    self._hand_on()
        request = self._run(Request(sequence, (token,), sampler))
        if request.chosen is None:
            return sequence.sample(sampler)
        return request.chosen

    def prompt(self, sequence: EngineSequence, tokens: Sequence[int]) -> None:
        """Appends tokens. What an error or an interrupt leaves is whole: `position` tells."""
        self._run(Request(sequence, tokens))

    def _run(self, request: Request) -> Request:
        try:
            with self._lock:
                self._waiting.append(request)
                request.leads = not self._led
                self._led = True
                if not request.leads:
                    self._condition.notify()
            if not request.leads:
                request.wake.acquire()
            while request.leads and not request.done:
                self._step()
        finally:
            self._leave(request)
        if request.error is not None:
            error, request.error = request.error, None
            try:
                raise error
            finally:
                del error  # whose traceback refers to this frame
        return request

    def _leave(self, request: Request) -> None:
        """A thread goes, its request done or interrupted, and leadership with it to another."""
        with self._lock:
            if request in self._waiting:
                self._waiting.remove(request)
            if request.leads:
                request.leads = False
                self._hand_on()
            elif not request.done:  # interrupted: no forward pass may have its sequence
                self._condition.wait_for(lambda: request not in self._passing)

    def _hand_on(self) -> None:
        """Makes the thread that has waited longest lead. The caller holds the lock."""
        if self._waiting:
            self._waiting[0].leads = True
            self._waiting[0].wake.release()
        else:
            self._led = False

    def _gather(self) -> tuple[list[Request], list[Request]]:
        """Decode steps and prompts of the next step; waits briefly for those that may come."""
        self._steps += 1
        oldest = self._steps - _RECENT
        self._decoded = {key: step for key, step in self._decoded.items() if step >= oldest}
        with self._lock:
            if len(self._decoded) > 1:
                slowest = max(self._decode_s.values(), default=0.0)
                until = time.perf_counter() + min(_MOST_GRACE_S, _GRACE_SHARE * slowest)
                while not self._decoded.keys() <= {id(r.sequence) for r in self._waiting}:
                    left = until - time.perf_counter()
                    if left <= 0 or not self._condition.wait(left):
                        break
            decodes = [r for r in self._waiting if r.sampler is not None]
            prompts = [r for r in self._waiting if r.sampler is None]
        del decodes[min(MOST_ROWS, self._chunk) :]
        for request in decodes:
            self._decoded[id(request.sequence)] = self._steps
        return decodes, prompts

    def _step(self) -> None:
        decodes, prompts = self._gather()
        if decodes:
            begin = time.perf_counter()
            self._pass(decodes, self._decode)
            seconds = time.perf_counter() - begin
            n = len(decodes)
            last = self._decode_s.get(n, seconds)
            self._decode_s[n] = last + (seconds - last) / 4
            self.rows += n
            self.shared += n > 1
        if prompts:
            self._prompts(prompts, len(decodes))

    def _prompts(self, requests: list[Request], n_decodes: int) -> None:
        """A part of the prompts that wait, first come first served."""
        room = self._chunk if self._together else len(requests[0].tokens)
        if n_decodes > 0:
            seconds = (MOST_SLOWDOWN - 1) * self._decode_s[n_decodes]
            room = min(room, self._prompt_time.rows(seconds))
        parts: list[tuple[Request, Sequence[int]]] = []
        for request in requests:
            part = request.left[:room]
            parts.append((request, part))
            room -= len(part)
            if room <= 0 or not self._together:
                break
        begin = time.perf_counter()
        rows = sum(len(part) for _, part in parts)

        def evaluate(some: list[Request]) -> None:
            chosen = [(r, part) for r, part in parts if r in some]
            if len(chosen) == 1:
                request, part = chosen[0]
                request.sequence.eval(part)
            else:
                self._engine.eval([(r.sequence, t) for r, part in chosen for t in part], "prompt")
            for request, _ in chosen:
                if not request.left:
                    self._finish(request)

        self._pass([r for r, _ in parts], evaluate)
        self._prompt_time.add(rows, time.perf_counter() - begin)

    def _decode(self, requests: list[Request]) -> None:
        if len(requests) == 1:
            request = requests[0]
            assert request.sampler is not None
            request.chosen = request.sequence.decode(request.tokens[0], request.sampler)
        else:
            steps = [(r.sequence, r.tokens[0], r.sampler) for r in requests]
            for request, token in zip(requests, self._engine.decode(steps), strict=True):
                request.chosen = token
        for request in requests:
            self._finish(request)

    def _pass(self, requests: list[Request], evaluate: Callable[[list[Request]], None]) -> None:
        """One forward pass. Whose fault an error is, is seen one by one."""
        self.passes += 1
        failed = None
        with self._lock:
            self._passing = [r for r in requests if r in self._waiting]
            requests = list(self._passing)
        try:
            if requests:
                evaluate(requests)
        except Exception as error:
            failed = error
        finally:
            with self._lock:
                self._passing = []
                self._condition.notify_all()
        if failed is None:
            return
        if len(requests) == 1:
            self._finish(requests[0], failed)
        failed = None  # its traceback refers to this frame
        if len(requests) > 1:
            for request in requests:
                self._pass([request], evaluate)

    def _finish(self, request: Request, error: BaseException | None = None) -> None:
        with self._lock:
            if request not in self._waiting:
                return
            self._waiting.remove(request)
            request.error = error
            request.done = True
            if not request.leads:
                request.wake.release()
