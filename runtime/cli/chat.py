"""`stoker chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..base.display import printable
from ..base.errors import ChatTemplateError, ContextLengthError, OptionError
from ..options import GenerationOptions, LoadOptions
from ..terminal.options import Model as ModelName
from ..terminal.options import (
    ParseSpecial,
    Plan,
    System,
    TemplateVar,
    Trace,
    take,
    template_variables,
    with_tables,
)
from ..terminal.terminal import StatusLine, WordWrap

if TYPE_CHECKING:
    from ..generate import Generation
    from ..model import Model
    from ..statistics import Statistics

_HELP = '''\
/help            this list
/reset           forget the conversation
/system [TEXT]   set the system message (without TEXT: show it; "-" removes it)
/stats           figures of the last answer
/quit            leave (also Ctrl-D)
A message of several lines: begin and end it with """, or end each line but the last with \\.
Ctrl-C stops the answer.'''


class Chat:
    """One conversation; `loop` reads messages and commands until the end of the input."""

    def __init__(
        self,
        model: Model,
        options: GenerationOptions,
        *,
        system: str | None,
        template: dict[str, Any] | None = None,
        parse_special: bool = False,
    ) -> None:
        """Begins the conversation; template: variables of the chat template."""
        if model.chat_template is None:
            raise ChatTemplateError(
                f"{model.path.name} has no chat template (a base model?): use `stoker run --raw`"
            )
        self._session = model.session(system=system)
        self._options = options
        self._given: dict[str, Any] = {"template": template, "parse_special": parse_special}
        self._last: Generation | None = None
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if self._terminal:
            _edit_lines()
            print(f"{printable(model.name)}. /help lists the commands, Ctrl-D leaves.")

    def loop(self) -> None:
        """Runs until /quit or the end of the input. Raises OptionError if the input is empty."""
        read = False
        while True:
            try:
                message = self._read()
                read = True
            except EOFError:
                if self._terminal:
                    print()
                elif not read:
                    raise OptionError("standard input: expected messages, found none") from None
                return
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                print("\n(Ctrl-D or /quit to leave)")
                continue
            if not message.strip():
                continue
            if message.startswith("/"):
                if not self._command(message):
                    return
                continue
            try:
                self._answer(message)
            except (ContextLengthError, ChatTemplateError) as error:
                if not self._terminal:
                    raise
                print(f"{error}\n(/reset forgets the conversation)")

    def _read(self) -> str:
        """Reads one message or command. Raises EOFError at the end."""
        prompt, more = ("> ", "... ") if self._terminal else ("", "")
        line = _line(prompt)
        if line.startswith('"""'):
            lines = [line[3:]]
            while not lines[-1].rstrip().endswith('"""'):
                lines.append(_line(more))
            lines[-1] = lines[-1].rstrip()[:-3]
            return "\n".join(lines).strip("\n")
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(_line(more))
        return "\n".join(lines)

    def _command(self, line: str) -> bool:
        """Executes a /command; returns False to leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit", "/bye"):
            return False
        if name == "/help":
            print(_HELP)
        elif name == "/reset":
            self._session.reset()
            print("(the conversation is forgotten)")
        elif name == "/system":
            if rest:
                self._session.system = None if rest == "-" else rest
            print(f"(system message: {self._session.system or 'that of the template, if any'})")
        elif name == "/stats":
            lines = ["(no answer yet)"] if self._last is None else self._last.stats.lines()
            print("\n".join(lines))
        elif self._terminal:
            print(f"(unknown command {printable(name)}; /help lists them)")
        else:
            raise OptionError(f"unknown command {name}; /help lists them")
        return True

    def _answer(self, message: str) -> None:
        generation = self._last = self._session.chat(message, options=self._options, **self._given)
        if not self._terminal:
            for chunk in generation:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
            print("" if generation.text.endswith("\n") else "\n", end="", flush=True)
            return
        with StatusLine(sys.stdout) as status:
            status.show(f"reading {generation.stats.prompt_tokens} tokens", now=True)
            wrapped = WordWrap(sys.stdout)
            try:
                for chunk in generation:
                    wrapped.write(printable(chunk.text))
                    status.show(self._status(generation))
            except KeyboardInterrupt:
                pass
            finally:
                generation.close()
                # The newline is printed while the status row is reserved, so that it stays last.
                if not generation.text.endswith("\n"):
                    print(flush=True)
        if generation.finish_reason == "cancelled":
            print("(stopped)")
        elif generation.finish_reason == "length":
            print("(cut off: the answer reached max-tokens or the context is full)")
        if generation.stats.experts is not None or generation.stats.stream is not None:
            print(f"({_speed(generation.stats)})")

    def _status(self, generation: Generation) -> str:
        stats = generation.stats
        speed = f" | {_speed(stats)}" if stats.decode_tokens else ""
        used = f"{self._session.position} of {self._session.context} tokens of context"
        return f"{stats.new_tokens} tokens{speed} | {used} | Ctrl-C stops"


def _line(prompt: str) -> str:
    """Reads one line of standard input. Raises EOFError, OptionError."""
    try:
        return input(prompt)
    except UnicodeDecodeError as error:
        raise OptionError(
            f"standard input: expected UTF-8 text, found byte {error.start} not to be"
        ) from error


def _speed(stats: Statistics) -> str:
    """Returns tokens a second and, if weights are on flash, the hit rate and the time waited."""
    parts = [f"{stats.decode_tok_s:.1f} tok/s"]
    if stats.experts is not None:
        parts.append(f"{stats.experts.hit_rate:.0%} hits")
    waits = [part.stall_s for part in (stats.experts, stats.stream) if part is not None]
    if waits:
        parts.append(f"{sum(waits):.1f} s waited")
    return ", ".join(parts)


def _edit_lines() -> None:
    """Gives input() line editing and history if Python has them."""
    with suppress(ImportError):
        import readline  # noqa: F401


@with_tables
def chat(
    model: ModelName,
    *,
    system: System = None,
    template_var: TemplateVar = None,
    parse_special: ParseSpecial = False,
    answering: GenerationOptions = take(GenerationOptions, without=("ignore_eos", "logprobs")),
    loading: LoadOptions = take(LoadOptions),
    plan: Plan = False,
    trace: Trace = None,
) -> None:
    """Talk with a model in the terminal.

    /help lists the commands, Ctrl-C stops an answer. Where stdin is no terminal, each line is
    one message.

    \b
    stoker chat smollm2
    stoker chat model.gguf --system "Answer in one sentence." -c 8192
    stoker chat mixture.gguf --memory 4GiB --plan
    printf 'Hello\\nAnd again\\n' | stoker chat smollm2 --temperature 0
    """
    from ..terminal.opening import open_named, recording

    variables = template_variables(template_var)
    loaded = open_named(model, loading, plan=plan, measure=True)
    with recording(loaded, trace):
        Chat(
            loaded, answering, system=system, template=variables, parse_special=parse_special
        ).loop()
