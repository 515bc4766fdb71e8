"""`stoker simulate`: replays recorded routing through every cache policy."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.display import aligned, size
from ..base.errors import OptionError
from ..base.memory import byte_count
from ..terminal.options import (
    Json,
)

if TYPE_CHECKING:
    from ...offload.trace.simulate import CacheSize, PolicyResult
    from ...offload.trace.trace import Trace


def simulate(
    trace: Annotated[Path, typer.Argument(help="Recorded routing: .csv, .jsonl, also .gz.")],
    *,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Of the expert cache, such as 1GiB.")
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Experts that the cache holds.")] = None,
    share: Annotated[
        str | None, typer.Option(help="Percent of all experts, a list [default: 15,25,40].")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Only this policy; repeatable [default: all].")
    ] = None,
    expert_bytes: Annotated[
        str | None, typer.Option(help="Bytes of an expert [default: as recorded].")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="Of the storage a second, such as 1.5GB: bounds tok/s.")
    ] = None,
    skip: Annotated[float, typer.Option(help="Share of tokens that only fill the cache.")] = 0.25,
    decode_only: Annotated[bool, typer.Option("--decode-only", help="Leave prompts out.")] = False,
    as_json: Json = False,
    tsv: Annotated[bool, typer.Option("--tsv", help="Tab-separated.")] = False,
) -> None:
    """Replay recorded routing through every cache policy, without the model.

    Shows hits, misses and bytes read a token for each policy and for Belady's, which knows the
    future, and how much of the way from LRU to Belady each policy goes.

    \b
    stoker simulate trace.csv.gz --share 15,25,40
    stoker simulate trace.csv.gz --memory 1GiB --bandwidth 1.5GB
    stoker simulate trace.jsonl.gz --slots 1000 --policy lru --policy reuse --json
    """
    if as_json and tsv:
        raise OptionError("give --json or --tsv, not both")
    read, found = replay(
        trace,
        memory=memory,
        slots=slots,
        share=share,
        policies=policy,
        expert_bytes=expert_bytes,
        bandwidth=bandwidth,
        skip=skip,
        decode_only=decode_only,
    )
    if as_json:
        typer.echo(json_text(read, found))
    elif tsv:
        typer.echo(as_tsv(found))
    else:
        typer.echo(as_table(read, found))


def replay(
    path: str | os.PathLike[str],
    *,
    memory: str | None = None,
    slots: int | None = None,
    share: str | None = None,
    policies: Sequence[str] | None = None,
    expert_bytes: str | None = None,
    bandwidth: str | None = None,
    skip: float = 0.25,
    decode_only: bool = False,
) -> tuple[Trace, list[CacheSize]]:
    """Replays the trace in `path` at the named sizes; share: percentages such as "15,25,40".

    Raises OptionError for a bad trace or option.
    """
    from ...offload.trace import simulate as simulation
    from ...offload.trace.trace import read_trace

    if sum(given is not None for given in (memory, slots, share)) > 1:
        raise OptionError("give one of --memory, --slots and --share")
    trace = read_trace(path)
    if decode_only:
        trace = trace.without_prompts()
    sizes = simulation.expert_sizes(
        trace, None if expert_bytes is None else byte_count(expert_bytes)
    )
    if memory is not None:
        if sizes is None:
            raise OptionError("the trace has no sizes of experts: --memory needs --expert-bytes")
        wanted = [simulation.slots_of_memory(sizes, byte_count(memory))]
    elif slots is not None:
        wanted = [slots]
    else:
        wanted = [
            simulation.slots_of_share(trace, _percent(part) / 100)
            for part in (share or "15,25,40").split(",")
        ]
    speed = None if bandwidth is None else float(byte_count(bandwidth))
    if speed is not None and sizes is None:
        raise OptionError("the trace has no sizes of experts: --bandwidth needs --expert-bytes")
    return trace, [
        simulation.simulate(
            trace, n, policies=policies, skip=skip, expert_bytes=sizes, bandwidth=speed
        )
        for n in wanted
    ]


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise OptionError(f"share: expected percentages such as 15,25,40, found {text[:40]!r}")
    return value


def as_table(trace: Trace, found: Sequence[CacheSize]) -> str:
    """Returns aligned columns for display."""
    out = [
        f"{trace.n_layer} layers of {trace.n_expert} experts, {trace.n_expert_used} used; "
        f"{trace.n_tokens} tokens, {int(trace.tokens[trace.decode].sum())} of them decoded"
    ]
    for at in found:
        held = "" if at.nbytes is None else f", {size(at.nbytes)}"
        out += ["", f"{at.slots} slots, {at.share * 100:.1f}% of the experts{held}"]
        rows = [["policy", "hits", "misses/token", "read/token", "gap closed"]]
        bound = any(result.tokens_per_s is not None for result in at.policies)
        foresight = [
            p for p in at.policies[0].foreseen if trace.token is not None or p != "history"
        ]
        rows[0] += [f"foreseen by {p}" for p in foresight]
        if bound:
            rows[0].append("tok/s at most")
        for result in at.policies:
            read = result.bytes_per_token
            row = [
                result.policy,
                f"{result.hit_rate * 100:.2f}%",
                f"{result.misses_per_token:.2f}",
                "?" if read is None else size(read),
                "-" if result.gap_closed is None else f"{result.gap_closed * 100:.1f}%",
            ]
            row += [f"{result.foreseen[p] * 100:.0f}%" for p in foresight]
            if bound:
                limit = result.tokens_per_s
                row.append("no limit" if limit is None else f"{limit:.1f}")
            rows.append(row)
        out += aligned(rows, left=1)
        out.append(_oracle_line(at.policies[-1]))
    return "\n".join(out)


def _oracle_line(belady: PolicyResult) -> str:
    read = belady.bytes_per_token
    amount = f"{belady.misses_per_token:.2f} experts" if read is None else size(read)
    line = f"oracle bound (Belady, every miss prefetched in time): {amount} a token must be read"
    if belady.tokens_per_s is not None:
        line += f", {belady.tokens_per_s:.1f} tok/s at most"
    return line


_COLUMNS = (
    "policy",
    "uses",
    "misses",
    "hit_rate",
    "misses_per_token",
    "bytes_per_token",
    "gap_closed",
    "tokens_per_s",
)


def as_tsv(found: Sequence[CacheSize]) -> str:
    """Returns one line a size and policy, tab-separated; unknown cells are empty."""
    from .. import _core

    kinds = ("foreseen", "needless_per_token")
    more = [f"{kind}_{p}" for p in _core.replayed_predictors for kind in kinds]
    out = ["\t".join(("slots", "share", *_COLUMNS, *more))]
    for at in found:
        for result in at.policies:
            values: list[Any] = [getattr(result, column) for column in _COLUMNS]
            for p in _core.replayed_predictors:
                values += [result.foreseen.get(p), result.needless_per_token.get(p)]
            cells = [at.slots, f"{at.share:.6f}", *("" if v is None else v for v in values)]
            out.append("\t".join(str(cell) for cell in cells))
    return "\n".join(out)


def json_text(trace: Trace, found: Sequence[CacheSize]) -> str:
    """Returns all results as one JSON object."""
    return json.dumps(
        {
            "n_layer": trace.n_layer,
            "n_expert": trace.n_expert,
            "n_expert_used": trace.n_expert_used,
            "tokens": trace.n_tokens,
            "sizes": [asdict(at) for at in found],
        },
        indent=2,
    )
