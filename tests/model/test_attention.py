"""What attention does beyond what every layout shares: heads that share keys where no kernel lets them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.support.ranks import run_on_ranks


def repeated_heads() -> tuple[float, bool]:
    """(largest difference to torch's shared heads, whether nothing is copied where none are shared)."""
    from pipeline.model.attention import one_key_head_per_query_head

    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (6, 3, 3))
    shared = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    k, v = one_key_head_per_query_head(q, k, v)
    difference = (F.scaled_dot_product_attention(q, k, v, is_causal=True) - shared).abs().max()
    again = one_key_head_per_query_head(q, k, v)
    return float(difference), again[0] is k and again[1] is v


def test_repeated_key_heads_give_what_shared_ones_do() -> None:
    """fp32 on CUDA: which query head looks at which key head must stay."""
    difference, copies_nothing = run_on_ranks(repeated_heads, 1)[0]
    assert difference < 1e-6 and copies_nothing


def orders() -> list[list[str]]:
    """Kernels' names in their order: on an A100, an H200, a B200, a Blackwell without cuDNN's own."""
    from pipeline.model.attention import kernel_order

    capabilities = [(8, 0), (9, 0), (10, 0), (12, 0)]
    return [[kernel.name for kernel in kernel_order(one)] for one in capabilities]


def pinned_order() -> tuple[list[str], list[str]]:
    """(what torch would try, what was given) once a CPU's process has pinned its kernels."""
    from torch.nn.attention import _cur_sdpa_kernel_backends

    from pipeline.model.attention import kernel_order, pin_attention_kernels

    pin_attention_kernels()
    pin_attention_kernels()  # of a second engine in the process
    given = [kernel.name for kernel in kernel_order((0, 0))]
    return [kernel.name for kernel in _cur_sdpa_kernel_backends(with_priority=True)], given


def test_cudnn_comes_first_where_it_is_the_faster_one() -> None:
    """Plain attention, which holds S x S scores, comes last, and fp32 has its kernel everywhere."""
    first = [order[0] for order in run_on_ranks(orders, 1)[0]]
    assert first == ["FLASH_ATTENTION", "CUDNN_ATTENTION", "CUDNN_ATTENTION", "FLASH_ATTENTION"]
    assert {tuple(order[2:]) for order in run_on_ranks(orders, 1)[0]} == {("EFFICIENT_ATTENTION", "MATH")}  # fmt: skip


def test_the_order_is_pinned() -> None:
    found, given = run_on_ranks(pinned_order, 1)[0]
    assert found[: len(given)] == given
