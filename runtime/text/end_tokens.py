"""Finds the tokens that end a turn or a generation: those that the file names, and known names.

A spelling is not enough: the vocabulary of Qwen holds "</s>" as a piece of HTML, as those of Gemma
do. A known name counts only if the file itself treats that token as more than text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .special_names import EOG_NAMES, EOM_NAMES, EOT_NAMES, FIM_END, FIM_IDS, FIM_NAMES
from .template_sources import template_sources
from .vocabulary import CONTROL, USER_DEFINED, Metadata, Vocabulary


@dataclass(frozen=True)
class EndTokens:
    """The tokens of a file that end a turn, a message or a generation.

    eot, eom: ids that end a turn and a message, None if there are none. eog: every token that ends
    a generation. control: the tokens among these, and the fill-in-the-middle tokens, that are
    control tokens although the file's type says otherwise.
    """

    eot: int | None
    eom: int | None
    eog: frozenset[int]
    control: frozenset[int]


def find_end_tokens(vocabulary: Vocabulary, get: Metadata, eos: int | None) -> EndTokens:
    """Returns the end tokens of a file; eos: its EOS. TokenizerError if an id is no number."""
    ids = _known_ids(vocabulary, get, eos)

    def first(names: Sequence[str]) -> int | None:
        return next((ids[name] for name in names if name in ids), None)

    eot = vocabulary.named(get, "eot_token_id", first(EOT_NAMES))
    eom = vocabulary.named(get, "eom_token_id", first(EOM_NAMES))
    eog = {ids[n] for n in (*EOT_NAMES, *EOM_NAMES, *EOG_NAMES) if n in ids}
    for key, names in FIM_END:
        found = vocabulary.named(get, key, first(names))
        if found is not None:
            eog.add(found)
    eog.update(i for i in (eos, eot, eom) if i is not None)
    # In the vocabularies of gpt-oss and Solar "<|end|>" ends a message, not the generation.
    if ("<|return|>" in ids and "<|call|>" in ids) or (
        "<|flush|>" in ids and ("<|call|>" in ids or "<|calls|>" in ids)
    ):
        eog.discard(ids.get("<|end|>", -1))
        if eot == ids.get("<|end|>"):
            eot = None
    return EndTokens(eot, eom, frozenset(eog), frozenset(ids.values()))


def _known_ids(vocabulary: Vocabulary, get: Metadata, eos: int | None) -> dict[str, int]:
    """Returns the known names that this file confirms, and their ids.

    The type CONTROL confirms a name, or an id of the metadata, or a chat template that writes a
    USER_DEFINED token. In files without any types the name alone suffices.
    """
    named = {eos}
    for key in ("eot_token_id", "eom_token_id", *FIM_IDS):
        named.add(vocabulary.named(get, key))
    templates = [t for t in template_sources(get).values() if isinstance(t, str)]
    known: dict[str, int] = {}
    for name in (*EOT_NAMES, *EOM_NAMES, *EOG_NAMES, *(n for _, ns in FIM_END for n in ns),
                 *FIM_NAMES):  # fmt: skip
        token = vocabulary.ids.get(name)
        if token is None:
            continue
        kind = vocabulary.types.get(token)
        if (
            not vocabulary.typed
            or kind == CONTROL
            or token in named
            or (kind == USER_DEFINED and any(name in template for template in templates))
        ):
            known[name] = token
    return known
