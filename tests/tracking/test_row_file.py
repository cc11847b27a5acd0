"""Lines of metrics.jsonl survive a full disk, a deleted folder and a read-only one, each once and in order."""

import errno
import os
import shutil
import subprocess

import pytest

from pipeline.tracking import row_file
from pipeline.tracking.row_file import RowFile


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def lines(count, first=0):
    return [b'{"step": %06d}\n' % number for number in range(first, first + count)]


def test_a_full_disk_costs_no_line(small_disk):
    """Half a line is not left behind either: a reader may look in between."""
    ballast = small_disk / "ballast"
    rows = RowFile(small_disk / "metrics.jsonl")
    for line in lines(100):
        rows.append(line)
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(bytes(1 << 20))
    for line in lines(1000, first=100):
        rows.append(line)
    seen = (small_disk / "metrics.jsonl").read_bytes()
    assert seen.endswith(b"\n") and len(seen) < 1000 * 17, "the disk was full"
    ballast.unlink()
    rows.append(b'{"step": 001100}\n')
    assert (small_disk / "metrics.jsonl").read_bytes() == b"".join(lines(1101))
    rows.close()


def test_a_disk_that_is_read_only_for_a_while_costs_no_line(small_disk):
    rows = RowFile(small_disk / "metrics.jsonl")
    rows.append(lines(1)[0])
    rows._forget()  # a file that is open for writing keeps the kernel from remounting
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for line in lines(10, first=1):
        rows.append(line)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    rows.append(lines(1, first=11)[0])
    assert (small_disk / "metrics.jsonl").read_bytes() == b"".join(lines(12))
    rows.close()


def test_a_deleted_folder_is_made_again(tmp_path):
    """What was in it is gone, what comes is kept: an open file without a name would take it all."""
    rows = RowFile(tmp_path / "run" / "metrics.jsonl")
    rows.append(b"1\n")
    shutil.rmtree(tmp_path / "run")
    rows.append(b"2\n")
    rows.append(b"3\n")
    rows.close()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b"2\n3\n"


def test_memory_is_bounded_and_what_is_lost_is_counted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(row_file, "MAX_WAITING_BYTES", 40)
    monkeypatch.setattr(row_file.logger, "propagate", True)
    (tmp_path / "run").write_text("a file where the folder should be")
    rows = RowFile(tmp_path / "run" / "metrics.jsonl")
    for number in range(10):
        rows.append(b"%09d\n" % number)
    assert rows.num_lost == 6
    rows.close()
    assert "10 lines could not be written and are lost" in caplog.text


def test_a_write_that_takes_a_part_only_is_taken_back(tmp_path, monkeypatch):
    """What the kernel does at the end of the space, on systems without mounts too."""
    rows = RowFile(tmp_path / "metrics.jsonl")
    rows.append(b"whole\n")

    class Full(row_file.FileIO):
        def write(self, data):
            if os.fstat(self.fileno()).st_size > len(b"whole\n"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:3])

    with monkeypatch.context() as full:
        full.setattr(row_file, "FileIO", Full)
        rows._forget()
        rows.append(b"second\n")
        assert (tmp_path / "metrics.jsonl").read_bytes() == b"whole\n"
    rows.append(b"third\n")
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"whole\nsecond\nthird\n"
    rows.close()
