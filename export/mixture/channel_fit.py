"""Down projections that make up for missing channels: least squares in closed form.

For the tokens of each route, only some channels are active. The down projections of the shared
expert and of all experts together are fitted so that their sum is as near as can be to what the
layer has to add to the residual stream. Ridge regression, shrunk towards the dense model's rows.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .channel_split import Split
from .llama_layers import Floats

Doubles = npt.NDArray[np.float64]


class ChannelFit:
    """The normal equations of one layer, token batch by token batch.

    In blocks: block 0 are the shared channels, block 1 + e those of expert e. Blocks of two
    experts that no token used together have no product.
    """

    def __init__(self, split: Split, outputs: int) -> None:
        self._split, self._outputs = split, outputs
        s, (experts, width) = len(split.shared), split.experts.shape
        edges = [0, *(s + e * width for e in range(experts + 1))]
        self._rows = [slice(a, b) for a, b in pairwise(edges)]
        # Products of activations with each other (i <= j), and with targets.
        self._gram: dict[tuple[int, int], Doubles] = {}
        self._cross = np.zeros((edges[-1], outputs))
        self.energy = np.zeros(edges[-1])  # sums of squares of the activations
        self.uses = np.zeros(edges[-1])  # tokens with which each column was active

    def add(self, experts: tuple[int, ...], active: Floats, target: Floats) -> None:
        """Adds tokens of one route: active [n, columns of Split.of(experts)], target [n, outputs].

        experts: ascending.
        """
        at = self._split.of(experts)
        gram = active.T @ active
        self._cross[at] += active.T @ target
        self.energy[at] += np.diagonal(gram)
        self.uses[at] += len(active)
        blocks, here = [0, *(1 + e for e in experts)], 0
        places = []
        for b in blocks:
            n = self._rows[b].stop - self._rows[b].start
            places.append((b, slice(here, here + n)))
            here += n
        for i, (a, rows) in enumerate(places):
            for b, columns in places[i:]:
                if (a, b) in self._gram:
                    self._gram[a, b] += gram[rows, columns]
                else:
                    self._gram[a, b] = gram[rows, columns].astype(np.float64)

    def solve(self, start: Floats, prior_tokens: float) -> Floats:
        """Down rows [columns, outputs] near `start`, the dense model's, of the same shape.

        prior_tokens: as many tokens of mean energy speak for `start`, so that columns that few
        tokens used move little.
        """
        pull = prior_tokens * self.energy.sum() / max(1.0, self.uses.sum())
        pull = max(float(pull), 1e-12)
        prior = start.astype(np.float64)
        right = self._cross.copy()
        for (a, b), gram in self._gram.items():
            right[self._rows[a]] -= gram @ prior[self._rows[b]]
            if a != b:
                right[self._rows[b]] -= gram.T @ prior[self._rows[a]]
        alone = all(a in (0, b) for a, b in self._gram)
        change = self._solve_apart(right, pull) if alone else self._solve_whole(right, pull)
        fitted: Floats = (prior + change).astype(np.float32)
        return fitted

    def _solve_whole(self, right: Doubles, pull: float) -> Doubles:
        left = np.zeros((len(right), len(right)))
        for (a, b), gram in self._gram.items():
            left[self._rows[a], self._rows[b]] = gram
            left[self._rows[b], self._rows[a]] = gram.T
        left[np.diag_indices_from(left)] += pull
        change: Doubles = np.linalg.solve(left, right).astype(np.float64)
        return change

    def _solve_apart(self, right: Doubles, pull: float) -> Doubles:
        """Solves without pairs of experts: eliminates each by itself, then the shared ones."""
        shared = self._rows[0]
        s = shared.stop
        change = np.zeros_like(right)
        left = self._gram.get((0, 0), np.zeros((s, s))) + pull * np.eye(s)
        rest = right[shared].copy()
        solved = {}
        for e, rows in enumerate(self._rows[1:], 1):
            if (e, e) not in self._gram:
                continue  # no token used this expert
            own = self._gram[e, e] + pull * np.eye(rows.stop - rows.start)
            both = self._gram[0, e]
            x = np.linalg.solve(own, np.concatenate([both.T, right[rows]], axis=1))
            left -= both @ x[:, :s]
            rest -= both @ x[:, s:]
            solved[e] = x
        change[shared] = np.linalg.solve(left, rest)
        for e, x in solved.items():
            change[self._rows[e]] = x[:, s:] - x[:, :s] @ change[shared]
        return change
