"""A running worker.py, seen from the process that measures."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ...runtime.base.errors import DeviceError
from ...runtime.base.side_thread import start
from .cgroup_run import MemoryGroup

WORKER = Path(__file__).with_name("worker.py")


class WorkerError(Exception):
    """A worker failed, was killed or took too long; the message says which in one line."""


class WorkerProcess:
    """One engine with one model, in its own process (and memory cgroup)."""

    def __init__(
        self,
        engine: str,
        model: str | Path,
        *,
        threads: int,
        context: int,
        options: dict[str, Any] | None = None,
        python: str = "",
        group: MemoryGroup | None = None,
    ) -> None:
        """Raises WorkerError if it cannot be started, DeviceError if no thread is left to read its
        answers.
        """
        self.engine, self.group = engine, group
        settings = {"threads": threads, "context": context, "options": options or {}}
        command = [python or sys.executable, str(WORKER), engine, str(model), json.dumps(settings)]
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        # The worker gets its own session, because Ctrl-C is ours to handle.
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": self._errors,
            "start_new_session": True,
        }
        try:
            if group is not None:
                self.process = group.popen(command, **pipes)
            else:
                self.process = subprocess.Popen(command, text=True, **pipes)
        except OSError as error:
            self._errors.close()
            raise WorkerError(f"{command[0]}: {error.strerror or error}") from None
        self._lines: queue.Queue[str | None] = queue.Queue()
        try:
            reader = threading.Thread(target=self._read, daemon=True)
            start(reader, "reads a worker's answers")
        except DeviceError:
            self.kill()
            self.close()
            raise

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, do: str, *, timeout_s: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Sends one command and waits for its result. WorkerError means that it has ended."""
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it has ended, and may have said why
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self.kill()
            raise WorkerError(f"no answer within {timeout_s:.0f} s, killed") from None
        if line is None:
            self._lines.put(None)  # for a later ask()
            raise WorkerError(self._end())
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            raise WorkerError(result["error"])
        return result

    def _end(self) -> str:
        code = self.process.wait()
        if self.group is not None and self.group.kills():
            return "killed: it needs more memory than its cgroup's limit"
        if code == -9:
            return "killed, as the system does where memory runs out"
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 4096))
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        ended = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"{ended}: {said[-1]}" if said else ended

    def kill(self) -> None:
        """Kills the worker."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends the worker once it has finished its current command."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self._errors.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.process.kill()
        self.close()
