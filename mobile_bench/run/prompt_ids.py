"""The prompts of all measurements: a public-domain text in the model's own tokens."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime.base.errors import StokerError
from .worker_process import WorkerError, WorkerProcess

if TYPE_CHECKING:
    from ...runtime._core import GgufFile

_TEXT = Path(__file__).parents[2] / "models" / "prompt.txt"


class PromptError(Exception):
    """There is no such prompt: one line that says why."""


def text_of(n: int) -> str:
    """The text, repeated until n tokens can be cut from it (of at most 16 letters each)."""
    text = _TEXT.read_text(encoding="utf-8")
    return text * (1 + 16 * n // len(text))


@lru_cache(maxsize=8)
def prompt_ids(model: Path, n: int) -> tuple[int, ...]:
    """The first n tokens of the text. Raises PromptError, ModelFileError.

    A model without a tokenizer that stoker knows gets numbers that are spread over its vocabulary:
    what they cost does not depend on what they mean.
    """
    if model.suffix.lower() == ".onnx":
        ids = _of_onnx(model, n)
    else:
        from ...runtime._core import GgufFile
        from ...runtime.text.tokenizer import Tokenizer

        file = GgufFile(str(model))
        try:
            ids = Tokenizer.from_metadata(file.get).encode(text_of(n))
        except StokerError:
            ids = _spread(_vocabulary(model, file), n)
    if len(ids) < n:
        raise PromptError(f"{model.name}: the text has {len(ids)} tokens, {n} are needed")
    return tuple(ids[:n])


def _of_onnx(model: Path, n: int) -> list[int]:
    """Tokens from a separate process: the graph is large, and this process measures."""
    with WorkerProcess("onnx", model, threads=1, context=1) as worker:
        n_vocab = int(worker.ask("load")["config"]["n_vocab"])
        try:
            found: list[int] = worker.ask("encode", text=text_of(n), n=n)["tokens"]
            return found
        except WorkerError:
            return _spread(n_vocab, n)


def _vocabulary(model: Path, file: GgufFile) -> int:
    """Vocabulary size of a model whose tokenizer is unknown."""
    for tensor in file.tensors:
        if tensor.name == "token_embd.weight":
            return tensor.shape[1]
    raise PromptError(f"{model.name}: expected a tokenizer or token_embd.weight")


def _spread(n_vocab: int, n: int) -> list[int]:
    return [(i * 2654435761 >> 7) % n_vocab for i in range(1, n + 1)]
