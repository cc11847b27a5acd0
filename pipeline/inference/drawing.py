"""The next token, drawn from what a model says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COLDEST = 1e-30
"""Lower temperatures draw as this one does; fp32 has no smaller divisors to spare."""


def choose(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """0-dim id drawn from (V,) logits.

    Args:
        logits: of all ids.
        temperature: divides them; 0 takes the largest, and so does a logit that is no number.
        top_k: draw among the k likeliest; 0: all.
        top_p: draw among the likeliest that together have this probability.
        generator: of the draw; None: torch's own.

    Source of top_p: Holtzman et al. 2020, arXiv:1904.09751: the smallest set of tokens whose
    probability reaches it.
    """
    import torch

    largest = logits.max()
    if temperature == 0 or not largest.isfinite():
        return logits.argmax()
    # Differences are divided: 5 / 1e-38 would be infinite, and infinity less itself no number.
    scaled = (logits - largest) / max(temperature, COLDEST)
    probabilities, order = torch.softmax(scaled, dim=-1).sort(descending=True)
    if top_k:
        probabilities[top_k:] = 0.0
    probabilities /= probabilities.sum()
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0.0
    return order[torch.multinomial(probabilities, 1, generator=generator)[0]]


def check_numbers(logits: Tensor) -> None:
    """Refuse to draw from a model that says nothing: the likeliest of no numbers is any token.

    Raises:
        CheckpointError: a logit is infinite, or no number.
    """
    if not logits.isfinite().all():
        raise CheckpointError(
            "what the model says of the next token is no number: it has diverged. Sample an "
            "earlier checkpoint."
        )


def numbers_alone() -> Any:
    """`check_numbers` as transformers' generate takes it, in front of its settings of how to draw.

    Without it torch says of a probability that it is below 0, and nothing at temperature 0.
    """
    from transformers import LogitsProcessor

    class NumbersAlone(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            check_numbers(scores)
            return scores

    return NumbersAlone()
