"""Weights that every token uses pass through memory where not all of them fit: exactly, inside the
budget, whatever the disk does."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stoker
from offload_models import (
    CONTEXT,
    MEBIBYTE,
    TinyMixture,
    engine,
    greedy,
    named_minimum,
    prompt,
    run,
)
from stoker.runtime import _core
from stoker.runtime.base import errors
from tiny_models import some_tokens

# Matrices of some hundred KB, as the smallest published models have them.
BIG = {"n_embd": 256, "n_ff": 1024, "n_ff_expert": 192, "n_ff_shared": 512}
MODELS: dict[str, TinyMixture] = {
    "llama": TinyMixture("llama", overrides=BIG),
    "llama-tied": TinyMixture("llama-tied", "Q8_0", overrides={**BIG, "n_ff": 3072}),
    "llama-shards": TinyMixture("llama", shard_tensors=4, overrides=BIG),
    "llama-odd": TinyMixture("llama", overrides={**BIG, "n_embd": 200, "n_ff": 1003}),
    "qwen2": TinyMixture("qwen2", "F16", overrides={**BIG, "n_ff": 2048}),
    "qwen3": TinyMixture("qwen3", overrides=BIG),
    "gemma3": TinyMixture("gemma3", "Q8_0", overrides={**BIG, "n_ff": 2048}),
    "mixtral": TinyMixture("mixtral", overrides={**BIG, "head_dim": 128}),
    "qwen2moe": TinyMixture("qwen2moe", overrides={**BIG, "n_ff_shared": 1024}),
    "smallthinker": TinyMixture("smallthinker", overrides={**BIG, "head_dim": 128}),
}
MIXTURES = ("mixtral", "qwen2moe", "smallthinker")
# Contexts that are no small part of the budget.
LONG = 1024
LONG_MODELS: dict[str, TinyMixture] = {
    f"{name}-long": TinyMixture(name, quant, overrides={**MODELS[name].overrides, "context": LONG})
    for name, quant in (("llama", "Q4_0"), ("gemma3", "Q8_0"), ("mixtral", "Q4_0"))
}


class Model:
    """A model, the budgets between which weights pass, and what the resident engine computes."""

    def __init__(self, path: Path, context: int = CONTEXT) -> None:
        self.path, self.context = path, context
        self.resident = engine(path, context=context)
        self.expected = run(self.resident)
        with pytest.raises(errors.BudgetError) as refused:
            engine(path, 1, context=context)
        self.least = named_minimum(refused.value)
        # The smallest budget in which nothing is streamed.
        low, high = self.least, self.least + (1 << 30)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (low, middle) if self.plan(middle)["streamed_bytes"] == 0 else (middle, high)
            )
        self.whole = high

    def plan(self, memory: int) -> dict[str, Any]:
        file = _core.GgufFile(str(self.path))
        return _core.plan(file, threads=1, context=self.context, memory=memory)[1]

    def part(self, share: float) -> int:
        return int(self.least + share * (self.whole - 1 - self.least))

    def engine(self, share: float, **options: Any) -> _core.Engine:
        return engine(self.path, self.part(share), **{"context": self.context, **options})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name in made:
            return made[name]
        folder = tmp_path_factory.mktemp(name)
        if name in LONG_MODELS:
            made[name] = Model(LONG_MODELS[name].write(folder), LONG)
        else:
            made[name] = Model(MODELS[name].write(folder))
        return made[name]

    return get


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_bit_for_bit(models: Any, name: str, share: float) -> None:
    model = models(name)
    script = f"null:delay=0..0.3ms,spike=2ms@0.02,reorder,seed={int(share * 10)}"
    for io, threads in ((script, 1), ("pread_pool", 2)):
        # The scratch of another thread comes on top.
        e = engine(model.path, model.part(share) + (threads - 1) * MEBIBYTE, io=io, threads=threads)
        if threads == 1:
            assert e.stream is not None and e.plan["streamed_bytes"] > 0
        t = e.sequence()
        for pieces in (1, 5):
            t.truncate(0)
            assert greedy(t, prompt(e), 16, pieces) == (
                model.expected if pieces == 1 else run(model.resident, pieces=pieces)
            )
        s = e.stream
        assert s is None or 0 < s["decode_bytes"] < s["bytes"]
        del t, e, s
        gc.collect()


@pytest.mark.parametrize("name", MODELS)
def test_plans_add_up(models: Any, name: str) -> None:
    model = models(name)
    last = None
    for share in np.linspace(0, 1, 30):
        memory = model.part(float(share))
        plan = model.plan(memory)
        kinds = ("process", "weight", "ring", "kv", "scratch", "slot", "margin")
        total = sum(plan[f"{kind}_bytes"] for kind in kinds)
        assert total <= memory
        # What is left over is less than what one read takes (and its share of rounding).
        assert memory - total < 3 * MEBIBYTE
        assert plan["streamed_bytes"] > 0 and plan["ring_bytes"] >= MEBIBYTE
        # But for the rounding to whole reads, and a chunk that has grown.
        assert last is None or plan["streamed_bytes"] < last["streamed_bytes"] + MEBIBYTE
        last = plan
    assert model.plan(model.whole)["streamed_bytes"] == 0
    with pytest.raises(errors.BudgetError, match="a ring for streamed weights"):
        model.plan(model.least - 1)


def test_a_token_reads_what_does_not_stay(models: Any) -> None:
    model = models("llama")
    e = model.engine(0.5)
    t = e.sequence()
    t.eval(prompt(e))
    before = e.stream["decode_bytes"]
    for _ in range(10):
        t.eval([3], "decode")
    read = (e.stream["decode_bytes"] - before) / 10
    streamed, lent = e.plan["streamed_bytes"], e.plan["kv_lent_bytes"]
    # And a row of the embeddings, in one page or two; a part of the lent weights has gone.
    assert streamed - lent < read <= streamed + 2 * 4096


def test_more_memory_reads_less(models: Any) -> None:
    model = models("llama")
    streamed = [model.plan(model.part(share))["streamed_bytes"] for share in (0.2, 0.5, 0.8, 1.0)]
    assert streamed == sorted(streamed, reverse=True)
    weights = sum(t.nbytes for t in _core.GgufFile(str(model.path)).tensors)
    assert streamed[-1] < weights / 4


def test_all_evaluations(models: Any) -> None:
    model = models("llama-tied")
    e = model.engine(0.3)
    tokens = prompt(e, n=90)
    ours, theirs = e.sequence(), model.resident.sequence()
    for name in ("eval_nll", "eval_hidden", "eval_all", "eval_taps"):
        ours.truncate(0)
        theirs.truncate(0)
        np.testing.assert_array_equal(getattr(ours, name)(tokens), getattr(theirs, name)(tokens))


def test_importance_sums(models: Any) -> None:
    model = models("llama")
    found = []
    for e in (model.engine(0.2), model.resident):
        sums = _core.ActivationSums(e)
        sums.eval(e.sequence(), prompt(e))
        found.append(sums.tensors)
    assert found[0].keys() == found[1].keys()
    for key, values in found[1].items():
        for ours, theirs in zip(found[0][key], values, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# What goes wrong.


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2moe"])
def test_failing_reads_never_change_a_token(models: Any, name: str) -> None:
    model = models(name)
    tokens = prompt(model.resident, n=60)
    expected = model.resident.sequence()
    expected.eval(tokens)
    failures = passed = 0
    for seed in range(200):
        try:
            e = model.engine(0.3, io=f"null:eio=0.01,short=0.005,delay=0..0.1ms,seed={seed}")
        except errors.DeviceError:
            continue
        t = e.sequence()
        while t.position < len(tokens):
            try:
                t.eval(tokens[t.position : t.position + 12])
            except errors.DeviceError as error:
                failures += 1
                assert ": expected " in str(error) and "\n" not in str(error)
                assert failures < 5000
        np.testing.assert_array_equal(t.logits(), expected.logits())
        passed += 1
        if passed >= 5 and failures > 5:
            break
    assert passed >= 5 and failures > 5


def test_cancelled_between_reads(models: Any) -> None:
    model = models("llama")
    e = model.engine(0.0, io="null:delay=2ms")
    t = e.sequence()
    tokens = prompt(e)
    timer = threading.Timer(0.03, t.cancel)
    timer.start()
    with pytest.raises(errors.Cancelled):
        for _ in range(50):
            t.truncate(0)
            t.eval(tokens)
    timer.join()
    t.truncate(0)
    assert greedy(t, tokens, 16) == model.expected


@pytest.mark.parametrize("name", LONG_MODELS)
def test_sessions_share_the_budget(models: Any, name: str) -> None:
    """What they have evaluated counts, not what they might: the last page is refused whole."""
    model = models(name)
    e = model.engine(0.5)
    kept = [e.sequence() for _ in range(1000)]
    assert e.sessions == (1000, 0)
    lent: list[int] = []
    with pytest.raises(errors.BudgetError, match=r"bytes more for the KV cache of 1000 sessions"):
        for t in kept:
            assert greedy(t, prompt(e), 16) == model.expected
            lent.append(e.sessions[1])
    n = len(lent)
    assert n > 1 and lent == sorted(lent) and lent[-1] > 0
    assert kept[n].position % 64 == 0  # where its next page would begin
    # The others go on, within their pages; what one leaves is the next one's.
    kept[0].eval([1])
    kept[n].truncate(0)
    del kept[n - 1], t
    assert greedy(kept[n - 1], prompt(e), 16) == model.expected
    kept.clear()
    assert run(e) == model.expected


def test_what_a_session_has_not_reached_holds_weights(models: Any) -> None:
    model = models("llama-long")
    e = model.engine(0.5)
    lent = e.plan["kv_lent_bytes"]
    assert 0 < lent <= e.plan["kv_bytes"]
    t, alone = e.sequence(), model.resident.sequence()
    read = []
    for token in some_tokens(e.plan["context"], seed=2) % e.config["n_vocab"]:
        before = e.stream["decode_bytes"]
        t.eval([token], "decode")
        alone.eval([token], "decode")
        assert t.logits().tobytes() == alone.logits().tobytes()
        read.append(e.stream["decode_bytes"] - before)
    # A token reads what is streamed but not lent, and a row of the embeddings in a page or two.
    streamed, row = e.plan["streamed_bytes"], 2 * 4096
    assert streamed - lent <= read[1] + lent / 2
    assert read[1] < read[-1] <= streamed + row
    assert streamed - lent / 8 < read[-1]
    # They are read again when it is gone.
    del t
    again = e.sequence()
    again.eval(prompt(e), "prompt")
    before = e.stream["decode_bytes"]
    again.eval([3], "decode")
    assert e.stream["decode_bytes"] - before < read[-1] - lent / 2


def test_gone_while_reading(models: Any) -> None:
    model = models("llama")
    for _ in range(20):
        e = model.engine(0.3, io="null:delay=5ms")
        del e
    e = model.engine(0.3, io="null:delay=1ms")
    t = e.sequence()
    t.eval([1, 2])
    del t, e
    gc.collect()


def test_a_file_that_shrinks(models: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(models("llama").path.read_bytes())
    model = models("llama")
    e = engine(path, model.part(0.0))
    t = e.sequence()
    t.eval([1, 2, 3])
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size // 2)
    with pytest.raises(errors.DeviceError, match="expected"):
        for _ in range(3):
            t.eval([4])


def test_bandwidth(models: Any) -> None:
    e = models("llama").engine(0.5)
    t = e.sequence()
    expected = models("llama").resident.sequence()
    for _ in range(2):
        assert e.flash_bandwidth(4 * MEBIBYTE) > 0
        t.eval([5, 6])
        expected.eval([5, 6])
        np.testing.assert_array_equal(t.logits(), expected.logits())


# The public interface.


def loaded(model: Model) -> stoker.Model:
    """The model in the budget that is named as the least."""
    with pytest.raises(errors.BudgetError) as refused:
        stoker.load(model.path, memory=1, threads=1, context=CONTEXT)
    memory = named_minimum(refused.value)
    return stoker.load(model.path, memory=memory, threads=1, context=CONTEXT)


def test_the_session_that_generate_keeps(models: Any) -> None:
    model = loaded(models("llama"))
    text = model.generate("the cat sat", temperature=0, max_tokens=4).read()
    session = model.session()
    others = [model.session() for _ in range(2)]
    for each in (session, *others):
        assert each.generate("the cat sat", temperature=0, max_tokens=4).read() == text
    del session, others, each
    gc.collect()
    assert model.generate("the cat sat", temperature=0, max_tokens=4).read() == text
    assert model.logits([1, 2, 3]).shape == (3, model.n_vocab)


def test_statistics_and_plan(models: Any) -> None:
    model = loaded(models("llama"))
    assert model.stream is not None and model.offload is None
    generation = model.generate("the cat sat", temperature=0, max_tokens=8)
    text = "".join(chunk.text for chunk in generation)
    resident = stoker.load(models("llama").path, threads=1, context=CONTEXT)
    assert text == resident.generate("the cat sat", temperature=0, max_tokens=8).read()
    s = generation.stats
    assert s.stream is not None and s.experts is None
    assert 0 < s.stream.decode_bytes < s.stream.bytes
    assert s.flash_bytes_per_token >= model.plan["streamed_bytes"]
    assert s.compute_s == pytest.approx(s.decode_s - s.stream.decode_stall_s)
    assert s.as_dict()["stream"]["bytes"] == s.stream.bytes
    assert any(line.startswith("streamed weights | flash ") for line in s.lines())
    model._memory_bandwidth = 2e10  # the model is too small to measure it with
    plan = model.forecast()
    assert plan.budget == model.plan["memory"] and plan.streamed == model.plan["streamed_bytes"]
    assert plan.times is not None
    assert plan.times["flash"] == pytest.approx(plan.streamed / plan.flash_bandwidth)
    rows = "\n".join(plan.lines())
    assert "streamed weights" in rows and "expert cache" not in rows
    used = plan.process + sum(plan.pinned.values()) + plan.ring + plan.kv + plan.scratch
    assert used + plan.margin <= plan.budget
    unread = replace(s, stream=None)
    assert unread.flash_bytes_per_token == 0 and len(unread.lines()) == 1
