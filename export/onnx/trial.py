"""A run of a written ONNX model in onnxruntime, before the file gets its name.

Checkers and shape inference pass graphs that onnxruntime refuses, at load or only in the middle of
a run: only a run proves what a quantizer, a tracer or a converter has made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...runtime.backends.onnx_tensors import TENSOR_TYPES, said
from ...runtime.base.errors import OptionError, UnsupportedModelError
from ...runtime.base.memory import available_memory

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]
Feed = dict[str, Array]

# A session holds the file's weights, repacked and float32 copies of them, and both at once while
# it is made: measured 1.3 times the file for float32, 2.6 times for float16.
_COPIES = 4
_CACHE = "past_key_values."  # prefix of optimum's names of cache inputs: empty at the first token
# Sizes that free dimensions get: 1 first, larger ones if windows do not fit into that.
_LENGTHS = (1, 8, 32, 224)


def require_onnxruntime() -> None:
    """Raises OptionError if onnxruntime, which runs the trials, is not installed."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "ONNX files are run once before they get their names, with onnxruntime:"
            " pip install 'stoker[export]'"
        ) from error


def run_once(
    path: Path,
    made: Path | bytes,
    *,
    advice: str,
    data: Path | None = None,
    feed: Feed | None = None,
    expected: Sequence[Array] | None = None,
) -> None:
    """Loads a model that was made and runs it once; raises UnsupportedModelError if it fails.

    path: the name that the file is to get, for the message. made: the file or its content. advice:
    what the user can do, the end of the message. data: the file of its external weights. feed:
    inputs by name; None: inputs invented from the model's own types and shapes. expected: the
    outputs of the original model on `feed`; the file's own must have their types and shapes, and be
    finite wherever these are.

    The session is made as users make it if the memory is enough for its copies of the weights.
    Else the graph runs as it was written: weights stay mapped from the file, one matrix after the
    other is read, and the file may be larger than memory.
    """
    require_onnxruntime()
    nbytes = len(made) if isinstance(made, bytes) else made.stat().st_size
    nbytes += 0 if data is None else data.stat().st_size
    try:
        graph = session(made, nbytes)
        outputs = first_run(graph)[1] if feed is None else graph.run(None, feed)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}; {advice}") from error
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise UnsupportedModelError(
            f"{path}: onnxruntime does not run the model that was made: {said(error)}; {advice}"
        ) from error
    if expected is not None:
        _check(path, graph, outputs, expected, advice)


def session(made: Path | bytes, nbytes: int) -> onnxruntime.InferenceSession:
    """A session for one run of a model of `nbytes` bytes, its data included."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # memory is freed after each operator
    options.enable_mem_pattern = False
    memory = available_memory()
    if memory is not None and _COPIES * nbytes > memory:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(
        made if isinstance(made, bytes) else str(made),
        options,
        providers=["CPUExecutionProvider"],
    )


def first_run(graph: onnxruntime.InferenceSession) -> tuple[Feed, list[Array]]:
    """The first invented inputs that a model takes, and its outputs.

    Raises what the first inputs raised if it takes none.
    """
    first: Exception | None = None
    for feed in _invented(graph.get_inputs()):
        try:
            return feed, graph.run(None, feed)
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            first = first or error
    assert first is not None
    raise first


def _invented(inputs: Sequence[Any]) -> Iterator[Feed]:
    """Invents inputs: integers are 1, then 0; the batch is one, a decoder's cache is empty."""
    for one in (1, 0):
        for length in _LENGTHS:
            yield {i.name: _values(i, one, length) for i in inputs}
            if all(isinstance(n, int) for i in inputs for n in i.shape[1:]):
                break  # only the batch is free


def _values(given: Any, one: int, length: int) -> Array:
    if given.type not in TENSOR_TYPES:
        raise UnsupportedModelError(f"input {given.name}: expected numbers, found {given.type}")
    free = 0 if given.name.startswith(_CACHE) else length
    shape = [n if isinstance(n, int) else free if axis else 1 for axis, n in enumerate(given.shape)]
    dtype = np.dtype(TENSOR_TYPES[given.type])
    nbytes = dtype.itemsize
    for n in shape:  # Python's integers, whose product cannot overflow
        nbytes *= n
    memory = available_memory()
    if memory is not None and nbytes > memory // 2:
        raise UnsupportedModelError(
            f"input {given.name}: expected one that fits the memory, found {nbytes} bytes"
        )
    if dtype.kind == "f":
        values: Array = np.random.default_rng(0).random(shape, np.float32).astype(dtype)
        return values
    return np.full(shape, one, dtype)


def _check(
    path: Path, graph: Any, outputs: Sequence[Array], expected: Sequence[Array], advice: str
) -> None:
    for node, found, wanted in zip(graph.get_outputs(), outputs, expected, strict=True):
        if not isinstance(wanted, np.ndarray):
            continue  # skips sequences and maps
        kinds = [f"{v.dtype} {list(v.shape)}" for v in (wanted, found)]
        if kinds[0] != kinds[1]:
            raise UnsupportedModelError(
                f"{path}: output {node.name}: expected {kinds[0]}, found {kinds[1]}; {advice}"
            )
        if wanted.dtype.kind == "f" and not np.isfinite(found[np.isfinite(wanted)]).all():
            raise UnsupportedModelError(
                f"{path}: output {node.name}: expected finite values as of the float model, found"
                f" NaN or infinity; {advice}"
            )
