"""tokenizer.model: the pieces of a SentencePiece vocabulary, read from its protocol buffer.

Only the fields that matter here: ModelProto{1: pieces{1: text, 2: score, 3: type}, 2: trainer
{3: model type}, 3: normalizer{2: character map, 3: add dummy prefix, 4: remove extra white
space}}. Source: SentencePiece's sentencepiece_model.proto and the protocol buffer encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...runtime.base.errors import ModelFileError, UnsupportedModelError
from ...runtime.files.whole_file import MOST_TEXT, read_whole
from ...runtime.text.vocabulary import BYTE, NORMAL  # GGUF numbers the types as SentencePiece does

_BPE = 2  # the trainer's model type; 1 is unigram, the default


@dataclass(frozen=True)
class SentencePieceModel:
    """pieces: (text, score, type) by id. add_space_prefix: text gets a space in front."""

    pieces: tuple[tuple[str, float, int], ...]
    add_space_prefix: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """A BPE model. ModelFileError if the file makes no sense, UnsupportedModelError."""
    try:
        return _model(path, read_whole(path, MOST_TEXT))
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: expected a SentencePiece model, found: {error}") from None
    except OSError as error:
        raise ModelFileError(f"{path}: expected a file, found: {error.strerror}") from None


def _model(path: Path, data: bytes) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    kind, prefix, squeeze, charsmap = 1, True, True, b""
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
        elif number == 2:
            kind = next((v for n, v in _fields(_bytes(value)) if n == 3), kind)  # type: ignore[assignment]
        elif number == 3:
            for n, v in _fields(_bytes(value)):
                if n == 2:
                    charsmap = _bytes(v)
                elif n == 3:
                    prefix = bool(v)
                elif n == 4:
                    squeeze = bool(v)
    if not pieces:
        raise ValueError("no pieces")
    for name, found, wanted in (
        ("model type", kind, _BPE),
        ("character map", len(charsmap), 0),
        ("remove_extra_whitespaces", squeeze, False),
    ):
        if found != wanted:
            raise UnsupportedModelError(f"{path}: {name}: expected {wanted}, found {found}")
    return SentencePieceModel(tuple(pieces), prefix)


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value).decode()
        elif number == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif number == 3 and isinstance(value, int):
            kind = value
    if not NORMAL <= kind <= BYTE:
        raise ValueError(f"a piece of type {kind}")
    return text, score, kind


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes were expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a message's fields; fixed-size values as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(wire, -1)
        if size < 0 or at + size > len(data):
            raise ValueError(f"a field of {size} bytes at {at} of {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError(f"the end at {at}")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError(f"a number of more than ten bytes at {at}")
