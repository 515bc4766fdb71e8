"""Plans from a header alone, forecasts, and the curves that they are made from."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offload_models import CONTEXT, MIXTURES, TinyMixture, engine, named_minimum
from round_device import PROFILE
from stoker.mobile_bench.checks import forecast_check
from stoker.offload.plan import device_profile, hit_curves
from stoker.offload.plan.device_profile import DeviceProfile
from stoker.offload.plan.forecast import Device, Forecast, ModelHeader, Workload, forecast
from stoker.offload.trace.trace import Trace
from stoker.runtime import _core
from stoker.runtime.base import errors
from tiny_models import VARIANTS

MEBIBYTE = 1 << 20


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a tiny mixture, or of a dense variant -> its file."""
    folder = tmp_path_factory.mktemp("forecast")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            mixture = MIXTURES.get(name) or TinyMixture(name)
            made[name] = mixture.write(folder / name)
        return made[name]

    return get


def changed(**parts: Any) -> DeviceProfile:
    """PROFILE with other parts."""
    return {**copy.deepcopy(PROFILE), **parts}  # type: ignore[typeddict-item]


# A plan without a load.


@pytest.mark.parametrize("name", [*MIXTURES, *(v for v in VARIANTS if v in ("llama", "gemma3"))])
def test_plan_is_the_engines(models: Callable[[str], Path], name: str) -> None:
    path = models(name)
    options = {"threads": 1, "context": CONTEXT}
    file = _core.GgufFile(str(path))
    config, plan = _core.plan(file, **options)  # type: ignore[arg-type]
    resident = engine(path)
    assert (resident.config, resident.plan) == (config, plan)
    least = plan["least_memory"]
    for memory in (least, least + MEBIBYTE, least + 100 * MEBIBYTE):
        e = engine(path, memory)
        assert (e.config, e.plan) == _core.plan(file, memory=memory, **options)  # type: ignore[arg-type]
        assert e.plan["least_memory"] == least
        del e
    for load in (lambda m: engine(path, m), lambda m: _core.plan(file, memory=m, **options)):
        with pytest.raises(errors.BudgetError) as caught:
            load(least - 1)
        assert named_minimum(caught.value) == least


def test_work_is_what_a_token_reads(models: Callable[[str], Path]) -> None:
    for name in ("mixtral", "qwen2moe", "k-quants", "mixtral-split"):
        file = _core.GgufFile(str(models(name)))
        config, plan = _core.plan(file, context=CONTEXT)
        assert sum(w["bytes"] for w in plan["work"]) == plan["token_bytes"]
        layers = [w for w in plan["work"] if w["part"] != "output"]
        assert sum(w["weights"] for w in layers) == plan["layer_macs"]
        experts = [t for t in file.tensors if re.search(r"ffn_(gate|up|down)(_exps|\.\d)", t.name)]
        used = sum(w["bytes"] for w in plan["work"] if w["part"] == "experts")
        share = config["n_expert_used"] / config["n_expert"]
        # Rounded down for each layer and format.
        assert used == pytest.approx(sum(t.nbytes for t in experts) * share, abs=64)
        assert {w["format"] for w in plan["work"] if w["part"] == "experts"} == {
            t.type for t in experts
        }


def test_plan_refuses_what_a_load_refuses(models: Callable[[str], Path]) -> None:
    file = _core.GgufFile(str(models("mixtral")))
    for options, text in (
        ({"threads": -1}, "threads"),
        ({"context": 1 << 30}, "context"),
        ({"memory": -1}, "memory"),
        ({"kv_type": "f8"}, "kv_type"),
        ({"precision": "best"}, "precision"),
    ):
        with pytest.raises(errors.OptionError, match=text):
            _core.plan(file, **options)  # type: ignore[arg-type]


# Forecasts.


def subject_of(path: Path, **options: Any) -> ModelHeader:
    return ModelHeader(_core.GgufFile(str(path)), path.stem, context=CONTEXT, **options)


def test_more_slots_are_never_slower(models: Callable[[str], Path]) -> None:
    for name in ("olmoe", "smallthinker", "k-quants"):
        subject = subject_of(models(name), process_bytes=0)
        device = Device(PROFILE)
        least = forecast(subject, device, 1).least_memory
        found = [forecast(subject, device, least + step * (64 << 10)) for step in range(0, 40, 4)]
        assert all(f.fits for f in found)
        # A larger budget may give what it has more to a longer chunk of prompts, not to slots.
        speeds = [f.tokens_per_s for f in sorted(found, key=lambda f: f.slots)]
        assert speeds == sorted(speeds)
        assert found[-1].slots > found[0].slots
        assert all(0 <= f.hit_rate <= 1 for f in found if f.hit_rate is not None)
        everything = forecast(subject, device, None)
        assert everything.tokens_per_s >= speeds[-1]
        assert everything.times["flash"] == everything.bytes_token == 0


def test_a_budget_that_is_too_small_is_an_answer(models: Callable[[str], Path]) -> None:
    for name in ("mixtral", "llama"):
        subject = subject_of(models(name))
        found = forecast(subject, Device(PROFILE), 1000)
        assert not found.fits
        assert found.tokens_per_s == 0
        assert forecast(subject, Device(PROFILE), found.least_memory).fits
        assert not forecast(subject, Device(PROFILE), found.least_memory - 1).fits


def test_the_limiting_resource(models: Callable[[str], Path]) -> None:
    """A device that has much of all but one thing is limited by that."""
    subject = subject_of(models("olmoe"), process_bytes=0)
    least = forecast(subject, Device(PROFILE), 1).least_memory
    slow_disk = [{**r, "bytes_s": 1e5} for r in PROFILE["storage_reads"]]
    slow_memory = [{"threads": 2, "bytes_s": 1e6}]
    slow_kernels = [{**f, "row_weights_s": 1e6, "tile_ops_s": 1e6} for f in PROFILE["formats"]]
    for parts, expected in (
        ({"storage_reads": slow_disk}, "flash"),
        ({"memory_reads": slow_memory}, "memory bandwidth"),
        ({"formats": slow_kernels}, "arithmetic"),
    ):
        assert forecast(subject, Device(changed(**parts)), least).limited_by == expected
    f = forecast(subject, Device(changed(storage_reads=slow_disk)), least)
    assert f.token_s > 0.9 * f.times["flash"] * 0.5
    assert f.ttft_s == f.load_s + f.prompt_s


def test_the_budget_that_doubles(models: Callable[[str], Path]) -> None:
    subject = subject_of(models("k-quants"), process_bytes=0)
    slow_disk = [{**r, "bytes_s": r["bytes_s"] / 100} for r in PROFILE["storage_reads"]]
    device = Device(changed(storage_reads=slow_disk))
    f = forecast(subject, device, forecast(subject, device, 1).least_memory)
    assert f.doubles_at is not None
    assert forecast(subject, device, f.doubles_at).tokens_per_s >= 2 * f.tokens_per_s
    below = forecast(subject, device, f.doubles_at - 2 * MEBIBYTE)
    assert not below.fits or below.tokens_per_s < 2 * f.tokens_per_s
    assert forecast(subject, device, None).doubles_at is None


def test_weights_that_pass(tmp_path: Path) -> None:
    path = TinyMixture("llama", overrides={"n_embd": 256, "n_ff": 2048}).write(tmp_path)
    subject, device = subject_of(path, process_bytes=0), Device(PROFILE)
    whole = forecast(subject, device, None)
    least = forecast(subject, device, 1).least_memory
    found = [forecast(subject, device, least + i * 4 * MEBIBYTE) for i in range(3)]
    for f in found:
        assert f.fits and f.limited_by == "flash" and f.hit_rate is None
        plan = subject.plan(f.memory or 0, 2)[1]
        assert f.bytes_token == plan["streamed_bytes"]
        assert f.resident["streamed weights"] == plan["ring_bytes"]
        assert f.token_s >= f.times["flash"]
    assert found[0].bytes_token > found[1].bytes_token > found[2].bytes_token
    assert found[0].tokens_per_s < found[2].tokens_per_s < whole.tokens_per_s
    assert found[0].prompt_s > whole.prompt_s
    assert found[0].doubles_at is not None
    assert forecast(subject, device, found[0].doubles_at).token_s <= found[0].token_s / 2


def test_speeds_of_the_profile() -> None:
    device = Device(PROFILE)
    assert device.threads == 2
    assert device.memory_bytes_s == 10e9
    assert Device(PROFILE, 1).memory_bytes_s == 6e9
    assert Device(PROFILE, 3).memory_bytes_s == 10e9
    assert device.flash_bytes_s(1 << 20, 4) == pytest.approx(1e9)
    assert device.flash_bytes_s(1 << 24, 4) == 1e9
    assert device.flash_bytes_s(1 << 20, 1) == 0.5e9
    # On a line in the logarithms: a quarter of the size is half of the speed here.
    assert device.flash_bytes_s(1 << 18, 4) == pytest.approx(0.5e9)
    assert device.flash_bytes_s(1 << 15, 4) == pytest.approx(0.125e9)
    assert device.row_weights_s("Q8_0", 8.5) == 30e9
    assert device.row_weights_s("Q5_1", 6.0) == 40e9  # the nearest is Q4_0
    assert device.row_weights_s("F32", 32) == 10e9
    assert device.available == int(0.9 * (1 << 30))
    for part in ("memory_reads", "formats"):
        with pytest.raises(errors.OptionError, match="device profile"):
            Device(changed(**{part: []}))
    with pytest.raises(errors.OptionError, match="storage_reads"):
        Device(changed(storage_reads=[])).flash_bytes_s(4096, 1)


def test_turns_that_do_not_fit(models: Callable[[str], Path]) -> None:
    subject, device = subject_of(models("mixtral")), Device(PROFILE)
    with pytest.raises(errors.OptionError, match="prompt: expected 1 to"):
        forecast(subject, device, None, Workload(CONTEXT + 1))
    assert forecast(subject, device, None, Workload(CONTEXT - 3, 100)).tokens == 3
    slow = Device(changed(memory={**PROFILE["memory"], "fresh_bytes_s": 1e6}))
    later = forecast(subject, slow, None, Workload(20, 1, first=False))
    assert later.prompt_s == forecast(subject, device, None, Workload(20, 1)).prompt_s
    budget = later.least_memory
    first = forecast(subject, slow, budget, Workload(20, 1)).prompt_s
    assert first > forecast(subject, slow, budget, Workload(20, 1, first=False)).prompt_s
    longer = forecast(subject, device, None, Workload(150, 1)).prompt_s
    assert longer > forecast(subject, device, None, Workload(10, 1)).prompt_s


# Curves.


def test_a_curve_stands_for_itself() -> None:
    for c in hit_curves.curves():
        alone = [c]
        for i, share in enumerate(hit_curves.SHARES):
            got = hit_curves.miss_rate(
                share, c.n_expert, c.n_expert_used, origin=c.origin, tokens=16, among=alone
            )
            assert got == pytest.approx(c.miss[0][i], abs=2e-4)


def test_curves_fall() -> None:
    shares = np.linspace(0, 1, 41)
    for experts, used in ((8, 2), (64, 4), (128, 8), (512, 10)):
        for origin in hit_curves.ORIGINS:
            rates = [hit_curves.miss_rate(float(s), experts, used, origin=origin) for s in shares]
            assert rates[0] == 1
            assert all(a >= b - 1e-9 for a, b in pairwise(rates))
            warm = hit_curves.miss_rate(0.8, experts, used, origin=origin, tokens=2000)
            assert warm <= hit_curves.miss_rate(0.8, experts, used, origin=origin, tokens=16)
    with pytest.raises(errors.OptionError):
        hit_curves.miss_rate(0.5, 4, 8)


def test_origins() -> None:
    assert hit_curves.origin_of(None) == "trained"
    assert hit_curves.origin_of('{"router": "kmeans"}') == "upcycled"
    assert hit_curves.origin_of('{"router": "random"}') == "random"


def random_trace(n_layer: int = 3, n_expert: int = 8, used: int = 2, tokens: int = 96) -> Trace:
    """Decoded tokens only, skewed choices."""
    rng = np.random.default_rng(1)
    weights = 1 / np.arange(1, n_expert + 1)
    visits = tokens * n_layer
    experts = [
        rng.choice(n_expert, used, replace=False, p=weights / weights.sum()) for _ in range(visits)
    ]
    return Trace(
        n_layer,
        n_expert,
        used,
        np.repeat(np.arange(tokens), n_layer).astype(np.int64),
        np.tile(np.arange(n_layer), tokens).astype(np.int32),
        np.repeat(np.arange(tokens), n_layer).astype(np.int64),
        np.arange(0, visits * used + 1, used).astype(np.int64),
        np.concatenate(experts).astype(np.int32),
        np.full(visits * used, 0.5, np.float32),
        np.ones(tokens, np.bool_),
        np.ones(tokens, np.int64),
    )


def test_curve_of_a_trace() -> None:
    trace = random_trace()
    routing = hit_curves.of_trace(trace, prompt=32)
    assert (routing.prompt, len(routing.uses), routing.token) == (32, 96, [])
    visits = hit_curves.visits_of(routing)
    # All that fits is read once: by the prompt, or by the first token that uses it.
    uses, misses = hit_curves.misses(routing, visits, 24, "lru")
    assert uses == [16 * 6, 48 * 6, 0]
    before = {(layer, e) for use in routing.uses[:32] for layer, es in use.items() for e in es}
    after = {(layer, e) for use in routing.uses[32:] for layer, es in use.items() for e in es}
    assert sum(misses) == len(after - before)
    made = hit_curves.curve("test", "trained", [routing], "lru")
    assert made.miss[2] == made.miss[1]  # not reached
    for row in made.miss:
        assert list(row) == sorted(row, reverse=True)
    with pytest.raises(errors.OptionError, match="at least one text"):
        hit_curves.curve("test", "trained", [], "lru")


def test_routing_of_a_model(models: Callable[[str], Path]) -> None:
    """What is recorded is what the engine does: the same choices as a trace of the same tokens."""
    path = models("olmoe")
    (routing,) = hit_curves.of_model(path, ["abc " * 40], tokens=20)
    assert routing.prompt == hit_curves.PROMPT
    assert len(routing.uses) == len(routing.token) == hit_curves.PROMPT + 20
    for use in routing.uses:
        assert sorted(use) == list(range(routing.n_layer))
        assert all(len(set(e)) == routing.n_expert_used for e in use.values())
    # A prompt of one token at a time routes as the chunk does.
    plan = _core.plan(_core.GgufFile(str(path)), context=CONTEXT)[1]
    e = engine(path, plan["least_memory"] + 100 * MEBIBYTE)
    sequence = e.sequence()
    e.record_routing(True)
    for token in routing.token[:5]:
        sequence.eval([token])
    columns = e.take_routing()
    for t in range(5):
        for layer in range(routing.n_layer):
            here = (columns["evaluation"] == columns["evaluation"].min() + t) & (
                columns["layer"] == layer
            )
            assert columns["expert"][here].tolist() == routing.uses[t][layer]


# The commands.


def stoker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stoker.runtime.cli.main", "plan", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def profile_file(tmp_path: Path) -> str:
    path = tmp_path / "device.json"
    device_profile.save(PROFILE, path)
    return str(path)


def test_plan_command(models: Callable[[str], Path], profile_file: str) -> None:
    model = str(models("olmoe"))
    common = (model, "--device", profile_file, "--context", "128", "--memory", "1MB,300MB,auto")
    done = stoker(*common, "--json")
    assert done.returncode == 0, done.stderr
    found = [Forecast(**row) for row in json.loads(done.stdout)["forecasts"]]
    assert [f.fits for f in found] == [False, True, True]
    assert found[2].memory is None
    table = stoker(*common)
    assert table.returncode == 0
    assert "does not fit in 976.6 KiB: at least" in table.stdout
    for word in ("all in memory", "tok/s", "limited by", "experts in memory", "first token after"):
        assert word in table.stdout
    rows = [line.split("\t") for line in stoker(*common, "--tsv").stdout.splitlines()]
    assert len(rows) == 4
    assert len({len(row) for row in rows}) == 1
    assert [row[1] for row in rows] == ["fits", "False", "True", "True"]


def test_plan_command_refuses(models: Callable[[str], Path], profile_file: str) -> None:
    model = str(models("olmoe"))
    broken = Path(profile_file).with_name("broken.json")
    broken.write_text("{}")
    for arguments, text in (
        ((model, "--memory", "lots", "--device", profile_file), "memory must be bytes"),
        ((model, "--device", str(broken)), "expected a device profile"),
        ((model, "--device", "/nowhere.json"), "/nowhere.json"),
        ((model, "--json", "--tsv", "--device", profile_file), "exclude each other"),
        ((model, "--prompt-tokens", "0", "--device", profile_file), "prompt: expected 1 to"),
        (("/nowhere.gguf", "--device", profile_file), "no such file"),
    ):
        done = stoker(*arguments)
        assert done.returncode == 2, done.stderr
        assert text in done.stderr
        assert len(done.stderr.splitlines()) == 1


# The check.


def test_errors_are_shares_of_what_was_measured() -> None:
    assert forecast_check.error_of(6, 5) == forecast_check.error_of(4, 5) == 0.2
    assert forecast_check.error_of(3, 3) == 0


def test_budgets_of_the_check_fit(models: Callable[[str], Path]) -> None:
    wanted = [10 * MEBIBYTE, 60 * MEBIBYTE, 1 << 30, 2 << 30, 3 << 30]
    for name in ("olmoe", "k-quants", "llama"):
        found = forecast_check.budgets(models(name), wanted, CONTEXT, 1)
        assert len(found) == len(wanted)
        assert found == sorted(found)
        subject = subject_of(models(name), process_bytes=forecast_check.PROCESS_BYTES)
        for limit in found:
            budget = int(limit * forecast_check.BUDGET_SHARE)
            assert forecast(subject, Device(PROFILE), budget).fits


def test_check_again(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Forecasts of what was measured: medians of runs and of profiles."""
    path = models("olmoe")
    runs = [
        {
            "load_cold_s": 0.1,
            "prompts": [{"tokens": forecast_check.PROMPT, "ttft_s": s, "tok_s": 1}],
            "decode": {"tok_s": 100 / s, "bytes_token": None},
            "error": None,
        }
        for s in (1.0, 2.0, 4.0)
    ]
    profiles = []
    for factor in (1, 2, 30):
        profile = copy.deepcopy(PROFILE)
        for r in profile["memory_reads"]:
            r["bytes_s"] *= factor
        profiles.append(profile)
    assert forecast_check.median_profile(profiles)["memory_reads"][1]["bytes_s"] == 20e9
    results = tmp_path / "check.json"
    document = {"profiles": profiles, "cases": [{"model": path.name, "limit": None, "runs": runs}]}
    results.write_text(json.dumps(document))
    out = tmp_path / "out.json"
    argv = ["forecast_check", str(path), "--again", str(results), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    forecast_check.main()
    (case,) = json.loads(out.read_text())["cases"]
    assert case["decode_tok_s"] == 50
    assert case["ttft_s"] == 2.1
    expected = case["forecast"]["tokens_per_s"]
    lines = capsys.readouterr().out.splitlines()
    error = forecast_check.error_of(expected, 50)
    assert lines[-2] == f"decode: error median {error:.1%}, worst {error:.1%}, 1 cases"
