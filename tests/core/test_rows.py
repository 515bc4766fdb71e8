"""Rows of any sequences in one forward pass have the bits that they have alone, on every family."""

from __future__ import annotations

from pathlib import Path

import pytest
from offload_models import CONTEXT, MIXTURES, Model, engine
from stoker.mobile_bench.checks.row_mixes import Mixer
from stoker.runtime.base.errors import ContextLengthError, OptionError
from tiny_models import VARIANTS, make

MIXES = 24


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family(tmp_path: Path, variant: str) -> None:
    family, shape = VARIANTS[variant]
    path = make(tmp_path / "tiny.gguf", family, quant="F16", **shape)
    causal = engine(path).config["causal"]
    if not causal:
        pytest.skip("tokens attend to later ones")
    mixer = Mixer(engine(path, threads=2), engine(path), seed=len(variant))
    for _ in range(MIXES):
        mixer.step()
    for what in ("shared", "first tokens", "truncated"):
        assert mixer.happened[what] > 0, what


@pytest.mark.parametrize("precision", ["fast", "high"])
@pytest.mark.parametrize("quant", ["Q4_K", "Q8_0"])
def test_precisions(tmp_path: Path, precision: str, quant: str) -> None:
    family, shape = VARIANTS["qwen3moe-top3"]
    path = make(tmp_path / "tiny.gguf", family, quant=quant, n_embd=256, n_ff_expert=256, **shape)
    options = {"precision": precision, "kv_type": "f32"}
    mixer = Mixer(engine(path, threads=2, **options), engine(path, **options), seed=3)
    for _ in range(MIXES):
        mixer.step()
    assert mixer.happened["shared"] > 3


@pytest.mark.parametrize("name", MIXTURES)
def test_offloaded(tmp_path: Path, name: str) -> None:
    model = Model(MIXTURES[name].write(tmp_path / name))
    mixed = model.offloaded(0.6, threads=2, predictor="history", prefetch="on")
    mixer = Mixer(mixed, model.resident, seed=5, most=2)
    for _ in range(MIXES):
        mixer.step()
    for what in ("shared", "forked", "truncated"):
        assert mixer.happened[what] > 0, what
    assert mixed.offload is not None and mixed.offload["misses"] + mixed.offload["late"] > 0
    assert mixed.offload["decode_hits"] > 0


def test_each_sequence_has_its_part(tmp_path: Path) -> None:
    """The parts of what a step of several sequences costs add up to the whole."""
    e = Model(MIXTURES["mixtral"].write(tmp_path)).offloaded(0.4, threads=2)
    a, b = e.sequence(), e.sequence()
    e.eval([(a, 1)] * 5 + [(b, 2)] * 3, "prompt")
    for token in range(20):
        e.eval([(a, token), (b, 20 - token)], "decode")
    parts = [t.stats["experts"] for t in (a, b)]
    assert e.offload is not None
    for count in ("hits", "late", "misses", "demand_bytes", "decode_misses"):
        assert sum(part[count] for part in parts) == e.offload[count]
    assert all(part["decode_misses"] + part["decode_late"] > 0 for part in parts)


@pytest.mark.parametrize(
    ("variant", "share"), [("llama", 0.2), ("gemma3", 0.4), ("qwen2moe", 0.02)]
)
def test_streamed(tmp_path: Path, variant: str, share: float) -> None:
    """With pages that are lent to weights, and come back."""
    family, shape = VARIANTS[variant]
    wide = {**shape, "n_embd": 256, "n_ff": 1024}
    model = Model(make(tmp_path / "tiny.gguf", family, quant="Q8_0", **wide))
    mixed = model.offloaded(share, threads=2)
    mixer = Mixer(mixed, model.resident, seed=8)
    for _ in range(4 * MIXES):
        mixer.step()
    for what in ("shared", "forked", "truncated"):
        assert mixer.happened[what] > 0, what
    assert mixed.stream is not None and mixed.stream["decode_bytes"] > 0


def test_what_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "tiny.gguf", "llama")
    e, other = engine(path), engine(path)
    a, b = e.sequence(), e.sequence()
    for rows, message in (
        ([], "at least 1 token"),
        ([(other.sequence(), 1)], "sequences of this engine"),
        ([(a, 1), (b, 1 << 20)], "token: expected 0 to"),
        ([(a, -1)], "token: expected 0 to"),
    ):
        with pytest.raises(OptionError, match=message):
            e.eval(rows, "prompt")
    with pytest.raises(OptionError, match="phase: expected"):
        e.eval([(a, 1)], "other")
    with pytest.raises(ContextLengthError, match="more do not fit"):
        e.eval([(a, 1)] * 2 + [(b, 1)] * (CONTEXT + 1), "prompt")
    with pytest.raises(TypeError):
        e.eval([(a, 1, 2)], "prompt")  # type: ignore[list-item]
    assert a.position == b.position == 0
    e.eval([(a, 1), (b, 2), (a, 3)], "prompt")
    assert (a.position, b.position) == (2, 1)
