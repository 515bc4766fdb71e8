"""Records the routing of a running model as a trace, a chunk or token at a time."""

from __future__ import annotations

import os
import re
import threading
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from .trace import DECODE, PREFILL, TraceWriter

if TYPE_CHECKING:
    from ...runtime._core import Engine, GgufFile

_HIT = 1  # one of the engine's sources: 0 miss, 1 hit, 2 late (its prefetch was in flight)
_JOINED = re.compile(r"blk\.(\d+)\.ffn_\w+_exps\.weight")
_SPLIT = re.compile(r"blk\.(\d+)\.ffn_\w+\.0\.weight")


class RoutingRecorder:
    """Moves the routing that an engine records into a file, until `close`."""

    def __init__(self, engine: Engine, file: GgufFile, path: str | os.PathLike[str]) -> None:
        config = engine.config
        self.chunk = int(engine.plan["chunk"])  # tokens to evaluate between drains
        self._engine = engine
        self._lock = threading.Lock()
        self._step = {PREFILL: 0, DECODE: 0}  # tokens recorded
        self._sequence: dict[int, int] = {}  # the engine's number of a sequence -> the file's
        self._open = True
        sizes = expert_bytes(file, int(config["n_layer"]))
        self._writer = TraceWriter(
            path,
            n_layer=int(config["n_layer"]),
            n_expert=int(config["n_expert"]),
            n_expert_used=int(config["n_expert_used"]),
            expert_bytes=sizes if all(sizes) else None,
            tokens=True,
        )
        try:
            engine.record_routing(True)
        except BaseException:
            self._writer.discard()
            raise

    def drain(self) -> None:
        """Writes what was evaluated since the last call."""
        with self._lock:
            if not self._open:
                return
            columns = self._engine.take_routing()
            # A visit is one token at one layer; the engine records experts in the order of use.
            keys = ("evaluation", "layer", "token", "rank")
            order = np.lexsort([columns[key] for key in reversed(keys)])
            visit = np.stack([columns[key][order] for key in keys[:3]])  # [3, uses]
            begins = np.flatnonzero(np.any(visit[:, 1:] != visit[:, :-1], axis=0)) + 1
            edges = [0, *begins.tolist(), len(order)] if len(order) else []
            expert, weight, wait = (
                columns[key][order].tolist() for key in ("expert", "weight", "wait_us")
            )
            hit = (columns["source"][order] == _HIT).tolist()
            tokens, ids, generates, sequence = (
                columns[key][order].tolist() for key in ("tokens", "id", "phase", "sequence")
            )
            evaluation, layer, token = visit.tolist()
            for at, end in pairwise(edges):
                phase = DECODE if generates[at] else PREFILL
                self._writer.visit(
                    self._step[phase] + (0 if generates[at] else token[at]),
                    phase,
                    layer[at],
                    expert[at:end],
                    weight[at:end],
                    hits=hit[at:end],
                    wait_us=wait[at:end],
                    token=ids[at],
                    sequence=self._sequence.setdefault(sequence[at], len(self._sequence)),
                )
                if end == len(order) or evaluation[end] != evaluation[at]:
                    self._step[phase] += 1 if generates[at] else tokens[at]

    def drop(self) -> None:
        """Drops what was recorded since the last drain, as after an unfinished evaluation."""
        with self._lock:
            if self._open:
                self._engine.take_routing()

    def close(self) -> None:
        """Renames the finished file to its name. Raises OptionError if it cannot be written."""
        with self._lock:
            self._open = False
            self._engine.record_routing(False)
            self._writer.close()


def expert_bytes(file: GgufFile, n_layer: int) -> list[int]:
    """Returns the bytes of one expert in each layer, [n_layer], from the sizes of its tensors."""
    sizes = [0] * n_layer
    for tensor in file.tensors:
        joined, split = _JOINED.fullmatch(tensor.name), _SPLIT.fullmatch(tensor.name)
        found = joined or split
        if found is not None and int(found[1]) < n_layer:
            experts = tensor.shape[-1] if joined else 1
            sizes[int(found[1])] += tensor.nbytes // experts
    return sizes
