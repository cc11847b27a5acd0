"""FP8 runs: within their tolerance of plain torch in fp32 at every layout, and refused where they cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.run_shape import derive
from pipeline.errors import ConfigError
from pipeline.huggingface.writer import DType
from pipeline.model import float8
from tests.support.checkpoint_runs import History, resume, train_and_save
from tests.support.equivalence import Case, check, compare
from tests.support.exported import TOLERANCE, export_and_compare, tokenizer_file
from tests.support.layouts import FEW_STEPS, STEPS, VOCAB, batches, config, reference, train
from tests.support.ranks import run_on_ranks

FP8: Case = dict(precision="bf16", fp8="rowwise")
CASES: dict[int, list[Case]] = {
    1: [dict(model="modern", zero=1, recompute="selective", documents=True, **FP8)],
    2: [
        dict(model="modern", tp=2, sp=True, **FP8),
        dict(model="gpt2", tp=2, **FP8),
        dict(model="gpt2", pp=2, **FP8),
        dict(model="gpt2", zero=3, recompute="full", **FP8),
        dict(model="modern", zero=2, optimizer="muon", **FP8),
        dict(model="moe-switch", pp=2, schedule="dualpipev", recompute="full", **FP8),
        dict(model="moe-switch", cp=2, zero=2, recompute="full", **FP8),
        dict(model="moe", ep=2, **FP8),
    ],
}


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_layouts_match_plain_torch(world_size: int) -> None:
    check(world_size, CASES[world_size], num_steps=STEPS)


def train_sabotaged(cfg: Any) -> dict[str, Any]:
    """A run whose products take each row's factor from the row beside it."""
    whole = float8.quantize

    def of_another_row(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, factors = whole(x)
        return numbers, factors.roll(1, 0).contiguous()

    float8.quantize = of_another_row
    return train(cfg, batches()[:FEW_STEPS])


@pytest.mark.slow
def test_factors_of_another_row_turn_the_comparison_red() -> None:
    """The widest tolerance of all, of what three bits of mantissa lose, still tells rows apart."""
    cfg = config("modern", **FP8)
    history = run_on_ranks(train_sabotaged, 1, cfg)[0]["history"]
    with pytest.raises(AssertionError, match="differs"):
        compare({"history": history}, reference(cfg, num_steps=FEW_STEPS), "fp8", "sabotage")


SAVED, LAST = 3, 5


def saved_by_two(folder: Path, tokenizer: bytes) -> list[History]:
    """Three steps at TP2 with SP; then to the fifth, and the same from the checkpoint."""
    cfg = config("modern", tp=2, sp=True, **FP8)
    attached = {"tokenizer.json": tokenizer}
    history = train_and_save(cfg, folder, [SAVED], LAST, attachments=attached)
    return [history[SAVED:], resume(cfg, folder, LAST)]


def resumed_by_one(folder: Path) -> list[History]:
    """In float8, written again; and in bf16, of which the files know nothing."""
    return [
        resume(config("modern", **FP8), folder, LAST, save_to=folder / "one"),
        resume(config("modern", precision="bf16"), folder, LAST),
    ]


def back_at_two(folder: Path) -> History:
    return resume(config("modern", tp=2, sp=True, **FP8), folder, LAST)


@pytest.mark.slow
def test_a_checkpoint_moves_to_one_process_and_back_and_is_exported(tmp_path: Path) -> None:
    """Weights and moments are kept in fp32: the same bits everywhere, whatever multiplies them."""
    root = tmp_path / "checkpoints"
    saved = root / "modern"
    expected, same = run_on_ranks(saved_by_two, 2, saved, tokenizer_file(tmp_path).read_bytes())[0]
    one, bf16 = run_on_ranks(resumed_by_one, 1, saved)[0]
    assert same == expected == run_on_ranks(back_at_two, 2, saved / "one")[0]
    compare({"history": one}, expected, "fp8", "one process")
    compare({"history": bf16}, expected, "fp8", "bf16")
    assert one != bf16
    how = ["modern"], root, tmp_path / "exported", DType.fp32
    assert run_on_ranks(export_and_compare, 1, *how)[0]["modern"] < TOLERANCE


def refused(message: str, **settings: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        derive(config("modern", **settings), world_size=1, tokenizer_vocab_size=VOCAB)


def test_what_float8_cannot_do_is_refused() -> None:
    refused("training.fp8=rowwise needs training.precision=bf16", fp8="rowwise")
    cfg = config("modern", **FP8)
    for given, message in (
        (dict(compile=True), "does not work with model.compile=true"),
        (dict(ffn_hidden_size=100), "multiples of 16, and a rank's linear_fc1 is 200 x 64"),
    ):
        model = replace(cfg.model, **given)
        with pytest.raises(ConfigError, match=message):
            derive(replace(cfg, model=model), world_size=1, tokenizer_vocab_size=VOCAB)


def test_a_device_without_such_products_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(ConfigError, match="capability 9.0.*NVIDIA A100 has 8.0. Set training.fp8"):
        float8.check_device()


class Made(TorchDispatchMode):
    """Counts fp32 tensors of so many elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype is torch.float32:
            self.count += out.numel() == self.numel
        return out


def test_rows_are_divided_without_a_copy_of_them_in_fp32() -> None:
    """Of 16,384 tokens of an inner width of 28,672 it was 1.75 GiB."""
    x = torch.randn(8, 16, dtype=torch.bfloat16)
    with Made(x.numel()) as made:
        numbers, factors = float8.quantize(x)
    assert made.count == 1  # the quotients
    assert torch.equal(numbers.float(), (x.float() / factors).to(numbers.dtype).float())
