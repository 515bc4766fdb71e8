"""Finds the forms of messages that a chat template takes, by rendering small conversations.

Templates disagree about tool-call arguments (a mapping or its JSON text), about content (text or a
list of parts, for each role), and about content that an assistant leaves out when it calls a tool.
None of them declares this; a template that gets the wrong form refuses it, drops it, or prints it
as Python does. The findings are kept, so that each is tried only once for a template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any

from .conversation import Arguments, joined

# Renders messages with tools (None: without any); returns None if the template refuses them.
Rendering = Callable[[list[dict[str, Any]], "list[dict[str, Any]] | None"], "str | None"]

_ABSENT = object()
_ONE, _TWO = "needle-7401", "needle-7402"
_JSON = f'{{"needle": "{_ONE}", "count": 5}}'
_USER = {"role": "user", "content": "Question"}
_ANSWER = {"role": "assistant", "content": "Answer"}
_HEADS = ("system", "developer")  # roles that usually begin a conversation
_ID = "call00000"  # Mistral's templates require nine letters or digits
_TOOL = {
    "type": "function",
    "function": {
        "name": "needle_tool",
        "description": "Needles",
        "parameters": {
            "type": "object",
            "properties": {"needle": {"type": "string", "description": "A needle"}},
            "required": ["needle"],
        },
    },
}


class TemplateForms:
    """The forms that one template takes; may be shared between threads (a race tries twice)."""

    def __init__(self, rendering: Rendering) -> None:
        self._rendering = rendering
        self._calls: tuple[bool, bool, object] | None = None
        self._text: dict[str, bool] = {}
        self._parts: dict[str, bool] = {}
        self._developer: bool | None = None
        self._results: bool | None = None
        self._thoughts: bool | None = None
        self._heads: dict[tuple[str, ...], bool] = {}

    def apply(
        self, messages: list[dict[str, Any]], *, ids: bool = False, parts: bool = True
    ) -> list[dict[str, Any]]:
        """Returns messages of `conversation` in the forms that the template takes.

        ids: give calls without an id one, and name it in their results. parts: False joins all
        lists of parts, whatever the template takes.
        """
        numbered = iter(range(100_000))
        open_ids: list[str] = []
        out = []
        for i, message in enumerate(self._heads_joined(messages)):
            kind = _kind(message, first=i == 0)
            changed = dict(message)
            if message["role"] == "developer" and not self._takes_developer():
                changed["role"] = "system"
            if "content" in message:
                content = message["content"] if parts else joined(message["content"])
                changed["content"] = self._content(content, kind)
                if _thinks(changed["content"]):  # the parts hold the reasoning: once is enough
                    for name in ("reasoning_content", "thinking"):
                        changed.pop(name, None)
            elif kind == "calls":
                empty = self._call_forms()[2]
                if empty is not _ABSENT:
                    changed["content"] = empty
            if kind == "calls":
                changed["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
            if ids and kind == "calls":
                for call in changed["tool_calls"]:
                    call.setdefault("id", f"call{next(numbered):05d}")
                open_ids = [call["id"] for call in changed["tool_calls"]]
            if ids and kind == "tool" and open_ids:
                changed.setdefault("tool_call_id", open_ids[0])
                open_ids = open_ids[1:]
            out.append(changed)
        return out

    def _heads_joined(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the messages, with leading system and developer ones joined to one of system.

        They are joined only if there are both, and the template does not show all of them.
        """
        heads = list(takewhile(lambda message: message["role"] in _HEADS, messages))
        roles = tuple(str(message["role"]) for message in heads)
        if set(roles) != set(_HEADS) or self._shows_heads(roles):
            return messages
        content = "\n\n".join(joined(message["content"]) for message in heads)
        return [{**heads[0], "role": "system", "content": content}, *messages[len(heads) :]]

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        as_text, verbatim, _ = self._call_forms()
        arguments: Arguments = call["function"]["arguments"]
        is_mapping = isinstance(arguments.value, dict)
        if as_text or (verbatim and not is_mapping):
            value: Any = arguments.as_text()
        else:
            value = arguments.value
        return {**call, "function": {**call["function"], "arguments": value}}

    def _content(self, content: str | list[dict[str, Any]] | Arguments, kind: str) -> Any:
        if isinstance(content, Arguments):
            if self._shows_results():
                return content.value
            content = content.as_text()
        if isinstance(content, list) and _thinks(content):
            if self._shows_thoughts():
                return content
            content = [part for part in content if part["type"] == "text"]
            content = content if len(content) > 1 else joined(content)
        if isinstance(content, list):
            return content if self._shows_parts(kind) else joined(content)
        if self._shows_text(kind) or not self._shows_parts(kind):
            return content
        return [{"type": "text", "text": content}]

    # The methods below find, and remember, what the template takes.

    def _call_forms(self) -> tuple[bool, bool, object]:
        """Returns (takes arguments as JSON text, prints JSON text verbatim, content for "none")."""
        if self._calls is None:
            self._calls = self._ask_calls()
        return self._calls

    def _ask_calls(self) -> tuple[bool, bool, object]:
        renders: object = None  # the first content with which the template renders at all
        for arguments in ({"needle": _ONE, "count": 5}, _JSON):
            for content in (_ABSENT, "", None):
                for text in self._around(_calling(arguments, content)):
                    if content is None and "None" in text:
                        continue
                    renders = content if renders is None else renders
                    if _ONE in text and "'needle'" not in text and '\\"needle' not in text:
                        verbatim = any(_JSON in t for t in self._around(_calling(_JSON, content)))
                        return arguments is _JSON, verbatim, content
        return False, False, _ABSENT if renders is None else renders

    def _shows_text(self, kind: str) -> bool:
        """Returns whether messages of a kind show a content that is a string."""
        if kind not in self._text:
            self._text[kind] = any(_ONE in text for text in self._with_content(kind, _ONE))
        return self._text[kind]

    def _shows_parts(self, kind: str) -> bool:
        """Returns whether messages of a kind show all texts of a list of parts."""
        if kind not in self._parts:
            parts = [{"type": "text", "text": _ONE}, {"type": "text", "text": _TWO}]
            self._parts[kind] = any(
                _ONE in text and _TWO in text and "'type': 'text'" not in text
                for text in self._with_content(kind, parts)
            )
        return self._parts[kind]

    def _shows_results(self) -> bool:
        """Returns whether a tool's result that is a mapping is printed as JSON."""
        if self._results is None:
            as_text, _, empty = self._call_forms()
            call = _calling(_JSON if as_text else {"n": 5}, empty)
            value = {"needle": _ONE, "count": 5}
            self._results = any(
                f'"{_ONE}"' in text and '\\"needle' not in text
                for text in self._around(call, value)
            )
        return self._results

    def _shows_thoughts(self) -> bool:
        """Returns whether an assistant's content may have parts of type "thinking"."""
        if self._thoughts is None:
            thought = {"type": "thinking", "thinking": _ONE}
            message = {**_ANSWER, "content": [thought, {"type": "text", "text": _TWO}]}
            self._thoughts = any(
                _ONE in text and _TWO in text and "'thinking':" not in text
                for text in self._texts([[_USER, message, _USER], [_USER, message]])
            )
        return self._thoughts

    def _takes_developer(self) -> bool:
        if self._developer is None:
            message = {"role": "developer", "content": _ONE}
            self._developer = any(_ONE in text for text in self._texts([[message, _USER]]))
        return self._developer

    def _shows_heads(self, roles: tuple[str, ...]) -> bool:
        """Returns whether all leading messages of system and developer are shown."""
        if roles not in self._heads:
            needles = [f"needle-75{i:02d}-" for i in range(len(roles))]
            heads = []
            for i, (role, needle) in enumerate(zip(roles, needles, strict=True)):
                taken = role if self._takes_developer() else "system"
                kind = _kind({"role": role}, first=i == 0)
                heads.append({"role": taken, "content": self._content(needle, kind)})
            texts = self._texts([[*heads, _USER]])
            self._heads[roles] = any(all(n in text for n in needles) for text in texts)
        return self._heads[roles]

    def _with_content(self, kind: str, content: Any) -> Iterator[str]:
        """Yields renderings of conversations in which a message of a kind has a content."""
        if kind == "calls":
            as_text, _, _ = self._call_forms()
            yield from self._around(_calling(_JSON if as_text else {"n": 5}, content))
            return
        message = {"role": kind.removeprefix("later "), "content": content}
        if kind == "tool":
            as_text, _, empty = self._call_forms()
            call = _calling(_JSON if as_text else {"n": 5}, empty)
            yield from self._around(call, content)
        elif kind in _HEADS:
            role = "system" if kind == "developer" and not self._takes_developer() else kind
            yield from self._texts([[{**message, "role": role}, _USER]])
        elif kind == "user":
            yield from self._texts([[message]])
        else:
            yield from self._texts([[_USER, message, _USER], [_USER, message]])

    def _around(self, call: dict[str, Any], result: Any = "Result") -> Iterator[str]:
        """Yields renderings of a message that calls the tool, in a longer and a shorter context."""
        answer = {"role": "tool", "tool_call_id": _ID, "name": "needle_tool", "content": result}
        conversations = [[_USER, call, answer, _ANSWER, _USER], [_USER, call, answer]]
        yield from self._texts(conversations, tools=True)

    def _texts(
        self, conversations: list[list[dict[str, Any]]], *, tools: bool = False
    ) -> Iterator[str]:
        """Yields a rendering of each conversation that renders; `tools`: try with tools first."""
        for messages in conversations:
            for given in ([_TOOL], None) if tools else (None, [_TOOL]):
                text = self._rendering(messages, given)
                if text is not None:
                    yield text
                    break


def with_new_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages of `conversation` with new call ids, the same for a call and its result.

    Templates of Mistral take nine letters or digits; OpenAI's ids are longer, others are numbers.
    """
    known: dict[str, str] = {}

    def new(sent: object) -> str:
        return known.setdefault(str(sent), f"sent{len(known):05d}")

    out = []
    for message in messages:
        changed = dict(message)
        if "tool_calls" in message:
            changed["tool_calls"] = [
                {**call, "id": new(call["id"])} if "id" in call else call
                for call in message["tool_calls"]
            ]
        if "tool_call_id" in message:
            changed["tool_call_id"] = new(message["tool_call_id"])
        out.append(changed)
    return out


def _kind(message: dict[str, Any], *, first: bool) -> str:
    """Returns the role, "calls" for tool calls, or "later <role>" for a system role not first."""
    if "tool_calls" in message:
        return "calls"
    role = str(message["role"])
    return f"later {role}" if role in _HEADS and not first else role


def _thinks(content: Any) -> bool:
    return isinstance(content, list) and any(part["type"] == "thinking" for part in content)


def _calling(arguments: Any, content: Any) -> dict[str, Any]:
    function = {"name": "needle_tool", "arguments": arguments}
    call = {"id": _ID, "type": "function", "function": function}
    message: dict[str, Any] = {"role": "assistant", "tool_calls": [call]}
    if content is not _ABSENT:
        message["content"] = content
    return message
