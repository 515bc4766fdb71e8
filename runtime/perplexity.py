"""Perplexity of a text under a model, by the method of llama.cpp's tool or with a stride."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .backends.engine import EngineSequence


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text, ppl = exp(nll).

    nll: mean negative log-likelihood, nats a token; tokens: number of scored tokens; chunks: number
    of windows; error: standard error of ppl (0 for a single token).
    """

    ppl: float
    nll: float
    tokens: int
    chunks: int
    error: float


def windows(n: int, context: int, stride: int | None) -> Iterator[tuple[int, int, int]]:
    """Yields (begin, end, first scored token) of each window; see Model.perplexity."""
    if n < context:
        yield 0, n, 1
    elif stride is None:
        # The token after position context / 2 is the first that llama.cpp scores.
        for begin in range(0, n - context + 1, context):
            yield begin, begin + context, begin + context // 2 + 1
    else:
        yield 0, context, 1
        scored = context
        while scored < n:
            end = min(scored + stride, n)
            yield end - context, end, scored
            scored = end


def measure(
    sequence: EngineSequence,
    tokens: npt.NDArray[np.int32],
    *,
    context: int,
    stride: int | None,
    bos: int | None,
    max_chunks: int | None,
    progress: Callable[[int, int, float], None] | None,
) -> Perplexity:
    """Measures the perplexity of tokens [n] on an otherwise unused sequence.

    bos: replaces each window's first token; None leaves it.
    progress: called after each window with (windows done, windows in all, ppl so far).
    """
    least = 2 if stride is not None else 3  # the second half of two tokens scores none
    if context < least:
        raise OptionError(f"context must be at least {least}, not {context}")
    if context > sequence.context:
        raise OptionError(
            f"context must be at most the {sequence.context} tokens that the model was loaded "
            f"with, not {context}"
        )
    if stride is not None and not 1 <= stride < context:
        raise OptionError(f"stride must be between 1 and {context - 1}, not {stride}")
    if max_chunks is not None and max_chunks < 1:
        raise OptionError(f"max_chunks must be at least 1, not {max_chunks}")
    if len(tokens) < 2:
        raise OptionError(f"the text has {len(tokens)} tokens; perplexity needs at least 2")
    plan = list(windows(len(tokens), context, stride))[:max_chunks]
    count, total, squares = 0, 0.0, 0.0
    for done, (begin, end, first) in enumerate(plan, 1):
        window = tokens[begin:end].copy()
        if bos is not None:
            window[0] = bos
        sequence.truncate(0)
        # nll[i] is the loss of the window's token i + 1.
        nll = sequence.eval_nll(window)[first - begin - 1 :]
        count += len(nll)
        total += float(nll.sum())
        squares += float((nll * nll).sum())
        if progress is not None:
            progress(done, len(plan), math.exp(min(total / count, 700.0)))
    mean = total / count
    ppl = math.exp(min(mean, 700.0))
    variance = max(squares / count - mean * mean, 0.0)
    error = ppl * math.sqrt(variance / (count - 1)) if count > 1 else 0.0
    return Perplexity(ppl, mean, count, len(plan), error)
