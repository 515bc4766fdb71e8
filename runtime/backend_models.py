"""Models on other engines: ONNX files on onnxruntime, and GGUF files on llama.cpp."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from .backends.onnx import (
    GraphEngine,
    OnnxEngine,
    OnnxOptions,
    fitting,
    is_decoder,
    metadata_of,
    no_decoder,
    open_graph,
    physical_cores,
    run_graph,
    type_name,
)
from .backends.sequence import Metadata
from .base import arguments
from .base.errors import OptionError
from .base.memory import budget
from .model import Model
from .options import LoadOptions

if TYPE_CHECKING:
    from .backends.engine import Tokens
    from .text.tokenizer import Tokenizer


class LlamaCppModel(Model):
    """A GGUF file on llama.cpp; `stoker.load` makes it if the native engine declines the file."""

    def __init__(self, path: Path, options: LoadOptions | None = None) -> None:
        from ._core import GgufFile
        from .backends.llama_cpp import LlamaCppEngine

        started = time.perf_counter()
        options = options or LoadOptions()
        self._set_up(path, options, GgufFile(str(path)))
        self._engine = LlamaCppEngine(path, self._file, options)
        self.load_s = time.perf_counter() - started


class OnnxModel(Model):
    """An ONNX file. `run` evaluates any graph; the rest of the API is for decoders."""

    def __init__(
        self, path: Path, options: LoadOptions | None = None, onnx: OnnxOptions | None = None
    ) -> None:
        started = time.perf_counter()
        options, onnx = options or LoadOptions(), onnx or OnnxOptions()
        limit = None if options.memory == "auto" else budget(options.memory)
        threads = options.threads or physical_cores()
        self._graph = open_graph(path, threads, onnx, limit)
        metadata = metadata_of(path, self._graph.get_modelmeta().custom_metadata_map)
        self.decodes = is_decoder(self._graph)
        self._set_up(path, options, Metadata(metadata))
        if self.decodes:
            engine = OnnxEngine(path, self._graph, metadata, options, threads)
            if limit is not None:
                engine.check(limit)
            self._engine = engine
        else:
            self._engine = GraphEngine(path, self._graph, threads)
        self.load_s = time.perf_counter() - started

    @property
    def inputs(self) -> dict[str, tuple[str, tuple[int | str | None, ...]]]:
        """Name -> (type, shape) of each input; a dimension that may vary has a name or None."""
        return {i.name: (type_name(i.type), tuple(i.shape)) for i in self._graph.get_inputs()}

    @property
    def outputs(self) -> dict[str, tuple[str, tuple[int | str | None, ...]]]:
        """Name -> (type, shape) of each output, in the form of `inputs`."""
        return {o.name: (type_name(o.type), tuple(o.shape)) for o in self._graph.get_outputs()}

    def run(self, inputs: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """Evaluates the graph once: arrays by the inputs' names -> arrays by the outputs' names.

        Integers and floats are converted to the input's own type. Raises OptionError for a name,
        type or shape that the graph does not take.
        """
        inputs = arguments.mapping("inputs", inputs, "names to arrays")
        known = {i.name: i for i in self._graph.get_inputs()}
        for name in inputs:
            if name not in known:
                raise OptionError(f"input {name!r}: expected {', '.join(known)}")
        missing = [name for name in known if name not in inputs]
        if missing:
            raise OptionError(f"inputs: expected {', '.join(known)}, {missing[0]} is missing")
        feed = {name: fitting(known[name], value) for name, value in inputs.items()}
        names = [o.name for o in self._graph.get_outputs()]
        return dict(zip(names, run_graph(self._graph, self.path, names, feed), strict=True))

    @property
    def tokenizer(self) -> Tokenizer:
        """Model.tokenizer; raises UnsupportedModelError if the graph is no decoder."""
        self._require_decoder()
        return super().tokenizer

    def _encode(self, text: str | Tokens, *, add_special: bool, parse_special: bool) -> list[int]:
        self._require_decoder()
        return super()._encode(text, add_special=add_special, parse_special=parse_special)

    def _require_decoder(self) -> None:
        if not self.decodes:
            raise no_decoder(self.path, self._graph)
