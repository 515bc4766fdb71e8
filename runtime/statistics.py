"""What a generation cost: times, tokens a second, bytes a token, peak memory."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Statistics:
    """Figures of one generation. Times are seconds of wall clock spent inside stoker.

    prompt_tokens: of the whole prompt; reused_tokens of them were already in the KV cache.
    new_tokens: tokens generated.
    ttft_s: from the call to the first token: tokenizing, prefill and the first choice.
    prefill_s, decode_s: evaluating the prompt; evaluating and choosing the tokens after the first.
    decode_bytes: weights and KV cache read from memory by the decode steps.
    peak_memory: largest resident size of the process so far, bytes (0 where unknown).
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

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens evaluated a second (reused ones do not count); 0 if there were none."""
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

    def as_dict(self) -> dict[str, Any]:
        """All figures, the derived ones included, for JSON."""
        derived = ("prefill_tok_s", "decode_tok_s", "bytes_per_token", "gb_s")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def line(self) -> str:
        """One line for people."""
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
    """Largest resident size of this process so far, bytes; 0 where the system does not tell."""
    if sys.platform.startswith("linux"):
        # VmHWM, not getrusage: ru_maxrss survives execve and would count the parent's peak.
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
