"""Tables of the rotary embedding: linear scaling, YaRN (arXiv 2309.00071), long-context factors
(arXiv 2402.13753) and Llama 3's divisors. The angles are those of runtime/core/model/rope.cc.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .config import Rope

Table = npt.NDArray[np.float32]


def rope_tables(
    rope: Rope, positions: int, *, local: bool, divisors: npt.NDArray[np.float32] | None
) -> tuple[Table, Table]:
    """cos and sin of each position's angles, float32 [positions, n_rot / 2] each.

    local: the tables of a sliding layer, whose embedding is never scaled. divisors: divide the
    frequencies, [n_rot / 2].
    """
    half = rope.n_rot // 2
    base = rope.local_base if local else rope.base
    frequency = base ** (-2.0 * np.arange(half) / rope.n_rot)
    if divisors is not None:
        frequency = frequency / divisors.astype(np.float64)
    magnitude = 1.0
    if not local:
        magnitude = rope.attention_factor
        if rope.scaling in ("linear", "yarn"):
            keep = _kept(rope, base) if rope.scaling == "yarn" else np.zeros(half)
            frequency = frequency / rope.factor * (1 - keep) + frequency * keep
        if rope.scaling == "yarn":
            magnitude *= 1 + 0.1 * math.log(rope.factor)
    angle = np.arange(positions, dtype=np.float64)[:, None] * frequency
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    return cos.astype(np.float32), sin.astype(np.float32)


def _kept(rope: Rope, base: float) -> npt.NDArray[np.float64]:
    """YaRN's ramp, [n_rot / 2]: 1 if a pair keeps its speed, 0 if it is interpolated."""

    def pair(turns: float) -> float:
        ratio = math.log(rope.original_context / (turns * 2 * math.pi))
        return rope.n_rot * ratio / (2 * math.log(base))

    low = max(0.0, math.floor(pair(rope.beta_fast)))
    high = min(rope.n_rot - 1.0, math.ceil(pair(rope.beta_slow)))
    ramp = (np.arange(rope.n_rot // 2) - low) / max(0.001, high - low)
    return np.asarray(1 - np.clip(ramp, 0.0, 1.0), dtype=np.float64)
