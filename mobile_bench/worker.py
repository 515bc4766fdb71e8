"""One engine in a process of its own, for compare.py: commands and results as JSON lines.

    python worker.py stoker|llama_cpp MODEL THREADS [CONTEXT]

The first token of a 16-token prompt is measured from outside, from the start of this process: so
everything is imported as late and as little as each engine allows. Runs as a script under any
Python that has the engine, so that llama-cpp-python may live in an environment of its own.

Commands, one a line: {"do": "first", "tokens": [...]}, {"do": "prefill", "tokens": [...]},
{"do": "decode", "tokens": [...], "n": 128}, {"do": "memory"}. Results, one a line: {"seconds": s},
for decode also {"tokens": [...]}, for memory {"peak_bytes": n}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol


class Engine(Protocol):
    """What a worker needs of an engine."""

    def restart(self) -> None:
        """Forgets the sequence."""

    def eval(self, tokens: Sequence[int]) -> None:
        """Appends tokens."""

    def best(self) -> int:
        """The most likely next token."""


class Stoker:
    """Stoker's core, without the Python API above it."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        from stoker.runtime._core import Engine, GgufFile, Sampler

        engine = Engine(GgufFile(path), threads=threads, context=context)
        self.timeline = engine.timeline()
        self.greedy = Sampler(engine.config["n_vocab"])

    def restart(self) -> None:
        """Forgets the sequence."""
        self.timeline.truncate(0)

    def eval(self, tokens: Sequence[int]) -> None:
        """Appends tokens."""
        self.timeline.eval(tokens)

    def best(self) -> int:
        """The most likely next token."""
        return self.timeline.sample(self.greedy)


class LlamaCpp:
    """llama-cpp-python at its defaults, with the same threads, context and a whole-prompt batch."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp

        self.llama = llama_cpp.Llama(
            path,
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=512,
            verbose=False,
        )
        self.n_vocab = self.llama.n_vocab()
        self.logits = llama_cpp.llama_get_logits_ith
        import numpy

        self.numpy = numpy

    def restart(self) -> None:
        """Forgets the sequence."""
        self.llama.reset()

    def eval(self, tokens: Sequence[int]) -> None:
        """Appends tokens."""
        self.llama.eval(tokens)

    def best(self) -> int:
        """The most likely next token."""
        last = self.numpy.ctypeslib.as_array(
            self.logits(self.llama._ctx.ctx, -1), shape=(self.n_vocab,)
        )
        return int(last.argmax())


ENGINES: dict[str, type[Stoker] | type[LlamaCpp]] = {"stoker": Stoker, "llama_cpp": LlamaCpp}


def peak_bytes() -> int:
    """Largest resident size of this process so far, bytes."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def answer(engine: Engine, command: dict[str, Any]) -> dict[str, Any]:
    """Carries out one command."""
    if command["do"] == "memory":
        return {"peak_bytes": peak_bytes()}
    engine.restart()
    tokens = command["tokens"]
    if command["do"] == "decode":
        engine.eval(tokens)
        made = [engine.best()]
        start = time.perf_counter()
        for _ in range(command["n"]):
            engine.eval(made[-1:])
            made.append(engine.best())
        return {"seconds": time.perf_counter() - start, "tokens": made}
    start = time.perf_counter()
    engine.eval(tokens)
    engine.best()
    return {"seconds": time.perf_counter() - start}


def main() -> None:
    """Serves commands until standard input ends."""
    name, path, threads = sys.argv[1:4]
    context = int(sys.argv[4]) if len(sys.argv) > 4 else 1024
    engine = ENGINES[name](path, int(threads), context)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
