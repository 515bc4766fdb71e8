"""A GGUF file as numpy arrays: metadata values and dequantized tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

FLOAT_TYPES = frozenset(
    {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16}
)


class Weights:
    """One GGUF file (not sharded). Tensors are dequantized when first asked for, then kept."""

    def __init__(self, path: str | Path, dtype: npt.DTypeLike = np.float64) -> None:
        self._reader = gguf.GGUFReader(str(path))
        self._tensors = {t.name: t for t in self._reader.tensors}
        self._loaded: dict[str, npt.NDArray[Any]] = {}
        self.dtype = np.dtype(dtype)

    def get(self, key: str, default: Any = None) -> Any:
        """Metadata value as a Python scalar, string or list; `default` where absent."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Numpy order: the contiguous dimension last."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def is_quantized(self, name: str) -> bool:
        """Whether the engine multiplies this tensor with int8 activations."""
        return self._tensors[name].tensor_type not in FLOAT_TYPES

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Tensor as `dtype`, numpy order: [out, in] for a matrix, [expert, out, in] for experts."""
        if name not in self._loaded:
            tensor = self._tensors[name]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            self._loaded[name] = values.reshape(self.shape(name)).astype(self.dtype)
        return self._loaded[name]

    def optional(self, name: str) -> npt.NDArray[Any] | None:
        """The tensor, or None where the file has none of that name."""
        return self[name] if name in self._tensors else None
