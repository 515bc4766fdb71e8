"""A dense llama's layers in numpy: their residual stream and channels, layer by layer.

The engine runs whole models; fitting one layer after the other to what the layers before it
really give needs the residual stream in between. Slow, but it is matrix products.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...runtime.base.errors import ModelFileError, UnsupportedModelError
from .dense_base import DenseBase

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_BATCH = 8  # sequences whose attention scores are held at once


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Rows x [..., d] at unit mean square, times weight [d]."""
    mean = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    normed: Floats = x / np.sqrt(mean + np.float32(eps)) * weight
    return normed


class LlamaLayers:
    """The layers of a dense model of architecture llama, read from its file when they are used."""

    def __init__(self, dense: DenseBase) -> None:
        """Raises UnsupportedModelError if the numpy form lacks something that the model has."""
        self.dense = dense
        file = dense.file

        def number(name: str, default: float) -> float:
            return float(file.get(f"llama.{name}") or default)

        self.eps = number("attention.layer_norm_rms_epsilon", 1e-5)
        self.head_dim = int(number("attention.key_length", dense.n_embd // dense.n_head))
        self.value_dim = int(number("attention.value_length", dense.n_embd // dense.n_head))
        self.scale = number("attention.scale", self.head_dim**-0.5)
        scaling = file.get("llama.rope.scaling.type")
        factor = number("rope.scaling.factor", number("rope.scale_linear", 1.0))
        if scaling not in (None, "none", "linear"):
            raise UnsupportedModelError(
                f"{file.path}: llama.rope.scaling.type: expected none or linear, found {scaling}"
            )
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if number(name, 0.0):
                raise UnsupportedModelError(f"{file.path}: llama.{name}: expected none")
        self._n_rot = int(number("rope.dimension_count", self.head_dim))
        base = number("rope.freq_base", 10000.0)
        self._frequency = base ** (-2.0 * np.arange(self._n_rot // 2) / self._n_rot)
        if scaling != "none":
            self._frequency /= factor
        if "rope_freqs.weight" in dense.tensors:
            self._frequency /= self.vector("rope_freqs.weight")

    def vector(self, name: str) -> Floats:
        """A one-dimensional tensor as floats."""
        from ...runtime._core import dequantize

        tensor = self.dense.tensor(name)
        n = int(np.prod(tensor.shape))
        values = dequantize(tensor.type, self.dense.data(name), n)
        if not np.isfinite(values).all():
            raise ModelFileError(
                f"{self.dense.file.path}: tensor {name} has values that are not finite"
            )
        return values

    def embeddings(self, tokens: Indices) -> Floats:
        """Residual stream before layer 0 of tokens [sequences, window]: [..., n_embd]."""
        from ...runtime._core import dequantize

        tensor = self.dense.tensor("token_embd.weight")
        width, n_vocab = tensor.shape
        data = self.dense.data(tensor.name).reshape(n_vocab, -1)
        ids, at = np.unique(tokens, return_inverse=True)
        rows = dequantize(
            tensor.type, np.ascontiguousarray(data[ids]).reshape(-1), len(ids) * width
        )
        if not np.isfinite(rows).all():
            raise ModelFileError(
                f"{self.dense.file.path}: tensor {tensor.name} has values that are not finite"
            )
        x: Floats = rows.reshape(-1, width)[at.reshape(-1)].reshape(*tokens.shape, width)
        return x

    def layer(self, index: int) -> LlamaLayer:
        """Layer `index`, its weights as floats."""
        return LlamaLayer(self, index)

    def rotation(self, window: int) -> tuple[Floats, Floats]:
        """cos and sin of positions 0 .. window - 1, each [window, n_rot / 2]."""
        angle = np.arange(window)[:, None] * self._frequency
        return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


class LlamaLayer:
    """One layer."""

    def __init__(self, layers: LlamaLayers, index: int) -> None:
        self._layers = layers
        dense, b = layers.dense, f"blk.{index}."
        if b + "attn_qkv.weight" in dense.tensors:
            raise UnsupportedModelError(
                f"{dense.file.path}: tensor {b}attn_qkv.weight: expected separate q, k and v"
            )
        self._attn_norm = layers.vector(b + "attn_norm.weight")
        self._ffn_norm = layers.vector(b + "ffn_norm.weight")
        self._weight = {p: dense.values(f"{b}attn_{p}.weight") for p in ("q", "k", "v", "output")}
        self._bias = {
            p: layers.vector(f"{b}attn_{p}.bias")
            for p in self._weight
            if f"{b}attn_{p}.bias" in dense.tensors
        }
        self.gate = dense.values(b + "ffn_gate.weight")  # [n_ff, n_embd]
        self.up = dense.values(b + "ffn_up.weight")  # [n_ff, n_embd]
        self.down = np.ascontiguousarray(dense.values(b + "ffn_down.weight").T)  # [n_ff, n_embd]

    def attend(self, x: Floats) -> None:
        """Adds the attention of x [sequences, window, n_embd] to it."""
        for begin in range(0, len(x), _BATCH):
            x[begin : begin + _BATCH] += self._attention(x[begin : begin + _BATCH])

    def _attention(self, x: Floats) -> Floats:
        s, dense = self._layers, self._layers.dense
        n, window = x.shape[:2]
        normed = rms_norm(x, self._attn_norm, s.eps)
        q = self._project("q", normed).reshape(n, window, dense.n_head, s.head_dim)
        k = self._project("k", normed).reshape(n, window, dense.n_head_kv, s.head_dim)
        v = self._project("v", normed).reshape(n, window, dense.n_head_kv, s.value_dim)
        cos, sin = s.rotation(window)
        for y in (q, k):
            _rotate(y, cos, sin)
        group = dense.n_head // dense.n_head_kv
        hidden = np.triu(np.full((window, window), -np.inf, dtype=np.float32), 1)
        out = np.empty((n, window, dense.n_head, s.value_dim), dtype=np.float32)
        for h in range(dense.n_head):
            scores = q[:, :, h] @ k[:, :, h // group].transpose(0, 2, 1) * np.float32(s.scale)
            scores += hidden
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            out[:, :, h] = scores @ v[:, :, h // group]
        return self._project("output", out.reshape(n, window, -1))

    def _project(self, part: str, x: Floats) -> Floats:
        y: Floats = x @ self._weight[part].T
        return y + self._bias[part] if part in self._bias else y

    def normed(self, x: Floats) -> Floats:
        """What the feed-forward reads, from the residual stream x [..., n_embd]."""
        return rms_norm(x, self._ffn_norm, self._layers.eps)

    def channels(self, z: Floats, which: Indices | None = None) -> Floats:
        """Channel activations silu(gate z) * (up z) of z [n, n_embd]: [n, n_ff or those asked]."""
        gate, up = (self.gate, self.up) if which is None else (self.gate[which], self.up[which])
        g: Floats = z @ gate.T
        g /= 1 + np.exp(np.minimum(-g, np.float32(80)))
        g *= z @ up.T
        return g


def _rotate(x: Floats, cos: Floats, sin: Floats) -> None:
    """Rotates pairs (2i, 2i + 1) of x [sequences, window, heads, head_dim] in place."""
    n = 2 * cos.shape[1]
    a, b = x[..., 0:n:2].copy(), x[..., 1:n:2]
    c, s = cos[None, :, None], sin[None, :, None]
    x[..., 0:n:2], x[..., 1:n:2] = a * c - b * s, a * s + b * c
