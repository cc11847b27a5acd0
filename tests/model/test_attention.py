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
