"""Checks that llama.cpp computes from exported files what transformers does from their folders.

Two steps, because the packages may live in different environments:

    python tests/golden/compare_hf_llama_cpp.py make DIR     # torch, transformers, stoker
    python tests/golden/compare_hf_llama_cpp.py check DIR    # llama-cpp-python

`make` exports every variant of hf_models.VARIANTS in F32, with transformers' logits and its
tokenizer's ids beside it; `check` prints the largest difference of each and exits with 1 if one
is above its limit. (No golden file is kept: the weights depend on torch's version.)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

LIMIT = 1e-3
# llama.cpp looks GELU up in a table of f16, which wide weights show.
LIMITS = {"gemma3": 3e-3}
# Variants that llama.cpp computes differently from the file, and why.
NOT_IN_LLAMA_CPP = {
    "qwen2moe-dense-layer": "expects a mixture in every layer",
    "qwen3-biases": "knows no biases of qwen3",
    "olmoe-gqa": "expects as many heads of keys and values as of queries",
    "gemma3-pattern": "the pattern of layers, the scale and the softcap are not read for gemma3",
}


def make(folder: Path) -> None:
    """Writes VARIANT.gguf, VARIANT.npz and texts.json."""
    import hf_models
    from stoker.export import hf_to_gguf
    from stoker.export.hf.tokenizer_probes import PROBES
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for variant in hf_models.VARIANTS:
        source, logits = hf_models.saved(variant)
        made = hf_to_gguf.convert(source, folder / f"{variant}.gguf", force=True)
        np.savez(folder / f"{variant}.npz", logits=logits, tokens=hf_models.TOKENS)
        print(made.path)
    library = Tokenizer.from_file(str(source / "tokenizer.json"))
    # llama.cpp takes texts up to their first zero byte.
    texts = [text for text in PROBES if "\0" not in text]
    ids = {text: library.encode(text, add_special_tokens=False).ids for text in texts}
    (folder / "texts.json").write_text(json.dumps(ids))


def check(folder: Path) -> bool:
    """Prints a line for each variant; returns whether all are within their limits."""
    import llama_cpp

    texts: dict[str, list[int]] = json.loads((folder / "texts.json").read_text())
    good = True
    for path in sorted(folder.glob("*.gguf")):
        if path.stem in NOT_IN_LLAMA_CPP:
            print(f"{path.stem:22} not in llama.cpp: {NOT_IN_LLAMA_CPP[path.stem]}")
            continue
        recorded = np.load(path.with_suffix(".npz"))
        llama = llama_cpp.Llama(
            str(path),
            n_ctx=256,
            n_batch=256,
            logits_all=True,
            verbose=False,
            n_threads=1,
            n_gpu_layers=0,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
        )
        llama.eval(recorded["tokens"].tolist())
        found = np.asarray(llama.scores[: len(recorded["tokens"])])
        difference = float(np.abs(found - recorded["logits"]).max())
        same = [
            text
            for text, ids in texts.items()
            if llama.tokenize(text.encode(), add_bos=False, special=False) == ids
        ]
        within = difference <= LIMITS.get(path.stem, LIMIT) and len(same) == len(texts)
        good = good and within
        print(
            f"{path.stem:22} logits within {difference:.1e}, ids of {len(same)} of {len(texts)} "
            f"texts equal{'' if within else '  <-- FAILED'}"
        )
        llama.close()
    return good


def main() -> None:
    """Runs one step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("make", "check"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.step == "make":
        make(options.folder)
    elif not check(options.folder):
        sys.exit(1)


if __name__ == "__main__":
    main()
