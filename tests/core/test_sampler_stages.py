"""What every sampling stage has in common: peek and commit, the mask, the names of options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from stoker.runtime._core import Sampler
from stoker.runtime.base.errors import OptionError
from stoker.runtime.options import GenerationOptions
from stoker.runtime.options.option import rows

ROOT = Path(__file__).resolve().parents[2]
# Options with which each stage of stages.inc does something, the mask apart.
STAGES: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {3: 2.0, 5: -2.0}},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    "dry": {"dry_multiplier": 0.8, "dry_allowed_length": 1, "dry_breakers": [9]},
    "top_k": {"top_k": 5},
    "typical": {"typical_p": 0.7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.1},
}
N = 40


def positions(n: int, seed: int = 0) -> list[npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 2, N).astype(np.float32) for _ in range(n)]


def test_every_stage_is_here() -> None:
    text = (ROOT / "runtime/sampling/stages.inc").read_text(encoding="utf-8")
    listed = re.findall(r"^STOKER_SAMPLER_STAGE\((\w+)\)", text, re.M)
    assert set(listed) == {*STAGES, "mask"}
    for name in listed:
        assert (ROOT / f"runtime/sampling/{name}.cc").is_file()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_peek_and_commit_are_sample(stage: str, temperature: float) -> None:
    """Peeking changes nothing: not the draw that comes, not the history."""
    options = {"temperature": temperature, "seed": 7, **STAGES[stage]}
    one, two = Sampler(N, **options), Sampler(N, **options)
    for logits in positions(60):
        token = one.sample(logits)
        assert [two.peek(logits) for _ in range(3)] == [token] * 3
        two.peek(-logits)
        two.commit(token)


@pytest.mark.parametrize("stage", STAGES)
def test_a_reset_sampler_is_a_new_one(stage: str) -> None:
    options = {"temperature": 1.0, "seed": 3, **STAGES[stage]}
    sampler = Sampler(N, **options)
    first = [sampler.sample(logits) for logits in positions(30)]
    sampler.set_mask(np.array([1, 0], np.uint32))
    sampler.reset()
    assert [sampler.sample(logits) for logits in positions(30)] == first


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_the_mask_allows(temperature: float) -> None:
    sampler = Sampler(N, temperature=temperature, top_k=8, min_p=0.05, seed=1)
    rng = np.random.default_rng(2)
    for logits in positions(50):
        allowed = rng.random(N) < 0.2
        allowed[rng.integers(N)] = True
        words = np.packbits(np.pad(allowed, (0, 64 - N)), bitorder="little").view(np.uint32)
        sampler.set_mask(words)
        token = sampler.sample(logits)
        assert allowed[token]
        if temperature == 0:
            assert token == int(np.where(allowed, logits, -np.inf).argmax())
    sampler.set_mask(None)
    assert Sampler(N).sample(positions(1)[0]) == int(positions(1)[0].argmax())


def test_masks_that_are_none() -> None:
    sampler = Sampler(N)
    with pytest.raises(OptionError, match="mask: expected 2 words of 32 tokens, found 3"):
        sampler.set_mask(np.zeros(3, np.uint32))
    sampler.set_mask(np.zeros(2, np.uint32))
    with pytest.raises(OptionError, match="mask: expected a token to choose"):
        sampler.sample(positions(1)[0])


def test_an_option_of_no_stage() -> None:
    with pytest.raises(OptionError, match="top_z: expected an option of a sampling stage"):
        Sampler(N, top_z=1)
    with pytest.raises(TypeError):
        Sampler(N, top_k="many")


def test_every_option_of_the_table_is_a_stages() -> None:
    """Each that GenerationOptions gives to the sampler is read by one."""
    given = GenerationOptions().of_sampler(lambda text: [])
    assert set(given) == {
        row.name for row, about in rows(GenerationOptions) if about.sampler == "number"
    }
    Sampler(N, **given)


def test_history_is_what_penalties_look_at() -> None:
    assert Sampler(N).history == 0
    assert Sampler(N, presence_penalty=1.0).history == 64
    assert Sampler(N, presence_penalty=1.0, penalty_window=5).history == 5
    assert Sampler(N, presence_penalty=1.0, penalty_window=-1).history == -1
