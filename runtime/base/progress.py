"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

# (stage, done, total): called between pieces of the work; total None where it is unknown.
Progress = Callable[[str, int, "int | None"], None]
