"""Backend for GGUF models on llama.cpp, for architectures and types that the native engine lacks.

It uses llama-cpp-python's binding of the C interface: one model, one context for each session.
Tokenizer, chat template and sampling stay stoker's own.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import Cancelled, DeviceError, UnsupportedModelError
from ..options import LoadOptions
from .engine import ModelFile
from .sequence import Array, BackendEngine, BackendSequence, Ids, Wanted, default_plan

_DEFAULT_CONTEXT = 4096
_BATCH = 512  # tokens of one evaluation at most
_TYPES = {"f32": 0, "f16": 1}  # types of the KV cache: ggml's ids
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG(lambda _level, _text, _data: None)
_ABORTED = 2  # llama_decode's result if the abort callback said so


@lru_cache(maxsize=1)
def _library() -> Any:
    """Imports llama-cpp-python; its log lines are dropped from now on."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    return llama_cpp


class LlamaCppEngine(BackendEngine):
    """llama.cpp's model, shared by its sequences."""

    def __init__(self, path: Path, file: ModelFile, options: LoadOptions) -> None:
        from .._core import cpu

        self.api = _library()
        self.path = path
        parameters = self.api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = self.api.llama_model_load_from_file(os.fsencode(path), parameters)
        arch = file.get("general.architecture")
        if not self.model:
            raise UnsupportedModelError(
                f"{path}: architecture {arch}: neither the native engine nor llama.cpp loads it"
            )
        weakref.finalize(self, self.api.llama_model_free, self.model)
        vocabulary = self.api.llama_model_get_vocab(self.model)
        self.n_vocab = int(self.api.llama_vocab_n_tokens(vocabulary))
        self.n_embd = int(self.api.llama_model_n_embd(self.model))
        trained = int(self.api.llama_model_n_ctx_train(self.model)) or _DEFAULT_CONTEXT
        self.context = min(trained, options.context or _DEFAULT_CONTEXT)
        self.kv_type = options.kv_type
        self.threads = options.threads or int(cpu()["physical"])
        self.weight_bytes = int(self.api.llama_model_size(self.model))
        self.config = {
            "architecture": arch,
            "name": file.get("general.name") or path.stem,
            "n_layer": int(self.api.llama_model_n_layer(self.model)),
            "n_embd": self.n_embd,
            "n_vocab": self.n_vocab,
            "n_head": int(self.api.llama_model_n_head(self.model)),
            "n_head_kv": int(self.api.llama_model_n_head_kv(self.model)),
            "n_expert": int(file.get(f"{arch}.expert_count") or 0),
            "context_train": trained,
            "context": self.context,
        }
        self.plan = default_plan(
            threads=self.threads,
            context=self.context,
            weight_bytes=self.weight_bytes,
            kv_bytes=0,  # only llama.cpp knows the size
            token_bytes=self.weight_bytes,
            kv_type=self.kv_type,
            isa="llama.cpp",
        )

    def sequence(self) -> LlamaCppSequence:
        """Makes a new, empty sequence."""
        return LlamaCppSequence(self)


class LlamaCppSequence(BackendSequence):
    """One context of llama.cpp: its KV cache and position."""

    def __init__(self, engine: LlamaCppEngine) -> None:
        super().__init__(engine.context, engine.n_vocab, engine.weight_bytes)
        self._engine = engine  # also keeps the model alive
        self._chunk = min(self._chunk, _BATCH)
        self._long_chunk = _BATCH
        api = engine.api
        parameters = api.llama_context_default_params()
        parameters.n_ctx = engine.context
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.n_threads = parameters.n_threads_batch = engine.threads
        parameters.type_k = parameters.type_v = _TYPES[engine.kv_type]
        self._context = api.llama_init_from_model(engine.model, parameters)
        if not self._context:
            raise DeviceError(
                f"{engine.path}: llama.cpp has no memory for a context of {engine.context} tokens"
            )
        self._batch = api.llama_batch_init(_BATCH, 0, 1)
        cancelled = self._cancelled
        kind = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
        self._abort = kind(lambda _: cancelled.is_set())  # lives as long as the context
        api.llama_set_abort_callback(self._context, self._abort, None)
        weakref.finalize(self, _free, api, self._context, self._batch, self._abort, engine)

    def _forward(self, ids: Ids, wanted: Wanted) -> Array:
        e, api, batch = self._engine, self._engine.api, self._batch
        n = len(ids)
        batch.n_tokens = n
        for i, token in enumerate(ids.tolist()):
            batch.token[i] = token
            batch.pos[i] = self.position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = wanted != "last" or i == n - 1
        hidden = wanted == "hidden"
        api.llama_set_embeddings(self._context, hidden)
        code = api.llama_decode(self._context, batch)
        if code != 0:
            self._forget(self.position)
            if code == _ABORTED or self._cancelled.is_set():
                raise Cancelled("cancelled")
            raise DeviceError(f"{e.path}: llama.cpp failed to evaluate {n} tokens (code {code})")
        rows = range(n) if wanted != "last" else [n - 1]
        read = api.llama_get_embeddings_ith if hidden else api.llama_get_logits_ith
        width = e.n_embd if hidden else e.n_vocab
        out = np.empty((len(rows), width), np.float32)
        for at, i in enumerate(rows):
            out[at] = np.ctypeslib.as_array(read(self._context, i), shape=(width,))
        return out

    def _forget(self, position: int) -> None:
        api = self._engine.api
        memory = api.llama_get_memory(self._context)
        if not api.llama_memory_seq_rm(memory, 0, position, -1):
            raise UnsupportedModelError(
                f"{self._engine.path}: this architecture's memory cannot be cut at a position: "
                "begin a new session"
            )


def _free(api: Any, context: Any, batch: Any, *kept: Any) -> None:
    """Frees a context; `kept` holds objects that must live until then."""
    api.llama_batch_free(batch)
    api.llama_free(context)
