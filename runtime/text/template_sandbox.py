"""The Jinja environment in which chat templates run, and its bounds.

A template comes with a model file, so it is untrusted code. It runs in Jinja's sandbox. This module
bounds what the sandbox leaves open: the steps of loops and macros, the time, the printed text, and
the size of every value that a template can build, multiply, join or pad (template_values.py).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, TemplateSyntaxError, nodes, pass_environment
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import make_attrgetter
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler

from ..base.errors import ChatTemplateError, one_line
from . import template_values
from .control_marks import ORDERING, ControlMarks
from .template_values import (
    BUDGET,
    CONTAINERS,
    Namespace,
    OwnList,
    Runaway,
    check_binary,
    check_format,
    check_join,
    check_method,
    check_replace,
    check_size,
    check_widths,
    given,
    measured,
    size,
)

MAX_SOURCE = 1 << 20  # characters of a template

# Filters of items; the items of a text are its characters.
_OF_CHARACTERS = frozenset(
    ("batch", "first", "groupby", "join", "last", "list", "map", "max", "min", "random", "reject",
     "select", "slice", "sort", "sum", "unique")
)  # fmt: skip
_COMPARISONS = frozenset(
    ("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=", "<", "lt",
     "lessthan", "<=", "le")
)  # fmt: skip


class _Rejection(Exception):
    """The exception that a template's raise_exception() raises."""


class TemplateStopped(ChatTemplateError):
    """A template was stopped because it reached a bound."""


def compile_template(environment: Environment, source: str, name: str) -> Template:
    """Compiles a template; `name` is for messages. Raises ChatTemplateError if malformed."""
    if len(source) > MAX_SOURCE:
        raise ChatTemplateError(
            f"chat template {name!r}: expected at most {MAX_SOURCE} characters, found {len(source)}"
        )
    BUDGET.reset(None)  # compiling passes the constants that a template prints to _printed
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"chat template {name!r}, line {error.lineno}: {one_line(error)}"
        ) from None
    except Exception as error:  # a template is data, so any failure is an error of the template
        raise ChatTemplateError(f"chat template {name!r}: {one_line(error)}") from None


def render_template(
    template: Template,
    name: str,
    variables: Mapping[str, Any],
    marks: ControlMarks | None = None,
) -> str:
    """Renders a template of the sandbox. ChatTemplateError, TemplateStopped at a bound.

    marks: those that the variables have; comparisons and searches do not see them.
    """
    BUDGET.reset(marks)
    chunks: list[str] = []
    characters = 0
    try:
        values = {key: given(value) for key, value in variables.items()}
        for chunk in template.generate(values):
            characters += len(chunk)
            if characters > template_values.MAX_OUTPUT:
                raise Runaway(f"more than {template_values.MAX_OUTPUT} characters")
            chunks.append(chunk)
    except _Rejection as error:
        message = f"chat template {name!r} rejects the conversation: {one_line(error)}"
        raise ChatTemplateError(message) from None
    except Runaway as error:
        message = f"chat template {name!r} is stopped: {one_line(error)}"
        raise TemplateStopped(message) from None
    except Exception as error:  # a template is data, so any failure is an error of the template
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


class _GenerationBlock(Extension):
    """{% generation %} marks the assistant's words for training; only its content is kept."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounded(ImmutableSandboxedEnvironment):
    """The sandbox with its bounds; templates do not see marks of control tokens as characters."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        BUDGET.check_time()
        check_binary(operator, left, right)
        return measured(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        BUDGET.check_time()
        if isinstance(__obj, Macro):
            known = len(__obj.arguments)  # the others become a tuple and a mapping
            named = {key: kwargs[key] for key in kwargs if key not in __obj.arguments}
            measured((measured(args[known:]), measured(named)))
        args = check_method(__obj, args, kwargs)
        if BUDGET.marks is not None:
            __obj = BUDGET.marks.method(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, Cycler):
            measured(result.items)
        return result if isinstance(result, Namespace) else measured(result)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allows changes of lists that the template has made, besides what the sandbox allows."""
        if attr in ("append", "pop") and type(obj) is OwnList:
            return True
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        sandboxed, pattern = wrapped, value.__self__

        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(pattern, [*args, *kwargs.values()])
            return sandboxed(*args, **kwargs)

        return checked

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Returns obj[argument]."""
        if BUDGET.marks is not None and isinstance(obj, str) and isinstance(argument, int):
            try:
                return BUDGET.marks.sliced(obj, argument)
            except IndexError:
                return self.undefined(obj=obj, name=argument)  # type: ignore[arg-type]
        return super().getitem(obj, argument)

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins the text that a macro or block has printed."""
        pieces = list(pieces)
        check_size(sum(map(len, pieces)))
        return "".join(pieces)

    # The rewritten syntax tree calls the methods below.

    def joined(self, *values: Any) -> str:
        """Evaluates the ~ operator."""
        BUDGET.check_time()
        size(values)
        return "".join(str(_as_text(value)) for value in values)

    def literal(self, value: Any) -> Any:
        """Measures a new list, tuple or mapping, since it may hold one part many times."""
        BUDGET.check_time()
        return measured(value)

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """Returns value[start:stop:step]."""
        BUDGET.check_time()
        at = slice(start, stop, step)
        if BUDGET.marks is not None and isinstance(value, str):
            return BUDGET.marks.sliced(value, at)
        found = value[at]
        return OwnList(found) if type(found) is list else found

    def iterated(self, value: Any) -> Any:
        """Returns what a loop iterates over."""
        marks = BUDGET.marks
        return marks.characters(value) if marks is not None and isinstance(value, str) else value

    def step(self) -> str:
        """Spends a step; every pass of a loop and every call of a macro calls this."""
        return BUDGET.step()

    def compared(self, value: Any) -> Any:
        """Returns a side of a comparison without the marks of what a client wrote."""
        return _compared(value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _mark_comparisons(tree)
        for loop in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            assert isinstance(loop, (nodes.For, nodes.Macro, nodes.CallBlock))
            if isinstance(loop, nodes.For):
                loop.iter = _to_environment("iterated", loop.iter)
            tick = _to_environment("step")
            loop.body.insert(0, nodes.ExprStmt(tick, lineno=loop.lineno))
        _bound_expressions(tree)
        tree.set_environment(self)
        return tree


def sandbox() -> Environment:
    """Returns a new environment that compiles and runs chat templates."""
    environment = _Bounded(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[LoopControlExtension, _GenerationBlock],
        optimized=False,  # folding constants would run code outside of a rendering and its budget
        finalize=_printed,
    )
    # No chat template needs these filters, and a long text makes them slow.
    for name in ("urlize", "wordwrap", "pprint"):
        del environment.filters[name]
    environment.filters["sum"] = _sum
    environment.filters["tojson"] = _tojson
    for name, function in list(environment.filters.items()):
        environment.filters[name] = _bounded_filter(name, function)
    tests: dict[str, Any] = environment.tests
    for name in _COMPARISONS:
        tests[name] = _bounded_test(tests[name])
    del environment.globals["lipsum"]
    environment.globals["namespace"] = Namespace
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _bounded_test(test: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, other: test(_compared(value), _compared(other))


def _bounded_filter(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a filter so that it keeps the bounds and does not see marks as characters."""
    # A filter that takes the environment or context first has this attribute.
    before = int(hasattr(original, "jinja_pass_arg"))

    @functools.wraps(original, updated=("__dict__",) if before else ())
    def bounded(*args: Any, **kwargs: Any) -> Any:
        BUDGET.check_time()
        context, value, given_args = args[:before], args[before], args[before + 1 :]
        if name == "join" and isinstance(value, Iterator):
            value = list(value)  # the check counts its items
        _check_filter(name, value, given_args, kwargs)
        marks = BUDGET.marks
        if marks is not None:
            filtered = functools.partial(original, *context)
            if name == "string":
                value = _as_text(value)
            if isinstance(value, str) and name in _OF_CHARACTERS:
                value = marks.characters(value)
            if name in ORDERING and isinstance(value, (Iterable, Mapping)):
                return measured(marks.ordered(name, filtered, value, given_args, kwargs))
            if isinstance(value, str):
                return measured(marks.filtered(name, filtered, value, given_args, kwargs))
        return measured(original(*context, value, *given_args, **kwargs))

    return bounded


def _check_filter(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises Runaway if a filter's result would be far larger than its input."""
    if name in ("batch", "slice", "center", "indent", "truncate", "round"):
        check_widths(*args, *kwargs.values())
    if name == "indent":
        width = args[0] if args else kwargs.get("width", 4)
        check_size(size(value) + str(value).count("\n") * (size(width) if width else 0))
    elif name == "format":
        check_format(value, [*args, *kwargs.values()])
    elif name == "replace":
        given_args = {**dict(zip(("old", "new"), args, strict=False)), **kwargs}
        check_replace(value, given_args.get("old", ""), given_args.get("new", ""))
    elif name == "join":
        check_join(args[0] if args else kwargs.get("d", ""), value)


@pass_environment
def _sum(
    environment: Environment, value: Iterable[Any], attribute: Any = None, start: Any = 0
) -> Any:
    """Adds up as Jinja's sum does, but without copying the sum for each further list or tuple."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    if not isinstance(start, (list, tuple)):
        return sum(value, start)
    kind: type[list[Any] | tuple[Any, ...]] = list if isinstance(start, list) else tuple
    items = list(start)
    for item in value:
        if not isinstance(item, kind):
            raise TypeError(f"sum: expected a {kind.__name__}, found {type(item).__name__}")
        items += item
        check_size(2 * len(items))
    return kind(items)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns plain JSON as transformers does, not escaped for HTML; iterators become lists."""
    check_widths(indent)
    if isinstance(value, Iterator):
        value = list(value)
    size(value)
    marks = BUDGET.marks
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii and marks is None,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    if indent is None and (separators is None or sum(map(len, separators)) < 9):
        text = encoder.encode(value)
    else:  # the separators and indentation may be far longer than the items
        chunks, characters = [], 0
        for chunk in encoder.iterencode(value):
            characters += len(chunk)
            check_size(characters)
            chunks.append(chunk)
        text = "".join(chunks)
    if ensure_ascii and marks is not None:  # a mark has to stay the character that it is
        text = re.sub(f"[^\\x00-\\x7e{marks.mark}]", lambda found: json.dumps(found[0])[1:-1], text)
    return text


def _raise_exception(message: object = "") -> None:
    raise _Rejection(str(message) or "no reason given")


def _strftime_now(pattern: str) -> str:
    check_format(pattern, ())
    return datetime.now().strftime(pattern)


def _compared(value: Any) -> Any:
    """Returns a side of a comparison without the marks of what a client wrote."""
    BUDGET.check_time()
    if not isinstance(value, str):
        size(value)
    marks = BUDGET.marks
    return value if marks is None else marks.plain(value)


def _as_text(value: Any) -> Any:
    """Returns the text of a container if there are marks, any other value as it is."""
    marks = BUDGET.marks
    holds = isinstance(value, (Mapping, Namespace, *CONTAINERS))
    return marks.printed(value) if marks is not None and holds else value


def _printed(value: Any) -> Any:
    """Returns a value to print; a container becomes its text if there are marks."""
    if isinstance(value, str):
        check_size(len(value))
        BUDGET.print(len(value))
        return value
    BUDGET.print(size(value))
    return _as_text(value)


def undeclared(environment: Environment, source: str) -> frozenset[str]:
    """Returns the variables that a template reads and expects from outside."""
    return frozenset(find_undeclared_variables(environment.parse(source)))


def constants(environment: Environment, source: str) -> frozenset[str]:
    """Returns the string constants in a template's expressions."""
    found: Any = environment.parse(source).find_all(nodes.Const)
    return frozenset(node.value for node in found if isinstance(node.value, str))


def _to_environment(method: str, *arguments: nodes.Node) -> nodes.Call:
    """Returns a call of a method of the environment, to replace its first argument."""
    call = nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)
    if arguments:
        call.set_lineno(arguments[0].lineno)
    return call


def _mark_comparisons(tree: nodes.Template) -> None:
    """Sends both sides of comparisons through compared(), unless one is a non-string constant."""
    for compare in list(tree.find_all(nodes.Compare)):
        operands = [compare.expr, *(operand.expr for operand in compare.ops)]
        if not any(isinstance(n, nodes.Const) and not isinstance(n.value, str) for n in operands):
            compare.expr = _to_environment("compared", compare.expr)
            for operand in compare.ops:
                operand.expr = _to_environment("compared", operand.expr)


def _bound_expressions(node: nodes.Node) -> None:
    """Sends a ~ b, slices, and literals of lists, tuples and mappings through the environment.

    A tuple that is unpacked into names at once is left alone, because no tuple is kept.
    """
    for field, value in list(node.iter_fields()):
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            if not isinstance(child, nodes.Node):
                continue
            _bound_expressions(child)
            if isinstance(child, nodes.Concat):
                call = _to_environment("joined", *child.nodes)
            elif isinstance(child, nodes.Getitem) and isinstance(child.arg, nodes.Slice):
                at = (child.arg.start, child.arg.stop, child.arg.step)
                ends = [nodes.Const(None) if end is None else end for end in at]
                call = _to_environment("sliced", child.node, *ends)
            elif isinstance(child, (nodes.List, nodes.Dict)) or (
                isinstance(child, nodes.Tuple) and child.ctx == "load" and not _unpacked(node)
            ):
                call = _to_environment("literal", child)
            else:
                continue
            if isinstance(value, list):
                value[i] = call
            else:
                setattr(node, field, call)


def _unpacked(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Tuple)
