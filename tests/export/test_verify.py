"""Comparison of two forms of a model: the figures against numpy, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import stoker
from stoker.export.verify import verify
from stoker.runtime.cli.main import app
from tiny_models import make
from typer.testing import CliRunner

TEXT = "the one that was in the water and not of it, " * 12
CONTEXT = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify")
    make(path / "f32.gguf", "llama", context=256)
    make(path / "q8.gguf", "llama", context=256, quant="Q8_0")
    return path


def test_a_model_is_its_own_form(folder: Path) -> None:
    found = verify(folder / "f32.gguf", folder / "f32.gguf", text=TEXT, tokens=64, context=CONTEXT)
    assert found.kl == 0 and found.difference == 0 and found.top1 == 1 and found.same_tokens
    assert found.ppl_ratio == 1
    assert found.a.kind == "GGUF" and found.a.nbytes == (folder / "f32.gguf").stat().st_size
    assert found.a.decode > 0


def test_figures_against_numpy(folder: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    found = verify(
        folder / "f32.gguf",
        folder / "q8.gguf",
        text=TEXT,
        tokens=60,
        context=CONTEXT,
        progress=lambda *call: calls.append(call),
    )
    logits = []
    for name in ("f32.gguf", "q8.gguf"):
        model = stoker.load(folder / name, precision="high", context=CONTEXT)
        ids = list(model.tokenizer.encode(TEXT, add_special=False))[:60]
        bos = [model.tokenizer.bos_id] if model.tokenizer.add_bos else []
        step = CONTEXT - len(bos)
        windows = [bos + ids[i : i + step] for i in range(0, 60, step)]
        logits.append([model.logits(w).astype(np.float64) for w in windows])
    assert found.tokens == sum(map(len, windows))
    assert calls[-1] == ("second model", found.tokens, found.tokens)

    def log_p(x: np.ndarray) -> np.ndarray:
        return (
            x
            - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - x.max(-1, keepdims=True)
        )

    kl, same, gap, nll = [], [], 0.0, ([], [])
    for a, b, window in zip(*logits, windows, strict=True):
        p, q = log_p(a), log_p(b)
        kl += list((np.exp(p) * (p - q)).sum(-1))
        same += list(a.argmax(-1) == b.argmax(-1))
        gap = max(gap, np.abs(a - b).max())
        for log, out in ((p, nll[0]), (q, nll[1])):
            out += [-log[i, t] for i, t in enumerate(window[1:])]
    assert 0 < found.kl < 0.1
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-6)
    assert found.kl_99 == pytest.approx(np.percentile(kl, 99), rel=1e-6)
    assert found.top1 == pytest.approx(np.mean(same))
    assert found.difference == pytest.approx(gap, rel=1e-6)
    assert found.a.ppl == pytest.approx(np.exp(np.mean(nll[0])), rel=1e-6)
    assert found.b.ppl == pytest.approx(np.exp(np.mean(nll[1])), rel=1e-6)


def test_the_command(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT)
    a, b = str(folder / "f32.gguf"), str(folder / "q8.gguf")
    common = ["export", "verify", a, b, "--text", str(folder / "text.txt"), "-n", "40", "-c", "32"]
    done = CliRunner().invoke(app, [*common, "--json", "--max-kl", "0.5"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["b"]["kind"] == "GGUF" and found["kl"] < 0.5
    done = CliRunner().invoke(app, [*common, "--max-difference", "0"])
    assert done.exit_code == 1
    assert "same top token" in done.stdout


def test_what_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    f32 = folder / "f32.gguf"
    with pytest.raises(stoker.OptionError, match="at least 2"):
        verify(f32, f32, text="", tokens=8)
    with pytest.raises(stoker.OptionError, match="at least 2"):
        verify(f32, f32, tokens=1)
    with pytest.raises(stoker.ModelFileError, match=r"config\.json"):
        verify(f32, tmp_path, text=TEXT, tokens=8, context=8)
    with pytest.raises(stoker.StokerError):
        verify(f32, tmp_path / "none.gguf", text=TEXT)
