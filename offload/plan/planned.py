"""Bytes of the core's plan, for callers that decide whether a model fits into memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...runtime._core import GgufFile

# A process takes this much after its load: Python objects of an answer, the allocator's remainder.
PROCESS_GROWTH = 64 << 20


def resident_parts(plan: Mapping[str, Any], process: int) -> dict[str, int]:
    """Returns what memory holds once the model runs, bytes by kind."""
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
    """Returns the bytes of a process with the whole model in memory, as the core plans it.

    process_bytes: bytes of the process before the engine; options: those of a load. Raises what a
    load raises.
    """
    from ...runtime._core import plan

    parts = resident_parts(plan(file, **options)[1], process_bytes)
    return sum(parts.values()) + PROCESS_GROWTH
