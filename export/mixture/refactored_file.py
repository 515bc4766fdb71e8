"""The file of a refactored model: its contents, and how its layers are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..writer import gguf_writer
from ..writer.gguf_writer import PartFile, Tensor
from ..writer.model_writer import making
from ..writer.tensor_types import format_row
from .channel_split import Split
from .dense_base import PARTS, DenseBase, feed_forward_part
from .llama_layers import Floats, Indices
from .refactor_recipe import Recipe
from .token_router import TokenRouter

ARCHITECTURE = "tokenrouted"

_ROUTER_HIDDEN = 64

# (layer, down rows [columns of its split, n_embd], the columns' mean squares if known)
Downs = Iterator[tuple[int, Floats, "Floats | None"]]


class RefactoredFile:
    """Layout and writing of the file for this recipe."""

    def __init__(self, dense: DenseBase, recipe: Recipe, threads: int) -> None:
        self._dense, self._recipe, self._threads = dense, recipe, threads
        self.hidden = min(_ROUTER_HIDDEN, dense.n_ff)  # width of the router
        self._copied: list[str] = []
        self.layout = gguf_writer.layout(self._metadata(), self._tensors())

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of layer 1, all three matrices."""
        total = 0
        for part in PARTS:
            kind = format_row(
                self._recipe.type or self._dense.tensor(f"blk.1.ffn_{part}.weight").type
            )
            weights = self._recipe.width * self._dense.n_embd
            total += weights // int(kind["block"]) * int(kind["bytes"])
        return total

    def _metadata(self) -> dict[str, bytes]:
        file = self._dense.file
        r, old, new = self._recipe, "llama.", f"{ARCHITECTURE}."
        entries: dict[str, bytes] = {}
        for key, value in gguf_writer.read_metadata(file.shards[0]).items():
            if not key.startswith("split."):
                entries[new + key[len(old) :] if key.startswith(old) else key] = value
        entries["general.architecture"] = gguf_writer.string(ARCHITECTURE)
        name = file.get("general.name") or Path(file.path).stem
        entries["general.name"] = gguf_writer.string(f"{name}, {r.experts} domains")
        for key, number in {
            "feed_forward_length": self._dense.n_ff,
            "expert_count": r.experts,
            "expert_used_count": r.used,
            "expert_feed_forward_length": r.width,
            "expert_shared_feed_forward_length": r.shared,
            "router_length": self.hidden,
        }.items():
            entries[new + key] = gguf_writer.u32(number)
        entries["stoker.refactor.recipe"] = gguf_writer.string(json.dumps(asdict(r)))
        return entries

    def _tensors(self) -> list[Tensor]:
        """The directory, in the base's order: a layer's experts stand where its dense part was."""
        r, d, h = self._recipe, self._dense, self.hidden
        rows = [
            Tensor("router_norm.weight", (d.n_embd,), 0, 4 * d.n_embd),
            Tensor("router_up.weight", (d.n_embd, h), 0, 4 * d.n_embd * h),
            Tensor("router_down.weight", (h, r.experts), 0, 4 * h * r.experts),
        ]
        for t in d.file.tensors:
            layer, part = feed_forward_part(t.name)
            if part is None or layer == 0:
                rows.append(Tensor(t.name, tuple(t.shape), format_row(t.type)["id"], t.nbytes))
                self._copied.append(t.name)
                continue
            kind = format_row(r.type or t.type)
            for suffix, n, count in (("shexp", r.shared, 1), ("exps", r.width, r.experts)):
                if n == 0:
                    continue
                matrix = (n, d.n_embd) if part == "down" else (d.n_embd, n)
                shape = matrix if suffix == "shexp" else (*matrix, count)
                nbytes = count * n * d.n_embd // int(kind["block"]) * int(kind["bytes"])
                name = f"blk.{layer}.ffn_{part}_{suffix}.weight"
                rows.append(Tensor(name, shape, int(kind["id"]), nbytes))
        return rows

    def write(
        self, path: Path, router: TokenRouter, splits: Mapping[int, Split], downs: Downs
    ) -> None:
        """Writes the model; it appears under `path` when it is complete, or not at all."""
        digest = hashlib.sha256(self.layout.header).hexdigest()
        with making(path, self.layout.size, digest) as part:
            part.write(0, self.layout.header)
            at = self.layout.offsets
            for name in self._copied:
                part.write(at[name], self._dense.data(name).data)
            part.write(at["router_norm.weight"], router.norm.tobytes())
            part.write(at["router_up.weight"], router.up.tobytes())
            part.write(at["router_down.weight"], router.down.tobytes())
            for index, down, energy in downs:
                self._write_layer(part, splits[index], index, down, energy)

    def _write_layer(
        self, part: PartFile, split: Split, index: int, down: Floats, energy: Floats | None
    ) -> None:
        at, s = self.layout.offsets, self._recipe.shared
        for which in ("gate", "up"):
            data = self._rows(f"blk.{index}.ffn_{which}.weight", split.all)
            if s:
                part.write(at[f"blk.{index}.ffn_{which}_shexp.weight"], data[:s].tobytes())
            part.write(at[f"blk.{index}.ffn_{which}_exps.weight"], data[s:].tobytes())
        columns = self._columns(index, down, energy)
        if s:
            part.write(at[f"blk.{index}.ffn_down_shexp.weight"], columns[0].tobytes())
            columns = columns[1:]
        data = np.concatenate([c.reshape(-1) for c in columns])
        part.write(at[f"blk.{index}.ffn_down_exps.weight"], data.tobytes())

    def _rows(self, name: str, channels: Indices) -> npt.NDArray[np.uint8]:
        """Rows of a gate or up matrix in the file's type; copied if the type is the base's."""
        from ...runtime._core import quantize

        kind = self._dense.tensor(name).type
        if self._recipe.type in (None, kind):
            return self._dense.data(name).reshape(self._dense.n_ff, -1)[channels]
        return quantize(
            self._recipe.type, np.ascontiguousarray(self._dense.values(name)[channels])
        ).reshape(len(channels), -1)

    def _columns(
        self, index: int, down: Floats, energy: Floats | None
    ) -> list[npt.NDArray[np.uint8]]:
        """The down matrices in the file's type: the shared expert's, if any, and each expert's."""
        from ...runtime._core import quantize

        kind = self._down_type(index)
        matrices = []
        for begin, end in self._pieces():
            matrix = np.ascontiguousarray(down[begin:end].T)
            weight = None
            if energy is not None and energy[begin:end].any():
                weight = np.broadcast_to(energy[begin:end], matrix.shape)
                weight = np.ascontiguousarray(weight)
            matrices.append(quantize(kind, matrix, importance=weight, threads=self._threads))
        return matrices

    def rounded(self, index: int, down: Floats, energy: Floats | None) -> Floats:
        """Down rows as the file's type gives them back."""
        from ...runtime._core import dequantize

        rounded = np.empty_like(down)
        matrices = self._columns(index, down, energy)
        for (begin, end), data in zip(self._pieces(), matrices, strict=True):
            n = down.shape[1] * (end - begin)
            values = dequantize(self._down_type(index), data.reshape(-1), n)
            rounded[begin:end] = values.reshape(down.shape[1], -1).T
        return rounded

    def _down_type(self, index: int) -> str:
        return self._recipe.type or self._dense.tensor(f"blk.{index}.ffn_down.weight").type

    def _pieces(self) -> list[tuple[int, int]]:
        """Columns of the shared expert, if any, and of each expert, as (first, end)."""
        r = self._recipe
        edges = [0] * (r.shared > 0)
        edges += [r.shared + e * r.width for e in range(r.experts + 1)]
        return list(pairwise(edges))
