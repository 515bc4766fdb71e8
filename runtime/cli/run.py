"""`stoker run`: answers one prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.display import printable
from ..base.errors import OptionError
from ..options import GenerationOptions, LoadOptions
from ..terminal.options import (
    Model,
    ParseSpecial,
    Plan,
    System,
    TemplateVar,
    Trace,
    take,
    template_variables,
    with_tables,
)

if TYPE_CHECKING:
    from ..generate import Generation
    from ..model import Model as LoadedModel


@with_tables
def run(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads stdin.")] = None,
    *,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt here.")] = None,
    system: System = None,
    prefill: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Words that the answer goes on with; what follows them is printed."
        ),
    ] = None,
    template_var: TemplateVar = None,
    parse_special: ParseSpecial = False,
    chat_format: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Use the chat template, or continue the prompt as plain text "
            "[default: the template where the model has one].",
        ),
    ] = None,
    answering: GenerationOptions = take(GenerationOptions),
    loading: LoadOptions = take(LoadOptions),
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines: one for each token, then the summary.")
    ] = False,
    stats: Annotated[bool, typer.Option(help="Print speed and memory on stderr.")] = False,
    plan: Plan = False,
    trace: Trace = None,
) -> None:
    """Answer one prompt and exit.

    The prompt goes through the model's chat template; where there is none, or with --raw, it is
    continued as plain text. A model of the catalogue is downloaded at first use.

    \b
    stoker run smollm2 "What is gravity?" --temperature 0 --stats
    stoker run model.gguf -f question.txt -n 200
    echo "Once upon a time" | stoker run model.gguf - --raw
    stoker run smollm2 "Hello" --json --logprobs 3
    stoker run qwen3.gguf "Hello" --template-var enable_thinking=false
    stoker run smollm2 "Name a fruit." --prefill "A fruit is the"
    stoker run mixture.gguf "Hello" --memory 2GiB --plan --stats
    stoker run mixture.gguf "Hello" --memory 60% --trace routing.csv.gz
    """
    from ..terminal.opening import open_named, read_prompt

    text = read_prompt(prompt, file)
    answer(
        open_named(model, loading, plan=plan, as_json=as_json, measure=stats),
        text,
        answering,
        system=system,
        prefill=prefill,
        template=template_variables(template_var),
        parse_special=parse_special,
        chat=chat_format,
        as_json=as_json,
        stats=stats,
        trace=trace,
    )


def answer(
    model: LoadedModel,
    prompt: str,
    options: GenerationOptions,
    *,
    system: str | None,
    prefill: str | None,
    template: dict[str, Any] | None,
    parse_special: bool,
    chat: bool | None,
    as_json: bool,
    stats: bool,
    trace: Path | None = None,
) -> None:
    """Answers `prompt` on stdout; chat None: in the chat format if the model has one.

    prefill: the answer's first words, which it continues. template: variables of the chat template.
    trace: the file that records the routing.
    """
    wanting = {"--system": system, "--prefill": prefill, "--template-var": template}
    needs = next((option for option, value in wanting.items() if value is not None), None)
    if chat is None:
        chat = needs is not None or model.chat_template is not None
    if not chat and needs is not None:
        raise OptionError(f"{needs} needs the chat format: leave out --raw")
    if not chat:
        generation = model.generate(prompt, options=options)
    else:
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        if prefill is not None:
            messages.append({"role": "assistant", "content": prefill})
        generation = model.chat(
            messages, template=template, parse_special=parse_special, options=options
        )
    from ..terminal.opening import recording

    with recording(model, trace):
        if as_json:
            _print_json(model, generation)
        else:
            _print_text(generation)
    if stats:
        lines = generation.stats.lines()
        lines[0] = f"load {model.load_s * 1e3:.0f} ms | {lines[0]}"
        print("\n".join(lines), file=sys.stderr, flush=True)


def _print_text(generation: Generation) -> None:
    out, terminal = sys.stdout, sys.stdout.isatty()
    try:
        for chunk in generation:
            out.write(printable(chunk.text) if terminal else chunk.text)
            out.flush()
    finally:
        if not generation.text.endswith("\n"):
            out.write("\n")
        out.flush()


def _print_json(model: LoadedModel, generation: Generation) -> None:
    def line(document: dict[str, Any]) -> None:
        print(json.dumps(document), flush=True)

    for chunk in generation:
        document: dict[str, Any] = {"text": chunk.text, "token": chunk.token}
        if chunk.logprob is not None:
            document |= {"logprob": chunk.logprob, "top_logprobs": list(chunk.top_logprobs)}
        line(document)
    line(
        {
            "done": True,
            "text": generation.text,
            "finish_reason": generation.finish_reason,
            "stop_string": generation.stop_string,
            "seed": generation.seed,
            "model": str(model.path),
            "load_s": model.load_s,
            "stats": generation.stats.as_dict(),
        }
    )
