"""What answering several prompts at once is worth, and what a long prompt does to a running answer.

    python -m stoker.mobile_bench.checks.batches MODEL[=MEMORY] ... [--sequences 8] [--tokens 64]
        [--prompt 64] [--repeats 7] [--gap 2048] [--text FILE] [--context N] [--plan] [--json]

For each model (a name or a file; MEMORY: a budget, else everything is in memory) one sequence and
`--sequences` of them decode `--tokens` tokens each after prompts of `--prompt` tokens, different
pieces of a real text, greedily, through `Model.generate_many`; the two take turns. Decode is timed
from the moment when every prompt is evaluated. The gain is the median of the ratios of the tokens a
second of all sequences together.

With --gap N one sequence decodes while another session evaluates a prompt of N tokens. The line
gives the 95th percentile of the time between two tokens of the former, over that of decoding alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stoker
from stoker.mobile_bench.checks.busy import TEXT
from stoker.mobile_bench.checks.compare import spread


class Prompts:
    """Pieces of a text, none like another."""

    def __init__(self, model: stoker.Model, text: str, tokens: int) -> None:
        self._ids = model.tokenizer.encode(text, add_special=False)
        self._tokens = tokens
        self._next = 0

    def take(self, tokens: int = 0) -> list[int]:
        """The next piece."""
        n = tokens or self._tokens
        if self._next + n > len(self._ids):
            self._next = self._next % 17 + 1
        piece = self._ids[self._next : self._next + n]
        self._next += n
        return piece


def decode_rate(model: stoker.Model, prompts: list[list[int]], tokens: int) -> float:
    """Tokens a second of all answers together, while every one of them is decoding."""
    begun: dict[int, int] = {}
    with model.generate_many(
        prompts, parallel=len(prompts), temperature=0, max_tokens=tokens, ignore_eos=True
    ) as answers:
        begin, n = 0.0, 0
        for index, _ in answers:
            if len(begun) < len(prompts):
                begun[index] = 1
                begin = time.perf_counter()
                continue
            n += 1
            end = time.perf_counter()
            generation = answers.generations[index]
            if generation is not None and len(generation.tokens) >= tokens:
                break  # from here on there are fewer
    return n / (end - begin)


def gaps(model: stoker.Model, prompt: list[int], other: list[int], tokens: int) -> list[float]:
    """Seconds between tokens; other: a prompt that enters meanwhile, of which all are gaps."""
    session, entering = model.session(), model.session()
    generation = session.generate(prompt, temperature=0, max_tokens=tokens, ignore_eos=True)
    next(generation)
    done = threading.Event()

    def enter() -> None:
        entering.append(other)
        done.set()

    thread = threading.Thread(target=enter)
    if other:
        thread.start()
    found, last = [], time.perf_counter()
    for _ in generation:
        now = time.perf_counter()
        found.append(now - last)
        last = now
        if other and done.is_set():
            break
    if other:
        thread.join()
        if not done.is_set() or not found:
            raise SystemExit("the prompt did not enter while the answer ran")
    return found


def percentile(values: list[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(name: str, memory: str | None, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The lines of one model."""
    loading: dict[str, Any] = {} if memory is None else {"memory": memory}
    model = stoker.load(name, context=options.context, **loading)
    if options.plan:
        print("\n".join(model.forecast().lines()), file=sys.stderr)
    text = TEXT * 200 if options.text is None else Path(options.text).read_text(encoding="utf-8")
    prompts = Prompts(model, text, options.prompt)
    line: dict[str, Any] = {"model": Path(name).name, "memory": memory or "resident"}
    if options.sequences > 1:
        decode_rate(model, [prompts.take()], options.tokens)
        one, many = [], []
        for _ in range(options.repeats):
            one.append(decode_rate(model, [prompts.take()], options.tokens))
            several = [prompts.take() for _ in range(options.sequences)]
            many.append(decode_rate(model, several, options.tokens))
        yield {
            **line,
            "what": f"decode of {options.sequences}",
            "alone": statistics.median(one),
            "together": statistics.median(many),
            "ratios": [b / a for a, b in zip(one, many, strict=True)],
        }
    if options.gap:
        alone, beside, ratios = [], [], []
        for _ in range(options.repeats):
            a = percentile(gaps(model, prompts.take(), [], 200), 0.95)
            b = percentile(gaps(model, prompts.take(), prompts.take(options.gap), 2000), 0.95)
            alone.append(a)
            beside.append(b)
            ratios.append(b / a)
        yield {
            **line,
            "what": f"p95 gap, {options.gap}-token prompt, ms",
            "alone": statistics.median(alone) * 1e3,
            "together": statistics.median(beside) * 1e3,
            "ratios": ratios,
        }


def main() -> int:
    """Runs the program. Returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL[=MEMORY]")
    parser.add_argument("--sequences", type=int, default=8, help="1: leave this out")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gap", type=int, default=0, help="tokens of the prompt that enters")
    parser.add_argument("--text", help="UTF-8 text that prompts are taken from")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--plan", action="store_true", help="print the plan on stderr")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    options = parser.parse_args()
    if not options.json:
        print("model\tmemory\twhat\talone\ttogether\tratio")
    for given in options.models:
        name, _, memory = given.partition("=")
        for line in measure(name, memory or None, options):
            if options.json:
                print(json.dumps(line), flush=True)
                continue
            print(
                f"{line['model']}\t{line['memory']}\t{line['what']}\t{line['alone']:.1f}\t"
                f"{line['together']:.1f}\t{spread(line['ratios'], digits=2)}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
