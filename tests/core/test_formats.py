"""Weight formats against the reference implementation of the `gguf` package.

Reading equals it bit for bit; writing gives the same bytes where the package writes, and a bounded
error elsewhere; every instruction set multiplies with the same bits as the scalar reference.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stoker.runtime import _core
from stoker.runtime.base.errors import OptionError

FORMATS = {row["name"]: row for row in _core.formats()}
INTEGER = [name for name in FORMATS if name not in {"F32", "F16", "BF16"}]
# The types that the gguf package writes; the other integer formats are searched for (search.h).
SAME_BYTES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]
SEARCHED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
# Relative rms error of llama.cpp's quantizers (libggml 0.25.3) on sample("normal"), without and
# with sample("importance"); measured with ggml_quantize_chunk.
LLAMA_RMS = {
    "Q2_K": (0.2961, 0.2213),
    "Q3_K": (0.1515, 0.1302),
    "Q4_K": (0.0715, 0.0626),
    "Q5_K": (0.0363, 0.0321),
    "Q6_K": (0.0178, 0.0157),
    "IQ4_NL": (0.0765, 0.0685),
    "IQ4_XS": (0.0770, 0.0693),
    "Q4_0": (0.0862, 0.0761),
    "Q4_1": (0.0782, 0.0615),
    "Q5_0": (0.0428, 0.0375),
    "Q5_1": (0.0380, 0.0298),
    "Q8_0": (0.0054, 0.0054),
    "MXFP4": (0.1163, 0.1157),
}

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def reference(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def sample(kind: str) -> Floats:
    """Fixed test data f32 [64, 1024]; "importance" is positive."""
    rng = np.random.default_rng(0)
    if kind == "normal":
        return (rng.standard_normal((64, 1024)) * 0.03).astype(np.float32)
    if kind == "heavy tails":
        return (rng.standard_t(3, (64, 1024)) * 0.03).astype(np.float32)
    if kind == "shifted":
        return (rng.random((64, 1024)) * 2 + 1).astype(np.float32)
    assert kind == "importance"
    row = np.random.default_rng(1).standard_normal(1024).astype(np.float32) ** 2 + 0.01
    return np.broadcast_to(row, (64, 1024)).astype(np.float32)


def restored(name: str, data: Bytes, like: Floats) -> Floats:
    return _core.dequantize(name, data.reshape(-1), like.size).reshape(like.shape)


def rms(error: Floats, x: Floats, weight: Floats | float = 1.0) -> float:
    total = np.sum(np.float64(weight) * np.float64(error) ** 2)
    return float(np.sqrt(total / np.sum(np.float64(weight) * np.float64(x) ** 2)))


def test_rows_agree_with_the_published_sizes() -> None:
    assert len(FORMATS) == 16
    for name, row in FORMATS.items():
        assert row["id"] == int(reference(name))
        assert (row["block"], row["bytes"]) == gguf.GGML_QUANT_SIZES[reference(name)]
        assert row["quantizes"]


@pytest.mark.parametrize("name", FORMATS)
def test_random_bytes_dequantize_bit_for_bit(name: str) -> None:
    blocks = 4096 if name in INTEGER else 65536
    row = FORMATS[name]
    data = np.random.default_rng(row["id"]).integers(0, 256, blocks * row["bytes"], dtype=np.uint8)
    ours = _core.dequantize(name, data, blocks * row["block"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # random scales may be infinite or NaN
        theirs = gguf.quants.dequantize(data, reference(name)).astype(np.float32)
    finite = np.isfinite(theirs)
    assert finite.mean() > 0.8
    assert np.array_equal(ours[finite].view(np.uint32), theirs[finite].view(np.uint32))
    assert not np.isfinite(ours[~finite]).any() or name == "MXFP4"


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "shifted"])
@pytest.mark.parametrize("name", SAME_BYTES)
def test_quantize_gives_the_reference_bytes(name: str, kind: str) -> None:
    x = sample(kind)
    theirs = gguf.quants.quantize(x, reference(name)).view(np.uint8)
    assert np.array_equal(_core.quantize(name, x), theirs.reshape(64, -1))


@pytest.mark.parametrize("name", LLAMA_RMS)
def test_quantize_is_no_worse_than_llama_cpp(name: str) -> None:
    x, importance = sample("normal"), sample("importance")
    plain, weighted = LLAMA_RMS[name]
    data = _core.quantize(name, x)
    assert data.shape == (64, 1024 // FORMATS[name]["block"] * FORMATS[name]["bytes"])
    assert rms(restored(name, data, x) - x, x) < plain * 1.005
    data = _core.quantize(name, x, importance=importance)
    assert rms(restored(name, data, x) - x, x, importance) < weighted * 1.005


@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
@pytest.mark.parametrize("name", SEARCHED)
def test_searched_scales_beat_the_plain_grid_of_equal_bits(name: str, kind: str) -> None:
    x = sample(kind)
    bits = 8 * FORMATS[name]["bytes"] / FORMATS[name]["block"]
    plain = "Q5_1" if bits > 5 else "Q4_0" if bits >= 4.25 else None
    error = rms(restored(name, _core.quantize(name, x), x) - x, x)
    if plain is None:
        assert error < {"Q2_K": 0.35, "Q3_K": 0.2}[name]
    else:
        assert error < rms(restored(plain, _core.quantize(plain, x), x) - x, x)


@pytest.mark.parametrize("name", [n for n in INTEGER if n != "Q8_0"])
def test_importances_move_the_error_to_where_it_matters_least(name: str) -> None:
    x, importance = sample("heavy tails"), sample("importance")
    unaware = restored(name, _core.quantize(name, x), x) - x
    aware = restored(name, _core.quantize(name, x, importance=importance), x) - x
    assert rms(aware, x, importance) < rms(unaware, x, importance)
    zero = restored(name, _core.quantize(name, x, importance=np.zeros_like(x)), x) - x
    assert rms(zero, x) < 1.2 * rms(unaware, x)  # nothing matters: still a sensible answer


@pytest.mark.parametrize("name", INTEGER)
def test_zeros_stay_zero(name: str) -> None:
    x = np.zeros((2, 512), np.float32)
    assert not restored(name, _core.quantize(name, x), x).any()
    x[0, 300:] = -0.0
    assert not restored(name, _core.quantize(name, x), x).any()


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-20, 1e-6, 1e3, 1e20, 3e38])
def test_any_magnitude_gives_finite_weights(name: str, magnitude: float) -> None:
    x = sample("normal")[:4] / np.float32(0.2)
    x = np.clip(x, -1, 1) * np.float32(magnitude)
    y = restored(name, _core.quantize(name, x), x)
    assert np.isfinite(y).all()
    largest = np.abs(x).max()
    # Scales are f16: what they cannot hold saturates, or rounds to a multiple of 2^-24 (which a
    # code of up to 127 multiplies).
    assert np.abs(y).max() <= 1.25 * largest + 127 * 2.0**-25
    if 1e-4 < magnitude < 1e4:
        assert rms(y - x, x) < 0.4


values = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 127.0, 65504.0])


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(INTEGER),
    few=st.lists(values, min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_odd_blocks_stay_near(name: str, few: list[float], seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.choice(np.array(few, np.float32), 256)
    x = (x * (1 + spread * rng.standard_normal(256))).astype(np.float32)
    y = restored(name, _core.quantize(name, x), x)
    largest = float(np.abs(x).max())
    step = {"Q2_K": 0.75, "Q3_K": 0.5, "Q8_0": 0.01, "MXFP4": 0.3}.get(name, 0.25)
    assert np.isfinite(y).all()
    assert np.abs(y - x).max() <= step * 2 * largest + 1e-4


def test_f16_and_bf16_round_to_nearest_even_over_their_whole_range() -> None:
    every = np.arange(65536, dtype=np.uint16)
    floats = every.view(np.float16).astype(np.float32)
    ours = _core.dequantize("F16", every.view(np.uint8), every.size)
    assert np.array_equal(ours, floats, equal_nan=True)
    finite = floats[np.isfinite(floats)]
    upward = np.nextafter(finite, np.float32(np.inf))
    downward = np.nextafter(finite, np.float32(-np.inf))
    halfway = (np.sort(finite)[1:] + np.sort(finite)[:-1]) / 2
    bits = np.random.default_rng(3).integers(0, 2**32, 200_000, dtype=np.uint32)
    random = bits.view(np.float32)
    limits = np.array([65519.996, 65520, 7e4, np.inf, -np.inf, 2.0**-25, -(2.0**-26)], np.float32)
    x = np.concatenate([finite, upward, downward, halfway, random, limits])
    x = x[~np.isnan(x)]
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    assert np.array_equal(_core.quantize("F16", x).view(np.float16), half)
    brain = gguf.quants.quantize(x, reference("BF16")).view(np.uint16)
    assert np.array_equal(_core.quantize("BF16", x).view(np.uint16), brain)
    nan = np.array([np.nan], np.float32)
    for name in ("F16", "BF16"):
        assert np.isnan(_core.dequantize(name, _core.quantize(name, nan), 1)[0])


@pytest.mark.parametrize("name", FORMATS)
def test_every_instruction_set_multiplies_alike(name: str) -> None:
    rng = np.random.default_rng(5)
    cols = 512 if name in INTEGER else 333
    w = (rng.standard_normal((37, cols)) * 0.05).astype(np.float32)
    x = rng.standard_normal((9, cols)).astype(np.float32)
    data = _core.quantize(name, w)
    expected = _core.matmul(name, "scalar", data, 37, x)
    assert expected.shape == (9, 37)
    exact = x @ restored(name, data, w).T
    scale = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)[None, :]
    assert np.abs(expected - exact).max() < (1e-3 if name in INTEGER else 1e-6) * scale.max()
    usable = [isa for isa, runs in _core.isas() if runs]
    assert usable[0] == "scalar"
    for isa in usable:
        for tokens in (1, 2, 5, 9):
            y = _core.matmul(name, isa, data, 37, x[:tokens])
            assert np.array_equal(y.view(np.uint32), expected[:tokens].view(np.uint32)), isa


@pytest.mark.parametrize("name", INTEGER)
def test_numbers_that_are_not_finite_are_refused(name: str) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        x = np.zeros(256, np.float32)
        x[77] = bad
        with pytest.raises(OptionError, match=r"finite.*index 77"):
            _core.quantize(name, x)
        with pytest.raises(OptionError, match="importance must be finite"):
            _core.quantize(name, np.ones(256, np.float32), importance=x)


def test_wrong_arguments_are_refused_with_what_was_expected() -> None:
    x = np.zeros(64, np.float32)
    data = _core.quantize("Q4_0", x)
    with pytest.raises(OptionError, match=r"unknown format 'Q9'.*Q4_0.*MXFP4"):
        _core.quantize("Q9", x)
    with pytest.raises(OptionError, match="row length 33 is not a multiple of the block of 32"):
        _core.quantize("Q4_0", x[:33])
    with pytest.raises(OptionError, match="dimension"):
        _core.quantize("Q4_0", np.float32(1).reshape(()))
    with pytest.raises(OptionError, match="shape of x"):
        _core.quantize("Q4_0", x, importance=x[:32])
    with pytest.raises(OptionError, match="negative: found -1"):
        _core.quantize("Q4_0", x, importance=x - 1)
    with pytest.raises(OptionError, match="n 63 is not a multiple"):
        _core.dequantize("Q4_0", data, 63)
    with pytest.raises(OptionError, match="n must not be negative"):
        _core.dequantize("Q4_0", data, -32)
    with pytest.raises(OptionError, match="expected 18 bytes for 32 weights, found 36"):
        _core.dequantize("Q4_0", data, 32)
    with pytest.raises(OptionError, match=r"instruction set 'mmx' is not usable.*scalar"):
        _core.matmul("Q4_0", "mmx", data, 2, x.reshape(2, 32))
    with pytest.raises(OptionError, match="expected 3 rows of 18 bytes, found 36 bytes"):
        _core.matmul("Q4_0", "scalar", data, 3, x.reshape(2, 32))
    with pytest.raises(OptionError, match=r"\[tokens, cols\], found 1"):
        _core.matmul("Q4_0", "scalar", data, 1, x)
    with pytest.raises(OptionError, match="no columns"):
        _core.matmul("Q4_0", "scalar", data, 1, np.zeros((1, 0), np.float32))
    assert _core.matmul("Q4_0", "scalar", data, 2, np.zeros((0, 32), np.float32)).shape == (0, 2)
    assert _core.quantize("Q4_0", np.zeros((0, 32), np.float32)).shape == (0, 18)


def run_with_isa(isa: str) -> subprocess.CompletedProcess[str]:
    code = "from stoker.runtime import _core; print(_core.active_isa())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"STOKER_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_chooses_the_instruction_set() -> None:
    listed = dict(_core.isas())
    assert listed["scalar"]
    for isa, runs in listed.items():
        result = run_with_isa(isa)
        if runs:
            assert result.stdout.strip() == isa, result.stderr
        else:
            assert "OptionError" in result.stderr and isa in result.stderr
    assert "OptionError: STOKER_ISA=mmx" in run_with_isa("mmx").stderr


def test_the_processor_is_described() -> None:
    cpu = _core.cpu()
    assert cpu["logical"] >= cpu["physical"] >= cpu["performance"] >= 1
    assert isinstance(cpu["model"], str)
    assert cpu["features"] == [isa for isa, runs in _core.isas() if runs]
