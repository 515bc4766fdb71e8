"""Refactored dense models: equal if all channels are used, with experts known early."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import stoker
from offload_models import CONTEXT, Model, run
from oracle import Oracle
from stoker.export import refactor as refactoring
from stoker.export.mixture.channel_fit import ChannelFit
from stoker.export.mixture.channel_split import choose
from stoker.export.mixture.dense_base import DenseBase
from stoker.export.mixture.llama_layers import LlamaLayers
from stoker.export.mixture.token_router import agreement, train
from stoker.export.refactor import refactor
from stoker.runtime import _core
from stoker.runtime.base.errors import (
    ModelFileError,
    OptionError,
    StokerError,
    UnsupportedModelError,
)
from stoker.runtime.cli.main import app
from tiny_models import WIDE, make, some_tokens
from typer.testing import CliRunner

WORDS = ("the cat sat on the mat", "a dog ran in fog", "one two three", "x = y + z;", "Paris")
F32_BOUND = 5e-4  # largest error of a logit


def text(n: int = 400, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=n))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("base") / "base.gguf", "llama", n_layer=4, tied=True)


@pytest.fixture(scope="module")
def made(base: Path) -> Path:
    """Makes six experts, two used, not all channels of a token; fitted."""
    return small(base, base.with_name("made.gguf"), experts=6, used=2, width=24).path


def small(base: Path, out: Path, **options: Any) -> refactoring.Refactored:
    """Makes 4 experts of 16 of 96 channels, 32 shared, unless told otherwise; fitted to all."""
    chosen: dict[str, Any] = {
        "experts": 4,
        "used": 1,
        "shared": 32,
        "width": 16,
        "text": [text()],
        "minutes": 5,  # enough for all of the text
        "threads": 2,
    }
    return refactor(base, out, **(chosen | options))


def engine(path: Path, **options: Any) -> _core.Engine:
    options = {"threads": 1, "kv_type": "f32", "precision": "high", **options}
    return _core.Engine(_core.GgufFile(str(path)), **options)


def logits(path: Path, n: int = 60) -> np.ndarray[Any, Any]:
    return engine(path).sequence().eval_all(some_tokens(n))


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(str(path)).tensors}


# Results.


@pytest.mark.parametrize("shared", [0, 32, 64])
def test_with_all_channels_it_computes_its_base(base: Path, tmp_path: Path, shared: int) -> None:
    width = (96 - shared) // 4
    found = small(
        base, tmp_path / "out.gguf", used=4, shared=shared, width=width, minutes=0, experts=4
    )
    np.testing.assert_allclose(logits(found.path), logits(base), atol=2e-4)
    assert found.split.perplexity == pytest.approx(found.dense.perplexity, rel=1e-4)
    assert found.distilled is None and found.tokens == 0


def test_fitting_keeps_what_needs_no_fitting(base: Path, tmp_path: Path) -> None:
    # All channels are used, so the dense model's down projections are already the best.
    found = small(base, tmp_path / "out.gguf", used=4)
    np.testing.assert_allclose(logits(found.path), logits(base), atol=2e-2)


@pytest.mark.parametrize(
    "options",
    [{}, {"used": 2}, {"shared": 0, "width": 24}, {"experts": 1}, {"width": 32, "experts": 7}],
)
def test_logits_equal_the_oracle(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    path = small(base, tmp_path / "out.gguf", minutes=0, **options).path
    oracle = Oracle(path, context=CONTEXT)
    tokens = some_tokens(100)
    expected = oracle.logits(tokens)
    sure = oracle.routes[0].margin > 1e-3
    assert sure.mean() > 0.95 and len(oracle.routes) == 1
    # A token with a small router margin may change those after it a little.
    until = len(tokens) if sure.all() else int(np.argmin(sure))
    assert until > 10
    actual = engine(path).sequence().eval_all(tokens)
    assert np.abs(actual - expected)[:until].max() < F32_BOUND


def test_fitted_logits_equal_the_oracle(made: Path) -> None:
    oracle = Oracle(made, context=CONTEXT)
    tokens = some_tokens(24, seed=3)
    expected = oracle.logits(tokens)
    assert oracle.routes[0].margin.min() > 1e-4, "a router hesitates: choose another seed"
    assert np.abs(engine(made).sequence().eval_all(tokens) - expected).max() < F32_BOUND


def test_prompts_in_pieces_give_the_same_bits(made: Path) -> None:
    e = engine(made)
    assert run(e, pieces=5) == run(e)


def test_fitting_brings_it_nearer_to_its_base(base: Path, tmp_path: Path) -> None:
    tokenizer = stoker.load(base, threads=1).tokenizer
    tokens = np.array(tokenizer.encode(text(seed=1))[:200], dtype=np.int32)

    def away(path: Path) -> float:
        mine, dense = (engine(p).sequence().eval_all(tokens) for p in (path, base))
        return float(np.square(mine - dense).mean())

    split = away(small(base, tmp_path / "split.gguf", minutes=0).path)
    assert away(small(base, tmp_path / "fitted.gguf").path) < 0.9 * split


# On flash.


@pytest.mark.parametrize("io", ["pread_pool", "null:delay=0..0.3ms,reorder,seed=1"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_offloaded_equals_resident(made: Path, share: float, io: str) -> None:
    model = Model(made)
    e = model.offloaded(share, threads=2, io=io)
    for pieces in (1, 3):
        assert run(e, pieces=pieces) == model.expected()
    assert run(e, seed=1) == model.expected(1)
    if share == 1.0:
        assert e.offload["evictions"] == 0


@pytest.mark.parametrize("options", [{"predictor": "none"}, {"prefetch": "off"}])
def test_demand_only_reads_nothing_ahead(made: Path, options: dict[str, Any]) -> None:
    model = Model(made)
    e = model.offloaded(0.4, **options)
    assert run(e) == model.expected()
    assert e.offload["prefetches"] == 0 and e.offload["misses"] > 0


def test_every_expert_of_a_token_is_announced(base: Path, tmp_path: Path) -> None:
    # There are many experts, so that the cache has room for a token's and not for all.
    path = small(base, tmp_path / "out.gguf", experts=24, width=24, used=2, minutes=0).path
    model = Model(path)
    for share in (0.5, 0.7, 1.0):
        e = model.offloaded(share, io="null:delay=0.05ms")
        sequence = e.sequence()
        for token in some_tokens(150):
            sequence.eval([int(token)])
        counts = e.offload
        assert counts["decode_misses"] == 0, share
        assert counts["prefetches_used"] == counts["prefetches"] > 0, share
        assert counts["late"] + counts["hits"] == 150 * 3 * 2, share


# Contents of the file.


def test_channels_have_one_place_where_they_fit(base: Path, tmp_path: Path) -> None:
    found = tensors(small(base, tmp_path / "out.gguf", minutes=0).path)
    dense = tensors(base)
    for layer in (1, 2, 3):
        rows = {}
        for part in ("gate", "up", "down"):
            shared = np.array(found[f"blk.{layer}.ffn_{part}_shexp.weight"].data)
            experts = np.array(found[f"blk.{layer}.ffn_{part}_exps.weight"].data)
            if part == "down":
                shared, experts = shared.T, experts.transpose(0, 2, 1)
            rows[part] = np.concatenate([shared, *experts])
        gate = np.array(dense[f"blk.{layer}.ffn_gate.weight"].data)
        order = [int(np.flatnonzero((gate == row).all(axis=1))[0]) for row in rows["gate"]]
        assert sorted(order) == list(range(96))
        np.testing.assert_array_equal(
            rows["up"], np.array(dense[f"blk.{layer}.ffn_up.weight"].data)[order]
        )
        np.testing.assert_array_equal(
            rows["down"], np.array(dense[f"blk.{layer}.ffn_down.weight"].data).T[order]
        )
    for name in ("blk.0.ffn_gate.weight", "token_embd.weight", "blk.2.attn_q.weight"):
        np.testing.assert_array_equal(found[name].data, dense[name].data)


def test_quantized_rows_are_copied(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense.gguf", "llama", quant="Q8_0")
    path = small(dense, tmp_path / "out.gguf", shared=32, width=32, used=1).path
    found, before = tensors(path), tensors(dense)
    rows = np.array(found["blk.1.ffn_gate_exps.weight"].data).reshape(-1, 68)
    source = {row.tobytes() for row in np.array(before["blk.1.ffn_gate.weight"].data)}
    assert all(row.tobytes() in source for row in rows)
    kinds = {t.tensor_type.name for n, t in found.items() if "ffn" in n and "norm" not in n}
    assert kinds == {"Q8_0"}
    other = tensors(small(dense, tmp_path / "other.gguf", shared=32, width=32, type="Q4_0").path)
    kinds = {
        t.tensor_type.name for n, t in other.items() if n.startswith("blk.1.ffn_") and "p" in n
    }
    assert "Q4_0" in kinds and other["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


def test_k_quants_are_split_by_their_blocks(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense.gguf", "llama", quant="Q4_K", **(WIDE | {"n_ff": 1024}))
    with pytest.raises(OptionError, match=r"width: .* in steps of 256 .*, found 128"):
        small(dense, tmp_path / "out.gguf", shared=256, width=128)
    path = small(dense, tmp_path / "out.gguf", experts=3, used=3, shared=256, width=256).path
    assert tensors(path)["blk.1.ffn_down_exps.weight"].tensor_type.name == "Q4_K"
    # The down matrices' columns are in other blocks, and are rounded once more.
    ours, theirs = logits(path), logits(dense)
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.8
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.98


def test_metadata_is_carried_over_under_the_new_name(base: Path, made: Path) -> None:
    mine, dense = _core.GgufFile(str(made)).metadata, _core.GgufFile(str(base)).metadata
    assert mine["general.architecture"] == "tokenrouted"
    assert not [k for k in mine if k.startswith("llama.")]
    for key, value in dense.items():
        if key not in ("general.architecture", "general.name"):
            assert mine[key.replace("llama.", "tokenrouted.")] == value
    assert mine["tokenrouted.expert_count"] == 6
    assert mine["tokenrouted.expert_used_count"] == 2
    assert mine["tokenrouted.expert_feed_forward_length"] == 24
    assert mine["tokenrouted.expert_shared_feed_forward_length"] == 32


def test_the_same_seed_gives_the_same_split(base: Path, tmp_path: Path) -> None:
    a, b = (small(base, tmp_path / f"{n}.gguf", minutes=0).path for n in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_the_base_writes_the_text_by_default(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refactoring, "_OWN_TOKENS", 1024)
    stages: list[str] = []
    small(base, tmp_path / "a.gguf", text=None, progress=lambda what, *_: stages.append(what))
    assert list(dict.fromkeys(stages)) == [
        "writing text",
        "perplexity",
        "router",
        "channels",
        "fitting",
    ]


# Parts.


def test_layers_in_numpy_equal_the_engine(tmp_path: Path) -> None:
    for i, options in enumerate(
        ({}, {"biases": True}, {"rope_freqs": True}, {"rope_scaling": "linear", "rope_factor": 4.0})
    ):
        path = make(tmp_path / f"{i}.gguf", "llama", **options)
        layers = LlamaLayers(DenseBase(_core.GgufFile(str(path)), None, "F32"))
        tokens = np.array(some_tokens(40), dtype=np.int64)
        taps = engine(path).sequence().eval_taps(tokens)
        x = layers.embeddings(tokens[None])
        for index in range(layers.dense.n_layer):
            layer = layers.layer(index)
            layer.attend(x)
            z = layer.normed(x)[0]
            np.testing.assert_allclose(z, taps[index], atol=1e-4)
            x[0] += layer.channels(z) @ layer.down


def test_common_channels_and_domains_are_found() -> None:
    importance = np.full((3, 40), 0.01)
    importance[:, :10] = 5.0  # common channels
    importance[0, 10:20] = importance[1, 20:30] = importance[2, 30:40] = 1.0
    importance[2] *= 100  # a domain of large activations
    split = choose(importance, 10, 10)
    assert split.shared.tolist() == list(range(10))
    assert [e.tolist() for e in split.experts] == [
        list(range(10 * i + 10, 10 * i + 20)) for i in range(3)
    ]
    # Experts that overlap: more places than channels.
    split = choose(importance, 10, 15)
    for i, expert in enumerate(split.experts):
        assert set(range(10 * i + 10, 10 * i + 20)) <= set(expert.tolist())
    assert split.of((0, 2)).tolist() == [*range(25), *range(40, 55)]


def test_the_router_learns_domains() -> None:
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((5, 32)).astype(np.float32)
    labels = rng.integers(5, size=1200)
    x = (3 * centres[labels] + rng.standard_normal((1200, 32))).astype(np.float32)
    router = train(x[:1000], labels[:1000], 5, hidden=16, eps=1e-5, seed=0)
    assert agreement(router, x[1000:], labels[1000:]) > 0.97
    again = train(x[:1000], labels[:1000], 5, hidden=16, eps=1e-5, seed=0)
    np.testing.assert_array_equal(router.up, again.up)


def test_the_fit_is_the_least_squares_solution() -> None:
    rng = np.random.default_rng(2)
    split = choose(rng.random((3, 12)), 3, 3)
    truth = rng.standard_normal((12, 4)).astype(np.float32)
    fit = ChannelFit(split, 4)
    # First no two experts meet, then two do, so both ways of solving are used.
    for experts in ((0,), (1,), (2,), (0, 2)):
        at = split.of(experts)
        h = rng.standard_normal((50, len(at))).astype(np.float32)
        fit.add(experts, h, h @ truth[at])
        if experts[0] == 2 or len(experts) > 1:
            found = fit.solve(np.zeros((12, 4), dtype=np.float32), 1e-9)
            np.testing.assert_allclose(found, truth, atol=1e-4)
    # The targets leave a residual for any rows: both ways find the same rows.
    apart, whole = ChannelFit(split, 4), ChannelFit(split, 4)
    for experts in ((0,), (2,)):
        h = rng.standard_normal((9, 6)).astype(np.float32)
        for f in (apart, whole):
            f.add(experts, h, h[:, :4] ** 2)
    whole.add((0, 1), np.zeros((1, 9), dtype=np.float32), np.zeros((1, 4), dtype=np.float32))
    zero = np.zeros((12, 4), dtype=np.float32)
    np.testing.assert_allclose(apart.solve(zero, 1e-3), whole.solve(zero, 1e-3), atol=1e-3)
    # With a strong prior the fit stays at its start.
    start = truth + 1
    np.testing.assert_allclose(fit.solve(start, 1e9), start, atol=1e-3)


# Refusals and leftovers.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "experts: expected 1 to 1024, found 0"),
        ({"used": 5}, r"used: expected 1 to 4 \(the experts\), found 5"),
        ({"shared": -1}, "shared: expected 0 to 96 channels, found -1"),
        ({"width": 0}, "width: expected 1 to 96 channels, found 0"),
        ({"shared": 90}, "shared and width: expected at most 96 channels together, found 106"),
        ({"type": "Q9"}, "type: expected one of .*, found Q9"),
        ({"type": "Q4_0"}, "width: expected 1 to 96 channels in steps of 32 .*found 16"),
        ({"type": "Q4_K"}, "type: Q4_K needs rows of a multiple of 256 weights, found 64"),
        ({"minutes": -1}, "minutes: expected 0 to 1440, found -1"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"text": ["  "]}, "text: expected some text, found none"),
        ({"text": ["a few words"]}, r"text: expected at least \d+ tokens in each text, found"),
    ],
)
def test_bad_options(base: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        small(base, tmp_path / "out.gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_other_models_are_refused(base: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    qwen = make(tmp_path / "qwen.gguf", "qwen2")
    with pytest.raises(UnsupportedModelError, match="expected llama, found qwen2"):
        small(qwen, out)
    mixture = make(tmp_path / "mixture.gguf", "llama-moe")
    with pytest.raises(UnsupportedModelError, match="expected a dense model, found a mixture"):
        small(mixture, out)
    with pytest.raises(UnsupportedModelError, match="expected llama, found tokenrouted"):
        small(made, out)
    yarn = make(tmp_path / "yarn.gguf", "llama", rope_scaling="yarn", rope_factor=4.0)
    with pytest.raises(UnsupportedModelError, match="expected none or linear, found yarn"):
        small(yarn, out)
    with pytest.raises(OptionError, match="exists: choose another name"):
        small(base, made)
    with pytest.raises(OptionError, match="expected another file than what it is made from"):
        small(base, base, force=True)
    assert not out.exists()


@pytest.mark.parametrize("name", ["blk.2.ffn_up.weight", "blk.3.ffn_down.weight", "token_embd"])
def test_weights_that_are_not_finite(base: Path, tmp_path: Path, name: str) -> None:
    broken = tmp_path / "broken.gguf"
    shutil.copy(base, broken)
    tensor = next(t for n, t in tensors(broken).items() if n.startswith(name))
    values = np.memmap(broken, np.float32, "r+", int(tensor.data_offset), int(tensor.n_elements))
    values[:] = np.nan
    values.flush()
    with pytest.raises(ModelFileError, match="not finite"):
        small(broken, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [broken]


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", ["perplexity", "router", "channels", "fitting"])
def test_an_interruption_leaves_nothing(base: Path, tmp_path: Path, stage: str) -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        if what == stage and done == total:
            raise Stop

    for minutes in (0, 5) if stage != "fitting" else (5,):
        with pytest.raises(Stop):
            small(base, tmp_path / "out.gguf", progress=progress, minutes=minutes)
        assert list(tmp_path.iterdir()) == []


def test_an_interruption_after_splitting_leaves_nothing(base: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def progress(what: str, done: int, total: int | None) -> None:
        seen.append(what)
        if what == "perplexity" and "channels" in seen:
            raise Stop

    with pytest.raises(Stop):
        small(base, tmp_path / "out.gguf", progress=progress, minutes=0)
    assert list(tmp_path.iterdir()) == []


def changed(path: Path, out: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    out.write_bytes(data.replace(old, new))
    return out


def number(key: str, value: int) -> bytes:
    """A u32 entry's bytes in a file."""
    return key.encode() + b"\x04\0\0\0" + value.to_bytes(4, "little")


@pytest.mark.parametrize(
    ("key", "value", "bad", "message"),
    [
        ("tokenrouted.router_length", 64, 0, "router_length: expected 1 to 96, found 0"),
        ("tokenrouted.router_length", 64, 97, "router_length: expected 1 to 96, found 97"),
        ("tokenrouted.router_length", 64, 63, "router_up.weight: expected shape"),
        ("tokenrouted.expert_used_count", 2, 7, "expert_used_count: expected 1 to 6, found 7"),
        ("tokenrouted.expert_feed_forward_length", 24, 25, "expected shape"),
        ("tokenrouted.expert_shared_feed_forward_length", 32, 0, "expected none of this name"),
        ("tokenrouted.block_count", 4, 1, "block_count: expected 2 to 4096, found 1"),
    ],
)
def test_files_that_contradict_themselves(
    made: Path, tmp_path: Path, *, key: str, value: int, bad: int, message: str
) -> None:
    path = changed(made, tmp_path / "bad.gguf", number(key, value), number(key, bad))
    for memory in (0, 1 << 30):
        with pytest.raises(StokerError, match=message):
            engine(path, memory=memory)


# The command.


def test_the_command_prints_a_table(base: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(text())
    arguments = ["export", "refactor", str(base), str(tmp_path / "out.gguf"), "-e", "4"]
    arguments += ["--shared", "32", "--width", "16", "-m", "5", "--text", str(corpus)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split() == ["perplexity", "change", "bytes", "a", "token"]
    assert [line.split("  ")[0] for line in lines[1:3]] == ["dense", "after splitting"]
    assert lines[3].startswith("after fitting to ")
    assert "32 shared channels, 4 experts of 16" in lines[4]
