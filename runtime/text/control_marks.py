"""Marks that keep what clients write from being read as control tokens.

A prompt is text, so nothing in it says whether the template or a user wrote an "<|im_end|>". A
mark, which is a character that occurs nowhere else, is therefore put into each spelling of a
control token that a client has written, behind its first character. After the template has
rendered, the tokenizer finds only the spellings without a mark, and removes the marks from the
rest before it encodes that.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

from ..base.errors import ChatTemplateError
from .marked_text import MarkedText

# These are noncharacters of Unicode, which no text that is meant to be read contains.
_NONCHARACTERS = tuple(chr(c) for c in range(0xFDD0, 0xFDF0))
_FIND_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
# Templates build control tokens from these role names: '<|' + message.role + '|>'.
_ROLES = frozenset(
    ("system", "developer", "user", "assistant", "tool", "function", "ipython", "platform")
)

# Filters that return a number about a text, and the arguments of some others with their defaults.
_NUMBERS = frozenset(("count", "filesizeformat", "float", "int", "length", "wordcount"))
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "center": {"width": 80},
    "replace": {"old": None, "new": None, "count": None},
    "trim": {"chars": None},
    "truncate": {"length": 255, "killwords": False, "end": "...", "leeway": None},
}
# Filters that compare items, and their arguments.
ORDERING = {
    "dictsort": ("case_sensitive", "by", "reverse"),
    "groupby": ("attribute", "default", "case_sensitive"),
    "max": ("case_sensitive", "attribute"),
    "min": ("case_sensitive", "attribute"),
    "sort": ("reverse", "case_sensitive", "attribute"),
    "unique": ("case_sensitive", "attribute"),
}


class ControlSpellings:
    """The spellings of a vocabulary's control tokens; immutable."""

    def __init__(self, spellings: Iterable[str], defined: Iterable[str] = ()) -> None:
        """Indexes the spellings; `defined` are those of user-defined tokens.

        The tokenizer finds user-defined tokens everywhere. Only those matter here that can swallow
        a control token or its beginning, as "<<" does of "<|end|>".
        """
        self._sorted = sorted({s for s in spellings if len(s) > 1})
        self._insides = "\n".join(s[1:-1] for s in self._sorted)
        lengths: dict[str, set[int]] = {}
        for spelling in self._sorted:
            lengths.setdefault(spelling[:2], set()).add(len(spelling))
        self._lengths = {head: sorted(found) for head, found in lengths.items()}
        self._known = frozenset(self._sorted)
        heads = "|".join(map(re.escape, self._lengths))
        self._heads = re.compile(f"(?=({heads}))") if heads else None
        self._swallowing = sorted({d for d in defined if self._swallows(d)})
        self._open = sorted({*self._sorted, *self._swallowing})
        self._backwards = sorted(s[::-1] for s in self._open)
        signs = {s[0] for s in self._open if not s[0].isalnum() and not s[0].isspace()}
        self._signs = re.compile(f"[{re.escape(''.join(sorted(signs)))}]") if signs else None
        self._longest = max(map(len, self._open), default=0)

    def __bool__(self) -> bool:
        return bool(self._sorted)

    def whole(self, text: str) -> dict[int, int]:
        """Returns where spellings begin in `text`, nested ones included, with the longest's end."""
        if self._heads is None:
            return {}
        found = {}
        for head in self._heads.finditer(text):
            begin = head.start()
            for n in self._lengths[head[1]]:  # from the shortest on
                spelling = text[begin : begin + n]  # shorter than n where the text ends
                if spelling in self._known:
                    found[begin] = begin + len(spelling)
        return found

    def spans(self, text: str, places: Iterable[int]) -> list[tuple[int, int]]:
        """Returns (begin, end) of each spelling in `text`, and of what swallows one, in order.

        places: indices of the text, ascending; spellings far from all of them are left out.
        """
        reach = self._longest  # characters of the longest spelling, or of what swallows one
        windows: list[list[int]] = []
        for place in places:
            if windows and place - reach <= windows[-1][1]:
                windows[-1][1] = place + 2 * reach
            else:
                windows.append([max(0, place - reach), place + 2 * reach])
        return [
            (start + begin, start + end)
            for start, stop in windows
            for begin, end in self._all_spans(text[start:stop])
        ]

    def _all_spans(self, text: str) -> list[tuple[int, int]]:
        control = self.whole(text)
        begins = sorted(control)
        found = list(control.items())
        for spelling in self._swallowing:
            begin = text.find(spelling)
            while begin >= 0:
                end = begin + len(spelling)
                if bisect_left(begins, begin) < bisect_left(begins, end):
                    found.append((begin, end))
                begin = text.find(spelling, begin + 1)
        return sorted(found)

    def _swallows(self, defined: str) -> bool:
        if len(defined) < 2:
            return False
        inside = range(1, len(defined))
        return bool(self.whole(defined)) or any(
            _begins_longer(self._sorted, defined[i:]) for i in inside
        )

    def places(self, text: str) -> set[int]:
        """Returns where marks go: the index of the character that each precedes.

        A mark follows the first character of each spelling, and of each beginning of one that the
        end of the text leaves open. A mark precedes a text that begins with the rest of a spelling
        or lies inside of one, because the template may join it with others. White space at the ends
        is not counted, because templates trim it. And a mark follows each sign that spellings begin
        with, such as "<", because the template may remove what follows it, as "<think>" of
        "<<think>|end|>".
        """
        found = {begin + 1 for begin in self.whole(text)}
        if self._signs is not None:
            found.update(sign.end() for sign in self._signs.finditer(text))
        for end in {len(text), len(text.rstrip())}:
            for begin in range(max(0, end - self._longest + 1), end):
                if _begins_longer(self._open, text[begin:end]):
                    found.add(begin + 1)
        bare = text.strip()
        start = len(text) - len(text.lstrip())
        for n in range(1, min(len(bare), self._longest - 1) + 1):
            if _begins_longer(self._backwards, bare[:n][::-1]):
                found.add(start)
        if bare and len(bare) < self._longest and bare in self._insides:
            found.add(start)
        return found


def _begins_longer(ordered: list[str], text: str) -> bool:
    """Returns whether one of the strings, which are in order, begins with `text` and is longer."""
    at = bisect_left(ordered, text)
    at += at < len(ordered) and ordered[at] == text
    return at < len(ordered) and ordered[at].startswith(text)


class ControlMarks:
    """The marks of one rendering.

    mark: the character.
    """

    def __init__(
        self, spellings: ControlSpellings, mark: str, constants: Callable[[], frozenset[str]]
    ) -> None:
        """Takes in `constants` the strings of the template.

        A client's string that equals one is marked at whole spellings only, because templates look
        such strings up, and build tokens from them: '<|' + message.role + '|>'.
        """
        self.mark = mark
        self._spellings = spellings
        self._constants = constants

    def text(self, text: str) -> str:
        """Returns `text` with its marks."""
        places = self._spellings.places(text)
        if places and text in self._constants():
            return self._whole(text)
        return self._marked(text, places)

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns a message of `conversation` with its marks."""
        marked: dict[str, Any] = self.value(message)
        if message["role"] in _ROLES:
            marked["role"] = message["role"]
        return marked

    def value(self, value: Any) -> Any:
        """Returns a value of dict, list and str with marks in all its strings."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self._key(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return value

    def needed(self, text: str) -> str:
        """Returns a rendering with only the marks that are inside a spelling or what swallows one.

        The others are not needed: most strings that end like the beginning of a spelling are
        followed by something else.
        """
        if self.mark not in text:
            return text
        pieces = text.split(self.mark)
        places = accumulate(map(len, pieces[:-1]))
        spans = self._spellings.spans("".join(pieces), places)
        out, at, last, end = [pieces[0]], len(pieces[0]), 0, 0
        for piece in pieces[1:]:
            while last < len(spans) and spans[last][0] < at:
                end = max(end, spans[last][1])
                last += 1
            out += [self.mark, piece] if end > at else [piece]
            at += len(piece)
        return "".join(out)

    def printed(self, value: Any) -> str:
        """Returns a list or mapping as Python prints it, but with its marks unescaped.

        Python prints a mark as an escape, and doubles each backslash that begins no escape.
        """
        escape = re.compile(rf"(?<!\\)((?:\\\\)*)\\u{ord(self.mark):04x}")
        return escape.sub(rf"\g<1>{self.mark}", str(value))

    def plain(self, value: Any) -> Any:
        """Returns a value of dict, list and str without marks."""
        if isinstance(value, str):
            return value.replace(self.mark, "")
        if isinstance(value, dict):
            return {self.plain(key): self.plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return list(map(self.plain, value))
        return tuple(map(self.plain, value)) if isinstance(value, tuple) else value

    # Templates use the methods below, for which a mark is no character of a text.

    def sliced(self, text: str, at: int | slice) -> str:
        """Returns text[at]. Raises IndexError as str does."""
        if self.mark not in text:
            return text[at]
        marked = MarkedText(text, self.mark)
        if isinstance(at, slice) and at.step not in (None, 1):
            return self.text(marked.plain[at])  # characters in another order spell other tokens
        return marked.sliced(at)

    def characters(self, text: str) -> Sequence[str]:
        """Returns the characters of a text."""
        return MarkedText(text, self.mark).characters() if self.mark in text else text

    def method(self, method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns a bound method, or its replacement if its text or arguments have marks.

        Templates search a content, as in content.split('</think>'). If that is a control token,
        the client's spelling has a mark, and the template's own has none.
        """
        text = getattr(method, "__self__", None)
        if not isinstance(text, str) or not self._has_mark(text, *args, *kwargs.values()):
            return method
        marked = MarkedText(text, self.mark)

        def call(*args: Any, **kwargs: Any) -> Any:
            found = marked.call(method.__name__, args, kwargs)
            return method(*args, **kwargs) if found is NotImplemented else found

        return call

    def filtered(
        self,
        name: str,
        original: Callable[..., Any],
        text: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Applies a filter of Jinja to a text. original: the filter itself."""
        if not self._has_mark(text, *args, *kwargs.values()):
            return original(text, *args, **kwargs)
        marked = MarkedText(text, self.mark)
        names = _ARGUMENTS.get(name, {})
        given = {**names, **dict(zip(names, args, strict=False)), **kwargs}
        found: Any = NotImplemented
        if name in _NUMBERS:
            return original(marked.plain, *args, **kwargs)
        if name == "trim":
            found = marked.call("strip", (given["chars"],), {})
        elif name == "center":
            found = marked.call("center", (given["width"],), {})
        elif name == "replace" and isinstance(given["old"], str):
            count = -1 if given["count"] is None else given["count"]
            found = marked.call("replace", (given["old"], str(given["new"]), count), {})
        elif name in ("capitalize", "lower", "title", "upper"):
            changed = original(marked.plain)
            if len(changed) == len(marked.plain):
                found = marked.remarked(changed)
        elif name == "truncate":
            short = original(marked.plain, *args, **kwargs)
            cut = len(short) - len(given["end"])
            found = text if short == marked.plain else marked.part(0, cut) + given["end"]
        elif name in ("reverse", "urlencode"):
            found = self.text(original(marked.plain))
        return original(text, *args, **kwargs) if found is NotImplemented else found

    def ordered(
        self,
        name: str,
        original: Callable[..., Any],
        value: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Applies a filter of ORDERING to a list or mapping, comparing its items without marks."""
        if name == "dictsort":
            triples = [
                (self.plain(key), self.plain(item), (key, item)) for key, item in value.items()
            ]
            found = original(SimpleNamespace(items=lambda: triples), *args, **kwargs)
            return [triple[2] for triple in found]
        items = list(value)
        pairs = [{"plain": self.plain(item), "item": item} for item in items]
        if all(pair["plain"] == pair["item"] for pair in pairs):
            return original(items, *args, **kwargs)
        given = {**dict(zip(ORDERING[name], args, strict=False)), **kwargs}
        attribute = given.get("attribute")
        parts = [] if attribute is None else str(attribute).split(",")
        given["attribute"] = ",".join(f"plain.{part}" for part in parts) or "plain"
        found = original(pairs, **given)
        if name in ("max", "min"):
            return found["item"]
        if name == "groupby":
            return [
                group._replace(
                    grouper=self.value(group.grouper), list=[pair["item"] for pair in group.list]
                )
                for group in found
            ]
        return [pair["item"] for pair in found]

    def _has_mark(self, *values: Any) -> bool:
        return any(isinstance(v, (str, tuple)) and self.plain(v) != v for v in values)

    def _key(self, key: Any) -> Any:
        """Marks a key; an identifier, which templates read as an attribute, at whole spellings."""
        if not isinstance(key, str):
            return key
        return self._whole(key) if key.isidentifier() else self.text(key)

    def _whole(self, text: str) -> str:
        return self._marked(text, {begin + 1 for begin in self._spellings.whole(text)})

    def _marked(self, text: str, places: set[int]) -> str:
        pieces, last = [], 0
        for place in sorted(places):
            pieces += [text[last:place], self.mark]
            last = place
        return "".join([*pieces, text[last:]])


def unused_mark(values: Iterable[Any]) -> str:
    """Returns a noncharacter that none of the values (dict, list, str) has. ChatTemplateError."""
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
