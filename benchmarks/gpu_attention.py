"""Causal attention by each of torch's kernels, forward and backward, at the shapes of the ladder, in bf16.

python benchmarks/gpu_attention.py        TFLOP/s of each; the model's order of kernels follows from it
"""

from __future__ import annotations

import sys
from pathlib import Path

# benchmarks/tokenize.py has the name of a module of the standard library: this folder must not be searched.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

import argparse  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402


def measure() -> dict[str, int]:
    """TFLOP/s of causal attention, forward and backward, by each of torch's kernels at the ladder's shapes in bf16."""
    on_cuda = torch.cuda.is_available()
    kernels = {"flash": SDPBackend.FLASH_ATTENTION}
    kernels |= {"cudnn": SDPBackend.CUDNN_ATTENTION} if on_cuda else {}
    # Batch, heads, tokens, width of a head.
    shapes = [(32, 12, 1024, 64), (16, 16, 2048, 64), (8, 16, 2048, 128), (1, 32, 8192, 128)]
    found: dict[str, int] = {}
    for shape in shapes if on_cuda else [(1, 2, 64, 32)]:
        batch, heads, tokens, width = shape
        # As the model has them: (B, S, heads, D) in memory.
        size = (batch, tokens, heads, width)
        device = "cuda" if on_cuda else "cpu"
        q, k, v = (
            torch.randn(size, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for _ in range(3)
        )
        for name, kernel in kernels.items():
            with sdpa_kernel([kernel]):
                for repeat in range(13):
                    if repeat == 3:
                        began = now(on_cuda)
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                    out.backward(out)
                seconds = (now(on_cuda) - began) / 10
            # 2 products forward, 5 backward, half of each masked: 3.5 times the forward pass's.
            work = 3.5 * 2 * 2 * batch * heads * tokens**2 * width / 2
            found[f"{'x'.join(map(str, shape))} {name}"] = round(work / seconds / 1e12)
    return found


def now(on_cuda: bool) -> float:
    """Seconds, when the device has done what it was given."""
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(json.dumps(measure()))


if __name__ == "__main__":
    main()
