"""Writes the seed corpus of gguf_fuzz: small GGUF files, one for each feature.

Usage: python tests/fuzz/make_seeds.py FOLDER
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np


def _model(writer: gguf.GGUFWriter) -> None:
    """A small model's header: every kind of metadata, tensors of several types."""
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "</s>", "a", "b", "é"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.0, -2.5])
    writer.add_array("tokenizer.ggml.token_type", [3, 3, 1])
    for name, kind, shape in (
        ("token_embd.weight", gguf.GGMLQuantizationType.F16, (2, 32)),
        ("blk.0.attn_q.weight", gguf.GGMLQuantizationType.Q8_0, (2, 32)),
        ("blk.0.ffn_up_exps.weight", gguf.GGMLQuantizationType.F32, (2, 2, 8)),
    ):
        data = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        if kind == gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, data.astype(np.float16))
        elif kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)


def _scalars(writer: gguf.GGUFWriter) -> None:
    """One key of each scalar type."""
    writer.add_uint8("k.u8", 255)
    writer.add_int8("k.i8", -1)
    writer.add_uint16("k.u16", 65535)
    writer.add_int16("k.i16", -2)
    writer.add_int32("k.i32", -3)
    writer.add_uint64("k.u64", 2**64 - 1)
    writer.add_int64("k.i64", -(2**63))
    writer.add_float64("k.f64", 0.1)
    writer.add_string("k.string", "text")


def _nested(writer: gguf.GGUFWriter) -> None:
    """Arrays of arrays."""
    writer.add_array("k.nested", [[1, 2], [3], [4, 5, 6]])


def _aligned(writer: gguf.GGUFWriter) -> None:
    """A file with an alignment of its own."""
    writer.add_custom_alignment(64)
    writer.add_tensor("a", np.ones(3, dtype=np.float32))
    writer.add_tensor("b", np.ones(5, dtype=np.float32))


def _shard(writer: gguf.GGUFWriter) -> None:
    """The keys of a split file."""
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 2)
    writer.add_int32("split.tensors.count", 2)
    writer.add_tensor("a", np.ones(8, dtype=np.float32))


SEEDS: dict[str, Callable[[gguf.GGUFWriter], None]] = {
    "model": _model,
    "scalars": _scalars,
    "nested": _nested,
    "aligned": _aligned,
    "shard": _shard,
}


def main(folder: Path) -> None:
    """Writes every seed into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, fill in SEEDS.items():
        writer = gguf.GGUFWriter(folder / f"{name}.gguf", "llama")
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    model = (folder / "model.gguf").read_bytes()
    (folder / "version2.gguf").write_bytes(model[:4] + struct.pack("<I", 2) + model[8:])
    (folder / "no_data.gguf").write_bytes(model[: model.index(b"token_embd.weight") + 200])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
