"""Attention inside documents, for which no mask of S x S exists.

    document_ids --document_starts--> starts --attend--> context

A query sees the keys from its document's first token to itself: one integer a token says it. As a
mask of true and false that were 1 GiB for a sequence of 32,768 tokens and 16 GiB for one of
131,072, and a kernel that takes masks makes a bias of it, twice as large in 16 bits.

On CUDA torch's flash kernel for sequences of many lengths takes the documents as sequences; what it
does not take (fp32, dropout, other processors) goes through the blocks of block_attention.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from pipeline.model import block_attention

# torch 2.11's takes as many key heads as query heads only, by its documentation.
SHARES_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters
WIDEST = 256  # of the kernel's heads, whose width is a multiple of 8
_most = 1  # documents of a micro-batch, as expect_documents was told


def document_starts(document_ids: Tensor) -> Tensor:
    """(B, S) int64: where the document of each token begins in its row; ids ascend in a row."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    torch.ne(document_ids[:, 1:], document_ids[:, :-1], out=begins[:, 1:])
    return torch.where(begins, places, 0).cummax(1).values


def expect_documents(counts: Iterable[int]) -> None:
    """Tell the kernel how many documents each of the micro-batches to come holds.

    The loader has counted them on the host. To count them on the device the host would wait for it
    in every block; and room for one a token would start 4 million empty groups of threads for a row
    of 4,096 and 32 heads, which take longer than the attention itself.
    """
    global _most
    most = max(counts, default=1)
    _most = 1 << max(0, most - 1).bit_length()  # few different numbers: model.compile follows them


def attend(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *, scale: float, dropout: float
) -> Tensor:
    """As `block_attention.causal_attention`, by whichever kernel takes these tensors."""
    if not dropout and _fits_kernel(q):
        return _by_kernel(q, k, v, starts, scale)
    return block_attention.causal_attention(q, k, v, scale, starts=starts, dropout=dropout)


def _fits_kernel(q: Tensor) -> bool:
    """Whether torch's flash kernel takes these queries: NVIDIA since Ampere, 16 bits."""
    return (
        q.is_cuda
        and torch.version.hip is None
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] <= WIDEST
        and q.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
    """The documents of all rows as sequences of one flat row: (B, G * Q, S, D)."""
    rows, size = starts.shape
    shares = q.shape[1] // k.shape[1]
    if shares > 1 and not SHARES_KEYS:
        k, v = k.repeat_interleave(shares, dim=1), v.repeat_interleave(shares, dim=1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    bounds = document_bounds(starts, _most)
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # no later key
    if SHARES_KEYS:
        options["enable_gqa"] = shares > 1
    out = varlen_attn(q, k, v, bounds, bounds, size, size, **options)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (rows, size)).transpose(1, 2)


def document_bounds(starts: Tensor, most: int) -> Tensor:
    """(most + 1,) int32: where the documents of all rows begin in B * S tokens, and the end.

    Behind the last document the end is repeated: sequences of no token. Nothing is read back.
    """
    rows, size = starts.shape
    place = torch.arange(rows * size, device=starts.device)
    first = starts + torch.arange(0, rows * size, size, device=starts.device)[:, None]
    number = (place == first.flatten()).cumsum(0) - 1
    bounds = torch.full((most + 1,), rows * size, dtype=torch.int64, device=starts.device)
    return bounds.scatter_reduce_(0, number, place, "amin").to(torch.int32)
