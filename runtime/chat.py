"""Chat templates: a conversation to the prompt that a model was trained on.

Templates are Jinja, as Hugging Face transformers defines them: `messages`, `tools`, `documents`,
`add_generation_prompt`, `bos_token` and `eos_token` are variables; `raise_exception` and
`strftime_now` are functions; `tojson` does not escape HTML; `break` and `continue` work, and the
`generation` block is transparent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import arguments
from .arguments import shown
from .errors import ChatTemplateError
from .template_sandbox import TemplateStopped, compile_template, render_template, sandbox

if TYPE_CHECKING:
    from jinja2 import Template

    from .tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Message = Mapping[str, Any]


class ChatTemplate:
    """The chat templates of one model; immutable, may be shared between threads.

    names: of the templates; "default" is the one that render() takes by itself.
    """

    def __init__(
        self,
        sources: str | Mapping[str, str],
        *,
        bos_token: str = "",
        eos_token: str = "",
    ) -> None:
        """sources: a Jinja template, or several by name. ChatTemplateError if one is malformed."""
        given = {"default": sources} if isinstance(sources, str) else sources
        named = {
            arguments.text("a template's name", name): arguments.text(f"template {name}", source)
            for name, source in arguments.mapping("sources", given).items()
        }
        self._variables = {
            "bos_token": arguments.text("bos_token", bos_token),
            "eos_token": arguments.text("eos_token", eos_token),
        }
        environment = sandbox()
        self._templates = {name: compile_template(environment, named[name], name) for name in named}
        self.names = tuple(named)
        self._typed: dict[str, bool] = {}

    @classmethod
    def from_metadata(cls, get: Callable[[str], Any], tokenizer: Tokenizer) -> ChatTemplate:
        """The templates of a GGUF file.

        get: a metadata key to its value, None where absent. Reads tokenizer.chat_template and
        tokenizer.chat_template.<name> for the names in tokenizer.chat_templates. A file without
        any gets the ChatML template if its vocabulary has <|im_start|> and <|im_end|>; otherwise
        ChatTemplateError.
        """
        sources: dict[str, str] = {}
        default = get("tokenizer.chat_template")
        if default is not None:
            sources["default"] = default
        names = get("tokenizer.chat_templates")
        for name in names if isinstance(names, (list, tuple)) else ():
            source = get(f"tokenizer.chat_template.{name}")
            if source is not None:
                sources.setdefault(str(name), source)
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
        """The prompt for a conversation.

        messages: each {"role": str, "content": str or list of {"type": "text", "text": str}},
        and whatever else the template reads (tool_calls, name, ...). add_generation_prompt: ends
        with what opens the assistant's answer. tools: JSON schemas of functions. template: one of
        `names`; by default "tool_use" for a call with tools if there is one, else "default".
        extra: further variables of the template, e.g. enable_thinking=False.
        ChatTemplateError, one line, if the messages are malformed or the template rejects them.
        """
        if tools is not None:
            tools = arguments.sequence("tools", tools, "a sequence of JSON schemas")
        if template is not None:
            template = arguments.text("template", template)
        name = template
        if name is None:
            name = "tool_use" if tools and "tool_use" in self._templates else "default"
        chosen = self._templates.get(name)
        if chosen is None:
            raise ChatTemplateError(
                f"no chat template {shown(name)}; the model has: {', '.join(self.names)}"
            )
        conversation = [_checked(message, i) for i, message in enumerate(_listed(messages))]
        variables: dict[str, Any] = {
            **self._variables,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **extra,
        }
        if self._wants_parts(name, chosen):
            conversation = [_in_parts(message) for message in conversation]
        variables["messages"] = conversation
        try:
            return render_template(chosen, name, variables)
        except TemplateStopped:
            raise
        except ChatTemplateError:
            if tools is not None:
                raise
            # Templates made for tools go through them without asking whether there are any.
            try:
                return render_template(chosen, name, {**variables, "tools": []})
            except ChatTemplateError:
                pass
            raise

    def _wants_parts(self, name: str, template: Template) -> bool:
        """Whether a template drops plain strings and reads only lists of parts; tried once."""
        known = self._typed.get(name)
        if known is None:
            probe = {"role": "user", "content": "needle-7401"}
            variables = {
                **self._variables,
                "tools": None,
                "documents": None,
                "add_generation_prompt": False,
            }

            def keeps(message: dict[str, Any]) -> bool:
                try:
                    text = render_template(template, name, {**variables, "messages": [message]})
                except TemplateStopped:
                    raise
                except ChatTemplateError:
                    return False
                return "needle-7401" in text

            known = not keeps(probe) and keeps(_in_parts(probe))
            self._typed[name] = known
        return known


def _listed(messages: object) -> Sequence[object]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatTemplateError(
            f"messages: expected a list of messages, found {type(messages).__name__}"
        )
    if not messages:
        raise ChatTemplateError("messages: expected at least one message, found none")
    return messages


def _checked(message: object, index: int) -> dict[str, Any]:
    """A copy of one message whose content is a string (or None beside tool calls)."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"{where}: expected a mapping, found {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ChatTemplateError(
            f"{where}.role: expected a name such as 'user', found {shown(role)}"
        )
    checked = dict(message)
    content = message.get("content")
    if content is None and (message.get("tool_calls") or role == "assistant"):
        checked["content"] = None if message.get("tool_calls") else ""
    elif isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        checked["content"] = "".join(
            _part(part, f"{where}.content[{i}]") for i, part in enumerate(content)
        )
    elif not isinstance(content, str):
        raise ChatTemplateError(
            f"{where}.content: expected text or a list of text parts, found {shown(content)}"
        )
    return checked


def _part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise ChatTemplateError(
            f"{where}: expected {{'type': 'text', 'text': ...}}, found a part of type {shown(kind)}"
        )
    return text


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}
