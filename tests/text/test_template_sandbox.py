"""The sandbox of chat templates: it stops hostile templates and serves harmless ones."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest
from jinja2.sandbox import SandboxedEnvironment
from stoker.runtime.base.errors import ChatTemplateError
from stoker.runtime.text import template_values
from stoker.runtime.text.chat import ChatTemplate

USER = {"role": "user", "content": "Hello"}


def render(source: str, *messages: Any) -> str:
    return ChatTemplate(source).render(list(messages) or [USER])


STOPPED = r"is stopped: (more than|a (value|number|width|search) of)"
GROW = "{% set ns = namespace(s='aa', l=['a'], n=9) %}{% for i in range(99) %}"


def test_lists_of_the_template_are_its_own() -> None:
    source = (
        "{% set l = [1, 2] %}{% set _ = l.append(3) %}{{ l.pop(0) }}{{ l }}"
        "{% set m = messages[:] %}{% set _ = m.append(4) %}{{ m | length }}{{ messages | length }}"
    )
    assert render(source) == "1[2, 3]21"


@pytest.mark.parametrize(
    "expression",
    [
        "[[1, 2], [3]] | sum(start=[])",
        "((1, 2), (3,)) | sum(start=())",
        "[1, 2.5] | sum",
        "[{'a': 1}, {'a': 2}] | sum(attribute='a', start=5)",
        "range(5) | batch(2, 0) | list",
        "range(5) | slice(2) | map('list') | list",
        "'b a b' | unique | list",
        "[3, 1, 2] | sort(reverse=true)",
        "[[2], [1, 5]] | min",
        "[{'a': 1, 'b': 2}, {'a': 1, 'b': 3}] | groupby('a') | map('last') | list",
        "[1] in [[1], [2]], [[1]] < [[1, 2]], [1, 2] is eq [1, 2], 3 is in [3, 4]",
        "[1, 2, 3][::-1], [1, 2, 3][1:], 'abc'[1:2], (1, 2, 3)[:-1], 'abc'[1], 'abc'[7]",
        "{'a': 1}.items() | list, {'a': 1}.keys() == {'a': 2}.keys()",
        "'a,b'.split(',')",
        "['x', ['y']] | join('-')",
        "'a\nb' | indent('> ', true)",
        "'%s-%5.1f' | format('a', 2)",
        "dict([('a', [1])], b=2)",
        "[1, 2] | first ~ ([1, 2] | last) ~ [1]",
        "(1).to_bytes(2, 'big')",
        "cycler('a', 'b').next(), namespace(a=[1]).a, namespace(a=[1])",
    ],
)
def test_expressions_have_jinja_s_values(expression: str) -> None:
    source = "{{ " + expression + " }}"
    assert render(source) == SandboxedEnvironment().from_string(source).render()


def test_lists_grow_until_they_are_part_of_another() -> None:
    for source, printed in (
        ("{% set a, b = [], [] %}{% set _ = a.append(1) %}{{ a }}{{ b }}", "[1][]"),
        ("{% set _ = l.append('x') %}{% set _ = l.append('y') %}{{ l }}{{ l.pop() }}{{ l }}",
         "['x', 'y']y['x']"),
        ("{% set ns = namespace(l=l) %}{% set _ = ns.l.append([1]) %}{{ l }}", "[[1]]"),
        ("{% set l = 'a b'.split() %}{% set _ = l.append('c') %}{{ l }}", "['a', 'b', 'c']"),
        ("{% set l = (1, 2) | list %}{% set _ = l.append(3) %}{{ l }}", "[1, 2, 3]"),
        ("{% set l = [1] + [2] %}{% set _ = l.append(3) %}{{ l }}", "[1, 2, 3]"),
        ("{% macro add(to) %}{% set _ = to.append(1) %}{% endmacro %}{{ add(l) }}{{ l }}", "[1]"),
    ):  # fmt: skip
        assert render("{% set l = [] %}" + source) == printed
        assert SandboxedEnvironment().from_string("{% set l = [] %}" + source).render() == printed
    for holder in ("[l]", "(l,)", "{'a': l}", "dict(a=l)", "m.append(l)", "keep(l)", "keep(a=l)"):
        source = (
            "{% macro keep() %}{{ varargs }}{{ kwargs }}{% endmacro %}"
            "{% set l, m = [], [] %}{% set _ = " + holder + " %}{% set _ = l.append(1) %}"
        )
        with pytest.raises(
            ChatTemplateError, match=r"line 1: append: expected a list that is part of"
        ):
            render(source)


# Values that hold the value before twice.
TWICE = "{% set m = [] %}{% set _ = m.append(ns.l) %}{% set _ = m.append(ns.l) %}{% set ns.l = m %}"


@pytest.mark.parametrize(
    "source",
    [
        GROW + TWICE + "{% endfor %}{{ ns.l }}",
        GROW + TWICE + "{% set ns.k = m | list %}{% endfor %}{{ ns.l == ns.k }}",
        GROW + "{% set ns.l = {'a': ns.l, 'b': ns.l}.items() %}{% endfor %}{{ ns.l | string }}",
        GROW + "{% set ns.l = cycler(ns.l, ns.l).items %}{% endfor %}{{ ns.l | upper }}",
        GROW + "{% set ns.l = dict.fromkeys('ab', ns.l) %}{% endfor %}{{ ns.l | upper }}",
        "{% macro f(n) %}{{ f(n - 1, varargs, varargs) if n else {varargs: 1} }}{% endmacro %}"
        "{{ f(60) }}",
        "{% macro f(n) %}{{ f(n - 1, a=kwargs, b=kwargs) if n else kwargs == 1 }}{% endmacro %}"
        "{{ f(60) }}",
        "{% set l = [] %}{% set _ = l.append(l) %}{{ l }}",
        "{% set l = [] %}{% set _ = l.append(l) %}{{ l | tojson }}",
    ],
)
def test_growing_values_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_values, "MAX_OUTPUT", 1 << 18)
    with pytest.raises(ChatTemplateError, match=STOPPED):
        render(source)


# A list that is filled from the top: the part that was appended twice gets its own parts later.
DOWN = (
    "{% set a, b = [], [] %}{% set ns = namespace(l=a, k=b) %}{% for i in range(60) %}"
    "{% set m, n = [], [] %}{% set _ = ns.l.append(m) %}{% set _ = ns.l.append(m) %}"
    "{% set _ = ns.k.append(n) %}{% set _ = ns.k.append(n) %}{% set ns.l = m %}{% set ns.k = n %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    "expression",
    ["a == b", "a != b", "a < b", "a in [b]", "a is eq b", "[a, b] | sort", "[a, b] | min",
     "[{'a': a}, {'a': b}] | groupby('a')", "a | upper", "a | tojson", "a", "[b].index(a)",
     "[b] | select('eq', a) | list", "loop.changed(b)"],
)  # fmt: skip
def test_parts_do_not_grow(expression: str) -> None:
    loop = "{% for x in (1, 2) %}{% set _ = loop.changed(a) %}{{ " + expression + " }}{% endfor %}"
    for chat in (ChatTemplate(DOWN + loop), ChatTemplate(DOWN + loop, control=["<end>"])):
        start = time.thread_time()
        with pytest.raises(ChatTemplateError, match="append: expected a list that is part of no"):
            chat.prompt([{"role": "user", "content": "<end>"}])
        assert time.thread_time() - start < 1


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum(n=10**9) }}",
    ],
)
def test_nothing_to_reach(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(90) }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [0] * 10 ** 10 }}",
        "{{ 9 ** 9999999 }}",
        GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
        GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        GROW + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
        GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}",
        GROW + "{% set ns.l = (ns.l, ns.l) %}{% endfor %}",
        GROW + "{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}",
        GROW + "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}",
        GROW + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{{ 'a'.ljust(width=10 ** 10) }}",
        "{{ 'a'.zfill(10 ** 10) }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ 'a' | indent(10 ** 10, true) }}",
        "{{ [1] | batch(10 ** 9, 'x') | list }}",
        "{{ 1.5 | round(10 ** 9) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 9999999999) }}",
        "{{ strftime_now('%9999999999d') }}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{% set a = 'a' * 10 ** 5 %}{{ a.replace('a', a) }}",
        "{% set a = 'a' * 10 ** 5 %}{{ a | replace('a', a) }}",
        "{% set a = 'a' * 10 ** 5 %}{{ a.join(a) }}",
        "{% set a = 'a' * 10 ** 5 %}{{ range(99999) | join(a) }}",
        GROW + "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
        GROW + "{% set ns.s = twice(ns.s) %}{% endfor %}",
        GROW + "{% set ns.s = ns.s | tojson %}{% endfor %}",
        GROW
        + "{% set ns.b = 'a'.encode() %}{% set ns.b = ns.b + ns.b %}"
        + "{% set ns.b = ns.b + ns.b %}" * 30
        + "{% endfor %}",
        "{{ 'a'.encode().ljust(10 ** 10) }}",
        "{{ 'a'.encode() % () }}{{ '%9999999999d'.encode() % 1 }}",
        "{% set b = ('a' * 10 ** 5).encode() %}{{ b.replace('a'.encode(), b) }}",
        "{{ (1).to_bytes(10 ** 10, 'big') }}",
        "{{ ('a\n' * 10 ** 5) | indent('a' * 10 ** 5) }}",
        "{{ range(9999) | list | tojson(indent='a' * 10 ** 5) }}",
        "{{ range(9999) | list | tojson(separators=('a' * 10 ** 5, ':')) }}",
        "{% set l = ['a' * 10 ** 5] %}{{ range(9999) | map(attribute='x', default=l) | list }}",
        "{% set l = ['a' * 10 ** 5] %}"
        "{{ range(9999) | map(attribute='x', default=l) | batch(9999) | first }}",
        "{% set l = ['a' * 10 ** 5] %}{{ range(9999) | map(attribute='x', default=l) | sort }}",
        "{% set l = ['a' * 10 ** 5] %}{{ 1 in (range(9999) | map(attribute='x', default=l)) }}",
        "{% set l = [0] * 10 ** 4 %}"
        "{{ range(9999) | map(attribute='x', default=l) | sum(start=[]) }}",
        "{% set m %}" + "{{ 'a' * 10 ** 5 }}{% if false %}{% endif %}" * 999 + "{% endset %}",
        "{% set a = 'a' * 10 ** 5 %}{{ a.rfind('a' + 'b' + a) }}",
        "{% set ns = namespace() %}{% set ns.a = [ns, ns] %}{{ ns.a | upper }}",
    ],
)
def test_nothing_runs_away(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_values, "MAX_STEPS", 20_000)
    monkeypatch.setattr(template_values, "MAX_OUTPUT", 1 << 18)
    monkeypatch.setattr(template_values, "MAX_PRINTED", 1 << 20)
    source = "{% macro twice(s) %}{{ s }}{{ s }}{% endmacro %}" + source
    start = time.thread_time()
    with pytest.raises(ChatTemplateError, match=STOPPED):
        render(source)
    assert time.thread_time() - start < 10


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10 ** 9) | list }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    ],
)
def test_depth_and_ranges_are_limited(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(source)


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_values, "MAX_SECONDS", 0.05)
    with pytest.raises(ChatTemplateError, match=r"is stopped: more than 0\.05 seconds"):
        render("{% for a in range(99999) %}{{ ('x' * 10000) | length }}{% endfor %}")


@pytest.mark.parametrize(
    "expression",
    ["a | upper", "a ~ a", "a == ''", "a.upper()", "a + a", "a is eq ''", "a[1:]", "[a]"],
)
def test_time_is_limited_without_loops(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function whose time grows with a text's size checks the clock."""
    chat = ChatTemplate(
        "{% set a = messages[0].content %}{% if go %}{{ EXPRESSION }}{% endif %}a".replace(
            "EXPRESSION", expression
        )
    )
    for go, seconds in ((True, 5), (False, -1)):
        monkeypatch.setattr(template_values, "MAX_SECONDS", seconds)
        assert chat.render([USER], go=go).endswith("a")
    with pytest.raises(ChatTemplateError, match="is stopped: more than -1 seconds"):
        chat.render([USER], go=True)


def test_time_of_trials_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(time, "thread_time", lambda: float(next(clock)))
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    with pytest.raises(ChatTemplateError, match="is stopped: its trials took more than 5 seconds"):
        render("no needle", USER, call)


def test_threads_have_budgets_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_values, "MAX_STEPS", 1500)
    template = ChatTemplate("{% for i in range(1000) %}x{% endfor %}")
    found: list[int] = []

    def work() -> None:
        found.extend(len(template.render([USER])) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1000] * 80
