"""Files that are whole or not there."""

import errno
import hashlib
import os
import socket
import threading

import pytest

from pipeline import files
from pipeline.errors import MachineError, of_the_machine
from pipeline.files import (
    check_writable,
    create_durably,
    parse_json,
    parse_yaml,
    read_file,
    sha256_of,
    sync_folder,
    whole_file,
    write_durably,
)


def test_a_file_whose_writer_fails_keeps_its_old_content(tmp_path):
    """A reader meets the file before or the file after, never half of one."""
    path = tmp_path / "deep" / "file"
    write_durably(path, b"old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"old"
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_the_content_then_the_name_are_on_the_disk_before_the_call_returns(tmp_path, monkeypatch):
    """A power cut between any two of the three calls leaves the old file or the new one."""
    calls, fsync, replace = [], os.fsync, os.replace
    is_folder = lambda fd: os.path.isdir(f"/proc/self/fd/{fd}")  # noqa: E731
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append("folder" if is_folder(fd) else "file"), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("rename"), replace(*a)))
    digest = write_durably(tmp_path / "file", b"content")
    assert calls == ["file", "rename", "folder"]
    assert digest == hashlib.sha256(b"content").hexdigest()
    calls.clear()
    with whole_file(tmp_path / "file", durable=False) as file:
        file.write(b"quick")
    assert calls == ["rename"]


def test_a_full_disk_leaves_no_temporary(tmp_path, monkeypatch):
    """fsync is where a network file system says that there was no room."""

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_durably(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_of_many_writers_one_makes_the_file(tmp_path, monkeypatch, links):
    """What the first wrote stays, on file systems without hard links too."""
    if not links:

        def refuse(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    made, start = [], threading.Barrier(8)

    def write(number):
        start.wait()
        if create_durably(tmp_path / "claim", b"%d" % number):
            made.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (tmp_path / "claim").read_bytes() == b"%d" % made[0]
    assert [p.name for p in tmp_path.iterdir()] == ["claim"]


def test_a_link_whose_answer_was_lost_is_ours(tmp_path, monkeypatch):
    """NFS sends the request again and hears that the file exists: its own."""
    link = os.link

    def twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert create_durably(tmp_path / "claim", b"mine")
    assert not create_durably(tmp_path / "claim", b"theirs")
    assert (tmp_path / "claim").read_bytes() == b"mine"


def test_a_secret_is_its_owner_s_from_the_first_byte(tmp_path, monkeypatch):
    """Made for all and then closed to them, it could be read in between."""
    modes, write = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (modes.append(os.fstat(fd).st_mode & 0o777), write(fd)))  # fmt: skip
    write_durably(tmp_path / "a", b"secret", mode=0o600)
    assert create_durably(tmp_path / "b", b"secret", mode=0o600)
    folder = tmp_path.stat().st_mode & 0o777
    assert [mode for mode in modes if mode != folder] == [0o600, 0o600]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_sha256_of_a_file_and_of_its_bytes_agree_with_hashlib(tmp_path):
    """Also beyond one block of reading."""
    content = os.urandom(5 * 2**20 + 3)
    (tmp_path / "file").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert sha256_of(tmp_path / "file") == sha256_of(content) == expected
    assert sha256_of(memoryview(content)) == expected


def test_folders_that_cannot_be_synced_are_let_be(tmp_path, monkeypatch):
    """Some network file systems order names themselves and refuse the call."""

    def refuse(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)


def test_only_ordinary_files_of_a_bounded_size_are_read(tmp_path):
    """A pipe without a writer would be waited for, a device has no end, a huge file no room."""
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "out").symlink_to("/proc/version")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    assert read_file(tmp_path / "file", most=5) == read_file(tmp_path / "link") == b"12345"
    assert read_file("/proc/version").startswith(b"Linux"), "its size is 0 and its content is not"
    assert read_file(tmp_path / "out"), "links may lead anywhere"
    for name, kwargs, reason in [
        ("file", {"most": 4}, "such a file has at most 4"),
        ("out", {"most": 4}, "such a file has at most 4"),
        ("out", {"inside": tmp_path}, "a link leads out of its folder"),
        ("zero", {}, "not an ordinary file"),
        ("pipe", {}, "not an ordinary file"),
        ("socket", {}, "not an ordinary file"),
        (".", {}, "not an ordinary file"),
        ("a\0b", {}, "null"),
        ("nothing", {}, "No such file"),
    ]:
        with pytest.raises(OSError, match=reason):
            read_file(tmp_path / name, **kwargs)
    with pytest.raises(OSError, match="not an ordinary file"):
        sha256_of(tmp_path / "pipe")


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"[" * 100_000, b"1" * 5000, ""])
def test_whatever_is_wrong_with_a_json_text_is_one_error(raw):
    with pytest.raises(ValueError):  # noqa: PT011  # what it says is the parser's
        parse_json(raw)


@pytest.mark.parametrize(
    "raw",
    [b"{", b"\xff", "[" * 20_000, "a: &x 1\nb: *x\n", b"a: !!python/none"]
    + ["!!bool x", "!!timestamp x", "!!int ''", "!!float x", "2020-99-99"],
)
def test_whatever_is_wrong_with_a_yaml_text_is_one_error(raw):
    """Aliases too: ten lines of them are a value whose text takes all memory. Tags are believed by
    the library: of three it raises KeyError, AttributeError and IndexError.
    """
    assert parse_yaml(b"a: [1, x]\nb: '*x'\n") == {"a": [1, "x"], "b": "*x"}
    with pytest.raises(ValueError):  # noqa: PT011  # what it says is the parser's
        parse_yaml(raw)


def test_a_link_under_the_name_of_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    """Whoever foresees the name could have any file of ours overwritten."""
    names = set()
    for _ in range(2):
        with files.whole_file(tmp_path / "new") as file:
            names.add(file.name)
    assert len(names) == 2, "no two writers agree on a name"
    monkeypatch.setattr(files, "_writer", lambda: "planted")
    (tmp_path / "victim").write_bytes(b"dear")
    (tmp_path / "new.planted.tmp").symlink_to("victim")
    with pytest.raises(FileExistsError):
        files.write_durably(tmp_path / "new", b"other")
    assert (tmp_path / "victim").read_bytes() == b"dear"


def _another_user(folder):
    folder.mkdir()
    os.chown(folder, 12345, 12345)


PLANTED = {
    "a link": lambda folder: folder.symlink_to(folder.parent / "elsewhere"),
    "another user's": _another_user,
    "open to others": lambda folder: (folder.mkdir(), folder.chmod(0o777)),
    "a file": lambda folder: folder.write_bytes(b""),
}


@pytest.mark.parametrize("planted", ["nothing", *PLANTED])
def test_compiled_kernels_are_kept_where_nobody_else_can_put_any(tmp_path, monkeypatch, planted):
    """/tmp/triton-$USER and Inductor's own /tmp/torchinductor_$USER could be made by anybody, and what lies there is run."""
    if planted == "another user's" and os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    if planted != "nothing":
        PLANTED[planted](tmp_path / f"pretrain-{os.getuid()}")
    files.own_compiled_code()
    own = tmp_path / f"pretrain-{os.getuid()}"
    folder = own if planted == "nothing" else tmp_path / "home" / "pretrain"
    assert os.environ["TRITON_CACHE_DIR"] == str(folder / "triton")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
    if planted == "nothing":
        assert own.stat().st_mode & 0o777 == 0o700
        monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
        files.own_compiled_code()
        assert os.environ["TRITON_CACHE_DIR"] == "mine"


def test_a_place_that_takes_no_file_is_found_before_the_work(tmp_path):
    """An hour of scoring was lost to a folder that was read-only."""
    check_writable(tmp_path / "new" / "folder" / "file", "output=")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        MachineError, match="cannot be written .it is a folder, no file.. Choose another"
    ):
        check_writable(tmp_path, "output=")
    for place in ("/proc/nothing/here", "/sys/x"):  # for root too, whom no right stops
        with pytest.raises(MachineError, match=rf"{place} cannot be written .* output="):
            check_writable(files.Path(place), "output=")


def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path):
    """output=/dev/null put a file there for everybody on the machine, where one may write to /dev."""
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(MachineError, match="pipe cannot be written .it is a device or pipe.*out"):
        check_writable(pipe, "output=")
    with pytest.raises(FileExistsError) as caught:
        write_durably(pipe, b"{}")
    assert pipe.is_fifo() and [*tmp_path.iterdir()] == [pipe]
    refused = of_the_machine(caught.value)
    assert str(refused) == f"{pipe}: it is a device or pipe, no file. Give the name of a file."
