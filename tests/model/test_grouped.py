"""All experts in one product: the numbers of a loop over them, and the loop where torch's kernel does not go."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.model import grouped
from pipeline.rehearsal import fake_cuda
from tests.support.device import run_on_device
from tests.support.equivalence import compare
from tests.support.layouts import FEW_STEPS, batches, config, reference, train
from tests.support.ranks import run_on_ranks

SIZES = [5, 0, 17, 1]  # tokens of each expert


def laid(shapes: list[tuple[int, int]], count: int, *, gap: int = 0, **where: Any) -> list[list]:
    """The matrices of `count` experts one after another in one memory, as ZeRO lays them."""
    each = sum(rows * columns for rows, columns in shapes) + gap
    flat, found = torch.randn(each * count, **where), [[] for _ in shapes]  # type: ignore[var-annotated]
    for expert in range(count):
        start = each * expert
        for of_shape, (rows, columns) in zip(found, shapes):
            part = flat[start : start + rows * columns].view(rows, columns)
            of_shape.append(nn.Parameter(part))
            start += rows * columns
    return found


def ends_of(sizes: list[int], where: Any = "cpu") -> Tensor:
    return torch.tensor(sizes).cumsum(0).to(where, torch.int32)


def both(dtype: torch.dtype, where: str) -> list[tuple[Tensor, Tensor]]:
    """Output and every gradient: by the grouped product, and expert by expert; in fp32 on the CPU."""
    torch.manual_seed(0)
    _, weights = laid([(16, 24), (32, 16)], len(SIZES), dtype=dtype, device=where)
    x = torch.randn(sum(SIZES), 16, dtype=dtype, device=where, requires_grad=True)
    grad = torch.randn(sum(SIZES), 32, dtype=dtype, device=where)
    assert grouped.lie_regularly(weights)
    once = grouped.grouped_product(x, ends_of(SIZES, where), weights)
    loop = torch.cat([part @ w.t() for part, w in zip(x.split(SIZES), weights)])
    found = [(once.detach(), loop.detach())]
    leaves = [x, *weights]
    found += zip(torch.autograd.grad(once, leaves, grad), torch.autograd.grad(loop, leaves, grad))
    return [(a.float().cpu(), b.float().cpu()) for a, b in found]


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_products_and_gradients_are_those_of_a_loop(dtype: torch.dtype, rel: float) -> None:
    """Also of an expert without tokens, whose gradient is zero, and of one with a single one."""
    pairs = both(dtype, "cpu")
    assert not pairs[3][0].any()  # x, then weights: expert 1
    for once, loop in pairs:
        torch.testing.assert_close(once, loop, rtol=rel, atol=rel)


def test_frozen_weights_get_no_gradient() -> None:
    [weights] = laid([(16, 16)], 4)
    for weight in weights:
        weight.requires_grad_(False)
    x = torch.randn(sum(SIZES), 16, requires_grad=True)
    grouped.grouped_product(x, ends_of(SIZES), weights).sum().backward()
    loop = torch.cat([g.sum(0).expand(n, 16) for g, n in zip(weights, SIZES)])
    torch.testing.assert_close(x.grad, loop)
    assert all(weight.grad is None for weight in weights)


def test_what_does_not_lie_regularly_stays_in_the_loop() -> None:
    """Rows that begin amid 16 bytes, memories of their own, distances that differ, ZeRO-3's empty weights."""
    bf16: dict[str, Any] = {"dtype": torch.bfloat16}
    first, second = laid([(16, 8), (8, 16)], 3, **bf16)
    assert grouped.lie_regularly(first) and grouped.lie_regularly(second)
    assert not grouped.lie_regularly(laid([(16, 8)], 3, gap=4, **bf16)[0])
    assert not grouped.lie_regularly(laid([(16, 12)], 3, **bf16)[0])
    assert not grouped.lie_regularly([nn.Parameter(torch.randn(16, 8, **bf16)) for _ in range(3)])
    assert not grouped.lie_regularly([first[0], first[2], first[1]])
    assert not grouped.lie_regularly([first[0], first[1], second[2]])
    first[0].ds_tensor = None
    assert not grouped.lie_regularly(first)


def train_at_once(cfg: Any) -> tuple[dict[str, Any], int, int]:
    """A run whose experts are taken at once on the CPU; how often, of how many products."""
    from pipeline.model import experts

    asked, taken = [], []

    def wherever_they_lie_so(x: Tensor, weights: Any) -> bool:
        asked.append(grouped.lie_regularly(weights))
        return asked[-1]

    whole = experts.grouped_product
    experts.goes = wherever_they_lie_so
    experts.grouped_product = lambda *args: taken.append(args) or whole(*args)  # type: ignore[func-returns-value]
    return train(cfg, batches()[:FEW_STEPS]), len(taken), len(asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [dict(), dict(ep=2, zero=2, recompute="full"), dict(tp=2, sp=True)]
)
def test_a_run_takes_all_experts_at_once_out_of_zeros_memory(layout: dict[str, Any]) -> None:
    """In the precision and the memory that a run on CUDA has; losses and norms are plain torch's."""
    cfg = config("moe-whole", precision="bf16", **layout)
    for got, taken, asked in run_on_ranks(train_at_once, 2 if layout else 1, cfg):
        assert taken == asked > 0
        compare(got, reference(config("moe-whole"), num_steps=FEW_STEPS), "bf16", str(layout))


ON_A_FAKE_DEVICE = """
import json
from pipeline.rehearsal import fake_cuda
fake_cuda.load_guard()
import torch
fake_cuda.stand_in()
from pipeline.model import grouped
found = {}
with fake_cuda.fake_tensors():
    for name, dtype, tokens in [
        ("bf16", torch.bfloat16, 37), ("fp32", torch.float32, 37), ("none", torch.bfloat16, 0),
    ]:
        flat = torch.zeros(4 * 24 * 16, dtype=dtype, device="cuda")
        weights = [torch.nn.Parameter(flat[i * 384 : i * 384 + 384].view(24, 16)) for i in range(4)]
        x = torch.zeros(tokens, 16, dtype=dtype, device="cuda", requires_grad=True)
        found[name] = grouped.goes(x, weights)
        if name != "bf16":
            continue
        ends = torch.zeros(4, dtype=torch.int32, device="cuda")
        fake_cuda.host_waits.clear()
        out = grouped.grouped_product(x, ends, weights)
        out.backward(torch.ones_like(out))
        found["shapes"] = [list(out.shape), list(x.grad.shape), *(list(w.grad.shape) for w in weights)]
        found["where"] = sorted({f"{t.dtype} {t.device}" for t in (out, x.grad, *(w.grad for w in weights))})
        assert not fake_cuda.host_waits
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(fake_cuda.compiler() is None, reason="no C++ compiler")
def test_on_a_device_bf16_is_taken_at_once_and_nothing_is_read_back() -> None:
    """On tensors of a device that computes nothing."""
    done = subprocess.run(
        [sys.executable, "-c", ON_A_FAKE_DEVICE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == {
        "bf16": True, "fp32": False, "none": False,
        "shapes": [[37, 24], [37, 16], *[[24, 16]] * 4], "where": ["torch.bfloat16 cuda:0"],
    }  # fmt: skip


@pytest.mark.gpu
def test_the_kernel_of_a_device_computes_what_a_loop_does() -> None:
    for once, loop in run_on_device(both, torch.bfloat16, "cuda"):
        assert float((once - loop).norm()) <= 1e-2 * float(loop.norm())
