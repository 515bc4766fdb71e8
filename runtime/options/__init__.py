"""Options of loading and generation: tables that check every value they are given."""

from .generation import GenerationOptions, merge
from .load import LoadOptions

__all__ = ["GenerationOptions", "LoadOptions", "merge"]
