"""Headers of remote files: range requests against a local server."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offload_models import MIXTURES
from round_device import PROFILE
from stoker.models import remote_header
from stoker.offload.plan import device_profile
from stoker.runtime import _core
from stoker.runtime.base import errors

MEBIBYTE = 1 << 20


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function from the name of a tiny mixture to its file."""
    folder = tmp_path_factory.mktemp("remote")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = MIXTURES[name].write(folder / name)
        return made[name]

    return get


class Server(http.server.ThreadingHTTPServer):
    """Serves files[path], with ranges unless told otherwise."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.ranges = True
        self.fail: list[int] = []  # status codes of the next answers
        self.cut: list[int] = []  # bytes to send of the next answers
        self.sent = 0
        self.seen: list[tuple[str, str | None]] = []  # path, Authorization

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Request(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        s = self.server
        s.seen.append((self.path, self.headers.get("Authorization")))
        path = self.path.split("?")[0]
        if s.fail:
            self.send_error(s.fail.pop(0))
        elif path in s.redirects:
            self.send_response(302)
            self.send_header("Location", s.redirects[path])
            self.end_headers()
        elif path not in s.files:
            self.send_response(404)
            if path.startswith("/acme/"):
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
        else:
            self.send(s.files[path])

    def send(self, content: bytes) -> None:
        s, wanted = self.server, self.headers.get("Range")
        begin, end = 0, len(content)
        if wanted and s.ranges:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups()  # type: ignore[union-attr]
            begin, end = int(first), min(int(last) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if s.cut:
            end = begin + s.cut.pop(0)
            self.close_connection = True
        with suppress(ConnectionError):
            for at in range(begin, end, 1 << 16):
                self.wfile.write(content[at : min(end, at + (1 << 16))])
                s.sent += min(end, at + (1 << 16)) - at

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote_header, "_PAUSE_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def directory(file: Any) -> list[tuple[Any, ...]]:
    return [(t.name, t.type, t.shape, t.offset, t.nbytes, t.shard) for t in file.tensors]


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of 12 MB with a header of 1.5 MB."""
    import gguf

    path = tmp_path_factory.mktemp("large") / "large.gguf"
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_string("note", "x" * 1_500_000)
    out.add_tensor("blk.0.weight", np.zeros((1024, 2688), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path.read_bytes()


def test_remote_header_fetches_no_more_than_it_needs(server: Server, large: bytes) -> None:
    server.files["/large.gguf"] = large
    with remote_header.remote_header(server.url("/large.gguf?signature=1")) as file:
        assert [t.name for t in file.tensors] == ["blk.0.weight"]
        assert file.nbytes == len(large)
        assert file.get("note") == "x" * 1_500_000
        folder = Path(file.path).parent
    assert not folder.exists()
    # The first request is for 1 MiB, the second for 2 more.
    assert len(server.seen) == 2
    assert server.sent == 3 * MEBIBYTE
    assert all(path.endswith("?signature=1") for path, _ in server.seen)


def test_remote_header_equals_the_files(server: Server, models: Callable[[str], Path]) -> None:
    for name in ("mixtral", "qwen3moe-shards", "smallthinker"):
        path = models(name)
        shards = sorted(path.parent.glob("*.gguf"))
        for shard in shards:
            server.files[f"/{name}/{shard.name}"] = shard.read_bytes()
        here = _core.GgufFile(str(path))
        with remote_header.remote_header(server.url(f"/{name}/{path.name}")) as there:
            assert directory(there) == directory(here)
            assert there.metadata == here.metadata
            assert len(there.shards) == len(shards) == len(here.shards)
            assert _core.plan(there, context=64) == _core.plan(here, context=64)


def test_remote_header_of_a_server_without_ranges(server: Server, large: bytes) -> None:
    server.ranges = False
    server.files["/large.gguf"] = large
    with remote_header.remote_header(server.url("/large.gguf")) as file:
        assert file.nbytes == len(large)


def test_remote_header_goes_on_after_a_break(server: Server, large: bytes) -> None:
    server.files["/large.gguf"] = large
    server.fail = [503, 429]
    server.cut = [300_000]
    with remote_header.remote_header(server.url("/large.gguf")) as file:
        assert file.nbytes == len(large)
    server.fail = [503] * 4
    with (
        pytest.raises(errors.DownloadError, match="the server answers 503"),
        remote_header.remote_header(server.url("/large.gguf")),
    ):
        pass


def test_remote_header_names_what_is_wrong(server: Server, large: bytes) -> None:
    def refused(spec: str, kind: type[Exception], text: str) -> None:
        with pytest.raises(kind) as caught, remote_header.remote_header(spec):
            pass
        assert re.search(text, str(caught.value)), str(caught.value)
        assert "\n" not in str(caught.value)

    url = server.url("/large.gguf")
    refused(url, errors.DownloadError, f"^{url}: the server has no such file")
    server.files["/large.gguf"] = b"<html>not found</html>" * 100
    refused(url, errors.ModelFileError, f"^{url}: magic: expected 'GGUF'")
    server.files["/large.gguf"] = large[:1_400_000]
    refused(url, errors.ModelFileError, f"^{url}: .*found the end of the file at 1400000")
    server.files["/large.gguf"] = large[:-1]
    refused(url, errors.ModelFileError, f"^{url}: .*truncated or corrupt")
    server.fail = [403]
    refused(url, errors.DownloadError, "the server refuses it")
    refused("https://", errors.OptionError, "expected hf:owner/name/file")
    server.shutdown()
    server.server_close()
    refused(url, errors.DownloadError, "cannot be reached")


def test_errors_in_the_body_name_the_spec(server: Server, models: Callable[[str], Path]) -> None:
    path = models("mixtral")
    server.files["/model.gguf"] = path.read_bytes()
    url = server.url("/model.gguf")
    with pytest.raises(errors.BudgetError, match=f"^{url}: memory: expected at least"):  # noqa: SIM117
        with remote_header.remote_header(url) as file:
            _core.plan(file, memory=1)


def test_the_token_stays_with_the_hub(server: Server, large: bytes) -> None:
    storage = Server()
    threading.Thread(target=storage.serve_forever, daemon=True).start()
    storage.files["/blob"] = large
    server.redirects["/acme/tiny/resolve/main/sub/large.gguf"] = storage.url("/blob")
    code = (
        "import sys\n"
        "from stoker.models.remote_header import remote_header\n"
        "with remote_header('hf:acme/tiny/sub/large.gguf') as file: print(file.nbytes)\n"
    )
    done = hub_process(server, [sys.executable, "-c", code])
    assert done.stdout.split() == [str(len(large))], done.stderr
    assert server.seen[0][1] == "Bearer secret"
    assert {token for _, token in storage.seen} == {None}
    storage.shutdown()
    storage.server_close()


def hub_process(server: Server, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs in a separate process: huggingface-hub reads its settings when imported."""
    settings = {
        "HF_ENDPOINT": server.url(""),
        "HF_TOKEN": "secret",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        command,
        check=False,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_plan_command_of_a_url(
    server: Server, models: Callable[[str], Path], tmp_path: Path
) -> None:
    profile = tmp_path / "device.json"
    device_profile.save(PROFILE, profile)
    server.files["/acme/tiny/resolve/main/model.gguf"] = models("olmoe").read_bytes()
    command = [sys.executable, "-m", "stoker.runtime.cli.main", "plan", "--tsv", "-c", "128"]
    command += ["--device", str(profile), "--memory", "500MB"]
    remote = hub_process(server, [*command, "hf:acme/tiny/model.gguf"])
    url = hub_process(server, [*command, server.url("/acme/tiny/resolve/main/model.gguf")])
    local = hub_process(server, [*command, str(models("olmoe"))])
    assert remote.returncode == url.returncode == local.returncode == 0, remote.stderr
    rows = [done.stdout.splitlines()[1].split("\t") for done in (remote, url, local)]
    # Compare the columns that do not depend on the size of this process.
    assert {row[4] for row in rows} == {rows[0][4]}
    assert {row[1] for row in rows} == {"True"}
    missing = hub_process(server, [*command, "hf:acme/tiny/none.gguf"])
    assert missing.returncode == 1
    assert missing.stderr.strip() == (
        "stoker: error: hf:acme/tiny/none.gguf: the repository has no such file"
    )
