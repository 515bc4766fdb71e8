"""`stoker run` and `stoker perplexity`: one prompt or one text through a model."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OptionError
from .options import GenerationOptions, LoadOptions
from .terminal import byte_progress, printable, progress_bars
from .whole_file import MOST_TEXT, read_stdin, read_whole

if TYPE_CHECKING:
    from .generate import Generation
    from .model import Model


def open_model(
    spec: str,
    options: LoadOptions | None = None,
    *,
    plan: bool = False,
    as_json: bool = False,
    measure: bool = False,
) -> Model:
    """Loads what `spec` names, downloading it with a progress display if need be.

    plan: print the plan, as JSON on stdout or as a table on stderr; measure: the bandwidth of the
    memory, so that statistics can name the limit. Raises BudgetError and what a load raises.
    """
    from . import backends

    model = backends.open_model(find(spec), options)
    if plan or measure:
        report = model.forecast()
        if plan and as_json:
            print(json.dumps({"plan": report.as_dict()}), flush=True)
        elif plan:
            print("\n".join(report.lines()), end="\n\n", file=sys.stderr, flush=True)
    return model


def recording(model: Model, path: Path | None) -> AbstractContextManager[None]:
    """Records the routing into `path` where there is one."""
    return nullcontext() if path is None else model.record(path)


def find(spec: str) -> Path:
    """The file that `spec` names, downloaded with a progress display if need be."""
    from ..models.locate import locate

    with byte_progress() as progress:
        return locate(spec, download=True, progress=progress, waiting=_waiting)


def fetch(spec: str) -> Path:
    """Downloads a catalogue model or hf: file with a progress display."""
    from ..models.locate import fetch

    with byte_progress() as progress:
        return fetch(spec, progress=progress, waiting=_waiting)


def _waiting() -> None:
    print("waiting for another download of this model to finish", file=sys.stderr)


def read_text(path: Path) -> str:
    """The text of a file, or of stdin for "-". Raises OptionError."""
    try:
        data = read_stdin() if str(path) == "-" else read_whole(path, MOST_TEXT)
        return data.decode("utf-8")
    except OSError as error:
        raise OptionError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        if not isinstance(error, UnicodeDecodeError):  # a NUL in the path
            raise OptionError(f"cannot read {path}: {error}") from None
        raise OptionError(f"{path}: expected UTF-8 text, found byte {error.start} not to be") from (
            error
        )


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, "-" (stdin) or a file: exactly one of them."""
    if prompt is not None and file is not None:
        raise OptionError("give a prompt or --file, not both")
    if prompt is None and file is None:
        text = "" if sys.stdin.isatty() else read_text(Path("-"))
        if not text:  # a terminal, or nothing in what is read: nobody has asked for that
            raise OptionError("give a prompt, - for stdin, or --file")
    elif prompt is not None and prompt != "-":
        return prompt
    else:
        text = read_text(file or Path("-"))
    return text.removesuffix("\n").removesuffix("\r")


def run(
    model: Model,
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

    prefill: words of the answer to go on with. template: variables of the chat template.
    trace: where to record the routing.
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


def _print_json(model: Model, generation: Generation) -> None:
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


def perplexity(
    model: Model,
    text: str,
    *,
    context: int | None,
    stride: int | None,
    max_chunks: int | None,
    as_json: bool,
    trace: Path | None = None,
) -> None:
    """Prints the perplexity of `text`; a progress bar on stderr in a terminal.

    trace: where to record the routing.
    """
    bar: Any = nullcontext()
    report = None
    if sys.stderr.isatty():
        bar = progress_bars(transient=True)
        task = bar.add_task("perplexity", total=None)

        def report(done: int, total: int, ppl: float) -> None:
            bar.update(task, completed=done, total=total, description=f"perplexity {ppl:.4f}")

    with recording(model, trace), bar:
        result = model.perplexity(
            text, context=context, stride=stride, max_chunks=max_chunks, progress=report
        )
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        print(
            f"perplexity {result.ppl:.4f} +/- {result.error:.4f} "
            f"({result.nll:.5f} nats a token; {result.tokens} tokens scored "
            f"in {result.chunks} chunks)"
        )
