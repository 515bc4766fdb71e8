"""Importance matrices: measurement, both file forms, and their effect on quantizers."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offload_models import budgets
from offload_models import engine as offloaded
from oracle import Oracle
from stoker.export.imatrix import collect
from stoker.export.quantize import quantize
from stoker.export.writer import gguf_writer
from stoker.export.writer.imatrix_file import Entry, Imatrix
from stoker.runtime import _core
from stoker.runtime.base.errors import ModelFileError, OptionError, StokerError
from tiny_models import WIDE, make, some_tokens

TEXT = "the cat sat on the mat and the dog ran in the fog; " * 40

Floats = npt.NDArray[np.float32]


class Listener(Oracle):
    """An oracle that records the squared inputs of every matrix."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sums: dict[str, npt.NDArray[np.float64]] = {}
        self.counts: dict[str, npt.NDArray[np.float64]] = {}

    def _linear(
        self,
        x: Any,
        name: str,
        bias: str = "",
        expert: int | None = None,
        positions: Any = None,
    ) -> npt.NDArray[Any]:
        shape = self.w.shape(name)
        experts = shape[0] if expert is not None else 1
        self.sums.setdefault(name, np.zeros((experts, shape[-1])))[expert or 0] += (x**2).sum(0)
        self.counts.setdefault(name, np.zeros(experts))[expert or 0] += len(x)
        return super()._linear(x, name, bias, expert, positions)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("base") / "base.gguf", "llama", tied=True)


@pytest.fixture(scope="module")
def measured(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Imatrix]:
    out = tmp_path_factory.mktemp("measured") / "base.imatrix.gguf"
    found, _ = collect(base, out, TEXT, chunk=64, threads=2)
    return out, found


# Measurement.


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gemma3", "llama-moe", "qwen2moe", "qwen3moe", "smallthinker"]
)
def test_sums_are_those_of_the_oracle(family: str, tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf", family, seed=1)
    tokens = some_tokens(48, seed=3)
    listener = Listener(path)
    expected_nll = listener.logits(tokens)
    engine = _core.Engine(_core.GgufFile(str(path)), threads=2, kv_type="f32", precision="high")
    sums = _core.ActivationSums(engine)
    nll = sums.eval(engine.sequence(), tokens)
    logp = expected_nll - np.log(np.exp(expected_nll).sum(1, keepdims=True))
    np.testing.assert_allclose(nll, -logp[np.arange(47), tokens[1:]], atol=1e-3)
    found = sums.tensors
    seen = {name for name, (_, counts) in found.items() if counts.any()}
    tied = "output.weight" not in found
    assert seen == set(listener.sums) and ("token_embd.weight" in seen) == tied
    for name in seen:
        squares, counts = found[name]
        np.testing.assert_array_equal(counts, listener.counts[name], err_msg=name)
        np.testing.assert_allclose(squares, listener.sums[name], rtol=2e-3, atol=1e-5, err_msg=name)


def test_sums_add_up_and_do_not_depend_on_threads(tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf", "qwen3moe")
    found = []
    for threads in (1, 2, 3):
        engine = _core.Engine(_core.GgufFile(str(path)), threads=threads, precision="high")
        sums = _core.ActivationSums(engine)
        sequence = engine.sequence()
        for seed in (0, 1):
            sequence.truncate(0)
            sums.eval(sequence, some_tokens(40, seed))
        sequence.eval(some_tokens(9))  # this evaluation does not count
        found.append(sums.tensors)
    for name, (squares, counts) in found[0].items():
        for other in found[1:]:
            np.testing.assert_array_equal(other[name][0], squares)
            np.testing.assert_array_equal(other[name][1], counts)
    router, experts = found[0]["blk.0.ffn_gate_inp.weight"], found[0]["blk.0.ffn_up_exps.weight"]
    assert router[1].tolist() == [80] and experts[1].sum() == 80 * 2
    # Each of the router's inputs goes to two experts.
    np.testing.assert_allclose(experts[0].sum(0), 2 * router[0][0], rtol=1e-5)


def test_sums_of_an_offloaded_model_are_the_same(tmp_path: Path) -> None:
    """Sums go by an expert's tensor, not by its slot; predictors' guesses do not count."""
    path = make(tmp_path / "m.gguf", "qwen3moe")
    found = []
    for memory in (0, budgets(path).part(0.3)):
        e = offloaded(path, memory, precision="high")
        sums = _core.ActivationSums(e)
        sequence = e.sequence()
        sums.eval(sequence, some_tokens(40))
        for seed in (1, 2):
            sequence.truncate(0)
            sums.eval(sequence, some_tokens(2, seed))
        found.append(sums.tensors)
    assert found[0].keys() == found[1].keys()
    for name, (squares, counts) in found[0].items():
        np.testing.assert_array_equal(found[1][name][0], squares, err_msg=name)
        np.testing.assert_array_equal(found[1][name][1], counts, err_msg=name)


def test_sums_want_their_own_engine(base: Path) -> None:
    file = _core.GgufFile(str(base))
    one, two = _core.Engine(file, threads=1), _core.Engine(file, threads=1)
    with pytest.raises(OptionError, match="the sums of this session's model, found another's"):
        _core.ActivationSums(one).eval(two.sequence(), some_tokens(4))


def test_a_collected_file(base: Path, measured: tuple[Path, Imatrix]) -> None:
    path, found = measured
    assert found.chunk_size == 64 and found.chunks > 4 and found.datasets == ["text"]
    assert found.entries["blk.2.ffn_down.weight"].sums.shape == (1, 96)
    assert {e.counts[0] for e in found.entries.values()} == {64 * found.chunks}
    reader = gguf.GGUFReader(str(path))
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["text"]
    assert reader.fields["imatrix.chunk_count"].contents() == found.chunks
    assert reader.fields["imatrix.chunk_size"].contents() == 64
    rows = {t.name: t for t in reader.tensors}
    assert len(rows) == 2 * len(found.entries)
    for name, entry in found.entries.items():
        sums, counts = rows[name + ".in_sum2"], rows[name + ".counts"]
        assert tuple(sums.shape) == (entry.sums.shape[1], 1) and tuple(counts.shape) == (1, 1)
        np.testing.assert_array_equal(sums.data, entry.sums)
        np.testing.assert_array_equal(counts.data.reshape(-1), entry.counts)
    # Queries, keys and values have the same input; the feed-forward's gate and up, too.
    attn = [found.entries[f"blk.1.attn_{part}.weight"].sums for part in "qkv"]
    np.testing.assert_array_equal(attn[0], attn[1])
    np.testing.assert_array_equal(attn[0], attn[2])


def test_threads_and_calls_give_the_same_file(base: Path, tmp_path: Path) -> None:
    done: list[tuple[str, int, int | None]] = []
    found = [
        collect(
            base,
            tmp_path / f"{threads}.gguf",
            TEXT,
            chunk=50,
            max_chunks=3,
            threads=threads,
            progress=lambda *row: done.append(row),
        )
        for threads in (1, 2)
    ]
    assert found[0][1] == found[1][1]
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()
    assert done[:3] == [("text", 1, 3), ("text", 2, 3), ("text", 3, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 1}, "chunk: expected at least 2 tokens, found 1"),
        ({"max_chunks": 0}, "chunks: expected at least 1, found 0"),
        ({"text": ""}, "text: expected at least 2 tokens"),
    ],
)
def test_bad_options_are_refused(
    base: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        collect(base, tmp_path / "out.gguf", **({"text": TEXT, "chunk": 64} | options))
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_not_replaced_unasked(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(OptionError, match="exists"):
        collect(base, out, TEXT, max_chunks=1)
    assert out.read_bytes() == b"precious"
    collect(base, out, TEXT, max_chunks=1, chunk=32, force=True)
    assert Imatrix.read(out).chunks == 1


# Files.


def some_entries(rng: np.random.Generator) -> dict[str, Entry]:
    dense = rng.random((1, 64)).astype(np.float32) * 100
    experts = rng.random((4, 32)).astype(np.float32)
    experts[2] = 0
    counts = np.array([5, 9, 0, 2], np.float32)
    return {
        "blk.0.ffn_up.weight": Entry(dense, np.array([640], np.float32)),
        "blk.0.ffn_up_exps.weight": Entry(experts, counts),
    }


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    matrix = Imatrix(some_entries(np.random.default_rng(0)), ["a b", "naïve"], 7, 512)
    matrix.write(tmp_path / "m.gguf")
    found = Imatrix.read(tmp_path / "m.gguf")
    assert found.digest == matrix.digest
    assert (found.datasets, found.chunks, found.chunk_size) == (["a b", "naïve"], 7, 512)
    with pytest.raises(OptionError, match="exists"):
        matrix.write(tmp_path / "m.gguf")


def legacy(entries: dict[str, Entry], calls: int, dataset: str | None = "wiki.txt") -> bytes:
    """Writes the .dat form: means times calls."""
    data = struct.pack("<i", len(entries))
    for name, entry in entries.items():
        means = entry.sums / np.maximum(entry.counts, 1)[:, None]
        text = name.encode()
        data += struct.pack("<i", len(text)) + text + struct.pack("<ii", calls, means.size)
        data += (means * calls).astype("<f4").tobytes()
    if dataset is not None:
        data += struct.pack("<ii", 30, len(dataset)) + dataset.encode()
    return data


def test_the_older_form_gives_the_same_importances(tmp_path: Path) -> None:
    entries = some_entries(np.random.default_rng(1))
    entries["blk.0.ffn_up_exps.weight"].counts[2] = 1  # the older form cannot express 0
    matrix = Imatrix(entries)
    path = tmp_path / "m.dat"
    for dataset in ("wiki.txt", None):
        path.write_bytes(legacy(entries, 30, dataset))
        found = Imatrix.read(path)
        assert found.datasets == ([dataset] if dataset else [])
        for name, shape in (
            ("blk.0.ffn_up.weight", (64, 128)),
            ("blk.0.ffn_up_exps.weight", (32, 16, 4)),
        ):
            mine, theirs = found.of(name, shape), matrix.of(name, shape)
            assert mine is not None and theirs is not None and mine.shape == theirs.shape
            np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_an_expert_without_tokens_gets_the_others_mean() -> None:
    matrix = Imatrix(some_entries(np.random.default_rng(2)))
    found = matrix.of("blk.0.ffn_up_exps.weight", (32, 16, 4))
    assert found is not None and found.shape == (4, 32)
    np.testing.assert_allclose(found[2], found[[0, 1, 3]].mean(0), rtol=1e-6)
    entry = matrix.entries["blk.0.ffn_up_exps.weight"]
    np.testing.assert_allclose(found[1], entry.sums[1] / 9, rtol=1e-6)
    assert matrix.of("blk.1.ffn_up.weight", (64, 128)) is None
    empty = Imatrix({"x": Entry(np.zeros((1, 8), np.float32), np.zeros(1, np.float32))})
    assert empty.of("x", (8, 8)) is None


def test_importances_of_another_shape_are_an_error() -> None:
    matrix = Imatrix(some_entries(np.random.default_rng(3)), path="m.gguf")
    for name, shape in (
        ("blk.0.ffn_up.weight", (32, 128)),
        ("blk.0.ffn_up_exps.weight", (32, 16, 8)),
    ):
        with pytest.raises(ModelFileError, match=r"m.gguf: tensor .*: expected importances of"):
            matrix.of(name, shape)


def test_files_that_are_something_else_are_refused(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(ModelFileError, match=r"m\.gguf: No such file"):
        Imatrix.read(path)
    with pytest.raises(ModelFileError, match=r"general.type: expected imatrix, found None"):
        Imatrix.read(base)
    for data in (b"", b"hello, world, this is no matrix", bytes(400)):
        path.write_bytes(data)
        with pytest.raises(ModelFileError, match="expected an importance matrix, found other data"):
            Imatrix.read(path)
    for value in (float("nan"), float("inf"), -1.0):
        entries = some_entries(np.random.default_rng(4))
        entries["blk.0.ffn_up.weight"].sums[0, 9] = value
        Imatrix(entries).write(path, force=True)
        with pytest.raises(ModelFileError, match=r"ffn_up.weight: expected finite importances"):
            Imatrix.read(path)

    def written(*tensors: tuple[str, npt.NDArray[Any]]) -> None:
        writer = gguf.GGUFWriter(path, "x")
        writer.add_type("imatrix")
        for name, data in tensors:
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    sums, counts = np.ones((2, 32), np.float32), np.ones((2, 1), np.float32)
    written(("a.in_sum2", sums))
    with pytest.raises(ModelFileError, match=r"expected 2 values of a.counts"):
        Imatrix.read(path)
    written(("a.in_sum2", sums), ("a.counts", counts[:1]))
    with pytest.raises(ModelFileError, match=r"expected 2 values of a.counts"):
        Imatrix.read(path)
    written(("a.in_sum2", sums.astype(np.float16)), ("a.counts", counts))
    with pytest.raises(ModelFileError, match=r"a.in_sum2: expected type F32, found F16"):
        Imatrix.read(path)
    written(("b", sums))
    with pytest.raises(ModelFileError, match=r"expected tensors named \*.in_sum2, found none"):
        Imatrix.read(path)


@given(st.binary(max_size=200), st.integers(0, 700))
def test_no_bytes_crash_the_reader(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.dat"
    whole = legacy(some_entries(np.random.default_rng(5)), 3)
    for data in (noise, whole[:cut], whole[:cut] + noise):
        path.write_bytes(data)
        try:
            found = Imatrix.read(path)
        except StokerError:
            continue
        assert all((e.sums >= 0).all() for e in found.entries.values())


# Effect on quantizers.


@pytest.mark.parametrize("form", [f["name"] for f in _core.formats() if f["block"] > 1])
def test_every_quantizer_heeds_importances(form: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 512)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal(512)).astype(np.float32)

    def error(data: npt.NDArray[np.uint8]) -> float:
        back = _core.dequantize(form, data.reshape(-1), x.size).reshape(x.shape)
        return float((importance * (back - x) ** 2).sum())

    raw = x.view(np.uint8)
    plain = error(_core.requantize("F32", raw, 64, 512, form))
    weighed = error(_core.requantize("F32", raw, 64, 512, form, importance))
    ones = error(_core.requantize("F32", raw, 64, 512, form, np.full(512, 3, np.float32)))
    # 8 bits leave nothing to choose: llama.cpp's own rule does not use importances, either.
    assert weighed < plain * (0.97 if form not in ("Q8_0", "MXFP4") else 1 + 1e-9)
    assert ones < 1.15 * plain


def test_zero_importances_are_no_trouble() -> None:
    x = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    for form in (f["name"] for f in _core.formats()):
        data = _core.requantize("F32", x.view(np.uint8), 4, 256, form, np.zeros(256, np.float32))
        back = _core.dequantize(form, data.reshape(-1), x.size).reshape(x.shape)
        assert np.abs(back - x).max() < 2.5, form


def test_a_file_made_with_importances(base: Path, measured: tuple[Path, Imatrix]) -> None:
    path, found = measured
    plain = quantize(base, path.parent / "plain.gguf", type="Q4_1")
    made = quantize(base, path.parent / "weighed.gguf", type="Q4_1", imatrix=path)
    assert made.notes == plain.notes and not any("importances" in note for note in made.notes)
    reader = gguf.GGUFReader(str(made.path))
    fields = reader.fields
    assert fields["quantize.imatrix.file"].contents() == path.name
    assert fields["quantize.imatrix.dataset"].contents() == "text"
    assert fields["quantize.imatrix.entries_count"].contents() == len(found.entries)
    assert fields["quantize.imatrix.chunks_count"].contents() == found.chunks
    source = {t.name: np.array(t.data, np.float32) for t in gguf.GGUFReader(str(base)).tensors}
    both = {t.name: t for t in gguf.GGUFReader(str(plain.path)).tensors}
    better = []
    for t in reader.tensors:
        weights = found.of(t.name, t.shape) if t.tensor_type.name != "F32" else None
        if weights is None:
            continue
        data = np.asarray(t.data)
        expected = _core.quantize(
            t.tensor_type.name,
            source[t.name],
            importance=np.ascontiguousarray(np.broadcast_to(weights, source[t.name].shape)),
        )
        np.testing.assert_array_equal(data.reshape(-1), expected.reshape(-1))
        errors = [
            (weights * (gguf.quants.dequantize(u.data, u.tensor_type) - source[t.name]) ** 2).sum()
            for u in (t, both[t.name])
        ]
        better.append(errors[0] / errors[1])
    assert len(better) == 3 * 7 + 1 and np.mean(better) < 0.95 and max(better) < 1.02


def test_each_expert_has_importances_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stoker.export.writer import model_writer

    base = make(tmp_path / "base.gguf", "qwen3moe", quant="F16", **{**WIDE, "n_expert": 5})
    path = tmp_path / "imatrix.gguf"
    found, _ = collect(base, path, TEXT, chunk=32, max_chunks=2)
    monkeypatch.setattr(model_writer, "PIECE_VALUES", 256 * 100)  # does not divide an expert
    made = quantize(base, tmp_path / "out.gguf", type="Q3_K_M", imatrix=path, threads=2)
    source = {t.name: t for t in gguf.GGUFReader(str(base)).tensors}
    for t in gguf.GGUFReader(str(made.path)).tensors:
        if not t.name.endswith("_exps.weight"):
            continue
        weights = found.of(t.name, t.shape)
        assert weights is not None and weights.shape == (5, 256)
        for e in range(5):
            x = np.array(source[t.name].data[e], np.float32)
            expected = _core.quantize(
                t.tensor_type.name,
                x,
                importance=np.ascontiguousarray(np.broadcast_to(weights[e], x.shape)),
            )
            np.testing.assert_array_equal(
                np.asarray(t.data[e]).reshape(-1), expected.reshape(-1), err_msg=t.name
            )


def test_tensors_without_importances_are_noted(base: Path, tmp_path: Path) -> None:
    entries = {"blk.0.attn_q.weight": Entry(np.ones((1, 64), np.float32), np.ones(1, np.float32))}
    Imatrix(entries).write(tmp_path / "few.gguf")
    made = quantize(base, tmp_path / "out.gguf", type="Q4_0", imatrix=tmp_path / "few.gguf")
    assert any(note.startswith("20 tensors have no importances (blk.") for note in made.notes)
    wrong = {"blk.0.attn_q.weight": Entry(np.ones((1, 32), np.float32), np.ones(1, np.float32))}
    Imatrix(wrong).write(tmp_path / "wrong.gguf")
    with pytest.raises(ModelFileError, match=r"wrong.gguf: tensor blk.0.attn_q.weight: expected"):
        quantize(base, tmp_path / "no.gguf", type="Q4_0", imatrix=tmp_path / "wrong.gguf")
    assert not list(tmp_path.glob("*no.gguf*"))


def test_other_importances_start_a_part_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stoker.export.writer import model_writer

    monkeypatch.setattr(model_writer, "COMMIT_BYTES", 1)
    rng = np.random.default_rng(0)
    shapes = {t.name: t.shape for t in _core.GgufFile(str(base)).tensors if len(t.shape) > 1}
    for name in ("a", "b"):
        one = np.ones(1, np.float32)
        entries = {
            n: Entry(rng.random((1, s[0])).astype(np.float32), one) for n, s in shapes.items()
        }
        Imatrix(entries).write(tmp_path / name)

    class Stop(Exception):
        pass

    left = [9]

    def stop(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise Stop

    out = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        quantize(base, out, type="Q4_0", imatrix=tmp_path / "a", progress=stop)
    (tmp_path / "a").write_bytes((tmp_path / "b").read_bytes())  # the same name, other values
    quantize(base, out, type="Q4_0", imatrix=tmp_path / "a")
    (tmp_path / "fresh").mkdir()
    fresh = quantize(base, tmp_path / "fresh" / "out.gguf", type="Q4_0", imatrix=tmp_path / "a")
    assert out.read_bytes() == fresh.path.read_bytes()


# The command.


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stoker.runtime.cli.main", "export", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_commands(base: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "m.imatrix.gguf"
    text.write_text(TEXT)
    done = command("imatrix", base, out, "--text", text, "--chunk", "64", "--chunks", "2")
    assert done.returncode == 0, done.stderr
    assert "2 chunks of 64 tokens, perplexity " in done.stdout and done.stderr == ""
    made = tmp_path / "q.gguf"
    done = command("quantize", base, made, "--type", "Q4_0", "--imatrix", out)
    assert done.returncode == 0, done.stderr
    assert (
        gguf_writer.string("text.txt")
        == gguf_writer.read_metadata(made)["quantize.imatrix.dataset"]
    )
    for arguments in (
        ("imatrix", base, out, "--text", text),  # exists already
        ("imatrix", base, tmp_path / "x", "--text", tmp_path / "absent"),
        ("imatrix", tmp_path / "absent.gguf", tmp_path / "x", "--text", text),
        ("imatrix", base, tmp_path / "x", "--text", text, "--chunk", "1"),
        ("quantize", base, tmp_path / "x", "--type", "Q4_0", "--imatrix", text),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("stoker: error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
