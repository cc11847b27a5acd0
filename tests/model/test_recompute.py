"""A block that is computed again in the backward pass draws the dropout masks that it drew before."""

import torch

from tests.support.ranks import run_on_ranks


def _gradients() -> tuple[list[float], list[float], bool]:
    from pipeline.distributed.megatron_on_cpu import install

    install()
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from pipeline.model.recompute import recompute

    tracker = get_cuda_rng_tracker()

    def block(x: torch.Tensor) -> torch.Tensor:
        with tracker.fork():  # what each tensor-parallel rank draws for itself
            x = torch.nn.functional.dropout(x, 0.5)
        return torch.nn.functional.dropout(x * x, 0.5)

    found = []
    for run in (block, lambda x: recompute(block, x)):
        torch.manual_seed(3)
        tracker.reset()
        tracker.add("model-parallel-rng", 7)
        x = torch.arange(1.0, 65.0, requires_grad=True)
        y = run(x)
        with tracker.fork():
            torch.rand(5)  # what later blocks draw in the meantime
        state = tracker.get_states()["model-parallel-rng"].clone()
        y.sum().backward()
        untouched = torch.equal(state, tracker.get_states()["model-parallel-rng"])
        found.append((x.grad.tolist(), untouched))
    return found[0][0], found[1][0], found[1][1]


def test_gradients_are_those_of_a_block_that_is_kept():
    ((kept, again, is_untouched),) = run_on_ranks(_gradients, 1)
    assert kept == again
    assert is_untouched, "the replay must not move the streams of the steps to come"
