"""Gemma 3, text only: the text part of files that see images is taken, the rest left out."""

from __future__ import annotations

import math

from ..folder.config import HfConfig
from ..folder.rope import read_rope
from .table import (
    ATTENTION,
    BIASES,
    ENDS,
    FEED_FORWARD,
    HEAD_NORMS,
    Change,
    Family,
    Model,
    Row,
    changed,
    note_biases,
    standard,
)

_PERIOD = 6  # layers: five with a sliding window, one global
_LOCAL_BASE = 10000.0  # the engines' default, if a file names none
_BIG_LAYERS = 62  # the 27B model, whose queries the engines scale by n_embd / n_head
_L = "model.layers.{i}."
_NORMS = (
    Row(_L + "input_layernorm.weight", "blk.{i}.attn_norm.weight", ("n_embd",)),
    Row(_L + "post_attention_layernorm.weight", "blk.{i}.post_attention_norm.weight", ("n_embd",)),
    Row(_L + "pre_feedforward_layernorm.weight", "blk.{i}.ffn_norm.weight", ("n_embd",)),
    Row(_L + "post_feedforward_layernorm.weight", "blk.{i}.post_ffw_norm.weight", ("n_embd",)),
)


def _read(config: HfConfig) -> Model:
    text = config.part("text_config") or config
    model, _ = standard(
        text,
        head_dim=256,
        context=131072,
        base=1e6,
        tied=True,
        activation=("gelu_pytorch_tanh",),
        layers="full_attention",
    )
    if text.get("attn_logit_softcapping") is not None:
        raise text.unsupported("attn_logit_softcapping", "none", text.get("attn_logit_softcapping"))
    softcap = text.number("final_logit_softcapping", 0.0)
    if softcap:
        model.entries["final_logit_softcapping"] = softcap
    note_biases(text, model)
    _scale(text, model)
    _windows(text, model)
    return model


def _scale(text: HfConfig, model: Model) -> None:
    """Sets attention.scale if it is not the engines' default."""
    scalar = text.number("query_pre_attn_scalar", 256.0)
    if scalar <= 0:
        raise text.wrong("query_pre_attn_scalar", "a positive number", scalar)
    width = model.sizes["head_dim"]
    if model.n_layer == _BIG_LAYERS:
        width = model.sizes["n_embd"] // (model.sizes["n_q"] // width)
    if scalar != width:
        model.entries["attention.scale"] = 1.0 / math.sqrt(scalar)
        model.notes.append(
            f"queries are scaled by {scalar:g}^-0.5: stoker reads that from the file, "
            f"llama.cpp scales by {width}^-0.5"
        )


def _windows(text: HfConfig, model: Model) -> None:
    """Sets the sliding window, its layers, and the base of their rotary embedding."""
    window = text.size("sliding_window", default=4096, low=0, high=1 << 32)
    period = text.size("sliding_window_pattern", "_sliding_window_pattern", default=_PERIOD)
    types = text.get("layer_types")
    slides = [(il + 1) % period != 0 for il in range(model.n_layer)]
    if types is not None:
        known = {"sliding_attention": True, "full_attention": False}
        if (
            not isinstance(types, list)
            or len(types) != model.n_layer
            or not all(isinstance(t, str) and t in known for t in types)
        ):
            raise text.wrong(
                "layer_types", f"{model.n_layer} of sliding_attention or full_attention", types
            )
        slides = [known[t] for t in types]
    if not window or not any(slides):
        return
    model.entries["attention.sliding_window"] = window
    if slides != [(il + 1) % _PERIOD != 0 for il in range(model.n_layer)]:
        model.entries["attention.sliding_window_pattern"] = slides
    local = HfConfig(text.path, {"rope_theta": text.number("rope_local_base_freq", _LOCAL_BASE)})
    if text.get("rope_parameters") is not None:
        local = HfConfig(text.path, {"rope_parameters": text.get("rope_parameters")})
    rope = read_rope(
        local, model.sizes["head_dim"], 1, default_base=_LOCAL_BASE, layers="sliding_attention"
    )
    if rope.entries or rope.tensors:
        raise text.unsupported("rope of sliding layers", "unscaled", rope.entries)
    if rope.base != _LOCAL_BASE:
        model.entries["rope.freq_base_swa"] = rope.base


GEMMA3 = Family(
    "gemma3",
    ("Gemma3ForCausalLM", "Gemma3TextForCausalLM", "Gemma3ForConditionalGeneration"),
    changed(
        (*ENDS, *_NORMS, *ATTENTION, *BIASES, *HEAD_NORMS, *FEED_FORWARD),
        Change.PLUS_ONE,
        "norm.weight",
    ),
    _read,
)
FAMILIES = (GEMMA3,)
