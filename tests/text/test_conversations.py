"""Conversations in the forms that clients send, through the published templates.

The reference is transformers. What it cannot render in a template (the template refuses it, prints
it as Python prints a list or mapping, or leaves its words out) has the prompt of the equivalent
form that it can.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import SandboxedEnvironment
from stoker.runtime.base.errors import ChatTemplateError
from stoker.runtime.text import template_sandbox
from stoker.runtime.text.chat import ChatTemplate

CONVERSATIONS: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(
    (Path(__file__).parents[1] / "data" / "conversations.json").read_text(encoding="utf-8")
)
VARIANTS = ("arguments as mapping", "arguments as string", "content as parts")
Messages = list[dict[str, Any]]
_ABSENT = object()


class FixedDay(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> FixedDay:
        return cls(2026, 1, 2)


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Replaces its sandbox, which forbids append and pop: two templates need them for tools."""
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    monkeypatch.setattr(reference, "ImmutableSandboxedEnvironment", SandboxedEnvironment)
    monkeypatch.setattr(reference, "datetime", FixedDay)
    monkeypatch.setattr(template_sandbox, "datetime", FixedDay)
    _forget_templates(reference)
    yield reference
    _forget_templates(reference)


def _forget_templates(reference: Any) -> None:
    """Clears compiled templates: they keep their sandbox, which another test may have made."""
    for part in vars(reference).values():
        if hasattr(part, "cache_clear"):
            part.cache_clear()


@lru_cache(maxsize=1)
def templates(folder: Path) -> dict[str, ChatTemplate]:
    paths = sorted((folder / "templates").glob("*.jinja"))
    return {
        path.stem: ChatTemplate(path.read_text(encoding="utf-8"), bos_token="<s>", eos_token="</s>")
        for path in paths
    }


# Repairs to sources of templates that the reference cannot render and stoker can.
MENDED = {
    # Its tojson takes no iterator.
    "llama-cpp-deepseek-r1": ("map(attribute='function') |", "map(attribute='function') | list |"),
}


def variables_of(name: str, tools: Messages | None) -> dict[str, Any]:
    """Further variables that a template needs, as its model's page gives them."""
    if name == "fireworks-ai-llama-3-firefunction-v2":
        return {"functions": json.dumps(tools or [], indent=4), "datetime": "2026-01-02"}
    return {}


# Why templates refuse conversations, in their or Jinja's words. The reference refuses, too.
REFUSALS = {
    "Apertus-8B-Instruct": "Tool message outside of assistant",
    "CohereForAI-c4ai-command-r-plus-tool_use": "has no attribute 'additionalProperties'",
    "MiniMax-M2": "no previous assistant message with a tool call",
    "MiniMax-M3": "no previous assistant message with a tool call",
    "Mistral-Small-3.2-24B-Instruct-2506": "roles must alternate",
    "google-gemma-2-2b-it": "System role not supported|roles must alternate",
    "meta-llama-Llama-3.1-8B-Instruct": "only supports single tool-calls",
    "meta-llama-Llama-3.2-3B-Instruct": "only supports single tool-calls",
    "meta-llama-Llama-3.3-70B-Instruct": "only supports single tool-calls",
    "mistralai-Ministral-3-14B-Reasoning-2512": "roles must alternate",
    "mistralai-Mistral-Nemo-Instruct-2407": "roles must alternate",
    "openai-gpt-oss-120b": "no previous assistant message with a tool call",
}


def test_prompts_are_those_of_transformers(transformers: Any, vocab_dir: Path) -> None:
    combinations, refused, different = 0, 0, []
    for name, template in templates(vocab_dir).items():
        source = (vocab_dir / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        reference = Reference(transformers, source.replace(*MENDED.get(name, ("", ""))))
        for about, conversation in CONVERSATIONS.items():
            mappings, tools = conversation["messages"], conversation.get("tools")
            variables = variables_of(name, tools)
            for form in VARIANTS:
                messages = variant(mappings, form)
                # The arguments are those of the mapping, however they are written.
                same = mappings if form == "arguments as string" else messages
                expected = reference.prompt(same, tools, variables)
                try:
                    prompt = template.render(messages, tools=tools, **variables)
                except ChatTemplateError as error:
                    assert re.search(REFUSALS[name], str(error)), (name, about, form)
                    prompt = None
                    refused += 1
                combinations += 1
                if prompt != expected:
                    different.append((name, about, form))
    assert combinations == 20 * 70 * 3
    assert not different
    assert refused <= 0.02 * combinations


def with_calls(messages: Messages, change: Any) -> Messages:
    """The messages with each call's arguments changed."""

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": change(function["arguments"])}}

    return [
        {**m, "tool_calls": list(map(changed, m["tool_calls"]))} if "tool_calls" in m else m
        for m in messages
    ]


def in_parts(text: str) -> list[dict[str, str]]:
    """Two parts, cut in the middle of the text."""
    middle = len(text) // 2
    return [{"type": "text", "text": text[:middle]}, {"type": "text", "text": text[middle:]}]


def variant(messages: Messages, name: str) -> Messages:
    if name == "arguments as string":
        return with_calls(messages, json.dumps)
    if name == "content as parts":
        return [
            {**m, "content": in_parts(m["content"])} if m.get("content") else m for m in messages
        ]
    return messages


def kind(message: dict[str, Any]) -> str:
    return "calls" if "tool_calls" in message else str(message["role"])


class Reference:
    """Renders conversations with one template in transformers."""

    def __init__(self, transformers: Any, source: str) -> None:
        self._render = transformers.render_jinja_template
        self._source = source
        self._variables: dict[str, Any] = {}

    def prompt(
        self, messages: Messages, tools: Messages | None, variables: dict[str, Any]
    ) -> str | None:
        """The prompt; None if no form of the conversation can be rendered."""
        self._variables = variables
        words = [word for message in messages for word in said(message)]
        joined = [
            {**m, "content": "".join(p["text"] for p in m["content"])}
            if isinstance(m.get("content"), list)
            else m
            for m in messages
        ]
        best, form = self._best(equivalent(joined), words, tools)
        if best is None or joined == messages:
            return best
        return self._best(partly_joined(form, messages), words, tools)[0]

    def _best(
        self, forms: Iterator[Messages], words: list[str], tools: Messages | None
    ) -> tuple[str | None, Messages]:
        """Of the renderings that keep the most words, returns the first, and its form."""
        best: tuple[str | None, Messages] = (None, [])
        most = -1
        for form in forms:
            text = self._text(form, tools)
            if text is None or any(value in text for value in structured(form)):
                continue
            kept = sum(w in text or json.dumps(w, ensure_ascii=False)[1:-1] in text for w in words)
            if kept > most:
                most, best = kept, (text, form)
            if kept == len(words):
                break
        return best

    def _text(self, messages: Messages, tools: Messages | None) -> str | None:
        last = messages[-1]
        continues = last["role"] == "assistant" and "tool_calls" not in last
        for given in (tools,) if tools else (None, []):
            try:
                return str(
                    self._render(
                        [messages],
                        tools=given,
                        chat_template=self._source,
                        add_generation_prompt=not continues,
                        continue_final_message=continues,
                        bos_token="<s>",
                        eos_token="</s>",
                        **self._variables,
                    )[0][0]
                )
            except Exception:
                continue
        return None


def equivalent(messages: Messages) -> Iterator[Messages]:
    """Equivalent forms, the better ones first."""
    for role in ("developer", "system") if messages[0]["role"] == "developer" else ("",):
        first = {**messages[0], "role": role} if role else messages[0]
        for arguments in (dict, json_text):
            for empty in (_ABSENT, "", None):
                form = with_calls([first, *messages[1:]], arguments)
                if empty is not _ABSENT:
                    form = [m if "content" in m else {**m, "content": empty} for m in form]
                yield form


def partly_joined(form: Messages, messages: Messages) -> Iterator[Messages]:
    """The form with the parts of messages joined: of all kinds, of all but one, ... of none."""
    kinds = sorted({kind(m) for m in messages if isinstance(m.get("content"), list)})
    for n in range(len(kinds) + 1):
        for joined in itertools.combinations(kinds, n):
            yield [
                {**f, "content": m["content"]} if m.get("content") and kind(m) not in joined else f
                for f, m in zip(form, messages, strict=True)
            ]


def json_text(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def structured(messages: Messages) -> Iterator[str]:
    """How Python prints the parts and mappings in messages."""
    for message in messages:
        if isinstance(message.get("content"), list):
            yield "{'type': 'text', 'text': "
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            if arguments and not isinstance(arguments, str):
                yield repr(arguments)


def said(message: dict[str, Any]) -> list[str]:
    """The words of a message that its prompt should have."""
    content = message.get("content") or []
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    return [*" ".join(texts).split(), *names]
