"""Files that are whole or not there, whatever is killed or unplugged meanwhile; for both packages.

    whole_file, write_durably    a temporary beside it -> fsync -> rename -> fsync of the folder
    create_durably               the same, but the first writer wins: a claim that two cannot make
    sha256_of                    of a file in blocks, or of bytes
    regular_file                 no pipe, no device, no link out of its folder
    open_regular, read_file      of a stranger: an ordinary file, of a bounded size
    check_writable               asked before the work whose result a file is to take
    own_name                     opens for writing: no link, no pipe
    check_no_links               a run folder in which every name is its own
    make_own                     a folder under a name that others could foresee, of this user
    parse_json, parse_yaml       its content, where whatever is wrong with it is a ValueError

A rename alone protects from a kill, not from a power cut: without the first fsync the name may come
back with an empty file, without the second the old file may come back.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import MachineError

MOST_BYTES = 1 << 26
"""Of a small file: a config, a record, a list of names. Real ones have a thousandth of that."""
_BLOCK_BYTES = 1 << 22
# What file systems without hard links answer: exFAT, some FUSE and object-store mounts.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@contextlib.contextmanager
def whole_file(
    path: Path, *, scratch: Path | None = None, durable: bool = True, mode: int = 0o666
) -> Iterator[BinaryIO]:
    """A file that gets its name, on disk to stay, when the block ends without an error.

    Args:
        path: final name; its folder is made.
        scratch: folder of the same file system for what a kill leaves unfinished; None: `path`'s.
        durable: false spares the two fsyncs, tens of milliseconds on a network file system; then a
            power cut may leave an empty file, and the reader must cope.
        mode: who may read it, less the umask; of a secret 0o600, from its first byte on.
    """
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = (scratch or path.parent) / f"{path.name}.{_writer()}.tmp"
    try:
        # "x": a link that somebody has put under this name is not followed.
        opener = partial(os.open, mode=mode)
        with open(unfinished, "xb", buffering=1 << 20, opener=opener) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.filename = error.filename or str(path)  # a write does not say of what
        raise
    if durable:
        sync_folder(path.parent)


def check_writable(path: Path, setting: str) -> None:
    """Raise MachineError unless a file of this name could be written; asked before the work.

    Folders that are not there yet would be made; the nearest that is takes a block without a name.
    `setting` names another place: `output=`.
    """
    there = next(p for p in path.absolute().parents if p.exists())
    try:
        _check_replaceable(path)
        with tempfile.TemporaryFile(dir=there, buffering=0) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise MachineError(
            f"{path} cannot be written ({error.strerror}). Choose another place with {setting}..."
        ) from None


def write_durably(
    path: Path, data: bytes, *, scratch: Path | None = None, mode: int = 0o666
) -> str:
    """Hex sha256 of `data`, which is on the disk under `path` when this returns; see whole_file."""
    with whole_file(path, scratch=scratch, mode=mode) as file:
        file.write(data)
    return sha256_of(data)


def create_durably(
    path: Path, data: bytes, *, scratch: Path | None = None, mode: int = 0o666
) -> bool:
    """Whether this call made the file; false when there is one, which stays as it is.

    Of any number of processes, on any number of machines that share the file system, one gets true.

    Args:
        path, data, scratch, mode: see write_durably.
    """
    unfinished = (scratch or path.parent) / f"{path.name}.{_writer()}.new.tmp"
    write_durably(unfinished, data, mode=mode)
    try:
        os.link(unfinished, path)
        made = True
    except FileExistsError:
        # NFS repeats a request whose answer was lost: then the link that is in the way is our own.
        made = os.stat(unfinished).st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        made = _create_without_links(path, unfinished)
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
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # NFS orders names itself
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
    _check_regular(_status(path), path)
    real, folder = os.path.realpath(path), os.path.realpath(inside or path.parent)
    if os.path.commonpath([real, folder]) != folder:
        raise OSError(errno.ELOOP, f"a link leads out of its folder, to {real}")
    return path


def open_regular(path: str | Path, *, buffering: int = 0) -> BinaryIO:
    """`path` for reading, when it is an ordinary file or a link to one; never waits.

    Raises:
        OSError: it is missing; or a folder, pipe, socket or device.
    """
    _check_regular(_status(path), path)  # first: to open a device may have an effect
    # A pipe that took its place meanwhile would be waited for without O_NONBLOCK.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(descriptor), path)
        return open(descriptor, "rb", buffering=buffering)
    except BaseException:
        os.close(descriptor)
        raise


def read_file(
    path: str | Path, *, most: int = MOST_BYTES, inside: str | Path | None = None
) -> bytes:
    """Content of an ordinary file of at most `most` bytes.

    Args:
        path: of the file; links are followed, as download caches consist of them.
        most: bytes that a file of this kind may have.
        inside: folder that a link must not lead out of; None: wherever.

    Raises:
        OSError: it is missing, larger, no ordinary file, or a link leads out of `inside`.
    """
    if inside is not None:
        regular_file(path, inside=inside)
    with open_regular(path) as file:
        size, blocks = os.fstat(file.fileno()).st_size, list[bytes]()  # files of /proc: size 0
        while size <= most and (block := file.read(max(size, _BLOCK_BYTES))):  # whole, at once
            blocks.append(block)
            size = max(size, sum(map(len, blocks)))
    if size > most:
        raise OSError(errno.EFBIG, f"{size} bytes; such a file has at most {most}", str(path))
    return b"".join(blocks)


def own_name(path: str, flags: int) -> int:
    """For `opener=` of open(): a link under this name is not followed, a pipe not waited for."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def check_no_links(folder: Path) -> None:
    """Refuse a run folder in which a name stands for something elsewhere.

    W&B's own folder, which is full of links of its making, is not looked into and may be elsewhere.

    Raises:
        MachineError: it holds a link: what a run writes, appends and prunes would not stay inside.
    """
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder and "wandb" in folders:
            folders.remove("wandb")
        if links := [path for n in folders + names if (path := Path(parent, n)).is_symlink()]:
            raise MachineError(
                f"{folder} holds the link {min(links).relative_to(folder)}; a run writes into its "
                "own folder only. Put the files there, or let the whole folder be the link."
            )


def temporary_folder() -> Path:
    """Where this user's programs keep what another start on this machine can do without."""
    return Path(tempfile.gettempdir()) / f"pretrain-{os.getuid()}"


def make_own(folder: Path) -> None:
    """Make a folder under a name that others could foresee.

    Raises:
        OSError: somebody else has made it, or could write to it, or it is a link, through which
            would be written.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise OSError(errno.EPERM, "it is not a folder of this user", str(folder))
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(errno.EPERM, "others can write to this folder", str(folder))
    folder.chmod(0o700)


def own_compiled_code() -> None:
    """Let Triton and Inductor keep compiled kernels where nobody else can put any.

    On the node's own disk: thousands of ranks must not lock files in one home directory. A kernel
    is code, and Inductor's own choice is a name in /tmp that anybody can take first. What the
    environment says already stays. Call before torch is imported.
    """
    try:
        make_own(folder := temporary_folder())
    except OSError:  # somebody was there first
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(home) / "pretrain"
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))


def size_of(path: Path) -> int:
    """Bytes of a file; -1: there is none that can be seen."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def parse_json(raw: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, not UTF-8, or nested beyond reason.
    """
    try:
        return json.loads(raw.decode() if isinstance(raw, bytes) else raw)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(raw: bytes | str) -> Any:
    """The value of a YAML text without aliases, by which ten lines are a value of any size.

    Raises:
        ValueError: not YAML, not UTF-8, nested beyond reason, or with an alias.
    """
    import yaml

    try:
        text, depth = raw.decode() if isinstance(raw, bytes) else raw, 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has an alias (*name), which no file of ours has")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > 100:  # the parser's time grows with its square: 20,000 take half a minute
                raise ValueError("it is nested too deeply")
        return yaml.safe_load(text)
    except (yaml.YAMLError, LookupError, AttributeError) as error:  # the latter two: of `!!bool x`
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _status(path: str | Path) -> os.stat_result:
    try:
        return os.stat(path)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))


def _check_replaceable(path: Path) -> None:
    """A rename would put a file in the place of /dev/null, for everybody on the machine."""
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device or pipe"
        raise FileExistsError(errno.EEXIST, f"it is a {kind}, no file", str(path))


def sha256_of(content: bytes | memoryview | Path) -> str:
    """Hex sha256 of bytes, or of an ordinary file's content.

    Raises:
        OSError: as open_regular.
    """
    if not isinstance(content, Path):
        return hashlib.sha256(content).hexdigest()
    digest, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    with open_regular(content) as stream:
        while count := stream.readinto(block):  # type: ignore[attr-defined]  # it is raw
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def _writer() -> str:
    """A word that nobody can foresee: tells writers apart, and a planted file is never met."""
    return f"{os.getpid()}.{secrets.token_hex(6)}"
