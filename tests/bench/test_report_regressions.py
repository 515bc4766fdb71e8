"""Comparison with earlier results: worse, better or the same."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import sample_results as sample
from stoker.mobile_bench.report import report as reports
from stoker.mobile_bench.report.quantities import Spread
from stoker.mobile_bench.report.regressions import verdict

MB = sample.MB


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


def test_what_chance_does_with_three_repeats() -> None:
    # The page states a fifth of all orders of 3 and 3 exchangeable repeats.
    apart = 0
    orders = list(itertools.combinations(range(6), 3))
    for mine in orders:
        old = tuple(100.0 + n for n in mine)
        new = tuple(100.0 + n for n in range(6) if n not in mine)
        apart += verdict(Spread(old), Spread(new), more=True, threshold=0.0) != "same"
    assert apart * 5 == len(orders)


def test_same_results_are_the_same(tmp_path: Path) -> None:
    file = sample.put(tmp_path / "a.jsonl", sample.results())
    found = reports.build([file], against=file).regressions
    assert found is not None
    assert {one.verdict for one in found.comparisons} == {"same"}
    assert {one.change for one in found.comparisons} == {0.0}
    assert not found.failed
    assert found.only_now == found.only_earlier == ()


def test_slower_is_worse_and_faster_is_better(tmp_path: Path) -> None:
    slow = sample.put(tmp_path / "slow.jsonl", sample.results())
    fast = sample.put(tmp_path / "fast.jsonl", sample.results(faster=1.2))
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
    files = sample.put(tmp_path / "new.jsonl", new), sample.put(tmp_path / "old.jsonl", old)
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
    files = sample.put(tmp_path / "new.jsonl", new), sample.put(tmp_path / "old.jsonl", old)
    found = reports.build([files[0]], against=files[1]).regressions
    assert found is not None
    assert [c.note for c in found.comparisons if c.note] == ["other tokens than earlier"]


def test_other_devices_are_not_compared(tmp_path: Path) -> None:
    laptop = sample.put(tmp_path / "laptop.jsonl", sample.results())
    phone = sample.put(tmp_path / "phone.jsonl", sample.results(sample.PHONE))
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
        files = (
            sample.put(tmp_path / "new.jsonl", [old | change]),
            sample.put(tmp_path / "old.jsonl", [old]),
        )
        found = reports.build([files[0]], against=files[1]).regressions
        assert found is not None and not found.comparisons, change
