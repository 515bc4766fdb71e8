"""How far stoker is from llama-cpp-python on the same file and tokens.

    python -m stoker.mobile_bench.checks.accuracy MODEL TEXT [--positions 256]
        [--baseline-python PY]

Mean KL of the next-token distributions, share of equal most likely tokens, and perplexity, for each
precision of stoker and for every given Python that has llama-cpp-python. Its CPU kernels round
activations to int8; a build with OpenBLAS multiplies prompts in float32
(CMAKE_ARGS="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS"), which leaves rounding out: with such a
build as the reference, distances are errors of the compared engine alone, with any other they are
errors of both. Weights are left as they are in the file ("repack": false), as BLAS cannot read
repacked ones. All tokens are evaluated as one prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.divergence import Floats, divergence, token_nll
from ..run.worker_process import WorkerProcess

PRECISIONS = ("fast", "balanced", "high")


def logits(
    engine: str, model: Path, tokens: list[int], *, python: str = "", **options: Any
) -> Floats:
    """Logits after each token, float32 [n, n_vocab], computed in a separate process."""
    with tempfile.TemporaryDirectory(prefix="stoker-accuracy-") as folder:
        file = Path(folder) / "logits.npy"
        with WorkerProcess(
            engine, model, threads=0, context=len(tokens) + 1, options=options, python=python
        ) as worker:
            worker.ask("load")
            worker.ask("logits", tokens=tokens, path=str(file))
        found: Floats = np.load(file)
        return found


def distances(reference: Floats, other: Floats, tokens: list[int]) -> dict[str, float]:
    """kl: mean, nats; top1: share of equal choices; perplexity; ratio to the reference's."""
    nll = token_nll(other, tokens).mean()
    return {
        "kl": float(divergence(reference, other).mean()),
        "top1": float((reference.argmax(axis=1) == other.argmax(axis=1)).mean()),
        "perplexity": float(np.exp(nll)),
        "ratio": float(np.exp(nll - token_nll(reference, tokens).mean())),
    }


def measure(model: Path, tokens: list[int], pythons: dict[str, str]) -> list[dict[str, Any]]:
    """One result for each pair of reference and engine. pythons: reference name -> its Python."""
    ours = {p: logits("stoker", model, tokens, precision=p) for p in PRECISIONS}
    theirs = {
        name: logits("llama-cpp", model, tokens, python=python, logits_all=True, repack=False)
        for name, python in pythons.items()
    }
    results = []
    for name, reference in theirs.items():
        others = {f"stoker, {p}": found for p, found in ours.items()}
        others |= {other: found for other, found in theirs.items() if other != name}
        for other, found in others.items():
            far = distances(reference, found, tokens)
            results.append({"reference": name, "engine": other, **far})
    return results


def report(results: list[dict[str, Any]]) -> str:
    """The results as a tab-separated table."""
    lines = ["reference\tengine\tKL\ttop-1\tperplexity\tratio"]
    for r in results:
        lines.append(
            f"{r['reference']}\t{r['engine']}\t{r['kl']:.7f}\t{r['top1']:.1%}"
            f"\t{r['perplexity']:.3f}\t{r['ratio']:.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a GGUF file or a catalogue name")
    parser.add_argument("text", type=Path, help="UTF-8 text, of which the beginning is taken")
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument(
        "--baseline-python",
        action="append",
        default=[],
        metavar="[NAME=]PYTHON",
        help="has llama-cpp-python; may be given several times [default: this one]",
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()

    from ...models.locate import locate
    from ...runtime._core import GgufFile
    from ...runtime.text.tokenizer import Tokenizer

    model = locate(options.model, download=False)
    text = options.text.read_text(encoding="utf-8")
    tokens = list(Tokenizer.from_metadata(GgufFile(str(model)).get).encode(text))
    if len(tokens) < options.positions:
        found = f"{options.text} has {len(tokens)} tokens, {options.positions} are needed"
        parser.error(found)
    tokens = tokens[: options.positions]
    given = options.baseline_python or [f"llama-cpp-python={sys.executable}"]
    pythons = dict(p.split("=", 1) if "=" in p else (p, p) for p in given)
    results = measure(model, tokens, pythons)
    print(f"{model.name}, {len(tokens)} positions")
    print(report(results))
    if options.json:
        record = {
            "model": model.name,
            "positions": len(tokens),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "results": results,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
