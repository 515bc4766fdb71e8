"""Memory budgets: sizes, available memory, plans, statistics and traces of offloaded runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stoker
from stoker.offload.plan.forecast import RESOURCES, Device, ModelHeader, Workload, forecast
from stoker.offload.plan.planned import PROCESS_GROWTH
from stoker.offload.trace.trace import read_trace
from stoker.runtime.base import cgroup, memory
from stoker.runtime.statistics import ExpertStatistics, Statistics, gained
from tiny_models import make, some_tokens

MIB = 1 << 20


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with 48 experts of 384 KiB, of which a token uses 6."""
    return make(
        tmp_path_factory.mktemp("mixture") / "mixture.gguf",
        "qwen3moe",
        n_expert=16,
        n_ff_expert=512,
        context=256,
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "dense.gguf", "llama", context=256)


def tight(path: Path, **options: Any) -> stoker.Model:
    """The model in the smallest budget that its BudgetError names."""
    memory = MIB
    # The process grows by the exception, by huge pages and by other mappings, and under a sanitizer
    # by all that it freed: each attempt leaves a larger margin.
    for attempt in range(5):
        try:
            return stoker.load(path, memory=memory, threads=2, **options)
        except stoker.BudgetError as error:
            least = re.search(r"expected at least (\d+) bytes", str(error))
            assert least is not None
            memory = int(least[1]) + (2 << attempt) * MIB
    raise AssertionError("what is named is never enough")


# Sizes.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (123, 123),
        (np.int64(5), 5),
        ("123", 123),
        ("500MB", 500 * 10**6),
        ("2GiB", 2 << 30),
        (" 1.5 gib ", 3 << 29),
        ("64k", 64 << 10),
        ("60%", 0.6),
        ("100 %", 1.0),
        ("12.5%", 0.125),
        ("auto", None),
        ("AUTO", None),
    ],
)
def test_sizes(value: object, expected: float | None) -> None:
    assert memory.check_memory(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        "0",
        "0%",
        "101%",
        "%",
        "much",
        "",
        "1e9",
        "-5MB",
        "1 2",
        True,
        1.5,
        None,
        1 << 62,
        "½",
    ],
)
def test_bad_sizes(value: object) -> None:
    with pytest.raises(stoker.OptionError, match="memory must be "):
        memory.check_memory(value)
    with pytest.raises(stoker.OptionError, match="memory must be "):
        stoker.load("nothing.gguf", memory=value)  # type: ignore[arg-type]


def test_budget_of_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert memory.budget("auto") == 1000
    assert memory.budget("25%") == 250
    assert memory.budget("3GB") == 3 * 10**9
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    with pytest.raises(stoker.OptionError, match=r"memory 25%: .* name bytes"):
        memory.budget("25%")


# Available memory.


def tree(root: Path, proc: str, files: dict[str, str]) -> dict[str, str]:
    (root / "proc").write_text(proc)
    for name, content in files.items():
        path = root / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return {"groups": str(root / "proc"), "mounts": "", "root": str(root / "mount")}


def test_headroom_leaves_the_page_cache_out(tmp_path: Path) -> None:
    at = tree(
        tmp_path,
        "0::/a\n",
        {
            "a/memory.max": "1000\n",
            "a/memory.current": "900\n",
            "a/memory.stat": "anon 100\nfile 600\nactive_file 200\ninactive_file 300\n"
            "slab_reclaimable 50\nshmem 100\n",
        },
    )
    assert cgroup.memory_headroom(**at) == cgroup.Headroom(1000, 1000 - (900 - 550))


def test_headroom_of_the_tightest_group(tmp_path: Path) -> None:
    """The tightest need not have the smallest limit: siblings may have filled the parent."""
    at = tree(
        tmp_path,
        "0::/a/b\n",
        {
            "a/memory.max": "2000\n",
            "a/memory.current": "1900\n",
            "a/b/memory.max": "1000\n",
            "a/b/memory.current": "10\n",
        },
    )
    assert cgroup.memory_headroom(**at) == cgroup.Headroom(2000, 100)


def test_headroom_of_version_1(tmp_path: Path) -> None:
    at = tree(
        tmp_path,
        "4:memory:/a\n",
        {
            "memory/a/memory.limit_in_bytes": "1000\n",
            "memory/a/memory.usage_in_bytes": "900\n",
            "memory/a/memory.stat": "active_file 1\ntotal_active_file 20\ntotal_inactive_file 30\n",
            "memory/memory.limit_in_bytes": f"{(1 << 63) - 4096}\n",
        },
    )
    assert cgroup.memory_headroom(**at) == cgroup.Headroom(1000, 150)


def test_headroom_without_a_limit(tmp_path: Path) -> None:
    at = tree(tmp_path, "0::/a\n", {"a/memory.max": "max\n", "a/memory.current": "9\n"})
    assert cgroup.memory_headroom(**at) is None
    assert cgroup.memory_headroom(groups=str(tmp_path / "none")) is None


def test_available_is_the_smaller_with_what_we_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 100)
    monkeypatch.setattr(memory, "_machine_available", lambda: 900)
    monkeypatch.setattr(memory, "memory_headroom", lambda: None)
    assert memory.available_memory() == 900
    monkeypatch.setattr(memory, "memory_headroom", lambda: cgroup.Headroom(1000, 700))
    assert memory.available_memory() == 950 - 300 + 100
    monkeypatch.setattr(memory, "memory_headroom", lambda: cgroup.Headroom(1000, 10))
    assert memory.available_memory() == 60
    monkeypatch.setattr(memory, "_machine_available", lambda: None)
    monkeypatch.setattr(memory, "memory_headroom", lambda: None)
    assert memory.available_memory() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_is_measured() -> None:
    before = memory.process_bytes()
    held = np.ones(64 * MIB, np.uint8)
    grown = memory.process_bytes() - before
    assert 63 * MIB < grown < 80 * MIB
    assert memory.anonymous_bytes() >= held.nbytes
    assert memory.available_memory()


# Loading.


def test_auto_loads_everything_where_it_fits(mixture: Path) -> None:
    model = stoker.load(mixture)
    assert model.offload is None
    assert model.plan["memory"] == 0


def test_auto_offloads_where_it_does_not(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tight(mixture)
    budget = model.plan["memory"]
    monkeypatch.setattr("stoker.runtime.model.available_memory", lambda: budget + 2 * MIB)
    loaded = stoker.load(mixture, threads=2)
    assert loaded.offload is not None
    assert loaded.plan["memory"] == budget + 2 * MIB
    monkeypatch.setattr("stoker.runtime.model.available_memory", lambda: None)
    assert stoker.load(mixture).offload is None


def test_budget_changes_no_token(mixture: Path) -> None:
    options = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    prompt = some_tokens(40, seed=3)
    expected = stoker.load(mixture, threads=2).generate(prompt, **options)
    expected.read()
    model = tight(mixture)
    assert model.plan["process_bytes"] > 10 * MIB
    found = model.generate(prompt, **options)
    found.read()
    assert found.tokens == expected.tokens


def test_impossible_budget_names_the_least(mixture: Path, dense: Path) -> None:
    for path in (mixture, dense):
        with pytest.raises(stoker.BudgetError, match=r"expected at least \d+ .*, found 1"):
            stoker.load(path, memory="1MiB")
    assert stoker.load(dense, memory="2GiB").offload is None  # everything fits in memory


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"policy": "oldest"}, "policy must be one of lru, .*, not 'oldest'"),
        ({"predictor": "crystal"}, "predictor must be one of none, .*, not 'crystal'"),
        ({"io": "tape"}, "io must be one of auto, pread_pool, .*, not 'tape'"),
        ({"prefetch": "maybe"}, "prefetch must be one of auto, on, off, not 'maybe'"),
        ({"readers": 0}, "readers must be between 1 and 256, not 0"),
        ({"policy": ""}, "policy must be a name"),
    ],
)
def test_unknown_names_even_where_nothing_is_offloaded(
    dense: Path, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(stoker.OptionError, match=message):
        stoker.load(dense, **option)


def test_options_reach_the_engine(mixture: Path) -> None:
    model = tight(mixture, policy="lru", predictor="none", prefetch="off", io="mmap", readers=2)
    assert model.offload is not None
    assert model.offload["io"].startswith("mmap")
    model.generate(some_tokens(5), max_tokens=5, ignore_eos=True).read()
    assert model.offload["prefetches"] == 0


def test_a_model_without_a_tokenizer_loads(mixture: Path, tmp_path: Path) -> None:
    data = mixture.read_bytes()
    at = data.index(b"tokenizer.ggml.model") + len("tokenizer.ggml.model") + 4 + 8
    path = tmp_path / "mixture.gguf"
    path.write_bytes(data[:at] + b"none"[:4] + data[at + 4 :])
    model = tight(path)
    assert model.logits([1, 2, 3]).shape == (3, model.n_vocab)
    with pytest.raises(stoker.TokenizerError):
        _ = model.tokenizer


# Statistics.


def test_statistics_count_every_use(mixture: Path) -> None:
    model = tight(mixture)
    generation = model.generate(some_tokens(20), temperature=0, max_tokens=11, ignore_eos=True)
    generation.read()
    stats = generation.stats
    e = stats.experts
    assert e is not None
    # A decode step uses 2 experts in each of 3 layers; a prompt uses each expert at most once.
    assert e.decode_hits + e.decode_late + e.decode_misses == 10 * 3 * 2
    assert 10 * 3 * 2 < e.hits + e.late + e.misses <= 10 * 3 * 2 + 3 * 16
    assert e.misses > 0
    assert e.demand_bytes + e.prefetch_bytes > 0
    assert 0 <= e.decode_stall_s <= e.stall_s
    assert stats.flash_bandwidth > 0 and stats.limit_share is None
    report = model.forecast()
    assert generation.stats.memory_bandwidth == report.memory_bandwidth
    again = model.generate(some_tokens(20), temperature=0, max_tokens=1, ignore_eos=True)
    again.read()
    assert again.stats.experts is not None
    assert again.stats.experts.decode_hits == again.stats.experts.decode_misses == 0
    whole = model.offload
    assert whole is not None
    assert whole["misses"] == e.misses + again.stats.experts.misses
    json.dumps(stats.as_dict())
    assert stats.as_dict()["experts"]["hit_rate"] == e.hit_rate
    assert len(stats.lines()) == 2


def test_figures_derived_from_the_counts() -> None:
    e = ExpertStatistics(
        hits=60,
        late=10,
        misses=30,
        prefetches=50,
        prefetches_used=30,
        cancelled=10,
        decode_bytes=4 * 10**9,
        decode_stall_s=0.5,
        stall_s=0.75,
        decode_hits=3,
        decode_misses=1,
    )
    assert (e.hit_rate, e.decode_hit_rate, e.precision, e.recall) == (0.6, 0.75, 0.75, 0.5)
    stats = Statistics(
        decode_s=4.0,
        decode_tokens=8,
        decode_bytes=10**10,
        memory_bandwidth=10**10,
        flash_bandwidth=2e9,
        experts=e,
    )
    assert stats.flash_bytes_per_token == 5e8
    assert stats.compute_s == 3.5
    assert stats.limit_share == 0.5  # flash: 2 s; memory: 1 s
    line = stats.experts_line()
    assert line is not None
    assert line == (
        "experts 60.0% of 100 hit, 10.0% late (decode 75.0%) | flash 500.0 MB a token at 2.00 GB/s"
        " | prefetch 50, 75% used, recall 50% | waited 0.75 s, 12% of decode"
        " | 50% of the memory and flash limit"
    )
    assert Statistics(decode_s=4.0, decode_bytes=10**10, memory_bandwidth=5e9).limit_share == 0.5
    assert Statistics().lines() == [Statistics().line()]
    assert ExpertStatistics().as_dict()["recall"] == 0


def test_what_counters_gained() -> None:
    before = dict.fromkeys(ExpertStatistics().__dataclass_fields__, 1)
    found = gained(ExpertStatistics, before, before | {"hits": 8, "other": 3})
    assert found == ExpertStatistics(hits=7)
    assert gained(ExpertStatistics, None, before) is None
    assert gained(ExpertStatistics, before, None) is None


# Plans.


def test_forecasts_agree(mixture: Path) -> None:
    """`Model.forecast` equals `stoker plan` for a device with the bandwidths that it measured."""
    model = tight(mixture)
    model._memory_bandwidth = 2e10  # the model is too small to measure it with
    found = model.forecast()
    assert found.times is not None and found.token_s is not None
    header = ModelHeader(
        model.file,
        model.name,
        context=found.context,
        process_bytes=int(model.plan["process_bytes"]),
    )
    device = Device.measured(found.threads, found.memory_bandwidth, found.flash_bandwidth)
    told = forecast(header, device, found.budget, Workload(64, 256))
    assert told.slots == found.slots and told.working_set == found.working_set
    assert told.hit_rate == found.expected_hit_rate < 1
    assert (told.times, told.token_s) == (found.times, found.token_s)
    assert told.limited_by == found.limited_by and told.tokens_per_s == found.tokens_per_s
    assert found.times["flash"] > 0 == found.times["arithmetic"]
    assert stoker.load(mixture).forecast().expected_hit_rate == 1


def test_auto_asks_the_core(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is in memory from exactly the size of the core's plan on, offloaded below it."""
    whole = stoker.load(mixture)
    plan = whole.plan
    parts = sum(int(plan[f"{kind}_bytes"]) for kind in ("weight", "kv", "scratch"))
    needed = memory.process_bytes() + parts + PROCESS_GROWTH
    for limit, offloaded in ((needed + (8 << 20), False), (needed - (8 << 20), True)):
        monkeypatch.setattr("stoker.runtime.model.available_memory", lambda n=limit: n)
        assert (stoker.load(mixture).offload is not None) == offloaded


def test_report_adds_up(mixture: Path) -> None:
    model = tight(mixture)
    report = model.forecast()
    assert report.budget == model.plan["memory"]
    total = sum(report.pinned.values())
    assert "experts" not in report.pinned
    assert {"routers", "norms", "attention", "embeddings"} <= set(report.pinned)
    assert total == model.plan["weight_bytes"]
    assert report.pinned["padding"] <= 4096 * len(model.file.tensors)
    used = report.process + total + report.kv + report.scratch + report.margin + report.slot_bytes
    assert used <= report.budget + 8192
    assert report.experts == 48 and report.working_set == 6
    assert report.flash_bandwidth > 0
    text = "\n".join(report.lines())
    for row in ("budget", "process", "pinned weights", "KV cache", "scratch", "expert cache"):
        assert f"\n{row} " in text
    assert json.loads(json.dumps(report.as_dict()))["slots"] == report.slots
    resident = stoker.load(mixture).forecast()
    assert resident.budget == 0 and resident.expected_hit_rate == 1
    assert resident.pinned["experts"] > 0


def test_the_slowest_resource_limits(mixture: Path) -> None:
    import dataclasses

    model = stoker.load(mixture)
    model._memory_bandwidth = 2e10  # the model is too small to measure it with
    base = model.forecast()
    assert base.limited_by in RESOURCES and base.tokens_per_s == 1 / (base.token_s or 0)
    times = dict.fromkeys(RESOURCES, 0.01) | {"flash": 0.04}
    slow = dataclasses.replace(base, times=times, token_s=0.05, budget=1)
    assert (slow.limited_by, slow.tokens_per_s) == ("flash", 20)
    assert "20.0 tok/s, limited by flash: memory 10.0 ms at " in slow.lines()[-1]
    unknown = dataclasses.replace(base, times=None, token_s=None)
    assert unknown.tokens_per_s is None and unknown.limited_by is None
    assert unknown.lines()[-1].endswith("could not be measured")


# Traces.


def test_recorded_routing_reads_back(mixture: Path, tmp_path: Path) -> None:
    model = tight(mixture)
    path = tmp_path / "routing.csv.gz"
    with model.record(path):
        for seed in (1, 2):
            model.generate(some_tokens(20, seed=seed), max_tokens=6, ignore_eos=True).read()
        assert not path.exists()
    trace = read_trace(path)
    assert (trace.n_layer, trace.n_expert, trace.n_expert_used) == (3, 16, 2)
    assert trace.decode.tolist() == [False, *[True] * 5] * 2
    assert trace.tokens.tolist() == [20, *[1] * 5] * 2
    assert len(trace.expert) == 50 * 3 * 2
    assert trace.expert_bytes is not None
    experts = [t for t in model.file.tensors if "_exps" in t.name]
    assert trace.expert_bytes.sum() * 16 == sum(t.nbytes for t in experts)
    assert list(tmp_path.iterdir()) == [path]
    assert model.engine.take_routing()["layer"].size == 0  # recording has stopped


def test_recording_does_not_depend_on_the_chunks(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stoker.offload.trace.record import RoutingRecorder

    model = tight(mixture)
    experts = []
    for name, chunk in (("a.csv", 64), ("b.csv", 7)):
        construct = RoutingRecorder.__init__

        def small(self: Any, *args: Any, chunk: int = chunk, construct: Any = construct) -> None:
            construct(self, *args)
            self.chunk = chunk

        with monkeypatch.context() as patch:
            patch.setattr(RoutingRecorder, "__init__", small)
            with model.record(tmp_path / name):
                model.generate(some_tokens(30), max_tokens=3, temperature=0, ignore_eos=True).read()
        trace = read_trace(tmp_path / name)
        by_token: dict[tuple[bool, int, int], list[int]] = {}
        for v in range(len(trace.layer)):
            key = (
                bool(trace.decode[trace.evaluation[v]]),
                int(trace.step[v]),
                int(trace.layer[v]),
            )
            by_token[key] = trace.expert[trace.offset[v] : trace.offset[v + 1]].tolist()
        experts.append(by_token)
    assert experts[0] == experts[1]
    assert len(experts[0]) == 32 * 3


def test_a_trace_is_whole_after_an_interrupt(mixture: Path, tmp_path: Path) -> None:
    model = tight(mixture)
    path = tmp_path / "routing.csv"
    with pytest.raises(KeyboardInterrupt), model.record(path):
        generation = model.generate(some_tokens(10), ignore_eos=True)
        for _ in range(4):
            next(generation)
        raise KeyboardInterrupt
    assert read_trace(path).tokens.tolist() == [10, 1, 1, 1]


def test_perplexity_and_logits_are_recorded(mixture: Path, tmp_path: Path) -> None:
    model = tight(mixture)
    with model.record(tmp_path / "a.csv"):
        model.perplexity(some_tokens(100), context=50)
        model.logits(some_tokens(8))
    trace = read_trace(tmp_path / "a.csv")
    assert not trace.decode.any()
    assert trace.n_tokens == 108


def test_what_cannot_be_recorded(mixture: Path, dense: Path, tmp_path: Path) -> None:
    for path in (mixture, dense):
        model = stoker.load(path)
        with (
            pytest.raises(stoker.OptionError, match=r"nothing to record.*--memory"),
            model.record(tmp_path / "a.csv"),
        ):
            pass
    model = tight(mixture)
    with (
        pytest.raises(stoker.OptionError, match="no such directory"),
        model.record(tmp_path / "none" / "a.csv"),
    ):
        pass
    with model.record(tmp_path / "a.csv"):
        with (
            pytest.raises(stoker.OptionError, match="being recorded already"),
            model.record(tmp_path / "b.csv"),
        ):
            pass
        model.logits([1])
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


# The command line.


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stoker.runtime.cli.main", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=500,
        check=False,
    )


def least(path: Path) -> str:
    done = command("run", str(path), "x", "--memory", "1MiB")
    assert done.returncode == 2
    assert re.fullmatch(r"stoker: error: .* at least \d+ bytes.*\n", done.stderr)
    found = re.search(r"at least (\d+) bytes", done.stderr)
    assert found is not None
    return found[1]


def test_run_inside_a_budget(mixture: Path, tmp_path: Path) -> None:
    budget = least(mixture)
    trace = tmp_path / "routing.csv.gz"
    arguments = ["run", str(mixture), "hello", "-n", "8", "--ignore-eos", "--temperature", "0"]
    done = command(*arguments, "--memory", budget, "--plan", "--stats", "--trace", str(trace))
    assert done.returncode == 0, done.stderr
    assert f"of {48} experts" in done.stderr
    assert re.search(r"^expected +", done.stderr, re.M)
    assert re.search(r"^experts \d+\.\d% of \d+ hit.* waited .*$", done.stderr, re.M)
    resident = command(*arguments)
    assert resident.stdout == done.stdout
    assert read_trace(trace).tokens[-7:].tolist() == [1] * 7
    rows = command(*arguments, "--memory", budget, "--plan", "--json").stdout.splitlines()
    assert json.loads(rows[0])["plan"]["budget"] == int(budget)
    assert json.loads(rows[-1])["stats"]["experts"]["misses"] > 0
    refused = command(*arguments, "--trace", str(trace))
    assert refused.returncode == 2 and "--memory" in refused.stderr
    assert refused.stdout == ""


def test_other_commands_take_budgets(mixture: Path, tmp_path: Path) -> None:
    budget = least(mixture)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog on the log " * 8)
    trace = tmp_path / "routing.csv"
    done = command(
        "perplexity", str(mixture), str(text), "--memory", budget, "--trace", str(trace), "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(
        command("perplexity", str(mixture), str(text), "--json").stdout
    )
    assert read_trace(trace).n_tokens > 50
    for arguments in (["chat", str(mixture)], ["perplexity", str(mixture), str(text)]):
        done = command(*arguments, "--memory", "1MiB")
        assert done.returncode == 2 and "expected at least" in done.stderr


def test_help_names_what_the_build_has() -> None:
    from stoker.runtime._core import io_backends, policies, predictors

    for name in ("run", "chat", "perplexity"):
        text = command(name, "--help").stdout
        assert "Memory and experts on flash:" in text
        for known, summary in (*policies(), *predictors(), *io_backends()):
            assert re.search(rf"^  {known} +{re.escape(summary.split()[0])}", text, re.M)
