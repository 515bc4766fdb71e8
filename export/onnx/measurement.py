"""Compares two forms of one model over the same samples: accuracy, errors and time, a row each."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ...runtime.base.errors import ModelFileError, OptionError, one_line
from ...runtime.base.progress import Progress
from .samples import Array, InputSpec, Samples, batch_size, input_specs

if TYPE_CHECKING:
    import onnxruntime


_BATCH = 32
_TIMED_RUNS = 200
_TIMED_SECONDS = 2.0


@dataclass(frozen=True)
class Measured:
    """One row of the table. Errors are those of the first output against the reference's."""

    name: str
    nbytes: int
    samples: int
    milliseconds: float  # time of one sample alone, median of the runs
    accuracy: float | None  # share of labels that are the largest output
    relative_error: float | None  # |difference| / |reference|, Euclidean
    max_error: float | None  # largest |difference| of one value
    max_relative: float | None  # the same, as a share of the reference's largest value
    agreement: float | None  # share of samples with the same largest output


class Runner(Protocol):
    """A loaded model."""

    name: str
    nbytes: int
    inputs: list[InputSpec]

    def run(self, batch: dict[str, Array]) -> Array:
        """The first output for inputs [batch, ...] by name. Raises OptionError, ModelFileError."""
        ...


class OnnxRunner:
    """An ONNX model in onnxruntime."""

    def __init__(
        self, name: str, path: Path, threads: int | None = None, content: bytes | None = None
    ) -> None:
        """threads: None takes all cores. content: the model, if `path` does not hold it yet.

        Raises ModelFileError if it cannot be loaded.
        """
        self.name, self.path = name, path
        self.session = _session(path, threads, content)
        self.nbytes = _bytes_of(path) if content is None else len(content)
        self.inputs = input_specs(self.session)

    def run(self, batch: dict[str, Array]) -> Array:
        """The first output."""
        found = np.asarray(self.run_all(batch)[0])
        if not np.isfinite(found.astype(np.float64)).all():
            raise ModelFileError(f"{self.path}: expected finite outputs, found NaN or infinity")
        return found

    def run_all(self, batch: dict[str, Array]) -> list[Array]:
        """All outputs. Raises OptionError if the model does not take the inputs."""
        try:
            outputs: list[Array] = self.session.run(None, batch)
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise OptionError(
                f"{self.path}: does not run on the samples: {one_line(error)}"
            ) from error
        return outputs


def compare(
    reference: Runner, candidate: Runner, samples: Samples, progress: Progress | None = None
) -> tuple[Measured, Measured]:
    """The rows of both models, which run over the samples batch by batch.

    progress: called with ("measuring", done, of how many). Raises what runners raise, and
    OptionError if the samples have labels and the first output is not [batch, classes].
    """
    runners = reference, candidate
    right, agreed, done = [0, 0], 0, 0
    squares = [0.0, 0.0]  # sums over the reference's outputs, and over the differences
    largest = [0.0, 0.0]  # largest magnitudes of the same
    classes = False
    for batch in samples.batches(batch_size(reference.inputs, _BATCH)):
        count = len(next(iter(batch.values())))
        outputs = [r.run(batch).astype(np.float64) for r in runners]
        expected, found = outputs
        if expected.shape != found.shape:
            raise OptionError(
                f"expected outputs of one shape, found {list(expected.shape)} of {reference.name}"
                f" and {list(found.shape)} of {candidate.name}"
            )
        for i, values in enumerate((expected, found - expected)):
            squares[i] += float((values**2).sum())
            largest[i] = max(largest[i], float(np.abs(values).max(initial=0.0)))
        classes = expected.ndim == 2 and expected.shape[1] > 1
        if classes:
            tops = [o.argmax(1) for o in outputs]
            agreed += int((tops[0] == tops[1]).sum())
            if samples.labels is not None:
                wanted = samples.labels[done : done + count]
                for i, top in enumerate(tops):
                    right[i] += int((top == wanted).sum())
        done += count
        if progress is not None:
            progress("measuring", done, len(samples))
    known = samples.labels is not None
    if known and not classes:
        raise OptionError(
            f"labels: expected a first output [batch, classes], found {list(expected.shape)}"
        )
    milliseconds = _latencies(runners, next(samples.batches(1)))
    rows = [
        Measured(
            name=runner.name,
            nbytes=runner.nbytes,
            samples=done,
            milliseconds=milliseconds[i],
            accuracy=right[i] / done if known else None,
            relative_error=_share(squares[1], squares[0]) ** 0.5 if i else None,
            max_error=largest[1] if i else None,
            max_relative=_share(largest[1], largest[0]) if i else None,
            agreement=agreed / done if i and classes else None,
        )
        for i, runner in enumerate(runners)
    ]
    return rows[0], rows[1]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float(part > 0)


def _latencies(runners: tuple[Runner, ...], sample: dict[str, Array]) -> list[float]:
    """Milliseconds of one sample in each model, taken in turns: changes of load hit both."""
    seconds: list[list[float]] = [[] for _ in runners]
    for runner in runners:
        runner.run(sample)  # the first run allocates
    start = time.perf_counter()
    while len(seconds[0]) < _TIMED_RUNS and time.perf_counter() - start < _TIMED_SECONDS:
        for runner, times in zip(runners, seconds, strict=True):
            begin = time.perf_counter()
            runner.run(sample)
            times.append(time.perf_counter() - begin)
    return [1e3 * float(np.median(times)) for times in seconds]


def _session(
    path: Path, threads: int | None, content: bytes | None
) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        with redirect_stdout(io.StringIO()):  # onnxruntime prints what it raises
            return onnxruntime.InferenceSession(
                str(path) if content is None else content,
                options,
                providers=["CPUExecutionProvider"],
            )
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise ModelFileError(f"{path}: onnxruntime cannot load it: {one_line(error)}") from error


def _bytes_of(path: Path) -> int:
    """Bytes of the model and its external data."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ModelFileError(f"{path}: not a valid ONNX model: {one_line(error)}") from error
    files = {ExternalDataInfo(t).location for t in model.graph.initializer if uses_external_data(t)}
    return path.stat().st_size + sum((path.parent / f).stat().st_size for f in files)
