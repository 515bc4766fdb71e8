"""Backend for ONNX models on onnxruntime: decoders with a KV cache as a `Model`, others by `run`.

A decoder is a graph with an input input_ids, past_key_values.N.key and .value, and outputs
logits and present.N.key and .value, as `stoker export onnx`, optimum and onnxruntime-genai make
them. `stoker export onnx` puts the tokenizer into the file; files of other tools have none in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..base import arguments
from ..base.errors import (
    BudgetError,
    Cancelled,
    DeviceError,
    ModelFileError,
    OptionError,
    UnsupportedModelError,
)
from ..base.memory import process_bytes
from ..files.json_text import parse
from ..options import LoadOptions
from .onnx_tensors import ONNX_LOGITS_FROM, ONNX_METADATA, TENSOR_TYPES, said
from .sequence import Array, BackendEngine, BackendSequence, Ids, Wanted, default_plan

_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_DEFAULT_CONTEXT = 4096
_FIRST_CAPACITY = 256  # tokens that a new cache can hold
_LONG_CHUNK = 512  # tokens of one run if not all logits are wanted
_LEVELS = ("disable", "basic", "extended", "all")


@dataclass(frozen=True)
class OnnxOptions:
    """How onnxruntime runs a model.

    arena: keep freed memory for the next run: faster, larger. None: off under a memory budget.
    memory_pattern: allocate a run's memory at once. None: same as arena.
    spinning: threads wait busily for work: faster, but burns CPU. None: onnxruntime's default.
    optimization: optimization of the graph at load: disable, basic, extended or all.
    config: further session options, as onnxruntime names them ("session.…": "1").
    """

    arena: bool | None = None
    memory_pattern: bool | None = None
    spinning: bool | None = None
    optimization: str = "all"
    config: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.optimization not in _LEVELS:
            raise OptionError(
                f"optimization must be one of {', '.join(_LEVELS)}, not {self.optimization!r}"
            )
        for key, value in self.config.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise OptionError(f"config must map strings to strings, not {key!r} to {value!r}")


def _runtime() -> Any:
    if find_spec("onnxruntime") is None:
        raise OptionError("ONNX models need onnxruntime: pip install 'stoker[onnx]'")
    import onnxruntime

    return onnxruntime


def physical_cores() -> int:
    """Returns the number of cores for computing: the performance cores, else all."""
    from .._core import cpu

    found = cpu()
    return int(found.get("performance") or found.get("physical") or os.cpu_count() or 1)


def type_name(type: str) -> str:
    """Returns numpy's name of a type: "tensor(float)" -> "float32"."""
    return np.dtype(TENSOR_TYPES[type]).name if type in TENSOR_TYPES else type


def open_graph(path: Path, threads: int, o: OnnxOptions, limit: int | None) -> Any:
    """Opens a session of onnxruntime.

    Raises ModelFileError, UnsupportedModelError, OptionError, BudgetError.
    """
    ort = _runtime()
    if limit is not None:
        needed = process_bytes() + _files_bytes(path)
        if needed > limit:
            raise BudgetError(
                f"{path.name}: expected a budget of at least {needed / 1e6:.0f} MB (the process "
                f"and its weights; an ONNX model is all in memory), found {limit / 1e6:.0f} MB"
            )
    arena = o.arena if o.arena is not None else limit is None
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.log_severity_level = 4  # errors come as exceptions
    chosen.enable_cpu_mem_arena = arena
    chosen.enable_mem_pattern = arena if o.memory_pattern is None else o.memory_pattern
    levels = ort.GraphOptimizationLevel
    chosen.graph_optimization_level = getattr(levels, f"ORT_{_level(o.optimization)}")
    if o.spinning is not None:
        chosen.add_session_config_entry("session.intra_op.allow_spinning", str(int(o.spinning)))
    for key, value in o.config.items():
        try:
            chosen.add_session_config_entry(key, value)
        except Exception as error:
            raise OptionError(f"config: {key}: {said(error)}") from None
    if path.stat().st_size == 0:
        raise ModelFileError(f"{path}: expected an ONNX model, found an empty file")
    try:
        return ort.InferenceSession(
            os.fspath(path), sess_options=chosen, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own exceptions have no common base but this
        text = said(error)
        if type(error).__name__ in ("NotImplemented", "InvalidGraph") or "opset" in text:
            raise UnsupportedModelError(f"{path}: onnxruntime does not run it: {text}") from None
        raise ModelFileError(f"{path}: expected an ONNX model: {text}") from None


def _level(name: str) -> str:
    return {"disable": "DISABLE_ALL", "all": "ENABLE_ALL"}.get(name, f"ENABLE_{name.upper()}")


def _files_bytes(path: Path) -> int:
    """Returns the bytes of the model and the data files beside it."""
    names = [path, path.with_name(path.name + ".data"), path.with_name(path.name + "_data")]
    return sum(name.stat().st_size for name in names if name.exists())


def metadata_of(path: Path, properties: Mapping[str, str]) -> dict[str, Any]:
    """Returns the GGUF metadata in an exported model's properties; none for a foreign model."""
    if ONNX_METADATA in properties:
        try:
            found = parse(properties[ONNX_METADATA])
        except ValueError as error:
            raise ModelFileError(f"{path}: {ONNX_METADATA}: expected JSON: {error}") from None
        if not isinstance(found, dict):
            raise ModelFileError(f"{path}: {ONNX_METADATA}: expected a JSON object")
        return found
    return {}


def is_decoder(graph: Any) -> bool:
    """Returns whether a graph takes tokens and a past, and returns logits and a present."""
    inputs = {i.name for i in graph.get_inputs()}
    outputs = {o.name for o in graph.get_outputs()}
    past = [m for m in map(_PAST.fullmatch, inputs) if m]
    presents = {f"present.{m[1]}.{m[2]}" for m in past}
    return "input_ids" in inputs and "logits" in outputs and bool(past) and presents <= outputs


def fitting(expected: Any, value: Any) -> npt.NDArray[Any]:
    """Converts `value` to an array of the input's type and shape. Raises OptionError."""
    try:
        array = np.asarray(value)
    except Exception:  # lists of unequal lengths, or the value's own methods, may raise anything
        found = arguments.shown(value)
        raise OptionError(f"input {expected.name}: expected an array, found {found}") from None
    dtype = TENSOR_TYPES.get(expected.type)
    if dtype is not None and array.dtype != dtype:
        wanted, kind = np.dtype(dtype), array.dtype
        floats = wanted.kind == "f" and kind.kind in "fiub"
        if not floats and not (wanted.kind in "iu" and kind.kind in "iub"):
            raise OptionError(f"input {expected.name}: expected {wanted.name}, found {kind.name}")
        converted: npt.NDArray[Any] = array.astype(dtype)
        if wanted.kind in "iu" and not np.array_equal(converted, array):
            raise OptionError(f"input {expected.name}: expected values of {wanted.name}")
        array = converted
    shape = tuple(expected.shape)
    fits = len(shape) == array.ndim and all(
        not isinstance(want, int) or want == have
        for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise OptionError(
            f"input {expected.name}: expected shape {list(shape)}, found {list(array.shape)}"
        )
    return np.ascontiguousarray(array)


def run_graph(
    graph: Any, path: Path, names: list[str], feed: Mapping[str, Any], options: Any = None
) -> list[Any]:
    """Runs a graph once; returns the outputs of these names. Raises DeviceError."""
    try:
        return list(graph.run(names, feed, options))
    except Exception as error:
        raise DeviceError(f"{path}: onnxruntime failed: {said(error)}") from None


def no_decoder(path: Path, graph: Any) -> UnsupportedModelError:
    """Returns the error for a graph that is used as a decoder but is none."""
    found = ", ".join(i.name for i in graph.get_inputs())
    return UnsupportedModelError(
        f"{path}: expected a decoder with input_ids, past_key_values and logits, found inputs "
        f"{found}: use run(inputs)"
    )


class GraphEngine(BackendEngine):
    """The engine of a graph that is not a decoder: it has no sequences."""

    def __init__(self, path: Path, graph: Any, threads: int) -> None:
        self._path, self._graph = path, graph
        self.config = {"architecture": "onnx", "name": path.stem, "n_vocab": 0}
        self.plan = default_plan(
            threads=threads,
            context=0,
            weight_bytes=_files_bytes(path),
            kv_bytes=0,
            token_bytes=0,
            kv_type="none",
            isa="onnxruntime",
        )

    def sequence(self) -> BackendSequence:
        """Raises UnsupportedModelError, since the graph has no cache."""
        raise no_decoder(self._path, self._graph)


class OnnxEngine(BackendEngine):
    """A decoder's graph, shared by its sequences."""

    def __init__(
        self,
        path: Path,
        graph: Any,
        metadata: Mapping[str, Any],
        options: LoadOptions,
        threads: int,
    ) -> None:
        self.path, self.graph = path, graph
        properties = graph.get_modelmeta().custom_metadata_map
        self.inputs = {i.name: i for i in graph.get_inputs()}
        self.outputs = [o.name for o in graph.get_outputs()]
        optional = {i.name for i in graph.get_overridable_initializers()}
        self.chooses_logits = ONNX_LOGITS_FROM in optional
        self.past = sorted(name for name in self.inputs if _PAST.fullmatch(name))
        one = self.inputs[self.past[0]]
        if len(one.shape) != 4 or not all(isinstance(one.shape[i], int) for i in (1, 3)):
            raise UnsupportedModelError(
                f"{path}: {one.name}: expected the shape [batch, KV heads, tokens, width of a "
                f"head], found {one.shape}"
            )
        self.kv_dtype = np.dtype(TENSOR_TYPES.get(one.type, np.float32))
        self.kv_heads, self.head_dim = int(one.shape[1]), int(one.shape[3])
        self.shares_buffer = properties.get("stoker.kv") == "buffer"
        trained = int(properties.get("stoker.context", 0)) or _beside(path)
        if options.context is not None and options.context > trained:
            raise OptionError(
                f"context must be at most the model's {trained}, not {options.context}"
            )
        self.context = options.context or min(trained, _DEFAULT_CONTEXT)
        weight_bytes = _files_bytes(path)
        self.token_bytes = int(properties.get("stoker.token_bytes", 0)) or weight_bytes
        self.n_vocab = self._vocabulary()
        kv = len(self.past) * self.kv_heads * self.head_dim * self.kv_dtype.itemsize
        self.kv_token_bytes = kv
        self.config = {
            "architecture": metadata.get("general.architecture", "onnx"),
            "name": metadata.get("general.name", path.stem),
            "n_layer": len(self.past) // 2,
            "n_vocab": self.n_vocab,
            "n_head_kv": self.kv_heads,
            "head_dim": self.head_dim,
            "n_expert": 0,
            "context_train": trained,
            "context": self.context,
        }
        self.plan = default_plan(
            threads=threads,
            context=self.context,
            weight_bytes=weight_bytes,
            kv_bytes=kv * self.context,
            token_bytes=self.token_bytes,
            kv_type="f16" if self.kv_dtype == np.float16 else "f32",
            isa="onnxruntime",
        )

    def check(self, limit: int) -> None:
        """Raises BudgetError if the process and one KV cache do not fit `limit` bytes."""
        needed = process_bytes() + self.kv_token_bytes * self.context
        if needed > limit:
            raise BudgetError(
                f"{self.path.name}: expected a budget of at least {needed / 1e6:.0f} MB for a "
                f"context of {self.context} tokens, found {limit / 1e6:.0f} MB"
            )

    def _vocabulary(self) -> int:
        shape = next(o.shape for o in self.graph.get_outputs() if o.name == "logits")
        if isinstance(shape[-1], int):
            return shape[-1]
        return int(self.evaluate(np.zeros(1, np.int32), 0, self.empty(), ["logits"])[0].shape[-1])

    def empty(self) -> dict[str, npt.NDArray[Any]]:
        """Returns a past of no tokens."""
        shape = (1, self.kv_heads, 0, self.head_dim)
        return {name: np.zeros(shape, self.kv_dtype) for name in self.past}

    def feed(self, ids: Ids, position: int, first: int = 0) -> dict[str, npt.NDArray[Any]]:
        """Returns the inputs for ids [n] after `position` tokens, without the past.

        first: the first of the ids whose logits are wanted; 0 if the graph cannot choose.
        """
        total = position + len(ids)
        values: dict[str, npt.NDArray[Any]] = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(position, total)[None],
            "use_cache_branch": np.array([position > 0]),
        }
        fed: dict[str, npt.NDArray[Any]] = {}
        for name, expected in self.inputs.items():
            if name in self.past:
                continue
            if name not in values:
                raise UnsupportedModelError(
                    f"{self.path}: input {name}: expected input_ids, attention_mask, position_ids "
                    "and past_key_values of a decoder: use run(inputs)"
                )
            fed[name] = values[name].astype(TENSOR_TYPES[expected.type])
        if self.chooses_logits:
            fed[ONNX_LOGITS_FROM] = np.array([first], np.int64)
        return fed

    def evaluate(
        self,
        ids: Ids,
        position: int,
        past: Mapping[str, npt.NDArray[Any]],
        names: list[str],
        options: Any = None,
    ) -> list[Any]:
        """Runs the graph once; returns the outputs of these names."""
        return run_graph(
            self.graph, self.path, names, {**self.feed(ids, position), **past}, options
        )

    def sequence(self) -> OnnxSequence:
        """Makes a new, empty sequence."""
        return OnnxSequence(self)


def _beside(path: Path) -> int:
    """Reads the context in tokens from config.json beside a foreign model."""
    try:
        found = parse((path.parent / "config.json").read_text())["max_position_embeddings"]
        return max(1, int(found))
    except (OSError, ValueError, OverflowError, KeyError, TypeError):
        return _DEFAULT_CONTEXT


class OnnxSequence(BackendSequence):
    """A KV cache in arrays: one buffer for past and present if the graph allows that.

    Otherwise each run's present becomes the next one's past, which copies the cache at each step.
    """

    def __init__(self, engine: OnnxEngine) -> None:
        super().__init__(engine.context, engine.n_vocab, engine.token_bytes)
        self._engine = engine
        if engine.chooses_logits:
            self._long_chunk = _LONG_CHUNK
        self._options: Any = None  # options of the running evaluation
        # If each run returns a new cache, it is here: name -> [1, KV heads, position, width].
        self._past = engine.empty()
        # If one buffer is shared, it is here and bound to the graph:
        # name -> [1, KV heads, capacity, width].
        self._buffers: dict[str, Any] = {}
        self._capacity = 0  # tokens that the buffers can hold
        self._binding: Any = None
        self._bound = ""  # name of the output that is bound with the cache

    def _forward(self, ids: Ids, wanted: Wanted) -> Array:
        e = self._engine
        name = "hidden_states" if wanted == "hidden" else "logits"
        if name not in e.outputs:
            raise UnsupportedModelError(
                f"{e.path}: expected an output hidden_states for embeddings, found none"
            )
        self._options = _runtime().RunOptions()
        self._options.log_severity_level = 4
        try:
            # The graph may leave out the logits of earlier tokens, which are not wanted.
            first = len(ids) - 1 if wanted != "all" and e.chooses_logits else 0
            if e.shares_buffer:
                found = self._shared(ids, name, first)
            else:
                found = self._appended(ids, name, first)
        except DeviceError:
            if self._cancelled.is_set():
                raise Cancelled("cancelled") from None
            raise
        finally:
            self._options = None
        rows = found[0] if wanted != "last" else found[0, -1:]
        return np.asarray(rows, dtype=np.float32)

    def _appended(self, ids: Ids, name: str, first: int) -> npt.NDArray[Any]:
        e = self._engine
        presents = [past.replace("past_key_values", "present") for past in e.past]
        feed = {**e.feed(ids, self.position, first), **self._past}
        found = run_graph(e.graph, e.path, [name, *presents], feed, self._options)
        self._past = dict(zip(e.past, found[1:], strict=True))
        wanted: npt.NDArray[Any] = found[0]
        return wanted

    def _shared(self, ids: Ids, name: str, first: int) -> npt.NDArray[Any]:
        e = self._engine
        self._reserve(self.position + len(ids))
        if self._bound != name:
            self._bind(name)
        binding = self._binding
        for key, value in e.feed(ids, self.position, first).items():
            if key == ONNX_LOGITS_FROM:  # bind_cpu_input knows no inputs with defaults
                binding.bind_ortvalue_input(key, _runtime().OrtValue.ortvalue_from_numpy(value))
            else:
                binding.bind_cpu_input(key, value)
        binding.bind_output(name, "cpu")  # bound again, since its shape has changed
        try:
            e.graph.run_with_iobinding(binding, self._options)
        except Exception as error:
            raise DeviceError(f"{e.path}: onnxruntime failed: {said(error)}") from None
        found: npt.NDArray[Any] = binding.get_outputs()[-1].numpy()
        return found

    def _reserve(self, tokens: int) -> None:
        """Makes buffers for `tokens` tokens if needed, and copies the old ones into them."""
        if tokens <= self._capacity:
            return
        e, ort = self._engine, _runtime()
        capacity = min(self.context, max(_FIRST_CAPACITY, 2 * self._capacity, tokens))
        for name in e.past:
            fresh = np.zeros((1, e.kv_heads, capacity, e.head_dim), e.kv_dtype)
            if self.position:
                fresh[:, :, : self.position] = self._buffers[name].numpy()[:, :, : self.position]
            self._buffers[name] = ort.OrtValue.ortvalue_from_numpy(fresh)
        self._capacity, self._bound = capacity, ""

    def _bind(self, output: str) -> None:
        """Binds the buffers, and `output` last."""
        self._binding = self._engine.graph.io_binding()
        for name, value in self._buffers.items():
            self._binding.bind_ortvalue_input(name, value)
            present = name.replace("past_key_values", "present")
            self._binding.bind_ortvalue_output(present, value)
        self._binding.bind_output(output, "cpu")
        self._bound = output

    def _forget(self, position: int) -> None:
        if not self._engine.shares_buffer:
            self._past = {name: a[:, :, :position].copy() for name, a in self._past.items()}

    def _interrupt(self) -> None:
        options = self._options
        if options is not None:
            options.terminate = True

    def _kv_bytes(self) -> int:
        return self._engine.kv_token_bytes * self.position
