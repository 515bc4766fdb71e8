"""Distance between two forms of a model on the same tokens.

A form is a GGUF or ONNX file, or a Hugging Face folder. One is loaded at a time: the first one's
logits wait in a temporary file, so that two models need no more memory than the larger of them.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..runtime.base.checked_call import checked
from ..runtime.base.errors import ModelFileError, OptionError
from ..runtime.base.progress import Progress
from ..runtime.divergence import Floats, divergence, token_nll

_SPEED_PROMPT, _SPEED_TOKENS = 16, 32
_BAD = 99  # the percentile of the divergence that is shown beside the mean


@dataclass(frozen=True)
class Form:
    """One of the two: its size on the disk, its result on the text, its decode speed.

    ppl: perplexity of the scored tokens. decode: greedy tokens a second, after a short prompt.
    """

    path: str
    kind: str
    nbytes: int
    ppl: float
    decode: float


@dataclass(frozen=True)
class Verification:
    """The distance of `b` from `a`.

    tokens: positions compared; n_vocab: logits compared at each. kl: mean divergence of b's
    next-token distribution from a's, nats; kl_99: its 99th percentile; top1: share of positions
    with the same most likely token; difference: largest absolute difference of a logit;
    same_tokens: whether b's own tokenizer cuts the text as a's does.
    """

    a: Form
    b: Form
    tokens: int
    n_vocab: int
    kl: float
    kl_99: float
    top1: float
    difference: float
    same_tokens: bool

    @property
    def ppl_ratio(self) -> float:
        """Perplexity of b over that of a."""
        return self.b.ppl / self.a.ppl


class _Loaded(Protocol):
    """The methods of a form that the comparison uses."""

    kind: str
    nbytes: int

    def encode(self, text: str) -> list[int]: ...
    def bos(self) -> int | None: ...
    def logits(self, tokens: Sequence[int]) -> Floats: ...
    def decode(self, prompt: Sequence[int], n: int) -> float: ...


class _Stoker:
    """A file that stoker runs, by its own engine or through a backend."""

    def __init__(self, path: Path, *, context: int, threads: int | None, precision: str) -> None:
        from ..runtime.load import load

        self.kind = path.suffix.removeprefix(".").upper() or "file"
        options: dict[str, Any] = {} if self.kind == "ONNX" else {"precision": precision}
        self._model = load(path, threads=threads, context=context, **options)
        if self.kind == "GGUF":
            from ..runtime._core import GgufFile

            self.nbytes = sum(os.path.getsize(shard) for shard in GgufFile(str(path)).shards)
        else:
            beside = (path.with_name(path.name + end) for end in (".data", "_data"))
            self.nbytes = sum(p.stat().st_size for p in (path, *beside) if p.exists())

    def encode(self, text: str) -> list[int]:
        return list(self._model.tokenizer.encode(text, add_special=False))

    def bos(self) -> int | None:
        tokenizer = self._model.tokenizer
        return tokenizer.bos_id if tokenizer.add_bos else None

    def logits(self, tokens: Sequence[int]) -> Floats:
        return self._model.logits(list(tokens))

    def decode(self, prompt: Sequence[int], n: int) -> float:
        generation = self._model.generate(
            list(prompt), max_tokens=n, temperature=0.0, ignore_eos=True
        )
        for _ in generation:
            pass
        return float(generation.stats.decode_tok_s)


class _HuggingFace:
    """A folder that transformers runs, in float32."""

    kind = "HF"

    def __init__(self, path: Path, *, threads: int | None) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise OptionError(
                f"{path}: comparing a Hugging Face folder needs {error.name}: "
                "pip install 'stoker[hf]'"
            ) from error
        if threads is not None:
            torch.set_num_threads(threads)
        self._torch = torch
        self.nbytes = sum(
            f.stat().st_size for f in path.iterdir() if f.suffix in (".safetensors", ".bin")
        )
        try:
            # Nothing is downloaded, and no code of the folder is run.
            self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, local_files_only=True
            )
            self._model = model.eval()
        except (OSError, ValueError, KeyError) as error:
            raise ModelFileError(f"{path}: {str(error).splitlines()[0]}") from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def bos(self) -> int | None:
        begun = self._tokenizer.encode("", add_special_tokens=True)
        bos = self._tokenizer.bos_token_id
        return bos if bos is not None and begun[:1] == [bos] else None

    def logits(self, tokens: Sequence[int]) -> Floats:
        with self._torch.no_grad():
            out = self._model(self._torch.tensor([list(tokens)])).logits[0]
        return np.ascontiguousarray(out.float().numpy())

    def decode(self, prompt: Sequence[int], n: int) -> float:
        torch = self._torch
        with torch.no_grad():
            out = self._model(torch.tensor([list(prompt)]), use_cache=True)
            start = time.perf_counter()
            for _ in range(n):
                best = out.logits[:, -1:].argmax(-1)
                out = self._model(best, past_key_values=out.past_key_values, use_cache=True)
        return n / (time.perf_counter() - start)


@checked
def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    text: str | None = None,
    tokens: int = 512,
    context: int = 256,
    precision: str = "high",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compares two forms of a model: GGUF and ONNX files, Hugging Face folders, names of models.

    text: both read it, cut by a's tokenizer; None: a few pages that come with stoker. The first
    `tokens` of it are compared in windows of `context` tokens, each begun with BOS where a's
    tokenizer does so; the logits after all of them count. precision: stoker's own engine's
    (LoadOptions). threads: None takes the default of each engine.
    progress: called with ("first model" or "second model", tokens done, of how many).

    Raises OptionError for texts or windows that are too short and for models whose vocabularies
    cannot be compared, and what loading raises.
    """
    if context < 2 or tokens < 2:
        raise OptionError(
            f"expected at least 2 tokens and a context of 2, found {tokens}, {context}"
        )
    if text is None:
        text = files("stoker.models").joinpath("prompt.txt").read_text(encoding="utf-8")
    paths = [_located(p) for p in (a, b)]
    with tempfile.TemporaryFile(prefix="stoker-verify-") as spool:
        with _loaded(paths[0], context, threads, precision) as first:
            ids = first.encode(text)
            if len(ids) < 2:
                raise OptionError(f"the text has {len(ids)} tokens; comparing needs at least 2")
            windows = _windows(ids[:tokens], context, first.bos())
            n_tokens = sum(map(len, windows))
            nll, n_a, done = _Mean(), 0, 0
            for window in windows:
                logits = _finite(first.logits(window), paths[0])
                n_a = logits.shape[1]
                spool.write(logits.tobytes())
                nll.add(token_nll(logits, window))
                done += len(window)
                if progress is not None:
                    progress("first model", done, n_tokens)
            form_a = _form(paths[0], first, nll, windows[0])
        spool.seek(0)
        with _loaded(paths[1], context, threads, precision) as second:
            same_tokens = second.encode(text) == ids
            nll, kl, top1, difference, n, done = _Mean(), [], _Mean(), 0.0, 0, 0
            for window in windows:
                theirs = np.frombuffer(spool.read(4 * n_a * len(window)), np.float32)
                theirs = theirs.reshape(len(window), n_a)
                ours = _finite(second.logits(window), paths[1])
                nll.add(token_nll(ours, window))
                n = _common(n_a, ours.shape[1], ids, same_tokens)
                theirs, ours = theirs[:, :n], ours[:, :n]
                difference = max(difference, float(np.abs(theirs - ours).max()))
                top1.add(theirs.argmax(1) == ours.argmax(1))
                kl.append(divergence(theirs, ours))
                done += len(window)
                if progress is not None:
                    progress("second model", done, n_tokens)
            form_b = _form(paths[1], second, nll, windows[0])
    every = np.concatenate(kl)
    return Verification(
        a=form_a,
        b=form_b,
        tokens=n_tokens,
        n_vocab=n,
        kl=float(every.mean()),
        kl_99=float(np.percentile(every, _BAD)),
        top1=top1.value,
        difference=difference,
        same_tokens=same_tokens,
    )


def _located(path: str | os.PathLike[str]) -> Path:
    from ..models.locate import locate

    return Path(path) if Path(path).exists() else locate(os.fspath(path), download=False)


@contextmanager
def _loaded(path: Path, context: int, threads: int | None, precision: str) -> Iterator[_Loaded]:
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelFileError(f"{path}: expected a Hugging Face folder, found no config.json")
        yield _HuggingFace(path, threads=threads)
    else:
        room = max(context, _SPEED_PROMPT + _SPEED_TOKENS)
        yield _Stoker(path, context=room, threads=threads, precision=precision)


def _windows(ids: list[int], context: int, bos: int | None) -> list[list[int]]:
    begin = [] if bos is None else [bos]
    step = context - len(begin)
    cut = [begin + ids[i : i + step] for i in range(0, len(ids), step)]
    return [w for w in cut if len(w) > 1]


class _Mean:
    """The mean of all values that were added."""

    def __init__(self) -> None:
        self._sum, self._n = 0.0, 0

    def add(self, values: npt.NDArray[Any]) -> None:
        self._sum += float(values.sum(dtype=np.float64))
        self._n += values.size

    @property
    def value(self) -> float:
        return self._sum / max(1, self._n)


def _common(n_a: int, n_b: int, ids: list[int], same_tokens: bool) -> int:
    """How many logits both have. Tables may be padded, but not those of two different models."""
    n = min(n_a, n_b)
    if n_a != n_b and (not same_tokens or max(ids) >= n):
        raise OptionError(
            f"expected two forms of one model, found vocabularies of {n_a} and {n_b} tokens"
        )
    return n


def _finite(logits: Floats, path: Path) -> Floats:
    if not np.isfinite(logits).all():
        raise ModelFileError(f"{path}: expected finite logits, found NaN or infinity")
    return logits


def _form(path: Path, loaded: _Loaded, nll: _Mean, window: list[int]) -> Form:
    speed = loaded.decode(window[:_SPEED_PROMPT], _SPEED_TOKENS)
    ppl = math.exp(min(nll.value, 700.0))
    return Form(str(path), loaded.kind, loaded.nbytes, ppl, speed)
