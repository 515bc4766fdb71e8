"""Oracle 3: what is computed with experts on flash is what is computed with all in memory, bit for
bit, whatever the budget, policy, predictor, backend and the timing of reads."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offload_models import (
    BACKENDS,
    CONTEXT,
    DECODE,
    MEBIBYTE,
    MIXTURES,
    POLICIES,
    PREDICTORS,
    PROMPT,
    Model,
    consistent,
    engine,
    greedy,
    named_minimum,
    prompt,
    run,
)
from oracle import Oracle
from stoker.runtime import _core
from stoker.runtime.base import errors

SHARES = (0.0, 0.3, 0.7, 1.0)
DELAYS = "null:delay=0..0.5ms,spike=4ms@0.02,reorder,seed={}"


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name -> Model, each written when first asked for."""
    folder = tmp_path_factory.mktemp("mixtures")
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = Model(MIXTURES[name].write(folder / name))
        return made[name]

    return get


def usable(options: dict[str, Any], build: Any) -> _core.Engine:
    """The engine; skips where this machine forbids the backend."""
    try:
        return build(**options)
    except errors.OptionError as error:
        if options.get("io") == "uring" and "io_uring" in str(error):
            pytest.skip(str(error))
        raise


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_every_family_at_every_budget(mixtures: Any, name: str) -> None:
    model = mixtures(name)
    streamed = cached = False
    for i, share in enumerate(SHARES):
        e = model.offloaded(share, threads=2, io=DELAYS.format(i) if i % 2 else "pread_pool")
        streamed |= e.plan["slots"] < e.plan["experts"] and share == 0
        cached |= e.plan["slots"] == e.plan["experts"]
        # In pieces of 60, 20, 15, 12 tokens.
        for pieces in (1, i + 2):
            assert run(e, pieces=pieces) == model.expected(), (share, pieces, e.offload["io"])
        consistent(e.offload)
    assert cached
    assert streamed or name == "all-experts"


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_and_predictor(mixtures: Any, policy: str, predictor: str) -> None:
    prefetches = 0
    for seed, (name, share) in enumerate(
        itertools.product(("mixtral", "smallthinker", "qwen3moe"), (0.0, 0.3))
    ):
        model = mixtures(name)
        options = {"policy": policy, "predictor": predictor, "prefetch": "on"}
        options["io"] = DELAYS.format(seed)
        e = model.offloaded(share, **options)
        for prompt_seed in (0, 1):
            assert run(e, seed=prompt_seed) == model.expected(prompt_seed), (name, share)
        consistent(e.offload)
        assert e.offload["evictions"] > 0
        prefetches += e.offload["prefetches"]
    assert (prefetches > 0) == (predictor != "none")


@pytest.mark.parametrize("prefetch", ["off", "on", "auto"])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_prefetch_modes_through_the_trials_of_auto(
    mixtures: Any, predictor: str, prefetch: str
) -> None:
    # Long enough for the controller to try the other side several times.
    decode = CONTEXT - PROMPT - 1
    model = mixtures("olmoe")
    options = {"predictor": predictor, "prefetch": prefetch, "io": DELAYS.format(5)}
    e = model.offloaded(0.3, **options)
    assert run(e, decode=decode) == model.expected(decode=decode)
    consistent(e.offload)
    if prefetch == "off":
        assert e.offload["prefetches"] == 0
        assert e.offload["prefetch"] == "off"


@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("io", BACKENDS)
def test_every_backend(mixtures: Any, io: str, direct: bool, readers: int) -> None:
    for name, share in (("mixtral", 0.0), ("qwen3moe-shards", 0.4)):
        model = mixtures(name)
        options = {"io": io, "readers": readers, "direct": direct}
        e = usable(options, lambda model=model, share=share, **o: model.offloaded(share, **o))
        assert io in e.offload["io"]
        assert run(e) == model.expected()


def test_the_real_smallthinker(shared_data: Path) -> None:
    path = shared_data / "models" / "tiny-smallthinker-Q4_0.gguf"
    if not path.is_file():
        pytest.skip(f"no {path}")
    model = Model(path)
    for seed, (share, policy) in enumerate(itertools.product((0.0, 0.25), POLICIES)):
        e = model.offloaded(share, policy=policy, io=DELAYS.format(seed))
        assert run(e) == model.expected(), (share, policy)
        consistent(e.offload)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_threads_and_kv_types(mixtures: Any, threads: int, kv_type: str) -> None:
    model = mixtures("qwen2moe")
    options = {"threads": threads, "kv_type": kv_type}
    expected = run(engine(model.path, **options))
    for share in (0.1, 0.5):
        assert run(model.offloaded(share, **options)) == expected
    if kv_type == "f16":
        assert expected == model.expected()


@pytest.mark.parametrize("precision", ["fast", "balanced", "high"])
def test_precisions(mixtures: Any, precision: str) -> None:
    model = mixtures("k-quants")
    expected = run(engine(model.path, precision=precision))
    assert run(model.offloaded(0.2, precision=precision)) == expected


# --- sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "smallthinker"])
def test_timelines_in_turns(mixtures: Any, name: str) -> None:
    model = mixtures(name)
    # Two more KV caches come out of the expert cache, in whole slots.
    memory = model.budgets.part(0.2) + 20 * model.resident.plan["kv_bytes"]
    e = engine(model.path, memory, io=DELAYS.format(3), prefetch="on")
    sequences = [e.sequence() for _ in range(3)]
    logits: list[list[bytes]] = [[] for _ in sequences]
    made = [0] * 3
    tokens: list[list[int]] = [[] for _ in sequences]
    for i, t in enumerate(sequences):
        rows = t.eval_all(prompt(e, seed=i))
        logits[i].append(rows.tobytes())
        made[i] = int(rows[-1].argmax())
    for _ in range(DECODE):
        for i, t in enumerate(sequences):
            tokens[i].append(made[i])
            row = t.eval_all([made[i]])
            logits[i].append(row.tobytes())
            made[i] = int(row[0].argmax())
    for i in range(3):
        all_tokens = np.array([*tokens[i], made[i]], np.int32)
        assert b"".join(logits[i]) + all_tokens.tobytes() == model.expected(seed=i)


def test_truncate_and_go_on(mixtures: Any) -> None:
    model = mixtures("qwen3moe")

    def routing(e: _core.Engine) -> bytes:
        t = e.sequence()
        parts = [greedy(t, prompt(e), 8)]
        for position, seed in ((31, 4), (50, 5), (0, 6)):
            t.truncate(position)
            parts.append(greedy(t, prompt(e, seed, 23), 5))
        return b"".join(parts)

    assert routing(model.offloaded(0.1)) == routing(model.resident)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("prefetch", ["off", "on"])
def test_cancel_in_a_slow_prompt_then_go_on(mixtures: Any, prefetch: str, share: float) -> None:
    model = mixtures("mixtral")
    e = model.offloaded(share, io="null:delay=2..8ms,reorder,seed=2", prefetch=prefetch)
    t = e.sequence()
    tokens = prompt(e)
    t.eval(tokens[:7])
    cancelled = 0
    # Where the prompt ended before the timer came round, again.
    for pause in itertools.islice(itertools.cycle((0.0, 0.005, 0.02, 0.04)), 200):
        timer = threading.Timer(pause, t.cancel)
        timer.start()
        try:
            t.eval(tokens[t.position :])
        except errors.Cancelled:
            cancelled += 1
        timer.join()
        if t.position == len(tokens):
            t.truncate(7)
        if cancelled == 4:
            break
    assert cancelled == 4
    # One that came after the end would cancel what follows.
    try:
        t.eval(tokens[t.position :])
    except errors.Cancelled:
        t.eval(tokens[t.position :])
    rows = [t.logits()]
    expected = model.resident.sequence()
    expected.eval(tokens)
    np.testing.assert_array_equal(rows[0], expected.logits())
    for _ in range(8):
        token = int(t.logits().argmax())
        t.eval([token])
        expected.eval([token])
        np.testing.assert_array_equal(t.logits(), expected.logits())
    consistent(e.offload, interrupted=True)


def test_emptied_cache(mixtures: Any) -> None:
    model = mixtures("olmoe")
    e = model.offloaded(0.6, predictor="none", policy="lru")
    assert run(e) == model.expected()
    first = e.offload
    e.empty_cache()
    assert run(e) == model.expected()
    second = e.offload
    # From cold again: the same misses as from the start.
    assert second["misses"] == 2 * first["misses"]
    e.empty_cache()
    before = e.offload["hits"]
    t = e.sequence()
    t.eval([1])
    assert e.offload["hits"] == before


# --- plan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_the_plan_adds_up(mixtures: Any, name: str) -> None:
    model = mixtures(name)
    b = model.budgets
    last = slot_bytes = 0
    for step in range(24):
        memory = b.part(step / 20)
        plan = engine(model.path, memory).plan
        parts = ("process", "weight", "kv", "scratch", "margin", "slot")
        total = sum(plan[f"{p}_bytes"] for p in parts)
        assert plan["memory"] == memory
        assert total <= memory, {p: plan[f"{p}_bytes"] for p in parts}
        assert plan["margin_bytes"] >= 12 * MEBIBYTE
        assert 0 < plan["slots"] <= plan["experts"]
        assert plan["streams"] == (plan["slots"] < plan["working_set"])
        e = engine(model.path)
        layers = sum(router is not None for router in e.routers)
        assert plan["experts"] == layers * e.config["n_expert"]
        assert plan["working_set"] == layers * e.config["n_expert_used"]
        if plan["chunk"] == last:
            assert plan["slot_bytes"] >= slot_bytes
        last, slot_bytes = plan["chunk"], plan["slot_bytes"]
        # Nothing to speak of is left over.
        if plan["slots"] < plan["experts"]:
            assert memory - total < 400 * 1024
    assert plan["slots"] == plan["experts"]


@pytest.mark.parametrize("context", [32, CONTEXT, 256])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_minimum_that_is_named_works(mixtures: Any, name: str, context: int) -> None:
    path = mixtures(name).path
    named = set()
    for asked in (1, 5 * MEBIBYTE, 12 * MEBIBYTE):
        with pytest.raises(errors.BudgetError, match="smaller context") as raised:
            engine(path, asked, context=context)
        named.add(named_minimum(raised.value))
    # The same whatever was asked for, neither more nor less than it takes.
    (least,) = named
    assert engine(path, least, context=context).plan["memory"] == least
    with pytest.raises(errors.BudgetError) as raised:
        engine(path, least - 1, context=context)
    assert named_minimum(raised.value) == least


def test_process_bytes_count(mixtures: Any) -> None:
    model = mixtures("mixtral")
    more = 3 * MEBIBYTE
    alone = engine(model.path, model.budgets.least).plan["process_bytes"]  # the token history
    e = engine(model.path, model.budgets.least + more, process_bytes=more)
    assert e.plan["process_bytes"] == alone + more
    with pytest.raises(errors.BudgetError):
        engine(model.path, model.budgets.least + more - 1, process_bytes=more)


def test_a_dense_model_fits_or_not(tmp_path: Path) -> None:
    from tiny_models import make

    path = make(tmp_path / "dense.gguf", "llama")
    with pytest.raises(errors.BudgetError) as raised:
        engine(path, 4 * MEBIBYTE)
    least = named_minimum(raised.value)
    with pytest.raises(errors.BudgetError):
        engine(path, least - 1)
    with pytest.raises(errors.OptionError, match="memory"):
        engine(path, -1)
    e = engine(path, least)
    assert e.offload is None
    assert run(e) == run(engine(path))
    with pytest.raises(errors.OptionError, match="resident"):
        e.take_routing()


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "mru"},
        {"predictor": "crystal_ball"},
        {"prefetch": "perhaps"},
        {"io": "floppy"},
        {"io": "pread_pool:delay=1ms"},
        {"io": "null:delay=5..1ms"},
        {"readers": 0},
        {"readers": 100000},
    ],
    ids=str,
)
def test_unknown_options_are_refused(mixtures: Any, options: dict[str, Any]) -> None:
    with pytest.raises(errors.OptionError, match=r"expected .*found"):
        mixtures("mixtral").offloaded(0.5, **options)


# --- statistics and traces ------------------------------------------------------------------------


def recorded(e: _core.Engine, decode: int = DECODE) -> dict[str, np.ndarray]:
    e.record_routing(True)
    run(e, decode=decode)
    trace = e.take_routing()
    e.record_routing(False)
    return trace


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["mixtral", "smallthinker", "olmoe"])
def test_counters_agree_with_the_trace(mixtures: Any, name: str, share: float) -> None:
    e = mixtures(name).offloaded(share, prefetch="on", io=DELAYS.format(9))
    trace = recorded(e)
    counts = e.offload
    consistent(counts)
    c = e.config
    assert len(trace["layer"]) == (PROMPT + DECODE) * c["n_layer"] * c["n_expert_used"]
    # An expert of a layer is acquired once an evaluation, however many tokens chose it.
    acquired = {}
    keys = zip(*(trace[k].tolist() for k in ("evaluation", "layer", "expert")), strict=True)
    for key, source, wait in zip(keys, trace["source"], trace["wait_us"], strict=True):
        assert acquired.setdefault(key, (source, wait)) == (source, wait)
        assert wait >= 0 and (wait == 0 or source != 1)
    for kind, source in (("misses", 0), ("hits", 1), ("late", 2)):
        assert counts[kind] == sum(s == source for s, _ in acquired.values()), kind
    decode = trace["tokens"] == 1
    rows = np.stack([trace[k][decode] for k in ("evaluation", "layer", "expert")])
    assert rows.shape[1] == np.unique(rows, axis=1).shape[1]
    for kind, source in (("misses", 0), ("hits", 1), ("late", 2)):
        assert counts[f"decode_{kind}"] == np.count_nonzero(trace["source"][decode] == source)
    uses = np.zeros(c["n_layer"], int)
    for _, layer, _ in acquired:
        uses[layer] += 1
    assert uses.tolist() == counts["layer_uses"]
    assert set(trace["rank"].tolist()) == set(range(c["n_expert_used"]))
    if share == 1.0:
        assert counts["evictions"] == 0
        e.record_routing(True)
        before = e.offload
        run(e)
        assert e.offload["misses"] == before["misses"]
        assert e.offload["read_bytes"] == before["read_bytes"]
        assert set(e.take_routing()["source"].tolist()) == {1}


def test_bytes_are_counted_once(mixtures: Any) -> None:
    # Demand only, from the same budget twice: what the backend read is what the store booked.
    for name in ("mixtral", "olmoe"):
        e = mixtures(name).offloaded(0.2, predictor="none")
        at_load = e.offload["read_bytes"]
        run(e)
        counts = e.offload
        assert counts["prefetch_bytes"] == counts["prefetches"] == 0
        read = counts["read_bytes"] - at_load
        # The last page of a file is not whole.
        assert 0 <= counts["demand_bytes"] - read <= 4096 * counts["misses"]
        assert counts["demand_bytes"] >= counts["misses"] * 4096


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe-odd-sizes", "smallthinker"])
def test_the_trace_is_the_oracles_routing(mixtures: Any, name: str) -> None:
    model = mixtures(name)
    e = model.offloaded(0.3)
    tokens = prompt(e)
    oracle = Oracle(model.path)
    oracle.logits(tokens)
    e.record_routing(True)
    e.sequence().eval(tokens)
    trace = e.take_routing()
    # Tokens are numbered within their chunk.
    first = {v: i for i, v in enumerate(dict.fromkeys(trace["evaluation"].tolist()))}
    chunk = np.array([first[v] for v in trace["evaluation"].tolist()])
    token = trace["token"] + chunk * e.plan["chunk"]
    used = e.config["n_expert_used"]
    for layer, route in enumerate(oracle.routes):
        of_layer = trace["layer"] == layer
        order = np.lexsort((trace["rank"][of_layer], token[of_layer]))
        experts = trace["expert"][of_layer][order].reshape(len(tokens), used)
        weights = trace["weight"][of_layer][order].reshape(len(tokens), used)
        np.testing.assert_array_equal(np.sort(experts, 1), np.sort(route.experts, 1))
        by_expert = np.argsort(experts, 1)
        oracle_by_expert = np.argsort(route.experts, 1)
        np.testing.assert_allclose(
            np.take_along_axis(weights, by_expert, 1),
            np.take_along_axis(route.weights, oracle_by_expert, 1),
            atol=0.02,
        )


def test_the_trace_does_not_depend_on_the_cache(mixtures: Any) -> None:
    model = mixtures("k-quants")
    a = recorded(model.offloaded(0.0, policy="lru", predictor="none"))
    b = recorded(model.offloaded(1.0, io=DELAYS.format(4)))
    decode = {k: (a[k][a["tokens"] == 1], b[k][b["tokens"] == 1]) for k in a}
    for column in ("layer", "rank", "expert", "weight"):
        np.testing.assert_array_equal(*decode[column])


def test_recording_can_stop(mixtures: Any) -> None:
    e = mixtures("mixtral").offloaded(0.5)
    run(e)
    assert len(e.take_routing()["layer"]) == 0
    e.record_routing(True)
    run(e)
    e.record_routing(False)
    assert len(e.take_routing()["layer"]) == 0
    run(e)
    assert len(e.take_routing()["layer"]) == 0


def test_statistics_can_be_read_while_it_runs(mixtures: Any) -> None:
    model = mixtures("mixtral")
    e = model.offloaded(0.2, io=DELAYS.format(1), prefetch="on")
    done = threading.Event()
    seen: list[int] = []

    def watch() -> None:
        while not done.is_set():
            counts = e.offload
            seen.append(counts["hits"] + counts["late"] + counts["misses"])
            assert isinstance(counts["prefetch"], str)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        assert run(e) == model.expected()
    done.set()
    watcher.join()
    assert seen == sorted(seen)
