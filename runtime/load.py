"""`stoker.load`: from a file or a name to a model on the engine that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from . import arguments
from .options import LoadOptions

if TYPE_CHECKING:
    from .model import Model


def load(
    path: str | PathLike[str],
    *,
    threads: int | None = None,
    context: int | None = None,
    kv_type: str = "f16",
    precision: str = "balanced",
    memory: int | str = "auto",
    policy: str | None = None,
    predictor: str | None = None,
    profile: str | PathLike[str] | None = None,
    prefetch: str = "auto",
    io: str | None = None,
    readers: int | None = None,
    onnx: Mapping[str, Any] | None = None,
    download: bool = False,
) -> Model:
    """Loads a GGUF or ONNX model.

    path: a file (the first one of a sharded model), "hf:owner/name/file.gguf[@revision]", or a
    name of the catalogue ("smollm2"). A name that ends in .onnx gives an OnnxModel, which runs on
    onnxruntime; a GGUF file that the native engine does not run goes to llama.cpp where llama_cpp
    is installed (see backends/).
    memory: budget of the whole process: bytes, "500MB", "2GiB", "60%" of what the machine can give,
        or "auto" (all of it, where the model needs it). Experts that do not fit stay on flash.
    threads, context, kv_type, precision, policy, predictor, profile, prefetch, io, readers: see
        LoadOptions.
    onnx: options of onnxruntime, fields of backends/onnx.py's OnnxOptions.
    download: fetch a named model that is not in the cache; without it that is a DownloadError.
    Raises ModelFileError, UnsupportedModelError, DownloadError, OptionError, BudgetError.
    """
    from ..models.locate import locate
    from .backends import open_model

    options = LoadOptions(
        threads=threads,
        context=context,
        kv_type=kv_type,
        precision=precision,
        memory=memory,
        policy=policy,
        predictor=predictor,
        profile=profile,
        prefetch=prefetch,
        io=io,
        readers=readers,
    )
    named = arguments.path("path", path)
    download = arguments.flag("download", download)
    return open_model(locate(named, download=download), options, onnx)
