"""The answer command: asks in batches, keeps the order, prints scores beside base rates."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.conversations import main as prepare_dialogues
from data_prep.tokens.conversation_job import ConversationConfig
from pipeline import answer, cli, evaluate, export, train
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.training import ParallelConfig
from pipeline.errors import ConfigError
from tests.support.corpus import make_tokenizer
from tests.support.ranks import run_on_ranks


class Parrot:
    """Knows the answers that are in its questions."""

    def __init__(self):
        self.sizes = []

    def answer(self, dialogues, *, on_text):
        self.sizes.append(len(dialogues))
        return [messages[-1]["content"].removeprefix("say ") for messages in dialogues]


@pytest.fixture
def parrot(monkeypatch):
    found = Parrot()
    monkeypatch.setattr(
        answer, "open_sampler", lambda cfg, needs_template: contextlib.nullcontext(found)
    )
    return found


def write(folder, count):
    path = folder / "held.jsonl"
    rows = [
        {"prompt": f"say {'x' * (count - n)}{n}", "completion": f"{'x' * (count - n)}{n}", "group": "ab"[n % 2]}
        for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_are_scored_and_written_in_the_order_of_the_questions(tmp_path, parrot, capsys):
    cfg = answer.AnswerConfig(checkpoint=str(tmp_path), data=str(write(tmp_path, 7)), batch_size=3)
    assert answer.main(cfg) == 0
    assert parrot.sizes == [3, 3, 1]
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == [line["reference"] for line in lines]
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:4] == ["7", "questions", "exact", "f1"]
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in out[1:13]}
    assert rows["all", "model"][:2] == ["100.0", "100.0"]
    assert rows["a", "shuffled"][0] == "0.0" and ("b", "copy") in rows


def test_a_limit_asks_fewer_and_settings_are_checked(tmp_path, parrot):
    data = str(write(tmp_path, 7))
    answer.main(answer.AnswerConfig(checkpoint=str(tmp_path), data=data, limit=2))
    assert parrot.sizes == [2]
    with pytest.raises(ConfigError, match="batch_size .0."):
        answer.main(answer.AnswerConfig(checkpoint=str(tmp_path), data=data, batch_size=0))


# ---- a model that was trained --------------------------------------------------------------------

ROW = 96


def talk(number: int) -> dict[str, Any]:
    """Two turns about a letter, answered by other letters; whether its number is even is the group."""
    first, second, third = ("abcdefghijklmnopqrstuvwxyz"[k * number % 26] for k in (1, 7, 15))
    said = [f"Fox {first}?", f"{second} hens", "And owls?", f"No, {third}"]
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
    return {"messages": messages, "group": ("even", "odd")[number % 2]}


def settings(folder: Path, name: str, **more: Any) -> list[str]:
    """A small model on the dialogues; held out are others beside some that were learned."""
    values = {
        "name": name, "runs_dir": folder, "model": "tiny", "model.num_layers": 2, "model.hidden_size": 64,
        "data.train": f"[{{path: {folder}/learned/train}}]",
        "data.validation": f"[{{path: {folder}/held/train, name: held}}]",
        "training.total_steps": 120, "training.seq_len": ROW, "training.global_batch_size": 4,
        "training.micro_batch_size": 4, "training.precision": "fp32", "training.eval_every": 20,
        "optimizer.lr": 0.01, "schedule.warmup_steps": 5, "tracking.wandb": "disabled", **more,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def train_all(runs: list[list[str]]) -> None:
    """One after the other, in this process."""
    for arguments in runs:
        train.main(cli.compose(PretrainConfig, arguments, config="pretrain"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `base` and, an adapter of it, `adapter`; held.jsonl."""
    folder = tmp_path_factory.mktemp("trained")
    make_tokenizer(folder / "tokenizer.json")
    for name, numbers in (("learned", range(14)), ("held", range(8, 20))):
        lines = "".join(json.dumps(talk(number)) + "\n" for number in numbers)
        (folder / f"{name}.jsonl").write_text(lines)
        cfg = ConversationConfig(
            input=f"{name}.jsonl", output=name, row_tokens=ROW, tokenizer="tokenizer.json",
            validation_fraction=0.0, workers=1,
        )  # fmt: skip
        # Where a source lies belongs to a dataset's identity, and that to the order of its rows: from
        # one folder's path to the next the answers of so few steps differ, from 4 % exact to 25 %.
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            prepare_dialogues(cfg)
    lora = {"finetune": "lora", "checkpoint.init_from": folder / "base", "training.total_steps": 10}
    run_on_ranks(train_all, 1, [settings(folder, "base"), settings(folder, "adapter", **lora)])
    return folder


def answered(data: Path, checkpoint: Path) -> tuple[float, list[str]]:
    """Percent of exact answers by decoding, and the answers."""
    output = data / "predictions.jsonl"
    cfg = answer.AnswerConfig(
        checkpoint=str(checkpoint), data=str(data / "held.jsonl"), output=str(output), max_new_tokens=16
    )  # fmt: skip
    assert answer.main(cfg) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 24
    return 100 * sum(r["answer"] == r["reference"] for r in rows) / 24, [r["answer"] for r in rows]


def taught(folder: Path, run: str, world_size: int, **parallel: int) -> float:
    """Percent of exact answers by teacher forcing at a layout."""
    cfg = evaluate.EvaluateConfig(
        checkpoint=str(folder / run), output=str(folder / "scores.json"), micro_batch_size=2,
        parallel=ParallelConfig(**parallel),
    )  # fmt: skip
    assert run_on_ranks(evaluate.main, world_size, cfg) == [0] * world_size
    found = json.loads((folder / "scores.json").read_text())["results"]["held"]
    assert found["answers"] == 24
    return found["exact"]


@pytest.mark.slow
def test_answers_of_a_trained_model_are_what_its_training_said(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exact match by decoding equals that of one teacher-forced pass: in training, and at any layout."""
    pytest.importorskip("sacrebleu")
    logged = [
        json.loads(line) for line in (trained / "base/metrics.jsonl").read_text().splitlines()
    ]
    during = [row["val/held/exact"] for row in logged if "val/held/exact" in row]
    assert len(during) == 6 and during[0] < during[-1]
    exact, said = answered(trained, trained / "base")
    table = capsys.readouterr().out
    assert exact == pytest.approx(during[-1]) and 10 < exact < 100
    for layout in ({}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        assert taught(trained, "base", 2 if layout else 1, **layout) == pytest.approx(exact)

    header, *rows = [line.split() for line in table.splitlines()[:13]]
    assert header == ["24", "questions", "exact", "f1", "chrf"]
    found = {(group, row): [float(x) for x in values] for group, row, *values in rows}
    assert found["all", "model"][0] == pytest.approx(exact, abs=0.06)
    assert found["all", "model"] > found["all", "shuffled"] and found["all", "copy"][0] == 0
    assert {group for group, _ in found} == {"all", "even", "odd"}

    export.main(export.ExportConfig(checkpoint=str(trained / "base"), output=str(trained / "hf")))
    assert answered(trained, trained / "hf") == (exact, said)


@pytest.mark.slow
def test_an_adapter_answers_beside_its_base(trained: Path) -> None:
    """Ten steps of low-rank matrices change some answers; base and adapter are put together to ask."""
    _, of_base = answered(trained, trained / "base")
    exact, said = answered(trained, trained / "adapter")
    assert said != of_base
    assert taught(trained, "adapter", 2, tensor_parallel_size=2) == pytest.approx(exact)
