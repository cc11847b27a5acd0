"""Files that are whole or not there, whatever is killed or unplugged meanwhile; for both packages.

    whole_file, write_durably    a temporary beside it -> fsync -> rename -> fsync of the folder
    create_durably               the same, but the first writer wins: a claim that two cannot make
    sha256_of                    of a file in blocks, or of bytes
    regular_file                 no pipe, no device, no link out of its folder

A rename alone protects from a kill, not from a power cut: without the first fsync the name may come
back with an empty file, without the second the old file may come back.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_BLOCK_BYTES = 1 << 22
# What file systems without hard links answer: exFAT, some FUSE and object-store mounts.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@contextlib.contextmanager
def whole_file(
    path: Path, *, scratch: Path | None = None, durable: bool = True
) -> Iterator[BinaryIO]:
    """A file that gets its name, on disk to stay, when the block ends without an error.

    Args:
        path: final name; its folder is made.
        scratch: folder, on the same file system, where an unfinished file may be left by a kill;
            None: beside `path`.
        durable: false spares the two fsyncs, tens of milliseconds on a network file system; then a
            power cut may leave an empty file, and the reader must cope.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = (scratch or path.parent) / f"{path.name}.{_writer()}.tmp"
    try:
        with open(unfinished, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_durably(path: Path, data: bytes, *, scratch: Path | None = None) -> str:
    """Hex sha256 of `data`, which is on the disk under `path` when this returns; see whole_file."""
    with whole_file(path, scratch=scratch) as file:
        file.write(data)
    return sha256_of(data)


def create_durably(path: Path, data: bytes, *, scratch: Path | None = None) -> bool:
    """Whether this call made the file; false when there is one, which stays as it is.

    Of any number of processes, on any number of machines that share the file system, one gets true.

    Args:
        path: final name.
        data: content.
        scratch: see whole_file.
    """
    unfinished = (scratch or path.parent) / f"{path.name}.{_writer()}.new.tmp"
    write_durably(unfinished, data)
    try:
        os.link(unfinished, path)
    except FileExistsError:
        # NFS repeats a request whose answer was lost: then the link that is in the way is our own.
        made = os.stat(unfinished).st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        made = _create_without_links(path, unfinished)
    else:
        made = True
    finally:
        unfinished.unlink(missing_ok=True)
    if made:
        sync_folder(path.parent)
    return made


def _create_without_links(path: Path, unfinished: Path) -> bool:
    """create_durably where links are unknown: for a moment `path` is empty."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    os.replace(unfinished, path)
    return True


def sync_folder(folder: Path) -> None:
    """Put the folder's names on the disk; a file's own fsync does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # network file systems that order names themselves
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def regular_file(path: str | Path, *, inside: str | Path | None = None) -> Path:
    """`path`, when it is an ordinary file of the folder `inside` (None: the one it is named in).

    Raises:
        OSError: it is missing; or a pipe or device, which would be waited for; or a link leads
            out of the folder.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    if not path.resolve().is_relative_to(Path(inside or path.parent).resolve()):
        raise OSError(errno.ELOOP, f"a link leads out of its folder, to {path.resolve()}")
    return path


def sha256_of(content: bytes | memoryview | Path) -> str:
    """Hex sha256 of bytes, or of a file's content."""
    if not isinstance(content, Path):
        return hashlib.sha256(content).hexdigest()
    digest, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    with open(content, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def _writer() -> str:
    """Tells temporary files of different threads, processes and machines apart."""
    return f"{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}"
