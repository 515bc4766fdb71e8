"""`stoker inspect`: the metadata and the tensor directory of a GGUF file, of any architecture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import OptionError
from ..terminal.options import (
    Json,
    Model,
)

if TYPE_CHECKING:
    from .._core import GgufFile, TensorInfo

_ITEMS = 8  # items of an array that are shown
_CHARS = 70  # characters of a text that the table shows


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
    from ..terminal.opening import find

    if as_json and tsv:
        raise OptionError("give --json or --tsv, not both")
    file = open_file(find(model))
    if as_json:
        typer.echo(json_text(file, full=full))
    elif tsv:
        typer.echo(as_tsv(file))
    else:
        typer.echo(as_table(file, metadata=metadata, tensors=tensors, full=full))


def open_file(path: Path) -> GgufFile:
    """Opens the file and checks its directory. Raises ModelFileError."""
    from .._core import GgufFile

    return GgufFile(str(path))


def parameters(file: GgufFile) -> int:
    """Returns the number of elements of all tensors."""
    return sum(math.prod(tensor.shape) for tensor in file.tensors)


def json_text(file: GgufFile, *, full: bool = False) -> str:
    """Returns one JSON object; long arrays are {"length", "first"} unless `full`."""
    document = {
        "path": file.path,
        "version": file.version,
        "shards": file.shards,
        "nbytes": file.nbytes,
        "parameters": parameters(file),
        "metadata": {key: _json_value(value, full) for key, value in file.metadata.items()},
        "tensors": [_tensor_row(tensor) for tensor in file.tensors],
    }
    return _text(json.dumps(document, indent=2, ensure_ascii=False))


def as_tsv(file: GgufFile) -> str:
    """Returns the tensors, one a line: name, type, shape, offset, nbytes, shard."""
    rows = ["name\ttype\tshape\toffset\tnbytes\tshard"]
    for tensor in file.tensors:
        row = _tensor_row(tensor)
        row["shape"] = "x".join(str(n) for n in row["shape"])
        rows.append("\t".join(_line(str(value)) for value in row.values()))
    return "\n".join(rows)


def as_table(file: GgufFile, *, metadata: bool, tensors: bool, full: bool = False) -> str:
    """Returns aligned columns for display."""
    from ..base.display import aligned, size

    entries = file.metadata
    infos = file.tensors
    count = parameters(file)
    million = f"{count / 1e6:.1f} M" if count < 1e9 else f"{count / 1e9:.2f} B"
    architecture = _line(str(entries.get("general.architecture")))
    out = [
        f"{_line(file.path)}: GGUF v{file.version}, {architecture}, "
        f"{million} parameters in {len(infos)} tensors, {size(file.nbytes)}"
        + (f" in {len(file.shards)} shards" if len(file.shards) > 1 else "")
    ]
    if metadata:
        width = max((len(key) for key in entries), default=0)
        out.append("")
        out += [f"{_line(key):{width}}  {_shown(value, full)}" for key, value in entries.items()]
    if tensors:
        out.append("")
        rows = [("tensor", "type", "shape", "size")]
        for t in infos:
            shape = " x ".join(str(n) for n in t.shape)
            rows.append((_line(t.name), t.type, shape, size(t.nbytes) if t.nbytes else "?"))
        if len(file.shards) > 1:
            rows = [
                (*row, "shard" if i == 0 else str(infos[i - 1].shard + 1))  # type: ignore[misc]
                for i, row in enumerate(rows)
            ]
        out += aligned(rows, left=len(rows[0]))
        totals: dict[str, int] = {}
        for t in infos:
            totals[t.type] = totals.get(t.type, 0) + t.nbytes
        parts = [f"{k} {size(v)}" for k, v in sorted(totals.items(), key=lambda kv: -kv[1])]
        out += ["", "by type: " + ", ".join(parts)]
    return "\n".join(out)


def _tensor_row(tensor: TensorInfo) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "type": tensor.type,
        "shape": list(tensor.shape),
        "offset": tensor.offset,
        "nbytes": tensor.nbytes,
        "shard": tensor.shard,
    }


def _json_value(value: Any, full: bool) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN and no infinity
    if isinstance(value, list):
        if full or len(value) <= _ITEMS:
            return [_json_value(item, full) for item in value]
        first = [_json_value(item, full) for item in value[:_ITEMS]]
        return {"length": len(value), "first": first}
    return value


def _shown(value: Any, full: bool) -> str:
    if isinstance(value, list):
        items = value if full else value[:_ITEMS]
        shown = ", ".join(_scalar(item) for item in items)
        if not full and len(shown) > _CHARS:
            shown = shown[:_CHARS] + "..."
        elif len(items) < len(value):
            shown += ", ..."
        return f"[{len(value)}] {shown}"
    text = _scalar(value)
    if not full and len(text) > _CHARS:
        return f"{text[:_CHARS]}... ({len(value)} characters)"
    return text


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _line(value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _line(text: str) -> str:
    """Escapes a text to one line that any terminal and UTF-8 can take."""
    plain = text.replace("\\", "\\\\") if "\n" in text else text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in _text(plain)
    )


def _text(text: str) -> str:
    """Replaces bytes that were not UTF-8 in the file (kept as lone surrogates) by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
