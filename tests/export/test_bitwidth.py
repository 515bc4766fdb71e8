"""Bit allocation for experts: sizes, contents, resumption, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import stoker
from offload_models import Model, engine, run
from stoker.export.bitwidth import DEFAULT_TYPES, Adapted, Search, adapt
from stoker.export.mixture.expert_matrices import expert_matrices
from stoker.export.mixture.judge import cut_text
from stoker.runtime._core import GgufFile
from stoker.runtime.base.errors import ModelFileError, OptionError, UnsupportedModelError
from stoker.runtime.divergence import token_nll
from tiny_models import WIDE, make

TEXT = "the more of the words that you hear in the night, the less is it that they say. " * 60
QUICK = Search(tokens=128, window=64, steps=3)
SIZES: dict[str, Any] = {**WIDE, "n_expert": 4, "n_layer": 2, "n_ff_expert": 256}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("b") / "m.gguf", "llama-moe", quant="F16", **SIZES)


@pytest.fixture(scope="module")
def adapted(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    out = tmp_path_factory.mktemp("o") / "out.gguf"
    return adapt(mixture, out, TEXT, bits=4.5, curve=2, search=QUICK)


def types(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(path)).tensors}


def test_size_is_kept_and_reported(adapted: Adapted) -> None:
    made = adapted.made
    assert made is not None and adapted.path is not None
    assert made.bits <= 4.5
    file = GgufFile(str(adapted.path))
    matrices = expert_matrices(file)
    weights = sum(m.rows * m.cols for m in matrices)
    assert 8 * sum(m.nbytes for m in matrices) / weights == pytest.approx(made.bits)
    assert adapted.path.stat().st_size <= made.nbytes
    assert sum(adapted.types.values()) == len(matrices) == 2 * 3 * 4


def test_file_gives_what_was_reported(adapted: Adapted, mixture: Path) -> None:
    """The store's perplexity is that of the file that was written."""
    assert adapted.made is not None and adapted.path is not None
    texts = cut_text(mixture, TEXT, tokens=128, window=64)
    model = stoker.load(adapted.path, context=64)
    nll = np.concatenate([token_nll(model.logits(list(w)), list(w)) for w in texts.report])
    assert float(np.exp(nll.mean())) == pytest.approx(adapted.made.ppl, rel=1e-6)


def test_curve_has_uniform_types_and_adapted_ones_of_their_sizes(adapted: Adapted) -> None:
    uniform = {p.uniform: p for p in adapted.points if p.uniform}
    assert set(uniform) == set(DEFAULT_TYPES)
    others = [p for p in adapted.points if not p.uniform]
    assert len(others) >= 6
    # On the search's text adapted types are never worse; on so short another text, nearly so.
    for type, point in uniform.items():
        same = [p.kl for p in others if p.bits <= point.bits]
        assert type == "Q2_K" or min(same) <= 1.3 * point.kl + 1e-6
    # More bits are never worse by much.
    by_size = sorted(others, key=lambda p: p.bits)
    assert by_size[0].kl > by_size[-1].kl


def test_joined_where_one_type_else_single(adapted: Adapted) -> None:
    assert adapted.path is not None
    names = types(adapted.path)
    for layer in range(2):
        for part in ("gate", "up", "down"):
            joined = f"blk.{layer}.ffn_{part}_exps.weight" in names
            single = [n for n in names if n.startswith(f"blk.{layer}.ffn_{part}.")]
            assert joined != bool(single)
            assert joined or len({names[n] for n in single}) > 1


def test_sensitive_experts_get_more(tmp_path: Path) -> None:
    """An expert whose weights are tiny adds little, whatever its type; it gets the fewest bits."""
    path = make(tmp_path / "m.gguf", "llama-moe", quant="F32", **SIZES, split_experts=True)
    reader = gguf.GGUFReader(str(path), "r+")
    for t in reader.tensors:
        if ".2.weight" in t.name and ".ffn_" in t.name:
            t.data[:] *= 0.001
    del reader
    found = adapt(path, tmp_path / "o.gguf", TEXT, bits=4.5, search=Search(128, 64, steps=0))
    file = expert_matrices(GgufFile(str(found.path)))
    bits = {e: np.mean([m.nbytes for m in file if m.expert == e]) for e in range(4)}
    assert bits[2] == min(bits.values()) and bits[2] < 0.8 * max(bits.values())


def test_max_loss_is_met(mixture: Path, tmp_path: Path) -> None:
    found = adapt(mixture, tmp_path / "o.gguf", TEXT, loss=0.02, search=QUICK)
    assert found.made is not None
    assert found.made.nbytes < found.source.nbytes
    texts = cut_text(mixture, TEXT, tokens=128, window=64)
    nll = []
    for path in (mixture, tmp_path / "o.gguf"):
        model = stoker.load(path, context=64)
        nll.append(np.mean([token_nll(model.logits(list(w)), w) for w in texts.search]))
    assert np.exp(nll[1] - nll[0]) <= 1.02 + 1e-3


def test_offloaded_file_is_the_resident_one(adapted: Adapted) -> None:
    """The store runs several types in a layer, with the written file's results bit for bit."""
    assert adapted.path is not None
    model = Model(adapted.path)
    for share in (0.0, 0.5):
        assert run(engine(adapted.path, model.budgets.part(share))) == model.expected()


@pytest.mark.parametrize("stage", ["store", "sensitivity", "search", "tensors"])
def test_interrupted_and_taken_up_again(
    mixture: Path, adapted: Adapted, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.export.writer.model_writer.COMMIT_BYTES", 1 << 16)
    out = tmp_path / "out.gguf"

    def stop(what: str, done: int, total: int | None) -> None:
        if what == stage and total is not None and done >= total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(mixture, out, TEXT, bits=4.5, search=QUICK, progress=stop)
    assert not out.exists()
    assert list(tmp_path.iterdir())  # there is something to go on from
    adapt(mixture, out, TEXT, bits=4.5, search=QUICK)
    assert adapted.path is not None
    assert out.read_bytes() == adapted.path.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_bad_input(mixture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(OptionError, match="one of bits, nbytes and loss"):
        adapt(mixture, out, TEXT)
    with pytest.raises(OptionError, match="one of bits, nbytes and loss"):
        adapt(mixture, out, TEXT, bits=4, loss=0.1)
    with pytest.raises(OptionError, match="curve"):
        adapt(mixture, None, TEXT)
    with pytest.raises(OptionError, match=r"at least 2\.62 bits"):
        adapt(mixture, out, TEXT, bits=2, search=QUICK)
    with pytest.raises(OptionError, match="text: expected at least"):
        adapt(mixture, out, "short", bits=4, search=QUICK)
    with pytest.raises(OptionError, match="types: expected"):
        adapt(mixture, out, TEXT, bits=4, types=["Q9"], search=QUICK)
    dense = make(tmp_path / "dense.gguf", "llama")
    with pytest.raises(UnsupportedModelError, match="expected a mixture"):
        adapt(dense, out, TEXT, bits=4, search=QUICK)
    broken = make(tmp_path / "nan.gguf", "llama-moe", quant="F16", **SIZES)
    reader = gguf.GGUFReader(str(broken), "r+")
    for t in reader.tensors:
        if t.name == "blk.1.ffn_up_exps.weight":
            t.data[1, 2, 3] = np.nan
    del reader
    with pytest.raises(ModelFileError, match="not finite"):
        adapt(broken, out, TEXT, bits=4, search=QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense.gguf", "nan.gguf"]


def test_command(mixture: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--text", str(text), "--tokens", "128", "--window", "64", "--steps", "1"]
    command = [sys.executable, "-m", "stoker.runtime.cli.main", "export", "bitwidth", str(mixture)]
    out = tmp_path / "out.gguf"
    ran = subprocess.run(
        [*command, str(out), *options, "--size", "2.8MB", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(ran.stdout)
    assert out.stat().st_size <= 2_800_000
    assert found["made"]["nbytes"] <= 2_800_000
    assert sum(row["matrices"] for row in found["types"]) == 24
    ran = subprocess.run(
        [*command, *options, "--curve", "1"], check=False, capture_output=True, text=True
    )
    assert "Q4_K" in ran.stdout and "adapted" in ran.stdout
    ran = subprocess.run(
        [*command, str(out), *options], check=False, capture_output=True, text=True
    )
    assert ran.returncode != 0 and "bits, nbytes and loss" in ran.stderr
