"""ggml's matrix products, timed, for kernels.py: commands and results as JSON lines.

    python ggml_kernels.py THREADS

Runs as a script under any Python that has llama-cpp-python, whose ggml libraries it calls through
ctypes. Prints {"ggml": path of the library, "version": the package's} first.

The command {"type": GGUF id, "rows": n, "cols": n, "tokens": n, "seconds": about how long} gives
{"plain": s, "repacked": s or null}: seconds of the fastest product in that time, for a matrix as it
lies in the file, and for one rearranged if ggml rearranges this type when loading.
A type that this ggml does not have gives {"error": message}.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

F32 = 0
ROWS = 64  # different rows; no kernel's speed depends on values

Pointer = ctypes.c_void_p


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", Pointer),
        ("no_alloc", ctypes.c_bool),
    )


class Ggml:
    """ggml's functions that are called here, with their types."""

    def __init__(self, folder: Path, threads: int) -> None:
        def library(name: str) -> Any:
            found = sorted(folder.glob(f"*{name}.*"), key=lambda p: len(p.name))
            if not found:
                raise OSError(f"{folder}: no library {name}")
            return ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)

        self.base, self.cpu = library("ggml-base"), library("ggml-cpu")
        signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "ggml_init": (Pointer, (InitParams,)),
            "ggml_free": (None, (Pointer,)),
            "ggml_new_tensor_2d": (
                Pointer,
                (Pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
            ),
            "ggml_mul_mat": (Pointer, (Pointer, Pointer, Pointer)),
            "ggml_new_graph": (Pointer, (Pointer,)),
            "ggml_build_forward_expand": (None, (Pointer, Pointer)),
            "ggml_row_size": (ctypes.c_size_t, (ctypes.c_int, ctypes.c_int64)),
            "ggml_blck_size": (ctypes.c_int64, (ctypes.c_int,)),
            "ggml_type_name": (ctypes.c_char_p, (ctypes.c_int,)),
            "ggml_quantize_chunk": (
                ctypes.c_size_t,
                (ctypes.c_int, Pointer, Pointer, *(ctypes.c_int64,) * 3, Pointer),
            ),
            "ggml_backend_alloc_ctx_tensors_from_buft": (Pointer, (Pointer, Pointer)),
            "ggml_backend_buffer_free": (None, (Pointer,)),
            "ggml_backend_cpu_buffer_type": (Pointer, ()),
            "ggml_backend_tensor_set": (
                None,
                (Pointer, Pointer, ctypes.c_size_t, ctypes.c_size_t),
            ),
            "ggml_backend_graph_compute": (ctypes.c_int, (Pointer, Pointer)),
            "ggml_backend_get_device": (Pointer, (Pointer,)),
            "ggml_backend_dev_backend_reg": (Pointer, (Pointer,)),
            "ggml_backend_dev_supports_op": (ctypes.c_bool, (Pointer, Pointer)),
            "ggml_backend_reg_get_proc_address": (Pointer, (Pointer, ctypes.c_char_p)),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.base, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.cpu.ggml_backend_cpu_init.restype = Pointer
        self.backend = self.cpu.ggml_backend_cpu_init()
        self.cpu.ggml_backend_cpu_set_n_threads.argtypes = (Pointer, ctypes.c_int)
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.device = self.base.ggml_backend_get_device(self.backend)

    def extra_buffer_types(self) -> list[int]:
        """Buffer types whose matrices are rearranged when they are loaded."""
        registry = self.base.ggml_backend_dev_backend_reg(self.device)
        address = self.base.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if not address:
            return []
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(address)(self.device)
        found = []
        for i in range(16):
            if not listed or not listed[i]:
                break
            found.append(int(listed[i] or 0))
        return found


class Product:
    """A product of one matrix and tokens in ggml's memory."""

    def __init__(self, g: Ggml, kind: int, rows: int, cols: int, tokens: int) -> None:
        self.g, self.size = g, g.base.ggml_row_size(kind, cols)
        self.rows, self.cols, self.tokens, self.kind = rows, cols, tokens, kind
        self.weights = g.base.ggml_init(InitParams(1 << 16, None, True))
        self.rest = g.base.ggml_init(InitParams(1 << 20, None, True))
        self.w = g.base.ggml_new_tensor_2d(self.weights, kind, cols, rows)
        self.x = g.base.ggml_new_tensor_2d(self.rest, F32, cols, tokens)
        self.y = g.base.ggml_mul_mat(self.rest, self.w, self.x)
        self.graph = g.base.ggml_new_graph(self.rest)
        g.base.ggml_build_forward_expand(self.graph, self.y)
        self.buffers: list[int] = []

    def place(self, buffer_type: int) -> bool:
        """Allocates, the matrix in a buffer of that type; False if it does not support this."""
        base = self.g.base
        plain = base.ggml_backend_cpu_buffer_type()
        for context, kind in ((self.weights, buffer_type), (self.rest, plain)):
            buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
            if not buffer:
                return False
            self.buffers.append(buffer)
        return bool(base.ggml_backend_dev_supports_op(self.g.device, self.y))

    def fill(self, row_bytes: bytes, floats: Any) -> None:
        """Fills the matrix by repeating the bytes of ROWS rows, and the tokens from floats."""
        set_tensor = self.g.base.ggml_backend_tensor_set
        whole = row_bytes * (self.rows // ROWS + 1)
        # Set in one piece: only then are matrices rearranged.
        set_tensor(self.w, whole, 0, self.rows * self.size)
        set_tensor(self.x, floats, 0, 4 * self.tokens * self.cols)

    def compute(self) -> None:
        """Computes the product once."""
        status = self.g.base.ggml_backend_graph_compute(self.g.backend, self.graph)
        if status != 0:
            raise OSError(f"ggml: computing failed with status {status}")

    def close(self) -> None:
        """Frees the memory."""
        for buffer in self.buffers:
            self.g.base.ggml_backend_buffer_free(buffer)
        for context in (self.weights, self.rest):
            self.g.base.ggml_free(context)


def fastest(seconds: float, f: Callable[[], None]) -> float:
    """Seconds of the fastest call, measured like kernel_speed of stoker's core."""
    start = time.perf_counter()
    f()
    best = time.perf_counter() - start
    if best >= seconds:
        return best
    best, end = seconds, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        f()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def floats(n: int) -> Any:
    """n floats between -1 and 1."""
    values = (ctypes.c_float * n)()
    state = 1
    for i in range(min(n, 1 << 16)):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        values[i] = state / (1 << 30) - 1
    part = 4 * (1 << 16)
    for at in range(part, 4 * n, part):  # repeats the first part
        ctypes.memmove(ctypes.addressof(values) + at, values, min(part, 4 * n - at))
    return values


def quantized_rows(g: Ggml, kind: int, cols: int) -> bytes:
    """ROWS rows of that type."""
    size = g.base.ggml_row_size(kind, cols)
    if kind == F32:
        return bytes(floats(ROWS * cols))
    out = ctypes.create_string_buffer(ROWS * size)
    wrote = g.base.ggml_quantize_chunk(kind, floats(ROWS * cols), out, 0, ROWS, cols, None)
    if wrote != ROWS * size:
        raise OSError(f"ggml: {wrote} bytes of {ROWS * size} quantized")
    return out.raw


def measure(
    g: Ggml, *, type: int, rows: int, cols: int, tokens: int, seconds: float
) -> dict[str, Any]:
    """Carries out one command."""
    rows_bytes = quantized_rows(g, type, cols)
    x = floats(tokens * cols)
    found: dict[str, Any] = {"plain": None, "repacked": None}
    kinds = [("plain", g.base.ggml_backend_cpu_buffer_type())]
    kinds += [("repacked", kind) for kind in g.extra_buffer_types()]
    for name, kind in kinds:
        product = Product(g, type, rows, cols, tokens)
        try:
            if not product.place(kind):
                continue
            product.fill(rows_bytes, x)
            took = fastest(seconds, product.compute)
            found[name] = min(took, found[name] or took)
        finally:
            product.close()
    return found


def main() -> None:
    """Serves commands until standard input ends."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        print(json.dumps({"error": f"{sys.executable} has no llama-cpp-python"}), flush=True)
        sys.exit(1)
    from importlib.metadata import version

    folder = Path(spec.origin).parent / "lib"
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ggml prints is not a result
    try:
        g = Ggml(folder, int(sys.argv[1]))
    except (OSError, AttributeError) as error:
        print(json.dumps({"error": str(error)}), file=out, flush=True)
        sys.exit(1)
    hello = {"ggml": str(folder), "version": version("llama_cpp_python")}
    print(json.dumps(hello), file=out, flush=True)
    for line in sys.stdin:
        try:
            result = measure(g, **json.loads(line))
        except OSError as error:
            result = {"error": str(error)}
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
