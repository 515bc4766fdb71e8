"""The cost of a bit allocation: KL and NLL of its file against the source, by the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...runtime.base.errors import BudgetError, OptionError
from ...runtime.divergence import Floats, divergence, token_nll
from ...runtime.files.json_text import parse

_BUDGET = "1GiB"  # memory of the models that are measured, if they need no more

Window = Sequence[int]


class Measurement(NamedTuple):
    """On one text: mean KL divergence from the source, mean -ln p of the text's tokens; nats."""

    kl: float
    nll: float


@dataclass(frozen=True)
class Texts:
    """Windows of token ids: some for the search, others for the report."""

    search: Sequence[Window]
    report: Sequence[Window]


def cut_text(source: Path, text: str, *, tokens: int, window: int) -> Texts:
    """Takes the first `tokens` of the text for the search, the next for the report.

    A shorter text is halved. Raises OptionError if it has fewer than two windows.
    """
    from ...runtime._core import GgufFile
    from ...runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_metadata(GgufFile(str(source)).get)
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    step = window - len(begin)
    windows = [begin + list(ids[i : i + step]) for i in range(0, len(ids) - step + 1, step)]
    n = min(max(1, tokens // window), len(windows) // 2)
    if n < 1:
        raise OptionError(f"text: expected at least {2 * step} tokens, found {len(ids)}")
    return Texts(windows[:n], windows[n : 2 * n])


class Judge:
    """Measures model files against the source, whose logits it keeps (float32)."""

    def __init__(
        self, source: Path, texts: Texts, *, memory: str | int | None, threads: int | None
    ) -> None:
        """memory: budget of the engine, None: 1 GiB, or more if the model needs it."""
        self._memory, self._threads = memory, threads
        self._context = max(len(w) for w in (*texts.search, *texts.report))
        self._journal: Path | None = None
        self._known: dict[str, Measurement] = {}
        self._texts: dict[str, Sequence[tuple[Window, Floats]]] = {}
        self.source: dict[str, Measurement] = {}
        with self._logits_of(source) as logits:
            for name, windows in (("search", texts.search), ("report", texts.report)):
                seen = [(window, logits(window)) for window in windows]
                self._texts[name] = seen
                nll = np.concatenate([token_nll(x, window) for window, x in seen])
                self.source[name] = Measurement(0.0, float(nll.mean()))

    @contextmanager
    def _logits_of(self, path: Path) -> Iterator[Callable[[Window], Floats]]:
        from ...runtime.model import Model
        from ...runtime.options import LoadOptions

        def load(memory: str | int) -> Model:
            options = LoadOptions(threads=self._threads, context=self._context, memory=memory)
            return Model(path, options)

        try:
            model = load(_BUDGET if self._memory is None else self._memory)
        except BudgetError:
            if self._memory is not None:
                raise
            model = load("auto")
        yield lambda window: model.logits(list(window))

    def resume(self, journal: Path, recipe: str) -> None:
        """Reads what an earlier call measured for the same recipe, and appends what comes."""
        self._journal = journal
        lines = []
        with suppress(OSError, ValueError):
            lines = [parse(line) for line in journal.read_text().splitlines()]
        if lines and lines[0] == recipe:
            self._known = {key: Measurement(*numbers) for key, *numbers in lines[1:]}
        else:
            journal.write_text(json.dumps(recipe) + "\n")

    def known(self, key: str, text: str) -> Measurement | None:
        """The measurement under this key, None if there is none."""
        return self._known.get(f"{text} {key}")

    def measure(self, key: str, path: Path, text: str) -> Measurement:
        """KL and NLL of a model file on the text for the "search" or the "report"."""
        kl, nll = [], []
        with self._logits_of(path) as logits:
            for window, theirs in self._texts[text]:
                ours = logits(window)
                kl.append(divergence(theirs, ours))
                nll.append(token_nll(ours, window))
        found = Measurement(
            float(np.concatenate(kl).mean(dtype=np.float64)),
            float(np.concatenate(nll).mean(dtype=np.float64)),
        )
        self._known[f"{text} {key}"] = found
        if self._journal is not None:
            with open(self._journal, "a") as file:
                file.write(json.dumps([f"{text} {key}", *found]) + "\n")
        return found
