"""Pools the hidden states of a text's tokens into one vector for the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import arguments
from .base.errors import ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# The poolings in the order of <arch>.pooling_type, from llama.cpp's enumeration.
_OF_FILE = ("none", "mean", "cls", "last", "rank")
POOLINGS = ("none", "mean", "cls", "last")


def check_pooling(name: object) -> str:
    """Returns `name` if it is one of POOLINGS. Raises OptionError."""
    return arguments.choice("pooling", name, POOLINGS)


def pooling_of_file(value: Any, key: str) -> str:
    """Returns the pooling that a file's pooling_type names; "mean" if it has none (None).

    Raises ModelFileError, UnsupportedModelError.
    """
    if value is None or value == -1:
        return "mean"
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(_OF_FILE):
        raise ModelFileError(f"{key}: expected 0 to {len(_OF_FILE) - 1}, found {value!r:.40}")
    name = _OF_FILE[value]
    if name not in POOLINGS:
        raise UnsupportedModelError(
            f"{key}: expected one of {', '.join(POOLINGS)}, found {name}: "
            "a reranker gives scores, not embeddings"
        )
    return name


def pool(hidden: npt.NDArray[np.float32], kind: str) -> npt.NDArray[Any]:
    """Pools hidden [n, n_embd], n >= 1. Returns [n_embd]; [n, n_embd] for "none"."""
    import numpy as np

    if kind == "none":
        return hidden
    if kind == "mean":
        return np.asarray(hidden.mean(axis=0, dtype=np.float64))
    return np.asarray(hidden[0 if kind == "cls" else -1])
