"""A running generation: an iterator of chunks, with the text, tokens and statistics so far."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .base.errors import Cancelled, OptionError
from .options import GenerationOptions
from .statistics import ExpertStatistics, Statistics, StreamStatistics, gained, peak_memory
from .text.stop import StopMatcher

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor
    from types import TracebackType

    from ._core import Sampler
    from .backends.engine import EngineSequence, LoadedModel
    from .text.tokenizer import TokenStream

_MOST_ASYNC = 256  # answers that `async for` generates at once

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Chunk:
    """One generated token and the text that became certain with it.

    text: may be empty while a character or a possible stop string is incomplete.
    token: its id; None for a closing chunk that only carries text held back until the end.
    logprob: natural log of its probability under the unmodified logits; None unless asked for.
    top_logprobs: (token, logprob) of the likeliest tokens, best first; empty unless asked for.
    """

    text: str
    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class _Steps:
    """What the steps of one answer need, from the first to the last."""

    sampler: Sampler
    ends: frozenset[int]  # tokens that end a generation
    decoder: TokenStream
    matcher: StopMatcher


class AnswerSession(Protocol):
    """What an answer needs of its session."""

    _sequence: EngineSequence
    _tokens: list[int]
    _lock: threading.Lock

    @property
    def _model(self) -> LoadedModel: ...
    @property
    def context(self) -> int:
        """Tokens that the session can hold."""

    def _exclusive(self, caller: Generation | None = None) -> AbstractContextManager[None]: ...
    def _cancel(self, generation: Generation | None) -> None: ...
    def _advance_to(self, target: list[int]) -> int: ...
    def _next(self, sampler: Sampler) -> int: ...


class Generation:
    """Iterates over the chunks of one answer; nothing is computed before the first `next`.

    It ends by itself, by `close()` (also as a context manager), by `Session.cancel()` from any
    thread, or when nobody refers to it any more. Ctrl-C raises KeyboardInterrupt and leaves the
    session at its last complete token.

    An answer holds its session, and nothing that the session or the model holds refers to an
    answer: when it ends, or its last reference goes, what it held is free at once.
    """

    def __init__(
        self,
        session: AnswerSession,
        target: list[int],
        options: GenerationOptions,
        *,
        started: float,
        begins_text: bool = False,
        on_end: Callable[[Generation], None] | None = None,
    ) -> None:
        """target: all tokens the sequence shall hold before the first choice; started: the
        perf_counter() of the call, from which the time to first token counts; begins_text: the
        answer is a text of its own, not a continuation.
        """
        self.options = options
        self.seed: int = secrets.randbits(63) if options.seed is None else options.seed
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None  # the one that ended the text
        self.tokens: list[int] = []  # generated, without an end-of-generation token
        self._session: AnswerSession | None = session  # None once the session is free again
        self._target = target
        self._begins_text = begins_text
        self._on_end = on_end
        self._release: Callable[[Generation], None] | None = None
        self._pieces: list[str] = []
        self._prepare_s = time.perf_counter() - started
        self._ttft_s = self._prefill_s = self._decode_s = 0.0
        self._reused = 0
        self._before: Mapping[str, Any] | None = None  # the sequence's stats as it began
        self._final: Statistics | None = None  # once it has ended
        self._cancel = threading.Event()
        self._thread: int | None = None  # that ran it last
        self._made_by = threading.get_ident()
        self._steps: _Steps | None = None  # before the first step

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._pieces)

    @property
    def stats(self) -> Statistics:
        """Figures so far; final once `finish_reason` is set."""
        session = self._session
        if self._final is not None or session is None:
            return self._final or Statistics()
        now = {} if self._before is None else session._sequence.stats
        before = self._before or {}
        return Statistics(
            prompt_tokens=len(self._target),
            reused_tokens=self._reused,
            new_tokens=len(self.tokens),
            ttft_s=self._ttft_s,
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
            decode_tokens=now.get("decode_tokens", 0) - before.get("decode_tokens", 0),
            decode_bytes=now.get("decode_bytes", 0) - before.get("decode_bytes", 0),
            peak_memory=peak_memory(),
            memory_bandwidth=session._model.memory_bandwidth,
            flash_bandwidth=session._model.flash_bandwidth,
            experts=gained(ExpertStatistics, before.get("experts"), now.get("experts")),
            stream=gained(StreamStatistics, before.get("stream"), now.get("stream")),
        )

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Chunk:
        session = self._session
        if session is None or self.finish_reason is not None:
            raise StopIteration
        try:
            with session._exclusive(self):
                self._thread = threading.get_ident()
                try:
                    # Another thread may have ended it while this one waited.
                    chunk = self._step(session) if self.finish_reason is None else None
                except Cancelled:
                    self._end("cancelled")
                    chunk = None
                except BaseException as error:
                    self._end("cancelled" if isinstance(error, KeyboardInterrupt) else "error")
                    raise
        finally:
            self._leave()
        if chunk is None:
            raise StopIteration
        return chunk

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk, from a thread that waits for it; a task that is cancelled ends it."""
        import asyncio

        loop = asyncio.get_running_loop()
        step = loop.run_in_executor(_waiting_threads(), next, self, None)
        try:
            chunk = await asyncio.shield(step)
        except asyncio.CancelledError:
            self.close()
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def read(self) -> str:
        """Runs to the end; returns the whole text."""
        for _ in self:
            pass
        return self.text

    def cancel(self) -> None:
        """Ends the generation at the next layer; callable from any thread."""
        session = self._session
        if session is not None and self.finish_reason is None:
            session._cancel(self)

    def close(self) -> None:
        """Ends the generation now; the session stays usable at the tokens generated so far."""
        self._cancel.set()
        if not self._abandon():
            self.cancel()  # another thread is inside a step: it ends there

    def __del__(self) -> None:
        # Whoever is inside the session now is no step of this generation, which nobody has.
        if getattr(self, "_session", None) is not None:
            self._abandon()

    def __reduce__(self) -> Any:
        raise OptionError("an answer cannot be copied or sent to another process: read its text")

    def _abandon(self) -> bool:
        """Ends the generation unless the session is in use; whether it has ended."""
        session = self._session
        if session is None or self.finish_reason is not None:
            return True
        if not session._lock.acquire(blocking=False):
            return False
        try:
            self._end("cancelled")
        finally:
            session._lock.release()
        self._leave()
        return True

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _end(self, reason: FinishReason) -> None:
        """Sets the reason, once; the caller holds the session's lock."""
        if self.finish_reason is not None:
            return
        self._final = self.stats
        self.finish_reason = reason
        if self._on_end is not None:
            self._on_end(self)
            self._on_end = None

    def _leave(self) -> None:
        """Lets go of the session once the generation has ended (and does not hold its lock)."""
        if self.finish_reason is None:
            return
        self._session = self._steps = None
        release = self.__dict__.pop("_release", None)  # at once: two threads may come here
        if release is not None:
            release(self)

    def _sampler(self, session: AnswerSession) -> Sampler:
        from ._core import Sampler

        o = self.options
        bias = {**session._model._never_chosen, **o.logit_bias}
        if o.ignore_eos:
            bias |= {token: -math.inf for token in session._model.tokenizer.eog_ids}
        sampler = Sampler(
            session._model.n_vocab,
            **o.of_sampler(session._model.tokenizer.tokens_with),
            logit_bias=bias or None,
            seed=self.seed,
            logprobs=o.logprobs,
        )
        n = len(self._target)
        seen = n if sampler.history < 0 else min(sampler.history, n)
        for token in self._target[n - seen :]:
            sampler.accept(token)
        return sampler

    def _step(self, session: AnswerSession) -> Chunk | None:
        """The next chunk, the last one with `finish_reason` already set; None at the end."""
        begin = time.perf_counter()
        if self._steps is None:
            self._steps = self._begin(session)
            if self.options.max_tokens == 0:
                self._end("length")
                return None
            choose = session._sequence.sample
        else:
            choose = session._next
        if self._was_cancelled():
            return None
        token = choose(self._steps.sampler)
        return None if self._was_cancelled() else self._take(session, token, begin)

    def _was_cancelled(self) -> bool:
        if self._cancel.is_set():
            self._end("cancelled")
        return self._cancel.is_set()

    def _begin(self, session: AnswerSession) -> _Steps:
        """Evaluates the prompt."""
        begin = time.perf_counter()
        sampler = self._sampler(session)
        self._before = session._sequence.stats
        self._reused = session._advance_to(self._target)
        self._prefill_s = time.perf_counter() - begin
        tokenizer = session._model.tokenizer
        return _Steps(
            sampler,
            frozenset(tokenizer.eog_ids),
            tokenizer.stream(skip_special=True, at_start=self._begins_text),
            StopMatcher(self.options.stop),
        )

    def _take(self, session: AnswerSession, token: int, begin: float) -> Chunk | None:
        """Takes a token that was chosen; begin: when the step began, by perf_counter()."""
        steps = self._steps
        assert steps is not None
        seconds = time.perf_counter() - begin
        if not self.tokens:
            self._ttft_s = self._prepare_s + seconds
        else:
            self._decode_s += seconds
        tokenizer = session._model.tokenizer
        decoder, matcher = steps.decoder, steps.matcher
        if token in steps.ends:
            text = matcher.push(decoder.flush())
            text += _rest(tokenizer.id_to_token(token), matcher, special=True)
            self._pieces.append(text)
            self.stop_string = matcher.matched
            self._end("stop")
            return Chunk(text, None) if text else None
        self.tokens.append(token)
        session._tokens.append(token)
        special = tokenizer.is_special(token)
        piece = tokenizer.id_to_token(token) if special else decoder.push(token)
        text = matcher.push(piece, special=special)
        full = len(session._tokens) > session.context
        if full:  # chosen, but there is no room to evaluate it
            session._tokens.pop()
        reason: FinishReason | None = None
        if matcher.matched is None and (full or len(self.tokens) == self.options.max_tokens):
            reason = "length"
            text += _rest(decoder.flush(), matcher)
        if matcher.matched is not None:
            reason = "stop"
            self.stop_string = matcher.matched
        self._pieces.append(text)
        if reason is not None:
            self._end(reason)
        return self._chunk(text, token, steps.sampler)

    def _chunk(self, text: str, token: int, sampler: Sampler) -> Chunk:
        if not self.options.logprobs:
            return Chunk(text, token)
        top = tuple((int(t), float(p)) for t, p in sampler.top_logprobs)
        return Chunk(text, token, float(sampler.logprob), top)


@cache
def _waiting_threads() -> ThreadPoolExecutor:
    """Threads that wait for the steps of `async for`, as many as there are answers."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(_MOST_ASYNC, thread_name_prefix="stoker-async")


def _rest(text: str, matcher: StopMatcher, *, special: bool = False) -> str:
    """The text at the end of the tokens: `text`, then what the matcher still held back."""
    text = matcher.push(text, special=special)
    return text + matcher.flush()
