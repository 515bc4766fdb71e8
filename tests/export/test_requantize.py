"""Rows are converted from one tensor type to another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stoker.runtime import _core
from stoker.runtime.base.errors import ModelFileError, OptionError


def test_requantize_reads_every_format() -> None:
    x = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    for form in _core.formats():
        data = _core.quantize(form["name"], x)
        exact = _core.dequantize(form["name"], data.reshape(-1), x.size).reshape(x.shape)
        found = _core.requantize(form["name"], data, 6, 512, "F32", threads=3)
        np.testing.assert_array_equal(found.view(np.float32), exact)
        again = _core.requantize(form["name"], data, 6, 512, "Q8_0")
        np.testing.assert_array_equal(again.reshape(-1), _core.quantize("Q8_0", exact).reshape(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 3}, "F32: expected 3 rows of 1024 bytes, found 2048 bytes"),
        ({"rows": -1}, "expected rows >= 0"),
        ({"cols": 0}, "cols >= 1"),
        ({"cols": 250}, "row length 250 is not a multiple of the block of 256 weights"),
        ({"format": "Q4_X"}, "format: expected a tensor type, found Q4_X"),
        ({"source_format": "?"}, "source_format: expected a tensor type"),
        ({"importance": np.ones(4, np.float32)}, r"importance: expected \[256\], found \[4\]"),
        ({"importance": np.full(256, -1, np.float32)}, "importance: expected finite values >= 0"),
    ],
)
def test_requantize_refuses(options: dict[str, Any], message: str) -> None:
    data = np.zeros(2048, np.uint8)
    chosen = {"source_format": "F32", "data": data, "rows": 2, "cols": 256, "format": "Q4_K"}
    with pytest.raises(OptionError, match=message):
        _core.requantize(**(chosen | options))


def test_the_first_bad_weight_is_named_whatever_the_threads() -> None:
    x = np.ones((5000, 256), np.float32)
    for row, column in ((4999, 3), (1200, 255), (1199, 7)):  # each one lies before the last
        x[row, column] = np.nan
        for threads in (1, 2, 7):
            with pytest.raises(ModelFileError, match=f"row {100 + row}, column {column}: expected"):
                _core.requantize(
                    "F32", x.view(np.uint8), 5000, 256, "Q4_0", threads=threads, first_row=100
                )
