"""Many answers at once: each is what it is alone, whoever it shares forward passes with."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stoker
from commands import command, finish
from offload_models import MEBIBYTE, TinyMixture, named_minimum
from stoker.runtime.scheduler import LEAST_PROMPT, PromptTime

CONTEXT = 4096  # tokens; budgets hold so many, in answers of any number
WORDS = ("the", "cat", "sat", "on")
PROMPTS = [" ".join(words) for words in itertools.permutations(WORDS, 3)]
OPTIONS: dict[str, Any] = {"temperature": 0.8, "seed": 5, "max_tokens": 20, "ignore_eos": True}


def load(folder: Path, kind: str = "resident", context: int = CONTEXT) -> stoker.Model:
    """A model of a kind; unless resident, in a budget of little more than one context."""
    variant = "mixtral" if kind == "offloaded" else "llama"
    sizes = {"n_embd": 256, "n_ff": 1024} if kind == "streamed" else {}
    path = TinyMixture(variant, overrides={"context": context, **sizes}).write(folder)
    if kind == "resident":
        return stoker.load(path, threads=2)
    with pytest.raises(stoker.BudgetError) as refused:
        stoker.load(path, threads=2, memory=1)
    return stoker.load(path, threads=2, memory=named_minimum(refused.value) + MEBIBYTE // 4)


def alone(model: stoker.Model, prompts: list[str] = PROMPTS, **options: Any) -> list[str]:
    chosen = {**OPTIONS, **options}
    return [model.session().generate(prompt, **chosen).read() for prompt in prompts]


@pytest.fixture(scope="module", params=["resident", "offloaded", "streamed"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(tmp_path_factory.mktemp(request.param), request.param)


def test_generate_many(model: stoker.Model) -> None:
    expected = alone(model)
    scheduler = model._scheduler
    rows, shared = scheduler.rows, scheduler.shared
    answers = model.generate_many(PROMPTS, **OPTIONS)
    told = [""] * len(PROMPTS)
    for index, chunk in answers:
        told[index] += chunk.text
    assert told == expected == answers.read()
    assert scheduler.rows - rows >= 19 * len(PROMPTS)
    assert scheduler.shared > shared  # they have met
    assert model.engine.sessions[0] <= 1 + len(answers)
    figures = [g.stats for g in answers.generations if g is not None]
    assert [f.new_tokens for f in figures] == [20] * len(PROMPTS)
    assert all(f.decode_tokens == 19 for f in figures)


def test_sessions_of_several_threads(model: stoker.Model) -> None:
    expected = alone(model)
    found: dict[int, str] = {}
    sessions = [model.session() for _ in PROMPTS]
    start = threading.Barrier(len(PROMPTS))
    scheduler = model._scheduler
    rows, shared = scheduler.rows, scheduler.shared

    def work(i: int) -> None:
        start.wait()
        found[i] = sessions[i].generate(PROMPTS[i], **OPTIONS).read()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(PROMPTS))] == expected
    assert scheduler.rows - rows == 19 * len(PROMPTS) and scheduler.shared > shared


def test_async_for(model: stoker.Model) -> None:
    expected = alone(model)

    async def read(prompt: str) -> str:
        text = ""
        async for chunk in model.session().generate(prompt, **OPTIONS):
            text += chunk.text
        return text

    async def main() -> list[str]:
        return list(await asyncio.gather(*map(read, PROMPTS)))

    assert asyncio.run(main()) == expected


def test_a_cancelled_task_ends_its_answer(model: stoker.Model) -> None:
    async def main() -> stoker.Generation:
        generation = model.session().generate("the cat", **{**OPTIONS, "max_tokens": 400})

        async def read() -> None:
            async for _ in generation:
                pass

        task = asyncio.create_task(read())
        while not generation.tokens and not task.done():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        until = time.monotonic() + 10
        while generation.finish_reason is None and time.monotonic() < until:
            await asyncio.sleep(0.001)  # a step that goes on ends it
        return generation

    generation = asyncio.run(main())
    assert generation.finish_reason == "cancelled" and len(generation.tokens) < 400


@pytest.mark.parametrize("seed", [None, 7])
def test_samples_share_their_prompt(model: stoker.Model, seed: int | None) -> None:
    prompts = [" ".join(PROMPTS[:8]), "the cat"]
    answers = model.generate_many(prompts, n=3, **{**OPTIONS, "seed": seed})
    texts = answers.read()
    assert len(texts) == len(answers) == 6
    for i, text in enumerate(texts):
        generation = answers.generations[i]
        assert generation is not None
        assert seed is None or generation.seed == seed + i % 3
        assert generation.stats.reused_tokens == generation.stats.prompt_tokens > 0
        again = alone(model, [prompts[i // 3]], seed=generation.seed)
        assert again == [text]
    assert len(set(texts[:3])) == 3


def test_conversations_and_tokens(model: stoker.Model) -> None:
    ids = model.tokenizer.encode("the cat sat", add_special=True)
    prompts: list[Any] = [[{"role": "user", "content": "the cat"}], ids, "the cat sat"]
    found = model.generate_many(prompts, **OPTIONS).read()
    assert found[1] == found[2] == alone(model, ["the cat sat"])[0]
    assert found[0] == model.session().chat(prompts[0], **OPTIONS).read()
    assert model.generate_many([], **OPTIONS).read() == []


@pytest.mark.parametrize("kind", ["offloaded", "streamed"])
def test_more_than_the_memory_holds(tmp_path: Path, kind: str) -> None:
    """Answers whose pages do not fit begin again when others have ended."""
    model = load(tmp_path, kind, context=512)
    prompts = [" ".join(PROMPTS[i:] + PROMPTS[:i])[:700] for i in range(6)]
    expected = alone(model, prompts)
    session = model.session()
    session.append(prompts[0])
    assert 64 < session.position < 512 / 2
    del session
    answers = model.generate_many(prompts, **OPTIONS)
    told = [""] * len(prompts)
    for index, chunk in answers:
        told[index] += chunk.text
    assert told == expected
    # And where one alone does not fit.
    kept = []
    with pytest.raises(stoker.BudgetError):
        for _ in range(100):
            kept.append(model.session())
            kept[-1].append(prompts[0])
    with pytest.raises(stoker.BudgetError):
        model.generate_many(prompts[:1], **OPTIONS).read()
    kept.clear()
    assert model.generate_many(prompts[:1], **OPTIONS).read() == expected[:1]


def test_an_error_ends_all(model: stoker.Model) -> None:
    long = " ".join(PROMPTS * 40)
    with pytest.raises(stoker.ContextLengthError):
        model.generate_many([*PROMPTS, long], **OPTIONS).read()
    with pytest.raises(stoker.OptionError, match="n must be between 1 and"):
        model.generate_many(PROMPTS, n=0)
    with pytest.raises(stoker.OptionError, match="prompts must be"):
        model.generate_many("a text")  # type: ignore[arg-type]
    assert alone(model, PROMPTS[:1])[0]


def test_left_early(model: stoker.Model) -> None:
    expected = alone(model, PROMPTS[:1])
    with model.generate_many(PROMPTS, **{**OPTIONS, "max_tokens": 400}) as answers:
        for _ in answers:
            break
    for generation in answers.generations:
        assert generation is None or generation.finish_reason in ("cancelled", None)
    assert alone(model, PROMPTS[:1]) == expected


def test_an_interrupt_is_one_thread_s(model: stoker.Model, monkeypatch: Any) -> None:
    """Ctrl-C in the thread that leads: the others' answers go on with another leader."""
    expected = alone(model)
    scheduler = model._scheduler
    real, calls = scheduler._pass, itertools.count()

    def interrupted(*arguments: Any) -> None:
        if next(calls) == 12:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(scheduler, "_pass", interrupted)
    found: dict[int, str | None] = {}

    def work(i: int) -> None:
        generation = model.session().generate(PROMPTS[i], **OPTIONS)
        try:
            found[i] = generation.read()
        except KeyboardInterrupt:
            found[i] = None
            assert generation.finish_reason == "cancelled"

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(PROMPTS))].count(None) == 1
    assert all(found[i] in (None, expected[i]) for i in range(len(PROMPTS)))
    assert not scheduler._waiting and not scheduler._led


# Ranks.


def test_rank(model: stoker.Model) -> None:
    candidates = ["mat", " mat", " dog and the cat", " a"]
    scores = model.rank("the cat sat on the", candidates)
    for candidate, score in zip(candidates, scores, strict=True):
        ids = model.tokenizer.encode("the cat sat on the" + candidate, add_special=True)
        logits = model.logits(ids).astype(np.float64)
        logp = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        logp -= logits.max(1, keepdims=True)
        own = [logp[i, ids[i + 1]] for i in range(len(ids) - 1)][-score.tokens :]
        assert score.logprob == pytest.approx(sum(own), rel=1e-9)
        assert score.per_token == score.logprob / score.tokens
    assert model.rank("the cat", []) == []
    with pytest.raises(stoker.OptionError, match="not empty"):
        model.rank("the cat", ["", " sat"])


# The command.


def stoker_cli(*arguments: str) -> Any:
    return finish(command(*arguments))


def test_batch(tmp_path: Path) -> None:
    model = load(tmp_path)
    source, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [{"prompt": prompt} for prompt in PROMPTS]
    lines[3] = {"id": "mine", "messages": [{"role": "user", "content": "the cat"}]}  # type: ignore[dict-item]
    source.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    arguments = ("batch", str(model.path), str(source), "--out", str(out))
    options = ("--temperature", "0", "-n", "12", "--ignore-eos", "--parallel", "5")
    done = stoker_cli(*arguments, *options)
    assert done.returncode == 0, done.stderr
    assert f"{len(lines)} answers, {len(lines)} of them now" in done.stderr
    whole = out.read_bytes().splitlines(keepends=True)
    answers = {a["id"]: a for a in map(json.loads, whole)}
    assert set(answers) == {str(i + 1) for i in range(len(lines))} - {"4"} | {"mine"}
    expected = alone(model, temperature=0, seed=None, max_tokens=12)
    for i, text in enumerate(expected):
        if i != 3:
            assert answers[str(i + 1)]["text"] == text
    assert answers["1"]["finish_reason"] == "length"
    # Interrupted in the middle of a line.
    out.write_bytes(b"".join(whole[:7]) + whole[7][:20])
    again = stoker_cli(*arguments, *options)
    assert again.returncode == 0 and f"{len(lines) - 7} of them now" in again.stderr
    assert {a["id"]: a["text"] for a in map(json.loads, out.read_bytes().splitlines())} == {
        key: a["text"] for key, a in answers.items()
    }
    assert "0 of them now" in stoker_cli(*arguments, *options).stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: expected JSON"),
        ("[]", 'expected an object with "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'expected an object with "prompt" or "messages"'),
        ('{"prompt": "a", "max_tokens": 3}', "found 'max_tokens'"),
        ('{"prompt": 3}', "expected a text, or a list of messages"),
        ('{"messages": []}', "expected a text, or a list of messages"),
        ('{"id": 1, "prompt": "a"}', "the id '1' is that of an earlier line"),
    ],
)
def test_batch_refuses(tmp_path: Path, line: str, said: str) -> None:
    source, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "a"}\n' + line + "\n")
    done = stoker_cli("batch", "smollm2", str(source), "--out", str(out))
    assert done.returncode == 2 and said in done.stderr
    assert not out.exists()
    source.write_text('{"prompt": "a"}\n')
    out.write_text("something else\n")
    done = stoker_cli("batch", "smollm2", str(source), "--out", str(out))
    assert done.returncode == 2 and "line 1 is no answer" in done.stderr
    assert out.read_text() == "something else\n"


# How long prompts take.


def test_prompt_time() -> None:
    times = PromptTime()
    assert times.rows(1.0) == 2 * LEAST_PROMPT
    times.add(16, 0.032)
    assert times.rows(0.1) == 50  # in proportion
    for rows in (8, 64, 32, 8, 128):
        times.add(rows, 0.01 + 0.001 * rows)
    for _ in range(60):
        for rows in (8, 64, 32):
            times.add(rows, 0.01 + 0.001 * rows)
    assert times.rows(0.1) == pytest.approx(90, abs=1)
    assert times.rows(0.001) == LEAST_PROMPT
