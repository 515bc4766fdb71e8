"""Upcycling: a mixture of experts made from a dense model, with nearly the same answers.

Every expert is the dense feed-forward with its neurons in another order and a little noise; the
router is spherical k-means over real hidden states. Whatever experts a token takes, their weighted
sum is nearly the dense feed-forward: so the mixture answers like its base, while its memory
traffic is that of a real mixture of its size. Source: Komatsuzaki et al., Sparse Upcycling, 2022,
for the idea; the permutations and the k-means router are ours.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..offload.profile.hidden_states import feed_forward_inputs, of_text, own_text
from ..runtime.base.checked_call import checked
from ..runtime.base.errors import ModelFileError, OptionError
from ..runtime.base.progress import Progress
from ..runtime.files.output_file import check_output
from .mixture.dense_base import PARTS, DenseBase, feed_forward_part
from .mixture.routers import kmeans_router, random_router
from .writer import gguf_writer
from .writer.gguf_writer import Layout, PartFile, Tensor
from .writer.model_writer import COMMIT_BYTES, Piece, making, resumable_part, write_pieces
from .writer.tensor_types import format_row

if TYPE_CHECKING:
    from ..runtime._core import GgufFile

__all__ = ["ROUTERS", "Recipe", "Upcycled", "resumable_part", "upcycle"]

ROUTERS = ("kmeans", "random")

_RECIPE_VERSION = 1  # changes if the same arguments make other bytes
_BATCH_BYTES = 16 << 20  # bytes of experts made in one call
_COMMIT_BYTES = COMMIT_BYTES
_STATE_BYTES = 1 << 30  # bytes of hidden states that are kept at once
# qwen2moe: the shared expert does this share of the work of its neurons, the experts the rest.
_SHARED_SHARE = np.float32(0.5)
# The general.file_type of files whose tensors are mostly of a type.
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
    "MXFP4": 38,
}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recipe:
    """All arguments that decide the bytes of the mixture."""

    base: str  # digest of the base file's header, with its size and time of change
    architecture: str
    experts: int
    used: int
    type: str
    noise: float
    seed: int
    router: str
    text: str | None  # digest of the text; None: the base writes it
    version: int = _RECIPE_VERSION

    def digest(self) -> str:
        """A digest of the recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Upcycled:
    """The result: the file, its bytes, the bytes of one expert (all three matrices)."""

    path: Path
    nbytes: int
    expert_bytes: int


@checked
def upcycle(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    experts: int,
    used: int,
    architecture: str | None = None,
    type: str = "Q4_0",
    text: str | None = None,
    router: str = "kmeans",
    noise: float = 0.01,
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Upcycled:
    """Makes a mixture of `experts` experts, `used` for each token, from a dense GGUF file.

    base: a dense model of architecture llama or qwen2. architecture: llama (Mixtral's form;
    default for a llama base) or qwen2moe (with a shared expert). type: of the experts' weights;
    all other tensors are copied unchanged. text: text that fits the routers; None lets the
    base write it. router: "kmeans", or "random", which uses all experts alike. noise: relative
    standard deviation, 0 to 0.5. threads: None takes all cores.

    The file appears under its name only when it is complete. An interrupted call leaves a hidden
    part beside it; the same call takes it up again and gives the same bytes. An existing `out` is
    replaced only with `force`.
    progress: called with (what is done, how much of it, of how much); bytes for "experts".
    Raises OptionError, ModelFileError, UnsupportedModelError; DeviceError if the disk is full.
    """
    from ..runtime._core import GgufFile

    path, base_path = Path(out), Path(base)
    _check_options(experts=experts, used=used, type=type, router=router, noise=noise, seed=seed)
    file = GgufFile(str(base_path))
    dense = DenseBase(file, architecture, type)
    check_output(path, [base_path], force=force)
    recipe = Recipe(
        base=_digest_of(file),
        architecture=dense.architecture,
        experts=experts,
        used=used,
        type=type,
        noise=float(noise),
        seed=seed,
        router=router,
        text=None if text is None else hashlib.sha256(text.encode()).hexdigest(),
    )
    work = _Upcycling(
        file, dense, recipe, text=text, threads=threads or os.cpu_count() or 1, progress=progress
    )
    with making(path, work.layout.size, recipe.digest()) as part:
        work.write(part)
    return Upcycled(path, work.layout.size, work.expert_bytes)


def _check_options(
    *, experts: int, used: int, type: str, router: str, noise: float, seed: int
) -> None:
    from ..runtime._core import formats

    writable = [f["name"] for f in formats() if f["quantizes"]]
    if not 2 <= experts <= 65536:
        raise OptionError(f"experts: expected 2 to 65536, found {experts}")
    if not 1 <= used <= experts:
        raise OptionError(f"used: expected 1 to {experts} (the experts), found {used}")
    if type not in writable:
        raise OptionError(f"type: expected one of {', '.join(writable)}, found {type}")
    if router not in ROUTERS:
        raise OptionError(f"router: expected {' or '.join(ROUTERS)}, found {router}")
    if not 0 <= noise <= 0.5:
        raise OptionError(f"noise: expected 0 to 0.5, found {noise}")
    if not 0 <= seed < 2**32:
        raise OptionError(f"seed: expected 0 to {2**32 - 1}, found {seed}")


def _digest_of(file: GgufFile) -> str:
    digest = hashlib.sha256()
    for shard in file.shards:
        found = os.stat(shard)
        digest.update(f"{found.st_size} {found.st_mtime_ns} ".encode())
    digest.update(repr([(t.name, t.type, t.shape) for t in file.tensors]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Batch:
    """Experts first .. first + count - 1 of one expert tensor."""

    layer: int
    part: str
    first: int
    count: int


class _Upcycling:
    """One run of `upcycle`."""

    def __init__(
        self,
        file: GgufFile,
        dense: DenseBase,
        recipe: Recipe,
        *,
        text: str | None,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self._dense, self._recipe, self._text = dense, recipe, text
        self._threads, self._progress = threads, progress
        row = format_row(recipe.type)
        self._type_id = int(row["id"])
        self._qwen = dense.architecture == "qwen2moe"
        # Bytes of one matrix of one expert: all three have the same size.
        self._matrix_bytes = dense.n_ff * dense.n_embd // row["block"] * row["bytes"]
        self._shared_bytes = dense.n_ff_shared * dense.n_embd // row["block"] * row["bytes"]
        self.expert_bytes = 3 * self._matrix_bytes
        self._sources: dict[str, str] = {}  # copied tensors -> the base's tensor
        self.layout: Layout = gguf_writer.layout(self._metadata(file), self._tensors(file))
        self._orders = lru_cache(maxsize=1)(self._make_orders)
        self._dense_part = lru_cache(maxsize=1)(self._make_dense_part)

    # Contents of the file.

    def _metadata(self, file: GgufFile) -> dict[str, bytes]:
        d, r = self._dense, self._recipe
        old, new = f"{d.base_architecture}.", f"{d.architecture}."
        entries: dict[str, bytes] = {}
        for key, value in gguf_writer.read_metadata(file.shards[0]).items():
            if not key.startswith("split."):
                entries[new + key[len(old) :] if key.startswith(old) else key] = value
        entries["general.architecture"] = gguf_writer.string(d.architecture)
        name = file.get("general.name") or Path(file.path).stem
        entries["general.name"] = gguf_writer.string(f"{name}, {r.experts} experts")
        label = file.get("general.size_label")
        if isinstance(label, str):
            entries["general.size_label"] = gguf_writer.string(f"{r.experts}x{label}")
        if r.type in _FILE_TYPES:
            entries["general.file_type"] = gguf_writer.u32(_FILE_TYPES[r.type])
        entries[new + "expert_count"] = gguf_writer.u32(r.experts)
        entries[new + "expert_used_count"] = gguf_writer.u32(r.used)
        if self._qwen:
            entries[new + "expert_feed_forward_length"] = gguf_writer.u32(d.n_ff)
            entries[new + "expert_shared_feed_forward_length"] = gguf_writer.u32(d.n_ff_shared)
        entries["stoker.upcycle.recipe"] = gguf_writer.string(
            json.dumps({k: v for k, v in asdict(r).items() if k != "base"})
        )
        return entries

    def _tensors(self, file: GgufFile) -> list[Tensor]:
        """The directory, in the base's order: a layer's experts stand where its dense part was."""
        d, e = self._dense, self._recipe.experts
        rows: list[Tensor] = []
        begun: set[int] = set()  # layers whose router is in the directory
        for t in file.tensors:
            layer, part = feed_forward_part(t.name)
            if part is None:
                rows.append(Tensor(t.name, tuple(t.shape), format_row(t.type)["id"], t.nbytes))
                self._sources[t.name] = t.name
                continue
            b = f"blk.{layer}."
            if layer not in begun:
                begun.add(layer)
                rows.append(Tensor(b + "ffn_gate_inp.weight", (d.n_embd, e), 0, 4 * d.n_embd * e))
                if self._qwen:
                    rows += self._shared_tensors(b)
            shape = (*t.shape, e)
            name = f"{b}ffn_{part}_exps.weight"
            rows.append(Tensor(name, shape, self._type_id, e * self._matrix_bytes))
        if self._qwen and "output.weight" not in d.tensors:
            t = d.tensor("token_embd.weight")  # the family has no tied output
            rows.append(Tensor("output.weight", tuple(t.shape), format_row(t.type)["id"], t.nbytes))
            self._sources["output.weight"] = t.name
        return rows

    def _shared_tensors(self, b: str) -> Iterator[Tensor]:
        """Shared expert and, if the base has none, biases of the layer with prefix `b`."""
        d, n, kind = self._dense, self._dense.n_ff_shared, self._type_id
        yield Tensor(b + "ffn_gate_inp_shexp.weight", (d.n_embd,), 0, 4 * d.n_embd)
        yield Tensor(b + "ffn_gate_shexp.weight", (d.n_embd, n), kind, self._shared_bytes)
        yield Tensor(b + "ffn_up_shexp.weight", (d.n_embd, n), kind, self._shared_bytes)
        yield Tensor(b + "ffn_down_shexp.weight", (n, d.n_embd), kind, self._shared_bytes)
        for part in "qkv":
            if b + f"attn_{part}.bias" not in d.tensors:
                rows = d.tensor(b + f"attn_{part}.weight").shape[1]
                yield Tensor(b + f"attn_{part}.bias", (rows,), 0, 4 * rows)

    # Making and writing.

    def write(self, part: PartFile) -> None:
        """Writes what is missing: first all but the experts, in one step, then the experts."""
        if part.done == 0:
            routers = self._routers()
            part.write(0, self.layout.header)
            for name, source in self._sources.items():
                part.write(self.layout.offsets[name], self._copied(name, source).data)
            for layer, router in enumerate(routers):
                name = f"blk.{layer}.ffn_gate_inp.weight"
                part.write(self.layout.offsets[name], router.tobytes())
                if self._qwen:
                    for shared, data in self._shared(layer):
                        part.write(self.layout.offsets[shared], data)
            part.commit(1)
        self._write_experts(part)

    def _write_experts(self, part: PartFile) -> None:
        """Makes the experts batch by batch, while a thread writes the batches before."""
        batches = self._batches()
        total = sum(b.count for b in batches) * self._matrix_bytes
        at = sum(b.count for b in batches[: part.done - 1]) * self._matrix_bytes

        def pieces() -> Iterator[Piece]:
            for index in range(part.done - 1, len(batches)):
                batch = batches[index]
                name = f"blk.{batch.layer}.ffn_{batch.part}_exps.weight"
                offset = self.layout.offsets[name] + batch.first * self._matrix_bytes
                yield Piece(offset, self._experts(batch), index + 2)

        def report(n: int) -> None:
            nonlocal at
            at += n
            self._report("experts", at, total)

        write_pieces(part, pieces(), commit_bytes=_COMMIT_BYTES, taken=report)

    def _batches(self) -> Sequence[_Batch]:
        """All experts in the order in which they are made."""
        e = self._recipe.experts
        size = max(1, min(e, _BATCH_BYTES // self._matrix_bytes))
        return [
            _Batch(layer, part, first, min(size, e - first))
            for layer in range(self._dense.n_layer)
            for part in PARTS
            for first in range(0, e, size)
        ]

    def _experts(self, batch: _Batch) -> npt.NDArray[np.uint8]:
        from ..runtime._core import make_experts

        r, which = self._recipe, slice(batch.first, batch.first + batch.count)
        seeds = np.random.default_rng([r.seed, 2, batch.layer, PARTS.index(batch.part)]).integers(
            0, 2**64, r.experts, dtype=np.uint64, endpoint=False
        )
        return make_experts(
            r.type,
            self._dense_part(batch.layer, batch.part),
            axis="columns" if batch.part == "down" else "rows",
            order=self._orders(batch.layer)[which],
            seeds=seeds[which],
            noise=r.noise,
            threads=self._threads,
        )

    def _make_orders(self, layer: int) -> npt.NDArray[np.int32]:
        """The neurons' order in every expert of a layer, [experts, n_ff]."""
        r, n_ff = self._recipe, self._dense.n_ff
        orders = np.empty((r.experts, n_ff), dtype=np.int32)
        for e in range(r.experts):
            orders[e] = np.random.default_rng([r.seed, 1, layer, e]).permutation(n_ff)
        return orders

    def _make_dense_part(self, layer: int, part: str) -> Floats:
        """A layer's dense matrix, without the shared expert's share."""
        values = self._dense.values(f"blk.{layer}.ffn_{part}.weight")
        if self._qwen and part == "down":
            values[:, self._shared_neurons(layer)] *= 1 - _SHARED_SHARE
        return values

    def _shared_neurons(self, layer: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([self._recipe.seed, 3, layer])
        return np.sort(rng.permutation(self._dense.n_ff)[: self._dense.n_ff_shared])

    def _shared(self, layer: int) -> Iterator[tuple[str, bytes]]:
        """Tensors of the layer's shared expert, and zero biases."""
        from ..runtime._core import quantize

        d, b = self._dense, f"blk.{layer}."
        neurons = self._shared_neurons(layer)
        for part in PARTS:
            values = d.values(f"{b}ffn_{part}.weight")
            # The gate halves the output: the sigmoid of almost nothing.
            share = 2 * _SHARED_SHARE
            values = values[:, neurons] * share if part == "down" else values[neurons]
            data = quantize(self._recipe.type, np.ascontiguousarray(values))
            yield f"{b}ffn_{part}_shexp.weight", data.tobytes()
        rng = np.random.default_rng([self._recipe.seed, 4, layer])
        gate = rng.standard_normal(d.n_embd) * (1e-3 / np.sqrt(d.n_embd))
        yield b + "ffn_gate_inp_shexp.weight", gate.astype(np.float32).tobytes()
        for part in "qkv":
            name = f"{b}attn_{part}.bias"
            if name not in d.tensors:
                yield name, bytes(4 * d.tensor(f"{b}attn_{part}.weight").shape[1])

    def _copied(self, name: str, source: str) -> npt.NDArray[np.uint8]:
        """A tensor's bytes; rows of q and k are in the order of the family's rotary layout."""
        data = self._dense.data(source)
        if not (self._qwen and self._dense.base_architecture == "llama"):
            return data
        kind = name.rpartition(".attn_")[2]
        if kind not in ("q.weight", "k.weight", "q.bias", "k.bias"):
            return data
        n_head = self._dense.n_head if kind[0] == "q" else self._dense.n_head_kv
        rows = self._dense.tensor(source).shape[-1]
        order = _halves_from_pairs(rows // n_head, self._n_rot(rows // n_head))
        heads = data.reshape(n_head, rows // n_head, -1)
        return np.ascontiguousarray(heads[:, order]).reshape(-1)

    def _n_rot(self, head_dim: int) -> int:
        return int(self._dense.file.get("llama.rope.dimension_count") or head_dim)

    def _routers(self) -> list[Floats]:
        """Every layer's router, [experts, n_embd]."""
        from ..runtime.model import Model
        from ..runtime.options import LoadOptions

        d, r = self._dense, self._recipe
        context = min(
            256, int(self._dense.file.get(f"{d.base_architecture}.context_length") or 256)
        )
        model = Model(Path(d.file.path), LoadOptions(threads=self._threads, context=context))
        fit = _STATE_BYTES // (2 * d.n_layer * d.n_embd)
        if self._text is None:
            n = max(2 * r.experts, min(fit, 32 * r.experts, 4096), min(fit, 1024))
            sequences = own_text(model, n, r.seed, self._progress)
        else:
            n = max(2 * r.experts, min(fit, 64 * r.experts, 16384), min(fit, 2048))
            sequences = of_text(model, self._text, n)
        found = sum(map(len, sequences))
        if found < r.experts:
            raise OptionError(
                f"text: expected at least {r.experts} tokens for as many experts, found {found}"
            )
        states = feed_forward_inputs(model, sequences, self._progress)
        make = kmeans_router if r.router == "kmeans" else random_router
        routers = []
        for layer in range(d.n_layer):
            of_layer = states[layer].astype(np.float32)
            if not np.isfinite(of_layer).all():
                raise ModelFileError(f"{d.file.path}: the base computes values that are not finite")
            routers.append(make(of_layer, r.experts, r.used, r.seed + layer))
            self._report("routers", layer + 1, d.n_layer)
        return routers

    def _report(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)


def _halves_from_pairs(head_dim: int, n_rot: int) -> npt.NDArray[np.int64]:
    """The order of a head's rows that turns rotary pairs (2i, 2i + 1) into (i, i + n_rot / 2)."""
    order = np.arange(head_dim)
    order[:n_rot] = np.concatenate([np.arange(0, n_rot, 2), np.arange(1, n_rot, 2)])
    return order
