"""A loaded model: immutable, shared by any number of sessions and threads."""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .base import arguments
from .base.errors import (
    ChatTemplateError,
    OptionError,
    TokenizerError,
    UnsupportedModelError,
)
from .base.memory import available_memory, budget, check_memory, process_bytes
from .options import GenerationOptions, LoadOptions, merge
from .perplexity import Perplexity, measure
from .pooling import check_pooling, pool, pooling_of_file
from .scheduler import Scheduler
from .session import Evaluated, Session
from .text.conversation import Message

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..offload.trace.record import RoutingRecorder
    from . import _core
    from .answers import Answers
    from .backends.engine import Engine, ModelFile, Tokens
    from .generate import Generation
    from .plan import PlanReport
    from .rank import CandidateScore
    from .text.chat import ChatTemplate
    from .text.tokenizer import Tokenizer


_LOG = logging.getLogger("stoker")

_NAMED_KEYS = 5  # unknown metadata keys that a warning names

# How long to wait for a session that was abandoned in the middle of a step. Until that step ends
# it cannot be told from a session in use.
_STEP_GRACE_S = 2.0

# generate_many takes at most so many samples of a prompt, and answers at once (a thread each).
_MOST_SAMPLES, _MOST_PARALLEL = 10_000, 1024


class Model:
    """Weights, configuration, tokenizer and chat template of one file. Made by `load`."""

    _file: ModelFile
    _engine: Engine
    _scheduler: Scheduler

    def __init__(self, path: Path, options: LoadOptions | None = None) -> None:
        from ._core import Engine, GgufFile

        started = time.perf_counter()
        options = options or LoadOptions()
        file = GgufFile(str(path))
        self._set_up(path, options, file)
        _check_names(options)
        self._engine = Engine(
            file,
            threads=options.threads or 0,
            context=options.context or 0,
            kv_type=options.kv_type,
            precision=options.precision,
            **self._offload_arguments(file),
        )
        unknown = file.unknown_metadata
        if unknown:
            names = ", ".join(map(ascii, unknown[:_NAMED_KEYS])) + ", ..." * (
                len(unknown) > _NAMED_KEYS
            )
            _LOG.warning("stoker: %s: metadata unknown and not used: %s", path.name, names)
        threads = int(self._engine.plan["threads"])
        if options.threads is not None and threads < options.threads:
            _LOG.warning(
                "stoker: %s: the system gives %d threads of %d", path.name, threads, options.threads
            )
        self._load_bandwidth = self._read_bandwidth()  # of the pinned weights
        self.load_s = time.perf_counter() - started  # seconds that loading took

    def _set_up(self, path: Path, options: LoadOptions, file: ModelFile) -> None:
        """Sets all fields but the engine, which each backend (backends/) makes in its own way."""
        self.path = path
        self.options = options
        self._process = self._loaded_in = os.getpid()
        self._lazy = threading.RLock()
        # The next generate or chat continues with this. It holds no reference to the model, so that
        # a model without references is freed at once.
        self._idle: Evaluated | None = None
        self._idle_lock = threading.RLock()  # re-entered if a generation is dropped while held
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._recorder: RoutingRecorder | None = None
        self._memory_bandwidth = self._load_bandwidth = 0.0  # bytes a second; 0: not measured
        self._file = file

    def _resident_bytes(self, file: _core.GgufFile) -> int:
        """Returns the bytes that the process would take with everything in memory, by the core."""
        from ..offload.plan.planned import resident_bytes

        o = self.options
        return resident_bytes(
            file,
            process_bytes(),
            threads=o.threads or 0,
            context=o.context or 0,
            kv_type=o.kv_type,
            precision=o.precision,
        )

    def _offload_arguments(self, file: _core.GgufFile) -> dict[str, Any]:
        """Returns the engine's arguments for the options' memory; none if everything fits."""
        o = self.options
        if check_memory(o.memory) is None:
            limit = available_memory()
            if limit is None or self._resident_bytes(file) <= limit:
                return {}
        else:
            limit = budget(o.memory)
        # The tokenizer and template are built now, so that the measured process size includes them.
        with suppress(TokenizerError, ChatTemplateError):  # errors are raised once they are needed
            _ = self.chat_template
        learnt = b""
        if o.profile is not None:
            from ..offload.profile.profile import predictor_state

            learnt = predictor_state(o.profile, o.predictor, file)
        gc.collect()
        named = {"policy": o.policy, "predictor": o.predictor, "io": o.io, "readers": o.readers}
        return {
            "memory": limit,
            "process_bytes": process_bytes(),
            "predictor_state": learnt,
            "prefetch": o.prefetch,
            **{name: value for name, value in named.items() if value is not None},
        }

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Architecture and sizes: architecture, n_layer, n_embd, n_vocab, context, ..."""
        return MappingProxyType(dict(self._engine.config))

    @property
    def engine(self) -> _core.Engine:
        """The native engine, for its own functions. Raises UnsupportedModelError on another."""
        from ._core import Engine

        if not isinstance(self._engine, Engine):
            raise UnsupportedModelError(f"{self.path.name}: this needs the native engine")
        return self._engine

    @property
    def file(self) -> _core.GgufFile:
        """The GGUF file. Raises UnsupportedModelError for a model of another format."""
        from ._core import GgufFile

        if not isinstance(self._file, GgufFile):
            raise UnsupportedModelError(f"{self.path.name}: this needs a GGUF file")
        return self._file

    @property
    def plan(self) -> Mapping[str, Any]:
        """The use of memory, bytes by kind; threads; isa."""
        return MappingProxyType(dict(self._engine.plan))

    def forecast(self) -> PlanReport:
        """Returns the plan with expected tokens a second, by bandwidths measured on this machine.

        The first call reads some memory for a tenth of a second; it is best made right after the
        load.
        """
        from .plan import report

        return report(self)

    @property
    def offload(self) -> Mapping[str, Any] | None:
        """Counters of the expert cache since the load; None if all experts are in memory."""
        counters = self._engine.offload
        return None if counters is None else MappingProxyType(dict(counters))

    @property
    def stream(self) -> Mapping[str, Any] | None:
        """Counters of streamed weights since the load; None if all are pinned.

        These are weights that every token uses. bytes, decode_bytes: read from flash. stall_s,
        decode_stall_s: seconds spent waiting for them.
        """
        counters = self._engine.stream
        return None if counters is None else MappingProxyType(dict(counters))

    @property
    def flash_bandwidth(self) -> float:
        """Bytes a second of the reads since the load or of the load's, whichever is more.

        It is 0 if everything is in memory.
        """
        return max(self._load_bandwidth, self._read_bandwidth())

    def _read_bandwidth(self) -> float:
        if os.getpid() != self._loaded_in and not self._engine.survives_fork:
            return 0.0
        counters = self._engine.offload or self._engine.stream
        if counters is None or counters["read_s"] <= 0:
            return 0.0
        return float(counters["read_bytes"] / counters["read_s"])

    @property
    def memory_bandwidth(self) -> float:
        """Bytes a second that all threads read from memory; 0 until `forecast` measured it."""
        return self._memory_bandwidth

    @contextmanager
    def record(self, path: str | PathLike[str]) -> Iterator[None]:
        """Writes the routing of all tokens evaluated in the block to a trace (.csv or .csv.gz).

        The file appears when the block ends, even by an exception (Ctrl-C); `stoker simulate` reads
        it. Raises OptionError if all experts are in memory, or the file cannot be written.
        """
        from ..offload.trace.record import RoutingRecorder

        with self._lazy:
            if self._recorder is not None:
                raise OptionError(f"{self.path.name}: its routing is being recorded already")
            if self._engine.offload is None:
                raise OptionError(
                    f"{self.path.name}: nothing to record, no expert is read from flash: "
                    "give a mixture of experts a memory budget (--memory)"
                )
            file = arguments.path("path", path)
            recorder = self._recorder = RoutingRecorder(self.engine, self.file, file)
        try:
            yield
        finally:
            self._recorder = None
            recorder.close()

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """All metadata of the file."""
        return MappingProxyType(dict(self._file.metadata))

    @property
    def name(self) -> str:
        """The name in the file's metadata, or else the name of the file."""
        return str(self._file.get("general.name") or self.path.stem)

    @cached_property
    def n_vocab(self) -> int:
        """Size of the vocabulary."""
        return int(self.config["n_vocab"])

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, built at first use. Raises TokenizerError."""
        self._own_locks()
        with self._lazy:
            return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from .text.tokenizer import Tokenizer

        return Tokenizer.from_metadata(self._file.get, getattr(self._file, "strings", None))

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The file's chat template, None if it has none. Raises ChatTemplateError."""
        self._own_locks()
        with self._lazy:
            return self._chat_template

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        from .text.chat import ChatTemplate
        from .text.template_sources import template_sources

        try:
            return ChatTemplate.from_metadata(self._file.get, self.tokenizer)
        except ChatTemplateError:
            if template_sources(self._file.get):
                raise  # the file has a template, which is malformed
            return None

    def run(self, inputs: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """Evaluates the graph of an ONNX model once, arrays by name -> arrays by name."""
        raise UnsupportedModelError(f"{self.path}: run(inputs) expects an ONNX model")

    def session(self, *, system: str | None = None) -> Session:
        """Makes a new, empty session, which takes memory as it grows."""
        self._check_process()
        return self._make_session(system=system)

    def _make_session(
        self, *, system: str | None = None, evaluated: Evaluated | None = None
    ) -> Session:
        session = Session(self, system=system, evaluated=evaluated)
        with self._idle_lock:
            if "_scheduler" not in self.__dict__:
                self._scheduler = Scheduler(self._engine)
            self._sessions.add(session)
        return session

    def generate(
        self,
        prompt: str | Tokens,
        *,
        options: GenerationOptions | None = None,
        **overrides: Any,
    ) -> Generation:
        """Continues `prompt` as plain text (no chat template).

        Special tokens written in the prompt are read as such. `overrides` are fields of
        GenerationOptions. Raises ContextLengthError, OptionError.
        """
        session = self._take()
        session.reset()
        return self._lend(session, lambda s: s.generate(prompt, options=options, **overrides))

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
        parse_special: bool = False,
        options: GenerationOptions | None = None,
        **overrides: Any,
    ) -> Generation:
        """Answers a conversation, a list of {"role", "content"}, in the model's chat format.

        A string is one user message; a conversation that ends with the assistant's words is
        continued. template: variables of the chat template, e.g. {"enable_thinking": False}.
        parse_special: read "<|name|>" in messages, tools and variables as the control token it
        names; otherwise it is plain text. Tokens that the KV cache still holds from the last call
        are not evaluated again. Raises ChatTemplateError, ContextLengthError, OptionError.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self._lend(
            self._take(),
            lambda s: s.chat(
                messages,
                tools=tools,
                template=template,
                parse_special=parse_special,
                options=options,
                **overrides,
            ),
        )

    def generate_many(
        self,
        prompts: Sequence[str | Tokens | Sequence[Message]],
        *,
        n: int = 1,
        parallel: int = 16,
        options: GenerationOptions | None = None,
        **overrides: Any,
    ) -> Answers:
        """Answers many prompts in forward passes that they share; each as if it were alone.

        prompts: texts or tokens to continue, or conversations to answer (lists of messages).
        n: samples of each prompt, which is evaluated once; a seed makes the j-th sample's seed + j.
        parallel: answers that are generated at once, where the memory holds so many.
        Raises OptionError; ContextLengthError, BudgetError, ... while iterating.
        """
        from .answers import Answers

        chosen = merge(options, overrides)
        listed = arguments.sequence("prompts", prompts, "a sequence of prompts")
        self._require_causal("generate")
        return Answers(
            self,
            list(listed),
            chosen,
            n=arguments.integer("n", n, 1, _MOST_SAMPLES),
            parallel=arguments.integer("parallel", parallel, 1, _MOST_PARALLEL),
        )

    def rank(
        self, prompt: str | Tokens, candidates: Sequence[str | Tokens]
    ) -> list[CandidateScore]:
        """How probable each candidate is as the continuation of a prompt, in one forward pass.

        Texts are tokenized together with the prompt. The scores are in the order of `candidates`.
        Raises ContextLengthError, OptionError, UnsupportedModelError (another backend).
        """
        from .rank import rank

        self._require_causal("rank")
        return rank(self, prompt, candidates)

    def logits(self, tokens: str | Tokens) -> npt.NDArray[np.float32]:
        """Returns the logits after each token, [n, n_vocab]; a string is tokenized first."""
        ids = self._encode(tokens, add_special=True, parse_special=True)
        with self._scratch(ids) as session:
            return session._sequence.eval_all(ids)

    def embed(
        self, text: str | Tokens, *, pooling: str | None = None, normalize: bool = False
    ) -> npt.NDArray[np.float32]:
        """Pools the tokens' final hidden states into one vector, [n_embd].

        pooling: "mean" of all tokens, "cls" (the first one's), "last", or "none": one row a token,
            [n, n_embd]. None takes what the file names, and the mean if it names nothing.
        normalize: scale to L2 norm 1.
        Raises OptionError, UnsupportedModelError (a reranker's file).
        """
        import numpy as np  # imported only here, because it takes 14 MiB

        kind = self._pooling if pooling is None else check_pooling(pooling)
        normalize = arguments.flag("normalize", normalize)
        ids = self._encode(text, add_special=True, parse_special=False)
        with self._scratch(ids) as session:
            pooled = pool(session._sequence.eval_hidden(ids), kind)
        if normalize:
            norms = np.linalg.norm(pooled, axis=-1, keepdims=True)
            pooled = pooled / np.maximum(norms, 1e-30)
        return np.asarray(pooled, dtype=np.float32)

    @cached_property
    def _pooling(self) -> str:
        arch = self._file.get("general.architecture")
        return pooling_of_file(self._file.get(f"{arch}.pooling_type"), f"{arch}.pooling_type")

    def perplexity(
        self,
        text: str | Tokens,
        *,
        context: int | None = None,
        stride: int | None = None,
        max_chunks: int | None = None,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> Perplexity:
        """Measures the perplexity of `text`.

        stride None counts as llama.cpp's perplexity tool does: disjoint windows of `context`
        tokens, the second half of each scored, the remainder left out. Otherwise windows overlap:
        each moves on by `stride` tokens and scores those alone (the first window scores all), so
        that every token but the first counts once, with at least context - stride tokens before
        it. Each window begins with BOS if the model uses one. A text shorter than `context` is
        one window, all scored.
        context: None takes 512, or the model's context if that is smaller.
        progress: called with (windows done, windows in all, ppl so far).
        Raises OptionError.
        """
        self._require_causal("score")
        if context is not None:
            context = arguments.integer("context", context, 2)
        if stride is not None:
            stride = arguments.integer("stride", stride, 1)
        if max_chunks is not None:
            max_chunks = arguments.integer("max_chunks", max_chunks, 1)
        if progress is not None:
            progress = arguments.function("progress", progress)
        ids = self._encode(text, add_special=True, parse_special=False)
        bos = self.tokenizer.bos_id if self.tokenizer.add_bos else None

        def report(done: int, total: int, ppl: float) -> None:
            self._drain()
            if progress is not None:
                progress(done, total, ppl)

        import numpy as np

        with self._scratch(None) as session:
            return measure(
                session._sequence,
                np.asarray(ids, dtype=np.int32),
                context=min(512, session.context) if context is None else context,
                stride=stride,
                bos=bos,
                max_chunks=max_chunks,
                progress=report,
            )

    def _take(self) -> Session:
        """Returns a session that continues what the last one left, or a new one."""
        self._check_process()
        return self._make_session(evaluated=self._left())

    def _make_way(self, session: Session) -> bool:
        """Frees memory of other sessions for one that grows; whether there was any.

        First what generate and chat have left, which they evaluate again when they need it.
        """
        return (
            self._left() is not None
            or self._wait_for_the_abandoned(session)
            or self._end_one_left_behind()
        )

    def _left(self) -> Evaluated | None:
        """Takes what the last session of generate or chat left; None if there is nothing."""
        with self._idle_lock:
            evaluated, self._idle = self._idle, None
        return evaluated

    def _wait_for_the_abandoned(self, caller: Session) -> bool:
        """Waits for a session without other references to end with its current step.

        Such a session was abandoned in the middle of a step, for example by a cancelled task of
        asyncio, whose thread continues to the end of the step. Returns whether one has ended;
        `caller` is not waited for.
        """
        with self._idle_lock:
            others = [s for s in self._sessions if s is not caller and s._lock.locked()]
            others = [s for s in others if s._active is not None and s._active() is None]
            busy = [(weakref.ref(s), s._lock) for s in others]
            del others
        until = time.monotonic() + _STEP_GRACE_S
        for session, lock in busy:
            if lock.acquire(timeout=max(0.0, until - time.monotonic())):
                lock.release()
            while session() is not None and not lock.locked() and time.monotonic() < until:
                time.sleep(0.001)
            if session() is None:
                return True
        return False

    def _end_one_left_behind(self) -> bool:
        """Ends an unfinished answer of generate or chat of this thread; returns whether one was.

        A variable that is assigned its next answer, for example, holds the last one while the next
        is made.
        """
        with self._idle_lock:
            sessions = list(self._sessions)
        for session in sessions:
            answer = session._active() if session._active is not None else None
            if answer is None or answer.finish_reason is not None or session._lock.locked():
                continue
            if answer.__dict__.get("_release") is not None and threading.get_ident() == (
                answer._thread or answer._made_by
            ):
                answer.close()
                _LOG.warning(
                    "stoker: %s: the memory is full: an unfinished answer was ended",
                    self.path.name,
                )
                return True
        return False

    def _give_back(self, session: Session) -> None:
        evaluated = session._hand_over()
        with self._idle_lock:
            self._idle = evaluated

    def _lend(self, session: Session, begin: Callable[[Session], Generation]) -> Generation:
        """Returns what `begin` makes; takes the session's state back however that ends."""
        try:
            generation = begin(session)
        except BaseException:
            self._give_back(session)
            raise

        def give_back(_: Generation) -> None:
            self._give_back(session)

        generation._release = give_back
        return generation

    def _own_locks(self) -> None:
        """Makes new locks in a forked process, since threads that it lacks may hold the old."""
        process = os.getpid()
        if process != self._process:
            self._lazy, self._idle_lock = threading.RLock(), threading.RLock()
            if "_scheduler" in self.__dict__:
                self._scheduler = Scheduler(self._engine)
            self._process = process

    def _check_process(self) -> None:
        """Raises OptionError in a forked process, which lacks the threads that the model needs."""
        self._own_locks()
        if not self._engine.survives_fork and self._process != self._loaded_in:
            raise OptionError(
                f"{self.path.name} was loaded before this process was forked, which has none of "
                "its threads: load the model in the new process"
            )

    def _require_causal(self, what: str) -> None:
        """Raises UnsupportedModelError if tokens attend to later ones."""
        if not self.config.get("causal", True):
            raise UnsupportedModelError(
                f"{self.path.name}: its tokens attend to later ones, so that it embeds texts "
                f"(Model.embed) and cannot {what} any"
            )

    def __reduce__(self) -> Any:
        raise OptionError(
            f"{self.path.name}: a model cannot be copied or sent to another process: load it there"
        )

    @cached_property
    def _never_chosen(self) -> Mapping[int, float]:
        """A bias that bans output rows without a token: there can be more rows than tokens."""
        return dict.fromkeys(range(self.tokenizer.vocab_size, self.n_vocab), -math.inf)

    @contextmanager
    def _scratch(self, ids: list[int] | None) -> Iterator[Session]:
        """Yields an empty session; its sequence may be used directly, and is emptied afterwards."""
        if ids is not None and not ids:
            raise OptionError("there are no tokens to evaluate")
        session = self._take()
        try:
            session.reset()
            if ids is not None:
                session._check_length(ids)
            yield session
            self._drain()
        finally:
            session._sequence.truncate(0)
            session._logits_at = -1
            self._give_back(session)

    def _drain(self) -> None:
        """Lets a recorder take what has been evaluated."""
        if self._recorder is not None:
            self._recorder.drain()

    def _encode(self, text: str | Tokens, *, add_special: bool, parse_special: bool) -> list[int]:
        """Returns the token ids of a text, or the given ids, checked."""
        if isinstance(text, str):  # token ids need no tokenizer
            return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)
        return arguments.tokens("a prompt", text, self.n_vocab)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]:
        """Returns the token ids of a conversation up to where the answer begins.

        It serves callers with messages and tools alone, among them scripts outside of the package.
        """
        return self._prompt(messages, tools=tools)[0]

    def _prompt(self, messages: Sequence[Message], **given: Any) -> tuple[list[int], str | None]:
        """Returns a conversation's token ids, and the assistant's words that they end with, if any.

        given: tools, variables and parse_special of ChatTemplate.prompt.
        """
        template = self.chat_template
        if template is None:
            raise ChatTemplateError(
                f"{self.path.name} has no chat template: use generate (stoker run --raw) instead"
            )
        prompt = template.prompt(messages, **given)
        tokenizer = self.tokenizer
        ids = tokenizer.encode(prompt.text, add_special=False, mark=prompt.mark)
        # Some templates write BOS themselves, others leave it to the tokenizer.
        bos = tokenizer.bos_id
        if tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids, prompt.continued


def _check_names(options: LoadOptions) -> None:
    """Raises OptionError for a policy, predictor or backend that does not exist.

    The check is here because an engine that keeps everything in memory never reads these options.
    """
    from ._core import io_backends, policies, predictors

    for option, value, listed in (
        ("policy", options.policy, policies()),
        ("predictor", options.predictor, predictors()),
        ("io", options.io, [("auto", ""), *io_backends()]),
    ):
        names = [name for name, _ in listed]
        if value is not None and value.partition(":")[0] not in names:
            raise OptionError(
                f"{option} must be one of {', '.join(names)}, not {arguments.shown(value)}"
            )
