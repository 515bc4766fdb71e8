"""Writes tests/data/tflite_golden.npz and tflite_operators.npz: tflite's interpreter's outputs.

Run by hand where `ai-edge-litert` (2.3.0) and `tflite` are installed, with the shared data beside
the checkout: PYTHONPATH=tests/models python tests/golden/make_tflite_golden.py. Inputs are hashes
(tiny_tflite.noise), so only outputs are kept. Keys: model/output number. The default interpreter
computes them; the models that the default delegate computes in a way of its own (hybrid operators)
and the tiny ones are computed by the reference kernels (BUILTIN_REF), but for those of one
operator each: not all of these have a reference kernel.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from ai_edge_litert import interpreter as litert
from tiny_tflite import FLOAT, INT8, SAMPLES, TINY, model_samples, reals
from tiny_tflite_operators import CASES

REFERENCE = (*TINY, "kws_ref_model_float32")


def outputs(name: str, content: bytes, samples: list[np.ndarray]) -> dict[str, np.ndarray]:
    kinds = litert.OpResolverType
    model = litert.Interpreter(
        model_content=content,
        experimental_op_resolver_type=kinds.BUILTIN_REF if name in REFERENCE else kinds.AUTO,
    )
    model.allocate_tensors()
    rows: list[list[np.ndarray]] = [[] for _ in model.get_output_details()]
    for sample in samples:
        model.set_tensor(model.get_input_details()[0]["index"], sample)
        model.invoke()
        for row, detail in zip(rows, model.get_output_details(), strict=True):
            row.append(model.get_tensor(detail["index"]).copy())
    return {f"{name}/{i}": np.concatenate(row) for i, row in enumerate(rows)}


def main() -> None:
    folder = Path(__file__).resolve().parents[1]
    found: dict[str, np.ndarray] = {}
    for name, (make, largest) in TINY.items():
        model = make()
        shape = model.tensors[0]["shape"]
        samples = [reals(f"{name} {i}", shape, largest) for i in range(SAMPLES)]
        found |= outputs(name, model.bytes(), samples)
    for name in (*FLOAT, *INT8):
        shared = Path(os.environ.get("STOKER_SHARED_DATA", folder.parents[1] / "shared" / "data"))
        path = shared / "tiny_models" / f"{name}.tflite"
        found |= outputs(name, path.read_bytes(), model_samples(name))
    np.savez_compressed(folder / "data" / "tflite_golden.npz", **found)
    found = {}
    for name, make in CASES.items():
        model = make()
        found |= outputs(name, model.bytes(), [reals(name, model.tensors[0]["shape"], 2)])
    np.savez_compressed(folder / "data" / "tflite_operators.npz", **found)


if __name__ == "__main__":
    main()
