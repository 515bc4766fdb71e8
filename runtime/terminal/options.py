"""Options that several commands share, in groups, and what their help says beyond one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..base.errors import OptionError

if TYPE_CHECKING:
    from ..options import GenerationOptions, LoadOptions

_MEMORY = "Memory and experts on flash"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="GGUF file, name of the catalogue (smollm2), or hf:owner/name/file.gguf.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", help="Compute threads [default: physical performance cores]."),
]
Context = Annotated[
    int | None,
    typer.Option("--context", "-c", help="Tokens of context [default: the model's, at most 4096]."),
]
KvType = Annotated[str, typer.Option(help="Element type of the KV cache: f16 or f32.")]
PrecisionOption = Annotated[
    str, typer.Option("--precision", help="Of activations: fast, balanced or high (slower).")
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", "-n", help="Tokens to generate at most [default: no limit]."),
]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this fraction of the likeliest's.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Of recent tokens; 1 is off.")]
FrequencyPenalty = Annotated[float, typer.Option(help="Per occurrence of a token; 0 is off.")]
PresencePenalty = Annotated[float, typer.Option(help="Once for a token seen; 0 is off.")]
PenaltyWindow = Annotated[int, typer.Option(help="Recent tokens that penalties look at; -1: all.")]
Seed = Annotated[int | None, typer.Option(help="Of the sampler [default: random].")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")]
System = Annotated[str | None, typer.Option("--system", "-s", help="The system message.")]
TemplateVar = Annotated[
    list[str] | None,
    typer.Option(
        "--template-var",
        metavar="NAME=VALUE",
        help="Variable of the chat template; VALUE is JSON, or else text; repeatable.",
    ),
]
ParseSpecial = Annotated[
    bool,
    typer.Option(
        "--parse-special",
        help="Read <|name|> in messages as the control token it names, not as plain text.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Memory = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Budget of the whole process: 500MB, 2GiB, 60% of what the machine can give, or auto: "
        "everything in memory where it fits, else what the machine can give.",
        rich_help_panel=_MEMORY,
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        "--policy", metavar="NAME", help="Which expert leaves the cache.", rich_help_panel=_MEMORY
    ),
]
Predictor = Annotated[
    str | None,
    typer.Option(
        "--predictor",
        metavar="NAME",
        help="What foresees the next layers' experts.",
        rich_help_panel=_MEMORY,
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        metavar="FILE",
        help="What stoker profile has taught the predictor.",
        rich_help_panel=_MEMORY,
    ),
]
Prefetch = Annotated[
    str,
    typer.Option(
        "--prefetch",
        metavar="auto|on|off",
        help="Read foreseen experts ahead; auto: while it measurably pays.",
        rich_help_panel=_MEMORY,
    ),
]
Io = Annotated[
    str | None,
    typer.Option("--io", metavar="NAME", help="What reads flash.", rich_help_panel=_MEMORY),
]
Readers = Annotated[
    int | None,
    typer.Option("--readers", help="Reads under way at a time.", rich_help_panel=_MEMORY),
]
Plan = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="First print where the memory goes and the speed to expect.",
        rich_help_panel=_MEMORY,
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Record which experts are used (.csv, .csv.gz), for stoker simulate.",
        rich_help_panel=_MEMORY,
    ),
]


def load_options(**values: Any) -> LoadOptions:
    """The options of a load. OptionError."""
    from ..options import LoadOptions

    return LoadOptions(**values)


def generation_options(stop: Sequence[str] | None, **values: Any) -> GenerationOptions:
    """The options of an answer. stop: None where none is given. OptionError."""
    from ..options import GenerationOptions

    return GenerationOptions(stop=tuple(stop or ()), **values)


def template_variables(given: list[str] | None) -> dict[str, Any] | None:
    """The values of --template-var by name, None where none is given. Raises OptionError."""
    if not given:
        return None
    variables: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise OptionError(f"--template-var: expected NAME=VALUE, found {text!r:.60}")
        try:
            variables[name.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            variables[name.strip()] = value
    return variables


class ModelCommand(TyperCommand):
    """A command that loads a model: options in groups, the names that they take at the end."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments, then the options of each group."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            if row is not None:
                kind = "Arguments" if param.param_type_name == "argument" else "Options"
                group = getattr(param, "rich_help_panel", None) or kind
                groups.setdefault(group, []).append(row)
        for group, rows in groups.items():
            if rows:
                with formatter.section(group):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Writes what the policies, predictors and backends of this build are."""
        from .._core import io_backends, policies, predictors

        for title, names in (
            ("Policies", policies()),
            ("Predictors", predictors()),
            ("I/O backends", [("auto", "the one that measures faster"), *io_backends()]),
        ):
            with formatter.section(title):
                formatter.write_dl(names)
