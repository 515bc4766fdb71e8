"""`stoker.load`, which opens a file or a named model on the engine that runs it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import arguments
from .base.errors import OptionError, UnsupportedModelError
from .options import LoadOptions

if TYPE_CHECKING:
    from .model import Model

_LOG = logging.getLogger("stoker")


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
    onnxruntime; a GGUF file that the native engine does not run goes to llama.cpp if llama_cpp is
    installed (see backends/).
    memory: budget of the whole process: bytes, "500MB", "2GiB", "60%" of what the machine can give,
        or "auto" (all of it, if the model needs it). Experts that do not fit stay on flash.
    threads, context, kv_type, precision, policy, predictor, profile, prefetch, io, readers: see
        LoadOptions.
    onnx: options of onnxruntime, fields of backends/onnx.py's OnnxOptions.
    download: fetch a named model that is not in the cache; without it that is a DownloadError.
    Raises ModelFileError, UnsupportedModelError, DownloadError, OptionError, BudgetError.
    """
    from ..models.locate import locate

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


def open_model(
    path: Path,
    options: LoadOptions | None = None,
    onnx: Mapping[str, Any] | None = None,
) -> Model:
    """Opens the model of a file on the engine that runs it.

    onnx: fields of OnnxOptions, for an ONNX file. A GGUF file that the native engine does not run
    is given to llama.cpp if llama_cpp is installed, with a line of warning in the log "stoker"
    (on stderr unless the program has set logging up otherwise). Raises what `stoker.load` raises.
    """
    from .model import Model

    options = options or LoadOptions()
    if path.suffix.lower() in (".onnx", ".ort"):
        from .backend_models import OnnxModel
        from .backends.onnx import OnnxOptions

        try:
            chosen = OnnxOptions(**(onnx or {}))
        except TypeError as error:
            raise OptionError(f"onnx: {error}") from None
        return OnnxModel(path, options, chosen)
    if onnx is not None:
        raise OptionError(f"{path}: options of onnxruntime expect a file that ends in .onnx")
    try:
        return Model(path, options)
    except UnsupportedModelError as error:
        return _on_llama_cpp(path, options, error)


def _on_llama_cpp(path: Path, options: LoadOptions, error: UnsupportedModelError) -> Model:
    if find_spec("llama_cpp") is None:
        raise UnsupportedModelError(
            f"{error}; llama.cpp may run it: pip install 'stoker[llama-cpp]'"
        ) from None
    if options.memory != "auto":
        raise UnsupportedModelError(
            f"{error}; llama.cpp may run it, but keeps no memory budget: leave out memory="
        ) from None
    from .backend_models import LlamaCppModel

    model = LlamaCppModel(path, options)
    _LOG.warning("stoker: %s; running on llama.cpp", error)
    return model
