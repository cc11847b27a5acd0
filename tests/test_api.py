"""Python for notebooks: the same settings, runs and texts as the command line, and its messages as exceptions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from pipeline import api
from pipeline.config.choices import Precision
from pipeline.errors import CheckpointError, ConfigError, DataError, DivergedError, PipelineError
from tests.support.exported import save_models, tokenizer_file
from tests.support.layouts import MODELS
from tests.support.ranks import run_on_ranks
from tests.support.small_runs import overrides, write_data
from tests.support.waiting import HANG_S


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_changed_settings_train_a_run_whose_history_is_a_table(data: Path, tmp_path: Path) -> None:
    """Of a config, not of words: what a notebook changed is what the process gets, paths as they are."""
    cfg = api.compose(*overrides(data, tmp_path / "it's a ${run}, 1"))
    cfg.training.total_steps, cfg.optimizer.lr = 4, 3e-3
    cfg.schedule.warmup_steps = 1
    assert cfg.training.precision is Precision.fp32
    run = api.train(cfg, show=False)
    assert run.folder == tmp_path / "it's a ${run}, 1" / "run"
    table = run.history()
    assert table.column("step") == [1, 2, 3, 4] and max(table.column("train/lr")) == 3e-3
    assert table.columns[:3] == ["step", "tokens", "train/loss"]
    assert len(table.column("val/validation/loss")) == 1
    html = table._repr_html_()
    assert html.count("<tr>") == 5 and "<th>train/loss</th>" in html
    assert run.history("step", "train/grad_norm").columns == ["step", "train/grad_norm"]
    cfg.training.total_steps = 6
    assert api.train(cfg, show=False).history("step").column("step") == [1, 2, 3, 4, 5, 6]


def test_what_is_wrong_is_an_exception_before_a_process_starts(data: Path, tmp_path: Path) -> None:
    cfg = api.compose(*overrides(data, tmp_path))
    cfg.training.global_batch_size = 7
    with pytest.raises(ConfigError, match="micro_batch_size"):
        api.train(cfg)
    cfg.training.global_batch_size = "many"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="training.global_batch_size: .*many"):
        api.train(cfg)
    with pytest.raises(ConfigError, match="Did you mean"):
        api.compose("modle=tiny")
    assert not (tmp_path / "run").exists()


def test_a_command_gives_what_it_printed_or_raises_its_message(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert "Commands:" in api.command("--help", show=False)
    assert capfd.readouterr().out == ""
    with pytest.raises(PipelineError, match="no command 'tarin'.*Did you mean train"):
        api.command(["tarin"])
    assert "no command" in capfd.readouterr().out


@pytest.mark.parametrize(
    "code, kind", [(2, PipelineError), (3, DivergedError), (130, KeyboardInterrupt)]
)
def test_an_exit_code_is_an_exception_of_its_kind(code: int, kind: type[BaseException]) -> None:
    words = [
        "bash",
        "-c",
        f"echo before; echo 'error: what is wrong'; echo '       more'; exit {code}",
    ]
    with pytest.raises(kind) as found:
        api._run(words, stdin="", show=False)
    if kind is not KeyboardInterrupt:
        assert re.sub(r"\s+", " ", str(found.value)) == "what is wrong more"


def test_an_interrupted_cell_is_one_ctrl_c_and_the_rest_is_heard(monkeypatch: Any) -> None:
    """The run saves and ends: its last lines belong to the cell, and its end is no error."""
    words = [
        "bash",
        "-c",
        "trap 'echo saved; exit 0' INT; echo ready; while :; do sleep 0.05; done",
    ]
    heard: list[str] = []

    def interrupted_once(line: str, **_: Any) -> None:
        heard.append(line)
        if len(heard) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupted_once)
    assert api._run(words, stdin="", show=True) == "ready\nsaved\n"


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is missing: util-linux")
def test_a_killed_kernel_takes_along_what_it_started(tmp_path: Path) -> None:
    """The run went on alone, and the next cell found its folder taken."""
    program = f"trap 'touch {tmp_path}/saved; exit' TERM; touch {tmp_path}/runs; while :; do sleep 0.05; done"
    code = f"from pipeline import api; api._run(['bash', '-c', {program!r}], stdin='', show=False)"
    root = Path(__file__).resolve().parents[1]
    end = time.monotonic() + HANG_S
    with subprocess.Popen([sys.executable, "-c", code], cwd=root) as kernel:
        while not (tmp_path / "runs").exists():
            assert time.monotonic() < end and kernel.poll() is None
            time.sleep(0.05)
        kernel.kill()
    while not (tmp_path / "saved").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def sampled(checkpoint: Path) -> list[str]:
    """In a process of its own, which has the model's groups."""
    warnings.simplefilter("ignore")
    model = api.load(checkpoint)
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0}
    found = [model.generate("t1", seed=seed, **settings) for seed in (1, 1, 2)]
    pieces: list[str] = []
    found.append(model.generate("t1", temperature=0.0, max_new_tokens=6, on_text=pieces.append))
    found.append("".join(pieces))
    for wrong in ({"temperature": -1.0}, {"temprature": 1.0}):
        with pytest.raises(ConfigError, match="temp"):
            model.generate("t1", **wrong)
    for without_effect in ({"image": "a.png"}, {"num_samples": 3}, {"checkpoint": "other"}):
        with pytest.raises(ConfigError, match="a call takes max_new_tokens, temperature"):
            model.generate("t1", **without_effect)
    with pytest.raises(ConfigError, match="no chat template"):
        model.answer([{"role": "user", "content": "t1"}])
    model.close()
    return found


def test_a_loaded_model_draws_with_the_settings_of_each_call(tmp_path: Path) -> None:
    """It is loaded once; a seed repeats a text."""
    run_on_ranks(save_models, 1, {"gpt2": MODELS["gpt2"]}, tmp_path, tokenizer_file(tmp_path))
    once, again, other, likeliest, streamed = run_on_ranks(sampled, 1, tmp_path / "gpt2")[0]
    assert once == again != other and likeliest == streamed and len(once.split()) >= 4


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        api.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="metrics.jsonl"):
        api.Run(tmp_path).history()


def test_the_page_of_the_module_is_what_a_reader_needs() -> None:
    """Every public name stands in the documentation."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "python.md").read_text()
    for name in ("compose", "train", "command", "load", "history", "generate", "answer", "column"):
        assert name in page
