"""`stoker export verify`: measures how far two forms of a model are from each other."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...base.errors import OptionError

if TYPE_CHECKING:
    from ....export.verify import Verification


def verify(
    a: Annotated[
        str, typer.Argument(metavar="A", help="GGUF or ONNX file, HF folder, or a model's name.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    *,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to read [default: a few pages of our own].")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Compared at most.")] = 512,
    context: Annotated[int, typer.Option("--context", "-c", help="Tokens of a window.")] = 256,
    precision: Annotated[
        str, typer.Option(help="Of stoker's own engine: fast, balanced or high.")
    ] = "high",
    threads: Annotated[int | None, typer.Option("--threads", "-t")] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Exit with code 1 where the mean KL is above, nats.")
    ] = None,
    max_difference: Annotated[
        float | None, typer.Option(help="Exit with code 1 where some logit differs by more.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare two forms of a model on the same text: KL, top-1, perplexity, size, speed.

    A is the reference: the divergence is that of B's next-token distributions from A's. Speeds are
    measured one after the other, after a short prompt: for ratios to rely on, use `stoker bench`.

    \b
    stoker export verify original_folder/ exported.gguf
    stoker export verify f16.gguf q4.gguf --text book.txt --tokens 4096
    stoker export verify model.gguf model.onnx --max-kl 0.01 && echo good enough
    """
    from ....export.verify import verify as compare
    from ...terminal.opening import read_text
    from ...terminal.terminal import stage_progress

    for name, bound in (("--max-kl", max_kl), ("--max-difference", max_difference)):
        if bound is not None and not bound >= 0:
            raise OptionError(f"{name} must be 0 or more, not {bound}")
    corpus = None if text is None else read_text(text)
    with stage_progress() as progress:
        found = compare(
            a,
            b,
            text=corpus,
            tokens=tokens,
            context=context,
            precision=precision,
            threads=threads,
            progress=progress,
        )
    typer.echo(json.dumps(_as_dict(found), indent=2) if as_json else _table(found))
    beyond = [
        f"{name} {value:.3g} is above {bound:g}"
        for name, value, bound in (
            ("KL", found.kl, max_kl),
            ("difference", found.difference, max_difference),
        )
        if bound is not None and not value <= bound
    ]
    if beyond:
        print("stoker: " + "; ".join(beyond), file=sys.stderr)
        raise typer.Exit(1)


def _as_dict(found: Verification) -> dict[str, object]:
    return {**asdict(found), "ppl_ratio": found.ppl_ratio}


def _table(found: Verification) -> str:
    """Returns aligned columns for display."""
    from ...base.display import aligned, size

    rows = [("", "kind", "size", "perplexity", "decode tok/s")]
    for name, form in (("A", found.a), ("B", found.b)):
        rows.append(
            (
                f"{name}: {form.path}",
                form.kind,
                size(form.nbytes),
                f"{form.ppl:.4f}",
                f"{form.decode:.1f}",
            )
        )
    out = aligned(rows, left=len(rows[0]))
    out += [
        "",
        f"KL of B from A     {found.kl:.3g} nats (99th percentile {found.kl_99:.3g})",
        f"same top token     {found.top1:.2%}",
        f"perplexity B / A   {found.ppl_ratio:.4f}",
        f"largest difference {found.difference:.3g} (of a logit)",
        f"compared           {found.tokens} tokens, {found.n_vocab} logits each",
    ]
    if not found.same_tokens:
        out.append("tokenizers         differ on this text: B read A's tokens")
    return "\n".join(out)
