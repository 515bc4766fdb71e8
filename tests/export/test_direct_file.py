"""Direct writing past the page cache gives the same bytes, wherever a write begins."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from stoker.export.writer import gguf_writer
from stoker.export.writer.direct_file import DirectFile, page_start
from stoker.export.writer.gguf_writer import PartFile

SIZE = 200_000
BYTES = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture
def small_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_writer, "_DIRECT_BYTES", 8192)


@pytest.mark.usefixtures("small_writes")
@pytest.mark.parametrize("step", [5000, 8192, 12289, 40_000, SIZE])
@pytest.mark.parametrize("first", [0, 1, 4096, 6000])
def test_pieces_of_any_size(tmp_path: Path, first: int, step: int) -> None:
    part = PartFile(tmp_path / "x", SIZE, "recipe")
    part.write(0, BYTES[:first].data)
    for at in range(first, SIZE, step):
        part.write(at, BYTES[at : at + step].data)
        if at % 3 == 0:
            part.commit(at)
    part.finish()
    assert (tmp_path / "x").read_bytes() == BYTES.tobytes()


@pytest.mark.usefixtures("small_writes")
def test_over_pages_that_were_read(tmp_path: Path) -> None:
    """A read after a direct write does not give what the cache held of a page."""
    part = PartFile(tmp_path / "x", SIZE, "recipe")
    part.write(0, bytes(SIZE))
    assert not any(part.part.read_bytes())
    part.write(777, BYTES[777:].data)
    assert part.part.read_bytes()[777:] == BYTES[777:].tobytes()
    part.close()


@pytest.mark.usefixtures("small_writes")
@pytest.mark.parametrize("accepted", [0, 4096, 8192])
def test_a_refusal_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accepted: int
) -> None:
    """If the system takes a part of a write, or none, the rest goes through the cache."""
    real = os.pwrite

    def some(fd: int, data: memoryview, offset: int) -> int:
        if accepted == 0:
            raise OSError(errno.EINVAL, "alignment")
        return real(fd, data[:accepted], offset)

    monkeypatch.setattr(os, "pwrite", some)
    part = PartFile(tmp_path / "x", SIZE, "recipe")
    part.write(100, BYTES[100:].data)
    part.write(0, BYTES[:100].data)
    part.finish()
    assert (tmp_path / "x").read_bytes() == BYTES.tobytes()


def test_systems_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"")
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert DirectFile.open(tmp_path / "x") is None
    part = PartFile(tmp_path / "y", SIZE, "recipe")
    part.write(0, BYTES.data)
    part.finish()
    assert (tmp_path / "y").read_bytes() == BYTES.tobytes()


def test_page_start() -> None:
    assert [page_start(n) for n in (0, 1, 4095, 4096, 4097)] == [0, 4096, 4096, 4096, 8192]
