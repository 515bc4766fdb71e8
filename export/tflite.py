"""Conversion of tflite models to ONNX: float ones in float32, int8 ones as QDQ, scales kept.

Inputs and outputs keep the names, types and NHWC shapes of the tflite file, and the batch is free
where it is free there. Source: the specifications of TensorFlow Lite's operators and of its int8
quantization, and of ONNX opset 17.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.base.checked_call import checked
from ..runtime.base.errors import ModelFileError, OptionError, UnsupportedModelError
from ..runtime.base.progress import Progress
from ..runtime.files.output_file import check_output
from .onnx.samples import Preprocessing, Samples
from .onnx.trial import require_onnxruntime, run_once

if TYPE_CHECKING:
    import onnx

    from .onnx.measurement import Measured


HYBRIDS = ("dynamic", "float")
ACTIVATIONS = ("int8", "uint8")


@dataclass(frozen=True)
class Converted:
    """The result: the file and the contents of its source."""

    path: Path
    nbytes: int
    operators: int
    quantized: bool  # whether activations are integers
    hybrids: int  # operators of float inputs and int8 weights
    reference: Measured | None = None  # the tflite file in its own interpreter, if measured
    measured: Measured | None = None  # the ONNX model


@checked
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    activations: str = "int8",
    hybrid: str = "dynamic",
    evaluation: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | None = None,
    reference_kernels: bool | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Writes the ONNX model of a tflite file.

    activations: what int8 tensors between operators become: "int8", or "uint8" with the same
    reals, which onnxruntime is faster with on x86 processors that have VNNI; before VNNI its
    uint8 sums can saturate.
    hybrid: how operators of float inputs and int8 weights compute. "dynamic": as tflite's
    reference kernel does, which rounds each sample's input to 8 bits. "float": with float32
    inputs, which is more exact and faster, but not what the interpreter computes.
    evaluation, labels, preprocessing: samples (see onnx_samples.Samples) that both models run on,
    the tflite file in its own interpreter (package ai-edge-litert). reference_kernels: the
    interpreter's plain ones, else its fast ones; None: plain ones if it has hybrid operators,
    whose inputs the fast ones round otherwise.
    out: appears under its name only when it is complete and onnxruntime has run it once; an
    existing one is replaced only with `force`. progress: called with ("operators", done, of how
    many).
    Raises ModelFileError if the file is missing, truncated or corrupt, UnsupportedModelError
    where it holds an operator or type that is not converted (named, with its index), OptionError
    where `out` cannot be written or a package is missing, DeviceError if the disk is full.
    """
    from .writer.gguf_writer import PartFile

    path, origin = Path(out), Path(source)
    check_output(path, [origin], force=force)
    if evaluation is None and labels is not None:
        raise OptionError("labels: expected data that they belong to (--evaluate)")
    require_onnxruntime()
    model, operators, quantized, hybrids = _build(origin, activations, hybrid, progress)
    data = model.SerializeToString(deterministic=True)
    run_once(path, data, advice="a newer onnxruntime may run it")
    rows: tuple[Measured, Measured] | tuple[()] = ()
    if evaluation is not None:
        from .onnx.measurement import OnnxRunner, compare
        from .tflite_ops.interpreter import TfliteRunner

        converted = OnnxRunner("onnx", path, threads, data)
        by = None if labels is None else os.fspath(labels)
        where = Path(evaluation)
        samples = Samples(where, converted.inputs, preprocessing=preprocessing, labels=by)
        names = [s.name for s in converted.inputs]
        plain = hybrids > 0 if reference_kernels is None else reference_kernels
        interpreter = TfliteRunner(origin, names, reference_kernels=plain, threads=threads)
        rows = compare(interpreter, converted, samples, progress)
    part = PartFile(path, len(data), "")
    try:
        part.write(0, data)
        part.finish()
    except BaseException:
        part.close()
        raise
    return Converted(path, len(data), operators, quantized, hybrids, *rows)


def to_onnx(
    source: str | os.PathLike[str],
    *,
    activations: str = "int8",
    hybrid: str = "dynamic",
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """The checked ONNX model of a tflite file. Arguments and errors are those of `convert`."""
    return _build(Path(source), activations, hybrid, progress)[0]


def _build(
    path: Path, activations: str, hybrid: str, progress: Progress | None
) -> tuple[onnx.ModelProto, int, bool, int]:
    """The model, how many operators it was made of, and `Converted`'s quantized and hybrids."""
    if hybrid not in HYBRIDS:
        raise OptionError(f"hybrid: expected {' or '.join(HYBRIDS)}, found {hybrid}")
    if activations not in ACTIVATIONS:
        raise OptionError(f"activations: expected {' or '.join(ACTIVATIONS)}, found {activations}")
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise OptionError("export tflite needs onnx: pip install 'stoker[export]'") from error
    from .. import __version__
    from .tflite_ops import CONVERTERS
    from .tflite_ops.file import read, with_unsigned
    from .tflite_ops.graph import Graph

    file = read(path)
    graph = Graph(with_unsigned(file) if activations == "uint8" else file, hybrid=hybrid)
    for operator in file.operators:  # first, so that one error names all that cannot be converted
        if operator.name not in CONVERTERS:
            missing = [o for o in file.operators if o.name not in CONVERTERS]
            named = ", ".join(dict.fromkeys(str(o) for o in missing[:5]))
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise UnsupportedModelError(f"{path}: no conversion of {named}{more}")
    for done, operator in enumerate(file.operators, 1):
        converter = CONVERTERS[operator.name]
        count = len(operator.inputs)
        required = operator.inputs[: converter.required]
        if not converter.fewest <= count <= converter.most or -1 in required:
            raise ModelFileError(
                f"{path}: {operator}: expected {converter.fewest} to {converter.most} inputs,"
                f" found {count}"
            )
        if len(operator.outputs) not in converter.outputs:
            wanted = converter.outputs.start
            raise ModelFileError(
                f"{path}: {operator}: expected {wanted} output{'s' * (wanted > 1)}"
                f"{' or more' * (len(converter.outputs) > 1)}, found {len(operator.outputs)}"
            )
        converter.add(graph, operator)
        if progress is not None:
            progress("operators", done, len(file.operators))
    quantized = any(t.quantized and t.data is None for t in file.tensors)
    return graph.model(__version__), len(file.operators), quantized, graph.hybrids
