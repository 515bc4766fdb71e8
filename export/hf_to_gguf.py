"""Conversion of a Hugging Face folder to a GGUF file, quantized on the way if asked for.

Names, orders and metadata are llama.cpp's, so that both engines read the file. Weights pass in
pieces of a few million, so that the folder may be far larger than memory.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.base.checked_call import checked
from ..runtime.base.errors import ModelFileError, UnsupportedModelError
from ..runtime.base.progress import Progress
from ..runtime.files.output_file import check_output
from .hf.embedding import add_embedding
from .hf.folder.config import HfConfig
from .hf.folder.safetensors_folder import SafetensorsFolder
from .hf.names import family_of
from .hf.names.table import Family, Model
from .hf.tokenizer import read_tokenizer
from .hf.weights import HfWeights, Weight, plan
from .writer import mixes
from .writer.gguf_values import Value, encode
from .writer.model_writer import resumable_part, write_model

__all__ = ["Converted", "convert", "resumable_part"]

_RECIPE_VERSION = 1  # changes if the same folder and options give other bytes
_QUANTIZATION_VERSION = 2  # version of ggml's block formats


@dataclass(frozen=True)
class Converted:
    """The result: the file, its bytes, its architecture, tensors by type, notes for the user."""

    path: Path
    nbytes: int
    source_nbytes: int
    architecture: str
    types: Mapping[str, int]  # tensor type -> tensors
    notes: Sequence[str]


@checked
def convert(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: str | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    pre: str | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Writes the model of a Hugging Face folder as a GGUF file.

    folder: config.json, *.safetensors, and tokenizer.json or tokenizer.model. type: a file type
    (mixes.FILE_TYPES); None keeps each matrix in the type it has. Norms, biases and routers are
    F32 either way. overrides: (glob, tensor type), with a type only. pre: the pre-tokenizer's
    name, if it is not recognised. threads: None takes all cores; the bytes do not depend on it.
    The pooling of a sentence-transformers folder becomes the file's.

    The file appears under its name only when it is complete. An interrupted call leaves a hidden
    part beside it; the same call takes it up again and gives the same bytes.
    progress: called with "convert", bytes done, bytes in all.
    Raises OptionError; ModelFileError (also for weights that are not finite);
    UnsupportedModelError; DeviceError if the disk is full.
    """
    row = None if type is None else mixes.file_type(type)
    root = Path(folder)
    check_output(Path(out), force=force)
    config = HfConfig.read(root)
    if config.get("quantization_config") is not None:
        raise UnsupportedModelError(
            f"{config.path}: quantization_config: expected none (weights in F32, F16 or BF16), "
            "found one"
        )
    family = family_of(config)
    model = family.read(config)
    add_embedding(root, config, model)
    shards = SafetensorsFolder(root)
    try:
        weights = plan(shards, family, model)
        tokenizer = read_tokenizer(root, config, model.sizes["n_vocab"], pre=pre)
        notes = [*model.notes, *tokenizer.notes]
        types: Mapping[str, str] = {}
        if row is not None:
            choice = mixes.choose(row.name, weights, _sizes(family, model), overrides=overrides)
            types = choice.types
            notes += choice.notes
        work = HfWeights(
            shards, weights, types, model.sizes["head_dim"], threads or os.cpu_count() or 1
        )
        file_type = row.id if row else mixes.FILE_TYPES[_main_type(weights)].id
        entries = _metadata(root, family, model, file_type, tokenizer.entries)
        nbytes = write_model(
            out,
            _encoded(root, entries),
            work.directory(),
            work.pieces,
            recipe=json.dumps([_RECIPE_VERSION, shards.identity()]),
            inputs=[config.path, *shards.shards],
            force=force,
            progress=progress,
            what="convert",
        )
    finally:
        shards.close()
    counts = Counter(work.type_of(weight) for weight in weights)
    return Converted(
        Path(out),
        nbytes,
        sum(tensor.nbytes for tensor in shards.tensors.values()),
        family.architecture,
        dict(counts.most_common()),
        notes,
    )


def _sizes(family: Family, model: Model) -> mixes.Sizes:
    s = model.sizes
    return mixes.Sizes(
        n_layer=model.n_layer,
        n_expert=s.get("n_expert", 0),
        n_gqa=s["n_q"] // s["n_kv"],
        architecture=family.architecture,
    )


def _main_type(weights: Iterable[Weight]) -> str:
    """The type that the most bytes have."""
    nbytes: Counter[str] = Counter()
    for weight in weights:
        nbytes[weight.type] += sum(part.nbytes for part in weight.parts)
    return nbytes.most_common(1)[0][0]


def _metadata(
    root: Path,
    family: Family,
    model: Model,
    file_type: int,
    tokenizer: Mapping[str, Value],
) -> dict[str, Value]:
    entries: dict[str, Value] = {
        "general.architecture": family.architecture,
        "general.type": "model",
        "general.name": root.resolve().name,
        "general.file_type": file_type,
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    entries |= {f"{family.architecture}.{key}": value for key, value in model.entries.items()}
    entries[f"{family.architecture}.vocab_size"] = model.sizes["n_vocab"]
    return entries | dict(tokenizer)


def _encoded(root: Path, entries: Mapping[str, Value]) -> dict[str, bytes]:
    encoded = {}
    for key, value in entries.items():
        try:
            encoded[key] = encode(value)
        except ValueError as error:
            raise ModelFileError(f"{root}: {key}: {error}") from None
    return encoded
