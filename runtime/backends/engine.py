"""Protocols that the API needs: an engine, its sequences, a file and a loaded model.

_core.Engine, _core.Sequence and _core.GgufFile implement them; so do the other backends' classes
(sequence.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ...offload.trace.record import RoutingRecorder
    from .. import _core
    from ..text.chat import ChatTemplate
    from ..text.conversation import Message
    from ..text.tokenizer import Tokenizer

    Ids = Sequence[int] | npt.NDArray[np.int32]
    Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]
    Floats = npt.NDArray[np.float32]


class EngineSequence(Protocol):
    """One sequence on an engine; _core.pyi documents the methods."""

    @property
    def position(self) -> int:
        """Number of evaluated tokens."""

    @property
    def context(self) -> int:
        """Number of tokens that it can hold."""

    @property
    def stats(self) -> Mapping[str, Any]:
        """Bytes, seconds and tokens so far; experts, stream: counters, or None."""

    def eval(self, tokens: Ids, phase: str = "prompt") -> None:
        """Appends tokens; phase: prompt or decode."""

    def decode(self, token: int, sampler: _core.Sampler) -> int:
        """Appends a token that was chosen; chooses the next."""

    def eval_all(self, tokens: Ids) -> Floats:
        """Appends tokens; returns the logits after each."""

    def eval_nll(self, tokens: Ids) -> npt.NDArray[np.float64]:
        """Appends tokens; returns the negative log-likelihood of each."""

    def eval_hidden(self, tokens: Ids) -> Floats:
        """Appends tokens; returns their final hidden states."""

    def logits(self) -> Floats:
        """Returns the logits after the last token."""

    def sample(self, sampler: _core.Sampler) -> int:
        """Chooses a token from the logits."""

    def truncate(self, position: int) -> None:
        """Forgets everything from `position` on, or all of it; `position` tells."""

    def fork(self) -> EngineSequence:
        """Returns one that holds the same. Raises UnsupportedModelError on another backend."""

    def cancel(self) -> None:
        """Ends an evaluation; any thread may call it."""

    def forget_cancel(self) -> None:
        """Takes back a cancel() that came too late."""


class Engine(Protocol):
    """A loaded model's weights, configuration and plan."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Architecture and sizes."""

    @property
    def plan(self) -> Mapping[str, Any]:
        """The use of memory."""

    @property
    def offload(self) -> Mapping[str, Any] | None:
        """Counters of the expert cache."""

    @property
    def stream(self) -> Mapping[str, Any] | None:
        """Counters of streamed weights."""

    @property
    def survives_fork(self) -> bool:
        """Whether it works in a process that is forked after the load."""

    def sequence(self) -> EngineSequence:
        """Makes a new, empty sequence."""


class ModelFile(Protocol):
    """The metadata of a model, and its tensors if it is a GGUF file."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """All metadata."""

    @property
    def tensors(self) -> Sequence[_core.TensorInfo]:
        """The directory of tensors."""

    def get(self, key: str) -> Any:
        """Returns the value of a key, None if absent."""


class LoadedModel(Protocol):
    """The part of `Model` that sessions, recordings and exports need."""

    path: Path
    _recorder: RoutingRecorder | None
    _memory_bandwidth: float

    @property
    def name(self) -> str:
        """The model's name for display."""

    @property
    def plan(self) -> Mapping[str, Any]:
        """The use of memory."""

    @property
    def offload(self) -> Mapping[str, Any] | None:
        """Counters of the expert cache."""

    @property
    def stream(self) -> Mapping[str, Any] | None:
        """Counters of streamed weights."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Architecture and sizes."""

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file."""

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template of the file, None if there is none."""

    @property
    def memory_bandwidth(self) -> float:
        """Bytes a second; 0 if it was not measured."""

    @property
    def flash_bandwidth(self) -> float:
        """Bytes a second; 0 if nothing is read."""

    @property
    def engine(self) -> _core.Engine:
        """The native engine. Raises UnsupportedModelError on another backend."""

    @property
    def file(self) -> _core.GgufFile:
        """The GGUF file. Raises UnsupportedModelError if the model is not one."""

    @property
    def _engine(self) -> Engine: ...
    @property
    def _file(self) -> ModelFile: ...
    @property
    def _never_chosen(self) -> Mapping[int, float]: ...
    def _check_process(self) -> None: ...
    def _require_causal(self, what: str) -> None: ...
    def _encode(
        self, text: str | Tokens, *, add_special: bool, parse_special: bool
    ) -> list[int]: ...
    def _prompt(
        self, messages: Sequence[Message], **given: Any
    ) -> tuple[list[int], str | None]: ...
    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]: ...
