"""Hugging Face folders to GGUF: stoker's answers on the file are transformers' on the folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from oracle import Oracle
from stoker.export import hf_to_gguf
from stoker.export.hf import weights as hf_weights
from stoker.export.writer import mixes
from stoker.runtime import _core
from stoker.runtime.base.errors import ModelFileError, OptionError, UnsupportedModelError

pytest.importorskip("torch", reason="needs PyTorch (pip install torch)")
pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
pytest.importorskip("safetensors", reason="needs safetensors (pip install safetensors)")

import hf_models
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[Any]
TOKENS = hf_models.TOKENS


def stoker_logits(path: Path, tokens: Array = TOKENS) -> Array:
    engine = _core.Engine(
        _core.GgufFile(str(path)), threads=1, kv_type="f32", context=256, precision="high"
    )
    return engine.sequence().eval_all(tokens)


# Logits.


@pytest.mark.parametrize("variant", hf_models.VARIANTS)
def test_logits_equal_transformers(tmp_path: Path, variant: str) -> None:
    folder, expected = hf_models.saved(variant)
    made = hf_to_gguf.convert(folder, tmp_path / "model.gguf")
    actual = stoker_logits(made.path)
    assert expected.std() > 0.3, "the model says nothing: the comparison would prove nothing"
    assert np.abs(actual - expected).max() < 2e-4  # measured: below 5e-5
    assert made.nbytes == made.path.stat().st_size
    assert set(made.types) == {"F32"}


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("llama-llama3", "llama"),
        ("llama-linear", "llama"),
        ("llama-yarn", "llama"),
        ("llama-yarn-factor", "llama-yarn"),
        ("qwen2-yarn", "llama"),
    ],
)
def test_the_variants_differ(variant: str, base: str) -> None:
    assert np.abs(hf_models.saved(variant)[1] - hf_models.saved(base)[1]).max() > 0.05


def test_old_spellings_of_rope_give_the_same_file(tmp_path: Path) -> None:
    """Uses transformers 4's keys: rope_theta and rope_scaling, rope_local_base_freq for Gemma 3."""
    folder, _ = hf_models.saved("llama-llama3")
    new = hf_to_gguf.convert(folder, tmp_path / "model.gguf").path.read_bytes()
    old = hf_models.copied(folder, tmp_path / folder.name)
    config = json.loads((old / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (old / "config.json").write_text(json.dumps(config))
    assert hf_to_gguf.convert(old, tmp_path / "old.gguf").path.read_bytes() == new

    folder, expected = hf_models.saved("gemma3")
    old = hf_models.copied(folder, tmp_path / "old-gemma")
    config = json.loads((old / "config.json").read_text())
    del config["rope_parameters"], config["layer_types"], config["_sliding_window_pattern"]
    config |= {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}
    (old / "config.json").write_text(json.dumps(config))
    actual = stoker_logits(hf_to_gguf.convert(old, tmp_path / "gemma.gguf").path)
    assert np.abs(actual - expected).max() < 1e-3


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_a_model_that_sees(tmp_path: Path, prefix: str) -> None:
    folder, expected = hf_models.saved("gemma3")
    both = hf_models.copied(folder, tmp_path / "both")
    weights = load_file(both / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): w for name, w in weights.items()}
    renamed["vision_tower.encoder.weight"] = np.ones((3, 3), np.float32)
    save_file(renamed, both / "model.safetensors")
    config = json.loads((both / "config.json").read_text())
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
    (both / "config.json").write_text(json.dumps(whole))
    actual = stoker_logits(hf_to_gguf.convert(both, tmp_path / "model.gguf").path)
    assert np.abs(actual - expected).max() < 1e-3


@pytest.mark.parametrize(("window", "softmax"), [(0, False), (24, True)])
def test_smallthinker_equals_the_oracle(tmp_path: Path, window: int, softmax: bool) -> None:
    weights = hf_models.smallthinker(tmp_path / "st", window=window, softmax=softmax)
    made = hf_to_gguf.convert(tmp_path / "st", tmp_path / "st.gguf")
    file = gguf.GGUFReader(str(made.path))
    found = {t.name: t.data for t in file.tensors}
    down = [weights[f"model.layers.2.block_sparse_moe.experts.{e}.down.weight"] for e in range(8)]
    np.testing.assert_array_equal(found["blk.2.ffn_down_exps.weight"], np.stack(down))
    oracle = Oracle(made.path)
    assert oracle.c.window == window
    assert oracle.c.gating == (1 if softmax else 2)
    expected = oracle.logits(TOKENS)
    steady = np.min([r.margin for r in oracle.routes], axis=0) > 1e-4  # no router hesitates
    first = int(np.argmin(steady)) if not steady.all() else len(TOKENS)
    assert first > 20
    assert np.abs(stoker_logits(made.path) - expected)[:first].max() < 1e-3


# Types.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_keep_their_type(tmp_path: Path, dtype: str) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(hf_models.saved("qwen3moe")[0])
    half = model.to(getattr(torch, dtype))
    half.save_pretrained(tmp_path / "half")
    hf_models.save_byte_level(tmp_path / "half")
    made = hf_to_gguf.convert(tmp_path / "half", tmp_path / "half.gguf")
    kind = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert set(made.types) == {kind, "F32"}
    file = _core.GgufFile(str(made.path))
    kinds = {t.name: t.type for t in file.tensors}
    assert kinds["blk.0.ffn_up_exps.weight"] == kinds["token_embd.weight"] == kind
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert file.get("general.file_type") == mixes.FILE_TYPES[kind].id
    # The model is read again: casting a model rounds its rotary frequencies, too.
    single = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "half", dtype=torch.float32, attn_implementation="eager"
    )
    expected = hf_models.logits(single.eval(), TOKENS)
    assert np.abs(stoker_logits(made.path) - expected).max() < 1e-3


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_quantized_on_the_way_as_afterwards(tmp_path: Path, kind: str) -> None:
    from stoker.export.quantize import quantize

    folder, expected = hf_models.saved("mixtral")
    direct = hf_to_gguf.convert(folder, tmp_path / "direct.gguf", type=kind).path
    whole = hf_to_gguf.convert(folder, tmp_path / "whole.gguf").path
    later = quantize(whole, tmp_path / "later.gguf", type=kind).path
    assert direct.read_bytes() == later.read_bytes()
    if kind == "Q8_0":
        error = np.abs(stoker_logits(direct) - expected).max(axis=-1)
        assert np.median(error) < 0.5


@pytest.fixture(scope="module")
def wide() -> Path:
    """A Llama folder in BF16 whose rows are whole blocks of 256, so that all mixes apply."""
    import torch

    return hf_models.saved_as("llama", "wide", torch.bfloat16, **hf_models.WIDE)


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q5_K_S", "Q6_K", "IQ4_NL", "MXFP4", "BF16", "F32"])
def test_mixes_in_one_pass_are_those_of_two(wide: Path, tmp_path: Path, kind: str) -> None:
    from stoker.export.quantize import quantize

    direct = hf_to_gguf.convert(wide, tmp_path / "direct.gguf", type=kind)
    whole = hf_to_gguf.convert(wide, tmp_path / "whole.gguf").path
    later = quantize(whole, tmp_path / "later.gguf", type=kind).path
    assert direct.path.read_bytes() == later.read_bytes()
    if kind == "Q4_K_M":
        assert {"Q4_K", "Q6_K", "F32"} == set(direct.types)
        original = {t.name: t for t in gguf.GGUFReader(str(whole)).tensors}
        for tensor in gguf.GGUFReader(str(direct.path)).tensors:
            was = original[tensor.name]
            expected = gguf.quants.dequantize(was.data, was.tensor_type)
            error = gguf.quants.dequantize(tensor.data, tensor.tensor_type) - expected
            assert np.linalg.norm(error) < 0.1 * np.linalg.norm(expected)


def test_overrides(tmp_path: Path) -> None:
    made = hf_to_gguf.convert(
        hf_models.saved("llama")[0],
        tmp_path / "m.gguf",
        type="Q4_0",
        overrides=[("blk.*.ffn_down", "Q8_0")],
    )
    kinds = {t.name: t.type for t in _core.GgufFile(str(made.path)).tensors}
    assert kinds["blk.1.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_up.weight"] == "Q4_0"


# Shards.


def test_shards_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf_models.saved("mixtral")[0]
    sharded = hf_models.in_shards(folder, tmp_path / folder.name)
    whole = hf_to_gguf.convert(folder, tmp_path / "whole.gguf").path.read_bytes()
    assert hf_to_gguf.convert(sharded, tmp_path / "a.gguf").path.read_bytes() == whole
    (sharded / "model.safetensors.index.json").unlink()
    # Pieces of a few rows end inside and across experts and heads.
    monkeypatch.setattr(hf_weights, "piece_rows", lambda cols: 37)
    assert hf_to_gguf.convert(sharded, tmp_path / "b.gguf").path.read_bytes() == whole


# Models that cannot be converted.


@pytest.mark.parametrize(
    ("variant", "values", "kind", "message"),
    [
        ("llama", {"architectures": ["MambaForCausalLM"]}, UnsupportedModelError, "found 'Mamba"),
        ("llama", {"architectures": None}, ModelFileError, "architectures"),
        ("llama", {"hidden_act": "gelu"}, UnsupportedModelError, "hidden_act"),
        ("llama", {"mlp_bias": True}, UnsupportedModelError, "mlp_bias"),
        ("llama", {"hidden_size": "big"}, ModelFileError, "hidden_size: expected an integer"),
        ("llama", {"num_hidden_layers": 4}, ModelFileError, "layers.3"),
        ("llama", {"num_hidden_layers": 2}, UnsupportedModelError, "layers.2"),
        ("llama", {"intermediate_size": 128}, ModelFileError, r"shape \[128, 64\], found \[96, 64"),
        ("llama", {"vocab_size": 512}, ModelFileError, "model.embed_tokens.weight: expected shape"),
        ("llama", {"num_key_value_heads": 3}, ModelFileError, "num_key_value_heads"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
         UnsupportedModelError, "rope_type"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}},
         UnsupportedModelError, "quantization_config"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32},
         UnsupportedModelError, "sliding_window"),
        ("qwen2moe", {"norm_topk_prob": True}, UnsupportedModelError, "norm_topk_prob"),
        ("qwen3moe", {"norm_topk_prob": False}, UnsupportedModelError, "norm_topk_prob"),
        ("qwen3moe", {"num_experts": 7}, ModelFileError, "gate.weight: expected shape"),
        ("olmoe", {"norm_topk_prob": True}, UnsupportedModelError, "norm_topk_prob"),
        ("olmoe", {"clip_qkv": 8.0}, UnsupportedModelError, "clip_qkv"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, UnsupportedModelError, "softcapping"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(
    tmp_path: Path,
    variant: str,
    values: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    folder = hf_models.copied(hf_models.saved(variant)[0], tmp_path / "folder")
    hf_models.edit(folder / "config.json", **values)
    assert re.search(message, hf_models.refused(folder, tmp_path / "out.gguf", kind))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [None, "Q4_0"])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
    ],
)
def test_weights_that_are_not_finite(
    tmp_path: Path,
    name: str,
    kind: str | None,
    bad: float,
) -> None:
    folder = hf_models.copied(hf_models.saved("mixtral")[0], tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    weights[name].reshape(-1)[-1] = bad
    save_file(weights, folder / "model.safetensors")
    message = hf_models.refused(folder, tmp_path / "out.gguf", ModelFileError, type=kind)
    assert f"tensor {name}:" in message
    assert str(bad) in message


def test_folders_without_a_model(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert "no such folder" in hf_models.refused(tmp_path / "nowhere", out, ModelFileError)
    folder = hf_models.copied(hf_models.saved("llama")[0], tmp_path / "folder")
    (folder / "tokenizer.json").rename(folder / "other.json")
    assert "tokenizer.model, found none" in hf_models.refused(folder, out, ModelFileError)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert hf_models.refused(folder, out, ModelFileError).endswith(
        "expected *.safetensors, found pytorch_model.bin"
    )
    (folder / "config.json").write_text("{")
    assert "expected JSON" in hf_models.refused(folder, out, ModelFileError)
    with pytest.raises(OptionError, match="type"):
        hf_to_gguf.convert(folder, out, type="Q9_9")


def test_type_that_the_width_does_not_allow(tmp_path: Path) -> None:
    """Rows of 64 and 96 have no 256-weight blocks: the mix falls back and notes it."""
    folder = hf_models.saved("llama")[0]
    made = hf_to_gguf.convert(folder, tmp_path / "k.gguf", type="Q4_K_M")
    assert any("Q4_K" in note for note in made.notes)
    message = hf_models.refused(
        folder,
        tmp_path / "out.gguf",
        OptionError,
        type="Q8_0",
        overrides=[("blk.*.ffn_down", "Q4_K")],
    )
    assert "expected rows of a multiple of 256" in message


# Interruptions.

PROGRAM = """
import sys, time
from stoker.export import hf_to_gguf
from stoker.export.hf import weights as hf_weights
from stoker.export.writer import model_writer
hf_weights.piece_rows = lambda cols: 16
model_writer.COMMIT_BYTES = 20_000
def progress(what, done, total):
    print(done, flush=True)
    time.sleep(0.005)
hf_to_gguf.convert(sys.argv[1], sys.argv[2], type=sys.argv[3], progress=progress)
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_restarted_gives_the_same_bytes(tmp_path: Path, stop: signal.Signals) -> None:
    folder = hf_models.saved("mixtral")[0]
    whole = hf_to_gguf.convert(folder, tmp_path / "whole.gguf", type="Q8_0").path.read_bytes()
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-c", PROGRAM, str(folder), str(out), "Q8_0"]
    firsts = []
    for wait in (len(whole) // 3, len(whole) // 2):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as child:
            assert child.stdout is not None
            firsts.append(int(child.stdout.readline()))
            for line in child.stdout:
                if int(line) > wait:
                    break
            child.send_signal(stop)
            child.wait(60)
        assert child.returncode != 0
        assert not out.exists()
        assert hf_to_gguf.resumable_part(out) is not None
    assert firsts[1] > firsts[0], "the second run began again"
    seen: list[int] = []
    hf_to_gguf.convert(
        folder, out, type="Q8_0", progress=lambda _what, done, _total: seen.append(done)
    )
    assert seen[0] > len(whole) // 4
    assert out.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


def test_a_changed_shard_starts_again(tmp_path: Path) -> None:
    folder = hf_models.copied(hf_models.saved("mixtral")[0], tmp_path / "folder")
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-c", PROGRAM, str(folder), str(out), "Q8_0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) > 100_000:
                break
        child.kill()
        child.wait(60)
    assert hf_to_gguf.resumable_part(out) is not None
    later = time.time_ns() + 10**9
    os.utime(folder / "model.safetensors", ns=(later, later))
    seen: list[int] = []
    hf_to_gguf.convert(
        folder, out, type="Q8_0", progress=lambda _what, done, _total: seen.append(done)
    )
    assert seen[0] < 100_000


LIMITED = """
import resource, signal, sys
from stoker.export.writer import gguf_writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
if sys.argv.pop(1) == "late":  # a file system that cannot allocate ahead: it fills up on the way
    gguf_writer.PartFile._allocate = lambda self: None
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from stoker.runtime.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, when: str) -> None:
    pytest.importorskip("resource", reason="needs file size limits (POSIX)")
    folder, out = hf_models.saved("mixtral")[0], tmp_path / "out.gguf"
    command = [sys.executable, "-c", LIMITED, "400000", when, "export", "gguf", folder, out]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    assert re.search("no space left in|a lower limit on the size of files", done.stderr)
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_existing_files_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(OptionError, match="--force"):
        hf_to_gguf.convert(hf_models.saved("llama")[0], out)
    assert out.read_bytes() == b"precious"
    hf_to_gguf.convert(hf_models.saved("llama")[0], out, force=True)
    assert out.read_bytes()[:4] == b"GGUF"


# The command.


def test_command(tmp_path: Path) -> None:
    folder = hf_models.saved("llama")[0]
    out = tmp_path / "m.gguf"
    command = [
        sys.executable,
        "-m",
        "stoker.runtime.cli.main",
        "export",
        "gguf",
        str(folder),
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    assert out.is_file()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "--force" in done.stderr
    assert "Traceback" not in done.stderr
