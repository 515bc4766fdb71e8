"""The sampling chain against a numpy reference: sets, distributions, penalties, logprobs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stoker.runtime._core import Sampler
from stoker.runtime.base.errors import ModelFileError, OptionError

Logits = npt.NDArray[np.float32]


def softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def adjusted(
    logits: Logits,
    history: list[int],
    *,
    bias: dict[int, float] | None = None,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
) -> Logits:
    """Bias and penalties as their sources define them, over a history already cut to the window."""
    out = logits.copy()
    for token, value in (bias or {}).items():
        out[token] = np.float32(float(out[token]) + value)
    for token in set(history):
        x = float(out[token])
        x = x / repetition if x > 0 else x * repetition
        out[token] = np.float32(x - history.count(token) * frequency - presence)
    return out


def distribution(
    logits: Logits,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[npt.NDArray[np.float64], bool]:
    """p [n_vocab] after top-k, top-p, min-p and temperature, and whether a cut is a close call."""
    x = logits.astype(np.float64)
    order = np.argsort(-x, kind="stable")  # ties: the lower id first
    order = order[np.isfinite(x[order])]
    close = False
    if top_k:
        order = order[:top_k]
    if top_p < 1.0:
        sums = np.cumsum(softmax(x[order]))
        reached = np.nonzero(sums >= top_p)[0]
        close |= bool((np.abs(sums - top_p) < 1e-9).any())
        order = order[: (reached[0] + 1) if len(reached) else len(order)]
    if min_p > 0.0:
        ratio = np.exp(x[order] - x[order[0]])
        close |= bool((np.abs(ratio - min_p) < 1e-9).any())
        order = order[(ratio >= min_p) | (ratio == 1.0)]
    p = np.zeros(len(x))
    p[order] = softmax(x[order] / temperature)
    return p, close


def draws(logits: Logits, n: int, **options: Any) -> npt.NDArray[np.int64]:
    sampler = Sampler(len(logits), **options)
    return np.array([sampler.sample(logits) for _ in range(n)])


def chi_square_fits(counts: npt.NDArray[np.int64], p: npt.NDArray[np.float64]) -> bool:
    """False where counts of a fixed seed differ from p more than one time in a million would."""
    if counts[p == 0].any():
        return False
    expected = p * counts.sum()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    keep = expected > 0
    observed, expected = observed[keep], expected[keep]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    k = len(expected) - 1
    if k == 0:
        return statistic < 1e-6
    # Wilson and Hilferty: the cube root of chi-square / k is nearly normal. 4.75 sigma: 1e-6.
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return z < 4.75


logit_lists = st.lists(
    st.one_of(
        st.floats(-20, 20, width=32),
        st.sampled_from([0.0, -0.0, 1.0, 2.5, -math.inf]),
    ),
    min_size=1,
    max_size=80,
).filter(lambda x: max(x) > -math.inf)


def as_logits(values: list[float]) -> Logits:
    return np.array(values, dtype=np.float32)


# ------------------------------------------------------------------ greedy


@given(values=logit_lists)
def test_greedy_is_the_first_of_the_largest(values: list[float]) -> None:
    assert Sampler(len(values)).sample(as_logits(values)) == int(np.argmax(as_logits(values)))


@pytest.mark.parametrize("n", [1, 15, 16, 17, 127, 128, 129, 4095, 4096, 4097, 262_144])
def test_greedy_at_every_place(n: int) -> None:
    rng = np.random.default_rng(n)
    logits = rng.normal(size=n).astype(np.float32)
    sampler = Sampler(n)
    for place in {0, n - 1, n // 2, *rng.integers(n, size=20).tolist()}:
        changed = logits.copy()
        changed[place:] = np.minimum(changed[place:], 10)
        changed[place] = 10
        changed[-1] = 10  # a tie: the lower id wins
        assert sampler.sample(changed) == place


def test_greedy_takes_zeros_of_both_signs_as_equal() -> None:
    logits = np.full(10_000, -1, np.float32)
    logits[[7, 9000]] = [-0.0, 0.0]
    assert Sampler(10_000).sample(logits) == 7


# ------------------------------------------------------------------ the sets


@settings(deadline=None)
@given(
    values=logit_lists,
    top_k=st.integers(0, 90),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_sets_are_exact(
    *, values: list[float], top_k: int, top_p: float, min_p: float, temperature: float, seed: int
) -> None:
    """No token outside the reference's set is drawn; in flat sets every token is."""
    logits = as_logits(values)
    p, close = distribution(logits, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    assume(not close)
    found = draws(
        logits, 60, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature, seed=seed
    )
    assert set(found.tolist()) <= set(np.nonzero(p)[0].tolist())
    # At an enormous temperature what is left is drawn evenly: the whole set shows.
    flat = draws(logits, 1600, top_k=top_k, top_p=top_p, min_p=min_p, temperature=1e9, seed=seed)
    hot, _ = distribution(logits, top_k=top_k, top_p=top_p, min_p=min_p, temperature=1e9)
    missed = np.count_nonzero(hot) - len(set(flat.tolist()))
    assert missed == 0 or (1 - hot[hot > 0].min()) ** 1600 > 1e-10
    assert set(flat.tolist()) <= set(np.nonzero(hot)[0].tolist())


def test_top_k_breaks_ties_by_id() -> None:
    logits = np.zeros(3000, np.float32)
    logits[2000] = 1
    found = set(draws(logits, 2000, top_k=5, temperature=1.0).tolist())
    assert found == {2000, 0, 1, 2, 3}


@pytest.mark.parametrize("top_k", [1, 2, 40, 255, 256, 1000, 49_999, 50_000, 60_000])
def test_top_k_of_a_large_vocabulary(top_k: int) -> None:
    logits = np.random.default_rng(top_k).normal(0, 3, 50_000).astype(np.float32)
    p, _ = distribution(logits, top_k=top_k, temperature=20.0)
    found = draws(logits, 4000 if top_k <= 1000 else 400, top_k=top_k, temperature=20.0, seed=1)
    assert (p[found] > 0).all()
    counts = np.bincount(found, minlength=len(logits))
    # Groups of similar probability: single tokens are too rare for the test.
    order = np.argsort(-p, kind="stable")[: min(top_k, len(p))]
    groups = np.array_split(order, min(20, len(order)))
    group_counts = np.array([counts[group].sum() for group in groups])
    assert chi_square_fits(group_counts, np.array([p[group].sum() for group in groups]))


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_top_p_of_a_large_vocabulary(spread: float) -> None:
    """Without top-k the cut may keep tens of thousands."""
    logits = np.random.default_rng(3).normal(0, spread, 30_000).astype(np.float32)
    p, close = distribution(logits, top_p=0.8)
    assert not close
    found = draws(logits, 300, top_p=0.8, temperature=1.0)
    assert (p[found] > 0).all()
    at_most = np.sort(p[p > 0])
    hot = draws(logits, 300, top_p=0.8, temperature=1e6)
    assert (p[hot] > 0).all()
    # The least probable tenth of the set is reached at a high temperature.
    assert (p[hot] <= at_most[len(at_most) // 10]).any()


# ------------------------------------------------------------------ the distribution


CHAINS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.01},
]


@pytest.mark.parametrize("options", CHAINS, ids=str)
@pytest.mark.parametrize("seed", [0, 12345])
def test_draws_follow_the_distribution(options: dict[str, Any], seed: int) -> None:
    logits = np.random.default_rng(5).normal(0, 1.5, 60).astype(np.float32)
    logits[11] = -np.inf
    p, close = distribution(logits, **options)
    assert not close
    counts = np.bincount(draws(logits, 50_000, seed=seed, **options), minlength=60)
    assert chi_square_fits(counts, p)


def test_the_distribution_test_notices_a_wrong_temperature() -> None:
    logits = np.random.default_rng(5).normal(0, 1.5, 60).astype(np.float32)
    p, _ = distribution(logits, temperature=1.0)
    counts = np.bincount(draws(logits, 50_000, temperature=1.05), minlength=60)
    assert not chi_square_fits(counts, p)


def test_draws_over_many_blocks_follow_the_distribution() -> None:
    """More than one block of the sums, the last one incomplete."""
    logits = np.random.default_rng(6).normal(0, 2, 5000).astype(np.float32)
    p, _ = distribution(logits, temperature=1.2)
    counts = np.bincount(draws(logits, 40_000, temperature=1.2, seed=9), minlength=5000)
    assert chi_square_fits(counts, p)


def test_consecutive_draws_are_independent() -> None:
    found = draws(np.zeros(4, np.float32), 40_000, temperature=1.0, seed=2)
    pairs = np.bincount(found[:-1] * 4 + found[1:], minlength=16)
    assert chi_square_fits(pairs, np.full(16, 1 / 16))


def test_neighbouring_seeds_are_independent() -> None:
    first = [
        int(draws(np.zeros(4, np.float32), 1, temperature=1.0, seed=s)[0]) for s in range(8000)
    ]
    assert chi_square_fits(np.bincount(first, minlength=4), np.full(4, 0.25))
    pairs = np.bincount(np.array(first[:-1]) * 4 + np.array(first[1:]), minlength=16)
    assert chi_square_fits(pairs, np.full(16, 1 / 16))


@pytest.mark.parametrize("temperature", [1e-12, 1e-3, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = np.random.default_rng(1).normal(size=500).astype(np.float32)
    assert set(draws(logits, 50, temperature=temperature).tolist()) == {int(logits.argmax())}


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = np.full(3000, -np.inf, np.float32)
    logits[[5, 1500, 2999]] = [0, -800, -1]
    for options in ({}, {"top_p": 0.9999999}, {"top_k": 100}, {"min_p": 1e-9}):
        found = set(draws(logits, 400, temperature=1.0, **options).tolist())
        assert found == {5, 2999}


# ------------------------------------------------------------------ determinism


def test_a_seed_gives_the_same_tokens_everywhere() -> None:
    """Recorded once; any platform and instruction set must give these."""
    logits = (np.arange(3000, dtype=np.float32) * 7919 % 101) / 16
    every = draws(logits, 12, temperature=0.8, seed=42)
    assert every.tolist() == [1032, 2860, 1458, 199, 2031, 203, 586, 2209, 335, 2148, 1916, 529]
    best = draws(logits, 12, temperature=0.8, seed=42, top_k=50)
    assert best.tolist() == [1648, 1781, 2323, 335, 367, 335, 941, 670, 537, 569, 165, 840]


def test_seeds_and_reset() -> None:
    logits = np.zeros(1000, np.float32)
    assert draws(logits, 20, temperature=1.0, seed=1).tolist() == (
        draws(logits, 20, temperature=1.0, seed=1).tolist()
    )
    assert draws(logits, 20, temperature=1.0, seed=1).tolist() != (
        draws(logits, 20, temperature=1.0, seed=2).tolist()
    )
    sampler = Sampler(1000, temperature=1.0, presence_penalty=2.0, seed=5, logprobs=1)
    first = [sampler.sample(logits) for _ in range(50)]
    sampler.reset()
    assert math.isnan(sampler.logprob)
    assert sampler.top_logprobs == []
    assert [sampler.sample(logits) for _ in range(50)] == first


def test_the_same_tokens_on_every_instruction_set() -> None:
    script = (
        "import numpy as np\n"
        "from stoker.runtime._core import Sampler\n"
        "x = np.random.default_rng(0).normal(0, 2, 40_001).astype(np.float32)\n"
        "for o in ({}, {'top_p': 0.9}, {'top_k': 40}, {'min_p': 0.01}):\n"
        "    s = Sampler(40_001, temperature=1.0, seed=3, logprobs=3, **o)\n"
        "    for _ in range(40):\n"
        "        print(s.sample(x), s.logprob.hex(), s.top_logprobs)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | extra,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for extra in ({}, {"STOKER_ISA": "scalar"})
    }
    assert len(outputs) == 1
    assert outputs.pop().count("\n") == 160


# ------------------------------------------------------------------ bias and penalties


def test_bias_moves_and_bans() -> None:
    logits = np.array([1, 2, 3, 4], np.float32)
    assert Sampler(4, logit_bias={0: 3.5}).sample(logits) == 0
    assert Sampler(4, logit_bias={3: -math.inf}).sample(logits) == 2
    found = draws(logits, 200, temperature=5.0, logit_bias={3: -math.inf, 1: -math.inf})
    assert set(found.tolist()) == {0, 2}
    p, _ = distribution(adjusted(logits, [], bias={0: 2.0}))
    counts = np.bincount(draws(logits, 20_000, temperature=1.0, logit_bias={0: 2.0}), minlength=4)
    assert chi_square_fits(counts, p)


@settings(deadline=None)
@given(
    values=logit_lists,
    history=st.lists(st.integers(0, 79), max_size=40),
    window=st.sampled_from([-1, 0, 1, 5, 64]),
    repetition=st.sampled_from([1.0, 0.5, 1.3, 10.0]),
    frequency=st.sampled_from([0.0, 0.7, -0.7]),
    presence=st.sampled_from([0.0, 1.1, -1.1]),
    bias=st.dictionaries(st.integers(0, 79), st.floats(-10, 10), max_size=3),
    steps=st.integers(1, 12),
)
def test_penalties(
    *,
    values: list[float],
    history: list[int],
    window: int,
    repetition: float,
    frequency: float,
    presence: float,
    bias: dict[int, float],
    steps: int,
) -> None:
    """Greedy choices over a few steps, prompt tokens and choices both counted."""
    logits = as_logits(values)
    n = len(logits)
    history = [token % n for token in history]
    bias = {token: value for token, value in bias.items() if token < n}
    sampler = Sampler(
        n,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        penalty_window=window,
        logit_bias=bias,
    )
    before = logits.copy()
    for token in history:
        sampler.accept(token)
    for _ in range(steps):
        seen = history if window < 0 else history[len(history) - min(window, len(history)) :]
        expected = adjusted(
            logits,
            seen,
            bias=bias,
            repetition=repetition,
            frequency=frequency,
            presence=presence,
        )
        token = sampler.sample(logits)
        # The reference subtracts in another order: its choice up to float32 rounding.
        best = float(expected.max())
        assert float(expected[token]) >= best - 1e-5 * max(1.0, abs(best))
        history.append(token)
    assert (logits == before).all()  # the caller's logits stay as they are


def test_repetition_penalty_by_hand() -> None:
    logits = np.array([2.0, 1.5, -1.0, -1.2], np.float32)
    sampler = Sampler(4, repetition_penalty=2.0, logit_bias={0: 0.0})
    sampler.accept(0)  # 2 -> 1
    assert sampler.sample(logits) == 1  # 1.5 -> 0.75
    assert sampler.sample(logits) == 0  # 1 against 0.75
    negative = Sampler(4, repetition_penalty=1.5, logit_bias={0: -math.inf, 1: -math.inf})
    assert negative.sample(logits) == 2  # -1 -> -1.5
    assert negative.sample(logits) == 3


def test_frequency_counts_and_presence_does_not() -> None:
    logits = np.array([3.0, 0.0], np.float32)
    frequency = Sampler(2, frequency_penalty=1.0)
    assert [frequency.sample(logits) for _ in range(5)] == [0, 0, 0, 0, 1]
    presence = Sampler(2, presence_penalty=1.0)
    assert [presence.sample(logits) for _ in range(5)] == [0] * 5


def test_the_window_forgets() -> None:
    logits = np.array([1.0, 0.5, 0.0], np.float32)
    sampler = Sampler(3, presence_penalty=5.0, penalty_window=2)
    assert [sampler.sample(logits) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    alone = Sampler(3, presence_penalty=5.0, penalty_window=1)
    assert [alone.sample(logits) for _ in range(4)] == [0, 1, 0, 1]


# ------------------------------------------------------------------ log-probabilities


@settings(deadline=None)
@given(values=logit_lists, logprobs=st.integers(1, 80), temperature=st.sampled_from([0.0, 1.0]))
def test_logprobs(values: list[float], logprobs: int, temperature: float) -> None:
    """Of the model's own distribution: bias, temperature and top-k do not show."""
    logits = as_logits(values)
    assume(logprobs <= len(logits))
    with np.errstate(divide="ignore"):
        reference = np.log(softmax(logits.astype(np.float64)))
    sampler = Sampler(
        len(logits),
        logprobs=logprobs,
        temperature=temperature,
        top_k=3,
        logit_bias={0: 1.0},
        presence_penalty=1.0,
    )
    token = sampler.sample(logits)
    np.testing.assert_allclose(sampler.logprob, reference[token], rtol=1e-12, atol=1e-12)
    order = np.argsort(-logits, kind="stable")[:logprobs]
    order = order[np.isfinite(logits[order])]
    assert [i for i, _ in sampler.top_logprobs] == order.tolist()
    np.testing.assert_allclose(
        [p for _, p in sampler.top_logprobs], reference[order], rtol=1e-12, atol=1e-12
    )


def test_logprobs_of_a_large_vocabulary_sum_to_one() -> None:
    logits = np.random.default_rng(0).normal(0, 4, 200_000).astype(np.float32)
    sampler = Sampler(200_000, logprobs=200_000)
    token = sampler.sample(logits)
    assert sampler.top_logprobs[0] == (token, sampler.logprob)
    assert math.fsum(math.exp(p) for _, p in sampler.top_logprobs) == pytest.approx(1, abs=1e-12)


def test_no_logprobs_unless_asked() -> None:
    sampler = Sampler(3)
    sampler.sample(np.zeros(3, np.float32))
    assert math.isnan(sampler.logprob)
    assert sampler.top_logprobs == []


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place", [0, 15, 16, 4096, 4999])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_logits_that_are_no_numbers(bad: float, place: int, temperature: float) -> None:
    logits = np.zeros(5000, np.float32)
    logits[place] = bad
    name = "NaN" if np.isnan(bad) else r"\+inf"
    with pytest.raises(ModelFileError, match=rf"found {name} for token {place}"):
        Sampler(5000, temperature=temperature).sample(logits)


def test_nothing_left_to_choose() -> None:
    with pytest.raises(ModelFileError, match="-inf for all"):
        Sampler(3).sample(np.full(3, -np.inf, np.float32))
    with pytest.raises(OptionError, match="-inf for all"):
        Sampler(2, temperature=1.0, logit_bias={0: -math.inf, 1: -math.inf}).sample(
            np.zeros(2, np.float32)
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature: expected a number of 0 or more, found -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"penalty_window": -2}, "penalty_window"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 9}, "logprobs"),
        ({"logit_bias": {8: 1.0}}, "logit_bias: expected tokens of the vocabulary, found 8"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Sampler(8, **options)


def test_arguments_out_of_range() -> None:
    with pytest.raises(OptionError, match="n_vocab"):
        Sampler(0)
    sampler = Sampler(8, presence_penalty=1.0)
    for token in (-1, 8):
        with pytest.raises(OptionError, match="token"):
            sampler.accept(token)
    with pytest.raises(OptionError, match="expected 8 of them, found 7"):
        sampler.sample(np.zeros(7, np.float32))
    with pytest.raises(TypeError):
        sampler.sample(np.zeros((8, 1), np.float32))
    with pytest.raises(TypeError):
        Sampler(8, seed=-1)
