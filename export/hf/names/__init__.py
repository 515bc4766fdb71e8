"""The families that can be converted: from tensor names and configs of Hugging Face to GGUF's."""

from __future__ import annotations

from ..folder.config import HfConfig
from . import gemma, glm, llama, olmoe, qwen, smallthinker
from .table import Family

FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES,
    *qwen.FAMILIES,
    *olmoe.FAMILIES,
    *gemma.FAMILIES,
    *smallthinker.FAMILIES,
    *glm.FAMILIES,
)


def family_of(config: HfConfig) -> Family:
    """The family that config.json's `architectures` names; UnsupportedModelError if none."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise config.wrong("architectures", "a list of names", classes)
    for family in FAMILIES:
        if classes[0] in family.classes:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.classes)
    raise config.unsupported("architectures", f"one of {known}", classes[0])
