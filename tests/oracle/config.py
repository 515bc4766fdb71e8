"""Hyperparameters of a model, from GGUF metadata with the defaults of the format's users."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from oracle.weights import Weights

ADJACENT_PAIRS = frozenset({"llama", "tokenrouted"})  # all others rotate (i, i + n_rot / 2)
GATE_SOFTMAX, GATE_SIGMOID = 1, 2  # values of <arch>.expert_gating_func
# Where the file does not say; softmax for all others. smallthinker must say.
GATING = {"smallthinker": 0, "glm4moe": GATE_SIGMOID}
SMALLTHINKER_PERIOD = 4  # every fourth layer is global and has no positions
PREGATED = "pregated-"  # prefix of architectures whose experts are chosen a layer ahead
GEMMA3_27B_LAYERS = 62  # the one size whose queries are not scaled by the head size


@dataclass(frozen=True)
class RopeScaling:
    """How positions are stretched beyond the trained context."""

    kind: str = "none"  # none, linear, yarn, longrope
    factor: float = 1.0
    original_context: int = 0  # tokens
    attention_factor: float = 1.0  # multiplies cos and sin


@dataclass(frozen=True)
class Config:
    """Sizes in elements; one entry a layer in the lists."""

    architecture: str  # without PREGATED
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int
    context: int
    rms_eps: float
    rope_base: float
    rope_base_local: float
    scaling: RopeScaling
    scale: float  # of q . k
    attention_softcap: float  # 0: none
    causal: bool  # tokens see no later ones
    final_softcap: float  # 0: none
    n_expert: int
    n_expert_used: int
    gating: int
    weights_scale: float  # of the used experts' weights
    groups: int  # that experts compete in; 1: none
    groups_used: int
    window: int  # tokens a sliding layer sees, its own included; 0: no sliding layers
    sliding: list[bool] = field(default_factory=list)  # [n_layer]
    positions: list[bool] = field(default_factory=list)  # [n_layer] whether the layer has RoPE


def scalar(value: Any) -> Any:
    """Per-layer arrays are accepted where all layers agree."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ValueError(f"the oracle runs equal layers only, found {value}")
        return value[0]
    return value


def read_config(w: Weights) -> Config:
    """The configuration of `w`; raises KeyError where a required key is missing."""
    prefix = w.get("general.architecture")
    arch = prefix.removeprefix(PREGATED)

    def get(key: str, default: Any = None) -> Any:
        value = scalar(w.get(f"{prefix}.{key}", default))
        if value is None:
            raise KeyError(f"{prefix}.{key}")
        return value

    n_layer, n_embd, n_head = (
        get("block_count") - get("nextn_predict_layers", 0),
        get("embedding_length"),
        get("attention.head_count"),
    )
    head_dim = get("attention.key_length", n_embd // n_head)
    context = get("context_length")
    kind = get("rope.scaling.type", "linear")
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0)) or 1.0
    base = get("rope.freq_base", 10000.0)

    window = get("attention.sliding_window", 0) if arch in ("gemma3", "smallthinker") else 0
    pattern = w.get(f"{prefix}.attention.sliding_window_pattern")
    sliding = [False] * n_layer
    positions = [True] * n_layer
    if window > 0 and arch == "gemma3":
        period = 6 if pattern is None else pattern
        sliding = (
            [layer % period < period - 1 for layer in range(n_layer)]
            if isinstance(period, int)
            else list(pattern)
        )
    if window > 0 and arch == "smallthinker":
        period = SMALLTHINKER_PERIOD if pattern is None else pattern
        sliding = (
            [layer % period != 0 for layer in range(n_layer)]
            if isinstance(period, int)
            else list(pattern)
        )
        positions = [layer % SMALLTHINKER_PERIOD != 0 for layer in range(n_layer)]

    scale = 1.0 / math.sqrt(head_dim)
    if arch == "gemma3" and n_layer == GEMMA3_27B_LAYERS:
        scale = 1.0 / math.sqrt(n_embd // n_head)
    return Config(
        architecture=arch,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=get("attention.head_count_kv", n_head),
        head_dim=head_dim,
        n_rot=get("rope.dimension_count", head_dim),
        context=context,
        rms_eps=get("attention.layer_norm_rms_epsilon"),
        rope_base=base,
        rope_base_local=get("rope.freq_base_swa", 10000.0 if arch == "gemma3" else base),
        scaling=RopeScaling(
            kind=kind,
            factor=1.0 if kind == "none" else factor,
            original_context=get("rope.scaling.original_context_length", context),
            attention_factor=get("rope.scaling.attn_factor", 1.0),
        ),
        scale=get("attention.scale", 0.0) or scale,
        attention_softcap=get("attn_logit_softcapping", 0.0),
        causal=get("attention.causal", True),
        final_softcap=get("final_logit_softcapping", 0.0),
        n_expert=get("expert_count", 0),
        n_expert_used=get("expert_used_count", 0),
        gating=get("expert_gating_func", GATING.get(arch, GATE_SOFTMAX)),
        weights_scale=get("expert_weights_scale", 1.0) or 1.0,
        groups=max(1, get("expert_group_count", 1)),
        groups_used=get("expert_group_used_count", 1),
        window=window,
        sliding=sliding,
        positions=positions,
    )
