"""Writing of model files larger than memory: piece by piece, resumable, atomic.

One thread makes the pieces (reads, quantizes), another writes them; a third may read the next
ones (`read_ahead`); if the system refuses these threads, the first does all. Every 128 MB the
part is flushed to the disk and its journal records the progress, so that a call that was killed
goes on from there and gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ...runtime.base.errors import Cancelled, OptionError, StokerError
from ...runtime.base.progress import Progress
from ...runtime.base.side_thread import SideThread
from ...runtime.files.output_file import check_output
from . import gguf_writer
from .gguf_writer import PartFile, Tensor

COMMIT_BYTES = 128 << 20  # written between two records of the progress
PIECE_VALUES = 8 << 20  # weights of one piece: 32 MiB as float32

Buffer = bytes | memoryview | npt.NDArray[Any]
# (tensor, start) -> the tensor's bytes from byte `start` on, piece by piece; start is 0 or the end
# of a piece that an earlier call has yielded. How the bytes are cut into pieces does not matter.
Source = Callable[[Tensor, int], Iterator[Buffer]]

_T = TypeVar("_T")


class Piece(NamedTuple):
    """Bytes for an offset of the file, and the journal's record once they are on the disk."""

    offset: int
    data: Buffer
    done: int


def resumable_part(out: str | os.PathLike[str]) -> Path | None:
    """The part that an interrupted writing of `out` has left, None if there is none."""
    path = Path(out)
    part = path.with_name(f".{path.name}.part")
    return part if part.exists() else None


@contextmanager
def making(out: Path, size: int, recipe: str) -> Iterator[PartFile]:
    """The part of a file of `size` bytes; it takes its name when the block ends without an error.

    recipe: a digest of all that decides the bytes. An interruption keeps what is on the disk for
    the same call to go on from; an error of stoker's (bad input, full disk) leaves nothing. A
    second process that makes the same file is refused (OptionError).
    """
    with _locked(out):
        part = PartFile(out, size, recipe)
        try:
            yield part
            part.finish()
        except BaseException as error:
            part.close()
            if isinstance(error, StokerError) and not isinstance(error, Cancelled):
                part.discard()
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    from ...models.cache import locked

    def busy() -> None:
        raise OptionError(f"{path}: another process is making this file")

    lock = path.with_name(f".{path.name}.lock")
    with locked(lock, busy):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def write_pieces(
    part: PartFile,
    pieces: Iterator[Piece],
    *,
    commit_bytes: int = COMMIT_BYTES,
    taken: Callable[[int], None] | None = None,
) -> None:
    """Writes pieces in a thread of its own while the next ones are made; commits as it goes.

    At most three pieces exist at once beside the one being made. taken: called with the bytes
    of each piece after it was handed to the writer; what was handed over is written even if
    `taken` or `pieces` raises; `pieces` is closed in any case.
    """
    pending: list[Future[None]] = []
    uncommitted, last = 0, part.done
    with _closed(pieces), SideThread("stoker-write") as writer:
        try:
            for piece in pieces:
                n = _view(piece.data).nbytes
                uncommitted += n
                commit = uncommitted >= commit_bytes
                pending.append(writer.submit(_write, part, piece, commit))
                uncommitted = 0 if commit else uncommitted
                last = piece.done
                while len(pending) > 2:  # bounds the memory
                    pending.pop(0).result()
                del piece
                if taken is not None:
                    taken(n)
        finally:
            for future in pending:
                future.result()
    if last != part.done:
        part.commit(last)


@contextmanager
def _closed(iterator: Iterator[Any]) -> Iterator[None]:
    """Closes a generator at the block's end, in this thread.

    A generator that reads ahead waits for its thread when it is closed. The garbage collector might
    close it anywhere, also where the thread that is waited for cannot go on.
    """
    try:
        yield
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


def _write(part: PartFile, piece: Piece, commit: bool) -> None:
    part.write(piece.offset, _view(piece.data))
    if commit:
        part.commit(piece.done)


def _view(data: Any) -> memoryview:
    """A buffer as bytes. (Typed as Any: typing has no name for buffers before Python 3.12.)"""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def write_model(
    out: str | os.PathLike[str],
    metadata: Mapping[str, bytes],
    tensors: Sequence[Tensor],
    source: Source,
    *,
    recipe: str,
    inputs: Iterable[str | os.PathLike[str]] = (),
    force: bool = False,
    progress: Progress | None = None,
    what: str = "tensors",
) -> int:
    """Writes a GGUF file; returns its bytes.

    metadata: encoded values (gguf_writer). tensors: the directory; the data lie in its order.
    source: yields the bytes of a tensor in pieces of some 16 to 64 MB (`Source`). recipe: text or
    a digest of all that decides the bytes beside metadata and tensors: the input and its time of
    change, the options. inputs: files that `out` must not be. progress: called with `what`, bytes
    of tensors done, and in all.

    The file appears under its name only when it is complete. An interrupted call leaves a hidden
    part beside it, and the same call takes it up again and gives the same bytes.
    Raises OptionError, DeviceError if the disk is full, and what `source` raises.
    """
    path = Path(out)
    check_output(path, inputs, force=force)
    layout = gguf_writer.layout(metadata, tensors)
    digest = hashlib.sha256(layout.header)
    digest.update(recipe.encode())
    total = sum(t.nbytes for t in tensors)

    def pieces(done: int) -> Iterator[Piece]:
        """Yields all pieces from byte `done` of the file on."""
        for tensor in tensors:
            begin = layout.offsets[tensor.name]
            at, end = max(begin, done), begin + tensor.nbytes
            if at >= end:
                continue
            cut = source(tensor, at - begin)
            with _closed(cut):
                for data in cut:
                    n = _view(data).nbytes
                    if at + n > end:
                        raise ValueError(f"{tensor.name}: expected {tensor.nbytes} bytes, got more")
                    yield Piece(at, data, at + n)
                    at += n
            if at != end:
                raise ValueError(
                    f"{tensor.name}: expected {tensor.nbytes} bytes, got {end - at} fewer"
                )

    with making(path, layout.size, digest.hexdigest()) as part:
        if part.done == 0:
            part.write(0, layout.header)
        begins = ((layout.offsets[t.name], t.nbytes) for t in tensors)
        at = sum(min(n, max(0, part.done - begin)) for begin, n in begins)

        def report(n: int) -> None:
            nonlocal at
            at += n
            if progress is not None:
                progress(what, at, total)

        write_pieces(part, pieces(part.done), commit_bytes=COMMIT_BYTES, taken=report)
    return layout.size


def read_ahead(jobs: Iterable[Callable[[], _T]]) -> Generator[_T, None, None]:
    """The results of the jobs in order; each job runs in a thread while the result before is used.

    Close it if it may be left before its end (`_closed` says why).
    """
    with SideThread("stoker-read") as reader:
        pending: Future[_T] | None = None
        for job in jobs:
            following = reader.submit(job)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def piece_rows(cols: int) -> int:
    """Rows of `cols` weights that make a piece."""
    return max(1, PIECE_VALUES // max(1, cols))


def read_bytes(path: str | os.PathLike[str], offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """nbytes bytes of a file from `offset` on, uint8 [nbytes]; OSError if it is shorter."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        data = np.empty(nbytes, dtype=np.uint8)
        view, at = _view(data), 0
        while at < nbytes:
            n = file.readinto(view[at:])
            if not n:
                raise OSError(f"{os.fspath(path)}: expected {nbytes} bytes at {offset}, found {at}")
            at += n
    return data
