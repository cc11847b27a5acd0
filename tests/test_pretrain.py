"""The front door: every command by one name, the way out of a wrong one, and an installation without the clone."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli, pretrain
from pipeline.config.pretrain import PretrainConfig
from pipeline.planning.flops import count_parameters
from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]


def door(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipeline.pretrain", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=HANG_S)


def test_every_command_of_both_packages_has_a_name():
    """A command that is missing at the front door does not exist for who installed a wheel."""
    files = [*ROOT.glob("pipeline/*.py"), *ROOT.glob("pipeline/*/__main__.py"), *ROOT.glob("data_prep/*.py")]  # fmt: skip
    runnable = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in files
        if '__name__ == "__main__"' in path.read_text()
    }
    assert {module for module, *_ in pretrain.COMMANDS.values()} == runnable - {"pipeline.pretrain"}


def test_the_page_has_a_sentence_for_each_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    with pytest.raises(SystemExit) as end:
        pretrain.main()
    lines = capsys.readouterr().out.split("Commands:\n")[1].splitlines()
    assert end.value.code == 0
    assert [line.split()[0] for line in lines if line[2] != " "] == [*pretrain.COMMANDS]
    assert all(len(line) <= 78 for line in lines)
    assert sum(line.endswith((".", "?")) for line in lines) == len(pretrain.COMMANDS)


@pytest.mark.parametrize(
    "word, part",
    [("tarin", "Did you mean train?"), ("sample", "Did you mean generate?"), ("eval", "evaluate?"),
     ("model=tiny", "pretrain train key=value"), ("qqq", "Commands: train-tokenizer, clean")],
)  # fmt: skip
def test_a_wrong_command_is_named_with_the_way_out(word, part, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain", word])
    with pytest.raises(SystemExit) as end:
        pretrain.main()
    assert end.value.code == 2 and part in capsys.readouterr().err


def test_a_command_is_told_its_words_and_its_exit_code_is_the_doors():
    """It is the module, as `python -m` runs it."""
    done = door("hf_import", "nowhere", "fodler=x")
    assert done.returncode == 2 and "Did you mean folder?" in done.stderr


@pytest.mark.parametrize("words", ["--help", "completion", "train --help", "train --cfg"])
def test_a_full_output_is_a_sentence(words):
    """Nothing is left for the interpreter's end, which writes of an exception that it ignores and exits with 120."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pipeline.pretrain", *words.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: the output: No space left")
    assert done.stderr.count("\n") == 1


def blocks(kind: str) -> list[str]:
    """Of docs/your-text.md: its commands (kind is empty), or its programs."""
    parts = (ROOT / "docs" / "your-text.md").read_text().split("```")[1::2]
    found = [part.partition("\n")[::2] for part in parts]
    return [text for name, text in found if name == kind]


def test_the_page_has_five_commands_of_the_front_door():
    names = [line.split()[1] for line in blocks("")[0].splitlines()]
    assert names == ["train-tokenizer", "tokenize", "train", "generate", "export"]


def test_the_page_compares_the_recipe_of_characters_that_there_is():
    """A nanoGPT user goes by it: its numbers are those of conf/experiment/chars.yaml."""
    cfg = cli.compose(PretrainConfig, ["experiment=chars"], config="pretrain")
    model, training, optimizer = cfg.model, cfg.training, cfg.optimizer
    count = count_parameters(model, cfg.finetune, 265)["num_parameters"]
    page = (ROOT / "docs" / "your-text.md").read_text().partition("beside nanoGPT")[2]
    for words in (
        f"{model.num_layers} layers, {model.num_attention_heads} heads, width {model.hidden_size}, {model.max_seq_len} positions",
        f"{count:,}: 200 rows more",
        f"{training.total_steps:,} of {training.global_batch_size} x {model.max_seq_len} characters; cosine from 1e-3 to 1e-4, {cfg.schedule.warmup_steps} warm-up",
        f"betas {optimizer.beta1} and {optimizer.beta2}, eps 1e-8, decay {optimizer.weight_decay} of matrices and embeddings, clip 1",
        f"Both were trained to the end, {training.total_steps:,} steps",
        "| after step | " + " | ".join(f"{n:,}" for n in range(250, 2001, training.eval_every)),
    ):  # fmt: skip
        assert words in page, words
    assert (optimizer.lr, cfg.schedule.min_lr, optimizer.eps, optimizer.clip_grad) == (1e-3, 1e-4, 1e-8, 1)  # fmt: skip
    assert training.precision.name == "fp32" and not model.bias
    assert model.hidden_dropout == model.attention_dropout == 0


def installed(folder: Path) -> Path:
    """Where a wheel of this tree is installed, without the clone."""
    source, site = folder / "source", folder / "site"
    source.mkdir()
    names = ["pipeline", "data_prep", "conf", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    alone = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *alone, "--no-build-isolation", "-w", str(folder), str(source)], check=True)  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *alone, "--target", str(site), str(wheel)], check=True)
    return site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("wheel"))


def library_text() -> str:
    """As many characters of the standard library's source as tiny Shakespeare has."""
    files, text = sorted(Path(os.__file__).parent.glob("*.py")), ""
    for file in files:
        text += file.read_text(encoding="utf-8")
    assert len(text) > 1_115_394
    return text[:1_115_394]


def typed(block: str, site: Path, folder: Path, more: dict[str, str]) -> dict[str, str]:
    """Name of each command of a block of the page, typed in `folder`, to what it said; some get more words."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1",
                   "PATH": f"{site / 'bin'}:{os.environ['PATH']}"}  # fmt: skip
    shown = {}
    for line in block.splitlines():
        name = line.split()[1]
        done = subprocess.run(
            f"{line} {more.get(name, '')}", shell=True, cwd=folder, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        shown[name] = done.stdout + done.stderr
    return shown


FEW = "schedule.warmup_steps=null training.eval_every=2 training.total_steps="


@pytest.mark.slow
def test_an_installed_wheel_makes_a_model_of_ones_own_text_from_an_empty_folder(site, tmp_path):
    """The page as it stands, but for fewer steps; presets and templates are in the wheel, nothing needs the clone."""
    (tmp_path / "text.txt").write_text(library_text())
    shown = typed(blocks("")[0], site, tmp_path, {"train": f"{FEW}4"})
    assert "done at step 4 of 4" in shown["train"] and "is the best so far" in shown["train"]
    assert shown["generate"].count("Once upon a time") == 1
    assert (tmp_path / "my" / "exported" / "model.safetensors").exists()
    (program,) = blocks("python")
    said = subprocess.run(
        [sys.executable, "-m", "pipeline.pretrain", "chat", "runs/your-text", "max_new_tokens=4"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)}, input="Once upon\n", capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0 and "no model of dialogues" in said.stderr, said.stderr
    assert said.stdout.startswith("> Once upon\n")
    loaded = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert loaded.returncode == 0 and loaded.stdout.startswith("Once upon"), loaded.stderr
    templates = {path.name for path in (site / "data_prep" / "chat").iterdir()}
    assert {"chatml.jinja", "plain.jinja"} <= templates
    assert (site / "pipeline" / "inference" / "talk.html").exists()


@pytest.mark.slow
def test_the_three_commands_of_characters_train(site, tmp_path):
    """A token is a byte, a tenth is held out, and some steps bring the loss below that of 265 equally likely ids."""
    text = library_text().encode("ascii", "ignore")
    (tmp_path / "input.txt").write_bytes(text)
    shown = typed(blocks("")[1], site, tmp_path, {"train": f"{FEW}20"})
    assert "done at step 20 of 20" in shown["train"]
    held, trained = (
        json.loads((tmp_path / "chars/tokens" / name / "manifest.json").read_text())["tokens"]
        for name in ("validation", "train")
    )  # fmt: skip
    assert held + trained == len(text) + 2, "bytes, and an end of each part"
    rows = map(json.loads, (tmp_path / "runs/chars/metrics.jsonl").read_text().splitlines())
    assert min(row.get("val/validation/loss", math.inf) for row in rows) < 5.0 < math.log(265)
