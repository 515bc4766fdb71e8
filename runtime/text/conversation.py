"""Brings conversations as clients send them into one form.

Clients send different forms: tool-call arguments as a JSON string (OpenAI) or as a mapping, calls
with and without "function", content as text, as a list of parts, or none, reasoning under three
names, tools with and without their envelope. template_forms.py then finds the forms that a
template takes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.errors import ChatTemplateError

Message = Mapping[str, Any]  # as a client sends it

TEXT_KINDS = ("text", "input_text", "output_text")  # kinds of content parts that hold text
# Names of an assistant's reasoning; transformers gives templates the first two, from any of them.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Anthropic's and MCP's names of a tool's schema, which OpenAI calls "parameters".
_PARAMETERS = ("input_schema", "inputSchema")

_LEVELS = 100  # nesting depth of mappings and lists
TOO_DEEP = f"expected at most {_LEVELS} levels of mappings and lists, found more"


@dataclass(frozen=True)
class Arguments:
    """The arguments of one tool call, or a tool's result that is a JSON value.

    value: the mapping; if the client sent something else, its JSON value, or its text if that is
    no JSON. text: the text as the client wrote it, None if it sent a value.
    """

    value: Any
    text: str | None

    def as_text(self) -> str:
        """Returns the JSON text, the client's own if it is no mapping. ChatTemplateError."""
        if self.text is not None and not isinstance(self.value, dict):
            return self.text
        try:
            return json.dumps(self.value, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise ChatTemplateError(
                f"tool_calls: expected JSON arguments, found: {error}"
            ) from None


def conversation(messages: object) -> list[dict[str, Any]]:
    """Returns copies of the messages, all in one form.

    Each has "role"; "content" as a string or as a list of {"type": "text", "text": str}, absent
    if an assistant only calls tools, as Arguments if a tool's result is no text; an
    assistant's thoughts before its texts, as {"type": "thinking", "thinking": str}, and as
    "reasoning_content" as well; "tool_calls" as a list of {"type": "function",
    "function": {"name": str, "arguments": Arguments}}; no key whose value is None.
    Raises ChatTemplateError, which names the place of what is malformed.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatTemplateError(
            f"messages: expected a list of messages, found {type(messages).__name__}"
        )
    if not messages:
        raise ChatTemplateError("messages: expected at least one message, found none")
    try:
        return [
            _message(turn, f"messages[{i}]")
            for i, message in enumerate(messages)
            for turn in _turns(message)
        ]
    except RecursionError:
        raise ChatTemplateError(f"messages: {TOO_DEEP}") from None


def tool_schemas(tools: object) -> list[dict[str, Any]] | None:
    """Returns copies of the tools, each {"type": "function", "function": {...}}; None if no tools.

    A bare function schema ("name" and "parameters" at the top) gets this envelope, and the
    parameters' schema is renamed to "parameters"; tools of other types are unchanged. Raises
    ChatTemplateError.
    """
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise ChatTemplateError(f"tools: expected a list of tools, found {type(tools).__name__}")
    schemas = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ChatTemplateError(f"tools[{i}]: expected a mapping, found {type(tool).__name__}")
        try:
            schema = plain(tool)
        except RecursionError:
            raise ChatTemplateError(f"tools[{i}]: {TOO_DEEP}") from None
        if "function" not in schema and isinstance(schema.get("name"), str):
            if schema.get("type") == "function":
                del schema["type"]
            schema = {"type": "function", "function": schema}
        function = schema.get("function")
        if isinstance(function, dict) and "parameters" not in function:
            other = next((name for name in _PARAMETERS if name in function), None)
            if other is not None:
                renamed = {"parameters" if k == other else k: v for k, v in function.items()}
                schema["function"] = renamed
        schemas.append(schema)
    return schemas or None


def plain(value: Any, levels: int = _LEVELS) -> Any:
    """Returns a deep copy in dict, list and str; RecursionError if `value` is nested too deeply."""
    if isinstance(value, str):
        return str(value)
    if not isinstance(value, (Mapping, list, tuple)):
        return value
    if levels == 0:
        raise RecursionError
    if isinstance(value, Mapping):
        return {plain(k): plain(item, levels - 1) for k, item in value.items()}
    return [plain(item, levels - 1) for item in value]


def joined(content: Any) -> str:
    """Returns the text of a content of `conversation`, without thoughts; "" for None."""
    if isinstance(content, Arguments):
        return content.as_text()
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content or ""


def _turns(message: object) -> list[object]:
    """Returns the messages that one with calls or results among its parts (Anthropic) stands for.

    An assistant's parts of type "tool_use" are calls. A user's parts of type "tool_result" become
    one tool message each, before what else the user says. Other messages are returned alone.
    """
    content = message.get("content") if isinstance(message, Mapping) else None
    kind = {"assistant": "tool_use", "user": "tool_result"}.get(
        str(message.get("role")) if isinstance(message, Mapping) else ""
    )
    if not isinstance(message, Mapping) or not isinstance(content, (list, tuple)) or kind is None:
        return [message]
    rest: list[Any] = []
    found: list[Mapping[Any, Any]] = []
    for part in content:
        of_kind = isinstance(part, Mapping) and part.get("type") == kind
        (found if of_kind else rest).append(part)
    if not found:
        return [message]
    if kind == "tool_use":
        calls = [
            {"id": p.get("id"), "function": {"name": p.get("name"), "arguments": p.get("input")}}
            for p in found
        ]
        return [{**message, "content": rest, "tool_calls": calls}]
    results: list[object] = [
        {"role": "tool", "tool_call_id": p.get("tool_use_id"), "content": p.get("content")}
        for p in found
    ]
    return [*results, {**message, "content": rest}] if rest else results


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"{where}: expected a mapping, found {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ChatTemplateError(f"{where}.role: expected a name such as 'user', found {role!r:.40}")
    checked: dict[str, Any] = {
        key: plain(value)
        for key, value in message.items()
        if value is not None and key not in ("content", "tool_calls", "function_call")
    }
    if role == "function":  # OpenAI's name of the role before there were several calls
        role = checked["role"] = "tool"
    calls = _tool_calls(message.get("tool_calls"), f"{where}.tool_calls")
    called = message.get("function_call")
    if called is not None and not calls:  # OpenAI's older form of a single call
        calls = [_tool_call({"function": called}, f"{where}.function_call")]
    sent, thoughts = message.get("content"), list[str]()
    if role == "assistant":
        sent, thoughts = _without_thoughts(sent, f"{where}.content")
    content: Any
    if role == "tool" and _is_json(sent):
        content = _result(sent, f"{where}.content")
    else:
        content = _content(sent, f"{where}.content")
    if content is None and not calls:
        if role not in ("assistant", "tool"):
            raise ChatTemplateError(
                f"{where}.content: expected text or a list of text parts, found None"
            )
        content = ""
    if content == []:  # without parts the content is absent beside calls, otherwise empty text
        content = None if calls else ""
    if content is not None:
        checked["content"] = content
    if calls:
        checked["tool_calls"] = calls
    reasoning = next((checked[name] for name in _REASONING if name in checked), None)
    if reasoning is None and thoughts:
        reasoning = "".join(thoughts)
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        checked["content"] = [*({"type": "thinking", "thinking": t} for t in thoughts), *parts]
    if reasoning is not None:
        checked = {"thinking": reasoning, **checked, "reasoning_content": reasoning}
    return checked


def _without_thoughts(content: object, where: str) -> tuple[object, list[str]]:
    """Splits an assistant's content into its other parts and the texts of its "thinking" parts."""
    if not isinstance(content, (list, tuple)):
        return content, []
    rest, thoughts = [], []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "thinking":
            rest.append(part)
        elif isinstance(part.get("thinking"), str):
            thoughts.append(str(part["thinking"]))
        else:
            raise ChatTemplateError(
                f"{where}[{i}].thinking: expected text, found {part.get('thinking')!r:.40}"
            )
    return rest, thoughts


def _is_json(content: object) -> bool:
    """Returns whether a tool's result is a JSON value: a mapping, a number or a boolean."""
    return isinstance(content, (Mapping, bool, int, float))


def _result(content: object, where: str) -> Arguments:
    value = plain(content)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ChatTemplateError(f"{where}: expected text or a JSON value, found: {error}") from None
    return Arguments(value, None)


def _content(content: object, where: str) -> str | list[dict[str, Any]] | None:
    if content is None:
        return None
    if isinstance(content, str):
        return str(content)
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return [_part(part, f"{where}[{i}]") for i, part in enumerate(content)]
    raise ChatTemplateError(
        f"{where}: expected text or a list of text parts, found {content!r:.40}"
    )


def _part(part: object, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": str(part)}
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in TEXT_KINDS or not isinstance(text, str) or not isinstance(part, Mapping):
        raise ChatTemplateError(
            f"{where}: expected {{'type': 'text', 'text': ...}}, found a part of type {kind!r:.40}"
        )
    return {"type": "text", **{key: plain(part[key]) for key in part if key != "type"}}


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if isinstance(calls, (str, bytes)) or not isinstance(calls, Sequence):
        raise ChatTemplateError(f"{where}: expected a list of calls, found {type(calls).__name__}")
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: object, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ChatTemplateError(f"{where}: expected a mapping, found {type(call).__name__}")
    if call.get("function") is None:  # {"name", "arguments"} without an envelope
        function: object = {k: v for k, v in call.items() if k not in ("id", "type", "function")}
        call = {k: v for k, v in call.items() if k in ("id", "type")}
    else:
        function, where = call["function"], f"{where}.function"
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        name = function.get("name") if isinstance(function, Mapping) else function
        raise ChatTemplateError(f"{where}.name: expected the function's name, found {name!r:.40}")
    checked = {k: plain(v) for k, v in call.items() if v is not None and k != "function"}
    called = {k: plain(v) for k, v in function.items() if v is not None and k != "arguments"}
    called["arguments"] = _arguments(function.get("arguments"))
    return {"type": "function", **checked, "function": called}


def _arguments(sent: object) -> Arguments:
    if sent is None:
        return Arguments({}, None)
    if not isinstance(sent, str):
        return Arguments(plain(sent), None)
    text = str(sent)
    if not text.strip():
        return Arguments({}, text)
    value = _parsed(text)
    if isinstance(value, str) and value is not text:  # some clients encode twice
        inner = _parsed(value)
        if isinstance(inner, dict):
            return Arguments(inner, value)
    return Arguments({} if value is None else value, None if value is None else text)


def _parsed(text: str) -> Any:
    """Returns the value of a JSON text, or `text` itself (the same object) if it is none."""

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):  # JSON has no NaN and Infinity, and 1e999 would become one
            raise ValueError(number)
        return value

    try:
        return plain(json.loads(text, parse_constant=finite, parse_float=finite))
    except (ValueError, RecursionError):
        return text
