"""Base classes of backends: a sequence on top of a cache that tokens are appended to."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ..base.errors import (
    Cancelled,
    ContextLengthError,
    OptionError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from .._core import Sampler

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Wanted = Literal["last", "all", "hidden"]

_LOGITS_BYTES = 32 << 20  # bytes of one evaluation's logits, which bound the tokens of a chunk


class BackendSequence(ABC):
    """One sequence: the same methods as _core.Sequence. Two threads must not use it at once."""

    def __init__(self, context: int, n_vocab: int, token_bytes: int) -> None:
        """Starts empty; context: tokens it holds; token_bytes: weight bytes that a token reads."""
        self.context = context
        self.position = 0  # tokens evaluated
        self._n_vocab = n_vocab
        self._token_bytes = token_bytes
        self._chunk = max(16, min(512, _LOGITS_BYTES // (4 * max(1, n_vocab))))
        self._long_chunk = self._chunk  # tokens of a chunk if not all logits are wanted
        self._last: Array | None = None
        self._cancelled = threading.Event()
        self._decode_tokens = self._decode_bytes = 0
        self._in_use = threading.Lock()

    # A backend implements the methods below.

    @abstractmethod
    def _forward(self, ids: Ids, wanted: Wanted) -> Array:
        """Appends ids [n] at `position` (which the caller moves).

        Returns logits [n or 1, n_vocab] of all or the last, or final hidden states [n, n_embd].
        """

    @abstractmethod
    def _forget(self, position: int) -> None:
        """Drops what the cache holds from `position` on."""

    def _interrupt(self) -> None:  # noqa: B027
        """Ends a running `_forward` early, if the backend can; called from another thread."""

    def _kv_bytes(self) -> int:
        """Returns the bytes of the cache that one step reads."""
        return 0

    # The methods below are those of _core.Sequence.

    def eval(self, tokens: Sequence[int] | Ids, phase: str = "prompt") -> None:
        """Appends tokens (n >= 1); afterwards logits() are those after the last one."""
        pieces = self._evaluate(tokens, "last", decode=phase == "decode")
        self._last = pieces[-1][-1]

    def decode(self, token: int, sampler: Sampler) -> int:
        """Appends a token that was chosen; chooses the next."""
        self.eval([token], "decode")
        return self.sample(sampler)

    def eval_all(self, tokens: Sequence[int] | Ids) -> Array:
        """Appends tokens; returns the logits after each, [n, n_vocab]."""
        return self._joined(self._evaluate(tokens, "all"))

    def eval_nll(self, tokens: Sequence[int] | Ids) -> npt.NDArray[np.float64]:
        """Appends n tokens; returns -log p(tokens[i + 1] | ...) for i < n - 1, [n - 1], in nats."""
        ids = np.asarray(tokens, np.int32)
        nll, at = np.empty(max(len(ids) - 1, 0)), 0
        for begin in range(0, len(ids), self._chunk):
            logits = self.eval_all(ids[begin : begin + self._chunk])
            following = ids[begin + 1 : begin + 1 + len(logits)]
            part = logits[: len(following)].astype(np.float64)
            part -= part.max(axis=-1, keepdims=True)
            chosen = part[np.arange(len(following)), following]
            nll[at : at + len(following)] = np.log(np.exp(part).sum(axis=-1)) - chosen
            at += len(following)
        return nll

    def eval_hidden(self, tokens: Sequence[int] | Ids) -> Array:
        """Appends tokens; returns the final-norm hidden state of each, [n, n_embd]."""
        return self._joined(self._evaluate(tokens, "hidden"))

    def logits(self) -> Array:
        """Returns a copy of the logits after the last token, [n_vocab]."""
        if self._last is None:
            raise OptionError("there are no logits: evaluate a token first")
        copied: Array = self._last.copy()
        return copied

    def sample(self, sampler: Sampler) -> int:
        """Chooses a token from the logits."""
        if self._last is None:
            raise OptionError("there are no logits: evaluate a token first")
        return sampler.sample(self._last)

    def step(self, sampler: Sampler) -> int:
        """Calls sample(), then eval() of the token."""
        token = self.sample(sampler)
        self.eval([token], "decode")
        return token

    def truncate(self, position: int) -> None:
        """Drops everything from `position` on."""
        if not 0 <= position <= self.position:
            raise OptionError(f"position must be between 0 and {self.position}, not {position}")
        if position < self.position:
            self._forget(position)
            self.position = position
        self._last = None

    def fork(self) -> Any:
        """Raises UnsupportedModelError: their caches are not ours to copy."""
        raise UnsupportedModelError("fork: expected a GGUF model in stoker's own engine")

    def cancel(self) -> None:
        """Makes the running evaluation raise Cancelled; any thread may call it."""
        if self._in_use.locked():
            self._cancelled.set()
            self._interrupt()

    def forget_cancel(self) -> None:
        """Takes back a cancel() that came too late to meet an evaluation."""
        self._cancelled.clear()

    @property
    def stats(self) -> dict[str, Any]:
        """decode_bytes: weights and cache read by the steps of decode_tokens."""
        return {
            "decode_tokens": self._decode_tokens,
            "decode_bytes": self._decode_bytes,
            "experts": None,
            "stream": None,
        }

    # The methods below are private.

    def _evaluate(
        self, tokens: Sequence[int] | Ids, wanted: Wanted, *, decode: bool = False
    ) -> list[Array]:
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        if ids.ndim != 1 or not len(ids):
            raise OptionError("there are no tokens to evaluate")
        if int(ids.min()) < 0 or int(ids.max()) >= self._n_vocab:
            raise OptionError(f"tokens must be between 0 and {self._n_vocab - 1}")
        if self.position + len(ids) > self.context:
            raise ContextLengthError(
                f"{self.position + len(ids)} tokens do not fit a context of {self.context}"
            )
        if not self._in_use.acquire(blocking=False):
            raise OptionError("this sequence is in use by another thread")
        try:
            self._cancelled.clear()
            pieces: list[Array] = []
            step = self._chunk if wanted == "all" else self._long_chunk
            for begin in range(0, len(ids), step):
                if self._cancelled.is_set():
                    raise Cancelled("cancelled")
                piece = ids[begin : begin + step]
                found = self._forward(piece, wanted)
                if decode:
                    self._decode_tokens += len(piece)
                    self._decode_bytes += self._token_bytes + self._kv_bytes()
                self.position += len(piece)
                self._last = found[-1] if wanted != "hidden" else None
                if wanted == "last":
                    pieces.clear()
                pieces.append(found)
            return pieces
        finally:
            self._in_use.release()

    @staticmethod
    def _joined(pieces: list[Array]) -> Array:
        joined: Array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return joined


class BackendEngine(ABC):
    """The part of an engine that `Model` needs. config and plan: the keys of _core.Engine's."""

    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    offload: Mapping[str, Any] | None = None
    stream: Mapping[str, Any] | None = None
    survives_fork = False  # the libraries have threads of their own

    @abstractmethod
    def sequence(self) -> BackendSequence:
        """Makes a new, empty sequence."""


class Metadata:
    """GGUF metadata without tensors, with GgufFile's interface."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.metadata = values
        self.tensors: list[Any] = []

    def get(self, key: str) -> Any:
        """Returns the value of a key, None if absent."""
        return self.metadata.get(key)


def default_plan(
    *,
    threads: int,
    context: int,
    weight_bytes: int,
    kv_bytes: int,
    token_bytes: int,
    kv_type: str,
    isa: str,
) -> dict[str, Any]:
    """Returns the plan of a backend that keeps all weights in memory; sizes in bytes."""
    return {
        "isa": isa,
        "threads": threads,
        "context": context,
        "chunk": 0,
        "kv_type": kv_type,
        "weight_bytes": weight_bytes,
        "kinds": {"weights": weight_bytes},
        "kv_bytes": kv_bytes,
        "scratch_bytes": 0,
        "token_bytes": token_bytes,
    }
