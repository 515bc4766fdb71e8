"""A decorator that checks a function's arguments against their annotations before the call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from . import arguments
from .errors import DeviceError, OptionError, StokerError
from .memory import plain_memory

P = ParamSpec("P")
R = TypeVar("R")

# The ranges of arguments that mean the same everywhere; functions check other ranges themselves.
_RANGES = {"threads": (1, 1024)}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Returns the function with a check that makes its arguments plain values of their types.

    The new function raises OptionError, which names the argument that has another type, and
    DeviceError where the system refuses what the function asks of it. Annotations are strings
    (`from __future__ import annotations`); one that is not in _CHECKS must name a class of the
    function's module.
    """
    signature = inspect.signature(function)
    checks = {
        parameter.name: _check(parameter.name, str(parameter.annotation), function)
        for parameter in signature.parameters.values()
    }

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = checks[name](value)
        try:
            return function(*bound.args, **bound.kwargs)
        except (StokerError, BrokenPipeError):  # printing a progress may raise the latter
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise DeviceError(f"{where}{error.strerror or error}") from error

    return call


def _check(name: str, annotation: str, function: Callable[..., Any]) -> Callable[[object], Any]:
    kind = annotation.removesuffix(" | None")
    check: Callable[[object], Any]
    if kind == "int":
        low, high = _RANGES.get(name, (-arguments.INT64_MAX, arguments.INT64_MAX))
        check = partial(_integer, name, low, high)
    elif kind in _CHECKS:
        check = partial(_CHECKS[kind], name)
    else:
        check = partial(_instance, name, kind, function)
    if kind == annotation:
        return check
    return lambda value: None if value is None else check(value)


def _integer(name: str, low: int, high: int, value: object) -> int:
    return arguments.integer(name, value, low, high)


def _number(name: str, value: object) -> float:
    """Returns a number; the function itself checks the range of a float, and that it is no NaN."""
    return float(value) if isinstance(value, float) else arguments.number(name, value)


def _text(name: str, value: object) -> str:
    """Returns a string that can be encoded as UTF-8."""
    found = arguments.text(name, value)
    try:
        found.encode()
    except UnicodeEncodeError:
        raise OptionError(
            f"{name} must be text of whole characters, not {arguments.shown(found)}"
        ) from None
    return found


def _texts(name: str, value: object) -> tuple[str, ...]:
    expected = "a sequence of strings"
    found = arguments.sequence(name, value, expected)
    return tuple(_text(name, arguments.text(name, item, expected)) for item in found)


def _pairs(name: str, value: object) -> tuple[tuple[str, str], ...]:
    expected = "a sequence of pairs of strings"
    pairs = []
    for item in arguments.sequence(name, value, expected):
        pair = arguments.sequence(name, item, expected)
        if len(pair) != 2:
            raise OptionError(f"{name} must be {expected}, not {arguments.shown(value)}")
        first, second = (arguments.text(name, part, expected) for part in pair)
        pairs.append((first, second))
    return tuple(pairs)


def _memory(name: str, value: object) -> int | str:
    return plain_memory(value)


def _instance(name: str, kind: str, function: Callable[..., Any], value: object) -> object:
    expected = function.__globals__[kind]
    if not isinstance(value, expected):
        raise OptionError(f"{name} must be a {kind}, not {arguments.shown(value)}")
    return value


_CHECKS: dict[str, Callable[[str, object], Any]] = {
    "str | os.PathLike[str]": arguments.path,
    "float": _number,
    "bool": arguments.flag,
    "str": _text,
    "str | int": _memory,
    "int | str": _memory,
    "Sequence[str]": _texts,
    "Sequence[tuple[str, str]]": _pairs,
    "Progress": arguments.function,
}
