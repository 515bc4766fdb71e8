"""Hugging Face folders to ONNX: onnxruntime's answers are transformers' on the folder."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stoker
from stoker.runtime.cli.main import app
from typer.testing import CliRunner

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch", reason="needs PyTorch (pip install torch)")
pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")

import hf_models
from stoker.export import hf_to_onnx
from stoker.export.hf_to_onnx import hf_to_onnx as convert
from stoker.export.onnx.graph.config import FAMILIES

TOKENS = np.random.default_rng(0).integers(0, hf_models.N_VOCAB, 64, dtype=np.int32)


def in_steps(model: stoker.Model) -> Any:
    """Logits of TOKENS after each, with a past in between."""
    found = []
    with model.session() as session:
        for token in TOKENS:
            session.append([int(token)])
            found.append(session.logits())
    return np.stack(found)


# Variants that stoker has a graph of.
DRAWN = [v for v in hf_models.VARIANTS if hf_models.architecture(v) in FAMILIES]


@pytest.mark.parametrize("variant", sorted(set(hf_models.VARIANTS) - set(DRAWN)))
def test_a_family_without_a_graph(variant: str, tmp_path: Path) -> None:
    with pytest.raises(stoker.UnsupportedModelError, match=r"for ONNX, found .*optimum-onnx may"):
        convert(hf_models.saved(variant)[0], tmp_path / "m.onnx", type="f32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variant", DRAWN)
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


def test_what_optimum_makes_is_run_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter is a third party: this one writes a graph that fails in the run."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rows = [7]  # rows of the table, of which the last one counts
    head = np.ones((64, hf_models.N_VOCAB), np.float32)

    def export(root: Path, scratch: str) -> None:
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "n"])
        logits = ["batch", "n", hf_models.N_VOCAB]
        graph = helper.make_graph(
            [
                helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
                helper.make_node("MatMul", ["rows", "head"], ["logits"]),
            ],
            "decoder",
            [ids],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits)],
            [
                numpy_helper.from_array(np.ones((rows[-1], 64), np.float32), "table"),
                numpy_helper.from_array(head, "head"),
            ],
        )
        opset = [helper.make_opsetid("", 17)]
        onnx.save(
            helper.make_model(graph, opset_imports=opset, ir_version=8),
            str(Path(scratch, "model.onnx")),
            save_as_external_data=True,
            location="model.onnx_data",
        )

    monkeypatch.setattr(hf_to_onnx, "_export", export)
    monkeypatch.setattr(hf_to_onnx, "find_spec", lambda name: True)
    hf_models.build("llama", tmp_path / "hf")
    out = tmp_path / "m.onnx"
    made = convert(tmp_path / "hf", out, type="f32", through="optimum")
    assert made.data.name == "m.onnx.data"
    found = stoker.load(made.path).run({"input_ids": np.zeros((1, 3), np.int64)})["logits"]
    assert (found == 64).all()
    out.unlink()
    made.data.unlink()
    rows.append(0)  # no token has a row
    with pytest.raises(stoker.UnsupportedModelError, match="onnxruntime does not run the model"):
        convert(tmp_path / "hf", out, type="f32", through="optimum")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_command(tmp_path: Path) -> None:
    reference = hf_models.build("qwen3moe", tmp_path / "hf")
    out = tmp_path / "m.onnx"
    arguments = ["export", "onnx", str(tmp_path / "hf"), str(out), "--type", "f32"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "through the qwen3moe graph of stoker" in done.output
    found = stoker.load(out).logits(TOKENS)
    assert np.abs(found - hf_models.logits(reference, TOKENS)).max() < 1e-3
