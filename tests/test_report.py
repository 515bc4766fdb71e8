"""`stoker report`: statistics, verdicts, tables, pages of whole, partial and hostile results."""

from __future__ import annotations

import builtins
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sample_results as sample
from stoker.mobile_bench import report as reports
from stoker.mobile_bench.report_markdown import markdown
from stoker.mobile_bench.report_quantities import (
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
from stoker.mobile_bench.report_regressions import verdict
from stoker.mobile_bench.report_setups import Setup
from stoker.runtime import cli

MB = sample.MB


def put(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def page_of(report: reports.Report) -> str:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (stoker[bench])")
    from stoker.mobile_bench.report_page import page

    return page(report)


class Page(HTMLParser):
    """What a page is made of; fails where elements are not closed in order."""

    VOID = frozenset(("meta", "link", "br", "img", "hr", "input"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.texts.append(data.strip())

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


# Numbers


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


# Verdicts


@pytest.mark.parametrize(
    ("old", "new", "more", "expected"),
    [
        ((10, 10.1, 10.2), (9, 9.1, 9.2), True, "worse"),
        ((10, 10.1, 10.2), (9, 9.1, 9.2), False, "better"),
        ((9, 9.1, 9.2), (10, 10.1, 10.2), True, "better"),
        ((10, 10.1, 10.2), (9.7, 9.8, 9.9), True, "same"),  # beyond the spread, within 5%
        ((8, 10, 10.2), (9, 9.1, 9.2), True, "same"),  # the new median lies among the old
        ((10, 10.1, 10.2), (8, 9, 10.15), True, "same"),  # the old median lies among the new
        ((10,), (9,), True, "worse"),
        ((10,), (9.6,), True, "same"),
        ((0,), (0,), False, "same"),
        ((0,), (5,), False, "worse"),
    ],
)
def test_verdict(old: Any, new: Any, more: bool, expected: str) -> None:
    assert verdict(Spread(old), Spread(new), more=more, threshold=0.05) == expected


def test_same_results_are_the_same(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", sample.results())
    found = reports.build([file], against=file).regressions
    assert found is not None
    assert {one.verdict for one in found.comparisons} == {"same"}
    assert {one.change for one in found.comparisons} == {0.0}
    assert not found.failed
    assert found.only_now == found.only_earlier == ()


def test_slower_is_worse_and_faster_is_better(tmp_path: Path) -> None:
    slow = put(tmp_path / "slow.jsonl", sample.results())
    fast = put(tmp_path / "fast.jsonl", sample.results(faster=1.2))
    worse = reports.build([slow], against=fast).regressions
    better = reports.build([fast], against=slow).regressions
    assert worse is not None and better is not None
    assert worse.failed and not better.failed
    assert len(worse.of("worse")) == len(better.of("better")) > 20
    assert not worse.of("better") and not better.of("worse")
    decode = [one for one in worse.of("worse") if one.metric == "decode"]
    # Only the mixture became slower, at every budget; other engines and models did not change.
    assert {one.room for one in decode} == {500 * MB, 1000 * MB, 2000 * MB, None}
    assert {one.engine for one in worse.of("worse")} == {"stoker"}
    resident = next(one for one in decode if one.room is None)
    assert resident.change == pytest.approx(1 / 1.2 - 1, abs=1e-9)
    lenient = reports.build([slow], against=fast, threshold=0.3).regressions
    assert lenient is not None and not lenient.failed


def test_a_configuration_that_fails_now_is_worse(tmp_path: Path) -> None:
    old = sample.results(dense=False, engines=("stoker",))
    new = [
        sample.failed(line, "killed: out of memory") if line.get("limit") == 500 * MB else line
        for line in old
    ]
    files = put(tmp_path / "new.jsonl", new), put(tmp_path / "old.jsonl", old)
    found = reports.build([files[0]], against=files[1]).regressions
    assert found is not None
    (one,) = found.of("worse")
    assert (one.room, one.metric) == (500 * MB, "runs")
    assert "killed: out of memory" in one.note
    back = reports.build([files[1]], against=files[0]).regressions
    assert back is not None and [c.note for c in back.of("better")] == ["failed earlier"]


def test_other_tokens_than_earlier_are_told(tmp_path: Path) -> None:
    old = sample.results(dense=False, budgets=(None,), engines=("stoker",))
    new = copy.deepcopy(old)
    for line in new:
        if line["kind"] == "run":
            line["tokens_sha256"] = "0" * 64
    files = put(tmp_path / "new.jsonl", new), put(tmp_path / "old.jsonl", old)
    found = reports.build([files[0]], against=files[1]).regressions
    assert found is not None
    assert [c.note for c in found.comparisons if c.note] == ["other tokens than earlier"]


def test_other_devices_are_not_compared(tmp_path: Path) -> None:
    laptop = put(tmp_path / "laptop.jsonl", sample.results())
    phone = put(tmp_path / "phone.jsonl", sample.results(sample.PHONE))
    found = reports.build([laptop], against=phone).regressions
    assert found is not None
    assert found.comparisons == () and found.failed
    assert "nothing to compare" in found.summary
    assert len(found.only_now) == len(found.only_earlier) == 11


def test_changed_budget_threads_or_options_are_not_compared(tmp_path: Path) -> None:
    old = sample.run(sample.LAPTOP, sample.UP64, memory=1000 * MB)
    for change in (
        {"limit": 2000 * MB},
        {"threads": 1},
        {"options": {"policy": "lru"}},
        {"context": 512},
        {"model": {**old["model"], "n_expert_used": 2}},
    ):
        files = put(tmp_path / "new.jsonl", [old | change]), put(tmp_path / "old.jsonl", [old])
        found = reports.build([files[0]], against=files[1]).regressions
        assert found is not None and not found.comparisons, change


# Setups and tables


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
    report = reports.build([put(tmp_path / "a.jsonl", lines)])
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
    report = reports.build([put(tmp_path / "a.jsonl", lines)])
    (row,) = tables(report)["stoker against other engines, pair by pair within a repeat"].rows
    assert (row.cells[0].text, row.cells[0].spread) == ("2.00", "1.88\N{EN DASH}2.22")
    assert row.cells[0].tone == "better"
    assert row.cells[-1].text == "3"
    # A repeat that only one side has is no pair, nor is one of another command.
    lines[0]["run"] = "another"
    report = reports.build([put(tmp_path / "b.jsonl", lines[:-1])])
    (row,) = tables(report)["stoker against other engines, pair by pair within a repeat"].rows
    assert (row.cells[0].text, row.cells[-1].text) == ("2.22", "1")


def test_ratio_that_pairs_disagree_on_is_not_coloured(tmp_path: Path) -> None:
    lines = []
    for engine, found in {"stoker": (10.0, 10.0), "llama-cpp": (9.0, 11.0)}.items():
        for repeat, speed in enumerate(found):
            line = sample.run(sample.LAPTOP, sample.UP64, engine=engine, repeat=repeat)
            line["decode"]["tok_s"] = speed
            lines.append(line)
    report = reports.build([put(tmp_path / "a.jsonl", lines)])
    (row,) = tables(report)["stoker against other engines, pair by pair within a repeat"].rows
    assert row.cells[0].tone == ""


def test_rooms_are_limits_where_there_are_some() -> None:
    values = {"device": "d", "model": "m", "engine": "e", "threads": 1, "context": 0, "options": ""}
    assert Setup(**values, memory=950, limit=1000).room == 1000
    assert Setup(**values, memory=950, limit=None).room == 950
    assert Setup(**values, memory=None, limit=None).room is None


def test_equal_outputs_have_equal_letters(tmp_path: Path) -> None:
    report = reports.build([put(tmp_path / "a.jsonl", sample.results())])
    table = tables(report)["Decode"]
    letters = {head: row_cells for (_, head), row_cells in cells(table, -1).items()}
    assert letters == {"stoker": "A", "llama.cpp": "B"}


def test_share_of_the_limit(tmp_path: Path) -> None:
    line = sample.run(sample.LAPTOP, sample.UP64, memory=1000 * MB)
    line["decode"]["tok_s"] = 10.0
    roof = sample.roofline(sample.LAPTOP, sample.UP64, 1000 * MB) | {"limit_s": 0.05}
    for memory in (1000 * MB, 950 * MB):  # bench may name the limit or the budget
        file = put(tmp_path / "a.jsonl", [line, roof | {"memory": memory}])
        assert cells(tables(reports.build([file]))["Decode"], 1) == {("1 GB", "stoker"): "50.0"}


def test_setups_of_an_engine_are_told_apart(tmp_path: Path) -> None:
    base = sample.run(sample.LAPTOP, sample.UP64, memory=1000 * MB)
    lines = [base, base | {"options": {"policy": "lru"}}, base | {"engine_version": "0.2.0"}]
    report = reports.build([put(tmp_path / "a.jsonl", lines)])
    heads = [row.head for row in tables(report)["Decode"].rows]
    assert heads == ["stoker, 0.1.0", "stoker, 0.2.0", "stoker, 0.1.0, policy=lru"]
    lines = [base, base | {"threads": 1}]
    report = reports.build([put(tmp_path / "a.jsonl", lines)])
    assert [r.head for r in tables(report)["Decode"].rows] == [
        "stoker, 1 thread",
        "stoker, 4 threads",
    ]


def test_another_engines_file_stands_beside_the_model_of_its_command(tmp_path: Path) -> None:
    ours = sample.run(sample.LAPTOP, sample.SMOLLM2)
    theirs = sample.run(sample.LAPTOP, sample.SMOLLM2, engine="onnx")
    theirs["model"] = {"name": "smollm2.onnx", "nbytes": 1, "architecture": "onnx", "type": ""}
    report = reports.build([put(tmp_path / "a.jsonl", [theirs, ours])])
    (model,) = report.sections[0].models
    assert model.results.name == sample.SMOLLM2.name
    assert {row.head for row in tables(report)["Decode"].rows} == {"stoker", "onnxruntime"}
    alone = reports.build([put(tmp_path / "b.jsonl", [theirs])])
    assert alone.sections[0].models[0].results.name == "smollm2.onnx"


def test_noisy_and_failed_repeats_are_marked(tmp_path: Path) -> None:
    lines = sample.results(dense=False, budgets=(1000 * MB,), engines=("stoker",))
    lines[1]["noise"]["noisy"] = ["throttled 3 times"]
    lines[2]["notes"] = ["prompts of 2048 tokens: the time limit of 60 s"]
    lines[3] = sample.failed(lines[3], "killed: no memory")
    report = reports.build([put(tmp_path / "a.jsonl", lines)])
    assert [row.mark for row in tables(report)["Decode"].rows] == ["noisy 1/2"]
    remarks = tables(report)["What was left out, failed or was disturbed"]
    assert [[cell.text for cell in row.cells] for row in remarks.rows] == [
        ["noisy: throttled 3 times", "0"],
        ["prompts of 2048 tokens: the time limit of 60 s", "1"],
        ["failed: killed: no memory", "2"],
    ]
    assert "1 of them noisy" in report.lead and "1 failed" in report.lead


def test_devices_side_by_side(tmp_path: Path) -> None:
    files = [
        put(tmp_path / "laptop.jsonl", sample.results()),
        put(tmp_path / "phone.jsonl", sample.results(sample.PHONE, engines=("stoker",))),
    ]
    report = reports.build(files)
    facts, decode, ttft = report.across
    assert decode.columns == facts.columns == (sample.LAPTOP.name, sample.PHONE.name)
    assert decode.caption == "Decode, tok/s" and ttft.caption == "TTFT of 512 tokens, s"
    # What only one of them has run (llama.cpp on the laptop) is not beside anything.
    assert {row.engine for row in decode.rows} == {"stoker", "onnx"}
    assert all(cell.text for row in decode.rows for cell in row.cells)
    assert [section.device.name for section in report.sections] == list(decode.columns)


# Whole pages


def everything(tmp_path: Path) -> reports.Report:
    lines = sample.results()
    lines[1]["noise"]["noisy"] = ["throttled 3 times"]
    lines[2] = sample.failed(lines[2], "killed: it needs more memory than its cgroup's limit")
    files = [
        put(tmp_path / "laptop.jsonl", lines),
        put(tmp_path / "phone.jsonl", sample.results(sample.PHONE, engines=("stoker",))),
    ]
    board = tmp_path / "board.json"
    board.write_text(json.dumps(sample.profile(sample.BOARD), indent=1), encoding="utf-8")
    old = put(tmp_path / "old.jsonl", sample.results(faster=1.2))
    return reports.build([*files, board], against=old)


def test_page_is_one_accessible_file(tmp_path: Path) -> None:
    text = page_of(everything(tmp_path))
    page = Page(text)
    assert not page.all("script", "iframe", "object", "embed", "img")
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    outside = re.findall(
        r"""(?:src|href)\s*=\s*["'](?!#|data:,)[^"']*|url\((?!#)[^)]*|@import""", text
    )
    assert outside == []
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key in ("href", "aria-labelledby"):
            for name in (attributes.get(key) or "").split():
                if name != "data:,":
                    assert name.removeprefix("#") in ids, name
    found = re.findall(r"url\(#([^)]*)\)", text)
    assert found and set(found) <= set(ids)
    assert all(a.get("scope") in ("col", "row", "rowgroup") for a in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) > 10
    pictures = page.all("svg")
    assert len(pictures) > 10
    assert all(a["role"] == "img" and a["aria-labelledby"] for a in pictures)
    assert len(page.all("title")) == len(page.all("desc")) + 1 == len(pictures) + 1
    assert page.all("html")[0]["lang"] == "en"
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"#0101\d\d|#0102\d\d|NaN|nan\b|None", text)


def test_page_shows_what_was_measured(tmp_path: Path) -> None:
    text = page_of(everything(tmp_path))
    texts = "\n".join(Page(text).texts)
    for expected in (
        "Decode speed against memory",
        "limit",
        "waiting for flash",
        "TTFT, 500 MB",
        "Hit rate by layer",
        "Latency of single tokens",
        "stoker bench up64.gguf --memory 500MB,1GB,2GB --against llama-cpp",
        "Storage, GB/s: random reads by block and by how many are under way",
        "256 KiB",
        "noisy 1/3",
        "killed: it needs more memory than its cgroup's limit",
        "Devices side by side",
        "Against old.jsonl",
        "Sample board, 4 cores, 4 GB",
    ):
        assert expected in texts, expected


def test_same_input_same_page(tmp_path: Path) -> None:
    first, second = page_of(everything(tmp_path)), page_of(everything(tmp_path))
    assert first == second
    assert markdown(everything(tmp_path)) == markdown(everything(tmp_path))


def test_names_are_untrusted(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&|`$\\frac{$ \u202e\x1b[31m\ud800 {{ 7*7 }} ]]> #010201"
    lines = sample.results(sample.LAPTOP)
    for line in lines:
        if line["kind"] == "profile":
            line["name"] = evil
            line["cpu"]["model"] = evil
            line["storage_reads"][0]["mode"] = evil
        elif line["kind"] == "run":
            line["model"] = line["model"] | {"name": evil, "architecture": evil}
            line["command"] = evil
            line["options"] = {evil: evil}
            line["engine_version"] = evil
            line["notes"] = [evil]
    lines[2]["engine"] = evil
    lines[3] = sample.failed(lines[3], evil)
    report = reports.build([put(tmp_path / "a.jsonl", lines)], title=evil)
    text = page_of(report)
    page = Page(text)
    text.encode()
    assert not page.all("script")
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
    assert "{{ 7*7 }}" in "".join(page.texts)
    rows = markdown(report)
    rows.encode()
    assert "\x1b" not in rows and "\u202e" not in rows
    for line in rows.splitlines():
        assert line.startswith("    ") or "<script" not in line.replace("\\<", "")
        if line.startswith("| "):
            assert line.endswith(" |")


def test_dense_model_in_memory(tmp_path: Path) -> None:
    report = reports.build([put(tmp_path / "a.jsonl", [sample.run(sample.BOARD, sample.SMOLLM2)])])
    texts = Page(page_of(report)).texts
    assert "Decode speed" in texts and "Hit rate by layer" not in texts
    assert "Where the time of a token goes" not in texts
    assert report.remarks == ("no device profile: stoker probe makes one.",)


@pytest.mark.parametrize("keep", ["decode", "prompts", "peak_bytes", "load_cold_s", None])
def test_partial_runs(tmp_path: Path, keep: str | None) -> None:
    lines = [
        sample.run(sample.LAPTOP, sample.UP64, memory=memory, engine=engine)
        for memory in (500 * MB, None)
        for engine in ("stoker", "llama-cpp")
    ]
    empty: dict[str, Any] = {"decode": None, "prompts": [], "energy": None, "noise": {}}
    empty |= dict.fromkeys(("peak_bytes", "group_peak_bytes", "load_cold_s", "load_warm_s"))
    empty |= dict.fromkeys(("tokens_sha256", "flash", "plan", "notes", "case"))
    lines = [line | {k: v for k, v in empty.items() if k != keep} for line in lines]
    report = reports.build([put(tmp_path / "a.jsonl", lines)])
    Page(page_of(report))
    assert markdown(report).startswith("# stoker report")
    assert len(report.sections[0].models) == 1


def test_odd_numbers(tmp_path: Path) -> None:
    line = sample.run(sample.LAPTOP, sample.UP64, memory=1000 * MB)
    line["decode"] |= {"tok_s": float("nan"), "hit_rate": float("inf"), "bytes_token": "many"}
    line["decode"]["token_s"] = [0.0, -1.0, float("nan"), None, 0.02, 0.0]
    line["decode"]["layer_hits"] = [0.0] * 30
    line["prompts"] = [
        {"tokens": 16, "ttft_s": 0.0, "tok_s": None},
        {"tokens": 64, "ttft_s": 1e-9, "tok_s": 1e12},
        "prompt",
    ]
    line["peak_bytes"] = 10**400  # more than a double holds
    report = reports.build([put(tmp_path / "a.jsonl", [line])])
    assert not re.search(r"nan\b|\binf\b", page_of(report))


def test_only_errors(tmp_path: Path) -> None:
    lines = [sample.failed(sample.run(sample.LAPTOP, sample.UP64), "died")]
    report = reports.build([put(tmp_path / "a.jsonl", lines)])
    assert report.summary is None
    assert f"{sample.UP64.name}: every run failed." in report.remarks
    assert "failed: died" in Page(page_of(report)).texts


def test_profile_alone(tmp_path: Path) -> None:
    file = tmp_path / "device.json"
    file.write_text(json.dumps(sample.profile(sample.PHONE), indent=1), encoding="utf-8")
    report = reports.build([file])
    assert report.lead[0] == "1 device"
    assert report.remarks == ("no runs: stoker bench MODEL measures.",)
    texts = Page(page_of(report)).texts
    assert "Memory, GB/s: reads by threads" in texts


def test_profile_without_measurements(tmp_path: Path) -> None:
    bare = sample.profile(sample.PHONE)
    for key, value in bare.items():
        if isinstance(value, (dict, list)):
            bare[key] = type(value)()
    report = reports.build([put(tmp_path / "a.jsonl", [bare])])
    Page(page_of(report))
    assert report.sections[0].tables == ()


def test_the_latest_full_probe_counts(tmp_path: Path) -> None:
    full, quick = sample.profile(sample.PHONE), sample.profile(sample.PHONE, quick=True)
    quick["time"] = "2027-01-01T00:00:00Z"
    later = full | {"time": "2026-12-01T00:00:00Z"}
    report = reports.build([put(tmp_path / "a.jsonl", [later, full, quick])])
    (section,) = report.sections
    assert dict(section.facts)["probed"] == "2026-12-01T00:00:00Z, stoker 0.1.0"


def test_sweeps(tmp_path: Path) -> None:
    model = {"name": "t.gguf", "nbytes": 274688, "architecture": "llama"}
    ppl = {"kind": "perplexity", "device": "", "model": model, "text": "ab" * 32, "context": 64}
    ppl |= {"stride": None, "ppl": 16.4321, "nll": 2.8, "tokens": 1116, "standard_error": 0.25}
    width = {"kind": "width", "device": "", "model": model, "text": "ab" * 32, "bits": 4.5}
    width |= {"types": [], "path": None, "points": [], "made": {"uniform": "", "kl": 0.0012}}
    width["source"] = {"uniform": "source", "nbytes": 274688, "bits": 16.0, "kl": 0.0, "ppl": 16.0}
    width["made"] |= {"nbytes": 90000, "bits": 4.5, "ppl": 16.1}
    job: dict[str, Any] = {"kind": "job", "version": 1, "run": "r", "node": "n", "attempts": 1}
    job |= {"time": "2026-11-21T20:10:00Z", "seconds": 1.0, "error": None, "results": []}
    job["job"] = {"kind": "measure", "model": "/no/such.gguf", "type": None, "memory": "1GB"}
    run = sample.run(sample.LAPTOP, sample.UP64)
    lines = [
        job | {"key": "0" * 16, "results": [ppl]},
        job | {"key": "1" * 16, "results": [width]},
        job | {"key": "2" * 16, "error": "no such file"},
    ]
    report = reports.build([put(tmp_path / "a.jsonl", lines)])
    assert report.lead == ("3 jobs", "1 failed", "2026-11-21 20:10 UTC")
    texts = Page(page_of(report)).texts
    for expected in ("16.43", "\N{PLUS-MINUS SIGN}0.25", "adapted", "0.0012", "no such file"):
        assert expected in texts
    assert "no such file" in markdown(report)
    lines.append(job | {"key": "3" * 16, "results": [run]})
    assert len(reports.build([put(tmp_path / "b.jsonl", lines)]).sections) == 1


def test_a_file_given_twice_counts_once(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", sample.results())
    assert reports.as_json(reports.build([file, file])) == reports.as_json(reports.build([file]))


def test_markdown(tmp_path: Path) -> None:
    report = everything(tmp_path)
    text = markdown(report)
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(blocks) > 15
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert "    stoker bench up64.gguf --memory 500MB,1GB,2GB --against llama-cpp" in text
    assert "## Against old.jsonl" in text


# The command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (stoker[bench])")
    file = put(tmp_path / "a.jsonl", sample.results())
    out, rows = tmp_path / "page.html", tmp_path / "page.md"
    assert cli.main(["report", str(file), "--out", str(out), "--markdown", str(rows)]) == 0
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert rows.read_text(encoding="utf-8").startswith("# stoker report")
    said = capsys.readouterr().out
    assert f"{out}: 1 device, 2 models, 33 runs" in said
    assert sorted(tmp_path.iterdir()) == [file, out, rows]


def test_command_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (stoker[bench])")
    put(tmp_path / "a.jsonl", [sample.profile(sample.PHONE)])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "a.jsonl"]) == 0
    assert (tmp_path / "report.html").stat().st_size > 5_000


def test_command_fails_on_regressions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = put(tmp_path / "new.jsonl", sample.results(dense=False))
    old = put(tmp_path / "old.jsonl", sample.results(dense=False, faster=1.2))
    other = put(tmp_path / "other.jsonl", sample.results(sample.PHONE, dense=False))
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
    new = put(tmp_path / "new.jsonl", sample.results(dense=False, budgets=(None,)))
    old = put(tmp_path / "old.jsonl", sample.results(dense=False, budgets=(None,), faster=1.2))
    assert cli.main(["report", str(new), "--against", str(old), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (setup,) = (one for one in found["setups"] if one["engine"] == "stoker")
    assert setup["decode_tok_s"]["n"] == 3
    verdicts = {c["quantity"]: c["verdict"] for c in found["against"]["comparisons"]}
    assert verdicts["decode"] == "same"  # the last of the two engines, llama.cpp
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
        (["good.jsonl", "--out", "no/folder.html"], "no/folder.html: expected the name of a file"),
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
    put(Path("good.jsonl"), [good])
    put(Path("empty.jsonl"), [])
    Path("bad.jsonl").write_text("stoker\n\n", encoding="utf-8")
    put(Path("version.jsonl"), [good | {"version": 7}])
    put(Path("kind.jsonl"), [{"kind": "shopping"}])
    put(Path("engine.jsonl"), [good | {"engine": 3}])
    put(Path("threads.jsonl"), [good | {"threads": None}])
    put(Path("model.jsonl"), [good | {"model": {}}])
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
    file = put(tmp_path / "a.jsonl", sample.results())
    assert cli.main(["report", str(file), "--out", str(tmp_path / "a.html")]) == 2
    said = capsys.readouterr().err
    assert "pip install 'stoker[bench]'" in said and said.count("\n") == 1
    assert cli.main(["report", str(file), "--markdown", str(tmp_path / "a.md")]) == 0
