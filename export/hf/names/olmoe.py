"""OLMoE: a mixture in every layer; q and k normalised over their whole width."""

from __future__ import annotations

from dataclasses import replace

from ..folder.config import HfConfig
from .table import (
    ATTENTION,
    BIASES,
    ENDS,
    HEAD_NORMS,
    NORMS,
    Family,
    Model,
    add_experts,
    mixture,
    note_biases,
    require,
    standard,
)

_NORMS = tuple(
    replace(row, shape=("n_q",) if "q_norm" in row.source else ("n_kv",)) for row in HEAD_NORMS
)


def _read(config: HfConfig) -> Model:
    model, _ = standard(config, context=4096, eps=1e-5)
    require(config, "norm_topk_prob", False, False)
    if config.get("clip_qkv") is not None:
        raise config.unsupported("clip_qkv", "none", config.get("clip_qkv"))
    n_ff = config.size("intermediate_size")
    n_expert = config.size("num_experts", "num_local_experts", default=64, high=65536)
    add_experts(model, config, n_expert, config.size("num_experts_per_tok", default=8), n_ff)
    model.mixture = [True] * model.n_layer
    model.needs_output = True
    note_biases(config, model)
    if model.sizes["n_kv"] != model.sizes["n_q"]:
        model.notes.append(
            "keys have fewer heads than queries: stoker runs that, llama.cpp does not"
        )
    return model


OLMOE = Family(
    "olmoe",
    ("OlmoeForCausalLM",),
    (
        *ENDS,
        *NORMS,
        *ATTENTION,
        *BIASES,
        *_NORMS,
        *mixture("mlp", "gate", "gate_proj", "up_proj", "down_proj"),
    ),
    _read,
)
FAMILIES = (OLMOE,)
