"""`stoker plan`: forecasts from a model's header whether it runs on a device, and how fast."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.errors import OptionError
from ..options import LoadOptions
from ..terminal.options import Json, take, with_tables

if TYPE_CHECKING:
    from ...offload.plan.device_profile import DeviceProfile
    from ...offload.plan.forecast import Device, Forecast, ModelHeader
    from .._core import GgufFile

_FRESH_BYTES = 128 << 20
_COLUMNS = (
    "memory",
    "fits",
    "least_memory",
    "slots",
    "experts",
    "hit_rate",
    "bytes_token",
    "load_s",
    "prompt_s",
    "ttft_s",
    "tokens_per_s",
    "limited_by",
    "doubles_at",
)


@with_tables
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="GGUF file, name of the catalogue, hf:owner/name/file.gguf, or a URL. "
            "Of what is not here only the header is fetched.",
        ),
    ],
    *,
    memory: Annotated[
        str,
        typer.Option(
            "--memory",
            metavar="SIZES",
            help="Budgets of the whole process, with commas: 500MB,2GiB,60%,auto.",
        ),
    ] = "auto",
    device: Annotated[
        Path | None,
        typer.Option(
            help="A profile made by stoker probe "
            "[default: this device's, measured if there is none]."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Of the prompt.")] = 64,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Decoded after it.")] = 256,
    loading: LoadOptions = take(LoadOptions, only=("threads", "context", "kv_type", "precision")),
    as_json: Json = False,
    as_tsv: Annotated[bool, typer.Option("--tsv", help="One line a budget.")] = False,
) -> None:
    """Forecast a model on a device: does it fit, what stays in memory, how fast, what limits it.

    Reads the header only, also of files that are elsewhere, and no weight. Bytes of the plan are
    exact, times are expected: as good as the profile is recent, and worse for a mixture whose
    routing is unlike the recorded one.

    \b
    stoker plan mixture.gguf --memory 500MB,1GiB,2GiB,auto
    stoker plan hf:Qwen/Qwen3-30B-A3B-GGUF/Qwen3-30B-A3B-Q4_K_M.gguf --memory 8GiB
    stoker plan mixture.gguf --memory 3GiB --device phone.json --prompt-tokens 512
    """
    from ...offload.plan.forecast import Device, ModelHeader, Workload, forecast
    from ..base.memory import process_bytes

    if as_json and as_tsv:
        raise OptionError("--json and --tsv exclude each other")
    _check_sizes(memory)
    with _header(model) as file:
        machine = Device(_profile(device), loading.threads or 0)
        subject = ModelHeader(
            file,
            model,
            loading.context or 0,
            loading.kv_type,
            loading.precision,
            process_bytes=process_bytes(),
        )
        found = [
            forecast(
                subject,
                machine,
                _budget(text, subject, machine),
                Workload(prompt_tokens, tokens),
            )
            for text in memory.split(",")
        ]
    if as_json:
        document = {"device": machine.profile, "forecasts": [f.as_dict() for f in found]}
        typer.echo(json.dumps(document, indent=2))
    elif as_tsv:
        typer.echo(as_tab_separated(found))
    else:
        typer.echo(as_table(machine, found))


@contextmanager
def _header(model: str) -> Iterator[GgufFile]:
    from ...models import hub
    from ...models.locate import locate
    from ...models.remote_header import is_remote, remote_header
    from .inspect import open_file

    # A hub file that was pulled before needs no network.
    if is_remote(model) and not (model.startswith("hf:") and hub.cached(hub.parse(model))):
        with remote_header(model) as file:
            yield file
    else:
        yield open_file(locate(model, download=False))


def _profile(path: Path | None) -> DeviceProfile:
    """Loads the named profile, else this device's with the present speed of fresh memory."""
    from ...mobile_bench.run.fresh_memory import fresh_bytes_s
    from ...offload.plan import device_profile

    if path is not None:
        return device_profile.load(path)
    profile = _own_profile()
    profile["memory"].setdefault("fresh_bytes_s", fresh_bytes_s(_FRESH_BYTES))
    return profile


def _own_profile() -> DeviceProfile:
    """Returns the profile that `stoker probe` saved, else measures quickly."""
    import sys

    from ...offload.plan import device_profile

    saved = device_profile.default_path()
    if saved.exists():
        profile = device_profile.load(saved)
        if profile["id"] == device_profile.current_id():
            return profile
        print(f"stoker: {saved} is of another machine; measuring this one", file=sys.stderr)
    else:
        print(
            "stoker: no profile of this device (stoker probe makes one); measuring for 10 s",
            file=sys.stderr,
        )
    from ...mobile_bench.probe.probe import probe

    return probe(quick=True)


def _check_sizes(memory: str) -> None:
    from ..base.memory import check_memory

    for text in memory.split(","):
        check_memory(text)


def _budget(text: str, subject: ModelHeader, device: Device) -> int | None:
    """Returns the budget in bytes on the device; None if it is auto and everything fits."""
    from ...offload.plan.planned import resident_bytes
    from ..base.memory import check_memory

    named = check_memory(text)
    if isinstance(named, int):
        return named
    available = device.available
    if available is None:
        raise OptionError(
            f"memory {text}: the profile does not tell what the device has; name bytes"
        )
    if isinstance(named, float):
        return int(available * named)
    needed = resident_bytes(
        subject.file,
        subject.process_bytes,
        threads=device.threads,
        context=subject.context,
        kv_type=subject.kv_type,
        precision=subject.precision,
    )
    return None if needed <= available else available


def as_tab_separated(found: Sequence[Forecast]) -> str:
    """Returns a head and one line a budget; unknown or unneeded cells are empty."""
    lines = ["\t".join(_COLUMNS)]
    for forecast in found:
        values = forecast.as_dict()
        if not forecast.fits:
            values = {k: values[k] for k in ("memory", "fits", "least_memory")}
        cells = [values.get(column) for column in _COLUMNS]
        lines.append("\t".join("" if cell is None else str(cell) for cell in cells))
    return "\n".join(lines)


def as_table(device: Device, found: Sequence[Forecast]) -> str:
    """Returns a table with one column a budget."""
    from ..base.display import aligned, size

    first = found[0]
    head = [
        f"{first.model} on {device.profile['name']} ({device.profile['id']}), "
        f"{device.threads} threads, context {first.context}",
        f"profile of {device.profile['time']}; the smallest budget that would do is "
        f"{size(first.least_memory)}",
    ]
    rows = [["memory", *(_memory_cell(f) for f in found)]]
    kinds = list(dict.fromkeys(kind for f in found for kind in f.resident))
    rows.append(["fits", *("yes" if f.fits else "no" for f in found)])
    for kind in kinds:
        rows.append([f"  {kind}", *(_size_cell(f.resident.get(kind)) for f in found)])
    if any(f.experts for f in found):
        rows.append(["experts in memory", *(_slots_cell(f) for f in found)])
        rows.append(
            ["expected hits", *("-" if f.hit_rate is None else f"{f.hit_rate:.0%}" for f in found)]
        )
    if any(f.bytes_token for f in found):
        rows.append(["flash a token", *(_size_cell(f.bytes_token or None) for f in found)])
    known = [f for f in found if f.fits]
    prompt = known[0].prompt_tokens if known else 0
    rows += [
        ["load, cold", *(_time_cell(f, f.load_s) for f in found)],
        [f"prompt of {prompt} tokens", *(_time_cell(f, f.prompt_s) for f in found)],
        ["first token after", *(_time_cell(f, f.ttft_s) for f in found)],
        ["decode", *(f"{f.tokens_per_s:.1f} tok/s" if f.fits else "-" for f in found)],
        ["limited by", *(f.limited_by or "-" for f in found)],
        ["  its share", *(_share_cell(f) for f in found)],
        ["twice as fast with", *(_double_cell(f) for f in found)],
    ]
    return "\n".join([*head, "", *aligned(rows, left=1), *_warnings(found)])


def _warnings(found: Sequence[Forecast]) -> list[str]:
    from ..base.display import size

    lines = []
    for f in found:
        if not f.fits and f.memory is not None:
            lines.append(
                f"does not fit in {size(f.memory)}: at least {size(f.least_memory)} "
                f"({f.least_memory} bytes) are needed; a smaller --context needs less"
            )
        elif f.streams:
            lines.append(
                f"{_memory_cell(f)}: one token uses {f.working_set} experts, the cache holds "
                f"{f.slots}: layers stream through it"
            )
    return ["", *lines] if lines else []


def _memory_cell(f: Forecast) -> str:
    from ..base.display import size

    return "all in memory" if f.memory is None else size(f.memory)


def _size_cell(nbytes: float | None) -> str:
    from ..base.display import size

    return "-" if nbytes is None else size(nbytes)


def _slots_cell(f: Forecast) -> str:
    if not f.fits or not f.experts:
        return "-" if not f.fits else "all"
    return f"{f.slots} of {f.experts} ({f.slots / f.experts:.0%})"


def _time_cell(f: Forecast, seconds: float) -> str:
    if not f.fits:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _share_cell(f: Forecast) -> str:
    if f.limited_by is None:
        return "-"
    return f"{f.times[f.limited_by] / f.token_s:.0%} of a token"


def _double_cell(f: Forecast) -> str:
    if not f.fits:
        return "-"
    return "no budget" if f.doubles_at is None else _size_cell(f.doubles_at)
