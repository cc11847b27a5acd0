"""Folders of a dataset: a local one as it is, a remote one through a cache that a node shares.

    s3:// gs:// http(s):// ...  --ranges, retries, sha256-->  <cache>/<manifest sha256>/shards/...
                                --mmap-->  reader

Files appear whole (written aside, then renamed) and the least recently used ones make room. Ranks
agree through locks on the files themselves: a shard is downloaded once a node, and a killed process
leaves nothing that blocks the others.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.data.dataset_files import MOST_BYTES
from pipeline.errors import ConfigError, DataError, MachineError, PipelineError, ShardError
from pipeline.files import sha256_of, write_durably
from pipeline.log import logger
from pipeline.remote import connect, read_range, read_small

CHUNK_BYTES = 8 << 20  # one request; what a broken connection costs
ATTEMPTS = 8  # of one request, about a minute in all
FIRST_PAUSE_S = 0.25  # doubles with every attempt, up to
LONGEST_PAUSE_S = 20.0
DOWNLOADS = 4  # in the background, at a time, per rank


@dataclass(frozen=True)
class RemoteFile:
    """A file of a dataset, as the manifest describes it."""

    path: str
    size_bytes: int
    sha256: str


class Folder(Protocol):
    """Where the files of one dataset are."""

    local: Path
    """Folder with manifest.json, index.npy and tokenizer.json on this machine."""
    is_remote: bool

    def fetch(self, file: RemoteFile) -> Path:
        """Local path of a shard; waits until it is there."""

    def prefetch(self, files: Sequence[RemoteFile]) -> None:
        """Begin to fetch shards, the first ones first."""


class LocalFolder:
    """A folder on a local or parallel file system."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.local = path

    def fetch(self, file: RemoteFile) -> Path:
        """The file itself."""
        return self.local / file.path

    def prefetch(self, files: Sequence[RemoteFile]) -> None:
        """Nothing: reading ahead is the file system's business."""


def open_folder(path: str, *, cache_dir: Path, size_bytes: int) -> Folder:
    """The folder behind a path or URL; a remote manifest, index and tokenizer are fetched here.

    Raises:
        ConfigError: the protocol is unknown or its package is not installed.
        DataError: the manifest cannot be read.
    """
    protocol, found, rest = path.partition("://")
    if not found or protocol == "file":
        return LocalFolder(Path(rest if found else path))
    return RemoteFolder(path, cache_dir=cache_dir, size_bytes=size_bytes)


class RemoteFolder:
    """A dataset on an object store or web server, cached in <cache_dir>/<part of its sha256>."""

    is_remote = True

    def __init__(self, url: str, *, cache_dir: Path, size_bytes: int) -> None:
        self.url, self.cache_dir, self.size_bytes = url.rstrip("/"), cache_dir, size_bytes
        self._fs, self._root = connect(self.url)
        manifest = self._small_file("manifest.json")
        self.local = cache_dir / sha256_of(manifest)[:16]
        # The manifest last: a folder that has one is whole.
        for name in ("tokenizer.json", "index.npy"):
            if not (self.local / name).exists():
                write_durably(self.local / name, self._small_file(name))
        write_durably(self.local / "manifest.json", manifest)
        self._wanted: queue.Queue[RemoteFile] = queue.Queue()
        self._queued: set[str] = set()
        self._threads: list[threading.Thread] = []

    def fetch(self, file: RemoteFile) -> Path:
        """Local path of a shard, downloaded if need be; marks it as recently used.

        Raises:
            ShardError: the shard is not there, or its bytes are not those of the manifest.
            DataError: the store cannot be reached.
            MachineError: the disk is full.
        """
        path = self.local / file.path
        while not _touch(path):
            self._fill(file, wait=True)
        return path

    def prefetch(self, files: Sequence[RemoteFile]) -> None:
        """Begin to download shards in the background, as many as the cache can hold at once."""
        room = self.size_bytes
        for file in files:
            room -= file.size_bytes
            if (
                room >= 0
                and file.path not in self._queued
                and not (self.local / file.path).exists()
            ):
                self._queued.add(file.path)
                self._wanted.put(file)
        if self._queued and not self._threads:
            # Daemons: a process that ends does not wait for what it will not read.
            self._threads = [
                threading.Thread(target=self._work, name="shards", daemon=True)
                for _ in range(DOWNLOADS)
            ]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        while True:
            file = self._wanted.get()
            # The fetch() that needs the shard meets the same error and raises it.
            with contextlib.suppress(Exception):
                self._fill(file, wait=False)
            self._queued.discard(file.path)

    def _fill(self, file: RemoteFile, *, wait: bool) -> None:
        """Download a shard unless another rank does; wait: return when that rank is done."""
        path = self.local / file.path
        aside = path.with_name(path.name + ".part")
        with _lock(aside, wait=wait) as part:
            if part is None:
                return
            if path.exists():  # finished between our look and our lock
                aside.unlink(missing_ok=True)
                return
            self._download(file, part, aside)
            aside.rename(path)

    def _download(self, file: RemoteFile, part: int, aside: Path) -> None:
        """Fill the locked part file; tries again once when the bytes are wrong."""
        for last in (False, True):
            try:
                self._make_room(file, part, aside)
                digest = hashlib.sha256()
                for start in range(0, file.size_bytes, CHUNK_BYTES):
                    chunk = self._range(file.path, start, min(start + CHUNK_BYTES, file.size_bytes))
                    os.pwrite(part, chunk, start)
                    digest.update(chunk)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise MachineError(
                        f"no space left in the shard cache {self.cache_dir}. Set "
                        f"data.cache_size_gib (now {self.size_bytes / 2**30:.1f}) below what is "
                        "free there, or data.cache_dir to another disk."
                    ) from None
                raise
            if digest.hexdigest() == file.sha256:
                return
            if last:
                raise ShardError(
                    f"{self.url}/{file.path} is corrupt: sha256 {digest.hexdigest()[:16]}, the "
                    f"manifest has {file.sha256[:16]} (downloaded twice). "
                    "Copy the shard again from where it was made."
                )

    def _make_room(self, file: RemoteFile, part: int, aside: Path) -> None:
        """Delete least recently used shards until one more fits.

        A reader that has one of them mapped keeps its bytes: they go with the last map.
        """
        if file.size_bytes > self.size_bytes:
            raise ConfigError(
                f"data.cache_size_gib ({self.size_bytes / 2**30:.3f}) is smaller than one shard "
                f"({file.size_bytes / 2**30:.3f} GiB); "
                "windows of data.window shards should fit twice."
            )
        with _lock(self.cache_dir / "lock", wait=True, keep=True):
            sizes = sorted(entry for entry in _cached(self.cache_dir) if entry[2] != aside)
            total = sum(size for _, size, _ in sizes)
            for _, size, path in sizes:
                if total + file.size_bytes <= self.size_bytes:
                    break
                # Being written, or left by a killed process: then its lock is free.
                if path.suffix == ".part":
                    with _lock(path, wait=False) as stale:
                        if stale is None:
                            continue
                        path.unlink(missing_ok=True)
                else:
                    path.unlink(missing_ok=True)
                total -= size
            os.ftruncate(part, file.size_bytes)  # from now on it counts in the sums of other ranks

    def _range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a remote file; tries again with growing pauses."""
        return self._retry(
            lambda: read_range(self._fs, f"{self._root}/{path}", start, stop),
            path,
            f"bytes {start} to {stop}",
        )

    def _small_file(self, path: str) -> bytes:
        """manifest.json, index.npy or tokenizer.json."""
        return self._retry(
            lambda: read_small(self._fs, f"{self._root}/{path}", most=MOST_BYTES),
            path,
            "the whole file",
        )

    def _retry(self, get: Any, path: str, what: str) -> bytes:
        """The bytes that `get` returns, asked again after errors that may pass."""
        for attempt in range(ATTEMPTS):
            try:
                return bytes(get())
            except PipelineError:
                raise
            except FileNotFoundError:
                raise ShardError(
                    f"{self.url}/{path} does not exist. "
                    "Copy the dataset again, or correct its path."
                ) from None
            except PermissionError as error:
                raise DataError(
                    f"{self.url}/{path} may not be read: {error}. "
                    "Check the credentials of this store."
                ) from None
            except (
                Exception
            ) as error:  # every store has its own: timeouts, resets, 5xx, short bodies
                if attempt == ATTEMPTS - 1:
                    raise DataError(
                        f"{self.url}/{path}: {what} could not be read in {ATTEMPTS} attempts; the "
                        f"last error was {type(error).__name__}: {error}. "
                        "Check the network and the store, then start again."
                    ) from error
                # Ranks spread out
                pause = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
                logger.warning(
                    "%s/%s: %s (%s), trying again in %.1f s",
                    self.url,
                    path,
                    type(error).__name__,
                    error,
                    pause,
                )
                time.sleep(pause)
        raise AssertionError("unreachable")


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool, keep: bool = False) -> Iterator[int | None]:
    """An open, exclusively locked descriptor of `path`, or None.

    None: another process has it, or has just finished with it.

    The lock lives on the file's inode and ends with its process. A part file is renamed or deleted
    when its work is done, so the name is checked again after waiting; keep: the file is a mere lock
    and always stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name can be foreseen: a link there would be written through.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise MachineError(f"the cache's {path} cannot be written: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield descriptor if keep or _is_same(descriptor, path) else None
    finally:
        os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _touch(path: Path) -> bool:
    """Mark a file as recently used; False: it does not exist."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _cached(cache_dir: Path) -> Iterator[tuple[float, int, Path]]:
    """(last use, size, path) of every shard in the cache, finished or in the making."""
    for path in cache_dir.glob("*/shards/*/*"):
        with contextlib.suppress(FileNotFoundError):  # another rank deleted or renamed it
            status = path.stat()
            yield status.st_mtime, status.st_size, path
