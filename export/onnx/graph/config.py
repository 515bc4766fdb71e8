"""A decoder's configuration: sizes, rotary embedding, norms and attention, from GGUF metadata.

Keys and their defaults are those of the GGUF specification and of the files in use; a family's
own habits are one row of `FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ....runtime.base.errors import ModelFileError, UnsupportedModelError

Activation = Literal["silu", "gelu", "relu"]
RopeScaling = Literal["none", "linear", "yarn", "longrope"]
Gating = Literal["softmax", "sigmoid"]  # how a router's logits become weights
_SCALINGS: tuple[RopeScaling, ...] = ("none", "linear", "yarn", "longrope")
_GEMMA3_27B_LAYERS = 62  # the one size whose queries are not scaled by the head's width


@dataclass(frozen=True)
class Family:
    """Properties of an architecture that its files do not tell.

    adjacent_pairs: rotary pairs are (2i, 2i + 1) instead of (i, i + n_rot / 2).
    head_norms: q and k are normalised, each head by itself; row_norms: over all heads at once.
    post_norms: norms after attention and after the feed-forward, before they are added.
    scales_embedding: the embedding is multiplied by sqrt(n_embd).
    window_period: all but one of so many layers use a sliding window; 0: no layer does.
    global_first: that one is the first instead of the last, and in models with a window it has
    no rotary embedding.
    local_base: rotary base of sliding layers, if the file has none of its own; 0: the others'.
    renormalises: used experts' weights are divided by their sum; None: a dense family.
    routes_early: the router reads what the layer was given, before attention.
    """

    adjacent_pairs: bool = False
    activation: Activation = "silu"
    head_norms: bool = False
    row_norms: bool = False
    post_norms: bool = False
    scales_embedding: bool = False
    window_period: int = 0
    global_first: bool = False
    local_base: float = 0.0
    renormalises: bool | None = None
    routes_early: bool = False


FAMILIES = {
    "llama": Family(adjacent_pairs=True, renormalises=True),  # with experts: Mixtral
    "qwen2": Family(),
    "qwen3": Family(head_norms=True),
    "gemma3": Family(
        activation="gelu",
        head_norms=True,
        post_norms=True,
        scales_embedding=True,
        window_period=6,
        local_base=10000.0,
    ),
    "qwen2moe": Family(renormalises=False),
    "qwen3moe": Family(head_norms=True, renormalises=True),
    "olmoe": Family(row_norms=True, renormalises=False),
    "smallthinker": Family(
        activation="relu",
        window_period=4,
        global_first=True,
        renormalises=True,
        routes_early=True,
    ),
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. n_rot: rotated values of a head, 0: none."""

    n_rot: int
    base: float
    local_base: float  # base of sliding layers, which are then not scaled; 0: the others' base
    scaling: RopeScaling
    factor: float  # positions are divided by it
    original_context: int  # tokens, before scaling
    attention_factor: float  # multiplies cos and sin
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes in elements; window in tokens, 0: none."""

    architecture: str
    family: Family
    n_layer: int
    n_embd: int
    n_vocab: int
    n_head: int
    n_head_kv: int
    head_dim: int
    context_train: int
    norm_eps: float
    rope: Rope
    attention_scale: float
    attention_softcap: float  # 0: none
    final_softcap: float  # 0: none
    window: int
    sliding: tuple[bool, ...]  # [n_layer] layers that use the window
    rotates: tuple[bool, ...]  # [n_layer] layers with rotary embedding
    n_expert: int  # 0: dense
    n_expert_used: int
    gating: Gating


def read_config(get: Callable[[str], Any], n_vocab: int, path: str) -> DecoderConfig:
    """The configuration of a GGUF file that `GgufFile` has opened.

    get: a metadata key to its value, None if absent. n_vocab: rows of its embedding. Raises
    UnsupportedModelError for a family that has no graph here, ModelFileError for bad values.
    """
    arch = str(get("general.architecture"))
    family = FAMILIES.get(arch)
    if family is None:
        raise UnsupportedModelError(
            f"{path}: architecture: expected one of {', '.join(FAMILIES)} for ONNX, found {arch}"
        )

    causal = get(f"{arch}.attention.causal")
    if causal not in (None, True):
        if not isinstance(causal, bool):
            raise ModelFileError(
                f"{path}: {arch}.attention.causal: expected true or false, found {causal!r:.40}"
            )
        raise UnsupportedModelError(
            f"{path}: {arch}.attention.causal: expected true for ONNX (a decoder's tokens attend "
            "to earlier ones), found false"
        )

    def number(key: str, default: float | None = None) -> float:
        value = get(f"{arch}.{key}")
        if isinstance(value, (list, tuple)):  # one value a layer
            if len(set(value)) > 1:
                raise UnsupportedModelError(
                    f"{path}: {arch}.{key} differs between layers: expected one value, found "
                    f"{value[0]} and {next(v for v in value if v != value[0])}"
                )
            value = value[0] if value else None
        if value is None:
            if default is None:
                raise ModelFileError(f"{path}: expected {arch}.{key} in its metadata, found none")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelFileError(f"{path}: {arch}.{key}: expected a number, found {value!r}")
        if not math.isfinite(value):
            raise ModelFileError(f"{path}: {arch}.{key}: expected a finite number, found {value}")
        return value

    def size(key: str, default: int | None = None, low: int = 1) -> int:
        value = int(number(key, default))
        if value < low:
            raise ModelFileError(f"{path}: {arch}.{key}: expected at least {low}, found {value}")
        return value

    n_layer, n_embd = size("block_count"), size("embedding_length")
    n_head = size("attention.head_count")
    n_head_kv = size("attention.head_count_kv", n_head)
    head_dim = size("attention.key_length", n_embd // n_head)
    value_dim = size("attention.value_length", n_embd // n_head)
    if head_dim != value_dim:
        raise UnsupportedModelError(
            f"{path}: width of a head: expected the same for keys and values, found {head_dim} "
            f"and {value_dim}"
        )
    context = size("context_length", 2048)
    scale = number("attention.scale", 0.0)
    if scale == 0:
        wide = arch == "gemma3" and n_layer == _GEMMA3_27B_LAYERS
        scale = 1.0 / math.sqrt(n_embd // n_head if wide else head_dim)
    window = size("attention.sliding_window", 0, 0) if family.window_period else 0
    scaling = get(f"{arch}.rope.scaling.type")
    n_expert = 0 if family.renormalises is None else size("expert_count", 0, 0)
    n_expert_used = size("expert_used_count") if n_expert else 0
    if n_expert_used > n_expert:
        raise ModelFileError(
            f"{path}: {arch}.expert_used_count: expected 1 to {n_expert}, found {n_expert_used}"
        )
    rope = _rope(number, scaling, f"{path}: {arch}", family, head_dim)
    return DecoderConfig(
        architecture=arch,
        family=family,
        n_layer=n_layer,
        n_embd=n_embd,
        n_vocab=n_vocab,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        context_train=context,
        norm_eps=number("attention.layer_norm_rms_epsilon", 1e-5),
        rope=rope,
        attention_scale=scale,
        attention_softcap=number("attn_logit_softcapping", 0.0),
        final_softcap=number("final_logit_softcapping", 0.0),
        window=window,
        sliding=_sliding(get(f"{arch}.attention.sliding_window_pattern"), family, window, n_layer),
        rotates=tuple(
            rope.n_rot > 0
            and not (family.global_first and window and il % family.window_period == 0)
            for il in range(n_layer)
        ),
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        gating=_gating(get(f"{arch}.expert_gating_func"), f"{path}: {arch}", family),
    )


def _gating(value: Any, where: str, family: Family) -> Gating:
    """value: 1 softmax, 2 sigmoid; only families that route early tell."""
    if not family.routes_early or value == 1:
        return "softmax"
    if value != 2:
        raise UnsupportedModelError(
            f"{where}.expert_gating_func: expected 1 (softmax) or 2 (sigmoid), found {value}"
        )
    return "sigmoid"


def _sliding(pattern: Any, family: Family, window: int, n_layer: int) -> tuple[bool, ...]:
    """Which layers slide; pattern: a period, or one flag a layer, or None."""
    if window == 0:
        return (False,) * n_layer
    if isinstance(pattern, (list, tuple)):
        return tuple(bool(flag) for flag in pattern[:n_layer])
    period = family.window_period if pattern is None else int(pattern)
    if period <= 0:
        return (True,) * n_layer
    whole = 0 if family.global_first else period - 1
    return tuple(il % period != whole for il in range(n_layer))


def _rope(
    number: Callable[..., float], scaling: Any, where: str, family: Family, head_dim: int
) -> Rope:
    factor = number("rope.scaling.factor", number("rope.scale_linear", 1.0))
    if factor <= 0:
        factor = 1.0
    scaling = scaling or ("none" if factor == 1.0 else "linear")
    kind = next((known for known in _SCALINGS if known == scaling), None)
    if kind is None:
        raise UnsupportedModelError(
            f"{where}.rope.scaling.type: expected one of {', '.join(_SCALINGS)}, found {scaling}"
        )
    n_rot = int(number("rope.dimension_count", head_dim))
    base = number("rope.freq_base", 10000.0)
    if n_rot % 2 or not 0 <= n_rot <= head_dim or base <= 0:
        raise ModelFileError(
            f"{where}: rotary embedding: expected an even width up to {head_dim} and a positive "
            f"base, found {n_rot} and {base}"
        )
    return Rope(
        n_rot=n_rot,
        base=base,
        local_base=number("rope.freq_base_swa", 0.0) or family.local_base,
        scaling=kind,
        factor=1.0 if kind == "none" else factor,
        original_context=int(
            number("rope.scaling.original_context_length", number("context_length", 2048))
        ),
        attention_factor=number("rope.scaling.attn_factor", 1.0),
        beta_fast=number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=number("rope.scaling.yarn_beta_slow", 1.0),
    )
