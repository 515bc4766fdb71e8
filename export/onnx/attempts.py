"""Attempts at an int8 model by onnxruntime's quantizer: the first that onnxruntime itself runs.

The quantizer raises on some nodes, and makes files of others that are refused at load or fail in
the run. If all nodes together fail, halves are tried, and a node that fails without any of the
rest stays float. That search ends after 200 attempts or 15 minutes (the attempt that is going
on then is the last); nodes that it has not come to stay float. It is made at most twice: with
scales for each channel, and if nothing runs so, with one for each weight.
"""

from __future__ import annotations

import errno
import io
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.base.errors import (
    DeviceError,
    ModelFileError,
    OptionError,
    UnsupportedModelError,
    one_line,
)
from ...runtime.base.progress import Progress
from .samples import Array, InputSpec, Samples, batch_size
from .source import Source, quantized_types

if TYPE_CHECKING:
    import onnx


_PERCENTILE = 99.99  # of an activation's values: 1 in 10000 is clipped
_SHOWN = 5  # names in a note
# Attempts of one search, each of them one quantization with one sample: ten failing nodes of a
# thousand take half of them. A large model's attempts take minutes: the time limit ends it.
_MOST_ATTEMPTS = 200
_MOST_SECONDS = 900.0
_NOTHING_LEFT = "nothing is quantized: all that could be is excluded"
# The quantizer's suffix for the product that it takes out of a Gemm. Its own list of nodes to
# leave out knows the Gemm's name alone.
_PRODUCT_OF_GEMM = "_MatMul"


class Attempts:
    """Quantized files of one source, made until one runs."""

    def __init__(
        self,
        source: Source,
        origin: Path,
        folder: Path,
        trial: Callable[[Path], None],
        *,
        specs: list[InputSpec],
        calibrating: Samples | None,
        few: Samples | None,
        method: str,
        activations: str,
        reduce_range: bool,
        progress: Progress | None,
    ) -> None:
        """folder: gets the files; trial: raises UnsupportedModelError if a file does not run.

        calibrating: samples for the scales of activations, None for dynamic scales; few: fewer of
        the same, for attempts that only find out which nodes can be quantized.
        """
        import onnx

        self._origin, self._folder, self._trial = origin, folder, trial
        self._specs, self._calibrating, self._few = specs, calibrating, few
        self._method, self._activations = method, activations
        self._reduce_range, self._progress = reduce_range, progress
        self._prepared, self._made = folder / "prepared.onnx", folder / "int8.onnx"
        with _quiet():
            model = _prepare(source.model, self._prepared)
        _name_nodes(model.graph)
        self._excluded = set(source.exclusion.names(model.graph))
        _flatten_weights(model, self._excluded)
        _simplify_gemms(model.graph, self._excluded)
        onnx.save(model, str(self._prepared))
        self._nodes = [n.name for n in model.graph.node]  # all names of nodes
        self._wanted = [name for name in self._nodes if name not in self._excluded]
        self._types = {n.name: n.op_type for n in model.graph.node}
        self._convolves = any(n.op_type == "Conv" for n in model.graph.node)
        self._left_alone = _unmergeable(model.graph)
        self._begin_search()

    def best(self, *, per_channel: bool) -> tuple[Path, int, tuple[str, ...]]:
        """Returns the file, how many of its operators are about integers, and notes for the user.

        Raises UnsupportedModelError if nothing can be quantized, or nothing that is runs.
        """
        try:
            count = self._attempt(self._wanted, per_channel, self._calibrating)
        except UnsupportedModelError as error:
            first = error
        else:
            if not count and not self._excluded:
                raise UnsupportedModelError(f"{self._origin}: nothing in it can be quantized")
            return self._made, count, () if count else (_NOTHING_LEFT,)
        self._begin_search()
        if not self._goes([], per_channel):
            raise first  # none of the nodes is the cause
        for channels in (True, False) if per_channel else (False,):
            self._begin_search()
            going = self._most(channels, failed=channels == per_channel)
            try:
                count = self._attempt(going, channels, self._calibrating)
            except UnsupportedModelError:
                continue
            if count:
                return self._made, count, tuple(self._notes(going, channels, per_channel))
        raise first

    def _notes(self, going: Sequence[str], channels: bool, asked: bool) -> Iterator[str]:
        goes = set(going)
        left = [n for n in self._wanted if n not in goes]
        if left:
            named = ", ".join(f"{n} ({self._types[n]})" for n in left[:_SHOWN])
            more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
            yield f"float, since onnxruntime does not run them quantized: {named}{more}"
        if self._ended is not None:
            yield (
                f"not all of these were tried: the search ended after {self._attempts} attempts in"
                f" {self._ended:.0f} s (--exclude what does not run, and it is shorter)"
            )
        if asked and not channels:
            yield "one scale for each weight: onnxruntime does not run it with one for each channel"

    def _begin_search(self) -> None:
        self._attempts, self._began = 0, time.monotonic()
        self._ended: float | None = None  # seconds of a search that ended before it tried all nodes

    def _most(self, channels: bool, *, failed: bool) -> list[str]:
        """The most wanted nodes found to run together; failed: all together have failed.

        The largest groups come first, so that what is known to run is as much as it can be when
        the search ends. If one half runs beside what runs already, the fault is in the other half.
        """
        if not failed and self._goes(self._wanted, channels):
            return self._wanted
        going: list[str] = []
        failing = deque([self._wanted])  # groups that do not run beside `going`
        while failing and self._ended is None:
            group = failing.popleft()
            if len(group) < 2:
                continue
            middle = len(group) // 2
            first, second = group[:middle], group[middle:]
            if self._goes([*going, *first], channels):
                going += first
                failing.append(second)
                continue
            failing.append(first)
            if self._goes([*going, *second], channels):
                going += second
            else:
                failing.append(second)
        return going

    def _goes(self, nodes: Sequence[str], channels: bool) -> bool:
        seconds = time.monotonic() - self._began
        if self._attempts >= _MOST_ATTEMPTS or seconds >= _MOST_SECONDS:
            self._ended = seconds if self._ended is None else self._ended
            return False
        self._attempts += 1
        if self._progress is not None:
            self._progress("attempts", self._attempts, None)
        try:
            self._attempt(nodes, channels, self._few)
        except UnsupportedModelError:
            return False
        return True

    def _attempt(self, nodes: Sequence[str], channels: bool, samples: Samples | None) -> int:
        """Quantizes `nodes`, runs the file; returns how many of its operators are integer ones."""
        import onnx

        kept = set(nodes)
        excluded = [n for n in self._nodes if n not in kept]
        products = [n + _PRODUCT_OF_GEMM for n in excluded if self._types[n] == "Gemm"]
        self._quantize([*excluded, *products, *self._left_alone], channels, samples)
        model = onnx.load(str(self._made))
        del model.graph.value_info[:]  # a runtime infers the shapes itself
        onnx.save(model, str(self._made))
        self._trial(self._made)
        return len(quantized_types(model))

    def _quantize(self, excluded: list[str], channels: bool, samples: Samples | None) -> None:
        from onnxruntime import quantization as q

        shared: dict[str, Any] = {
            "per_channel": channels,
            "reduce_range": self._reduce_range,
            "nodes_to_exclude": excluded,
        }
        try:
            with _quiet():
                if samples is None:
                    # Its integer convolution is four times slower with int8 weights than uint8.
                    kind = q.QuantType.QUInt8 if self._convolves else q.QuantType.QInt8
                    shared["per_channel"] = channels and not self._convolves
                    q.quantize_dynamic(self._prepared, self._made, weight_type=kind, **shared)
                    return
                methods = {
                    "minmax": q.CalibrationMethod.MinMax,
                    "percentile": q.CalibrationMethod.Percentile,
                }
                percentile = self._method == "percentile"
                q.quantize_static(
                    self._prepared,
                    self._made,
                    _reader(samples, self._specs, self._progress),
                    quant_format=q.QuantFormat.QDQ,
                    activation_type=(
                        q.QuantType.QInt8 if self._activations == "int8" else q.QuantType.QUInt8
                    ),
                    weight_type=q.QuantType.QInt8,
                    calibrate_method=methods[self._method],
                    extra_options={"CalibPercentile": _PERCENTILE} if percentile else {},
                    **shared,
                )
        except (OptionError, ModelFileError):
            raise
        except OSError as error:
            raise disk_error(error, self._folder.parent) from error
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise UnsupportedModelError(
                f"{self._origin}: cannot be quantized: {one_line(error)}"
            ) from error


def _prepare(model: onnx.ModelProto, prepared: Path) -> onnx.ModelProto:
    """Folds shapes and constants of the model, as far as shapes can be found."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # Works on a file: of a model in memory it would take the weights out, and not put them back.
    source = prepared.with_name("float.onnx")
    try:
        onnx.save(model, str(source))
        for symbolic in (True, False):  # symbolic shapes need sympy, and fail on some models
            try:
                quant_pre_process(str(source), str(prepared), skip_symbolic_shape=not symbolic)
                return onnx.load(str(prepared))
            except OSError:
                raise
            except Exception as error:  # models make it raise anything: the next way is plainer
                logging.getLogger(__name__).debug("preparing failed: %s", error)
        return model
    except OSError as error:
        raise disk_error(error, prepared.parent.parent) from error
    finally:
        source.unlink(missing_ok=True)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Gives each node a name of its own: the quantizer leaves out by name, and "" would be all."""
    taken = {n.name for n in graph.node}
    seen: set[str] = set()
    for i, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            base = name = node.name or f"{node.op_type}_{i}"
            number = 1
            while name in taken:
                number += 1
                name = f"{base}_{number}"
            node.name = name
            taken.add(name)
        seen.add(node.name)


def _unmergeable(graph: onnx.GraphProto) -> list[str]:
    """Relu and Clip nodes whose input has another reader: the caller, or a graph within a node.

    The quantizer gives the input of such a node the range of its output if it knows of no other
    reader, and these it does not know: what they read would be clipped as well. Left out, the
    node rectifies floats between two tensors that have ranges of their own.
    """
    seen = {output.name for output in graph.output}
    seen.update(name for node in graph.node for name in _inner_reads(node))
    return [
        node.name
        for node in graph.node
        if node.op_type in ("Relu", "Clip") and node.input[0] in seen
    ]


def _inner_reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that graphs within a node read or output."""
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            yield from (output.name for output in graph.output)
            for inner in graph.node:
                yield from inner.input
                yield from _inner_reads(inner)


def _flatten_weights(model: onnx.ModelProto, excluded: set[str]) -> None:
    """Reshapes products' weights [1, .., in, out] to [in, out]: these get scales by channel."""
    from onnx import numpy_helper

    constants = {w.name: w for w in model.graph.initializer}
    ranks = {
        v.name: len(v.type.tensor_type.shape.dim)
        for v in (*model.graph.value_info, *model.graph.input)
        if v.type.tensor_type.HasField("shape")
    }
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.name in excluded:
            continue
        weight = constants.get(node.input[1])
        if weight is None or len(weight.dims) <= 2 or set(weight.dims[:-2]) != {1}:
            continue
        if ranks.get(node.input[0], 0) < len(weight.dims):
            continue  # the product's dimensions are those of the weights
        flat = f"{weight.name}:matrix"
        if flat not in constants:
            values = numpy_helper.to_array(weight).reshape(weight.dims[-2], weight.dims[-1])
            constants[flat] = numpy_helper.from_array(values, flat)
            model.graph.initializer.append(constants[flat])
        node.input[1] = flat


def _simplify_gemms(graph: onnx.GraphProto, excluded: set[str]) -> None:
    """Folds factors into constant weights and biases, and moves transA into a node of its own.

    The quantizer takes a product only out of Gemms that have none of these.
    """
    from onnx import helper, numpy_helper

    constants = {w.name: w for w in graph.initializer}
    nodes = []
    for node in graph.node:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        factors = {1: options.get("alpha", 1.0), 2: options.get("beta", 1.0)}
        factors = {i: f for i, f in factors.items() if f != 1.0 and i < len(node.input)}
        quantized = node.op_type == "Gemm" and node.name not in excluded
        if quantized and all(node.input[i] in constants for i in (1, *factors)):
            for i, factor in factors.items():
                name = f"{node.input[i]}:times:{factor:g}"
                if name not in constants:
                    values = numpy_helper.to_array(constants[node.input[i]])
                    scaled = (values * values.dtype.type(factor)).astype(values.dtype)
                    constants[name] = numpy_helper.from_array(scaled, name)
                    graph.initializer.append(constants[name])
                node.input[i] = name
            if options.get("transA"):
                turned = f"{node.name}:transposed"
                nodes.append(helper.make_node("Transpose", [node.input[0]], [turned], name=turned))
                node.input[0] = turned
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("transB", options.get("transB", 0)))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _reader(samples: Samples, specs: list[InputSpec], progress: Progress | None) -> Any:
    """The samples as onnxruntime's calibration takes them: one batch after the other."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = samples.batches(batch_size(specs, 1))
            self._done = 0

        def get_next(self) -> dict[str, Array] | None:
            batch = next(self._batches, None)
            if batch is not None:
                self._done += len(next(iter(batch.values())))
                if progress is not None:
                    progress("calibration", self._done, len(samples))
            return batch

    return Reader()


def disk_error(error: OSError, folder: Path) -> Exception:
    """DeviceError if the disk is full, else ModelFileError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DeviceError(f"no space left in {folder}: {error.strerror}")
    return ModelFileError(f"{folder}: {one_line(error)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences onnxruntime's quantizer, which prints and logs advice through the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
