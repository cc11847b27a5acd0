"""A mixture that begins as copies of a dense model's MLP gives its losses, at any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import folder as folders
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import MoeConfig
from pipeline.config.operation import CheckpointConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.config.upcycling import dense_model, dense_name
from pipeline.errors import ConfigError
from tests.support.checkpoint_runs import Run
from tests.support.exported import save_models, tokenizer_file
from tests.support.layouts import MODELS, VOCAB, config, rank_batches
from tests.support.ranks import run_on_ranks

UPCYCLE = CheckpointConfig(init_from="somewhere", upcycle=True)


def test_names_of_a_mixture_are_those_of_its_dense_model() -> None:
    assert dense_name("layers.3.mlp.experts.local_experts.11.linear_fc1.weight") == (
        "layers.3.mlp.linear_fc1.weight"
    )
    assert dense_name("layers.3.mlp.router.weight") is None
    assert dense_name("layers.3.self_attention.linear_qkv.weight") == (
        "layers.3.self_attention.linear_qkv.weight"
    )
    wide = replace(config("moe").model, moe=MoeConfig(num_experts=4, ffn_hidden_size=24))
    assert (dense_model(wide).ffn_hidden_size, dense_model(wide).moe.num_experts) == (24, 0)


REFUSED: list[tuple[str, PretrainConfig, str]] = [
    ("nothing to copy", replace(config("moe-unbalanced"), checkpoint=CheckpointConfig(upcycle=True)), "set checkpoint.init_from"),
    ("no experts", replace(config("modern"), checkpoint=UPCYCLE), r"model.moe.num_experts is 0"),
    ("one expert a token", replace(config("moe-switch"), checkpoint=UPCYCLE), "top_k of at least 2"),
    ("a shared expert", replace(config("moe"), checkpoint=UPCYCLE), "shared_expert_ffn_hidden_size=0"),
    ("frozen weights", replace(config("moe-unbalanced"), checkpoint=UPCYCLE, finetune=FinetuneConfig(train=["*.mlp.*"])), "Set finetune=full"),
]  # fmt: skip


@pytest.mark.parametrize("cfg, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_copies_that_would_not_compute_the_same_are_refused(
    cfg: PretrainConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        derive(cfg, world_size=1, tokenizer_vocab_size=VOCAB)


def loss_of(run: Run) -> float:
    """Mean over a batch that was not trained on."""
    scores = run.engine.evaluate(rank_batches(run.steps[5], run.shape, run.layout))
    return float(scores.nats / scores.tokens)


def make_dense(root: Path) -> float:
    """A checkpoint and a Hugging Face folder of a dense model, and its loss."""
    from pipeline.huggingface.writer import DType, export

    save_models({"dense": MODELS["modern"]}, root, tokenizer_file(root))
    export(folders.find(root / "dense"), root / "folder", dtype=DType.fp32)
    run = Run(config("modern"), root / "dense")
    run.checkpointer.restore(run.engine)
    loss = loss_of(run)
    run.close()
    return loss


def upcycled(cfg: Any, root: Path) -> list[float]:
    """Losses of a mixture that begins with the checkpoint, and with the folder; one of it trained for a step."""
    from pipeline.training.initial_weights import load_weights

    losses = []
    for source in ("dense", "folder"):
        run = Run(cfg, root / "mixture")
        load_weights(run.engine, root / source, upcycle=True)
        losses.append(loss_of(run))
        if source == "folder":
            run.train(0, 2)
            losses.append(loss_of(run))
        run.close()
    return losses


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_mixture_begins_with_the_losses_of_its_dense_model(
    world_size: int, tmp_path: Path
) -> None:
    """Whichever experts a token goes to: their weights add up to 1, and they are one MLP; then they are trained."""
    [expected] = run_on_ranks(make_dense, 1, tmp_path)
    cfg = config("moe-unbalanced", ep=world_size)
    for from_run, from_folder, trained in run_on_ranks(upcycled, world_size, cfg, tmp_path):
        assert [from_run, from_folder] == pytest.approx([expected] * 2, rel=1e-6)
        assert trained != pytest.approx(expected, rel=1e-4)
