"""The graph of a decoder with a KV cache: input_ids and past in, logits and present out.

Inputs: input_ids int64 [batch, sequence]; attention_mask int64 [batch, past and sequence], of
which only the number of ones in each row counts (padding stands on the right); for each layer
past_key_values.N.key and .value float32 [batch, KV heads, past, width of a head]; if wanted,
logits_from int64 [1], the first token of the sequence whose logits are made (0).
Outputs: logits float32 [batch, sequence or fewer, vocabulary], hidden_states [batch, sequence,
width] (after the last norm), present.N.key and .value. These are the names that optimum and
onnxruntime-genai use. past and present may be one buffer, as long as the longest sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ....runtime.backends.onnx_tensors import ONNX_LOGITS_FROM
from ....runtime.base.errors import UnsupportedModelError
from .config import DecoderConfig
from .feed_forward import gated
from .graph import MICROSOFT, Graph
from .mixture import Mixture
from .rope import rope_tables
from .weights import Linear, Weights

_HEAD_UNIT = 16  # GroupQueryAttention's rotary embedding needs a multiple of it as head width


class Decoder:
    """Builds one graph. c: its configuration; context: tokens that its rotary tables cover."""

    def __init__(self, graph: Graph, c: DecoderConfig, weights: Weights, context: int) -> None:
        self._g, self._c, self._w = graph, c, weights
        self._context = context
        self._linear = Linear(graph, weights)
        self._mixture = Mixture(graph, c, weights, self._linear)

    def build(self) -> None:
        """Adds the whole graph. Raises UnsupportedModelError, ModelFileError."""
        g, c = self._g, self._c
        if c.head_dim % _HEAD_UNIT:
            raise UnsupportedModelError(
                f"{self._w.path}: width of a head: expected a multiple of {_HEAD_UNIT} for ONNX, "
                f"found {c.head_dim}"
            )
        g.input("input_ids", np.int64, ["batch_size", "sequence_length"])
        g.input("attention_mask", np.int64, ["batch_size", "total_sequence_length"])
        self._lengths()
        x = self._linear.embedding("input_ids", "token_embd.weight", "embedding")
        if c.family.scales_embedding:
            scale = g.constant("embedding_scale", np.array(math.sqrt(c.n_embd), np.float32))
            x = g.node("Mul", [x, scale], "embedding_scaled")
        pending = ""  # tensor still to be added to x
        for il in range(c.n_layer):
            x, a = self._add_norm(x, pending, f"blk.{il}.attn_norm")
            entering = x  # the input of an early router
            pending = self._attention(a, il)
            if c.family.post_norms:
                pending = self._norm(pending, f"blk.{il}.post_attention_norm")
            x, a = self._add_norm(x, pending, f"blk.{il}.ffn_norm")
            pending = self._feed_forward(a, entering if c.family.routes_early else a, il)
            if c.family.post_norms:
                pending = self._norm(pending, f"blk.{il}.post_ffw_norm")
        x, hidden = self._add_norm(x, pending, "output_norm")
        g.node("Identity", [hidden], "hidden_states")
        self._logits(self._wanted(hidden))
        g.output("logits", np.float32, ["batch_size", "logits_length", c.n_vocab])
        g.output("hidden_states", np.float32, ["batch_size", "sequence_length", c.n_embd])
        for il in range(c.n_layer):
            self._cache_values(il)
        unused = self._w.unused
        if unused:
            raise UnsupportedModelError(
                f"{self._w.path}: expected only tensors that the {c.architecture} graph uses, "
                f"found {', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}"
            )

    def _cache_values(self, il: int) -> None:
        g, c = self._g, self._c
        for part in ("key", "value"):
            past: list[int | str] = ["batch_size", c.n_head_kv, "past_sequence_length", c.head_dim]
            present: list[int | str] = [
                "batch_size",
                c.n_head_kv,
                "total_sequence_length",
                c.head_dim,
            ]
            g.input(f"past_key_values.{il}.{part}", np.float32, past)
            g.output(f"present.{il}.{part}", np.float32, present)

    def _lengths(self) -> None:
        """Adds attention's length inputs: the last position of each row, the longest total."""
        g = self._g
        axis = g.constant("axis_1", np.array([1], np.int64))
        one = g.constant("one", np.array([1], np.int64))
        count = g.node("ReduceSum", ["attention_mask", axis], "token_counts", keepdims=0)
        g.node("Cast", [g.node("Sub", [count, one], "last_positions")], "seqlens_k", to=6)
        shape = g.node("Shape", ["attention_mask"], "mask_shape")
        total = g.node("Gather", [shape, g.constant("second", np.array(1, np.int64))], "total")
        g.node("Cast", [total], "total_length", to=6)

    # Norms.

    def _gamma(self, name: str, n: int) -> str:
        return self._g.constant(name, self._w.vector(name, n))

    def _norm(self, x: str, name: str) -> str:
        """RMS norm of x [..., n_embd] by the weights `name`.weight."""
        gamma = self._gamma(name + ".weight", self._c.n_embd)
        return self._g.node(
            "SimplifiedLayerNormalization",
            [x, gamma],
            name,
            axis=-1,
            epsilon=self._c.norm_eps,
            stash_type=1,
        )

    def _add_norm(self, x: str, added: str, name: str) -> tuple[str, str]:
        """x + added, and its norm; added "" adds nothing."""
        if not added:
            return x, self._norm(x, name)
        gamma = self._gamma(name + ".weight", self._c.n_embd)
        total = name + "_residual"
        self._g.nodes(
            "SkipSimplifiedLayerNormalization",
            [x, added, gamma],
            [name, "", "", total],
            domain=MICROSOFT,
            epsilon=self._c.norm_eps,
        )
        return total, name

    # Attention.

    def _attention(self, a: str, il: int) -> str:
        g, c = self._g, self._c
        b = f"blk.{il}."
        names = tuple(f"{b}attn_{part}.weight" for part in "qkv")
        self._check_heads(names)
        normed = c.family.head_norms or c.family.row_norms
        if normed or not self._linear.alike(names):
            qkv = [self._linear(a, (name,), name[:-7])[0] for name in names]
            if normed:
                heads = (c.n_head, c.n_head_kv)
                qkv[:2] = [self._head_norm(x, n) for x, n in zip(qkv, heads, strict=False)]
        else:  # one product for q, k and v
            qkv = [self._linear(a, names, b + "attn_qkv")[0], "", ""]
        rotary: list[str] = []
        if c.rotates[il]:
            rotary = self._rotary(local=c.sliding[il] and c.rope.local_base > 0)
        g.nodes(
            "GroupQueryAttention",
            [
                *qkv,
                f"past_key_values.{il}.key",
                f"past_key_values.{il}.value",
                "seqlens_k",
                "total_length",
                *rotary,
            ],
            [b + "attention", f"present.{il}.key", f"present.{il}.value"],
            domain=MICROSOFT,
            num_heads=c.n_head,
            kv_num_heads=c.n_head_kv,
            scale=c.attention_scale,
            softcap=c.attention_softcap,
            local_window_size=c.window if c.sliding[il] else -1,
            do_rotary=int(c.rotates[il]),
            rotary_interleaved=int(c.family.adjacent_pairs),
        )
        return self._linear(b + "attention", (b + "attn_output.weight",), b + "attn_output")[0]

    def _check_heads(self, names: tuple[str, ...]) -> None:
        c = self._c
        for name, heads in zip(names, (c.n_head, c.n_head_kv, c.n_head_kv), strict=True):
            rows, wanted = self._w.shape(name)[0], heads * c.head_dim
            if rows != wanted:
                raise UnsupportedModelError(
                    f"{self._w.path}: {name}: expected {wanted} rows, found {rows}"
                )

    def _head_norm(self, x: str, heads: int) -> str:
        """Norm of q or k [batch, sequence, heads * width], for each head or over all at once."""
        g, c = self._g, self._c
        if c.family.row_norms:
            gamma = self._gamma(x + "_norm.weight", heads * c.head_dim)
            cut = x
        else:
            gamma = self._gamma(x + "_norm.weight", c.head_dim)
            shape = g.constant(f"{heads}_heads", np.array([0, 0, heads, c.head_dim], np.int64))
            cut = g.node("Reshape", [x, shape], x + "_heads")
        normed = g.node(
            "SimplifiedLayerNormalization",
            [cut, gamma],
            x + "_norm",
            axis=-1,
            epsilon=c.norm_eps,
            stash_type=1,
        )
        if c.family.row_norms:
            return normed
        joined = g.constant("joined", np.array([0, 0, -1], np.int64))
        return g.node("Reshape", [normed, joined], x + "_normed")

    def _rotary(self, *, local: bool) -> list[str]:
        g, c = self._g, self._c
        names = ["cos_cache_local", "sin_cache_local"] if local else ["cos_cache", "sin_cache"]
        shape = (self._context, c.rope.n_rot // 2)
        arrays = [(name, np.float32, shape, name) for name in names]
        divisors = None if local else self._divisors()

        def tables() -> Iterator[tuple[int, npt.NDArray[Any]]]:
            pair = rope_tables(c.rope, self._context, local=local, divisors=divisors)
            yield from enumerate(pair)

        return g.stored(arrays, tables)

    def _divisors(self) -> npt.NDArray[np.float32] | None:
        c, half = self._c, self._c.rope.n_rot // 2
        long = self._context > c.rope.original_context
        found = None
        for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
            values = self._w.optional(name, half)
            if c.rope.scaling == "longrope" and long == ("long" in name):
                found = values
        plain = self._w.optional("rope_freqs.weight", half)
        return found if c.rope.scaling == "longrope" else plain

    # Feed-forward and output.

    def _feed_forward(self, a: str, routed: str, il: int) -> str:
        """Adds the feed-forward. routed: what a router reads, if the layer has one."""
        b = f"blk.{il}.ffn_"
        if f"{b}gate_inp.weight" in self._w:
            return self._mixture(a, routed, f"blk.{il}.")
        return gated(self._g, self._linear, self._c.family.activation, a, b + "{}.weight")

    def _wanted(self, hidden: str) -> str:
        """The tokens that get logits: all, or those from the one that an input names.

        The input has a default, so that a runtime which does not know it need not give it.
        """
        g = self._g
        first = g.constant(ONNX_LOGITS_FROM, np.array([0], np.int64))
        g.input(ONNX_LOGITS_FROM, np.int64, [1])
        end = g.constant("end", np.array([np.iinfo(np.int64).max], np.int64))
        axis = g.constant("axis_1", np.array([1], np.int64))
        return g.node("Slice", [hidden, first, end, axis], "hidden_wanted")

    def _logits(self, hidden: str) -> None:
        g, c = self._g, self._c
        untied = "output.weight" in self._w
        cap = c.final_softcap
        name = "logits" if not cap else "logits_uncapped"
        out = name if untied or "output.bias" not in self._w else name + "_unbiased"
        head = "output.weight" if untied else "token_embd.weight"
        self._linear(hidden, (head,), out, head=True)
        if out != name:
            bias = self._w.vector("output.bias", c.n_vocab)
            g.node("Add", [out, g.constant("output.bias", bias)], name)
        if cap:
            limit = g.constant("final_softcap", np.array(cap, np.float32))
            bent = g.node("Tanh", [g.node("Div", [name, limit], name + "_scaled")], name + "_bent")
            g.node("Mul", [bent, limit], "logits")
