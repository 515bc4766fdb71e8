"""Replays recorded routing through every cache policy, without a model.

Conventions: the cache is global (any layer's expert in any slot), starts cold, and reads on demand
only. A token, or a prompt's chunk, asks for each distinct expert of a layer once; that is one use.
The policy sees the token's choice before it is asked for victims, and an expert that the chunk
needs cannot be a victim. Belady's policy evicts the expert whose next use is last: no policy that
reads on demand misses less. It is also the oracle bound: with every miss foreseen and prefetched
these bytes must still be read.

Predictors that need only recorded routing (`predictor_names`) run along each replay. It counts
which of its misses they would have named in time, and what they would have read in vain. `stoker
profile` measures the predictors that need hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...runtime import _core
from ...runtime.base.errors import OptionError
from .trace import Trace

BELADY = "belady"


@dataclass(frozen=True)
class PolicyResult:
    """One policy's replay at one cache size, over the counted tokens."""

    policy: str
    uses: int
    misses: int
    layer_misses: tuple[int, ...]  # [n_layer]
    hit_rate: float
    misses_per_token: float
    # `foreseen` is the share of a decoded token's misses that each predictor named before their
    # layer began; `needless_per_token` counts the experts that it named in vain and that were not
    # in the cache.
    foreseen: dict[str, float]
    needless_per_token: dict[str, float]
    bytes_per_token: float | None  # bytes read; None if the size of an expert is unknown
    gap_closed: float | None  # share of the gap in misses from LRU to Belady; None without a gap
    tokens_per_s: float | None  # the bandwidth's bound, with computing taken as free


@dataclass(frozen=True)
class CacheSize:
    """Every policy at one cache size."""

    slots: int
    share: float  # slots / all experts
    nbytes: int | None  # bytes of the slots
    policies: tuple[PolicyResult, ...]  # the last one is Belady


def predictor_names() -> list[str]:
    """Returns the predictors that need only recorded routing; the others need hidden states."""
    return list(_core.replayed_predictors)


def policy_names() -> list[str]:
    """Returns the names of the online policies and Belady's."""
    return [*(name for name, _ in _core.policies()), BELADY]


def slots_of_share(trace: Trace, share: float) -> int:
    """Returns the slots that hold this share (0 to 1] of all experts, at least one."""
    if not 0 < share <= 1:
        raise OptionError(f"share: expected above 0 and at most 100%, found {share * 100:g}%")
    return max(1, round(share * trace.n_layer * trace.n_expert))


def slots_of_memory(expert_bytes: Sequence[int], nbytes: int) -> int:
    """Returns the slots in `nbytes`, each for the largest expert. Raises OptionError for none."""
    largest = max(expert_bytes)
    if nbytes < largest:
        raise OptionError(
            f"memory: expected at least one expert of {largest} bytes, found {nbytes} bytes"
        )
    return nbytes // largest


def expert_sizes(trace: Trace, expert_bytes: int | None = None) -> tuple[int, ...] | None:
    """Returns the bytes of an expert by layer [n_layer]: as given, else as recorded, else None."""
    if expert_bytes is not None:
        if expert_bytes < 1:
            raise OptionError(f"expert bytes: expected at least 1, found {expert_bytes}")
        return (expert_bytes,) * trace.n_layer
    return None if trace.expert_bytes is None else tuple(trace.expert_bytes.tolist())


def counted_from(trace: Trace, skip: float) -> int:
    """Returns the first evaluation that begins after the share `skip` of all tokens."""
    if not 0 <= skip < 1:
        raise OptionError(f"skip: expected from 0 to below 1, found {skip:g}")
    begin = np.concatenate([[0], np.cumsum(trace.tokens)[:-1]])
    later = np.nonzero(begin >= math.ceil(skip * trace.n_tokens))[0]
    if later.size == 0:
        raise OptionError(f"skip: no evaluation begins after {skip:g} of {trace.n_tokens} tokens")
    return int(later[0])


def simulate(
    trace: Trace,
    slots: int,
    *,
    policies: Sequence[str] | None = None,
    skip: float = 0.25,
    expert_bytes: Sequence[int] | None = None,
    bandwidth: float | None = None,
) -> CacheSize:
    """Replays `trace` through `slots` slots.

    Args:
        trace: the routing.
        slots: experts that the cache holds; more than all experts count as all.
        policies: names of policy_names(), default all. LRU and Belady are replayed in any case.
        skip: share of the tokens that fill the cache before counting begins.
        expert_bytes: [n_layer] bytes of an expert, if bytes are wanted.
        bandwidth: measured bytes a second, for the bound on tokens a second.

    Raises OptionError for slots < 1, an unknown policy, or a bandwidth that is not positive.
    """
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise OptionError(f"bandwidth: expected a positive number, found {bandwidth:g}")
    names = list(dict.fromkeys([*(policies or policy_names()), BELADY]))
    names.remove(BELADY)
    names.append(BELADY)
    first = counted_from(trace, skip)
    tokens = int(trace.tokens[first:].sum())
    decoded = max(1, int(trace.tokens[first:][trace.decode[first:]].sum()))

    def replay(name: str, predictor: str) -> dict[str, Any]:
        return _core.simulate(
            evaluation=trace.evaluation,
            layer=trace.layer,
            offset=trace.offset,
            expert=trace.expert,
            weight=trace.weight,
            token=np.zeros(0, np.int32) if trace.token is None else trace.token,
            decode=trace.decode[trace.evaluation].astype(np.uint8),
            sequence=np.zeros(0, np.int64) if trace.sequence is None else trace.sequence,
            n_layer=trace.n_layer,
            n_expert=trace.n_expert,
            n_expert_used=trace.n_expert_used,
            policy=name,
            slots=slots,
            count_from=first,
            predictor=predictor,
        )

    replays = {name: replay(name, "") for name in dict.fromkeys([*names, "lru"])}
    least, lru = replays[BELADY]["misses"], replays["lru"]["misses"]

    def result(name: str) -> PolicyResult:
        found = replays[name]
        uses, misses = found["uses"], found["misses"]
        read: float | None = None
        if expert_bytes is not None:
            read = float(np.dot(found["layer_misses"], expert_bytes)) / tokens
        foresight = {p: replay(name, p) for p in predictor_names() if trace.decode[first:].any()}
        return PolicyResult(
            policy=name,
            uses=uses,
            misses=misses,
            layer_misses=tuple(found["layer_misses"]),
            hit_rate=1 - misses / uses if uses else 1.0,
            misses_per_token=misses / tokens,
            foreseen={p: r["foreseen"] / max(1, r["decode_misses"]) for p, r in foresight.items()},
            needless_per_token={p: r["needless"] / decoded for p, r in foresight.items()},
            bytes_per_token=read,
            gap_closed=None if lru == least else (lru - misses) / (lru - least),
            tokens_per_s=bandwidth / read if bandwidth is not None and read else None,
        )

    return CacheSize(
        slots=slots,
        share=slots / (trace.n_layer * trace.n_expert),
        nbytes=None if expert_bytes is None else slots * max(expert_bytes),
        policies=tuple(result(name) for name in names),
    )
