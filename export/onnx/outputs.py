"""Compares each output of a quantized ONNX model with the float model's.

The table of `measurement` covers the first output alone, which can hide one that is ruined.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .measurement import OnnxRunner
from .samples import Array, Samples, batch_size

# A share of an output's own spread. int8 costs a few hundredths; at this bound a third of the
# output's information is lost, more than a network in use can bear.
BOUND = 0.3
_BATCH = 32


@dataclass
class _Sums:
    """Sums over the values of one output that are finite in the float model."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    differences: float = 0.0  # sum of squared differences

    def add(self, expected: Array, found: Array) -> None:
        wanted = expected.astype(np.float64)
        counted = np.isfinite(wanted)
        difference = (found.astype(np.float64) - wanted)[counted]
        wanted = wanted[counted]
        self.count += wanted.size
        self.total += float(wanted.sum())
        self.squares += float((wanted**2).sum())
        with np.errstate(over="ignore"):
            self.differences += float((difference**2).sum())

    def error(self) -> float:
        """The root of the differences' squares over that of the deviations from the mean.

        An output that is the same everywhere has no spread: its own size takes that place.
        """
        spread = self.squares - self.total**2 / max(self.count, 1)
        if spread <= 1e-12 * self.squares:
            spread = self.squares
        if spread == 0:
            return 0.0 if self.differences == 0 else float("inf")
        ratio = self.differences / spread
        return float(np.sqrt(ratio)) if np.isfinite(ratio) else float("inf")


def far_outputs(reference: OnnxRunner, candidate: OnnxRunner, samples: Samples) -> Iterator[str]:
    """Notes each floating-point output whose error on the samples exceeds BOUND.

    Outputs whose shapes depend on the values (detections) cannot be compared and are left out.
    Raises what runners raise.
    """
    names = [output.name for output in reference.session.get_outputs()]
    sums: dict[str, _Sums] = {name: _Sums() for name in names}
    for batch in samples.batches(batch_size(reference.inputs, _BATCH)):
        pairs = zip(names, reference.run_all(batch), candidate.run_all(batch), strict=True)
        for name, expected, found in pairs:
            if not isinstance(expected, np.ndarray) or expected.dtype.kind != "f":
                sums.pop(name, None)  # classes, sequences, maps: outputs that are not comparable
            elif expected.shape != found.shape:
                sums.pop(name, None)
            elif name in sums:
                sums[name].add(expected, found)
    for name, one in sums.items():
        error = one.error()
        if not error <= BOUND:
            yield (
                f"output {name} is off by {error:.2f} of its spread (expected at most {BOUND}): "
                "the nodes that it comes from may have to stay float (--exclude)"
            )
