"""Load and generation options: frozen dataclasses that check every value they are given."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import index
from types import MappingProxyType
from typing import Any, SupportsFloat, SupportsIndex

from .errors import OptionError
from .memory import check_memory

KV_TYPES = ("f16", "f32")
PRECISIONS = ("fast", "balanced", "high")
PREFETCH_MODES = ("auto", "on", "off")
_MAX_SEED = 2**64 - 1


def _integer(name: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise OptionError(f"{name} must be an integer, not {value!r}")
    number = index(value)  # numpy's integers too
    if number < low or (high is not None and number > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise OptionError(f"{name} must be {limits}, not {number}")
    return number


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise OptionError(f"{name} must be a number, not {value!r}")
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high:
        limits = "finite" if low == -math.inf else f"between {low:g} and {high:g}"
        if low != -math.inf and high == math.inf:
            limits = f"finite and at least {low:g}"
        raise OptionError(f"{name} must be {limits}, not {number:g}")
    return number


def _stop_strings(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence) or not all(isinstance(s, str) for s in value):
        raise OptionError(f"stop must be a string or a sequence of strings, not {value!r}")
    if not all(value):
        raise OptionError("stop must not contain an empty string")
    return tuple(value)


def _logit_bias(value: object) -> Mapping[int, float]:
    if not isinstance(value, Mapping):
        raise OptionError(f"logit_bias must map token ids to numbers, not {value!r}")
    bias: dict[int, float] = {}
    for key, number in value.items():
        token = _integer("logit_bias token", key, 0)
        banned = isinstance(number, float) and number == -math.inf
        bias[token] = (
            -math.inf if banned else _number(f"logit_bias[{token}]", number, -math.inf, math.inf)
        )
    return MappingProxyType(bias)


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    threads: compute threads; None takes the physical performance cores.
    context: tokens that a session holds; None takes the model's limit, at most 4096.
    kv_type: element type of the KV cache, "f16" or "f32".
    precision: how activations are rounded for the integer kernels. "fast": int8. "balanced": two
        int8 terms (about 15 bits) for q, k, v, routers and the output, which halves the rounding
        noise. "high": two terms everywhere, exact to float32 rounding, at twice the arithmetic.
    memory: budget of the whole process: bytes, "500MB", "2GiB", "60%" (of what the machine can
        give) or "auto". A mixture of experts keeps as many experts in memory as fit and reads the
        others from flash as they are needed. Where not even the weights that every token uses fit,
        as those of a large dense model, a part of them passes through memory with every token.
        "auto" loads everything where that fits, and otherwise takes what the machine can give.
    policy: which expert leaves the cache, a name of `stoker run --help`; None: the default.
    predictor: what foresees the next layers' experts; None: the default.
    profile: file made by `stoker profile`, for the predictors that need one; None: none.
    prefetch: "auto" reads ahead while that measurably pays; "on", "off".
    io: backend that reads flash, "auto" for the one that measures faster; None: the default.
    readers: reads under way at a time; None: the default.
    The last six have no effect where all weights are in memory, the first four of them where all
    experts are.
    """

    threads: int | None = None
    context: int | None = None
    kv_type: str = "f16"
    precision: str = "balanced"
    memory: int | str = "auto"
    policy: str | None = None
    predictor: str | None = None
    profile: str | os.PathLike[str] | None = None
    prefetch: str = "auto"
    io: str | None = None
    readers: int | None = None

    def __post_init__(self) -> None:
        check_memory(self.memory)
        for name in ("policy", "predictor", "io"):  # that they exist is for the core to say
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise OptionError(f"{name} must be a name, not {value!r}")
        if self.profile is not None and not isinstance(self.profile, (str, os.PathLike)):
            raise OptionError(f"profile must be a path, not {self.profile!r}")
        if self.prefetch not in PREFETCH_MODES:
            raise OptionError(
                f"prefetch must be one of {', '.join(PREFETCH_MODES)}, not {self.prefetch!r}"
            )
        if self.readers is not None:
            _integer("readers", self.readers, 1, 256)
        if self.threads is not None:
            _integer("threads", self.threads, 1, 1024)
        if self.context is not None:
            _integer("context", self.context, 1)
        if self.kv_type not in KV_TYPES:
            raise OptionError(f"kv_type must be one of {', '.join(KV_TYPES)}, not {self.kv_type!r}")
        if self.precision not in PRECISIONS:
            raise OptionError(
                f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}"
            )


@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen and when generation ends.

    max_tokens: tokens to generate at most; None ends only at a stop or a full context.
    temperature: 0 is greedy; otherwise logits are divided by it, after the filters.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set with this probability mass (1 keeps all).
    min_p: drop tokens below this fraction of the likeliest one's probability (0 keeps all).
    repetition_penalty: divides positive logits (multiplies negative ones) of tokens in the window.
    frequency_penalty, presence_penalty: subtracted once per occurrence / once if present.
    penalty_window: how many of the last tokens (prompt included) the penalties look at;
        -1 looks at all of them.
    logit_bias: token id -> number added to its logit (-inf bans the token).
    seed: of the sampler; None draws a fresh one (`Generation.seed` tells which).
    stop: strings that end the text; they, and any beginning of them, are never part of it. They
        may name special tokens, such as "<|im_end|>", which print nothing.
    logprobs: 0 for none; n reports each token's log-probability and its n best rivals (nats).
    ignore_eos: never choose an end-of-generation token.

    Raises OptionError for a value out of range.
    """

    max_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "temperature": _number("temperature", self.temperature, 0.0, math.inf),
            "top_k": _integer("top_k", self.top_k, 0),
            "top_p": _number("top_p", self.top_p, 0.0, 1.0),
            "min_p": _number("min_p", self.min_p, 0.0, 1.0),
            "repetition_penalty": _number(
                "repetition_penalty", self.repetition_penalty, 0.01, math.inf
            ),
            "frequency_penalty": _number("frequency_penalty", self.frequency_penalty, -100, 100),
            "presence_penalty": _number("presence_penalty", self.presence_penalty, -100, 100),
            "penalty_window": _integer("penalty_window", self.penalty_window, -1),
            "logit_bias": _logit_bias(self.logit_bias),
            "stop": _stop_strings(self.stop),
            "logprobs": _integer("logprobs", self.logprobs, 0, 1000),
        }
        if self.max_tokens is not None:
            checked["max_tokens"] = _integer("max_tokens", self.max_tokens, 0)
        if self.seed is not None:
            checked["seed"] = _integer("seed", self.seed, 0, _MAX_SEED)
        if not isinstance(self.ignore_eos, bool):
            raise OptionError(f"ignore_eos must be True or False, not {self.ignore_eos!r}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def penalizes(self) -> bool:
        """Whether any penalty is on, so that the sampler must see the prompt's tokens."""
        return self.penalty_window != 0 and (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
        )


def merge(options: GenerationOptions | None, overrides: Mapping[str, Any]) -> GenerationOptions:
    """`options` (or the defaults) with `overrides` on top; OptionError for an unknown name."""
    base = GenerationOptions() if options is None else options
    if not isinstance(base, GenerationOptions):
        raise OptionError(f"options must be a GenerationOptions, not {base!r}")
    names = [f.name for f in fields(GenerationOptions)]
    for name in overrides:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise OptionError(f"unknown generation option {name!r}{hint}")
    return replace(base, **overrides) if overrides else base
