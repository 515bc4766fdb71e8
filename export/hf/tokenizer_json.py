"""tokenizer.json of a Hugging Face folder: vocabulary, merges, steps and added tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.base.errors import ModelFileError, UnsupportedModelError
from ...runtime.text.subword import SPACE
from .folder.safetensors_folder import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfLibrary


@dataclass(frozen=True)
class AddedToken:
    """One row of added_tokens; the flags are the library's."""

    id: int
    text: str
    special: bool = False
    strips: bool = False  # lstrip or rstrip
    single_word: bool = False
    normalized: bool = False


class TokenizerJson:
    """The file, parsed; what is malformed is a ModelFileError when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = read_json(path)

    def model(self, *, any_kind: bool = False) -> dict[str, Any]:
        """The BPE model. any_kind: also one that only tokenizer.model beside it explains."""
        model = self._values.get("model")
        if not isinstance(model, dict):
            raise ModelFileError(f"{self.path}: model: expected an object, found {model!r:.40}")
        # Old files give no type; only BPE has merges.
        kind = model.get("type") or ("BPE" if "merges" in model else "none")
        if kind != "BPE" and not any_kind:
            raise UnsupportedModelError(f"{self.path}: model: expected BPE, found {kind}")
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(key):
                raise UnsupportedModelError(
                    f"{self.path}: model.{key}: expected none, found {model[key]!r:.40}"
                )
        return model

    def steps(self, key: str) -> Iterator[dict[str, Any]]:
        """The parts of a normalizer, pre-tokenizer or decoder, sequences unrolled."""
        pending = [self._values.get(key)]
        while pending:
            step = pending.pop(0)
            if not isinstance(step, dict):
                continue
            inner = step.get("pretokenizers") or step.get("normalizers") or step.get("decoders")
            if step.get("type") == "Sequence":
                pending = [*(inner if isinstance(inner, list) else ()), *pending]
            else:
                yield step

    def is_byte_level(self) -> bool:
        """Whether its tokens are spelled in GPT-2's byte alphabet."""
        steps = [*self.steps("pre_tokenizer"), *self.steps("decoder")]
        return any(step.get("type") == "ByteLevel" for step in steps)

    def nfc(self) -> bool:
        """Whether a byte-level tokenizer brings text to normalization form C first.

        UnsupportedModelError for any other normalizer: no name of tokenizer.ggml.pre implies it.
        """
        kinds = [step.get("type") for step in self.steps("normalizer")]
        other = [kind for kind in kinds if kind != "NFC"]
        if other:
            raise UnsupportedModelError(
                f"{self.path}: normalizer: expected none or NFC, found {other[0]!s:.40}"
            )
        return bool(kinds)

    def check_escaping(self) -> None:
        """Raises UnsupportedModelError if a normalizer does more than put "▁" for spaces."""
        for step in self.steps("normalizer"):
            kind, pattern = step.get("type"), step.get("pattern")
            escapes = (
                kind == "Replace" and pattern == {"String": " "} and step.get("content") == SPACE
            )
            if not escapes and not (kind == "Prepend" and step.get("prepend") == SPACE):
                raise UnsupportedModelError(
                    f"{self.path}: normalizer: expected none but spaces as {SPACE!r}, "
                    f"found {kind!s:.40}"
                )

    def space_prefix(self) -> bool:
        """Whether text gets a space in front, as SentencePiece does."""
        for step in [*self.steps("normalizer"), *self.steps("pre_tokenizer")]:
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

    def texts(self, model: Mapping[str, Any], n_vocab: int) -> list[str | None]:
        """The tokens of model.vocab by id, None for ids that it leaves out.

        Added tokens that are listed there, too, may lie beyond the n_vocab rows of the embedding
        and are left out; any other is a ModelFileError.
        """
        vocab = model.get("vocab")
        if not isinstance(vocab, dict) or not vocab:
            raise ModelFileError(f"{self.path}: model.vocab: expected tokens, found none")
        beyond = {token.text for token in self.added() if token.id >= n_vocab}
        texts: list[str | None] = []
        for text, i in vocab.items():
            if text in beyond and type(i) is int and i >= n_vocab:
                continue
            if type(i) is not int or not 0 <= i < n_vocab:
                raise ModelFileError(
                    f"{self.path}: token {text!r:.40}: expected an id below {n_vocab} (the rows "
                    f"of the embedding), found {i!r:.40}"
                )
            texts += [None] * (i + 1 - len(texts))
            if texts[i] is not None:
                raise ModelFileError(
                    f"{self.path}: id {i}: expected one token, found {texts[i]!r:.40} and "
                    f"{text!r:.40}"
                )
            texts[i] = text
        return texts

    def merges(self, model: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The pairs of model.merges by rank."""
        merges = model.get("merges")
        if not isinstance(merges, list):
            raise ModelFileError(f"{self.path}: model.merges: expected a list, found none")
        pairs: list[tuple[str, str]] = []
        for merge in merges:
            parts = merge.split(" ") if isinstance(merge, str) else merge
            if (
                not isinstance(parts, list)
                or len(parts) != 2
                or not all(isinstance(p, str) and p and " " not in p for p in parts)
            ):
                raise ModelFileError(
                    f"{self.path}: model.merges: expected two tokens, found {merge!r:.60}"
                )
            pairs.append((parts[0], parts[1]))
        return pairs

    def added(self) -> list[AddedToken]:
        """The added tokens in the file's order."""
        listed = self._values.get("added_tokens")
        rows = listed if isinstance(listed, list) else []
        return added_tokens(self.path, ((r.get("id"), r) for r in rows if isinstance(r, dict)))

    def library(self) -> HfLibrary:
        """Hugging Face's tokenizer of the file.

        Padding and truncation, which a trainer leaves in it, are settings of its batches and no
        part of the tokenizer.
        """
        from tokenizers import Tokenizer as Library

        try:
            library = Library.from_file(str(self.path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelFileError(
                f"{self.path}: expected a tokenizer, found: {error!s:.200}"
            ) from None
        library.no_padding()
        library.no_truncation()
        return library


def added_tokens(path: Path, rows: Iterator[tuple[object, Mapping[str, Any]]]) -> list[AddedToken]:
    """Added tokens of (id, row) pairs; the first row of an id counts. ModelFileError."""
    found: dict[int, AddedToken] = {}
    for i, row in rows:
        text = row.get("content")
        if type(i) is not int or i < 0 or not isinstance(text, str):
            raise ModelFileError(
                f"{path}: added token {text!r:.40}: expected an id and a text, found id {i!r:.40}"
            )
        if i in found and found[i].text != text:
            raise ModelFileError(
                f"{path}: id {i}: expected one token, found {found[i].text!r:.40} and {text!r:.40}"
            )
        found.setdefault(
            i,
            AddedToken(
                i,
                text,
                special=bool(row.get("special")),
                strips=bool(row.get("lstrip") or row.get("rstrip")),
                single_word=bool(row.get("single_word")),
                normalized=bool(row.get("normalized")),
            ),
        )
    return list(found.values())
