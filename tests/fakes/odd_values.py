"""Values of every kind that Python can hold, for tests that hand them to the public API.

`ODD` is a list of values that make no sense for options; some are valid for some arguments.
`values()` is a strategy of hypothesis over these, over numbers around every power of two that is a
limit of something, and over containers of them.
"""

from __future__ import annotations

import collections
import decimal
import fractions
import math
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st


class Raises:
    """An object of which every operation raises a new error of `kind`."""

    def __init__(self, kind: type[BaseException], *arguments: object) -> None:
        self._error = kind, arguments

    def _raise(self, *_: Any, **__: Any) -> Any:
        kind, arguments = self._error
        raise kind(*arguments)

    __index__ = __float__ = __int__ = __str__ = __repr__ = __iter__ = __len__ = __bool__ = _raise
    __eq__ = __fspath__ = __array__ = __contains__ = __getitem__ = _raise  # type: ignore[assignment]
    __hash__ = object.__hash__


class Lies:
    """An object of which every operation returns a value of the wrong type."""

    def __index__(self) -> Any:
        return "x"  # noqa: PLE0305

    def __iter__(self) -> Any:
        return 5

    def __len__(self) -> Any:
        return -1  # noqa: PLE0303

    __float__ = __fspath__ = __index__
    __str__ = __repr__ = __bool__ = __iter__


class Text(str):
    """A string whose methods raise."""

    def __len__(self) -> int:
        raise ValueError("len")

    def __iter__(self) -> Any:
        raise ValueError("iter")

    def encode(self, *_: Any, **__: Any) -> Any:
        raise ValueError("encode")


class Number(int):
    """An integer of a type of its own."""


def breaking() -> Iterator[int]:
    """Yields one token, then raises."""
    yield 1
    raise KeyError("generator")


def _nested() -> tuple[Any, Any, Any]:
    circle: list[Any] = []
    circle.append(circle)
    ring: dict[str, Any] = {}
    ring["a"] = ring
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    return circle, ring, deep


CIRCLE, RING, DEEP = _nested()
_DTYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", ">u8", "f2", "f4", "f8", ">f4",
           "g", "c8", "O", "?", "U3", "S3", "m8[s]", "M8[s]")  # fmt: skip
_SCALARS = ("i1", "u8", ">i4", ">f8", "f2", "c8", "O", "U1", "?")

NUMBERS: list[Any] = [
    *(sign * (2**power + step) for power in (0, 15, 16, 31, 32, 53, 62, 63, 64, 128)
      for step in (-1, 0, 1) for sign in (1, -1)),
    10**400, 10**5000, -(10**5000), 0.0, -0.0, 0.5, -1.5, 5e-324, 1e-40, 3.5e38, 1e39, 1e300,
    -1e300, math.nan, math.inf, -math.inf, 1j, complex(math.nan, 0), Number(3), True, False,
    decimal.Decimal(1), decimal.Decimal("NaN"), decimal.Decimal("sNaN"),
    decimal.Decimal("1e999999"),
    fractions.Fraction(1, 3), fractions.Fraction(10**400, 1),
    *(t(1) for t in (np.bool_, np.int8, np.uint8, np.int64, np.uint64, np.float16, np.float32,
                     np.float64, np.longdouble, np.complex64)),
    np.uint64(2**64 - 1), np.int64(-1), np.float32("nan"), np.float64("inf"),
    np.datetime64("2020"), np.datetime64("NaT"), np.timedelta64(1, "s"), np.void(b"x"),
    *(np.array(1, dtype=d) for d in _SCALARS),
]  # fmt: skip

TEXTS: list[Any] = [
    "", " ", "x", "\0", "a\0b", "\ud800", "a\udcff", "\udcff\udc80", "\U0010ffff", "e\u0301",
    "\u202e", "\r\n", "x" * 20_000, "1", "-1", "nan", "1e400", "none", "auto", "f16", "50%", "1%1%",
    "²", "٣", "٣MB", "1" * 400, "1" * 5000 + "MB", "∞", "%s%n", "{0.__class__}", "<|im_end|>", "~",
    "~nobody/x", "-", "hf:", "hf:a/b/c", "hf:../../x/y", "C:\\x", "http://x", b"", b"x", b"\xff\0",
    bytearray(b"ab"), memoryview(b"abc"), Text("x"), np.str_("x"), np.bytes_(b"x"),
]  # fmt: skip

CONTAINERS: list[Any] = [
    *(np.array([1, 2, 3], dtype=d) for d in _DTYPES), np.array([]), np.array([], "i4"),
    np.zeros((0, 3), "i4"), np.zeros((2, 2), "i4"), np.zeros((1, 1, 1, 1)),
    np.array([1, None], dtype=object), np.array([2**70, 1], dtype=object),
    np.array([2**64 - 1], "u8"), np.array([-1]), np.arange(10)[::-2], np.zeros(3, [("a", "i4")]),
    np.ma.array([1, 2], mask=[0, 1]), np.frombuffer(b"\1\0\0\0", "i4"),
    [], [1], [1.5], [None], [True], ["x"], [""], ["x", 1], [b"x"], [[1]], [1, [2]], [1, 2**40],
    [2**64], [10**30], [math.nan], [np.int32(1)], [np.float32(1)], [np.array([1])], ["\ud800"],
    ["a\0b"], [object()], (), (1,), ("x", "y"), set(), {1}, {"x"}, frozenset([1]), {}, {1: 1},
    {1: 1.5}, {1: None}, {-1: 1}, {2**31: 1.0}, {2**64: 1.0}, {"x": 1}, {1: "x"}, {1: math.nan},
    {1: math.inf}, {1: -math.inf}, {1: 1e39}, {1: 10**400}, {1.0: 1}, {True: 1}, {None: 1},
    {np.int64(1): np.float32(1)}, {1: decimal.Decimal("sNaN")}, {"role": "user", "content": "x"},
    [{"role": "user", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": 1}],
    [{"role": 1, "content": "x"}], [{"role": "\ud800", "content": "\udcff"}], [("role", "user")],
    [{"role": "user", "content": [{"type": "image"}]}], [{"role": "user", "content": CIRCLE}],
    [{"role": "user", "content": "x", "tool_calls": CIRCLE}], [{1: 2}],
    [{"role": "user", "content": "x"}, None], CIRCLE, RING, [CIRCLE], {1: CIRCLE}, DEEP,
    range(3), range(10**12), range(-3, 0), collections.deque([1]), collections.Counter("x"),
    types.MappingProxyType({1: 2}), types.SimpleNamespace(a=1),
]  # fmt: skip

OBJECTS: list[Any] = [
    None, object(), object, int, len, Ellipsis, NotImplemented, types, Exception("x"), Lies(),
    *map(Raises, (ValueError, KeyError, MemoryError, RecursionError, OverflowError, UnicodeError,
                  StopIteration, AttributeError)),
    Raises(RuntimeError, "r\nn"), Raises(OSError, 5, "io"),
]  # fmt: skip

PATHS: list[Any] = [
    *map(pathlib.Path, ("", ".", "/nonexistent/x.gguf", "a\0b", "/" + "x" * 300, "/" + "x/" * 3000,
                        "\udcff", "\ud800", "/dev/null", "/dev/full", "/proc/self/mem")),
    pathlib.PureWindowsPath("x"), "/dev/zero", "/", "..", "/root/.none/x",
]  # fmt: skip

ODD: list[Any] = [*NUMBERS, *TEXTS, *CONTAINERS, *OBJECTS, *PATHS]


def iterators() -> list[Any]:
    """New iterators: each can be used once."""
    return [iter([1, 2]), breaking(), (x for x in [1]), map(int, ["1"]), zip([1], [2], strict=True)]


def values() -> st.SearchStrategy[Any]:
    """Any value: from the lists above, drawn, or a container of such values."""
    single = st.one_of(
        st.sampled_from(ODD),
        st.integers(),
        st.floats(),
        st.text(st.characters(), max_size=8),  # with lone surrogates
        st.binary(max_size=8),
        st.builds(breaking),
    )
    return st.one_of(
        single,
        st.lists(single, max_size=3),
        st.tuples(single, single),
        st.dictionaries(st.one_of(st.integers(-2, 400), st.text(max_size=3)), single, max_size=3),
        st.lists(
            st.fixed_dictionaries({"role": single, "content": single}), min_size=1, max_size=2
        ),
    )
