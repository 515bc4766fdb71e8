"""One mutable sequence over a shared model: its tokens, KV cache and conversation."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .backends.engine import LoadedModel
from .base import arguments
from .base.errors import (
    BudgetError,
    Cancelled,
    ChatTemplateError,
    ContextLengthError,
    OptionError,
)
from .generate import Generation
from .options import GenerationOptions, merge
from .text.conversation import Message

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt

    from ._core import Sampler
    from .backends.engine import EngineSequence, Tokens
    from .scheduler import Scheduler


_BUSY = "this session is in use by another thread: make one session for each (Model.session())"


@dataclass
class Evaluated:
    """A sequence and what it holds: all of a session that another one can go on with.

    tokens: what the sequence shall hold. Its tail may not be evaluated yet: the sequence's own
    position says how far it is, so that an interrupt at any point leaves no contradiction.
    logits_at: the position whose logits the sequence holds.
    """

    sequence: EngineSequence
    tokens: list[int] = field(default_factory=list)
    logits_at: int = -1


class SharedModel(LoadedModel, Protocol):
    """A model whose sessions share its memory, as its sessions see it."""

    _scheduler: Scheduler

    def _make_session(
        self, *, system: str | None = None, evaluated: Evaluated | None = None
    ) -> Session: ...
    def _make_way(self, session: Session) -> bool: ...


class Session:
    """Made by `Model.session()`. For one thread at a time; another gets OptionError.

    A call that fails or is interrupted leaves the session at the tokens it held before (an
    interrupted generation: at its last complete token).
    """

    def __init__(
        self, model: SharedModel, *, system: str | None = None, evaluated: Evaluated | None = None
    ) -> None:
        """evaluated: what another session has left, None makes a sequence."""
        start = evaluated or Evaluated(model._engine.sequence())
        self._model = model
        self._sequence = start.sequence
        self._tokens = start.tokens
        self._logits_at = start.logits_at
        self._lock = threading.Lock()
        self._stop = threading.Event()  # cancel() was called during the present call
        self._active: weakref.ref[Generation] | None = None
        self.system = system
        self._messages: list[dict[str, Any]] = []

    @property
    def model(self) -> SharedModel:
        """The shared model."""
        return self._model

    @property
    def position(self) -> int:
        """Tokens in the session."""
        return len(self._tokens)

    @property
    def context(self) -> int:
        """Tokens that the session can hold."""
        return int(self._sequence.context)

    @property
    def tokens(self) -> list[int]:
        """The tokens in the session (a copy)."""
        return list(self._tokens)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation that `chat` continues, the system message included (a copy)."""
        return self._with_system(self._messages)

    @property
    def system(self) -> str | None:
        """The system message put before the conversation; None for the template's own."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = None if text is None else arguments.text("system", text)

    def append(
        self,
        text: str | Tokens,
        *,
        add_special: bool | None = None,
        parse_special: bool = False,
    ) -> int:
        """Evaluates text or token ids after what is there; returns how many tokens that were.

        add_special: add BOS as the tokenizer says; None adds it at position 0 only.
        parse_special: read "<|name|>" in the text as the special token it names.
        Raises ContextLengthError, OptionError, Cancelled.
        """
        if add_special is not None:
            add_special = arguments.flag("add_special", add_special)
        parse_special = arguments.flag("parse_special", parse_special)
        with self._exclusive():
            if add_special is None:
                add_special = not self._tokens
            added = self._model._encode(text, add_special=add_special, parse_special=parse_special)
            self._advance_to(self._tokens + added)
        return len(added)

    def logits(self) -> npt.NDArray[np.float32]:
        """The logits after the last token, [n_vocab]."""
        with self._exclusive():
            if not self._tokens:
                raise OptionError("the session is empty: append something before asking for logits")
            self._evaluate()
            return self._sequence.logits()

    def generate(
        self,
        prompt: str | Tokens = "",
        *,
        options: GenerationOptions | None = None,
        **overrides: Any,
    ) -> Generation:
        """Continues the session's tokens and then `prompt`, as plain text (no chat template).

        Special tokens written in the prompt are read as such. `overrides` are fields of
        GenerationOptions. Raises ContextLengthError, OptionError.
        """
        started = time.perf_counter()
        chosen = merge(options, overrides)
        with self._exclusive():
            added = self._model._encode(prompt, add_special=not self._tokens, parse_special=True)
            return self._begin(self._tokens + added, chosen, started)

    def chat(
        self,
        message: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
        parse_special: bool = False,
        options: GenerationOptions | None = None,
        **overrides: Any,
    ) -> Generation:
        """Answers in the model's chat format, and remembers message and answer.

        message: the next user turn, or a list of {"role", "content"} that replaces the whole
        conversation; one that ends with the assistant's words is continued, and these words with
        what is generated are remembered as one message. What the KV cache already holds is not
        evaluated again. A cancelled answer is remembered as far as it came.
        template: variables of the chat template, e.g. {"enable_thinking": False}.
        parse_special: read "<|name|>" in messages, tools and variables as the control token it
        names; otherwise it is plain text.
        Raises ChatTemplateError, ContextLengthError, OptionError.
        """
        started = time.perf_counter()
        chosen = merge(options, overrides)
        with self._exclusive():  # which may first put an unfinished answer into the conversation
            if isinstance(message, str):
                message = arguments.text("message", message)
                turns = [*self._messages, {"role": "user", "content": message}]
                rendered: Sequence[Message] = self._with_system(turns)
            else:
                turns, rendered = [], message
            target, continued = self._model._prompt(
                rendered, tools=tools, variables=template, parse_special=parse_special
            )
            turns = turns or _copied(rendered)
            return self._begin(target, chosen, started, turns, continued)

    def fork(self) -> Session:
        """Another session that holds the same tokens and conversation, and shares their memory.

        What both hold is not evaluated again. Raises UnsupportedModelError on another backend.
        """
        with self._exclusive():
            forked = self._model._make_session(
                system=self._system,
                evaluated=Evaluated(self._sequence.fork(), list(self._tokens), self._logits_at),
            )
            forked._messages = [dict(turn) for turn in self._messages]
            return forked

    def truncate(self, position: int) -> None:
        """Forgets every token from `position` on."""
        with self._exclusive():
            self._truncate(arguments.integer("position", position, 0, len(self._tokens)))

    def reset(self) -> None:
        """Forgets all tokens and the conversation (not the system message)."""
        with self._exclusive():
            self._truncate(0)
            self._messages = []

    def cancel(self) -> None:
        """Stops what the session is doing, from any thread.

        A generation ends with finish_reason "cancelled"; an append raises Cancelled.
        """
        self._cancel(self._active() if self._active is not None else None)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        active = self._active() if self._active is not None else None
        if active is not None:
            active.close()

    def __reduce__(self) -> Any:
        raise OptionError("a session cannot be copied or sent to another process: make one there")

    def _hand_over(self) -> Evaluated:
        """What the session holds, for another one; it is of no use afterwards.

        Whoever still refers to it (the frames of a traceback, say) holds no KV cache.
        """
        evaluated = Evaluated(self._sequence, self._tokens, self._logits_at)
        del self._sequence
        evaluated.sequence.forget_cancel()  # was meant for this session
        return evaluated

    def _with_system(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self._system is None or (turns and turns[0].get("role") == "system"):
            return list(turns)
        return [{"role": "system", "content": self._system}, *turns]

    def _begin(
        self,
        target: list[int],
        options: GenerationOptions,
        started: float,
        turns: list[dict[str, Any]] | None = None,
        continued: str | None = None,
    ) -> Generation:
        """turns: the conversation that the answer will end; continued: the words it goes on with,
        those of its last message.
        """
        self._model._require_causal("generate")
        if not target and turns is not None:
            raise ChatTemplateError(
                f"{self._model.path.name}: the chat template makes no prompt of these messages"
            )
        if not target:
            raise OptionError("the prompt is empty and the model has no beginning-of-text token")
        self._check_length(target)

        def remember(generation: Generation) -> None:
            answered = generation.finish_reason in ("stop", "length")
            if turns is not None and (answered or generation.text):
                said = {"role": "assistant", "content": generation.text}
                if continued is None:
                    self._messages = [*turns, said]
                else:
                    said = {**turns[-1], "content": continued + generation.text}
                    self._messages = [*turns[:-1], said]

        generation = Generation(
            self,
            target,
            options,
            started=started,
            begins_text=turns is not None and not continued,
            on_end=remember,
        )
        self._active = weakref.ref(generation)
        return generation

    def _exclusive(self, caller: Generation | None = None) -> _Exclusive:
        """Holds the session for one call; ends a generation that the same thread left behind."""
        return _Exclusive(self, caller)

    def _enter(self, caller: Generation | None) -> None:
        self._model._check_process()
        if not self._lock.acquire(blocking=False):
            if caller is None or not caller._cancel.is_set():
                raise OptionError(_BUSY)
            self._lock.acquire()  # another thread is just ending the caller
        try:
            self._stop.clear()
            active = self._active() if self._active is not None else None
            if active is not None and active is not caller and active.finish_reason is None:
                running = {thread.ident for thread in threading.enumerate()}
                if active._thread in running - {threading.get_ident()}:
                    raise OptionError(_BUSY)
                active._end("cancelled")
                active._leave()
        except BaseException:
            self._lock.release()
            raise

    def _cancel(self, generation: Generation | None) -> None:
        if generation is not None:
            generation._cancel.set()
        sequence = self.__dict__.get("_sequence")  # it may be handed over this moment
        if sequence is not None and self._lock.locked():
            self._stop.set()
            sequence.cancel()

    def _check_length(self, target: list[int]) -> None:
        if len(target) > self.context:
            raise ContextLengthError(
                f"{len(target)} tokens do not fit a context of {self.context}: "
                "shorten the prompt, or load the model with a larger context"
            )

    def _advance_to(self, target: list[int]) -> int:
        """Makes the sequence hold `target`; returns how many of its tokens were evaluated before.

        On any exception the session keeps the part that it had in common with `target`.
        """
        self._check_length(target)
        keep = common_prefix(self._tokens, target)
        reused = min(keep, self._sequence.position)
        self._truncate(keep)
        try:
            self._tokens.extend(target[keep:])
            self._evaluate()
        except BaseException:
            self._truncate(keep)
            raise
        return reused

    def _truncate(self, position: int) -> None:
        del self._tokens[position:]
        if self._sequence.position > position:
            self._logits_at = -1
            self._sequence.truncate(position)

    def _evaluate(self, *, decode: bool = False) -> None:
        """Evaluates what is pending, so that the sequence has the logits of the last token.

        decode: it is a token that was generated, not a prompt.
        """
        end = len(self._tokens)
        if end > 0 and self._sequence.position == end and self._logits_at != end:
            # Truncated: the last token's logits are gone, compute them again.
            self._sequence.truncate(end - 1)
        while self._sequence.position < end:
            self._logits_at = -1
            begin = self._sequence.position
            recorder = self._model._recorder
            # Recorded chunk by chunk, so that the recording of a long prompt needs no more memory.
            stop = end if recorder is None else min(end, begin + recorder.chunk)
            try:
                if recorder is None and not decode:
                    self._model._scheduler.prompt(self._sequence, self._tokens[begin:stop])
                else:
                    self._sequence.eval(self._tokens[begin:stop], "decode" if decode else "prompt")
            except BudgetError:
                if not self._model._make_way(self):
                    raise
            except Cancelled:
                if recorder is not None:
                    recorder.drop()
                if self._stop.is_set():
                    raise
                # Otherwise the request came as an earlier call was ending, and was meant for it.
            except BaseException:
                if recorder is not None:
                    recorder.drop()
                raise
            else:
                if recorder is not None:
                    recorder.drain()
        self._logits_at = end

    def _next(self, sampler: Sampler) -> int:
        """Evaluates the token chosen last and chooses the next; not for an answer's first one."""
        end = len(self._tokens)
        if self._model._recorder is not None or self._logits_at != end - 1:
            self._evaluate(decode=True)
            return self._sequence.sample(sampler)
        while True:
            self._logits_at = -1
            try:
                token = self._model._scheduler.decode(self._sequence, self._tokens[-1], sampler)
            except BudgetError:
                if not self._model._make_way(self):
                    raise
            except Cancelled:
                if self._stop.is_set():
                    raise
                # Otherwise the request came as an earlier call was ending, and was meant for it.
            else:
                self._logits_at = end
                return token


class _Exclusive(AbstractContextManager[None]):
    """A session held for one call. A generator would cost a token twice as much."""

    __slots__ = ("_caller", "_session")

    def __init__(self, session: Session, caller: Generation | None) -> None:
        self._session, self._caller = session, caller

    def __enter__(self) -> None:
        self._session._enter(self._caller)

    def __exit__(self, *error: object) -> None:
        self._session._lock.release()


def _copied(messages: object) -> list[Any]:
    """The messages, each mapping a copy; what is no mapping is for the template to refuse."""
    listed = arguments.sequence("messages", messages, "a string or a sequence of messages")
    return [dict(turn) if isinstance(turn, Mapping) else turn for turn in listed]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many leading elements `a` and `b` share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
