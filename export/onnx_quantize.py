"""int8 ONNX models from float ones, by onnxruntime's quantizer, measured before and after.

Static: activations get scales from calibration data, and the file is QDQ (QuantizeLinear and
DequantizeLinear around each operator): for convolutional networks. Dynamic: only weights are
quantized, activations as they come: for encoders. Source of the method: Jacob et al.,
Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018.
"""

from __future__ import annotations

import fnmatch
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.checked_call import checked
from ..runtime.errors import DeviceError, ModelFileError, OptionError, UnsupportedModelError
from .measurement import Measured, OnnxRunner, compare, one_line
from .onnx_samples import Array, InputSpec, Preprocessing, Samples, batch_size

if TYPE_CHECKING:
    import onnx

Progress = Callable[[str, int, "int | None"], None]

# onnxruntime has an entropy method, too: with its histograms of 128 bins for 128 levels it always
# takes the whole range, as minmax does.
METHODS = ("minmax", "percentile")
ACTIVATIONS = ("uint8", "int8")

_PERCENTILE = 99.99  # of an activation's values: 1 in 10000 is clipped

_QDQ_OPSET = 13  # the first with scales for each channel
_TARGET_OPSET = 17
_MAX_BYTES = 2**31 - 1  # of a model in one file (protobuf)


@dataclass(frozen=True)
class Quantized:
    """What was made, and how the model was before and is after; None: nothing to measure with."""

    path: Path
    nbytes: int
    quantized_nodes: int
    before: Measured | None
    after: Measured | None


@checked
def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    static: bool = True,
    calibration: str | os.PathLike[str] | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | None = None,
    per_channel: bool = True,
    method: str = "minmax",
    activations: str = "uint8",
    samples: int = 200,
    exclude: Sequence[str] = (),
    reduce_range: bool = False,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Quantizes the weights and (static) activations of an ONNX model to int8.

    calibration: inputs that are like those of use (see onnx_samples.Samples); static needs it.
    evaluation: inputs to measure with [default: the calibration data]; labels: their classes (a
    CSV file, or "folders"). per_channel: a scale for each channel of the weights. method: how the
    range of an activation is found. activations: their type; onnxruntime is twice as fast with
    uint8 on x86 with VNNI, but before VNNI its sums can saturate, and int8 is exact. samples: how
    many calibrate. exclude: patterns of node names or operator types that stay float.
    reduce_range: 7-bit weights, which cannot saturate either.

    `out` appears only when it is complete; an existing one is replaced only with `force`.
    progress: called with (what, done, of how many).
    Raises OptionError, ModelFileError, UnsupportedModelError; DeviceError where the disk is full.
    """
    origin, path = Path(source), Path(out)
    _check_options(
        origin,
        path,
        static=static,
        calibration=calibration,
        method=method,
        activations=activations,
        samples=samples,
        force=force,
    )
    _require()
    model = _load(origin)
    reference = OnnxRunner("float", origin, threads)
    specs = reference.inputs
    calibrating = None
    if static:
        assert calibration is not None
        calibrating = Samples(Path(calibration), specs, preprocessing=preprocessing, limit=samples)
    measured_with = evaluation or calibration
    measuring = None
    if measured_with is not None:
        by = None if labels is None else os.fspath(labels)
        whole = Samples(Path(measured_with), specs, preprocessing=preprocessing, labels=by)
        # All that has labels or was meant for it; without, the error of some is that of all.
        measuring = whole
        if evaluation is None and whole.labels is None:
            measuring = calibrating or whole
    elif labels is not None:
        raise OptionError("labels: expected data that they belong to (--calibrate or --evaluate)")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            made = _make(
                model,
                origin,
                Path(folder),
                specs,
                calibrating,
                per_channel=per_channel,
                method=method,
                activations=activations,
                exclude=exclude,
                reduce_range=reduce_range,
                progress=progress,
            )
            nodes = _finish(made)
            if not nodes:
                raise UnsupportedModelError(f"{origin}: nothing in it can be quantized")
            before = after = None
            if measuring is not None:
                after_runner = OnnxRunner("int8", made, threads)
                before, after = compare(reference, after_runner, measuring, progress)
            _publish(made, path)
    except DeviceError:
        raise
    except OSError as error:
        raise _disk(error, path.parent) from error
    return Quantized(path, path.stat().st_size, nodes, before, after)


def _check_options(
    origin: Path,
    path: Path,
    *,
    static: bool,
    calibration: str | os.PathLike[str] | None,
    method: str,
    activations: str,
    samples: int,
    force: bool,
) -> None:
    if not origin.is_file():
        raise ModelFileError(f"{origin}: no such file")
    if path.exists() and os.path.samefile(path, origin):
        raise OptionError(f"{path}: expected another file than the source")
    if path.exists() and not force:
        raise OptionError(f"{path} exists: choose another name, or replace it with --force")
    if not path.parent.is_dir():
        raise OptionError(f"{path.parent}: no such directory")
    if static and calibration is None:
        raise OptionError("static quantization needs --calibrate: inputs that are like real ones")
    if method not in METHODS:
        raise OptionError(f"method: expected one of {', '.join(METHODS)}, found {method}")
    if activations not in ACTIVATIONS:
        raise OptionError(f"activations: expected {' or '.join(ACTIVATIONS)}, found {activations}")
    if samples < 1:
        raise OptionError(f"samples: expected at least 1, found {samples}")


def _require() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime.quantization  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "quantize-onnx needs onnx and onnxruntime: pip install 'stoker[export]'"
        ) from error


def _load(path: Path) -> onnx.ModelProto:
    """The checked float model, of an opset that has scales for each channel."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(str(path))
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as error:
        raise ModelFileError(f"{path}: not a valid ONNX model: {one_line(error)}") from error
    if not model.graph.node:
        raise ModelFileError(f"{path}: expected an ONNX model, found one without operators")
    _fold_weights(model)
    if _quantized_types(model):
        raise UnsupportedModelError(
            f"{path}: expected a float model, found {_quantized_types(model)[0]}: quantized already"
        )
    if _casts_weights(model):
        raise UnsupportedModelError(
            f"{path}: expected a float model, found int8 weights that it casts: a tflite model with"
            " hybrid operators is to be converted with --hybrid float first"
        )
    if model.ByteSize() > _MAX_BYTES:
        raise UnsupportedModelError(f"{path}: expected at most 2 GiB of weights")
    if not _finite(model):
        raise ModelFileError(f"{path}: expected finite weights, found NaN or infinity")
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < _QDQ_OPSET:
        from onnx import version_converter

        try:
            model = version_converter.convert_version(model, _TARGET_OPSET)
        except Exception as error:  # it raises RuntimeError, and types of its own
            raise UnsupportedModelError(
                f"{path}: opset {opset} cannot be brought to {_TARGET_OPSET}: {one_line(error)}"
            ) from error
    return model


def _fold_weights(model: onnx.ModelProto) -> None:
    """Replaces DequantizeLinear of constants by their float32: weights that are stored as int8."""
    from onnx import helper, numpy_helper

    if any(n.op_type == "QuantizeLinear" for n in model.graph.node):
        return  # its activations are quantized, too
    constants = {w.name: w for w in model.graph.initializer}
    kept, folded = [], []
    for node in model.graph.node:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        foldable = node.op_type == "DequantizeLinear" and not set(options) - {"axis"}
        if foldable and all(i in constants for i in node.input):
            stored, scale, *zero = (numpy_helper.to_array(constants[i]) for i in node.input)
            shape = [1] * stored.ndim
            if scale.ndim:
                shape[options.get("axis", 1)] = -1
            offset = zero[0].astype(np.int64) if zero else np.zeros((), np.int64)
            reals = (stored.astype(np.int64) - offset.reshape(shape)).astype(scale.dtype)
            folded.append(numpy_helper.from_array(reals * scale.reshape(shape), node.output[0]))
        else:
            kept.append(node)
    if folded:
        used = {i for n in kept for i in n.input}
        weights = [w for w in model.graph.initializer if w.name in used] + folded
        del model.graph.node[:], model.graph.initializer[:]
        model.graph.node.extend(kept)
        model.graph.initializer.extend(weights)


def _finite(model: onnx.ModelProto) -> bool:
    from onnx import TensorProto, numpy_helper

    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    return all(
        bool(np.isfinite(numpy_helper.to_array(w)).all())
        for w in model.graph.initializer
        if w.data_type in kinds and len(w.dims) > 1  # masks of -inf are scalars and vectors
    )


def _quantized_types(model: onnx.ModelProto) -> list[str]:
    prefixes = (
        "Quantize",
        "Dequantize",
        "DynamicQuantize",
        "QLinear",
        "MatMulInteger",
        "ConvInteger",
        "QAttention",
        "QGemm",
        "MatMulNBits",
    )
    return [n.op_type for n in model.graph.node if n.op_type.startswith(prefixes)]


def _casts_weights(model: onnx.ModelProto) -> bool:
    from onnx import TensorProto

    kinds = (TensorProto.INT8, TensorProto.UINT8)
    stored = {w.name for w in model.graph.initializer if w.data_type in kinds and len(w.dims) > 1}
    return any(n.op_type == "Cast" and n.input[0] in stored for n in model.graph.node)


def _finish(path: Path) -> int:
    """Drops what a runtime infers itself; how many operators of the file are about integers."""
    import onnx

    model = onnx.load(str(path))
    del model.graph.value_info[:]
    onnx.save(model, str(path))
    return len(_quantized_types(model))


def _make(
    model: onnx.ModelProto,
    origin: Path,
    folder: Path,
    specs: list[InputSpec],
    calibrating: Samples | None,
    *,
    per_channel: bool,
    method: str,
    activations: str,
    exclude: Sequence[str],
    reduce_range: bool,
    progress: Progress | None,
) -> Path:
    """The quantized model, in `folder`."""
    from onnxruntime import quantization as q

    prepared, made = folder / "prepared.onnx", folder / "int8.onnx"
    with _quiet():
        _prepare(model, prepared)
    excluded = _excluded(prepared, exclude)
    shared: dict[str, Any] = {
        "per_channel": per_channel,
        "reduce_range": reduce_range,
        "nodes_to_exclude": excluded,
    }
    try:
        with _quiet():
            if calibrating is None:
                # Its integer convolution is four times slower with int8 weights than with uint8.
                convolves = any(n.op_type == "Conv" for n in model.graph.node)
                kind = q.QuantType.QUInt8 if convolves else q.QuantType.QInt8
                shared["per_channel"] = per_channel and not convolves
                q.quantize_dynamic(prepared, made, weight_type=kind, **shared)
                return made
            methods = {
                "minmax": q.CalibrationMethod.MinMax,
                "percentile": q.CalibrationMethod.Percentile,
            }
            q.quantize_static(
                prepared,
                made,
                _reader(calibrating, specs, progress),
                quant_format=q.QuantFormat.QDQ,
                activation_type=(
                    q.QuantType.QInt8 if activations == "int8" else q.QuantType.QUInt8
                ),
                weight_type=q.QuantType.QInt8,
                calibrate_method=methods[method],
                extra_options={"CalibPercentile": _PERCENTILE} if method == "percentile" else {},
                **shared,
            )
    except (OptionError, ModelFileError):
        raise
    except OSError as error:
        raise _disk(error, folder.parent) from error
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise UnsupportedModelError(f"{origin}: cannot be quantized: {one_line(error)}") from error
    return made


def _prepare(model: onnx.ModelProto, prepared: Path) -> None:
    """Shapes and constant folding, as far as the model lets them be found."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    for symbolic in (True, False):  # symbolic shapes need sympy, and fail on some models
        try:
            quant_pre_process(model, prepared, skip_symbolic_shape=not symbolic)
            return
        except OSError as error:
            raise _disk(error, prepared.parent.parent) from error
        except Exception as error:  # whatever the model makes it raise: the next way is plainer
            logging.getLogger(__name__).debug("preparing failed: %s", error)
    onnx.save(model, str(prepared))


def _excluded(prepared: Path, patterns: Sequence[str]) -> list[str]:
    """Names of nodes that a pattern fits, by name or by operator type."""
    if not patterns:
        return []
    import onnx

    names: list[str] = []
    for pattern in patterns:
        fitting = [
            n.name
            for n in onnx.load(str(prepared)).graph.node
            if fnmatch.fnmatchcase(n.name, pattern) or fnmatch.fnmatchcase(n.op_type, pattern)
        ]
        if not fitting:
            raise OptionError(f"exclude: no node or operator type fits {pattern!r}")
        names += fitting
    return names


def _reader(samples: Samples, specs: list[InputSpec], progress: Progress | None) -> Any:
    """The samples, as onnxruntime's calibration takes them: one batch after the other."""
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


def _publish(made: Path, path: Path) -> None:
    with open(made, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(made, path)


def _disk(error: OSError, folder: Path) -> Exception:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DeviceError(f"no space left in {folder}: {error.strerror}")
    return ModelFileError(f"{folder}: {one_line(error)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantizer prints, and logs advice for programmers through the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
