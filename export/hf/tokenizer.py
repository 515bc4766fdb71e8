"""The tokenizer of a Hugging Face folder as tokenizer.* metadata of a GGUF file.

Two kinds: byte-level BPE ("gpt2"), from tokenizer.json, and SentencePiece BPE ("llama"), from
tokenizer.model or from a tokenizer.json that was made from one. What comes out is compared with
what Hugging Face's own library does on texts full of traps, so that a tokenizer that GGUF cannot
express is refused instead of becoming a slightly wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.base.errors import (
    ModelFileError,
    OptionError,
    TokenizerError,
    UnsupportedModelError,
)
from ...runtime.files.whole_file import read_whole_text
from ...runtime.text.pretokenizers import PRE_TOKENIZERS
from ...runtime.text.special_names import EOG_NAMES, EOM_NAMES, EOT_NAMES
from ...runtime.text.subword import SPACE
from ...runtime.text.tokenizer import Tokenizer
from ...runtime.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from ..writer.gguf_values import Value
from .added_tokens import complete, listed, special_tokens
from .folder.config import HfConfig
from .folder.safetensors_folder import read_json
from .sentencepiece_model import read_sentencepiece
from .tokenizer_comparison import added_token_notes, difference, find_pre
from .tokenizer_json import AddedToken, TokenizerJson, added_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfLibrary

_ADDED_SCORE = -1000.0  # score of tokens that the vocabulary has no score for
_NO_NAME = re.compile("[^A-Za-z0-9]")  # gguf-py, too, makes these characters "_" in template names
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass
class HfTokenizer:
    """entries: metadata keys and values, the chat template among them; notes: for the user."""

    entries: dict[str, Value]
    notes: list[str] = field(default_factory=list)


@dataclass
class _Vocabulary:
    """tokens, types and scores by id; merges: None if scores decide instead."""

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
        self._json = TokenizerJson(self._path) if self._path.is_file() else None
        self._settings = self._optional("tokenizer_config.json")
        self._generation = self._optional("generation_config.json")
        if self._settings.get("added_tokens_decoder") is None:  # else transformers does not read it
            self._settings = self._settings | self._optional("special_tokens_map.json")
        self._notes: list[str] = []
        if self._json is None and not self._sentencepiece.is_file():
            raise ModelFileError(
                f"{folder}: expected tokenizer.json or tokenizer.model, found none"
            )

    def _optional(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        return read_json(path) if path.is_file() else {}

    def read(self) -> HfTokenizer:
        file = self._json
        space_prefix: bool | None = None
        if file is not None and file.is_byte_level():
            vocabulary = self._byte_level(file)
        elif self._sentencepiece.is_file():
            found = read_sentencepiece(self._sentencepiece)
            texts, scores, types = (list(column) for column in zip(*found.pieces, strict=True))
            vocabulary = _Vocabulary(texts, types, scores)
            space_prefix = found.add_space_prefix
        else:
            assert file is not None
            vocabulary = self._escaped(file)
            space_prefix = file.space_prefix()
        if file is not None and space_prefix is not None:
            file.model(any_kind=self._sentencepiece.is_file())
            file.check_escaping()
        library = None if file is None else file.library()
        added = self._added(library)
        self._add_tokens(vocabulary, added)
        entries = self._entries(vocabulary)
        self._framing(entries, vocabulary.tokens, library)
        if space_prefix is not None:
            entries["tokenizer.ggml.add_space_prefix"] = space_prefix
            self._verify(entries, library)
        else:
            assert file is not None and library is not None
            entries["tokenizer.ggml.pre"] = self._pre_name(entries, file, library)
        if library is not None:
            self._compare_special(entries, library, added)
        entries.update(self._templates())
        return HfTokenizer(entries, self._notes)

    # The vocabulary.

    def _byte_level(self, file: TokenizerJson) -> _Vocabulary:
        model = file.model()
        texts = file.texts(model, self._n_vocab)
        merges = [f"{left} {right}" for left, right in file.merges(model)]
        return _Vocabulary([t or "" for t in texts], [NORMAL] * len(texts), merges=merges)

    def _escaped(self, file: TokenizerJson) -> _Vocabulary:
        """SentencePiece's vocabulary from its merges: an earlier merge has a higher score."""
        model = file.model()
        texts = [t or "" for t in file.texts(model, self._n_vocab)]
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(file.merges(model)):
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

    def _added(self, library: HfLibrary | None) -> list[AddedToken]:
        """Added tokens that the embedding has rows for; notes the others.

        The library gets those that tokenizer.json lacks.
        """
        special = list(special_tokens(self._settings))
        texts = {row["content"] for row in special}
        rows = listed(
            self._folder, self._settings, self._optional("added_tokens.json"), special=texts
        )
        if self._json is not None and library is not None:
            found = complete(self._path, library, rows, iter(special), self._json.added())
        else:
            found = added_tokens(self._folder, iter(rows))
        kept = [token for token in found if token.id < self._n_vocab]
        beyond = [token.text for token in found if token.id >= self._n_vocab]
        if beyond:
            named = ", ".join(f"{text!r:.40}" for text in beyond[:3])
            self._notes.append(
                f"{len(beyond)} added tokens beyond the {self._n_vocab} rows of the embedding "
                f"are left out: {named}{', ...' if len(beyond) > 3 else ''}"
            )
        return kept

    def _special_texts(self) -> set[str]:
        """Texts that the folder names as special tokens; transformers makes them special, too."""
        named: list[object] = []
        for values in (self._settings, self._optional("special_tokens_map.json")):
            for key, value in values.items():
                if key.endswith("_token"):
                    named.append(value)
                elif key.endswith("_special_tokens"):  # a list, or texts by role
                    listed = value.values() if isinstance(value, dict) else value
                    named += listed if isinstance(value, (list, dict)) else ()
        texts = (token.get("content") if isinstance(token, dict) else token for token in named)
        return {text for text in texts if isinstance(text, str)}

    def _add_tokens(self, v: _Vocabulary, added: list[AddedToken]) -> None:
        """Adds the added tokens and their types, then names for ids without a token."""
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
        named, ends = self._special_texts(), set(self._ends())
        for token in added:
            i = token.id
            v.tokens[i] = token.text
            if token.special or token.text in named or i in ends:
                v.types[i] = v.types[i] if v.types[i] == UNKNOWN else CONTROL
            elif v.types[i] in (NORMAL, USER_DEFINED):
                v.types[i] = USER_DEFINED
        known = set(v.tokens)
        for i, text in enumerate(v.tokens):
            if v.types[i] == USER_DEFINED and v.scores is not None and SPACE in text:
                plain = text.replace(SPACE, " ")  # added tokens are found in the unescaped text
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
        for role, key in (
            ("bos", "bos_token_id"),
            ("eos", "eos_token_id"),
            ("unk", "unknown_token_id"),
            ("sep", "seperator_token_id"),  # the key's spelling in GGUF
            ("pad", "padding_token_id"),
        ):
            token = self._special_id(self._settings, role, ids)
            if token is not None:
                entries[f"tokenizer.ggml.{key}"] = token
        self._end_of_turn(entries, v)
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

    def _ends(self) -> list[int]:
        """The ids that generation_config.json, else config.json, names as ends: one or several."""
        ends = self._generation.get("eos_token_id")
        if ends is None:
            ends = self._config.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        return [i for i in ends if type(i) is int and i >= 0]

    def _end_of_turn(self, entries: dict[str, Value], v: _Vocabulary) -> None:
        """Sets the end of turn: transformers stops at ids of its own, which need not be the EOS."""
        tokens = v.tokens
        others = [
            i
            for i in dict.fromkeys(self._ends())
            if i < len(tokens) and i != entries.get("tokenizer.ggml.eos_token_id")
        ]
        names = {*EOT_NAMES, *EOM_NAMES, *EOG_NAMES}
        # Readers know a name by itself if its token is a control token.
        unknown = [i for i in others if tokens[i] not in names or v.types[i] != CONTROL]
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

    def _framing(
        self, entries: dict[str, Value], tokens: list[str], library: HfLibrary | None
    ) -> None:
        """Sets whether texts get BOS and EOS, by tokenizer_config.json, else by the library."""
        before = after = False
        if library is not None:
            plain = library.encode("a", add_special_tokens=False).ids
            framed = library.encode("a", add_special_tokens=True).ids
            at = next(
                (i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), len(framed)
            )
            head, tail = framed[:at], framed[at + len(plain) :]
            for role, frame in (("bos", head), ("eos", tail)):
                key = f"tokenizer.ggml.{role}_token_id"
                if len(frame) == 1 and frame[0] < len(tokens):
                    entries.setdefault(key, frame[0])
                if frame and frame != [entries.get(key)]:
                    spelled = " ".join(map(str, map(library.id_to_token, frame)))
                    side = "begin" if role == "bos" else "end"
                    self._notes.append(
                        f"tokenizer.json lets texts {side} with {spelled!r:.80} rather than with "
                        f"{role.upper()} alone, which GGUF cannot say"
                    )
            before = head == [entries.get("tokenizer.ggml.bos_token_id")]
            after = tail == [entries.get("tokenizer.ggml.eos_token_id")]
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
                else:
                    self._notes.append(f"a chat template without a text is left out: {row!r:.60}")
        more = self._folder / "additional_chat_templates"
        if path.is_file():
            named["default"] = _text(path)
        if more.is_dir():
            named |= {p.stem: _text(p) for p in sorted(more.glob("*.jinja"))}
        if "default" in named:
            yield "tokenizer.chat_template", named.pop("default")
        others: dict[str, str] = {}
        for name, template in sorted(named.items()):
            key = _NO_NAME.sub("_", name)
            if not key or key in others:
                why = "another has its name in the file" if key else "it has no name"
                self._notes.append(f"the chat template {name!r:.60} is left out: {why}")
                continue
            if key != name:
                self._notes.append(f"the chat template {name!r:.60} is called {key} in the file")
            others[key] = template
        if others:
            yield "tokenizer.chat_templates", list(others)
        for key, template in others.items():
            yield f"tokenizer.chat_template.{key}", template

    # Comparing with Hugging Face's library.

    def _pre_name(
        self, entries: Mapping[str, Value], file: TokenizerJson, library: HfLibrary
    ) -> str:
        """The name for tokenizer.ggml.pre: what the user chose, or what does the same."""
        nfc = file.nfc()
        if self._pre is not None:
            if nfc and not PRE_TOKENIZERS[self._pre].nfc:
                raise UnsupportedModelError(
                    f"{self._path}: normalizer: expected none (--pre {self._pre} implies none), "
                    "found NFC"
                )
            found = difference({**entries, "tokenizer.ggml.pre": self._pre}, library)
            if found is not None:
                self._notes.append(
                    f"--pre {self._pre} is not what tokenizer.json does: expected {found}"
                )
            return self._pre
        whole = bool(file.model().get("ignore_merges"))
        name, otherwise = find_pre(entries, library, nfc=nfc, ignore_merges=whole)
        if name is not None:
            return name
        if otherwise:
            raise UnsupportedModelError(
                f"{self._path}: normalizer: expected {'none' if nfc else 'NFC'} (as "
                f"{', '.join(otherwise)}, which cut text alike, imply), found "
                f"{'NFC' if nfc else 'none'}"
            )
        raise UnsupportedModelError(
            f"{self._path}: pre_tokenizer: expected one that GGUF has a name for, found another: "
            "name the nearest with --pre NAME (llama-bpe, qwen2, gpt-2, ...)"
        )

    def _verify(self, entries: Mapping[str, Value], library: HfLibrary | None) -> None:
        found = None if library is None else difference(entries, library)
        if found is not None:
            raise UnsupportedModelError(
                f"{self._path}: expected a vocabulary that SentencePiece's rule (the best-scored "
                f"pair first) encodes alike: {found}"
            )

    def _compare_special(
        self, entries: Mapping[str, Value], library: HfLibrary, added: list[AddedToken]
    ) -> None:
        """Notes each added token whose context counts."""
        try:
            ours = Tokenizer.from_metadata(entries.get)
        except TokenizerError as error:
            raise ModelFileError(f"{self._path}: {error}") from None
        self._notes += added_token_notes(ours, library, added)


def _text(path: Path) -> str:
    try:
        return read_whole_text(path)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: expected UTF-8 text, found: {error}") from None
