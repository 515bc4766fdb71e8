"""Load and generation options: frozen dataclasses that check every value they are given."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..base import arguments
from ..base.arguments import INT32_MAX
from ..base.errors import OptionError
from ..base.memory import plain_memory

KV_TYPES = ("f16", "f32")
PRECISIONS = ("fast", "balanced", "high")
PREFETCH_MODES = ("auto", "on", "off")
_MAX_SEED = 2**64 - 1


class _Frozen(dict[int, float]):
    """A mapping that nobody changes; other than MappingProxyType it can be pickled and copied."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("options are frozen: make others with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> Any:
        return _Frozen, (dict(self),)


def _stop_strings(value: object) -> tuple[str, ...]:
    expected = "a string or a sequence of strings"
    values = [value] if isinstance(value, str) else arguments.sequence("stop", value, expected)
    stops = tuple(arguments.text("stop", stop, expected) for stop in values)
    if not all(stops):
        raise OptionError("stop must not contain an empty string")
    return stops


def _logit_bias(value: object) -> Mapping[int, float]:
    bias: dict[int, float] = {}
    for key, added in arguments.mapping("logit_bias", value, "token ids to numbers").items():
        token = arguments.integer("logit_bias token", key, 0, INT32_MAX)
        banned = isinstance(added, float) and added == -math.inf
        bias[token] = -math.inf if banned else arguments.number(f"logit_bias[{token}]", added)
    return _Frozen(bias)


def _set(options: object, checked: Mapping[str, Any]) -> None:
    """Puts plain values in place of those that were given to a frozen dataclass."""
    for name, value in checked.items():
        object.__setattr__(options, name, value)


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
        as those of a large dense model, a part of them is streamed: read with every token.
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
        checked: dict[str, Any] = {
            "memory": plain_memory(self.memory),
            "kv_type": arguments.choice("kv_type", self.kv_type, KV_TYPES),
            "precision": arguments.choice("precision", self.precision, PRECISIONS),
            "prefetch": arguments.choice("prefetch", self.prefetch, PREFETCH_MODES),
        }
        for name in ("policy", "predictor", "io"):  # that they exist is for the core to say
            value = getattr(self, name)
            if value is None:
                continue
            checked[name] = arguments.text(name, value)
            if not checked[name]:
                raise OptionError(f"{name} must be a name, not ''")
        if self.profile is not None:
            checked["profile"] = arguments.path("profile", self.profile)
        if self.readers is not None:
            checked["readers"] = arguments.integer("readers", self.readers, 1, 256)
        if self.threads is not None:
            checked["threads"] = arguments.integer("threads", self.threads, 1, 1024)
        if self.context is not None:
            checked["context"] = arguments.integer("context", self.context, 1)
        _set(self, checked)


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
            "temperature": arguments.number("temperature", self.temperature, 0.0),
            "top_k": arguments.integer("top_k", self.top_k, 0, INT32_MAX),
            "top_p": arguments.number("top_p", self.top_p, 0.0, 1.0),
            "min_p": arguments.number("min_p", self.min_p, 0.0, 1.0),
            "repetition_penalty": arguments.number(
                "repetition_penalty", self.repetition_penalty, 0.01
            ),
            "frequency_penalty": arguments.number(
                "frequency_penalty", self.frequency_penalty, -100, 100
            ),
            "presence_penalty": arguments.number(
                "presence_penalty", self.presence_penalty, -100, 100
            ),
            "penalty_window": arguments.integer(
                "penalty_window", self.penalty_window, -1, INT32_MAX
            ),
            "logit_bias": _logit_bias(self.logit_bias),
            "stop": _stop_strings(self.stop),
            "logprobs": arguments.integer("logprobs", self.logprobs, 0, 1000),
            "ignore_eos": arguments.flag("ignore_eos", self.ignore_eos),
        }
        if self.max_tokens is not None:
            checked["max_tokens"] = arguments.integer("max_tokens", self.max_tokens, 0)
        if self.seed is not None:
            checked["seed"] = arguments.integer("seed", self.seed, 0, _MAX_SEED)
        _set(self, checked)

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
        raise OptionError(f"options must be a GenerationOptions, not {arguments.shown(base)}")
    names = [f.name for f in fields(GenerationOptions)]
    for name in overrides:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise OptionError(f"unknown generation option {name!r}{hint}")
    return replace(base, **overrides) if overrides else base
