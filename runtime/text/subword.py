"""The subword algorithms, which turn plain text without special tokens into token ids.

Every class has `encode(text) -> list[int]` for one run of plain text. All are exact, in Python:
merging runs once per distinct word (words repeat, so a dictionary of words does most of the work)
and needs no index beyond the dictionaries of the vocabulary, so that a tokenizer is ready in a
fraction of the time that a library takes to index 500,000 merges.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import insort
from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from typing import Protocol

from .normalizers import PrecompiledMap
from .vocabulary import Ids, spelled_bytes

SPACE = "▁"  # how SentencePiece writes a space inside a token

_CACHED_WORDS = 1 << 15
_CACHED_WORD_LENGTH = 48
_UNKNOWN_PENALTY = 10.0  # SentencePiece: an unknown character scores this much below the worst


class Subword(Protocol):
    """The interface that all algorithms of this file share."""

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of one run of plain text."""
        ...


def byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's alphabet: the byte that each character of a byte-level token stands for."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(shown)]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def byte_fallback(ids: Ids, unk: int | None) -> Callable[[str], list[int]]:
    """Returns what encodes a piece without a token: as <0xXX> bytes, else as `unk` if any."""

    def fallback(piece: str) -> list[int]:
        found = [ids.get(f"<0x{byte:02X}>") for byte in piece.encode()]
        known = [i for i in found if i is not None]
        if len(known) == len(found):
            return known
        return known if unk is None else [unk]

    return fallback


class Merges:
    """Byte-pair merging of one word: the cheapest adjacent pair first, the leftmost among equals.

    cost: the cost of a pair by its key, left + joint + right; None if it cannot be merged. For
    merge lists it is the rank, for SentencePiece the negated score of the joined token (and `joint`
    is empty).
    """

    def __init__(
        self,
        ids: Ids,
        cost: Callable[[str], float | None],
        joint: str,
        fallback: Callable[[str], list[int]],
    ) -> None:
        self._ids = ids
        self._cost = cost
        self._joint = joint
        self._fallback = fallback
        self._words: dict[str, tuple[int, ...]] = {}

    def word(self, word: str) -> tuple[int, ...]:
        """Returns the token ids of one word."""
        known = self._words.get(word)
        if known is not None:
            return known
        ids: list[int] = []
        for piece in self._merge(word):
            found = self._ids.get(piece)
            if found is None:
                ids += self._fallback(piece)
            else:
                ids.append(found)
        result = tuple(ids)
        if len(word) <= _CACHED_WORD_LENGTH:
            if len(self._words) >= _CACHED_WORDS:
                self._words.clear()
            self._words[word] = result
        return result

    def _merge(self, word: str) -> list[str]:
        pieces = list(word)
        count = len(pieces)
        if count < 2:
            return pieces
        cost, joint = self._cost, self._joint
        after = list(range(1, count + 1))
        before = list(range(-1, count - 1))
        heap: list[tuple[float, int, int, str]] = []
        for i in range(count - 1):
            key = pieces[i] + joint + pieces[i + 1]
            c = cost(key)
            if c is not None:
                heap.append((c, i, i + 1, key))
        heapify(heap)
        while heap:
            _, left, right, key = heappop(heap)
            # A piece that was merged away is empty, so a changed pair no longer spells its key.
            if not pieces[right] or pieces[left] + joint + pieces[right] != key:
                continue
            pieces[left] += pieces[right]
            pieces[right] = ""
            following = after[left] = after[right]
            if following < count:
                before[following] = left
                key = pieces[left] + joint + pieces[following]
                c = cost(key)
                if c is not None:
                    heappush(heap, (c, left, following, key))
            previous = before[left]
            if previous >= 0:
                key = pieces[previous] + joint + pieces[left]
                c = cost(key)
                if c is not None:
                    heappush(heap, (c, previous, left, key))
        return [piece for piece in pieces if piece]


class ByteLevelBpe:
    """GPT-2's byte-level BPE.

    split: cuts text into words in the byte alphabet (pretokenizers.byte_level_words).
    whole_words: whether a word that is a token is taken whole (ignore_merges).
    """

    def __init__(
        self,
        ids: Ids,
        cost: Callable[[str], float | None],
        joint: str,
        split: Callable[[str], list[str]],
        whole_words: bool,
    ) -> None:
        self._ids = ids
        self._split = split
        self._whole_words = whole_words
        # A character here is one byte. Bytes that have no token are dropped before merging, as in
        # HF tokenizers, so that their neighbours can merge.
        self._without_token = {ord(c): None for c in byte_alphabet() if c not in ids}
        self._merges = Merges(ids, cost, joint, lambda piece: [ids[c] for c in piece if c in ids])

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of one run of plain text."""
        out: list[int] = []
        for word in self._split(text):
            whole = self._ids.get(word) if self._whole_words else None
            if whole is not None:
                out.append(whole)
                continue
            known = word.translate(self._without_token) if self._without_token else word
            out += self._merges.word(known)
        return out


class EscapedBpe:
    """Merging over whole lines in which "▁" stands for a space: SentencePiece BPE, and Gemma 4.

    If no token contains "x▁", no merge can cross that place, so the text is cut there and each
    part is merged (and cached) on its own; the result is the same.

    newlines: whether runs of newlines are cut out first, and taken whole if they are a token.
    """

    def __init__(self, ids: Ids, merges: Merges, spellings: str, *, newlines: bool) -> None:
        """Takes all tokens in `spellings`, separated by NUL characters."""
        self._ids = ids
        self._merges = merges
        self._newlines = newlines
        before = {part[-1:] for part in spellings.split(SPACE)[:-1]}
        crossed = "".join(sorted(before - {"", "\0"}))
        part = f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"
        if crossed:
            part = f"(?:{part})(?:(?<=[{re.escape(crossed)}]){SPACE}+[^{SPACE}]*)*"
        self._parts = re.compile(part).findall

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of one run of plain text."""
        text = text.replace(" ", SPACE)
        out: list[int] = []
        if not self._newlines:
            for part in self._parts(text):
                out += self._merges.word(part)
            return out
        for line in re.findall(r"[^\n]+|\n+", text):
            if line[0] == "\n":
                whole = self._ids.get(line)
                out += self._merges.word(line) if whole is None else (whole,)
            else:
                for part in self._parts(line):
                    out += self._merges.word(part)
        return out


class Unigram:
    """SentencePiece's unigram model, which finds the segmentation of highest total score (Viterbi).

    scores: token -> (score, id) of the tokens that may be matched.
    """

    def __init__(
        self,
        scores: Mapping[str, tuple[float, int]],
        unk: int,
        lowest: float,
        charsmap: PrecompiledMap | None,
        *,
        add_space_prefix: bool,
        remove_extra_whitespaces: bool,
    ) -> None:
        self._scores = scores
        self._unk = unk
        self._unk_score = lowest - _UNKNOWN_PENALTY
        self._charsmap = charsmap
        self._add_space_prefix = add_space_prefix
        self._remove_extra_whitespaces = remove_extra_whitespaces
        # The token lengths in characters by first character are those worth looking up at a place.
        lengths: dict[str, list[int]] = {}
        for token in scores:
            if token:
                known = lengths.setdefault(token[0], [])
                if len(token) not in known:
                    insort(known, len(token))
        self._lengths = lengths

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of one run of plain text."""
        text = self._normalize(text)
        n = len(text)
        best = [0.0] + [float("-inf")] * n  # by end position, in characters
        back: list[tuple[int, int]] = [(self._unk, 0)] * (n + 1)  # token, its start
        for start in range(n):
            score = best[start]
            single = False
            for length in self._lengths.get(text[start], ()):
                end = start + length
                if end > n:
                    break
                found = self._scores.get(text[start:end])
                if found is None:
                    continue
                single = single or length == 1
                if score + found[0] > best[end]:
                    best[end] = score + found[0]
                    back[end] = (found[1], start)
            if not single and score + self._unk_score > best[start + 1]:
                best[start + 1] = score + self._unk_score
                back[start + 1] = (self._unk, start)
        out: list[int] = []
        end = n
        while end > 0:
            token, end = back[end]
            if not (out and out[-1] == token == self._unk):  # a run of unknowns is one
                out.append(token)
        out.reverse()
        return out

    def _normalize(self, text: str) -> str:
        pieces: list[str] = []
        inside = False  # within a run of characters other than spaces
        prefix = self._add_space_prefix
        merge = self._remove_extra_whitespaces
        if self._charsmap is not None:
            text = self._charsmap.mapped(text)
        for char in text:
            if char != " ":
                if not inside and (prefix or merge):
                    pieces.append(SPACE)
                    prefix = False
                inside = True
                pieces.append(char)
            else:
                inside = False
                if not merge:
                    pieces.append(SPACE)
        return "".join(pieces)


class WordPiece:
    """BERT's WordPiece over a vocabulary that marks the start of a word with "▁".

    The text is lowercased and stripped of accents (NFD, marks dropped) as asked; punctuation and
    each CJK ideograph are words of their own; a word is cut into the longest tokens from the
    left, or is `unk` if that does not cover it.
    """

    def __init__(
        self, ids: Ids, longest: int, unk: int, *, lowercase: bool, strip_accents: bool
    ) -> None:
        """Takes in `longest` the characters of the longest token."""
        self._ids = ids
        self._unk = unk
        self._lowercase = lowercase
        self._strip_accents = strip_accents
        self._longest = longest
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of one run of plain text."""
        out: list[int] = []
        for word in self._split(text):
            known = self._words.get(word)
            if known is None:
                known = self._word(SPACE + word)
                if len(self._words) >= _CACHED_WORDS:
                    self._words.clear()
                self._words[word] = known
            out += known
        return out

    def _word(self, word: str) -> list[int]:
        out: list[int] = []
        start = 0
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                found = self._ids.get(word[start:end])
                if found is not None:
                    out.append(found)
                    start = end
                    break
            else:
                return [self._unk]
        return out

    def _split(self, text: str) -> list[str]:
        if self._strip_accents:
            text = unicodedata.normalize("NFD", text)
        marked: list[str] = []
        for char in text:
            category = unicodedata.category(char)
            if category[0] == "Z" or char in "\t\n\v\f\r\x85":
                marked.append(" ")
            elif (
                category[0] == "C" or char == "\ufffd" or (self._strip_accents and category == "Mn")
            ):
                continue
            elif _is_word(char, category):
                marked.append(f" {char} ")
            else:
                marked.append(char)
        joined = "".join(marked)
        return (joined.lower() if self._lowercase else joined).split()


def _is_word(char: str, category: str) -> bool:
    """Returns whether a character is a BERT word of its own: punctuation, or a CJK ideograph."""
    if category[0] == "P" or (char < "\x7f" and category[0] == "S"):
        return True
    # These are the ranges of BERT's own tokenizer (U+2B920 as in its Rust port).
    point = ord(char)
    return point >= 0x3400 and (
        0x4E00 <= point <= 0x9FFF
        or 0x3400 <= point <= 0x4DBF
        or 0xF900 <= point <= 0xFAFF
        or 0x20000 <= point <= 0x2A6DF
        or 0x2A700 <= point <= 0x2B81F
        or 0x2B920 <= point <= 0x2CEAF
        or 0x2F800 <= point <= 0x2FA1F
    )


class LongestMatch:
    """RWKV's tokenizer: takes the longest token at every byte, `unk` for a byte without one."""

    def __init__(self, tokens: Mapping[bytes, int], unk: int | None) -> None:
        self._tokens = tokens
        self._unk = unk
        lengths: dict[bytes, set[int]] = {}
        for token in tokens:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of one run of plain text."""
        data = text.encode()
        out: list[int] = []
        at = 0
        while at < len(data):
            step = 1
            token = self._tokens.get(data[at : at + 1], self._unk)
            for length in self._lengths.get(data[at : at + 2], ()):
                found = self._tokens.get(data[at : at + length])
                if found is not None and length > 1:
                    token, step = found, length
                    break
            if token is not None:
                out.append(token)
            at += step
        return out


def unescape_rwkv(spelling: str) -> bytes:
    r"""Returns the bytes of an RWKV token, which is spelled with \t, \n, \r and \x00 escapes."""
    out = bytearray()
    at = 0
    while at < len(spelling):
        char = spelling[at]
        if char != "\\" or at + 1 == len(spelling):
            out += spelled_bytes(char)
            at += 1
            continue
        code = spelling[at + 1]
        if code == "x":
            try:
                out.append(int(spelling[at + 2 : at + 4], 16))
            except ValueError:
                raise ValueError(f"bad escape in token {spelling!r}") from None
            at += 4
            continue
        out += {"t": b"\t", "n": b"\n", "r": b"\r"}.get(code, spelled_bytes(code))
        at += 2
    return bytes(out)
