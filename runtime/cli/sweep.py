"""`stoker sweep`: runs many measurements and width searches, here or on a Ray cluster."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import OptionError
from ..files.output_file import check_output
from ..terminal.options import Json

if TYPE_CHECKING:
    from ...mobile_bench.run.records import JobResult
    from ...mobile_bench.sweep.jobs import Job
    from ...mobile_bench.sweep.spec import Spec
    from ...mobile_bench.sweep.sweep import Planned, Summary


def sweep(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="What to run.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File of results [default: SPEC.jsonl beside the spec]."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Run on a Ray cluster: HOST:PORT, ray://HOST:PORT, auto (the one that this "
            "machine belongs to), local or local:CPUS (one of this machine alone).",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Which device this machine is: runs its jobs and those of no device."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run jobs again that have failed before.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the jobs.")] = False,
    as_json: Json = False,
) -> None:
    """Run many measurements, perplexities and width searches.

    SPEC.yaml names models, types that they are quantized to first, budgets, threads and repeats;
    every combination is a job. Results are JSON lines, written as they come: `stoker report` reads
    them. What is in the file is not run again, so the same command goes on after Ctrl-C, a crash,
    or a change of the spec. A job that fails is a result with an error; the others go on.

    On a cluster stoker is installed on every node, and models are paths that exist there or names
    of the catalogue. A machine measures one job at a time. Jobs of a group with `device: laptop`
    run on nodes with the label device=laptop or the resource device:laptop.

    \b
    stoker sweep sweep.yaml --dry-run
    stoker sweep sweep.yaml --out results.jsonl
    stoker sweep sweep.yaml --out results.jsonl --retry-failed
    ray start --head --num-cpus 0                                 # on one machine
    ray start --address HOST:6379 --labels device=laptop          # on those that measure
    stoker sweep sweep.yaml --ray auto                            # on any of them
    """
    from ...mobile_bench.sweep import spec as sweep_spec
    from ...mobile_bench.sweep.sweep import InProcess, plan
    from ...mobile_bench.sweep.sweep import sweep as run

    wanted = sweep_spec.load(spec)
    path = out or spec.with_suffix(".jsonl")
    check_output(path, [spec])
    if ray is None:
        wanted, left_out = sweep_spec.for_device(wanted, device)
        if left_out:
            print(f"{left_out} jobs are of other devices: left out", file=sys.stderr)
    elif device is not None:
        raise OptionError("give --ray or --device, not both: nodes say which device they are")
    if dry_run:
        planned = plan(wanted, path)
        typer.echo(_plan_json(planned) if as_json else _plan_table(planned, retry_failed))
        return
    runner: Any = InProcess(retries=wanted.retries, timeout=wanted.timeout)
    lines = _Lines()
    if ray is not None:
        from ...mobile_bench.sweep.ray import OnRay

        runner = OnRay(ray, retries=wanted.retries, timeout=wanted.timeout, say=lines.say)
    command = shlex.join(["stoker", *sys.argv[1:]])
    try:
        summary = run(
            wanted, path, runner, retry_failed=retry_failed, command=command, watcher=lines
        )
    except KeyboardInterrupt:
        lines.say(f"interrupted: {path} has what is done; the same command goes on from here")
        raise
    finally:
        lines.close()
    typer.echo(_summary_json(summary) if as_json else _summary_text(summary, wanted))
    if summary.failures:
        raise typer.Exit(1)


class _Lines:
    """Progress on stderr: a line for each finished job and, in a terminal, the running jobs."""

    def __init__(self) -> None:
        self._running: list[str] = []
        self._live = sys.stderr.isatty()

    def started(self, job: Job, where: str) -> None:
        """Notes that a job has begun."""
        self._running.append(job.label())
        self._show()

    def finished(self, job: Job, result: JobResult, done: int, of: int) -> None:
        """Prints the line of a job that has ended."""
        if job.label() in self._running:
            self._running.remove(job.label())
        what = f"error: {result['error']}" if result["error"] else headline(result)
        width = len(str(of))
        self.say(f"[{done:{width}}/{of}] {job.label()}: {what} ({result['seconds']:.1f} s)")

    def say(self, text: str) -> None:
        """Prints a line above the running jobs."""
        from ..base.display import printable

        print(("\r\x1b[K" if self._live else "") + printable(text), file=sys.stderr, flush=True)
        self._show()

    def close(self) -> None:
        """Clears the line of running jobs."""
        self._running = []
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _show(self) -> None:
        import shutil

        if not self._live or not self._running:
            return
        text = "running: " + ", ".join(dict.fromkeys(self._running))
        text = text[: shutil.get_terminal_size().columns - 1]
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def headline(result: JobResult) -> str:
    """Returns a result's most important figure for display."""
    from ..base.display import size

    for found in result["results"]:
        if found["kind"] == "perplexity":
            return f"perplexity {found['ppl']:.4f}"
        if found["kind"] == "width":
            made, source = found["made"], found["source"]
            return (
                f"{size(made['nbytes'])}, {made['bits']:.3f} bits, KL {made['kl']:.5f}, "
                f"perplexity {made['ppl']:.4f} (source {source['ppl']:.4f})"
            )
        decode, prompts = found["decode"], found["prompts"]
        words = [] if decode is None else [f"{decode['tok_s']:.1f} tok/s"]
        if prompts:
            longest = max(prompts, key=lambda p: p["tokens"])
            words.append(f"TTFT {longest['ttft_s'] * 1e3:.0f} ms of {longest['tokens']} tokens")
        return ", ".join(words) or "nothing was measured"
    return "no result"


def _plan_table(planned: Sequence[Planned], retry_failed: bool) -> str:
    """Returns the jobs, one a line, with their states."""
    rows = []
    for p in planned:
        state = "to do"
        if p.known is not None:
            state = "done" if p.known["error"] is None else "failed"
            if state == "failed" and retry_failed:
                state = "again"
        rows.append(f"{p.key}  {state:6}  {p.job.label()}")
    n = sum(p.pending(retry_failed=retry_failed) for p in planned)
    return "\n".join([*rows, f"{len(planned)} jobs, {n} to do"])


def _plan_json(planned: Sequence[Planned]) -> str:
    from dataclasses import asdict

    return json.dumps(
        [
            {
                "key": p.key,
                "job": asdict(p.job),
                "model_sha256": p.digest,
                "done": p.known is not None and p.known["error"] is None,
                "error": None if p.known is None else p.known["error"],
            }
            for p in planned
        ],
        indent=2,
    )


def _summary_json(summary: Summary) -> str:
    return json.dumps(
        {
            "results": str(summary.out),
            "jobs": summary.jobs,
            "done": summary.done,
            "reused": summary.reused,
            "failed": [
                {"key": r["key"], "job": r["job"], "node": r["node"], "error": r["error"]}
                for r in summary.failures
            ],
        },
        indent=2,
    )


def _summary_text(summary: Summary, spec: Spec) -> str:
    from ...mobile_bench.sweep.jobs import Job

    lines = [
        f"{summary.out}: {summary.jobs} jobs, {summary.done} run now, {summary.reused} were there, "
        f"{len(summary.failures)} failed"
    ]
    for result in summary.failures:
        lines.append(f"failed: {Job(**result['job']).label()}: {result['error']}")
    if summary.failures:
        lines.append(f"stoker sweep {spec.path} --retry-failed runs these again")
    return "\n".join(lines)
