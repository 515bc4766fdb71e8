"""The tokenizer of a GGUF file, built from its tokenizer.ggml.* metadata."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable

from ..base import arguments
from ..base.errors import TokenizerError
from .end_tokens import find_end_tokens
from .normalizers import PrecompiledMap, nfc, squeezed_spaces
from .pretokenizers import PreTokenizer, byte_level_words, pre_tokenizer
from .special_tokens import SpecialTokens
from .subword import (
    SPACE,
    ByteLevelBpe,
    EscapedBpe,
    LongestMatch,
    Merges,
    Subword,
    Unigram,
    WordPiece,
    byte_alphabet,
    byte_fallback,
    unescape_rwkv,
)
from .vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Metadata,
    Strings,
    Vocabulary,
    flag,
    merge_ranks,
    spelled_bytes,
    string,
)

# The default ids of files that name none: (bos, eos, unk, sep, pad).
_DEFAULT_IDS: dict[str, tuple[int | None, ...]] = {
    "gpt2": (None, None, None, None, None),
    "gemma4": (None, None, None, None, None),
    "llama": (1, 2, 0, None, None),
    "bert": (101, None, 100, 102, 0),
    "t5": (None, 1, 2, None, 0),
    "rwkv": (None, None, None, None, None),
}


class TokenStream:
    """Decodes a sequence of tokens as they come, never giving out half a character.

    Tokenizer.stream() makes it. `push` returns the text that is complete after a token, and
    `flush` the rest at the end (a cut-off character becomes U+FFFD).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, at_start: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = arguments.flag("skip_special", skip_special)
        self._strip_space = arguments.flag("at_start", at_start) and tokenizer.add_space_prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Returns the text that this token completes; "" while a character is unfinished."""
        if self._skip_special and self._tokenizer.is_special(token):
            return ""
        data = self._tokenizer.token_bytes(token)
        if self._strip_space and not self._tokenizer.is_special(token):
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Returns the text of an unfinished character and empties the stream."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class Tokenizer:
    """An immutable tokenizer; may be shared between threads.

    kind: tokenizer.ggml.model; pre: tokenizer.ggml.pre ("default" if absent).
    vocab_size: number of tokens. bos_id, eos_id, eot_id, eom_id, unk_id, sep_id, pad_id: ids or
    None. eog_ids: every token that ends a generation. add_bos, add_eos: whether encode() frames
    the text. add_space_prefix: whether text gets a space in front, as SentencePiece does.
    """

    def __init__(self, get: Metadata, strings: Strings | None = None) -> None:
        """Builds the tokenizer; from_metadata documents the arguments."""
        self.kind = string(get, "tokenizer.ggml.model", "")
        if self.kind not in _DEFAULT_IDS:
            found = repr(self.kind) if self.kind else "none"
            raise TokenizerError(
                f"tokenizer.ggml.model: expected one of {', '.join(_DEFAULT_IDS)}, found {found}"
            )
        self.pre = string(get, "tokenizer.ggml.pre", "default")
        vocabulary = self._vocabulary = Vocabulary(get, strings)
        self.vocab_size = len(vocabulary)

        pre: PreTokenizer | None = None
        if self.kind == "gpt2":
            pre = pre_tokenizer(self.pre)
        elif self.kind == "gemma4":
            pre = pre_tokenizer("gemma4")
        self._escaped = self.kind in ("llama", "t5", "bert") or (pre is not None and pre.escaped)

        bos, eos, unk, sep, pad = map(vocabulary.known, _DEFAULT_IDS[self.kind])
        self.bos_id = vocabulary.named(get, "bos_token_id", bos)
        self.eos_id = vocabulary.named(get, "eos_token_id", eos)
        self.unk_id = vocabulary.named(get, "unknown_token_id", unk)
        self.sep_id = vocabulary.named(get, "seperator_token_id", sep)  # the key is spelled so
        self.pad_id = vocabulary.named(get, "padding_token_id", pad)
        if self.kind == "bert":
            self.bos_id = vocabulary.named(get, "cls_token_id", self.bos_id)
        ends = find_end_tokens(vocabulary, get, self.eos_id)
        self.eot_id, self.eom_id, self.eog_ids = ends.eot, ends.eom, ends.eog
        vocabulary.types.update(dict.fromkeys(ends.control, CONTROL))

        self.add_bos = flag(
            get,
            "tokenizer.ggml.add_bos_token",
            self.kind in ("llama", "bert") or (pre is not None and pre.add_bos),
        )
        self.add_eos = flag(get, "tokenizer.ggml.add_eos_token", self.kind in ("t5", "bert"))
        if self.kind == "bert":
            self.add_bos = self.add_eos = True
        if pre is not None and pre.escaped and self.pre != "sarvam-moe":
            self.add_bos = True  # Gemma 4 files that say otherwise are wrong (as in llama.cpp)
        self.add_space_prefix = flag(
            get, "tokenizer.ggml.add_space_prefix", self.kind == "llama"
        ) and self.kind in ("llama", "t5")

        self._normalize = self._normalizers(get, pre)
        self._subword = self._build(get, pre, strings)
        self._special = SpecialTokens(vocabulary, get, self.pre)
        self._byte_alphabet = byte_alphabet()

    @classmethod
    def from_metadata(cls, get: Metadata, strings: Strings | None = None) -> Tokenizer:
        """Builds the tokenizer of a file.

        get: returns a metadata key's value (str, int, float, bool or a sequence of these), None
        if absent, e.g. GgufFile.get. strings: returns a key's array of strings without a copy of
        them (GgufFile.strings), which saves most of the memory. Raises TokenizerError if the
        metadata is missing, malformed or of an unknown kind.
        """
        return cls(get, strings)

    # These methods turn text into ids.

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True, mark: str = ""
    ) -> list[int]:
        """Returns the token ids of a text.

        add_special: put BOS before and EOS after, if the model wants them (add_bos, add_eos)
        and the text does not begin or end with them as special tokens of its own.
        parse_special: spellings of control tokens in the text, like "<|im_end|>", become those
        tokens; otherwise they are plain text. User-defined tokens are always found.
        mark: a character that is no part of the text; spellings that contain it are plain text.
        """
        text = arguments.text("text", text)
        add_special = arguments.flag("add_special", add_special)
        parse_special = arguments.flag("parse_special", parse_special)
        # Lone surrogates have no UTF-8; in plain text they become U+FFFD. Pairs are characters.
        repaired = not text.isascii() and not _is_utf8(text)
        if repaired:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        parts = self._special.partition(text, parse_special)
        out: list[int] = []
        prefix = " " if self.kind == "llama" and self.add_space_prefix else ""
        for part in parts:
            if isinstance(part, int):
                out.append(part)
                continue
            # This part is plain text, at the start or after a special token.
            run = part.replace(mark, "") if mark else part
            if repaired:
                run = run.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            for normalize in self._normalize:
                run = normalize(run)
            if run:
                out += self._subword.encode(prefix + run)
        if add_special and self.add_bos and self.bos_id is not None:
            written = parse_special and parts[:1] == [self.bos_id]
            if not written:
                out.insert(0, self.bos_id)
            elif len(parts) == 1:
                parts = []  # one token does not frame both ends
        end = self.sep_id if self.kind == "bert" else self.eos_id
        written = parse_special and parts[-1:] == [end]
        if add_special and self.add_eos and end is not None and not written:
            out.append(end)
        return out

    # These methods turn ids into text.

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Returns the text of a whole sequence; bytes that are not UTF-8 become U+FFFD.

        The space that encode() puts in front (add_space_prefix) is removed again.
        skip_special: leaves control and unknown tokens out.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Does what decode() does, but returns the bytes before they are read as UTF-8."""
        skip_special = arguments.flag("skip_special", skip_special)
        out = bytearray()
        strip_space = self.add_space_prefix
        for token in arguments.integers("ids", ids):
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
        """Returns an incremental decoder.

        at_start: the tokens begin a text (or follow a special token), so that the space which
        encode() puts in front is removed, as decode() does; False continues a text.
        """
        return TokenStream(self, skip_special=skip_special, at_start=at_start)

    def token_bytes(self, token: int) -> bytes:
        """Returns the exact bytes of a token in a text. Raises TokenizerError if out of range."""
        token = arguments.integer("token", token, None, None)
        spelling = self.id_to_token(token)
        kind = self._vocabulary.types.get(token, NORMAL)
        if kind in (CONTROL, UNKNOWN):
            return spelled_bytes(spelling)
        if self.kind == "rwkv":
            return unescape_rwkv(spelling)
        if self._escaped:
            if kind == BYTE:
                value = _byte_token(spelling)
                return spelled_bytes(spelling) if value is None else bytes((value,))
            return spelled_bytes(spelling.replace(SPACE, " "))
        if kind == USER_DEFINED:
            return spelled_bytes(spelling)
        out = bytearray()
        for char in spelling:
            byte = self._byte_alphabet.get(char)
            out += spelled_bytes(char) if byte is None else bytes((byte,))
        return bytes(out)

    # These methods describe the vocabulary.

    def tokens_with(self, text: str) -> list[int]:
        """Returns the tokens whose bytes contain this text."""
        wanted = text.encode("utf-8")
        return [i for i in range(self.vocab_size) if wanted in self.token_bytes(i)]

    def id_to_token(self, token: int) -> str:
        """Returns the token as the file spells it, bytes that are not UTF-8 by "surrogateescape".

        TokenizerError if out of range.
        """
        token = arguments.integer("token", token, None, None)
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(
                f"token id {arguments.shown(token)} is outside the vocabulary of "
                f"{self.vocab_size} tokens"
            )
        return self._vocabulary.tokens[token]

    def token_to_id(self, spelling: str) -> int | None:
        """Returns the id of a token as the file spells it, None if there is none."""
        return self._vocabulary.ids.get(arguments.text("spelling", spelling))

    def special_spellings(self) -> list[str]:
        """Returns the spellings of all tokens for which is_special() is true."""
        return self._spellings(CONTROL, UNKNOWN)

    def defined_spellings(self) -> list[str]:
        """Returns the spellings of user-defined tokens, which encode() finds in any text."""
        return self._spellings(USER_DEFINED)

    def _spellings(self, *kinds: int) -> list[str]:
        v = self._vocabulary
        return [v.tokens[i] for i, kind in v.types.items() if kind in kinds]

    def is_special(self, token: int) -> bool:
        """Returns whether a token is a control or unknown token, which has no text of its own."""
        token = arguments.integer("token", token, None, None)
        return self._vocabulary.types.get(token) in (CONTROL, UNKNOWN)

    # These methods build the tokenizer.

    def _normalizers(
        self, get: Metadata, pre: PreTokenizer | None
    ) -> tuple[Callable[[str], str], ...]:
        """Returns the normalizers of a run of plain text, in order.

        With a pre-tokenizer its name decides, since GGUF has no key for it. A SentencePiece
        vocabulary uses what the file carries (the published ones of Llama, Mistral and Gemma have
        no map).
        """
        if pre is not None:
            return (nfc(),) if pre.nfc else ()
        steps: list[Callable[[str], str]] = []
        if self.kind == "llama":
            charsmap = _charsmap(get)
            if charsmap is not None:
                steps.append(charsmap.mapped)
            if flag(get, "tokenizer.ggml.remove_extra_whitespaces", False):
                steps.append(squeezed_spaces)
        return tuple(steps)

    def _build(self, get: Metadata, pre: PreTokenizer | None, strings: Strings | None) -> Subword:
        ids, tokens = self._vocabulary.ids, self._vocabulary.tokens
        if self.kind == "bert":
            return self._build_wordpiece(get)
        if self.kind == "rwkv":
            try:
                return LongestMatch(
                    {unescape_rwkv(t): i for i, t in enumerate(tokens)}, self.unk_id
                )
            except ValueError as error:
                raise TokenizerError(f"tokenizer.ggml.tokens: {error}") from None
        if self.kind == "t5":
            return self._build_unigram(get)
        if self.kind == "llama":
            scores = self._vocabulary.scores(get)

            def negated_score(spelling: str) -> float | None:
                token = ids.get(spelling)
                return None if token is None else -scores[token]

            pieces = Merges(ids, negated_score, "", byte_fallback(ids, self.unk_id))
            return EscapedBpe(ids, pieces, "\0".join(tokens), newlines=False)
        assert pre is not None
        if self.pre == "kimi-k2" and get("tokenizer.ggml.merges") is None:
            cost, joint = ids.get, ""  # tiktoken's rule: the lower id is merged first
        else:
            cost, joint = merge_ranks(get, strings).get, " "
        if pre.escaped:
            pieces = Merges(ids, cost, joint, byte_fallback(ids, None))
            return EscapedBpe(ids, pieces, "\0".join(tokens), newlines=True)
        return ByteLevelBpe(ids, cost, joint, byte_level_words(pre), pre.ignore_merges)

    def _build_wordpiece(self, get: Metadata) -> WordPiece:
        if self.unk_id is None:
            raise TokenizerError("tokenizer.ggml.unknown_token_id: expected an id, found none")
        lowercase = flag(get, "tokenizer.ggml.normalizer.lowercase", True)
        accents = flag(get, "tokenizer.ggml.normalizer.strip_accents", lowercase)
        ids = self._vocabulary.ids
        longest = max(map(len, self._vocabulary.tokens), default=0)
        return WordPiece(ids, longest, self.unk_id, lowercase=lowercase, strip_accents=accents)

    def _build_unigram(self, get: Metadata) -> Unigram:
        if self.unk_id is None:
            raise TokenizerError("tokenizer.ggml.unknown_token_id: expected an id, found none")
        vocabulary = self._vocabulary
        scores = vocabulary.scores(get)
        matched: dict[str, tuple[float, int]] = {}
        verbatim: list[str] = []
        for i, token in enumerate(vocabulary.tokens):
            kind = vocabulary.types.get(i, NORMAL)
            if kind == USER_DEFINED:
                verbatim.append(token)
                matched[token] = (0.0, i)
            elif kind in (NORMAL, UNUSED):
                matched[token] = (scores[i], i)
        normal = [scores[i] for i in range(self.vocab_size) if i not in vocabulary.types]
        return Unigram(
            matched,
            self.unk_id,
            min(normal, default=0.0),
            _charsmap(get, verbatim),
            add_space_prefix=self.add_space_prefix,
            remove_extra_whitespaces=flag(get, "tokenizer.ggml.remove_extra_whitespaces", False),
        )


def _charsmap(get: Metadata, verbatim: Iterable[str] = ()) -> PrecompiledMap | None:
    blob = get("tokenizer.ggml.precompiled_charsmap")
    if blob is None:
        return None
    try:
        return PrecompiledMap(bytes(int(b) & 0xFF for b in blob), verbatim)
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"tokenizer.ggml.precompiled_charsmap: {error}") from None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _byte_token(spelling: str) -> int | None:
    """Returns the byte of a token like <0x0A>."""
    if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
        try:
            return int(spelling[3:5], 16)
        except ValueError:
            return None
    return None
