"""Rotary position embedding: from config.json's spellings to GGUF's keys and tensors.

transformers 4 has rope_theta and rope_scaling, transformers 5 has rope_parameters (Gemma 3: one
for each type of layer). The formulas of the scalings are those of their papers as transformers
computes them; the engine's are in runtime/core/model/rope.cc.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...writer.gguf_values import Value
from .config import HfConfig

Floats = npt.NDArray[np.float32]


@dataclass
class Rope:
    """base: of the frequencies; width: rotated values of a head; entries: GGUF keys without the
    architecture; tensors: by name.
    """

    base: float
    width: int
    entries: dict[str, Value] = field(default_factory=dict)
    tensors: dict[str, Floats] = field(default_factory=dict)


def read_rope(
    config: HfConfig,
    head_dim: int,
    context: int,
    *,
    default_base: float = 10000.0,
    layers: str | None = None,
    share: float | None = None,
) -> Rope:
    """The rotary embedding of a model.

    head_dim: values of a head. context: max_position_embeddings. layers: the type of layer whose
    parameters count, if the file has several. share: share of a head's values that is rotated, if
    the folder does not say; None: the family rotates all. Raises ModelFileError,
    UnsupportedModelError.
    """
    found = config.part("rope_parameters")
    if found is not None and layers is not None:
        found = found.part(layers) or found
    scaling = found or config.part("rope_scaling") or HfConfig(config.path, {})
    base = scaling.number("rope_theta", config.number("rope_theta", default_base))
    if base <= 0:
        raise config.wrong("rope_theta", "a positive number", base)
    found_share = scaling.number(
        "partial_rotary_factor", config.number("partial_rotary_factor", share or 1.0)
    )
    if share is None and found_share != 1.0:
        raise config.unsupported("partial_rotary_factor", "1", found_share)
    width = int(head_dim * found_share)
    if not 0 < width <= head_dim or width % 2:
        raise config.wrong("partial_rotary_factor", "an even number of values", found_share)
    rope = Rope(base, width)
    kind = scaling.text("rope_type", "type", default="default")
    if kind == "default":
        return rope
    writer = {"linear": _linear, "yarn": _yarn, "llama3": _llama3, "longrope": _longrope}.get(kind)
    if writer is None:
        raise config.unsupported("rope_type", "default, linear, yarn, llama3 or longrope", kind)
    writer(rope, scaling, width, context)
    return rope


def _factor(scaling: HfConfig) -> float:
    factor = scaling.number("factor")
    if factor < 1:
        raise scaling.wrong("rope factor", "at least 1", factor)
    return factor


def _original(scaling: HfConfig, context: int) -> int:
    return scaling.size("original_max_position_embeddings", default=context, high=1 << 32)


def _linear(rope: Rope, scaling: HfConfig, head_dim: int, context: int) -> None:
    rope.entries["rope.scaling.type"] = "linear"
    rope.entries["rope.scaling.factor"] = _factor(scaling)


def _yarn(rope: Rope, scaling: HfConfig, head_dim: int, context: int) -> None:
    factor = _factor(scaling)
    if not scaling.flag("truncate", True):
        raise scaling.unsupported("truncate (yarn)", "true", False)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    wanted = scaling.number("attention_factor", 0.0)
    if not wanted:
        over, under = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
        wanted = magnitude(over) / magnitude(under) if over and under else magnitude(1.0)
    rope.entries["rope.scaling.type"] = "yarn"
    rope.entries["rope.scaling.factor"] = factor
    rope.entries["rope.scaling.original_context_length"] = _original(scaling, context)
    # The engines multiply what the file says by the paper's magnitude.
    if wanted != magnitude(1.0):
        rope.entries["rope.scaling.attn_factor"] = wanted / magnitude(1.0)
    for key, name, default in (
        ("beta_fast", "yarn_beta_fast", 32.0),
        ("beta_slow", "yarn_beta_slow", 1.0),
    ):
        value = scaling.number(key, 0.0) or default
        if value != default:
            rope.entries[f"rope.scaling.{name}"] = value


def _llama3(rope: Rope, scaling: HfConfig, head_dim: int, context: int) -> None:
    """Divisors of the frequencies: 1 for fast ones, the factor for slow ones, a ramp between."""
    factor = _factor(scaling)
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if not 0 < low < high:
        raise scaling.wrong("low_freq_factor", f"more than 0 and less than {high}", low)
    original = _original(scaling, context)
    turns = original / (2 * np.pi) * rope.base ** -(np.arange(0, head_dim, 2) / head_dim)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    rope.tensors["rope_freqs.weight"] = (1 / ((1 - keep) / factor + keep)).astype(np.float32)


def _longrope(rope: Rope, scaling: HfConfig, head_dim: int, context: int) -> None:
    original = _original(scaling, context)
    factor = scaling.number("factor", context / original)
    magnitude = scaling.number("attention_factor", 0.0)
    if not magnitude:
        spread = math.log(factor) / math.log(original) if factor > 1 else 0.0
        magnitude = math.sqrt(1 + spread)
    rope.entries["rope.scaling.type"] = "longrope"
    rope.entries["rope.scaling.factor"] = factor
    rope.entries["rope.scaling.original_context_length"] = original
    rope.entries["rope.scaling.attn_factor"] = magnitude
    for length in ("long", "short"):
        values = scaling.get(f"{length}_factor")
        numbers = isinstance(values, list) and {type(v) for v in values} <= {int, float}
        if not numbers or len(values) != head_dim // 2:
            raise scaling.wrong(f"{length}_factor", f"{head_dim // 2} numbers", values)
        rope.tensors[f"rope_factors_{length}.weight"] = np.asarray(values, np.float32)
