"""The values that a chat template computes with, and what a rendering may spend on them.

Every use of a value (printing, comparing, sorting, looking it up) takes time in proportion to its
size, with shared parts counted each time they occur: sixty lists that each hold the one before
twice are small in memory, but would never finish printing. So no value may be larger than
MAX_OUTPUT. A value is measured when it is made, and the parts of a value cannot grow any more.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from typing import TYPE_CHECKING, Any, SupportsIndex

from jinja2.utils import Namespace as JinjaNamespace

if TYPE_CHECKING:
    from .control_marks import ControlMarks

MAX_OUTPUT = 1 << 22  # characters of a prompt, and of any value made on the way
MAX_PRINTED = 1 << 26  # characters that expressions print in one rendering, macros included
MAX_STEPS = 1_000_000  # passes of loops and calls of macros in one rendering
MAX_SECONDS = 5.0  # thread time of one rendering, which a busy machine does not lengthen
_MAX_WIDTH = 4096  # the largest number that padding and cutting functions take
_MAX_INT_BITS = 4096
_MAX_BACKWARDS = 1 << 30  # characters of a text times those looked for from its end

_TEXTS = (str, bytes, bytearray)
CONTAINERS = (list, tuple, Set, ValuesView)  # KeysView and ItemsView are sets


class Runaway(Exception):
    """A bound of this file was reached."""


class Budget(threading.local):
    """The budget left to the rendering in this thread, and the marks in its messages."""

    steps = 0
    printable = 0  # characters
    deadline = 0.0
    marks: ControlMarks | None = None

    def reset(self, marks: ControlMarks | None) -> None:
        """Begins a rendering."""
        self.marks = marks
        self.steps = MAX_STEPS
        self.printable = MAX_PRINTED
        self.deadline = time.thread_time() + MAX_SECONDS

    def step(self) -> str:
        """Spends a step; prints nothing. Raises Runaway."""
        self.steps -= 1
        if self.steps < 0:
            raise Runaway(f"more than {MAX_STEPS} steps")
        self.check_time()
        return ""

    def check_time(self) -> None:
        """Raises Runaway if the rendering has taken too long."""
        if time.thread_time() > self.deadline:
            raise Runaway(f"more than {MAX_SECONDS:g} seconds")

    def print(self, characters: int) -> None:
        """Spends characters that a template prints anywhere. Raises Runaway."""
        self.printable -= characters
        if self.printable < 0:
            raise Runaway(f"more than {MAX_PRINTED} characters printed on the way")


BUDGET = Budget()


class GivenList(list[Any]):
    """A list of the conversation, which a template may not change."""


def given(value: Any) -> Any:
    """Returns a value of a conversation (dict, list, str) as a template gets it."""
    if isinstance(value, dict):
        return {key: given(item) for key, item in value.items()}
    return GivenList(map(given, value)) if isinstance(value, list) else value


class OwnList(list[Any]):
    """A list that the template has made and may change until it is part of another value."""

    __slots__ = ("_is_part", "_size")

    def __init__(self, items: Iterable[Any] = ()) -> None:
        super().__init__(items)
        self._is_part = False
        self._size: int | None = None  # measured when the list begins to grow

    def become_part(self) -> None:
        """Forbids further growth, since the size of the value that holds it is final."""
        self._is_part = True

    def append(self, item: Any) -> None:
        """Appends an item. ValueError if this is part of another value, Runaway if too large."""
        if item is self:
            raise Runaway(f"a value of more than {MAX_OUTPUT} characters")
        if self._is_part:
            raise ValueError("append: expected a list that is part of no other value")
        if self._size is None:
            self._size = size(self)
        larger = self._size + 2 + size(item)
        check_size(larger)
        _fix(item)
        self._size = larger
        super().append(item)

    def pop(self, index: SupportsIndex = -1) -> Any:
        """Removes and returns an item, as a list's pop does."""
        item = super().pop(index)
        if self._size is not None:
            self._size -= 2 + size(item)
        return item


class Namespace(JinjaNamespace):
    """The result of namespace(), which is measured when it is printed.

    It may hold values that change, even itself, so it cannot be measured when made. No other
    operation looks into one: two of them are equal only if they are the same object.
    """

    def __repr__(self) -> str:
        BUDGET.print(size(self))
        return super().__repr__()


def check_size(characters: int) -> None:
    """Raises Runaway for a value that prints as too many characters."""
    if characters > MAX_OUTPUT:
        raise Runaway(f"a value of more than {MAX_OUTPUT} characters")


def size(value: object) -> int:
    """Returns about how many characters a value prints as, shared parts counted each time.

    Raises Runaway if that is more than MAX_OUTPUT.
    """
    total = 0
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, _TEXTS):
            total += len(item)
        elif isinstance(item, Mapping):
            total += 4 * len(item)
            check_size(total)
            rest += item.keys()
            rest += item.values()
        elif isinstance(item, CONTAINERS):
            total += 2 * len(item)
            check_size(total)
            rest += item
        else:
            total += 1
            if isinstance(item, JinjaNamespace):
                rest.append(object.__getattribute__(item, "_Namespace__attrs"))
        check_size(total)
    return total


def measured(value: Any) -> Any:
    """Returns a value that was just made, with its parts final. Raises Runaway if it is too large.

    A new list becomes one that the template may change; an iterator is measured item by item.
    """
    if isinstance(value, str):
        check_size(len(value))
        return value
    if isinstance(value, Iterator):
        return _measured_items(value)
    size(value)
    _fix_parts(value)
    return OwnList(value) if type(value) is list else value


def _measured_items(items: Iterator[Any]) -> Iterator[Any]:
    total = 0
    for item in items:
        total += 2 + size(item)
        check_size(total)
        yield measured(item)


def _fix_parts(value: Any) -> None:
    if isinstance(value, Mapping):
        for item in value.values():
            _fix(item)
    elif isinstance(value, CONTAINERS):
        for item in value:
            _fix(item)


def _fix(item: Any) -> None:
    if isinstance(item, OwnList):
        item.become_part()


# These checks run before a value is made, since it may be far larger than its inputs.


def check_widths(*values: object) -> None:
    """Raises Runaway for numbers beyond any width that a text is padded to or cut at."""
    for value in values:
        if isinstance(value, (int, float)) and abs(value) > _MAX_WIDTH:
            raise Runaway(f"a width of more than {_MAX_WIDTH}")


def check_format(pattern: object, values: object) -> None:
    """Raises Runaway for a printf or str.format pattern with fields or a result too large."""
    text = str(pattern)
    if any(int(digits[:9]) > _MAX_WIDTH for digits in re.findall(r"\d{4,}", text)) or (
        re.search(r"%[^a-zA-Z%]*\*|\{[^{}]*\{", text)
    ):
        raise Runaway(f"a width of more than {_MAX_WIDTH}")
    fields = text.count("%") + text.count("{")
    items = values if isinstance(values, (tuple, list)) else [values]
    check_size(len(text) + fields * max([size(item) for item in items], default=0))


def check_binary(operator: str, left: Any, right: Any) -> None:
    """Raises Runaway for an operation of two values whose result is too large."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if operator == "**":
            bits = left.bit_length() * max(right, 0)
        if bits > _MAX_INT_BITS and operator in ("*", "**"):
            raise Runaway(f"a number of more than {_MAX_INT_BITS} bits")
    elif operator == "+":
        check_size(size(left) + size(right))
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(count, int):
                check_size(size(sequence) * max(count, 0))
    elif operator == "%" and isinstance(left, _TEXTS):
        check_format(left, right)


def check_join(separator: object, items: Sequence[object]) -> None:
    """Raises Runaway for items whose joined text is too large."""
    check_size(size(items) + size(separator) * len(items))


def check_replace(text: object, old: object, new: object) -> None:
    """Raises Runaway for a text that is too large once `new` replaces `old`."""
    found = str(text).count(str(old)) if str(old) else len(str(text)) + 1
    check_size(len(str(text)) + found * size(new))


def check_method(method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Raises Runaway for a call of a text's method, or of to_bytes, whose result is too large.

    Returns the arguments for the call (an iterator that had to be counted is now a list).
    """
    text = getattr(method, "__self__", None)
    name = getattr(method, "__name__", "")
    if name == "to_bytes":
        check_widths(*args, *kwargs.values())
    if not isinstance(text, _TEXTS):
        return args
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        check_widths(*args, *kwargs.values())
        if name == "expandtabs":
            check_size(len(text) * 8 if not args and not kwargs else len(text) * _MAX_WIDTH)
    elif name == "replace" and len(args) >= 2:
        if isinstance(text, str):
            check_replace(text, args[0], args[1])
        else:
            check_size(len(text) + (len(text) + 1) * size(args[1]))
    elif name == "join" and len(args) == 1:
        items = list(args[0])
        check_join(text, items)
        return (items,)
    elif name in ("rfind", "rindex", "rsplit", "rpartition"):
        # At worst these take Python the product of both lengths.
        sought = args[0] if args else kwargs.get("sep")
        if isinstance(sought, _TEXTS) and len(text) * len(sought) > _MAX_BACKWARDS:
            raise Runaway(f"a search of more than {_MAX_BACKWARDS} comparisons")
    elif name == "translate":
        raise Runaway("str.translate is not for templates")
    return args
