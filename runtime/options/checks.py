"""Checks of option values: (name, value) -> the plain value, or OptionError."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..base import arguments
from ..base.arguments import INT32_MAX, INT64_MAX
from ..base.errors import OptionError
from ..base.memory import plain_memory

Check = Callable[[str, Any], Any]


class _Frozen(dict[int, float]):
    """An immutable mapping; unlike MappingProxyType it can be pickled and copied."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("options are frozen: make others with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> Any:
        return _Frozen, (dict(self),)


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """Accepts a finite number of low to high."""
    return lambda name, value: arguments.number(name, value, low, high)


def integer(low: int, high: int = INT64_MAX) -> Check:
    """Accepts an integer of low to high."""
    return lambda name, value: arguments.integer(name, value, low, high)


def one_of(names: Sequence[str]) -> Check:
    """Accepts one of these names."""
    return lambda name, value: arguments.choice(name, value, tuple(names))


def flag(name: str, value: Any) -> bool:
    """Accepts True or False."""
    return arguments.flag(name, value)


def path(name: str, value: Any) -> Any:
    """Accepts a path."""
    return arguments.path(name, value)


def memory(_: str, value: Any) -> Any:
    """Accepts a budget: bytes, "500MB", "60%" or "auto"."""
    return plain_memory(value)


def core_name(name: str, value: Any) -> str:
    """Accepts a name that is not empty; the core checks whether it exists."""
    text = arguments.text(name, value)
    if not text:
        raise OptionError(f"{name} must be a name, not ''")
    return text


def strings(name: str, value: Any) -> tuple[str, ...]:
    """Accepts one string or several, none of them empty."""
    expected = "a string or a sequence of strings"
    values = [value] if isinstance(value, str) else arguments.sequence(name, value, expected)
    found = tuple(arguments.text(name, text, expected) for text in values)
    if not all(found):
        raise OptionError(f"{name} must not contain an empty string")
    return found


def biases(name: str, value: Any) -> Mapping[int, float]:
    """Accepts a mapping of token ids to numbers or -inf."""
    bias: dict[int, float] = {}
    for key, added in arguments.mapping(name, value, "token ids to numbers").items():
        token = arguments.integer(f"{name} token", key, 0, INT32_MAX)
        banned = isinstance(added, float) and added == -math.inf
        bias[token] = -math.inf if banned else arguments.number(f"{name}[{token}]", added)
    return _Frozen(bias)
