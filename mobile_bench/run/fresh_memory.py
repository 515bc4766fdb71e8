"""How fast memory that a process has not used yet comes: what a load and a cold cache wait for.

On most machines the kernel zeroes pages at some GB/s. Virtual machines that give free memory back
to their host may be ten times slower, depending on what they did a moment ago: so it is measured
when it is needed, in the state that it is needed in.
"""

from __future__ import annotations

import mmap
import time

_PAGE = 4096


def fresh_bytes_s(nbytes: int) -> float:
    """Bytes a second at which one thread touches `nbytes` (a page at least) of fresh memory."""
    with mmap.mmap(-1, max(nbytes, _PAGE)) as memory:
        if hasattr(memory, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # as the engine does
        zero = bytes(1)
        begin = time.perf_counter()
        for at in range(0, len(memory), _PAGE):
            memory[at : at + 1] = zero
        return len(memory) / (time.perf_counter() - begin)
