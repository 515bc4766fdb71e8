"""Finds the user-defined tokens with which a chat template frames turns.

Some files type the tokens that open and end a turn as user-defined (Command R's
<|START_OF_TURN_TOKEN|>, DeepSeek's <|User|>), as they type <think>, <tool_call> and runs of spaces,
which clients may write. Renderings of the chat template tell the two sorts apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, Protocol

from jinja2 import Environment, nodes

from .conversation import Arguments

_Found = tuple[str, int, int]  # a token in a text, with its begin and end


class Rendering(Protocol):
    """Renders messages without a generation prompt; returns None if the template refuses them."""

    def __call__(self, turns: list[dict[str, Any]], *, thinking: bool) -> str | None:
        """Renders `turns`; `thinking` switches reasoning on if the template has a switch for it."""


_SYSTEM = {"role": "system", "content": "needle-7411"}
_USER = {"role": "user", "content": "needle-7412"}
_ANSWER = {"role": "assistant", "content": "needle-7413"}
_THOUGHT = "needle-7414"
_THINKING = {**_ANSWER, "reasoning_content": _THOUGHT, "thinking": _THOUGHT}
# String methods and filters that search for their first argument in a text, or remove it.
_LOOKS = frozenset(
    ("count", "endswith", "find", "index", "lstrip", "partition", "removeprefix", "removesuffix",
     "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "startswith",
     "strip", "trim")
)  # fmt: skip


def frame_tokens(rendering: Rendering, defined: Iterable[str], reads: Iterable[str]) -> set[str]:
    """Returns the spellings of `defined`, those of user-defined tokens, that frame turns.

    A token frames turns if further turns add more of it although no message contains it, if it
    encloses the words of a system message or a user, or if it directly follows such a token. White
    space never frames turns. Nor do strings that the template looks for in messages (`reads`),
    since clients write them, nor tokens that enclose an assistant's reasoning, unless they enclose
    a user's words as well. Tokens that appear only with tools, with a template's own words, or in
    the generation prompt are no frames.
    """
    looked_for = {read.strip() for read in reads}
    visible = [d for d in defined if len(d) > 1 and d.strip()]
    candidates = [d for d in visible if d.strip() not in looked_for]
    if not candidates:
        return set()

    def found(*turns: dict[str, Any]) -> tuple[str, list[_Found]]:
        text = rendering(list(turns), thinking=False) or ""
        return text, list(_tokens(text, candidates))

    enclosing: set[str] = set()
    answered = found(_USER, _ANSWER, _USER)
    rendered = [found(_SYSTEM, _USER), found(_USER), answered]
    for text, tokens in rendered:
        for turn in (_SYSTEM, _USER):
            enclosing |= _around(text, turn["content"], tokens)
            enclosing |= _header(text, turn, tokens)
    frames = set(enclosing)
    for less, more in (
        (rendered[1], rendered[0]),
        (rendered[1], answered),
        (rendered[0], found(_SYSTEM, _USER, _ANSWER, _USER)),
    ):
        if less[0] and more[0]:
            counted = Counter(token for token, _, _ in less[1])
            frames |= (Counter(token for token, _, _ in more[1]) - counted).keys()
    if not frames:
        return frames
    for text, tokens in rendered[:2]:
        frames |= _beside(text, tokens, frames)
    # The template may look for several tokens as one string, such as the one that opens a thought.
    parts = "\n".join(looked_for)
    frames = {token for token in frames if token in enclosing or token not in parts}
    call = {"type": "function", "function": {"name": "needle", "arguments": Arguments({}, None)}}
    calling: dict[str, Any] = {**_THINKING, "tool_calls": [{"id": "call00000", **call}]}
    result = {"role": "tool", "tool_call_id": "call00000", "name": "needle", "content": "5"}
    thoughtful: list[list[dict[str, Any]]] = [[_USER, _THINKING], [_USER, calling, result]]
    for turns in thoughtful:
        text = rendering(turns, thinking=True) or ""
        frames -= _around(text, _THOUGHT, list(_tokens(text, candidates))) - enclosing
    # A token directly before one that the template looks for is part of an empty thought.
    text = answered[0]
    for (left, _, end), (right, begin, _) in pairwise(_tokens(text, visible)):
        if right in looked_for and left not in enclosing and not text[end:begin].strip():
            frames.discard(left)
    return frames


def looked_for(environment: Environment, source: str) -> set[str]:
    """Returns the strings that a template's comparisons, methods and filters look for in texts."""
    tree = environment.parse(source)
    named: dict[str, set[str]] = {}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name):
            named.setdefault(assign.target.name, set()).update(_strings(assign.node, {}))
    found: set[str] = set()
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter)):
        if isinstance(node, nodes.Compare):
            for side in (node.expr, *(operand.expr for operand in node.ops)):
                found |= _strings(side, named)
        elif isinstance(node, (nodes.Call, nodes.Filter)) and node.args:
            method = node.node.attr if isinstance(node.node, nodes.Getattr) else None
            if (node.name if isinstance(node, nodes.Filter) else method) in _LOOKS:
                found |= _strings(node.args[0], named)
    return found


def _strings(node: nodes.Node, named: dict[str, set[str]]) -> set[str]:
    """Returns the strings that an expression may be: a constant, a variable's or a list's."""
    if isinstance(node, nodes.Const):
        return {node.value} if isinstance(node.value, str) else set()
    if isinstance(node, nodes.Name):
        return named.get(node.name, set())
    if isinstance(node, (nodes.List, nodes.Tuple)):
        return {string for item in node.items for string in _strings(item, named)}
    if isinstance(node, nodes.Call) and len(node.args) == 1:  # of the environment, as compared()
        return _strings(node.args[0], named)
    return set()


def _tokens(text: str, spellings: Iterable[str]) -> Iterator[_Found]:
    """Yields the tokens in a text as the tokenizer cuts them out, each with its begin and end."""
    present = sorted((s for s in spellings if s in text), key=len, reverse=True)
    if present:
        for match in re.finditer("|".join(map(re.escape, present)), text):
            yield match[0], match.start(), match.end()


def _around(text: str, words: str, found: list[_Found]) -> set[str]:
    """Returns the tokens directly before and after words of a text, white space not counted."""
    begin = text.find(words)
    if begin < 0:
        return set()
    end = begin + len(words)
    return {
        token
        for token, start, stop in found
        if (stop <= begin and not text[stop:begin].strip())
        or (start >= end and not text[end:start].strip())
    }


def _header(text: str, turn: dict[str, Any], found: list[_Found]) -> set[str]:
    """Returns the tokens directly before a turn's words, and the one before its role's name."""
    begin = text.find(turn["content"])
    header: set[str] = set()
    for token, start, stop in reversed(found):
        if stop <= begin:
            between = text[stop:begin].strip()
            if between not in ("", turn["role"]):
                break
            header.add(token)
            begin = start
            if between:
                return header
    return set()  # no role's name


def _beside(text: str, found: list[_Found], frames: set[str]) -> set[str]:
    """Returns the tokens that directly follow one of the frames, or another such token."""
    beside: set[str] = set()
    for (left, _, end), (right, begin, _) in pairwise(found):
        if (left in frames or left in beside) and not text[end:begin].strip():
            beside.add(right)
    return beside
