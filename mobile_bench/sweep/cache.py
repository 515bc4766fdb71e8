"""State that the jobs of a sweep share on a machine: digests, quantized models, one lock."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ...offload.plan.device_profile import default_path

_PIECE = 4 << 20  # bytes that are read at a time


def default_folder() -> Path:
    """Folder of quantized models: quantized/ beside the device profile."""
    return default_path().parent / "quantized"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keeps other processes from making the same file; waits for one that does."""
    from ...models.cache import locked

    out.parent.mkdir(parents=True, exist_ok=True)
    # The lock's file stays: if it were removed, two processes could hold locks of the same name.
    with locked(out.with_name(f".{out.name}.sweep")):
        yield


def measuring() -> AbstractContextManager[None]:
    """Lock held while something is measured: other measurements of this user's sweeps wait."""
    from ...models.cache import locked

    user = os.getuid() if hasattr(os, "getuid") else 0
    return locked(Path(tempfile.gettempdir()) / f"stoker-measuring-{user}.lock")


def content_digest(path: Path, folder: Path) -> str:
    """sha256 of a model file, all its shards one after the other, as 64 hex digits.

    It is remembered in `folder` for as long as sizes and times of the shards stay the same.
    Raises ModelFileError for an invalid GGUF file.
    """
    shards = _shards(path)
    seen = [(str(s), i.st_size, i.st_mtime_ns, i.st_ino) for s in shards for i in [s.stat()]]
    name = hashlib.sha256(repr(seen).encode()).hexdigest()
    note = folder / "digests" / name
    if note.exists():
        known = note.read_text(encoding="ascii", errors="replace").strip()
        if len(known) == 64:
            return known
    digest = hashlib.sha256()
    for shard in shards:
        with shard.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    note.parent.mkdir(parents=True, exist_ok=True)
    part = note.with_name(f".{name}.{os.getpid()}.part")
    part.write_text(digest.hexdigest() + "\n", encoding="ascii")
    os.replace(part, note)
    return digest.hexdigest()


def quantized(source: Path, digest: str, type: str, folder: Path, threads: int | None) -> Path:
    """The model in another file type (export/quantize.py), made unless it exists already.

    digest: content_digest of the source. The file is found again by the content that it was made
    from, whatever the source's name; it appears whole or not at all, and only one process makes it.
    """
    from ... import __version__
    from ...export.quantize import quantize

    made_of = hashlib.sha256(repr((digest, type, __version__)).encode()).hexdigest()[:12]
    out = folder / f"{source.stem}-{type}-{made_of}.gguf"
    found = _made(folder, type, made_of)
    if found is not None:
        return found
    with held(folder / f"{type}-{made_of}"):
        found = _made(folder, type, made_of)
        if found is None:
            quantize(source, out, type=type, threads=threads)
    return found or out


def _made(folder: Path, type: str, made_of: str) -> Path | None:
    return next(iter(sorted(folder.glob(f"[!.]*-{type}-{made_of}.gguf"))), None)


def _shards(path: Path) -> list[Path]:
    if path.suffix != ".gguf":
        return [path]
    from ...runtime._core import GgufFile

    return [Path(shard) for shard in GgufFile(str(path)).shards]
