"""Tiny random GGUF models of every family, with a working byte-level tokenizer.

    make("/tmp/m.gguf", "qwen3moe", quant="Q4_0", seed=1, n_expert_used=3)
    python tests/models/tiny_models.py DIR    # all VARIANTS as DIR/<variant>.gguf, for make_golden

The values of a tensor depend on the seed and on its name alone, so that two variants of a model
(split or joined experts, say) hold the same weights. `VARIANTS` is the list that the family tests
run; a new family or feature is one line there.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

N_TOKENS = 100  # that tests evaluate: beyond the windows and scaled contexts of the variants

K_QUANTS = frozenset({"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"})
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Every merge's parts are bytes or results of earlier merges; "_" stands for the space symbol.
MERGES = (
    "_ t|h e|_ a|i n|_t he|r e|o n|e r|_ s|a t|n d|_ w|_ o|i s|o u|_a nd|_ b|_ c|e n|_o f|_ f|"
    "in g|_ p|e s|_ m|o r|e d|_t o|_ in|a n|_ h|_ d|a l|a r|_w a|_ l|i t|_ n|_b e|_t h|l e|i c|"
    "s t|_ g|_ e|o m|l l|_ re|_ y|v e|_y ou|_f or|_s t|_h e|_ it|o t"
)


@dataclass(frozen=True)
class Spec:
    """Shape of a tiny model; sizes in elements, 0 or None: the family's default."""

    family: str
    n_layer: int = 3
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 16
    n_ff: int = 96
    n_expert: int = 8
    n_expert_used: int = 2
    n_ff_expert: int = 64
    n_ff_shared: int = 96
    context: int = 256
    rms_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_base_local: float | None = None
    rope_dim: int = 0  # 0: head_dim
    rope_scaling: str | None = None  # linear, yarn, longrope; old: linear by its former key
    rope_factor: float = 1.0
    rope_original_context: int = 0
    rope_attention_factor: float | None = None
    rope_freqs: bool = False  # llama 3's divisors
    tied: bool = False
    arrays: bool = False  # head counts and widths as one value a layer
    # What the family has.
    mixture: bool = False
    biases: bool = False  # of q, k, v
    output_projection_bias: bool = False  # of the attention's output, where there are biases
    qk_norms: str = ""  # "head" or "all": of each head, or of all at once
    post_norms: bool = False  # after attention and feed-forward, before the sum
    ffn_norm: str = "ffn_norm"  # name of the norm before the feed-forward
    shared: str = ""  # the shared expert: "gated" by a router of its own, or "plain"
    width_key: bool = False  # expert_feed_forward_length is written
    joint_width: bool = False  # feed_forward_length is the experts'
    n_layer_dense: int = 0  # first layers without experts
    n_layer_foresee: int = 0  # layers after the others that foresee further tokens
    router_bias: float = 0.0  # spread of what is added to the gates for the choice; 0: nothing
    weights_scale: float = 0.0  # of the experts' weights; 0: no key
    weights_norm: bool | None = None  # expert_weights_norm; None: no key
    groups: int = 0  # of experts; 0: no key
    groups_used: int = 0
    output_bias: bool = False
    split_experts: bool = False  # one tensor an expert, as early Mixtral files
    window: int = 0
    window_pattern: int | tuple[bool, ...] | None = None
    gating: int = 0  # 1 softmax, 2 sigmoid; 0: no key
    attention_softcap: float = 0.0
    attention_scale: float = 0.0
    final_softcap: float = 0.0
    router_gain: float = 2.5  # spread of router logits
    embedding_quant: str | None = None

    @property
    def arch(self) -> str:
        return "llama" if self.family == "llama-moe" else self.family

    @property
    def moe(self) -> bool:
        return self.mixture and self.n_expert > 0


# Family defaults over those above.
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"output_projection_bias": True},
    "llama-moe": {"mixture": True, "joint_width": True},
    "qwen2": {"rope_base": 1e6, "biases": True},
    "qwen2moe": {
        "rope_base": 1e6,
        "n_head_kv": 4,
        "biases": True,
        "mixture": True,
        "width_key": True,
        "shared": "gated",
    },
    "qwen3": {"rope_base": 1e6, "head_dim": 32, "tied": True, "rms_eps": 1e-6, "qk_norms": "head"},
    "qwen3moe": {
        "rope_base": 1e6,
        "head_dim": 32,
        "rms_eps": 1e-6,
        "qk_norms": "head",
        "mixture": True,
        "width_key": True,
    },
    "olmoe": {"n_head_kv": 4, "qk_norms": "all", "mixture": True, "joint_width": True},
    "gemma3": {
        "n_layer": 7,
        "n_head_kv": 1,
        "head_dim": 32,
        "tied": True,
        "rope_base": 1e6,
        "window": 16,
        "rms_eps": 1e-6,
        "qk_norms": "head",
        "post_norms": True,
    },
    # Its router reads the residual itself, which is long: a small gain keeps it well-conditioned.
    "smallthinker": {
        "n_layer": 4,
        "tied": True,
        "router_gain": 0.4,
        "mixture": True,
        "width_key": True,
        "gating": 1,
    },
    "glm4moe": {
        "biases": True,
        "rope_dim": 8,
        "ffn_norm": "post_attention_norm",
        "mixture": True,
        "width_key": True,
        "shared": "plain",
        "n_ff_shared": 64,
        "n_layer_dense": 1,
        "router_bias": 0.2,
        "router_gain": 1.0,
        "weights_scale": 1.5,
        "weights_norm": True,
    },
}


# The variants that test_families.py runs in F32: name -> (family, overrides). The seeds are ones
# at which no router hesitates over the first N_TOKENS of some_tokens(), so that rounding does not
# decide what is computed.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "llama-mha": ("llama", {"n_head_kv": 4}),
    "llama-mqa": ("llama", {"n_head_kv": 1}),
    "llama-biases": ("llama", {"biases": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-rope-freqs": ("llama", {"rope_freqs": True, "rope_base": 5e5}),
    "llama-linear": ("llama", {"rope_scaling": "linear", "rope_factor": 4.0}),
    "llama-linear-old-key": ("llama", {"rope_scaling": "old", "rope_factor": 4.0}),
    "llama-arrays": ("llama", {"arrays": True}),
    "llama-odd-sizes": (
        "llama",
        {"n_embd": 72, "n_head": 3, "n_head_kv": 1, "head_dim": 24, "n_ff": 100},
    ),
    "llama-yarn": (
        "llama",
        {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 64, "head_dim": 32},
    ),
    "llama-yarn-attn-factor": (
        "llama",
        {
            "rope_scaling": "yarn",
            "rope_factor": 8.0,
            "rope_original_context": 128,
            "rope_attention_factor": 0.9,
        },
    ),
    "llama-longrope-short": (
        "llama",
        {"rope_scaling": "longrope", "rope_original_context": 256, "rope_attention_factor": 1.1},
    ),
    "llama-longrope-long": (
        "llama",
        {"rope_scaling": "longrope", "rope_original_context": 64, "rope_attention_factor": 1.1},
    ),
    "llama-attention-softcap": ("llama", {"attention_softcap": 2.0}),
    "llama-attention-scale": ("llama", {"attention_scale": 0.5}),
    "llama-window-key-ignored": ("llama", {"window": 8}),
    "mixtral": ("llama-moe", {"seed": 2}),
    "mixtral-split": ("llama-moe", {"seed": 2, "split_experts": True}),
    "mixtral-top1": ("llama-moe", {"seed": 1, "n_expert_used": 1}),
    "mixtral-top4": ("llama-moe", {"seed": 4, "n_expert_used": 4}),
    "mixtral-all": ("llama-moe", {"n_expert": 4, "n_expert_used": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tied": True}),
    "qwen2-output-bias": ("qwen2", {"output_bias": True}),
    "qwen2-yarn": (
        "qwen2",
        {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 64},
    ),
    "qwen2moe": ("qwen2moe", {"seed": 1}),
    "qwen2moe-top4": ("qwen2moe", {"seed": 4, "n_expert_used": 4, "n_ff_shared": 128}),
    "qwen3": ("qwen3", {}),
    "qwen3-untied": ("qwen3", {"tied": False}),
    "qwen3moe": ("qwen3moe", {}),
    "qwen3moe-odd-sizes": (
        "qwen3moe",
        {"n_embd": 56, "n_head": 6, "head_dim": 8, "n_ff_expert": 20, "n_expert": 5},
    ),
    "qwen3moe-top3": ("qwen3moe", {"seed": 2, "n_expert_used": 3, "n_expert": 12}),
    "olmoe": ("olmoe", {}),
    "olmoe-top4": ("olmoe", {"seed": 2, "n_expert_used": 4, "n_expert": 16}),
    "gemma3": ("gemma3", {}),
    "gemma3-global": ("gemma3", {"window": 0, "n_layer": 3}),
    "gemma3-linear": ("gemma3", {"rope_scaling": "linear", "rope_factor": 8.0}),
    "gemma3-window-37": ("gemma3", {"window": 37}),
    "gemma3-local-base": ("gemma3", {"rope_base_local": 500.0}),
    "gemma3-pattern-2": ("gemma3", {"window_pattern": 2, "n_layer": 4}),
    "gemma3-pattern-list": (
        "gemma3",
        {"window_pattern": (True, False, False, True), "n_layer": 4},
    ),
    "gemma3-final-softcap": ("gemma3", {"final_softcap": 3.0}),
    "gemma3-partial-rope": ("gemma3", {"rope_dim": 16}),
    "gemma3-untied": ("gemma3", {"tied": False, "n_head_kv": 2}),
    "smallthinker": ("smallthinker", {"seed": 10}),
    "smallthinker-sigmoid": (
        "smallthinker",
        {"seed": 8, "gating": 2, "n_expert_used": 3},
    ),
    "smallthinker-window": ("smallthinker", {"seed": 10, "window": 16, "n_layer": 6}),
    "smallthinker-pattern-3": (
        "smallthinker",
        {"seed": 10, "window": 16, "window_pattern": 3, "n_layer": 6},
    ),
    "smallthinker-window-4096": ("smallthinker", {"seed": 10, "window": 4096, "n_layer": 6}),
    "smallthinker-untied": ("smallthinker", {"tied": False, "n_expert_used": 1}),
    "glm4moe": ("glm4moe", {"seed": 11}),
    "glm4moe-head-norms": ("glm4moe", {"seed": 17, "qk_norms": "head", "n_ff_shared": 128}),
    "glm4moe-groups": ("glm4moe", {"seed": 3, "groups": 4, "groups_used": 2, "n_expert_used": 3}),
    "glm4moe-foresees": ("glm4moe", {"n_layer_foresee": 1, "router_bias": 0.0}),
    "glm4moe-softmax": (
        "glm4moe",
        {"seed": 2, "gating": 1, "weights_norm": False, "weights_scale": 0.0},
    ),
}

# Sizes at which every row is a whole number of 256-weight blocks.
WIDE: dict[str, Any] = {
    "n_embd": 256,
    "n_head": 8,
    "head_dim": 32,
    "n_ff": 256,
    "n_ff_expert": 256,
    "n_ff_shared": 256,
    "n_layer": 2,
}


def spec_of(family: str, **overrides: Any) -> Spec:
    """The family's tiny shape with `overrides` of Spec's fields."""
    return replace(Spec(family, **FAMILY[family]), **overrides)


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte value, in order of value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {b: chr(b) for b in printable}
    others = [b for b in range(256) if b not in stand_in]
    stand_in |= {b: chr(256 + i) for i, b in enumerate(others)}
    return [stand_in[b] for b in range(256)]


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens (special ones first, then bytes, then merges) and merges."""
    space = byte_symbols()[32]
    merges, known = [], set(byte_symbols())
    for pair in MERGES.replace("_", space).split("|"):
        left, right = pair.split(" ")
        assert {left, right} <= known, pair
        merges.append(pair)
        known.add(left + right)
    tokens = [*SPECIAL, *byte_symbols(), *(m.replace(" ", "") for m in merges)]
    return list(dict.fromkeys(tokens)), merges


def tensors(s: Spec, seed: int) -> Iterator[tuple[str, Array]]:
    """(name, values), numpy order: the contiguous dimension last."""

    def normal(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Array:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def matrix(name: str, n_out: int, n_in: int, gain: float = 1.0) -> tuple[str, Array]:
        return name, normal(name, (n_out, n_in), gain / np.sqrt(n_in))

    def norm(name: str, n: int) -> tuple[str, Array]:
        return name, normal(name, (n,), 0.15, 1.0)

    n_vocab = len(vocabulary()[0])
    n_q, n_kv = s.n_head * s.head_dim, s.n_head_kv * s.head_dim
    # Logits of a few units: the output rows have a length of about 3 after the final norm.
    embedding_gain = 3.0 if s.tied else 8.0
    yield matrix("token_embd.weight", n_vocab, s.n_embd, embedding_gain)
    yield norm("output_norm.weight", s.n_embd)
    if not s.tied:
        yield matrix("output.weight", n_vocab, s.n_embd, 3.0)
    if s.output_bias:
        yield "output.bias", normal("output.bias", (n_vocab,), 2.0)
    half = (s.rope_dim or s.head_dim) // 2
    ramp = np.linspace(0.0, 1.0, half, dtype=np.float32)
    if s.rope_freqs:
        yield "rope_freqs.weight", 8.0 ** np.clip(2 * ramp - 0.5, 0.0, 1.0)
    if s.rope_scaling == "longrope":
        yield "rope_factors_long.weight", 1.0 + 20.0 * ramp
        yield "rope_factors_short.weight", 1.0 + 0.5 * ramp
    for layer in range(s.n_layer + s.n_layer_foresee):
        b = f"blk.{layer}."
        yield norm(b + "attn_norm.weight", s.n_embd)
        yield norm(f"{b}{s.ffn_norm}.weight", s.n_embd)
        if s.post_norms:
            # Large, or the scaled embedding would drown what the layers say.
            for name in (b + "post_attention_norm.weight", b + "post_ffw_norm.weight"):
                yield name, normal(name, (s.n_embd,), 0.4, 2.5)
        yield matrix(b + "attn_q.weight", n_q, s.n_embd, 1.6)
        yield matrix(b + "attn_k.weight", n_kv, s.n_embd, 1.3)
        yield matrix(b + "attn_v.weight", n_kv, s.n_embd, 1.5)
        yield matrix(b + "attn_output.weight", s.n_embd, n_q, 1.5)
        if s.biases:
            for part, n in (("q", n_q), ("k", n_kv), ("v", n_kv)):
                yield b + f"attn_{part}.bias", normal(b + f"attn_{part}.bias", (n,), 0.5)
        if s.qk_norms:
            for part, n, mean in (("q", n_q, 1.5), ("k", n_kv, 1.2)):
                name = b + f"attn_{part}_norm.weight"
                width = n if s.qk_norms == "all" else s.head_dim
                yield name, normal(name, (width,), 0.3, mean)
        if s.biases and s.output_projection_bias:
            yield b + "attn_output.bias", normal(b + "attn_output.bias", (s.n_embd,), 0.5)
        if s.moe and layer >= s.n_layer_dense:
            yield from expert_tensors(s, b, matrix)
            if s.router_bias:
                name = b + "exp_probs_b.bias"
                yield name, normal(name, (s.n_expert,), s.router_bias)
        else:
            yield matrix(b + "ffn_gate.weight", s.n_ff, s.n_embd, 1.5)
            yield matrix(b + "ffn_up.weight", s.n_ff, s.n_embd, 1.5)
            yield matrix(b + "ffn_down.weight", s.n_embd, s.n_ff, 1.5)
        if layer >= s.n_layer:  # what joins the token before to the state
            yield matrix(b + "nextn.eh_proj.weight", s.n_embd, 2 * s.n_embd)
            yield norm(b + "nextn.enorm.weight", s.n_embd)


def expert_tensors(s: Spec, b: str, matrix: Any) -> Iterator[tuple[str, Array]]:
    """Router, experts and shared expert of the layer with prefix `b`."""
    yield matrix(b + "ffn_gate_inp.weight", s.n_expert, s.n_embd, s.router_gain)
    shapes = {"gate": (s.n_ff_expert, s.n_embd), "up": (s.n_ff_expert, s.n_embd)}
    shapes["down"] = (s.n_embd, s.n_ff_expert)
    for part, (n_out, n_in) in shapes.items():
        each = [matrix(f"{b}ffn_{part}.{e}.weight", n_out, n_in, 2.0) for e in range(s.n_expert)]
        if s.split_experts:
            yield from each
        else:
            yield f"{b}ffn_{part}_exps.weight", np.stack([values for _, values in each])
    if s.shared == "gated":
        name, gate = matrix(b + "ffn_gate_inp_shexp.weight", 1, s.n_embd, 2.0)
        yield name, gate[0]
    if s.shared:
        yield matrix(b + "ffn_gate_shexp.weight", s.n_ff_shared, s.n_embd, 1.5)
        yield matrix(b + "ffn_up_shexp.weight", s.n_ff_shared, s.n_embd, 1.5)
        yield matrix(b + "ffn_down_shexp.weight", s.n_embd, s.n_ff_shared, 1.5)


def write_metadata(out: gguf.GGUFWriter, s: Spec) -> None:
    """Hyperparameters and tokenizer."""
    a = s.arch
    out.add_name(f"tiny {s.family}")
    out.add_block_count(s.n_layer + s.n_layer_foresee)
    if s.n_layer_foresee:
        out.add_uint32(f"{a}.nextn_predict_layers", s.n_layer_foresee)
    out.add_context_length(s.context)
    out.add_embedding_length(s.n_embd)
    out.add_head_count([s.n_head] * s.n_layer if s.arrays else s.n_head)
    out.add_head_count_kv([s.n_head_kv] * s.n_layer if s.arrays else s.n_head_kv)
    out.add_layer_norm_rms_eps(s.rms_eps)
    out.add_rope_freq_base(s.rope_base)
    n_ff = s.n_ff_expert if s.joint_width else s.n_ff
    out.add_feed_forward_length([n_ff] * s.n_layer if s.arrays else n_ff)
    if s.head_dim != s.n_embd // s.n_head:
        out.add_key_length(s.head_dim)
        out.add_value_length(s.head_dim)
    if s.rope_dim or s.family.startswith("llama"):
        out.add_rope_dimension_count(s.rope_dim or s.head_dim)
    if s.rope_base_local is not None:
        out.add_float32(f"{a}.rope.freq_base_swa", s.rope_base_local)
    if s.rope_scaling == "old":
        out.add_float32(f"{a}.rope.scale_linear", s.rope_factor)
    elif s.rope_scaling:
        out.add_string(f"{a}.rope.scaling.type", s.rope_scaling)
        out.add_float32(f"{a}.rope.scaling.factor", s.rope_factor)
    if s.rope_original_context:
        out.add_uint32(f"{a}.rope.scaling.original_context_length", s.rope_original_context)
    if s.rope_attention_factor is not None:
        out.add_float32(f"{a}.rope.scaling.attn_factor", s.rope_attention_factor)
    if s.window:
        out.add_sliding_window(s.window)
    if s.window_pattern is not None:
        key = f"{a}.attention.sliding_window_pattern"
        if isinstance(s.window_pattern, int):
            out.add_uint32(key, s.window_pattern)
        else:
            out.add_array(key, list(s.window_pattern))
    if s.attention_softcap:
        out.add_attn_logit_softcapping(s.attention_softcap)
    if s.attention_scale:
        out.add_attention_scale(s.attention_scale)
    if s.final_softcap:
        out.add_final_logit_softcapping(s.final_softcap)
    if s.mixture:
        out.add_expert_count(s.n_expert)
        out.add_expert_used_count(s.n_expert_used)
    if s.width_key:
        out.add_expert_feed_forward_length(s.n_ff_expert)
    if s.shared == "gated":
        out.add_expert_shared_feed_forward_length(s.n_ff_shared)
    elif s.shared:
        out.add_expert_shared_count(s.n_ff_shared // s.n_ff_expert)
    if s.n_layer_dense:
        out.add_leading_dense_block_count(s.n_layer_dense)
    if s.gating:
        out.add_uint32(f"{a}.expert_gating_func", s.gating)
    if s.weights_scale:
        out.add_expert_weights_scale(s.weights_scale)
    if s.weights_norm is not None:
        out.add_expert_weights_norm(s.weights_norm)
    if s.groups:
        out.add_expert_group_count(s.groups)
        out.add_expert_group_used_count(s.groups_used)

    tokens, merges = vocabulary()
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types(
        [gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens]
    )
    out.add_token_merges(merges)
    out.add_bos_token_id(0)
    out.add_eos_token_id(2)
    out.add_add_bos_token(False)
    out.add_chat_template(CHAT_TEMPLATE)


def set_metadata(out: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Sets, replaces or (None) takes away a key; the type is that of Python's value."""
    out.kv_data[0].pop(key, None)
    if isinstance(value, bool):
        out.add_bool(key, value)
    elif isinstance(value, int):
        (out.add_int32 if value < 0 else out.add_uint32)(key, value)
    elif isinstance(value, float):
        out.add_float32(key, value)
    elif isinstance(value, str):
        out.add_string(key, value)
    elif value is not None:
        out.add_array(key, list(value))


def fingerprint(path: str | Path) -> int:
    """CRC-32 of all tensor bytes in file order: equal where the weights are."""
    crc = 0
    for tensor in gguf.GGUFReader(str(path)).tensors:
        crc = zlib.crc32(np.ascontiguousarray(tensor.data).tobytes(), crc)
    return crc


def quantized(values: Array, quant: str) -> npt.NDArray[Any]:
    """File bytes of `values`; K-quants and the like need stoker's own quantizer."""
    if quant == "F32":
        return values
    if quant == "F16":
        return values.astype(np.float16)
    try:
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[quant])
    except NotImplementedError:
        from stoker.runtime import _core

        rows = _core.quantize(quant, np.ascontiguousarray(values.reshape(-1)))
        return rows.reshape(*values.shape[:-1], -1)


def make(
    path: str | Path,
    family: str,
    *,
    quant: str = "F32",
    seed: int = 0,
    drop: Collection[str] = (),
    extra: Mapping[str, int] | None = None,
    metadata: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Writes the model and returns its path. Matrices get `quant`; norms, biases, routers F32.

    K-quants and IQ4_XS take the sizes of WIDE (rows of 256) unless overridden. A broken model
    lacks the tensors named in `drop` or has vectors of ones as well, `extra`: name -> length.
    metadata: keys to set beside the model's own ({arch} is its architecture); None takes one away.
    """
    s = spec_of(family, **({**WIDE, **overrides} if quant in K_QUANTS else overrides))
    out = gguf.GGUFWriter(str(path), s.arch)
    write_metadata(out, s)
    for key, value in (metadata or {}).items():
        set_metadata(out, key.replace("{arch}", s.arch), value)
    content = dict(tensors(s, seed))
    for name in drop:
        del content[name]
    for name, n in (extra or {}).items():
        assert name not in content, name
        content[name] = np.ones(n, np.float32)
    for name, values in content.items():
        is_matrix = values.ndim > 1 and "ffn_gate_inp" not in name
        embedding = name == "token_embd.weight" and s.embedding_quant
        kind = (s.embedding_quant if embedding else quant) if is_matrix else "F32"
        assert kind is not None
        out.add_tensor(name, quantized(values, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return Path(path)


def some_tokens(n: int, seed: int = 0) -> npt.NDArray[np.int32]:
    """n pseudo-random tokens of the tiny vocabulary, specials among them."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, len(vocabulary()[0]), n, dtype=np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes every variant as a GGUF file.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, (family, overrides) in VARIANTS.items():
        weights[name] = fingerprint(make(folder / f"{name}.gguf", family, **overrides))
    (folder / "tiny.json").write_text(
        json.dumps({"tokens": some_tokens(N_TOKENS).tolist(), "fingerprints": weights})
    )


if __name__ == "__main__":
    main()
