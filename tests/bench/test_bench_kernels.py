"""kernel_speed and `stoker bench-kernels`: what is measured and shown, never how fast it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from stoker.mobile_bench.probe import kernels
from stoker.runtime import _core
from stoker.runtime.base.errors import OptionError
from stoker.runtime.cli.bench_kernels import as_json_text, as_table, as_tsv

FORMATS = [f["name"] for f in _core.formats()]
USABLE = [name for name, executes in _core.isas() if executes]
QUICK = 0.001  # seconds


@pytest.fixture(autouse=True)
def small_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "stack_bytes", lambda: 1 << 18)


def baseline(folder: Path, script: str) -> str:
    """An interpreter that runs `script` instead of the given program."""
    stand_in = folder / "stand_in.py"
    stand_in.write_text(script)
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stand_in}"\n')
    program.chmod(0o755)
    return str(program)


GGML = """
import json, os, sys
print(json.dumps({"ggml": "/lib", "version": "9.9.9"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["type"] == 39:
        os.abort()
    repacked = 0.25 if asked["tokens"] > 1 else None
    print(json.dumps({"plain": 0.5, "repacked": repacked}), flush=True)
"""


@pytest.mark.parametrize("name", FORMATS)
def test_kernel_speed_of_every_format(name: str) -> None:
    for isa in USABLE:
        for tokens in (1, 9):
            for quantize in (False, True):
                assert _core.kernel_speed(name, isa, 33, 256, tokens, 1, QUICK, quantize) > 0


def test_kernel_speed_on_two_threads() -> None:
    assert _core.kernel_speed("Q4_0", USABLE[-1], 4096, 256, 1, threads=2, seconds=QUICK) > 0
    assert _core.kernel_speed("Q4_0", USABLE[-1], 300, 256, 70, threads=2, seconds=QUICK) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Q9", "scalar", 1, 32, 1), "unknown format 'Q9'"),
        (("Q4_0", "mmx", 1, 32, 1), "instruction set 'mmx' is not usable here"),
        (("Q4_0", "scalar", 1, 31, 1), "Q4_0: expected columns in blocks of 32, found 31"),
        (("F32", "scalar", 1, 33, 1), "F32: expected columns in blocks of 32, found 33"),
        (("Q4_K", "scalar", 1, 32, 1), "Q4_K: expected columns in blocks of 256, found 32"),
        (("Q4_0", "scalar", 0, 32, 1), "rows: expected 1 or more, found 0"),
        (("Q4_0", "scalar", 1, 0, 1), "cols: expected 1 or more, found 0"),
        (("Q4_0", "scalar", 1, 32, 0), "tokens: expected 1 or more, found 0"),
        (("Q4_0", "scalar", 1, 32, 1, 0), "threads: expected 1 or more, found 0"),
    ],
)
def test_kernel_speed_refuses(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        _core.kernel_speed(*arguments)  # type: ignore[arg-type]


def test_measures_every_combination() -> None:
    seen: list[tuple[int, int]] = []
    found = kernels.measure(
        formats=["Q4_0", "Q6_K", "F16"],
        isas=["scalar", USABLE[-1]],
        shapes=[(32, 256), (48, 320)],
        tokens=[1, 8],
        seconds=QUICK,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    # Q6_K has blocks of 256, which do not divide 320 columns.
    assert len(found.rows) == (2 * 2 + 1) * 2 * 2
    assert {(r.format, r.cols) for r in found.rows} == {
        ("Q4_0", 256), ("Q4_0", 320), ("Q6_K", 256), ("F16", 256), ("F16", 320)
    }  # fmt: skip
    assert seen == [(i, 10) for i in range(11)]
    assert found.ggml is None and found.memory_s > 0
    assert re.fullmatch(r"[0-9a-f]{12}", found.device)
    assert list(found.int8_s) == list(found.float32_s) == ["scalar", USABLE[-1]]
    nbytes = {f["name"]: f["bytes"] / f["block"] for f in _core.formats()}
    for r in found.rows:
        weights = r.rows * r.cols
        assert r.stacked * weights * nbytes[r.format] >= (1 << 18 if r.tokens == 1 else 0)
        assert (r.stacked == 1) == (r.tokens == 8)
        assert r.bytes_s * r.seconds == pytest.approx(r.stacked * weights * nbytes[r.format])
        assert r.ops_s * r.seconds == pytest.approx(2 * r.stacked * weights * r.tokens)
        assert r.of_memory == pytest.approx(r.bytes_s / found.memory_s)
        peaks = found.float32_s if r.format == "F16" else found.int8_s
        assert r.of_peak == pytest.approx(r.ops_s / peaks[r.isa])
        assert r.ggml_s is None and r.repacked is None and r.faster is None


def test_by_default_all_formats_and_all_isas_but_scalar(monkeypatch: pytest.MonkeyPatch) -> None:
    def limits(self: kernels._Limits) -> None:  # measuring them for every format takes long
        self.memory_s = 1.0
        self.int8_s = self.float32_s = dict.fromkeys(self.int8_s, 1.0)

    monkeypatch.setattr(kernels._Limits, "measure", limits)
    found = kernels.measure(shapes=[(16, 256)], tokens=[1], seconds=QUICK)
    expected = [isa for isa in USABLE if isa != "scalar"] or ["scalar"]
    assert [(r.format, r.isa) for r in found.rows] == [(f, i) for f in FORMATS for i in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["Q4_0", "Q9"]}, "format: expected one of F32, .*, found 'Q9'"),
        ({"isas": ["sse"]}, "isa: expected one of scalar.*, found 'sse'"),
        ({"tokens": [1, 0]}, "tokens: expected numbers of at least 1"),
        ({"shapes": [(0, 32)]}, "rows and columns: expected numbers of at least 1"),
        ({"threads": 0}, "threads: expected at least 1, found 0"),
        ({"formats": ["Q4_K"], "shapes": [(8, 32)]}, "no format of those has blocks"),
        ({"baseline_python": "/absent/python"}, "/absent/python: No such file"),
    ],
)
def test_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kernels.measure(**options)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_ggml_stands_beside_and_may_die_of_a_format(tmp_path: Path) -> None:
    found = kernels.measure(
        formats=["MXFP4", "Q4_0"],
        isas=["scalar"],
        shapes=[(32, 256)],
        tokens=[1, 8],
        seconds=QUICK,
        baseline_python=baseline(tmp_path, GGML),
    )
    assert found.ggml == "9.9.9"
    assert [(r.format, r.tokens, r.ggml_s, r.repacked) for r in found.rows] == [
        ("MXFP4", 1, None, None),
        ("MXFP4", 8, None, None),
        ("Q4_0", 1, 0.5, False),
        ("Q4_0", 8, 0.25, True),
    ]
    decode, prompt = found.rows[2:]
    assert decode.faster == pytest.approx(0.5 / decode.seconds)
    table = as_table(found)
    assert "32 x 256, 1 token, from memory" in table and "32 x 256, 8 tokens" in table
    assert "ggml of llama-cpp-python 9.9.9" in table
    assert f"{prompt.faster:.2f}" in table and "times ggml" in table
    rows = [line.split("\t") for line in as_tsv(found).splitlines()]
    assert all(len(row) == len(rows[0]) for row in rows) and len(rows) == 5
    assert dict(zip(rows[0], rows[1], strict=True))["ggml_s"] == ""
    assert dict(zip(rows[0], rows[4], strict=True))["repacked"] == "True"
    document = json.loads(as_json_text(found))
    assert document["ggml"] == "9.9.9" and document["rows"][2]["ggml_s"] == 0.5


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("", "the baseline does not run: it ended at once"),
        ('print(\'{"error": "no ggml"}\')', "the baseline does not run: no ggml"),
    ],
)
def test_a_baseline_that_does_not_run(tmp_path: Path, script: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kernels.measure(seconds=QUICK, baseline_python=baseline(tmp_path, script))


def test_ggml_itself() -> None:
    """Times all formats with the real library, if there is one."""
    python = os.environ.get("STOKER_BASELINE_PYTHON") or kernels.baseline_here()
    if python is None:
        pytest.skip("no llama-cpp-python here, and none in STOKER_BASELINE_PYTHON")
    if find_spec("llama_cpp") is not None and "fake" in str(find_spec("llama_cpp")):
        pytest.skip("a stand-in for llama-cpp-python")
    found = kernels.measure(
        isas=USABLE[-1:], shapes=[(64, 256)], seconds=QUICK, baseline_python=python
    )
    assert all(r.ggml_s is not None and r.ggml_s > 0 for r in found.rows)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from stoker.runtime.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, "bench-kernels", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_command() -> None:
    small = ["--formats", "Q8_0", "--isas", "scalar", "--shapes", "64x64", "--tokens", "1,16"]
    done = command(*small, "--seconds", "0.001", "--no-baseline", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [(r["format"], r["tokens"]) for r in document["rows"]] == [("Q8_0", 1), ("Q8_0", 16)]
    assert document["rows"][0]["stacked"] > 1000  # 4352 bytes each: more than every cache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "64"], "shapes: expected rows x columns such as 576x1536, found '64'"),
        (["--tokens", "some"], "tokens: expected numbers such as 1,512, found 'some'"),
        (["--formats", "Q9"], "format: expected one of"),
        (["--json", "--tsv"], "give --json or --tsv, not both"),
        (["--no-baseline", "--baseline-python", "x"], "give --baseline-python or --no-baseline"),
    ],
)
def test_command_refuses(arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr
