"""`stoker report`: numbers, setups, tables, and the command."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import sample_results as sample
from stoker.mobile_bench.report import report as reports
from stoker.mobile_bench.report.quantities import (
    BYTES,
    ONE,
    SECONDS,
    Spread,
    between,
    budget,
    number,
    quantity,
    unit_of,
)
from stoker.mobile_bench.report.setups import Setup
from stoker.runtime.cli import main as cli

MB = sample.MB


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00123, "0.0012"),
        (0.0348, "0.0348"),
        (0.9996, "1.00"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (12345678, "12,345,678"),
        (-2.5, "-2.50"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_units_suit_a_whole_column() -> None:
    assert unit_of([0.35, 1.2, 14], SECONDS).name == "s"
    assert unit_of([0.00035, 0.9], SECONDS).name == "ms"
    assert unit_of([485e6, 2.9e9], BYTES).name == "GB"
    assert unit_of([], SECONDS).name == "s"
    assert quantity(1.5e9, BYTES) == "1.50 GB"
    assert quantity(12.0, BYTES) == "12.0 B"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (500_000_000, "500 MB"),
        (1_000_000_000, "1 GB"),
        (1 << 30, "1 GiB"),
        (3 << 29, "1.5 GiB"),
        (1_234_567_890, "1.23 GB"),
        (200 << 20, "200 MiB"),
        (None, "all in memory"),
    ],
)
def test_budget(nbytes: int | None, text: str) -> None:
    assert budget(nbytes) == text


def test_spread_is_as_exact_as_its_median() -> None:
    assert between(Spread((7.2, 7.21, 7.5)), ONE) == "7.20\N{EN DASH}7.50"
    assert between(Spread((7.2101, 7.2102)), ONE) == ""
    assert between(Spread((7.2,)), ONE) == ""


def cells(table: Any, column: int = 0) -> dict[tuple[str, str], str]:
    return {(row.group, row.head): row.cells[column].text for row in table.rows}


def tables(report: reports.Report, model: int = 0) -> dict[str, Any]:
    return {table.caption: table for table in report.sections[0].models[model].tables}


def test_medians_and_spreads(tmp_path: Path) -> None:
    lines = [
        sample.run(sample.LAPTOP, sample.UP64, memory=1000 * MB, repeat=repeat)
        for repeat in range(3)
    ]
    for line, speed in zip(lines, (10.0, 14.0, 11.0), strict=True):
        line["decode"]["tok_s"] = speed
    report = reports.build([sample.put(tmp_path / "a.jsonl", lines)])
    (row,) = tables(report)["Decode"].rows
    assert (row.group, row.head) == ("1 GB", "stoker")
    assert (row.cells[0].text, row.cells[0].spread) == ("11.0", "10.0\N{EN DASH}14.0")


def test_ratios_are_taken_pair_by_pair(tmp_path: Path) -> None:
    # Both engines were disturbed in the same repeat: the pairs agree, ratios of medians would not.
    speeds = {"stoker": (10.0, 20.0, 30.0), "llama-cpp": (5.0, 9.0, 16.0)}
    lines = []
    for engine, found in speeds.items():
        for repeat, speed in enumerate(found):
            line = sample.run(sample.LAPTOP, sample.UP64, engine=engine, repeat=repeat)
            line["decode"]["tok_s"] = speed
            lines.append(line)
    report = reports.build([sample.put(tmp_path / "a.jsonl", lines)])
    table = tables(report)["stoker against other engines, pair by pair within a repeat"]
    (row,) = table.rows
    assert (row.cells[0].text, row.cells[0].spread) == ("2.00", "1.88\N{EN DASH}2.22")
    assert row.cells[0].tone == "better"
    assert [note for note in table.notes if note.endswith("3 pairs each.")]
    # A repeat that only one side has, or that is of another command, makes no pair.
    lines[0]["run"] = "another"
    report = reports.build([sample.put(tmp_path / "b.jsonl", lines[:-1])])
    table = tables(report)["stoker against other engines, pair by pair within a repeat"]
    cell = table.rows[0].cells[0]
    assert (cell.text, cell.spread, cell.tone) == ("2.22", "", "")
    assert [note for note in table.notes if note.endswith("1 pair each.")]


def test_ratio_that_pairs_disagree_on_is_not_coloured(tmp_path: Path) -> None:
    lines = []
    for engine, found in {"stoker": (10.0, 10.0), "llama-cpp": (9.0, 11.0)}.items():
        for repeat, speed in enumerate(found):
            line = sample.run(sample.LAPTOP, sample.UP64, engine=engine, repeat=repeat)
            line["decode"]["tok_s"] = speed
            lines.append(line)
    report = reports.build([sample.put(tmp_path / "a.jsonl", lines)])
    (row,) = tables(report)["stoker against other engines, pair by pair within a repeat"].rows
    assert row.cells[0].tone == ""


def test_rooms_are_limits_where_there_are_some() -> None:
    values = {"device": "d", "model": "m", "engine": "e", "threads": 1, "context": 0, "options": ""}
    assert Setup(**values, memory=950, limit=1000).room == 1000
    assert Setup(**values, memory=950, limit=None).room == 950
    assert Setup(**values, memory=None, limit=None).room is None


def test_equal_outputs_have_equal_letters(tmp_path: Path) -> None:
    report = reports.build([sample.put(tmp_path / "a.jsonl", sample.results())])
    table = tables(report)["Decode"]
    letters = {head: row_cells for (_, head), row_cells in cells(table, -1).items()}
    assert letters == {"stoker": "A", "llama.cpp": "B"}


def test_outputs_are_equal_as_far_as_both_go(tmp_path: Path) -> None:
    lines = []
    for engine, memory, ids in (
        ("stoker", 1000 * MB, [1, 2, 3]),
        ("llama-cpp", 1000 * MB, [1]),
        ("stoker", None, [1, 2, 3, 4, 5]),
        ("llama-cpp", None, [1, 2, 3, 4, 6]),
    ):
        line = sample.run(sample.LAPTOP, sample.UP64, engine=engine, memory=memory)
        lines.append(line | {"token_ids": ids, "tokens_sha256": str(ids)})
    table = tables(reports.build([sample.put(tmp_path / "a.jsonl", lines)]))["Decode"]
    assert list(cells(table, -1).values()) == ["A", "A", "A", "B"]


def test_share_of_the_limit(tmp_path: Path) -> None:
    line = sample.run(sample.LAPTOP, sample.UP64, memory=1000 * MB)
    line["decode"]["tok_s"] = 10.0
    roof = sample.roofline(sample.LAPTOP, sample.UP64, 1000 * MB) | {"limit_s": 0.05}
    for memory in (1000 * MB, 950 * MB):  # bench may name the limit or the budget
        file = sample.put(tmp_path / "a.jsonl", [line, roof | {"memory": memory}])
        assert cells(tables(reports.build([file]))["Decode"], 1) == {("1 GB", "stoker"): "50.0"}


def test_setups_of_an_engine_are_told_apart(tmp_path: Path) -> None:
    base = sample.run(sample.LAPTOP, sample.UP64, memory=1000 * MB)
    lines = [base, base | {"options": {"policy": "lru"}}, base | {"engine_version": "0.2.0"}]
    report = reports.build([sample.put(tmp_path / "a.jsonl", lines)])
    heads = [row.head for row in tables(report)["Decode"].rows]
    assert heads == ["stoker, 0.1.0", "stoker, 0.2.0", "stoker, 0.1.0, policy=lru"]
    lines = [base, base | {"threads": 1}]
    report = reports.build([sample.put(tmp_path / "a.jsonl", lines)])
    assert [r.head for r in tables(report)["Decode"].rows] == [
        "stoker, 1 thread",
        "stoker, 4 threads",
    ]


def test_another_engines_file_stands_beside_the_model_of_its_command(tmp_path: Path) -> None:
    ours = sample.run(sample.LAPTOP, sample.SMOLLM2)
    theirs = sample.run(sample.LAPTOP, sample.SMOLLM2, engine="onnx")
    theirs["model"] = {"name": "smollm2.onnx", "nbytes": 1, "architecture": "onnx", "type": ""}
    report = reports.build([sample.put(tmp_path / "a.jsonl", [theirs, ours])])
    (model,) = report.sections[0].models
    assert model.results.name == sample.SMOLLM2.name
    assert {row.head for row in tables(report)["Decode"].rows} == {"stoker", "onnxruntime"}
    alone = reports.build([sample.put(tmp_path / "b.jsonl", [theirs])])
    assert alone.sections[0].models[0].results.name == "smollm2.onnx"


def test_noisy_and_failed_repeats_are_marked(tmp_path: Path) -> None:
    lines = sample.results(dense=False, budgets=(1000 * MB,), engines=("stoker",))
    lines[1]["noise"]["noisy"] = ["throttled 3 times"]
    lines[2]["notes"] = ["prompts of 2048 tokens: the time limit of 60 s"]
    lines[3] = sample.failed(lines[3], "killed: no memory")
    report = reports.build([sample.put(tmp_path / "a.jsonl", lines)])
    assert [row.mark for row in tables(report)["Decode"].rows] == ["noisy 1/2"]
    remarks = tables(report)["What was left out, failed or was disturbed"]
    assert [[cell.text for cell in row.cells] for row in remarks.rows] == [
        ["noisy: throttled 3 times", "1"],
        ["prompts of 2048 tokens: the time limit of 60 s", "2"],
        ["failed: killed: no memory", "3"],
    ]
    assert "1 of them noisy" in report.lead and "1 failed" in report.lead


def test_devices_side_by_side(tmp_path: Path) -> None:
    files = [
        sample.put(tmp_path / "laptop.jsonl", sample.results()),
        sample.put(tmp_path / "phone.jsonl", sample.results(sample.PHONE, engines=("stoker",))),
    ]
    report = reports.build(files)
    facts, decode, ttft = report.across
    assert decode.columns == facts.columns == (sample.LAPTOP.name, sample.PHONE.name)
    assert decode.caption == "Decode, tok/s" and ttft.caption == "TTFT of 512 tokens, s"
    # A setup that only one device has run (llama.cpp on the laptop) is not listed.
    assert {row.engine for row in decode.rows} == {"stoker", "onnx"}
    assert all(cell.text for row in decode.rows for cell in row.cells)
    assert [section.device.name for section in report.sections] == list(decode.columns)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (stoker[bench])")
    file = sample.put(tmp_path / "a.jsonl", sample.results())
    out, rows = tmp_path / "page.html", tmp_path / "page.md"
    assert cli.main(["report", str(file), "--out", str(out), "--markdown", str(rows)]) == 0
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert rows.read_text(encoding="utf-8").startswith("# stoker report")
    said = capsys.readouterr().out
    assert f"{out}: 1 device, 2 models, 33 runs" in said
    assert sorted(tmp_path.iterdir()) == [file, out, rows]


def test_command_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (stoker[bench])")
    sample.put(tmp_path / "a.jsonl", [sample.profile(sample.PHONE)])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "a.jsonl"]) == 0
    assert (tmp_path / "report.html").stat().st_size > 5_000


def test_command_fails_on_regressions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = sample.put(tmp_path / "new.jsonl", sample.results(dense=False))
    old = sample.put(tmp_path / "old.jsonl", sample.results(dense=False, faster=1.2))
    other = sample.put(tmp_path / "other.jsonl", sample.results(sample.PHONE, dense=False))
    out = ["--markdown", str(tmp_path / "r.md")]
    assert cli.main(["report", str(new), "--against", str(old), *out]) == 0
    fail = ["--fail-on-regression"]
    assert cli.main(["report", str(new), "--against", str(old), *out, *fail]) == 1
    assert (
        "worse: smollm2-135m-64-experts.gguf, 500 MB, stoker, decode -" in capsys.readouterr().out
    )
    assert (tmp_path / "r.md").exists()
    assert cli.main(["report", str(old), "--against", str(new), *out, *fail]) == 0
    lenient = ["--threshold", "40"]
    assert cli.main(["report", str(new), "--against", str(old), *out, *fail, *lenient]) == 0
    assert cli.main(["report", str(new), "--against", str(other), *out, *fail]) == 1
    assert "nothing to compare" in capsys.readouterr().out


def test_command_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = sample.put(tmp_path / "new.jsonl", sample.results(dense=False, budgets=(None,)))
    old = sample.put(
        tmp_path / "old.jsonl", sample.results(dense=False, budgets=(None,), faster=1.2)
    )
    assert cli.main(["report", str(new), "--against", str(old), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (setup,) = (one for one in found["setups"] if one["engine"] == "stoker")
    assert setup["decode_tok_s"]["n"] == 3
    verdicts = {c["quantity"]: c["verdict"] for c in found["against"]["comparisons"]}
    assert verdicts["decode"] == "same"  # the later of the two engines, llama.cpp
    assert list(tmp_path.glob("*.html")) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["missing.jsonl"], "missing.jsonl: No such file"),
        (["empty.jsonl"], "empty.jsonl: no results"),
        (["bad.jsonl"], "bad.jsonl:1: expected a result as a JSON object"),
        (["version.jsonl"], "version.jsonl:1: expected version 1, found 7"),
        (["kind.jsonl"], "kind.jsonl:1: unknown kind of result 'shopping'"),
        (["engine.jsonl"], "engine.jsonl: run 1: expected engine as text, found 3"),
        (["threads.jsonl"], "threads.jsonl: run 1: expected threads as a number, found None"),
        (["model.jsonl"], "model.jsonl: run 1: expected a model with a name"),
        (["good.jsonl", "--out", "good.jsonl"], "good.jsonl: expected another file than"),
        (["good.jsonl", "--against", "empty.jsonl"], "empty.jsonl: expected earlier runs"),
        (["good.jsonl", "--against", "good.jsonl", "--threshold", "-3"], "expected 0 to 100 %"),
        (["good.jsonl", "--fail-on-regression"], "needs --against"),
        (["good.jsonl", "--out", "no/folder.html"], "no/folder.html: no such directory: "),
        (["good.jsonl", "--out", "a.html", "--markdown", "a.html"], "different files"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    good = sample.run(sample.LAPTOP, sample.SMOLLM2)
    monkeypatch.chdir(tmp_path)
    sample.put(Path("good.jsonl"), [good])
    sample.put(Path("empty.jsonl"), [])
    Path("bad.jsonl").write_text("stoker\n\n", encoding="utf-8")
    sample.put(Path("version.jsonl"), [good | {"version": 7}])
    sample.put(Path("kind.jsonl"), [{"kind": "shopping"}])
    sample.put(Path("engine.jsonl"), [good | {"engine": 3}])
    sample.put(Path("threads.jsonl"), [good | {"threads": None}])
    sample.put(Path("model.jsonl"), [good | {"model": {}}])
    before = sorted(tmp_path.iterdir())
    assert cli.main(["report", *arguments]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    file = sample.put(tmp_path / "a.jsonl", sample.results())
    assert cli.main(["report", str(file), "--out", str(tmp_path / "a.html")]) == 2
    said = capsys.readouterr().err
    assert "pip install 'stoker[bench]'" in said and said.count("\n") == 1
    assert cli.main(["report", str(file), "--markdown", str(tmp_path / "a.md")]) == 0
