"""The command: what it prints, how fast it is there, that it needs no torch."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import cli
from pipeline.errors import ConfigError
from pipeline.plan import PlanConfig, main
from pipeline.rehearsal import fake_cuda
from tests.support.token_dataset import write_dataset

ROOT = Path(__file__).resolve().parents[1]


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(cli.compose(PlanConfig, words, config="pretrain"))
    return capsys.readouterr().out


def test_the_plan_of_a_recipe_fits_the_terminal_and_says_all(capsys):
    out = plan(capsys, "experiment=gpt3-175b", "world_size=1024", "search=true")
    assert max(map(len, out.splitlines())) <= 100
    for text in (
        "174,604,259,328 parameters", "1024 ranks = 8 data x 16 pipeline x 8 tensor parallel",
        "stage 0: 6 blocks", "stage 15: 6 blocks", "it fits", "bubble", "tokens/s; MFU",
        "device-hours", "USD at 2.50", "MWh", "legal layouts",
    ):  # fmt: skip
        assert text in out, text


def test_a_run_that_does_not_fit_is_told_what_would(capsys):
    out = plan(capsys, "model=gpt3-6.7b", "world_size=8", "training.micro_batch_size=8",
               "device=a100", "usd_per_hour=1.0")  # fmt: skip
    assert "IT DOES NOT FIT" in out and "USD at 1.00" in out
    assert "single settings with which it fits a100, fastest first:" in out
    assert out.count("  training.micro_batch_size=") == 1  # the fastest of them


def test_a_layout_that_would_not_start_is_searched_past(capsys):
    words = ["model=gpt3-1.3b", "world_size=64", "training.micro_batch_size=4"]  # 64 < 4 * 64
    with pytest.raises(ConfigError, match="must be a multiple of"):
        plan(capsys, *words)
    out = plan(capsys, *words, "search=true")
    assert "as it is set it would not start: training.global_batch_size (64)" in out
    assert "training.micro_batch_size=1" in out


def test_what_no_rank_could_be_is_a_sentence(capsys):
    """Before anything is planned or started."""
    words = ["model=tiny", "world_size=8", "training.micro_batch_size=1"]
    of_a_copy = (
        "must be a multiple of parallel.tensor_parallel_size * parallel.context_parallel_size * "
        "parallel.pipeline_parallel_size"
    )
    for more, sentence in (
        (["rank=3"], "rank=3 is which rank is rehearsed: it needs dry_run=true."),
        (["dry_run=true", "rank=8"], "rank=8 must be from 0 to world_size - 1 = 7."),
        (["dry_run=true", "rank=-1"], "rank=-1 must be from 0 to world_size - 1 = 7."),
        (
            ["dry_run=true", "parallel.pipeline_parallel_size=3"],
            f"the number of ranks (8) {of_a_copy} (1 * 1 * 3 = 3). Start 9 ranks, or choose sizes that divide 8.",
        ),
        (["world_size=0"], f"the number of ranks (0) {of_a_copy} (1 * 1 * 1 = 1). Start 1 ranks"),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            plan(capsys, *words, *more)


def test_with_data_it_says_how_often_they_are_read_and_writes_the_page(capsys, tmp_path):
    for split in ("train", "validation"):
        write_dataset(tmp_path / "tokens" / split, [np.arange(4096) % 64], vocab_size=64)
    page = tmp_path / "plan.html"
    out = plan(capsys, f"data.path={tmp_path / 'tokens'}", f"page={page}", "training.seq_len=32",
               "training.total_steps=4",
               "schedule=constant", "schedule.warmup_steps=0")  # fmt: skip
    assert "it reads " in out and " epochs of " in out
    assert page.read_text().startswith("<!doctype html>")


def test_the_command_is_there_at_once_and_imports_no_torch():
    """1.5 s on an idle machine: counted here in CPU time, that the neighbours leave alone."""
    code = (
        "import sys, runpy, time\n"
        "sys.argv = ['plan', 'experiment=gpt3-175b', 'world_size=1024']\n"
        "try: runpy.run_module('pipeline.plan', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
        "print('cpu', time.process_time())\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1.5, time.perf_counter() - start


@pytest.mark.skipif(fake_cuda.compiler() is None, reason="no C++ compiler")
def test_a_rank_of_a_large_job_is_rehearsed_beside_its_plan(capsys):
    """Rank 700 of 1,024: the stage, the memory, what it sends."""
    out = plan(capsys, "model=tiny", "world_size=1024", "dry_run=true", "rank=700",
               "parallel.pipeline_parallel_size=2", "training.global_batch_size=2048",
               "training.micro_batch_size=1", "training.total_steps=200")  # fmt: skip
    assert "rehearsed rank 700 (data 188, pipeline 1, tensor 0): all on cuda:0" in out
    assert (
        "the host reads 0 numbers back in a step" in out
        and " allreduce of float32 over data" in out
    )
