"""Answers to many prompts at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from .base.errors import BudgetError, DeviceError
from .generate import Chunk, Generation
from .options import GenerationOptions

if TYPE_CHECKING:
    from types import TracebackType

    from .session import Session


class PromptedModel(Protocol):
    """What answers need of their model."""

    def session(self) -> Session:
        """Makes a new, empty session."""


class Answers:
    """Iterates over (index, chunk) of all answers, as they come.

    Answer `i * n + j` is the j-th sample of prompt i. As many as `parallel` are generated at once,
    each on a thread of its own, in forward passes that they share. Where the memory holds fewer,
    one of them begins again when another has ended: what it says is the same.

    Ends by itself, by `close()` (also as a context manager), or when nobody refers to it any more.
    """

    def __init__(
        self,
        model: PromptedModel,
        prompts: Sequence[Any],
        options: GenerationOptions,
        *,
        n: int,
        parallel: int,
    ) -> None:
        self._work = _Work(model, prompts, options, n)
        self._parallel = min(parallel, len(self._work.generations)) or 1
        self._started = False

    def __len__(self) -> int:
        return len(self._work.generations)

    @property
    def generations(self) -> list[Generation | None]:
        """Each answer's generation, with its text and figures; None before it begins."""
        return list(self._work.generations)

    def __iter__(self) -> Iterator[tuple[int, Chunk]]:
        for index, chunk in self._items():
            if chunk is not None:
                yield index, chunk

    def ended(self) -> Iterator[int]:
        """Runs to the end; the index of each answer as it ends."""
        for index, chunk in self._items():
            if chunk is None:
                yield index

    def _items(self) -> Iterator[tuple[int, Chunk | None]]:
        """Chunks, and None after the last one of an answer."""
        work = self._work
        self._start()
        while (item := work.out.get()) is not None:
            if isinstance(item, BaseException):
                self.close()
                raise item
            yield item
        work.out.put(None)  # for whoever asks again

    def read(self) -> list[str]:
        """Runs to the end; returns the texts, by index."""
        for _ in self:
            pass
        return ["" if g is None else g.text for g in self._work.generations]

    def close(self) -> None:
        """Ends all of them now."""
        self._work.stop()

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if "_work" in self.__dict__:
            self._work.stop()

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        work = self._work
        work.running = self._parallel
        for i in range(self._parallel):
            try:
                threading.Thread(target=work.run, name="stoker-answers", daemon=True).start()
            except RuntimeError:  # the system gives no more
                work.go(self._parallel - i)
                if i == 0:
                    raise DeviceError("the system gives no thread to wait for answers") from None
                return


class _Work:
    """What the threads share. It knows nothing of the Answers, which may go before them."""

    def __init__(
        self, model: PromptedModel, prompts: Sequence[Any], options: GenerationOptions, n: int
    ) -> None:
        self._model, self._prompts, self._options, self._n = model, prompts, options, n
        self.generations: list[Generation | None] = [None] * (len(prompts) * n)
        self.out: queue.SimpleQueue[tuple[int, Chunk | None] | BaseException | None]
        self.out = queue.SimpleQueue()
        self.running = 0  # threads
        self._changed = threading.Condition()
        self._waiting = list(range(len(self.generations)))[::-1]  # the next one last
        self._active = self._ended = 0  # answers that are being generated; that were
        self._stopped = False
        self._told = [0] * len(self.generations)  # chunks
        self._bases: dict[int, Session] = {}  # of prompts with samples to come
        self._base_locks = [threading.Lock() for _ in prompts]

    def run(self) -> None:
        """A thread's work."""
        try:
            while (index := self._take()) is not None:
                again = False
                try:
                    again = self._answer(index)
                finally:
                    self._give_back(index, again=again)
        except BaseException as error:
            self.out.put(error)
            self.stop()
        finally:
            self.go(1)

    def go(self, threads: int) -> None:
        """So many threads have gone, or never came."""
        with self._changed:
            self.running -= threads
            last = self.running == 0
        if last:
            self._bases.clear()
            self.out.put(None)

    def stop(self) -> None:
        """Ends all answers."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()
        for generation in self.generations:
            if generation is not None:
                generation.close()

    def _take(self) -> int | None:
        with self._changed:
            if not self._waiting:
                return None
            self._active += 1
            return self._waiting.pop()

    def _give_back(self, index: int, *, again: bool) -> None:
        with self._changed:
            self._active -= 1
            self._ended += not again
            self._changed.notify_all()
            if again and not self._stopped:
                self._waiting.append(index)
                ended = self._ended
                # Until one of those that have the memory has ended.
                self._changed.wait_for(
                    lambda: self._stopped or self._ended > ended or self._active == 0
                )

    def _answer(self, index: int) -> bool:
        """Generates one answer; whether it must begin again, as the memory is others'."""
        try:
            generation = self._begin(index)
            with self._changed:
                if self._stopped:
                    generation.close()
                self.generations[index] = generation
            for i, chunk in enumerate(generation):
                if i >= self._told[index]:
                    self.out.put((index, chunk))
                    self._told[index] += 1
            if generation.finish_reason != "cancelled":
                self.out.put((index, None))
        except BudgetError:
            with self._changed:
                alone = self._active == 1 and not self._bases
                self._bases.clear()
            if alone:
                raise
            return True
        return False

    def _begin(self, index: int) -> Generation:
        prompt, sample = self._prompts[index // self._n], index % self._n
        options = self._options
        if options.seed is None:
            # The same where it begins again.
            before = self.generations[index]
            seed = None if before is None else before.seed
            options = replace(options, seed=seed)
        elif self._n > 1:
            options = replace(options, seed=options.seed + sample)
        if self._n == 1:
            return _ask(self._model.session(), prompt, options)
        with self._base_locks[index // self._n]:
            base = self._bases.get(index // self._n)
            if base is None:
                base = self._model.session()
                _ask(base, prompt, replace(options, max_tokens=0)).read()
                self._bases[index // self._n] = base
            if sample == self._n - 1:
                self._bases.pop(index // self._n, None)
            session = base.fork()
        return _ask(session, prompt, options)


def _ask(session: Session, prompt: Any, options: GenerationOptions) -> Generation:
    """A string or tokens are continued, messages answered."""
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping):
        return session.chat(prompt, options=options)
    return session.generate("" if session.tokens else prompt, options=options)
