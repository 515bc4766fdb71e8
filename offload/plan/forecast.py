"""Forecasts a model's speed on a device from its header and the device's profile.

No weight is read. A decoded token takes

    memory or arithmetic   each format's weights at the slower of the memory's bandwidth and the
                           kernel's speed, on all threads (DeviceProfile.formats)
    second terms           of products that take their activations in two int8 terms (Precision)
    KV cache               the part that attention reads, which grows with the position
    overhead               synchronising threads, norms and rotary embedding a layer; the start of
                           each expert, which the processor's prefetchers have not foreseen
    flash                  misses (hit_curves.py) times an expert's bytes, at the storage's
                           bandwidth for reads of that size and depth, less what computing hides

and a prompt takes the same per chunk: an expert is read once a chunk; each matrix costs its
unpacking once and its operations a token (tile_ops_s). A load reads the pinned weights at the
storage's bandwidth.

The constants below are properties of the engine, not of the device; each comment gives the source.
They were set by hand from records of one machine (2 cores of Zen 5, virtual).
`python -m stoker.mobile_bench.checks.forecast_check` measures the error of the whole forecast,
with a profile of the same session.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from ...runtime.base.errors import OptionError
from ...runtime.base.memory import GROUP_MARGIN, MACHINE_MARGIN
from .device_profile import DeviceProfile
from .hit_curves import distinct, miss_rate, origin_of
from .planned import resident_parts

if TYPE_CHECKING:
    from ...runtime._core import GgufFile

# Seconds of overhead per layer of a decoded token, for six phases that threads enter and leave
# together, and the norms between them. The source is SmolLM2 and Gemma 3 on 2 threads: a token's
# time less its reads.
LAYER_S = 8e-6
# Seconds of overhead per expert that a token uses, whose three matrices are at random places of
# gigabytes: no cache holds their first lines and page tables. The source is up64, all in memory.
EXPERT_S = 15e-6
# The speed of a row of second activation terms (Precision), whose weights are in the cache, over
# that of a prompt's products. The source is `precision` fast against balanced on both models
# (README, Performance).
SECOND_TERM = 0.5
# The share of the memory bandwidth that reads of the KV cache reach, whose rows have some hundred
# bytes a head and position.
KV_STREAMING = 0.5
# Seconds per use of an expert under a budget, for the directory, the policy and the predictor's
# lookups. The source is offload-up64-2GB.json, which hardly reads, against everything in memory.
STORE_S = 6e-6
# The share of plain reading's memory bandwidth that products reach, which compute between reads.
# The sources are the models of forecast_check.py with all experts in memory; records of a slower
# memory gave 0.86.
STREAMING = 0.76
# The share of the probe's storage bandwidth for blocks of this size and depth that reads of experts
# reach, which are three extents of a file that the model shares with others. The source is
# flash_bandwidth in the runs of the check.
EXPERT_READS = 0.72
# The speed of reading a whole file in order, which the system reads ahead, over that of 4 MiB at
# random places through the page cache. The sources are loads of the check's dense models.
READ_AHEAD = 1.6
# Bytes read for each byte that was missing, because some predictions are wrong. The source is
# offload-up64-1GB.json, with prefetching against without.
NEEDLESS = 1.09
# The share of a miss's reading that is in flight before it is needed, and the share of computing
# that can hide reads. The sources are the check's mixtures: waiting against bytes over the
# bandwidth in the same run.
FORESEEN = 0.38
HIDING = 0.95
# In a prompt's chunk, the share of the smaller of reading and computing that the larger one does
# not hide. It is assumed; offload-up64-1GB-prompt512.json does not contradict it.
EXPOSED = 0.15
# Seconds of one thread per hidden value of an expert in a prompt: activation function, rounding,
# sum. The source is up64 with 64 and 512 tokens, everything in memory.
HIDDEN_S = 3.5e-9
# The share of the float32 peak that attention's loops reach in a prompt. The source is SmolLM2 with
# 512 tokens, and a peak of 450 GFLOP/s that was estimated, not measured.
ATTENTION = 0.35
# Seconds of a load for opening the file, threads and buffers, from the same records.
LOAD_S = 0.012
# With cold caches a load reads the core and the interpreter's modules, a few pages at a time as
# they are touched. The bytes are a process's read_bytes; the block size fits the rest of the time
# that loads of mixtures in the check take.
LIBRARY_BYTES = 4.7e6
LIBRARY_BLOCK = 16 << 10
# Bytes a second of touching memory for the first time, if the profile does not have it: the kernel
# zeroes pages. Virtual machines may be ten times slower (forecast_check.py measures it).
FRESH_BYTES_S = 4e9

_MEASURED = "measured"  # id of a device of which only the bandwidths are known
RESOURCES = ("memory bandwidth", "arithmetic", "flash", "overhead")


class Device:
    """A device's speeds, as the engine would meet them on `threads` threads."""

    def __init__(self, profile: DeviceProfile, threads: int = 0) -> None:
        self.profile = profile
        self.threads = threads or int(profile["cpu"].get("performance") or 1)
        self.isa = str(profile["isa"].get("active", ""))
        self._formats = {f["format"]: f for f in profile["formats"]}
        # A device of measured() has no formats: its processor is taken to limit nothing.
        if not profile["memory_reads"] or not (self._formats or profile["id"] == _MEASURED):
            raise OptionError("device profile: expected memory_reads and formats, found none")

    @classmethod
    def measured(cls, threads: int, memory_bytes_s: float, flash_bytes_s: float) -> Device:
        """Returns this device from two bandwidths in bytes a second; flash 0: nothing is read.

        Its processor is taken to limit nothing, so that its forecasts are upper bounds.
        """
        speed = flash_bytes_s / EXPERT_READS
        reads = [  # for every size
            {"block": 1, "depth": 1, "mode": mode, "bytes_s": speed}
            for mode in ("direct", "buffered")
        ]
        known = {
            "id": _MEASURED,
            "cpu": {"performance": threads},
            "isa": {},
            "memory": {},
            "memory_reads": [{"threads": threads, "bytes_s": memory_bytes_s}],
            "formats": [],
            "peaks": [],
            "storage": {},
            "storage_reads": reads,
        }
        return cls(cast("DeviceProfile", known), threads)

    @property
    def memory_bytes_s(self) -> float:
        """Bytes a second of reading memory on all threads."""
        reads = {r["threads"]: r["bytes_s"] for r in self.profile["memory_reads"]}
        below = [n for n in reads if n <= self.threads]
        return reads[max(below)] if below else reads[min(reads)]

    @property
    def available(self) -> int | None:
        """Bytes that a process may take, with a margin left to others; None if unknown."""
        memory = self.profile["memory"]
        limits = []
        if memory.get("available"):
            limits.append(memory["available"] * (1 - MACHINE_MARGIN))
        if memory.get("limit"):
            limits.append(memory["limit"] * (1 - GROUP_MARGIN))
        return int(min(limits)) if limits else None

    def _format(self, name: str, bits: float) -> Any:
        """Returns the format's speeds, else those of the format nearest in bits a weight."""
        if name in self._formats:
            return self._formats[name]
        if not self._formats:
            return {"row_weights_s": math.inf, "tile_ops_s": math.inf}
        return min(self._formats.values(), key=lambda f: abs(_bits()[f["format"]] - bits))

    def row_weights_s(self, name: str, bits: float) -> float:
        """Returns weights a second of one token's product, all threads, without memory's limit."""
        return float(self._format(name, bits)["row_weights_s"]) * self.threads

    def tile_ops_s(self, name: str, bits: float) -> float:
        """Returns operations a second of a prompt's product, all threads."""
        return float(self._format(name, bits)["tile_ops_s"]) * self.threads

    @property
    def float_ops_s(self) -> float:
        """The float32 peak of the active ISA, all threads."""
        peaks = [p for p in self.profile["peaks"] if p["kind"] == "float32"]
        own = [p for p in peaks if p["isa"] == self.isa] or peaks
        if not own:
            return self.memory_bytes_s  # an operation a byte, which any processor reaches
        best = max(own, key=lambda p: (p["threads"] <= self.threads, p["threads"]))
        return best["ops_s"] * max(1.0, self.threads / best["threads"])

    def flash_bytes_s(self, block: float, depth: int, mode: str = "direct") -> float:
        """Returns bytes a second of random reads; buffered ones if there are none of this mode.

        It interpolates linearly between the logarithms of measured sizes, at the nearest measured
        depth.
        """
        reads = self.profile["storage_reads"]
        of = [r for r in reads if r["mode"] == mode] or [
            r for r in reads if r["mode"] == "buffered"
        ]
        if not of:
            raise OptionError(
                "device profile: expected storage_reads, found none"
                + (f" ({self.profile['storage']['error']})" if "error" in self.profile["storage"]
                   else "")
            )  # fmt: skip
        nearest = min({r["depth"] for r in of}, key=lambda d: abs(math.log(d / depth)))
        points = sorted((r["block"], r["bytes_s"]) for r in of if r["depth"] == nearest)
        if block <= points[0][0]:
            return points[0][1] * block / points[0][0]
        for (b0, s0), (b1, s1) in pairwise(points):
            if block <= b1:
                at = math.log(block / b0) / math.log(b1 / b0)
                return math.exp(math.log(s0) + at * math.log(s1 / s0))
        return points[-1][1]

    def expert_bytes_s(self, block: float) -> float:
        """Returns bytes a second of reading experts as the engine does, `block` bytes a read."""
        return self.flash_bytes_s(block, engine_constants()["readers"]) * EXPERT_READS

    @property
    def fresh_bytes_s(self) -> float:
        """Bytes a second of touching memory for the first time."""
        return float(self.profile["memory"].get("fresh_bytes_s") or FRESH_BYTES_S)


@cache
def engine_constants() -> dict[str, int]:
    """Returns the engine's constants.

    These are readers, and for the ring of streamed weights ring_reads, least_read and most_read
    (bytes).
    """
    from ...runtime._core import plan_constants

    return plan_constants()


@cache
def _bits() -> dict[str, float]:
    """Returns the bits a weight of each format."""
    from ...runtime._core import formats

    return {row["name"]: 8 * row["bytes"] / row["block"] for row in formats()}


@dataclass(frozen=True)
class ModelHeader:
    """A model's header and the options of its load."""

    file: GgufFile
    name: str
    context: int = 0
    kv_type: str = "f16"
    precision: str = "balanced"
    process_bytes: int = 64 << 20  # bytes of the process before the engine

    def plan(self, memory: int, threads: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (config, plan) at a budget; 0: all in memory. Raises BudgetError and others."""
        from ...runtime._core import plan

        return plan(
            self.file,
            threads=threads,
            context=self.context,
            kv_type=self.kv_type,
            precision=self.precision,
            memory=memory,
            process_bytes=self.process_bytes,
        )

    @property
    def origin(self) -> str:
        """The origin of the routers, for hit_curves.py."""
        recipe = self.file.get("stoker.upcycle.recipe")
        return origin_of(recipe if isinstance(recipe, str) else None)


@dataclass(frozen=True)
class Workload:
    """The tokens of a prompt, and the tokens decoded after it.

    first: it is the first of the process, so that the memory of the (empty) expert cache is fresh.
    """

    prompt_tokens: int = 64
    tokens: int = 256
    first: bool = True


@dataclass(frozen=True)
class Forecast:
    """The forecast of one model in one budget on one device, in bytes and seconds.

    memory: the budget, None: everything in memory. least_memory: the smallest sufficient budget; if
    the model does not fit, all that follows is 0, empty or None. resident: bytes in memory by kind.
    slots: experts that the cache holds of `experts`; a token uses working_set of them. hit_rate:
    hits of a token's experts, mean of the first `tokens` after the prompt; bytes_token: bytes that
    a token reads from flash. prompt_tokens: length of the prompt, whose first token comes after
    load_s + prompt_s = ttft_s, cold. times: seconds of a token by resource; they overlap, so
    token_s is less than their sum. doubles_at: the budget that would double tokens_per_s, None if
    none does.
    """

    model: str
    device: str
    threads: int
    context: int
    memory: int | None
    fits: bool
    least_memory: int
    resident: dict[str, int]
    slots: int
    experts: int
    expert_bytes: int
    working_set: int
    streams: bool
    hit_rate: float | None
    bytes_token: float
    tokens: int
    prompt_tokens: int
    load_s: float
    prompt_s: float
    ttft_s: float
    token_s: float
    tokens_per_s: float
    times: dict[str, float]
    prompt_times: dict[str, float]
    limited_by: str | None
    ttft_limited_by: str | None
    doubles_at: int | None
    resident_tokens_per_s: float | None

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields, for JSON."""
        return asdict(self)


def forecast(
    subject: ModelHeader,
    device: Device,
    memory: int | None,
    turn: Workload = Workload(),
) -> Forecast:
    """Forecasts one budget (None: everything in memory); one that is too small gives fits=False.

    Raises OptionError if the prompt does not fit the context, or the profile lacks needed values;
    ModelFileError, UnsupportedModelError.
    """
    config, everything = subject.plan(0, device.threads)
    context = everything["context"]
    if not 1 <= turn.prompt_tokens <= context:
        raise OptionError(
            f"prompt: expected 1 to {context} tokens (the context), found {turn.prompt_tokens}"
        )
    turn = replace(turn, tokens=max(1, min(turn.tokens, context - turn.prompt_tokens)))
    least = int(everything["least_memory"])
    mixture = bool(config["n_expert"])
    fits = memory is None or memory >= least
    if not fits:
        return _unfit(subject, device, memory, everything)
    plan = everything if memory is None else subject.plan(memory, device.threads)[1]
    model = _Model(subject.origin, device, turn, config, plan)
    times, prompt = model.token(), model.prompt()
    token_s, prompt_s = model.token_s(times), model.prompt_s(prompt)
    load_s = model.load_s()
    alone = _Model(subject.origin, device, turn, config, everything)
    full_s = alone.token_s(alone.token())
    doubles: int | None = None
    offloads = mixture or plan["streamed_bytes"]
    if offloads and memory is not None and full_s <= token_s / 2:
        doubles = _budget_for(subject, device, turn, token_s / 2, memory)
    experts = int(plan.get("experts", 0))
    return Forecast(
        model=subject.name,
        device=device.profile["id"],
        threads=device.threads,
        context=int(plan["context"]),
        memory=memory,
        fits=True,
        least_memory=least,
        resident=resident_parts(plan, subject.process_bytes),
        slots=int(plan.get("slots", 0)),
        experts=experts,
        expert_bytes=int(plan.get("expert_bytes", 0)) // experts if experts else 0,
        working_set=int(plan.get("working_set", 0)),
        streams=bool(plan.get("streams", False)),
        hit_rate=1 - model.miss if experts else None,
        bytes_token=model.flash_bytes + model.streamed_bytes,
        tokens=turn.tokens,
        prompt_tokens=turn.prompt_tokens,
        load_s=load_s,
        prompt_s=prompt_s,
        ttft_s=load_s + prompt_s,
        token_s=token_s,
        tokens_per_s=1 / token_s,
        times=times,
        prompt_times=prompt,
        limited_by=max(times, key=lambda k: times[k]),
        ttft_limited_by="load" if load_s > prompt_s else max(prompt, key=lambda k: prompt[k]),
        doubles_at=doubles,
        resident_tokens_per_s=1 / full_s,
    )


def _unfit(
    subject: ModelHeader, device: Device, memory: int | None, plan: Mapping[str, Any]
) -> Forecast:
    return Forecast(
        model=subject.name,
        device=device.profile["id"],
        threads=device.threads,
        context=int(plan["context"]),
        memory=memory,
        fits=False,
        least_memory=int(plan["least_memory"]),
        resident={},
        slots=0,
        experts=0,
        expert_bytes=0,
        working_set=0,
        streams=False,
        hit_rate=None,
        bytes_token=0.0,
        tokens=0,
        prompt_tokens=0,
        load_s=0.0,
        prompt_s=0.0,
        ttft_s=0.0,
        token_s=0.0,
        tokens_per_s=0.0,
        times={},
        prompt_times={},
        limited_by=None,
        ttft_limited_by=None,
        doubles_at=None,
        resident_tokens_per_s=None,
    )


def _budget_for(
    subject: ModelHeader, device: Device, turn: Workload, token_s: float, low: int
) -> int | None:
    """Returns the smallest budget above `low` whose tokens take at most token_s, to a MiB."""

    def slow(memory: int) -> bool:
        config, plan = subject.plan(memory, device.threads)
        model = _Model(subject.origin, device, turn, config, plan)
        return model.token_s(model.token()) > token_s

    everything = subject.plan(0, device.threads)[1]
    high = low + sum(resident_parts(everything, subject.process_bytes).values()) * 2
    if slow(high):
        return None
    while high - low > 1 << 20:
        middle = (low + high) // 2
        low, high = (middle, high) if slow(middle) else (low, middle)
    return -(-high >> 20) << 20


@dataclass(frozen=True)
class Decoding:
    """The forecast of decode under one plan on one device.

    hit_rate: hits of a token's experts, 1 if all are in memory; times: seconds of a token by
    resource, which overlap; token_s: seconds of a token; flash_bytes: bytes that a token reads.
    """

    hit_rate: float
    times: dict[str, float]
    token_s: float
    flash_bytes: float

    @property
    def limited_by(self) -> str:
        """The resource that takes longest."""
        return max(self.times, key=lambda k: self.times[k])


def decoding(
    config: Mapping[str, Any],
    plan: Mapping[str, Any],
    origin: str,
    device: Device,
    turn: Workload = Workload(),
) -> Decoding:
    """Forecasts decode under a plan (Engine.config, Engine.plan); origin: ModelHeader.origin."""
    model = _Model(origin, device, turn, config, plan)
    times = model.token()
    return Decoding(
        1 - model.miss, times, model.token_s(times), model.flash_bytes + model.streamed_bytes
    )


class _Model:
    """The times of one plan on one device."""

    def __init__(
        self,
        origin: str,
        device: Device,
        turn: Workload,
        config: Mapping[str, Any],
        plan: Mapping[str, Any],
    ) -> None:
        self.device, self.turn, self.config, self.plan = device, turn, config, plan
        self.work: list[Mapping[str, Any]] = [w for w in plan["work"] if w["weights"]]
        self.precision = plan["precision"]
        slots, experts = int(plan.get("slots", 0)), int(plan.get("experts", 0))
        self.slots, self.experts = slots, experts
        self.uses = int(plan.get("working_set", 0))
        if not experts and config["n_expert"]:
            self.uses = sum(w["products"] for w in self.work if w["part"] == "experts") // 3
        self.miss = 0.0
        if experts:
            self.miss = miss_rate(
                slots / experts,
                config["n_expert"],
                config["n_expert_used"],
                origin=origin,
                tokens=turn.tokens,
            )
        self.unit = plan["slot_bytes"] / slots if slots else 0.0
        self.flash_bytes = self.uses * self.miss * self.unit * (NEEDLESS if self.miss < 1 else 1.0)
        # The weights that every forward pass streams, and the time that this takes.
        self.streamed_bytes = int(plan["streamed_bytes"])
        self.stream_s = 0.0
        if self.streamed_bytes:
            c = engine_constants()
            block = min(
                max(int(plan["ring_bytes"]) // c["ring_reads"], c["least_read"]), c["most_read"]
            )
            self.stream_s = self.streamed_bytes / device.expert_bytes_s(block)

    def _second_s(self, work: Mapping[str, Any]) -> float:
        """Returns the seconds of the second terms of one token's products; 0 if there are none."""
        wanted = self.precision == "high" or (self.precision == "balanced" and work["balanced"])
        if not wanted or work["format"] in ("F32", "F16", "BF16"):
            return 0.0
        return float(work["weights"] / (self._tile_s(work) / 2 * SECOND_TERM))

    def _tile_s(self, work: Mapping[str, Any]) -> float:
        return self.device.tile_ops_s(work["format"], 8 * work["bytes"] / work["weights"])

    def _rows(self, work: Mapping[str, Any]) -> tuple[float, float]:
        """Returns the seconds of one pass over the weights (memory's, kernel's), one of them 0."""
        bits = 8 * work["bytes"] / work["weights"]
        kernel = work["weights"] / self.device.row_weights_s(work["format"], bits)
        read = work["bytes"] / (self.device.memory_bytes_s * STREAMING)
        return (read, 0.0) if read >= kernel else (0.0, kernel)

    def token(self) -> dict[str, float]:
        """Returns the seconds of one decoded token by resource."""
        memory = arithmetic = flash = 0.0
        for work in self.work:
            read, kernel = self._rows(work)
            memory += read
            arithmetic += kernel + self._second_s(work)
        position = self.turn.prompt_tokens + self.turn.tokens / 2
        kv = self.plan["kv_bytes"] / self.plan["context"] * position
        memory += kv / (self.device.memory_bytes_s * KV_STREAMING)
        overhead = self.config["n_layer"] * LAYER_S + self.uses * EXPERT_S
        if self.experts:
            overhead += self.uses * STORE_S
            flash = self.flash_bytes / self.device.expert_bytes_s(self.unit / 3)
        flash += self.stream_s
        return dict(zip(RESOURCES, (memory, arithmetic, flash, overhead), strict=True))

    def token_s(self, times: Mapping[str, float]) -> float:
        """Returns the seconds of a token, with overlapping times counted once."""
        computing = sum(times[k] for k in RESOURCES if k != "flash")
        # Streamed weights are certain prefetches: all of their reads are in flight in time.
        foreseen = self.stream_s + FORESEEN * (times["flash"] - self.stream_s)
        hidden = min(foreseen, HIDING * computing)
        return computing + times["flash"] - hidden

    def chunks(self) -> list[int]:
        """Returns the tokens of each chunk of the prompt."""
        chunk = int(self.plan["chunk"])
        whole, rest = divmod(self.turn.prompt_tokens, chunk)
        return [chunk] * whole + ([rest] if rest else [])

    def prompt(self) -> dict[str, float]:
        """Returns the seconds of the prompt and first token by resource, with an empty cache."""
        c, device = self.config, self.device
        memory = arithmetic = flash = overhead = 0.0
        position = 0
        chunks = self.chunks()
        for number, n in enumerate(chunks):
            wanted = self._distinct(n)
            for work in self.work:
                if work["part"] == "output" and number < len(chunks) - 1:
                    continue
                # Unpacking passes once over the weights, whatever the number of tokens.
                read, unpack = self._rows(work)
                times = wanted / c["n_expert_used"] if work["part"] == "experts" else 1
                tokens = 1 if work["part"] == "output" else n
                memory += read * times
                arithmetic += unpack * times + self._second_s(work) * SECOND_TERM * tokens
                arithmetic += 2 * work["weights"] * tokens / self._tile_s(work)
            # Attention computes scores and values of all positions so far, for each head.
            pairs = n * (position + n / 2)
            attention = 4.0 * c["n_layer"] * c["n_head"] * c["head_dim"] * pairs
            arithmetic += attention / (device.float_ops_s * ATTENTION)
            overhead += c["n_layer"] * LAYER_S + self._layers() * wanted * EXPERT_S
            hidden = n * self.uses * c["n_ff_expert"]
            arithmetic += hidden * HIDDEN_S / device.threads
            if self.experts:
                # Neighbours in the file that are both wanted are read one after the other, which
                # is like one large read, and no slower than each alone.
                run = 1 / max(1 - wanted / c["n_expert"], 1e-3)
                needed = self._layers() * wanted
                if number:  # the chunk before left some in the cache
                    needed *= 1 - min(1.0, self.slots / self.experts)
                read_bytes = needed * self.unit
                block = self.unit / 3
                rate = max(device.expert_bytes_s(block), device.expert_bytes_s(block * run))
                flash += read_bytes / rate
                overhead += needed * STORE_S
            flash += self.stream_s
            position += n
        if self.experts and self.turn.first:
            filled = min(self.slots, self._layers() * self._distinct(position))
            flash += filled * self.unit / device.fresh_bytes_s
        return dict(zip(RESOURCES, (memory, arithmetic, flash, overhead), strict=True))

    def prompt_s(self, times: Mapping[str, float]) -> float:
        """Returns the seconds of the prompt, with overlapping times counted once."""
        computing = sum(times[k] for k in RESOURCES if k != "flash")
        small, large = sorted((computing, times["flash"]))
        return large + EXPOSED * small

    def _layers(self) -> float:
        """Returns the number of layers with experts."""
        return self.uses / max(1, int(self.config["n_expert_used"]))

    def _distinct(self, n: int) -> float:
        """Returns the number of a layer's experts that n tokens use."""
        if not self.config["n_expert"]:
            return 0.0
        return distinct(self.config["n_expert"], self.config["n_expert_used"], n)

    def load_s(self) -> float:
        """Returns the seconds of a load with cold caches."""
        nbytes = int(self.plan["weight_bytes"])
        # A load of everything reads in order through the page cache, in pieces of 4 MiB; a load
        # under a budget reads past the page cache, as experts are read.
        if self.experts or self.streamed_bytes:
            rate = self.device.flash_bytes_s(4 << 20, engine_constants()["readers"])
        else:
            readers = engine_constants()["readers"]
            rate = self.device.flash_bytes_s(4 << 20, readers, "buffered") * READ_AHEAD
        fresh = (nbytes + int(self.plan["scratch_bytes"])) / self.device.fresh_bytes_s
        libraries = LIBRARY_BYTES / self.device.flash_bytes_s(LIBRARY_BLOCK, 1, "buffered")
        return LOAD_S + libraries + nbytes / rate + fresh
