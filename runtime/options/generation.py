"""The table of generation options."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..base import arguments
from ..base.arguments import INT32_MAX
from ..base.errors import OptionError
from . import checks
from .option import check_all, default_of, documented, option, rows

_MAX_SEED = 2**64 - 1


@documented
@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen and when generation ends.

    Raises OptionError for a value out of range.
    """

    max_tokens: int | None = option(
        None,
        checks.integer(0),
        "Tokens to generate at most.",
        long="None ends only at a stop or a full context.",
        flags=("-n",),
        default_text="no limit",
    )
    temperature: float = option(
        0.8,
        checks.number(0.0),
        "0 always takes the likeliest token.",
        long="Otherwise logits are divided by it, after the filters.",
        sampler="number",
    )
    top_k: int = option(
        40,
        checks.integer(0, INT32_MAX),
        "Keep the k likeliest tokens; 0 keeps all.",
        sampler="number",
    )
    typical_p: float = option(
        1.0,
        checks.number(0.0, 1.0),
        "Keep the most typical tokens of this total probability.",
        long="1 keeps all.",
        sampler="number",
    )
    top_p: float = option(
        0.95,
        checks.number(0.0, 1.0),
        "Keep the likeliest tokens of this total probability.",
        long="1 keeps all.",
        sampler="number",
    )
    min_p: float = option(
        0.05,
        checks.number(0.0, 1.0),
        "Drop tokens below this fraction of the likeliest's.",
        long="0 keeps all.",
        sampler="number",
    )
    xtc_probability: float = option(
        0.0,
        checks.number(0.0, 1.0),
        "How often the likeliest tokens are left out; 0 is off.",
        sampler="number",
    )
    xtc_threshold: float = option(
        0.1,
        checks.number(0.0, 1.0),
        "Of the tokens above this probability that leaves the least likely.",
        sampler="number",
    )
    repetition_penalty: float = option(
        1.0,
        checks.number(0.01),
        "Of recent tokens; 1 is off.",
        long="Divides positive logits, multiplies negative ones.",
        sampler="number",
    )
    frequency_penalty: float = option(
        0.0, checks.number(-100, 100), "Per occurrence of a token; 0 is off.", sampler="number"
    )
    presence_penalty: float = option(
        0.0, checks.number(-100, 100), "Once for a token seen; 0 is off.", sampler="number"
    )
    penalty_window: int = option(
        64,
        checks.integer(-1, INT32_MAX),
        "Recent tokens that penalties look at; -1: all.",
        long="The prompt is included.",
        sampler="number",
    )
    dry_multiplier: float = option(
        0.0,
        checks.number(0.0),
        "Of the penalty for going on with a repetition; 0 is off.",
        long="The penalty is dry_multiplier * dry_base ** (length - dry_allowed_length).",
        sampler="number",
    )
    dry_base: float = option(
        1.75, checks.number(1.0), "How fast that grows with its length.", sampler="number"
    )
    dry_allowed_length: int = option(
        2, checks.integer(1, INT32_MAX), "Tokens that may repeat freely.", sampler="number"
    )
    dry_window: int = option(
        -1,
        checks.integer(-1, INT32_MAX),
        "Recent tokens that are searched for repetitions; -1: all.",
        sampler="number",
    )
    dry_breakers: tuple[str, ...] = option(
        ("\n", ":", '"', "*"),
        checks.strings,
        "Text that no repetition reaches over; repeatable.",
        long="A token with one of these texts in it.",
        default_text="newline, colon, quote and star",
        sampler="tokens",
        only_with="dry_multiplier",
    )
    logit_bias: Mapping[int, float] = option(
        {},
        checks.biases,
        "Token id -> number added to its logit (-inf bans it).",
        long="Python only.",
        flags=None,
    )
    seed: int | None = option(
        None,
        checks.integer(0, _MAX_SEED),
        "Of the sampler.",
        long="None draws a fresh one (`Generation.seed` tells which).",
        default_text="random",
    )
    stop: tuple[str, ...] = option(
        (),
        checks.strings,
        "Text that ends the answer; repeatable.",
        long="It, and any beginning of it, is never part of the text. It may name special tokens, "
        'such as "<|im_end|>", which print nothing.',
    )
    logprobs: int = option(
        0,
        checks.integer(0, 1000),
        "With --json: likeliest tokens to report.",
        long="n reports each token's log-probability and its n best rivals (nats).",
    )
    ignore_eos: bool = option(False, checks.flag, "Never end before --max-tokens.")

    def __post_init__(self) -> None:
        check_all(self)

    def of_sampler(self, tokens_with: Callable[[str], Iterable[int]]) -> dict[str, Any]:
        """Returns the options of the sampling stages by name.

        tokens_with returns the tokens whose text has a string in it.
        """
        defaults = {row.name: default_of(row) for row, _ in rows(self)}
        given: dict[str, Any] = {}
        for row, about in rows(self):
            value = getattr(self, row.name)
            if about.sampler == "number":
                given[row.name] = value
            elif about.sampler == "tokens" and (
                getattr(self, about.only_with) != defaults[about.only_with]
            ):
                given[row.name] = sorted({token for text in value for token in tokens_with(text)})
        return given


def merge(options: GenerationOptions | None, overrides: Mapping[str, Any]) -> GenerationOptions:
    """Returns `options` (or the defaults) with `overrides`; OptionError for an unknown name."""
    base = GenerationOptions() if options is None else options
    if not isinstance(base, GenerationOptions):
        raise OptionError(f"options must be a GenerationOptions, not {arguments.shown(base)}")
    names = [row.name for row, _ in rows(GenerationOptions)]
    for name in overrides:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise OptionError(f"unknown generation option {name!r}{hint}")
    return replace(base, **overrides) if overrides else base
