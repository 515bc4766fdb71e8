"""One engine in a process of its own, for offload.py: a prompt and greedy tokens, timed.

    python offload_worker.py stoker|llama_cpp MODEL < JSON

Reads one JSON object {"prompt": [ids], "n": 256, "context": 1024, "threads": 2, "engine": {...}}
from standard input; "engine" are keyword arguments of stoker's Engine ("memory" is the budget of
the whole process, process_bytes is measured here) or of llama_cpp.Llama. Writes one JSON object:
load_s, prompt_s, decode_s, token_s [n], tokens [n], peak_rss; for stoker also the plan, the store's
counters of decode, the bandwidth of the disk, and, if asked ("trace": true), the routing that
decode followed. Runs under any Python that has the engine.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def resident_bytes() -> int:
    """Resident size of this process now, bytes."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * 4096


def peak_bytes() -> int:
    """Largest resident size of this process so far, bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def stoker(path: str, task: dict[str, Any]) -> dict[str, Any]:
    """Runs the task on stoker's core."""
    from stoker.runtime._core import Engine, GgufFile, Sampler

    options = dict(task["engine"])
    if options.get("memory"):
        # Room for what the interpreter grows by while it runs.
        options["process_bytes"] = resident_bytes() + (4 << 20)
    start = time.perf_counter()
    engine = Engine(GgufFile(path), threads=task["threads"], context=task["context"], **options)
    timeline = engine.timeline()
    greedy = Sampler(engine.config["n_vocab"])
    load_s = time.perf_counter() - start
    if task.get("trace") and options.get("memory"):
        engine.record_routing(True)
    start = time.perf_counter()
    timeline.eval(task["prompt"])
    tokens = [timeline.sample(greedy)]
    prompt_s = time.perf_counter() - start
    before = engine.offload
    token_s = []
    for _ in range(task["n"]):
        start = time.perf_counter()
        timeline.eval(tokens[-1:])
        tokens.append(timeline.sample(greedy))
        token_s.append(time.perf_counter() - start)
    result: dict[str, Any] = {"plan": engine.plan, "peak_rss": peak_bytes()}
    after = engine.offload
    if before and after:
        result["decode"] = {
            key: after[key] - before[key] for key in after if isinstance(after[key], (int, float))
        }
        result["prefetch"], result["io"] = after["prefetch"], after["io"]
        if task.get("trace"):
            routing = engine.take_routing()
            names = ("evaluation", "layer", "rank", "expert", "weight")
            result["routing"] = {name: routing[name].tolist() for name in names}
        engine.empty_cache()
        result["flash_bandwidth"] = sorted(engine.flash_bandwidth(512 << 20, s) for s in range(5))[
            2
        ]
    return result | {
        "load_s": load_s,
        "prompt_s": prompt_s,
        "decode_s": sum(token_s),
        "token_s": token_s,
        "tokens": tokens,
    }


def llama_cpp(path: str, task: dict[str, Any]) -> dict[str, Any]:
    """Runs the task on llama-cpp-python."""
    import llama_cpp as package
    import numpy as np

    # Repacked weights are memory of the process, which the kernel cannot drop: it would be killed.
    defaults = package.llama_cpp.llama_model_default_params

    def mapped() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    package.llama_cpp.llama_model_default_params = mapped
    start = time.perf_counter()
    llama = package.Llama(
        path,
        n_ctx=task["context"],
        n_threads=task["threads"],
        n_threads_batch=task["threads"],
        n_batch=512,
        verbose=False,
        **task["engine"],
    )
    n_vocab = llama.n_vocab()

    def best() -> int:
        logits = package.llama_get_logits_ith(llama._ctx.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(n_vocab,)).argmax())

    load_s = time.perf_counter() - start
    start = time.perf_counter()
    llama.eval(task["prompt"])
    tokens = [best()]
    prompt_s = time.perf_counter() - start
    token_s = []
    for _ in range(task["n"]):
        start = time.perf_counter()
        llama.eval(tokens[-1:])
        tokens.append(best())
        token_s.append(time.perf_counter() - start)
    return {
        "load_s": load_s,
        "prompt_s": prompt_s,
        "decode_s": sum(token_s),
        "token_s": token_s,
        "tokens": tokens,
        "peak_rss": peak_bytes(),
    }


def main() -> None:
    """Runs one task."""
    engine, path = sys.argv[1:3]
    result = {"stoker": stoker, "llama_cpp": llama_cpp}[engine](path, json.load(sys.stdin))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
