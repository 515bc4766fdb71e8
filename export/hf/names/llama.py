"""Llama, Mistral and Mixtral: one graph, with a mixture if there are experts."""

from __future__ import annotations

from ..folder.config import HfConfig
from .table import (
    ATTENTION,
    BIASES,
    ENDS,
    FEED_FORWARD,
    NORMS,
    Change,
    Family,
    Model,
    add_experts,
    changed,
    mixture,
    require,
    standard,
)

_ROWS = (
    *ENDS,
    *NORMS,
    *changed((*ATTENTION, *BIASES), Change.PAIRS, "q_proj", "k_proj"),
)


def _read(config: HfConfig) -> Model:
    mistral = config.text("model_type", default="llama") in ("mistral", "mixtral")
    model, _ = standard(config, context=None if mistral else 2048, eps=1e-5 if mistral else 1e-6)
    require(config, "mlp_bias", False, False)
    window = config.size("sliding_window", default=0, low=0, high=1 << 32)
    context = model.entries["context_length"]
    if mistral and window and isinstance(context, int) and window < context:
        model.notes.append(
            f"attention is not limited to the window of {window} tokens, as in other GGUF files "
            "of this family: past that position the answers differ from the original's"
        )
    return model


def _read_mixtral(config: HfConfig) -> Model:
    model = _read(config)
    n_ff = config.size("intermediate_size")
    add_experts(
        model,
        config,
        config.size("num_local_experts", "num_experts", default=8, high=65536),
        config.size("num_experts_per_tok", default=2),
        n_ff,
    )
    model.mixture = [True] * model.n_layer
    return model


DENSE = Family("llama", ("LlamaForCausalLM", "MistralForCausalLM"), (*_ROWS, *FEED_FORWARD), _read)
MIXTRAL = Family(
    "llama",
    ("MixtralForCausalLM",),
    (*_ROWS, *mixture("block_sparse_moe", "gate", "w1", "w3", "w2")),
    _read_mixtral,
)
FAMILIES = (DENSE, MIXTRAL)
