"""Importance matrices of a model: mean squares of its matrices' inputs on a text."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from ..runtime.base.checked_call import checked
from ..runtime.base.errors import ModelFileError, OptionError
from ..runtime.base.progress import Progress
from ..runtime.files.output_file import check_output
from .writer.imatrix_file import Entry, Imatrix


@checked
def collect(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    text: str,
    *,
    name: str = "text",
    chunk: int = 512,
    max_chunks: int | None = None,
    memory: str | int = "auto",
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Imatrix, float]:
    """Measures the inputs of every matrix of a model on a text, and writes the file.

    chunk: tokens that see each other; each chunk begins with the model's BOS token if it has
    one; a rest shorter than a chunk is left out (a text shorter than one is one chunk). name: the
    text's name, noted in the file. memory: budget of the model while it runs. The output matrix
    counts all tokens. Returns the matrix and the text's perplexity. progress: called with "text",
    chunks done, chunks in all.
    Raises OptionError, ModelFileError, UnsupportedModelError, DeviceError.
    """
    from ..runtime._core import ActivationSums
    from ..runtime.model import Model
    from ..runtime.options import LoadOptions

    path = Path(source)
    check_output(Path(out), [path] if path.exists() else [], force=force)
    if chunk < 2:
        raise OptionError(f"chunk: expected at least 2 tokens, found {chunk}")
    if max_chunks is not None and max_chunks < 1:
        raise OptionError(f"chunks: expected at least 1, found {max_chunks}")
    model = Model(
        path, LoadOptions(threads=threads, context=chunk, precision="high", memory=memory)
    )
    tokens = np.array(model.tokenizer.encode(text, add_special=True), dtype=np.int32)
    if len(tokens) < 2:
        raise OptionError(f"text: expected at least 2 tokens, found {len(tokens)}")
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    begins = list(range(0, len(tokens) - chunk + 1, chunk)) or [0]
    begins = begins[:max_chunks]
    sequence = model.engine.sequence()
    sums = ActivationSums(model.engine)
    total, count = 0.0, 0
    for done, begin in enumerate(begins, 1):
        window = tokens[begin : begin + chunk].copy()
        if bos is not None:
            window[0] = bos
        sequence.truncate(0)
        nll = sums.eval(sequence, window)
        total, count = total + float(nll.sum()), count + len(nll)
        if progress is not None:
            progress("text", done, len(begins))
    entries = {
        tensor: Entry(squares.astype(np.float32), counts.astype(np.float32))
        for tensor, (squares, counts) in sums.tensors.items()
        if counts.any()
    }
    found = Imatrix(entries, [name], len(begins), min(chunk, len(tokens)), os.fspath(out))
    for tensor, entry in entries.items():
        if not np.isfinite(entry.sums).all():
            raise ModelFileError(f"{path}: tensor {tensor}: the model computes values not finite")
    found.write(out, force=force)
    return found, math.exp(min(total / max(count, 1), 700.0))
