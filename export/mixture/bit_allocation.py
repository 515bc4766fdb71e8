"""Bit allocation: one of several sizes for each of many units, at the least total cost.

The costs are assumed to add up. The choice for a budget is then where every unit stands on the
convex hull of its (bytes, cost) points at one common price of a byte, found by going down the steps
of all hulls together, those first that save most for their bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Choice = npt.NDArray[np.int64]  # [units] index of the level that each unit has


class BitAllocation:
    """The best choices for all budgets."""

    def __init__(self, cost: Floats, nbytes: npt.NDArray[np.int64]) -> None:
        """cost, nbytes: [units, levels]; cost is infinite where a unit lacks a level."""
        n_units, n_levels = cost.shape
        smallest = np.where(np.isfinite(cost), nbytes, np.iinfo(np.int64).max)
        # The smallest; of equal ones the cheaper.
        order = np.lexsort((cost, smallest), axis=1)
        self._nbytes = nbytes
        start = order[:, 0]
        units, targets, savings, sizes = [], [], [], []
        at = start.copy()
        # From each point of a hull, the next is the level that saves most for each byte more.
        rows = np.arange(n_units)
        active = np.ones(n_units, dtype=bool)
        step_of = np.zeros(n_units, dtype=np.int64)
        steps = []
        for _ in range(n_levels):
            more = nbytes - nbytes[rows, at][:, None]
            saved = cost[rows, at][:, None] - cost
            with np.errstate(invalid="ignore", divide="ignore"):
                rate = np.where((more > 0) & (saved > 0) & np.isfinite(cost), saved / more, -1.0)
            best = np.argmax(rate, axis=1)
            active &= rate[rows, best] > 0
            if not active.any():
                break
            chosen = np.flatnonzero(active)
            units.append(chosen)
            targets.append(best[chosen])
            savings.append(rate[chosen, best[chosen]])
            sizes.append(more[chosen, best[chosen]])
            steps.append(step_of[chosen].copy())
            step_of[chosen] += 1
            at[chosen] = best[chosen]
        self._start = start
        join = np.concatenate
        self._unit = join(units) if units else np.empty(0, dtype=np.int64)
        self._target = join(targets) if units else np.empty(0, dtype=np.int64)
        self._size = join(sizes) if units else np.empty(0, dtype=np.int64)
        rate = join(savings) if units else np.empty(0)
        step = join(steps) if units else np.empty(0, dtype=np.int64)
        # Rates fall along a hull; where rounding makes two equal, the earlier step comes first.
        self._order = np.lexsort((step, -rate))

    @property
    def least(self) -> int:
        """Bytes of the smallest choice."""
        return int(self._nbytes[np.arange(len(self._start)), self._start].sum())

    def choose(self, budget: int) -> Choice:
        """The choice of least cost whose bytes are at most `budget`; the smallest below that."""
        at: Choice = self._start.copy()
        left = budget - self.least
        if left <= 0:
            return at
        sizes = self._size[self._order]
        fits = int(np.searchsorted(np.cumsum(sizes), left, side="right"))
        blocked = np.zeros(len(at), dtype=bool)
        taken = self._order[:fits]
        at[self._unit[taken]] = self._target[taken]  # of several, the last: the largest
        left -= int(sizes[:fits].sum())
        for index in self._order[fits:]:  # smaller steps may fit into what is left
            unit = self._unit[index]
            if blocked[unit] or self._size[index] > left:
                blocked[unit] = True
                continue
            at[unit] = self._target[index]
            left -= int(self._size[index])
        return at

    def bytes_of(self, choice: Choice) -> int:
        """Bytes of all units at these levels."""
        return int(self._nbytes[np.arange(len(choice)), choice].sum())
