"""What CUDA's kernels keep, where a CPU build of torch takes the operators apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.rehearsal.fused_kernels import stand_in_for_fused_kernels


def test_the_stand_ins_keep_what_the_kernels_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's derivatives.yaml: rms_norm keeps input, weight and an fp32 number a row, silu its input."""
    for name in ("rms_norm", "silu"):
        monkeypatch.setattr(F, name, getattr(F, name))  # put back behind the test
    stand_in_for_fused_kernels()
    x = torch.ones(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    kept: list[tuple[tuple[int, ...], torch.dtype]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        normed = F.rms_norm(x, (8,), weight, 1e-5)
        assert kept == [((2, 3, 8), x.dtype), ((8,), x.dtype), ((2, 3, 1), torch.float32)]
        kept.clear()
        out = F.silu(normed)
        assert kept == [((2, 3, 8), x.dtype)]
    assert normed.shape == out.shape == x.shape and out.dtype == x.dtype
    out.backward(torch.ones_like(out))
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and weight.grad.shape == weight.shape
