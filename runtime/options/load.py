"""The table of load options."""

from __future__ import annotations

import os
from dataclasses import dataclass

from . import checks
from .option import check_all, documented, option

KV_TYPES = ("f16", "f32")
PRECISIONS = ("fast", "balanced", "high")
PREFETCH_MODES = ("auto", "on", "off")
_FLASH = "Memory and experts on flash"


@documented
@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    The last six have no effect if all weights are in memory, the first four of them if all experts
    are. Raises OptionError for a value out of range.
    """

    threads: int | None = option(
        None,
        checks.integer(1, 1024),
        "Compute threads.",
        flags=("-t",),
        default_text="physical performance cores",
    )
    context: int | None = option(
        None,
        checks.integer(1),
        "Tokens of context.",
        flags=("-c",),
        default_text="the model's, at most 4096",
    )
    kv_type: str = option(
        "f16", checks.one_of(KV_TYPES), "Element type of the KV cache: f16 or f32."
    )
    precision: str = option(
        "balanced",
        checks.one_of(PRECISIONS),
        "Of activations: fast, balanced or high (slower).",
        long="fast: int8. balanced: two int8 terms (about 15 bits) for q, k, v, routers and the "
        "output, which halves the rounding noise. high: two terms everywhere, exact to float32 "
        "rounding, at twice the arithmetic.",
    )
    memory: int | str = option(
        "auto",
        checks.memory,
        "Budget of the whole process: 500MB, 2GiB, 60% of what the machine can give, or auto: "
        "everything in memory where it fits, else what the machine can give.",
        long="A mixture of experts keeps as many experts in memory as fit and reads the others "
        "from flash as they are needed. Where not even the weights that every token uses fit, as "
        "those of a large dense model, a part of them is streamed: read with every token.",
        metavar="SIZE",
        panel=_FLASH,
    )
    policy: str | None = option(
        None, checks.core_name, "Which expert leaves the cache.", metavar="NAME", panel=_FLASH
    )
    predictor: str | None = option(
        None,
        checks.core_name,
        "What foresees the next layers' experts.",
        metavar="NAME",
        panel=_FLASH,
    )
    profile: str | os.PathLike[str] | None = option(
        None,
        checks.path,
        "What stoker profile has taught the predictor.",
        metavar="FILE",
        panel=_FLASH,
    )
    prefetch: str = option(
        "auto",
        checks.one_of(PREFETCH_MODES),
        "Read foreseen experts ahead; auto: while it measurably pays.",
        metavar="auto|on|off",
        panel=_FLASH,
    )
    io: str | None = option(
        None,
        checks.core_name,
        "What reads flash.",
        long='"auto" takes the one that measures faster.',
        metavar="NAME",
        panel=_FLASH,
    )
    readers: int | None = option(
        None, checks.integer(1, 256), "Reads under way at a time.", panel=_FLASH
    )

    def __post_init__(self) -> None:
        check_all(self)
