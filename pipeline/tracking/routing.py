"""What routers did with the tokens of a mixture of experts, as numbers of a logged step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.config.model import MoeConfig


def routing_values(sums: Tensor, moe: MoeConfig) -> dict[str, Any]:
    """The metrics of these sums; reads them from the device.

    Args:
        sums: (layers, experts + 2) as Engine.routing has them.
        moe: of the model.

    Returns:
        `moe/load`: tokens of each expert over an even share, a list for each layer, in order;
        `moe/load_max` and `moe/load_min` of it: 1 is even, num_experts / top_k the most there is;
        `moe/router_entropy`: mean over tokens and layers, nats; ln(num_experts) is no preference;
        `moe/dropped_tokens`: choices that no expert computed; here always 0.
    """
    counts, entropy, tokens = sums[:, :-2].cpu(), sums[:, -2].cpu(), sums[:, -1].cpu()
    top_k = moe.top_k
    load = counts / (tokens * top_k / counts.shape[1]).clamp(min=1e-9)[:, None]
    return {
        "moe/load": [[round(value, 3) for value in layer] for layer in load.tolist()],
        "moe/load_max": float(load.max()),
        "moe/load_min": float(load.min()),
        "moe/router_entropy": float((entropy / tokens.clamp(min=1.0)).mean()),
        "moe/dropped_tokens": round(float((tokens * top_k - counts.sum(1)).sum())),
    }
