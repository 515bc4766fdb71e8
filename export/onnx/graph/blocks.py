"""Weights in blocks of 32, in MatMulNBits' format.

Format (onnxruntime, com.microsoft.MatMulNBits): B uint8 [rows, blocks, 16 or 32], two 4-bit values
a byte (the even one low) or one 8-bit value; scales float32 [rows, blocks]; without zero points a
value v stands for scale * (v - 8), or scale * (v - 128).

That is GGUF's Q4_0 and Q8_0 exactly. Q4_1 and Q4_K add a minimum to each block, which an integer
zero point cannot express. It is kept as an offset beside the block: scale * v + minimum is
scale * (v - 8) + offset with offset = minimum + 8 * scale, and the offsets' share of a product is
a small float32 product of its own, with the sums of the input's blocks. So a source of these types
loses nothing, and others are fitted with an offset, too, since that loses least.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK = 32
EXACT = frozenset({"Q4_0", "Q4_1", "Q4_K"})  # GGUF types that 4 bits hold without loss
SYMMETRIC = frozenset({"Q4_0"})  # GGUF types that need no offsets at 4 bits
_SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)  # factors that the fit tries on a block's range


@dataclass(frozen=True)
class Blocks:
    """packed uint8 [rows, blocks, 16 or 32]; scales [rows, blocks]; offsets the same, or None."""

    packed: Bytes
    scales: Array
    offsets: Array | None


def _pack(values: Bytes) -> Bytes:
    """4-bit values [..., 32] -> [..., 16]."""
    return np.ascontiguousarray(values[..., 0::2] | (values[..., 1::2] << 4))


def _halves(nibbles: Bytes) -> Bytes:
    """GGUF's 16 bytes, values i and i + 16 in byte i, as 32 values."""
    return np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)


def _f16(data: Bytes) -> Array:
    """Bytes [..., 2] -> float32 [...]."""
    return np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float32)


def four_bits(type: str, data: Bytes, values: Array | None, rows: int, cols: int) -> Blocks:
    """Packs a matrix [rows, cols] at 4 bits, exactly if its GGUF type allows.

    data: the file's bytes; values: float32 [rows, cols], needed for types other than Q4_0, Q4_1
    and Q4_K. cols is a multiple of 32.
    """
    n = cols // BLOCK
    if type == "Q4_0":
        rows_of = data.reshape(rows, n, 18)
        return Blocks(_pack(_halves(rows_of[..., 2:])), _f16(rows_of[..., :2]), None)
    if type == "Q4_1":
        rows_of = data.reshape(rows, n, 20)
        scales = _f16(rows_of[..., :2])
        offsets = _f16(rows_of[..., 2:4]) + 8 * scales
        return Blocks(_pack(_halves(rows_of[..., 4:])), scales, offsets)
    if type == "Q4_K":
        return _from_q4_k(data, rows, cols)
    assert values is not None
    return _fitted(values.reshape(rows, n, BLOCK))


def _from_q4_k(data: Bytes, rows: int, cols: int) -> Blocks:
    """Unpacks Q4_K: d, dmin (f16), 12 bytes of 6-bit scales and minima, 128 of 256 4-bit values."""
    blocks = data.reshape(rows, cols // 256, 144)
    d, dmin, packed = _f16(blocks[..., :2]), _f16(blocks[..., 2:4]), blocks[..., 4:16]
    # The first four scales and minima are 6 bits of bytes 0-3 and 4-7; the others are 4 bits of
    # bytes 8-11 under the 2 highest bits of those.
    scale = np.concatenate(
        [packed[..., :4] & 63, (packed[..., 8:] & 15) | ((packed[..., :4] >> 6) << 4)], axis=-1
    )
    minimum = np.concatenate(
        [packed[..., 4:8] & 63, (packed[..., 8:] >> 4) | ((packed[..., 4:8] >> 6) << 4)], axis=-1
    )
    scales = (d[..., None] * scale).reshape(rows, -1)
    offsets = 8 * scales - (dmin[..., None] * minimum).reshape(rows, -1)
    # 64 values in 32 bytes: the low halves are one block, the high halves the next.
    pairs = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    values = np.stack([pairs & 15, pairs >> 4], axis=-2).reshape(rows, cols // BLOCK, BLOCK)
    return Blocks(_pack(values), scales, offsets)


def _fitted(x: Array) -> Blocks:
    """Fits scale and offset of each block of x [rows, blocks, 32] for the least squared error.

    Values are rounded in several ranges; scale and offset are solved for each rounding.
    """
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    middle, span = (low + high) / 2, (high - low) / 15
    best = np.full(x.shape[:2], np.inf, np.float32)
    scales, offsets = np.zeros(x.shape[:2], np.float32), np.zeros(x.shape[:2], np.float32)
    packed = np.zeros(x.shape, np.uint8)
    mean = x.mean(axis=-1, keepdims=True)
    for shrink in _SHRINKS:
        step = span * np.float32(shrink)
        inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
        q = np.clip(np.rint((x - middle) * inverse + np.float32(7.5)), 0, 15)
        centred = q - q.mean(axis=-1, keepdims=True)
        power = (centred * centred).sum(axis=-1, keepdims=True)
        scale = (centred * (x - mean)).sum(axis=-1, keepdims=True)
        scale = np.divide(scale, power, out=np.zeros_like(power), where=power > 0)
        error = x - (mean + scale * centred)
        error = np.square(error).sum(axis=-1)
        better = error < best
        best = np.where(better, error, best)
        packed[better] = q[better].astype(np.uint8)
        scales = np.where(better, scale[..., 0], scales)
        # scale * (q - 8) + offset, the line through the means
        at = mean - scale * (q.mean(axis=-1, keepdims=True) - 8)
        offsets = np.where(better, at[..., 0], offsets)
    return Blocks(_pack(packed), scales, offsets)


def eight_bits(q8_0: Bytes, rows: int, cols: int) -> Blocks:
    """A matrix [rows, cols] of the GGUF type Q8_0 at 8 bits: the same values."""
    blocks = q8_0.reshape(rows, cols // BLOCK, 34)
    return Blocks(blocks[..., 2:] ^ np.uint8(128), _f16(blocks[..., :2]), None)
