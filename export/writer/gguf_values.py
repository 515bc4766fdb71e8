"""Metadata values in GGUF's encoding, from Python values."""

from __future__ import annotations

import struct
from collections.abc import Sequence

# Type ids of the GGUF specification.
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9

Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]


def encode(value: Value) -> bytes:
    """Encodes type and bytes: bool, u32, f32, string, or an array of bool, i32, f32 or strings.

    Raises ValueError for an integer that a u32 cannot hold and for an array of mixed types. An
    empty array is one of strings (a vocabulary without merges).
    """
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        if not 0 <= value < 1 << 32:
            raise ValueError(f"expected 0 to {(1 << 32) - 1}, found {value}")
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    return _array(value)


def _array(values: Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]) -> bytes:
    kinds = set(map(type, values))
    head = struct.pack("<I", _ARRAY)
    n = len(values)
    if kinds <= {str}:
        return head + struct.pack("<IQ", _STRING, n) + b"".join(_text(str(v)) for v in values)
    if kinds == {bool}:
        return head + struct.pack("<IQ", _BOOL, n) + bytes(map(bool, values))
    if kinds == {int}:
        return head + struct.pack(f"<IQ{n}i", _I32, n, *values)
    if kinds == {float}:
        return head + struct.pack(f"<IQ{n}f", _F32, n, *values)
    raise ValueError(f"expected values of one type, found {sorted(k.__name__ for k in kinds)}")


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data
