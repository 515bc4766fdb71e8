"""Statistics of a generation: times, tokens a second, bytes a token, expert cache, peak memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar


@dataclass(frozen=True)
class ExpertStatistics:
    """Counters of the expert cache for one generation; prompt included unless named decode.

    Every use of an expert is a hit (it was in memory), late (its prefetch was in flight) or a miss.
    prefetches: submitted prefetches; prefetches_used: those that their forward pass needed, late
    ones included; cancelled: prefetches that never began.
    demand_bytes, prefetch_bytes, decode_bytes: bytes read from flash.
    stall_s, decode_stall_s: seconds that computation waited for reads.
    """

    hits: int = 0
    late: int = 0
    misses: int = 0
    prefetches: int = 0
    prefetches_used: int = 0
    cancelled: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    evictions: int = 0
    stall_s: float = 0.0
    decode_hits: int = 0
    decode_late: int = 0
    decode_misses: int = 0
    decode_bytes: int = 0
    decode_stall_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Hits among all uses; 0 if there were none."""
        return _share(self.hits, self.late + self.misses)

    @property
    def decode_hit_rate(self) -> float:
        """Hits among the uses of decode; 0 if there were none."""
        return _share(self.decode_hits, self.decode_late + self.decode_misses)

    @property
    def precision(self) -> float:
        """Prefetches that were needed among those that were read; 0 if none were."""
        read = max(self.prefetches - self.cancelled, self.prefetches_used)
        return _share(self.prefetches_used, read - self.prefetches_used)

    @property
    def recall(self) -> float:
        """Used experts that prefetch had read or in flight, among all that were not resident."""
        return _share(self.prefetches_used, self.misses)

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures, the derived ones included, for JSON."""
        derived = ("hit_rate", "decode_hit_rate", "precision", "recall")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class StreamStatistics:
    """Counters of streamed weights for one generation; prompt included unless named decode.

    Weights that every token uses are streamed if not all of them fit the budget. bytes,
    decode_bytes: bytes read from flash. stall_s, decode_stall_s: seconds that computation waited
    for these reads.
    """

    bytes: int = 0
    stall_s: float = 0.0
    decode_bytes: int = 0
    decode_stall_s: float = 0.0


def _share(part: float, rest: float) -> float:
    return part / (part + rest) if part + rest > 0 else 0.0


_T = TypeVar("_T", ExpertStatistics, StreamStatistics)


def gained(
    kind: type[_T], before: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> _T | None:
    """Returns what counters of this kind have gained, None if there are none."""
    if before is None or now is None:
        return None
    return kind(**{f.name: now[f.name] - before[f.name] for f in fields(kind)})


@dataclass(frozen=True)
class Statistics:
    """Figures of one generation. Times are seconds of wall clock spent inside stoker.

    prompt_tokens: tokens of the whole prompt; reused_tokens of them were already in the KV cache.
    new_tokens: tokens generated.
    ttft_s: from the call to the first token: tokenizing, prefill and the first choice.
    prefill_s, decode_s: evaluating the prompt; evaluating and choosing the tokens after the first.
    decode_bytes: weights and KV cache read from memory by the decode steps.
    peak_memory: largest resident size of the process so far, bytes (0 if unknown).
    memory_bandwidth, flash_bandwidth: measured on this machine, bytes a second (0 if unknown;
    see Model.forecast and Model.flash_bandwidth).
    experts: counters of the expert cache, None if all experts are in memory.
    stream: counters of streamed weights, None if all other weights are pinned.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_tokens: int = 0
    decode_bytes: int = 0
    peak_memory: int = 0
    memory_bandwidth: float = 0.0
    flash_bandwidth: float = 0.0
    experts: ExpertStatistics | None = None
    stream: StreamStatistics | None = None

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens evaluated a second (reused tokens do not count); 0 if there were none."""
        evaluated = self.prompt_tokens - self.reused_tokens
        return evaluated / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second after the first one; 0 if there were none."""
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes read from memory by one decode step, on average."""
        return self.decode_bytes / self.decode_tokens if self.decode_tokens else 0.0

    @property
    def gb_s(self) -> float:
        """Memory traffic of decode, 10^9 bytes a second."""
        return self.decode_bytes / self.decode_s / 1e9 if self.decode_s > 0 else 0.0

    @property
    def flash_bytes_per_token(self) -> float:
        """Bytes read from flash by one decode step, on average, prefetches included."""
        return self._flash_bytes / self.decode_tokens if self.decode_tokens else 0.0

    @property
    def _flash_bytes(self) -> int:
        """Bytes read from flash by decode."""
        return sum(part.decode_bytes for part in (self.experts, self.stream) if part is not None)

    @property
    def compute_s(self) -> float:
        """Seconds of decode that did not wait for reads: computation, choice of tokens, Python."""
        parts = (self.experts, self.stream)
        return self.decode_s - sum(part.decode_stall_s for part in parts if part is not None)

    @property
    def limit_share(self) -> float | None:
        """The limit's time over the measured time of decode: 1 is the limit of memory and flash.

        The limit is the larger of the bytes read from memory over its bandwidth, and the bytes
        really read from flash over its bandwidth. (A better cache would read less: `stoker
        simulate` tells how much.) It is None until `Model.forecast` has measured the memory's
        bandwidth.
        """
        if self.memory_bandwidth <= 0 or self.decode_s <= 0:
            return None
        limit = self.decode_bytes / self.memory_bandwidth
        if self.flash_bandwidth > 0:
            limit = max(limit, self._flash_bytes / self.flash_bandwidth)
        return limit / self.decode_s

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures, the derived ones included, for JSON."""
        derived = (
            "prefill_tok_s",
            "decode_tok_s",
            "bytes_per_token",
            "gb_s",
            "flash_bytes_per_token",
            "compute_s",
            "limit_share",
        )
        document = {f.name: getattr(self, f.name) for f in fields(self)}
        document |= {name: getattr(self, name) for name in derived}
        document["experts"] = None if self.experts is None else self.experts.as_dict()
        document["stream"] = None if self.stream is None else asdict(self.stream)
        return document

    def experts_line(self) -> str | None:
        """Returns a line of text about the expert cache, None if all experts are in memory."""
        e = self.experts
        if e is None:
            return None
        uses = e.hits + e.late + e.misses
        parts = [f"experts {e.hit_rate:.1%} of {uses} hit"]
        if e.late:
            parts[0] += f", {e.late / uses:.1%} late"
        if self.decode_tokens:
            parts[0] += f" (decode {e.decode_hit_rate:.1%})"
        read = e.decode_bytes if self.decode_tokens else e.demand_bytes + e.prefetch_bytes
        parts.append(self._flash_text(read))
        if e.prefetches:
            parts.append(f"prefetch {e.prefetches}, {e.precision:.0%} used, recall {e.recall:.0%}")
        else:
            parts.append("no prefetch")
        parts.append(self._stall_text(e))
        if self.limit_share is not None:
            parts.append(f"{self.limit_share:.0%} of the memory and flash limit")
        return " | ".join(parts)

    def stream_line(self) -> str | None:
        """Returns a line of text about streamed weights, None if all are pinned."""
        s = self.stream
        if s is None:
            return None
        read = s.decode_bytes if self.decode_tokens else s.bytes
        parts = ["streamed weights", self._flash_text(read), self._stall_text(s)]
        if self.experts is None and self.limit_share is not None:
            parts.append(f"{self.limit_share:.0%} of the memory and flash limit")
        return " | ".join(parts)

    def _flash_text(self, nbytes: int) -> str:
        """Returns a text about flash reads; nbytes: those of decode, if there was any."""
        text = f"flash {nbytes / max(self.decode_tokens, 1) / 1e6:.1f} MB"
        if self.decode_tokens:
            text += " a token"
        if self.flash_bandwidth:
            text += f" at {self.flash_bandwidth / 1e9:.2f} GB/s"
        return text

    def _stall_text(self, part: ExpertStatistics | StreamStatistics) -> str:
        text = f"waited {part.stall_s:.2f} s"
        if self.decode_s > 0:
            text += f", {part.decode_stall_s / self.decode_s:.0%} of decode"
        return text

    def lines(self) -> list[str]:
        """Returns `line` and, if weights are read from flash, `experts_line` and `stream_line`."""
        others = (self.experts_line(), self.stream_line())
        return [self.line(), *(line for line in others if line is not None)]

    def line(self) -> str:
        """Returns a line of text about times, tokens and memory."""
        evaluated = self.prompt_tokens - self.reused_tokens
        prompt = f"prompt {self.prompt_tokens} tokens"
        if self.reused_tokens:
            prompt += f" ({self.reused_tokens} reused)"
        parts = [f"TTFT {self.ttft_s * 1e3:.0f} ms", prompt]
        if evaluated and self.prefill_s > 0:
            parts[-1] += f" at {self.prefill_tok_s:.0f} tok/s"
        parts.append(f"answer {self.new_tokens} tokens")
        if self.decode_tokens:
            parts[-1] += f" at {self.decode_tok_s:.1f} tok/s"
        if self.decode_bytes:
            parts.append(f"{self.bytes_per_token / 1e6:.1f} MB a token, {self.gb_s:.1f} GB/s")
        if self.peak_memory:
            parts.append(f"peak memory {self.peak_memory / 2**20:.0f} MiB")
        return " | ".join(parts)


def peak_memory() -> int:
    """Returns the largest resident size of this process so far, bytes; 0 if it is unknown."""
    if sys.platform.startswith("linux"):
        # VmHWM is read because getrusage's ru_maxrss survives execve: it counts the parent's peak.
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except (OSError, ValueError, IndexError):
            return 0
        return 0
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
