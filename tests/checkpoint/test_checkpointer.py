"""Checkpoints: any layout resumes any other, and nothing a crash or a bad disk does is taken for a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.__main__ import ToolConfig, main
from pipeline.checkpoint.agreement import Agreement
from pipeline.checkpoint.tensors import HostCopy, write
from pipeline.engine import state
from pipeline.errors import CheckpointError
from pipeline.log import logger
from pipeline.model.fragments import Fragment
from pipeline.model.partition import Partition
from tests.support.checkpoint_runs import Run, resume, small_chunks, train_and_save
from tests.support.layouts import allow_fp16_on_the_cpu, config
from tests.support.ranks import run_on_ranks
from tests.support.waiting import HANG_S

SAVED, LAST = 3, 5


def four_ranks(model: str, precision: str, folder: Path) -> dict[str, list]:
    """Save at TP2 x PP2, go on; then resume the same and other layouts of four ranks."""
    source = config(
        model, tp=2, pp=2, precision=precision, dropout=0.1 if precision == "bf16" else 0.0
    )
    histories = {"source": train_and_save(source, folder, [SAVED], LAST)[SAVED:]}
    histories["same"] = resume(source, folder, LAST)
    if precision == "fp32":
        histories["pp4"] = resume(config(model, pp=4), folder, LAST)
        histories["tp2 dp2 zero3"] = resume(
            config(model, tp=2, zero=3), folder, LAST, save_to=folder / "zero3"
        )
    return histories


def two_ranks(model: str, folder: Path) -> dict[str, list]:
    """Resume on two ranks."""
    return {
        "dualpipev": resume(
            config(model, pp=2, schedule="dualpipev", micro_batch_size=1),
            folder,
            LAST,
            save_to=folder / "dualpipev",
        ),
        "dp2 zero2 from zero3": resume(config(model, zero=2), folder / "zero3", LAST),
    }


def one_rank(model: str, folder: Path) -> dict[str, list]:
    """Resume in one process, write it again."""
    return {
        "zero0": resume(config(model, zero=0), folder, LAST),
        "tp1": resume(config(model), folder, LAST, save_to=folder / "one"),
    }


@pytest.mark.parametrize("model", [pytest.param("gpt2", marks=pytest.mark.slow), "modern"])
def test_every_layout_resumes_a_checkpoint_of_every_other(model: str, tmp_path: Path) -> None:
    """The first loss after a move is equal, later ones within fp32 rounding; the files hold the same bits again."""
    found = run_on_ranks(four_ranks, 4, model, "fp32", tmp_path)[0]
    found |= run_on_ranks(two_ranks, 2, model, tmp_path)[0]
    found |= run_on_ranks(one_rank, 1, model, tmp_path)[0]
    found["back"] = run_on_ranks(resume, 4, config(model, tp=2, pp=2), tmp_path / "one", LAST)[0]
    expected = found.pop("source")
    assert found["same"] == expected and found["back"] == expected
    for layout, history in found.items():
        assert history[0][0] == pytest.approx(expected[0][0], rel=2e-7), layout
        for got, want in zip(history, expected, strict=True):
            assert got == pytest.approx(want, rel=1e-5), layout
    sizes = [
        path.stat().st_size for path in (folders.find(tmp_path / "zero3")).glob("*.safetensors")
    ]
    assert len(sizes) == 4 and max(sizes) < 1.25 * min(sizes), "writers are not balanced"
    original = folders.find(tmp_path)
    for copy in ("zero3", "dualpipev", "one"):
        assert main(ToolConfig("diff", str(original), str(tmp_path / copy))) == 0


def experts_on_four_ranks(folder: Path) -> dict[str, list]:
    """Save with experts on ranks of their own, across tensor and data ranks; at ZeRO-0 copies of them."""
    spread = config("moe-whole", ep=4, tp=2, sp=True)
    histories = {"source": train_and_save(spread, folder, [SAVED], LAST)[SAVED:]}
    return histories | {
        "ep2 dp4 zero0": resume(
            config("moe-whole", ep=2, zero=0), folder, LAST, save_to=folder / "copies"
        ),
        "tp2 dp2": resume(config("moe-whole", tp=2, sp=True), folder, LAST),
    }


def experts_on_one_rank(folder: Path) -> dict[str, list]:
    return {"one": resume(config("moe-whole"), folder, LAST, save_to=folder / "one")}


def experts_on_two_ranks(folder: Path) -> dict[str, list]:
    return {
        "ep2 zero2": resume(config("moe-whole", ep=2, zero=2), folder / "one", LAST),
        "ep2 tp2 zero3": resume(
            config("moe-whole", ep=2, tp=2, sp=True, zero=3), folder / "copies", LAST
        ),
    }


@pytest.mark.slow
def test_experts_move_between_ranks_of_their_own_and_one_process(tmp_path: Path) -> None:
    """A checkpoint names experts as the model does, whichever ranks held them."""
    found = run_on_ranks(experts_on_four_ranks, 4, tmp_path)[0]
    found |= run_on_ranks(experts_on_one_rank, 1, tmp_path)[0]
    found |= run_on_ranks(experts_on_two_ranks, 2, tmp_path)[0]
    expected = found.pop("source")
    for layout, history in found.items():
        assert history[0][0] == pytest.approx(expected[0][0], rel=2e-7), layout
        for got, want in zip(history, expected, strict=True):
            assert got == pytest.approx(want, rel=1e-5), layout
    original = folders.find(tmp_path)
    for copy in ("copies", "one"):
        assert main(ToolConfig("diff", str(original), str(tmp_path / copy))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "modern"])
def test_same_layout_resumes_bitwise_in_bf16_with_dropout(model: str, tmp_path: Path) -> None:
    """A restart must not show: master weights, moments and dropout streams continue exactly."""
    found = run_on_ranks(four_ranks, 4, model, "bf16", tmp_path)[0]
    assert found["same"] == found["source"]


def fp16_again(folder: Path) -> list[Any]:
    """Train in fp16, whose loss scale falls in the first steps; resume."""
    allow_fp16_on_the_cpu()
    run = Run(config("gpt2", precision="fp16"), folder)
    run.engine.loss_scale.cur_scale.fill_(2.0**22)
    run.train(0, SAVED)
    run.save(SAVED)
    scaler = run.engine.loss_scale.state()
    history = run.train(SAVED, LAST)
    run.close()
    again = Run(config("gpt2", precision="fp16"), folder)
    again.checkpointer.restore(again.engine)
    found = again.engine.loss_scale.state()
    resumed = again.train(SAVED, LAST)
    again.close()
    return [scaler, found, history, resumed]


def test_fp16_continues_with_its_loss_scale(tmp_path: Path) -> None:
    """A fresh scale would skip steps that the uninterrupted run does not skip."""
    scaler, found, history, resumed = run_on_ranks(fp16_again, 1, tmp_path)[0]
    assert scaler["scale"] < 2.0**22 and scaler["good_steps"] < SAVED
    assert found == scaler and resumed == history


def offloaded(folder: Path) -> list[list]:
    """A state that moves from the device to the host and back."""
    source = train_and_save(config("gpt2"), folder, [SAVED], LAST)[SAVED:]
    on_host = resume(config("gpt2", offload=True, zero=2), folder, LAST, save_to=folder / "host")
    return [source, on_host, resume(config("gpt2"), folder / "host", LAST)]


@pytest.mark.slow
def test_optimizer_state_moves_to_the_host_and_back(tmp_path: Path) -> None:
    """DeepSpeedCPUAdam keeps its step count as an integer, torch's AdamW as a tensor."""
    source, on_host, back = run_on_ranks(offloaded, 1, tmp_path)[0]
    assert back == source
    for got, want in zip(on_host, source, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def save_then_train(asynchronous: bool, folder: Path) -> None:
    cfg = config("gpt2")
    cfg.checkpoint.asynchronous = asynchronous
    train_and_save(cfg, folder, [1, 2], 4)


def test_steps_after_an_asynchronous_save_are_not_in_it(tmp_path: Path) -> None:
    """Training goes on while the file is written; the file is the state at the save."""
    for name in ("background", "foreground"):
        run_on_ranks(save_then_train, 1, name == "background", tmp_path / name)
    for step in (1, 2):
        paths = [
            str(tmp_path / name / folders.name_of(step)) for name in ("background", "foreground")
        ]
        assert main(ToolConfig("diff", *paths)) == 0


def restore_after_damage(folder: Path) -> tuple[dict, list[str], list]:
    run = Run(config("gpt2"), folder)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    record = run.checkpointer.restore(run.engine)
    assert record is not None
    history = run.train(record.step, 4)
    run.save(4)
    run.close()
    return record, messages, history


@pytest.mark.parametrize("how", [pytest.param("cut", marks=pytest.mark.slow), "flipped"])
def test_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    how: str, tmp_path: Path
) -> None:
    """A node that died with a dirty cache must not cost the run, nor go unnoticed.

    Tensors are read while they are checked: a cut file cannot be read, a flipped bit can.
    """
    history = run_on_ranks(train_and_save, 1, config("gpt2"), tmp_path, [2, 3], 4)[0]
    newest = tmp_path / folders.name_of(3) / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[-2000] ^= 64
    newest.write_bytes(content[:-1000] if how == "cut" else content)
    record, messages, resumed = run_on_ranks(restore_after_damage, 1, tmp_path)[0]
    assert record.step == 2 and resumed == history[2:]
    assert any(
        "step-00000003 is DAMAGED" in message and "rank-00000.safetensors" in message
        for message in messages
    )
    assert (tmp_path / "damaged-step-00000003").is_dir()
    assert [step for step, _ in folders.list_checkpoints(tmp_path)] == [2, 4]


def test_state_that_a_checkpoint_lacks_is_zero_again() -> None:
    """A checkpoint from before the first update has no moments; those of a diverged run must go."""
    flat = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([flat])
    flat.grad = torch.full((3,), 1e30)
    optimizer.step()
    slot = SimpleNamespace(flat=flat, parameter=flat)
    engine: Any = SimpleNamespace(
        runner=SimpleNamespace(optimizer=optimizer, slots=lambda: [slot]),
        all_parameters=lambda: {"final_norm.weight": (flat, Partition.of((3,)))},
    )
    state.create_state(engine, ["exp_avg"], optimizer_step=0)
    kept, gone = (optimizer.state[flat][key] for key in ("exp_avg", "exp_avg_sq"))
    assert kept.count_nonzero() == 3 and gone.count_nonzero() == 0
    assert float(optimizer.state[flat]["step"]) == 0


def expect_refusals(configs: list[Any], folder: Path) -> list[str]:
    messages = []
    for cfg in configs:
        run = Run(cfg, folder)
        with pytest.raises(CheckpointError) as caught:
            run.checkpointer.restore(run.engine)
        run.close()
        messages.append(str(caught.value))
    return messages


def test_checkpoint_of_another_model_is_refused_with_names_and_shapes(tmp_path: Path) -> None:
    """The message must say what differs."""
    run_on_ranks(train_and_save, 1, config("gpt2"), tmp_path, [1], 1)
    wider = config("gpt2")
    wider.model.ffn_hidden_size = 128
    message, other = run_on_ranks(expect_refusals, 2, [wider, config("modern")], tmp_path)[1]
    assert "mlp.linear_fc1.bias is (256,)" in message and "(128,) in this model" in message
    assert "has no head.weight and 8 more" in other


def write_hole(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    chunks = small_chunks(1) if dist.get_rank() == 0 else []
    with pytest.raises(CheckpointError, match="do not fill its .40, 30.: a hole"):
        write(chunks, folder, ranks=Agreement(dist.group.WORLD))
    return "refused"


def test_a_tensor_with_a_hole_is_not_written(tmp_path: Path) -> None:
    """A rank that forgets its part must fail the save, not leave zeros."""
    assert run_on_ranks(write_hole, 2, tmp_path / "x") == ["refused", "refused"]


def test_host_copy_reuses_its_memory() -> None:
    """Pages are faulted in, or pinned, once: that is most of the stall of a first save."""
    fragment = Fragment("a", Partition.of((4, 5)), 3, {"weight": torch.arange(9.0)}, True)
    copies = HostCopy()
    first, second = copies.take([fragment]), copies.take([fragment])
    assert [chunk.data.data_ptr() for chunk in first] == [chunk.data.data_ptr() for chunk in second]
    assert [(chunk.offsets, chunk.data.tolist()) for chunk in second] == [
        ((0, 3), [[0.0, 1.0]]), ((1, 0), [[2.0, 3.0, 4.0, 5.0, 6.0]]), ((2, 0), [[7.0, 8.0]]),
    ]  # fmt: skip


def test_host_copy_by_several_threads_is_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk once, and by as many threads as were given: one core does not reach the memory's speed."""
    import threading

    from torch import Tensor

    fragments = [
        Fragment(f"f{number}", Partition.of((300, 40)), 0, {"weight": torch.rand(12_000)}, True)
        for number in range(8)
    ]
    meet, copy = threading.Barrier(2, timeout=HANG_S), Tensor.copy_

    def copy_together(self: Tensor, source: Tensor, **kwargs: object) -> Tensor:
        meet.wait()  # breaks where one thread copies one after the other
        return copy(self, source, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Tensor, "copy_", copy_together)
    copies = HostCopy(num_threads=2).take(fragments)
    monkeypatch.undo()
    assert [chunk.name for chunk in copies] == [f"weights/f{number}" for number in range(8)]
    for fragment, chunk in zip(fragments, copies):
        assert torch.equal(chunk.data.reshape(-1), fragment.views["weight"])
