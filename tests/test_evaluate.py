"""Held-out loss, perplexity and bits per byte: equal to a plain computation, at any layout."""

from __future__ import annotations

import contextlib
import io
import json
import math
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.choices import Precision, WandbMode
from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.config.data_rules import held_out
from pipeline.config.operation import TrackingConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.training import ParallelConfig
from pipeline.data.datasets import describe
from pipeline.data.shard_format import Pictures
from pipeline.errors import ConfigError
from pipeline.evaluate import EvaluateConfig, _described, _summary, main
from pipeline.evaluation.perplexity import EvalResult, Evaluator
from pipeline.inference.asked_model import held_out_data, say_if_masks_differ
from tests.engine.test_pictures import PATCHES, PLACEHOLDER, pictured
from tests.support.checkpoint_runs import Run
from tests.support.exported import tokenizer_file
from tests.support.layouts import SEQ_LEN, VOCAB, config
from tests.support.log_lines import unbroken
from tests.support.ranks import run_on_ranks
from tests.support.reference import ReferenceGPT
from tests.support.token_dataset import write_dataset

TRACKED = TrackingConfig(wandb=WandbMode.disabled, tensorboard=find_spec("tensorboard") is not None)
SIZES = [70, 45]  # tokens of the shards: their last windows are not full


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two shards."""
    folder = tmp_path_factory.mktemp("data")
    tokens = np.random.default_rng(0).integers(0, VOCAB, sum(SIZES))
    shards = np.split(tokens, [SIZES[0]])
    write_dataset(folder, shards, vocab_size=VOCAB, tokenizer=tokenizer_file(folder).read_bytes())
    return folder


def expected(cfg: PretrainConfig, data: Path) -> EvalResult:
    """In plain torch: every token of a shard but its first is a label once, seen from its own window."""
    model = ReferenceGPT(cfg, VOCAB)
    tokens = np.random.default_rng(0).integers(0, VOCAB, sum(SIZES))
    nats, labels = 0.0, []
    for shard in np.split(tokens, [SIZES[0]]):
        for start in range(0, len(shard) - 1, SEQ_LEN):
            window = torch.from_numpy(shard[start : start + SEQ_LEN + 1])[None]
            nats += float(model.loss(window[:, :-1], window[:, 1:]).detach()) * (
                window.shape[1] - 1
            )
            labels += window[0, 1:].tolist()
    size = 4 * len(labels)  # words forget the spaces between them; the manifest has 4 bytes a token
    assert len(labels) == sum(SIZES) - len(SIZES)
    loss = nats / len(labels)
    return EvalResult(loss, math.exp(loss), nats / math.log(2) / size, len(labels))


def with_data(cfg: PretrainConfig, data: Path) -> PretrainConfig:
    cfg.data = DataConfig(
        validation=[DatasetConfig(path=str(data), name="held-out")], cache_dir=str(data / "cache")
    )
    cfg.tracking = TRACKED
    return cfg


def evaluate(
    layouts: list[dict], data: Path, folder: Path, *, save: bool = False
) -> list[EvalResult]:
    """The Evaluator's answer at each layout, on fresh weights. Collective."""
    results = []
    for layout in layouts:
        run = Run(
            with_data(config("gpt2", **layout), data),
            folder,
            attachments={"tokenizer.json": (data / "tokenizer.json").read_bytes()},
        )
        beats: list[int] = []
        results.append(
            Evaluator(
                run.cfg.data,
                shape=run.shape,
                engine=run.engine,
                sequences=0,
                cache_dir=data / "cache",
            ).run(alive=partial(beats.append, 1))["held-out"]
        )
        assert beats
        if save:
            run.save(0)
        run.close()
    return results


def check(result: EvalResult, data: Path) -> None:
    want = expected(config("gpt2"), data)
    assert result.tokens == want.tokens
    got = (result.loss, result.ppl, result.bits_per_byte)
    assert got == pytest.approx((want.loss, want.ppl, want.bits_per_byte), rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (1, [{}]),
        pytest.param(
            4,
            [{"tp": 2, "pp": 2}, {"zero": 3}, {"pp": 4, "micro_batch_size": 1}],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_evaluation_equals_plain_torch_at_any_layout(
    world_size: int, layouts: list[dict], data: Path, tmp_path: Path
) -> None:
    """Sequences that only fill the last batch, padding and data-parallel sums must not count."""
    for rank_results in run_on_ranks(evaluate, world_size, layouts, data, tmp_path):
        for result in rank_results:
            check(result, data)


def save_fresh(data: Path, folder: Path) -> list[EvalResult]:
    return evaluate([{}], data, folder, save=True)


def evaluate_aloud(cfg: EvaluateConfig) -> tuple[int, str]:
    """The command's exit code, and what it says. Collective."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return main(cfg), said.getvalue()


def test_command_evaluates_a_checkpoint_on_another_layout(data: Path, tmp_path: Path) -> None:
    """Saved by one process, evaluated by two; on the run's own held-out data where none is named; the run is told.

    And it says once on which data: path, sequences, tokens, tokenizer.
    """
    run_on_ranks(save_fresh, 1, data, tmp_path / "run" / "checkpoints")
    row = {"step": 0, "tokens": 0, "train/loss": 1.0}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    cfg = EvaluateConfig(
        checkpoint=str(tmp_path / "run"),
        track=TRACKED.tensorboard,
        output=str(tmp_path / "out.json"),
        micro_batch_size=2,
        precision=Precision.fp32,
        parallel=ParallelConfig(tensor_parallel_size=2),
    )
    (code, said), (other_code, other) = run_on_ranks(evaluate_aloud, 2, cfg)
    assert (code, other_code) == (0, 0) and "evaluating" not in other
    tokenizer = json.loads((data / "manifest.json").read_text())["tokenizer"]["sha256"]
    part = "5 of 5 sequences of 32, 115 tokens"
    assert unbroken(said).count(f"evaluating on {data}: {part}, tokenizer {tokenizer[:12]}\n") == 1
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["checkpoint"].endswith("step-00000000")
    check(EvalResult(**document["results"]["held-out"]), data)
    drawn = [path.read_bytes() for path in (tmp_path / "run/tensorboard/by-step").glob("events.*")]
    assert len(drawn) == TRACKED.tensorboard and all(
        b"evaluation/held-out/loss" in file for file in drawn
    )


@pytest.mark.parametrize(
    ("limit", "part"), [(0, "5 of 5"), (3, "3 of 5"), (9, "5 of 5")]
)  # shards of 70 and 45 tokens: 69 labels in three windows of 32, 44 in two
def test_what_is_evaluated_is_named_with_how_much_of_it(data: Path, limit: int, part: str) -> None:
    """Also where `sequences=` cuts it, or asks for more than there are."""
    (dataset,) = describe(DataConfig(train=[DatasetConfig(path=str(data))])).train
    assert f"{data}: {part} sequences of {SEQ_LEN}, " in _described(dataset, SEQ_LEN, limit)


def test_the_data_of_the_run_count_only_where_none_are_named() -> None:
    """Never a default that nobody typed; the run's masks go with the run's data."""
    of_run = DataConfig(train=[DatasetConfig(path="a")], mask_documents=True,
                        validation=[DatasetConfig(path="held-out")])  # fmt: skip
    found = held_out_data(EvaluateConfig(checkpoint="x"), of_run)
    assert [d.path for d in found.train] == ["held-out"] and found.mask_documents
    named = EvaluateConfig(checkpoint="x", data=DataConfig(path="mine"))
    found = held_out_data(named, of_run)
    assert found.validation == [DatasetConfig(path="mine/validation")] and not found.mask_documents
    with pytest.raises(ConfigError, match="x names no held-out data.*data.validation"):
        held_out_data(EvaluateConfig(checkpoint="x"), replace(of_run, validation=[]))
    with pytest.raises(ConfigError, match="x names no held-out data"):
        held_out_data(EvaluateConfig(checkpoint="x"), None)


def test_shares_of_an_older_runs_held_out_data_are_let_be() -> None:
    """They had no effect when it trained, and a run that gives them is refused now."""
    share = DatasetConfig(path="held-out", name="a", weight=2.0, max_epochs=1.0)
    found = held_out_data(EvaluateConfig(checkpoint="x"), DataConfig(validation=[share]))
    assert found.validation == [DatasetConfig(path="held-out", name="a")]
    assert not list(held_out(found))


@pytest.mark.parametrize(
    "data",
    [DataConfig(mask_documents=True), DataConfig(train=[DatasetConfig(path="b")]), DataConfig(lanes=2)],
)  # fmt: skip
def test_settings_beside_the_runs_own_data_are_not_dropped(data: DataConfig) -> None:
    """`data.mask_documents=true`, or a `data.train`, was typed and ignored."""
    of_run = DataConfig(validation=[DatasetConfig(path="held-out")])
    with pytest.raises(
        ConfigError, match="^data.(mask_documents|train|lanes) would have no effect"
    ):
        held_out_data(EvaluateConfig(checkpoint="x", data=data), of_run)
    cache = DataConfig(cache_dir="c", cache_size_gib=3.0)
    found = held_out_data(EvaluateConfig(checkpoint="x", data=cache), of_run)
    assert (found.cache_dir, found.cache_size_gib) == ("c", 3.0)


def test_a_run_of_masked_documents_scored_without_masks_is_said(caplog) -> None:
    """Not of packed rows, which are masked whatever was typed."""
    of_run = DataConfig(path="a", mask_documents=True, reset_positions=True)
    say_if_masks_differ(DataConfig(path="mine"), of_run)
    assert "data.mask_documents=true data.reset_positions=true to score it" in caplog.text
    caplog.clear()
    say_if_masks_differ(DataConfig(path="mine", mask_documents=True), of_run)
    say_if_masks_differ(DataConfig(path="mine"), None)
    assert not caplog.text


def write_pictured(folder: Path, images: torch.Tensor, tokenizer: bytes) -> Path:
    """The rows of test_pictures, each shown the first of these pictures (row, slot, 3, 16, 16)."""
    step = {key: value[: len(images)] for key, value in pictured()[0].items()}
    counts = (step["tokens"] == PLACEHOLDER).sum(1) // PATCHES
    learned = torch.zeros_like(step["tokens"])
    learned[:, 1:] = step["mask"][:, :-1]
    return write_dataset(
        folder, [step["tokens"].flatten().numpy()], starts=[np.arange(0, len(learned) * SEQ_LEN, SEQ_LEN)],
        block_tokens=2 * SEQ_LEN, vocab_size=VOCAB, tokenizer=tokenizer, losses=[learned.flatten().numpy()],
        row_tokens=SEQ_LEN, pictures=Pictures(16, 8, PLACEHOLDER), images_per_row_max=2,
        images=[torch.cat([shown[:count] for shown, count in zip(images, counts)]).numpy()],
    )  # fmt: skip


def evaluated_seeing(root: Path) -> tuple[str, dict[str, float]]:
    """What the command prints, and the summary it tells, of a model that has looked at pictures. Collective."""
    cfg = config("modern-pictures")
    cfg.optimizer.lr, cfg.schedule.warmup_steps = 0.03, 0
    tokenizer = tokenizer_file(root).read_bytes()
    run = Run(cfg, root / "run/checkpoints", attachments={"tokenizer.json": tokenizer})
    run.steps = pictured()
    run.train(0, 3)
    run.save(3)
    run.close()
    images = pictured()[0]["images"]
    sets = {"right": images, "rolled": images.roll(1, 0), "alone": images[:1]}
    validation = [
        DatasetConfig(path=str(write_pictured(root / name, shown, tokenizer)), name=name)
        for name, shown in sets.items()
    ]
    asked = EvaluateConfig(
        checkpoint=str(root / "run"), data=DataConfig(validation=validation), output=str(root / "out.json"),
        micro_batch_size=16, precision=Precision.fp32,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(asked)
    found = json.loads((root / "out.json").read_text())["results"]
    return said.getvalue(), _summary({name: EvalResult(**result) for name, result in found.items()})


def test_pictures_are_scored_beside_those_of_another_row(tmp_path: Path) -> None:
    """The number that says whether they are looked at: it is the loss of a dataset with them exchanged."""
    said, summary = run_on_ranks(evaluated_seeing, 1, tmp_path)[0]
    right, wrong = (summary[f"evaluation/right/{key}"] for key in ("loss", "wrong_pictures_loss"))
    assert wrong == pytest.approx(summary["evaluation/rolled/loss"], rel=1e-6)
    bits = [f"{loss / math.log(2):.2f}" for loss in (right, wrong)]
    assert bits[0] != bits[1], "the pictures are not looked at"
    line = f"right: {bits[0]} bits per token with the right pictures, {bits[1]} with those of another row"
    assert line in said.splitlines()
    assert "evaluation/alone/wrong_pictures_loss" not in summary, "there is no other row"
