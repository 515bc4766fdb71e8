"""`stoker bench`: measures a model under budgets and compares it with other engines."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ..base.errors import OptionError
from ..files.output_file import check_output
from ..options import LoadOptions
from ..terminal.options import Model, take, with_tables

if TYPE_CHECKING:
    from ...mobile_bench.run.case import Case
    from ...mobile_bench.run.records import Run
    from ...mobile_bench.run.series import Baseline, Series
    from ...offload.plan.device_profile import DeviceProfile

T = TypeVar("T")


@with_tables
def bench(
    model: Model,
    *,
    memory: Annotated[
        str,
        typer.Option(
            "--memory",
            metavar="SIZES",
            help="With commas: 500MB, 2GiB, 60%, auto, resident. Where memory cgroups are allowed "
            "(Linux, as root) a size limits the whole process, page cache included, and stoker's "
            "budget is 95% of it; elsewhere it is stoker's budget.",
        ),
    ] = "auto",
    threads: Annotated[
        str, typer.Option("--threads", "-t", help="With commas; 0: the physical cores.")
    ] = "0",
    prompts: Annotated[
        str, typer.Option(help="Lengths in tokens, with commas; the context bounds them.")
    ] = "16,64,256,512,1024,2048",
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", help="To decode after a prompt of 64.")
    ] = 128,
    context: Annotated[
        int, typer.Option("--context", "-c", help="Tokens of context; 0: what is needed.")
    ] = 0,
    repeats: Annotated[int, typer.Option(help="Of everything, interleaved.")] = 3,
    against: Annotated[
        str,
        typer.Option(
            metavar="ENGINES",
            help="Other engines, with commas: llama-cpp, onnx, each with =FILE where it needs "
            "another form of the model than MODEL (or one of the same name beside it).",
        ),
    ] = "",
    baseline_python: Annotated[
        str, typer.Option(metavar="PYTHON", help="That has llama-cpp-python [default: this one].")
    ] = "",
    install_baseline: Annotated[
        bool, typer.Option("--install-baseline", help="Build one in the user's cache, 5 minutes.")
    ] = False,
    slow_tokens: Annotated[
        int, typer.Option(help="To decode with llama-cpp where the model is over the limit.")
    ] = 4,
    time_limit: Annotated[
        float, typer.Option(help="Seconds of a run; what would end later is left out.")
    ] = 60.0,
    slow_time_limit: Annotated[
        float,
        typer.Option(
            help="The same for llama-cpp where the model is over the limit; twice in the first "
            "repeat."
        ),
    ] = 25.0,
    results: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write JSON lines here.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Measure only what the --json file lacks.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the --json file.")] = False,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the runs as CSV.")
    ] = None,
    loading: LoadOptions = take(
        LoadOptions,
        only=("kv_type", "precision", "policy", "predictor", "prefetch", "io", "readers"),
    ),
) -> None:
    """Measure a model: load, first token, tokens a second, memory, flash, energy.

    Every run is a process of its own, after the page cache was dropped (as root; else the model's
    pages) and memory was touched; a prompt starts with an empty expert cache. Engines and budgets
    take turns within each repeat; medians and ranges are shown, ratios are taken within a repeat.
    Says when the machine was too noisy. Ctrl-C keeps what was measured; --resume goes on.

    \b
    stoker bench smollm2
    stoker bench mixture.gguf --memory 500MB,1GB,resident --threads 1,2 --json results.jsonl
    stoker bench mixture.gguf --memory 1GB,resident --against llama-cpp --install-baseline
    stoker bench model.gguf --against llama-cpp,onnx=model.onnx --csv results.csv
    stoker bench mixture.gguf --memory 1GB --policy lru --prefetch off
    """
    from ...mobile_bench.run.case import options_of
    from ...mobile_bench.run.series import Series, parse_baselines
    from ..terminal.opening import find

    _check_targets(results, csv, resume=resume, force=force)
    path = find(model)
    python = _baseline_python(baseline_python, install=install_baseline)
    baselines: Sequence[Baseline] = tuple(parse_baselines(against, path, python))
    series = Series(
        path,
        memory=_listed("memory", memory, str),
        threads=_listed("threads", threads, int),
        baselines=tuple(baselines),
        repeats=repeats,
        prompts=_listed("prompts", prompts, int),
        tokens=tokens,
        context=context,
        options=options_of(
            kv_type=None if loading.kv_type == "f16" else loading.kv_type,
            precision=None if loading.precision == "balanced" else loading.precision,
            policy=loading.policy,
            predictor=loading.predictor,
            prefetch=None if loading.prefetch == "auto" else loading.prefetch,
            io=loading.io,
            readers=loading.readers,
        ),
        time_limit_s=time_limit,
        slow_tokens=slow_tokens,
        slow_time_limit_s=slow_time_limit,
    )
    runs: list[Run] = []
    try:
        _measure(series, runs, None if results is None else _File(results, force))
    finally:  # also after Ctrl-C
        if csv is not None and runs:
            from ...mobile_bench.run.run_table import as_csv

            csv.write_text(as_csv(runs), encoding="utf-8")
    if not any(run["error"] is None for run in runs):
        raise typer.Exit(1)


def _check_targets(results: Path | None, csv: Path | None, *, resume: bool, force: bool) -> None:
    for file in filter(None, (results, csv)):
        check_output(file)
    if resume and results is None:
        raise OptionError("--resume needs --json FILE, the file that is to be completed")
    if resume and force:
        raise OptionError("give --resume or --force, not both")
    if results is not None and results.exists() and not (resume or force):
        raise OptionError(f"{results} exists: go on with --resume, or replace it with --force")


def _listed(name: str, text: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    """Returns the values between the commas, each once."""
    try:
        values = tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
    except ValueError:
        raise OptionError(f"{name}: expected numbers with commas, found {text!r}") from None
    if not text.strip():
        raise OptionError(f"{name}: expected at least one value")
    return values


def _baseline_python(python: str, *, install: bool) -> str:
    if python and install:
        raise OptionError("give --baseline-python or --install-baseline, not both")
    if install:
        from ...mobile_bench.run.baseline import install_baseline

        try:
            return install_baseline()
        except subprocess.CalledProcessError as error:
            raise OptionError(f"the baseline was not built: {error}") from None
    return python


class _File:
    """The file that results are appended to."""

    def __init__(self, path: Path, replace: bool) -> None:
        self.path, self._replace = path, replace

    def open(self, device: DeviceProfile) -> list[Run]:
        """Returns the runs in the file. Raises OptionError if another device measured them."""
        from ...mobile_bench.run import records

        if self._replace or not self.path.exists():
            self.path.unlink(missing_ok=True)
            self.write([device])
            return []
        before = records.read(self.path)
        other = [p["name"] for p in before["profiles"] if p["id"] != device["id"]]
        if other:
            found = f"expected results of {device['name']}, found {other[0]}"
            raise OptionError(f"{self.path}: {found}")
        records.mend(self.path)
        if not before["profiles"]:
            self.write([device])
        return before["runs"]

    def write(self, lines: Iterable[object]) -> None:
        """Appends lines to the file."""
        from ...mobile_bench.run import records

        records.write(self.path, lines)


def _measure(series: Series, runs: list[Run], file: _File | None) -> None:
    """Measures the missing runs, adds them to `runs` and shows all, also after Ctrl-C."""
    from ...mobile_bench.probe.this_device import this_device
    from ...mobile_bench.run.measure import groups_allowed, measure
    from ...mobile_bench.run.roofline import rooflines
    from ...mobile_bench.run.run_table import as_text
    from ...mobile_bench.run.series import cases, missing
    from ..terminal.terminal import stage_progress

    every = cases(series)
    with stage_progress() as progress:
        device = this_device(progress)
    if file is not None:
        # The file may hold other series as well.
        keys = {case.key for case in every}
        runs += [r for r in file.open(device) if r.get("case") in keys]
    wanted, added = missing(every, runs), 0
    run = runs[0]["run"] if runs else time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    if any(case.memory is not None for case in wanted) and not groups_allowed():
        print("no memory cgroup is allowed here: budgets, but no limits", file=sys.stderr)
    start = time.monotonic()
    # SIGTERM acts as Ctrl-C, so that it leaves no workers and no groups behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        made = measure(
            wanted,
            run=run,
            command=shlex.join(["stoker", *sys.argv[1:]]),
            device=device["id"],
            started=lambda case: _say(case, f"{added + 1}/{len(wanted)}"),
        )
        for found in made:
            runs.append(found)
            added += 1
            if file is not None:
                file.write([found])
            _told(found)
        limits = rooflines(runs)
        if file is not None and added:
            file.write(limits)
        print(f"took {time.monotonic() - start:.0f} s", file=sys.stderr)
    except KeyboardInterrupt:
        kept = "no file has them" if file is None else f"{file.path} has them, --resume goes on"
        print(f"\ninterrupted after {added} of {len(wanted)} runs: {kept}", file=sys.stderr)
        if runs:
            typer.echo(as_text(runs, rooflines(runs)))
        raise
    typer.echo(f"{series.model.name} on {device['name']}, {series.repeats} repeats\n")
    typer.echo(as_text(runs, limits))


def _say(case: Case, count: str) -> None:
    where = "resident" if case.memory is None else f"{case.memory / 1e6:.0f} MB"
    text = f"{count} repeat {case.repeat + 1}: {case.engine}, {where}, {case.threads} threads: "
    print(text, end="", file=sys.stderr, flush=True)


def _told(run: Run) -> None:
    if run["error"] is not None or run["decode"] is None:
        print(f"error: {run['error']}", file=sys.stderr, flush=True)
        return
    noise = ", NOISY" if run["noise"]["noisy"] else ""
    print(f"{run['decode']['tok_s']:.2f} tok/s{noise}", file=sys.stderr, flush=True)
