"""Added tokens of a Hugging Face folder: those of tokenizer.json, and those that other files add.

transformers reads the same files and in this order (PreTrainedTokenizerBase._from_pretrained,
TokenizersBackend.__init__): added_tokens_decoder of tokenizer_config.json, or if it is absent
special_tokens_map.json and added_tokens.json; then the special tokens that have no token yet. The
tokenizers library gives the ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.base.errors import ModelFileError
from .tokenizer_json import AddedToken, added_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfLibrary

_DECODER = "added_tokens_decoder"
# The order is transformers', in which tokens get ids.
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def listed(
    folder: Path, settings: Mapping[str, Any], legacy: Mapping[str, Any], special: set[str]
) -> list[tuple[int, Mapping[str, Any]]]:
    """(id, row) of the tokens that other files than tokenizer.json give ids, by id.

    settings: tokenizer_config.json; legacy: added_tokens.json, which counts if the settings
    have no added_tokens_decoder; special: texts that are special tokens there. ModelFileError.
    """
    decoder = settings.get(_DECODER)
    pairs: list[tuple[object, Any]]
    if decoder is not None:
        if not isinstance(decoder, dict):
            raise ModelFileError(f"{folder}: {_DECODER}: expected an object, found {decoder!r:.40}")
        pairs = [(int(i) if i.isdecimal() else i, row) for i, row in decoder.items()]
    else:
        pairs = [
            (i, {"content": text, "special": text in special, "normalized": text not in special})
            for text, i in legacy.items()
        ]
    rows: dict[int, Mapping[str, Any]] = {}
    for i, row in pairs:
        content = row.get("content") if isinstance(row, dict) else None
        if type(i) is not int or i < 0 or not isinstance(content, str):
            raise ModelFileError(
                f"{folder}: added token: expected an id and a row with its content, found "
                f"{i!r:.40} and {row!r:.40}"
            )
        rows[i] = row
    return sorted(rows.items())


def special_tokens(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Rows of the special tokens that tokenizer_config.json names, roles first, then the others."""
    keys = [key for key in settings if key.endswith("_token") and key not in _ROLES]
    named = [settings.get(key) for key in (*_ROLES, *keys)]
    others = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    if isinstance(others, dict):
        named += others.values()
    elif isinstance(others, list):
        named += others
    for token in named:
        row = token if isinstance(token, dict) else {"content": token}
        if isinstance(row.get("content"), str) and row["content"]:
            yield {**row, "special": True}


def complete(
    path: Path,
    library: HfLibrary,
    rows: list[tuple[int, Mapping[str, Any]]],
    special: Iterator[Mapping[str, Any]],
    own: list[AddedToken],
) -> list[AddedToken]:
    """Adds the tokens to the library as transformers does; returns all that it has then, by id.

    path: tokenizer.json; rows: from listed(); own: the file's own added tokens. Raises
    ModelFileError if the library gives a token another id than the folder.
    """
    from tokenizers import AddedToken as Row

    def made(row: Mapping[str, Any]) -> Row:
        return Row(row["content"], **{key: bool(row[key]) for key in _FLAGS if key in row})

    try:
        known = {repr(token) for token in library.get_added_tokens_decoder().values()}
        adding = [row for row in (made(row) for _, row in rows) if repr(row) not in known]
        taken = {token.content for token in library.get_added_tokens_decoder().values()}
        taken.update(row.content for row in adding)
        for token in special:
            if token["content"] not in taken:
                adding.append(made(token))
                taken.add(token["content"])
        library.add_tokens(adding)
    except (TypeError, ValueError) as error:  # raised for a value that is not text
        raise ModelFileError(f"{path}: added tokens: {error!s:.200}") from None
    given = [(token.id, token.text) for token in own]
    for i, text in [*given, *((i, row["content"]) for i, row in rows)]:
        found = library.token_to_id(text)
        if found != i:  # the library renumbers ids that do not follow the vocabulary
            raise ModelFileError(
                f"{path}: added token {text!r:.40}: expected id {found} (what the "
                f"tokenizers library gives it), found {i}"
            )
    return added_tokens(
        path,
        (
            (i, {"content": token.content, **{key: getattr(token, key) for key in _FLAGS}})
            for i, token in sorted(library.get_added_tokens_decoder().items())
        ),
    )
