"""Marks that keep what clients write from being read as control tokens.

A prompt is text: of "<|im_end|>" in it nothing says whether the template or a user wrote it. So a
mark, a character that occurs nowhere else, goes into each spelling of a control token that a
client has written, behind its first character; the template renders, the tokenizer finds only the
spellings without a mark, and takes the marks out of the rest before it encodes that.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

from .errors import ChatTemplateError

# Noncharacters of Unicode: no text that is meant to be read has them.
_NONCHARACTERS = tuple(chr(c) for c in range(0xFDD0, 0xFDF0))
_FIND_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
# Templates build control tokens from these names: '<|' + message.role + '|>'.
_ROLES = frozenset(
    ("system", "developer", "user", "assistant", "tool", "function", "ipython", "platform")
)

# Methods of str that search it for their first argument; those that do from the end; those that
# find all places, where they get so many arguments.
_FROM_THE_END = frozenset({"rsplit", "rpartition", "rfind", "rindex", "endswith", "removesuffix"})
_SEARCHES = _FROM_THE_END | {
    *("split", "partition", "find", "index", "startswith", "removeprefix"),
    *("replace", "count"),
}
_SEARCHES_ALL = {"split": 1, "rsplit": 1, "count": 1, "replace": 2}


class ControlSpellings:
    """The spellings of a vocabulary's control tokens; immutable."""

    def __init__(self, spellings: Iterable[str]) -> None:
        self._sorted = sorted({s for s in spellings if len(s) > 1})
        self._longest = max(map(len, self._sorted), default=0)
        lengths: dict[str, set[int]] = {}
        for spelling in self._sorted:
            lengths.setdefault(spelling[:2], set()).add(len(spelling))
        self._lengths = {head: sorted(found) for head, found in lengths.items()}
        self._known = frozenset(self._sorted)
        heads = "|".join(map(re.escape, self._lengths))
        self._heads = re.compile(f"(?=({heads}))") if heads else None

    def __bool__(self) -> bool:
        return bool(self._sorted)

    def whole(self, text: str) -> dict[int, int]:
        """Where in `text` spellings begin, those inside of others too, and the longest's end."""
        if self._heads is None:
            return {}
        found = {}
        for head in self._heads.finditer(text):
            begin = head.start()
            for n in self._lengths[head[1]]:  # from the shortest on
                if text[begin : begin + n] in self._known:
                    found[begin] = begin + n
        return found

    def unfinished(self, text: str) -> set[int]:
        """Where spellings begin that the end of `text` leaves open.

        Of the text without the white space at its end, too: templates trim.
        """
        found = set()
        for end in {len(text), len(text.rstrip())}:
            for begin in range(max(0, end - self._longest + 1), end):
                tail = text[begin:end]
                at = bisect_left(self._sorted, tail)
                # The next in order is longer, if it is not the tail itself.
                at += at < len(self._sorted) and self._sorted[at] == tail
                if at < len(self._sorted) and self._sorted[at].startswith(tail):
                    found.add(begin)
        return found

    def around(self, text: str) -> bool:
        """Whether a spelling has `text` inside, neither at its beginning nor at its end."""
        return any(text in spelling[1:-1] for spelling in self._sorted)


class ControlMarks:
    """The marks of one rendering.

    mark: the character.
    """

    def __init__(
        self, spellings: ControlSpellings, mark: str, constants: Callable[[], frozenset[str]]
    ) -> None:
        """constants: of the template. A client's string that equals one of them ends in no mark.

        Otherwise a vocabulary with a control token that begins with "m" would change "system".
        """
        self.mark = mark
        self._spellings = spellings
        self._constants = constants

    def text(self, text: str) -> str:
        """`text` with its marks."""
        places = set(self._spellings.whole(text))
        unfinished = self._spellings.unfinished(text) - places
        if unfinished and text not in self._constants():
            places |= unfinished
        return self._marked(text, places)

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message of `conversation` with its marks."""
        marked: dict[str, Any] = self.value(message)
        role = message["role"]
        if (
            marked["role"] == role
            and role not in _ROLES
            and role not in self._constants()
            and self._spellings.around(role)
        ):
            marked["role"] = self._marked(role, {0})
        return marked

    def value(self, value: Any) -> Any:
        """A value of dict, list and str with marks in all its strings."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self._key(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return value

    def needed(self, text: str) -> str:
        """A rendering with those marks alone that are inside of a control token's spelling.

        Most strings that end like the beginning of one are followed by something else.
        """
        if self.mark not in text:
            return text
        pieces = text.split(self.mark)
        spans = sorted(self._spellings.whole("".join(pieces)).items())
        out, at, last, end = [pieces[0]], len(pieces[0]), 0, 0
        for piece in pieces[1:]:
            while last < len(spans) and spans[last][0] < at:
                end = max(end, spans[last][1])
                last += 1
            out += [self.mark, piece] if end > at else [piece]
            at += len(piece)
        return "".join(out)

    def printed(self, value: Any) -> str:
        """A list or mapping as Python prints it, but with the marks as they are.

        Python prints a mark as an escape, and doubles each backslash that is no escape's.
        """
        escape = re.compile(rf"(?<!\\)((?:\\\\)*)\\u{ord(self.mark):04x}")
        return escape.sub(rf"\g<1>{self.mark}", str(value))

    def searching(self, method: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """A call of a method of str, so that it finds what a client wrote: (method, arguments).

        Templates look into a content, as in content.split('</think>'), and where that is a control
        token the client's spelling has a mark, and the template's own has none.
        """
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if not isinstance(text, str) or name not in _SEARCHES:
            return method, args
        plain, marked = args[0], self.text(args[0])
        if marked == plain or marked not in text:
            return method, args
        if plain in text:
            if _SEARCHES_ALL.get(name) == len(args):
                # None of the places is left, so that what a client wrote needs no mark there.
                return getattr(text.replace(marked, plain), name), args
            if name in _FROM_THE_END:
                nearer = text.rfind(plain) > text.rfind(marked)
            else:
                nearer = text.find(plain) < text.find(marked)
            if nearer:
                return method, args
        return method, (marked, *args[1:])

    def _key(self, key: Any) -> Any:
        """Templates read identifiers as attributes: these end in no mark."""
        if not isinstance(key, str):
            return key
        if key.isidentifier():
            return self._marked(key, set(self._spellings.whole(key)))
        return self.text(key)

    def _marked(self, text: str, places: set[int]) -> str:
        if not places:
            return text
        pieces, last = [], 0
        for place in sorted(places):
            pieces += [text[last : place + 1], self.mark]
            last = place + 1
        return "".join([*pieces, text[last:]])


def unused_mark(values: Iterable[Any]) -> str:
    """A noncharacter that none of the values (dict, list, str) has. ChatTemplateError."""
    found: set[str] = set()
    rest = list(values)
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            if not value.isascii():
                found.update(_FIND_NONCHARACTERS.findall(value))
        elif isinstance(value, dict):
            rest += value
            rest += value.values()
        elif isinstance(value, (list, tuple)):
            rest += value
    free = next((c for c in _NONCHARACTERS if c not in found), None)
    if free is None:
        raise ChatTemplateError(
            "messages: expected text that leaves one of the noncharacters U+FDD0 to U+FDEF "
            "unused, found all of them (parse_special=True needs none)"
        )
    return free
