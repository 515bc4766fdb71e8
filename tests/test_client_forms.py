"""What clients of several interfaces send, and the form in which templates get it."""

from __future__ import annotations

from typing import Any

from stoker.runtime.chat import ChatTemplate
from stoker.runtime.conversation import tool_schemas

USER = {"role": "user", "content": "Weather?"}
TOOLED = (
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}]{% endfor %}"
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}


def rendered(*messages: Any, source: str = TOOLED) -> str:
    return ChatTemplate(source).render(list(messages), add_generation_prompt=False)


def test_the_one_call_of_earlier_clients() -> None:
    """OpenAI's function_call and role "function" are a call and its result."""
    function = {"name": "weather", "arguments": '{"city": "Bonn"}'}
    before = rendered(
        USER,
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "weather", "content": "5 C"},
    )
    today = rendered(
        USER,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "weather", "content": "5 C"},
    )
    assert before == today
    assert 'weather({"city": "Bonn"})' in before and "[tool:5 C]" in before


def test_a_tool_s_schema_under_other_names() -> None:
    expected = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
    for key in ("parameters", "input_schema", "inputSchema"):
        tool = {"name": "f", key: PARAMETERS}
        assert tool_schemas([tool]) == expected
        assert tool_schemas([{"type": "function", "function": tool}]) == expected
        assert list(tool) == ["name", key]  # the client's own stays
