"""The plan of a loaded model as text and JSON: the use of memory and the expected speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from .base.display import size
from .base.memory import process_bytes

if TYPE_CHECKING:
    from ..offload.plan.forecast import Decoding
    from .backends.engine import LoadedModel

_MOST_READ = 256 << 20  # bytes read to measure the memory's bandwidth, at most
_LEAST_READ = 16 << 20  # below this, caches would serve the reads


@dataclass(frozen=True)
class PlanReport:
    """The use of memory of one loaded model, in bytes, and the expected speed of decode.

    budget: bytes of the whole process; 0: no budget, everything is in memory.
    pinned: weights in memory, by kind. If the weights that every token uses do not all fit,
    `streamed` bytes of them are read anew with every token, through a ring of `ring` bytes.
    kv: KV cache of one session at its full context.
    slots: experts that the cache holds of all `experts`; working_set: experts that one token uses.
    streams: slots are fewer than that: layers stream through a small ring with little reuse.
    times: expected seconds of a decoded token by resource, which overlap (see
    offload/plan/forecast.py); token_s: expected seconds of a token. None if a bandwidth is unknown.
    """

    model: str
    threads: int
    isa: str
    context: int
    kv_type: str
    budget: int
    process: int
    pinned: dict[str, int]
    streamed: int
    ring: int
    kv: int
    scratch: int
    margin: int
    chunk: int
    slots: int
    experts: int
    slot_bytes: int
    expert_bytes: int
    working_set: int
    streams: bool
    io: str | None
    prefetch: str | None
    memory_bandwidth: float
    flash_bandwidth: float
    expected_hit_rate: float
    times: dict[str, float] | None
    token_s: float | None

    @property
    def limited_by(self) -> str | None:
        """The resource that takes longest; None if it is unknown."""
        return None if self.times is None else max(self.times, key=self.times.__getitem__)

    @property
    def tokens_per_s(self) -> float | None:
        """The expected decode tokens a second; None if a bandwidth is unknown."""
        return None if self.token_s is None else 1 / self.token_s

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields, for JSON."""
        return asdict(self) | {"limited_by": self.limited_by, "tokens_per_s": self.tokens_per_s}

    def lines(self) -> list[str]:
        """Returns the lines of a table for display."""
        rows = self._rows()
        width = max(len(what) for what, _ in rows)
        return [f"{what:{width}}  {finding}" for what, finding in rows]

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("plan", f"{self.model}, {self.threads} threads, {self.isa}")]
        if self.budget:
            rows.append(("budget", f"{size(self.budget)} for the whole process"))
            rows.append(("process", f"{size(self.process)} before the model"))
            rows.append(("margin", size(self.margin)))
        else:
            rows.append(("budget", "none needed: everything is in memory"))
        total = sum(self.pinned.values())
        kinds = ", ".join(f"{kind} {size(nbytes)}" for kind, nbytes in self.pinned.items())
        rows.append(("pinned weights", f"{size(total)}: {kinds}"))
        if self.streamed:
            through = f"{size(self.streamed)} with every token, through {size(self.ring)}"
            rows.append(("streamed weights", through))
        rows.append(
            ("KV cache", f"{size(self.kv)}: {self.context} tokens of a session, {self.kv_type}")
        )
        rows.append(("scratch", f"{size(self.scratch)}: prompts in chunks of {self.chunk} tokens"))
        if self.budget:
            rows.extend(self._expert_rows())
        rows.append(("expected", self._expectation()))
        return rows

    def _expert_rows(self) -> list[tuple[str, str]]:
        if not self.experts:
            return [("reads", str(self.io))]
        share = self.slots / self.experts
        held = "does not fit: layers stream through" if self.streams else "fits"
        return [
            (
                "expert cache",
                f"{size(self.slot_bytes)}: {self.slots} of {self.experts} experts ({share:.0%})"
                f" of {size(self.expert_bytes)}",
            ),
            ("a token uses", f"{self.working_set} experts, which {held} the cache"),
            ("reads", f"{self.io}; prefetch {self.prefetch}"),
        ]

    def _expectation(self) -> str:
        if self.tokens_per_s is None or self.times is None:
            return "unknown: the bandwidths could not be measured"
        text = f"{self.tokens_per_s:.1f} tok/s, limited by {self.limited_by}: "
        memory, flash = self.times["memory bandwidth"], self.times["flash"]
        text += f"memory {memory * 1e3:.1f} ms at {self.memory_bandwidth / 1e9:.1f} GB/s"
        if self.budget:
            text += f", flash {flash * 1e3:.1f} ms at {self.flash_bandwidth / 1e9:.2f} GB/s"
            if self.experts:
                text += f" and {self.expected_hit_rate:.0%} hits"
        return text + " a token"


def report(model: LoadedModel) -> PlanReport:
    """Returns the plan of a loaded model; the first call measures the memory's bandwidth."""
    plan, reads = model.plan, model.offload or model.stream
    limit = int(plan.get("memory", 0)) if reads is not None else 0
    if model._memory_bandwidth == 0:
        model._memory_bandwidth = memory_bandwidth(
            int(plan["threads"]), _room(int(plan["token_bytes"]), limit)
        )
    slots, experts = int(plan.get("slots", 0)), int(plan.get("experts", 0))
    working_set = int(plan.get("working_set", 0))
    one = int(plan.get("expert_bytes", 0)) // experts if experts else 0
    if model.stream is not None:
        pinned = {"of every kind, evenly": int(plan["weight_bytes"])}
    else:
        pinned = {
            kind: int(n) for kind, n in plan["kinds"].items() if not limit or kind != "experts"
        }
    padding = int(plan["weight_bytes"]) - sum(pinned.values())
    if padding > 0:
        pinned["padding"] = padding  # it aligns tensors for direct reads
    flash_bandwidth = model.flash_bandwidth
    found = _decoding(model, plan, flash_bandwidth)
    return PlanReport(
        model=model.name,
        threads=int(plan["threads"]),
        isa=str(plan["isa"]),
        context=int(plan["context"]),
        kv_type=str(plan["kv_type"]),
        budget=limit,
        process=int(plan.get("process_bytes", 0)),
        pinned=pinned,
        streamed=int(plan.get("streamed_bytes", 0)),
        ring=int(plan.get("ring_bytes", 0)),
        kv=int(plan["kv_bytes"]),
        scratch=int(plan["scratch_bytes"]),
        margin=int(plan.get("margin_bytes", 0)),
        chunk=int(plan["chunk"]),
        slots=slots,
        experts=experts,
        slot_bytes=int(plan.get("slot_bytes", 0)),
        expert_bytes=one,
        working_set=working_set,
        streams=bool(plan.get("streams", False)),
        io=None if reads is None else str(reads["io"]),
        prefetch=None if model.offload is None else str(model.offload["prefetch"]),
        memory_bandwidth=model._memory_bandwidth,
        flash_bandwidth=flash_bandwidth,
        expected_hit_rate=1.0 if found is None else found.hit_rate,
        times=None if found is None else found.times,
        token_s=None if found is None else found.token_s,
    )


def _decoding(
    model: LoadedModel, plan: Mapping[str, Any], flash_bandwidth: float
) -> Decoding | None:
    """Forecasts decode as `stoker plan` would for a device with these bandwidths."""
    reads = int(plan.get("streamed_bytes", 0)) or (
        int(plan.get("slots", 0)) < int(plan.get("experts", 0))
    )
    if not model._memory_bandwidth or "work" not in plan or (reads and not flash_bandwidth):
        return None
    from ..offload.plan.forecast import Device, Workload, decoding
    from ..offload.plan.hit_curves import origin_of

    context = int(plan["context"])
    usual = Workload()
    prompt = min(usual.prompt_tokens, max(1, context // 2))
    recipe = model._file.get("stoker.upcycle.recipe")
    return decoding(
        model.config,
        plan,
        origin_of(recipe if isinstance(recipe, str) else None),
        Device.measured(int(plan["threads"]), model._memory_bandwidth, flash_bandwidth),
        Workload(prompt, max(1, min(usual.tokens, context - prompt))),
    )


def _room(token_bytes: int, limit: int) -> int:
    """Returns the bytes to measure with: those that a token reads, if the budget leaves them."""
    wanted = min(token_bytes, _MOST_READ)
    # Right after the load the cache is empty, and its memory is not yet in use.
    return min(wanted, limit - process_bytes() - _LEAST_READ) if limit else wanted


@cache
def memory_bandwidth(threads: int, nbytes: int) -> float:
    """Returns bytes a second at which all threads together read `nbytes`; 0 for too few bytes."""
    from ._core import read_bandwidth

    return float(read_bandwidth(threads, nbytes)) if nbytes >= _LEAST_READ else 0.0
