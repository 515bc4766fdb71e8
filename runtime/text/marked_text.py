"""A text with marks (control_marks.py), used as if it had none.

For a template a mark is no character: positions, lengths, slices and searches are those of the
text without marks. A part that is cut out of it keeps the marks inside it and at its ends.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

# Methods of str by what they return: a number or boolean; one part of the text; the text with its
# characters changed; the text with padding.
_ANSWERS = frozenset(
    ("count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit",
     "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper",
     "rfind", "rindex", "startswith")
)  # fmt: skip
_PARTS = frozenset(("lstrip", "removeprefix", "removesuffix", "rstrip", "strip"))
_CASES = frozenset(("capitalize", "casefold", "lower", "swapcase", "title", "upper"))
_PADDED = frozenset(("center", "ljust", "rjust"))


class MarkedText:
    """One text with its marks; immutable.

    plain: the text without them.
    """

    def __init__(self, text: str, mark: str) -> None:
        """Splits `text` at `mark`, which is a character."""
        pieces = text.split(mark)
        self.plain = "".join(pieces)
        self._text = text
        self._mark = mark
        self._marks = list(accumulate(map(len, pieces[:-1])))  # each before plain[i], ascending

    def part(self, start: int, stop: int) -> str:
        """Returns plain[start:stop] with its marks, 0 <= start, stop <= len(plain); "" has none."""
        if start >= stop:
            return ""
        first = start + bisect_left(self._marks, start)
        return self._text[first : stop + bisect_right(self._marks, stop)]

    def sliced(self, at: int | slice) -> str:
        """Returns plain[at] with its marks. Raises IndexError as str does."""
        if isinstance(at, int):
            _ = self.plain[at]
            start = at % len(self.plain)
            return self.part(start, start + 1)
        start, stop, step = at.indices(len(self.plain))
        if step != 1:
            raise ValueError(f"a step of 1 is expected, found {step}")
        return self.part(start, stop)

    def characters(self) -> list[str]:
        """Returns the characters, each with the marks at its ends."""
        return [self.part(i, i + 1) for i in range(len(self.plain))]

    def remarked(self, changed: str) -> str:
        """Returns a text of the same length as `plain` with the marks in the same places."""
        if not changed:
            return ""
        pieces, last = [], 0
        for place in self._marks:
            pieces += [changed[last:place], self._mark]
            last = place
        return "".join([*pieces, changed[last:]])

    def call(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns what the method of str returns, NotImplemented if marks do not disturb it."""
        bare = [self._bare(value) for value in args]
        named = {key: self._bare(value) for key, value in kwargs.items()}
        method: Callable[..., Any] = getattr(self.plain, name)
        if name in _ANSWERS:
            return method(*bare, **named)
        if name in _PARTS:
            return self._stripped(name, method(*bare, **named), bare)
        if name in ("split", "rsplit"):
            separator = bare[0] if bare else named.get("sep")
            return list(self._between(method(*bare, **named), separator))
        if name in ("partition", "rpartition"):
            return tuple(self._between(method(*bare, **named), ""))
        if name == "splitlines":
            whole = self.plain.splitlines(True)
            starts = accumulate(map(len, whole), initial=0)
            lines = zip(starts, method(*bare, **named), strict=False)
            return [self.part(start, start + len(line)) for start, line in lines]
        if name == "replace":
            method(*bare, **named)  # so that wrong arguments raise what str raises
            count = args[2] if len(args) > 2 else kwargs.get("count", -1)
            return self._replaced(bare[0], args[1], count)
        if name in _CASES:
            changed = method()
            return self.remarked(changed) if len(changed) == len(self.plain) else NotImplemented
        if name in _PADDED:
            return self._padded(name, method(*bare), bare)
        return NotImplemented

    def _stripped(self, name: str, found: str, bare: list[Any]) -> str:
        start = 0
        if name == "removeprefix":
            start = len(self.plain) - len(found)
        elif name in ("strip", "lstrip"):
            start = len(self.plain) - len(self.plain.lstrip(*bare))
        return self.part(start, start + len(found))

    def _between(self, parts: Iterator[str], separator: str | None) -> Iterator[str]:
        """Yields the parts of `plain` between separators; None separates at white space."""
        at = 0
        for part in parts:
            if separator is None:
                at = self.plain.index(part, at)
            yield self.part(at, at + len(part))
            at += len(part) + len(separator or "")

    def _replaced(self, old: str, new: str, count: int) -> str:
        if old:
            return new.join(self._between(iter(self.plain.split(old, count)), old))
        parts = ["", *self.characters(), ""]  # between any two characters, and at both ends
        if 0 <= count < len(parts) - 1:
            parts = [*parts[:count], self.part(max(count - 1, 0), len(self.plain))]
        return new.join(parts)

    def _padded(self, name: str, changed: str, bare: list[Any]) -> str:
        n = len(self.plain)
        if len(changed) == n:
            return self.part(0, n)
        fill = changed[0] if name != "ljust" else changed[-1]
        other = "a" if fill != "a" else "b"
        left = getattr(other * n, name)(*bare).find(other) if n else 0
        return changed[:left] + self._text + changed[left + n :]

    def _bare(self, value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(self._mark, "")
        return tuple(map(self._bare, value)) if isinstance(value, tuple) else value
