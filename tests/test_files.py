"""Files that are whole or not there."""

import errno
import hashlib
import os
import threading

import pytest

from pipeline.files import create_durably, sha256_of, sync_folder, whole_file, write_durably


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
