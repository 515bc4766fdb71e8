"""How fast a process gets memory it has not used yet: a load and a cold cache wait for it.

On most machines the kernel zeroes pages at some GB/s. Virtual machines that give free memory back
to their host may be ten times slower, depending on what they did a moment ago, so it is measured
just before it is needed.
"""

from __future__ import annotations

import mmap
import time

_PAGE = 4096


def fresh_bytes_s(nbytes: int) -> float:
    """Bytes per second at which one thread touches `nbytes` (at least a page) of fresh memory."""
    with mmap.mmap(-1, max(nbytes, _PAGE)) as memory:
        if hasattr(memory, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # as the engine does
        zero = bytes(1)
        begin = time.perf_counter()
        for at in range(0, len(memory), _PAGE):
            memory[at : at + 1] = zero
        return len(memory) / (time.perf_counter() - begin)
