"""Output of the commands: progress bars, a status line below streamed text, word wrap."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from ..base.display import size

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn

    from ..base.progress import Progress

_REDRAW_S = 0.1  # seconds between two drawings of a bar
_BYTE_STAGES = ("experts", "tensors", "scratch file")  # stages that count bytes


@contextmanager
def resumable(part: Callable[[], object]) -> Iterator[None]:
    """Prints on Ctrl-C whether the same command can continue; part() is None if it cannot."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "nothing was written" if part() is None else "the same command goes on from here"
        print(f"\ninterrupted: {kept}", file=sys.stderr)
        raise


def progress_bars(*columns: str | ProgressColumn, transient: bool = False) -> Bars:
    """Bars on stderr that are drawn in the calls that update them.

    rich would draw them in a thread of its own, which the system may refuse (side_thread.py).
    columns: those of each bar, rich's own if none are given. transient: erase the bars at the end.
    """
    from rich.console import Console
    from rich.progress import Progress as Bars

    class Drawn(Bars):
        due = 0.0  # time.monotonic() of the next drawing

        def update(self, *arguments: Any, **fields: Any) -> None:
            super().update(*arguments, **fields)
            if time.monotonic() >= self.due:
                self.refresh()
                self.due = time.monotonic() + _REDRAW_S

    return Drawn(*columns, console=Console(stderr=True), auto_refresh=False, transient=transient)


@contextmanager
def stage_progress() -> Iterator[Progress | None]:
    """Yields a callback that draws a bar for each stage on stderr, None if that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn

    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with progress_bars(*columns) as bars:

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, amount="")
            amount = size(done) if what in _BYTE_STAGES else f"{done} of {total}"
            bars.update(tasks[what], completed=done, total=total, amount=amount)

        yield report


@contextmanager
def byte_progress() -> Iterator[Progress]:
    """Yields a progress callback for downloads on stderr: bars in a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    bars = progress_bars(*columns)

    def report(label: str, done: int, total: int | None) -> None:
        if label not in tasks:
            bars.start()  # only now, since an empty display would print an empty line
            tasks[label] = bars.add_task(label, total=total)
        bars.update(tasks[label], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()


def _lines() -> Progress:
    shown: dict[str, int] = {}  # label -> quarters printed

    def report(label: str, done: int, total: int | None) -> None:
        quarters = 4 * done // total if total else 0
        if quarters > shown.get(label, -1):
            shown[label] = quarters
            print(f"{label}: {25 * quarters}% of {size(total or 0)}", file=sys.stderr, flush=True)

    return report


class WordWrap:
    """Breaks streamed text between words at the width of the terminal.

    A word that turns out too long for its row is taken back and written on the next one.
    """

    def __init__(self, out: TextIO) -> None:
        from rich.cells import cell_len

        self._out = out
        self._width_of = cell_len  # in columns: 2 for East Asian and most emoji
        self._column = 0
        self._word = ""  # the end of the row since the last space

    def write(self, text: str) -> None:
        """Writes text without control characters other than newline and tab."""
        # The last column stays free: a terminal that is about to wrap moves its cursor oddly.
        limit = shutil.get_terminal_size().columns - 1
        for char in text.expandtabs(4):
            if char == "\n":
                self._out.write(char)
                self._column, self._word = 0, ""
                continue
            width = self._width_of(char)
            if self._column + width > limit:
                if char == " ":  # the next word opens the next row
                    self._column, self._word = limit, ""
                    continue
                self._break(limit)
            self._out.write(char)
            self._column += width
            self._word = "" if char == " " else self._word + char
        self._out.flush()

    def _break(self, limit: int) -> None:
        moved = self._width_of(self._word)
        if 0 < moved <= limit * 3 // 4:
            self._out.write(f"\x1b[{moved}D\x1b[K\n{self._word}")
            self._column = moved
        else:  # text without spaces: a word of its own, or a script that does not use them
            self._out.write("\n")
            self._column, self._word = 0, ""


class StatusLine:
    """The terminal's last row, while text streams in the rows above it.

    The text scrolls in a region that leaves the row out (DECSTBM), so that the terminal itself
    does the wrapping and the scrollback holds nothing but the text. It does nothing if `out` is
    not a terminal that understands this.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._rows = 0
        self._shown_at = 0.0
        self.enabled = (
            out.isatty() and sys.platform != "win32" and os.environ.get("TERM", "dumb") != "dumb"
        )

    def __enter__(self) -> StatusLine:
        if self.enabled:
            self._reserve()
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            # This restores the full screen (which moves the cursor home) and clears the status row.
            self._out.write(f"\x1b7\x1b[r\x1b[{self._rows};1H\x1b[2K\x1b8")
            self._out.flush()

    def show(self, text: str, *, now: bool = False) -> None:
        """Replaces the status, at most ten times a second unless `now`."""
        if not self.enabled or (not now and time.monotonic() - self._shown_at < 0.1):
            return
        self._shown_at = time.monotonic()
        columns, rows = shutil.get_terminal_size()
        if rows != self._rows:
            self._reserve()
        line = text[: max(columns - 1, 0)]
        self._out.write(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[2m{line}\x1b[0m\x1b8")
        self._out.flush()

    def _reserve(self) -> None:
        self._rows = shutil.get_terminal_size().lines
        if self._rows < 3:
            self.enabled = False
            return
        # The cursor may be on the row to be reserved, so it goes down a line first and up again.
        self._out.write(f"\n\x1b7\x1b[1;{self._rows - 1}r\x1b8\x1b[1A")
        self._out.flush()
