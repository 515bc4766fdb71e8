"""The `stoker` command as a process: finished, in a terminal, or on a model that recites."""

from __future__ import annotations

import os
import re
import select
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

FAKES = Path(__file__).parent
# Runs the command on a model whose words the test decides. Its answer to a question with "slowly"
# in it never ends, so that an interruption cannot come too late.
RECITING = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import fake_core
fake_core.install()
fake_core.Engine.delay = float(sys.argv.pop(1))
fake_core.Engine.stuck = ("slowly", 8)
fake_core.Engine.story = sys.argv.pop(1).encode()
from stoker.runtime.cli.main import main
sys.exit(main())
"""


def reciting(story: str, *arguments: str, delay: float = 0.0) -> list[str]:
    return [sys.executable, "-c", RECITING, str(FAKES), str(delay), story, *arguments]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "stoker.runtime.cli.main", *arguments]


def finish(
    line: list[str], *, text: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line,
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=500,
        check=False,
    )


# The sequence saves the cursor, writes on the last row and goes back.
STATUS = re.compile(r"\x1b7\x1b\[24;1H\x1b\[2K\x1b\[2m(.*?)\x1b\[0m\x1b8")


class Terminal:
    """A command in a pseudo-terminal of 24 rows and 80 columns."""

    def __init__(self, line: list[str]) -> None:
        pty = pytest.importorskip("pty")
        import fcntl
        import termios

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os.environ["TERM"] = "xterm"
                os.execv(line[0], line)
            finally:
                os._exit(127)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.seen = ""
        self.statuses = ""  # the text written on the status row

    def expect(self, text: str, seconds: float = 120) -> str:
        """Reads until `text` comes; returns what came with it."""
        if not self.comes(text, seconds):
            raise AssertionError(f"expected {text!r}, found {self.seen!r}")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def comes(self, text: str, seconds: float) -> bool:
        """Whether `text` comes in time; expect() then finds it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            if not select.select([self.fd], [], [], max(end - time.monotonic(), 0))[0]:
                return False
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # the program has ended
                data = b""
            if not data:
                raise AssertionError(f"expected {text!r}, found the end after {self.seen!r}")
            self.seen += data.decode(errors="replace")
            self.statuses += "\n".join(STATUS.findall(self.seen))
            self.seen = STATUS.sub("", self.seen)
        return True

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait(self) -> int:
        while True:
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
