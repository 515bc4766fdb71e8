"""What clients of several interfaces send, and the form in which templates get it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stoker.runtime.chat import ChatTemplate
from stoker.runtime.conversation import tool_schemas
from stoker.runtime.errors import ChatTemplateError

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


def test_a_developer_s_message_behind_the_system_s(vocab_dir: Path) -> None:
    """Both reach the model, in their order, whatever a template does with a second one."""
    system = {"role": "system", "content": "Say ABRA."}
    developer = {"role": "developer", "content": "Say KADABRA."}
    checked = 0
    for path in sorted((vocab_dir / "templates").glob("*.jinja")):
        chat = ChatTemplate(path.read_text(encoding="utf-8"), bos_token="<s>", eos_token="</s>")
        try:
            chat.render([{"role": "system", "content": "x"}, USER])
            text = chat.render([system, developer, USER])
        except ChatTemplateError:
            continue
        checked += 1
        assert "ABRA" in text and "KADABRA" in text, path.name
        assert text.index("Say ABRA") < text.index("Say KADABRA"), path.name
    assert checked > 60
    first = "{% for m in messages %}{% if loop.first %}[{{ m.role }}:{{ m.content }}]{% endif %}"
    joined = ChatTemplate(first + "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    assert joined.render([system, developer, USER]) == "[system:Say ABRA.\n\nSay KADABRA.]Weather?"


def test_a_refusal_shows_no_marks() -> None:
    chat = ChatTemplate("{{ messages[0].content }}", control=["<|end|>"])
    said = {"role": "assistant", "content": "so <|end|> it is"}
    with pytest.raises(ChatTemplateError, match=r"found no 'so <\|end\|> it is' there"):
        chat.prompt([USER, said])
