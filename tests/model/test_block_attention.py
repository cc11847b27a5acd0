"""Attention in blocks computes softmax(scale q k^T) v and its gradients, for any length, head grouping and precision."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model import block_attention, documents

CASES = [  # batch, key/value heads, queries a head, sequence, width
    (1, 1, 1, 1, 8),
    (2, 3, 1, 64, 16),
    (2, 2, 1, 65, 16),
    (1, 2, 3, 200, 8),  # grouped queries
    (3, 1, 4, 130, 8),  # one key/value head
    (2, 16, 1, 600, 4),  # more scores than are computed at a time
]


def tensors(case: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as Attention hands them over, (B, S, heads, D) in memory; and a gradient of the output."""
    batch, groups, queries, size, width = case
    generator = torch.Generator().manual_seed(1)
    heads = [groups * queries, groups, groups, groups * queries]
    return [
        torch.randn(batch, size, n, width, generator=generator).to(dtype).transpose(1, 2)
        for n in heads
    ]


def results(attend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None, kept: Any = 1.0
) -> Tensor:
    """By the definition, every score at once; kept: factors of the probabilities."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    if starts is not None:
        hidden = hidden | (torch.arange(q.shape[2]) < starts[:, None, :, None])
    return kept * (scale * q @ k.transpose(2, 3)).masked_fill(hidden, -math.inf).softmax(-1) @ v


def some_starts(batch: int, size: int, mean: int) -> Tensor:
    """Documents of about `mean` tokens, other ones in every row."""
    ids = (torch.rand(batch, size, generator=torch.Generator().manual_seed(2)) < 1 / mean).cumsum(1)
    return documents.document_starts(ids)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_the_definition(case: tuple[int, ...]) -> None:
    """In fp32, against fp64."""
    inputs = tensors(case, torch.float32)
    for starts in (None, some_starts(case[0], case[3], 20), some_starts(case[0], case[3], 200)):
        ours = partial(block_attention.causal_attention, scale=0.3, starts=starts)
        found = results(ours, *inputs)
        definition = partial(plain, scale=0.3, starts=starts)
        expected = results(definition, *(x.double() for x in inputs))
        for have, want in zip(found, expected, strict=True):
            assert have.shape == want.shape and have.dtype is torch.float32
            torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("documents_of", [None, 20])
def test_what_is_left_out_is_left_out_backwards_too(documents_of: int | None) -> None:
    """Dropout is drawn again in the backward pass, whatever was drawn between the two."""
    size, dropout = 130, 0.4
    q, k, v, grad = tensors((2, 2, 2, size, size), torch.float32)
    starts = None if documents_of is None else some_starts(2, size, documents_of)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        return block_attention.causal_attention(q, k, v, 0.3, starts=starts, dropout=dropout)

    # With values that are unit vectors the output is the probabilities themselves.
    units = torch.eye(size).expand(2, 2, size, size)
    dropped, whole = attend(q, k, units), plain(q, k, units, 0.3, starts)
    kept = torch.where(whole > 0, dropped / whole, 0.0)
    drawn = kept[whole > 0]
    torch.testing.assert_close(drawn, torch.where(drawn > 0, 1 / (1 - dropout), 0.0))
    assert abs(float((drawn == 0).float().mean()) - dropout) < 0.02

    def attend_and_draw(*x: Tensor) -> Tensor:
        out = attend(*x)
        torch.manual_seed(99)
        return out

    found = results(attend_and_draw, q, k, v, grad)
    expected = results(lambda *x: plain(*x, 0.3, starts, kept), q, k, v, grad)
    after = torch.rand(())
    torch.manual_seed(99)
    assert torch.equal(after, torch.rand(()))  # the backward pass leaves the stream where it was
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16_is_as_precise_as_torchs_kernel(case: tuple[int, ...]) -> None:
    """Errors against fp64 at most half as large again as those of scaled_dot_product_attention."""
    inputs = tensors(case, torch.bfloat16)
    scale = case[-1] ** -0.5
    expected = results(lambda *x: plain(*x, scale), *(x.double() for x in inputs))
    grouped = case[2] > 1
    torchs = results(
        lambda *x: F.scaled_dot_product_attention(
            *x, is_causal=True, enable_gqa=grouped, scale=scale
        ),
        *inputs,
    )
    ours = results(lambda *x: block_attention.causal_attention(*x, scale), *inputs)
    for have, theirs, want in zip(ours, torchs, expected, strict=True):
        error, limit = ((x.double() - want).norm() for x in (have, theirs))
        assert error <= 1.5 * limit + 1e-6


def test_it_is_used_where_it_is_faster() -> None:
    """One thread a rank; long sequences, or bf16."""
    threads = torch.get_num_threads()
    try:
        for count, size, dtype, expected in [
            (1, 256, torch.float32, True), (1, 255, torch.float32, False), (1, 8, torch.bfloat16, True),
            (1, 256, torch.float16, False), (2, 256, torch.float32, False), (2, 8, torch.bfloat16, False),
        ]:  # fmt: skip
            torch.set_num_threads(count)
            assert block_attention.is_faster(torch.empty(1, 1, size, 8, dtype=dtype)) is expected
    finally:
        torch.set_num_threads(threads)
