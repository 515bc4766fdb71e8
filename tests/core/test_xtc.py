"""Exclude top choices against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from stoker.runtime._core import Sampler
from stoker.runtime.base.errors import OptionError

P = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
LOGITS = np.log(P).astype(np.float32)


def frequencies(n: int = 40_000, **options: float) -> np.ndarray:
    sampler = Sampler(len(P), temperature=1.0, seed=5, **options)
    drawn = np.bincount([sampler.sample(LOGITS) for _ in range(n)], minlength=len(P))
    return drawn / n


def test_all_above_but_the_least_likely_are_left_out() -> None:
    found = frequencies(xtc_probability=1.0, xtc_threshold=0.12)
    left = np.where(np.arange(len(P)) >= 2, P, 0)  # 0.15 is the least of those above
    assert (found[:2] == 0).all()
    assert found == pytest.approx(left / left.sum(), abs=0.01)


def test_as_often_as_the_probability_says() -> None:
    """And its draws are not those of the token: both distributions mix."""
    found = frequencies(xtc_probability=0.3, xtc_threshold=0.12)
    left = np.where(np.arange(len(P)) >= 2, P, 0)
    assert found == pytest.approx(0.7 * P + 0.3 * left / left.sum(), abs=0.01)


def test_where_one_is_above_nothing_is_left_out() -> None:
    off = frequencies()
    assert (frequencies(xtc_probability=1.0, xtc_threshold=0.3) == off).all()
    assert (frequencies(xtc_probability=1.0, xtc_threshold=0.6) == off).all()


def test_out_of_range() -> None:
    for name in ("xtc_probability", "xtc_threshold"):
        with pytest.raises(OptionError, match=f"{name}: expected a number of 0 to 1"):
            Sampler(8, **{name: -0.1})
