"""config.json of a Hugging Face folder, with checks that name the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....runtime.base.errors import ModelFileError, UnsupportedModelError
from .safetensors_folder import read_json

_SIZE_LIMIT = 1 << 24  # the engine's limit, too (config.cc)


class HfConfig:
    """Values by key; a key whose value is null counts as absent, as it does in transformers."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    @classmethod
    def read(cls, folder: Path) -> HfConfig:
        """The folder's config.json. ModelFileError if it is missing or is not JSON."""
        path = folder / "config.json"
        if not path.is_file():
            found = "no such folder" if not folder.is_dir() else "none"
            raise ModelFileError(f"{folder}: expected a folder with config.json, found {found}")
        return cls(path, read_json(path))

    def get(self, *keys: str) -> Any:
        """The first of the keys that has a value, else None."""
        return next((v for v in map(self.values.get, keys) if v is not None), None)

    def wrong(self, key: str, expected: str, found: object) -> ModelFileError:
        """The error of a value that makes no sense."""
        return ModelFileError(f"{self.path}: {key}: expected {expected}, found {found!r:.80}")

    def unsupported(self, key: str, expected: str, found: object) -> UnsupportedModelError:
        """The error of a value that means something which stoker does not compute."""
        return UnsupportedModelError(
            f"{self.path}: {key}: expected {expected}, found {found!r:.80}"
        )

    def size(self, *keys: str, default: int | None = None, low: int = 1, high: int = 0) -> int:
        """An integer from `low` to `high` (0: the engine's limit), of the first key that has it."""
        value = self.get(*keys)
        if value is None:
            if default is None:
                raise ModelFileError(f"{self.path}: expected {keys[0]}, found none")
            return default
        high = high or _SIZE_LIMIT
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(keys[0], f"an integer of {low} to {high}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise ModelFileError(f"{self.path}: expected {key}, found none")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, "a number", value)
        if not math.isfinite(value):
            raise self.wrong(key, "a finite number", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def text(self, *keys: str, default: str) -> str:
        """A string."""
        value = self.get(*keys)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(keys[0], "a string", value)
        return value

    def flags(self, key: str, n: int) -> list[bool] | None:
        """A list of n flags (true, false, 1 or 0), None if there is none."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != n or set(map(int_or_none, value)) - {0, 1}:
            raise self.wrong(key, f"{n} values of 0 or 1", value)
        return [bool(v) for v in value]

    def part(self, key: str) -> HfConfig | None:
        """An object inside the config, None if there is none."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object", value)
        return HfConfig(self.path, value)


def int_or_none(value: object) -> int | None:
    """An int or bool as int, None for anything else."""
    return int(value) if isinstance(value, int) else None
