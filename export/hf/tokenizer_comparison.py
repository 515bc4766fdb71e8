"""Comparison of a GGUF file's tokenizer with Hugging Face's library, on texts full of traps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...runtime.text.pretokenizers import PRE_TOKENIZERS, byte_level_words
from ...runtime.text.tokenizer import Tokenizer
from ...runtime.text.vocabulary import NORMAL
from ..writer.gguf_values import Value
from .tokenizer_json import AddedToken
from .tokenizer_probes import PROBES

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfLibrary

# Names preferred over others of their kind: llama.cpp's own conversions write these.
_PREFERRED = (
    "llama-bpe", "qwen2", "gpt-2", "smollm", "deepseek-v3", "gpt-4o", "dbrx", "glm4", "falcon",
    "default", "deepseek-r1-qwen", "bailingmoe", "tiny_aya", "bloom", "olmo",
)  # fmt: skip
_SALAD_TOKENS, _SALAD_LENGTH = 4000, 40
_ALIKE = 8  # added tokens of the same flags that are tried


def find_pre(
    entries: Mapping[str, Value], library: HfLibrary, *, nfc: bool, ignore_merges: bool
) -> tuple[str | None, list[str]]:
    """The pre-tokenizer's name under which the probes get the library's ids, None without one.

    nfc: the library's normalizer, which the name has to imply. ignore_merges: names with this
    value are tried first. Second result: names that cut the probes as the library does, but imply
    another normalizer.
    """
    cutter = library.pre_tokenizer
    if cutter is None:
        return None, []
    words = [[w for w, _ in cutter.pre_tokenize_str(text)] for text in PROBES]
    ranked = sorted(
        (name for name, kind in PRE_TOKENIZERS.items() if not kind.escaped),
        key=lambda name: (
            PRE_TOKENIZERS[name].nfc != nfc,
            PRE_TOKENIZERS[name].ignore_merges != ignore_merges,
            _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED),
        ),
    )
    otherwise: list[str] = []
    tried: list[object] = []
    for name in ranked:
        kind = PRE_TOKENIZERS[name]
        if kind in tried:
            continue
        tried.append(kind)
        cut = byte_level_words(kind)
        if any(cut(t) != w for t, w in zip(PROBES, words, strict=True)):
            continue
        if kind.nfc != nfc:
            otherwise.append(name)
        elif difference({**entries, "tokenizer.ggml.pre": name}, library) is None:
            return name, []
    return None, otherwise


def difference(entries: Mapping[str, Value], library: HfLibrary) -> str | None:
    """Says where the probes' ids differ from the library's, None if they agree."""
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


def added_token_notes(
    ours: Tokenizer, library: HfLibrary, added: Sequence[AddedToken]
) -> Iterator[str]:
    """What GGUF cannot say of added tokens: one note for each kind of flags that matters."""
    tried: dict[tuple[bool, bool, bool], int] = {}
    for token in added:
        flags = (token.strips, token.single_word, token.normalized)
        tried[flags] = tried.get(flags, 0) + 1
        if tried[flags] > _ALIKE:
            continue
        text = token.text
        probe = f"one {text} two{text}three"
        expected = library.encode(probe, add_special_tokens=False).ids
        if ours.encode(probe, add_special=False) == expected:
            continue
        tried[flags] = _ALIKE
        if token.single_word:
            yield f"{text!r} is found within words, too, other than in tokenizer.json"
        elif token.strips:
            yield f"white space beside {text!r} is not treated as in tokenizer.json"
        else:
            yield f"text beside {text!r} is not treated as in tokenizer.json"


def _salads(tokenizer: Tokenizer, entries: Mapping[str, Value]) -> Iterator[str]:
    """Texts of tokens in random order: they meet at pairs that merges may treat differently."""
    types = np.asarray(entries["tokenizer.ggml.token_type"])
    normal = np.flatnonzero(types == NORMAL)
    if not len(normal):
        return
    picked = np.random.default_rng(0).choice(normal, _SALAD_TOKENS).tolist()
    for first in range(0, _SALAD_TOKENS, _SALAD_LENGTH):
        ids = picked[first : first + _SALAD_LENGTH]
        yield b"".join(map(tokenizer.token_bytes, ids)).decode(errors="ignore")
