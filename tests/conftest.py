"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import signal
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before numpy is imported: on a busy machine the threads of its BLAS wait for each other in loops,
# and small matrices take thirty times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A shell that runs the tests in the background makes them, and the commands that they start, deaf
# to Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run, however long one takes: neither chance nor a busy machine decides
# whether a change passes. (Search: STOKER_HYPOTHESIS=search; the reader has a fuzzer, too.)
settings.register_profile(
    "stoker", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "search", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("STOKER_HYPOTHESIS", "stoker"))


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of a few kilobytes, with a context of 4096."""
    from tiny_models import make

    return make(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", context=4096)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral, whose experts a budget leaves on flash."""
    from offload_models import TinyMixture

    return TinyMixture("mixtral").write(tmp_path_factory.mktemp("mixture"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names what was left out, and why: a reason a line, with how many tests."""
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section("left out")
        for reason, n in reasons.most_common():
            terminalreporter.line(f"{n:5} {reason}")
