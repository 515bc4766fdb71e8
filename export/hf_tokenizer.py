"""The tokenizer of a Hugging Face folder as tokenizer.* metadata of a GGUF file.

Two kinds: byte-level BPE ("gpt2"), from tokenizer.json, and SentencePiece BPE ("llama"), from
tokenizer.model or from a tokenizer.json that was made from one. What comes out is compared with
what Hugging Face's own library does on texts full of traps, so that a tokenizer that GGUF cannot
express is refused instead of becoming a slightly wrong one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.errors import ModelFileError, OptionError, TokenizerError, UnsupportedModelError
from ..runtime.pretokenizers import PRE_TOKENIZERS, byte_level_words
from ..runtime.special_names import EOG_NAMES, EOM_NAMES, EOT_NAMES
from ..runtime.subword import SPACE
from ..runtime.tokenizer import Tokenizer
from .gguf_values import Value
from .hf_config import HfConfig
from .safetensors_folder import read_json
from .sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_sentencepiece,
)
from .tokenizer_probes import PROBES

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfLibrary

# Of the names of one kind, those that llama.cpp's own conversions write.
_PREFERRED = ("llama-bpe", "qwen2", "gpt-2", "smollm", "deepseek-v3", "gpt-4o", "dbrx", "glm4",
              "falcon", "default", "bailingmoe", "tiny_aya", "bloom")  # fmt: skip
_ADDED_SCORE = -1000.0  # of tokens that the vocabulary has no score for
_SPECIAL_LOOK = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d+>|<pad>|<mask>|<2mass>|\[@BOS@\]")  # noqa: RUF001
_SALAD_TOKENS, _SALAD_LENGTH = 4000, 40
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass
class HfTokenizer:
    """entries: metadata keys and values, the chat template among them; notes: for the user."""

    entries: dict[str, Value]
    notes: list[str] = field(default_factory=list)


@dataclass
class _Vocabulary:
    """tokens, types and scores by id; merges, where they decide."""

    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None


def read_tokenizer(
    folder: Path, config: HfConfig, n_vocab: int, *, pre: str | None = None
) -> HfTokenizer:
    """The tokenizer of a folder, with n_vocab tokens (unused ones fill what it does not name).

    pre: the pre-tokenizer's name for tokenizer.ggml.pre, None finds it. Raises ModelFileError,
    UnsupportedModelError, OptionError (pre).
    """
    return _Reader(folder, config, n_vocab, pre).read()


class _Reader:
    def __init__(self, folder: Path, config: HfConfig, n_vocab: int, pre: str | None) -> None:
        if pre is not None and pre not in PRE_TOKENIZERS:
            raise OptionError(
                f"pre: expected one of {', '.join(sorted(PRE_TOKENIZERS))}, found {pre}"
            )
        self._folder = folder
        self._config = config
        self._n_vocab = n_vocab
        self._pre = pre
        self._path = folder / "tokenizer.json"
        self._sentencepiece = folder / "tokenizer.model"
        self._json = read_json(self._path) if self._path.is_file() else None
        self._settings = self._optional("tokenizer_config.json")
        self._generation = self._optional("generation_config.json")
        self._notes: list[str] = []
        if self._json is None and not self._sentencepiece.is_file():
            raise ModelFileError(
                f"{folder}: expected tokenizer.json or tokenizer.model, found none"
            )

    def _optional(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        return read_json(path) if path.is_file() else {}

    def read(self) -> HfTokenizer:
        model = self._model()
        byte_level = model is not None and self._is_byte_level()
        space_prefix: bool | None = None
        if byte_level:
            vocabulary = self._byte_level(model or {})
        elif self._sentencepiece.is_file():
            found = read_sentencepiece(self._sentencepiece)
            texts, scores, types = (list(column) for column in zip(*found.pieces, strict=True))
            vocabulary = _Vocabulary(texts, types, scores)
            space_prefix = found.add_space_prefix
        else:
            vocabulary = self._escaped(model or {})
            space_prefix = self._space_prefix()
        self._add_tokens(vocabulary)
        entries = self._entries(vocabulary)
        library = self._library()
        self._framing(entries, library)
        if space_prefix is not None:
            entries["tokenizer.ggml.add_space_prefix"] = space_prefix
            self._verify(entries, library)
        else:
            entries["tokenizer.ggml.pre"] = self._pre or self._find_pre(entries, library)
            if self._pre is not None and library is not None:
                self._compare_named(entries, library)
        if library is not None:
            self._compare_special(entries, library)
        entries.update(self._templates())
        return HfTokenizer(entries, self._notes)

    # The vocabulary.

    def _model(self) -> dict[str, Any] | None:
        if self._json is None:
            return None
        model = self._json.get("model")
        if not isinstance(model, dict):
            raise ModelFileError(f"{self._path}: model: expected an object, found {model!r:.40}")
        # Files of old give no type; only BPE has merges.
        kind = model.get("type") or ("BPE" if "merges" in model else "none")
        if kind != "BPE" and not self._sentencepiece.is_file():
            raise UnsupportedModelError(f"{self._path}: model: expected BPE, found {kind}")
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(key):
                raise UnsupportedModelError(
                    f"{self._path}: model.{key}: expected none, found {model[key]!r:.40}"
                )
        return model

    def _steps(self, key: str) -> Iterator[dict[str, Any]]:
        """The parts of a normalizer, pre-tokenizer or decoder, sequences unrolled."""
        pending = [(self._json or {}).get(key)]
        while pending:
            step = pending.pop(0)
            if not isinstance(step, dict):
                continue
            inner = step.get("pretokenizers") or step.get("normalizers") or step.get("decoders")
            if step.get("type") == "Sequence" and isinstance(inner, list):
                pending = [*inner, *pending]
            else:
                yield step

    def _is_byte_level(self) -> bool:
        steps = [*self._steps("pre_tokenizer"), *self._steps("decoder")]
        return any(step.get("type") == "ByteLevel" for step in steps)

    def _texts(self, model: Mapping[str, Any]) -> list[str | None]:
        """The tokens of model.vocab by id, None for ids that it leaves out."""
        vocab = model.get("vocab")
        if not isinstance(vocab, dict) or not vocab:
            raise ModelFileError(f"{self._path}: model.vocab: expected tokens, found none")
        texts: list[str | None] = []
        for text, i in vocab.items():
            self._place(texts, text, i)
        return texts

    def _place(self, texts: list[str | None], text: object, i: object) -> None:
        if type(i) is not int or not 0 <= i < self._n_vocab or not isinstance(text, str):
            raise ModelFileError(
                f"{self._path}: token {text!r:.40}: expected an id below {self._n_vocab} (the rows "
                f"of the embedding), found {i!r:.40}"
            )
        texts += [None] * (i + 1 - len(texts))
        if texts[i] is not None and texts[i] != text:
            raise ModelFileError(
                f"{self._path}: id {i}: expected one token, found {texts[i]!r:.40} and {text!r:.40}"
            )
        texts[i] = text

    def _merges(self, model: Mapping[str, Any]) -> list[tuple[str, str]]:
        merges = model.get("merges")
        if not isinstance(merges, list):
            raise ModelFileError(f"{self._path}: model.merges: expected a list, found none")
        pairs: list[tuple[str, str]] = []
        for merge in merges:
            parts = merge.split(" ") if isinstance(merge, str) else merge
            if (
                not isinstance(parts, list)
                or len(parts) != 2
                or not all(isinstance(p, str) and p and " " not in p for p in parts)
            ):
                raise ModelFileError(
                    f"{self._path}: model.merges: expected two tokens, found {merge!r:.60}"
                )
            pairs.append((parts[0], parts[1]))
        return pairs

    def _byte_level(self, model: Mapping[str, Any]) -> _Vocabulary:
        texts = self._texts(model)
        merges = [f"{left} {right}" for left, right in self._merges(model)]
        return _Vocabulary([t or "" for t in texts], [NORMAL] * len(texts), merges=merges)

    def _escaped(self, model: Mapping[str, Any]) -> _Vocabulary:
        """SentencePiece's vocabulary from its merges: an earlier merge has a higher score."""
        texts = [t or "" for t in self._texts(model)]
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(self._merges(model)):
            ranks.setdefault(left + right, rank)
        unknown = model.get("unk_token")
        types = [
            UNKNOWN
            if text == unknown
            else BYTE
            if model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(text)
            else NORMAL
            for text in texts
        ]
        last = float(-len(ranks) - 1)
        scores = [-float(ranks[t]) if t in ranks else last for t in texts]
        return _Vocabulary(texts, types, scores)

    def _space_prefix(self) -> bool:
        for step in [*self._steps("normalizer"), *self._steps("pre_tokenizer")]:
            if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
                return True
            if step.get("type") == "Metaspace":
                scheme = step.get("prepend_scheme")
                return (
                    scheme in ("always", "first")
                    if scheme
                    else bool(step.get("add_prefix_space", True))
                )
        return False

    def _added(self) -> dict[int, tuple[str, bool]]:
        """Added tokens by id: text, and whether they are special."""
        rows: list[tuple[object, object]] = []
        listed = (self._json or {}).get("added_tokens")
        if isinstance(listed, list):
            rows += [(row.get("id"), row) for row in listed if isinstance(row, dict)]
        decoder = self._settings.get("added_tokens_decoder")
        if isinstance(decoder, dict) and self._json is None:
            rows += [(int(i) if i.isdecimal() else i, row) for i, row in decoder.items()]
        plain = self._optional("added_tokens.json") if self._json is None else {}
        rows += [(i, {"content": text}) for text, i in plain.items()]
        added: dict[int, tuple[str, bool]] = {}
        for i, row in rows:
            content = row.get("content") if isinstance(row, dict) else None
            texts: list[str | None] = []
            self._place(texts, content, i)
            assert isinstance(i, int) and isinstance(content, str) and isinstance(row, dict)
            special = bool(row.get("special")) or _SPECIAL_LOOK.fullmatch(content) is not None
            added.setdefault(i, (content, special))
        return added

    def _add_tokens(self, v: _Vocabulary) -> None:
        """Added tokens and their types, then names for ids without a token."""
        if len(v.tokens) > self._n_vocab:
            raise ModelFileError(
                f"{self._folder}: tokens: expected at most {self._n_vocab} (the rows of the "
                f"embedding), found {len(v.tokens)}"
            )
        more = self._n_vocab - len(v.tokens)
        v.tokens += [""] * more
        v.types += [NORMAL] * more
        if v.scores is not None:
            v.scores += [_ADDED_SCORE] * more
        for i, (text, special) in self._added().items():
            v.tokens[i] = text
            if special:
                v.types[i] = v.types[i] if v.types[i] == UNKNOWN else CONTROL
            elif v.types[i] in (NORMAL, USER_DEFINED):
                v.types[i] = USER_DEFINED
        known = set(v.tokens)
        for i, text in enumerate(v.tokens):
            if v.types[i] == USER_DEFINED and v.scores is not None and SPACE in text:
                plain = text.replace(SPACE, " ")  # they are found in the text as it is
                v.tokens[i] = text if plain in known else plain
            if text == "":
                name = f"[PAD{i}]"
                while name in known:
                    name = f"[{name}]"
                v.tokens[i], v.types[i] = name, UNUSED
        if len(set(v.tokens)) != len(v.tokens):
            seen: set[str] = set()
            twice = next(t for t in v.tokens if t in seen or seen.add(t))  # type: ignore[func-returns-value]
            raise ModelFileError(f"{self._folder}: token {twice!r:.40}: expected one id, found two")

    # The metadata.

    def _entries(self, v: _Vocabulary) -> dict[str, Value]:
        entries: dict[str, Value] = {
            "tokenizer.ggml.model": "gpt2" if v.scores is None else "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": v.tokens,
        }
        if v.scores is not None:
            entries["tokenizer.ggml.scores"] = v.scores
        entries["tokenizer.ggml.token_type"] = v.types
        if v.merges is not None:
            entries["tokenizer.ggml.merges"] = v.merges
        ids = {text: i for i, text in enumerate(v.tokens)}
        named = (
            self._settings | self._optional("special_tokens_map.json")
            if not self._settings
            else self._settings
        )
        for role, key in (
            ("bos", "bos_token_id"),
            ("eos", "eos_token_id"),
            ("unk", "unknown_token_id"),
            ("sep", "seperator_token_id"),  # the key is spelled so
            ("pad", "padding_token_id"),
        ):
            token = self._special_id(named, role, ids)
            if token is not None:
                entries[f"tokenizer.ggml.{key}"] = token
        self._end_of_turn(entries, v.tokens)
        return entries

    def _special_id(
        self, named: Mapping[str, Any], role: str, ids: Mapping[str, int]
    ) -> int | None:
        token = named.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            return ids[text]
        if f"{role}_token" in named and token is None:
            return None
        for values in (self._generation, self._config.values):
            found = values.get(f"{role}_token_id")
            if isinstance(found, list):
                found = found[0] if found else None
            if type(found) is int and 0 <= found < self._n_vocab:
                return found
        return None

    def _end_of_turn(self, entries: dict[str, Value], tokens: list[str]) -> None:
        """generation_config.json may name more than one token that ends an answer."""
        ends = self._generation.get("eos_token_id") or self._config.get("eos_token_id")
        if not isinstance(ends, list):
            return
        names = {*EOT_NAMES, *EOM_NAMES, *EOG_NAMES}
        others = [
            i
            for i in ends
            if type(i) is int
            and 0 <= i < len(tokens)
            and i != entries.get("tokenizer.ggml.eos_token_id")
        ]
        unknown = [i for i in others if tokens[i] not in names]
        if unknown:
            entries["tokenizer.ggml.eot_token_id"] = unknown[0]
        elif others:
            known = [n for n in EOT_NAMES if n in {tokens[i] for i in others}]
            if known:
                entries["tokenizer.ggml.eot_token_id"] = tokens.index(known[0])
        if len(unknown) > 1:
            entries["tokenizer.ggml.eom_token_id"] = unknown[1]
        for i in unknown[2:]:
            self._notes.append(f"token {tokens[i]!r} ends an answer, which GGUF cannot say")

    def _framing(self, entries: dict[str, Value], library: HfLibrary | None) -> None:
        """Whether texts get BOS and EOS: tokenizer_config.json says, or what the library does."""
        before = after = False
        if library is not None:
            plain = library.encode("a", add_special_tokens=False).ids
            framed = library.encode("a", add_special_tokens=True).ids
            bos, eos = (entries.get(f"tokenizer.ggml.{r}_token_id") for r in ("bos", "eos"))
            before = bos is not None and framed[:1] == [bos] and framed != plain
            after = eos is not None and framed[-1:] == [eos] and framed != plain
        elif "tokenizer.ggml.bos_token_id" in entries:
            before = True  # SentencePiece models of these families begin with BOS
        for role, found in (("bos", before), ("eos", after)):
            said = self._settings.get(f"add_{role}_token")
            value = said if isinstance(said, bool) else found
            known = f"tokenizer.ggml.{role}_token_id" in entries
            entries[f"tokenizer.ggml.add_{role}_token"] = value and known

    def _templates(self) -> Iterator[tuple[str, Value]]:
        """The chat template, from wherever the folder keeps it, and further ones by name."""
        path = self._folder / "chat_template.jinja"
        found: object = self._settings.get("chat_template")
        if found is None:
            found = self._optional("chat_template.json").get("chat_template")
        named: dict[str, str] = {}
        if isinstance(found, str):
            named["default"] = found
        elif isinstance(found, list):
            for row in found:
                if isinstance(row, dict) and isinstance(row.get("template"), str):
                    named[str(row.get("name"))] = row["template"]
        more = self._folder / "additional_chat_templates"
        if path.is_file():
            named["default"] = _text(path)
        if more.is_dir():
            named |= {p.stem: _text(p) for p in sorted(more.glob("*.jinja"))}
        others = sorted(
            name for name in named if name != "default" and re.fullmatch("[a-z0-9_]+", name)
        )
        if "default" in named:
            yield "tokenizer.chat_template", named["default"]
        if others:
            yield "tokenizer.chat_templates", others
        for name in others:
            yield f"tokenizer.chat_template.{name}", named[name]

    # Comparing with Hugging Face's library.

    def _library(self) -> HfLibrary | None:
        if self._json is None:
            return None
        from tokenizers import Tokenizer as Library

        try:
            return Library.from_file(str(self._path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelFileError(
                f"{self._path}: expected a tokenizer, found: {error!s:.200}"
            ) from None

    def _find_pre(self, entries: dict[str, Value], library: HfLibrary | None) -> str:
        """The name of the pre-tokenizer that cuts and encodes the probes as the library does."""
        assert library is not None
        cutter = library.pre_tokenizer
        if cutter is not None:
            words = [[w for w, _ in cutter.pre_tokenize_str(text)] for text in PROBES]
            whole = bool((self._model() or {}).get("ignore_merges"))
            ranked = sorted(
                (name for name, kind in PRE_TOKENIZERS.items() if not kind.escaped),
                key=lambda name: (
                    PRE_TOKENIZERS[name].ignore_merges != whole,
                    _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED),
                ),
            )
            tried: list[object] = []
            for name in ranked:
                kind = PRE_TOKENIZERS[name]
                if kind in tried:
                    continue
                tried.append(kind)
                cut = byte_level_words(kind)
                if all(cut(t) == w for t, w in zip(PROBES, words, strict=True)):
                    with_name: dict[str, Value] = {**entries, "tokenizer.ggml.pre": name}
                    if self._difference(with_name, library) is None:
                        return name
        raise UnsupportedModelError(
            f"{self._path}: pre_tokenizer: expected one that GGUF has a name for, found another: "
            "name the nearest with --pre NAME (llama-bpe, qwen2, gpt-2, ...)"
        )

    def _difference(self, entries: Mapping[str, Value], library: HfLibrary) -> str | None:
        """Says where the probes' ids differ from the library's, None where they do nowhere."""
        ours = Tokenizer.from_metadata(entries.get)
        for text in (*PROBES, *_salads(ours, entries)):
            expected = library.encode(text, add_special_tokens=False).ids
            if ours.kind == "llama" and ours.unk_id is not None and ours.unk_id in expected:
                continue  # runs of unknown characters are counted differently
            found = ours.encode(text, add_special=False)
            if found != expected:
                at = next(
                    (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                    min(len(found), len(expected)),
                )
                where = ours.decode(expected[max(0, at - 2) : at + 3])
                return f"{where!r} as {expected[at : at + 4]}, found {found[at : at + 4]}"
        return None

    def _verify(self, entries: Mapping[str, Value], library: HfLibrary | None) -> None:
        difference = None if library is None else self._difference(entries, library)
        if difference is not None:
            raise UnsupportedModelError(
                f"{self._path}: expected a vocabulary that SentencePiece's rule (the best-scored "
                f"pair first) encodes alike: {difference}"
            )

    def _compare_named(self, entries: Mapping[str, Value], library: HfLibrary) -> None:
        difference = self._difference(entries, library)
        if difference is not None:
            self._notes.append(
                f"--pre {self._pre} is not what tokenizer.json does: expected {difference}"
            )

    def _compare_special(self, entries: Mapping[str, Value], library: HfLibrary) -> None:
        """Added tokens: their ids must be the library's; a note where their context counts."""
        for i, (text, _) in self._added().items():
            known = library.token_to_id(text)
            if known != i:  # the library numbers tokens anew that do not follow the vocabulary
                raise ModelFileError(
                    f"{self._path}: added token {text!r:.40}: expected id {known} (what the "
                    f"tokenizers library gives it), found {i}"
                )
        try:
            ours = Tokenizer.from_metadata(entries.get)
        except TokenizerError as error:
            raise ModelFileError(f"{self._path}: {error}") from None
        for text, _ in [*self._added().values()][:8]:
            probe = f"one {text} two{text}three"
            if (
                ours.encode(probe, add_special=False)
                != library.encode(probe, add_special_tokens=False).ids
            ):
                self._notes.append(
                    f"white space beside {text!r} is not treated as in tokenizer.json"
                )
                return


def _salads(tokenizer: Tokenizer, entries: Mapping[str, Value]) -> Iterator[str]:
    """Texts of tokens in random order: they meet at pairs that merges may treat differently."""
    types = np.asarray(entries["tokenizer.ggml.token_type"])
    normal = np.flatnonzero(types == NORMAL)
    if not len(normal):
        return
    picked = np.random.default_rng(0).choice(normal, _SALAD_TOKENS).tolist()
    for first in range(0, _SALAD_TOKENS, _SALAD_LENGTH):
        ids = picked[first : first + _SALAD_LENGTH]
        text = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="ignore")
        yield unicodedata.normalize("NFC", text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: expected UTF-8 text, found: {error}") from None
