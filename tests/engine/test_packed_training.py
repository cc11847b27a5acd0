"""Training on packed rows is training on their dialogues: not on their neighbours, not by rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Masks, make_batches
from pipeline.data.reader import Windows
from tests.support.layouts import BATCH, SEQ_LEN, VOCAB, batches, config
from tests.support.ranks import run_on_ranks

LENGTHS = [9, 14, 5, 4]  # of the dialogues of a row of 32 tokens


def packed_row() -> Any:
    """The loader's batch of one row; half of its tokens are learned."""
    rng = np.random.default_rng(3)
    ids = np.zeros((1, SEQ_LEN + 1), np.int64)
    ids[0, :SEQ_LEN] = rng.integers(1, VOCAB, SEQ_LEN)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)[:-1]])
    loss = rng.integers(0, 2, (1, SEQ_LEN)).astype(np.uint8)
    loss[0, starts] = 0
    windows = Windows(ids, np.array([SEQ_LEN - 1]), [starts], 0, loss)
    (batch,) = make_batches(
        windows, np.zeros(1, np.int64), seq_len=SEQ_LEN, micro_batch_size=1,
        masks=Masks(loss=True, documents=True, positions=True), eod=0, device=torch.device("cpu"),
    )  # fmt: skip
    return batch, loss[0]


def packed_and_alone(model: str) -> dict[str, float]:
    """Sums of the loss of a row: its dialogues alone, packed, and packed with a fault."""
    from pipeline.config.parallel_sizes import ParallelSizes
    from pipeline.config.training import ParallelConfig, TrainingConfig
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.model.architecture import Architecture
    from pipeline.model.gpt import GPT

    layout = connect(ranks_from_environment(), ParallelSizes())
    torch.manual_seed(0)
    architecture = Architecture(
        config(model).model, ParallelConfig(), TrainingConfig(), VOCAB, VOCAB
    )
    gpt = GPT(architecture, layout.tensor.group).eval()
    for name, parameter in gpt.named_parameters():
        if parameter.dim() > 1:  # large enough that attention is not uniform
            parameter.data.normal_(std=0.2)
        else:
            parameter.data.fill_(float(name.endswith("norm.weight")))
    batch, loss = packed_row()

    def total(*arguments: Tensor | None) -> float:
        with torch.no_grad():
            return float(gpt(batch.tokens, batch.labels, *arguments))

    alone, at = 0.0, 0
    for length in LENGTHS:
        one = batch.tokens[:, at : at + length]
        learned = torch.from_numpy(loss[at : at + length][None].astype(np.float32))
        with torch.no_grad():
            alone += float(
                gpt(one[:, :-1].contiguous(), one[:, 1:].contiguous(), learned[:, 1:].contiguous())
            )
        at += length
    mask = batch.loss_mask
    return {
        "alone": alone,
        "packed": total(mask, batch.document_ids, batch.positions),
        "positions off": total(mask, batch.document_ids, None),
        "masks off": total(mask, None, None),
        "labels off by one": total(mask.roll(1, 1), batch.document_ids, batch.positions),
    }


@pytest.mark.parametrize("model", ["gpt2", "modern"])
def test_a_packed_row_is_its_dialogues_alone(model: str) -> None:
    """Learned positions and rotary ones; each fault that would go unnoticed in training is seen here."""
    found = run_on_ranks(packed_and_alone, 1, model)[0]
    alone = found["alone"]
    assert found["packed"] == pytest.approx(alone, rel=1e-6)
    faults = ["masks off", "labels off by one", *(["positions off"] if model == "gpt2" else [])]
    for fault in faults:  # rotary positions are relative: only learned ones must start at 0
        assert abs(found[fault] - alone) > 1e-4 * alone, fault


def uneven() -> list[dict[str, Tensor]]:
    """Two steps in which almost all of what is learned lies in the first half of the batch."""
    steps = batches(documents=True, positions=True)[:2]
    for step in steps:
        step["mask"] = torch.zeros(BATCH, SEQ_LEN)
        step["mask"][0, 3:8] = 1.0
        step["mask"][BATCH - 1, 7] = 1.0
    return steps


def train_uneven(configs: list[Any], fault: bool = False) -> list[Any]:
    """Histories of the uneven steps; fault: each rank takes the mean over its own learned tokens."""
    from pipeline.engine import engine
    from tests.support.layouts import train

    if fault:

        def own_mean(batches: list[Any], layout: Any) -> tuple[list[Tensor], Tensor]:
            masks = [batch.loss_mask for batch in batches]
            return masks, torch.stack(masks).sum() * layout.data.size

        engine.loss_masks = own_mean
    return [train(cfg, uneven())["history"] for cfg in configs]


def test_ranks_with_5_and_1_learned_tokens_give_the_gradient_of_their_batch() -> None:
    """The mean is over the learned tokens of the global batch; a mean of ranks' means weighs them 1 to 5 wrong."""
    kind = {"documents": True, "positions": True}
    (one,) = run_on_ranks(train_uneven, 1, [config(**kind)])[0]
    found = run_on_ranks(
        train_uneven, 2, [config(zero=1, **kind), config(zero=3, **kind), config(pp=2, **kind)]
    )[0]  # fmt: skip
    for history in found:
        assert np.allclose(history, one, rtol=1e-5)
    (wrong,) = run_on_ranks(train_uneven, 2, [config(zero=1, **kind)], True)[0]
    assert not np.allclose(wrong[0], one[0], rtol=1e-2)
