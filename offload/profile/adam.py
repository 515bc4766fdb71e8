"""Adam for the small maps that are fitted to recordings with numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_DECAY1, _DECAY2 = 0.9, 0.99  # decay of the gradients' running means and mean squares
_LEAST = 1e-8


class Adam:
    """Moves parameters against their gradients, at a rate that falls to 0 like a cosine.

    Sources: Kingma and Ba, Adam, 2014; Loshchilov and Hutter, SGDR, 2016, for the rate.
    """

    def __init__(self, parameters: Sequence[Floats], rate: float) -> None:
        """Takes `parameters`, which step() changes in place."""
        self._parameters, self._rate = parameters, rate
        self._mean = [np.zeros_like(p) for p in parameters]
        self._square = [np.zeros_like(p) for p in parameters]
        self._steps = 0

    def step(self, gradients: Sequence[Floats], part: float) -> None:
        """Takes one step; part: share of the training that is over, 0 to 1."""
        self._steps += 1
        rate = self._rate * 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))
        rate /= 1 - _DECAY1**self._steps
        size = 1 / (1 - _DECAY2**self._steps)
        for i, gradient in enumerate(gradients):
            mean, square = self._mean[i], self._square[i]
            np.add(mean, np.float32(1 - _DECAY1) * (gradient - mean), out=mean)
            np.add(square, np.float32(1 - _DECAY2) * (np.square(gradient) - square), out=square)
            change = np.float32(rate) * mean / (np.sqrt(np.float32(size) * square) + _LEAST)
            np.subtract(self._parameters[i], change, out=self._parameters[i])
