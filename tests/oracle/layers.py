"""The parts that families are made of. Shapes: n tokens, D model width, H heads, K kv heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oracle.config import GATE_SIGMOID, GATE_SOFTMAX, Config

Array = npt.NDArray[Any]

ACTIVATION_GROUP = 32  # activations that share one int8 scale (kernels_cpu/kernel.h)
MIN_WEIGHT_SUM = 6.103515625e-5  # smallest normal f16: the floor of a renormalising divisor
YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Over the last axis."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def gelu_tanh_half(x: Array) -> Array:
    """GELU through a table of f16: what llama.cpp computes on a CPU."""
    rounded = x.astype(np.float16).astype(x.dtype)
    table = gelu_tanh(rounded).astype(np.float16).astype(x.dtype)
    return np.where(x <= -10.0, 0.0, np.where(x >= 10.0, x, table))


def softmax(x: Array) -> Array:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softcap(x: Array, cap: float) -> Array:
    return cap * np.tanh(x / cap) if cap else x


def int8_activations(x: Array, terms: int = 1) -> Array:
    """x [n, cols] as the engine passes it to a quantized matrix: int8 in groups of 32.

    With two terms the error of the first is rounded in the same way and added.
    """
    exact = x.astype(np.float32).reshape(x.shape[0], -1, ACTIVATION_GROUP)
    out = np.zeros(exact.shape, np.float64)
    for _ in range(terms):
        peak = np.abs(exact).max(axis=-1, keepdims=True)
        inverse = np.divide(np.float32(127.0), peak, out=np.zeros_like(peak), where=peak > 0)
        term = np.rint(exact * inverse).astype(np.float64) * (peak / np.float32(127.0))
        out += term
        exact = (exact - term).astype(np.float32)
    return out.reshape(x.shape).astype(x.dtype)


def yarn_ramp(n_rot: int, base: float, original_context: int) -> Array:
    """[n_rot / 2]: 1 where a pair turns so often that it is left alone, 0 where interpolated."""

    def pair_of(turns: float) -> float:
        return n_rot * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(0.0, math.floor(pair_of(YARN_BETA_FAST)))
    high = min(n_rot - 1.0, math.ceil(pair_of(YARN_BETA_SLOW)))
    return 1.0 - np.clip((np.arange(n_rot // 2) - low) / max(0.001, high - low), 0.0, 1.0)


def rope_table(
    c: Config, positions: Array, *, local: bool, divisors: Array | None
) -> tuple[Array, Array]:
    """cos and sin, each [n, n_rot / 2]. `divisors` [n_rot / 2] slow down single pairs (llama 3)."""
    base = c.rope_base_local if local else c.rope_base
    freq = base ** (-2.0 * np.arange(c.n_rot // 2) / c.n_rot)
    if divisors is not None:
        freq = freq / divisors
    s = c.scaling
    factor = 1.0 if local and c.architecture == "gemma3" else s.factor
    magnitude = s.attention_factor
    scaled = freq / factor
    if s.kind == "yarn":
        ramp = yarn_ramp(c.n_rot, base, s.original_context)
        scaled = scaled * (1.0 - ramp) + freq * ramp
        magnitude *= 1.0 + 0.1 * math.log(factor)
    angle = positions[:, None] * scaled[None, :]
    return np.cos(angle) * magnitude, np.sin(angle) * magnitude


def rotate(x: Array, table: tuple[Array, Array], *, adjacent: bool) -> Array:
    """x [n, heads, head_dim]; elements from n_rot on are left as they are."""
    cos, sin = (t[:, None, :].astype(x.dtype) for t in table)
    half = cos.shape[-1]
    first = slice(0, 2 * half, 2) if adjacent else slice(0, half)
    second = slice(1, 2 * half, 2) if adjacent else slice(half, 2 * half)
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def attention(q: Array, k: Array, v: Array, c: Config, *, window: int) -> Array:
    """q [n, H, dh], k and v [n, K, dh] -> [n, H * dh]. window 0: all earlier positions."""
    n = q.shape[0]
    group = c.n_head // c.n_head_kv
    at = np.arange(n)
    visible = (at[:, None] >= at[None, :]) | (not c.causal)
    if window:
        visible &= at[:, None] - at[None, :] < window
    out = np.empty_like(q)
    for h in range(c.n_head):
        scores = softcap(c.scale * (q[:, h] @ k[:, h // group].T), c.attention_softcap)
        out[:, h] = softmax(np.where(visible, scores, -np.inf)) @ v[:, h // group]
    return out.reshape(n, -1)


@dataclass(frozen=True)
class Route:
    """What one layer's router chose."""

    experts: npt.NDArray[np.int64]  # [n, n_expert_used], best first
    weights: Array  # [n, n_expert_used]
    margin: Array  # [n] score of the last chosen less that of the best not chosen


def best_groups(scores: Array, c: Config) -> Array:
    """scores [n, n_expert] with -inf for the experts of all groups but the best.

    A group's score is the sum of its two best.
    """
    grouped = scores.reshape(len(scores), c.groups, -1)
    top = np.sort(grouped, axis=-1)[:, :, -2:].sum(axis=-1)
    order = np.argsort(-top, axis=-1, kind="stable")[:, : c.groups_used]
    out = np.full_like(grouped, -np.inf)
    for row, groups in enumerate(order):
        out[row, groups] = grouped[row, groups]
    return out.reshape(scores.shape)


def route(
    router_logits: Array,
    c: Config,
    *,
    renormalise: bool,
    scores: Array | None = None,
    bias: Array | None = None,
) -> Route:
    """Chooses n_expert_used of [n, n_expert]; the lower index wins a tie.

    scores: choose instead of the router, which then weighs their choice, with the sum that its own
        would have had. bias: [n_expert], added to the gates for the choice alone.
    """
    if c.gating not in (GATE_SOFTMAX, GATE_SIGMOID):
        raise ValueError(f"expert_gating_func 1 or 2 expected, found {c.gating}")
    soft = c.gating == GATE_SOFTMAX
    p = softmax(router_logits) if soft else 1.0 / (1.0 + np.exp(-router_logits))
    chosen_elsewhere = scores is not None
    if scores is None:
        scores = router_logits if bias is None else p + bias
        if c.groups > 1:
            scores = best_groups(p if bias is None else scores, c)
    best = router_logits if bias is None else p + bias
    order = np.argsort(-scores, axis=-1, kind="stable")
    experts = np.sort(order[:, : c.n_expert_used], axis=-1)
    best_first = np.argsort(-np.take_along_axis(best, experts, -1), -1, kind="stable")
    experts = np.take_along_axis(experts, best_first, axis=-1)
    weights = np.take_along_axis(p, experts, axis=-1)
    total = weights.sum(axis=-1, keepdims=True)
    if chosen_elsewhere:  # they are all there is, however unlikely
        most = 1.0 if renormalise else np.sort(p)[:, -c.n_expert_used :].sum(-1, keepdims=True)
        alone = softmax(np.take_along_axis(router_logits, experts, axis=-1))
        weights = most * np.where(total < MIN_WEIGHT_SUM, alone, weights / (total + 1e-30))
    elif renormalise:
        weights = weights / np.maximum(total, MIN_WEIGHT_SUM)
    weights = weights * c.weights_scale
    ranked = np.take_along_axis(scores, order, axis=-1)
    last = c.n_expert_used
    margin = (
        ranked[:, last - 1] - ranked[:, last] if last < c.n_expert else np.full(len(ranked), np.inf)
    )
    return Route(experts, weights, margin)


def mixture(x: Array, r: Route, expert: Callable[[int, Array], Array]) -> Array:
    """sum_e weight_e * expert(e, tokens) over each token's own experts; x [n, D] -> [n, D].

    expert: (e, rows of x) -> its output for them.
    """
    out = np.zeros_like(x)
    for e in np.unique(r.experts):
        token, slot = np.nonzero(r.experts == e)
        out[token] += r.weights[token, slot, None] * expert(int(e), token)
    return out
