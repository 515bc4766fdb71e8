"""Qwen 2, Qwen 2 MoE, Qwen 3 and Qwen 3 MoE."""

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
    note_biases,
    refuse_windows,
    require,
    standard,
)

_ROWS = (*ENDS, *NORMS, *ATTENTION, *BIASES)
_DENSE_LAYERS = tuple(replace(row, layers=Layers.DENSE) for row in FEED_FORWARD)
_EXPERTS = mixture("mlp", "gate", "gate_proj", "up_proj", "down_proj")
_B = "model.layers.{i}.mlp.shared_expert"
_SHARED = tuple(
    replace(row, layers=Layers.MIXTURE)
    for row in (
        Row(_B + "_gate.weight", "blk.{i}.ffn_gate_inp_shexp.weight", ("one", "n_embd")),
        Row(_B + ".gate_proj.weight", "blk.{i}.ffn_gate_shexp.weight", ("n_ff_shared", "n_embd")),
        Row(_B + ".up_proj.weight", "blk.{i}.ffn_up_shexp.weight", ("n_ff_shared", "n_embd")),
        Row(_B + ".down_proj.weight", "blk.{i}.ffn_down_shexp.weight", ("n_embd", "n_ff_shared")),
    )
)


def _read_qwen2(config: HfConfig) -> Model:
    model, _ = standard(config, context=32768)
    refuse_windows(config, model)
    return model


def _read_qwen3(config: HfConfig) -> Model:
    model, _ = standard(config, head_dim=128, context=32768)
    note_biases(config, model)
    refuse_windows(config, model)
    return model


def _read_mixture(config: HfConfig, model: Model) -> Model:
    refuse_windows(config, model)
    n_ff = config.size("moe_intermediate_size")
    n_expert = config.size("num_experts", "num_local_experts", high=65536)
    add_experts(model, config, n_expert, config.size("num_experts_per_tok"), n_ff)
    model.entries["expert_feed_forward_length"] = n_ff
    step = config.size("decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(il) is int for il in dense):
        raise config.wrong("mlp_only_layers", "a list of layers", dense)
    model.mixture = [(il + 1) % step == 0 and il not in dense for il in range(model.n_layer)]
    if not all(model.mixture):
        if not model.sizes["n_ff"]:
            raise config.wrong("intermediate_size", "a width for the dense layers", None)
        model.notes.append("some layers are dense: stoker runs that, llama.cpp does not")
    return model


def _read_qwen2moe(config: HfConfig) -> Model:
    model = _read_mixture(config, standard(config, context=32768)[0])
    require(config, "norm_topk_prob", False, False)
    shared = config.size("shared_expert_intermediate_size")
    model.sizes["n_ff_shared"] = shared
    model.entries["expert_shared_feed_forward_length"] = shared
    model.needs_output = True
    return model


def _read_qwen3moe(config: HfConfig) -> Model:
    model = _read_mixture(config, standard(config, context=32768)[0])
    require(config, "norm_topk_prob", True, False)
    note_biases(config, model)
    return model


QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), (*_ROWS, *FEED_FORWARD), _read_qwen2)
QWEN2MOE = Family(
    "qwen2moe",
    ("Qwen2MoeForCausalLM",),
    (*_ROWS, *_DENSE_LAYERS, *_EXPERTS, *_SHARED),
    _read_qwen2moe,
)
QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), (*_ROWS, *HEAD_NORMS, *FEED_FORWARD), _read_qwen3)
QWEN3MOE = Family(
    "qwen3moe",
    ("Qwen3MoeForCausalLM",),
    (*_ROWS, *HEAD_NORMS, *_DENSE_LAYERS, *_EXPERTS),
    _read_qwen3moe,
)
FAMILIES = (QWEN2, QWEN2MOE, QWEN3, QWEN3MOE)
