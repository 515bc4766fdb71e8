"""How far off forecasts are, on this machine: measures, forecasts, compares.

    python -m stoker.mobile_bench.checks.forecast_check MODELS... [--memory 500MB,1GB,...]
        [--repeats 3] [--json FILE]

Every case (a model in a budget) is measured in a process of its own, in a memory cgroup if that is
allowed (`measure.run_case`): load with cold caches, greedy tokens, a prompt with an empty expert
cache. Memory is touched beforehand (preparation.py): how long a virtual machine takes to get fresh
memory from its host varies tenfold from minute to minute and does not depend on the model. Repeats
are interleaved: all cases once, then all again. Before each repeat the device is profiled anew, so
that a machine whose speed drifts is compared with itself; the profile of the comparison is the
median of them, the measured value the median of the repeats that nothing disturbed (noise.py: the
host took CPU time, other processes ran), or of all repeats if every one was disturbed. Budgets that
are too small or too large for a model are replaced by ones that make a difference, so that each
model has as many as were asked for.

Prints one line per case, and the median and the worst error of decode tok/s and of the time to the
first token (load and prompt), each as a share of what was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...offload.plan.device_profile import DeviceProfile
from ...offload.plan.forecast import (
    Device,
    Forecast,
    ModelHeader,
    Workload,
    engine_constants,
    forecast,
)
from ..run.case import BUDGET_SHARE, DECODE_PROMPT, Case
from ..run.measure import groups_allowed, run_case
from ..run.preparation import drop_page_cache, read_directly

PROMPT = 2 * DECODE_PROMPT  # tokens; evaluated after decoding, so its memory has been touched
PROCESS_BYTES = 32 << 20  # the worker before it loads the engine: interpreter, numpy, core


@dataclass
class Checked:
    """One model in one budget (None: everything in memory)."""

    model: Path
    memory: int | None
    runs: list[dict[str, Any]] = field(default_factory=list)
    expected: Forecast | None = None

    @property
    def quiet(self) -> list[dict[str, Any]]:
        """The runs that nothing disturbed (noise.py), or all if every one was disturbed."""
        undisturbed = [r for r in self.runs if not r.get("noise", {}).get("noisy")]
        return [r for r in undisturbed if r["decode"]] or self.runs

    @property
    def decode(self) -> float | None:
        """Median of the measured tokens per second."""
        found = [r["decode"]["tok_s"] for r in self.quiet if r["decode"]]
        return statistics.median(found) if found else None

    @property
    def ttft(self) -> float | None:
        """Median of the measured seconds of a cold load and the prompt after it."""
        found = [
            r["load_cold_s"] + p["ttft_s"]
            for r in self.quiet
            for p in r["prompts"]
            if p["tokens"] == PROMPT
        ]
        return statistics.median(found) if found else None


def error_of(expected: float, measured: float) -> float:
    """Relative error of a forecast: 0.2 if it is a fifth too high or too low."""
    return abs(expected - measured) / measured


def budgets(path: Path, wanted: Sequence[int], context: int, threads: int) -> list[int]:
    """As many budgets as `wanted`: those that make a difference, then others between the bounds."""
    from ...runtime._core import GgufFile

    subject = ModelHeader(
        GgufFile(str(path)), path.name, context=context, process_bytes=PROCESS_BYTES
    )
    plan = subject.plan(0, threads)[1]
    # A margin in case the worker is larger than is assumed here.
    least = int(plan["least_memory"] * 1.1) + (8 << 20)
    whole = least + int(plan["weight_bytes"])
    found = [w for w in wanted if least <= w * BUDGET_SHARE < whole]
    spare = len(wanted) - len(found)
    for i in range(spare):
        budget = least + (i + 0.5) / spare * 0.95 * (whole - least)
        found.append(-int(-budget // BUDGET_SHARE))
    return sorted(found)


def profile_now(folder: Path) -> DeviceProfile:
    """A quick probe that measures storage at the sizes that experts have."""
    from ..probe import storage as probe_storage
    from ..probe.probe import probe

    profile = probe(folder, quick=True)
    effort = replace(
        probe_storage.QUICK,
        blocks=(4 << 10, 64 << 10, 256 << 10, 512 << 10, 1 << 20, 4 << 20),
        depths=(1, engine_constants()["readers"]),
        rounds=2,
        slice_s=0.12,
        total_s=12,
    )
    profile["storage"], profile["storage_reads"] = probe_storage.measure(folder, effort)
    return profile


def median_profile(profiles: Sequence[DeviceProfile]) -> DeviceProfile:
    """The first profile, with the median of each speed."""
    made: Any = json.loads(json.dumps(profiles[0]))
    keys = {
        "memory_reads": ("bytes_s",),
        "peaks": ("ops_s",),
        "formats": ("row_weights_s", "tile_ops_s"),
        "storage_reads": ("bytes_s",),
    }
    for part, names in keys.items():
        for i, row in enumerate(made[part]):
            for name in names:
                values = [p[part][i][name] for p in profiles if i < len(p[part])]  # type: ignore[literal-required]
                row[name] = statistics.median(values)
    return made  # type: ignore[no-any-return]


def expect(checked: Checked, device: Device, context: int, tokens: int) -> Forecast:
    """The forecast of one case."""
    from ...runtime._core import GgufFile

    memory = checked.memory
    if memory is not None and groups_allowed():
        memory = int(memory * BUDGET_SHARE)
    subject = ModelHeader(
        GgufFile(str(checked.model)),
        checked.model.stem,
        context=context,
        process_bytes=PROCESS_BYTES,
    )
    decode = forecast(subject, device, memory, Workload(DECODE_PROMPT, tokens))
    prompt = forecast(subject, device, memory, Workload(PROMPT, 1, first=False))
    return replace(
        decode,
        prompt_tokens=PROMPT,
        prompt_s=prompt.prompt_s,
        ttft_s=prompt.ttft_s,
        prompt_times=prompt.prompt_times,
        ttft_limited_by=prompt.ttft_limited_by,
    )


def table(cases: Sequence[Checked]) -> str:
    """A tab-separated table: one line per case, then the errors."""
    head = ("model", "limit", "decode tok/s", "forecast", "error", "TTFT s", "forecast", "error")
    lines = ["\t".join([*head, "limited by", "MB a token", "forecast"])]
    errors: dict[str, list[float]] = {"decode": [], "TTFT": []}
    for c in cases:
        limit = "none" if c.memory is None else f"{c.memory / 1e6:.0f} MB"
        f, decode, ttft = c.expected, c.decode, c.ttft
        if f is None or decode is None or ttft is None:
            why = next((r["error"] for r in c.runs if r["error"]), "not measured")
            lines.append(f"{c.model.stem}\t{limit}\t{why}")
            continue
        off = (error_of(f.tokens_per_s, decode), error_of(f.ttft_s, ttft))
        errors["decode"].append(off[0])
        errors["TTFT"].append(off[1])
        read = [r["decode"]["bytes_token"] or 0.0 for r in c.runs if r["decode"]]
        lines.append(
            f"{c.model.stem}\t{limit}\t{decode:.1f}\t{f.tokens_per_s:.1f}\t{off[0]:.0%}\t"
            f"{ttft:.3f}\t{f.ttft_s:.3f}\t{off[1]:.0%}\t{f.limited_by}\t"
            f"{statistics.median(read) / 1e6:.1f}\t{f.bytes_token / 1e6:.1f}"
        )
    lines += _flash_line(cases)
    lines += [
        f"{what}: error median {statistics.median(values):.1%}, worst {max(values):.1%}, "
        f"{len(values)} cases"
        for what, values in errors.items()
        if values
    ]
    return "\n".join(lines)


def _flash_line(cases: Sequence[Checked]) -> list[str]:
    """The measured bandwidth of expert reads beside the one that the forecasts assumed."""
    pairs = [
        (r["flash"]["bytes_s"] / 1e6, c.expected.bytes_token / c.expected.times["flash"] / 1e6)
        for c in cases
        for r in c.runs
        if r.get("flash") and c.expected is not None and c.expected.bytes_token > 0
    ]
    if not pairs:
        return []
    found, taken = (statistics.median(column) for column in zip(*pairs, strict=True))
    return [f"reading experts: {found:.0f} MB/s measured in the runs, {taken:.0f} MB/s forecast"]


def record(cases: Sequence[Checked], profiles: Sequence[DeviceProfile]) -> dict[str, Any]:
    """The check as a JSON object: profiles, runs without their long lists, forecasts."""
    rows = []
    for c in cases:
        runs = []
        for r in c.runs:
            decode = r["decode"] and {
                k: v for k, v in r["decode"].items() if k not in ("token_s", "layer_hits")
            }
            runs.append({k: v for k, v in r.items() if k != "token_ids"} | {"decode": decode})
        rows.append(
            {
                "model": c.model.name,
                "limit": c.memory,
                "decode_tok_s": c.decode,
                "ttft_s": c.ttft,
                "forecast": None if c.expected is None else c.expected.as_dict(),
                "runs": runs,
            }
        )
    return {"prompt_tokens": PROMPT, "profiles": list(profiles), "cases": rows}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--memory", default="350MB,500MB,1GB,1500MB,2GB", help="limits, bytes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="decoded")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--again", type=Path, help="measure nothing: forecast the cases of a file")
    options = parser.parse_args()

    from ...runtime.base.memory import byte_count

    context = max(PROMPT, DECODE_PROMPT + options.tokens) + 1
    if options.again is not None:
        cases, profiles = _read(options.again, options.models)
    else:
        wanted = [byte_count(text) for text in options.memory.split(",")]
        cases = [
            Checked(path, memory)
            for path in options.models
            for memory in budgets(path, wanted, context, options.threads)
        ]
        profiles = _measure(cases, options, context)
    device = Device(median_profile(profiles), options.threads)
    for c in cases:
        c.expected = expect(c, device, context, options.tokens)
    print(table(cases))
    if options.json:
        text = json.dumps(record(cases, profiles), indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


def _measure(
    cases: Sequence[Checked], options: argparse.Namespace, context: int
) -> list[DeviceProfile]:
    """Fills in the cases' runs; returns one profile per repeat."""
    begin = time.monotonic()
    for path in options.models:
        read_directly(path)
    profiles = []
    for repeat in range(options.repeats):
        drop_page_cache(options.models)
        profiles.append(profile_now(options.models[0].absolute().parent))
        for c in cases:
            case = Case(
                str(c.model),
                memory=c.memory,
                threads=options.threads,
                context=context,
                prompts=(PROMPT,),
                tokens=options.tokens,
                repeat=repeat,
            )
            run: Any = run_case(case, device=profiles[0]["id"], command=" ".join(sys.argv))
            c.runs.append(run)
            speed = run["error"] or f"{run['decode']['tok_s']:.1f} tok/s"
            limit = "all" if c.memory is None else f"{c.memory / 1e6:.0f} MB"
            passed = time.monotonic() - begin
            print(f"{passed:.0f} s: {c.model.stem} {limit}: {speed}", file=sys.stderr, flush=True)
    return profiles


def _read(path: Path, models: Sequence[Path]) -> tuple[list[Checked], list[DeviceProfile]]:
    """Cases and profiles that an earlier check recorded for these models."""
    document = json.loads(path.read_text(encoding="utf-8"))
    named = {m.name: m for m in models}
    cases = [
        Checked(named[row["model"]], row["limit"], row["runs"])
        for row in document["cases"]
        if row["model"] in named
    ]
    return cases, document["profiles"]


if __name__ == "__main__":
    main()
