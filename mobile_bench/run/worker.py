"""One engine in a process of its own: commands and results as JSON lines.

    python worker.py stoker|llama-cpp|onnx MODEL '{"threads": 2, "context": 1024, "options": {}}'

Runs as a script under any Python that has the engine, so that llama-cpp-python may live in an
environment of its own. The time to the first token is also measured from outside, from the start of
this process, so imports are as late and as few as each engine allows.

options: keyword arguments of stoker's Engine (with "memory", the budget of the whole process,
process_bytes is measured here), llama_cpp.Llama, or stoker's OnnxOptions. For llama-cpp
"repack": false leaves the weights as they are in the file: repacked ones are memory of the process,
which the kernel cannot drop, so that the process would be killed under a limit.

Commands, one per line, and their results:
{"do": "load"}: {"seconds", "version", "plan", "config"} of the load at the start
{"do": "prompt", "tokens": [ids], "cold": false}: forgets the sequence (cold: stoker's expert cache
    too), evaluates: {"seconds", "token"}, the likeliest next token
{"do": "decode", "n": 128, "limit_s": null}: greedy tokens after the prompt, at least one, until n
    or the time is over: {"token_s": [n], "tokens": [n], "counters": of the expert store or null}
{"do": "logits", "tokens": [ids], "path": ...}: forgets the sequence, evaluates, and writes the
    logits after each token as .npy, float32 [n, n_vocab] (llama-cpp: with the option logits_all)
{"do": "record"}: records the routing from here on, if there is one: {"recording": bool}
{"do": "routing", "path": ...}: writes what was recorded as .npz, and records no longer
{"do": "flash", "nbytes": ..., "seeds": 5}: {"bytes_s": median on this model's experts or null}
{"do": "encode", "text": ..., "n": ...}: {"tokens": [n]}, of engines that have the tokenizer
{"do": "memory"}: {"peak_bytes", "resident_bytes"}
A command that fails gives {"error": message} and ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol


class Engine(Protocol):
    """Interface that a worker needs of an engine."""

    version: str
    plan: dict[str, Any] | None
    config: dict[str, Any]

    def restart(self, cold: bool) -> None:
        """Forgets the sequence; cold: also what was read from flash, if possible."""

    def eval(self, tokens: Sequence[int]) -> None:
        """Appends tokens."""

    def best(self) -> int:
        """The most likely next token."""

    def eval_all(self, tokens: Sequence[int]) -> Any:
        """Appends tokens; returns the logits after each, float32 [n, n_vocab]."""

    def counters(self) -> dict[str, Any] | None:
        """The expert store's counters since the load, None if there is no store."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""


class Stoker:
    """Stoker's core, without the Python API above it."""

    def __init__(self, path: str, threads: int, context: int, **options: Any) -> None:
        from stoker.runtime._core import Engine, GgufFile, Sampler

        if options.get("memory"):
            # `stoker run` imports it too, and "routing" must not take more than the budget.
            import numpy  # noqa: F401

            # The 4 MiB are for the interpreter's growth while it runs.
            options["process_bytes"] = resident_bytes() + (4 << 20)
        self.file = GgufFile(path)
        self.engine = Engine(self.file, threads=threads, context=context, **options)
        self.sequence = self.engine.sequence()
        self.config = {k: v for k, v in self.engine.config.items() if isinstance(v, (int, str))}
        self.greedy = Sampler(self.engine.config["n_vocab"])
        self.plan = dict(self.engine.plan)

    @property
    def version(self) -> str:
        """The stoker package's version."""
        import stoker

        return stoker.__version__

    def restart(self, cold: bool) -> None:
        """Forgets the sequence; cold: empties the expert cache."""
        self.sequence.truncate(0)
        if cold and self.engine.offload is not None:
            self.engine.empty_cache()

    def eval(self, tokens: Sequence[int]) -> None:
        """Appends tokens of a prompt."""
        self.sequence.eval(tokens)

    def decode(self, token: int) -> None:
        """Appends one that was chosen."""
        self.sequence.eval([token], "decode")

    def best(self) -> int:
        """The most likely next token."""
        return self.sequence.sample(self.greedy)

    def eval_all(self, tokens: Sequence[int]) -> Any:
        """Appends tokens; returns the logits after each."""
        return self.sequence.eval_all(tokens)

    def counters(self) -> dict[str, Any] | None:
        """Counters since the load of the expert store and streamed weights; None without both."""
        offload, stream = self.engine.offload, self.engine.stream
        if stream is None:
            return offload
        found = dict(offload or {"io": stream["io"], "prefetch": None})
        for name in ("decode_bytes", "decode_stall_s"):
            found[name] = found.get(name, 0) + stream[name]
        return found

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        from stoker.runtime.text.tokenizer import Tokenizer

        return Tokenizer.from_metadata(self.file.get).encode(text)


class LlamaCpp:
    """llama-cpp-python at its defaults, with our threads and context and a whole-prompt batch."""

    plan = None

    def __init__(
        self, path: str, threads: int, context: int, repack: bool = True, **options: Any
    ) -> None:
        import llama_cpp
        import numpy

        if not repack:
            defaults = llama_cpp.llama_cpp.llama_model_default_params

            def mapped() -> Any:
                params = defaults()
                params.use_extra_bufts = False
                return params

            llama_cpp.llama_cpp.llama_model_default_params = mapped
        self.llama = llama_cpp.Llama(
            path,
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=512,
            verbose=False,
            **options,
        )
        self.version = str(llama_cpp.__version__)
        self.n_vocab = self.llama.n_vocab()
        self.config = {"n_vocab": self.n_vocab}
        self.logits = llama_cpp.llama_get_logits_ith
        self.numpy = numpy

    def restart(self, cold: bool) -> None:
        """Forgets the sequence."""
        self.llama.reset()

    def eval(self, tokens: Sequence[int]) -> None:
        """Appends tokens of a prompt."""
        self.llama.eval(tokens)

    def decode(self, token: int) -> None:
        """Appends one that was chosen."""
        self.llama.eval([token])

    def best(self) -> int:
        """The most likely next token."""
        last = self.numpy.ctypeslib.as_array(
            self.logits(self.llama._ctx.ctx, -1), shape=(self.n_vocab,)
        )
        return int(last.argmax())

    def eval_all(self, tokens: Sequence[int]) -> Any:
        """Appends tokens; returns the logits after each."""
        begin = self.llama.n_tokens
        self.llama.eval(tokens)
        return self.llama.scores[begin : begin + len(tokens)]

    def counters(self) -> dict[str, Any] | None:
        """None: it has no expert store."""
        return None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return list(self.llama.tokenize(text.encode()))


class Onnx:
    """onnxruntime behind stoker's backend."""

    def __init__(self, path: str, threads: int, context: int, **options: Any) -> None:
        from pathlib import Path

        import onnxruntime
        from stoker.runtime._core import Sampler
        from stoker.runtime.backend_models import OnnxModel
        from stoker.runtime.backends.onnx import OnnxOptions
        from stoker.runtime.options import LoadOptions

        memory = options.pop("memory", "auto")
        load = LoadOptions(threads=threads, context=context, memory=memory)
        self.model = OnnxModel(Path(path), load, OnnxOptions(**options))
        self.version = str(onnxruntime.__version__)
        self.sequence = self.model._engine.sequence()
        self.config = {k: v for k, v in self.model.config.items() if isinstance(v, (int, str))}
        self.plan = dict(self.model.plan)
        self.greedy = Sampler(self.model.config["n_vocab"])

    def restart(self, cold: bool) -> None:
        """Forgets the sequence."""
        self.sequence.truncate(0)

    def eval(self, tokens: Sequence[int]) -> None:
        """Appends tokens of a prompt."""
        self.sequence.eval(tokens)

    def decode(self, token: int) -> None:
        """Appends one that was chosen."""
        self.sequence.eval([token], "decode")

    def best(self) -> int:
        """The most likely next token."""
        return self.sequence.sample(self.greedy)

    def eval_all(self, tokens: Sequence[int]) -> Any:
        """Appends tokens; returns the logits after each."""
        return self.sequence.eval_all(tokens)

    def counters(self) -> dict[str, Any] | None:
        """None: it has no expert store."""
        return None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self.model.tokenizer.encode(text)


ENGINES: dict[str, type[Stoker] | type[LlamaCpp] | type[Onnx]] = {
    "stoker": Stoker,
    "llama-cpp": LlamaCpp,
    "onnx": Onnx,
}


def resident_bytes() -> int:
    """Resident size of this process now, bytes; 0 if the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass
    try:
        import psutil  # type: ignore[import-untyped, unused-ignore]

        return int(psutil.Process().memory_info().rss)
    except ImportError:
        return 0


def peak_bytes() -> int:
    """Largest resident size of this process so far, bytes; 0 if the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        try:
            import psutil

            return int(psutil.Process().memory_info().peak_wset)
        except ImportError:
            return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Worker:
    """An engine with its current sequence."""

    def __init__(self, name: str, path: str, threads: int, context: int, options: Any) -> None:
        start = time.perf_counter()
        self.engine: Any = ENGINES[name](path, threads, context, **options)
        self.load_s = time.perf_counter() - start
        self.last: list[int] = []  # the likeliest token after what was evaluated

    def load(self) -> dict[str, Any]:
        """The seconds that loading took, and what was loaded."""
        e = self.engine
        return {"seconds": self.load_s, "version": e.version, "plan": e.plan, "config": e.config}

    def prompt(self, tokens: list[int], cold: bool = False) -> dict[str, Any]:
        """Evaluates a prompt from the start."""
        self.engine.restart(cold)
        start = time.perf_counter()
        self.engine.eval(tokens)
        self.last = [self.engine.best()]
        return {"seconds": time.perf_counter() - start, "token": self.last[0]}

    def decode(self, n: int, limit_s: float | None = None) -> dict[str, Any]:
        """Decodes greedy tokens; the last one is chosen, not evaluated."""
        engine, token_s, tokens = self.engine, [], list(self.last)
        before = engine.counters()
        begin = time.perf_counter()
        for _ in range(n):
            start = time.perf_counter()
            engine.decode(tokens[-1])
            tokens.append(engine.best())
            end = time.perf_counter()
            token_s.append(end - start)
            if limit_s is not None and end - begin > limit_s:
                break
        after, gained = engine.counters(), None
        if before and after:
            numbers = (key for key in after if isinstance(after[key], (int, float)))
            gained = {key: after[key] - before[key] for key in numbers}
            gained.update(prefetch=after["prefetch"], io=after["io"])
        self.last = tokens[-1:]
        return {"token_s": token_s, "tokens": tokens[1:], "counters": gained}

    def logits(self, tokens: list[int], path: str) -> dict[str, Any]:
        """Evaluates tokens from the start and writes the logits after each."""
        import numpy

        self.engine.restart(False)
        found = self.engine.eval_all(tokens)
        numpy.save(path, numpy.asarray(found, numpy.float32))
        return {"n": len(found)}

    def record(self) -> dict[str, Any]:
        """Records the routing from here on if experts are offloaded."""
        offloads = self.engine.engine.offload is not None
        if offloads:
            self.engine.engine.record_routing(True)
        return {"recording": offloads}

    def routing(self, path: str) -> dict[str, Any]:
        """Writes the recorded arrays of Engine.take_routing as .npz."""
        import numpy

        taken = self.engine.engine.take_routing()
        self.engine.engine.record_routing(False)
        numpy.savez(path, **taken)
        return {"uses": len(taken["expert"])}

    def flash(self, nbytes: int, seeds: int) -> dict[str, Any]:
        """Bandwidth of reading random experts, or streamed weights; bytes per second."""
        if self.engine.counters() is None:
            return {"bytes_s": None}
        self.engine.restart(True)
        found = sorted(self.engine.engine.flash_bandwidth(nbytes, s) for s in range(seeds))
        return {"bytes_s": found[seeds // 2]}

    def encode(self, text: str, n: int) -> dict[str, Any]:
        """The first n tokens of a text, or all if it has fewer."""
        return {"tokens": self.engine.encode(text)[:n]}

    def memory(self) -> dict[str, Any]:
        """Peak and current resident size of this process, bytes."""
        return {"peak_bytes": peak_bytes(), "resident_bytes": resident_bytes()}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carries out one command."""
        name = command.pop("do")
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}")
        result: dict[str, Any] = getattr(self, name)(**command)
        return result


COMMANDS = ("load", "prompt", "decode", "logits", "record", "routing", "flash", "encode", "memory")


def main() -> None:
    """Serves commands until standard input ends."""
    # A script's folder comes first in sys.path; our file names must not hide other modules.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != here]
    name, path, settings = sys.argv[1:4]
    out, sys.stdout = sys.stdout, sys.stderr  # what engines print is not a result
    try:
        given = json.loads(settings)
        worker = Worker(name, path, given["threads"], given["context"], given.get("options", {}))
        for line in sys.stdin:
            print(json.dumps(worker.answer(json.loads(line))), file=out, flush=True)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(json.dumps({"error": text, "type": type(error).__name__}), file=out, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
