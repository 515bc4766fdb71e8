"""The matrices of a mixture's routed experts, however the file joins them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...runtime.base.errors import UnsupportedModelError

if TYPE_CHECKING:
    from ...runtime._core import GgufFile

PARTS = ("gate", "up", "down")
_JOINED = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
_SINGLE = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight")


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of one expert, [rows, cols], and where its bytes lie.

    tensor: the name of the tensor that holds it; slice: its number there. offset: bytes from the
    beginning of the shard.
    """

    layer: int
    part: str
    expert: int
    type: str
    rows: int
    cols: int
    shard: int
    offset: int
    nbytes: int
    tensor: str
    slice: int

    @property
    def name(self) -> str:
        """The matrix's name as a tensor of its own."""
        return f"blk.{self.layer}.ffn_{self.part}.{self.expert}.weight"


def joined_name(layer: int, part: str) -> str:
    """The name of the tensor that holds a part of all experts of a layer."""
    return f"blk.{layer}.ffn_{part}_exps.weight"


def expert_matrices(file: GgufFile) -> Sequence[ExpertMatrix]:
    """All experts' matrices, by layer, part and expert. UnsupportedModelError if there are none."""
    found = []
    for t in file.tensors:
        if joined := _JOINED.fullmatch(t.name):
            layer, part, experts, first = int(joined[1]), joined[2], math.prod(t.shape[2:]), 0
        elif single := _SINGLE.fullmatch(t.name):
            layer, part, experts, first = int(single[1]), single[2], 1, int(single[3])
        else:
            continue
        size = t.nbytes // experts
        found += [
            ExpertMatrix(
                layer=layer,
                part=part,
                expert=first + e,
                type=t.type,
                rows=t.shape[1],
                cols=t.shape[0],
                shard=t.shard,
                offset=t.offset + e * size,
                nbytes=size,
                tensor=t.name,
                slice=e,
            )
            for e in range(experts)
        ]
    if not found:
        raise UnsupportedModelError(f"{file.path}: expected a mixture of experts, found none")
    return sorted(found, key=lambda m: (m.layer, PARTS.index(m.part), m.expert))
