"""Results of measurements: JSON lines, the device's profile first.

A file of results has one object a line, told apart by "kind": "profile" (device_profile.py), then
"run" (one repeat of one engine in one configuration) and "roofline". A sweep writes a "job" for
each of its jobs, with runs, "perplexity" and "width" inside. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypedDict

from ...offload.plan.device_profile import DeviceProfile
from ...runtime.base.arguments import shown
from ...runtime.base.errors import OptionError
from ...runtime.files.json_text import parse
from ...runtime.files.whole_file import read_whole_text

VERSION = 1


class Prompt(TypedDict):
    """A prompt evaluated at an empty KV cache, and the token chosen after it."""

    tokens: int
    ttft_s: float
    tok_s: float


class Decode(TypedDict):
    """Greedy tokens after a prompt of 64 tokens. The last five are None without a budget."""

    tokens: int
    seconds: float
    tok_s: float
    token_ms: dict[str, float]  # "p50", "p95", "p99"
    token_s: list[float]
    bytes_token: float | None  # read from flash
    hit_rate: float | None
    layer_hits: list[float] | None  # [n_layer], hit rate; 0 in layers without experts
    stall_s: float | None  # seconds per token spent waiting for flash
    compute_s: float | None  # the rest of a token's time


class Flash(TypedDict):
    """Flash reads of a mixture under a budget, per decoded token."""

    bytes_s: float  # bandwidth of reading this model's experts at random
    belady_misses: float  # misses of an optimal cache with as many slots on this run's routing
    belady_bytes: float


class _Optional(TypedDict, total=False):
    """Fields that older results lack."""

    case: str  # Case.key: the same for all repeats of a configuration
    token_ids: list[int]  # generated: the one after the prompt, then those of `decode`
    flash: Flash | None
    notes: list[str]  # what was left out and why, for people


class Run(_Optional):
    """One repeat of one engine in one configuration, in a process of its own."""

    kind: Literal["run"]
    version: int
    run: str  # the same for all lines of one command
    time: str  # ISO 8601, UTC
    command: str
    device: str  # DeviceProfile.id
    model: dict[str, Any]  # name, nbytes, architecture, type, n_layer, n_expert, n_expert_used
    engine: str  # "stoker", "llama-cpp", "onnx"
    engine_version: str
    repeat: int
    threads: int
    context: int
    memory: int | None  # the budget (95% of the limit); None: everything in memory
    limit: int | None  # limit of the process's own cgroup; None: there was none
    options: dict[str, Any]  # other options that differ from the defaults
    plan: dict[str, Any] | None  # Engine.plan
    load_cold_s: float | None  # the engine's load in a started process, page cache dropped before
    load_warm_s: float | None  # the load again in a new process, page cache as the run left it
    prompts: list[Prompt]
    decode: Decode | None
    peak_bytes: int  # resident size of the process
    group_peak_bytes: int | None  # of the cgroup, page cache included
    energy: dict[str, Any] | None  # source, joules, joules_token
    noise: dict[str, Any]  # what else the machine did, as noise.py's NoiseWatch.finish says
    tokens_sha256: str | None  # of the generated ids; equal if engines and budgets agree
    error: str | None  # why the run died; all measured fields are then empty


class Roofline(TypedDict):
    """The least time a token can take in a configuration."""

    kind: Literal["roofline"]
    run: str
    device: str
    model: str
    memory: int | None
    threads: int
    compute_s: float  # measured, everything in memory
    bytes_s: float  # flash bandwidth on this model's experts
    read_bytes: float  # per token, by an optimal cache (Belady)
    limit_s: float  # the larger of computation and reading


class Perplexity(TypedDict):
    """Perplexity of a model on one text, as runtime/perplexity.py counts it."""

    kind: Literal["perplexity"]
    device: str
    model: dict[str, Any]  # name, nbytes, architecture
    text: str  # sha256
    context: int
    stride: int | None
    ppl: float
    nll: float
    tokens: int
    standard_error: float  # ppl's


class Width(TypedDict):
    """Result of a search of expert widths (export/bitwidth.py)."""

    kind: Literal["width"]
    device: str
    model: dict[str, Any]  # name, nbytes, architecture
    text: str  # sha256
    bits: float  # requested, per expert weight
    source: dict[str, Any]  # a Point: uniform, nbytes, bits, kl, ppl
    made: dict[str, Any]
    points: list[dict[str, Any]]  # by size
    types: list[dict[str, Any]]  # part, type, matrices
    path: str | None  # the file that was made, if it is kept


class JobResult(TypedDict):
    """One job of a sweep. If several lines have the same key, the last one holds."""

    kind: Literal["job"]
    version: int
    key: str  # hash of what decides the result, 16 hex digits
    run: str
    time: str  # ISO 8601, UTC
    job: dict[str, Any]  # jobs.Job (of a sweep)
    node: str  # the host that did it
    attempts: int  # more than 1 if a worker died
    seconds: float
    error: str | None
    results: list[Run | Perplexity | Width]


class Results(TypedDict):
    """Contents of a file of results. Results inside jobs are in the other lists as well."""

    profiles: list[DeviceProfile]
    runs: list[Run]
    rooflines: list[Roofline]
    jobs: list[JobResult]
    perplexities: list[Perplexity]
    widths: list[Width]


def write(path: Path, lines: Iterable[Any]) -> None:
    """Appends lines to a file of results, one object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        for line in lines:
            out.write(json.dumps(line) + "\n")


def mend(path: Path) -> None:
    """Prepares a file for appending: removes a cut-off last line, ends one that lacks its newline.

    Raises OptionError if the last line is not part of a result.
    """
    with path.open("r+b") as file:
        data = file.read()
        if not data or data.endswith(b"\n"):
            return
        begin = data.rfind(b"\n") + 1
        line, beginning = data[begin:], b'{"kind": '
        if line[: len(beginning)] != beginning[: len(line)]:
            raise OptionError(f"{path}: expected a file of results")
        try:
            parse(line)
        except ValueError:
            file.truncate(begin)
        else:
            file.write(b"\n")


def read(path: Path) -> Results:
    """Reads a file of results. Raises OptionError naming the first line that is not one.

    A cut-off last line (a measurement that was killed) is left out.
    """
    results: Results = {
        "profiles": [],
        "runs": [],
        "rooflines": [],
        "jobs": [],
        "perplexities": [],
        "widths": [],
    }
    jobs: dict[str, JobResult] = {}
    try:
        text = read_whole_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parse(line)
            kind = value["kind"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise OptionError(f"{path}:{number}: expected a result as a JSON object") from None
        if kind == "profile":
            results["profiles"].append(value)
        elif kind == "run":
            if value.get("version") != VERSION:
                found = value.get("version")
                raise OptionError(
                    f"{path}:{number}: expected version {VERSION}, found {shown(found)}"
                )
            results["runs"].append(value)
        elif kind == "roofline":
            results["rooflines"].append(value)
        elif kind == "job":
            _check_job(value, f"{path}:{number}")
            jobs.pop(value["key"], None)
            jobs[value["key"]] = value
        else:
            raise OptionError(f"{path}:{number}: unknown kind of result {shown(kind)}")
    results["jobs"] = list(jobs.values())
    for result in (r for job in results["jobs"] for r in job["results"]):
        if result["kind"] == "run":
            results["runs"].append(result)
        elif result["kind"] == "perplexity":
            results["perplexities"].append(result)
        else:
            results["widths"].append(result)
    return results


def _check_job(value: Any, where: str) -> None:
    if value.get("version") != VERSION:
        raise OptionError(f"{where}: expected version {VERSION}, found {value.get('version')}")
    missing = sorted(JobResult.__required_keys__ - value.keys())
    if missing:
        raise OptionError(f"{where}: the job lacks {', '.join(missing)}")
    if not isinstance(value["key"], str) or not isinstance(value["results"], list):
        raise OptionError(f"{where}: expected a job's key and its list of results")
    kinds = [r.get("kind") if isinstance(r, dict) else r for r in value["results"]]
    unknown = [kind for kind in kinds if kind not in ("run", "perplexity", "width")]
    if unknown:
        raise OptionError(f"{where}: unknown kind of result {shown(unknown[0])}")
