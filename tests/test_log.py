"""Rank 0 speaks; the others only warn, and say who they are."""

import os
import subprocess
import sys

import pytest

from pipeline import log

SPEAK = """
import sys
from pipeline import log
log.setup(global_rank=int(sys.argv[1]))
log.setup(global_rank=int(sys.argv[1]))
log.logger.info("step 1")
log.logger.warning("slow disk")
"""


@pytest.mark.parametrize(
    "rank, lines", [(0, ["I step 1", "W slow disk"]), (3, ["[rank 3] W slow disk"])]
)
def test_ranks_above_0_only_warn(rank, lines):
    """A thousand ranks that all speak make a log that nobody reads; set up twice, nothing is said twice."""
    done = subprocess.run(
        [sys.executable, "-c", SPEAK, str(rank)], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert [line.partition(" ")[2] for line in done.stderr.splitlines()] == lines


def test_a_message_commands_no_terminal():
    code = "from pipeline import log; log.setup(); log.logger.info('a\\x1b[2Jb\\udcff')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.endswith("I a\\x1b[2Jb\\udcff\n")


def test_what_is_printed_commands_no_terminal(capsys, monkeypatch):
    """Names and texts of files are printed too; a byte that is no UTF-8 would end a strict stream."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log.open_standard_streams()
    log.open_standard_streams()
    print("a\x1b[2J\udcff\tb", "\x1b[32mgreen\x1b[0m")
    sys.stdout.flush()
    assert capsys.readouterr().out == "a\\x1b[2J\\udcff\tb \x1b[32mgreen\x1b[0m\n"


PRINT = """
from pipeline import log
log.open_standard_streams()
print("a\\fb\\x1b[2J\\u2028\\xe9\\udcff", end="")
"""


@pytest.mark.parametrize(
    "encoding, written",
    [
        ("utf-8", "a\fb\x1b[2J\u2028\xe9\\udcff"),
        ("ascii", "a\fb\x1b[2J\\u2028\\xe9\\udcff"),
    ],
)
def test_a_file_gets_what_is_printed(encoding, written):
    """Samples are kept in files: a form feed in one is its text. No encoding ends the command."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.stdout == written.encode()


@pytest.mark.parametrize(
    "num_bytes, words",
    [(0, "0 MiB"), (1000, "0.1 MiB"), (9.5e6, "9.1 MiB"), (14e6, "13 MiB"), (1e12, "931.3 GiB")],
)
def test_bytes_are_said_in_units_in_which_they_are_not_zero(num_bytes, words):
    """A checkpoint of a small model had 0.01 GiB."""
    assert log.in_units(num_bytes) == words


def test_long_messages_are_broken_between_words(caplog, monkeypatch):
    """The terminal of a newcomer has 80 columns; a warning was 160 wide."""
    monkeypatch.setattr(log.logger, "propagate", True)
    words = "four ranks wait for each other " * 5
    log.warning(words)
    shown = [record.getMessage() for record in caplog.records]
    assert 1 < len(shown) and all(len("23:59:59 W ") + len(line) <= 78 for line in shown)
    assert " ".join(line.strip() for line in shown) == words.strip()
