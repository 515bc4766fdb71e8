"""What a file says about its computation is computed or refused, never passed over in silence."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import stoker
from oracle import Oracle
from stoker.runtime import _core
from stoker.runtime.pooling import POOLINGS
from tiny_models import make, some_tokens

ROOT = Path(__file__).resolve().parents[2]
KEYS = _core.metadata_keys()
REFUSED = [(key, neutral) for key, use, neutral in KEYS if use == "refused"]
USED = [key for key, use, _ in KEYS if use == "used"]


def published_constants(of: Any) -> Iterator[str]:
    for name, value in vars(of).items():
        if inspect.isclass(value):
            yield from published_constants(value)
        elif isinstance(value, str) and not name.startswith("__"):
            yield value


def spelled(key: str) -> str:
    return key.format(arch="llama", id=0, name="tool_use", dense="dense_2")


def values(neutral: str) -> list[Any]:
    """The neutral values of a row as Python holds them."""
    named = {"true": True, "false": False}
    return [named.get(v, v if v.isalpha() else int(v)) for v in neutral.split("|") if v]


# The list.


def test_every_constant_of_the_format_is_listed() -> None:
    constants = set(published_constants(gguf.constants.Keys))
    assert len(constants) > 200
    unknown = [k for k in constants if _core.metadata_key_use(spelled(k), "llama") is None]
    assert unknown == []


def test_every_key_of_the_published_files_is_listed(vocab_dir: Path) -> None:
    files = sorted(vocab_dir.glob("**/*.gguf"))
    assert len(files) >= 19
    for path in files:
        file = _core.GgufFile(str(path))
        architecture = file.get("general.architecture")
        assert file.unknown_metadata == [], path.name
        for key in file.metadata:
            assert _core.metadata_key_use(key, architecture) is not None, (path.name, key)


def test_no_key_is_listed_twice() -> None:
    names = [key for key, _, _ in KEYS]
    assert len(names) == len(set(names))
    assert {use for _, use, _ in KEYS} == {"used", "harmless", "refused", "no model"}


def test_what_is_used_is_read_and_nothing_else_is() -> None:
    """By the sources: a key that somebody begins or ceases to read changes its row."""
    folders = ("runtime/gguf", "runtime/core/model", "runtime/arch", "runtime/text", "runtime")
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in folders
        for path in sorted((ROOT / folder).glob("*.*"))
        if path.suffix in (".cc", ".h", ".py") and not path.name.startswith("metadata_keys")
    )
    for key, use, _ in KEYS:
        own = key.removeprefix("{arch}.").removeprefix("tokenizer.ggml.").split(".{")[0]
        read = re.search(rf'["./}}]{re.escape(own)}["./]', sources) is not None
        if use == "used":
            assert read, key
        elif key.startswith("{arch}."):
            assert not read, key


# Refusal.


@pytest.mark.parametrize(("key", "neutral"), REFUSED)
def test_what_is_not_computed_is_refused(tmp_path: Path, key: str, neutral: str) -> None:
    path = tmp_path / "model.gguf"
    name = spelled(key)
    other: Any = {"true": False, "false": True}.get(neutral, 3)
    make(path, "llama", metadata={name: other})
    with pytest.raises(stoker.UnsupportedModelError) as refused:
        stoker.load(path)
    assert f"{name}: expected {' or '.join(neutral.split('|')) or 'none'}, found" in str(
        refused.value
    )
    for value in values(neutral):
        make(path, "llama", metadata={name: value})
        assert stoker.load(path).generate([5, 6], max_tokens=2).read() is not None
        if isinstance(value, int) and not isinstance(value, bool):
            make(path, "llama", metadata={name: float(value)})
            stoker.load(path)
            make(path, "llama", metadata={name: [value, value]})
            stoker.load(path)


@pytest.mark.parametrize("value", ["text", [1, 2], [0.5], True, math.nan, -3, 1 << 31, 0.999999])
def test_odd_values_of_a_refused_key(tmp_path: Path, value: Any) -> None:
    path = make(tmp_path / "odd.gguf", "llama", metadata={"{arch}.expert_group_scale": value})
    if value is True:  # as a number it is 1
        stoker.load(path)
        return
    with pytest.raises(stoker.UnsupportedModelError, match="expert_group_scale: expected 0 or 1"):
        stoker.load(path)


def test_a_key_that_nobody_knows_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make(tmp_path / "new.gguf", "llama", metadata={"{arch}.attention.new_trick": 2})
    stoker.load(path)
    assert "metadata unknown and not used: 'llama.attention.new_trick'" in caplog.text
    caplog.clear()
    stoker.load(make(tmp_path / "old.gguf", "llama", metadata={"some.vendor_note": "x"}))
    assert not caplog.records


# What is no model, or lacks what it must say.


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, family: str, key: str) -> None:
    path = make(tmp_path / "model.gguf", family, metadata={f"{{arch}}.{key}": None})
    with pytest.raises(stoker.ModelFileError, match=rf"{family}\.{re.escape(key)}"):
        stoker.load(path)


def test_a_missing_width_of_experts_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    metadata = {"{arch}.expert_feed_forward_length": None, "{arch}.feed_forward_length": None}
    for family in ("qwen3moe", "smallthinker"):
        make(path, family, metadata=metadata)
        with pytest.raises(stoker.ModelFileError, match="expert_feed_forward_length: expected at"):
            stoker.load(path)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "vocab", "imatrix", 7])
def test_what_is_no_model(tmp_path: Path, kind: Any) -> None:
    path = make(tmp_path / "model.gguf", "llama", metadata={"general.type": kind})
    with pytest.raises(stoker.ModelFileError, match=r"general\.type: expected model, found"):
        stoker.load(path)


def test_an_adapter(tmp_path: Path) -> None:
    """As llama.cpp's converter writes one: hardly any metadata, pairs of small matrices."""
    path = tmp_path / "adapter.gguf"
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_string("general.type", "adapter")
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", 16.0)
    for part in ("a", "b"):
        out.add_tensor(f"blk.0.attn_q.weight.lora_{part}", np.zeros((8, 64), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    with pytest.raises(stoker.ModelFileError, match="adapter is to be merged into its base model"):
        stoker.load(path)


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(5000)]
    path = make(tmp_path / "model.gguf", "llama", metadata={"tokenizer.ggml.tokens": tokens})
    with pytest.raises(stoker.ModelFileError, match=r"tokenizer\.ggml\.tokens: expected at most"):
        stoker.load(path)


def test_more_rows_than_tokens(tmp_path: Path) -> None:
    """The rows that no token names are never chosen."""
    path = make(tmp_path / "whole.gguf", "llama")
    file = _core.GgufFile(str(path))
    keys = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    fewer = {key: file.get(key)[:-40] for key in keys}
    model = stoker.load(make(tmp_path / "model.gguf", "llama", metadata=fewer))
    named = model.tokenizer.vocab_size
    assert model.n_vocab == named + 40
    prompt = next(p for p in range(200) if int(model.logits([p])[-1].argmax()) >= named)
    for options in ({"temperature": 0}, {"temperature": 5.0, "top_k": 0, "top_p": 1, "min_p": 0}):
        generation = model.generate([prompt], max_tokens=100, seed=1, ignore_eos=True, **options)
        generation.read()
        assert len(generation.tokens) == 100 and max(generation.tokens) < named


# Pooling and causality.


@pytest.mark.parametrize("kind", range(5))
def test_pooling_is_the_files(tmp_path: Path, kind: int) -> None:
    path = make(tmp_path / "model.gguf", "llama", metadata={"{arch}.pooling_type": kind})
    model = stoker.load(path, precision="high", kv_type="f32")
    ids = some_tokens(9)
    hidden = np.stack([model.embed(ids[: n + 1], pooling="last") for n in range(9)])
    if kind == 4:
        with pytest.raises(stoker.UnsupportedModelError, match=r"pooling_type: .*found rank"):
            model.embed(ids)
        return
    expected = [hidden, hidden.mean(axis=0, dtype=np.float64), hidden[0], hidden[-1]][kind]
    np.testing.assert_allclose(model.embed(ids), expected, rtol=1e-6)
    np.testing.assert_array_equal(model.embed(ids), model.embed(ids, pooling=POOLINGS[kind]))
    unit = model.embed(ids, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, rtol=1e-6)


def test_pooling_that_is_none(tmp_path: Path) -> None:
    ids = some_tokens(5)
    plain = stoker.load(make(tmp_path / "plain.gguf", "llama"))
    np.testing.assert_array_equal(plain.embed(ids), plain.embed(ids, pooling="mean"))
    with pytest.raises(stoker.OptionError, match="pooling must be one of none, mean, cls, last"):
        plain.embed(ids, pooling="max")
    path = make(tmp_path / "odd.gguf", "llama", metadata={"{arch}.pooling_type": 9})
    with pytest.raises(stoker.ModelFileError, match="pooling_type: expected 0 to 4, found 9"):
        stoker.load(path).embed(ids)


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-moe"])
def test_tokens_that_see_later_ones(tmp_path: Path, family: str) -> None:
    metadata = {"{arch}.attention.causal": False}
    path = make(tmp_path / "model.gguf", family, metadata=metadata, context=700)
    model = stoker.load(path, precision="high", kv_type="f32", threads=2)
    for n in (1, 40, 600):  # more than a chunk of a causal model
        ids = some_tokens(n)
        assert np.abs(model.logits(ids) - Oracle(path).logits(ids)).max() < 5e-4
    causal = stoker.load(make(tmp_path / "causal.gguf", family), precision="high", kv_type="f32")
    assert np.abs(model.logits(ids[:40])[0] - causal.logits(ids[:40])[0]).max() > 0.01
    for call in (model.generate, model.chat, model.session().generate):
        with pytest.raises(stoker.UnsupportedModelError, match="cannot generate"):
            call("hello")
    with pytest.raises(stoker.UnsupportedModelError, match="cannot score"):
        model.perplexity("hello hello hello")
    session = model.session()
    session.append(ids[:5])
    with pytest.raises(stoker.ContextLengthError, match="a whole text of at most"):
        session.append(ids[:5])


def test_windows_that_see_later_ones_are_refused(tmp_path: Path) -> None:
    metadata = {"{arch}.attention.causal": False}
    path = make(tmp_path / "model.gguf", "gemma3", metadata=metadata, window=16)
    with pytest.raises(stoker.UnsupportedModelError, match="causal: expected true in a model with"):
        stoker.load(path)


def test_experts_weights_norm_is_the_files(tmp_path: Path) -> None:
    ids = some_tokens(20)
    found = {}
    for family in ("qwen2moe", "qwen3moe"):
        for value in (None, False, True):
            metadata = {"{arch}.expert_weights_norm": value}
            path = make(tmp_path / "model.gguf", family, metadata=metadata)
            found[family, value] = stoker.load(path).logits(ids)
    for family, usual in (("qwen2moe", False), ("qwen3moe", True)):
        np.testing.assert_array_equal(found[family, None], found[family, usual])
        assert np.abs(found[family, True] - found[family, False]).max() > 0.01
