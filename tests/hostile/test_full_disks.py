"""Outputs that take no byte: every command that writes one says so in a sentence and ends with exit code 2."""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.corpus import make_texts, write_jsonl
from tests.support.ranks import run_on_ranks
from tests.support.small_runs import overrides, train_on_ranks, write_data

TALK = {"messages": [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "dog"}]}
# DISK is full; RUN, DATA, TEXT, TALKS and TOKENIZER lie elsewhere. COPY is the run, on the full disk.
WRITE = {
    "report": "pipeline.report COPY",
    "sweep": "pipeline.sweep name=s runs_dir=DISK/runs run=false seed=1,2 data.path=DATA",
    "plan": "pipeline.plan model=tiny data.path=DATA page=DISK/plan.html",
    "evaluate": "pipeline.evaluate RUN sequences=2 output=DISK/evaluation.json",
    "export": "pipeline.export RUN DISK/exported",
    "probe": "pipeline.probe RUN sequences=2 output=DISK/probe",
    "answer": "pipeline.answer RUN TALKS output=DISK/predictions.jsonl",
    "activations": "pipeline.activations RUN place=blocks.0 sequences=2 output=DISK/activations",
    "memorization": "pipeline.memorization COPY windows=2 prefixes=[8] continuation=8",
    "train": "pipeline.train runs_dir=DISK/runs name=a data.path=DATA model=tiny training.total_steps=2",
    "train-tokenizer": "data_prep.train_tokenizer TEXT DISK/tokenizer.json vocab_size=300",
    "clean": "data_prep.clean TEXT DISK/clean clean=dedup",
    "tokenize": "data_prep.tokenize TEXT DISK/tokens tokenizer=TOKENIZER",
    "conversations": "data_prep.conversations TALKS DISK/talks tokenizer=TOKENIZER row_tokens=64 template=plain",
    "show": "data_prep.show DATA/train histogram=DISK/lengths.png",
}  # fmt: skip
PRINT = {
    "help": "pipeline.train --help",
    "config": "pipeline.train --cfg",
    "plan": "pipeline.plan model=tiny data.path=DATA",
    "report": "pipeline.report RUN",
    "checkpoint": "pipeline.checkpoint list RUN",
    "show": "data_prep.show DATA/train",
    "verify": "data_prep.verify DATA/train workers=1",
    "generate": "pipeline.generate RUN max_new_tokens=2",
    "evaluate": "pipeline.evaluate RUN sequences=2",
    "serve": "pipeline.serve RUN port=0",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of two steps and its data, a text, dialogues."""
    root = tmp_path_factory.mktemp("places")
    data = write_data(root / "data")
    small = {"training.total_steps": 2, "training.eval_every": 0, "schedule.warmup_steps": 1}
    run_on_ranks(train_on_ranks, 1, overrides(data, root / "runs", **small))
    (root / "text.txt").write_text("\n\n".join(make_texts(300)))
    return {
        "RUN": root / "runs" / "run", "DATA": data, "TEXT": root / "text.txt", "TOKENIZER": data / "tokenizer.json",
        "TALKS": write_jsonl(root / "talks.jsonl", ["x"] * 50, **TALK),
    }  # fmt: skip


@pytest.fixture
def disk(tmp_path: Path, places: dict[str, Path]) -> Iterator[Path]:
    """A real file system that holds a copy of the run, and then no byte more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        shutil.copytree(places["RUN"], folder / "run")
        with contextlib.suppress(OSError), open(folder / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def filled(command: str, places: dict[str, Path], disk: Path) -> list[str]:
    for name, path in {**places, "COPY": disk / "run", "DISK": disk}.items():
        command = command.replace(name, str(path))
    return command.split()


def end_of(words: list[str], output: str, errors: str) -> int:
    """Exit code of a command, as `python -m` runs it, in a process that has the libraries."""
    warnings.simplefilter("ignore")
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = words
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return int(ended.code or 0)
    return -1


def ended(words: list[str], output: str, folder: Path) -> tuple[int, str]:
    (code,) = run_on_ranks(end_of, 1, words, output, str(folder / "errors"))
    return code, (folder / "errors").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITE)
def test_a_full_disk_is_a_sentence(
    name: str, places: dict[str, Path], disk: Path, tmp_path: Path
) -> None:
    """Whether it is found before the work or after it: what, where, and what to do."""
    code, said = ended(filled(WRITE[name], places, disk), os.devnull, tmp_path)
    assert code == 2 and "Traceback" not in said, said
    last = said[said.rindex("error: ") :]
    assert str(disk) in last and ("No space" in last or " free" in last), said
    assert not [path for path in disk.rglob("*.tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITE)
def test_an_output_that_is_read_only_is_a_sentence(
    name: str, places: dict[str, Path], disk: Path, tmp_path: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code, said = ended(filled(WRITE[name], places, disk), os.devnull, tmp_path)
    assert code == 2 and "Traceback" not in said, said
    assert "Read-only" in said[said.rindex("error: ") :], said


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINT)
def test_a_full_standard_output_is_a_sentence(
    name: str, places: dict[str, Path], tmp_path: Path
) -> None:
    """Python wrote of an exception that it ignores, at its very end, with exit code 120."""
    code, said = ended(filled(PRINT[name], places, tmp_path), "/dev/full", tmp_path)
    assert code == 2 and said.endswith(
        "error: the output: No space left on device. Free some space there, or choose another place.\n"
    ), said
