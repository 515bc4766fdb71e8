"""Figures from a run's recorded routing: hits by layer, and reads of an optimal cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HIT = 1  # Engine.take_routing()'s "source"


def load(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays that a worker wrote."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def layer_hits(routing: Mapping[str, npt.NDArray[Any]], n_layer: int, n: int) -> list[float]:
    """Share of hits by layer [n_layer] in the last n evaluations; 0 in layers without experts."""
    decoded = routing["evaluation"] > routing["evaluation"].max() - n
    layer = routing["layer"][decoded]
    uses = np.bincount(layer, minlength=n_layer)
    hits = np.bincount(layer[routing["source"][decoded] == HIT], minlength=n_layer)
    shares = hits / np.maximum(uses, 1)
    return [round(float(share), 4) for share in shares]


def belady_misses(
    routing: Mapping[str, npt.NDArray[Any]], config: Mapping[str, Any], slots: int, n: int
) -> float:
    """Misses per decoded token of an optimal cache that was empty before the prompt.

    config: n_layer, n_expert, n_expert_used; slots: experts that the cache holds; n: the last
    evaluations, which are counted.
    """
    from ...runtime import _core

    evaluation = np.asarray(routing["evaluation"], np.int64)
    first = np.flatnonzero(np.asarray(routing["rank"]) == 0)
    result = _core.simulate(
        evaluation=evaluation[first],
        layer=np.asarray(routing["layer"], np.int32)[first],
        offset=np.append(first, len(evaluation)).astype(np.int64),
        expert=np.asarray(routing["expert"], np.int32),
        weight=np.asarray(routing["weight"], np.float32),
        token=np.zeros(0, np.int32),
        decode=np.asarray(routing["phase"], np.uint8)[first],
        sequence=np.zeros(0, np.int64),
        n_layer=config["n_layer"],
        n_expert=config["n_expert"],
        n_expert_used=config["n_expert_used"],
        policy="belady",
        slots=slots,
        count_from=int(evaluation.max()) - n + 1,
    )
    return float(result["misses"]) / n
