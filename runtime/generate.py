"""A running generation: an iterator of chunks, with the text, tokens and statistics so far."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .errors import Cancelled
from .options import GenerationOptions
from .statistics import Counter, ExpertStatistics, Statistics, StreamStatistics, peak_memory
from .stop import StopMatcher

if TYPE_CHECKING:
    from types import TracebackType

    from ._core import Sampler
    from .session import Session

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


class Generation:
    """Iterates over the chunks of one answer; nothing is computed before the first `next`.

    It ends by itself, by `close()` (also as a context manager), or by `Session.cancel()` from any
    thread. Ctrl-C raises KeyboardInterrupt and leaves the session at its last complete token.
    """

    def __init__(
        self,
        session: Session,
        target: list[int],
        options: GenerationOptions,
        *,
        started: float,
        begins_text: bool = False,
        on_end: Callable[[Generation], None] | None = None,
    ) -> None:
        """target: all tokens the timeline shall hold before the first choice; started: the
        perf_counter() of the call, from which the time to first token counts; begins_text: the
        answer is a text of its own, not a continuation.
        """
        self.options = options
        self.seed: int = secrets.randbits(63) if options.seed is None else options.seed
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None  # the one that ended the text
        self.tokens: list[int] = []  # generated, without an end-of-generation token
        self._session = session
        self._target = target
        self._begins_text = begins_text
        self._on_end = on_end
        self._release: Callable[[Generation], None] | None = None
        self._pieces: list[str] = []
        self._prepare_s = time.perf_counter() - started
        self._ttft_s = self._prefill_s = self._decode_s = 0.0
        self._reused = self._decode_tokens = self._decode_bytes = 0
        self._experts, self._stream = Counter(ExpertStatistics), Counter(StreamStatistics)
        self._peak = 0
        self._cancel = threading.Event()
        self._thread: int | None = None  # that ran it last
        self._steps = self._run()

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._pieces)

    @property
    def stats(self) -> Statistics:
        """Figures so far; final once `finish_reason` is set."""
        return Statistics(
            prompt_tokens=len(self._target),
            reused_tokens=self._reused,
            new_tokens=len(self.tokens),
            ttft_s=self._ttft_s,
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
            decode_tokens=self._decode_tokens,
            decode_bytes=self._decode_bytes,
            peak_memory=self._peak or peak_memory(),
            memory_bandwidth=self._session._model.memory_bandwidth,
            flash_bandwidth=self._session._model.flash_bandwidth,
            experts=self._experts.statistics(),
            stream=self._stream.statistics(),
        )

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Chunk:
        if self.finish_reason is not None:
            raise StopIteration
        try:
            with self._session._exclusive(self):
                self._thread = threading.get_ident()
                try:
                    return next(self._steps)
                except StopIteration:
                    raise
                except Cancelled:
                    self._end("cancelled")
                    raise StopIteration from None
                except BaseException as error:
                    self._end("cancelled" if isinstance(error, KeyboardInterrupt) else "error")
                    raise
        finally:
            self._released()

    def read(self) -> str:
        """Runs to the end; returns the whole text."""
        for _ in self:
            pass
        return self.text

    def cancel(self) -> None:
        """Ends the generation at the next layer; callable from any thread."""
        if self.finish_reason is None:
            self._session._cancel(self)

    def close(self) -> None:
        """Ends the generation now; the session stays usable at the tokens generated so far."""
        if self.finish_reason is None:
            if self._session._lock.acquire(blocking=False):
                try:
                    self._end("cancelled")
                finally:
                    self._session._lock.release()
                self._released()
            else:
                self.cancel()  # another thread is inside a step: it ends there

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
        self.finish_reason = reason
        self._peak = peak_memory()
        if self._on_end is not None:
            self._on_end(self)
            self._on_end = None

    def _released(self) -> None:
        """Tells that the session is free, once it is (its lock is not held any more)."""
        if self.finish_reason is not None and self._release is not None:
            release, self._release = self._release, None
            release(self)

    def _sampler(self) -> Sampler:
        from ._core import Sampler

        o = self.options
        bias = dict(o.logit_bias)
        if o.ignore_eos:
            bias |= {token: -math.inf for token in self._session._model.tokenizer.eog_ids}
        sampler = Sampler(
            self._session._model.n_vocab,
            temperature=o.temperature,
            top_k=o.top_k,
            top_p=o.top_p,
            min_p=o.min_p,
            repetition_penalty=o.repetition_penalty,
            frequency_penalty=o.frequency_penalty,
            presence_penalty=o.presence_penalty,
            penalty_window=o.penalty_window,
            logit_bias=bias or None,
            seed=self.seed,
            logprobs=o.logprobs,
        )
        if o.penalizes:
            first = 0 if o.penalty_window < 0 else len(self._target) - o.penalty_window
            for token in self._target[max(first, 0) :]:
                sampler.accept(token)
        return sampler

    def _run(self) -> Iterator[Chunk]:
        """The steps; the last chunk comes with `finish_reason` already set."""
        clock = time.perf_counter
        session, options = self._session, self.options
        timeline = session._timeline
        begin = clock()
        sampler = self._sampler()
        with self._counting():
            self._reused = session._advance_to(self._target)
        self._prefill_s = clock() - begin
        if options.max_tokens == 0:
            self._end("length")
            return
        tokenizer = session._model.tokenizer
        eog = frozenset(tokenizer.eog_ids)
        decoder = tokenizer.stream(skip_special=True, at_start=self._begins_text)
        matcher = StopMatcher(options.stop)
        reason: FinishReason | None = None
        while not self._cancel.is_set():
            token = timeline.sample(sampler)
            now = clock()
            if not self.tokens:
                self._ttft_s = self._prepare_s + now - begin
            else:
                self._decode_s += now - begin
            if token in eog:
                text = matcher.push(decoder.flush())
                text += _rest(tokenizer.id_to_token(token), matcher, special=True)
                self._pieces.append(text)
                self.stop_string = matcher.matched
                self._end("stop")
                if text:
                    yield Chunk(text, None)
                return
            self.tokens.append(token)
            session._tokens.append(token)
            special = tokenizer.is_special(token)
            piece = tokenizer.id_to_token(token) if special else decoder.push(token)
            text = matcher.push(piece, special=special)
            full = len(session._tokens) > session.context
            if full:  # chosen, but there is no room to evaluate it
                session._tokens.pop()
            if matcher.matched is None and (full or len(self.tokens) == options.max_tokens):
                reason = "length"
                text += _rest(decoder.flush(), matcher)
            if matcher.matched is not None:
                reason = "stop"
                self.stop_string = matcher.matched
            self._pieces.append(text)
            if reason is not None:
                self._end(reason)
            yield self._chunk(text, token, sampler)
            if reason is not None:
                return
            begin = clock()
            bytes_before = session._decode_bytes()
            with self._counting():
                session._evaluate(decode=True)
            self._decode_tokens += 1
            self._decode_bytes += session._decode_bytes() - bytes_before
        self._end("cancelled")

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Counts what the evaluations inside read from flash."""
        engine = self._session._model._engine
        experts = self._experts.counting(lambda: engine.offload)
        stream = self._stream.counting(lambda: engine.stream)
        with experts, stream:
            yield

    def _chunk(self, text: str, token: int, sampler: Sampler) -> Chunk:
        if not self.options.logprobs:
            return Chunk(text, token)
        top = tuple((int(t), float(p)) for t, p in sampler.top_logprobs)
        return Chunk(text, token, float(sampler.logprob), top)


def _rest(text: str, matcher: StopMatcher, *, special: bool = False) -> str:
    """The text at the end of the tokens: `text`, then what the matcher still held back."""
    text = matcher.push(text, special=special)
    return text + matcher.flush()
