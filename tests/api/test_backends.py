"""The same API over onnxruntime and llama.cpp."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fake_llama_cpp
import numpy as np
import pytest
import stoker
from stoker.runtime import load as loading
from tiny_models import make, some_tokens


@pytest.fixture(scope="module")
def onnx_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny GGUF model and the same as ONNX."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from stoker.export.to_onnx import gguf_to_onnx

    folder = tmp_path_factory.mktemp("pair")
    gguf = make(folder / "m.gguf", "llama", context=2048)
    return gguf, gguf_to_onnx(gguf, folder / "m.onnx", type="f32").path


@pytest.fixture
def pair(onnx_pair: tuple[Path, Path]) -> tuple[stoker.Model, stoker.Model]:
    """The same model on the native engine and on onnxruntime."""
    gguf, onnx = onnx_pair
    options: dict[str, Any] = {"kv_type": "f32", "threads": 1}
    return stoker.load(gguf, precision="high", **options), stoker.load(onnx, **options)


def graph_without_cache(path: Path) -> Path:
    """A graph of y = a + b, for floats and for int64 [n, 2]."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    a = helper.make_tensor_value_info("a", kinds.FLOAT, ["n", 2])
    b = helper.make_tensor_value_info("b", kinds.INT64, ["n", 2])
    y = helper.make_tensor_value_info("y", kinds.FLOAT, ["n", 2])
    nodes = [
        helper.make_node("Cast", ["b"], ["c"], to=kinds.FLOAT),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [a, b], [y]),
        ir_version=9,
        opset_imports=[helper.make_opsetid("", 20)],
    )
    onnx.save(model, path)
    return path


# ONNX decoders.


def test_same_logits_and_embeddings(pair: tuple[stoker.Model, stoker.Model]) -> None:
    native, onnx = pair
    tokens = some_tokens(700)  # more than one chunk, and more than the cache's first capacity
    assert np.abs(onnx.logits(tokens) - native.logits(tokens)).max() < 1e-3
    assert np.abs(onnx.embed(tokens[:50]) - native.embed(tokens[:50])).max() < 1e-3
    a, b = native.perplexity(tokens, context=128), onnx.perplexity(tokens, context=128)
    assert abs(a.ppl / b.ppl - 1) < 1e-4
    assert (a.tokens, a.chunks) == (b.tokens, b.chunks)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 3, "top_k": 20},
        {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 2},
    ],
)
def test_same_generation(pair: tuple[stoker.Model, stoker.Model], options: dict[str, Any]) -> None:
    native, onnx = pair
    prompt = "the thing and the other"
    expected = native.generate(prompt, max_tokens=40, ignore_eos=True, **options)
    found = onnx.generate(prompt, max_tokens=40, ignore_eos=True, **options)
    assert found.read() == expected.read()
    assert found.tokens == expected.tokens
    assert found.stats.decode_tokens == 39
    assert found.stats.decode_bytes > 0
    message = [{"role": "user", "content": "hello"}]
    assert (
        onnx.chat(message, max_tokens=20, temperature=0).read()
        == native.chat(message, max_tokens=20, temperature=0).read()
    )


def test_sessions_truncate_and_go_on(pair: tuple[stoker.Model, stoker.Model]) -> None:
    _, onnx = pair
    tokens = some_tokens(40).tolist()
    expected = onnx.logits(tokens)
    with onnx.session() as session, onnx.session() as other:
        session.append(tokens[:30])
        other.append(tokens[5:9])
        session.append(some_tokens(300, seed=1))  # the cache grows
        session.truncate(25)
        session.append(tokens[25:])
        assert np.abs(session.logits() - expected[-1]).max() < 1e-4
        session.truncate(10)
        assert np.abs(session.logits() - expected[9]).max() < 1e-4
        assert session.position == 10
    with onnx.session() as session:
        first = session.chat("one", max_tokens=4, temperature=0)
        first.read()
        second = session.chat("two", max_tokens=4, temperature=0)
        second.read()
        assert second.stats.reused_tokens > 0


def test_limits_and_errors(pair: tuple[stoker.Model, stoker.Model]) -> None:
    _, onnx = pair
    with pytest.raises(stoker.ContextLengthError):
        onnx.logits(some_tokens(2049))
    with pytest.raises(stoker.OptionError, match="outside the vocabulary"):
        onnx.logits([10**6])
    with pytest.raises(stoker.OptionError, match=r"context must be at most the model's 2048"):
        stoker.load(onnx.path, context=4096)
    with pytest.raises(stoker.BudgetError, match="expected a budget of at least"):
        stoker.load(onnx.path, memory="1MB")
    assert stoker.load(onnx.path, memory="90%", context=64).config["context"] == 64
    lines = "\n".join(onnx.forecast().lines())
    assert "onnxruntime" in lines


def test_runtime_options(onnx_pair: tuple[Path, Path]) -> None:
    path = onnx_pair[1]
    tokens = some_tokens(20)
    expected = stoker.load(path).logits(tokens)
    chosen = {
        "arena": False,
        "spinning": False,
        "optimization": "basic",
        "config": {"session.set_denormal_as_zero": "1"},
    }
    plain = stoker.load(path, threads=2, onnx=chosen).logits(tokens)
    assert np.abs(plain - expected).max() < 1e-4
    for bad in ({"areena": True}, {"optimization": "most"}, {"config": {"a": 1}}):
        with pytest.raises(stoker.OptionError):
            stoker.load(path, onnx=bad)
    with pytest.raises(stoker.OptionError, match=r"expect a file that ends in .onnx"):
        stoker.load(onnx_pair[0], onnx={"arena": False})


def test_cancel_from_another_thread(pair: tuple[stoker.Model, stoker.Model]) -> None:
    _, onnx = pair
    with onnx.session() as session:
        generation = session.generate("the", temperature=0, ignore_eos=True)
        thread = threading.Thread(target=generation.read)
        thread.start()
        while len(generation.tokens) < 5 and thread.is_alive():
            time.sleep(0.001)
        session.cancel()
        thread.join(60)
        assert generation.finish_reason == "cancelled"
        session.append("more")
        assert session.logits().shape == (onnx.n_vocab,)


def test_a_foreign_decoder_without_buffer(onnx_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Decoders as optimum makes them: no properties, and present is past plus the new tokens."""
    onnx = pytest.importorskip("onnx")
    gguf, path = onnx_pair
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    foreign, native = stoker.load(tmp_path / "foreign.onnx"), stoker.load(gguf, kv_type="f32")
    tokens = some_tokens(50)
    expected = native.logits(tokens)
    assert np.abs(foreign.logits(tokens) - expected).max() < 1e-3
    with foreign.session() as session:
        session.append(tokens[:20])
        session.truncate(10)
        session.append(tokens[10:])
        assert np.abs(session.logits() - expected[-1]).max() < 1e-3
    with pytest.raises(stoker.TokenizerError):
        _ = foreign.tokenizer


# Other graphs, and files that are not graphs.


def test_run_of_any_graph(tmp_path: Path) -> None:
    model = stoker.load(graph_without_cache(tmp_path / "sum.onnx"))
    found = model.run({"a": [[1, 2.5]], "b": np.array([[3, 4]], np.int32)})
    assert list(found) == ["y"]
    assert found["y"].dtype == np.float32
    assert found["y"].tolist() == [[4.0, 6.5]]
    assert model.inputs["b"] == ("int64", ("n", 2))
    assert list(model.outputs) == ["y"]
    a, b = np.zeros((1, 2)), np.zeros((1, 2), np.int64)
    for inputs, message in (
        ({"a": a}, "b is missing"),
        ({"a": a, "b": b, "c": b}, "input 'c': expected a, b"),
        ({"a": a, "b": b.astype(float)}, "input b: expected int64, found float64"),
        ({"a": a[0], "b": b}, "input a: expected shape"),
        ({"a": np.zeros((1, 3)), "b": b}, "input a: expected shape"),
    ):
        with pytest.raises(stoker.OptionError) as error:
            model.run(inputs)
        assert message in str(error.value)
    with pytest.raises(stoker.DeviceError, match="onnxruntime failed"):
        model.run({"a": np.zeros((2, 2)), "b": np.zeros((3, 2), np.int64)})
    for call in (
        lambda: model.generate("x"),
        lambda: model.chat("x"),
        lambda: model.logits([1]),
        model.session,
    ):
        with pytest.raises(stoker.UnsupportedModelError, match=r"use run\(inputs\)"):
            call()


def test_a_gguf_model_has_no_run(tmp_path: Path) -> None:
    model = stoker.load(make(tmp_path / "m.gguf", "llama"))
    with pytest.raises(stoker.UnsupportedModelError, match="expects an ONNX model"):
        model.run({})


def test_files_that_are_no_model(tmp_path: Path, onnx_pair: tuple[Path, Path]) -> None:
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("this is no model")
    for name in ("empty.onnx", "text.onnx"):
        with pytest.raises(stoker.ModelFileError, match="expected an ONNX model") as error:
            stoker.load(tmp_path / name)
        assert "\n" not in str(error.value)
    (tmp_path / "alone.onnx").write_bytes(onnx_pair[1].read_bytes())
    with pytest.raises(stoker.ModelFileError) as error:
        stoker.load(tmp_path / "alone.onnx")
    assert "m.onnx.data" in str(error.value)
    (tmp_path / "m.bin").write_text("this is no model")
    with pytest.raises(stoker.ModelFileError):
        stoker.load(tmp_path / "m.bin")


def test_without_onnxruntime_the_extra_is_named(
    onnx_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stoker.runtime.backends import onnx

    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(stoker.OptionError, match=r"pip install 'stoker\[onnx\]'"):
        stoker.load(onnx_pair[1])


# llama.cpp.


def unknown_architecture(path: Path) -> Path:
    """A model whose architecture the native engine lacks (and llama.cpp, too)."""
    make(path, "llama")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"llama", b"lloma"))
    return path


def test_without_llama_cpp_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(stoker.UnsupportedModelError) as error:
        stoker.load(unknown_architecture(tmp_path / "m.gguf"))
    assert "lloma" in str(error.value)
    assert "pip install 'stoker[llama-cpp]'" in str(error.value)


def test_llama_cpp_keeps_no_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: name)
    with pytest.raises(stoker.UnsupportedModelError, match="keeps no memory budget"):
        stoker.load(unknown_architecture(tmp_path / "m.gguf"), memory="1GiB")


def test_what_neither_runs(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    with pytest.raises(stoker.UnsupportedModelError, match=r"lloma.*nor llama.cpp"):
        stoker.load(unknown_architecture(tmp_path / "m.gguf"))


def test_llama_cpp_is_chosen_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("llama_cpp")
    gguf = make(tmp_path / "m.gguf", "llama")
    native = stoker.load(gguf, kv_type="f32", precision="high")

    def refuse(*_: object) -> stoker.Model:
        raise stoker.UnsupportedModelError(f"{gguf}: no such architecture")

    monkeypatch.setattr("stoker.runtime.model.Model.__init__", refuse)
    with caplog.at_level(logging.WARNING, "stoker"):
        model = stoker.load(gguf, kv_type="f32", threads=1)
    assert type(model).__name__ == "LlamaCppModel"
    assert [r.getMessage() for r in caplog.records] == [
        f"stoker: {gguf}: no such architecture; running on llama.cpp"
    ]
    tokens = some_tokens(100)
    # llama.cpp computes some of attention in half precision.
    assert np.abs(model.logits(tokens) - native.logits(tokens)).max() < 0.05
    assert np.abs(model.embed(tokens) - native.embed(tokens)).max() < 0.05
    expected = native.generate("the thing", temperature=0, max_tokens=20).read()
    assert model.generate("the thing", temperature=0, max_tokens=20).read() == expected
    with model.session() as session:
        session.append(tokens[:50])
        session.truncate(20)
        session.append(tokens[20:])
        assert np.abs(session.logits() - native.logits(tokens)[-1]).max() < 0.05


def test_an_architecture_that_only_llama_cpp_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    freed = fake_llama_cpp.install(monkeypatch)
    gguf = unknown_architecture(tmp_path / "m.gguf")
    with caplog.at_level(logging.WARNING, "stoker"):
        model = stoker.load(gguf, threads=1, context=128)
    assert "running on llama.cpp" in caplog.text
    assert "lloma" in caplog.text
    native = stoker.load(tmp_path / "m.gguf.native", kv_type="f32", precision="high", threads=1)
    tokens = some_tokens(100)
    expected = native.logits(tokens)
    assert np.array_equal(model.logits(tokens), expected)
    assert np.array_equal(model.embed(tokens), native.embed(tokens))
    assert model.perplexity(tokens, context=64).ppl == pytest.approx(
        native.perplexity(tokens, context=64).ppl, rel=1e-6
    )
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    chunks = [chunk.text for chunk in model.chat("the thing", **options)]
    assert len(chunks) > 3
    assert "".join(chunks) == native.chat("the thing", **options).read()
    with model.session() as session:
        session.append(tokens[:50])
        session.truncate(20)
        session.append(tokens[20:])
        assert np.array_equal(session.logits(), expected[-1])
        generation = session.generate("", max_tokens=8, temperature=0, ignore_eos=True)
        for _ in generation:
            session.cancel()
        assert generation.finish_reason == "cancelled"
    with pytest.raises(stoker.ContextLengthError):
        model.logits(some_tokens(129))
    del model, session, generation
    gc.collect()
    assert freed.count("batch") == freed.count("context") > 0
    assert freed[-1] == "model"  # not before its contexts


def tiny_gpt2(path: Path, n_layer: int = 2, width: int = 64, heads: int = 4) -> Any:
    """A GPT-2, which the native engine lacks; returns tokens -> logits, in numpy."""
    import gguf
    import tiny_models

    vocabulary, merges = tiny_models.vocabulary()
    rng = np.random.default_rng(5)
    w: dict[str, Any] = {}

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        spread = 1.5 / np.sqrt(shape[-1]) if len(shape) > 1 else 0.2
        w[name] = (mean + spread * rng.standard_normal(shape)).astype(np.float32)

    add("token_embd.weight", len(vocabulary), width)
    add("position_embd.weight", 256, width)
    norms = ["output_norm"]
    for b in (f"blk.{il}." for il in range(n_layer)):
        norms += [b + "attn_norm", b + "ffn_norm"]
        shapes = {"attn_qkv": (3, 1), "attn_output": (1, 1), "ffn_up": (4, 1), "ffn_down": (1, 4)}
        for part, (rows, cols) in shapes.items():
            add(f"{b}{part}.weight", rows * width, cols * width)
            add(f"{b}{part}.bias", rows * width)
    for name in norms:
        add(name + ".weight", width, mean=1.0)
        add(name + ".bias", width)
    out = gguf.GGUFWriter(path, "gpt2")
    out.add_context_length(256)
    out.add_embedding_length(width)
    out.add_feed_forward_length(4 * width)
    out.add_block_count(n_layer)
    out.add_head_count(heads)
    out.add_layer_norm_eps(1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(vocabulary)
    out.add_token_types([3] * len(tiny_models.SPECIAL) + [1] * (len(vocabulary) - 3))
    out.add_token_merges(merges)
    out.add_bos_token_id(0)
    out.add_eos_token_id(2)
    out.add_add_bos_token(False)
    for name, values in w.items():
        out.add_tensor(name, values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()

    def norm(x: Any, name: str) -> Any:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x: Any, name: str) -> Any:
        return x @ w[name + ".weight"].T.astype(np.float64) + w[name + ".bias"]

    def forward(tokens: Any) -> Any:
        n = len(tokens)
        x = w["token_embd.weight"][tokens].astype(np.float64) + w["position_embd.weight"][:n]
        for b in (f"blk.{il}." for il in range(n_layer)):
            qkv = linear(norm(x, b + "attn_norm"), b + "attn_qkv")
            q, k, v = qkv.reshape(n, 3, heads, -1).transpose(1, 2, 0, 3)
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(width // heads)
            scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (p / p.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(n, width)
            x = x + linear(mixed, b + "attn_output")
            h = linear(norm(x, b + "ffn_norm"), b + "ffn_up")
            h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
            x = x + linear(h, b + "ffn_down")
        return norm(x, "output_norm") @ w["token_embd.weight"].T

    return forward


def test_gpt2_on_llama_cpp(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("llama_cpp")
    reference = tiny_gpt2(tmp_path / "gpt2.gguf")
    with caplog.at_level(logging.WARNING, "stoker"):
        model = stoker.load(tmp_path / "gpt2.gguf", kv_type="f32", threads=1)
    assert "gpt2" in caplog.text
    assert "running on llama.cpp" in caplog.text
    tokens = some_tokens(60)
    expected = reference(tokens)
    assert np.abs(model.logits(tokens) - expected).max() < 0.05
    with model.session() as session:
        session.append(tokens[:40])
        session.truncate(30)
        for token in tokens[30:]:
            session.append([int(token)])
        assert np.abs(session.logits() - expected[-1]).max() < 0.05
    text = model.generate("the thing", max_tokens=10, temperature=0, ignore_eos=True)
    assert len(text.read()) > 0
    assert model.perplexity(tokens, context=30).ppl > 1


def test_importing_stoker_loads_no_backend() -> None:
    import subprocess

    code = (
        "import sys, stoker; stoker.load; "
        "print([m for m in ('onnxruntime', 'onnx', 'llama_cpp', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
