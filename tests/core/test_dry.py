"""DRY against its definition: every earlier place is compared with the end of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stoker
from hypothesis import given
from hypothesis import strategies as st
from stoker.runtime._core import Sampler
from stoker.runtime.base.errors import OptionError

N = 6
BREAKER = 5


def penalties(
    text: list[int],
    *,
    multiplier: float,
    base: float,
    allowed: int,
    window: int,
    breakers: set[int],
) -> np.ndarray:
    text = text[-window:] if window > 0 else text
    lost = np.zeros(N)
    for i in range(len(text) - 1):
        length = 0
        while (
            length <= i
            and text[i - length] == text[len(text) - 1 - length]
            and text[i - length] not in breakers
        ):
            length += 1
        if length >= allowed and text[i + 1] not in breakers:
            lost[text[i + 1]] = max(lost[text[i + 1]], multiplier * base ** (length - allowed))
    return lost


@given(
    st.lists(st.integers(0, N - 1), max_size=40),
    st.integers(1, 4),
    st.sampled_from([-1, 3, 7, 100]),
    st.booleans(),
)
def test_what_a_token_loses(text: list[int], allowed: int, window: int, breaks: bool) -> None:
    breakers = {BREAKER} if breaks else set()
    options = {"multiplier": 0.5, "base": 1.6, "allowed": allowed, "window": window}
    sampler = Sampler(
        N,
        logprobs=N,
        dry_multiplier=0.5,
        dry_base=1.6,
        dry_allowed_length=allowed,
        dry_window=window,
        dry_breakers=sorted(breakers),
    )
    for token in text:
        sampler.accept(token)
    lost = penalties(text, **options, breakers=breakers)
    # The order of the tokens tells their logits: each is the likeliest once its rivals are lower.
    for token in range(N):
        for step in (0.99, 1.01):
            logits = np.full(N, -50, np.float32)
            logits[token] = lost[token]
            rival = (token + 1) % N
            logits[rival] = lost[rival] + (step - 1)
            assert sampler.peek(logits) == (token if step < 1 else rival)


def test_a_window_is_all_that_is_kept() -> None:
    """A text much longer than the window gives what its end alone would."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, N, 5000).tolist()
    long, short = (Sampler(N, dry_multiplier=1.0, dry_window=50, temperature=0) for _ in "ab")
    for token in text:
        long.accept(token)
    for token in text[-50:]:
        short.accept(token)
    for _ in range(100):
        logits = rng.normal(0, 0.3, N).astype(np.float32)
        assert long.sample(logits) == short.sample(logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dry_multiplier": -1}, "dry_multiplier: expected a number of 0 or more"),
        ({"dry_base": 0.5}, "dry_base: expected a number of 1 or more"),
        ({"dry_allowed_length": 0}, "dry_allowed_length: expected 1 or more"),
        ({"dry_window": -2}, "dry_window: expected -1"),
        ({"dry_breakers": [N]}, "dry_breakers: expected tokens of the vocabulary"),
    ],
)
def test_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Sampler(N, **options)


def test_breakers_are_texts_of_tokens(tiny: Path) -> None:
    """With texts that break, through the API: a model that loops without DRY does not with it."""
    model = stoker.load(tiny)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 200, "ignore_eos": True}
    plain = model.generate("the", **options)
    plain.read()
    dry = model.generate("the", **options, dry_multiplier=100.0, dry_breakers="q")
    dry.read()

    def repeats(tokens: list[int], n: int = 3) -> int:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        return len(grams) - len(set(grams))

    assert repeats(plain.tokens) > repeats(dry.tokens) == 0
    assert all("q" in model.tokenizer.decode([t]) for t in model.tokenizer.tokens_with("q"))
