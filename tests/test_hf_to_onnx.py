"""Hugging Face folders to ONNX: onnxruntime's answers are transformers' on the folder."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stoker
from stoker.runtime.cli import app
from typer.testing import CliRunner

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch", reason="needs PyTorch (pip install torch)")
pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")

import hf_models
from stoker.export import hf_to_onnx
from stoker.export.hf_to_onnx import hf_to_onnx as convert

TOKENS = np.random.default_rng(0).integers(0, hf_models.N_VOCAB, 64, dtype=np.int32)


def in_steps(model: stoker.Model) -> Any:
    """Logits of TOKENS after each, with a past."""
    found = []
    with model.session() as session:
        for token in TOKENS:
            session.append([int(token)])
            found.append(session.logits())
    return np.stack(found)


@pytest.mark.parametrize("variant", hf_models.VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path) -> None:
    reference = hf_models.build(variant, tmp_path / "hf")
    expected = hf_models.logits(reference, TOKENS)
    made = convert(tmp_path / "hf", tmp_path / "m.onnx", type="f32")
    assert made.route.endswith("graph of stoker")
    model = stoker.load(made.path, threads=1)
    assert np.abs(model.logits(TOKENS) - expected).max() < 1e-3
    assert np.abs(in_steps(model) - expected).max() < 1e-3
    assert model.generate("the thing", max_tokens=3, temperature=0).read() is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "m.onnx", "m.onnx.data"]


@pytest.mark.skipif(find_spec("optimum") is None, reason="needs optimum-onnx (stoker[optimum])")
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_through_optimum(variant: str, tmp_path: Path) -> None:
    reference = hf_models.build(variant, tmp_path / "hf")
    expected = hf_models.logits(reference, TOKENS)
    made = convert(tmp_path / "hf", tmp_path / "m.onnx", type="f32", through="optimum")
    assert made.route == "optimum-onnx"
    model = stoker.load(made.path, threads=1)
    assert np.abs(model.logits(TOKENS) - expected).max() < 1e-3
    assert np.abs(in_steps(model) - expected).max() < 1e-3
    generation = model.chat([{"role": "user", "content": "hello"}], max_tokens=3, temperature=0)
    assert generation.read() is not None
    assert made.nbytes == sum(p.stat().st_size for p in {made.path, made.data})


@pytest.mark.skipif(find_spec("optimum") is None, reason="needs optimum-onnx (stoker[optimum])")
def test_other_families_go_through_optimum(tmp_path: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(2)
    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    config = transformers.GPT2Config(
        vocab_size=hf_models.N_VOCAB, bos_token_id=0, eos_token_id=2, **sizes
    )
    reference = transformers.GPT2LMHeadModel(config).eval()
    reference.save_pretrained(tmp_path / "hf")
    hf_models.save_byte_level(tmp_path / "hf")
    made = convert(tmp_path / "hf", tmp_path / "m.onnx")
    assert made.route == "optimum-onnx"
    model = stoker.load(made.path, threads=1)
    assert np.abs(in_steps(model) - hf_models.logits(reference, TOKENS)).max() < 1e-3
    assert model.generate("the thing", max_tokens=3, temperature=0).read() is not None


def test_folders_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_models.build("llama", tmp_path / "hf")
    out = tmp_path / "m.onnx"

    def refused(kind: type[Exception], text: str, **options: Any) -> None:
        with pytest.raises(kind) as error:
            convert(tmp_path / "hf", options.pop("out", out), **options)
        assert text in str(error.value)
        assert "\n" not in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["hf"]

    refused(stoker.OptionError, "through: expected one of auto, gguf, optimum", through="x")
    refused(stoker.OptionError, "type: expected one of keep", type="q4")
    refused(stoker.OptionError, "ends in .onnx", out=tmp_path / "m.bin")
    refused(stoker.OptionError, "context: expected 1 to 512 tokens", context=513)
    monkeypatch.setattr(hf_to_onnx, "find_spec", lambda name: None)
    refused(stoker.OptionError, "pip install 'stoker[optimum]'", through="optimum")
    config = tmp_path / "hf" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"architectures": ["MambaForCausalLM"]}))
    refused(stoker.UnsupportedModelError, "pip install 'stoker[optimum]'")
    refused(stoker.UnsupportedModelError, "Mamba", through="gguf")
    config.write_text(json.dumps(values))
    (tmp_path / "hf" / "model.safetensors").unlink()
    refused(stoker.ModelFileError, "safetensors")
    config.unlink()
    refused(stoker.ModelFileError, "expected a folder with config.json")


def test_command(tmp_path: Path) -> None:
    reference = hf_models.build("qwen3moe", tmp_path / "hf")
    out = tmp_path / "m.onnx"
    arguments = ["export", "onnx", str(tmp_path / "hf"), str(out), "--type", "f32"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "through the qwen3moe graph of stoker" in done.output
    found = stoker.load(out).logits(TOKENS)
    assert np.abs(found - hf_models.logits(reference, TOKENS)).max() < 1e-3
