"""The tensor types that file types choose: llama.cpp's mixtures, fallbacks, overrides."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from make_mixes_golden import MODELS, summary
from stoker.export import quantize
from stoker.export.quantize import model_sizes
from stoker.export.writer import mixes
from stoker.runtime import _core
from stoker.runtime.base.errors import OptionError
from tiny_models import WIDE, make, some_tokens

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_mixes.json").read_text())
FLOATS = ("F32", "F16", "BF16")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model in F16, whose rows are whole K-quant blocks."""
    return make(tmp_path_factory.mktemp("base") / "base.gguf", "llama", quant="F16", **WIDE)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture") / "mixture.gguf"
    return make(path, "qwen3moe", **{**WIDE, "n_expert": 5})


def types(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(path)).tensors}


@pytest.mark.parametrize("model", MODELS)
def test_every_mixture_is_llama_cpps(model: str, tmp_path: Path) -> None:
    family, sizes = MODELS[model]
    file = _core.GgufFile(str(make(tmp_path / "f16.gguf", family, quant="F16", **sizes)))
    different = {}
    dense = "_exps" not in " ".join(t.name for t in file.tensors)
    for name, expected in GOLDEN["models"][model].items():
        kind, _, imatrix = name.partition("+")
        if kind == "MXFP4" and dense:  # llama.cpp makes a Q8_0 file of a dense model; ours is MXFP4
            continue
        choice = mixes.choose(kind, file.tensors, model_sizes(file), imatrix=bool(imatrix))
        found = summary({t.name: choice.types.get(t.name, t.type) for t in file.tensors})
        if found != expected:
            different[name] = (found, expected)
    assert not different


def test_the_record_covers_every_type_but_the_floats() -> None:
    for model, found in GOLDEN["models"].items():
        assert {name for name in found if "+" not in name} == set(mixes.FILE_TYPES) - set(FLOATS), (
            model
        )


def test_float_types_take_every_matrix(mixture: Path, tmp_path: Path) -> None:
    for name in FLOATS:
        out = tmp_path / f"{name}.gguf"
        quantize.quantize(mixture, out, type=name)
        found = types(out)
        assert {t for n, t in found.items() if n.endswith(("_norm.weight", "gate_inp.weight"))} == {
            "F32"
        }
        matrices = [n for n in found if not n.endswith(("_norm.weight", "gate_inp.weight"))]
        assert {found[n] for n in matrices} == {name}


def test_rows_that_blocks_do_not_divide_fall_back_with_a_note(tmp_path: Path) -> None:
    narrow = make(tmp_path / "narrow.gguf", "llama", n_ff=100)  # rows of 64 and of 100
    made = quantize.quantize(narrow, tmp_path / "out.gguf", type="Q4_K_M")
    found = types(made.path)
    assert found["blk.0.attn_q.weight"] == "Q5_0" and found["blk.0.ffn_down.weight"] == "F16"
    assert any("take Q5_0 instead of Q4_K, whose blocks of 256 weights" in n for n in made.notes)
    assert any("take F16 instead of Q" in n for n in made.notes)
    engine = _core.Engine(_core.GgufFile(str(made.path)), threads=1)
    assert np.isfinite(engine.sequence().eval_all(some_tokens(8))).all()


def test_overrides_decide_after_the_mixture_the_last_one_last(base: Path, tmp_path: Path) -> None:
    plain = quantize.quantize(base, tmp_path / "plain.gguf", type="Q4_0")
    patterns = ["blk.*.ffn_down=Q6_K", "blk.1.ffn_*=Q8_0", "blk.0.attn_q.weight=F16"]
    overrides = [mixes.parse_override(text) for text in patterns]
    made = quantize.quantize(base, tmp_path / "out.gguf", type="Q4_0", overrides=overrides)
    expected = types(plain.path) | {
        "blk.0.ffn_down.weight": "Q6_K",
        "blk.1.ffn_down.weight": "Q8_0",
        "blk.1.ffn_gate.weight": "Q8_0",
        "blk.1.ffn_up.weight": "Q8_0",
        "blk.0.attn_q.weight": "F16",
    }
    assert types(made.path) == expected  # the norm, which ffn_* also matches, stays
    assert made.types["Q8_0"] == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("blk.*.ffn_down", "Q9_K")], "override: expected a type of .*, found Q9_K"),
        ([("blk.9.*", "Q4_0")], r"blk.9.\*=Q4_0: expected a pattern that some matrix matches"),
        ([("*_norm", "Q4_0")], "expected a pattern that some matrix matches, found none"),
        (
            [("*.attn_output", "Q4_K")],
            "tensor blk.0.attn_output.weight: expected rows of a multiple of 256 weights, found 64",
        ),
    ],
)
def test_overrides_that_cannot_be_are_refused(
    tmp_path: Path, overrides: list[tuple[str, str]], message: str
) -> None:
    narrow = make(tmp_path / "narrow.gguf", "llama")
    with pytest.raises(OptionError, match=message):
        quantize.quantize(narrow, tmp_path / "out.gguf", type="Q8_0", overrides=overrides)
    assert [p.name for p in tmp_path.iterdir()] == ["narrow.gguf"]


@pytest.mark.parametrize("text", ["", "Q4_0", "=Q4_0", "blk.*=", "blk.*=Q4"])
def test_an_override_is_a_pattern_and_a_type(text: str) -> None:
    with pytest.raises(OptionError, match="override: expected"):
        mixes.parse_override(text)
