"""Quantized files hold the quantizers' bytes, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
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
from stoker.export import quantize
from stoker.export.writer import gguf_writer, mixes, model_writer
from stoker.runtime import _core
from stoker.runtime.base.errors import (
    DeviceError,
    ModelFileError,
    OptionError,
    StokerError,
    UnsupportedModelError,
)
from tiny_models import WIDE, make, some_tokens

FLOATS = ("F32", "F16", "BF16")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model in F16, whose rows are whole K-quant blocks."""
    return make(tmp_path_factory.mktemp("base") / "base.gguf", "llama", quant="F16", **WIDE)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture") / "mixture.gguf"
    return make(path, "qwen3moe", **{**WIDE, "n_expert": 5})


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(str(path)).tensors}


def types(path: Path) -> dict[str, str]:
    return {name: t.tensor_type.name for name, t in tensors(path).items()}


def values(tensor: Any) -> npt.NDArray[np.float32]:
    """Values of a float tensor in numpy order."""
    return np.ascontiguousarray(tensor.data, dtype=np.float32)


def logits(path: Path, n: int = 24) -> npt.NDArray[np.float32]:
    engine = _core.Engine(_core.GgufFile(str(path)), threads=1, kv_type="f32", precision="high")
    return engine.sequence().eval_all(some_tokens(n))


# Contents of the file.


@pytest.mark.parametrize("name", [n for n in mixes.FILE_TYPES if n not in FLOATS])
def test_every_tensor_is_what_its_quantizer_makes(name: str, base: Path, tmp_path: Path) -> None:
    made = quantize.quantize(base, tmp_path / "out.gguf", type=name.lower(), threads=2)
    source, found = tensors(base), tensors(made.path)
    assert list(found) == list(source)
    for tensor, t in found.items():
        assert tuple(t.shape) == tuple(source[tensor].shape)
        kind = t.tensor_type.name
        if kind == "F32":
            np.testing.assert_array_equal(t.data, source[tensor].data)
            continue
        expected = _core.quantize(kind, values(source[tensor]))
        np.testing.assert_array_equal(np.asarray(t.data).reshape(-1), expected.reshape(-1))
    assert made.nbytes == made.path.stat().st_size
    assert made.types == {k: list(types(made.path).values()).count(k) for k in made.types}


def test_metadata_is_carried_over(base: Path, tmp_path: Path) -> None:
    made = quantize.quantize(base, tmp_path / "out.gguf", type="Q5_K_M")
    mine, theirs = gguf_writer.read_metadata(made.path), gguf_writer.read_metadata(base)
    changed = {
        "general.file_type": gguf_writer.u32(17),
        "general.quantization_version": gguf_writer.u32(2),
    }
    assert mine == theirs | changed


@pytest.mark.parametrize(("name", "distance"), [("F16", 0.01), ("Q8_0", 0.2), ("Q6_K", 0.6)])
def test_the_engine_runs_it_near_its_source(
    name: str, distance: float, base: Path, mixture: Path, tmp_path: Path
) -> None:
    for source in (base, mixture):
        made = quantize.quantize(source, tmp_path / f"{source.stem}.gguf", type=name)
        exact = logits(source)
        error = np.abs(logits(made.path) - exact)
        assert error.mean() < distance and exact.std() > 1
        assert (error.max() == 0) == (name == "F16" and source == base)


@pytest.mark.parametrize("name", ["Q4_K_M", "Q8_0", "IQ4_NL", "MXFP4"])
def test_experts_are_quantized_one_by_one(name: str, mixture: Path, tmp_path: Path) -> None:
    made = quantize.quantize(mixture, tmp_path / "out.gguf", type=name)
    source, found = tensors(mixture), tensors(made.path)
    for part in ("gate", "up", "down"):
        t = found[f"blk.1.ffn_{part}_exps.weight"]
        assert tuple(t.shape) == (256, 256, 5)
        for e in range(5):
            exact = values(source[t.name])[e]
            expected = _core.quantize(t.tensor_type.name, exact)
            np.testing.assert_array_equal(np.asarray(t.data[e]).reshape(-1), expected.reshape(-1))
    assert np.isfinite(logits(made.path)).all()


def test_shards_are_read_as_one(base: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(str(base))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=5)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.glob("m-*.gguf"))
    assert len(shards) == 5
    whole = quantize.quantize(base, tmp_path / "whole.gguf", type="Q4_K_M")
    made = quantize.quantize(shards[0], tmp_path / "out.gguf", type="Q4_K_M")
    assert not any(key.startswith("split.") for key in gguf_writer.read_metadata(made.path))
    mine, theirs = tensors(made.path), tensors(whole.path)
    assert mine.keys() == theirs.keys()
    for name, t in mine.items():
        np.testing.assert_array_equal(t.data, theirs[name].data)
    np.testing.assert_array_equal(logits(made.path), logits(whole.path))
    with pytest.raises(OptionError, match="expected another file than what it is made from"):
        quantize.quantize(shards[0], shards[3], type="Q8_0", force=True)
    shards[2].unlink()
    with pytest.raises(ModelFileError, match="m-00003-of-00005"):
        quantize.quantize(shards[0], tmp_path / "again.gguf", type="Q8_0")
    assert not list(tmp_path.glob("*again*"))


def test_quantizing_again_is_noted(base: Path, tmp_path: Path) -> None:
    first = quantize.quantize(base, tmp_path / "q8.gguf", type="Q8_0")
    assert not first.notes
    second = quantize.quantize(first.path, tmp_path / "q4.gguf", type="Q4_0")
    assert any("tensors were quantized already" in note for note in second.notes)
    same = quantize.quantize(first.path, tmp_path / "same.gguf", type="Q8_0")
    assert same.path.read_bytes() == first.path.read_bytes() and not same.notes
    floats = quantize.quantize(first.path, tmp_path / "f32.gguf", type="F32")
    assert not floats.notes
    np.testing.assert_allclose(logits(floats.path), logits(first.path), atol=0.05)


# The bytes do not depend on how the work is cut.


@pytest.mark.parametrize("name", ["Q4_K_M", "Q5_0", "IQ4_XS"])
def test_threads_and_pieces_do_not_change_the_bytes(
    name: str, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize.quantize(mixture, tmp_path / "1.gguf", type=name, threads=1)
    for threads, piece in ((2, 8 << 20), (5, 1000), (1, 70000), (3, 1)):
        monkeypatch.setattr(model_writer, "PIECE_VALUES", piece)
        out = tmp_path / f"{threads}-{piece}.gguf"
        if piece > 1:
            quantize.quantize(mixture, out, type=name, threads=threads)
        else:  # row by row: one matrix is enough
            data = values(tensors(mixture)["blk.0.ffn_up_exps.weight"])
            kind = types(whole.path)["blk.0.ffn_up_exps.weight"]
            whole_rows = _core.requantize("F32", data.view(np.uint8), 5 * 256, 256, kind, threads=3)
            for r in range(0, 5 * 256, 97):
                row = data.reshape(-1, 256)[r].view(np.uint8)
                np.testing.assert_array_equal(
                    _core.requantize("F32", row, 1, 256, kind)[0], whole_rows[r]
                )
            continue
        assert out.read_bytes() == whole.path.read_bytes()


# Memory.


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """240 MiB of F16 go through 1 MiB pieces, of which only a few are held at once."""
    rows_of = 15 << 13  # of 1024 weights
    tensor = gguf_writer.Tensor("blk.0.ffn_up.weight", (1024, rows_of), 1, rows_of * 2048)
    plan = gguf_writer.layout({"general.architecture": gguf_writer.string("llama")}, [tensor])
    source = tmp_path / "big.gguf"
    with source.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.size)
    script = (
        "import resource, sys\n"
        "from stoker.export import quantize\nfrom stoker.export.writer import model_writer\n"
        "from stoker.runtime import _core\n"
        "model_writer.PIECE_VALUES = 1 << 19\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "quantize.quantize(sys.argv[1], sys.argv[2], type='Q8_0', threads=2)\n"
        "print(peak() - before)\n"
    )
    out = tmp_path / "out.gguf"
    run = [sys.executable, "-c", script, str(source), str(out)]
    grown = int(subprocess.run(run, capture_output=True, check=True, timeout=300).stdout) * 1024
    assert out.stat().st_size > 120 << 20
    assert grown < 24 << 20


# Whole or not at all.


class Stop(Exception):
    pass


def stop_after(count: int) -> Any:
    left = [count]

    def progress(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    return progress


def test_interrupted_at_every_commit_it_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of calls take minutes
    monkeypatch.setattr(model_writer, "COMMIT_BYTES", 1)
    monkeypatch.setattr(model_writer, "PIECE_VALUES", 64 * 50)  # some end within an expert
    mixture = make(tmp_path / "mixture.gguf", "qwen3moe", n_layer=2, n_expert=3)
    done: list[int] = []
    whole = quantize.quantize(
        mixture,
        tmp_path / "whole.gguf",
        type="Q5_0",
        progress=lambda _, at, total: done.append(at),
    )
    expected = whole.path.read_bytes()
    assert len(done) > 40 and done == sorted(set(done))
    out = tmp_path / "out.gguf"
    for count in range(1, len(done)):
        with pytest.raises(Stop):
            quantize.quantize(mixture, out, type="Q5_0", progress=stop_after(count))
        assert not out.exists()
        part = quantize.resumable_part(out)
        assert part is not None and part.stat().st_size == len(expected)
        left: list[int] = []
        quantize.quantize(
            mixture, out, type="Q5_0", progress=lambda _, at, __, left=left: left.append(at)
        )
        assert left == done[count:]  # it went on, and did not start again
        assert out.read_bytes() == expected
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        out.unlink()


def test_interrupted_again_and_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(model_writer, "COMMIT_BYTES", 60_000)  # several pieces a commit
    monkeypatch.setattr(model_writer, "PIECE_VALUES", 256 * 100)
    whole = quantize.quantize(base, tmp_path / "whole.gguf", type="Q6_K")
    out = tmp_path / "out.gguf"
    for _ in range(100):
        try:
            quantize.quantize(base, out, type="Q6_K", progress=stop_after(9))
        except Stop:
            continue
        break
    assert out.read_bytes() == whole.path.read_bytes()


def test_a_changed_source_or_option_starts_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_writer, "COMMIT_BYTES", 1)
    source, out = tmp_path / "source.gguf", tmp_path / "out.gguf"
    source.write_bytes(base.read_bytes())

    def interrupted(**options: Any) -> None:
        with pytest.raises(Stop):
            quantize.quantize(source, out, progress=stop_after(8), **options)

    interrupted(type="Q4_0")
    quantize.quantize(source, out, type="Q8_0")
    assert (
        out.read_bytes()
        == quantize.quantize(base, tmp_path / "q8.gguf", type="Q8_0").path.read_bytes()
    )
    out.unlink()
    interrupted(type="Q4_0")
    first = tensors(source)["token_embd.weight"]
    with source.open("r+b") as file:  # other weights of the same shapes
        file.seek(int(first.data_offset))
        file.write(bytes(int(first.n_bytes)))
    os.utime(source, ns=(1, 1))
    quantize.quantize(source, out, type="Q4_0")
    found = tensors(out)["token_embd.weight"]
    assert not gguf.quants.dequantize(found.data, found.tensor_type).any()


SLOW = (
    "import os, sys, time\n"
    "from stoker.export.writer import model_writer\n"
    "from stoker.runtime.cli.main import main\n"
    "model_writer.COMMIT_BYTES = 1\n"
    "model_writer.PIECE_VALUES = 256 * 64\n"
    "view = model_writer._view\n"
    "def slowly(data):\n"
    "    time.sleep(0.002)\n"
    "    return view(data)\n"
    "model_writer._view = slowly\n"
    "sys.exit(main())\n"
)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_command_is_taken_up_again(
    sent: signal.Signals, status: int, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    arguments = ["export", "quantize", str(base), str(out), "--type", "Q5_K_S"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / ".out.gguf.part.json"
    try:
        while process.poll() is None and not journal.exists():
            time.sleep(0.005)
        time.sleep(0.03)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == status and not out.exists()
    assert (sent != signal.SIGINT) or "interrupted: the same command goes on from here" in errors
    assert json.loads(journal.read_text())["done"] > 0
    done = command(base, out, "--type", "Q5_K_S")
    assert done.returncode == 0, done.stderr
    whole = quantize.quantize(base, tmp_path / "whole.gguf", type="Q5_K_S")
    assert out.read_bytes() == whole.path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


# Refusals.


def damaged(base: Path, out: Path, tensor: str, index: int, value: float) -> Path:
    """A copy of a model with one weight changed."""
    t = tensors(base)[tensor]
    kind = np.dtype(np.float16 if t.tensor_type.name == "F16" else np.float32)
    data = bytearray(base.read_bytes())
    at = int(t.data_offset) + index * kind.itemsize
    data[at : at + kind.itemsize] = kind.type(value).tobytes()
    out.write_bytes(data)
    return out


@pytest.mark.parametrize(
    ("tensor", "index", "value", "where"),
    [
        ("blk.1.ffn_down.weight", 256 * 200 + 17, float("nan"), "row 200, column 17"),
        ("blk.0.attn_q.weight", 0, float("inf"), "row 0, column 0"),
        ("blk.1.attn_norm.weight", 3, float("-inf"), "row 0, column 3"),  # it is only copied
    ],
)
def test_weights_that_are_not_finite_are_named(  # noqa: PLR0917
    tensor: str,
    index: int,
    value: float,
    where: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_writer, "COMMIT_BYTES", 1)  # also a part on the disk goes away
    monkeypatch.setattr(model_writer, "PIECE_VALUES", 256 * 64)
    source = damaged(base, tmp_path / "bad.gguf", tensor, index, value)
    for threads in (1, 3):
        with pytest.raises(ModelFileError) as caught:
            quantize.quantize(source, tmp_path / "out.gguf", type="Q4_K_M", threads=threads)
        assert str(caught.value) == (
            f"{source}: tensor {tensor}: {where}: expected a finite value, found "
            f"{format(value, 'g').replace('-nan', 'nan')}"
        )
        assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q4_1", "Q5_K_M", "Q8_0", "Q2_K", "IQ4_XS"])
def test_weights_beyond_a_types_range_are_named(name: str, mixture: Path, tmp_path: Path) -> None:
    source = damaged(mixture, tmp_path / "bad.gguf", "blk.0.attn_q.weight", 300, 3e9)
    with pytest.raises(ModelFileError, match=r"attn_q.weight: row 1, column 44: expected a finite"):
        quantize.quantize(source, tmp_path / "out.gguf", type=name)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


def test_bad_outputs_are_refused(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(OptionError, match=r"type: expected one of F32, .*, found Q4_9"):
        quantize.quantize(base, out, type="Q4_9")
    with pytest.raises(OptionError, match="no such directory"):
        quantize.quantize(base, tmp_path / "nowhere" / "out.gguf", type="Q8_0")
    with pytest.raises(OptionError, match="expected the name of a file, found a directory"):
        quantize.quantize(base, tmp_path, type="Q8_0")
    with pytest.raises(ModelFileError):
        quantize.quantize(tmp_path / "absent.gguf", out, type="Q8_0")
    assert list(tmp_path.iterdir()) == []
    out.write_bytes(b"precious")
    with pytest.raises(OptionError, match="exists: choose another name, or replace it with"):
        quantize.quantize(base, out, type="Q8_0")
    assert out.read_bytes() == b"precious"
    link = tmp_path / "link.gguf"
    link.hardlink_to(base)
    before = base.read_bytes()
    with pytest.raises(OptionError, match="expected another file than what it is made from"):
        quantize.quantize(base, link, type="Q8_0", force=True)
    assert base.read_bytes() == before
    quantize.quantize(base, out, type="Q8_0", force=True)
    assert out.read_bytes()[:4] == b"GGUF"


def test_tensor_types_that_are_not_known_are_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((4, 64), np.float32))
    writer.add_tensor("ids", np.arange(8, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises((UnsupportedModelError, ModelFileError), match="tensor ids: "):
        quantize.quantize(path, tmp_path / "out.gguf", type="Q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["odd.gguf"]


def test_a_full_disk_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_writer, "COMMIT_BYTES", 1)
    write = gguf_writer.PartFile.write
    left = [12]

    class Full:
        """A file whose disk is full."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(self: Any, offset: int, data: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            self._file = Full(self._file)
        write(self, offset, data)

    monkeypatch.setattr(gguf_writer.PartFile, "write", full)
    with pytest.raises(DeviceError, match=r"no space left in .* MB needed for out.gguf"):
        quantize.quantize(base, tmp_path / "out.gguf", type="Q8_0")
    assert left[0] <= 0 and list(tmp_path.iterdir()) == []


def test_a_limit_on_file_sizes_is_one_clear_line(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    limited = (
        "import resource, sys\n"
        "from stoker.runtime.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "sys.exit(main())\n"
    )
    out = tmp_path / "out.gguf"
    done = subprocess.run(
        [sys.executable, "-c", limited, "export", "quantize", base, out, "--type", "Q8_0"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("stoker: error: no space left in ")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_source_that_shrinks_is_an_error(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    source.write_bytes(base.read_bytes())

    def progress(*_: Any) -> None:
        os.truncate(source, 4096)

    with pytest.raises(ModelFileError, match=r"source.gguf: tensor .*: expected \d+ bytes at"):
        quantize.quantize(source, tmp_path / "out.gguf", type="Q4_0", progress=progress)
    assert [p.name for p in tmp_path.iterdir()] == ["source.gguf"]


def test_two_processes_do_not_make_the_same_file(base: Path, tmp_path: Path) -> None:
    from stoker.models.cache import locked

    out = tmp_path / "out.gguf"
    with (
        locked(tmp_path / ".out.gguf.lock"),
        pytest.raises(OptionError, match="another process is making this file"),
    ):
        quantize.quantize(base, out, type="Q4_0")
    quantize.quantize(base, out, type="Q4_0")


def test_a_source_of_pieces_must_keep_its_word(tmp_path: Path) -> None:
    tensor = gguf_writer.Tensor("t", (8,), 0, 32)
    for given, message in ((bytes(40), "32 bytes, got more"), (bytes(30), "32 bytes, got 2 fewer")):
        with pytest.raises(ValueError, match=message):
            model_writer.write_model(
                tmp_path / "x.gguf", {}, [tensor], lambda *_, g=given: iter([g]), recipe=""
            )
        assert list(tmp_path.iterdir()) == []


# The command.


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "stoker.runtime.cli.main",
            "export",
            "quantize",
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_command(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = command(base, out, "--type", "q4_k_m", "--override", "blk.*.ffn_down=Q8_0", "-t", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # there is no progress without a terminal
    assert done.stdout.startswith(f"{out}: ") and "tensors: " in done.stdout
    assert types(out)["blk.0.ffn_down.weight"] == "Q8_0"
    again = command(out, tmp_path / "again.gguf", "--type", "Q4_0")
    assert again.returncode == 0 and again.stderr.startswith("note: ")


def test_command_errors_exit_with_2(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    bad = damaged(base, tmp_path / "bad.gguf", "blk.0.attn_k.weight", 5, float("nan"))
    for arguments in (
        (base, out),
        (base, out, "--type", "Q17"),
        (base, out, "--type", "Q4_0", "--override", "nothing"),
        (base, out, "--type", "Q4_0", "--override", "nothing=Q4_0"),
        (base, out, "--type", "Q4_0", "--imatrix", tmp_path / "absent.gguf"),
        (bad, out, "--type", "Q4_0"),
        (tmp_path / "absent.gguf", out, "--type", "Q4_0"),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("stoker: error: ") and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]
    assert "--override 'blk.*.ffn_down=Q6_K'" in command("--help").stdout


def test_all_errors_are_stokers(base: Path, tmp_path: Path) -> None:
    """A header cut off anywhere gives an error of stoker's, and no output."""
    data = base.read_bytes()
    source = tmp_path / "cut.gguf"
    for n in range(0, 4000, 171):
        source.write_bytes(data[:n])
        with pytest.raises(StokerError):
            quantize.quantize(source, tmp_path / "out.gguf", type="Q4_0")
    assert [p.name for p in tmp_path.iterdir()] == ["cut.gguf"]
