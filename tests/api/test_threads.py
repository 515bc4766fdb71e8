"""One engine used by several Python threads at once; cancelling; signals."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from stoker.runtime import _core
from stoker.runtime.base import errors
from tiny_models import make

TOKENS = np.arange(1, 65, dtype=np.int32)


@pytest.fixture(scope="module", params=["llama", "qwen2moe"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    path = make(tmp_path_factory.mktemp("threads") / "model.gguf", request.param)
    return _core.Engine(_core.GgufFile(str(path)), threads=2)


def greedy(engine: _core.Engine, n: int) -> list[int]:
    sequence = engine.sequence()
    sampler = _core.Sampler(engine.config["n_vocab"])
    sequence.eval(TOKENS[:n])
    return [sequence.step(sampler) for _ in range(24)]


def test_eight_threads_give_what_one_gives(engine: _core.Engine) -> None:
    alone = [greedy(engine, 8 + i) for i in range(8)]
    together: list[list[int] | None] = [None] * 8

    def run(i: int) -> None:
        for _ in range(3):
            together[i] = greedy(engine, 8 + i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert together == alone


def test_cancel_from_another_thread(engine: _core.Engine) -> None:
    sequence = engine.sequence()
    sequence.eval(TOKENS[:4])
    sequence.cancel()
    with pytest.raises(errors.Cancelled):
        sequence.eval(TOKENS[4:8])
    assert sequence.position == 4
    sequence.eval(TOKENS[4:8])
    expected = engine.sequence()
    expected.eval(TOKENS[:8])
    np.testing.assert_array_equal(sequence.logits(), expected.logits())


def test_a_timeline_serves_one_thread_at_a_time(engine: _core.Engine) -> None:
    sequence = engine.sequence()
    found: list[BaseException] = []
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            try:
                sequence.eval(TOKENS[:2])
                sequence.truncate(0)
            except errors.OptionError as e:
                found.append(e)
                stop.set()

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for t in threads:
        t.start()
    stop.wait(120)
    stop.set()
    for t in threads:
        t.join()
    assert any("another thread" in str(e) for e in found)


def test_reproducible_for_any_number_of_threads(tmp_path: Path) -> None:
    path = make(tmp_path / "model.gguf", "qwen3moe", quant="Q8_0")
    logits = []
    for threads in (1, 2, 3, 5):
        sequence = _core.Engine(_core.GgufFile(str(path)), threads=threads).sequence()
        logits.append(sequence.eval_all(TOKENS))
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])


def test_a_sampler_for_another_vocabulary_is_refused(engine: _core.Engine) -> None:
    sequence = engine.sequence()
    sequence.eval(TOKENS[:2])
    with pytest.raises(errors.OptionError, match="sampler"):
        sequence.sample(_core.Sampler(engine.config["n_vocab"] + 1))
