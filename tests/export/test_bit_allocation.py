"""Bit allocations against exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stoker.export.mixture.bit_allocation import BitAllocation

tables = st.integers(0, 2**31).map(np.random.default_rng)


def exhaustive(cost: np.ndarray, nbytes: np.ndarray, budget: int) -> float:
    rows = np.arange(len(cost))
    return min(
        cost[rows, list(c)].sum()
        for c in itertools.product(range(cost.shape[1]), repeat=len(cost))
        if nbytes[rows, list(c)].sum() <= budget
    )


@settings(max_examples=60, deadline=None)
@given(tables)
def test_least_cost_of_hull_budgets(rng: np.random.Generator) -> None:
    """At the sizes that the hull passes through, nothing is cheaper; elsewhere nothing is larger
    than the budget, and nothing cheaper beyond what one step saves."""
    cost, nbytes = rng.random((4, 3)), rng.integers(1, 50, (4, 3))
    allocation = BitAllocation(cost, nbytes)
    rows = np.arange(4)
    largest_step = 0.0
    for budget in range(allocation.least, int(nbytes.max(axis=1).sum()) + 1):
        choice = allocation.choose(budget)
        assert allocation.bytes_of(choice) <= budget
        largest_step = max(largest_step, float((cost.max(axis=1) - cost.min(axis=1)).max()))
        assert cost[rows, choice].sum() <= exhaustive(cost, nbytes, budget) + largest_step
        if allocation.bytes_of(choice) == budget:
            hull = allocation.choose(budget)
            assert np.array_equal(choice, hull)


def test_convex_costs_are_solved_exactly() -> None:
    """With levels of equal steps and falling savings the greedy choice is the best one."""
    rng = np.random.default_rng(5)
    savings = np.sort(rng.random((5, 3)), axis=1)[:, ::-1]
    cost = 4 - np.concatenate([np.zeros((5, 1)), np.cumsum(savings, axis=1)], axis=1)
    nbytes = np.tile(np.arange(1, 5) * 10, (5, 1))
    allocation = BitAllocation(cost, nbytes)
    rows = np.arange(5)
    for budget in range(50, 201, 10):
        choice = allocation.choose(budget)
        assert cost[rows, choice].sum() == pytest.approx(exhaustive(cost, nbytes, budget))


def test_below_the_smallest() -> None:
    allocation = BitAllocation(np.array([[2.0, 1.0]]), np.array([[10, 20]]))
    assert list(allocation.choose(0)) == [0]
    assert list(allocation.choose(19)) == [0]
    assert list(allocation.choose(20)) == [1]


def test_missing_levels_and_costs_that_rise_are_not_chosen() -> None:
    cost = np.array([[3.0, 5.0, 1.0], [2.0, 1.0, np.inf]])
    nbytes = np.array([[10, 20, 30], [10, 20, 0]])
    allocation = BitAllocation(cost, nbytes)
    assert allocation.least == 20
    assert list(allocation.choose(10**6)) == [2, 1]
    assert list(allocation.choose(30)) == [0, 1]


def test_equal_sizes_take_the_cheaper() -> None:
    allocation = BitAllocation(np.array([[2.0, 1.0, 3.0]]), np.array([[10, 10, 10]]))
    assert list(allocation.choose(10)) == [1]
