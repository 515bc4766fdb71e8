"""SmallThinker: routers before attention, ReGLU experts, every fourth layer without positions."""

from __future__ import annotations

from ..folder.config import HfConfig
from .table import ATTENTION, ENDS, NORMS, Family, Model, add_experts, mixture, require, standard

_PERIOD = 4  # one layer of so many has no rotary embedding, in models with a window
_SOFTMAX, _SIGMOID = 1, 2  # values of expert_gating_func
_LLAMA_CPP_WINDOW = 4096  # the window that llama.cpp takes whatever the file says


def _read(config: HfConfig) -> Model:
    model, _ = standard(
        config, head_dim=128, context=131072, base=1e6, tied=True, activation=("relu",)
    )
    require(config, "use_qk_norm", False, False)
    require(config, "norm_topk_prob", True, True)
    require(config, "moe_enable_early_router", True, True)
    require(config, "moe_enable_secondary_experts", False, False)
    if config.get("moe_shared_primary_experts"):
        raise config.unsupported(
            "moe_shared_primary_experts", "0", config.get("moe_shared_primary_experts")
        )
    if not all(config.flags("moe_layer_layout", model.n_layer) or [True]):
        raise config.unsupported("moe_layer_layout", "a mixture in every layer", "dense ones")
    n_ff = config.size("moe_ffn_hidden_size")
    add_experts(
        model,
        config,
        config.size("moe_num_primary_experts", "num_experts", high=65536),
        config.size("moe_num_active_primary_experts", "num_experts_per_tok"),
        n_ff,
    )
    model.mixture = [True] * model.n_layer
    model.entries["expert_feed_forward_length"] = n_ff
    model.entries["feed_forward_length"] = n_ff
    soft = config.flag("moe_primary_router_apply_softmax", False)
    model.entries["expert_gating_func"] = _SOFTMAX if soft else _SIGMOID
    _windows(config, model)
    return model


def _windows(config: HfConfig, model: Model) -> None:
    n = model.n_layer
    slides = config.flags("sliding_window_layout", n) or [False] * n
    rotates = config.flags("rope_layout", n) or [True] * n
    window = config.size("sliding_window_size", default=4096, low=0, high=1 << 32)
    expected = [True] * n
    if any(slides) and window:
        model.entries["attention.sliding_window"] = window
        expected = [il % _PERIOD != 0 for il in range(n)]
        if slides != expected:
            model.entries["attention.sliding_window_pattern"] = slides
        if window != _LLAMA_CPP_WINDOW:
            model.notes.append(f"llama.cpp takes a window of 4096 tokens, not {window}")
    if rotates != expected:
        raise config.unsupported(
            "rope_layout", str([int(r) for r in expected]), [int(r) for r in rotates]
        )


SMALLTHINKER = Family(
    "smallthinker",
    ("SmallThinkerForCausalLM", "SmallthinkerForCausalLM"),
    (
        *ENDS,
        *NORMS,
        *ATTENTION,
        *mixture("block_sparse_moe", "primary_router", "gate", "up", "down"),
    ),
    _read,
)
FAMILIES = (SMALLTHINKER,)
