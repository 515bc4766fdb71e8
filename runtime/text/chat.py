"""Chat templates, which turn a conversation into the prompt format that a model was trained on.

Templates are Jinja, as Hugging Face transformers defines them: `messages`, `tools`, `documents`,
`add_generation_prompt`, `bos_token` and `eos_token` are variables; `raise_exception` and
`strftime_now` are functions; `tojson` does not escape HTML; `break` and `continue` work, and the
`generation` block is transparent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..base import arguments
from ..base.arguments import shown
from ..base.errors import ChatTemplateError, OptionError
from . import template_values
from .control_marks import ControlMarks, ControlSpellings, unused_mark
from .conversation import TOO_DEEP, Arguments, Message, conversation, joined, plain, tool_schemas
from .prefill import cut, tagged, to_continue
from .template_forms import TemplateForms, with_new_ids
from .template_sandbox import (
    TemplateStopped,
    compile_template,
    constants,
    render_template,
    sandbox,
    undeclared,
)
from .template_sources import template_sources
from .turn_frames import frame_tokens, looked_for

if TYPE_CHECKING:
    from jinja2 import Template

    from .tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Variables of a template that no caller may set, since the prompt is made of them.
_OWNED = frozenset(
    {
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
    }
)


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation.

    text: the prompt, with a `mark` inside each control token that a client has written
    (control_marks.py); mark: that character, "" if there is none. continued: the assistant's words
    that the text ends with; None if a new answer begins.
    """

    text: str
    mark: str
    continued: str | None


@dataclass(frozen=True)
class _Request:
    """A conversation to render, with turns and tools in the form of conversation.py.

    name: the template's. extra: further variables. opens: whether the prompt ends where the
    assistant continues.
    """

    name: str
    turns: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    extra: Mapping[str, Any]
    opens: bool = True

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [call for turn in self.turns for call in turn.get("tool_calls", ())]

    @property
    def continues(self) -> bool:
        return self.opens and to_continue(self.turns)


class ChatTemplate:
    """The chat templates of one model; immutable, may be shared between threads.

    names: those of the templates; render() uses "default" unless told otherwise.
    """

    def __init__(
        self,
        sources: str | Mapping[str, str],
        *,
        bos_token: str = "",
        eos_token: str = "",
        control: Iterable[str] = (),
        defined: Iterable[str] = (),
    ) -> None:
        """Compiles `sources`: a Jinja template, or several by name.

        control, defined: spellings of control and of user-defined tokens. Raises ChatTemplateError
        if a template is malformed.
        """
        given = {"default": sources} if isinstance(sources, str) else sources
        named = {
            arguments.text("a template's name", name): arguments.text(f"template {name}", source)
            for name, source in arguments.mapping("sources", given).items()
        }
        self._variables = {
            "bos_token": arguments.text("bos_token", bos_token),
            "eos_token": arguments.text("eos_token", eos_token),
        }
        self._environment = sandbox()
        self._templates = {
            name: compile_template(self._environment, named[name], name) for name in named
        }
        self._sources = named
        self.names = tuple(named)
        self._control, self._defined = list(control), list(defined)
        self._spellings: dict[str, ControlSpellings] = {}
        self._forms = {name: TemplateForms(partial(self._tried, name)) for name in self._templates}
        self._trial_s = dict.fromkeys(self._templates, 0.0)  # seconds spent in trials
        self._constants: dict[str, frozenset[str]] = {}
        self._read: dict[str, frozenset[str]] = {}

    @classmethod
    def from_metadata(cls, get: Callable[[str], Any], tokenizer: Tokenizer) -> ChatTemplate:
        """Returns the templates of a GGUF file.

        get: returns a metadata key's value, None if absent. A file without any template gets the
        ChatML template if its vocabulary has <|im_start|> and <|im_end|>; otherwise this raises
        ChatTemplateError.
        """
        sources = template_sources(get)
        for name, source in sources.items():
            if not isinstance(source, str):
                raise ChatTemplateError(
                    f"chat template {name!r}: expected a string, found {type(source).__name__}"
                )
        if not sources:
            marks = ("<|im_start|>", "<|im_end|>")
            if any(tokenizer.token_to_id(mark) is None for mark in marks):
                raise ChatTemplateError(
                    "the file has no tokenizer.chat_template and its vocabulary has no ChatML "
                    "tokens: pass a chat template of your own, or complete plain text instead"
                )
            sources["default"] = CHATML
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        return cls(
            sources,
            bos_token="" if bos is None else tokenizer.id_to_token(bos),
            eos_token="" if eos is None else tokenizer.id_to_token(eos),
            control=tokenizer.special_spellings(),
            defined=tokenizer.defined_spellings(),
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **extra: Any,
    ) -> str:
        """Returns the prompt for a conversation, as text.

        messages: each {"role": str, "content": str or list of {"type": "text", "text": str}},
        and whatever else the template reads (tool_calls, name, ...); conversation.py documents the
        forms. add_generation_prompt: end where the assistant continues: with the opening of its
        answer, or with its words if the conversation ends with such. tools: JSON schemas of
        functions. template: one of `names`; by default "tool_use" for a call with tools if there
        is one, else "default". extra: further variables of the template, e.g.
        enable_thinking=False.
        Raises ChatTemplateError, one line, if the messages are malformed or the template rejects
        them.
        """
        opens = arguments.flag("add_generation_prompt", add_generation_prompt)
        schemas = tool_schemas(tools)
        name = self._chosen(template, schemas)
        return self._rendered(_Request(name, conversation(messages), schemas, extra, opens))

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        parse_special: bool = False,
    ) -> Prompt:
        """Returns the prompt for a conversation, for a tokenizer.

        messages, tools: as in `render`. variables: further ones of the template. parse_special:
        set no marks, so that control tokens may be written in messages, tools and variables.
        Raises ChatTemplateError as `render` does, and OptionError for a variable that the template
        does not read or a caller may not set.
        """
        parse_special = arguments.flag("parse_special", parse_special)
        schemas = tool_schemas(tools)
        name = self._chosen(None, schemas)
        request = _Request(name, conversation(messages), schemas, self._checked(name, variables))
        marks = None
        spellings = None if parse_special else self._spellings_of(name)
        if spellings:
            passed = [(a.value, a.text) for a in map(_arguments, request.calls)]
            results = (turn.get("content") for turn in request.turns)
            passed += [(r.value, r.text) for r in results if isinstance(r, Arguments)]
            mark = unused_mark([self._sources[name], request.turns, schemas, request.extra, passed])
            marks = ControlMarks(spellings, mark, partial(self._constants_of, name))
        text = self._rendered(request, marks)
        mark = ""
        if marks is not None:
            text = marks.needed(text)
            mark = marks.mark if marks.mark in text else ""
        continued = None
        if request.continues:
            words = joined(request.turns[-1]["content"])
            end = text.replace(mark, "") if mark else text
            trimmed = (words, words.rstrip(), words.strip())  # as templates may trim them
            continued = next((w for w in trimmed if end.endswith(w)), words)
        return Prompt(text, mark, continued)

    def _chosen(self, name: str | None, tools: list[dict[str, Any]] | None) -> str:
        if name is not None:
            name = arguments.text("template", name)
        else:
            name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ChatTemplateError(
                f"no chat template {shown(name)}; the model has: {', '.join(self.names)}"
            )
        return name

    def _checked(self, name: str, variables: Mapping[str, Any] | None) -> dict[str, Any]:
        """Returns a checked copy of a caller's variables. Raises OptionError."""
        if variables is None:
            return {}
        variables = arguments.mapping(
            "template", variables, "the names of template variables to values"
        )
        owned = _OWNED | frozenset(self._environment.globals)
        for variable in variables:
            if arguments.text("a template variable", variable) in owned:
                raise OptionError(f"template variable {variable!r} is set by the prompt itself")
        if variables:
            read = self._read_by(name) - owned
            for variable in variables:
                if variable not in read:
                    listed = f"the variables {', '.join(sorted(read))}" if read else "none"
                    raise OptionError(
                        f"template variable {variable!r}: chat template {name!r} reads {listed}"
                    )
        try:
            return {variable: plain(value) for variable, value in variables.items()}
        except RecursionError:
            raise OptionError(f"template: {TOO_DEEP}") from None

    def _read_by(self, name: str) -> frozenset[str]:
        if name not in self._read:
            self._read[name] = undeclared(self._environment, self._sources[name])
        return self._read[name]

    def _constants_of(self, name: str) -> frozenset[str]:
        if name not in self._constants:
            self._constants[name] = constants(self._environment, self._sources[name])
        return self._constants[name]

    def _spellings_of(self, name: str) -> ControlSpellings:
        """Returns what no client may write into a prompt: control tokens and frames of turns."""
        if name not in self._spellings:
            framing: set[str] = set()
            if self._defined:
                reads = looked_for(self._environment, self._sources[name])
                framing = frame_tokens(partial(self._tried_turns, name), self._defined, reads)
            others = [spelling for spelling in self._defined if spelling not in framing]
            self._spellings[name] = ControlSpellings([*self._control, *framing], others)
        return self._spellings[name]

    def _tried_turns(self, name: str, turns: list[dict[str, Any]], *, thinking: bool) -> str | None:
        """Renders turns in the forms that a template takes, for frame_tokens."""
        switches = dict.fromkeys(("thinking", "enable_thinking"), True) if thinking else {}
        return self._tried(name, self._forms[name].apply(turns), None, switches)

    def _rendered(self, request: _Request, marks: ControlMarks | None = None) -> str:
        """Renders a request in the forms that the template takes."""
        name, tools = request.name, request.tools
        variables = {
            "add_generation_prompt": request.opens and not request.continues,
            **request.extra,
        }
        if marks is not None:
            tools, variables = marks.value(tools), marks.value(variables)
        refused: ChatTemplateError | None = None
        for messages in self._attempts(request):
            marked = messages if marks is None else list(map(marks.message, messages))
            given = tagged(marked) if request.continues else marked
            try:
                text = self._printed(name, given, tools, variables, marks)
                if _prints_lists(text, given):
                    raise ChatTemplateError(f"chat template {name!r} prints parts as Python does")
                if not request.continues:
                    return text
                return cut(text, _last_text(marked), name, "" if marks is None else marks.mark)
            except TemplateStopped:
                raise
            except ChatTemplateError as error:
                refused = refused or error
        assert refused is not None
        raise self._blamed(request, refused)

    def _attempts(self, request: _Request) -> Iterator[list[dict[str, Any]]]:
        """Yields the messages in the forms that the template takes, then with all parts as text.

        Some places of a template take only text. Both forms are yielded with the client's call ids,
        then with missing ids filled in, then with new ids.
        """
        forms, turns = self._forms[request.name], request.turns
        results = [turn for turn in turns if turn["role"] == "tool"]
        lacking = any("id" not in call for call in request.calls) or any(
            "tool_call_id" not in turn for turn in results
        )
        named = any("id" in call for call in request.calls) or any(
            "tool_call_id" in turn for turn in results
        )
        lists = any(isinstance(turn.get("content"), list) for turn in turns)
        variants = [(turns, False)]
        if lacking:
            variants.append((turns, True))
        if named:
            variants.append((with_new_ids(turns), True))
        for messages, ids in variants:
            for parts in (True, False) if lists else (True,):
                yield forms.apply(messages, ids=ids, parts=parts)

    def _printed(
        self,
        name: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        marks: ControlMarks | None = None,
    ) -> str:
        given: dict[str, Any] = {
            **self._variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            **variables,
        }
        template: Template = self._templates[name]
        try:
            return render_template(template, name, given, marks)
        except TemplateStopped:
            raise
        except ChatTemplateError:
            if tools is not None:
                raise
            # Templates made for tools loop over them without testing whether there are any.
            try:
                return render_template(template, name, {**given, "tools": []}, marks)
            except ChatTemplateError:
                pass
            raise

    def _tried(
        self,
        name: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        switches: Mapping[str, Any] = MappingProxyType({}),
    ) -> str | None:
        """Renders a trial for TemplateForms; None if the template refuses. switches: variables.

        Raises TemplateStopped once all its trials take longer than a rendering may.
        """
        if self._trial_s[name] > template_values.MAX_SECONDS:
            raise TemplateStopped(
                f"chat template {name!r} is stopped: its trials took more than "
                f"{template_values.MAX_SECONDS:g} seconds"
            )
        started = time.thread_time()
        try:
            return self._printed(
                name, messages, tools, {**switches, "add_generation_prompt": False}
            )
        except TemplateStopped:
            raise
        except ChatTemplateError:
            return None
        finally:
            self._trial_s[name] += time.thread_time() - started

    def _blamed(self, request: _Request, refused: ChatTemplateError) -> ChatTemplateError:
        """Returns a refusal's error: its own, or that non-object arguments are the cause."""
        odd = [
            (f"messages[{i}].tool_calls[{j}]", _arguments(call))
            for i, turn in enumerate(request.turns)
            for j, call in enumerate(turn.get("tool_calls", ()))
            if not isinstance(_arguments(call).value, dict)
        ]
        if not odd:
            return refused
        turns = [
            {**turn, "tool_calls": [_without_arguments(call) for call in turn["tool_calls"]]}
            if "tool_calls" in turn
            else turn
            for turn in request.turns
        ]
        try:
            self._rendered(replace(request, turns=turns, opens=False))
        except ChatTemplateError:
            return refused
        where, arguments = odd[0]
        found = arguments.value if arguments.text is None else arguments.text
        return ChatTemplateError(
            f"{where}: chat template {request.name!r} expects arguments that are a JSON object, "
            f"found {found!r:.60}"
        )


def _arguments(call: dict[str, Any]) -> Arguments:
    arguments: Arguments = call["function"]["arguments"]
    return arguments


def _without_arguments(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "function": {**call["function"], "arguments": Arguments({}, None)}}


def _prints_lists(text: str, messages: list[dict[str, Any]]) -> bool:
    """Returns whether a template has printed a list of parts instead of its texts."""
    lists = (m["content"] for m in messages if isinstance(m.get("content"), list))
    return any(repr(parts[0]) in text for parts in lists)


def _last_text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    return str(content[-1]["text"] if isinstance(content, list) else content)
