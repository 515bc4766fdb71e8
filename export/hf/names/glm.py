"""GLM-4.5."""

from __future__ import annotations

from dataclasses import replace

from ..folder.config import HfConfig
from .table import (
    ATTENTION,
    BIASES,
    ENDS,
    FEED_FORWARD,
    HEAD_NORMS,
    NORMS,
    Family,
    Layers,
    Model,
    Row,
    add_experts,
    mixture,
    standard,
)

_SIGMOID = 2
_B = "model.layers.{i}.mlp."
_S = _B + "shared_experts."
_MIXTURE = tuple(
    replace(row, layers=Layers.MIXTURE)
    for row in (
        Row(_B + "gate.e_score_correction_bias", "blk.{i}.exp_probs_b.bias", ("n_expert",)),
        Row(_S + "gate_proj.weight", "blk.{i}.ffn_gate_shexp.weight", ("n_ff_shared", "n_embd")),
        Row(_S + "up_proj.weight", "blk.{i}.ffn_up_shexp.weight", ("n_ff_shared", "n_embd")),
        Row(_S + "down_proj.weight", "blk.{i}.ffn_down_shexp.weight", ("n_embd", "n_ff_shared")),
    )
)
_ROWS = (
    *ENDS,
    NORMS[0],
    replace(NORMS[1], target="blk.{i}.post_attention_norm.weight"),
    *ATTENTION,
    *BIASES,
    *(replace(row, optional=True) for row in HEAD_NORMS),
    *(replace(row, layers=Layers.DENSE) for row in FEED_FORWARD),
    *mixture("mlp", "gate", "gate_proj", "up_proj", "down_proj"),
    *_MIXTURE,
)


def _read(config: HfConfig) -> Model:
    model, _ = standard(config, head_dim=128, context=131072, eps=1e-5, rotated=0.5)
    n_expert = config.size("n_routed_experts", "num_local_experts", default=128, high=65536)
    used = config.size("num_experts_per_tok", default=8)
    n_ff = config.size("moe_intermediate_size", default=1408)
    add_experts(model, config, n_expert, used, n_ff)
    shared = config.size("n_shared_experts", default=1, high=1024)
    model.sizes["n_ff_shared"] = shared * n_ff
    dense = config.size("first_k_dense_replace", default=1, low=0, high=model.n_layer)
    model.mixture = [il >= dense for il in range(model.n_layer)]
    model.foresees = config.size("num_nextn_predict_layers", "num_mtp_layers", default=0, low=0)
    model.entries |= {
        "expert_feed_forward_length": n_ff,
        "expert_shared_count": shared,
        "leading_dense_block_count": dense,
        "expert_gating_func": _SIGMOID,
        "expert_weights_scale": config.number("routed_scaling_factor", 1.0),
        "expert_weights_norm": config.flag("norm_topk_prob", True),
        "expert_group_count": config.size("n_group", default=1),
        "expert_group_used_count": config.size("topk_group", default=1),
    }
    return model


FAMILIES = (Family("glm4moe", ("Glm4MoeForCausalLM",), _ROWS, _read),)
