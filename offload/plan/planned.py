"""What the core has planned, in bytes: for who decides whether a model fits into memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...runtime._core import GgufFile

# What a process takes after its load: Python objects of an answer, the allocator's rest.
PROCESS_GROWTH = 64 << 20


def resident_parts(plan: Mapping[str, Any], process: int) -> dict[str, int]:
    """What the memory holds once the model runs, bytes by kind."""
    parts = {
        "process": int(plan.get("process_bytes", process)),
        "weights": int(plan["weight_bytes"]),
        "KV cache": int(plan["kv_bytes"]),
        "scratch": int(plan["scratch_bytes"]),
        "streamed weights": int(plan.get("ring_bytes", 0)),
        "expert cache": int(plan.get("slot_bytes", 0)),
        "margin": int(plan.get("margin_bytes", 0)),
    }
    return {kind: nbytes for kind, nbytes in parts.items() if nbytes}


def resident_bytes(file: GgufFile, process_bytes: int, **options: Any) -> int:
    """Bytes of a process that holds the whole model in memory, as the core plans it.

    process_bytes: of the process before the engine; options: of a load. Raises what a load does.
    """
    from ...runtime._core import plan

    parts = resident_parts(plan(file, **options)[1], process_bytes)
    return sum(parts.values()) + PROCESS_GROWTH
