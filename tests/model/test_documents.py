"""Attention inside documents holds no mask: a row of 32,768 tokens fits, and CUDA's kernel is told the same bounds."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.model import block_attention, documents
from pipeline.rehearsal import fake_cuda
from tests.support.device import run_on_device
from tests.support.layouts import config
from tests.support.ranks import run_on_ranks

IDS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])


def test_a_document_starts_where_its_number_changes() -> None:
    assert documents.document_starts(IDS).tolist() == [[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 1, 1]]


def test_the_documents_of_all_rows_are_sequences_of_one_flat_row() -> None:
    """Rows end a document, and what is expected beyond those that are there has no token."""
    bounds = documents.document_bounds(documents.document_starts(IDS), 8)
    assert bounds.tolist() == [0, 3, 5, 6, 7, 12, 12, 12, 12] and bounds.dtype is torch.int32


def test_as_many_documents_are_expected_as_the_fullest_micro_batch_has() -> None:
    """Rounded up to a power of two, which changes rarely."""
    for counts, most in [([], 1), ([1], 1), ([3, 5, 2], 8), ([8], 8), ([9], 16)]:
        documents.expect_documents(counts)
        assert documents._most == most


def peak_of_a_long_row(size: int) -> float:
    """GiB by which a step of one block on a row of `size` tokens raises this process's peak."""
    from pipeline.config.parallel_sizes import ParallelSizes
    from pipeline.config.training import ParallelConfig
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.model.architecture import Architecture
    from pipeline.model.gpt import GPT

    layout = connect(ranks_from_environment(), ParallelSizes())
    model = replace(config("modern").model, num_layers=1, max_seq_len=size)
    cfg = config("modern")
    architecture = Architecture(
        model, ParallelConfig(), cfg.training.precision, vocab_size=250, padded_vocab_size=256
    )
    gpt = GPT(architecture, layout.tensor.group)
    for parameter in gpt.parameters():
        parameter.data.normal_(std=0.1)
    tokens = torch.arange(size)[None] % 250
    ids = torch.arange(size)[None] // 1500

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    before = peak()
    gpt(tokens, tokens, None, ids).backward()
    return peak() - before


def test_a_row_of_32768_tokens_with_documents_takes_less_than_a_gib() -> None:
    """Its mask alone was 1 GiB, and the bias that torch's kernel makes of it 4."""
    assert 0.01 < run_on_ranks(peak_of_a_long_row, 1, 32768)[0] < 1.0


ON_A_FAKE_DEVICE = """
import json, sys
from pipeline.rehearsal import fake_cuda
fake_cuda.load_guard()
import torch
fake_cuda.stand_in()
used = []
fake_cuda.stand_in_for_attention(used.append)
from pipeline.model import documents
found = {}
with fake_cuda.fake_tensors():
    for dtype, dropout, width in [
        (torch.bfloat16, 0.0, 64), (torch.float16, 0.0, 128), (torch.float32, 0.0, 64),
        (torch.bfloat16, 0.1, 64), (torch.bfloat16, 0.0, 260),
    ]:
        largest = 0
        def keep(x):
            global largest
            largest = max(largest, x.numel())
            return x
        q, k, v = (
            torch.zeros(2, 4096, n, width, dtype=dtype, device="cuda").transpose(1, 2).requires_grad_()
            for n in (4, 2, 2)
        )
        starts = torch.zeros(2, 4096, dtype=torch.long, device="cuda")
        fake_cuda.host_waits.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = documents.attend(q, k, v, starts, scale=0.1, dropout=dropout)
        out.backward(torch.ones_like(out))
        assert out.shape == q.shape == q.grad.shape and k.grad.shape == k.shape == v.grad.shape
        assert out.dtype == q.grad.dtype == v.grad.dtype == dtype and str(q.grad.device) == "cuda:0"
        assert largest == q.numel() and not fake_cuda.host_waits
        found[f"{dtype} {dropout} {width}"] = used.pop()
print(json.dumps(found))
"""


@pytest.mark.skipif(fake_cuda.compiler() is None, reason="no C++ compiler")
def test_on_a_device_the_kernel_takes_what_it_can_and_blocks_the_rest() -> None:
    """On tensors of a device that computes nothing: nothing is read back, nothing of S x S is kept."""
    done = subprocess.run(
        [sys.executable, "-c", ON_A_FAKE_DEVICE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == {
        "torch.bfloat16 0.0 64": "varlen", "torch.float16 0.0 128": "varlen",
        "torch.float32 0.0 64": "blocks", "torch.bfloat16 0.1 64": "blocks",
        "torch.bfloat16 0.0 260": "blocks",
    }  # fmt: skip


def results(attend: Any, inputs: list[Tensor], where: str, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients, in fp32 on the CPU; inputs: q, k, v and the output's gradient."""
    *leaves, grad = (x.to(where, dtype).detach().requires_grad_() for x in inputs)
    out = attend(*leaves)
    out.backward(grad.detach())
    return [x.detach().float().cpu() for x in (out, *(leaf.grad for leaf in leaves))]


def on_a_device() -> dict[str, list[float]]:
    """Largest differences of output and gradients to fp32 blocks on the CPU, by way."""
    torch.manual_seed(0)
    rows, size = 2, 700
    starts = documents.document_starts((torch.rand(rows, size) < 1 / 60).cumsum(1))
    found = {}
    for way, dtype, shares in [
        ("varlen", torch.bfloat16, 4), ("varlen, a key head each", torch.bfloat16, 1),
        ("blocks", torch.float32, 4),
    ]:  # fmt: skip
        heads = [4, 4 // shares, 4 // shares, 4]
        inputs = [torch.randn(rows, size, n, 64).to(dtype).transpose(1, 2) for n in heads]
        documents.expect_documents([int((starts == torch.arange(size)).sum())])

        on_cuda = partial(documents.attend, starts=starts.cuda(), scale=0.125, dropout=0.0)
        have = results(on_cuda, inputs, "cuda", dtype)
        blocks = partial(block_attention.causal_attention, scale=0.125, starts=starts)
        want = results(blocks, inputs, "cpu", torch.float32)
        found[way] = [float((a - b).norm() / b.norm()) for a, b in zip(have, want)]
    return found


@pytest.mark.gpu
def test_cuda_kernels_attend_inside_documents() -> None:
    """torch's varlen kernel and our blocks against blocks on the CPU, grouped heads and not."""
    for way, errors in run_on_device(on_a_device).items():
        assert max(errors) < (1e-2 if way.startswith("varlen") else 1e-3), (way, errors)
