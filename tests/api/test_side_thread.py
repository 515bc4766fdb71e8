"""If the system refuses threads, the same files are made without them, or an error says so."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import Terminal
from control_groups import group, inside, joining
from stoker.export import quantize
from stoker.export.writer import gguf_writer, model_writer
from stoker.mobile_bench.run.worker_process import WorkerProcess
from stoker.runtime.base.errors import DeviceError
from stoker.runtime.base.side_thread import SideThread
from tiny_models import WIDE, make


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("base") / "base.gguf", "llama", quant="F16", **WIDE)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The quantized file made with all threads."""
    made = quantize.quantize(base, tmp_path_factory.mktemp("whole") / "out.gguf", type="Q4_K_M")
    return made.path.read_bytes()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Makes starts of Python threads fail, as if the system had none left; yields their names."""
    names: list[str] = []

    def start(thread: threading.Thread) -> None:
        names.append(thread.name)
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        yield names


class Stop(Exception):
    pass


@pytest.mark.skipif(sys.platform == "win32", reason="groups of Linux")
@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_a_group_of_few_threads_gets_the_whole_file(
    limit: int, base: Path, whole: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    arguments = ["export", "quantize", str(base), str(out), "--type", "Q4_K_M", "-t", "4"]
    with group("pids", {"pids.max": str(limit)}) as folder:
        done = inside(folder, sys.executable, "-m", "stoker.runtime.cli.main", *arguments)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="groups of Linux")
@pytest.mark.parametrize("command", ["quantize", "perplexity"])
def test_a_terminal_gets_its_bars_without_a_thread(
    command: str, base: Path, whole: bytes, tmp_path: Path
) -> None:
    out, text = tmp_path / "out.gguf", tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 20)
    arguments = {
        "quantize": ["export", "quantize", str(base), str(out), "--type", "Q4_K_M"],
        "perplexity": ["perplexity", str(base), str(text), "--context", "32"],
    }[command]
    line = [sys.executable, "-m", "stoker.runtime.cli.main", *arguments, "-t", "1"]
    with group("pids", {"pids.max": "1"}) as folder:
        terminal = Terminal(joining(folder, *line))
        drawn = terminal.expect("\x1b[?25h")  # the cursor, which bars hide
        assert terminal.wait() == 0
    assert "\u2501" in drawn and "error" not in drawn
    assert command == "perplexity" or out.read_bytes() == whole


def test_without_threads_a_part_is_kept_and_taken_up(
    base: Path,
    whole: bytes,
    tmp_path: Path,
    refused: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_writer, "COMMIT_BYTES", 1)
    out, done = tmp_path / "out.gguf", []

    def stopping(_: str, at: int, __: int | None) -> None:
        done.append(at)
        if len(done) == 9:
            raise Stop

    with pytest.raises(Stop):
        quantize.quantize(base, out, type="Q4_K_M", progress=stopping)
    assert {name.rsplit("_", 1)[0] for name in refused} == {"stoker-write", "stoker-read"}
    assert not out.exists() and quantize.resumable_part(out) is not None
    left: list[int] = []
    quantize.quantize(base, out, type="Q4_K_M", progress=lambda _, at, __: left.append(at))
    assert left[0] > done[-1]  # it resumed instead of starting over
    assert out.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.usefixtures("refused")
def test_without_threads_a_failing_disk_is_its_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise DeviceError("no space left")

    monkeypatch.setattr(gguf_writer.PartFile, "write", full)
    with pytest.raises(DeviceError, match="no space left"):
        quantize.quantize(base, tmp_path / "out.gguf", type="Q4_0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("refused")
def test_a_worker_without_a_thread_to_read_it_is_ended(tmp_path: Path) -> None:
    before = psutil.Process().children()
    with pytest.raises(DeviceError, match="expected a thread that reads a worker's answers, found"):
        WorkerProcess("stoker", tmp_path / "none.gguf", threads=1, context=8)
    assert psutil.Process().children() == before


def test_jobs_are_done_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes jobs handed over while threads were refused and later allowed again."""
    start, left = threading.Thread.start, [1]

    def now_and_then(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    for refusals in (0, 1):
        left[0] = refusals
        done: list[int] = []
        monkeypatch.setattr(threading.Thread, "start", now_and_then)
        with SideThread("side") as side:
            futures = [side.submit(done.append, i) for i in range(20)]
            failing = side.submit(int, "no number")
            process = side.submit(threading.get_ident)
        assert done == list(range(20))
        assert [f.result() for f in futures] == [None] * 20
        with pytest.raises(ValueError, match="no number"):
            failing.result()
        assert (process.result() == threading.get_ident()) == bool(refusals)
        assert left[0] < refusals  # a pool that was refused a thread asks for no other


@pytest.mark.usefixtures("refused")
def test_an_interrupt_reaches_the_caller() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), SideThread("side") as side:
        side.submit(interrupted)


def test_reading_ahead_without_threads_gives_results_and_errors_in_order(
    refused: list[str],
) -> None:
    def job(i: int) -> int:
        if i == 3:
            raise OSError("gone")
        return i

    found = []
    with pytest.raises(OSError, match="gone"):
        for n in model_writer.read_ahead(lambda i=i: job(i) for i in range(5)):
            found.append(n)
    assert found == [0, 1, 2] and len(refused) == 1
