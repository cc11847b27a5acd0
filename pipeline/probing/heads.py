"""What attention heads do, as numbers: where they look, how sharply, which kind they are.

    Passage -> pattern(block, head) (B, S, S) -> sums over the tokens that count

Kinds are read on random tokens that are repeated once, [r, r], where nothing but the repetition can
be known (Elhage et al. 2021; Olsson et al. 2022, arXiv:2209.11895): a token at place i of the
second half is looked up at i - T (duplicate), what came after it at i - T + 1 (induction).

B micro-batch, S sequence, T half of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.probing.passage import BlockPassage, Passage

Scores = dict[str, Tensor]
"""Name -> (blocks of the model, heads of the model) fp64 sums; 0 where another rank computes."""

LOOKS, KINDS = ("entropy", "sink"), ("previous", "duplicate", "induction")
REPEATS, HALF = 8, 64  # sequences and T, where the model's sequences have room for 2 T


def pattern(block: BlockPassage, head: int) -> Tensor:
    """(B, S, S) fp32 attention of one head of this rank: rows are queries and sum to 1."""
    queries, keys = block.queries, block.keys
    group = head // (queries.shape[1] // keys.shape[1])
    q, k = queries[:, head].float(), keys[:, group].float()
    scores = q @ k.transpose(1, 2) * block.scale
    size = q.shape[1]
    allowed = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if block.starts is not None:
        allowed = allowed & (torch.arange(size, device=q.device) >= block.starts[..., None])
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


def looks(attention: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """0-dim fp64 sums over tokens of a head's (B, S, S) attention on any text.

    entropy: nats of a token's attention. sink: what a token that is not the first gives the first.

    Args:
        weights: (B, S), 1 where a token counts.
    """
    entropy = torch.special.entr(attention).sum(-1)
    return {
        "entropy": (entropy * weights).double().sum(),
        "sink": (attention[:, 1:, 0] * weights[:, 1:]).double().sum(),
    }


def kinds(attention: Tensor, half: int) -> dict[str, Tensor]:
    """0-dim fp64 means of a head's (B, 2 T or more, the same) attention on repeated random tokens.

    Args:
        half: T; what lies behind 2 T fills up.
    """
    attention = attention[:, : 2 * half, : 2 * half]

    def back(distance: int, skipped: int) -> Tensor:
        """Mean attention to the token `distance` before, over the tokens that have one."""
        return attention.diagonal(-distance, 1, 2)[:, skipped:].double().mean()

    # Of T - 1 back the first entry is the last token of the first half, which repeats nothing.
    return {"previous": back(1, 0), "duplicate": back(half, 0), "induction": back(half - 1, 1)}


def of_all_heads(
    passage: Passage,
    ask: Callable[[Tensor], dict[str, Tensor]],
    scores: Scores,
    *,
    heads: range,
) -> None:
    """Fill in what `ask` says of the attention of every head of this rank, a head at a time.

    Args:
        scores: zeros, by the names that `ask` gives.
        heads: numbers in the model of this rank's heads.
    """
    for number, block in passage.items():
        for place, head in enumerate(heads):
            for name, value in ask(pattern(block, place)).items():
                scores[name][number, head] = value


def repeated_tokens(
    vocab_size: int, *, seq_len: int, parts: int = 1, seed: int = 0
) -> tuple[Tensor, int]:
    """(REPEATS, 2 T) int64 ids, random ones and the same again; and T.

    The same at every layout; behind them what no earlier token sees fills up.

    Args:
        seq_len: tokens of the longest sequence, a multiple of `parts`.
        parts: sequence-parallel ranks, which take equal parts.
    """
    half = min(HALF, 1 << ((seq_len // 2).bit_length() - 1))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (REPEATS, half), generator=generator)
    return torch.nn.functional.pad(torch.cat([ids, ids], dim=1), (0, -2 * half % parts)), half
