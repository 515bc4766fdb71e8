"""llama-cpp-python's C interface as far as stoker uses it, computed by stoker's own engine.

It "supports" one architecture that stoker does not, `lloma`, which is llama under another name.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stoker.runtime import _core

ABORTED = 2


class _Context:
    def __init__(self, model: Any, parameters: Any) -> None:
        self.n_ctx = parameters.n_ctx
        self.sequence = model.engine.sequence()
        self.tokens: list[int] = []
        self.hidden = False
        self.rows: list[Any] = []
        self.abort: Any = None


def _load(path: bytes, _: Any) -> Any:
    data = Path(path.decode()).read_bytes()
    if b"lloma" not in data:
        return None
    native = Path(path.decode() + ".native")
    native.write_bytes(data.replace(b"lloma", b"llama"))
    file = _core.GgufFile(str(native))
    engine = _core.Engine(file, threads=1, kv_type="f32", precision="high")
    return SimpleNamespace(engine=engine, nbytes=len(data))


def _decode(context: _Context, batch: Any) -> int:
    n = batch.n_tokens
    if context.abort and context.abort(None):
        return ABORTED
    positions, wanted = batch.pos[:n], batch.logits[:n]
    assert positions == list(range(len(context.tokens), len(context.tokens) + n))
    assert [batch.seq_id[i][0] for i in range(n)] == [0] * n
    tokens = np.array(batch.token[:n], np.int32)
    run = context.sequence.eval_hidden if context.hidden else context.sequence.eval_all
    found = np.ascontiguousarray(run(tokens))
    context.rows = [found[i] if wanted[i] else None for i in range(n)]
    context.tokens += tokens.tolist()
    return 0


def _row(context: _Context, i: int) -> Any:
    return context.rows[i].ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def _remove(context: _Context, sequence: int, begin: int, end: int) -> bool:
    assert (sequence, end) == (0, -1)
    context.sequence.truncate(begin)
    del context.tokens[begin:]
    return True


def _batch(n: int, _embeddings: int, _sequences: int) -> Any:
    lists = {name: [0] * n for name in ("token", "pos", "n_seq_id", "logits")}
    return SimpleNamespace(n_tokens=0, seq_id=[[None] for _ in range(n)], **lists)


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts the module in place of llama_cpp; the returned list records what is freed."""
    from stoker.runtime.backends import llama_cpp as backend

    freed: list[str] = []
    module = ModuleType("llama_cpp")
    module.__spec__ = ModuleSpec("llama_cpp", None)
    fields: dict[str, Any] = {
        "llama_backend_init": lambda: None,
        "llama_log_set": lambda callback, data: None,
        "llama_model_default_params": lambda: SimpleNamespace(n_gpu_layers=-1),
        "llama_model_load_from_file": _load,
        "llama_model_free": lambda model: freed.append("model"),
        "llama_model_get_vocab": lambda model: model,
        "llama_vocab_n_tokens": lambda model: model.engine.config["n_vocab"],
        "llama_model_n_embd": lambda model: model.engine.config["n_embd"],
        "llama_model_n_ctx_train": lambda model: model.engine.config["context_train"],
        "llama_model_n_layer": lambda model: model.engine.config["n_layer"],
        "llama_model_n_head": lambda model: model.engine.config["n_head"],
        "llama_model_n_head_kv": lambda model: model.engine.config["n_head_kv"],
        "llama_model_size": lambda model: model.nbytes,
        "llama_context_default_params": SimpleNamespace,
        "llama_init_from_model": _Context,
        "llama_batch_init": _batch,
        "llama_batch_free": lambda batch: freed.append("batch"),
        "llama_free": lambda context: freed.append("context"),
        "llama_set_abort_callback": lambda c, callback, data: setattr(c, "abort", callback),
        "llama_set_embeddings": lambda c, on: setattr(c, "hidden", on),
        "llama_decode": _decode,
        "llama_get_logits_ith": _row,
        "llama_get_embeddings_ith": _row,
        "llama_get_memory": lambda context: context,
        "llama_memory_seq_rm": _remove,
    }
    for name, value in fields.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    backend._library.cache_clear()
    monkeypatch.setattr(backend, "_library", lambda: module)
    return freed
