"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of test data beside the checkout; the test is skipped where it is absent."""
    named = os.environ.get("STOKER_SHARED_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder} (set STOKER_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def vocab_dir(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's vocabulary files with their .inp and .out vectors, and templates/."""
    archive = shared_data / "vocab" / "llama-cpp-vocab-and-templates.tgz"
    if not archive.is_file():
        pytest.skip(f"no {archive}")
    folder = tmp_path_factory.mktemp("vocab")
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and ".." not in Path(member.name).parts:
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())
    return folder
