"""`stoker bench-kernels` compares matrix products of every format with the limits and ggml."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.errors import OptionError
from ..terminal.options import Json

if TYPE_CHECKING:
    from ...mobile_bench.probe.kernels import KernelBench, KernelRow

_COLUMNS = (
    "format",
    "isa",
    "rows",
    "cols",
    "tokens",
    "stacked",
    "seconds",
    "bytes_s",
    "ops_s",
    "of_memory",
    "of_peak",
    "ggml_s",
    "repacked",
)


def bench_kernels(
    *,
    formats: Annotated[
        str | None, typer.Option("--formats", help="Such as Q4_0,Q4_K [default: all].")
    ] = None,
    isas: Annotated[
        str | None,
        typer.Option("--isas", help="Instruction sets [default: all that execute but scalar]."),
    ] = None,
    shapes: Annotated[
        str, typer.Option("--shapes", help="Rows x columns of the matrices.")
    ] = "576x1536,2048x2048",
    tokens: Annotated[
        str, typer.Option("--tokens", help="Tokens at a time: 1 is decoding, 512 a prompt.")
    ] = "1,512",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of a product.")] = 1,
    seconds: Annotated[
        float, typer.Option(min=0.001, max=60.0, help="How long each product is repeated.")
    ] = 0.1,
    baseline_python: Annotated[
        str | None,
        typer.Option(help="A Python that has llama-cpp-python [default: this one, if it has]."),
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Measure ggml, where it is installed.")
    ] = True,
    as_json: Json = False,
    tsv: Annotated[bool, typer.Option("--tsv", help="Tab-separated values.")] = False,
) -> None:
    """Measure matrix products: formats, instruction sets, shapes.

    Decoding (1 token) is compared with the memory bandwidth that the same run measures: matrices
    are stacked until no cache holds them. Prompts are compared with the int8 operations that the
    processor does out of registers. Beside them stands ggml, whose faster layout counts; the
    activations' quantization is in both times.

    \b
    stoker bench-kernels
    stoker bench-kernels --formats Q4_K,Q6_K --isas avx2 --shapes 1536x576,4096x4096
    stoker bench-kernels --baseline-python ~/llama/bin/python --tsv > kernels.tsv
    """
    if as_json and tsv:
        raise OptionError("give --json or --tsv, not both")
    from ...mobile_bench.probe import kernels
    from ..terminal.terminal import stage_progress

    if baseline_python is not None and not baseline:
        raise OptionError("give --baseline-python or --no-baseline, not both")
    with stage_progress() as progress:
        found = kernels.measure(
            formats=None if formats is None else formats.split(","),
            isas=None if isas is None else isas.split(","),
            shapes=[_shape(text) for text in shapes.split(",")],
            tokens=[_number(text) for text in tokens.split(",")],
            threads=threads,
            seconds=seconds,
            baseline_python=(baseline_python or kernels.baseline_here()) if baseline else None,
            progress=progress,
        )
    typer.echo(as_json_text(found) if as_json else as_tsv(found) if tsv else as_table(found))


def _number(text: str) -> int:
    if not re.fullmatch(r"\d{1,7}", text):
        raise OptionError(f"tokens: expected numbers such as 1,512, found {text[:40]!r}")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,7})x(\d{1,7})", text)
    if found is None:
        raise OptionError(f"shapes: expected rows x columns such as 576x1536, found {text[:40]!r}")
    return int(found[1]), int(found[2])


def as_table(found: KernelBench) -> str:
    """Returns one table for each shape and number of tokens."""
    from ...mobile_bench.probe.kernels import PROMPT_TOKENS
    from ..base.display import aligned

    int8, float32 = (
        ", ".join(f"{isa} {ops_s / 1e9:.0f}" for isa, ops_s in peaks.items())
        for peaks in (found.int8_s, found.float32_s)
    )
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    lines = [
        f"{found.cpu}, {threads}",
        f"memory {found.memory_s / 1e9:.1f} GB/s",
        f"int8 GOP/s: {int8}; float32: {float32}",
    ]
    if found.ggml is not None:
        lines.append(f"ggml of llama-cpp-python {found.ggml}; r: of its rearranged weights")
    for rows, cols, tokens in dict.fromkeys((r.rows, r.cols, r.tokens) for r in found.rows):
        decode = tokens < PROMPT_TOKENS
        what = "1 token" if tokens == 1 else f"{tokens} tokens"
        head = ["format", "isa", "GB/s", "of memory"] if decode else ["format", "isa"]
        head += ["Gweights/s"] if decode else ["GOP/s", "of peak"]
        table = [head + (["ggml", "times ggml"] if found.ggml is not None else [])]
        for r in found.rows:
            if (r.rows, r.cols, r.tokens) == (rows, cols, tokens):
                table.append(_cells(r, decode=decode, ggml=found.ggml is not None))
        stacked = ", from memory" if decode else ""
        lines += ["", f"{rows} x {cols}, {what}{stacked}", *aligned(table, left=2)]
    return "\n".join(lines)


def _cells(r: KernelRow, *, decode: bool, ggml: bool) -> list[str]:
    rate = r.rows * r.cols * r.stacked / 1e9 if decode else r.ops_s * r.seconds / 1e9
    cells = [r.format, r.isa]
    cells += [f"{r.bytes_s / 1e9:.1f}", f"{r.of_memory:.0%}"] if decode else []
    cells += [f"{rate / r.seconds:.1f}" if decode else f"{rate / r.seconds:.0f}"]
    cells += [] if decode else [f"{r.of_peak:.0%}"]
    if ggml and r.ggml_s is None:
        cells += ["-", "-"]
    elif ggml and r.ggml_s is not None and r.faster is not None:
        digits = 1 if decode else 0
        cells += [f"{'r ' if r.repacked else ''}{rate / r.ggml_s:.{digits}f}", f"{r.faster:.2f}"]
    return cells


def as_tsv(found: KernelBench) -> str:
    """Returns one line a product; unknown cells are empty."""
    lines = ["\t".join(_COLUMNS)]
    for row in found.rows:
        values = asdict(row)
        cells = ("" if values[name] is None else _cell(values[name]) for name in _COLUMNS)
        lines.append("\t".join(cells))
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def as_json_text(found: KernelBench) -> str:
    """Returns all results as one JSON object."""
    return json.dumps(asdict(found), indent=1)
