"""Argument checks: each turns a caller's value into the plain value that the core can hold.

Each function takes the argument's name and a value of any type whatever, even one whose own methods
raise. It returns a value of exactly the type it names, or raises an OptionError that names the
argument, what was expected and what was found.
"""

from __future__ import annotations

import math
import os
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from operator import index
from typing import Any, NoReturn, SupportsFloat, SupportsIndex

from .errors import OptionError

INT32_MAX = 2**31 - 1  # the core counts most things in 32 bits
INT64_MAX = 2**63 - 1

_SHOWN = 60  # characters of a value in a message, about
_LONG = 256  # bits from which an integer is not written out


class _Brief(reprlib.Repr):
    """Representations of a bounded length for any value: a list may hold itself."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _SHOWN
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        """Describes a long integer: Python refuses to write one of many thousand digits."""
        return repr(x) if x.bit_length() < _LONG else f"an integer of {x.bit_length()} bits"


_BRIEF = _Brief()


def shown(value: object) -> str:
    """Returns a value's representation for a message, cut short; its type where it has none."""
    try:
        return " ".join(_BRIEF.repr(value).split())
    except Exception:  # the value's own methods may raise anything
        return f"a {type(value).__name__}"


def integer(name: str, value: object, low: int | None = None, high: int | None = INT64_MAX) -> int:
    """Returns an integer of low to high: Python's, numpy's, or whatever else counts as one."""
    number = _index(value)
    if number is None:
        _refuse(name, "an integer", value)
    if (low is not None and number < low) or (high is not None and number > high):
        limits = f"between {low} and {high}"
        if high is None or (high == INT64_MAX and low is not None and number < low):
            limits = f"at least {low}"
        elif low is None:
            limits = f"at most {high}"
        raise OptionError(f"{name} must be {limits}, not {shown(number)}")
    return number


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns a finite number of low to high."""
    try:
        found = float(value) if _is_number(value) else None
    except OverflowError:
        found = math.inf
    except Exception:
        found = None
    if found is None:
        _refuse(name, "a number", value)
    if not math.isfinite(found) or not low <= found <= high:
        limits = "finite" if low == -math.inf else f"between {low:g} and {high:g}"
        if low != -math.inf and high == math.inf:
            limits = f"finite and at least {low:g}"
        _refuse(name, limits, value)
    return float(found)


def integers(name: str, values: object, expected: str = "integers") -> Iterator[int]:
    """Yields the integers of any iterable, one by one, because there may be far too many.

    expected: what the message says they must be.
    """
    try:
        items = iter(values)  # type: ignore[call-overload]
    except Exception:
        _refuse(name, expected, values)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except Exception:
            _refuse(name, expected, values)
        number = _index(item)
        if number is None:
            raise OptionError(f"{name} must be {expected}, not {shown(item)} among others")
        yield number


def flag(name: str, value: object) -> bool:
    """Returns True or False, also for numpy's booleans."""
    numpy = sys.modules.get("numpy")  # a value of numpy has loaded it
    if isinstance(value, bool) or (numpy is not None and isinstance(value, numpy.bool_)):
        return bool(value)
    _refuse(name, "True or False", value)


def text(name: str, value: object, expected: str = "a string") -> str:
    """Returns a string; expected: what the message says it must be."""
    if not isinstance(value, str):
        _refuse(name, expected, value)
    return str.__str__(value)  # a plain str, also for a value of a subclass


def choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Returns one of the strings `choices`."""
    if not isinstance(value, str) or str.__str__(value) not in choices:
        _refuse(name, f"one of {', '.join(choices)}", value)
    return str.__str__(value)


def path(name: str, value: object) -> str:
    """Returns a path that the system accepts; whether there is such a file is not checked."""
    try:
        found = os.fspath(value)  # type: ignore[call-overload]
    except Exception:
        _refuse(name, "a path", value)
    if not isinstance(found, str):
        _refuse(name, "a path", value)
    found = str.__str__(found)
    if not found:
        _refuse(name, "a path", value)
    try:
        encoded = os.fsencode(found)
    except UnicodeEncodeError:
        _refuse(name, f"a path that {sys.getfilesystemencoding()} can write", value)
    if b"\0" in encoded:
        _refuse(name, "a path without NUL characters", value)
    return found


def mapping(name: str, value: object, of: str = "names to values") -> dict[Any, Any]:
    """Returns a copy of a mapping; of: what it maps, for the message."""
    if isinstance(value, Mapping):
        try:
            return dict(value)
        except Exception:
            pass
    raise OptionError(f"{name} must map {of}, not {shown(value)}")


def sequence(name: str, value: object, expected: str) -> list[Any]:
    """Copies a sequence that is no text; expected: what the message says it must be."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        try:
            return list(value)
        except Exception:
            pass
    _refuse(name, expected, value)


def function(name: str, value: object) -> Callable[..., Any]:
    """Returns something that can be called."""
    if not callable(value):
        _refuse(name, "a function", value)
    return value


def tokens(name: str, value: object, vocabulary: int) -> list[int]:
    """Returns the token ids, all below `vocabulary`, of a sequence or an array [n]."""
    expected = "a string or a sequence of token ids"
    if isinstance(value, (str, bytes, bytearray, Mapping, AbstractSet)):
        _refuse(name, expected, value)
    if not isinstance(value, Sequence):
        import numpy as np

        try:
            array = np.asarray(value)
        except Exception:
            _refuse(name, expected, value)
        if array.ndim != 1 or (array.dtype.kind not in "iuO" and array.size):
            _refuse(name, expected, value)
        value = array.tolist()
    ids = []
    for token in integers(name, value, expected):
        if not 0 <= token < vocabulary:
            raise OptionError(f"token {shown(token)} is outside the vocabulary of {vocabulary}")
        ids.append(token)
    return ids


def _is_number(value: Any) -> bool:
    """Returns whether a value is a number, which float() then gives.

    float() also accepts numpy's booleans, dates, arrays of one element and (dropping a part)
    complex numbers, which do not count here.
    """
    if isinstance(value, (bool, str, bytes)) or not isinstance(value, SupportsFloat):
        return False
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    return kind is None or (kind in "iufO" and getattr(value, "ndim", 0) == 0)


def _index(value: object) -> int | None:
    """Returns the integer that a value is; None for a boolean and for anything else."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return int(index(value))  # int(), because __index__ may return a bool
    except Exception:
        return None


def _refuse(name: str, expected: str, value: object) -> NoReturn:
    raise OptionError(f"{name} must be {expected}, not {shown(value)}") from None
