"""Benchmarks start as files, beside one that is called tokenize.py, and the ladder climbs its smallest rung."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.name for path in (ROOT / "benchmarks").glob("[a-z]*.py"))


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", FILES)
def test_help_of_every_benchmark(name: str) -> None:
    assert len(run(f"benchmarks/{name}", "--help").splitlines()) > 5


def test_a_contender_that_says_much_is_heard_out(tmp_path: Path) -> None:
    """Nobody read what its processes wrote beside their numbers: 64 KiB of warnings and they waited for ever."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys\n"
        "print('w' * 300_000, file=sys.stderr, flush=True)\n"
        "print('x' * 300_000, flush=True)\n"
        "print('{\"loss\": 2.5}', flush=True)\n"
        "input()\n"
        "sys.exit('no kernel')\n"
    )
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks import parallel
parallel.__file__ = {str(worker)!r}
contender = parallel.Contender("DDP", "fp32")
print(contender.answer())
try:
    contender.answer(3)
except ChildProcessError as error:
    print(str(error).splitlines()[-1])
contender.stop()
"""
    assert run("-c", program).splitlines() == ["{'loss': 2.5}", "no kernel"]


SCRIPT = """
import argparse, json, sys
sys.path.append(sys.argv[0].rpartition("/tools/")[0])
import megatron.core
parser = argparse.ArgumentParser()
for name in ("input", "output-prefix", "tokenizer-type", "tokenizer-model", *MORE):
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("--append-eod", action="store_true")
parser.add_argument("--use-gigatoken", action="store_true")
args = parser.parse_args()
assert args.tokenizer_type == "HuggingFaceTokenizer" and args.append_eod
json.load(open(args.tokenizer_model + "/tokenizer.json"))
assert json.load(open(args.tokenizer_model + "/tokenizer_config.json"))["eos_token"] == "<|endoftext|>"
open(args.output_prefix + "_text_document.bin", "w").write(megatron.core.__file__)
"""


def test_scripts_of_megatron_get_what_they_take(tmp_path: Path) -> None:
    """The fast one knows no --workers, both want a tokenizer's folder, and an installed megatron-core is another than theirs."""
    checkout, work = tmp_path / "checkout", tmp_path / "work"
    for folder in (checkout / "megatron" / "core", checkout / "tools", work / "out"):
        folder.mkdir(parents=True)
    (checkout / "megatron" / "core" / "__init__.py").touch()
    for name, more in (("preprocess_data", "['workers']"), ("preprocess_data_fast", "[]")):
        (checkout / "tools" / f"{name}.py").write_text(SCRIPT.replace("MORE", more))
    (work / "tokenizer-9.json").write_text("{}")
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks import tokenize as b
cfg, work = b.BenchConfig(megatron={str(checkout)!r}), Path({str(work)!r})
commands = b.commands(cfg, work, "tiny", work / "tokenizer-9.json")
for name in ("megatron", "megatron_fast"):
    print(b.measure(commands[name], path=b.path_of(cfg, name))[0] > 0, b.path_of(cfg, "ours") == b.ROOT)
    print(Path(work / "out" / "megatron_text_document.bin").read_text())
"""
    core = str(checkout / "megatron" / "core" / "__init__.py")
    assert run("-c", program).splitlines() == ["True True", core] * 2


STUB = """
class MDSWriter:
    def __init__(self, out, columns):
        import json, transformers
        self.out, self.rows = open(out + ".json", "w"), []
        self.facts = {"columns": columns, "transformers": transformers.__version__}
    def __enter__(self):
        return self
    def write(self, sample):
        self.rows.append(sample["tokens"].tolist())
    def __exit__(self, *_):
        import json
        json.dump({"rows": self.rows, **self.facts}, self.out)
        self.out.close()
"""


def test_a_contender_that_wants_other_libraries_has_a_python_of_its_own(tmp_path: Path) -> None:
    """mosaicml-streaming wants transformers below 5, which this project needs: one environment cannot have both."""
    theirs = tmp_path / "theirs"
    (theirs / "streaming").mkdir(parents=True)
    (theirs / "streaming" / "__init__.py").write_text(STUB)
    (theirs / "transformers.py").write_text("__version__ = '4.99'\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={theirs} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from pathlib import Path
from benchmarks import loader
from benchmarks.contenders.loader_data import NUM_SHARDS, SEQ_LEN, streaming_problem
folder = Path({str(tmp_path)!r})
np.arange(NUM_SHARDS * (2 * SEQ_LEN + 1), dtype=np.uint16).tofile(folder / "tokens.bin")
print(streaming_problem({str(python)!r}), streaming_problem(sys.executable), streaming_problem("/nowhere/python"), sep="|")
print(loader.in_process("mds", str(folder), 0.0, python={str(python)!r}))
"""
    problems, samples = run("-c", program).splitlines()
    assert problems == "|ModuleNotFoundError: No module named 'streaming'|/nowhere/python: No such file or directory"  # fmt: skip
    assert samples == "{'samples': 32}"
    written = json.loads((tmp_path / "mds.json").read_text())
    assert written["transformers"] == "4.99"
    assert [row[0] for row in written["rows"][:3]] == [0, 2048, 4097]
    assert {len(row) for row in written["rows"]} == {2049}


def test_a_profile_says_what_part_of_a_collective_hid_behind_operators() -> None:
    """By hand: reductions 0 to 4 and 3 to 6, a gather 8 to 10; operators 1 to 2, 1.5 to 3 and 9 to 12; two steps."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.parallel import overlap
spans = [("gloo:all_reduce", 0, 4), ("gloo:all_reduce", 3, 6), ("gloo:all_gather", 8, 10), ("wait", 0, 20)]
spans += [("aten::mm", 1, 2), ("aten::add", 1.5, 3), ("aten::mm", 9, 12)]
print("\\n".join(overlap(spans, 2)))
"""
    assert [line.split() for line in run("-c", program).splitlines()] == [
        "1.00 ms 0.5 times gloo:all_gather under way; 0.50 ms of it (50%) beside operators".split(),
        "3.00 ms 1.0 times gloo:all_reduce under way; 1.00 ms of it (33%) beside operators".split(),
        "4.00 ms 1.5 times any collective under way; 1.50 ms of it (38%) beside operators".split(),
    ]


def test_a_check_of_a_device_ends_with_a_table_whatever_happens(tmp_path: Path) -> None:
    """A device is lent for minutes: a stage that fails, hangs or does not fit costs only itself."""
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from benchmarks import gpu_check as c
stages = [
    c.Stage("good", 60, ("-c", "print('first'); print('{{}}')")),
    c.Stage("bad", 60, ("-c", "import sys; sys.exit('no kernel')")),
    c.Stage("hangs", 1, ("-c", "import time; time.sleep(600)")),
    c.Stage("large", 60, ("-c", ""), least_gib=130),
]
print(c.check(stages, out=Path({str(tmp_path)!r}), budget_s=300, cpu=True))
print(c.check(stages[:1], out=Path({str(tmp_path)!r}), budget_s=c.LEAST_S - 1, cpu=True))
"""
    lines = run("-c", program).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    assert [(row[0], row[1]) for row in rows if row[0] not in ("stage", "---")] == [
        ("good", "ok"), ("bad", "failed (1)"), ("hangs", "time limit"), ("large", "needs 130 GiB"), ("good", "not reached"),
    ]  # fmt: skip
    assert rows[2][3] == "{}" and rows[3][3] == "no kernel"
    assert (lines[6], lines[-1]) == ("2", "1")  # that did not end well
    assert (tmp_path / "table.md").read_text().splitlines() == lines[-4:-1]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 5


def test_another_checkout_is_measured_in_the_same_rounds() -> None:
    """Runs of one commit after those of another showed 16 % that was the neighbours' noise."""
    program = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {str(ROOT)!r})
from benchmarks import loader, train_step
there, asked = Path("/there"), []
def answer(root, **numbers):
    asked.append("there" if root == there else "here")
    return {{name: value * (1 if root == there else 2) for name, value in numbers.items()}}
loader.prepare = lambda folder: None
loader.subprocess = SimpleNamespace(run=lambda words, cwd, check: asked.append(str(cwd)))
loader.in_process = lambda name, folder, cpu_s, *, root: answer(root, cpu_rate=3.0)
loader.compare(there, ["ours", "memmap"], rounds=2, cpu_s=1.0)
def start(name, *_, root=train_step.ROOT):
    return SimpleNamespace(root=root, kill=lambda: None)
train_step.start = start
train_step.ask = lambda worker, _: answer(worker.root, tokens_per_s=5.0, flops=7.0, peak_mib=1.0)
sizes = dict(rounds=1, seconds=1.0, threads=1, preload="", against=there)
print(train_step.compare("small", "fp32", ["eager", "ours"], **sizes)[-1])
print(*asked)
"""
    lines = run("-c", program).splitlines()
    assert lines[4:-2] == [
        "| ours | cpu_rate | 2.00 (2.00-2.00) |",
        "| scale | cpu_rate | 2.00 (2.00-2.00) |",
    ]
    assert lines[-2].startswith("| small | fp32 | ours here / there | | 2.000 (2.000-2.000)")
    rounds = "here there here there there here there here"  # of ours and of scale, twice
    assert lines[-1] == f"/there {rounds} here here here there"


@pytest.mark.slow
def test_the_check_of_a_device_runs_on_a_cpu(tmp_path: Path) -> None:
    """So that the minutes of a device are not spent on mistakes of the check."""
    run("benchmarks/gpu_check.py", "--cpu", "--budget", "3000", "--out", str(tmp_path), "--stages", "facts", "smoke", "repeat", "tiny")  # fmt: skip
    assert (tmp_path / "table.md").read_text().count("| ok |") == 4


@pytest.mark.slow
def test_the_ladder_measures_its_smallest_rung() -> None:
    row = run("benchmarks/gpu_ladder.py", "--rungs", "tiny", "--steps", "2").splitlines()[-1]
    name, parameters, tokens_per_s, *_ = (cell.strip() for cell in row.strip("|").split("|"))
    assert (
        name == "tiny"
        and int(parameters.replace(",", "")) > 500_000
        and float(tokens_per_s.replace(",", "")) > 0
    )
