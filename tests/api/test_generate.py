"""Generation on a model whose words the test decides: stops, streaming, history, cancellation."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_core
import pytest
from stoker.runtime.base.errors import Cancelled, ContextLengthError, OptionError
from stoker.runtime.generate import Generation
from stoker.runtime.model import Model
from stoker.runtime.options import GenerationOptions, LoadOptions


@pytest.fixture(autouse=True)
def core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "stoker.runtime._core", fake_core)
    monkeypatch.setattr(fake_core.Sampler, "made", [])
    yield


def reciting(
    monkeypatch: pytest.MonkeyPatch, story: str | bytes, *, context: int = 500, delay: float = 0.0
) -> Model:
    monkeypatch.setattr(
        fake_core.Engine, "story", story.encode() if isinstance(story, str) else story
    )
    monkeypatch.setattr(fake_core.Engine, "delay", delay)
    return Model(Path("recital.gguf"), LoadOptions(context=context))


def evaluated(session: Any) -> list[int]:
    return session._sequence.evaluated  # type: ignore[no-any-return]


# Stop strings.


@pytest.mark.parametrize(
    ("story", "stops", "text", "matched"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("one two three", ["twx", "thr"], "one two ", "thr"),
        ("aaab", ["aab"], "a", "aab"),
        ("sea 🌊 wave", ["🌊 w"], "sea ", "🌊 w"),
        ("größe", ["ß"], "grö", "ß"),
        ("the end", ["end."], "the end", None),
        ("abc", ["abcd", "c"], "ab", "c"),
        ("x", ["x"], "", "x"),
    ],
)
def test_stop_strings(
    monkeypatch: pytest.MonkeyPatch, story: str, stops: list[str], text: str, matched: str | None
) -> None:
    generation = reciting(monkeypatch, story).chat("?", stop=stops)
    shown = ""
    for chunk in generation:
        shown += chunk.text
        assert text.startswith(shown)  # no part of a stop string was ever shown
    assert generation.text == shown == text
    assert generation.finish_reason == "stop"
    assert generation.stop_string == matched


def test_characters_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    story = "naïve 🙂 末"
    chunks = list(reciting(monkeypatch, story).chat("?"))
    assert "".join(c.text for c in chunks) == story
    assert len(chunks) == len(story.encode())
    assert all("\ufffd" not in c.text for c in chunks)


def test_cut_off_character_is_replaced_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reciting(monkeypatch, "a🙂")
    cut = model.chat("?", max_tokens=3)
    assert cut.read() == "a\ufffd"
    assert cut.finish_reason == "length"
    ended = reciting(monkeypatch, "a🙂".encode()[:3]).chat("?")
    chunks = list(ended)
    assert ended.text == "a\ufffd"
    assert chunks[-1].token is None  # the last chunk has only text that was held back
    assert len(ended.tokens) == 3


def test_held_text_comes_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = reciting(monkeypatch, "abc").chat("?", stop="cd")
    assert [(c.text, c.token) for c in generation] == [
        ("a", ord("a")), ("b", ord("b")), ("", ord("c")), ("c", None),
    ]  # fmt: skip
    assert generation.finish_reason == "stop"


# How it ends.


def test_finish_reason_comes_with_the_last_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = reciting(monkeypatch, "abcdef").chat("?", max_tokens=2)
    next(generation)
    assert generation.finish_reason is None
    next(generation)
    assert generation.finish_reason == "length"
    with pytest.raises(StopIteration):
        next(generation)


def test_no_tokens_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "abc").session()
    generation = session.chat("?", max_tokens=0)
    assert list(generation) == []
    assert generation.finish_reason == "length"
    assert session.position == 3  # the prompt is evaluated


def test_context_full(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "abcdefghij", context=8).session()
    generation = session.generate("abc<|answer|>")
    # The last token needs no room: it is chosen, but not evaluated.
    assert generation.read() == "abcde"
    assert generation.finish_reason == "length"
    assert session.position == 8
    with pytest.raises(ContextLengthError, match="9 tokens do not fit a context of 8"):
        session.append("x")
    assert session.position == 8


def test_too_long_prompt_names_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reciting(monkeypatch, "abc", context=8)
    with pytest.raises(ContextLengthError, match="11 tokens do not fit a context of 8"):
        model.chat("123456789")
    assert model.chat("1").read() == "abc"


def test_empty_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="the prompt is empty"):
        reciting(monkeypatch, "abc").generate("")


def test_ignore_eos_and_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reciting(monkeypatch, "ab")
    assert model.chat("?", max_tokens=5, ignore_eos=True).tokens == []
    forever = model.chat("?", max_tokens=5, ignore_eos=True)
    forever.read()
    assert len(forever.tokens) == 5
    banned = model.chat("?", max_tokens=1, logit_bias={ord("a"): float("-inf"), 7: 5.0})
    banned.read()
    assert banned.tokens == [7]


def test_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reciting(monkeypatch, "ab")
    assert all(c.logprob is None and c.top_logprobs == () for c in model.chat("?"))
    for chunk in model.chat("?", logprobs=3):
        assert len(chunk.top_logprobs) == 3
        assert chunk.top_logprobs[0] == (chunk.token, chunk.logprob)
        assert chunk.logprob is not None and -0.1 < chunk.logprob < 0


def test_sampler_gets_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reciting(monkeypatch, "ab")
    generation = model.chat("xyz", temperature=0.5, top_k=3, seed=7, penalty_window=2)
    generation.read()
    assert generation.seed == 7
    made = fake_core.Sampler.made[-1]
    assert made.options["temperature"] == 0.5
    assert made.options["top_k"] == 3
    assert made.options["seed"] == 7
    assert made.accepted == []  # without a penalty the sampler need not know the prompt
    model.chat("xyz", repetition_penalty=1.1, penalty_window=2).read()
    assert fake_core.Sampler.made[-1].accepted == [ord("z"), fake_core.ANSWER]
    model.chat("xyz", repetition_penalty=1.1, penalty_window=-1).read()
    assert len(fake_core.Sampler.made[-1].accepted) == 5


def test_fresh_seeds_differ_and_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reciting(monkeypatch, "ab")
    first, second = model.chat("?"), model.chat("?")
    assert first.seed != second.seed


class StoppedClock:
    """A clock that advances only when a test says so; seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def taking(self, seconds: float, call: Any) -> Any:
        """`call`, made to take `seconds`."""

        def slow(*arguments: Any) -> Any:
            self.now += seconds
            return call(*arguments)

        return slow


def test_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StoppedClock(monkeypatch)
    monkeypatch.setattr(
        fake_core.EngineSequence, "eval", clock.taking(0.01, fake_core.EngineSequence.eval)
    )
    generation = reciting(monkeypatch, "abcd").chat("12")
    assert generation.stats.new_tokens == 0
    generation.read()
    stats = generation.stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.new_tokens) == (4, 0, 4)
    assert stats.decode_tokens == 4  # the last one led to the end-of-generation token
    assert (stats.prefill_s, stats.ttft_s) == (pytest.approx(0.01), pytest.approx(0.01))
    assert stats.decode_s == pytest.approx(0.04)
    assert stats.prefill_tok_s == pytest.approx(4 / stats.prefill_s)
    assert stats.bytes_per_token == 1000
    assert stats.gb_s == pytest.approx(4000 / stats.decode_s / 1e9)
    assert stats.peak_memory > 1_000_000
    assert stats.as_dict()["decode_tok_s"] == stats.decode_tok_s
    assert "answer 4 tokens" in stats.line()


def test_time_of_the_reader_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StoppedClock(monkeypatch)
    generation = reciting(monkeypatch, "abcdef").chat("?")
    for _ in generation:
        clock.now += 0.02
    assert generation.stats.decode_s == 0


# Sessions.


def test_chat_keeps_the_conversation_and_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "yes").session(system="S")
    session.chat("first").read()
    assert session.messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
    ]
    before = len(evaluated(session))
    again = session.chat("second")
    again.read()
    stats = again.stats
    # <|end|> and "<|user|>second<|answer|>" are all that is new.
    assert stats.prompt_tokens - stats.reused_tokens == 1 + len("second") + 2
    assert evaluated(session)[before] == 1 + len("second") + 2
    text = session.model.tokenizer.decode(session.tokens)
    assert text == "<|user|>S<|user|>first<|answer|>yes<|end|><|user|>second<|answer|>yes"
    session.reset()
    assert session.messages == [{"role": "system", "content": "S"}]
    assert session.position == 0


def test_changed_system_message_is_evaluated_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "yes").session(system="AAA")
    session.chat("first").read()
    session.system = "AAB"
    again = session.chat("second")
    again.read()
    assert again.stats.reused_tokens == 3
    assert session.messages[0]["content"] == "AAB"


def test_chat_with_a_whole_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "yes").session()
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    session.chat(turns).read()
    assert session.messages == [*turns, {"role": "assistant", "content": "yes"}]
    session.chat(turns[:1]).read()
    assert session.messages[1:] == [{"role": "assistant", "content": "yes"}]


def test_model_chat_reuses_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reciting(monkeypatch, "yes")
    turns = [{"role": "user", "content": "a long question"}]
    assert model.chat(turns).read() == "yes"
    longer = [*turns, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "b"}]
    again = model.chat(longer)
    assert again.read() == "yes"
    assert again.stats.reused_tokens >= len("a long question")
    plain = model.generate("<|answer|>")
    assert plain.read() == "yes"
    assert plain.stats.reused_tokens == 0


def test_session_generate_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "abcdef").session()
    assert session.append("x<|answer|>", parse_special=True) == 2
    assert session.generate(max_tokens=2).read() == "ab"
    assert session.position == 4
    assert session.generate(max_tokens=2).read() == "cd"
    session.truncate(3)
    assert session.generate(max_tokens=2).read() == "bc"
    assert evaluated(session)[0] == 2


def test_append_reads_special_tokens_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "a").session()
    assert session.append("<|answer|>") == len("<|answer|>")
    assert session.append([fake_core.ANSWER]) == 1
    with pytest.raises(OptionError, match="token 259 is outside the vocabulary of 259"):
        session.append([259])
    with pytest.raises(OptionError, match="a string or a sequence of token ids"):
        session.append([0.5])  # type: ignore[list-item]


def test_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "abc").session()
    with pytest.raises(OptionError, match="the session is empty"):
        session.logits()
    session.append([fake_core.ANSWER])
    assert session.logits().argmax() == ord("a")
    session.append("a")
    assert session.logits().argmax() == ord("b")
    session.truncate(1)
    assert session.logits().argmax() == ord("a")
    with pytest.raises(OptionError, match="position must be between 0 and 1, not 2"):
        session.truncate(2)


# Interrupts, cancellation, threads.


def test_close_ends_and_keeps_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "abcdef").session()
    with session.chat("?") as generation:
        next(generation)
        next(generation)
    assert generation.finish_reason == "cancelled"
    assert session.messages[-1] == {"role": "assistant", "content": "ab"}
    assert list(generation) == []


def test_a_new_call_ends_the_generation_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "abcdef").session()
    left = session.chat("one")
    next(left)
    assert session.chat("two").read() == "abcdef"
    assert left.finish_reason == "cancelled"
    assert [m["content"] for m in session.messages] == ["one", "a", "two", "abcdef"]


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_interrupt_leaves_a_usable_session(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """An interrupt may come during the prompt, the first or a later token."""
    session = reciting(monkeypatch, "abcdef").session()
    session.chat("earlier", max_tokens=3).read()
    held = session.messages
    calls = itertools.count(1)
    real = fake_core.EngineSequence.eval

    def interrupted(self: Any, tokens: Any, phase: str = "prompt") -> None:
        if next(calls) == failing:
            raise KeyboardInterrupt
        real(self, tokens, phase)

    monkeypatch.setattr(fake_core.EngineSequence, "eval", interrupted)
    generation = session.chat("now")
    with pytest.raises(KeyboardInterrupt):
        generation.read()
    assert generation.finish_reason == "cancelled"
    said = "abcdef"[: failing - 1]
    assert generation.text == said
    if said:
        assert session.messages[-1]["content"] == said
    else:
        assert session.messages == held
    assert session.chat("again").read() == "abcdef"
    sequence: Any = session._sequence
    assert session.tokens[: sequence.position] == sequence.tokens


def test_interrupted_append_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "abc").session()
    session.append("before")
    real = fake_core.EngineSequence.eval

    def half(self: Any, tokens: Any, phase: str = "prompt") -> None:
        real(self, tokens[: len(tokens) // 2], phase)  # the core ends at a whole chunk
        raise KeyboardInterrupt

    monkeypatch.setattr(fake_core.EngineSequence, "eval", half)
    with pytest.raises(KeyboardInterrupt):
        session.append("a long text")
    assert session.position == session._sequence.position == len("before")
    monkeypatch.setattr(fake_core.EngineSequence, "eval", real)
    session.append([fake_core.ANSWER])
    assert session.generate().read() == "abc"


def in_thread(call: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def target() -> None:
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    return thread, results


def test_cancel_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_core.Engine, "stuck", ("slowly", 20))  # it never ends by itself
    session = reciting(monkeypatch, "abcdef" * 50).session()
    generation = session.chat("slowly?")
    thread, results = in_thread(generation.read)
    while not generation.tokens:
        time.sleep(0.002)
    session.cancel()
    thread.join(60)
    assert generation.finish_reason == "cancelled"
    assert results == [generation.text]
    assert 0 < len(generation.text) <= 21
    # The cancellation affects neither the next prompt nor the next answer.
    assert session.chat("?", max_tokens=5).read() == "abcde"


def test_cancelled_append(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "abc").session()
    engine = session._sequence.engine
    engine.go_on.clear()
    thread, results = in_thread(lambda: session.append("text"))
    assert engine.evaluating.wait(300)
    session.cancel()
    thread.join(60)
    engine.go_on.set()
    assert isinstance(results[0], Cancelled)
    assert session.position == 0
    session.cancel()  # nothing is running, so this must not affect the next call
    assert session.append("text") == 4


def test_late_cancel_does_not_hit_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "abc").session()
    session._sequence.cancel()  # as if the request had come after the last look of a call
    assert session.append("text") == 4


def test_cancel_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    generation: Generation = reciting(monkeypatch, "abc").chat("?")
    generation.cancel()
    assert list(generation) == []
    assert generation.finish_reason == "cancelled"


def test_second_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "abc").session()
    engine = session._sequence.engine
    engine.go_on.clear()
    thread, results = in_thread(lambda: session.append("text"))
    assert engine.evaluating.wait(300)
    with pytest.raises(OptionError, match="in use by another thread"):
        session.append("more")
    engine.go_on.set()
    thread.join(60)
    assert results == [4]


def test_second_thread_is_refused_between_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    session = reciting(monkeypatch, "abc").session()
    go_on = threading.Event()
    generation = session.chat("?")

    def read() -> str:
        next(generation)
        go_on.wait(300)
        return generation.read()

    thread, results = in_thread(read)
    while not generation.tokens:
        time.sleep(0.002)
    with pytest.raises(OptionError, match="in use by another thread"):
        session.append("more")
    go_on.set()
    thread.join(60)
    assert results == ["abc"]
    session.append("more")  # that thread is done with it


def test_threads_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reciting(monkeypatch, "a story of some length", delay=0.0005)
    runs = [in_thread(lambda i=i: model.chat(f"question {i}").read()) for i in range(8)]
    runs += [in_thread(lambda: [model.chat("again").read() for _ in range(5)][-1])]
    for thread, results in runs:
        thread.join(120)
        assert results == ["a story of some length"]


def test_failing_core_ends_the_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reciting(monkeypatch, "abc")
    generation = model.chat("?")
    next(generation)

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(fake_core.EngineSequence, "eval", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            generation.read()
    assert generation.finish_reason == "error"
    assert model.chat("?").read() == "abc"


# Options.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature must be finite and at least 0, not -1"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"top_p": 1.5}, "top_p must be between 0 and 1, not 1.5"),
        ({"top_k": 0.5}, "top_k must be an integer, not 0.5"),
        ({"top_k": True}, "top_k must be an integer, not True"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"max_tokens": -1}, "max_tokens must be at least 0, not -1"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"repetition_penalty": 0}, "repetition_penalty must be finite and at least 0.01, not 0"),
        ({"stop": ["a", ""]}, "stop must not contain an empty string"),
        ({"stop": 5}, "stop must be a string or a sequence of strings, not 5"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias token must be an integer, not 'a'"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {1: float("inf")}}, r"logit_bias\[1\] must be finite, not inf"),
        ({"logprobs": -1}, "logprobs must be between 0 and 1000, not -1"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, not 1"),
        ({"temprature": 1}, "unknown generation option 'temprature'; did you mean 'temperature'?"),
    ],
)
def test_bad_options(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("?", r"\?")):
        reciting(monkeypatch, "abc").chat("?", **values)


def test_options_are_frozen_and_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    options = GenerationOptions(stop="x", max_tokens=3)  # type: ignore[arg-type]
    assert options.stop == ("x",)
    assert hash(options) == hash(GenerationOptions(stop=("x",), max_tokens=3))
    with pytest.raises(AttributeError):
        options.top_k = 1  # type: ignore[misc]
    generation = reciting(monkeypatch, "abcdef").chat("?", options=options, max_tokens=2)
    assert generation.read() == "ab"
    with pytest.raises(OptionError, match="options must be a GenerationOptions"):
        reciting(monkeypatch, "abc").chat("?", options={"max_tokens": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{"threads": 0}, {"context": 0}, {"kv_type": "q4"}])
def test_bad_load_options(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(values))):
        LoadOptions(**values)
