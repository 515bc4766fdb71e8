"""A mixture of experts built from plain operators.

Each token takes part once for each of its experts. These (token, expert) pairs are sorted by
expert, one Split gives every expert its rows (none, for most), and the experts' outputs, brought
back into the tokens' order, are summed by the router's weights. So an expert is multiplied with
the tokens that chose it and with no others, at any width of weights and with any activation, which
onnxruntime's own mixture operators do not offer.
"""

from __future__ import annotations

import numpy as np

from ....runtime.base.errors import ModelFileError
from .config import DecoderConfig
from .feed_forward import activated, gated
from .graph import Graph
from .weights import Linear, Weights

_LEAST_SUM = 6.103515625e-5  # least sum that weights are divided by: the smallest normal f16


class Mixture:
    """Adds the mixtures of a decoder's layers to its graph."""

    def __init__(self, graph: Graph, c: DecoderConfig, weights: Weights, linear: Linear) -> None:
        self._g, self._c, self._w, self._linear = graph, c, weights, linear

    def __call__(self, x: str, routed: str, b: str) -> str:
        """x [batch, sequence, n_embd] -> the same shape. routed: the router's input, shaped like x.

        b: prefix of the layer's names.
        """
        g, c = self._g, self._c
        if not c.n_expert:
            raise ModelFileError(
                f"{self._w.path}: {b}ffn_gate_inp.weight: expected {c.architecture}.expert_count "
                "of at least 1, found 0"
            )
        chosen, weights = self._route(routed, b)
        order, counts = self._sort(chosen, b)
        k = self._ints(f"{c.n_expert_used}_used", [c.n_expert_used])
        tokens = g.node("Div", [order, k], b + "tokens_of_pairs")
        rows = g.node("Reshape", [x, self._ints("rows", [1, -1, c.n_embd])], b + "ffn_rows")
        pairs = g.node("Gather", [rows, tokens], b + "pairs", axis=1)
        out = self._experts(pairs, counts, b)
        # The pair that stands at place i of the sorted ones is order[i]; places is the inverse.
        _, places = self._top(order, b + "places", largest=0)
        restored = g.node("Gather", [out, places], b + "pairs_restored", axis=1)
        shape = self._ints("pairs_of_tokens", [-1, c.n_expert_used, c.n_embd])
        each = g.node("Reshape", [restored, shape], b + "experts_of_tokens")
        shape = self._ints("weights_of_tokens", [-1, 1, c.n_expert_used])
        factors = g.node("Reshape", [weights, shape], b + "expert_weights")
        total = g.node("MatMul", [factors, each], b + "experts_summed")
        whole = g.node("Shape", [x], b + "ffn_shape")
        mixed = g.node("Reshape", [total, whole], b + "mixture")
        if f"{b}ffn_up_shexp.weight" in self._w:
            mixed = g.node("Add", [mixed, self._shared(x, b)], b + "mixture_and_shared")
        return mixed

    def _ints(self, name: str, values: list[int]) -> str:
        return self._g.constant(name, np.array(values, np.int64))

    def _top(self, x: str, name: str, *, largest: int) -> tuple[str, str]:
        """All of x int64 [n] sorted: (values, their old positions)."""
        g = self._g
        n = g.node("Shape", [x], name + "_count")
        outputs = [name + "_values", name]
        g.nodes("TopK", [x, n], outputs, axis=-1, largest=largest, sorted=1)
        return outputs[0], outputs[1]

    def _route(self, x: str, b: str) -> tuple[str, str]:
        """Experts of each token, int64 [batch, sequence, used], best first, and their weights."""
        g, c = self._g, self._c
        logits = self._linear(x, (b + "ffn_gate_inp.weight",), b + "router", exact=True)[0]
        if self._w.shape(b + "ffn_gate_inp.weight")[0] != c.n_expert:
            raise ModelFileError(
                f"{self._w.path}: {b}ffn_gate_inp.weight: expected {c.n_expert} rows, found "
                f"{self._w.shape(b + 'ffn_gate_inp.weight')[0]}"
            )
        k = self._ints(f"{c.n_expert_used}_used", [c.n_expert_used])
        chosen = b + "experts"
        g.nodes("TopK", [logits, k], [b + "expert_logits", chosen], axis=-1, largest=1, sorted=1)
        if c.gating == "softmax":
            p = g.node("Softmax", [logits], b + "expert_shares", axis=-1)
        else:
            p = g.node("Sigmoid", [logits], b + "expert_shares")
        weights = g.node("GatherElements", [p, chosen], b + "used_shares", axis=-1)
        if c.family.renormalises:
            last = self._ints("last_axis", [-1])
            total = g.node("ReduceSum", [weights, last], b + "share_total", keepdims=1)
            least = g.constant("least_share", np.array(_LEAST_SUM, np.float32))
            total = g.node("Max", [total, least], b + "share_divisor")
            weights = g.node("Div", [weights, total], b + "normal_shares")
        return chosen, weights

    def _sort(self, chosen: str, b: str) -> tuple[str, str]:
        """Pairs by expert, int64 [pairs], and how many each expert has, int64 [n_expert]."""
        g = self._g
        flat = g.node("Reshape", [chosen, self._ints("minus_one", [-1])], b + "expert_of_pairs")
        _, order = self._top(flat, b + "pair_order", largest=0)
        none = g.constant("no_pairs", np.zeros(self._c.n_expert, np.int64))
        one = self._ints("one", [1])
        n = g.node("Shape", [flat], b + "pair_count")
        ones = g.node("Expand", [one, n], b + "pair_ones")
        counts = g.node(
            "ScatterElements", [none, flat, ones], b + "expert_counts", axis=0, reduction="add"
        )
        return order, counts

    def _cut(self, x: str, counts: str, name: str) -> list[str]:
        """Cuts x [1, pairs, ...], sorted by expert, into one piece for each expert."""
        pieces = [f"{name}.{e}" for e in range(self._c.n_expert)]
        self._g.nodes("Split", [x, counts], pieces, axis=1)
        self._linear.share_means(x, pieces, counts)
        return pieces

    def _experts(self, pairs: str, counts: str, b: str) -> str:
        """Runs each expert on its own pairs: [1, pairs, n_embd] -> the same shape."""
        g, c, w = self._g, self._c, self._w
        gates, ups, downs = (w.experts(b, part, c.n_expert) for part in ("gate", "up", "down"))
        share = c.n_expert_used / c.n_expert
        opened = [
            self._linear(piece, (gate, up), f"{b}ffn_gate_up.{e}", share=share)[0]
            for e, (piece, gate, up) in enumerate(
                zip(self._cut(pairs, counts, b + "ffn_in"), gates, ups, strict=True)
            )
        ]
        joined = g.node("Concat", opened, b + "ffn_gate_up", axis=1)
        halves = [b + "ffn_gates", b + "ffn_ups"]
        g.nodes("Split", [joined], halves, axis=2, num_outputs=2)
        gate = activated(g, c.family.activation, halves[0])
        product = g.node("Mul", [gate, halves[1]], b + "ffn_products")
        closed = [
            self._linear(piece, (down,), f"{b}ffn_down.{e}", share=share)[0]
            for e, (piece, down) in enumerate(
                zip(self._cut(product, counts, b + "ffn_product"), downs, strict=True)
            )
        ]
        return g.node("Concat", closed, b + "ffn_down", axis=1)

    def _shared(self, x: str, b: str) -> str:
        """The expert that every token takes, times its own gate if it has one."""
        g, w = self._g, self._w
        out = gated(g, self._linear, self._c.family.activation, x, b + "ffn_{}_shexp.weight")
        name = b + "ffn_gate_inp_shexp.weight"
        values = w.optional(name, self._c.n_embd)
        if values is None:
            return out
        column = g.constant(name, values.reshape(-1, 1))
        logit = g.node("MatMul", [x, column], b + "shared_logit")
        return g.node("Mul", [out, g.node("Sigmoid", [logit], b + "shared_gate")], b + "shared")
