"""Ways to leave a generation: what it held is free at once, without a garbage collection.

Each way is tried after some steps of generate, chat and a session's chat, on a model in memory, a
mixture whose experts are on flash, and one whose weights are streamed: the latter two in budgets
that hold one sequence of the full context, so that a second long one that is still alive is a
BudgetError.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stoker
from offload_models import MEBIBYTE, TinyMixture, named_minimum
from stoker.runtime.generate import Generation

STREAMED = {"n_embd": 256, "n_ff": 1024}
CONTEXT = 4096  # tokens; there is room for one KV cache of this size
STEPS = (0, 1, 2, 5)
PROMPT = "the cat sat on the mat"
LONG_PROMPT = " ".join([PROMPT] * 380)  # of more than half of the context


class Left(Exception):
    pass


def steps(generation: Generation, n: int) -> None:
    for _ in range(n):
        next(generation, None)


# The ways to leave: each gets the only reference to a generation, in a list of one.


def by_break(held: list[Generation], n: int) -> None:
    for i, _ in enumerate(held.pop()):
        if i >= n:
            break


def by_never_reading(held: list[Generation], n: int) -> None:
    held.pop()


def by_del(held: list[Generation], n: int) -> None:
    generation = held.pop()
    steps(generation, n)
    del generation


def by_close(held: list[Generation], n: int) -> None:
    steps(held[0], n)
    held[0].close()  # the list still refers to it


def by_with(held: list[Generation], n: int) -> None:
    with held[0] as generation:
        steps(generation, n)


def by_cancel(held: list[Generation], n: int) -> None:
    steps(held[0], n)
    held[0].cancel()
    assert held[0].read() is not None
    assert held[0].finish_reason in ("cancelled", "stop")


def by_an_exception(held: list[Generation], n: int) -> None:
    with contextlib.suppress(Left):
        for i, _ in enumerate(held.pop()):
            if i >= n:
                raise Left


def by_an_exception_in_a_with(held: list[Generation], n: int) -> None:
    with contextlib.suppress(Left), held[0] as generation:
        steps(generation, n)
        raise Left


def by_an_error_of_the_step(held: list[Generation], n: int) -> None:
    steps(held[0], n)
    session = held[0]._session
    if session is None:
        return
    held[0]._steps = None  # the next step begins anew and fails
    held[0]._target = [1] * (session.context + 1)
    del session
    try:
        next(held[0])
    except stoker.ContextLengthError as error:
        assert error.__traceback__ is not None  # its frames are still alive
        assert held[0].finish_reason == "error"
    else:
        raise AssertionError("a prompt longer than the context")


def by_a_wrapper_that_is_closed(held: list[Generation], n: int) -> None:
    def texts(generation: Generation) -> Iterator[str]:
        for chunk in generation:
            yield chunk.text

    wrapped = texts(held.pop())
    for _ in range(n):
        next(wrapped, None)
    wrapped.close()


def by_a_slice(held: list[Generation], n: int) -> None:
    assert len(list(itertools.islice(held.pop(), n))) <= n


def by_zip(held: list[Generation], n: int) -> None:
    for _ in zip(range(n), held.pop(), strict=False):
        pass


def by_the_end(held: list[Generation], n: int) -> None:
    held[0].read()
    assert held[0].finish_reason in ("stop", "length")


def by_the_death_of_its_thread(held: list[Generation], n: int) -> None:
    def work(mine: list[Generation]) -> None:
        generation = mine.pop()
        steps(generation, n)

    thread = threading.Thread(target=work, args=(held,))
    thread.start()
    thread.join()


def by_another_thread_that_cancels(held: list[Generation], n: int) -> None:
    steps(held[0], n)
    reader = threading.Thread(target=held[0].read)
    reader.start()
    held[0].cancel()
    reader.join()
    assert held[0].finish_reason is not None


def by_a_timer_that_closes(held: list[Generation], n: int) -> None:
    steps(held[0], n)
    closer = threading.Thread(target=held[0].close)
    closer.start()
    held[0].read()
    closer.join()


def by_a_cancelled_task(held: list[Generation], n: int) -> None:
    """The executor's thread runs to the end of its step after the task is gone."""

    async def read(generation: Generation, begun: asyncio.Event) -> None:
        await asyncio.to_thread(steps, generation, n)
        begun.set()
        while await asyncio.to_thread(next, generation, None) is not None:
            pass

    async def cancelled() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(read(held.pop(), begun))
        await begun.wait()
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


WAYS: list[Callable[[list[Generation], int], None]] = [
    value for name, value in sorted(globals().items()) if name.startswith("by_")
]


def as_generate(model: stoker.Model, prompt: str = PROMPT) -> Generation:
    return model.generate(prompt, temperature=0, max_tokens=8, ignore_eos=True)


def as_chat(model: stoker.Model, prompt: str = PROMPT) -> Generation:
    return model.chat(prompt, temperature=0, max_tokens=8, ignore_eos=True)


def as_session(model: stoker.Model) -> Generation:
    return model.session().chat(PROMPT, temperature=0, max_tokens=8, ignore_eos=True)


CALLS: list[Callable[[stoker.Model], Generation]] = [as_generate, as_chat, as_session]


def load(kind: str, folder: Path) -> stoker.Model:
    """A model of a kind; unless resident, in a budget with room for one sequence."""
    if kind == "resident":
        what = TinyMixture("llama", overrides={"context": CONTEXT})
        return stoker.load(what.write(folder), threads=2)
    what = TinyMixture("mixtral", overrides={"context": CONTEXT})
    if kind == "streamed":
        what = TinyMixture("llama", overrides={**STREAMED, "context": CONTEXT})
    path = what.write(folder)
    with pytest.raises(stoker.BudgetError) as refused:
        stoker.load(path, threads=2, memory=1)
    return stoker.load(path, threads=2, memory=named_minimum(refused.value) + MEBIBYTE // 4)


@pytest.fixture(scope="module", params=["resident", "offloaded", "streamed"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    loaded = load(request.param, tmp_path_factory.mktemp(request.param))
    assert (loaded.offload is not None) == (request.param == "offloaded")
    assert (loaded.stream is not None) == (request.param == "streamed")
    return loaded


def test_one_sequence_fills_the_budget(model: stoker.Model) -> None:
    if model.engine.survives_fork:
        pytest.skip("everything is in memory: there is no budget")
    kept, other = model.session(), model.session()
    kept.append(LONG_PROMPT)
    assert kept.context / 2 < kept.position < kept.context
    with pytest.raises(stoker.BudgetError):
        other.append(LONG_PROMPT)
    assert kept.logits().shape == (model.n_vocab,)
    del kept
    other.append(LONG_PROMPT)


def test_there_are_two_hundred_ways() -> None:
    assert len(WAYS) * len(STEPS) * len(CALLS) >= 200


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_is_left_is_free_at_once(
    model: stoker.Model, way: Callable[[list[Generation], int], None]
) -> None:
    expected = as_generate(model).read()
    before = model.engine.sessions
    assert before == (1, 0)  # one sequence kept for the next generate, no bytes lent by the cache
    gc.disable()
    try:
        for n, call in itertools.product(STEPS, CALLS):
            held = [call(model)]
            way(held, n)
            assert as_generate(model).read() == expected, (n, call.__name__)
            del held
            assert model.engine.sessions == before, (n, call.__name__)
    finally:
        gc.enable()


def test_a_partial_answer_is_remembered(model: stoker.Model) -> None:
    session = model.session()
    for chunk in session.chat("hello", temperature=0, ignore_eos=True, max_tokens=8):
        if chunk.text:
            break
    assert [m["role"] for m in session.messages] == ["user", "assistant"]
    assert session.messages[1]["content"].startswith(chunk.text)
    session.generate("unread", max_tokens=8)
    assert len(session.messages) == 2


def test_a_model_goes_with_its_last_reference(tmp_path: Path) -> None:
    gc.disable()
    try:
        for kind in ("resident", "offloaded", "streamed"):
            model = load(kind, tmp_path / kind)
            as_chat(model).read()
            for _ in as_generate(model):
                break
            engine, gone = model.engine, weakref.ref(model)
            del model
            assert gone() is None and engine.sessions == (0, 0), kind
            assert sys.getrefcount(engine) == 2, kind
    finally:
        gc.enable()


def test_an_answer_that_ended_tells_its_figures(model: stoker.Model) -> None:
    generation = as_generate(model)
    text = generation.read()
    stats = generation.stats
    as_chat(model).read()
    assert generation.stats == stats and generation.text == text
    assert stats.new_tokens == 8 and stats.prompt_tokens > 1
    generation.close()
    generation.cancel()
    assert list(generation) == []


@pytest.mark.parametrize("call", [as_generate, as_chat])
def test_a_variable_gets_its_next_answer(
    model: stoker.Model, call: Callable[[stoker.Model], Generation], caplog: Any
) -> None:
    expected = call(model, LONG_PROMPT).read()
    full = not model.engine.survives_fork  # its memory
    ended = 0
    for n in STEPS:
        last = answer = call(model, LONG_PROMPT)
        steps(answer, n)
        answer = call(model, LONG_PROMPT)  # during the call the variable still has the last one
        assert answer.read() == expected
        ended += last.finish_reason == "cancelled"
        assert caplog.text.count("an unfinished answer was ended") == ended
        del last, answer
    assert ended >= (len(STEPS) - 1 if full else 0) and (full or not ended)
    # Another thread's answer is not ended.
    if full:
        theirs: list[Generation] = []
        made, done = threading.Event(), threading.Event()

        def work() -> None:
            theirs.append(call(model, LONG_PROMPT))
            next(theirs[0])
            made.set()
            done.wait(60)

        thread = threading.Thread(target=work)
        thread.start()
        assert made.wait(60)
        with pytest.raises(stoker.BudgetError):
            call(model, LONG_PROMPT).read()
        done.set()
        thread.join()
        theirs[0].read()
        assert theirs.pop().text == expected


def test_a_late_cancel_is_not_the_next_calls(model: stoker.Model) -> None:
    for _ in range(20):
        generation = as_generate(model)
        next(generation)
        session = generation._session
        assert session is not None
        session._sequence.cancel()  # after the last look of the step
        generation.close()
        del session
        assert model.logits([1, 2, 3]).shape == (3, model.n_vocab)


def test_a_failed_call_keeps_what_was_evaluated(model: stoker.Model) -> None:
    as_chat(model).read()
    with pytest.raises(stoker.OptionError):
        model.chat(PROMPT, temperature=-1)
    again = as_chat(model)
    again.read()
    assert again.stats.reused_tokens > 0
