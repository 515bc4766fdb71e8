"""Mixtures made from dense models compute what their base computes, and appear whole."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from stoker.export import upcycle as upcycling
from stoker.export.mixture.kmeans import spherical_kmeans, unit
from stoker.export.mixture.routers import random_router
from stoker.export.upcycle import resumable_part, upcycle
from stoker.export.writer import gguf_writer
from stoker.export.writer.gguf_writer import PartFile, Tensor
from stoker.runtime import _core
from stoker.runtime.base.errors import (
    DeviceError,
    ModelFileError,
    OptionError,
    StokerError,
    UnsupportedModelError,
)
from tiny_models import make, some_tokens

TEXT = "the cat sat on the mat and the dog ran in the fog; " * 60


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("base") / "base.gguf", "llama", tied=True)


def logits(path: Path, n: int = 40) -> np.ndarray[Any, Any]:
    engine = _core.Engine(_core.GgufFile(str(path)), threads=1, kv_type="f32", precision="high")
    return engine.sequence().eval_all(some_tokens(n))


def small(base: Path, out: Path, **options: Any) -> Path:
    """Makes a mixture quickly: 4 experts, 2 used, F32, no noise, unless told otherwise."""
    chosen: dict[str, Any] = {
        "experts": 4,
        "used": 2,
        "type": "F32",
        "noise": 0.0,
        "text": TEXT,
        "threads": 2,
    }
    return upcycle(base, out, **(chosen | options)).path


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(str(path)).tensors}


# Results.


def test_without_noise_the_mixture_computes_its_base(base: Path, tmp_path: Path) -> None:
    out = small(base, tmp_path / "out.gguf")
    np.testing.assert_allclose(logits(out), logits(base), atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_qwen2moe_computes_its_base(family: str, tmp_path: Path) -> None:
    dense = make(tmp_path / "dense.gguf", family)
    # With all experts used, softmax's weights sum to 1 although the family does not renormalise.
    out = small(dense, tmp_path / "out.gguf", architecture="qwen2moe", used=4)
    assert _core.GgufFile(str(out)).get("general.architecture") == "qwen2moe"
    np.testing.assert_allclose(logits(out), logits(dense), atol=2e-2)


def test_the_shared_expert_does_part_of_the_work(base: Path, tmp_path: Path) -> None:
    out = small(base, tmp_path / "out.gguf", architecture="qwen2moe", used=4)
    found = tensors(out)
    before = logits(out)
    offset = found["blk.1.ffn_down_shexp.weight"].data_offset
    with out.open("r+b") as file:
        file.seek(int(offset))
        file.write(bytes(int(found["blk.1.ffn_down_shexp.weight"].n_bytes)))
    assert np.abs(logits(out) - before).max() > 0.05


def test_partial_rotation_is_unpermuted(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense.gguf", "llama", rope_dim=8)
    out = small(dense, tmp_path / "out.gguf", architecture="qwen2moe", used=4)
    np.testing.assert_allclose(logits(out), logits(dense), atol=2e-2)


def test_noise_and_quantization_stay_near_the_base(base: Path, tmp_path: Path) -> None:
    out = small(base, tmp_path / "out.gguf", type="Q8_0", noise=0.01)
    ours, dense = logits(out), logits(base)
    assert 1e-4 < np.abs(ours - dense).max() < 0.5
    assert (ours.argmax(1) == dense.argmax(1)).mean() > 0.9


def test_every_expert_is_the_dense_matrix_in_another_order(base: Path, tmp_path: Path) -> None:
    out, dense = tensors(small(base, tmp_path / "out.gguf")), tensors(base)
    gates = np.array(out["blk.2.ffn_gate_exps.weight"].data)
    ups = np.array(out["blk.2.ffn_up_exps.weight"].data)
    downs = np.array(out["blk.2.ffn_down_exps.weight"].data)
    gate = np.array(dense["blk.2.ffn_gate.weight"].data)
    seen = set()
    for e in range(4):
        order = [int(np.flatnonzero((gate == row).all(1))[0]) for row in gates[e]]
        assert sorted(order) == list(range(len(gate)))
        seen.add(tuple(order))
        np.testing.assert_array_equal(ups[e], np.array(dense["blk.2.ffn_up.weight"].data)[order])
        np.testing.assert_array_equal(
            downs[e], np.array(dense["blk.2.ffn_down.weight"].data)[:, order]
        )
    assert len(seen) == 4


def test_noise_has_the_stated_size_and_differs_between_experts() -> None:
    x = np.ones((64, 512), dtype=np.float32)
    order = np.tile(np.arange(64, dtype=np.int32), (3, 1))
    make_them = lambda threads: _core.make_experts(  # noqa: E731
        "F32",
        x,
        axis="rows",
        order=order,
        seeds=np.array([1, 2, 3], dtype=np.uint64),
        noise=0.02,
        threads=threads,
    ).view(np.float32)
    noisy = make_them(1)
    np.testing.assert_array_equal(noisy, make_them(3))
    assert noisy.shape == (3, 64, 512)
    assert abs(noisy.std() - 0.02) < 2e-4 and abs(noisy.mean() - 1) < 5e-4
    assert abs(np.corrcoef(noisy.reshape(3, -1))[0, 1]) < 0.02
    assert len(np.unique(noisy)) > 1000


def test_make_experts_refuses_what_is_no_permutation() -> None:
    x = np.zeros((2, 32), dtype=np.float32)
    seeds = np.zeros(1, dtype=np.uint64)
    for rows in ([0, 0], [0, 2], [-1, 0]):
        order = np.array([rows], dtype=np.int32)
        with pytest.raises(OptionError, match="order: expected permutations"):
            _core.make_experts("F32", x, axis="rows", order=order, seeds=seeds, noise=0.0)
    good = np.array([[1, 0]], dtype=np.int32)
    with pytest.raises(OptionError, match="axis"):
        _core.make_experts("F32", x, axis="both", order=good, seeds=seeds, noise=0.0)
    with pytest.raises(OptionError, match="multiple of the block"):
        _core.make_experts("Q4_K", x, axis="rows", order=good, seeds=seeds, noise=0.0)


def test_quantizing_on_threads_gives_the_same_bytes() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 256)).astype(np.float32)
    weight = rng.random((7, 256)).astype(np.float32)
    for kind in ("Q4_0", "Q4_K", "F16"):
        for importance in (None, weight):
            one = _core.quantize(kind, x, importance=importance)
            for threads in (2, 3, 64):
                many = _core.quantize(kind, x, importance=importance, threads=threads)
                np.testing.assert_array_equal(many, one)


# Tensors and metadata of the base.


def test_other_tensors_and_metadata_are_copied(base: Path, tmp_path: Path) -> None:
    out = small(base, tmp_path / "out.gguf", type="Q4_0")
    mine, dense = gguf.GGUFReader(str(out)), gguf.GGUFReader(str(base))
    theirs = {t.name: t for t in dense.tensors}
    copied = [t for t in mine.tensors if "_exps" not in t.name and "ffn_gate_inp" not in t.name]
    assert len(copied) == len(theirs) - 3 * 3
    for t in copied:
        assert t.tensor_type == theirs[t.name].tensor_type
        np.testing.assert_array_equal(t.data, theirs[t.name].data)
    changed = {"general.architecture", "general.name", "general.file_type"}
    for key, field in dense.fields.items():
        if key.startswith("GGUF.") or key in changed:
            continue
        assert mine.fields[key].contents() == field.contents()
        assert mine.fields[key].types == field.types
    assert mine.fields["llama.expert_count"].contents() == 4
    assert mine.fields["llama.expert_used_count"].contents() == 2
    router = next(t for t in mine.tensors if t.name == "blk.0.ffn_gate_inp.weight")
    assert router.tensor_type.name == "F32" and tuple(router.shape) == (64, 4)
    experts = next(t for t in mine.tensors if t.name == "blk.0.ffn_down_exps.weight")
    assert experts.tensor_type.name == "Q4_0" and tuple(experts.shape) == (96, 64, 4)


def test_the_writer_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": gguf_writer.string("x"),
        "general.alignment": gguf_writer.u32(64),
        "a.number": gguf_writer.u32(7),
        "a.text": gguf_writer.string("naïve"),
    }
    rows = [Tensor("one", (3, 5), 0, 60), Tensor("two", (4,), 0, 16)]
    plan = gguf_writer.layout(metadata, rows)
    one = np.arange(15, dtype=np.float32)
    data = bytearray(plan.size)
    data[: len(plan.header)] = plan.header
    data[plan.offsets["one"] : plan.offsets["one"] + 60] = one.tobytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    reader = gguf.GGUFReader(str(path))
    assert reader.fields["a.number"].contents() == 7
    assert reader.fields["a.text"].contents() == "naïve"
    assert [t.name for t in reader.tensors] == ["one", "two"]
    np.testing.assert_array_equal(reader.tensors[0].data, one.reshape(5, 3))
    assert plan.offsets["two"] % 64 == 0 and plan.size % 64 == 0
    assert gguf_writer.read_metadata(path) == metadata


# The routers.


def test_spherical_kmeans_finds_separate_directions() -> None:
    rng = np.random.default_rng(0)
    directions = unit(rng.standard_normal((6, 32)).astype(np.float32))
    labels = rng.integers(6, size=400)
    x = unit(directions[labels] + 0.05 * rng.standard_normal((400, 32)).astype(np.float32))
    centroids = spherical_kmeans(x, 6, 1)
    assert (directions @ centroids.T).max(1).min() > 0.99
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)


def test_spherical_kmeans_of_few_different_rows_has_no_empty_cluster() -> None:
    x = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    centroids = spherical_kmeans(x, 5, 0)
    assert centroids.shape == (5, 3) and np.isfinite(centroids).all()
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)


def test_random_router_uses_experts_alike() -> None:
    rng = np.random.default_rng(3)
    spread = np.linspace(0.1, 4.0, 48, dtype=np.float32)
    states = (5 + spread * rng.standard_normal((4000, 48))).astype(np.float32)
    router = random_router(states, 16, 2, 0)
    chosen = np.argsort(-(states @ router.T), axis=1)[:, :2]
    use = np.bincount(chosen.ravel(), minlength=16) / chosen.size
    assert use.min() > 0.4 / 16 and use.max() < 2.0 / 16


def test_used_experts_carry_nearly_all_weight(base: Path, tmp_path: Path) -> None:
    out = small(base, tmp_path / "out.gguf", experts=16, used=2)
    file = _core.GgufFile(str(base))
    taps = _core.Engine(file, threads=1).sequence().eval_taps(some_tokens(64))
    router = np.array(tensors(out)["blk.1.ffn_gate_inp.weight"].data)
    z = taps[1] @ router.T
    p = np.exp(z - z.max(1, keepdims=True))
    top = np.sort(p, axis=1)[:, -2:].sum(1) / p.sum(1)
    assert top.mean() > 0.8


def test_taps_are_the_inputs_of_the_feed_forward(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense.gguf", "llama", n_layer=2)
    sequence = _core.Engine(_core.GgufFile(str(dense)), threads=1).sequence()
    tokens = some_tokens(20)
    taps = sequence.eval_taps(tokens)
    assert taps.shape == (2, 20, 64) and sequence.position == 20
    weight = np.array(tensors(dense)["blk.0.ffn_norm.weight"].data)
    # An RMS norm leaves rows of unit mean square before its weight.
    np.testing.assert_allclose(((taps[0] / weight) ** 2).mean(1), 1, rtol=1e-3)
    sequence.truncate(0)
    one_by_one = np.concatenate([sequence.eval_taps([t]) for t in tokens], axis=1)
    np.testing.assert_array_equal(one_by_one, taps)


def test_the_base_writes_the_text_by_default(base: Path, tmp_path: Path) -> None:
    stages = []
    a = small(base, tmp_path / "a.gguf", text=None, progress=lambda what, *_: stages.append(what))
    b = small(base, tmp_path / "b.gguf", text=None)
    assert a.read_bytes() == b.read_bytes()
    assert list(dict.fromkeys(stages)) == ["writing text", "hidden states", "routers", "experts"]
    c = small(base, tmp_path / "c.gguf", text=None, seed=1)
    assert c.read_bytes() != a.read_bytes()


# Whole or not at all.


class Stop(Exception):
    pass


def stop_at(what: str, count: int) -> Any:
    left = [count]

    def progress(stage: str, _done: int, _total: int | None) -> None:
        left[0] -= stage == what
        if left[0] == 0:
            raise Stop

    return progress


@pytest.mark.parametrize(("stage", "count"), [("experts", 1), ("experts", 5), ("experts", 9)])
def test_an_interrupted_export_resumes_to_the_same_bytes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, count: int
) -> None:
    monkeypatch.setattr(upcycling, "_COMMIT_BYTES", 1)
    whole = small(base, tmp_path / "whole.gguf", noise=0.01)
    out = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        small(base, out, noise=0.01, progress=stop_at(stage, count))
    assert not out.exists()
    part = resumable_part(out)
    assert part is not None and part.stat().st_size == whole.stat().st_size
    stages: list[str] = []
    small(base, out, noise=0.01, progress=lambda what, *_: stages.append(what))
    assert set(stages) <= {"experts"} and len(stages) == 9 - count
    assert out.read_bytes() == whole.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_interrupted_before_anything_is_written_leaves_nothing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        small(base, tmp_path / "out.gguf", progress=stop_at("routers", 1))
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_another_recipe_is_not_taken_up(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upcycling, "_COMMIT_BYTES", 1)
    out = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        small(base, out, noise=0.01, progress=stop_at("experts", 4))
    small(base, out, noise=0.02)
    assert out.read_bytes() == small(base, tmp_path / "b.gguf", noise=0.02).read_bytes()


def test_a_damaged_journal_starts_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upcycling, "_COMMIT_BYTES", 1)
    out = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        small(base, out, progress=stop_at("experts", 4))
    (tmp_path / ".out.gguf.part.json").write_text("{")
    small(base, out)
    np.testing.assert_allclose(logits(out), logits(base), atol=2e-4)


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"no space left in .* MB needed for x, .* MB free"):
        PartFile(tmp_path / "x", 1 << 60, "recipe")
    assert list(tmp_path.iterdir()) == []


def test_control_c_leaves_a_part_and_says_so(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    slow = (
        "import sys, time\n"
        "from stoker.export import upcycle\n"
        "from stoker.runtime.cli.main import main\n"
        "upcycle._COMMIT_BYTES = 1\n"
        "make = upcycle._Upcycling._experts\n"
        "left = [4]\n"
        "def slowly(self, batch):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: time.sleep(600)\n"
        "    return make(self, batch)\n"
        "upcycle._Upcycling._experts = slowly\n"
        "sys.exit(main())\n"
    )
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--experts", "4", "--used", "2", "--type", "F32", "--text", str(text)]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "export", "upcycle", str(base), str(out), *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    journal = tmp_path / ".out.gguf.part.json"
    while process.poll() is None and not (
        journal.exists() and json.loads(journal.read_text())["done"] >= 3
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted: the same command goes on from here" in errors
    assert not out.exists()
    # The same command, without the delay.
    done = command(base, out, *options)
    assert done.returncode == 0, done.stderr
    whole = small(base, tmp_path / "whole.gguf", noise=0.01)
    assert out.read_bytes() == whole.read_bytes()


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "experts: expected 2 to 65536, found 1"),
        ({"experts": 4, "used": 5}, r"used: expected 1 to 4 \(the experts\), found 5"),
        ({"used": 0}, "used: expected 1 to 4"),
        ({"type": "Q9_9"}, "type: expected one of F32"),
        ({"router": "best"}, "router: expected kmeans or random, found best"),
        ({"noise": 0.7}, "noise: expected 0 to 0.5, found 0.7"),
        ({"noise": float("nan")}, "noise: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"architecture": "olmoe"}, "architecture: expected llama or qwen2moe"),
        ({"text": "hi", "experts": 64}, "text: expected at least 64 tokens"),
        ({"type": "Q4_K"}, "type Q4_K: expected rows of a multiple of 256 weights, found 64"),
    ],
)
def test_bad_options_are_refused(
    base: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(StokerError, match=message):
        small(base, tmp_path / "out.gguf", **options)
    assert not (tmp_path / "out.gguf").exists()
    assert list(tmp_path.iterdir()) == []


def test_bases_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    mixture = make(tmp_path / "mixture.gguf", "llama-moe")
    with pytest.raises(UnsupportedModelError, match="expected a dense model, found a mixture of 8"):
        small(mixture, out)
    with pytest.raises(UnsupportedModelError, match="expected llama or qwen2, found gemma3"):
        small(make(tmp_path / "gemma.gguf", "gemma3"), out)
    factors = make(tmp_path / "factors.gguf", "llama", rope_freqs=True)
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs.weight: expected none"):
        small(factors, out, architecture="qwen2moe")
    with pytest.raises(ModelFileError):
        small(tmp_path / "absent.gguf", out)
    with pytest.raises(OptionError, match="no such directory"):
        small(factors, tmp_path / "nowhere" / "out.gguf")


def test_an_existing_file_is_replaced_only_with_force(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(OptionError, match="exists: choose another name, or replace it with"):
        small(base, out)
    assert out.read_bytes() == b"precious"
    small(base, out, force=True)
    assert out.read_bytes()[:4] == b"GGUF"
    with pytest.raises(OptionError, match="expected another file than what it is made from"):
        small(base, base, force=True)


def test_two_processes_do_not_make_the_same_file(base: Path, tmp_path: Path) -> None:
    from stoker.models.cache import locked

    out = tmp_path / "out.gguf"
    with (
        locked(tmp_path / ".out.gguf.lock"),
        pytest.raises(OptionError, match="another process is making this file"),
    ):
        small(base, out)
    small(base, out)


# The command.


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "stoker.runtime.cli.main",
            "export",
            "upcycle",
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_the_command(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    done = command(base, out, "-e", "4", "-k", "2", "--arch", "qwen2moe", "--text", text)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # there is no progress without a terminal
    assert done.stdout.startswith(f"{out}: ") and "4 experts of" in done.stdout
    assert struct.unpack("<4sI", out.read_bytes()[:8]) == (b"GGUF", 3)


def test_command_errors_exit_with_2(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    for arguments in (
        (base, out),
        (base, out, "-e", "4", "-k", "5"),
        (tmp_path / "absent.gguf", out, "-e", "4", "-k", "2"),
        (base, out, "-e", "4", "-k", "2", "--text", tmp_path / "absent.txt"),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("stoker: error: ") and done.stderr.count("\n") == 1
    assert not out.exists()
    assert "stoker export upcycle smollm2" in command("--help").stdout
