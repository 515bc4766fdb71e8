"""Writes tests/data/golden_mixes.json: which tensor types llama.cpp chooses for a file type.

Needs gguf and llama-cpp-python, which quantizes the models of `MODELS`:

    python tests/golden/make_mixes_golden.py

The record: {model: {file type: {tensor type: tensors}}}, tensors as "kind" or "kind:layers", such
as "attn_v:0 1 4" for blk.0.attn_v.weight and so on; tensors that stay F32 and those of the type
that most have ("most") are not listed. "Q4_0+imatrix": with an importance matrix.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tiny_models import WIDE, make

# name -> family and overrides. With sixteen layers, eighths and sixteenths of them differ.
DEEP: dict[str, Any] = {**WIDE, "n_layer": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", DEEP),
    "llama-tied": ("llama", {**WIDE, "tied": True, "n_layer": 9}),
    "llama-narrow": ("llama", {"n_layer": 8, "n_ff": 256}),
    "llama-odd": ("llama", {"n_layer": 8, "n_embd": 72, "n_head": 3, "n_head_kv": 1, "n_ff": 256}),
    "llama-80": ("llama", {**WIDE, "n_layer": 80, "n_ff": 32, "n_head_kv": 1, "n_head": 2}),
    "mixtral": ("llama-moe", {**WIDE, "n_layer": 8}),
    "qwen2": ("qwen2", {**WIDE, "n_head_kv": 8, "n_layer": 11}),
    "qwen2moe": ("qwen2moe", {**WIDE, "n_layer": 8, "n_expert": 2, "n_head_kv": 2}),
    "qwen3moe": ("qwen3moe", {**WIDE, "n_layer": 9, "n_expert": 3}),
    "gemma3": ("gemma3", {**WIDE, "n_layer": 18}),
    "smallthinker": ("smallthinker", {**WIDE, "n_layer": 8, "n_expert": 2}),
}
# llama.cpp's numbers of the file types.
FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11,
    "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17,
    "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4": 38,
}  # fmt: skip
WITH_IMATRIX = ("Q4_0", "Q5_0", "Q4_K_M", "Q3_K_M", "IQ4_NL", "IQ4_XS")


def summary(types: dict[str, str]) -> dict[str, list[str]]:
    """The record of a file: tensor type -> "kind:layers"; see above."""
    most = Counter(t for t in types.values() if t != "F32").most_common(1)[0][0]
    layers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for tensor, kind in types.items():
        if kind in ("F32", most):
            continue
        name = tensor.removesuffix(".weight")
        block, _, rest = name.partition(".")
        if block == "blk":
            layer, _, name = rest.partition(".")
            layers[kind, name].append(int(layer))
        else:
            layers[kind, name] = []
    found: dict[str, list[str]] = {"most": [most]}
    for (kind, name), numbers in sorted(layers.items()):
        text = f"{name}:{' '.join(map(str, sorted(numbers)))}" if numbers else name
        found.setdefault(kind, []).append(text)
    return found


def types_of(path: Path) -> dict[str, str]:
    """Tensor types by name."""
    import gguf

    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(path)).tensors}


def quantized_by_llama_cpp(source: Path, out: Path, number: int, imatrix: bool) -> None:
    """Writes `out`; raises if llama.cpp refuses."""
    import gguf
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, 2
    kept = []
    if imatrix:
        tensors = [t for t in gguf.GGUFReader(str(source)).tensors if len(t.shape) > 1]
        table = (llama_cpp.llama_model_imatrix_data * (len(tensors) + 1))()
        for row, t in zip(table, tensors, strict=False):
            n = int(t.shape[0]) * (int(t.shape[2]) if len(t.shape) > 2 else 1)
            ones = (ctypes.c_float * n)(*[1.0] * n)
            kept.append(ones)
            row.name, row.data, row.size = t.name.encode(), ones, n
        params.imatrix = table
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(out).encode(), ctypes.byref(params)
    )
    if code != 0:
        raise RuntimeError(f"{out.name}: llama.cpp returned {code}")


def main() -> None:
    import llama_cpp

    record: dict[str, Any] = {"llama_cpp": llama_cpp.__version__, "models": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for model, (family, sizes) in MODELS.items():
            source = make(Path(temporary) / "f16.gguf", family, quant="F16", **sizes)
            rows: dict[str, Any] = {}
            for name, number in FILE_TYPES.items():
                for suffix in ("", "+imatrix") if name in WITH_IMATRIX else ("",):
                    out = Path(temporary) / "out.gguf"
                    quantized_by_llama_cpp(source, out, number, bool(suffix))
                    rows[name + suffix] = summary(types_of(out))
            record["models"][model] = rows
            print(model, flush=True)
    path = Path(__file__).parents[1] / "data" / "golden_mixes.json"
    lines = [
        f"{json.dumps(model)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        + "\n }"
        for model, rows in record["models"].items()
    ]
    models = ",\n ".join(lines)
    path.write_text(f'{{"llama_cpp": "{record["llama_cpp"]}", "models": {{\n {models}\n}}}}\n')


if __name__ == "__main__":
    main()
