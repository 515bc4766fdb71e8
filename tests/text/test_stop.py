"""Stop strings: the matcher against a search of the whole text, and special tokens in real runs."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_core
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stoker.runtime.model import Model
from stoker.runtime.options import LoadOptions
from stoker.runtime.text.stop import StopMatcher

# Pieces of a stream are texts, and spellings of special tokens that share characters with them.
SPECIALS = ("<a>", "<ab>", "<", "a")
PIECES = st.one_of(
    st.tuples(st.text("ab<>", min_size=1, max_size=3), st.just(False)),
    st.tuples(st.sampled_from(SPECIALS), st.just(True)),
)
STOPS = st.lists(st.text("ab<>", min_size=1, max_size=7), max_size=3)


def first_stop(pieces: list[tuple[str, bool]], stops: list[str]) -> tuple[str, str | None]:
    """(what is shown, the stop string), found by looking at everything so far, piece by piece.

    Of the stop strings that are complete after a piece the first wins, then the longest; one may
    be complete in the text with spellings, none of them in part, or in the text without them.
    """
    written: list[tuple[str, bool, bool]] = []  # character, whether shown, whether a piece's first
    for text, special in pieces:
        written += [(c, not special, not special or i == 0) for i, c in enumerate(text)]
        found = []
        for stop in stops:
            for chosen in (range(len(written)), [i for i, (_, s, _) in enumerate(written) if s]):
                places = list(chosen)
                for at in range(len(places) - len(stop) + 1):
                    after = at + len(stop)
                    ends = after == len(places) or written[places[after]][2]
                    spelled = "".join(written[i][0] for i in places[at:after])
                    if spelled == stop and written[places[at]][2] and ends:
                        found.append((places[at], -len(stop), stop))
        if found:
            begin, _, stop = min(found)
            return "".join(c for c, shown, _ in written[:begin] if shown), stop
    return "".join(c for c, shown, _ in written if shown), None


@given(st.lists(PIECES, max_size=12), STOPS)
def test_matcher_finds_what_a_search_of_the_whole_finds(
    pieces: list[tuple[str, bool]], stops: list[str]
) -> None:
    matcher, out = StopMatcher(stops), ""
    shown, stop = first_stop(pieces, stops)
    for text, special in pieces:
        out += matcher.push(text, special=special)
        assert shown.startswith(out)  # no output would have to be taken back
    assert (out + matcher.flush(), matcher.matched) == (shown, stop)


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
    seed=st.integers(0, 1000),
)
def test_matcher_cuts_where_the_whole_text_would_be_cut(
    text: str, stops: list[str], seed: int
) -> None:
    """Split in any way, the output is the text before the first complete stop string."""
    chance = random.Random(seed)
    matcher, out, pushed = StopMatcher(stops), "", 0
    while pushed < len(text) and matcher.matched is None:
        piece = text[pushed : pushed + chance.randint(1, 3)]
        pushed += len(piece)
        out += matcher.push(piece)
        assert not any(stop in out for stop in stops)
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if ends:
        assert matcher.matched in stops
        assert out + str(matcher.matched) == text[: len(out) + len(str(matcher.matched))]
        # The stop that is complete first ends the text, with the piece that completes it.
        assert min(ends) <= pushed <= min(ends) + 2
        assert matcher.flush() == ""
    else:
        assert matcher.matched is None
        assert out + matcher.flush() == text


def test_text_comes_out_as_soon_as_it_is_certain() -> None:
    matcher = StopMatcher(["b<a>c"])
    assert matcher.push("ab") == "a"
    assert matcher.push("<a>", special=True) == ""
    assert matcher.push("d") == "bd"


# Generation, on a model that recites special tokens too.


@pytest.fixture(autouse=True)
def core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "stoker.runtime._core", fake_core)
    yield


def reciting(monkeypatch: pytest.MonkeyPatch, *story: str | int) -> Model:
    """A model that says texts and special tokens, then <|end|>."""
    said: list[int] = []
    for piece in story:
        said += [piece] if isinstance(piece, int) else list(piece.encode())
    monkeypatch.setattr(fake_core.Engine, "story", said)
    monkeypatch.setattr(
        fake_core.EngineSequence, "_next", lambda self: said_next(self.tokens, said), raising=True
    )
    return Model(Path("recital.gguf"), LoadOptions(context=500))


def said_next(tokens: list[int], said: list[int]) -> int:
    begun = tokens.index(fake_core.ANSWER) + 1
    done = len(tokens) - begun
    return said[done] if done < len(said) else fake_core.END


@pytest.mark.parametrize(
    ("story", "stop", "text", "matched"),
    [
        (("one", fake_core.USER, "two"), "<|user|>", "one", "<|user|>"),
        (("one", fake_core.USER, "two"), "e<|user|>t", "on", "e<|user|>t"),
        (("a", fake_core.USER, fake_core.ANSWER, "b"), "<|user|><|answer|>", "a",
         "<|user|><|answer|>"),
        (("a", fake_core.USER, "b"), "ab", "", "ab"),  # as it is shown
        (("one",), "<|end|>", "one", "<|end|>"),
        (("one",), "ne<|end|>", "o", "ne<|end|>"),
        (("one", fake_core.USER, "two"), "<|user|>x", "onetwo", None),
        (("one", fake_core.USER, "two"), "user", "onetwo", None),  # a part of a name is not text
        (("one",), "end", "one", None),
        (("say <|user|>", "!"), "<|user|>", "say ", "<|user|>"),  # written as text
        (("é", fake_core.USER, "ü"), "é<|user|>ü", "", "é<|user|>ü"),
    ],
)  # fmt: skip
def test_stop_strings_over_special_tokens(
    monkeypatch: pytest.MonkeyPatch,
    story: tuple[Any, ...],
    stop: str,
    text: str,
    matched: str | None,
) -> None:
    generation = reciting(monkeypatch, *story).chat("?", stop=stop)
    shown = ""
    for chunk in generation:
        shown += chunk.text
        assert text.startswith(shown)
    assert generation.text == shown == text
    assert generation.finish_reason == "stop"
    assert generation.stop_string == matched
