"""Normalizers, which a tokenizer applies to plain text before it is cut into words.

Each normalizer is a function from text to text: Unicode forms and SentencePiece maps.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable

from .vocabulary import spelled_bytes


def nfc() -> Callable[[str], str]:
    """Returns a function that brings text to Unicode's normalization form C as HF tokenizers does.

    It uses that library's function, because its Unicode version is older than Python's and leaves
    newer combining marks in their order. Text that Python finds normalized is so by the older
    version, too.
    """
    from tokenizers import normalizers

    normalized = normalizers.NFC().normalize_str

    def normalize(text: str) -> str:
        if text.isascii() or unicodedata.is_normalized("NFC", text):
            return text
        return normalized(text)

    return normalize


def squeezed_spaces(text: str) -> str:
    """Removes outer and repeated spaces, as SentencePiece's remove_extra_whitespaces."""
    return re.sub(" {2,}", " ", text.strip(" "))


class PrecompiledMap:
    """SentencePiece's precompiled_charsmap, which replaces the longest matching prefix.

    The blob: uint32 length of a trie in bytes; the trie, a double array of uint32 units (bits
    0-7 label and bit 31, bit 8 has-value, bit 9 wide offset, bits 10-30 offset); then the
    replacements, NUL-terminated UTF-8. Source: SentencePiece's normalizer, and the darts-clone
    library for the unit's layout.
    """

    def __init__(self, blob: bytes, verbatim: Iterable[str] = ()) -> None:
        """Reads the map; `verbatim` are spellings that stay unchanged.

        Raises ValueError if the blob is malformed.
        """
        size = int.from_bytes(blob[:4], "little")
        if len(blob) < 8 or size < 4 or size % 4 or 4 + size > len(blob):
            raise ValueError(f"expected a trie of {size} bytes within {len(blob)}")
        self._units = memoryview(blob[4 : 4 + size]).cast("I")
        self._replacements = blob[4 + size :]
        kept = sorted({spelled_bytes(spelling) for spelling in verbatim}, key=len, reverse=True)
        longest_first = b"|".join(re.escape(spelling) for spelling in kept if spelling)
        self._verbatim = re.compile(longest_first) if longest_first else None

    def replace(self, text: bytes, start: int) -> tuple[bytes, int] | None:
        """Returns the replacement of the longest known prefix at `start`, and that one's bytes."""
        units, best = self._units, None
        node = self._offset(units[0])
        for end in range(start, len(text)):
            byte = text[end]
            node ^= byte
            if byte == 0 or node >= len(units):
                break
            unit = units[node]
            if unit & 0x8000_00FF != byte:
                break
            node ^= self._offset(unit)
            if node >= len(units):
                break
            if unit & 0x100:
                value = units[node] & 0x7FFF_FFFF
                stop = self._replacements.find(b"\0", value)
                if stop >= 0:
                    best = (self._replacements[value:stop], end + 1 - start)
        return best

    def mapped(self, text: str) -> str:
        """Returns the text with every known prefix replaced, from left to right."""
        data = text.encode()
        out = bytearray()
        at = 0
        while at < len(data):
            kept = self._verbatim.match(data, at) if self._verbatim is not None else None
            if kept is not None:
                out += kept[0]
                at = kept.end()
                continue
            found = self.replace(data, at)
            if found is not None:
                out += found[0]
                at += found[1]
                continue
            end = at + 1
            while end < len(data) and data[end] & 0xC0 == 0x80:
                end += 1
            out += data[at:end]
            at = end
        return out.decode(errors="replace")

    @staticmethod
    def _offset(unit: int) -> int:
        return unit >> 10 << ((unit & 0x200) >> 6)
