"""A run, its data and its input lie where nothing can be written: a colleague's folder, a snapshot, an archive.

chmod means nothing to root, as whom tests run in containers: each command gets a view of the folder that is read-only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.corpus import make_texts, write_jsonl
from tests.support.small_runs import overrides, write_data

ROOT = Path(__file__).resolve().parents[2]
VIEW = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"']  # fmt: skip
"""Before a folder and a command; the view ends with the command."""
REFUSED = "Read-only file system"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, its datasets, and a run of two steps on them."""
    folder = tmp_path_factory.mktemp("archive")
    if subprocess.run([*VIEW, str(folder), "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    write_jsonl(folder / "text.jsonl", make_texts(60))
    write_data(folder)
    words = overrides(folder, folder / "runs", **{"training.total_steps": 2, "schedule.warmup_steps": 1})  # fmt: skip
    assert pretrain([], "train", *words).returncode == 0
    words = [f"{folder}/text.jsonl", f"{folder}/tokens", f"tokenizer={folder}/tokenizer.json", "workers=1"]  # fmt: skip
    assert pretrain([], "tokenize", *words).returncode == 0
    return folder


def pretrain(view: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    """A command at the front door, behind the words that give it another view of the files."""
    command = [*view, sys.executable, "-m", "pipeline.pretrain", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def on(archive: Path, out: Path, command: str) -> subprocess.CompletedProcess[str]:
    """A command whose RUN, DATA and TEXT are the archive's, and OUT is not."""
    places = {"RUN": f"{archive}/runs/run", "RUNS": f"{archive}/runs", "DATA": f"{archive}", "TEXT": f"{archive}/text.jsonl", "OUT": f"{out}"}  # fmt: skip
    words = [word.format(**places) for word in command.split()]
    if words[0] == "train":
        name, runs = words[1:]
        more = {"training.total_steps": 4, "schedule.warmup_steps": 1}
        words = ["train", *overrides(archive, Path(runs), name, **more)]
    return pretrain([*VIEW, str(archive)], *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("generate {RUN} the max_new_tokens=4", "the"),
        ("evaluate {RUN} sequences=4 output={OUT}/scores.json", "perplexity"),
        ("export {RUN} {OUT}/exported", "written; logits of transformers and ours differ"),
        ("checkpoint list {RUN}", "step-00000002"),
        ("checkpoint show {RUN}", "layers.0"),
        ("checkpoint verify {RUN}", "step-00000002"),
        ("show {DATA}/train", "documents"),
        ("verify {DATA}/tokens", "train: whole"),
        ("tokenize {TEXT} {OUT}/tokens tokenizer={DATA}/tokenizer.json workers=1", ""),
        ("train other {OUT}/runs", "done at step 4 of 4"),
    ],
    ids=lambda value: "-".join(value.split()[:2]).replace("{", "").replace("}", ""),
)  # fmt: skip
def test_what_only_reads_works(archive: Path, tmp_path: Path, command: str, said: str) -> None:
    """No lock, no cache, no index beside what is read."""
    done = on(archive, tmp_path, command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert said in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "train run {RUNS}",
        "report {RUN}",
        "evaluate {RUN} sequences=4 output={RUN}/evaluation.json",
        "export {RUN} {RUN}/exported",
        "tokenize {TEXT} {DATA}/others tokenizer={DATA}/tokenizer.json workers=1",
    ],
    ids=lambda value: value.split()[0],
)
def test_what_would_write_there_says_so_in_a_sentence(archive: Path, tmp_path: Path, command: str) -> None:  # fmt: skip
    """At once, with the folder's name and a way out; the run stays as it was."""
    before = sorted((path, path.stat().st_mtime_ns) for path in archive.rglob("*"))
    done = on(archive, tmp_path, command)
    assert done.returncode == 2, done.stdout + done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and str(archive) in lines[0] and REFUSED in lines[0], done.stderr
    assert "hoose another" in lines[0] and "Traceback" not in done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in archive.rglob("*")) == before
