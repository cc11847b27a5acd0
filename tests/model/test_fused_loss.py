"""The compiled passes over the logits; their arithmetic, ranks included, is in test_loss.py."""

from __future__ import annotations

import pytest
import torch

from tests.support.loss_inputs import OPTIONS, chunked, plain


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("softcap, z, scale", OPTIONS)
def test_compiled_passes_equal_torch(softcap: float, z: float, scale: float) -> None:
    """As the arithmetic does that is compiled."""
    found = chunked(softcap, z, scale, 2**14, compiled=True)
    for got, want in zip(found, plain(softcap, z, scale), strict=True):
        torch.testing.assert_close(torch.as_tensor(got), want, rtol=2e-5, atol=2e-5)
