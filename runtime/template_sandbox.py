"""The Jinja environment in which chat templates run, and its bounds.

A template comes with a model file, so it is untrusted code. It runs in Jinja's sandbox, and what
the sandbox leaves open is bounded here: the steps of loops and macros, the time, and the size of
every value that it can build, multiply, join or pad.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from .errors import ChatTemplateError, one_line

if TYPE_CHECKING:
    from jinja2 import Environment, Template

    from .control_marks import ControlMarks

MAX_SOURCE = 1 << 20  # characters of a template
MAX_OUTPUT = 1 << 22  # characters of a prompt, and of any value made on the way
MAX_STEPS = 1_000_000  # passes of loops and calls of macros in one rendering
MAX_SECONDS = 5.0  # of one rendering, of its thread: a busy machine is not its fault
_MAX_WIDTH = 4096  # any number given to a padding or cutting function
_MAX_INT_BITS = 4096


class _Rejection(Exception):
    """raise_exception() of a template."""


class _Runaway(Exception):
    """A bound of this file was reached."""


class TemplateStopped(ChatTemplateError):
    """The same, as rendering tells it."""


class _Budget(threading.local):
    """What the rendering in this thread may still spend, and the marks in its messages."""

    steps = 0
    deadline = 0.0
    marks: ControlMarks | None = None

    def reset(self, marks: ControlMarks | None) -> None:
        self.marks = marks
        self.steps = MAX_STEPS
        self.deadline = time.thread_time() + MAX_SECONDS

    def step(self) -> str:
        self.steps -= 1
        if self.steps < 0:
            raise _Runaway(f"more than {MAX_STEPS} steps")
        if time.thread_time() > self.deadline:
            raise _Runaway(f"more than {MAX_SECONDS:g} seconds")
        return ""


_BUDGET = _Budget()


def compile_template(environment: Environment, source: str, name: str) -> Template:
    """The template of a source text; `name` is for messages. ChatTemplateError if malformed."""
    from jinja2 import TemplateSyntaxError

    if len(source) > MAX_SOURCE:
        raise ChatTemplateError(
            f"chat template {name!r}: expected at most {MAX_SOURCE} characters, found {len(source)}"
        )
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"chat template {name!r}, line {error.lineno}: {one_line(error)}"
        ) from None
    except Exception as error:  # the template is data: whatever it breaks is its error
        raise ChatTemplateError(f"chat template {name!r}: {one_line(error)}") from None


class _Given(list[Any]):
    """A list of the conversation, which a template may not change."""


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items()}
    return _Given(map(_given, value)) if isinstance(value, list) else value


def render_template(
    template: Template,
    name: str,
    variables: Mapping[str, Any],
    marks: ControlMarks | None = None,
) -> str:
    """What a template of the sandbox prints. ChatTemplateError, TemplateStopped at a bound.

    marks: those that the variables have; comparisons and searches do not see them.
    """
    _BUDGET.reset(marks)
    chunks: list[str] = []
    size = 0
    try:
        given = {key: _given(value) for key, value in variables.items()}
        for chunk in template.generate(given):
            size += len(chunk)
            if size > MAX_OUTPUT:
                raise _Runaway(f"more than {MAX_OUTPUT} characters")
            chunks.append(chunk)
    except _Rejection as error:
        message = f"chat template {name!r} rejects the conversation: {one_line(error)}"
        raise ChatTemplateError(message) from None
    except _Runaway as error:
        message = f"chat template {name!r} is stopped: {one_line(error)}"
        raise TemplateStopped(message) from None
    except Exception as error:  # the template is data: whatever it breaks is its error
        message = f"chat template {name!r}{_line_of(error)}: {one_line(error)}"
        raise ChatTemplateError(message) from None
    return "".join(chunks)


def _line_of(error: BaseException) -> str:
    line = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return line


# The environment.


def _bounded(size: int) -> None:
    if size > MAX_OUTPUT:
        raise _Runaway(f"a value of more than {MAX_OUTPUT} characters")


def _size(value: object) -> int:
    """About how many characters a value prints as, shared parts counted each time they occur."""
    from jinja2.utils import Namespace

    total = 0
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += 4 * len(item)
            _bounded(total)
            rest += item.keys()
            rest += item.values()
        elif isinstance(item, (list, tuple)):
            total += 2 * len(item)
            _bounded(total)
            rest += item
        else:
            total += 1
            if isinstance(item, Namespace):
                rest.append(object.__getattribute__(item, "_Namespace__attrs"))
        _bounded(total)
    return total


def _check_widths(*values: object) -> None:
    for value in values:
        if isinstance(value, (int, float)) and abs(value) > _MAX_WIDTH:
            raise _Runaway(f"a width of more than {_MAX_WIDTH}")


def _check_format(pattern: object, values: object) -> None:
    """A printf or str.format pattern: no wide fields, no field as long as the limit."""
    text = str(pattern)
    if any(int(digits[:9]) > _MAX_WIDTH for digits in re.findall(r"\d{4,}", text)) or (
        re.search(r"%[^a-zA-Z%]*\*|\{[^{}]*\{", text)
    ):
        raise _Runaway(f"a width of more than {_MAX_WIDTH}")
    fields = text.count("%") + text.count("{")
    items = values if isinstance(values, (tuple, list)) else [values]
    _bounded(len(text) + fields * max([_size(item) for item in items], default=0))


def _check_binary(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if operator == "**":
            bits = left.bit_length() * max(right, 0)
        if bits > _MAX_INT_BITS and operator in ("*", "**"):
            raise _Runaway(f"a number of more than {_MAX_INT_BITS} bits")
    elif operator == "+":
        _bounded(_size(left) + _size(right))
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(count, int):
                _bounded(_size(sequence) * max(count, 0))
    elif operator == "%" and isinstance(left, str):
        _check_format(left, right)


def _check_join(separator: object, items: Sequence[object]) -> None:
    _bounded(_size(items) + _size(separator) * len(items))


def _check_replace(text: object, old: object, new: object) -> None:
    found = str(text).count(str(old)) if str(old) else len(str(text)) + 1
    _bounded(len(str(text)) + found * _size(new))


def _check_method(method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """dict(), and the methods of str whose result can be far larger than what goes in.

    Returns the arguments to call it with (an iterator that had to be counted is now a list).
    """
    if method is dict:
        _size((args, kwargs))
    text = getattr(method, "__self__", None)
    name = getattr(method, "__name__", "")
    if isinstance(text, list) and name == "append":  # by parts that it has many times, say
        _size(args)
    if not isinstance(text, str):
        return args
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        _check_widths(*args, *kwargs.values())
        if name == "expandtabs":
            _bounded(len(text) * 8 if not args and not kwargs else len(text) * _MAX_WIDTH)
    elif name == "replace" and len(args) >= 2:
        _check_replace(text, args[0], args[1])
    elif name == "join" and len(args) == 1:
        items = list(args[0])
        _check_join(text, items)
        return (items,)
    elif name == "translate":
        raise _Runaway("str.translate is not for templates")
    return args


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: plain JSON, not escaped for HTML; iterators, as of map(), are lists."""
    _check_widths(indent)
    if isinstance(value, Iterator):
        value = list(value)
    _size(value)
    marks = _BUDGET.marks
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii and marks is None,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    if ensure_ascii and marks is not None:  # a mark has to stay the character that it is
        text = re.sub(f"[^\\x00-\\x7e{marks.mark}]", lambda found: json.dumps(found[0])[1:-1], text)
    return text


def _raise_exception(message: object = "") -> None:
    raise _Rejection(str(message) or "no reason given")


def _strftime_now(pattern: str) -> str:
    _check_format(pattern, ())
    return datetime.now().strftime(pattern)


def _printed(value: Any) -> Any:
    """What a template prints; of a list or mapping the text, if there are marks in it."""
    if isinstance(value, str):
        return value
    _size(value)
    marks = _BUDGET.marks
    return marks.printed(value) if marks is not None and isinstance(value, (list, dict)) else value


def sandbox() -> Environment:
    """A new environment that compiles and runs chat templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """{% generation %}: marks what the assistant wrote, for training; the content stays."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Bounded(ImmutableSandboxedEnvironment):
        """The sandbox, with the bounds of this file."""

        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_binary(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            args = _check_method(__obj, args, kwargs)
            if _BUDGET.marks is not None and args and isinstance(args[0], (str, tuple)):
                __obj, args = _BUDGET.marks.searching(__obj, args)
            return super().call(__context, __obj, *args, **kwargs)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            """Beside what the sandbox allows, changes of lists that the template has made."""
            if attr in ("append", "pop") and isinstance(obj, list) and type(obj) is not _Given:
                return True
            return super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            wrapped = super().wrap_str_format(value)
            if wrapped is None:
                return None
            sandboxed, pattern = wrapped, value.__self__

            def checked(*args: Any, **kwargs: Any) -> str:
                _check_format(pattern, [*args, *kwargs.values()])
                return sandboxed(*args, **kwargs)

            return checked

        def joined(self, *values: Any) -> str:
            """The ~ operator."""
            _size(values)
            return "".join(str(_printed(value)) for value in values)

        def literal(self, value: Any) -> Any:
            """A list, tuple or mapping as it is built: it may hold one part many times."""
            _size(value)
            return value

        def step(self) -> str:
            """Called by every pass of a loop and every call of a macro."""
            return _BUDGET.step()

        def compared(self, value: Any) -> Any:
            """A side of a comparison, without the marks of what a client wrote."""
            marks = _BUDGET.marks
            return value if marks is None else marks.plain(value)

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = super()._parse(source, name, filename)
            _mark_comparisons(tree, nodes)
            repeated: Any = tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))
            for loop in repeated:
                tick = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
                loop.body.insert(0, nodes.ExprStmt(tick, lineno=loop.lineno))
            _bound_expressions(tree, nodes)
            tree.set_environment(self)
            return tree

    environment = Bounded(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[LoopControlExtension, GenerationBlock],
        optimized=False,  # folding constants would run code outside of a rendering and its budget
        finalize=_printed,
    )
    filters = environment.filters

    def guarded(name: str, check: Callable[..., None]) -> None:
        original = filters[name]

        def checked(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return original(*args, **kwargs)

        # Filters that take the environment or context say so by this attribute.
        mark = getattr(original, "jinja_pass_arg", None)
        if mark is not None:
            checked.jinja_pass_arg = mark  # type: ignore[attr-defined]
        filters[name] = checked

    def widths(*args: Any, **kwargs: Any) -> None:
        _check_widths(*args[1:], *kwargs.values())

    for name in ("batch", "slice", "center", "indent", "truncate", "round"):
        guarded(name, widths)
    guarded("string", lambda value: _bounded(_size(value)))
    string = filters["string"]
    filters["string"] = lambda value: string(_printed(value))
    guarded("format", lambda pattern, *args, **kw: _check_format(pattern, [*args, *kw.values()]))
    guarded("replace", lambda context, text, old, new, *_: _check_replace(text, old, new))
    replace = filters["replace"]

    def replaced(context: Any, text: Any, old: Any, new: Any, *count: Any) -> Any:
        if _BUDGET.marks is not None and isinstance(old, str):
            method, args = _BUDGET.marks.searching(str(text).replace, (old, new, *count))
            text, old = method.__self__, args[0]
        return replace(context, text, old, new, *count)

    replaced.jinja_pass_arg = replace.jinja_pass_arg  # type: ignore[attr-defined]
    filters["replace"] = replaced
    join = filters["join"]

    def checked_join(context: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
        items = list(value)
        _check_join(d, items)
        return join(context, items, d, attribute)

    checked_join.jinja_pass_arg = join.jinja_pass_arg  # type: ignore[attr-defined]
    filters["join"] = checked_join
    filters["tojson"] = _tojson
    # No chat template needs these, and a long text makes them slow.
    for name in ("urlize", "wordwrap", "pprint"):
        del filters[name]
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def undeclared(environment: Environment, source: str) -> frozenset[str]:
    """The variables that a template reads and expects from outside."""
    from jinja2.meta import find_undeclared_variables

    return frozenset(find_undeclared_variables(environment.parse(source)))


def constants(environment: Environment, source: str) -> frozenset[str]:
    """The strings that the expressions of a template are written with."""
    from jinja2 import nodes

    found: Any = environment.parse(source).find_all(nodes.Const)
    return frozenset(node.value for node in found if isinstance(node.value, str))


def _mark_comparisons(tree: Any, nodes: Any) -> None:
    """Sends both sides of ==, != and `in` through compared()."""

    def compared(node: Any) -> Any:
        call = nodes.Call(nodes.EnvironmentAttribute("compared"), [node], [], None, None)
        return call.set_lineno(node.lineno)

    for compare in list(tree.find_all(nodes.Compare)):
        operands = [compare.expr, *(operand.expr for operand in compare.ops)]
        if {operand.op for operand in compare.ops} <= {"in", "notin", "eq", "ne"} and not any(
            isinstance(node, nodes.Const) and not isinstance(node.value, str) for node in operands
        ):
            compare.expr = compared(compare.expr)
            for operand in compare.ops:
                operand.expr = compared(operand.expr)


def _bound_expressions(node: Any, nodes: Any) -> None:
    """Sends every a ~ b and every list, tuple and mapping of a syntax tree through a check."""
    for field, value in list(node.iter_fields()):
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            if not isinstance(child, nodes.Node):
                continue
            _bound_expressions(child, nodes)
            if isinstance(child, nodes.Concat):
                method, arguments = "joined", child.nodes
            elif isinstance(child, (nodes.List, nodes.Dict)) or (
                isinstance(child, nodes.Tuple) and child.ctx == "load"
            ):
                method, arguments = "literal", [child]
            else:
                continue
            call = nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)
            call.set_lineno(child.lineno)
            if isinstance(value, list):
                value[i] = call
            else:
                setattr(node, field, call)
