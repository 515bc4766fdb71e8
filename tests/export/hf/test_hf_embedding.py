"""Embedders' folders to GGUF: pooling by sentence-transformers' files, attention both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stoker
from stoker.export import hf_to_gguf
from stoker.runtime import _core
from stoker.runtime.base.errors import ModelFileError, UnsupportedModelError

pytest.importorskip("safetensors", reason="needs safetensors (pip install safetensors)")

import hf_models

_ST = "sentence_transformers.models."
# sentence-transformers saves all keys, one of them true.
MODES = (
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)


def mode(*chosen: str) -> dict[str, Any]:
    flags = {f"pooling_mode_{name}": name in chosen for name in MODES}
    return {"word_embedding_dimension": 64, **flags, "include_prompt": True}


def add_modules(folder: Path, pooling: dict[str, Any], *more: str) -> None:
    """Writes modules.json and 1_Pooling in sentence-transformers' layout."""
    rows = [("", "Transformer"), ("1_Pooling", "Pooling")]
    rows += [(f"{i + 2}_{kind}", kind) for i, kind in enumerate(more)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": _ST + kind}
        for i, (path, kind) in enumerate(rows)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_models.smallthinker(tmp_path / "folder", window=0, softmax=False)
    return tmp_path / "folder"


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (mode("mean_tokens"), 1),
        (mode("cls_token"), 2),
        (mode("lasttoken"), 3),
        ({"word_embedding_dimension": 64}, 1),  # sentence-transformers' default
        ({"embedding_dimension": 64, "pooling_mode": "lasttoken"}, 3),
    ],
)
def test_pooling_is_that_of_the_folder(
    folder: Path, tmp_path: Path, pooling: dict[str, Any], expected: int
) -> None:
    add_modules(folder, pooling, "Normalize")
    made = hf_to_gguf.convert(folder, tmp_path / "m.gguf")
    assert _core.GgufFile(str(made.path)).get("smallthinker.pooling_type") == expected
    model = stoker.load(made.path)
    states = model.embed("the fire", pooling="none")
    rows = {1: states.mean(0), 2: states[0], 3: states[-1]}
    np.testing.assert_allclose(model.embed("the fire"), rows[expected], rtol=1e-5, atol=1e-6)
    (note,) = made.notes
    assert note.startswith("sentence-transformers normalizes the embeddings")


def test_folders_without_modules_name_no_pooling(folder: Path, tmp_path: Path) -> None:
    made = hf_to_gguf.convert(folder, tmp_path / "m.gguf")
    file = _core.GgufFile(str(made.path))
    assert file.get("smallthinker.pooling_type") is None
    assert file.get("smallthinker.attention.causal") is None


def test_a_module_that_is_left_out_is_told(folder: Path, tmp_path: Path) -> None:
    add_modules(folder, mode("mean_tokens"), "Dense")
    (note,) = hf_to_gguf.convert(folder, tmp_path / "m.gguf").notes
    assert note.startswith("the module 2_Dense (Dense) of modules.json is left out")


@pytest.mark.parametrize(
    ("pooling", "found"),
    [
        (mode("max_tokens"), "found max_tokens"),
        (mode("weightedmean_tokens"), "found weightedmean_tokens"),
        (mode("cls_token", "mean_tokens"), "found cls_token and mean_tokens"),
        (mode(), "found none"),
        ({"pooling_mode": "max"}, "pooling_mode: expected one of mean, cls, lasttoken"),
        ({"pooling_mode": ["mean"]}, "pooling_mode: expected one of mean, cls, lasttoken"),
    ],
)
def test_other_poolings_are_refused(
    folder: Path, tmp_path: Path, pooling: dict[str, Any], found: str
) -> None:
    add_modules(folder, pooling)
    assert found in hf_models.refused(folder, tmp_path / "o.gguf", UnsupportedModelError)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "expected a JSON array, found dict"),
        ([5], "expected modules with a type, found 5"),
        ([{"type": _ST + "Pooling"}], "expected that of a folder within this one, found None"),
        ([{"type": _ST + "Pooling", "path": "../x"}], "folder within this one"),
        ([{"type": _ST + "Pooling", "path": "/etc"}], "expected a relative one"),
        ([{"type": _ST + "Pooling", "path": "a\0b"}], "folder within this one"),
        ([{"type": _ST + "Pooling", "path": "none"}], "expected the pooling that modules.json"),
    ],
)
def test_modules_that_make_no_sense(
    folder: Path, tmp_path: Path, modules: Any, message: str
) -> None:
    (folder / "modules.json").write_text(json.dumps(modules))
    assert message in hf_models.refused(folder, tmp_path / "o.gguf", ModelFileError)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_attention_both_ways_is_that_of_transformers(tmp_path: Path, variant: str) -> None:
    pytest.importorskip("torch", reason="needs PyTorch (pip install torch)")
    pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
    tokens = hf_models.TOKENS
    model = hf_models.build(variant, tmp_path / "folder", is_causal=False)
    expected = hf_models.logits(model, tokens)
    made = hf_to_gguf.convert(tmp_path / "folder", tmp_path / "m.gguf")
    engine = stoker.load(made.path, precision="high", kv_type="f32", threads=1)
    assert np.abs(engine.logits(tokens) - expected).max() < 2e-4
    model.config.is_causal = True
    assert np.abs(hf_models.logits(model, tokens) - expected).max() > 0.05


@pytest.mark.parametrize("key", ["is_causal", "use_bidirectional_attention"])
def test_attention_both_ways_through_windows_is_refused(tmp_path: Path, key: str) -> None:
    hf_models.smallthinker(tmp_path / "folder", window=16, softmax=False)
    hf_models.edit(tmp_path / "folder" / "config.json", **{key: key != "is_causal"})
    message = hf_models.refused(tmp_path / "folder", tmp_path / "o.gguf", UnsupportedModelError)
    assert f"{key}: expected {str(key == 'is_causal').lower()} in a model with sliding" in message
