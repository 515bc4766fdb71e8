"""The dense model that a mixture is made from: its sizes, its tensors, what is supported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...runtime.base.errors import ModelFileError, OptionError, UnsupportedModelError
from ..writer.tensor_types import format_row

if TYPE_CHECKING:
    from ...runtime._core import GgufFile, TensorInfo

PARTS = ("gate", "up", "down")  # matrices of a feed-forward

# Architecture of a base -> architectures of the mixtures that it can become, the default first.
_MIXTURES = {"llama": ("llama", "qwen2moe"), "qwen2": ("qwen2moe",)}

Floats = npt.NDArray[np.float32]


def feed_forward_part(name: str) -> tuple[int, str | None]:
    """(layer, "gate", "up" or "down") of a dense feed-forward matrix, (-1, None) of others."""
    pieces = name.split(".")
    if len(pieces) == 4 and pieces[0] == "blk" and pieces[3] == "weight":
        part = pieces[2].removeprefix("ffn_")
        if pieces[2].startswith("ffn_") and part in PARTS:
            return int(pieces[1]), part
    return -1, None


class DenseBase:
    """The base: its sizes and its tensors' bytes."""

    def __init__(self, file: GgufFile, architecture: str | None, type: str) -> None:
        found = file.get("general.architecture")
        if found not in _MIXTURES:
            raise UnsupportedModelError(
                f"{file.path}: general.architecture: expected llama or qwen2, found {found}"
            )
        if file.get(f"{found}.expert_count"):
            raise UnsupportedModelError(
                f"{file.path}: expected a dense model, found a mixture of "
                f"{file.get(f'{found}.expert_count')} experts"
            )
        self.file = file
        self.base_architecture: str = found
        self.architecture = architecture or _MIXTURES[found][0]
        if self.architecture not in _MIXTURES[found]:
            raise OptionError(
                f"architecture: expected {' or '.join(_MIXTURES[found])} for a {found} base, "
                f"found {self.architecture}"
            )
        self.tensors: dict[str, TensorInfo] = {t.name: t for t in file.tensors}
        self.n_layer = int(self._size("block_count"))
        self.n_embd = int(self._size("embedding_length"))
        self.n_head = int(self._size("attention.head_count"))
        self.n_head_kv = int(self._size("attention.head_count_kv", self.n_head))
        self.n_ff = self._feed_forward_width()
        block = format_row(type)["block"]
        for n in (self.n_embd, self.n_ff):
            if n % block:
                raise UnsupportedModelError(
                    f"{file.path}: type {type}: expected rows of a multiple of {block} weights, "
                    f"found {n}: choose a type with smaller blocks, such as Q4_0"
                )
        unit = max(int(block), 32)
        self.n_ff_shared = min(self.n_ff, max(unit, self.n_ff // 4 // unit * unit))
        if self.architecture == "qwen2moe":
            self._check_qwen2moe()

    def _size(self, name: str, default: int | None = None) -> int:
        key = f"{self.base_architecture}.{name}"
        value = self.file.get(key)
        if isinstance(value, list):  # some models give one value a layer
            value = value[0] if value and all(v == value[0] for v in value) else None
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise ModelFileError(f"{self.file.path}: {key}: expected one positive integer")
        return value

    def tensor(self, name: str) -> TensorInfo:
        """The directory row of a tensor that must be there."""
        if name not in self.tensors:
            raise ModelFileError(f"{self.file.path}: expected tensor {name}, found none")
        return self.tensors[name]

    def _feed_forward_width(self) -> int:
        n_ff = self.tensor("blk.0.ffn_gate.weight").shape[-1]
        for layer in range(self.n_layer):
            for part in PARTS:
                tensor = self.tensor(f"blk.{layer}.ffn_{part}.weight")
                expected = (n_ff, self.n_embd) if part == "down" else (self.n_embd, n_ff)
                if tuple(tensor.shape) != expected:
                    raise ModelFileError(
                        f"{self.file.path}: tensor {tensor.name}: expected shape "
                        f"{list(expected)}, found {list(tensor.shape)}"
                    )
        return int(n_ff)

    def _check_qwen2moe(self) -> None:
        absent = ["rope_freqs.weight", "rope_factors_long.weight", "output.bias"]
        absent += [f"blk.{i}.attn_output.bias" for i in range(self.n_layer)]
        absent += [f"blk.{i}.attn_qkv.weight" for i in range(self.n_layer)]
        for name in absent:
            if name in self.tensors:
                raise UnsupportedModelError(
                    f"{self.file.path}: tensor {name}: expected none, qwen2moe has no such tensor"
                )

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's bytes."""
        tensor = self.tensor(name)
        with open(self.file.shards[tensor.shard], "rb") as shard:
            shard.seek(tensor.offset)
            data = np.fromfile(shard, dtype=np.uint8, count=tensor.nbytes)
        if len(data) != tensor.nbytes:
            raise ModelFileError(f"{self.file.path}: tensor {name} is truncated")
        return data

    def values(self, name: str) -> Floats:
        """A matrix as floats, [rows, columns]."""
        from ...runtime._core import dequantize

        tensor = self.tensor(name)
        columns, rows = tensor.shape
        values = dequantize(tensor.type, self.data(name), rows * columns)
        if not np.isfinite(values).all():
            raise ModelFileError(f"{self.file.path}: tensor {name} has values that are not finite")
        return values.reshape(rows, columns)
