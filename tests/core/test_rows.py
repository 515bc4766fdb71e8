"""Rows of any sequences in one forward pass have the bits that they have alone, on every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from offload_models import CONTEXT, MIXTURES, Model, engine
from stoker.runtime import _core
from stoker.runtime.base.errors import ContextLengthError, OptionError
from tiny_models import VARIANTS, make

Array = npt.NDArray[Any]
MIXES = 24


class Mixer:
    """Sequences that are evaluated in random mixes, beside the same ones evaluated alone."""

    def __init__(self, mixed: _core.Engine, alone: _core.Engine, seed: int, most: int = 4) -> None:
        self.engine = mixed
        self.random = np.random.default_rng(seed)
        self.pairs = [(mixed.sequence(), alone.sequence()) for _ in range(most)]
        self.n_vocab = mixed.config["n_vocab"]
        self.shared = self.sinks = self.truncated = 0  # what has happened

    def step(self) -> None:
        """One mix, and now and then a truncation."""
        random = self.random
        phase = str(random.choice(["prompt", "decode", "verify"]))
        chosen = random.permutation(len(self.pairs))[: random.integers(1, len(self.pairs) + 1)]
        rows: list[tuple[int, int]] = []
        for i in chosen.tolist():
            most = {"prompt": 40, "decode": 1, "verify": 5}[phase]
            n = min(int(random.integers(1, most + 1)), self.room(i))
            rows += [(i, int(t)) for t in random.integers(0, self.n_vocab, n)]
        if not rows:
            return self.truncate()
        # In the order of each sequence, else in any.
        if random.random() < 0.5:
            order = random.permutation([i for i, _ in rows]).tolist()
            tokens = {i: [t for j, t in rows if j == i] for i, _ in rows}
            rows = [(i, tokens[i].pop(0)) for i in order]
        self.shared += len({i for i, _ in rows}) > 1
        self.sinks += any(self.pairs[i][0].position < 2 for i, _ in rows)
        found = self.engine.eval([(self.pairs[i][0], t) for i, t in rows], phase, True)
        assert found is not None
        for i in {i for i, _ in rows}:
            mine = [k for k, (j, _) in enumerate(rows) if j == i]
            mixed, alone = self.pairs[i]
            expected = alone.eval_all(np.array([rows[k][1] for k in mine], np.int32))
            assert found[mine].tobytes() == expected.tobytes(), (phase, i, len(rows))
            assert mixed.logits().tobytes() == expected[-1].tobytes()
            assert mixed.hidden().tobytes() == alone.hidden().tobytes()
            assert mixed.position == alone.position
        if random.random() < 0.2:
            self.truncate()

    def room(self, i: int) -> int:
        return self.pairs[i][0].context - self.pairs[i][0].position

    def truncate(self) -> None:
        mixed, alone = self.pairs[self.random.integers(len(self.pairs))]
        position = int(self.random.integers(0, mixed.position + 1))
        self.truncated += position < mixed.position
        mixed.truncate(position)
        alone.truncate(position)


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
    assert mixer.shared > 3 and mixer.sinks > 0 and mixer.truncated > 0


@pytest.mark.parametrize("precision", ["fast", "high"])
@pytest.mark.parametrize("quant", ["Q4_K", "Q8_0"])
def test_precisions(tmp_path: Path, precision: str, quant: str) -> None:
    family, shape = VARIANTS["qwen3moe-top3"]
    path = make(tmp_path / "tiny.gguf", family, quant=quant, n_embd=256, n_ff_expert=256, **shape)
    options = {"precision": precision, "kv_type": "f32"}
    mixer = Mixer(engine(path, threads=2, **options), engine(path, **options), seed=3)
    for _ in range(MIXES):
        mixer.step()
    assert mixer.shared > 3


@pytest.mark.parametrize("name", MIXTURES)
def test_offloaded(tmp_path: Path, name: str) -> None:
    model = Model(MIXTURES[name].write(tmp_path / name))
    mixed = model.offloaded(0.6, threads=2, predictor="history", prefetch="on")
    mixer = Mixer(mixed, model.resident, seed=5, most=2)
    for _ in range(MIXES):
        mixer.step()
    assert mixer.shared > 3 and mixed.offload is not None
    assert mixed.offload["misses"] + mixed.offload["late"] > 0
    assert mixed.offload["decode_hits"] > 0
    # Each sequence has its part, and nothing is lost.
    parts = [pair[0].stats["experts"] for pair in mixer.pairs]
    for count in ("hits", "late", "misses", "demand_bytes", "decode_misses"):
        assert sum(part[count] for part in parts) == mixed.offload[count]


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
