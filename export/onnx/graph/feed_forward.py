"""The gated feed-forward block: down(activation(gate(x)) * up(x))."""

from __future__ import annotations

from .config import Activation
from .graph import Graph
from .weights import Linear


def activated(g: Graph, kind: Activation, x: str) -> str:
    """The activation of x, elementwise."""
    if kind == "gelu":
        return g.node("Gelu", [x], x + "_gelu", approximate="tanh")
    if kind == "relu":
        return g.node("Relu", [x], x + "_relu")
    return g.node("Mul", [x, g.node("Sigmoid", [x], x + "_sigmoid")], x + "_silu")


def gated(g: Graph, linear: Linear, kind: Activation, x: str, names: str) -> str:
    """x [..., n_embd] -> [..., n_embd]. names: weights' names, with {} for gate, up and down."""
    gate, up, down = (names.format(part) for part in ("gate", "up", "down"))
    stem = names.removesuffix(".weight")
    halves = [stem.format("gate"), stem.format("up")]
    if linear.alike((gate, up)):
        both = linear(x, (gate, up), stem.format("gate_up"))[0]
        g.nodes("Split", [both], halves, axis=-1, num_outputs=2)
    else:
        for name, half in zip((gate, up), halves, strict=True):
            linear(x, (name,), half)
    product = g.node("Mul", [activated(g, kind, halves[0]), halves[1]], stem.format("product"))
    return linear(product, (down,), stem.format("down"))[0]
