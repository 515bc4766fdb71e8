"""Tokenizers of small vocabularies that a test writes down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stoker.runtime.text.tokenizer import Tokenizer


def byte_level(
    merges: list[str], extra: Mapping[str, int] | None = None, **metadata: Any
) -> Tokenizer:
    """A byte-level tokenizer of the 256 bytes, the results of `merges`, and `extra` tokens."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    tokens = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [1] * len(tokens)
    for token, kind in (extra or {}).items():
        tokens.append(token)
        types.append(kind)
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    values |= {key.replace("__", "."): value for key, value in metadata.items()}
    return Tokenizer.from_metadata(values.get)


def sentencepiece(
    pieces: Mapping[str, float], extra: Mapping[str, int] | None = None, **metadata: Any
) -> Tokenizer:
    """A SentencePiece BPE tokenizer: <unk>, <s>, </s>, 256 byte tokens, `pieces`, `extra`."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + list(pieces.values())
    for token, kind in (extra or {}).items():
        tokens.append(token)
        types.append(kind)
        scores.append(0.0)
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
    }
    values |= {key.replace("__", "."): value for key, value in metadata.items()}
    return Tokenizer.from_metadata(values.get)


def spelled(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.id_to_token(i) for i in ids]
