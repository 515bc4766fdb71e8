"""stoker: runs language models that are bigger than the device.

`load(path)` gives a `Model`; `Model.generate`, `Model.chat` and `Model.session` generate text.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .runtime.base.errors import (
    BudgetError,
    Cancelled,
    ChatTemplateError,
    ContextLengthError,
    DeviceError,
    DownloadError,
    ModelFileError,
    OptionError,
    StokerError,
    TokenizerError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from .runtime.generate import Chunk, Generation
    from .runtime.load import load
    from .runtime.model import Model
    from .runtime.options import GenerationOptions, LoadOptions
    from .runtime.perplexity import Perplexity
    from .runtime.session import Session
    from .runtime.statistics import Statistics

__version__ = "0.1.0"

# Imported at first use, so that `stoker --help` need not load numpy and the core.
_LAZY = {
    "Chunk": "generate",
    "Generation": "generate",
    "GenerationOptions": "options",
    "LoadOptions": "options",
    "Model": "model",
    "Perplexity": "perplexity",
    "Session": "session",
    "Statistics": "statistics",
    "load": "load",
}

__all__ = [
    "BudgetError",
    "Cancelled",
    "ChatTemplateError",
    "Chunk",
    "ContextLengthError",
    "DeviceError",
    "DownloadError",
    "Generation",
    "GenerationOptions",
    "LoadOptions",
    "Model",
    "ModelFileError",
    "OptionError",
    "Perplexity",
    "Session",
    "Statistics",
    "StokerError",
    "TokenizerError",
    "UnsupportedModelError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".runtime.{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
