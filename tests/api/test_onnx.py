"""GGUF to ONNX: the graph computes what the native engine does, and files are whole or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import stoker
from oracle import Oracle
from stoker.runtime.cli.main import app
from tiny_models import VARIANTS, WIDE, make, some_tokens, spec_of
from typer.testing import CliRunner

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from stoker.export.onnx import trial as onnx_trial  # noqa: E402
from stoker.export.onnx.graph import blocks, graph, weights  # noqa: E402
from stoker.export.onnx.graph.config import FAMILIES  # noqa: E402
from stoker.export.to_onnx import gguf_to_onnx  # noqa: E402
from stoker.runtime import _core  # noqa: E402

# onnxruntime's rotary embedding needs heads of a multiple of 16 values.
RUN = [
    name
    for name, (family, o) in VARIANTS.items()
    if o.get("head_dim", 16) % 16 == 0 and spec_of(family).arch in FAMILIES
]
N = 60  # tokens
SPLITS = (1, 30, 7, 1, 21)  # tokens per evaluation when fed with a past


def session(path: Path) -> Any:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def evaluate(graph: Any, tokens: npt.NDArray[Any], past: dict[str, Any] | None = None) -> Any:
    """(logits [n, n_vocab], present as the next past)."""
    if past is None:
        past = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in graph.get_inputs()
            if i.name.startswith("past_key_values")
        }
    before = next(iter(past.values())).shape[2]
    feed = {
        "input_ids": tokens[None].astype(np.int64),
        "attention_mask": np.ones((1, before + len(tokens)), np.int64),
        **past,
    }
    names = [o.name for o in graph.get_outputs()]
    found = dict(zip(names, graph.run(names, feed), strict=True))
    following = {p: found[p.replace("past_key_values", "present")] for p in past}
    return found["logits"][0], following


def native(path: Path, tokens: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return stoker.load(path, kv_type="f32", precision="high", threads=1).logits(tokens)


@pytest.mark.parametrize("variant", RUN)
def test_agrees_with_the_native_engine(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    gguf = make(tmp_path / "m.gguf", family, **overrides)
    graph = session(gguf_to_onnx(gguf, tmp_path / "m.onnx", type="f32").path)
    tokens = some_tokens(N)
    expected = native(gguf, tokens)
    whole, _ = evaluate(graph, tokens)
    assert np.abs(whole - expected).max() < 1e-3
    assert np.abs(whole - Oracle(gguf).logits(tokens)).max() < 1e-3
    parts, past, at = [], None, 0
    for n in SPLITS:
        logits, past = evaluate(graph, tokens[at : at + n], past)
        parts.append(logits)
        at += n
    assert at == N
    assert np.abs(np.concatenate(parts) - expected).max() < 1e-3


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1", "Q4_K", "Q8_0"])
@pytest.mark.parametrize("family", ["llama-moe", "qwen2moe", "smallthinker"])
def test_experts_keep_their_values(
    family: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations are float32, so that rounding does not decide which experts are chosen."""
    monkeypatch.setattr(weights, "_INT8_ACTIVATIONS", 1)
    gguf = make(tmp_path / "m.gguf", family, quant=quant, **WIDE)
    tokens = some_tokens(N)
    expected = Oracle(gguf).logits(tokens)
    made = gguf_to_onnx(gguf, tmp_path / "keep.onnx", type="keep")
    kept = session(made.path)
    whole, _ = evaluate(kept, tokens)
    assert np.abs(whole - expected).max() < 1e-3
    past, parts = None, []
    for at in range(12):
        logits, past = evaluate(kept, tokens[at : at + 1], past)
        parts.append(logits)
    assert np.abs(np.concatenate(parts) - whole[:12]).max() < 1e-3
    read = int(kept.get_modelmeta().custom_metadata_map["stoker.token_bytes"])
    assert read < 0.8 * made.nbytes  # a token does not read the experts that it does not use


def test_padding_on_the_right_does_not_count(tmp_path: Path) -> None:
    gguf = make(tmp_path / "m.gguf", "llama")
    graph = session(gguf_to_onnx(gguf, tmp_path / "m.onnx", type="f32").path)
    tokens = some_tokens(20)
    past = {
        i.name: np.zeros((2, i.shape[1], 0, i.shape[3]), np.float32)
        for i in graph.get_inputs()
        if i.name.startswith("past_key_values")
    }
    mask = np.ones((2, 20), np.int64)
    mask[1, 12:] = 0
    feed = {"input_ids": np.stack([tokens, tokens]).astype(np.int64), "attention_mask": mask}
    logits = graph.run(["logits"], {**feed, **past})[0]
    alone, _ = evaluate(graph, tokens)
    some = graph.run(["logits"], {**feed, **past, "logits_from": np.array([17])})[0]
    assert np.array_equal(some, logits[:, 17:])
    assert np.abs(logits[0] - alone).max() < 1e-4
    assert np.abs(logits[1, :12] - alone[:12]).max() < 1e-4


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1", "Q4_K", "Q8_0"])
def test_keep_loses_only_the_rounding_of_activations(quant: str, tmp_path: Path) -> None:
    gguf = make(tmp_path / "m.gguf", "llama", quant=quant)
    expected = native(gguf, some_tokens(N))
    kept = gguf_to_onnx(gguf, tmp_path / "keep.onnx", type="keep")
    exact = gguf_to_onnx(gguf, tmp_path / "f32.onnx", type="f32")
    assert kept.nbytes < exact.nbytes
    logits, _ = evaluate(session(kept.path), some_tokens(N))
    # Tiny random models are rough; coarser weights (4 bits for 8) would be five times as far off.
    assert np.abs(logits - expected).mean() < 0.1
    # The native engine multiplies quantized weights with activations of 15 bits.
    assert np.abs(evaluate(session(exact.path), some_tokens(N))[0] - expected).max() < 5e-3


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1", "Q4_K"])
def test_four_bits_hold_these_types_exactly(quant: str) -> None:
    x = np.random.default_rng(0).standard_normal(8 * 512).astype(np.float32)
    data = _core.quantize(quant, x)
    made = blocks.four_bits(quant, data, None, 8, 512)
    expected = _core.dequantize(quant, data, x.size)
    assert np.abs(values_of(made, 4) - expected).max() < 1e-6


def test_eight_bits_hold_q8_0_exactly() -> None:
    x = np.random.default_rng(0).standard_normal(8 * 64).astype(np.float32)
    data = _core.quantize("Q8_0", x)
    made = blocks.eight_bits(data, 8, 64)
    assert np.array_equal(values_of(made, 8), _core.dequantize("Q8_0", data, x.size))


def test_fitted_blocks_lose_less_than_q4_1() -> None:
    x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    made = blocks.four_bits("F32", np.empty(0, np.uint8), x, 64, 256)
    error = np.square(values_of(made, 4) - x.reshape(-1)).mean()
    q4_1 = _core.dequantize("Q4_1", _core.quantize("Q4_1", x.reshape(-1)), x.size)
    assert error < 0.95 * np.square(q4_1 - x.reshape(-1)).mean()
    flat = np.full((1, 32), 0.25, np.float32)
    made = blocks.four_bits("F32", np.empty(0, np.uint8), flat, 1, 32)
    assert np.array_equal(values_of(made, 4), flat.reshape(-1))


def values_of(made: blocks.Blocks, bits: int) -> npt.NDArray[np.float32]:
    q = made.packed.astype(np.float32)
    if bits == 4:
        q = np.stack([made.packed & 15, made.packed >> 4], -1).reshape(*q.shape[:2], 32)
        q = q.astype(np.float32)
    values = made.scales[..., None] * (q - 2 ** (bits - 1))
    if made.offsets is not None:
        values = values + made.offsets[..., None]
    return values.reshape(-1).astype(np.float32)


def test_f16_and_int4_are_near(tmp_path: Path) -> None:
    gguf = make(tmp_path / "m.gguf", "qwen3", n_embd=64, n_ff=128)
    expected = native(gguf, some_tokens(N))
    half = gguf_to_onnx(gguf, tmp_path / "half.onnx", type="f16")
    four = gguf_to_onnx(gguf, tmp_path / "four.onnx", type="int4")
    eight = gguf_to_onnx(gguf, tmp_path / "eight.onnx", type="int8")
    assert four.nbytes < eight.nbytes < half.nbytes
    errors = [
        np.abs(evaluate(session(made.path), some_tokens(N))[0] - expected).mean()
        for made in (half, eight, four)
    ]
    assert errors[0] < 0.02
    assert errors[0] < errors[1] < errors[2] < 2


def test_weights_lie_beside_the_graph_and_the_tokenizer_in_it(tmp_path: Path) -> None:
    import onnx

    gguf = make(tmp_path / "m.gguf", "llama")
    made = gguf_to_onnx(gguf, tmp_path / "m.onnx", type="int4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "m.onnx", "m.onnx.data"]
    assert made.nbytes == made.path.stat().st_size + made.data.stat().st_size
    model = onnx.load(made.path, load_external_data=False)
    for tensor in model.graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries:
            assert entries["location"] == "m.onnx.data"
            large = int(entries["length"]) >= 4096
            assert int(entries["offset"]) % (4096 if large else 64) == 0
        else:
            assert len(tensor.raw_data) <= 1024
    properties = {p.key: p.value for p in model.metadata_props}
    metadata = json.loads(properties["stoker.metadata"])
    assert metadata["tokenizer.ggml.tokens"] == stoker.load(gguf).metadata["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "q4"}, "type: expected one of keep, int4, int8, f16, f32, found q4"),
        ({"context": 0}, "context: expected 1 to 256 tokens, found 0"),
        ({"context": 257}, "context: expected 1 to 256 tokens, found 257"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    gguf = make(tmp_path / "m.gguf", "llama")
    with pytest.raises(stoker.OptionError) as error:
        gguf_to_onnx(gguf, tmp_path / "m.onnx", **options)
    assert message in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_bad_models_leave_nothing(tmp_path: Path) -> None:
    def refused(kind: type[Exception], text: str, path: Path, name: str = "o.onnx") -> None:
        before = sorted(p.name for p in tmp_path.iterdir())
        with pytest.raises(kind) as error:
            gguf_to_onnx(path, tmp_path / name, type="int4")
        assert text in str(error.value)
        assert "\n" not in str(error.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == before

    unsupported, file_error = stoker.UnsupportedModelError, stoker.ModelFileError
    unknown = make(tmp_path / "unknown.gguf", "llama")
    unknown.write_bytes(unknown.read_bytes().replace(b"llama", b"lloma"))
    refused(unsupported, "architecture: expected one of llama", unknown)
    moe = make(tmp_path / "moe.gguf", "qwen3moe", drop=["blk.0.ffn_up_exps.weight"])
    refused(file_error, "expected a tensor blk.0.ffn_up.0.weight", moe)
    missing = make(tmp_path / "missing.gguf", "llama", drop=["blk.1.ffn_up.weight"])
    refused(file_error, "expected a tensor blk.1.ffn_up.weight", missing)
    extra = make(tmp_path / "extra.gguf", "llama", extra={"blk.0.other.weight": 8})
    refused(unsupported, "found blk.0.other.weight", extra)
    odd = make(tmp_path / "odd.gguf", "llama", head_dim=24)
    refused(unsupported, "width of a head: expected a multiple of 16", odd)
    good = make(tmp_path / "good.gguf", "llama")
    refused(stoker.OptionError, "ends in .onnx", good, "o.bin")
    (tmp_path / "there.onnx").write_bytes(b"x")
    refused(stoker.OptionError, "exists: choose another name", good, "there.onnx")


@pytest.mark.parametrize(("kind", "row"), [(1, None), (2, 0), (3, -1)])
def test_embeddings_pool_as_the_file_says(kind: int, row: int | None, tmp_path: Path) -> None:
    """llama.cpp's enumeration: 1 is the mean, 2 the first token's state, 3 the last one's."""
    gguf = make(tmp_path / "m.gguf", "llama", metadata={"{arch}.pooling_type": kind})
    model = stoker.load(gguf_to_onnx(gguf, tmp_path / "m.onnx", type="f32").path)
    tokens = some_tokens(12)
    states = Oracle(gguf).hidden(tokens)
    expected = states.mean(0) if row is None else states[row]
    assert np.abs(model.embed(tokens) - expected).max() < 1e-3
    assert np.abs(model.embed(tokens, pooling="none") - states).max() < 1e-3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.causal", False, "attention.causal: expected true for ONNX"),
        ("pooling_type", 4, "pooling_type: expected one of none, mean, cls, last, found rank"),
    ],
)
def test_what_the_graph_does_not_compute_is_refused(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    gguf = make(tmp_path / "m.gguf", "llama", metadata={f"{{arch}}.{key}": value})
    with pytest.raises(stoker.UnsupportedModelError, match=message):
        gguf_to_onnx(gguf, tmp_path / "m.onnx", type="f32")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    gguf = make(tmp_path / "m.gguf", "llama")
    tensor = next(t for t in _core.GgufFile(str(gguf)).tensors if t.name == "blk.2.ffn_up.weight")
    with open(gguf, "r+b") as file:
        file.seek(tensor.offset + 40)
        file.write(np.array([np.nan], "<f4").tobytes())
    for width in ("f32", "int4"):
        with pytest.raises(stoker.ModelFileError, match=r"blk.2.ffn_up.weight: expected finite"):
            gguf_to_onnx(gguf, tmp_path / "m.onnx", type=width)
        assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("copies", [1, 1 << 60])
def test_a_graph_that_does_not_run_gets_no_name(
    copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last check is a run in onnxruntime, also if the weights have to stay mapped."""
    gguf = make(tmp_path / "m.gguf", "llama")
    monkeypatch.setattr(onnx_trial, "_COPIES", copies)
    good = gguf_to_onnx(gguf, tmp_path / "good.onnx", type="f16")
    assert np.isfinite(evaluate(session(good.path), some_tokens(N))[0]).all()
    names = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.setattr(graph, "_MICROSOFT_OPSET", 99)
    with pytest.raises(stoker.UnsupportedModelError) as error:
        gguf_to_onnx(gguf, tmp_path / "bad.onnx", type="int4")
    assert "bad.onnx: onnxruntime does not run the model that was made: " in str(error.value)
    assert str(error.value).endswith("another --type or a newer onnxruntime may run it")
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_force_replaces_both_files(tmp_path: Path) -> None:
    gguf = make(tmp_path / "m.gguf", "llama")
    gguf_to_onnx(gguf, tmp_path / "m.onnx", type="int4")
    made = gguf_to_onnx(gguf, tmp_path / "m.onnx", type="f32", force=True)
    logits, _ = evaluate(session(made.path), some_tokens(N))
    assert np.abs(logits - native(gguf, some_tokens(N))).max() < 1e-3


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process")
def test_a_killed_export_goes_on(tmp_path: Path) -> None:
    gguf = make(tmp_path / "m.gguf", "llama", n_layer=6, n_embd=256, n_ff=512)
    wanted = gguf_to_onnx(gguf, tmp_path / "whole.onnx", type="int4").data.read_bytes()
    code = (
        "import sys, time\n"
        "from stoker.export import to_onnx\n"
        "to_onnx.COMMIT_BYTES = 1\n"
        "def slow(what, done, total):\n"
        "    print(done, flush=True)\n"
        "    time.sleep(0.05)\n"
        "to_onnx.gguf_to_onnx(sys.argv[1], sys.argv[2], type='int4', progress=slow)\n"
    )
    out = tmp_path / "m.onnx"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(gguf), str(out)],
        stdout=subprocess.PIPE,
        env=dict(os.environ),
    )
    assert process.stdout is not None
    for _ in range(12):
        assert process.stdout.readline()
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    seen: list[int] = []
    made = gguf_to_onnx(gguf, out, type="int4", progress=lambda _, done, total: seen.append(done))
    assert seen[0] > len(wanted) // 20  # it does not start from the beginning
    assert made.data.read_bytes() == wanted
    left = {".m.onnx.data.part", ".m.onnx.new"} & {p.name for p in tmp_path.iterdir()}
    assert not left


def test_command(tmp_path: Path) -> None:
    gguf = make(tmp_path / "m.gguf", "qwen2")
    out = tmp_path / "m.onnx"
    done = CliRunner().invoke(app, ["export", "onnx", str(gguf), str(out), "--type", "f32"])
    assert done.exit_code == 0, done.output
    assert "256 tokens of context" in done.output
    logits, _ = evaluate(session(out), some_tokens(N))
    assert np.abs(logits - native(gguf, some_tokens(N))).max() < 1e-3


def smollm2() -> Path:
    from stoker.models.locate import locate

    try:
        return locate("smollm2")
    except stoker.StokerError as error:
        pytest.skip(str(error))


def test_smollm2_at_four_bits(shared_data: Path, tmp_path: Path) -> None:
    import gzip

    gguf = smollm2()
    text = shared_data / "text" / "wikitext2-test-tokenised.txt.gz"
    if not text.is_file():
        pytest.skip(f"no {text}")
    model = stoker.load(gguf, kv_type="f32", precision="high")
    with gzip.open(text, "rt", encoding="utf-8") as file:
        tokens = np.array(model.tokenizer.encode(file.read(8000)))[:256]
    assert len(tokens) == 256
    made = gguf_to_onnx(gguf, tmp_path / "m.onnx", type="int4")
    assert made.nbytes < 1.2 * gguf.stat().st_size
    four = stoker.load(made.path)
    a, b = (log_softmax(m.logits(tokens)) for m in (model, four))
    assert float((np.exp(a) * (a - b)).sum(axis=-1).mean()) < 0.01
    assert float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean()) > 0.9
    with four.session() as session:  # the same tokens, one at a time
        steps = []
        for token in tokens[:24]:
            session.append([int(token)])
            steps.append(session.logits())
    c = log_softmax(np.stack(steps))
    assert float((np.exp(a[:24]) * (a[:24] - c)).sum(axis=-1).mean()) < 0.015
    answer = four.chat("What is the capital of France?", temperature=0, max_tokens=12)
    assert answer.read()
    assert len(answer.tokens) > 1


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
