"""A Hugging Face folder's settings of embeddings: pooling, and whether tokens see later ones.

The pooling is that of sentence-transformers: modules.json lists the steps from a text to its
vector, and a step's own folder has its config.json.
"""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from ...runtime.base.errors import ModelFileError, UnsupportedModelError
from .folder.config import HfConfig
from .folder.safetensors_folder import read_json, read_json_array
from .names.table import Model

# Keys of a pooling's config.json -> values of <arch>.pooling_type (llama.cpp's).
_POOLINGS = {
    "pooling_mode_mean_tokens": 1,
    "pooling_mode_cls_token": 2,
    "pooling_mode_lasttoken": 3,
}
_NAMED = {"mean": 1, "cls": 2, "lasttoken": 3}  # values of its key pooling_mode, in newer folders
_MODE = "pooling_mode_"


def add_embedding(folder: Path, config: HfConfig, model: Model) -> None:
    """Puts pooling_type and attention.causal into model.entries if the folder says them.

    Raises UnsupportedModelError for a pooling that GGUF has no number for and for later tokens
    seen through a sliding window, ModelFileError for files that make no sense.
    """
    _add_causality(config.part("text_config") or config, model)
    for module in _modules(folder):
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            model.entries["pooling_type"] = _pooling(folder / module["path"] / "config.json")
        elif kind == "Normalize":
            model.notes.append(
                "sentence-transformers normalizes the embeddings: stoker does with normalize=True"
            )
        elif kind != "Transformer":
            model.notes.append(
                f"the module {module['path'] or kind} ({kind}) of modules.json is left out: "
                "embeddings are those before it"
            )


def _add_causality(text: HfConfig, model: Model) -> None:
    causal = text.flag("is_causal", True)
    both_ways = text.flag("use_bidirectional_attention", False)
    if causal and not both_ways:
        return
    if model.entries.get("attention.sliding_window"):
        key = "use_bidirectional_attention" if both_ways else "is_causal"
        expected = f"{str(not both_ways).lower()} in a model with sliding windows"
        raise text.unsupported(key, expected, both_ways)
    model.entries["attention.causal"] = False


def _modules(folder: Path) -> list[dict[str, Any]]:
    """The rows of modules.json, each with a type and the path of its folder; none without it."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    rows = read_json_array(path)
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("type"), str):
            raise ModelFileError(f"{path}: expected modules with a type, found {row!r:.80}")
        inner = row.get("path")
        if not isinstance(inner, str) or "\0" in inner or ".." in PurePath(inner).parts:
            raise ModelFileError(
                f"{path}: path: expected that of a folder within this one, found {inner!r:.80}"
            )
        if PurePath(inner).is_absolute():
            raise ModelFileError(f"{path}: path: expected a relative one, found {inner!r:.80}")
    return rows


def _pooling(path: Path) -> int:
    """The pooling_type of a pooling's config.json."""
    if not path.is_file():
        raise ModelFileError(f"{path}: expected the pooling that modules.json lists, found none")
    config = HfConfig(path, read_json(path))
    expected = ", ".join(_NAMED)
    named = config.get("pooling_mode")
    if named is not None:
        if not isinstance(named, str) or named not in _NAMED:
            raise config.unsupported("pooling_mode", f"one of {expected}", named)
        return _NAMED[named]
    # Without any of the keys the pooling is the mean, whose key counts as true if it is absent.
    modes = {key: False for key in config.values if key.startswith(_MODE)}
    modes["pooling_mode_mean_tokens"] = True
    chosen = [key for key, default in modes.items() if config.flag(key, default)]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        found = " and ".join(key.removeprefix(_MODE) for key in chosen) or "none"
        raise UnsupportedModelError(
            f"{path}: pooling: expected one of {', '.join(_POOLINGS)}, found {found:.80}"
        )
    return _POOLINGS[chosen[0]]
