"""The type of the callbacks by which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

# The work calls it with (stage, done, total) between its pieces; total is None where unknown.
Progress = Callable[[str, int, "int | None"], None]
