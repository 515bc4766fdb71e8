"""int8 ONNX models from float ones, by onnxruntime's quantizer, measured before and after.

Static: activations get scales from calibration data, and the file is QDQ (QuantizeLinear and
DequantizeLinear around each operator): for convolutional networks. Dynamic: only weights are
quantized, activations as they come: for encoders. Source of the method: Jacob et al.,
Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.backends.onnx_tensors import said
from ..runtime.base.checked_call import checked
from ..runtime.base.errors import DeviceError, ModelFileError, OptionError
from ..runtime.base.progress import Progress
from ..runtime.files.output_file import check_output
from .onnx.attempts import Attempts, disk_error
from .onnx.measurement import Measured, OnnxRunner, compare
from .onnx.outputs import far_outputs
from .onnx.samples import Preprocessing, Samples
from .onnx.source import read
from .onnx.trial import first_run, run_once

# onnxruntime has an entropy method, too: with its histograms of 128 bins for 128 levels it always
# takes the whole range, as minmax does.
METHODS = ("minmax", "percentile")
ACTIVATIONS = ("uint8", "int8")


@dataclass(frozen=True)
class Quantized:
    """The result, and the model's measurements before and after; None: nothing to measure with."""

    path: Path
    nbytes: int
    quantized_nodes: int
    before: Measured | None
    after: Measured | None
    notes: tuple[str, ...] = ()  # for the user: nodes that stay float


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
    many calibrate. exclude: patterns of node names or operator types that stay float; a node
    without a name is matched by its type. reduce_range: 7-bit weights, which do not saturate, too.

    Half precision is computed in float32; inputs and outputs keep their types. Nodes that
    onnxruntime's quantizer cannot do, or turns into what onnxruntime does not run, stay float, and
    a note says so. A note names each output, too, whose error on the calibration data (else, on the
    evaluation data) exceeds onnx_outputs.BOUND of its own spread.

    `out` appears only when it is complete and has run; an existing one is replaced only with
    `force`.
    progress: called with (what, done, of how many).
    Raises OptionError, ModelFileError, UnsupportedModelError; DeviceError if the disk is full.
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
    found = read(origin, exclude)
    reference = OnnxRunner("float", origin, threads)
    specs = reference.inputs
    calibrating = few = None
    if static:
        assert calibration is not None
        calibrating = Samples(Path(calibration), specs, preprocessing=preprocessing, limit=samples)
        few = Samples(Path(calibration), specs, preprocessing=preprocessing, limit=1)
    measured_with = evaluation or calibration
    measuring = None
    if measured_with is not None:
        by = None if labels is None else os.fspath(labels)
        whole = Samples(Path(measured_with), specs, preprocessing=preprocessing, labels=by)
        # All samples if they have labels or were meant for it; else some give the error of all.
        measuring = whole
        if evaluation is None and whole.labels is None:
            measuring = calibrating or whole
    elif labels is not None:
        raise OptionError("labels: expected data that they belong to (--calibrate or --evaluate)")
    trial = _trial(origin, path, reference, measuring)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            attempts = Attempts(
                found,
                origin,
                Path(folder),
                trial,
                calibrating=calibrating,
                few=few,
                specs=specs,
                method=method,
                activations=activations,
                reduce_range=reduce_range,
                progress=progress,
            )
            made, nodes, notes = attempts.best(per_channel=per_channel)
            before = after = None
            if measuring is not None:
                after_runner = OnnxRunner("int8", made, threads)
                before, after = compare(reference, after_runner, measuring, progress)
                notes = (*notes, *far_outputs(reference, after_runner, calibrating or measuring))
            _publish(made, path)
    except DeviceError:
        raise
    except OSError as error:
        raise disk_error(error, path.parent) from error
    return Quantized(path, path.stat().st_size, nodes, before, after, notes)


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
    check_output(path, [origin], force=force)
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


def _trial(
    origin: Path, path: Path, reference: OnnxRunner, samples: Samples | None
) -> Callable[[Path], None]:
    """A function that runs a file once, on a sample or on inputs that the float model takes."""
    if samples is not None:
        feed = next(samples.batches(1))
        expected = reference.run_all(feed)
    else:
        try:
            feed, expected = first_run(reference.session)
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise OptionError(
                f"{origin}: does not run on inputs of stoker's own: {said(error)}: give it some"
                " that it takes (--evaluate)"
            ) from error

    def trial(made: Path) -> None:
        advice = "keep what fails float (--exclude)"
        run_once(path, made, advice=advice, feed=feed, expected=expected)

    return trial


def _publish(made: Path, path: Path) -> None:
    with open(made, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(made, path)
