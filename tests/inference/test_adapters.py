"""What the commands make of an adapter's run: base plus product, as training computed it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import read_record
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.config.choices import Precision
from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.config.parameter_names import is_lora
from pipeline.config.training import ParallelConfig
from pipeline.data.chat import ChatTemplate
from pipeline.data.tokenizer import Tokenizer
from pipeline.evaluate import EvaluateConfig
from pipeline.evaluate import main as evaluate
from pipeline.evaluation.perplexity import Evaluator
from pipeline.generate import GenerateConfig
from pipeline.generate import main as generate
from pipeline.inference.samplers import LocalSampler
from tests.inference.test_chat_models import CHATML, END, EOD, TALK, chat_tokenizer
from tests.support.checkpoint_runs import Run
from tests.support.layouts import VOCAB, config
from tests.support.ranks import run_on_ranks
from tests.support.token_dataset import write_dataset

NEW = 6  # tokens of an answer


def save_runs(root: Path, tokenizer: bytes) -> dict[str, float]:
    """A base and two adapters of it; their held-out losses as the engines have them."""
    losses = {}
    files = {"tokenizer.json": tokenizer, "chat_template.jinja": CHATML.encode()}
    for name, rank in (("base", 0), ("adapter", 4), ("other", 2)):
        kind: dict[str, Any] = dict(train="*.lora_?", lora_rank=rank) if rank else {}
        cfg = config("modern", **kind)
        cfg.optimizer.lr, cfg.schedule.warmup_steps = 0.03, 0
        held_out = DatasetConfig(path=str(root / "data"), name="held-out")
        cfg.data = DataConfig(validation=[held_out], cache_dir=str(root / "cache"))
        base = None if name == "base" else folders.find(root / "base")
        ends = {"eod": EOD, "end_of_turn": END}
        run = Run(cfg, root / name, attachments=files, base=base, ends=ends)
        run.train(0, 3)
        run.save(3)
        evaluator = Evaluator(
            cfg.data, shape=run.shape, engine=run.engine, sequences=0, cache_dir=root / "cache"
        )
        losses[name] = evaluator.run()["held-out"].loss
        run.close()
    return losses


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    root = tmp_path_factory.mktemp("runs")
    tokenizer = chat_tokenizer(root / "tokenizer.json").read_bytes()
    tokens = np.random.default_rng(0).integers(3, VOCAB, 150)
    write_dataset(root / "data", [tokens], vocab_size=VOCAB, tokenizer=tokenizer, eod=EOD)
    return root, run_on_ranks(save_runs, 1, root, tokenizer)[0]


@pytest.mark.parametrize("layout", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_an_adapter_is_evaluated_beside_its_base(
    runs: tuple[Path, dict[str, float]], layout: dict[str, int], tmp_path: Path
) -> None:
    """The command's merged weights at another layout give the loss of the engine that trained beside it."""
    root, losses = runs
    cfg = EvaluateConfig(
        checkpoint=str(root / "adapter"), output=str(tmp_path / "out.json"), micro_batch_size=2,
        precision=Precision.fp32, parallel=ParallelConfig(**layout),
    )  # fmt: skip
    assert run_on_ranks(evaluate, 2, cfg) == [0, 0]
    found = json.loads((tmp_path / "out.json").read_text())["results"]["held-out"]["loss"]
    assert found == pytest.approx(losses["adapter"], rel=1e-5)
    assert abs(found - losses["base"]) > 1e-2 * found, "the adapter changes nothing"


def answers(root: Path, run: str) -> dict[str, Any]:
    """Greedy words after a prompt and in a chat: W x + scale * B (A x), the commands', the base's."""
    from pipeline.huggingface.whole_model import open_model
    from pipeline.model.local_model import LocalModel

    warnings.simplefilter("ignore")
    checkpoint = folders.find(root / run)
    tokenizer = Tokenizer.from_file(root / "tokenizer.json", eod=EOD)
    record, own = read_record(checkpoint), CheckpointTensors(checkpoint)
    base = open_model(folders.find(root / "base"))

    def weight(name: str) -> torch.Tensor:
        return (own if is_lora(name) else base).tensor(f"weights/{name}")

    beside = LocalModel(record.model(), weight, finetune=record.finetune())

    def greedy(model: LocalModel, ids: list[int]) -> list[str]:
        for _ in range(NEW):
            ids = [*ids, int(model.logits(torch.tensor([ids]))[0, -1].argmax())]
        return tokenizer.decode(ids[-NEW:]).split()

    asked = ChatTemplate(CHATML, tokenizer).prompt_ids(TALK)
    found: dict[str, Any] = {
        "beside": [greedy(beside, tokenizer.encode("t5 t6")), greedy(beside, asked)]
    }
    cfg = GenerateConfig(checkpoint="", max_new_tokens=NEW, temperature=0.0)
    ours = LocalSampler(checkpoint, cfg)
    ours.ends = set()
    found["ours"] = [
        ours.sample(["t5 t6"], on_text=None)[0].split(), ours.answer([TALK], on_text=None)[0].split()
    ]  # fmt: skip
    for name in (run, "base"):
        printed = []
        for settings in (dict(prompt="t5 t6"), dict(chat=True)):
            sys.stdin = io.StringIO("t5 t6\n")
            cfg = GenerateConfig(
                checkpoint=str(root / name), max_new_tokens=NEW, temperature=0.0, **settings
            )
            with contextlib.redirect_stdout(io.StringIO()) as out:
                generate(cfg)
            printed.append(out.getvalue().lstrip("> ").removeprefix("t5 t6").strip("> \n").split())
        found[name] = printed
    return found


@pytest.mark.parametrize("name", ["adapter", "other"])
def test_an_adapter_continues_texts_and_talks_as_base_plus_product(
    runs: tuple[Path, dict[str, float]], name: str
) -> None:
    """Each of a base's; both samplers; what stands beside the base is heard, and stops where a turn or document ends."""
    found = run_on_ranks(answers, 1, runs[0], name)[0]
    assert found["ours"] == found["beside"]
    for printed, whole in zip(found[name], found["beside"], strict=True):
        assert printed == whole[: len(printed)] and printed
    assert found[name] != found["base"]
