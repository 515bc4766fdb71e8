"""The process around a model: forks, copies, the interpreter's end."""

from __future__ import annotations

import multiprocessing
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import stoker
from offload_models import MEBIBYTE, named_minimum

posix = pytest.mark.skipif(sys.platform == "win32", reason="forks, groups and streams of POSIX")
PROMPT = "the cat sat"


def load(path: Path, budget: bool) -> stoker.Model:
    """The model in memory, or in a budget with experts on flash."""
    if not budget:
        return stoker.load(path, threads=2)
    with pytest.raises(stoker.BudgetError) as refused:
        stoker.load(path, threads=2, memory=1)
    return stoker.load(path, threads=2, memory=named_minimum(refused.value) + MEBIBYTE)


def answer(model: stoker.Model) -> str:
    return model.generate(PROMPT, temperature=0, max_tokens=8).read()


# Forks.

_INHERITED: list[stoker.Model] = []  # models that a forked child inherits


def _child(how: str, path: Path, results: Any) -> None:
    try:
        model = stoker.load(path, threads=2) if how == "own" else _INHERITED[0]
        results.put(("answer", answer(model)))
    except stoker.StokerError as error:
        results.put((type(error).__name__, str(error)))


def in_child(start: str, how: str, path: Path) -> tuple[str, str]:
    """Result of a child process: ("answer", text) or (an error's name, its message)."""
    context = multiprocessing.get_context(start)
    results = context.Queue()
    child = context.Process(target=_child, args=(how, path, results))
    child.start()
    try:
        said: tuple[str, str] = results.get(timeout=120)
        child.join(timeout=120)
        assert child.exitcode == 0  # it ends whether or not its parent has threads
        return said
    except queue.Empty:
        raise AssertionError(f"{start}, {how}: the child says nothing") from None
    finally:
        child.kill()
        child.join()


@contextmanager
def generating(model: stoker.Model) -> Iterator[None]:
    """Context in which another thread is in the middle of long generations."""
    stop, begun = threading.Event(), threading.Event()

    def work() -> None:
        session = model.session() if model.engine.survives_fork else None
        while not stop.is_set():
            begin = session.generate if session is not None else model.generate
            for _ in begin(PROMPT, temperature=0, max_tokens=400, ignore_eos=True):
                begun.set()
                if stop.is_set():
                    break
            if session is not None:
                session.reset()

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    try:
        yield
    finally:
        stop.set()
        thread.join()


@posix
@pytest.mark.parametrize("budget", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("when", ["before", "after", "during"])
@pytest.mark.parametrize("start", ["fork", "forkserver", "spawn"])
def test_fork(tiny: Path, mixture: Path, start: str, when: str, budget: bool) -> None:
    path = mixture if budget else tiny
    expected = answer(stoker.load(path, threads=2))
    how = "inherited" if start == "fork" and when != "before" else "own"
    if when == "before":
        assert in_child(start, how, path) == ("answer", expected)
        return
    model = load(path, budget)
    _INHERITED[:] = [model]
    try:
        assert answer(model) == expected
        if when == "after":
            found = in_child(start, how, path)
        else:
            with generating(model):
                found = in_child(start, how, path)
        assert answer(model) == expected  # the parent goes on
    finally:
        _INHERITED.clear()
    if how == "own" or (when == "after" and not budget):
        assert found == ("answer", expected)
    elif found[0] != "answer" or budget:  # caught between two evaluations, a child may succeed
        assert found[0] == "OptionError" and "was loaded before this process was forked" in found[1]
        assert "load" in found[1]
    else:
        assert found[1] == expected


@posix
def test_a_forked_child_exits_and_loads_anew(mixture: Path) -> None:
    model = load(mixture, True)
    expected = answer(model)
    child = os.fork()
    if child == 0:  # pragma: no cover (another process)
        code = 1
        try:
            try:
                answer(model)
            except stoker.OptionError:
                del model  # must not wait for threads that do not exist here
                code = 0 if answer(load(mixture, True)) == expected else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, 9)
            raise AssertionError("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status) == 0
    assert answer(model) == expected


def test_a_model_is_not_sent_to_another_process(tiny: Path) -> None:
    import copy
    import pickle

    model = stoker.load(tiny)
    answer = model.generate(PROMPT, max_tokens=4)
    next(answer)
    for send in (pickle.dumps, copy.copy, copy.deepcopy):
        for what in (model, model.session(), answer):
            with pytest.raises(stoker.OptionError, match="cannot be copied or sent"):
                send(what)


def test_options_are_sent_to_another_process() -> None:
    import copy
    import dataclasses
    import pickle

    for options in (
        stoker.GenerationOptions(logit_bias={3: -1.5}, stop=["x"], seed=2),
        stoker.LoadOptions(threads=2, memory="2GiB"),
    ):
        assert pickle.loads(pickle.dumps(options)) == copy.deepcopy(options) == options
        assert type(options)(**dataclasses.asdict(options)) == options
    frozen: Any = stoker.GenerationOptions(logit_bias={3: -1.5}).logit_bias
    with pytest.raises(TypeError):
        frozen[3] = 1.0
    with pytest.raises(TypeError):
        frozen.update({4: 1.0})


# The interpreter's end.

_DAEMON = """
import sys, threading, time, stoker
model = stoker.load(sys.argv[1], threads=2)
started = threading.Event()
def work():
    while True:
        {work}
        started.set()
threading.Thread(target=work, daemon=True).start()
assert started.wait(60)
time.sleep({pause})
"""


@pytest.mark.parametrize("pause", [0, 0.01, 0.05])
@pytest.mark.parametrize(
    "work",
    [
        "for c in model.generate('a', max_tokens=300, ignore_eos=True): started.set()",
        "model.logits([1] * 500)",
        "stoker.load(sys.argv[1])",
        "model.session()",
    ],
    ids=["generate", "logits", "load", "session"],
)
def test_exit_while_a_daemon_thread_works(tiny: Path, work: str, pause: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DAEMON.format(work=work, pause=pause), str(tiny)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_handler_at_exit_may_still_generate(tiny: Path) -> None:
    """The handler is registered before the core's own, and so called after it."""
    code = (
        "import atexit, sys\n"
        "held = []\n"
        "atexit.register(lambda: print(held[0].generate('a', max_tokens=3, seed=1).read()))\n"
        "import stoker\n"
        "held.append(stoker.load(sys.argv[1], threads=2))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() and done.stderr == ""
