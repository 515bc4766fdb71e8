"""Model files of a hub repository, "hf:owner/name/path/file.gguf[@revision]".

They are kept under hub/ in our cache; a file that the hub library's own cache has is used from
there. HF_ENDPOINT, HF_HOME and HF_TOKEN are honoured.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import inspect
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..runtime.base.arguments import shown
from ..runtime.base.errors import DownloadError, OptionError
from ..runtime.base.progress import Progress
from .cache import directory, locked

_SPEC = re.compile(r"hf:([\w.-]+/[\w.-]+)/([^@]+)(?:@(.+))?")
_MOST_NAME = 200  # bytes of a file's name, including the suffix while it is downloaded
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at a revision (None: the default branch)."""

    repo: str
    file: str
    revision: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repo}/{self.file}{at}"


def parse(spec: str) -> HubFile:
    """Reads "hf:owner/name/file[@revision]"; raises OptionError for anything else."""
    _check_endpoint()
    if not spec.isprintable():
        raise OptionError(f"{spec}: expected hf:owner/name/file.gguf[@revision] in printable text")
    match = _SPEC.fullmatch(spec)
    # Each part must be a file name, so that the path stays inside our cache.
    parts = [] if match is None else f"{match[1]}/{match[2]}".split("/")
    if match is None or not all(map(is_file_name, parts)):
        raise OptionError(f"{spec}: expected hf:owner/name/file.gguf[@revision]")
    return HubFile(match[1], match[2], match[3])


def _check_endpoint() -> None:
    """Raises OptionError if HF_ENDPOINT is no URL: the hub library cannot even be imported then."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if endpoint and not usable:
        raise OptionError(
            f"HF_ENDPOINT must be a URL such as https://huggingface.co, not {shown(endpoint)}"
        )


def is_file_name(name: str) -> bool:
    """Whether a file can be kept under this name without leaving its folder."""
    return (
        name not in ("", ".", "..")
        and "/" not in name
        and name.isprintable()
        and len(name.encode()) <= _MOST_NAME
    )


def shards(file: HubFile) -> list[HubFile]:
    """The file, or all shards of a "-00001-of-0000N.gguf" model, the named one first."""
    match = _SHARD.search(file.file)
    if match is None:
        return [file]
    stem, count = file.file[: match.start()], int(match[2])
    names = [f"{stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    names.sort(key=lambda name: name != file.file)
    return [HubFile(file.repo, name, file.revision) for name in names]


def cached(file: HubFile) -> Path | None:
    """The file in our cache, or in the hub library's own, if all its shards are there."""
    from huggingface_hub import try_to_load_from_cache

    ours = [_place(shard) for shard in shards(file)]
    if all(path.exists() for path in ours):
        return ours[0]
    theirs = []
    for shard in shards(file):
        path = try_to_load_from_cache(shard.repo, shard.file, revision=shard.revision)
        if not isinstance(path, str) or not os.path.exists(path):
            return None
        theirs.append(Path(path))
    return theirs[0]


def pull(
    file: HubFile,
    *,
    progress: Progress | None = None,
    waiting: Callable[[], None] | None = None,
) -> Path:
    """Downloads the file and its shards, unless they are here and the hub has nothing newer.

    An interrupted download resumes where it stopped. A file appears under its name only when it
    is complete and has the sha256 that the hub states. Raises DownloadError.
    """
    paths = [_pull_one(shard, progress, waiting) for shard in shards(file)]
    return paths[0]


def _place(file: HubFile) -> Path:
    """The file's path in the cache: a revision's shards lie side by side, as the reader expects."""
    return directory() / "hub" / file.repo / (file.revision or "main") / file.file


def _pull_one(file: HubFile, progress: Progress | None, waiting: Callable[[], None] | None) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    path = _place(file)
    try:
        url = hf_hub_url(file.repo, file.file, revision=file.revision)
        metadata = get_hf_file_metadata(url)
        if metadata.etag is None or metadata.size is None:
            raise DownloadError(f"{file}: the hub does not say what the file's content is")
        etag, size = metadata.etag, metadata.size
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock"), waiting):
            # The etag that the file was downloaded with shows whether the hub has a newer one.
            state = path.with_name(f".{path.name}.etag")
            if path.exists() and state.exists() and state.read_text() == etag:
                return path
            for old in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
                if etag[:16] not in old.name:
                    old.unlink()
            part = path.with_name(f".{path.name}.{etag[:16]}.part")
            _download(file, part, url=url, location=metadata.location, size=size, progress=progress)
            _verify(file, part, etag, progress)
            os.replace(part, path)
            state.write_text(etag)
            return path
    except (DownloadError, AttributeError, NameError, TypeError):
        raise  # the latter are our own bugs, and shall look so
    except Exception as error:  # whatever huggingface-hub and its HTTP library raise
        raise DownloadError(f"{file}: {_reason(error)}") from error


def _download(
    file: HubFile, part: Path, *, url: str, location: str, size: int, progress: Progress | None
) -> None:
    """Appends the missing bytes to `part`.

    hf_hub_download is not used: since huggingface-hub 2 it starts over after an interrupt.
    """
    from huggingface_hub.file_download import http_get

    headers: dict[str, str] = _hub_utility("build_hf_headers")()
    if urlsplit(location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # signed storage elsewhere must not get the token
    with part.open("ab") as out:
        if out.tell() > size:
            out.truncate(0)
        if shutil.disk_usage(part.parent).free < size - out.tell():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        while True:
            done = out.tell()
            arguments: dict[str, Any] = {}
            if progress is not None:
                bar = _bar(f"downloading {file.file}", progress)
                if "tqdm_class" in inspect.signature(http_get).parameters:
                    arguments["tqdm_class"] = bar
                else:  # huggingface-hub before 1.0
                    arguments["_tqdm_bar"] = bar(total=size, initial=done)
            try:
                http_get(
                    location,
                    out,
                    resume_size=done,
                    headers=headers,
                    expected_size=size,
                    **arguments,
                )
                break
            except Exception as error:
                # The library itself resumes after most breaks; we retry as long as data comes.
                if out.tell() == done or _reason(error) != _BROKEN:
                    raise
        out.flush()
        os.fsync(out.fileno())


def _verify(file: HubFile, part: Path, etag: str, progress: Progress | None) -> None:
    """Compares the content with the etag, which is the sha256 of every large file."""
    if not _SHA256.fullmatch(etag):
        return
    digest, done, size = hashlib.sha256(), 0, part.stat().st_size
    with part.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
            done += len(block)
            if progress is not None:
                progress(f"checking {file.file}", done, size)
    if digest.hexdigest() != etag:
        part.unlink()
        raise DownloadError(
            f"{file}: expected sha256 {etag}, found {digest.hexdigest()}; pull it again"
        )


_BROKEN = "the hub cannot be reached, or the connection broke; pull again to go on"
# Meanings of exceptions of huggingface-hub and of the HTTP library under it, by class name: the
# modules of these classes, and the HTTP library, differ between versions.
_MEANINGS = {
    "GatedRepoError": "the repository is gated: accept its terms on the hub and set HF_TOKEN",
    "RepositoryNotFoundError": "no such repository (or it is private: set HF_TOKEN)",
    "RevisionNotFoundError": "no such revision",
    "EntryNotFoundError": "the repository has no such file",
    **dict.fromkeys(
        ("ConnectError", "ConnectionError", "NetworkError", "RemoteProtocolError", "Timeout",
         "TimeoutException", "ChunkedEncodingError"),
        _BROKEN,
    ),
}  # fmt: skip


def _reason(error: BaseException) -> str:
    """One line for an exception met while downloading."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left in {directory()}"
        for base in type(cause).__mro__:
            if base.__name__ in _MEANINGS:
                return _MEANINGS[base.__name__]
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _bar(label: str, progress: Progress) -> Any:
    """A stand-in for the tqdm class that reports to `progress` and prints nothing."""
    base: Any = _hub_utility("tqdm")

    class Bar(base):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            settings["disable"] = True
            self._done = int(settings.get("initial") or 0)
            self._size = settings.get("total")
            super().__init__(*arguments, **settings)

        def update(self, n: float | None = 1) -> None:
            self._done += int(n or 0)
            progress(label, self._done, self._size)

    return Bar


def _hub_utility(name: str) -> Any:
    """A public name of huggingface_hub.utils, which does not export them to type checkers."""
    from huggingface_hub import utils

    return getattr(utils, name)
