"""Muon: one result at every layout, each matrix by itself, and nothing left of a step that was left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.config.parameter_names import matrices_of
from pipeline.config.run_shape import derive
from pipeline.engine.home_ranks import Run, _least_loaded
from pipeline.engine.muon import MOMENTUM, Muon, orthogonalize, update_of
from pipeline.errors import ConfigError
from pipeline.huggingface.writer import DType
from pipeline.model.partition import Partition
from tests.support.checkpoint_runs import History, resume, train_and_save
from tests.support.equivalence import Case, check, compare
from tests.support.exported import TOLERANCE, export_and_compare, tokenizer_file
from tests.support.layouts import FEW_STEPS, VOCAB, batches, config, reference, train
from tests.support.ranks import run_on_ranks
from tests.support.reference import newton_schulz

MUON: Case = dict(optimizer="muon")
FAST: dict[int, list[Case]] = {
    2: [
        dict(model="modern", tp=2, sp=True, **MUON),
        dict(model="gpt2", zero=3, **MUON),
    ],
}
ALL: dict[int, list[Case]] = {
    1: [dict(model=m, zero=z, **MUON) for m in ("gpt2", "moe") for z in (0, 1)]
    + [dict(model="modern", zero=z, precision="bf16", **MUON) for z in (1, 3)]
    + [dict(model="modern", zero=2, precision="fp16", **MUON)],
    2: [dict(model="modern", tp=2, zero=z, **MUON) for z in (0, 3)]
    + [dict(model="modern", zero=z, **MUON) for z in (0, 1, 2)]
    + [dict(model="modern", pp=2, precision="bf16", **MUON)]
    + [dict(model="moe", tp=2, sp=True, **MUON), dict(model="mqa", pp=2, **MUON)]
    + [dict(model="modern", zero=1, precision="bf16", **MUON)]
    + [dict(model="moe-switch", zero=1, precision="fp16", **MUON)]
    + [dict(model="modern", pp=2, recompute="selective", **MUON)],
    3: [dict(model="odd", tp=3, **MUON), dict(model="odd", zero=2, batch_size=12, **MUON)],
    4: [dict(model="modern", pp=4, **MUON), dict(model="gpt2", tp=2, pp=2, sp=True, recompute="full", **MUON)]
    + [dict(model="modern", tp=2, zero=z, sp=True, **MUON) for z in (1, 3)]
    + [dict(model="modern", pp=2, schedule="dualpipev", precision=p, **MUON) for p in ("fp32", "bf16")]
    + [dict(model="modern", tp=2, zero=2, precision="bf16", **MUON)]
    + [dict(model="modern", cp=2, zero=2, documents=True, **MUON), dict(model="modern", cp=2, pp=2, **MUON)],
}  # fmt: skip


@pytest.mark.parametrize("world_size", FAST)
def test_layouts_match_plain_torch(world_size: int) -> None:
    """A rank that makes its shard orthogonal trains another model at every layout."""
    check(world_size, FAST[world_size])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", ALL)
def test_every_layout_matches_plain_torch(world_size: int) -> None:
    """TP, SP, PP, DualPipeV, ZeRO 0 to 3, bf16, fp16, experts."""
    check(world_size, ALL[world_size])


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_matrix_that_is_not_whole_or_not_alone_turns_the_comparison_red(world_size: int) -> None:
    """One process makes query, key and value orthogonal as one; two make each its own shard."""
    cfg = config("modern", tp=world_size, **MUON)
    history = run_on_ranks(train_sabotaged, world_size, cfg)[0]["history"]
    with pytest.raises(AssertionError, match="differs"):
        compare({"history": history}, reference(cfg, num_steps=FEW_STEPS), "fp32", "sabotage")


def train_sabotaged(cfg: Any) -> dict[str, Any]:
    """A run whose matrices are the fused weights, or the shards of this rank."""
    from pipeline.engine import engine, muon

    if cfg.parallel.tensor_parallel_size == 1:
        muon.matrices_of = lambda name, rows, model: [[(0, rows)]]
    else:
        right = engine.state.linear_runs
        engine.state.linear_runs = lambda engine: [
            replace(run, partition=Partition.of(run.partition.local_shape), name=f"{run.name} {r}")
            for run in right(engine)
            for r in [engine.layout.tensor.rank]
        ]
    return train(cfg, batches()[:FEW_STEPS])


def test_query_key_value_and_gate_up_are_matrices_of_their_own() -> None:
    """Two groups of two queries, a key and a value, four rows a head; gate above up."""
    model = replace(config("modern").model, num_attention_heads=4, num_query_groups=2, head_dim=4)
    assert matrices_of("layers.0.self_attention.linear_qkv.weight", 32, model) == [
        [(0, 8), (16, 24)], [(8, 12), (24, 28)], [(12, 16), (28, 32)],
    ]  # fmt: skip
    assert matrices_of("layers.0.mlp.linear_fc1.weight", 10, model) == [[(0, 5)], [(5, 10)]]
    assert matrices_of("layers.0.mlp.linear_fc2.weight", 10, model) == [[(0, 10)]]
    plain = config("gpt2").model
    assert matrices_of("layers.0.mlp.linear_fc1.weight", 10, plain) == [[(0, 10)]]


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_nearly_orthonormal_and_of_adamws_size(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Singular values near 1, whatever those of the momentum; 0.2 is the root of their mean square."""
    torch.manual_seed(0)
    momentum = torch.randn(shape).to(dtype) * 1e-4
    assert orthogonalize(momentum).dtype is dtype
    values = torch.linalg.svdvals(orthogonalize(momentum).float())
    assert 0.5 < values.median() < 1.2 and values.max() < 1.25
    name = "layers.0.self_attention.linear_proj.weight"
    update = update_of(name, momentum, config("modern").model)
    assert 0.15 < float(update.float().square().mean().sqrt()) < 0.23


def alone(weight: torch.Tensor) -> tuple[torch.nn.Parameter, Muon]:
    """A parameter that is one matrix, and its optimizer in one process."""
    parameter = torch.nn.Parameter(weight)
    groups = [{"params": [parameter], "weight_decay": 0.1, "lr_scale": 1.0, "is_matrix": True}]
    optimizer = Muon(groups, momentum=0.9, dtype=torch.float32, lr=0.1)
    part = Partition.of(tuple(weight.shape))
    run = Run("layers.0.mlp.linear_fc2.weight", part, 0, weight.numel(), 0, 0)
    peers: Any = SimpleNamespace(rank=0, size=1, group=None)
    optimizer.join([run], peers, flats=[parameter], model=config("gpt2").model)
    return parameter, optimizer


def test_a_step_that_is_left_out_leaves_weights_and_momentum_bitwise() -> None:
    """Its gradients are not numbers; DeepSpeed's Muon has moved the momentum before it is known."""
    torch.manual_seed(0)
    parameter, optimizer = alone(torch.randn(6, 4))
    after = []
    for gradient, left_out in ((torch.randn(6, 4), 0.0), (torch.full((6, 4), torch.nan), 1.0)):
        parameter.grad = gradient
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(left_out)
        optimizer.step()
        state = optimizer.state[parameter]
        after.append([parameter.detach().clone(), state[MOMENTUM].clone(), state["step"].clone()])
    assert all(torch.equal(*pair) for pair in zip(*after))
    assert torch.isfinite(parameter).all() and float(after[0][2]) == 1


def test_momentum_clipping_decay_and_rate_are_worked_out_by_hand() -> None:
    """w (1 - lr decay) - lr update(g2 + 0.9 (0.9 g1 + g2)), gradients over the scale."""
    torch.manual_seed(0)
    weight, first, second = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 4)
    parameter, optimizer = alone(weight.clone())
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.zeros(())
    expected, momentum = weight.clone(), torch.zeros(6, 4)
    for gradient in (first, second):
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + gradient / 4
        update = newton_schulz(gradient / 4 + 0.9 * momentum)
        expected = expected * (1 - 0.1 * 0.1) - 0.1 * update
    torch.testing.assert_close(parameter.detach(), expected)


def saved_by_four(folder: Path, tokenizer: Path) -> History:
    """Two steps at TP2 with ZeRO-1, kept for export; the losses and norms behind them."""
    cfg = config("modern", tp=2, zero=1, **MUON)
    attached = {"tokenizer.json": tokenizer.read_bytes()}
    return train_and_save(cfg, folder, [SAVED], LAST, attachments=attached)[SAVED:]


def resumes(folder: Path, names: list[str], save_to: Path | None = None) -> dict[str, History]:
    """Training that goes on from the newest checkpoint at the layouts called so; the first one's is written again."""
    layouts: dict[str, Case] = {
        "tp2 dp2": dict(tp=2, zero=1), "pp4": dict(pp=4), "tp2 zero3": dict(tp=2, zero=3, sp=True),
        "one": dict(zero=0), "zero1": dict(zero=1),
    }  # fmt: skip
    found = {}
    for name in names:
        cfg = config("modern", **layouts[name], **MUON)
        found[name] = resume(cfg, folder, LAST, save_to=save_to)
        save_to = None
    return found


SAVED, LAST = 2, 5


def test_momentum_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    """Bitwise in the same layout; a matrix has one state, a vector AdamW's two."""
    cfg = config("modern", zero=0, **MUON)
    went_on = run_on_ranks(train_and_save, 1, cfg, tmp_path, [SAVED], LAST)[0][SAVED:]
    found = run_on_ranks(resumes, 1, tmp_path, ["one"])[0]
    assert found["one"] == went_on
    tensors = CheckpointTensors(folders.find(tmp_path))
    for name in tensors.parameters:
        kinds = {key for key in tensors.optimizer_keys if f"{key}/{name}" in tensors.names}
        assert kinds == ({MOMENTUM} if ".linear_" in name else {"exp_avg", "exp_avg_sq"}), name


@pytest.mark.slow
def test_any_layout_resumes_any_other_and_what_was_trained_is_exported(tmp_path: Path) -> None:
    """To one process and back each bit of the momentum is there; transformers computes our logits."""
    root = tmp_path / "checkpoints"
    saved = root / "modern"
    expected = run_on_ranks(saved_by_four, 4, saved, tokenizer_file(tmp_path))[0]
    found = run_on_ranks(resumes, 4, saved, ["tp2 dp2", "pp4", "tp2 zero3"])[0]
    found |= run_on_ranks(resumes, 1, saved, ["one", "zero1"], saved / "one")[0]
    back = run_on_ranks(resumes, 4, saved / "one", ["tp2 dp2"])[0]
    assert found.pop("tp2 dp2") == back["tp2 dp2"] == expected
    for layout, history in found.items():
        for got, want in zip(history, expected, strict=True):
            assert got == pytest.approx(want, rel=1e-5), layout
    how = ["modern"], root, tmp_path / "exported", DType.fp32
    assert run_on_ranks(export_and_compare, 1, *how)[0]["modern"] < TOLERANCE


def refused(message: str, **settings: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        derive(config("modern", **MUON, **settings), world_size=1, tokenizer_vocab_size=VOCAB)


def test_what_muon_cannot_do_is_refused() -> None:
    refused("would update nothing.*Set optimizer=adamw", train="*.lora_?", lora_rank=4)
    refused("does not work with parallel.offload_optimizer=true", offload=True)


def test_homes_share_the_work() -> None:
    """The dearest first, each to the rank that has least to do; the same on every rank."""
    costs = {"a": 4.0, "b": 3.0, "c": 3.0, "d": 2.0, "e": 2.0}
    assert _least_loaded(costs, 2) == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 0}
