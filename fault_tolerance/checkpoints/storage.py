"""Storage: named byte objects in one directory of a local disk or of an object store (fsspec: S3, GCS, ...).

    write(name, parts)      the object appears whole, or not at all
    read_into(name, at, m)  a byte range, straight into one or several places in memory

Two rules. An object that can be seen is complete and durable: locally it is written under a hidden name, fsynced,
renamed, and the directory fsynced; remotely it is an upload that is committed at its end, or discarded. And only
faults that may pass by themselves are retried: a full disk is not, and silence only once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import functools
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from fault_tolerance.checkpoints.buffers import Bytes

T = TypeVar("T")
PART_BYTES = 8 << 20
_BEHIND_BYTES = 64 << 20  # what a disk may be behind with
_MAX_BUFFERS = 512  # of one preadv; the system's limit is 1024
_HOPELESS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENODATA)
)
_S3: dict[str, Any] = {  # who tries again is told once, in this file: three loops inside each other took minutes to say that nobody answers
    "config_kwargs": {"connect_timeout": 10, "read_timeout": 20, "retries": {"total_max_attempts": 1}}
}
_REQUEST_S = 60.0  # of one part or less; `read_timeout` does not begin before all of it is sent, and a store that is stopped takes nothing
_SILENCES = 2  # who was silent so often until the time was up is not asked again: each costs half a minute
_REMEDIES = {
    errno.ENOSPC: "make room there, keep fewer checkpoints, or save elsewhere",
    errno.EDQUOT: "make room there, keep fewer checkpoints, or save elsewhere",
    errno.EROFS: "make it writable, or save elsewhere",
    errno.EACCES: "make it writable for this user, or save elsewhere",
    errno.EPERM: "make it writable for this user, or save elsewhere",
    errno.ENOTDIR: "give a path whose every part but the last is a directory",
    errno.EIO: "look after the disk, and save elsewhere",
}
_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)  # of the C library of Linux
if _SYNC_FILE_RANGE is not None:
    _SYNC_FILE_RANGE.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class StorageError(RuntimeError):
    """A read or write that the storage refused, after the retries. `errno` as the system gave it, or None."""

    def __init__(self, message: str, *, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class _RequestTimeoutError(Exception):
    """An object store has not taken a request in time. No TimeoutError: fsspec keeps the word of none."""


class _SourceFailedError(Exception):
    """The parts that were to be written could not be had: not the storage's fault, and not its to retry."""


class Storage(Protocol):
    """One directory. Names are plain file names."""

    url: str
    local: bool

    def write(self, name: str, parts: Callable[[], Iterable[Bytes]]) -> int:
        """Store the parts, one after the other, as one object; returns its bytes.

        Asked again for the parts when it tries again. Raises StorageError; what `parts` raises passes through.
        """

    def read_into(self, name: str, offset: int, outs: Sequence[Bytes]) -> None:
        """Fill the buffers, one after the other, from byte `offset` on, in one request.

        Raises StorageError, also when the object ends too early.
        """

    def read(self, name: str) -> bytes:
        """The whole object. Raises StorageError."""

    def sizes(self) -> dict[str, int]:
        """Name and bytes of every object; empty when there is no such directory."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; those that are gone already are passed over."""

    def children(self) -> list[str]:
        """Names of the directories inside this one; empty when there is no such directory."""

    def child(self, name: str) -> Storage:
        """A directory inside this one."""

    def remove_all(self) -> None:
        """Remove the directory with everything in it."""


def open_storage(url: str | os.PathLike[str], *, attempts: int = 4, first_delay_s: float = 0.2) -> Storage:
    """The storage behind a path or an fsspec URL such as `s3://bucket/run/checkpoints`."""
    text = os.fspath(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        return LocalStorage(text, attempts=attempts, first_delay_s=first_delay_s)
    return RemoteStorage(text, attempts=attempts, first_delay_s=first_delay_s)


def retry(what: str, call: Callable[[], T], *, attempts: int, first_delay_s: float) -> T:
    """`call()`, again after 1, 2, 4, ... times the delay while it fails for a reason that may pass.

    Raises StorageError with the last reason.
    """
    silences = 0
    for attempt in range(attempts):
        try:
            return call()
        except _SourceFailedError as failure:
            assert failure.__cause__ is not None
            raise failure.__cause__ from None
        except FileNotFoundError as error:
            raise StorageError(f"{what}: must exist, but does not", errno=errno.ENOENT) from error
        except Exception as error:  # object stores raise classes of their own; every one is re-raised, typed
            code = error.errno if isinstance(error, OSError | StorageError) else None
            silences += "Timeout" in type(error).__name__
            if code in _HOPELESS or silences == _SILENCES or attempt == attempts - 1:
                tries = f"after {attempt + 1} tries" if attempt else "at once"
                remedy = f"; {_REMEDIES[code]}" if code in _REMEDIES else ""
                raise StorageError(f"{what}: failed {tries}: {error or type(error).__name__}{remedy}", errno=code) from error
        time.sleep(first_delay_s * 2**attempt)
    raise AssertionError("attempts is at least 1")


def paced(parts: Iterable[Bytes], max_rate_mb_s: float | None) -> Iterator[Bytes]:
    """The parts in slices of 8 MiB, no faster than the rate (MB/s), so that training keeps its bandwidth."""
    start, done = time.monotonic(), 0
    for part in parts:
        for at in range(0, part.nbytes, PART_BYTES):
            yield part[at : at + PART_BYTES]
            done += min(PART_BYTES, part.nbytes - at)
            if max_rate_mb_s is not None:
                time.sleep(max(0.0, start + done / (max_rate_mb_s * 1e6) - time.monotonic()))


class LocalStorage:
    """A directory of a mounted file system."""

    local = True

    def __init__(self, path: str, *, attempts: int, first_delay_s: float) -> None:
        self.url = path
        self._path = Path(path)
        self._retry: dict[str, Any] = {"attempts": attempts, "first_delay_s": first_delay_s}

    def write(self, name: str, parts: Callable[[], Iterable[Bytes]]) -> int:
        return retry(f"{self.url}/{name}", lambda: self._write(name, _guarded(parts)), **self._retry)

    def _write(self, name: str, parts: Iterable[Bytes]) -> int:
        begun, hidden = 0, self._path / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
        if not self._path.is_dir():
            self._path.mkdir(parents=True, exist_ok=True)
            sync_directory(self._path.parent)
        try:
            with hidden.open("wb", buffering=1 << 20) as file:
                size = 0
                for part in parts:
                    size += file.write(part.data)
                    begun = _begin_writing(file.fileno(), size, begun)
                file.flush()
                os.fsync(file.fileno())
            hidden.rename(self._path / name)
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise
        sync_directory(self._path)
        return size

    def read_into(self, name: str, offset: int, outs: Sequence[Bytes]) -> None:
        def fill() -> None:
            with (self._path / name).open("rb", buffering=0) as file:
                at = offset
                for first in range(0, len(outs), _MAX_BUFFERS):
                    at = _fill(file.fileno(), at, list(outs[first : first + _MAX_BUFFERS]))

        retry(f"{self.url}/{name}", fill, **self._retry)

    def read(self, name: str) -> bytes:
        return retry(f"{self.url}/{name}", (self._path / name).read_bytes, **self._retry)

    def sizes(self) -> dict[str, int]:
        if not self._path.is_dir():
            return {}
        found: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self._path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # a writer has just renamed its hidden file
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self._path / name).unlink(missing_ok=True)

    def children(self) -> list[str]:
        return sorted(e.name for e in os.scandir(self._path) if e.is_dir()) if self._path.is_dir() else []

    def child(self, name: str) -> LocalStorage:
        return LocalStorage(str(self._path / name), **self._retry)

    def remove_all(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


class RemoteStorage:
    """A prefix of an object store, through fsspec. Credentials and endpoint come from the environment, as usual."""

    local = False

    def __init__(self, url: str, *, attempts: int, first_delay_s: float) -> None:
        import fsspec  # kept out of the start-up of runs that save locally

        self.url = url.rstrip("/")
        found: tuple[Any, str] = _s3(self.url) if self.url.startswith("s3://") else fsspec.core.url_to_fs(self.url)
        self._fs, self._path = found
        self._retry: dict[str, Any] = {"attempts": attempts, "first_delay_s": first_delay_s}

    def write(self, name: str, parts: Callable[[], Iterable[Bytes]]) -> int:
        return retry(f"{self.url}/{name}", lambda: self._write(name, _guarded(parts)), **self._retry)

    def _write(self, name: str, parts: Iterable[Bytes]) -> int:
        file = self._fs.open(f"{self._path}/{name}", "wb", autocommit=False, block_size=PART_BYTES)
        try:
            size = sum(int(file.write(part.data)) for part in parts)
            file.close()
            file.commit()
        except BaseException:
            with contextlib.suppress(Exception):  # a store that has just failed; why it did is what is to be told
                file.discard()
            file.closed = True  # else it would be sent once more when it is collected, by whichever thread that meets
            raise
        return size

    def read_into(self, name: str, offset: int, outs: Sequence[Bytes]) -> None:
        total = sum(out.nbytes for out in outs)

        def fetch() -> Bytes:
            data = self._fs.cat_file(f"{self._path}/{name}", start=offset, end=offset + total) if total else b""
            if len(data) != total:
                raise StorageError(f"the object ends {total - len(data)} bytes too early", errno=errno.ENODATA)
            return np.frombuffer(data, np.uint8)

        data, at = retry(f"{self.url}/{name}", fetch, **self._retry), 0
        for out in outs:
            out[:] = data[at : at + out.nbytes]
            at += out.nbytes

    def read(self, name: str) -> bytes:
        data: bytes = retry(f"{self.url}/{name}", lambda: self._fs.cat_file(f"{self._path}/{name}"), **self._retry)
        return data

    def sizes(self) -> dict[str, int]:
        return {name: size for name, size, kind in self._entries() if kind == "file"}

    def remove(self, names: Iterable[str]) -> None:
        present = self.sizes()
        doomed = [f"{self._path}/{name}" for name in names if name in present]
        if doomed:
            retry(self.url, lambda: self._fs.rm(doomed), **self._retry)

    def children(self) -> list[str]:
        return sorted(name for name, _, kind in self._entries() if kind == "directory")

    def child(self, name: str) -> RemoteStorage:
        return RemoteStorage(f"{self.url}/{name}", **self._retry)

    def remove_all(self) -> None:
        if self._fs.exists(self._path):
            retry(self.url, lambda: self._fs.rm(self._path, recursive=True), **self._retry)

    def _entries(self) -> Iterator[tuple[str, int, str]]:
        def rows() -> list[dict[str, Any]]:
            self._fs.invalidate_cache(self._path)
            try:
                return list(self._fs.ls(self._path, detail=True))
            except FileNotFoundError:
                return []

        for row in retry(self.url, rows, **self._retry):
            yield row["name"].rstrip("/").rsplit("/", 1)[-1], row["size"] or 0, row["type"]


def _s3(url: str) -> tuple[Any, str]:
    """The file system and the path of an S3 URL."""
    kind = _s3_kind()
    store = kind(**_S3)
    store.retries = 1
    return store, str(kind._strip_protocol(url))


@functools.cache
def _s3_kind() -> Any:
    """s3fs, but no request takes longer than `_REQUEST_S`."""
    import s3fs
    from fsspec.asyn import sync_wrapper

    class S3(s3fs.S3FileSystem):
        async def _call_s3(self, *words: Any, **options: Any) -> Any:
            try:
                return await asyncio.wait_for(super()._call_s3(*words, **options), _REQUEST_S)
            except TimeoutError:
                raise _RequestTimeoutError(f"{words[0]}: the store has not taken the request within {_REQUEST_S:g} s") from None

        call_s3 = sync_wrapper(_call_s3)

    return S3


def _guarded(parts: Callable[[], Iterable[Bytes]]) -> Iterator[Bytes]:
    """The parts, with what they raise told apart from what the storage raises."""
    try:
        yield from parts()
    except Exception as error:
        raise _SourceFailedError from error


def _fill(file: int, offset: int, outs: list[Bytes]) -> int:
    """Read on until the buffers are full; returns the offset after them."""
    while outs:
        got = os.preadv(file, [out.data for out in outs], offset)
        if got == 0 and any(out.nbytes for out in outs):
            missing = sum(out.nbytes for out in outs)
            raise StorageError(f"the file ends {missing} bytes too early", errno=errno.ENODATA)
        offset += got
        while outs and got >= outs[0].nbytes:
            got -= outs.pop(0).nbytes
        if outs:
            outs[0] = outs[0][got:]
    return offset


def _begin_writing(file: int, size: int, begun: int) -> int:
    """Have the disk begin with what was written since `begun`, if it is a good deal; returns what it has begun with.

    Left to itself the system keeps it all until `fsync`, and the disk rests while parts are hashed. It may never be far behind:
    whoever looks how much was taken would take what lies in memory for it.
    """
    if size - begun < PART_BYTES:
        return begun
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(file, begun, size - begun, 2)  # SYNC_FILE_RANGE_WRITE; nothing hangs on it, fsync tells of errors
        if begun > _BEHIND_BYTES:
            _SYNC_FILE_RANGE(file, 0, begun - _BEHIND_BYTES, 1)  # SYNC_FILE_RANGE_WAIT_BEFORE
    return size


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
