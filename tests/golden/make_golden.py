"""Writes tests/data/golden_*.npz: what llama.cpp computes for real model files.

Needs llama-cpp-python, which the tests themselves never import:

    python tests/models/tiny_models.py TINY       # with the gguf package
    python tests/golden/make_golden.py --tiny TINY
    python tests/golden/make_golden.py --models DIR --text wikitext2-test-tokenised.txt.gz

golden_tiny.npz holds, for each tiny variant that llama.cpp can run, logits_{variant} [4, n_vocab]
after the tokens at `positions` of `tokens`, and weights_{variant}, the fingerprint of its weights.

The others hold real models, two runs each. `exact`: the file's weights converted to F32 by
llama.cpp (dequantization is exact), F32 cache, so that nothing but float32 is rounded. `default`:
the file as it is, with the int8 activations and the f16 cache that llama.cpp uses. An engine
should be as near to `exact` as `default` is; how near the two engines are to each other says
less, their roundings differ.

Each npz holds, for one model, natural logarithms throughout:
    llama_cpp                version of llama-cpp-python
    model_bytes, model_sha256  of the GGUF file, so that a test never compares another file
    text, tokens [n]         the evaluated text and its tokens (with BOS if the model adds one)
    top_ids [n, 64]          exact's most likely next tokens after each position, best first
    exact_logprobs, default_logprobs [n, 64]  of those tokens
    exact_tail, default_tail [n]              log of the probability of all others together
    exact_nll, default_nll [n - 1]            -log p(tokens[i + 1])
    default_best [n]         default's most likely token
    prompt_{i}, prompt_{i}_tokens, greedy_{i} [64], gap_{i} [64]
                             prompts, exact's greedy continuations, and by how much (nats) the best
                             token led the second: if that is little, roundings may decide
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

CONTEXT = 1024
TOP = 64
GREEDY_TOKENS = 64
TINY_POSITIONS = (7, 31, 63, 99)
# Variants that llama.cpp computes differently from the file, and why.
NOT_IN_LLAMA_CPP = {
    "mixtral-split": "one tensor an expert is no longer read",
    "smallthinker-window": "the window is 4096 whatever the file says",
    "smallthinker-pattern-3": "the window is 4096 whatever the file says",
    "llama-attention-softcap": "the key is not read for llama",
    "llama-attention-scale": "the key is not read for llama",
}
CHAT = (
    "<|im_start|>system\n{system}<|im_end|>\n"
    "<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
)
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a lighthouse keeper.",
    "Explain how a steam engine works in three sentences.",
)
OPENINGS = (
    "The history of the steam engine begins with",
    "Once upon a time there was a lighthouse keeper who",
    "def fibonacci(n):\n    ",
)
# name -> (file, tokens of text, prompts). Gemma's text is longer than its window of 512.
MODELS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "smollm2": (
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        288,
        tuple(CHAT.format(system=SYSTEM, user=q) for q in QUESTIONS),
    ),
    "gemma3": ("gemma-3-270m-q4_k_m.gguf", 640, OPENINGS),
    "smallthinker_f16": ("tiny-smallthinker-F16.gguf", 288, OPENINGS),
    "smallthinker_q4_0": ("tiny-smallthinker-Q4_0.gguf", 288, OPENINGS),
}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def logprobs_of(model: llama_cpp.Llama, tokens: list[int]) -> np.ndarray:
    """Log-probabilities after each token, [n, n_vocab], from an empty cache."""
    model.reset()
    model.eval(tokens)
    return log_softmax(np.array(model.scores[: len(tokens)]))


def greedy(model: llama_cpp.Llama, prompt: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The GREEDY_TOKENS most likely tokens after `prompt`, end tokens included, and their leads."""
    model.reset()
    model.eval(prompt)
    chosen, leads = [], []
    for _ in range(GREEDY_TOKENS):
        logprobs = log_softmax(np.array(model.scores[model.n_tokens - 1]))
        second, best = np.argsort(logprobs)[-2:]
        chosen.append(best)
        leads.append(logprobs[best] - logprobs[second])
        model.eval([int(best)])
    return np.array(chosen, np.int32), np.array(leads, np.float32)


def load(path: Path, *, context: int = CONTEXT, **options: Any) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(path),
        n_ctx=context,
        logits_all=True,
        n_threads=2,
        flash_attn=False,
        verbose=False,
        **options,
    )


def to_f32(source: Path, target: Path) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) != 0:
        raise RuntimeError(f"{source}: conversion to F32 failed")


def record(logprobs: np.ndarray, top: np.ndarray, tokens: list[int]) -> dict[str, np.ndarray]:
    of_top = np.take_along_axis(logprobs, top, axis=-1)
    return {
        "logprobs": of_top.astype(np.float32),
        "tail": np.log1p(-np.exp(of_top).sum(axis=-1)).astype(np.float32),
        "nll": -logprobs[np.arange(len(tokens) - 1), tokens[1:]].astype(np.float32),
    }


def golden(path: Path, text: str, n: int, prompts: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / path.name
        to_f32(path, converted)
        model = load(converted, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
        tokens = model.tokenize(text.encode(), add_bos=True, special=False)[:n]
        logprobs = logprobs_of(model, tokens)
        top = np.argsort(-logprobs, axis=-1, kind="stable")[:, :TOP]
        out: dict[str, Any] = {
            "llama_cpp": llama_cpp.__version__,
            "model_bytes": path.stat().st_size,
            "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "text": model.detokenize(tokens).decode(errors="ignore"),
            "tokens": np.array(tokens, np.int32),
            "top_ids": top.astype(np.int32),
        }
        out |= {f"exact_{k}": v for k, v in record(logprobs, top, tokens).items()}
        for i, prompt in enumerate(prompts):
            ids = model.tokenize(prompt.encode(), add_bos=True, special=True)
            out[f"prompt_{i}"] = prompt
            out[f"prompt_{i}_tokens"] = np.array(ids, np.int32)
            out[f"greedy_{i}"], out[f"gap_{i}"] = greedy(model, ids)
            text_of = model.detokenize([int(t) for t in out[f"greedy_{i}"]])
            print(repr(text_of.decode("utf8", "replace")))
        del model
    logprobs = logprobs_of(load(path), tokens)
    out |= {f"default_{k}": v for k, v in record(logprobs, top, tokens).items()}
    out["default_best"] = logprobs.argmax(axis=-1).astype(np.int32)
    return out


def golden_tiny(folder: Path) -> dict[str, Any]:
    about = json.loads((folder / "tiny.json").read_text())
    tokens = about["tokens"]
    out: dict[str, Any] = {
        "llama_cpp": llama_cpp.__version__,
        "tokens": np.array(tokens, np.int32),
        "positions": np.array(TINY_POSITIONS, np.int32),
    }
    for name, weights in about["fingerprints"].items():
        if name in NOT_IN_LLAMA_CPP:
            continue
        f32 = llama_cpp.GGML_TYPE_F32
        model = load(folder / f"{name}.gguf", context=256, type_k=f32, type_v=f32)
        model.eval(tokens)
        out[f"logits_{name}"] = np.array(model.scores)[list(TINY_POSITIONS)].astype(np.float32)
        out[f"weights_{name}"] = weights
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder of the real GGUF files")
    parser.add_argument("--text", type=Path, help="gzipped text to evaluate")
    parser.add_argument("--tiny", type=Path, help="folder written by tiny_models.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "data")
    args = parser.parse_args()
    if args.tiny:
        np.savez_compressed(args.out / "golden_tiny.npz", **golden_tiny(args.tiny))
    if not args.models:
        return
    with gzip.open(args.text, "rt", encoding="utf8") as file_of_text:
        text = file_of_text.read().lstrip()[:20000]
    for name, (file, n, prompts) in MODELS.items():
        out = golden(args.models / file, text, n, prompts)
        target = args.out / f"golden_{name}.npz"
        np.savez_compressed(target, **out)
        p, q = out["exact_logprobs"].astype(float), out["default_logprobs"].astype(float)
        p_tail, q_tail = out["exact_tail"].astype(float), out["default_tail"].astype(float)
        kl = (np.exp(p) * (p - q)).sum(axis=-1) + np.exp(p_tail) * (p_tail - q_tail)
        exact, default = (np.exp(out[f"{k}_nll"].mean()) for k in ("exact", "default"))
        same = (out["default_best"] == out["top_ids"][:, 0]).mean()
        print(f"{target}: {target.stat().st_size} bytes, {n} tokens")
        print(f"  perplexity: exact {exact:.4f}, default {default:.4f}")
        print(f"  default against exact: KL {kl.mean():.2e}, same best {same:.4f}")


if __name__ == "__main__":
    main()
