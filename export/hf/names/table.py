"""Types of a family's table: rows from Hugging Face's tensor names to GGUF's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

from ...writer.gguf_values import Value
from ..folder.config import HfConfig
from ..folder.rope import Floats, Rope, read_rope


class Change(Enum):
    """What happens to a tensor on the way."""

    COPY = "copy"
    # Rows of each head from (i, i + head_dim / 2) to (2i, 2i + 1), the pairs that llama rotates.
    PAIRS = "pairs"
    # Gemma's norms multiply by 1 + weight; the engines multiply by the weight.
    PLUS_ONE = "plus one"


class Layers(Enum):
    """The layers that have a tensor."""

    ALL = "all"
    DENSE = "dense"
    MIXTURE = "mixture"


@dataclass(frozen=True)
class Row:
    """One tensor, or one a layer.

    source: the name in the shards; {i} is the layer, {e} the expert (all experts of a layer become
    one tensor). target: the name in the file. shape: names of Model.sizes, row-major.
    optional: may be absent.
    """

    source: str
    target: str
    shape: tuple[str, ...]
    change: Change = Change.COPY
    layers: Layers = Layers.ALL
    optional: bool = False


@dataclass
class Model:
    """What a config says, in GGUF's terms.

    sizes: used by the rows' shapes. mixture: whether each layer is one, [n_layer]. entries:
    metadata keys without the architecture. tensors: the computed ones, by name. notes: what the
    user should know. tied: the output is the embedding. needs_output: the family's readers want
    an output tensor even so. foresees: number of layers after the others that predict further
    tokens; they are left out.
    """

    n_layer: int
    sizes: dict[str, int]
    mixture: list[bool]
    entries: dict[str, Value]
    tied: bool
    tensors: dict[str, Floats] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    needs_output: bool = False
    foresees: int = 0


@dataclass(frozen=True)
class Family:
    """architecture: general.architecture; classes: config.json's names of the models."""

    architecture: str
    classes: tuple[str, ...]
    rows: tuple[Row, ...]
    read: Callable[[HfConfig], Model]


_LAYER = "model.layers.{i}."

ENDS = (
    Row("model.embed_tokens.weight", "token_embd.weight", ("n_vocab", "n_embd")),
    Row("model.norm.weight", "output_norm.weight", ("n_embd",)),
    Row("lm_head.weight", "output.weight", ("n_vocab", "n_embd"), optional=True),
)
NORMS = (
    Row(_LAYER + "input_layernorm.weight", "blk.{i}.attn_norm.weight", ("n_embd",)),
    Row(_LAYER + "post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", ("n_embd",)),
)
ATTENTION = (
    Row(_LAYER + "self_attn.q_proj.weight", "blk.{i}.attn_q.weight", ("n_q", "n_embd")),
    Row(_LAYER + "self_attn.k_proj.weight", "blk.{i}.attn_k.weight", ("n_kv", "n_embd")),
    Row(_LAYER + "self_attn.v_proj.weight", "blk.{i}.attn_v.weight", ("n_kv", "n_embd")),
    Row(_LAYER + "self_attn.o_proj.weight", "blk.{i}.attn_output.weight", ("n_embd", "n_q")),
)
BIASES = (
    Row(_LAYER + "self_attn.q_proj.bias", "blk.{i}.attn_q.bias", ("n_q",), optional=True),
    Row(_LAYER + "self_attn.k_proj.bias", "blk.{i}.attn_k.bias", ("n_kv",), optional=True),
    Row(_LAYER + "self_attn.v_proj.bias", "blk.{i}.attn_v.bias", ("n_kv",), optional=True),
    Row(_LAYER + "self_attn.o_proj.bias", "blk.{i}.attn_output.bias", ("n_embd",), optional=True),
)
HEAD_NORMS = (
    Row(_LAYER + "self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight", ("head_dim",)),
    Row(_LAYER + "self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight", ("head_dim",)),
)
FEED_FORWARD = (
    Row(_LAYER + "mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight", ("n_ff", "n_embd")),
    Row(_LAYER + "mlp.up_proj.weight", "blk.{i}.ffn_up.weight", ("n_ff", "n_embd")),
    Row(_LAYER + "mlp.down_proj.weight", "blk.{i}.ffn_down.weight", ("n_embd", "n_ff")),
)


def mixture(block: str, router: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Rows of router and experts. block: their module in a layer, the rest: names within it."""
    b, e = f"{_LAYER}{block}.", f"{_LAYER}{block}.experts.{{e}}."
    into, out = ("n_expert", "n_ff_expert", "n_embd"), ("n_expert", "n_embd", "n_ff_expert")
    rows = (
        Row(f"{b}{router}.weight", "blk.{i}.ffn_gate_inp.weight", ("n_expert", "n_embd")),
        Row(f"{e}{gate}.weight", "blk.{i}.ffn_gate_exps.weight", into),
        Row(f"{e}{up}.weight", "blk.{i}.ffn_up_exps.weight", into),
        Row(f"{e}{down}.weight", "blk.{i}.ffn_down_exps.weight", out),
    )
    return tuple(replace(row, layers=Layers.MIXTURE) for row in rows)


def changed(rows: Iterable[Row], change: Change, *parts: str) -> tuple[Row, ...]:
    """The rows, with a change for those whose source has one of the parts in its name."""
    return tuple(
        replace(row, change=change) if any(p in row.source for p in parts) else row for row in rows
    )


def standard(
    config: HfConfig,
    *,
    head_dim: int | None = None,
    context: int | None = None,
    base: float = 10000.0,
    eps: float = 1e-6,
    tied: bool = False,
    activation: tuple[str, ...] = ("silu", "swish"),
    layers: str | None = None,
    rotated: float | None = None,
) -> tuple[Model, Rope]:
    """What nearly all families have in common.

    head_dim, context, base, eps, tied: transformers' defaults for the family (None: there is none;
    head_dim: n_embd / n_head). activation: the names that the engine computes. rotated: rotated
    share of a head, if the folder does not say; None: all of it, always.
    """
    n_embd = config.size("hidden_size")
    n_head = config.size("num_attention_heads", high=4096)
    n_head_kv = config.size("num_key_value_heads", default=n_head, high=4096)
    if n_head % n_head_kv:
        raise config.wrong("num_key_value_heads", f"a divisor of {n_head}", n_head_kv)
    width = config.size("head_dim", default=head_dim or n_embd // n_head, high=65536)
    if width % 2:
        raise config.wrong("head_dim", "an even number", width)
    n_context = config.size("max_position_embeddings", default=context, high=1 << 32)
    found = config.text("hidden_act", "hidden_activation", default=activation[0])
    if found not in activation:
        raise config.unsupported("hidden_act", " or ".join(activation), found)
    n_layer = config.size("num_hidden_layers", high=4096)
    n_ff = config.size("intermediate_size", default=0)
    rope = read_rope(config, width, n_context, default_base=base, layers=layers, share=rotated)
    entries: dict[str, Value] = {
        "context_length": n_context,
        "embedding_length": n_embd,
        "block_count": n_layer,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head_kv,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", eps),
        "rope.dimension_count": rope.width,
        "rope.freq_base": rope.base,
        **rope.entries,
    }
    if n_ff:
        entries["feed_forward_length"] = n_ff
    sizes = {
        "n_embd": n_embd,
        "n_vocab": config.size("vocab_size"),
        "n_q": n_head * width,
        "n_kv": n_head_kv * width,
        "head_dim": width,
        "n_ff": n_ff,
        "one": 1,
    }
    model = Model(
        n_layer,
        sizes,
        [False] * n_layer,
        entries,
        config.flag("tie_word_embeddings", tied),
        dict(rope.tensors),
    )
    return model, rope


def add_experts(model: Model, config: HfConfig, n_expert: int, used: int, n_ff: int) -> None:
    """Adds sizes and metadata of a mixture whose experts are n_ff wide."""
    if used > n_expert:
        raise config.wrong("experts for each token", f"at most {n_expert}", used)
    model.sizes |= {"n_expert": n_expert, "n_ff_expert": n_ff}
    model.entries["expert_count"] = n_expert
    model.entries["expert_used_count"] = used


def require(config: HfConfig, key: str, wanted: bool, default: bool) -> None:
    """Refuses a model that has the other value: the engine computes only this one."""
    found = config.flag(key, default)
    if found != wanted:
        raise config.unsupported(key, str(wanted).lower(), found)


def note_biases(config: HfConfig, model: Model) -> None:
    """Says that the attention has biases, in families where only stoker reads them."""
    if config.flag("attention_bias", False):
        model.notes.append("the attention has biases: stoker runs that, llama.cpp does not")


def refuse_windows(config: HfConfig, model: Model) -> None:
    """Refuses a sliding window that would be narrower than the context."""
    if not config.flag("use_sliding_window", False):
        return
    window = config.size("sliding_window", default=0, low=0, high=1 << 32)
    context = model.entries["context_length"]
    if window and isinstance(context, int) and window < context:
        raise config.unsupported("sliding_window", f"none, or at least {context}", window)
