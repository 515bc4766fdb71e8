"""Conversion of GGUF models to ONNX decoders with a KV cache, for onnxruntime.

OUT holds the graph, the tokenizer and the chat template; OUT.data beside it the weights. The graph
(export/onnx/graph/decoder.py) has the inputs and outputs that optimum and onnxruntime-genai name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from ..runtime.backends.onnx_tensors import ONNX_METADATA
from ..runtime.base.checked_call import checked
from ..runtime.base.errors import ModelFileError, OptionError
from ..runtime.base.progress import Progress
from ..runtime.files.output_file import check_output
from ..runtime.pooling import pooling_of_file
from .onnx.graph.config import DecoderConfig, read_config
from .onnx.graph.decoder import Decoder
from .onnx.graph.graph import Graph
from .onnx.graph.weights import Weights, Width
from .onnx.trial import require_onnxruntime, run_once
from .writer.model_writer import COMMIT_BYTES, making, resumable_part

if TYPE_CHECKING:
    from onnx import ModelProto

    from ..runtime._core import GgufFile
    from .writer.gguf_writer import PartFile

WIDTHS: tuple[Width, ...] = get_args(Width)
LONGEST_CONTEXT = 8192  # tokens, unless a longer one is asked for: the rotary tables take memory
_VERSION = 2  # version of this module's output: parts of another version are not taken up
_KEPT = ("general.", "tokenizer.")  # prefixes of metadata that the model keeps


@dataclass(frozen=True)
class Exported:
    """The result.

    data: the file of the weights, `path` itself if they lie in it. nbytes: of both; context:
    tokens that the model runs; route: how it was made; notes: for the user.
    """

    path: Path
    data: Path
    nbytes: int
    context: int
    route: str
    notes: Sequence[str] = ()


def require_onnx() -> None:
    """Raises OptionError if the `onnx` package is not installed, or onnxruntime."""
    if find_spec("onnx") is None:
        raise OptionError("ONNX files need the onnx package: pip install 'stoker[export]'")
    require_onnxruntime()


def check_options(out: Path, type: str) -> Width:
    """The width of a type. Raises OptionError for an unknown type, for a name that does not end in
    .onnx, and if a package is missing.
    """
    width = next((known for known in WIDTHS if known == type), None)
    if width is None:
        raise OptionError(f"type: expected one of {', '.join(WIDTHS)}, found {type}")
    require_onnx()
    if out.suffix != ".onnx":
        raise OptionError(f"{out}: expected a name that ends in .onnx")
    return width


@checked
def gguf_to_onnx(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: str = "keep",
    context: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Writes a GGUF model as an ONNX decoder: `out` and, beside it, `out`.data.

    type: type of the matrices. f32; f16, computed in float32; int8 and int4, in blocks of 32, with
    activations rounded to int8; keep: 4 bits if they are exact, 8 otherwise. 4 bits hold Q4_0,
    Q4_1 and Q4_K exactly and fit other types, 8 bits hold Q8_0 exactly; an embedding gets 4 bits
    only if they are exact. Routers of experts stay float32. context: tokens the model
    shall run, None: as trained, at most 8192.
    progress: called with ("weights", bytes written, bytes in all).

    Both files appear when they are complete and onnxruntime has run them once. An interrupted
    call leaves a hidden part that the same call takes up again. Raises OptionError,
    ModelFileError, UnsupportedModelError; DeviceError if the disk is full.
    """
    from ..runtime._core import GgufFile

    path = Path(out)
    width = check_options(path, type)
    file = GgufFile(os.fspath(source))
    data = path.with_name(path.name + ".data")
    check_output(path, file.shards, force=force)
    if data.is_dir():
        raise OptionError(f"{data}: expected the name of a file, found a directory")
    weights = Weights(file, width)
    config = read_config(file.get, weights.shape("token_embd.weight")[0], file.path)
    covered = _context(context, config)
    graph = Graph()
    Decoder(graph, config, weights, covered).build()
    metadata = _metadata(file, config, covered, round(weights.token_bytes))
    name = str(file.get("general.name") or path.stem)
    proto = graph.model(name, data.name, metadata)
    model = proto.SerializeToString()
    recipe = hashlib.sha256(model + f"{_VERSION} {_stamp(file)}".encode()).hexdigest()
    fresh = path.with_name(f".{path.name}.new")
    try:
        with making(data, graph.data_bytes, recipe) as part:
            _write(graph, part, progress)
            relocate(proto, part.part.name)  # until then, the weights have only this name
            fresh.write_bytes(proto.SerializeToString())
            advice = "another --type or a newer onnxruntime may run it"
            run_once(path, fresh, advice=advice, data=part.part)
            fresh.write_bytes(model)
            path.unlink(missing_ok=True)  # the old model names data that is about to be replaced
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    nbytes = len(model) + graph.data_bytes
    return Exported(path, data, nbytes, covered, f"the {config.architecture} graph of stoker")


def relocate(model: ModelProto, name: str) -> set[str]:
    """Points the model's external tensors to the file `name`; returns their old files' names."""
    before: set[str] = set()
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                before.add(entry.value)
                entry.value = name
    return before


def _context(asked: int | None, c: DecoderConfig) -> int:
    if asked is None:
        return min(c.context_train, LONGEST_CONTEXT)
    if not 1 <= asked <= c.context_train:
        raise OptionError(f"context: expected 1 to {c.context_train} tokens, found {asked}")
    return asked


def _stamp(file: GgufFile) -> str:
    """A text that differs for another input, and for this one if it changed."""
    found = [os.stat(shard) for shard in file.shards]
    return " ".join(f"{s.st_size}:{s.st_mtime_ns}" for s in found)


def _metadata(
    file: GgufFile, c: DecoderConfig, context: int, token_bytes: int
) -> Mapping[str, str]:
    """Properties of the model: its tokenizer, its pooling and the backend's keys."""
    kept = {k: v for k, v in file.metadata.items() if k.startswith(_KEPT)}
    kept[f"{c.architecture}.context_length"] = c.context_train
    key = f"{c.architecture}.pooling_type"
    pooling = file.get(key)
    if pooling is not None:
        pooling_of_file(pooling, f"{file.path}: {key}")  # raises wherever embed would
        kept[key] = pooling
    return {
        ONNX_METADATA: json.dumps(kept),
        "stoker.context": str(context),
        "stoker.kv": "buffer",  # past and present may share memory
        "stoker.token_bytes": str(token_bytes),
    }


def _write(graph: Graph, part: PartFile, progress: Progress | None) -> None:
    """Writes the data file's arrays; a source that was begun and not committed is made again."""
    written = uncommitted = 0
    total = sum(array.nbytes for _, made in graph.sources for array in made)
    for done, (source, made) in enumerate(graph.sources):
        size = sum(array.nbytes for array in made)
        if done >= part.done:
            ends = [0] * len(made)
            for index, values in source():
                piece = np.ascontiguousarray(values)
                part.write(made[index].offset + ends[index], piece.data)
                ends[index] += piece.nbytes
                if progress is not None:
                    progress("weights", written + sum(ends), total)
            if ends != [array.nbytes for array in made]:
                wanted = [array.nbytes for array in made]
                raise ModelFileError(f"{made[0].key}: expected {wanted} bytes, found {ends}")
            uncommitted += size
            if uncommitted >= COMMIT_BYTES:
                part.commit(done + 1)
                uncommitted = 0
        written += size


def interrupted_part(out: str | os.PathLike[str]) -> Path | None:
    """What an interrupted call has left for the next one, None if there is nothing."""
    return resumable_part(os.fspath(out) + ".data")
