"""The report's page: whole, partial and hostile results."""

from __future__ import annotations

import itertools
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_results as sample
from stoker.mobile_bench.report import report as reports
from stoker.mobile_bench.report.markdown import markdown
from stoker.runtime.base.errors import OptionError

MB = sample.MB


def page_of(report: reports.Report) -> str:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (stoker[bench])")
    from stoker.mobile_bench.report.page import page

    return page(report)


class Page(HTMLParser):
    """The parts of a page; fails if elements are not closed in order."""

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


def test_page_is_one_accessible_file(tmp_path: Path) -> None:
    text = page_of(sample.everything(tmp_path))
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


# Machado, Oliveira and Fernandes 2009, "A physiologically-based model for simulation of color
# vision deficiency", severity 1, on linear sRGB.
VISION = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour: str, vision: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of "#rrggbb" as seen with this kind of colour vision."""
    rgb = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = TO_XYZ @ np.clip(vision @ linear, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = [np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("scheme", [0, 1])
def test_engines_are_told_apart_by_everyone(scheme: int, vision: str) -> None:
    template = Path(reports.__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    defined = re.findall(r"--(e-[a-z0-9-]+): (#[0-9a-f]{6});", template)
    schemes = [dict(defined[: len(defined) // 2]), dict(defined[len(defined) // 2 :])]
    assert len(schemes[0]) == len(schemes[1]) == 5
    seen = {name: lab(colour, VISION[vision]) for name, colour in schemes[scheme].items()}
    for a, b in itertools.combinations(seen, 2):
        # A difference of 2.3 is just noticeable.
        assert np.linalg.norm(seen[a] - seen[b]) > 10, (a, b)


def test_page_shows_what_was_measured(tmp_path: Path) -> None:
    text = page_of(sample.everything(tmp_path))
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
    first, second = page_of(sample.everything(tmp_path)), page_of(sample.everything(tmp_path))
    assert first == second
    assert markdown(sample.everything(tmp_path)) == markdown(sample.everything(tmp_path))


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
    report = reports.build([sample.put(tmp_path / "a.jsonl", lines)], title=evil)
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
    report = reports.build(
        [sample.put(tmp_path / "a.jsonl", [sample.run(sample.BOARD, sample.SMOLLM2)])]
    )
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
    report = reports.build([sample.put(tmp_path / "a.jsonl", lines)])
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
    report = reports.build([sample.put(tmp_path / "a.jsonl", [line])])
    assert not re.search(r"nan\b|\binf\b", page_of(report))


JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e308, -1e-300, float("nan"), float("inf"), 10**30, 1e-9),
    *("", "x", "<b>", [], {}, [None], {"a": 1}, [1, "x"], [[1]]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values inside a record; only the beginning of long lists."""
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value[:3]) if isinstance(value, list) else inside
    found = [path] if path else []
    for key, one in inside:
        found += places(one, (*path, key))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_any_field_may_be_junk(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    lines = sample.results(repeats=1, budgets=(500 * MB, None), dense=False)
    for line in lines:
        for path in rng.sample(places(line), 2):
            at = line
            for key in path[:-1]:
                at = at[key] if isinstance(at, dict) else at[key % len(at)] if at else {}
            if isinstance(at, dict):
                at[path[-1]] = rng.choice(JUNK)
    file = sample.put(tmp_path / "a.jsonl", lines)
    try:
        report = reports.build([file], against=file)
    except OptionError as error:
        assert str(file) in str(error)
        return
    json.dumps(reports.as_json(report))
    markdown(report)
    if seed % 4 == 0:  # pictures take long
        Page(page_of(report))


def test_only_errors(tmp_path: Path) -> None:
    lines = [sample.failed(sample.run(sample.LAPTOP, sample.UP64), "died")]
    report = reports.build([sample.put(tmp_path / "a.jsonl", lines)])
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
    report = reports.build([sample.put(tmp_path / "a.jsonl", [bare])])
    Page(page_of(report))
    assert report.sections[0].tables == ()


def test_the_latest_full_probe_counts(tmp_path: Path) -> None:
    full, quick = sample.profile(sample.PHONE), sample.profile(sample.PHONE, quick=True)
    quick["time"] = "2027-01-01T00:00:00Z"
    later = full | {"time": "2026-12-01T00:00:00Z"}
    report = reports.build([sample.put(tmp_path / "a.jsonl", [later, full, quick])])
    (section,) = report.sections
    assert dict(section.facts)["probed"] == "2026-12-01 00:00 UTC, stoker 0.1.0"


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
    report = reports.build([sample.put(tmp_path / "a.jsonl", lines)])
    assert report.lead == ("3 jobs", "1 failed", "2026-11-21 20:10 UTC")
    texts = Page(page_of(report)).texts
    for expected in ("16.43", "\N{PLUS-MINUS SIGN}0.25", "adapted", "0.0012", "no such file"):
        assert expected in texts
    assert "no such file" in markdown(report)
    lines.append(job | {"key": "3" * 16, "results": [run]})
    assert len(reports.build([sample.put(tmp_path / "b.jsonl", lines)]).sections) == 1


def test_a_file_given_twice_counts_once(tmp_path: Path) -> None:
    file = sample.put(tmp_path / "a.jsonl", sample.results())
    assert reports.as_json(reports.build([file, file])) == reports.as_json(reports.build([file]))


def test_markdown(tmp_path: Path) -> None:
    report = sample.everything(tmp_path)
    text = markdown(report)
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(blocks) > 15
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert "    stoker bench up64.gguf --memory 500MB,1GB,2GB --against llama-cpp" in text
    assert "## Against old.jsonl" in text
