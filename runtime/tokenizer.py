"""Text to token ids and back, built from the tokenizer.ggml.* metadata of a GGUF file."""

from __future__ import annotations

import codecs
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .errors import TokenizerError
from .pretokenizers import PreTokenizer, byte_level_words, pre_tokenizer
from .special_names import EOG_NAMES, EOM_NAMES, EOT_NAMES, FIM_END, FIM_NAMES
from .subword import (
    SPACE,
    ByteLevelBpe,
    EscapedBpe,
    LongestMatch,
    Merges,
    PrecompiledMap,
    Subword,
    Unigram,
    WordPiece,
    byte_fallback,
    unescape_rwkv,
)

# tokenizer.ggml.token_type, from the GGUF specification.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Default ids where a file names none: (bos, eos, unk, sep, pad).
_DEFAULT_IDS: dict[str, tuple[int | None, ...]] = {
    "gpt2": (None, None, None, None, None),
    "gemma4": (None, None, None, None, None),
    "llama": (1, 2, 0, None, None),
    "bert": (101, None, 100, 102, 0),
    "t5": (None, 1, 2, None, 0),
    "rwkv": (None, None, None, None, None),
}

_ASCII_SPACE = " \t\n\v\f\r"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte in a byte-level token."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(shown)]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


class TokenStream:
    """Decodes a sequence of tokens as they come, never giving out half a character.

    Made by Tokenizer.stream(). `push` returns the text that is complete after a token, and
    `flush` what is left at the end (a cut-off character becomes U+FFFD).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, at_start: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = at_start and tokenizer.add_space_prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that became complete with this token; "" while a character is unfinished."""
        if self._skip_special and self._tokenizer.is_special(token):
            return ""
        data = self._tokenizer.token_bytes(token)
        if self._strip_space and not self._tokenizer.is_special(token):
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The text of an unfinished character, then an empty stream again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class Tokenizer:
    """An immutable tokenizer; may be shared between threads.

    kind: tokenizer.ggml.model; pre: tokenizer.ggml.pre ("default" where absent).
    vocab_size: number of tokens. bos_id, eos_id, eot_id, eom_id, unk_id, sep_id, pad_id: ids or
    None. eog_ids: every token that ends a generation. add_bos, add_eos: whether encode() frames
    the text. add_space_prefix: whether text gets a space in front, as SentencePiece does.
    """

    def __init__(self, get: Callable[[str], Any]) -> None:
        """See from_metadata."""
        self.kind = _text(get, "tokenizer.ggml.model", "")
        if self.kind not in _DEFAULT_IDS:
            found = repr(self.kind) if self.kind else "none"
            raise TokenizerError(
                f"tokenizer.ggml.model: expected one of {', '.join(_DEFAULT_IDS)}, found {found}"
            )
        self.pre = _text(get, "tokenizer.ggml.pre", "default")
        self._tokens = _tokens(get)
        self.vocab_size = len(self._tokens)
        self._ids = dict(zip(self._tokens, range(self.vocab_size), strict=True))
        self._types = self._read_types(get)

        pre: PreTokenizer | None = None
        if self.kind == "gpt2":
            pre = pre_tokenizer(self.pre)
        elif self.kind == "gemma4":
            pre = pre_tokenizer("gemma4")
        self._escaped = self.kind in ("llama", "t5", "bert") or (pre is not None and pre.escaped)

        bos, eos, unk, sep, pad = (self._known(i) for i in _DEFAULT_IDS[self.kind])
        self.bos_id = self._read_id(get, "bos_token_id", bos)
        self.eos_id = self._read_id(get, "eos_token_id", eos)
        self.unk_id = self._read_id(get, "unknown_token_id", unk)
        self.sep_id = self._read_id(get, "seperator_token_id", sep)  # the key is spelled so
        self.pad_id = self._read_id(get, "padding_token_id", pad)
        if self.kind == "bert":
            self.bos_id = self._read_id(get, "cls_token_id", self.bos_id)
        self.eot_id, self.eom_id, self.eog_ids = self._end_of_generation(get)

        self.add_bos = _flag(
            get,
            "tokenizer.ggml.add_bos_token",
            self.kind in ("llama", "bert") or (pre is not None and pre.add_bos),
        )
        self.add_eos = _flag(get, "tokenizer.ggml.add_eos_token", self.kind in ("t5", "bert"))
        if self.kind == "bert":
            self.add_bos = self.add_eos = True
        if pre is not None and pre.escaped and self.pre != "sarvam-moe":
            self.add_bos = True  # Gemma 4 files that say otherwise are wrong (as in llama.cpp)
        self.add_space_prefix = _flag(
            get, "tokenizer.ggml.add_space_prefix", self.kind == "llama"
        ) and self.kind in ("llama", "t5")

        self._subword = self._build(get, pre)
        self._special_types, self._special_heads = self._index_special()
        self._strip_right, self._strip_left = self._stripping(get)
        self._byte_alphabet = _byte_alphabet()

    @classmethod
    def from_metadata(cls, get: Callable[[str], Any]) -> Tokenizer:
        """Builds the tokenizer of a file.

        get: a metadata key to its value (str, int, float, bool or a sequence of these), None
        where absent, e.g. GgufFile.get. TokenizerError where the metadata is missing, malformed
        or of an unknown kind.
        """
        return cls(get)

    # Text to ids.

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True, mark: str = ""
    ) -> list[int]:
        """The token ids of a text.

        add_special: put BOS before and EOS after, where the model wants them (add_bos, add_eos).
        parse_special: spellings of control tokens in the text, like "<|im_end|>", become those
        tokens; otherwise they are plain text. User-defined tokens are always found.
        mark: a character that is no part of the text; spellings that have it inside are plain text.
        """
        out: list[int] = []
        if add_special and self.add_bos and self.bos_id is not None:
            out.append(self.bos_id)
        if not text.isascii():
            # Lone surrogates have no UTF-8; they become U+FFFD.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        prefix = " " if self.kind == "llama" and self.add_space_prefix else ""
        for part in self._partition(text, parse_special):
            if isinstance(part, int):
                out.append(part)
            elif part := part.replace(mark, "") if mark else part:
                # Text starts here or follows a special token.
                out += self._subword.encode(prefix + part)
        if add_special and self.add_eos:
            end = self.sep_id if self.kind == "bert" else self.eos_id
            if end is not None:
                out.append(end)
        return out

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Cuts out special tokens: longer ones first, each from left to right."""
        found = [
            token
            for head, tokens in self._special_heads.items()
            if head in text
            for token in tokens
            if (parse_special or self._special_types[token] == _USER_DEFINED)
            and self._tokens[token] in text
        ]
        parts: list[str | int] = [text] if text else []
        for token in sorted(found, key=lambda i: (-len(self._tokens[i].encode()), i)):
            spelling = self._tokens[token]
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int) or spelling not in part:
                    cut.append(part)
                    continue
                pieces = part.split(spelling)
                if token in self._strip_right:
                    pieces[1:] = [piece.lstrip(_ASCII_SPACE) for piece in pieces[1:]]
                if token in self._strip_left:
                    pieces[:-1] = [piece.rstrip(_ASCII_SPACE) for piece in pieces[:-1]]
                for i, piece in enumerate(pieces):
                    if i:
                        cut.append(token)
                    if piece:
                        cut.append(piece)
            parts = cut
        return parts

    # Ids to text.

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD.

        The space that encode() puts in front (add_space_prefix) is taken away again.
        skip_special: leaves control and unknown tokens out.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Like decode(), before the bytes are read as UTF-8."""
        out = bytearray()
        strip_space = self.add_space_prefix
        for token in ids:
            special = self.is_special(token)
            if special and skip_special:
                continue
            data = self.token_bytes(token)
            if strip_space and not special:
                strip_space = False
                data = data.removeprefix(b" ")
            out += data
        return bytes(out)

    def stream(self, *, skip_special: bool = False, at_start: bool = False) -> TokenStream:
        """An incremental decoder.

        at_start: the tokens begin a text (or follow a special token), so that the space which
        encode() puts in front is taken away, as decode() does; False continues a text.
        """
        return TokenStream(self, skip_special=skip_special, at_start=at_start)

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that a token contributes to a text. TokenizerError if out of range."""
        spelling = self.id_to_token(token)
        kind = self._types.get(token, _NORMAL)
        if kind in (_CONTROL, _UNKNOWN):
            return spelling.encode()
        if self.kind == "rwkv":
            return unescape_rwkv(spelling)
        if self._escaped:
            if kind == _BYTE:
                value = _byte_token(spelling)
                return spelling.encode() if value is None else bytes((value,))
            return spelling.replace(SPACE, " ").encode()
        if kind == _USER_DEFINED:
            return spelling.encode()
        out = bytearray()
        for char in spelling:
            byte = self._byte_alphabet.get(char)
            out += char.encode() if byte is None else bytes((byte,))
        return bytes(out)

    # The vocabulary.

    def id_to_token(self, token: int) -> str:
        """The token as the file spells it. TokenizerError if out of range."""
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(
                f"token id {token} is outside the vocabulary of {self.vocab_size} tokens"
            )
        return self._tokens[token]

    def token_to_id(self, spelling: str) -> int | None:
        """The id of a token as the file spells it, None where there is none."""
        return self._ids.get(spelling)

    def special_spellings(self) -> list[str]:
        """The spellings of all tokens that is_special()."""
        return [self._tokens[i] for i, t in self._special_types.items() if t != _USER_DEFINED]

    def is_special(self, token: int) -> bool:
        """Whether a token is a control or unknown token, one without text of its own."""
        return self._types.get(token) in (_CONTROL, _UNKNOWN)

    # Building.

    def _known(self, token: int | None) -> int | None:
        return token if token is not None and 0 <= token < self.vocab_size else None

    def _read_id(self, get: Callable[[str], Any], key: str, default: int | None) -> int | None:
        """An id from the metadata; one outside the vocabulary (-1, usually) counts as absent."""
        value = get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        try:
            token = int(value)
        except (TypeError, ValueError):
            raise TokenizerError(
                f"tokenizer.ggml.{key}: expected a token id, found {value!r}"
            ) from None
        return self._known(token)

    def _read_types(self, get: Callable[[str], Any]) -> dict[int, int]:
        """The types of all tokens that are not normal ones."""
        types = get("tokenizer.ggml.token_type")
        if types is None:
            return {}
        if not _is_list(types) or len(types) < self.vocab_size:
            raise TokenizerError(
                f"tokenizer.ggml.token_type: expected {self.vocab_size} values, "
                f"found {len(types) if _is_list(types) else type(types).__name__}"
            )
        try:
            packed = bytes(types[: self.vocab_size])
        except (TypeError, ValueError):
            raise TokenizerError(
                "tokenizer.ggml.token_type: expected small integers, found other values"
            ) from None
        return {found.start(): found[0][0] for found in re.finditer(b"[^\1]", packed, re.DOTALL)}

    def _end_of_generation(
        self, get: Callable[[str], Any]
    ) -> tuple[int | None, int | None, frozenset[int]]:
        """(eot, eom, every token that ends a generation): named by the file, or known by name.

        Such tokens and the fill-in-the-middle tokens become control tokens where a file calls
        them normal, as some do.
        """
        ids = self._ids

        def first(names: Sequence[str]) -> int | None:
            return next((ids[name] for name in names if name in ids), None)

        eot = self._read_id(get, "eot_token_id", first(EOT_NAMES))
        eom = self._read_id(get, "eom_token_id", first(EOM_NAMES))
        eog = {ids[n] for n in (*EOT_NAMES, *EOM_NAMES, *EOG_NAMES) if n in ids}
        for key, names in FIM_END:
            found = self._read_id(get, key, first(names))
            if found is not None:
                eog.add(found)
        for token in (*eog, *(ids[n] for n in FIM_NAMES if n in ids)):
            self._types[token] = _CONTROL
        eog.update(i for i in (self.eos_id, eot, eom) if i is not None)
        # In the vocabularies of gpt-oss and Solar "<|end|>" ends a message, not the generation.
        if ("<|return|>" in ids and "<|call|>" in ids) or (
            "<|flush|>" in ids and ("<|call|>" in ids or "<|calls|>" in ids)
        ):
            eog.discard(ids.get("<|end|>", -1))
            if eot == ids.get("<|end|>"):
                eot = None
        # In Gemma 4's "</s>" is text.
        if "<|tool_response>" in ids and "</s>" in ids:
            eog.discard(ids["</s>"])
            self._types.pop(ids["</s>"], None)
        return eot, eom, frozenset(eog)

    def _build(self, get: Callable[[str], Any], pre: PreTokenizer | None) -> Subword:
        ids = self._ids
        if self.kind == "bert":
            return self._build_wordpiece(get)
        if self.kind == "rwkv":
            try:
                return LongestMatch({unescape_rwkv(t): i for t, i in ids.items()}, self.unk_id)
            except ValueError as error:
                raise TokenizerError(f"tokenizer.ggml.tokens: {error}") from None
        if self.kind == "t5":
            return self._build_unigram(get)
        if self.kind == "llama":
            scores = self._scores(get)

            def negated_score(spelling: str) -> float | None:
                token = ids.get(spelling)
                return None if token is None else -scores[token]

            merges = Merges(ids, negated_score, "", byte_fallback(ids, self.unk_id))
            return EscapedBpe(ids, merges, "\0".join(self._tokens), newlines=False)
        assert pre is not None
        ranks = get("tokenizer.ggml.merges")
        joint = " "
        if ranks is None and self.pre == "kimi-k2":
            ranks, joint = self._tokens, ""  # tiktoken's rule: the lower id is merged first
        if not _is_list(ranks):
            raise TokenizerError("tokenizer.ggml.merges: expected a list of merges, found none")
        if set(map(type, ranks)) - {str}:
            raise TokenizerError("tokenizer.ggml.merges: expected strings, found other values")
        cost = dict(zip(ranks, range(len(ranks)), strict=True)).get
        if pre.escaped:
            merges = Merges(ids, cost, joint, byte_fallback(ids, None))
            return EscapedBpe(ids, merges, "\0".join(self._tokens), newlines=True)
        return ByteLevelBpe(ids, cost, joint, byte_level_words(pre), pre.ignore_merges)

    def _build_wordpiece(self, get: Callable[[str], Any]) -> WordPiece:
        if self.unk_id is None:
            raise TokenizerError("tokenizer.ggml.unknown_token_id: expected an id, found none")
        lowercase = _flag(get, "tokenizer.ggml.normalizer.lowercase", True)
        accents = _flag(get, "tokenizer.ggml.normalizer.strip_accents", lowercase)
        return WordPiece(self._ids, self.unk_id, lowercase=lowercase, strip_accents=accents)

    def _build_unigram(self, get: Callable[[str], Any]) -> Unigram:
        if self.unk_id is None:
            raise TokenizerError("tokenizer.ggml.unknown_token_id: expected an id, found none")
        scores = self._scores(get)
        matched: dict[str, tuple[float, int]] = {}
        verbatim: list[str] = []
        for i, token in enumerate(self._tokens):
            kind = self._types.get(i, _NORMAL)
            if kind == _USER_DEFINED:
                verbatim.append(token)
                matched[token] = (0.0, i)
            elif kind in (_NORMAL, _UNUSED):
                matched[token] = (scores[i], i)
        blob = get("tokenizer.ggml.precompiled_charsmap")
        charsmap = None
        if blob is not None:
            try:
                charsmap = PrecompiledMap(bytes(int(b) & 0xFF for b in blob))
            except (TypeError, ValueError) as error:
                raise TokenizerError(f"tokenizer.ggml.precompiled_charsmap: {error}") from None
        normal = [scores[i] for i in range(self.vocab_size) if i not in self._types]
        return Unigram(
            matched,
            self.unk_id,
            min(normal, default=0.0),
            charsmap,
            verbatim,
            add_space_prefix=self.add_space_prefix,
            remove_extra_whitespaces=_flag(get, "tokenizer.ggml.remove_extra_whitespaces", False),
        )

    def _scores(self, get: Callable[[str], Any]) -> Sequence[float]:
        scores = get("tokenizer.ggml.scores")
        if not _is_list(scores) or len(scores) < self.vocab_size:
            raise TokenizerError(
                f"tokenizer.ggml.scores: expected {self.vocab_size} values, "
                f"found {len(scores) if _is_list(scores) else 'none'}"
            )
        try:
            return array("f", scores[: self.vocab_size])
        except TypeError:
            raise TokenizerError(
                "tokenizer.ggml.scores: expected numbers, found other values"
            ) from None

    def _index_special(self) -> tuple[dict[int, int], dict[str, list[int]]]:
        """Special tokens: their types by id, and their ids by their first three characters.

        A text that does not hold the three characters holds none of the tokens; thousands of
        reserved tokens usually share them.
        """
        types = {i: t for i, t in self._types.items() if t in (_CONTROL, _UNKNOWN, _USER_DEFINED)}
        heads: dict[str, list[int]] = {}
        for i in types:
            heads.setdefault(self._tokens[i][:3], []).append(i)
        return types, heads

    def _stripping(self, get: Callable[[str], Any]) -> tuple[frozenset[int], frozenset[int]]:
        """Special tokens that swallow the white space after them, and before them.

        GGUF files do not say it; llama.cpp knows these models by name.
        """
        name = str(get("general.name") or "").lower()
        architecture = str(get("general.architecture") or "")
        if self.pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code") or architecture in (
            "nomic-bert-moe",
            "jina-bert-v3",
        ):
            mask = self._ids.get("<mask>")
            return frozenset(), frozenset(() if mask is None else (mask,))
        if "phi-3" in name or "phi3" in name:
            kept = {self._ids.get(t) for t in ("<unk>", "<s>", "<|endoftext|>")}
            return frozenset(i for i in self._special_types if i not in kept), frozenset()
        if "modern-bert" in name:
            mask = self._ids.get("[MASK]")
            return frozenset(), frozenset(() if mask is None else (mask,))
        return frozenset(), frozenset()


def _is_list(value: object) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes))


def _text(get: Callable[[str], Any], key: str, default: str) -> str:
    value = get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise TokenizerError(f"{key}: expected a string, found {value!r:.40}")
    return value


def _flag(get: Callable[[str], Any], key: str, default: bool) -> bool:
    value = get(key)
    return default if value is None else bool(value)


def _tokens(get: Callable[[str], Any]) -> list[str]:
    tokens = get("tokenizer.ggml.tokens")
    if not _is_list(tokens) or not len(tokens):
        raise TokenizerError("tokenizer.ggml.tokens: expected a list of tokens, found none")
    tokens = list(tokens)
    if set(map(type, tokens)) != {str}:
        raise TokenizerError("tokenizer.ggml.tokens: expected strings, found other values")
    if "" in tokens:
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    return tokens


def _byte_token(spelling: str) -> int | None:
    """The byte of a token like <0x0A>."""
    if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
        try:
            return int(spelling[3:5], 16)
        except ValueError:
            return None
    return None
