"""Writes a Hugging Face folder of any size with random weights, for measuring conversions.

    python -m stoker.mobile_bench.checks.synthetic_hf DIR --bytes 20e9 [--shape llama|qwen3moe]
        [--dtype BF16|F16|F32] [--shard-bytes 5e9] [--seed 0]

The tensors are those of an 8B Llama (matrices of 4096 x 14336) or of a 30B Qwen 3 mixture (128
experts of 768 x 2048 a layer, two and a half times as many names), with as many layers as the size
asks for. Values are normal, standard deviation 0.02, much like trained weights; the same seed
gives the same bytes. The tokenizer knows bytes only. The folder is written at the disk's speed,
synced, and dropped from the page cache, so that the next reader really reads from the disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_DEVIATION = 0.02
_POOL_VALUES = 16 << 20  # random values that tensors are cut from
_CHUNK_VALUES = 4 << 20  # cut from one place of the pool, written at once
_SYNC_BYTES = 256 << 20  # written between two syncs, so that few pages are dirty
_N_BYTES = 256  # byte tokens

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_QWEN3MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SHAPES = {"llama": _LLAMA, "qwen3moe": _QWEN3MOE}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write. shape: row-major; ones: all ones, as norms begin."""

    name: str
    shape: tuple[int, ...]
    ones: bool = False

    def nbytes(self, dtype: str) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * ITEM_BYTES[dtype]


def write_folder(
    folder: Path,
    nbytes: int,
    *,
    shape: str = "llama",
    dtype: str = "BF16",
    shard_bytes: int = 5_000_000_000,
    seed: int = 0,
) -> int:
    """Writes the folder; returns the bytes of its weights, the whole layers nearest to `nbytes`.

    folder: must not exist. shape: one of SHAPES. dtype: one of ITEM_BYTES. Raises ValueError if
    `nbytes` is less than one layer with embeddings, FileExistsError, OSError.
    """
    config = dict(SHAPES[shape])
    ends = sum(t.nbytes(dtype) for t in _ends(config))
    layer = sum(t.nbytes(dtype) for t in _layer(config, 0))
    n_layer = round((nbytes - ends) / layer)
    if n_layer < 1:
        raise ValueError(f"expected at least {ends + layer} bytes ({shape}), found {nbytes}")
    config |= {"num_hidden_layers": n_layer, "torch_dtype": _torch_name(dtype)}
    tensors = [*_ends(config), *(t for il in range(n_layer) for t in _layer(config, il))]
    shards = _shards(tensors, dtype, shard_bytes)
    folder.mkdir(parents=True)
    pool = _pool(dtype, seed)
    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard, dtype, pool, np.random.default_rng([seed, i]))
        where |= dict.fromkeys((t.name for t in shard), name)
    total = sum(t.nbytes(dtype) for t in tensors)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": where},
    )
    _write_json(folder / "tokenizer.json", _tokenizer())
    return total


def _torch_name(dtype: str) -> str:
    return {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]


def _ends(config: dict[str, Any]) -> list[Tensor]:
    table = (config["vocab_size"], config["hidden_size"])
    return [
        Tensor("model.embed_tokens.weight", table),
        Tensor("model.norm.weight", table[1:], ones=True),
        Tensor("lm_head.weight", table),
    ]


def _layer(config: dict[str, Any], il: int) -> Iterator[Tensor]:
    n, head = config["hidden_size"], config["head_dim"]
    b = f"model.layers.{il}."
    n_q, n_kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield Tensor(b + "input_layernorm.weight", (n,), ones=True)
    yield Tensor(b + "post_attention_layernorm.weight", (n,), ones=True)
    for part, rows in (("q", n_q), ("k", n_kv), ("v", n_kv)):
        yield Tensor(f"{b}self_attn.{part}_proj.weight", (rows, n))
    yield Tensor(b + "self_attn.o_proj.weight", (n, n_q))
    if "num_experts" not in config:
        yield from _feed_forward(b + "mlp.", n, config["intermediate_size"])
        return
    for part in ("q", "k"):
        yield Tensor(f"{b}self_attn.{part}_norm.weight", (head,), ones=True)
    yield Tensor(b + "mlp.gate.weight", (config["num_experts"], n))
    for e in range(config["num_experts"]):
        yield from _feed_forward(f"{b}mlp.experts.{e}.", n, config["moe_intermediate_size"])


def _feed_forward(prefix: str, n: int, n_ff: int) -> Iterator[Tensor]:
    yield Tensor(prefix + "gate_proj.weight", (n_ff, n))
    yield Tensor(prefix + "up_proj.weight", (n_ff, n))
    yield Tensor(prefix + "down_proj.weight", (n, n_ff))


def _shards(tensors: Sequence[Tensor], dtype: str, most: int) -> list[list[Tensor]]:
    """Tensors in their order, split into shards of at most `most` bytes (or a single tensor)."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        n = tensor.nbytes(dtype)
        if shards[-1] and size + n > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += n
    return shards


def _encoded(values: npt.NDArray[np.float32], dtype: str) -> Bytes:
    if dtype == "F32":
        return values.view(np.uint8)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint8)
    # BF16 is the upper half, rounded to the nearest (these values have no ties that matter).
    upper = (values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)
    return np.asarray(upper, dtype=np.uint16).view(np.uint8)


def _pool(dtype: str, seed: int) -> Bytes:
    """Encoded normal values, uint8 [_POOL_VALUES * bytes of a value]."""
    values = np.random.default_rng(seed).standard_normal(_POOL_VALUES, dtype=np.float32)
    values *= np.float32(_DEVIATION)
    return _encoded(values, dtype)


def _write_shard(
    path: Path, tensors: Sequence[Tensor], dtype: str, pool: Bytes, rng: np.random.Generator
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + tensor.nbytes(dtype)
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        _write(file.fileno(), struct.pack("<Q", len(text)) + text)
        dirty = 0
        for tensor in tensors:
            for chunk in _chunks(tensor, dtype, pool, rng):
                _write(file.fileno(), chunk.data)
                dirty += chunk.nbytes
                if dirty >= _SYNC_BYTES:
                    _drop(file.fileno())
                    dirty = 0
        _drop(file.fileno())


def _chunks(tensor: Tensor, dtype: str, pool: Bytes, rng: np.random.Generator) -> Iterator[Bytes]:
    left, item = math.prod(tensor.shape), ITEM_BYTES[dtype]
    if tensor.ones:
        yield _encoded(np.ones(left, np.float32), dtype)
        return
    while left:
        n = min(left, _CHUNK_VALUES)
        first = int(rng.integers(0, _POOL_VALUES - n))
        yield pool[first * item : (first + n) * item]
        left -= n


def _write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _drop(fd: int) -> None:
    """Syncs what was written to the disk and drops it from the page cache."""
    os.fsync(fd)
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def _tokenizer() -> dict[str, Any]:
    """A byte-level BPE without merges, with GPT-2's pre-tokenization."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(_N_BYTES) if b not in plain]
    letters = {b: chr(b) for b in plain} | {b: chr(_N_BYTES + i) for i, b in enumerate(others)}
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {**byte, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {letters[b]: b for b in range(_N_BYTES)},
            "merges": [],
        },
    }


def main() -> None:
    """Writes a folder and prints how fast that was."""
    parser = argparse.ArgumentParser(description="A Hugging Face folder with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bytes", type=float, required=True, dest="nbytes")
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--dtype", choices=ITEM_BYTES, default="BF16")
    parser.add_argument("--shard-bytes", type=float, default=5e9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        total = write_folder(
            options.folder,
            int(options.nbytes),
            shape=options.shape,
            dtype=options.dtype,
            shard_bytes=int(options.shard_bytes),
            seed=options.seed,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    seconds = time.perf_counter() - start
    shards = len(list(options.folder.glob("*.safetensors")))
    print(
        f"{options.folder}: {total / 1e9:.2f} GB in {shards} shards, {seconds:.1f} s, "
        f"{total / 1e6 / seconds:.0f} MB/s"
    )


if __name__ == "__main__":
    main()
