"""Whether `stoker run --memory` keeps its promise: runs in memory cgroups of that size.

    python -m stoker.mobile_bench.checks.budget MODEL [--limits 500MB,700MB,1GB,2GB] [--runs 20]

Linux, as root. Each run is one `stoker run` in a memory cgroup of its own with the stated limit and
without swap, with --memory at the limit less 5%, the page cache cold. Contexts go up to 4,096 and
prompts up to 2,000 tokens; the first two runs are the extremes, the others are drawn (the same for
every limit). A violation is: an exit code other than 0, a process killed for memory, a page
swapped out, a peak above the limit, fewer tokens than asked for, or a text that differs from the
one that the same prompt gave under another limit.

The peak is the kernel's (version 1: memory.max_usage_in_bytes) and includes page cache that the
process was charged for: the file's header and the interpreter's libraries are read through it,
experts are not. If a peak comes close to its limit, look at "anonymous": page cache is dropped
before anything is killed, anonymous memory cannot be. One JSON line a run on stdout, the table on
stderr.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stoker.mobile_bench.run.cgroup_run import MemoryGroup, memory_group
from stoker.runtime.base.side_thread import start

PROMPT = Path(__file__).parents[2] / "models" / "prompt.txt"
SHARE = 0.95  # --memory as a share of the limit
CONTEXTS = (256, 512, 1024, 2048, 4096)
MOST_PROMPT = 2000
SAMPLE_S = 0.02
COMMAND = "from stoker.runtime.cli.main import main; main()"


@dataclass(frozen=True)
class Case:
    """Sizes of one run, in tokens."""

    context: int
    prompt: int
    new: int


@dataclass
class Run:
    """Result of one run; bytes and seconds. peak: the cgroup's, page cache included.

    anonymous, cache: the largest seen of each while it ran (sampled). reclaims: how often the
    group was at its limit (page cache was dropped then). sha: the text's.
    """

    limit: int
    memory: int
    case: Case
    exit_code: int = 0
    seconds: float = 0.0
    peak: int = 0
    anonymous: int = 0
    cache: int = 0
    reclaims: int = 0
    kills: int = 0
    swapped: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    decode_tok_s: float = 0.0
    text: str = ""
    error: str = ""
    violations: list[str] = field(default_factory=list)


class Sampler(threading.Thread):
    """Largest anonymous memory, page cache and swap of a group while it runs."""

    def __init__(self, group: MemoryGroup) -> None:
        super().__init__(daemon=True)
        self.group = group
        self.anonymous = self.cache = self.swapped = 0
        self._done = threading.Event()

    def run(self) -> None:
        """Samples until stop()."""
        names = ("anon", "file") if self.group.unified else ("total_rss", "total_cache")
        while not self._done.wait(SAMPLE_S):
            with suppress(OSError, ValueError):
                text = (self.group.folder / "memory.stat").read_text()
                counts = dict(line.split() for line in text.splitlines())
                self.anonymous = max(self.anonymous, int(counts[names[0]]))
                self.cache = max(self.cache, int(counts[names[1]]))
                # memory.memsw less memory.usage would not do: the two are not read at one moment.
                self.swapped = max(self.swapped, int(counts.get("total_swap", 0)))
            if self.group.unified:
                self.swapped = max(self.swapped, self.group.swapped())

    def stop(self) -> None:
        """Ends the thread."""
        self._done.set()
        self.join()


def reclaims(group: MemoryGroup) -> int:
    """How often an allocation found the group at its limit."""
    with suppress(OSError, ValueError, KeyError):
        if not group.unified:
            # If the limits with and without swap are equal, either may be met first.
            files = (group.folder / name for name in ("memory.failcnt", "memory.memsw.failcnt"))
            return max(int(file.read_text()) for file in files if file.is_file())
        text = (group.folder / "memory.events").read_text()
        return int(dict(line.split() for line in text.splitlines())["max"])
    return 0


def cases(runs: int, new: int, seed: int) -> list[Case]:
    """The two extreme cases, then drawn ones: prompts of 1 token up to what the context holds."""
    draw = random.Random(seed)
    chosen = [Case(4096, MOST_PROMPT, new), Case(4096, 8, new)]
    while len(chosen) < runs:
        context = draw.choice(CONTEXTS)
        chosen.append(Case(context, draw.randint(1, min(MOST_PROMPT, context - new - 1)), new))
    return chosen[:runs]


def prompts(model: Path, counts: set[int]) -> dict[int, str]:
    """Texts of about so many tokens: the start of a text that repeats, cut by the tokenizer."""
    from stoker.runtime._core import GgufFile
    from stoker.runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_metadata(GgufFile(str(model)).get)
    text = PROMPT.read_text(encoding="utf-8")
    ids = tokenizer.encode(text * 6, add_special=False, parse_special=False)
    if len(ids) < max(counts):
        raise SystemExit(f"budget: {PROMPT} has too few tokens")
    return {n: tokenizer.decode(ids[:n]) for n in counts}


def run(model: Path, limit: int, case: Case, text: str, extra: list[str]) -> Run:
    """One `stoker run` in a group of `limit` bytes."""
    result = Run(limit, int(limit * SHARE), case)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        command = [sys.executable, "-c", COMMAND, "run", str(model), "--file", file.name, "--raw"]
        command += ["--memory", str(result.memory), "--context", str(case.context)]
        command += ["--max-tokens", str(case.new), "--ignore-eos", "--temperature", "0", "--json"]
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        with memory_group(limit) as group:
            sampler = Sampler(group)
            start(sampler, "samples memory")
            began = time.perf_counter()
            process = group.popen(
                [*command, *extra], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            out, err = process.communicate()
            result.seconds = time.perf_counter() - began
            sampler.stop()
            result.exit_code = process.returncode
            result.peak, result.kills = group.peak(), group.kills()
            result.reclaims = reclaims(group)
            result.swapped = sampler.swapped
            result.anonymous, result.cache = sampler.anonymous, sampler.cache
    if result.exit_code == 0:
        summary = json.loads(out.splitlines()[-1])
        stats: dict[str, Any] = summary["stats"]
        result.text = summary["text"]
        result.prompt_tokens = stats["prompt_tokens"]
        result.new_tokens = sum("token" in json.loads(line) for line in out.splitlines())
        result.decode_tok_s = stats["decode_tok_s"]
    else:
        result.error = (err.strip().splitlines() or ["no message"])[-1]
    judge(result)
    return result


def judge(r: Run) -> None:
    """Notes what a run did that it must not."""
    for found, what in (
        (r.exit_code != 0, f"exit code {r.exit_code}: {r.error}"),
        (r.kills > 0, f"{r.kills} killed for memory"),
        (r.swapped > 0, f"{r.swapped} bytes in swap"),
        (r.peak > r.limit, f"peak {r.peak} above the limit"),
        (r.exit_code == 0 and r.new_tokens != r.case.new, f"{r.new_tokens} tokens"),
    ):
        if found:
            r.violations.append(what)


def table(results: list[Run]) -> str:
    """One line a limit: the worst of its runs."""
    lines = [
        f"{'limit':>9} {'runs':>5} {'bad':>4} {'peak':>9} {'of limit':>9} {'anonymous':>10} "
        f"{'of memory':>9} {'cache':>8} {'reclaims':>9} {'tok/s':>12}"
    ]
    for limit in dict.fromkeys(r.limit for r in results):
        runs = [r for r in results if r.limit == limit]
        peak = max(r.peak for r in runs)
        anonymous = max(r.anonymous for r in runs)
        speeds = [r.decode_tok_s for r in runs if r.exit_code == 0] or [0.0]
        lines.append(
            f"{limit / 1e6:6.0f} MB {len(runs):5} {sum(bool(r.violations) for r in runs):4} "
            f"{peak / 1e6:6.0f} MB {peak / limit:9.1%} {anonymous / 1e6:7.0f} MB "
            f"{anonymous / runs[0].memory:9.1%} {max(r.cache for r in runs) / 1e6:5.0f} MB "
            f"{max(r.reclaims for r in runs):9} {min(speeds):5.1f}..{max(speeds):.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the cases under every limit; exit code 1 if one breaks the promise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a GGUF file or a model of the catalogue")
    parser.add_argument("--limits", default="500MB,700MB,1GB,2GB", help="with commas")
    parser.add_argument("--runs", type=int, default=20, help="under each limit")
    parser.add_argument("--tokens", type=int, default=24, help="that each run generates")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn cases")
    parser.add_argument("--options", default="", help="more options of `stoker run`, with spaces")
    options = parser.parse_args()

    from stoker.models.locate import locate
    from stoker.runtime.base.memory import byte_count

    model = locate(options.model, download=False)
    limits = [byte_count(limit) for limit in options.limits.split(",")]
    chosen = cases(options.runs, options.tokens, options.seed)
    texts = prompts(model, {case.prompt for case in chosen})
    results: list[Run] = []
    said: dict[Case, str] = {}
    # The limits take turns, so that a drift of the machine spreads over all of them.
    for i, case in enumerate(chosen):
        for limit in limits:
            r = run(model, limit, case, texts[case.prompt], options.options.split())
            if r.exit_code == 0 and said.setdefault(case, r.text) != r.text:
                r.violations.append("another text than under another limit")
            results.append(r)
            print(json.dumps(asdict(r)), flush=True)
            state = "; ".join(r.violations) or "kept"
            print(
                f"run {i + 1} in {limit / 1e6:.0f} MB: context {case.context}, "
                f"{r.prompt_tokens} + {r.new_tokens} tokens, peak {r.peak / 1e6:.0f} MB: {state}",
                file=sys.stderr,
            )
    print(table(results), file=sys.stderr)
    sys.exit(1 if any(r.violations for r in results) else 0)


if __name__ == "__main__":
    main()
