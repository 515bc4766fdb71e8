"""Chat templates: the published ones against transformers, bad messages, hostile code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from make_text_golden import CASES, digest, fixed_date
from stoker.runtime.base.errors import ChatTemplateError, OptionError
from stoker.runtime.text import chat, template_sandbox
from stoker.runtime.text.chat import ChatTemplate
from stoker.runtime.text.tokenizer import Tokenizer

GOLDEN: dict[str, dict[str, str | None]] = json.loads(
    (Path(__file__).parents[1] / "data" / "golden_chat.json").read_text()
)
USER = {"role": "user", "content": "Hello"}
PRINT = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"

PARTS = (
    "{% for m in messages %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }};{% endif %}{% endfor %}{% endfor %}"
)


def render(source: str, *messages: Any, **extra: Any) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(
        list(messages) or [USER], **extra
    )


def tokenizer_of(*tokens: str) -> Tokenizer:
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *tokens],
        "tokenizer.ggml.scores": [0.0] * (3 + len(tokens)),
    }
    return Tokenizer.from_metadata(values.get)


# The published templates.


@pytest.mark.parametrize("file", sorted(GOLDEN))
def test_published_templates(vocab_dir: Path, file: str) -> None:
    source = (vocab_dir / "templates" / file).read_text(encoding="utf-8")
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    for case, (messages, tools, prompt) in CASES.items():
        expected = GOLDEN[file][case]
        try:
            text = template.render(
                messages, tools=tools, add_generation_prompt=prompt, strftime_now=fixed_date
            )
        except ChatTemplateError as error:
            assert expected is None, (case, error)
            assert str(error).startswith("chat template 'default'")
            assert "\n" not in str(error)
        else:
            # Templates for tools that transformers cannot render without any, we can; and one
            # whose tojson gets an iterator (tests/text/test_conversations.py).
            more = tools is None or file == "llama-cpp-deepseek-r1.jinja"
            assert expected == digest(text) or (expected is None and more), case
            assert str(messages[-1]["content"]) in text


def test_every_published_template_has_a_golden(vocab_dir: Path) -> None:
    assert {path.name for path in (vocab_dir / "templates").glob("*.jinja")} == set(GOLDEN)


# Files.


def test_templates_of_a_file() -> None:
    values: dict[str, Any] = {
        "tokenizer.chat_template": "{{ bos_token }}plain",
        "tokenizer.chat_templates": ["tool_use", "rag"],
        "tokenizer.chat_template.tool_use": "{{ tools | length }} tools{{ eos_token }}",
        "tokenizer.chat_template.rag": "rag",
    }
    template = ChatTemplate.from_metadata(values.get, tokenizer_of())
    assert template.names == ("default", "tool_use", "rag")
    assert template.render([USER]) == "<s>plain"
    assert template.render([USER], tools=[{"name": "f"}]) == "1 tools</s>"
    assert template.render([USER], template="rag") == "rag"
    with pytest.raises(ChatTemplateError, match="no chat template 'x'; the model has: default, "):
        template.render([USER], template="x")


def test_a_file_without_template() -> None:
    def nothing(key: str) -> None:
        return None

    template = ChatTemplate.from_metadata(nothing, tokenizer_of("<|im_start|>", "<|im_end|>"))
    system = {"role": "system", "content": "Be brief"}
    assert template.render([system, USER]) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert template.render([USER], add_generation_prompt=False).endswith("Hello<|im_end|>\n")
    with pytest.raises(ChatTemplateError, match=r"no tokenizer\.chat_template.* of your own"):
        ChatTemplate.from_metadata(nothing, tokenizer_of("<|im_start|>"))


def test_an_empty_template_is_none() -> None:
    chatml = tokenizer_of("<|im_start|>", "<|im_end|>")
    empty = ChatTemplate.from_metadata({"tokenizer.chat_template": ""}.get, chatml)
    assert empty.render([USER]) == ChatTemplate.from_metadata({}.get, chatml).render([USER])
    with pytest.raises(ChatTemplateError, match=r"no tokenizer\.chat_template"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": ""}.get, tokenizer_of())


# Functions and values that templates may use.


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'a': '<é>', 'b': [1, 2.5, none]} | tojson }}", '{"a": "<é>", "b": [1, 2.5, null]}'),
        ("{{ {'é': 1} | tojson(ensure_ascii=True, indent=1) }}", '{\n "\\u00e9": 1\n}'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}", '{"a":2,"b":1}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in [0, 1] %}{% if i == 0 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "aHellob"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
         "{{ ns.n }}", "1"),
        ("{{ 'a' ~ 1 ~ (none if true) ~ missing }}", "a1None"),
        ("{{ (1, [2, {'k': 'v'}]) }}", "(1, [2, {'k': 'v'}])"),
        ("{{ ['a', 'b'] | join('-') }}{{ '/'.join(['c', 'd']) }}", "a-bc/d"),
        ("{{ '%s is %03d' % ('x', 7) }} {{ '{:>4}'.format(5) }} {{ 'y' | indent(2, true) }}",
         "x is 007    5   y"),
        ("{{ 'aXbX'.replace('X', '--') }}{{ 'q' | replace('q', 'r') }}", "a--b--r"),
        ("{% macro f(x) %}{{ x }}{{ caller() }}{% endmacro %}{% call f(1) %}2{% endcall %}", "12"),
        ("{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %}", "x1"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ enable_thinking }} {{ tools }} {{ documents }}", "False None None"),
    ],
)  # fmt: skip
def test_language(source: str, expected: str) -> None:
    assert render(source, enable_thinking=False) == expected


def test_rejections_and_faults_name_the_line() -> None:
    with pytest.raises(ChatTemplateError) as caught:
        render("{{ raise_exception('Roles must\nalternate') }}")
    assert str(caught.value) == (
        "chat template 'default' rejects the conversation: Roles must alternate"
    )
    with pytest.raises(ChatTemplateError, match="'default', line 2: 'nope' is undefined"):
        render("a\n{{ nope.x.y }}")
    with pytest.raises(ChatTemplateError, match=r"'default', line 3: .*unknown tag 'zap'"):
        render("\n\n{% zap %}")
    with pytest.raises(ChatTemplateError, match="expected at most"):
        render("x" * (template_sandbox.MAX_SOURCE + 1))


# Messages.


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(PRINT, {"role": "user", "content": parts}) == "[user:ab]"


def test_templates_that_want_parts_get_them() -> None:
    said = {"role": "assistant", "content": "Hi"}
    assert render(PARTS, USER, said, add_generation_prompt=False) == "Hello;Hi;"


def test_tool_calls_need_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert render(PRINT, USER, call) == "[user:Hello][assistant:]"
    assert render(PRINT, {"role": "assistant"}, add_generation_prompt=False) == "[assistant:]"


@pytest.mark.parametrize(
    "content",
    [
        "ab",
        ["a", "b"],
        [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}],
        [{"text": "a"}, {"type": "text", "text": "b", "annotations": []}],
    ],
)
def test_kinds_of_text(content: Any) -> None:
    assert render(PRINT, {"role": "user", "content": content}) == "[user:ab]"
    assert render(PARTS, {"role": "user", "content": content}).replace(";", "") == "ab"


def test_parts_reach_templates_that_take_them() -> None:
    both = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }};{% else %}"
        "{{ m.content | map(attribute='text') | join('|') }};{% endif %}{% endfor %}"
    )
    parts = {"role": "user", "content": ["a", "b"]}
    assert render(both, USER, parts) == "Hello;a|b;"
    # If a template takes parts of users' messages only, a system message's parts are joined.
    users = both.replace("m.content is string", "m.content is string or m.role == 'system'")
    assert render(users, {"role": "system", "content": ["a", "b"]}, parts) == "ab;a|b;"
    # If it takes parts of the first message only, all messages' parts are joined.
    first = both.replace("m.content is string", "m.content is string or not loop.first")
    assert render(first, parts) == "a|b;"
    assert render(first, parts, parts) == "ab;ab;"


CALLS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% for c in m.tool_calls or [] %}"
    "{{ c.type }} {{ c.function.name }}({{ ARGUMENTS }});{% endfor %}{% endfor %}"
)
AS_MAPPING = CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")
AS_TEXT = CALLS.replace("ARGUMENTS", "'' + c.function.arguments")
ITEMS = CALLS.replace("ARGUMENTS", "c.function.arguments.items() | map('join', '=') | join(',')")
EITHER = CALLS.replace(
    "ARGUMENTS",
    "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def calling(call: Any, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", **extra, "tool_calls": [call]}


@pytest.mark.parametrize("source", [AS_MAPPING, AS_TEXT, EITHER])
@pytest.mark.parametrize(
    "call",
    [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"é": [1, None]}}},
        {"function": {"name": "f", "arguments": '{"é": [1, null]}'}},
        {"type": "function", "function": {"name": "f", "arguments": '{"\\u00e9":[1,null]}'}},
        {"name": "f", "arguments": '{"é": [1, null]}'},
        {"id": "1", "type": "function", "name": "f", "arguments": {"é": (1, None)}},
        {"function": None, "name": "f", "arguments": json.dumps('{"é": [1, null]}')},
    ],
)
def test_forms_of_tool_calls(source: str, call: Any) -> None:
    expected = 'user:Hello;assistant:;function f({"é": [1, null]});'
    for content in ({}, {"content": None}, {"content": ""}, {"content": []}):
        assert render(source, USER, calling(call, **content)) == expected


@pytest.mark.parametrize(
    ("arguments", "mapping", "text", "items"),
    [
        (None, "{}", "{}", ""),
        ("", "{}", "{}", ""),
        (" ", "{}", "{}", ""),
        ("null", "{}", "{}", ""),
        ('{"a": 1.5, "b": -2}', '{"a": 1.5, "b": -2}', '{"a": 1.5, "b": -2}', "a=1.5,b=-2"),
        ("[1, 2]", "[1, 2]", "[1, 2]", None),
        ([1, 2], "[1, 2]", "[1, 2]", None),
        ('"x"', '"x"', '"x"', None),
        ("7", "7", "7", None),
        (7, "7", "7", None),
        ('{"a": "b', '"{\\"a\\": \\"b"', '{"a": "b', None),  # what a model had no room to end
        ('{"a": NaN}', '"{\\"a\\": NaN}"', '{"a": NaN}', None),
        ('{"a": 1e999}', '"{\\"a\\": 1e999}"', '{"a": 1e999}', None),
        ("[" * 200 + "]" * 200, json.dumps("[" * 200 + "]" * 200), "[" * 200 + "]" * 200, None),
        ("[" * 99999, json.dumps("[" * 99999), "[" * 99999, None),
    ],
)
def test_arguments(arguments: Any, mapping: str, text: str, items: str | None) -> None:
    call = calling({"name": "f", "arguments": arguments})
    assert render(AS_MAPPING, call) == f"assistant:;function f({mapping});"
    for source in (AS_TEXT, EITHER):
        assert render(source, call) == f"assistant:;function f({text});"
    if items is not None:
        assert render(ITEMS, call) == f"assistant:;function f({items});"
    else:
        with pytest.raises(ChatTemplateError) as caught:
            render(ITEMS, USER, call)
        found = repr(arguments)[:60]
        assert str(caught.value) == (
            "messages[1].tool_calls[0]: chat template 'default' expects arguments that are a JSON "
            f"object, found {found}"
        )


def test_calls_get_the_ids_that_a_template_wants() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% if c.id | length != 9 %}{{ raise_exception('no id') }}{% endif %}{{ c.id }};"
        "{% endfor %}{% if m.role == 'tool' %}{{ m.tool_call_id[-1] }}={{ m.content }};{% endif %}"
        "{% endfor %}"
    )
    call = {"name": "f", "arguments": {}}
    calls = {"role": "assistant", "tool_calls": [call, call]}
    results = [{"role": "tool", "content": text} for text in ("x", "y")]
    prompt = "call00000;call00001;0=x;1=y;"
    assert render(source, calls, *results) == prompt
    own = [{**call, "id": f"call0000{i}"} for i in range(2)]
    named = [{**r, "tool_call_id": f"call0000{i}"} for i, r in enumerate(results)]
    assert render(source, {**calls, "tool_calls": own}, *named) == prompt
    # A template that does without an id gets none.
    assert render("{{ messages[0].tool_calls[0].id is defined }}", calls) == "False"


def test_content_that_a_template_wants_beside_calls() -> None:
    call = calling({"name": "f", "arguments": {}})
    each = "{% for m in messages %}FORM{% endfor %}"
    name = "{{ m.tool_calls[0].function.arguments | tojson if m.tool_calls else '' }}"
    split = each.replace("FORM", "{{ m.content.split(' ') }}" + name)
    assert render(split, USER, call) == "['Hello']['']{}"
    if_none = each.replace("FORM", "{% if m.content is none %}" + name + "{% endif %}")
    assert render(if_none, USER, call) == "{}"
    if_absent = each.replace("FORM", "{% if m.content is undefined %}" + name + "{% endif %}")
    assert render(if_absent, USER, call) == "{}"


def test_developer_is_a_system_message_where_there_is_no_other() -> None:
    developer = {"role": "developer", "content": "Brief"}
    assert render(PRINT, developer, USER) == "[developer:Brief][user:Hello]"
    known = (
        "{% for m in messages %}{% if m.role not in ['system', 'user'] %}"
        "{{ raise_exception('unknown role') }}{% endif %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    )
    assert render(known, developer, USER) == "[system:Brief][user:Hello]"
    silent = "{% for m in messages if m.role in ['system', 'user'] %}[{{ m.content }}]{% endfor %}"
    assert render(silent, developer, USER) == "[Brief][Hello]"


def test_tools_in_their_envelope() -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    expected = [{"type": "function", "function": function}]
    source = "{{ tools | tojson }}"
    for tool in (expected[0], function, {"type": "function", **function}):
        assert json.loads(render(source, tools=[tool])) == expected
    other = {"type": "browser"}
    assert json.loads(render(source, tools=[other])) == [other]
    for tools, message in (
        ("f", "tools: expected a list of tools, found str"),
        ([function, "f"], r"tools\[1\]: expected a mapping, found str"),
    ):
        with pytest.raises(ChatTemplateError, match=message):
            render(source, tools=tools)


def test_reasoning_has_the_names_that_templates_read() -> None:
    source = "{{ messages[0].reasoning_content }}/{{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        message = {"role": "assistant", "content": "x", name: "why"}
        assert render(source, message, add_generation_prompt=False) == "why/why"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages: expected a list of messages, found str"),
        ([], "expected at least one message"),
        (["hi"], r"messages\[0\]: expected a mapping, found str"),
        ([USER, {"content": "x"}], r"messages\[1\].role: expected a name .* found None"),
        ([{"role": 3, "content": "x"}], r"messages\[0\].role: .* found 3"),
        ([{"role": "user"}], r"messages\[0\].content: expected text .* found None"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content: .* found 5"),
        ([{"role": "user", "content": [{"type": "image_url"}]}],
         r"messages\[0\].content\[0\]: expected .* found a part of type 'image_url'"),
        ([{"role": "user", "content": [5]}], r"content\[0\]: .* found a part of type 'int'"),
        ([{"role": "tool", "content": [{"type": "text", "text": 5}]}], r"content\[0\]: "),
        ([{**USER, "x": nested(200)}], "messages: expected at most 100 levels of mappings and"),
        ([calling({"name": "f", "arguments": nested(9999)})], "messages: expected at most 100"),
        ([calling("f")], r"messages\[0\].tool_calls\[0\]: expected a mapping, found str"),
        ([calling({})], r"tool_calls\[0\].name: expected the function's name, found None"),
        ([calling({"function": "f"})], r"tool_calls\[0\].function.name: .* found 'f'"),
        ([{**calling({}), "tool_calls": "f"}], "tool_calls: expected a list of calls, found str"),
    ],
)  # fmt: skip
def test_bad_messages(messages: Any, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(PRINT).render(messages)


def test_messages_stay_as_they_were() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    before = json.dumps(messages)
    ChatTemplate(PRINT).render(messages)
    assert json.dumps(messages) == before


# Variables.


def test_a_template_is_read_once_for_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate({"default": "{{ budget }}", "tool_use": "{{ effort }}"})
    read: list[str] = []
    undeclared = chat.undeclared
    monkeypatch.setattr(chat, "undeclared", lambda e, s: read.append(s) or undeclared(e, s))
    for _ in range(3):
        assert template.prompt([USER], variables={"budget": 5}).text == "5"
        tools = [{"name": "f"}]
        assert template.prompt([USER], tools=tools, variables={"effort": "x"}).text == "x"
    assert sorted(read) == ["{{ budget }}", "{{ effort }}"]


def test_variables() -> None:
    source = (
        "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}{{ budget }}"
        "{% set local = 1 %}{{ messages[0].content }}{{ strftime_now }}"
    )
    template = ChatTemplate(source)
    given = {"enable_thinking": False, "budget": 5}
    assert template.prompt([USER], variables=given).text.startswith("no5Hello")
    with pytest.raises(OptionError, match=r"'thinking': .* reads the variables budget, enable_"):
        template.prompt([USER], variables={"thinking": False})
    for owned in ("messages", "tools", "add_generation_prompt", "bos_token", "strftime_now"):
        with pytest.raises(OptionError, match=f"'{owned}' is set by the prompt itself"):
            template.prompt([USER], variables={owned: 1})
    with pytest.raises(OptionError, match=r"template must map the names .* not \['enable"):
        template.prompt([USER], variables=["enable_thinking"])  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="template: expected at most 100 levels"):
        template.prompt([USER], variables={"budget": nested(200)})
    with pytest.raises(OptionError, match="'a': chat template 'default' reads none"):
        ChatTemplate(PRINT).prompt([USER], variables={"a": 1})
