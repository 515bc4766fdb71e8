"""Cuts special tokens (control, unknown and user-defined ones) out of a text before all else."""

from __future__ import annotations

import re

from .vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Metadata, Vocabulary

_ASCII_SPACE = " \t\n\v\f\r"


class SpecialTokens:
    """An index of a vocabulary's special tokens; immutable."""

    def __init__(self, vocabulary: Vocabulary, get: Metadata, pre: str) -> None:
        """Indexes the special tokens; pre: tokenizer.ggml.pre."""
        self._tokens = vocabulary.tokens
        self._types = {
            i: kind
            for i, kind in vocabulary.types.items()
            if kind in (CONTROL, UNKNOWN, USER_DEFINED)
        }
        # The tokens are indexed by their first three characters: a text that does not contain these
        # contains none of the tokens; thousands of reserved tokens usually share them.
        self._heads: dict[str, list[int]] = {}
        for i in self._types:
            self._heads.setdefault(self._tokens[i][:3], []).append(i)
        self._strip_right, self._strip_left = self._stripping(vocabulary, get, pre)

    def partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Cuts a text into runs of plain text and ids: the leftmost token first, then the longest.

        parse_special: control and unknown tokens are cut out as well, not only user-defined ones.
        """
        found = {
            self._tokens[token]: token
            for head, tokens in self._heads.items()
            if head in text
            for token in tokens
            if (parse_special or self._types[token] == USER_DEFINED) and self._tokens[token] in text
        }
        if not found:
            return [text] if text else []
        longest_first = sorted(found, key=len, reverse=True)
        parts: list[str | int] = []
        start = 0
        for match in re.finditer("|".join(map(re.escape, longest_first)), text):
            token = found[match[0]]
            run = text[start : match.start()]
            start = match.end()
            if parts and parts[-1] in self._strip_right:
                run = run.lstrip(_ASCII_SPACE)
            if token in self._strip_left:
                run = run.rstrip(_ASCII_SPACE)
            parts += (run, token) if run else (token,)
        rest = text[start:]
        if parts[-1] in self._strip_right:
            rest = rest.lstrip(_ASCII_SPACE)
        return [*parts, rest] if rest else parts

    def _stripping(
        self, vocabulary: Vocabulary, get: Metadata, pre: str
    ) -> tuple[frozenset[int], frozenset[int]]:
        """Returns the special tokens that swallow white space after them, and those before them.

        GGUF files do not say which do, so the architecture decides: a title (general.name) tells
        nothing certain about a vocabulary. Phi 3's vocabulary is SentencePiece; Phi 4, which is of
        the same architecture, has another kind.
        """
        architecture = str(get("general.architecture") or "")
        if pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code") or architecture in (
            "nomic-bert-moe",
            "jina-bert-v3",
        ):
            mask = vocabulary.ids.get("<mask>")
            return frozenset(), frozenset(() if mask is None else (mask,))
        if architecture == "phi3" and get("tokenizer.ggml.model") == "llama":
            kept = {vocabulary.ids.get(t) for t in ("<unk>", "<s>", "<|endoftext|>")}
            return frozenset(i for i in self._types if i not in kept), frozenset()
        if architecture == "modern-bert":
            mask = vocabulary.ids.get("[MASK]")
            return frozenset(), frozenset(() if mask is None else (mask,))
        return frozenset(), frozenset()
