"""Pictures in the sequence at every layout: losses and norms are those of one process, pictures on every rank or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.model import VisionConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.distributed.layout import connect
from pipeline.distributed.ranks import ranks_from_environment
from tests.support.checkpoint_runs import Run
from tests.support.layouts import (
    BATCH,
    PICTURES,
    SEQ_LEN,
    VOCAB,
    batches,
    config,
    rank_batches,
    reset_parallel_state,
)
from tests.support.ranks import run_on_ranks
from tests.support.unwritten import with_nan_memory

STEPS, PER_ROW, PATCHES, PLACEHOLDER = 4, 2, 4, VOCAB - 1
LORA: dict[str, Any] = dict(train="*.lora_? vision.linear_?.*", lora_rank=4)


def pictured(*, first_row: int = 0) -> list[dict[str, Tensor]]:
    """Global batches whose rows have 0, 1 or 2 pictures of 4 patches, anywhere; rows before first_row none.

    Nothing is predicted at a placeholder.
    """
    generator, steps = torch.Generator().manual_seed(3), []
    for step in batches()[:STEPS]:
        stream = torch.cat([step["tokens"], step["labels"][:, -1:]], 1).clamp(max=PLACEHOLDER - 1)
        images = torch.zeros(BATCH, PER_ROW, 3, 16, 16, dtype=torch.uint8)
        for row in range(first_row, BATCH):
            for number in range(row % 3):
                at = 16 * number + int(torch.randint(0, 10, (), generator=generator))
                stream[row, at : at + PATCHES] = PLACEHOLDER
                images[row, number] = torch.randint(0, 256, (3, 16, 16), generator=generator)
        tokens, labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
        stands = tokens == PLACEHOLDER
        steps.append({
            "tokens": tokens, "labels": labels, "mask": (labels != PLACEHOLDER).float(), "images": images,
            "patch_ids": torch.where(stands, stands.cumsum(1) - 1, -1),
        })  # fmt: skip
    return steps


def train(cfg: PretrainConfig, first_row: int = 0) -> dict[str, Any]:
    """Losses and norms of a few steps, and the last batch's loss with its pictures and with another row's."""
    from pipeline.training.build import build_engine

    ranks = ranks_from_environment()
    shape = derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=VOCAB)
    layout = connect(ranks, shape.sizes)
    engine, steps = build_engine(cfg, shape, layout), pictured(first_row=first_row)
    history = []
    for number, step in enumerate(steps):
        result = engine.train_step(rank_batches(step, shape, layout), step=number)
        history.append((float(result.loss), float(result.grad_norm)))
    wrong = {**steps[-1], "images": steps[-1]["images"].roll(3, 0)}
    scores = [engine.evaluate(rank_batches(s, shape, layout)) for s in (steps[-1], wrong)]
    names = sorted(engine.all_parameters())
    reset_parallel_state()
    losses = [float(s.nats / s.tokens) for s in scores]
    return {"history": history, "losses": losses, "names": names}


def train_all(runs: list[tuple[PretrainConfig, int]]) -> list[dict[str, Any]]:
    return [train(cfg, first_row) for cfg, first_row in runs]


def check(world_size: int, cases: list[tuple[dict[str, Any], int]]) -> None:
    """Every layout against one process: (settings, first row with a picture)."""
    layout = {"tp", "sp", "pp", "zero", "cp", "schedule", "recompute"}
    alone = [({k: v for k, v in case.items() if k not in layout}, row) for case, row in cases]
    wanted = {}
    for case, row in alone:
        wanted.setdefault(str((case, row)), (config(**case), row))
    expected = dict(zip(wanted, run_on_ranks(train_all, 1, list(wanted.values()))[0]))
    runs = [(config(**case), row) for case, row in cases]
    found = run_on_ranks(with_nan_memory, world_size, train_all, runs)
    for key, (case, row), *ranks in zip(map(str, alone), cases, *found, strict=True):
        for rank in ranks:
            for have, want in zip(rank["history"], expected[key]["history"], strict=True):
                assert have == pytest.approx(want, rel=1e-5), (case, row)
            assert rank["losses"] == pytest.approx(expected[key]["losses"], rel=1e-5), (case, row)
        right, wrong = expected[key]["losses"]
        assert abs(right - wrong) > 2e-5 * right, "the pictures are not looked at"


def test_tensor_parallel_ranks_agree_with_one_and_pictures_count() -> None:
    """Every third row has no picture; another row's pictures give another loss."""
    check(2, [(dict(model="pictures", tp=2), 0)])


@pytest.mark.slow
def test_two_ranks_match_one() -> None:
    """Where one data-parallel rank has no picture others wait for it for ever (DeepSpeed issue 7170)."""
    check(2, [
        (dict(model="modern-pictures", tp=2, sp=True, recompute="full"), 0),
        (dict(model="pictures", zero=0), 8),
        (dict(model="pictures", zero=1), 8),
        (dict(model="pictures", zero=3), 8),
        (dict(model="pictures", pp=2), 0),
        (dict(model="modern-pictures", pp=2, schedule="dualpipev"), 0),
        (dict(model="modern-pictures", cp=2), 0),
        (dict(model="modern-pictures", zero=2, **LORA), 0),
        (dict(model="modern-pictures", tp=2, train="vision.linear_?.*"), 0),
    ])  # fmt: skip


@pytest.mark.slow
def test_eight_ranks_match_one() -> None:
    check(
        8,
        [(dict(model="pictures", tp=2, pp=2), 0), (dict(model="pictures", tp=2, sp=True, cp=2), 8)],
    )


def text_losses(cfgs: list[PretrainConfig]) -> list[tuple[list[str], str]]:
    """(parameter names, bits of the loss) of a text under each model."""
    from pipeline.training.build import build_engine

    found = []
    for cfg in cfgs:
        shape = derive(cfg, world_size=1, tokenizer_vocab_size=VOCAB)
        layout = connect(ranks_from_environment(), shape.sizes)
        engine, step = build_engine(cfg, shape, layout), batches()[0]
        scores = engine.evaluate(rank_batches(step, shape, layout))
        found.append((sorted(engine.all_parameters()), float(scores.nats).hex()))
        reset_parallel_state()
    return found


def test_text_is_computed_bit_for_bit_as_without_an_encoder() -> None:
    """Off it leaves no name; on it leaves a text alone: weights begin by their names."""
    off = config("gpt2")
    set_but_off = replace(PICTURES, num_layers=0)
    cfgs = [off, replace(off, model=replace(off.model, vision=set_but_off)), config("pictures")]
    plain, also_off, on = run_on_ranks(text_losses, 1, cfgs)[0]
    assert plain == also_off and not any(name.startswith("vision.") for name in plain[0])
    assert on[1] == plain[1]
    assert [name for name in on[0] if not name.startswith("vision.")] == plain[0]
    assert off.model.vision == VisionConfig() and SEQ_LEN == 32


def trained_and_saved(folder: Path) -> list[tuple[float, float]]:
    """Two steps at ZeRO-3, kept; two more."""
    run = Run(config("pictures", zero=3), folder, ends={"image_token_id": PLACEHOLDER})
    run.steps = pictured()
    run.train(0, 2)
    run.save(2)
    history = run.train(2, 4)
    run.close()
    return history


def resumed(folder: Path, layouts: list[dict[str, Any]]) -> list[list[tuple[float, float]]]:
    found = []
    for layout in layouts:
        run = Run(config("pictures", **layout), folder)
        record = run.checkpointer.restore(run.engine)
        assert record is not None and record.image_token_id == PLACEHOLDER
        run.steps = pictured()
        found.append(run.train(2, 4))
        run.close()
    return found


@pytest.mark.slow
def test_a_checkpoint_moves_to_any_layout(tmp_path: Path) -> None:
    """The encoder's weights and moments with it, wherever its first stage is."""
    expected = run_on_ranks(trained_and_saved, 2, tmp_path)[0]
    two = [dict(tp=2, sp=True), dict(pp=2), dict(cp=2)]
    histories = [*run_on_ranks(resumed, 2, tmp_path, two)[0], *run_on_ranks(resumed, 1, tmp_path, [{}])[0]]  # fmt: skip
    for history in histories:
        for have, want in zip(history, expected, strict=True):
            assert have == pytest.approx(want, rel=1e-5)
