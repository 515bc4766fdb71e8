"""The vocabulary of a GGUF file: spellings, types and ids from its tokenizer.ggml.* metadata.

A file's strings reach Python as UTF-8 with "surrogateescape": a byte that is not UTF-8 becomes one
of U+DC80 to U+DCFF, and `spelled_bytes` gives the bytes back as they stand in the file.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from ..base.errors import TokenizerError

# tokenizer.ggml.token_type, from the GGUF specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

Metadata = Callable[[str], Any]  # returns the value of a metadata key, None if absent


class Ids(Protocol):
    """A mapping of spellings to numbers; of equal spellings the last one counts."""

    def get(self, spelling: str, /) -> int | None:
        """Returns the number of a spelling, None if there is none."""

    def __contains__(self, spelling: object, /) -> bool: ...
    def __getitem__(self, spelling: str, /) -> int: ...


class Spellings(Protocol):
    """Spellings by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> str: ...
    def __iter__(self) -> Iterator[str]: ...


class StringArray(Spellings, Protocol):
    """An array of strings that stays in its file (_core.Strings)."""

    @property
    def ids(self) -> Ids:
        """The numbers of the strings by their text."""


# Returns the array of strings of a metadata key, None if there is none.
Strings = Callable[[str], "StringArray | None"]


class Vocabulary:
    """The tokens of a file.

    tokens: spellings by id. ids: ids by spelling (of equal spellings the last). types: types by id
    of the tokens that are not NORMAL. typed: whether the file has types at all.
    """

    tokens: Spellings
    ids: Ids

    def __init__(self, get: Metadata, strings: Strings | None = None) -> None:
        """Reads the vocabulary; `strings` returns the file's own arrays, which need no copies.

        Raises TokenizerError if tokenizer.ggml.tokens is missing, or it or token_type malformed.
        """
        inside = None if strings is None else strings("tokenizer.ggml.tokens")
        if inside is not None and len(inside) and "" not in inside.ids:
            self.tokens, self.ids = inside, inside.ids
        else:
            copied = _tokens(get)
            self.tokens = copied
            self.ids = dict(zip(copied, range(len(copied)), strict=True))
        found = _types(get, len(self.tokens))
        self.typed = found is not None
        self.types: dict[int, int] = found or {}

    def __len__(self) -> int:
        return len(self.tokens)

    def known(self, token: int | None) -> int | None:
        """Returns the id itself, None for one outside the vocabulary."""
        return token if token is not None and 0 <= token < len(self.tokens) else None

    def named(self, get: Metadata, key: str, default: int | None = None) -> int | None:
        """Returns the id in tokenizer.ggml.`key`; one outside the vocabulary (often -1) is None."""
        value = get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        try:
            token = int(value)
        except (TypeError, ValueError, OverflowError):
            raise TokenizerError(
                f"tokenizer.ggml.{key}: expected a token id, found {value!r:.40}"
            ) from None
        return self.known(token)

    def scores(self, get: Metadata) -> Sequence[float]:
        """Returns the scores by id, float32. TokenizerError if they are missing or too few."""
        scores = get("tokenizer.ggml.scores")
        if not is_list(scores) or len(scores) < len(self):
            raise TokenizerError(
                f"tokenizer.ggml.scores: expected {len(self)} values, "
                f"found {len(scores) if is_list(scores) else 'none'}"
            )
        try:
            return array("f", scores[: len(self)])
        except TypeError:
            raise TokenizerError(
                "tokenizer.ggml.scores: expected numbers, found other values"
            ) from None


def merge_ranks(get: Metadata, strings: Strings | None = None) -> Ids:
    """Returns the ranks of tokenizer.ggml.merges, "left right"; TokenizerError without any."""
    inside = None if strings is None else strings("tokenizer.ggml.merges")
    if inside is not None:
        return inside.ids
    ranks = list(merges(get))
    return dict(zip(ranks, range(len(ranks)), strict=True))


def merges(get: Metadata) -> Sequence[str]:
    """Returns tokenizer.ggml.merges, "left right" by rank. TokenizerError if there are none."""
    ranks = get("tokenizer.ggml.merges")
    if not is_list(ranks):
        raise TokenizerError("tokenizer.ggml.merges: expected a list of merges, found none")
    if set(map(type, ranks)) - {str}:
        raise TokenizerError("tokenizer.ggml.merges: expected strings, found other values")
    found: Sequence[str] = ranks
    return found


def string(get: Metadata, key: str, default: str) -> str:
    """Returns a string of the metadata, `default` if absent."""
    value = get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise TokenizerError(f"{key}: expected a string, found {value!r:.40}")
    return value


def flag(get: Metadata, key: str, default: bool) -> bool:
    """Returns a boolean of the metadata, `default` if absent."""
    value = get(key)
    return default if value is None else bool(value)


def is_list(value: object) -> bool:
    """Returns whether a metadata value is an array."""
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes))


def spelled_bytes(spelling: str) -> bytes:
    """Returns the bytes of a spelling as they are in the file, which need not be UTF-8."""
    return spelling.encode("utf-8", "surrogateescape")


def _tokens(get: Metadata) -> list[str]:
    tokens = get("tokenizer.ggml.tokens")
    if not is_list(tokens) or not len(tokens):
        raise TokenizerError("tokenizer.ggml.tokens: expected a list of tokens, found none")
    tokens = list(tokens)
    if set(map(type, tokens)) != {str}:
        raise TokenizerError("tokenizer.ggml.tokens: expected strings, found other values")
    try:
        spelled_bytes("".join(tokens))
    except UnicodeEncodeError as error:
        raise TokenizerError(
            "tokenizer.ggml.tokens: expected text or bytes, found half of a surrogate pair "
            f"(U+{ord(error.object[error.start]):04X})"
        ) from None
    if "" in tokens:
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    return tokens


def _types(get: Metadata, count: int) -> dict[int, int] | None:
    types = get("tokenizer.ggml.token_type")
    if types is None:
        return None
    if not is_list(types) or len(types) < count:
        raise TokenizerError(
            f"tokenizer.ggml.token_type: expected {count} values, "
            f"found {len(types) if is_list(types) else type(types).__name__}"
        )
    try:
        packed = bytes(types[:count])
    except (TypeError, ValueError):
        raise TokenizerError(
            "tokenizer.ggml.token_type: expected small integers, found other values"
        ) from None
    return {found.start(): found[0][0] for found in re.finditer(b"[^\1]", packed, re.DOTALL)}
