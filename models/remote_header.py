"""Reads the header of a model file that stays remote: on the hub, or behind a URL.

Range requests fetch a growing prefix of each shard until its directory is complete. The prefix is
put into a sparse temporary file of the true size, so that the usual reader checks it.
"""

from __future__ import annotations

import http.client
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ..runtime.base.errors import DownloadError, OptionError, StokerError
from . import hub

if TYPE_CHECKING:
    from ..runtime._core import GgufFile

_FIRST = 1 << 20  # bytes of the first request; vocabularies make headers of 2 to 20 MB
_GROWTH = 3
_MOST = 1 << 28  # bytes; no header is longer
_ATTEMPTS = 4
_PAUSE_S = 0.5  # before the second attempt, doubled before each further one
_TIMEOUT_S = 30.0
_BLOCK = 1 << 16
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_TOTAL = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def is_remote(spec: str) -> bool:
    """Whether `spec` names a remote file: "hf:owner/name/file" or a URL."""
    return spec.startswith(("hf:", "https://", "http://"))


@dataclass
class _Remote:
    """One shard: its URL, its local name and its name in messages."""

    url: str
    name: str
    shown: str
    headers: dict[str, str] = field(default_factory=dict)


@contextmanager
def remote_header(spec: str) -> Iterator[GgufFile]:
    """The file's header and directory, of all shards, without the data.

    spec: "hf:owner/name/file.gguf[@revision]" (HF_ENDPOINT, HF_TOKEN are honoured) or a URL.
    Raises DownloadError, ModelFileError and UnsupportedModelError as opening the file would (also
    out of the body of the `with`, with `spec` in place of the temporary file's name), OptionError
    for any other spec.
    """
    from ..runtime._core import GgufFile

    shards = _shards(spec)
    folder = Path(tempfile.mkdtemp(prefix="stoker-header-"))
    try:
        for shard in shards:
            _fetch_header(shard, folder / shard.name)
        try:
            yield GgufFile(str(folder / shards[0].name))
        except StokerError as error:
            text = str(error)
            for shard in shards:
                text = text.replace(str(folder / shard.name), shard.shown)
            raise type(error)(text.replace(str(folder), spec)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shards(spec: str) -> list[_Remote]:
    if spec.startswith("hf:"):
        return _hub_shards(spec)
    try:
        parts = urlsplit(spec)
        path, named = parts.path, is_remote(spec) and bool(parts.hostname)
    except ValueError:  # half an address in brackets, say
        path, named = "", False
    name = unquote(PurePosixPath(path).name)
    # The local name must not lead out of our folder.
    if not named or not hub.is_file_name(name):
        raise OptionError(f"{spec}: expected hf:owner/name/file.gguf or the URL of a file")
    found = []
    for shard in hub.shards(hub.HubFile("", name)):
        # Only the file name at the end of the path is replaced: queries (signatures) are kept.
        head, _, tail = spec.rpartition(PurePosixPath(path).name)
        url = spec if shard.file == name else f"{head}{shard.file}{tail}"
        found.append(_Remote(url, shard.file, url))
    return found


def _hub_shards(spec: str) -> list[_Remote]:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined, unused-ignore]

    file = hub.parse(spec)
    headers: dict[str, str] = build_hf_headers()
    return [
        _Remote(
            hf_hub_url(shard.repo, shard.file, revision=shard.revision),
            PurePosixPath(shard.file).name,
            str(shard),
            headers,
        )
        for shard in hub.shards(file)
    ]


def _fetch_header(shard: _Remote, path: Path) -> None:
    """Writes a file of the shard's size that begins with all of its header."""
    from ..runtime._core import GgufFile

    data = bytearray()
    wanted = _FIRST
    while True:
        total = _append(shard, data, wanted)
        if GgufFile.header_is_whole(bytes(data), total, shard.shown):
            break
        if len(data) >= min(total, _MOST):
            # The whole file, or as much as any header has, is here: the reader says what is wrong.
            break
        wanted = min(total, _MOST, wanted * _GROWTH)
    try:
        with path.open("wb") as out:
            out.write(data)
            out.truncate(total)
    except OSError as error:
        raise DownloadError(
            f"{shard.shown}: cannot make a temporary file of its size in {path.parent}: "
            f"{error.strerror or error}"
        ) from error


def _append(shard: _Remote, data: bytearray, wanted: int) -> int:
    """Fetches until `data` has `wanted` bytes, or the whole file; returns the file's size."""
    pause = _PAUSE_S
    for attempt in range(1, _ATTEMPTS + 1):
        before = len(data)
        try:
            return _request(shard, data, wanted)
        except DownloadError:
            raise
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in _AGAIN or attempt == _ATTEMPTS:
                    raise DownloadError(f"{shard.shown}: {_refusal(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            # Retries go on as long as data comes.
            if attempt == _ATTEMPTS and len(data) == before:
                reason = getattr(error, "reason", None) or error
                raise DownloadError(
                    f"{shard.shown}: cannot be reached, or the connection broke: {reason}"
                ) from None
        time.sleep(pause)
        pause *= 2
    raise DownloadError(f"{shard.shown}: the connection broke {_ATTEMPTS} times")


def _request(shard: _Remote, data: bytearray, wanted: int) -> int:
    request = urllib.request.Request(shard.url, headers=shard.headers)
    begin = len(data)
    request.add_header("Range", f"bytes={begin}-{wanted - 1}")
    request.add_header("Accept-Encoding", "identity")
    with _opener().open(request, timeout=_TIMEOUT_S) as answer:
        total, skip = _placement(answer, begin, shard)
        want = min(wanted, total) - begin + skip
        while want > 0:
            block = answer.read(min(want, _BLOCK))
            if not block:
                raise http.client.IncompleteRead(b"", want)
            want -= len(block)
            data += block[skip:]
            skip = max(0, skip - len(block))
    return total


def _placement(answer: Any, begin: int, shard: _Remote) -> tuple[int, int]:
    """(the file's size, bytes of the answer that come before `begin`)."""
    if answer.status == 206:
        found = _TOTAL.fullmatch(answer.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != begin:
            raise DownloadError(
                f"{shard.shown}: expected bytes from {begin} on, found "
                f"Content-Range {answer.headers.get('Content-Range')!r}"
            )
        return int(found[3]), 0
    # The server ignores ranges and sends the file from its beginning; we stop reading early.
    length = answer.headers.get("Content-Length")
    if length is None:
        raise DownloadError(f"{shard.shown}: the server does not say how long the file is")
    return int(length), begin


def _refusal(error: urllib.error.HTTPError) -> str:
    code = error.headers.get("X-Error-Code", "") if error.headers else ""
    if code == "GatedRepo":
        return "the repository is gated: accept its terms on the hub and set HF_TOKEN"
    if code in ("RepoNotFound", "RevisionNotFound", "EntryNotFound"):
        return {
            "RepoNotFound": "no such repository (or it is private: set HF_TOKEN)",
            "RevisionNotFound": "no such revision",
            "EntryNotFound": "the repository has no such file",
        }[code]
    if error.code in (401, 403):
        return f"the server refuses it ({error.code}): a token is missing, or the URL has expired"
    if error.code == 404:
        return "the server has no such file (404)"
    return f"the server answers {error.code} {error.reason}"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and does not send the token to other servers."""

    def redirect_request(self, req: Any, *answer: Any) -> urllib.request.Request | None:
        """The request to send instead."""
        new = super().redirect_request(req, *answer)
        if new is not None and urlsplit(new.full_url).netloc != urlsplit(req.full_url).netloc:
            for name in [n for n in new.headers if n.lower() == "authorization"]:
                del new.headers[name]
        return new


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects)
