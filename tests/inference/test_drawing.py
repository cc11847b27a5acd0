"""What is drawn is what the model says, without the tail that is left out."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.inference.drawing import choose


def test_top_k_and_top_p_leave_out_the_tail() -> None:
    """Worked by hand: probabilities 0.5, 0.3, 0.15, 0.05."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    torch.manual_seed(0)

    def drawn(**kwargs: Any) -> set[int]:
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **kwargs}
        return {int(choose(logits, **options)) for _ in range(200)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_p=0.5) == {1}  # the first token alone reaches one half
    assert drawn(top_p=0.51) == {1, 3}
    assert drawn(top_k=3, top_p=0.9) == {1, 3, 2}
    assert drawn(temperature=0.0) == {1}
    counts = torch.bincount(
        torch.stack([choose(logits, temperature=1.0, top_k=0, top_p=1.0) for _ in range(2000)]),
        minlength=4,
    )
    assert torch.allclose(counts / 2000, logits.exp(), atol=0.04)


def test_of_any_temperature_and_of_no_number_a_token_is_drawn() -> None:
    """Divided by 1e-38 they were infinite, and the draw of a run that trains ended it."""
    logits = torch.tensor([1.0, 2.0, 5.0, -3.0])
    for temperature in (1e-3, 1e-30, 1e-38, 5e-324):
        assert int(choose(logits, temperature=temperature)) == 2
    for wrong in (float("nan"), float("inf")):
        assert int(choose(torch.tensor([1.0, wrong, 2.0]), temperature=1.0)) == 1


def test_a_generator_of_its_own_leaves_torch_alone() -> None:
    """Samples of a run in training draw nothing from the streams of its dropout."""
    logits, state = torch.zeros(1000), torch.get_rng_state()
    drawn = [
        [int(choose(logits, temperature=1.0, generator=own)) for _ in range(5)]
        for own in (torch.Generator().manual_seed(seed) for seed in (3, 3, 4))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(state, torch.get_rng_state())
