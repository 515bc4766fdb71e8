"""Reads the chat templates of a GGUF file: one without a name, and others by name."""

from __future__ import annotations

from typing import Any

from .vocabulary import Metadata


def template_sources(get: Metadata) -> dict[str, Any]:
    """Returns the chat templates of a file by name, "default" for the one without a name.

    Reads tokenizer.chat_template, and tokenizer.chat_template.<name> for the names that
    tokenizer.chat_templates lists; an empty one counts as absent, since some files write that. The
    values may be of any type, not only text.
    """
    found = {"default": get("tokenizer.chat_template")}
    names = get("tokenizer.chat_templates")
    for name in names if isinstance(names, (list, tuple)) else ():
        source = get(f"tokenizer.chat_template.{name}")
        if found.get(str(name)) in (None, ""):
            found[str(name)] = source
    return {name: source for name, source in found.items() if source is not None and source != ""}
