"""Forward passes. `Oracle(path).logits(tokens)` is the answer an engine must give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from oracle import layers
from oracle.config import ADJACENT_PAIRS, read_config
from oracle.layers import Array, Route, rms_norm
from oracle.weights import Weights

RENORMALISED = {"llama": True, "qwen3moe": True, "smallthinker": True}
RENORMALISED |= {"qwen2moe": False, "olmoe": False, "glm4moe": False}
# Matrices that precision="balanced" multiplies with activations of two int8 terms.
BALANCED = frozenset({"attn_q", "attn_k", "attn_v", "ffn_gate_inp", "output", "token_embd"})
SINK_TOKENS = 2  # the first of a sequence, whose products have two terms with "balanced"
# The norm before the feed-forward, where it has another name.
FFN_NORM = {"glm4moe": "post_attention_norm.weight"}
FAMILIES = frozenset({"qwen2", "qwen3", "gemma3", "tokenrouted", *RENORMALISED})


class Oracle:
    """A model file and how to round on the way.

    dtype: of weights and sums; float64 unless the model is too large for it.
    precision: round what quantized matrices are multiplied with to int8, as the engine does with
        its option of that name: fast, balanced or high; None: do not round.
    sink_tokens: of the sequence's beginning, which "balanced" rounds less than the others.
    half_cache: round keys and values to f16, as the engine's f16 KV cache does.
    half_gelu: GELU as llama.cpp's CPU backend computes it.
    context: tokens of the session; only longrope asks.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: npt.DTypeLike = np.float64,
        precision: str | None = None,
        sink_tokens: int = SINK_TOKENS,
        half_cache: bool = False,
        half_gelu: bool = False,
        context: int = 0,
    ) -> None:
        self.w = Weights(path, dtype)
        self.c = read_config(self.w)
        if self.c.architecture not in FAMILIES:
            raise ValueError(f"no oracle for architecture {self.c.architecture!r}")
        self._precision = precision
        self._sink_tokens = sink_tokens if precision == "balanced" else 0
        self._half_cache = half_cache
        self._gelu = layers.gelu_tanh_half if half_gelu else layers.gelu_tanh
        self._context = context or self.c.context
        self.routes: list[Route] = []  # of the last call, one a mixture layer
        self._scores: Array | None = None  # of the next mixture layer's experts, if pre-gated

    def logits(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> Array:
        """Logits after each of `tokens`, [n, n_vocab]."""
        x = self.hidden(tokens)
        head = "output.weight" if "output.weight" in self.w else "token_embd.weight"
        return layers.softcap(self._linear(x, head, "output.bias"), self.c.final_softcap)

    def hidden(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> Array:
        """Final-norm hidden state after each of `tokens`, [n, n_embd]."""
        self.routes, self._scores = [], None
        h = self.w["token_embd.weight"][np.asarray(tokens, dtype=np.int64)]
        if self.c.architecture == "gemma3":
            h = h * math.sqrt(self.c.n_embd)
        block: Callable[[Array, int], Array] = {
            "gemma3": self._sandwich_block,
            "smallthinker": self._prerouted_block,
            "tokenrouted": self._once_routed_block,
        }.get(self.c.architecture, self._block)
        for layer in range(self.c.n_layer):
            h = block(h, layer)
        return self._norm(h, "output_norm.weight")

    # Layers.

    def _block(self, h: Array, layer: int) -> Array:
        """The common layer: attention, then FFN or mixture, each on a normed residual."""
        b = f"blk.{layer}."
        h = h + self._attention(self._norm(h, b + "attn_norm.weight"), layer)
        x = self._norm(h, b + FFN_NORM.get(self.c.architecture, "ffn_norm.weight"))
        if b + "ffn_gate_inp.weight" not in self.w:
            return h + self._ffn(x, b + "ffn_{}.weight", layers.silu)
        out = self._experts(x, self._route(x, layer), layer, layers.silu)
        if b + "ffn_gate_shexp.weight" in self.w:
            shared = self._ffn(x, b + "ffn_{}_shexp.weight", layers.silu)
            gate = self.w.optional(b + "ffn_gate_inp_shexp.weight")
            if gate is not None:
                shared = shared / (1.0 + np.exp(-(x @ gate.reshape(-1, 1))))
            out = out + shared
        return h + out

    def _sandwich_block(self, h: Array, layer: int) -> Array:
        """gemma3: each half's output is normed before it is added."""
        b = f"blk.{layer}."
        a = self._attention(self._norm(h, b + "attn_norm.weight"), layer)
        h = h + self._norm(a, b + "post_attention_norm.weight")
        f = self._ffn(self._norm(h, b + "ffn_norm.weight"), b + "ffn_{}.weight", self._gelu)
        return h + self._norm(f, b + "post_ffw_norm.weight")

    def _prerouted_block(self, h: Array, layer: int) -> Array:
        """smallthinker: the router sees the layer's raw input, before attention."""
        b = f"blk.{layer}."
        r = self._route(h, layer)
        h = h + self._attention(self._norm(h, b + "attn_norm.weight"), layer)
        x = self._norm(h, b + "ffn_norm.weight")
        return h + self._experts(x, r, layer, layers.relu)

    def _once_routed_block(self, h: Array, layer: int) -> Array:
        """tokenrouted: a dense layer 0, then one choice of experts for all layers, each in full."""
        b = f"blk.{layer}."
        h = h + self._attention(self._norm(h, b + "attn_norm.weight"), layer)
        x = self._norm(h, b + "ffn_norm.weight")
        if layer > 0:
            if b + "ffn_gate_shexp.weight" in self.w:
                h = h + self._ffn(x, b + "ffn_{}_shexp.weight", layers.silu)
            return h + self._experts(x, self.routes[-1], layer, layers.silu)
        h = h + self._ffn(x, b + "ffn_{}.weight", layers.silu)
        hidden = self._linear(self._norm(h, "router_norm.weight"), "router_up.weight")
        logits = self._linear(layers.relu(hidden), "router_down.weight")
        chosen = layers.route(logits, self.c, renormalise=False)
        self.routes.append(replace(chosen, weights=np.ones_like(chosen.weights)))
        return h

    # Parts.

    def _norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self.w[name], self.c.rms_eps)

    def _linear(
        self,
        x: Array,
        name: str,
        bias: str = "",
        expert: int | None = None,
        positions: Array | None = None,
    ) -> Array:
        """x [n, in] -> [n, out]; a 3-d tensor holds one matrix an expert.

        positions: [n] of the tokens; None: 0 .. n - 1.
        """
        matrix = self.w[name] if expert is None else self.w[name][expert]
        if self._precision and self.w.is_quantized(name):
            x = self._rounded(x, name, np.arange(len(x)) if positions is None else positions)
        y = x @ matrix.T
        return y + self.w[bias] if bias and bias in self.w else y

    def _rounded(self, x: Array, name: str, positions: Array) -> Array:
        """x [n, cols] as the engine passes it to a quantized matrix."""
        if self._precision == "high" or (
            self._precision == "balanced" and name.split(".")[-2] in BALANCED
        ):
            return layers.int8_activations(x, terms=2)
        out = layers.int8_activations(x)
        first = positions < self._sink_tokens
        if first.any():
            out[first] = layers.int8_activations(x[first], terms=2)
        return out

    def _ffn(self, x: Array, names: str, activation: Callable[[Array], Array]) -> Array:
        """names: a pattern with {} for gate, up and down."""
        gate, up, down = (names.format(part) for part in ("gate", "up", "down"))

        def project(y: Array, name: str) -> Array:
            return self._linear(y, name, name.replace(".weight", ".bias"))

        return project(activation(project(x, gate)) * project(x, up), down)

    def _route(self, x: Array, layer: int) -> Route:
        """The experts for x, which the router reads; where the model is pre-gated they were chosen
        at the mixture layer before."""
        b = f"blk.{layer}."
        r = layers.route(
            self._linear(x, b + "ffn_gate_inp.weight"),
            self.c,
            renormalise=bool(
                self.w.get(
                    f"{self.w.get('general.architecture')}.expert_weights_norm",
                    RENORMALISED[self.c.architecture],
                )
            ),
            scores=self._scores,
            bias=self.w.optional(b + "exp_probs_b.bias"),
        )
        self.routes.append(r)
        gated = b + "ffn_pregate.weight" in self.w
        self._scores = (
            self._linear(x, b + "ffn_pregate.weight", b + "ffn_pregate.bias") if gated else None
        )
        return r

    def _experts(
        self, x: Array, r: Route, layer: int, activation: Callable[[Array], Array]
    ) -> Array:
        b = f"blk.{layer}."
        one_tensor = b + "ffn_gate_exps.weight" in self.w

        def expert(e: int, tokens: Array) -> Array:
            def project(y: Array, part: str) -> Array:
                if one_tensor:
                    name = f"{b}ffn_{part}_exps.weight"
                    return self._linear(y, name, expert=e, positions=tokens)
                return self._linear(y, f"{b}ffn_{part}.{e}.weight", positions=tokens)

            y = x[tokens]
            return project(activation(project(y, "gate")) * project(y, "up"), "down")

        return layers.mixture(x, r, expert)

    def _attention(self, x: Array, layer: int) -> Array:
        c, b = self.c, f"blk.{layer}."
        n = x.shape[0]
        q, k, v = (
            self._linear(x, f"{b}attn_{part}.weight", f"{b}attn_{part}.bias") for part in "qkv"
        )
        norms = b + "attn_q_norm.weight" in self.w
        whole = norms and len(self.w[b + "attn_q_norm.weight"]) > c.head_dim
        if whole:  # over the whole projection, not per head
            q, k = self._norm(q, b + "attn_q_norm.weight"), self._norm(k, b + "attn_k_norm.weight")
        q = q.reshape(n, c.n_head, c.head_dim)
        k, v = (y.reshape(n, c.n_head_kv, c.head_dim) for y in (k, v))
        if norms and not whole:
            q, k = self._norm(q, b + "attn_q_norm.weight"), self._norm(k, b + "attn_k_norm.weight")
        if c.positions[layer]:
            table = layers.rope_table(
                c, np.arange(n), local=c.sliding[layer], divisors=self._rope_divisors()
            )
            adjacent = c.architecture in ADJACENT_PAIRS
            q, k = (layers.rotate(y, table, adjacent=adjacent) for y in (q, k))
        if self._half_cache:
            k, v = (y.astype(np.float16).astype(x.dtype) for y in (k, v))
        out = layers.attention(q, k, v, c, window=c.window if c.sliding[layer] else 0)
        return self._linear(out, b + "attn_output.weight", b + "attn_output.bias")

    def _rope_divisors(self) -> Array | None:
        if self.c.architecture not in ADJACENT_PAIRS:
            return None
        if self.c.scaling.kind != "longrope":
            return self.w.optional("rope_freqs.weight")
        long = self._context > self.c.scaling.original_context
        return self.w.optional(f"rope_factors_{'long' if long else 'short'}.weight")
