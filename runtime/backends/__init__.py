"""Other engines behind the same API: onnxruntime for ONNX files, llama.cpp for what is not native.

A backend gives `Model` an engine whose timelines evaluate tokens; tokenizer, chat templates,
sampling, sessions and statistics are stoker's own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, UnsupportedModelError
from ..options import LoadOptions

if TYPE_CHECKING:
    from ..model import Model

# Property of an ONNX model: the GGUF metadata of its tokenizer and chat template, as JSON.
ONNX_METADATA = "stoker.metadata"
# Input of an ONNX decoder, int64 [1], 0 where it is not given: the first token with logits.
ONNX_LOGITS_FROM = "logits_from"

_LOG = logging.getLogger("stoker")


def open_model(
    path: Path,
    options: LoadOptions | None = None,
    onnx: Mapping[str, Any] | None = None,
) -> Model:
    """The model of a file, on the engine that runs it.

    onnx: fields of OnnxOptions, for an ONNX file. A GGUF file that the native engine does not run
    is given to llama.cpp where llama_cpp is installed, with a line of warning in the log "stoker"
    (on stderr unless the program has set logging up otherwise). Raises what `stoker.load` raises.
    """
    from ..model import Model

    options = options or LoadOptions()
    if path.suffix.lower() in (".onnx", ".ort"):
        from .onnx import OnnxModel, OnnxOptions

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
    from .llama_cpp import LlamaCppModel

    model = LlamaCppModel(path, options)
    _LOG.warning("stoker: %s; running on llama.cpp", error)
    return model
