"""Files in the stores that fsspec knows (s3, gcs, http, hf and others), read by ranges of bytes.

Credentials and endpoints are those of the store's own configuration, or of fsspec's (`FSSPEC_S3_ENDPOINT_URL` and the
like). What fails is tried again a few times, with growing pauses; what cannot get better is not.
"""

from __future__ import annotations

import io
import logging
import os
import random
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

T = TypeVar("T")

# One connection to a store brings some tens of megabytes a second: so many at once, each with parts that are large
# beside the wait for their first byte.
AT_ONCE = 16
PART_BYTES = 4 << 20
_HEADER_BYTES = 1 << 16
_TRIES = 6
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_TIMEOUT_S = 60.0  # of one try, for a part or a listing
# What tells one version of a file from another, as stores call it.
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "md5Hash")
_TIMES = ("Last-Modified", "LastModified", "last_modified", "mtime", "created")
# What is wrong with the call, or with the code of a store, and so will be wrong again.
_HOPELESS = (ValueError, TypeError, AttributeError, NotImplementedError, IsADirectoryError)
_HINT = "pip install 'realign-fast[remote]'"

_log = logging.getLogger("realign_fast")
_never = Event()


class RemotePath:
    """A file in a store; as much of a `pathlib.Path` as readers of headers need.

    Attributes
    ----------
    name, stem, suffix, parent : str
        As a path has them; a query is no part of them.
    size : int
        In bytes.
    version : str or None
        What changes when the file does, as the store says.
    """

    def __init__(self, url: str, size: int, version: str | None) -> None:
        self._url = url
        self.size = size
        self.version = version
        path = urlsplit(url).path if url.startswith(("http:", "https:")) else url
        self.parent, _, name = path.rpartition("/")
        self.name = unquote(name) if path != url else name
        self.stem, self.suffix = os.path.splitext(self.name)

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open it for the reading of headers: by ranges as they are asked for."""
        return io.BufferedReader(_File(self), _HEADER_BYTES)

    def fetch(self, begin: int, end: int, stop: Event = _never) -> bytes:
        """Return bytes `begin` to `end`; gives up early where `stop` is set.

        Raises
        ------
        OSError
            If the store refuses, or still fails after some tries.
        ValueError
            If the file ends before, or the store sends no ranges.
        """

        def once() -> bytes:
            fs, path = _filesystem(self._url)
            data = _bytes_of(fs, path, begin, end)
            if len(data) > end - begin:
                raise _FinalError(f"{self}: its server sends no ranges of bytes")
            if len(data) < end - begin:
                raise EOFError(f"asked for bytes {begin} to {end}, got {len(data)}")
            return bytes(data)

        if begin >= end:
            return b""
        if end > self.size:
            raise ValueError(f"{self} has {self.size} bytes, expected bytes up to {end}")
        try:
            return _attempt(str(self), once, stop)
        except OSError as error:
            if isinstance(error.__cause__, EOFError):
                self.check()  # a file that has become shorter is another one
            raise

    def check(self) -> None:
        """Raise ValueError if the file is no longer the one that was listed."""
        found = _remote_path(self._url, _info(self._url))
        if [found.size, found.version] != [self.size, self.version]:
            raise ValueError(f"{self} has changed while it was read: size or version differ")


AnyPath = Path | RemotePath


def size_of(path: AnyPath) -> int:
    """Return the size of a file in bytes."""
    return path.size if isinstance(path, RemotePath) else path.stat().st_size


def state_of(path: AnyPath) -> list[Any]:
    """Return what changes when a file does: its size, and its time of change or its store's word for its version."""
    if isinstance(path, RemotePath):
        return [path.size, path.version]
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


class _File(io.RawIOBase):
    """Reads where it is asked to, through `fetch` or what has been fetched ahead."""

    def __init__(self, path: RemotePath, ahead: FetchAhead | None = None) -> None:
        self._path, self._ahead, self._at = path, ahead, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._path.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(view.nbytes, self._path.size - self._at))
        if self._ahead is None:
            view[:count] = self._path.fetch(self._at, self._at + count)
        else:
            self._ahead.read(self._path, self._at, view[:count])
        self._at += count
        return count


class _Part(NamedTuple):
    path: RemotePath
    begin: int
    end: int
    data: Future[bytes]

    def holds(self, path: RemotePath, offset: int) -> bool:
        return self.path is path and self.begin <= offset < self.end


class FetchAhead:
    """Ranges of files, fetched in their order, some at once, before they are read.

    Parameters
    ----------
    plan
        Which bytes will be read, in order: file, begin and end. Bytes that are not in it can be read too, but are
        waited for.
    """

    def __init__(self, plan: Iterable[tuple[RemotePath, int, int]]) -> None:
        self._plan = (
            (path, part, min(end, part + PART_BYTES))
            for path, begin, end in plan
            for part in range(begin, end, PART_BYTES)
        )
        self._stop = Event()
        self._pool = ThreadPoolExecutor(AT_ONCE, "realign-fetch")
        self._window: deque[_Part] = deque()
        self._fill()

    def _fill(self) -> None:
        for path, begin, end in islice(self._plan, AT_ONCE - len(self._window)):
            self._window.append(_Part(path, begin, end, self._pool.submit(path.fetch, begin, end, self._stop)))

    def _drop(self) -> None:
        self._window.popleft().data.cancel()
        self._fill()

    @contextmanager
    def open(self, path: RemotePath) -> Iterator[io.RawIOBase]:
        """Open a file of the plan, all before it being done with; at the end it must still be the one listed."""
        while self._window and self._window[0].path is not path:
            self._drop()
        yield _File(path, self)
        path.check()

    def read(self, path: RemotePath, begin: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `begin` on; raises as `RemotePath.fetch`."""
        done = 0
        while done < len(view):
            at = begin + done
            place = next((i for i, part in enumerate(self._window) if part.holds(path, at)), None)
            if place is None:
                view[done:] = path.fetch(at, begin + len(view), self._stop)
                return
            for _ in range(place):
                self._drop()
            part = self._window[0]
            count = min(len(view) - done, part.end - at)
            view[done : done + count] = memoryview(part.data.result())[at - part.begin :][:count]
            done += count

    def close(self) -> None:
        """Give up what is on its way."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


def copy_to(file: io.RawIOBase, path: RemotePath, target: Path) -> None:
    """Write all that `file`, opened of `path`, holds to `target`; OSError that names both where that cannot be."""
    try:
        with target.open("wb") as out:
            shutil.copyfileobj(file, out, PART_BYTES)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror}: no copy of {path} can be made", str(target.parent)) from None


def naming(error: Exception, path: RemotePath, copy: Path) -> Exception:
    """Return the error with the name of a remote file where it has that of its copy."""
    if type(error) is not ValueError or str(copy) not in str(error):
        return error
    named = ValueError(str(error).replace(str(copy), str(path)))
    named.__cause__ = error
    return named


def read_into(requests: list[tuple[RemotePath, int, memoryview]]) -> None:
    """Fill each view with the bytes of a file from an offset on, many at once; raises as `RemotePath.fetch`."""

    def fill(path: RemotePath, begin: int, view: memoryview) -> None:
        view[:] = path.fetch(begin, begin + len(view))

    parts = [
        (path, begin + start, view[start : start + PART_BYTES])
        for path, begin, view in requests
        for start in range(0, len(view), PART_BYTES)
    ]
    if len(parts) <= 1:
        for part in parts:
            fill(*part)
        return
    with ThreadPoolExecutor(min(AT_ONCE, len(parts)), "realign-fetch") as pool:
        for done in [pool.submit(fill, *part) for part in parts]:
            done.result()


def is_url(text: str) -> bool:
    """Return whether `text` is a URL and no path."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", text) is not None


def list_files(url: str) -> list[RemotePath]:
    """Return the file that `url` names, those of the folder it names, or those that match it as a glob, in no order.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ImportError
        If fsspec, or what it needs for this store, is not installed.
    OSError
        If the store refuses, or still fails after some tries.
    """
    is_http = url.startswith(("http:", "https:"))
    magic = "*" in urlsplit(url).path if is_http else re.search(r"[*?[]", url) is not None

    def once() -> list[tuple[str, dict[str, Any]]]:
        fs, path = _filesystem(url)
        fs.invalidate_cache()
        if magic:
            found = list(_call(fs, "glob", path, detail=True).values())
        elif is_http and not Path(urlsplit(url).path).suffix:
            found = _call(fs, "ls", path, detail=True)  # a page of links is a file to fsspec
        else:
            info = _call(fs, "info", path)
            if info["type"] != "directory":
                return [(url, info)]
            found = _call(fs, "ls", path, detail=True)
        return [(fs.unstrip_protocol(item["name"]), item) for item in found if item["type"] != "directory"]

    found = _attempt(url, once)
    if not found:
        raise FileNotFoundError(f"{url} holds or matches no files")
    with ThreadPoolExecutor(AT_ONCE, "realign-fetch") as pool:
        return list(pool.map(_remote_path, *zip(*found, strict=True)))


def _remote_path(url: str, info: dict[str, Any]) -> RemotePath:
    # A listing may give no size, and times in another form than a look at one file does.
    if not isinstance(info.get("size"), int) or not any(info.get(key) for key in _VERSIONS):
        info = _info(url)
    if not isinstance(info.get("size"), int):
        raise OSError(f"{url}: its server states no size")
    version = next((str(info[key]) for key in (*_VERSIONS, *_TIMES) if info.get(key)), None)
    return RemotePath(url, info["size"], version)


def _info(url: str) -> dict[str, Any]:
    def once() -> dict[str, Any]:
        fs, path = _filesystem(url)
        fs.invalidate_cache(path)
        found: dict[str, Any] = _call(fs, "info", path)
        return found

    return _attempt(url, once)


def _filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, which it keeps for each process, and the path there."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ImportError(f"{url}: reading it needs fsspec: {_HINT}") from None
    try:
        found: tuple[Any, str] = url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{url}: {error}: {_HINT}") from None
    return found


def _call(fs: Any, name: str, *args: Any, **options: Any) -> Any:
    """Call a method of a file system; one that hangs is given up, where fsspec can do that."""
    if getattr(fs, "async_impl", False) and not fs.asynchronous:
        from fsspec.asyn import sync

        return sync(fs.loop, getattr(fs, f"_{name}"), *args, timeout=_TIMEOUT_S, **options)
    return getattr(fs, name)(*args, **options)


def _bytes_of(fs: Any, path: str, begin: int, end: int) -> bytes:
    """Return bytes `begin` to `end` of a file, fewer or more where its store sends so many."""
    if "https" not in fs.protocol:
        found: bytes = _call(fs, "cat_file", path, start=begin, end=end)
        return found
    from fsspec.asyn import sync

    found = sync(fs.loop, _http_range, fs, path, begin, end, timeout=_TIMEOUT_S)
    return found


async def _http_range(fs: Any, url: str, begin: int, end: int) -> bytes:
    """As `fs._cat_file`, which reads all that comes: a server that knows no ranges sends the whole file."""
    session = await fs.set_session()
    options = dict(fs.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(url), headers=headers, **options) as answer:
        fs._raise_not_found_for_status(answer, url)
        if begin > 0 and answer.status == 200:
            raise _FinalError(f"{url}: its server sends no ranges of bytes")
        data = bytearray()
        while len(data) <= end - begin and (chunk := await answer.content.read(1 << 20)):
            data += chunk
        return bytes(data)


class _FinalError(Exception):
    """What another try would not change."""


def _attempt(url: str, operation: Callable[[], T], stop: Event = _never) -> T:
    """Return what `operation` does, tried again where it fails by chance."""
    began, pause, tries = time.monotonic(), _FIRST_PAUSE_S, 0
    while True:
        try:
            return operation()
        except Exception as error:  # each store raises errors of its own
            _raise_if_final(url, error)
            tries += 1
            if tries == _TRIES or stop.is_set():
                waited = time.monotonic() - began
                raise OSError(f"{url}: gave up after {tries} tries in {waited:.0f} s: {_text(error)}") from error
            _log.info("%s: %s; try %d of %d follows", url, _text(error), tries + 1, _TRIES)
        stop.wait(pause * random.uniform(0.5, 1.0))  # so that many readers do not come back at once
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _raise_if_final(url: str, error: BaseException) -> None:
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause and getattr(cause, "status", 404) not in (404, 410):
        error = cause  # fsspec's HTTP files are not found, whatever the server has answered
    text, kind = _text(error), type(error).__name__
    status = getattr(error, "status", getattr(error, "status_code", None))
    if isinstance(error, _FinalError):
        raise ValueError(text) from None
    if isinstance(error, ImportError):
        raise error
    if isinstance(error, FileNotFoundError):
        raise FileNotFoundError(f"{url} does not exist" + (f": {text}" if text not in url else "")) from error
    if "Credential" in kind or "Token" in kind:
        raise PermissionError(f"{url}: there are no credentials for it: {text}") from error
    if isinstance(error, PermissionError):
        raise PermissionError(f"{url}: access is refused: {text}") from error
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        raise OSError(f"{url}: its server answers {status}: {text}") from error
    if isinstance(error, _HOPELESS):
        raise ValueError(f"{url}: {text}") from error


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
