"""Messages in the forms of several clients' interfaces, and the form that templates get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stoker.runtime.base.errors import ChatTemplateError
from stoker.runtime.text.chat import ChatTemplate
from stoker.runtime.text.conversation import tool_schemas

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
        assert list(tool) == ["name", key]  # the client's own key stays


def test_a_developer_s_message_behind_the_system_s(vocab_dir: Path) -> None:
    """Both messages reach the model in order, whatever a template does with a second one."""
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


def test_thoughts_in_parts(vocab_dir: Path) -> None:
    """Thoughts are as transformers prints them if the template takes parts, else the reasoning."""
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    thought = {"type": "thinking", "thinking": "Hmm <s>"}
    said = {"role": "assistant", "content": [thought, {"type": "text", "text": "Sunny"}]}
    path = vocab_dir / "templates" / "mistralai-Ministral-3-14B-Reasoning-2512.jinja"
    source = path.read_text(encoding="utf-8")
    given = {"chat_template": source, "bos_token": "<s>", "eos_token": "</s>"}
    expected = reference.render_jinja_template([[USER, said, USER]], **given)[0][0]
    chat = ChatTemplate(source, bos_token="<s>", eos_token="</s>", control=["<s>"])
    assert chat.render([USER, said, USER]) == expected
    assert "[THINK]Hmm <s>[/THINK]Sunny" in expected
    prompt = chat.prompt([USER, said, USER])
    assert prompt.text.replace(prompt.mark, "") == expected and prompt.mark
    reads = "{% for m in messages %}{{ m.reasoning_content }};{{ m.content }}|{% endfor %}"
    assert rendered(said, USER, source=reads) == "Hmm <s>;Sunny|;Weather?|"
    assert rendered({**said, "content": [thought]}, USER, source=reads) == "Hmm <s>;|;Weather?|"
    assert ChatTemplate(reads).prompt([USER, said]).continued == "Sunny"
    with pytest.raises(ChatTemplateError, match=r"\[0\]\.thinking: expected text, found None"):
        rendered({"role": "assistant", "content": [{"type": "thinking"}]})


@pytest.mark.parametrize("value", [{"degrees": 5, "sky": "<|end|> blue"}, 5, 2.5, True])
def test_results_that_are_values(value: Any) -> None:
    """A result is JSON, encoded once, whether the template prints it so or wants text."""
    text = json.dumps(value)
    for printed in ("m.content", "m.content | tojson", "m.content | string"):
        source = "{% for m in messages %}{% if m.role == 'tool' %}{{ X }}{% else %}."
        source = source.replace("X", printed) + "{% endif %}{% endfor %}"
        chat = ChatTemplate(source, control=["<|end|>"])
        messages = [USER, {"role": "tool", "content": value}]
        assert chat.render(messages) == f".{text}", printed
        prompt = chat.prompt(messages)
        assert prompt.text.replace(prompt.mark or "\0", "") == f".{text}"
        assert "<|end|>" not in prompt.text
    with pytest.raises(ChatTemplateError, match=r"messages\[0\]\.content: expected text or a JSON"):
        rendered({"role": "tool", "content": {"a": float("nan")}})


def test_calls_and_results_in_parts() -> None:
    """Anthropic's blocks become OpenAI's calls and messages of a tool."""
    text = {"type": "text", "text": "I look."}
    use = {"type": "tool_use", "id": "a1", "name": "weather", "input": {"city": "Bonn"}}
    result = {"type": "tool_result", "tool_use_id": "a1", "content": [{**text, "text": "5 C"}]}
    source = TOOLED.replace("{{ m.content }}", "{{ m.tool_call_id }}{{ m.content }}")
    blocks = [
        USER,
        {"role": "assistant", "content": [text, use]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    function = {"name": "weather", "arguments": {"city": "Bonn"}}
    calls = [{"id": "a1", "type": "function", "function": function}]
    tool = {"role": "tool", "tool_call_id": "a1", "content": "5 C"}
    messages = [
        USER,
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        tool,
        {"role": "user", "content": "And?"},
        {"role": "assistant", "tool_calls": calls},
        tool,
    ]
    assert rendered(*blocks, source=source) == rendered(*messages, source=source)
    assert "[tool:a15 C][user:And?]" in rendered(*blocks, source=source)
    with pytest.raises(ChatTemplateError, match=r"messages\[0\]\.tool_calls\[0\].*name"):
        rendered({"role": "assistant", "content": [{"type": "tool_use"}]})


def test_results_that_are_mappings_as_transformers_prints_them(vocab_dir: Path) -> None:
    """These are the templates that print mappings as JSON by themselves."""
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    value = {"degrees": 7405, "sky": "blue"}
    function = {"name": "weather", "arguments": {"city": "Bonn"}}
    calls = [{"id": "call00000", "type": "function", "function": function}]
    result = {"role": "tool", "name": "weather", "tool_call_id": "call00000", "content": value}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": calls}, result]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
    printed = 0
    for path in sorted((vocab_dir / "templates").glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        given = {"chat_template": source, "bos_token": "<s>", "eos_token": "</s>"}
        chat = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
        try:
            expected = reference.render_jinja_template(
                [messages], tools=tools, add_generation_prompt=True, **given
            )[0][0]
        except Exception:
            expected = ""
        if '"sky": "blue"' in expected:
            printed += 1
            assert chat.render(messages, tools=tools) == expected, path.name
    assert printed > 3


def test_ids_of_calls_that_a_template_refuses(vocab_dir: Path) -> None:
    """Mistral's templates take nine letters or digits; OpenAI's clients send longer ids."""
    source = (vocab_dir / "templates/mistralai-Mistral-Nemo-Instruct-2407.jinja").read_text()
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")

    def conversation(one: Any, two: Any) -> list[dict[str, Any]]:
        def call(i: Any, city: str) -> dict[str, Any]:
            function = {"name": "weather", "arguments": {"city": city}}
            return {"id": i, "type": "function", "function": function}

        return [
            {"role": "user", "content": "Compare."},
            {"role": "assistant", "tool_calls": [call(one, "Lima"), call(two, "Cusco")]},
            {"role": "tool", "tool_call_id": one, "content": "19"},
            {"role": "tool", "tool_call_id": two, "content": "11"},
        ]

    expected = template.render(conversation("sent00000", "sent00001"))
    assert expected.count("sent00000") == expected.count("sent00001") == 2
    for ids in (("call_9pw1qnYScqvGrCH58HWCvFH6", "call_x"), ("a", "b"), ("0", "1")):
        assert template.render(conversation(*ids)) == expected
    kept = template.render(conversation("abcdefghi", "123456789"))
    assert kept.count("abcdefghi") == kept.count("123456789") == 2
