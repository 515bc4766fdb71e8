"""What goes wrong with a disk or a file under a running model gives a clear error or right tokens:
never a wrong token, a hang or a leak."""

from __future__ import annotations

import gc
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offload_models import CONTEXT, MIXTURES, Model, consistent, engine, greedy, prompt, run
from stoker.runtime import _core
from stoker.runtime.base import errors

SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "") or "tsan" in os.environ.get("LD_PRELOAD", "")


@pytest.fixture(scope="module", params=["mixtral", "smallthinker"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(MIXTURES[request.param].write(tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(MIXTURES["mixtral"].write(tmp_path_factory.mktemp("alone")))


def opened(model: Model, share: float, script: str, **options: Any) -> Iterator[_core.Engine]:
    """Engines with `script` and seeds 0, 1, ...: those whose load nothing broke."""
    for seed in range(1000):
        try:
            yield model.offloaded(share, io=f"null:{script},seed={seed}", **options)
        except errors.DeviceError as error:
            check_message(model, error)


def check_message(model: Model, error: BaseException) -> None:
    text = str(error)
    assert text.startswith(f"{model.path}: offset "), text
    assert ": expected " in text and " bytes, found " in text, text
    assert "\n" not in text


def persevere(
    model: Model, t: _core.Sequence, tokens: np.ndarray, pieces: int
) -> tuple[bytes, int]:
    """Logits of the last token of each piece, however often a piece must be tried; and failures."""
    logits, failures = [], 0
    for piece in np.array_split(tokens, pieces):
        end = t.position + len(piece)
        while t.position < end:
            try:
                t.eval(piece[len(piece) - (end - t.position) :])
            except errors.DeviceError as error:
                failures += 1
                assert failures < 5000
                check_message(model, error)
        logits.append(t.logits().tobytes())
    return b"".join(logits), failures


@pytest.mark.parametrize("fault", ["eio=0.02", "short=0.02", "eio=0.01,short=0.01"])
@pytest.mark.parametrize("prefetch", ["off", "on"])
def test_failing_reads_never_change_a_token(model: Model, fault: str, prefetch: str) -> None:
    tokens = prompt(model.resident, n=100)
    expected = [persevere(model, model.resident.sequence(), tokens, n)[0] for n in (4, 50)]
    failures = passed = 0
    for share in (0.0, 0.4):
        script = f"{fault},delay=0..0.2ms,reorder"
        engines = opened(model, share, script, prefetch=prefetch)
        for _ in range(4):
            e = next(engines)
            for i, pieces in enumerate((4, 50)):
                found, failed = persevere(model, e.sequence(), tokens, pieces)
                assert found == expected[i]
                failures += failed
                passed += 1
            consistent(e.offload, interrupted=True)
    assert failures > passed


def test_a_prefetch_that_fails_as_its_layer_comes(model: Model) -> None:
    # Long prompts, a cache of a third, many failures: a prefetch sometimes fails between the moment
    # when the store books ended reads and the one when it hands out what is in the cache.
    tokens = prompt(model.resident, n=150)
    expected = model.resident.sequence()
    expected.eval(tokens)
    script = "eio=0.03,delay=0..0.4ms"
    engines = opened(model, 0.3, script, prefetch="on", policy="reuse")
    passed = 0
    deadline = time.monotonic() + 4
    for e in engines:
        t = e.sequence()
        for _ in range(20):
            t.truncate(0)
            try:
                t.eval(tokens)
            except errors.DeviceError:
                continue
            passed += 1
            np.testing.assert_array_equal(t.logits(), expected.logits())
        if passed > 0 and time.monotonic() > deadline:
            break
    assert passed > 0


def test_every_single_read_may_fail(mixtral: Model) -> None:
    # The load's reads and those of a prompt, one after the other.
    tokens = prompt(mixtral.resident, n=8)
    expected = mixtral.resident.sequence()
    expected.eval(tokens)
    at_load = in_prompt = 0
    for n in range(1, 500):
        try:
            e = mixtral.offloaded(0.0, io=f"null:fail={n}", readers=1, prefetch="off")
        except errors.DeviceError as error:
            check_message(mixtral, error)
            assert "Input/output error" in str(error)
            at_load += 1
            continue
        t = e.sequence()
        failed = False
        try:
            t.eval(tokens)
        except errors.DeviceError as error:
            check_message(mixtral, error)
            assert "Input/output error" in str(error)
            failed = True
            assert t.position == 0
            t.eval(tokens)
        np.testing.assert_array_equal(t.logits(), expected.logits())
        if not failed:
            break
        in_prompt += 1
    assert at_load > 0
    assert in_prompt > 10


# --- the file -------------------------------------------------------------------------------------


@pytest.fixture
def copied(mixtral: Model, tmp_path: Path) -> Path:
    """A file of this test's own."""
    path = Path(shutil.copy(mixtral.path, tmp_path / "model.gguf"))
    # So old that a change shows, also where the file system's clock is coarse.
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


BACKENDS = ["pread_pool", "uring", "mmap", "null"]


def open_copy(mixtral: Model, path: Path, io: str, share: float = 0.0) -> _core.Engine:
    try:
        return engine(path, mixtral.budgets.part(share), io=io)
    except errors.OptionError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("io", BACKENDS)
@pytest.mark.parametrize("cut", [1, 4096, 0.5, 1.0])
def test_truncated_in_place(mixtral: Model, copied: Path, io: str, cut: float) -> None:
    e = open_copy(mixtral, copied, io)
    t = e.sequence()
    tokens = prompt(e)
    t.eval(tokens[:30])
    size = copied.stat().st_size
    os.truncate(copied, size - int(cut if isinstance(cut, int) else cut * size))
    for _ in range(3):
        with pytest.raises(errors.DeviceError, match=r"model\.gguf: .*changed while the model"):
            t.eval(tokens[30:])
    assert t.position == 30


@pytest.mark.parametrize("io", BACKENDS)
def test_replaced_in_place(mixtral: Model, copied: Path, io: str) -> None:
    e = open_copy(mixtral, copied, io)
    t = e.sequence()
    tokens = prompt(e)
    t.eval(tokens[:30])
    content = bytearray(copied.read_bytes())
    content[-100000:] = b"\x3f" * 100000
    copied.write_bytes(content)
    with pytest.raises(errors.DeviceError, match=r"model\.gguf: .*changed while the model runs"):
        t.eval(tokens[30:])


@pytest.mark.parametrize("io", BACKENDS)
def test_a_few_bytes_overwritten(mixtral: Model, copied: Path, io: str) -> None:
    e = open_copy(mixtral, copied, io)
    t = e.sequence()
    tokens = prompt(e)
    t.eval(tokens[:30])
    with copied.open("r+b") as file:
        file.seek(-50000, os.SEEK_END)
        file.write(b"\x00" * 16)
    with pytest.raises(errors.DeviceError, match="changed while the model runs"):
        t.eval(tokens[30:])


@pytest.mark.parametrize("io", BACKENDS)
def test_another_file_at_the_path(mixtral: Model, copied: Path, io: str) -> None:
    # The open file goes on: an update by rename does not disturb a session.
    e = open_copy(mixtral, copied, io)
    other = copied.with_name("other")
    other.write_bytes(b"another")
    t = e.sequence()
    tokens = prompt(e)
    parts = [t.eval_all(tokens[:30])]
    other.replace(copied)
    parts.append(t.eval_all(tokens[30:]))
    assert np.concatenate(parts).tobytes() == mixtral.resident.sequence().eval_all(tokens).tobytes()
    with pytest.raises(errors.ModelFileError):
        engine(copied, mixtral.budgets.whole)


def test_removed(mixtral: Model, copied: Path) -> None:
    e = open_copy(mixtral, copied, "pread_pool")
    copied.unlink()
    assert run(e) == mixtral.expected()


def test_truncated_during_a_slow_prompt(mixtral: Model, copied: Path) -> None:
    e = open_copy(mixtral, copied, "null:delay=2..4ms")
    size = copied.stat().st_size
    timer = threading.Timer(0.03, os.truncate, (copied, size // 3))
    t = e.sequence()
    timer.start()
    # Prompts until it happens, which is in the first where nothing holds the timer up.
    with pytest.raises(errors.DeviceError, match="changed while the model runs"):
        for _ in range(1000):
            t.truncate(0)
            t.eval(prompt(e))
    timer.join()


# --- waiting --------------------------------------------------------------------------------------


def slow(mixtral: Model, **options: Any) -> _core.Engine:
    """Of the reads of a prompt, some take two seconds."""
    return next(opened(mixtral, 0.0, "spike=2000ms@0.05", **options))


def interrupted(work: Any, how: Any, error: Any) -> float:
    """Seconds from calling `how`, 0.1 s after the start of `work`, until that ends with `error`.

    Infinity where the work ended before.
    """
    asked: list[float] = []

    def ask() -> None:
        asked.append(time.monotonic())
        how()

    timer = threading.Timer(0.1, ask)
    timer.start()
    try:
        work()
    except error:
        ended = time.monotonic()
        timer.cancel()  # where an earlier one that came too late has ended it
        timer.join()
        return ended - asked[0] if asked else math.inf
    with suppress(error):
        timer.join()
        time.sleep(0.01)  # a signal comes when this thread runs next
    return math.inf


def prompt_ends(work: Any, how: Any, error: Any) -> None:
    """Asserts that `work` can be interrupted promptly, whatever else the machine has to do."""
    took: list[float] = []
    while min(took, default=math.inf) >= PROMPTLY:
        assert len(took) < 10, took
        took.append(interrupted(work, how, error))


def goes_on(mixtral: Model, t: _core.Sequence, tokens: np.ndarray) -> None:
    t.eval(tokens[t.position :])
    expected = mixtral.resident.sequence()
    expected.eval(tokens)
    np.testing.assert_array_equal(t.logits(), expected.logits())


# Seconds; the best of ten: a machine that stalls for a moment is no failure.
PROMPTLY = 1.5 if SANITIZED else 0.25


def slow_prompt(t: _core.Sequence, tokens: np.ndarray) -> Any:
    def work() -> None:
        t.truncate(0)
        t.eval(tokens)

    return work


def test_a_spike_of_two_seconds_can_be_cancelled(mixtral: Model) -> None:
    t = slow(mixtral, prefetch="on").sequence()
    tokens = prompt(mixtral.resident, n=12)
    prompt_ends(slow_prompt(t, tokens), t.cancel, errors.Cancelled)
    goes_on(mixtral, t, tokens)


@pytest.mark.skipif(sys.platform == "win32", reason="no pthread_kill")
def test_control_c_in_a_spike(mixtral: Model) -> None:
    t = slow(mixtral).sequence()
    tokens = prompt(mixtral.resident, n=12)
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        signal.pthread_kill(main, signal.SIGINT)

    prompt_ends(slow_prompt(t, tokens), interrupt, KeyboardInterrupt)
    goes_on(mixtral, t, tokens)


@pytest.mark.skipif(sys.platform == "win32", reason="no pthread_kill")
def test_control_c_while_loading(mixtral: Model) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        signal.pthread_kill(main, signal.SIGINT)

    memory = mixtral.budgets.least
    prompt_ends(
        lambda: engine(mixtral.path, memory, io="null:delay=50ms", readers=1),
        interrupt,
        KeyboardInterrupt,
    )
    assert run(mixtral.offloaded(0.0)) == mixtral.expected()


def test_hundreds_of_cancelled_prefetches(mixtral: Model) -> None:
    # One reader that is slower than the forward pass: guesses pile up and go stale. (Ten
    # thousand, without the arithmetic of a model, in tests/native/flash_experts_test.cc.)
    tokens = prompt(mixtral.resident, n=CONTEXT)
    expected = mixtral.resident.sequence()
    expected.eval(tokens)
    e = mixtral.offloaded(0.5, io="null:delay=0.3ms,reorder", readers=1, prefetch="on")
    t = e.sequence()
    for _ in range(50):  # about 24 each
        if e.offload["cancelled"] >= 100:
            break
        t.truncate(0)
        for piece in np.array_split(tokens, 48):
            t.eval(piece)
        np.testing.assert_array_equal(t.logits(), expected.logits())
    assert e.offload["cancelled"] >= 100
    consistent(e.offload)


# --- sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_eight_threads_with_a_session_each(model: Model, share: float) -> None:
    # Further sessions take their KV caches out of the expert cache.
    # A larger budget has a larger prompt chunk as well.
    room = 20 * model.resident.plan["kv_bytes"]
    memory = model.budgets.part(share) + room
    e = engine(model.path, memory, io="null:delay=0..0.2ms,reorder,seed=8", prefetch="on")
    found: list[bytes | BaseException | None] = [None] * 8

    def work(i: int) -> None:
        try:
            t = e.sequence()
            for _ in range(2):
                t.truncate(0)
                found[i] = greedy(t, prompt(e, seed=i % 4), 12, pieces=1 + i % 3)
        except BaseException as error:  # reported below
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        assert found[i] == model.expected(seed=i % 4, decode=12), found[i]
    consistent(e.offload)


def test_eight_threads_of_which_some_fail_and_some_are_cancelled(mixtral: Model) -> None:
    room = 20 * mixtral.resident.plan["kv_bytes"]
    memory = mixtral.budgets.part(0.2) + room
    for seed in range(200):
        try:
            script = f"null:eio=0.01,delay=0..0.2ms,reorder,seed={seed}"
            e = engine(mixtral.path, memory, io=script, prefetch="on")
            break
        except errors.DeviceError:
            continue
    tokens = [prompt(e, seed=i, n=60) for i in range(8)]
    expected = []
    for i in range(8):
        t = mixtral.resident.sequence()
        t.eval(tokens[i])
        expected.append(t.logits())
    sequences = [e.sequence() for _ in range(8)]
    wrong: list[Any] = []
    ends = [0] * 8

    def work(i: int) -> None:
        t = sequences[i]
        for _ in range(300):
            try:
                if t.position == 60:
                    t.truncate(0)
                t.eval(tokens[i][t.position : t.position + 20])
            except (errors.DeviceError, errors.Cancelled):
                continue
            except BaseException as error:
                wrong.append(error)
                return
            if t.position == 60:
                ends[i] += 1
                if not np.array_equal(t.logits(), expected[i]):
                    wrong.append(i)
                if ends[i] == 3:
                    return

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for t in sequences[::2]:
            t.cancel()
        time.sleep(0.01)
    assert not wrong
    assert sum(ends) >= 4


def test_more_sessions_than_the_budget_holds(mixtral: Model) -> None:
    e = mixtral.offloaded(0.5)
    tokens = prompt(e)
    expected = mixtral.resident.sequence()
    expected.eval(tokens)

    def fill() -> list[_core.Sequence]:
        kept = []
        with pytest.raises(errors.BudgetError, match="sessions"):
            for _ in range(1000):
                kept.append(e.sequence())
                kept[-1].eval(tokens)
                np.testing.assert_array_equal(kept[-1].logits(), expected.logits())
        assert kept[-1].position == 0
        return kept

    count = len(fill())
    assert count > 2
    gc.collect()
    assert len(fill()) == count  # as many again once they have gone


# --- leaks ----------------------------------------------------------------------------------------


def resources() -> tuple[int, int, int]:
    """Resident bytes, threads and descriptors of this process."""
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    fds = len(os.listdir("/proc/self/fd"))
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["Threads"]), fds


def open_and_run(model: Model, io: str) -> None:
    e = model.offloaded(0.3, io=io)
    run(e, decode=2)


def open_and_fail(model: Model, io: str) -> None:
    for n in (1, 5, 40, 60):
        try:
            e = model.offloaded(0.0, io=f"null:fail={n}")
            t = e.sequence()
            t.eval(prompt(e))
        except errors.DeviceError:
            pass
    for option in ({"policy": "no"}, {"predictor": "no"}, {"readers": 0}, {"io": "null:no"}):
        with pytest.raises(errors.OptionError):
            model.offloaded(0.0, **option)
    with pytest.raises(errors.BudgetError):
        engine(model.path, model.budgets.least - 1)


def open_and_cancel(model: Model, io: str) -> None:
    e = model.offloaded(0.3, io="null:delay=1ms")
    t = e.sequence()
    t.cancel()
    with pytest.raises(errors.Cancelled):
        t.eval(prompt(e))
    timer = threading.Timer(0.004, t.cancel)
    timer.start()
    with suppress(errors.Cancelled):
        t.eval(prompt(e))
    timer.join()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("cycle", "io"),
    [
        (open_and_run, "pread_pool"),
        (open_and_run, "uring"),
        (open_and_run, "mmap"),
        (open_and_fail, ""),
        (open_and_cancel, ""),
    ],
)
def test_nothing_leaks(mixtral: Model, cycle: Any, io: str) -> None:
    try:
        for _ in range(6):
            cycle(mixtral, io)
    except errors.OptionError as error:
        pytest.skip(str(error))
    rss, threads, fds = resources()
    n = 25
    for _ in range(n):
        cycle(mixtral, io)
    # A thread that was joined is counted until the kernel is done with it.
    for _ in range(1000):
        more_rss, more_threads, more_fds = resources()
        if more_threads <= threads:
            break
        time.sleep(0.01)
    assert more_threads <= threads
    assert more_fds <= fds
    # An engine holds a megabyte and more: half of one a cycle would be found.
    if not SANITIZED:
        assert more_rss - rss < n * 100_000, (more_rss - rss) / n
