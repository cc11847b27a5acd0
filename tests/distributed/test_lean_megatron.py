"""megatron-core's import leaves out what it would only mention."""

from __future__ import annotations

import sys

from tests.support.ranks import run_on_ranks


def what_was_left_out() -> None:
    import megatron.core.timers as timers
    import megatron.core.transformer.moe.router as router
    from megatron.core.inference.contexts import dynamic_context

    def function() -> None: ...

    assert router.jit_fuser(function) is function
    assert dynamic_context.HAVE_WANDB is False and timers.SummaryWriter is None
    for name in ("wandb", "torch.utils.tensorboard"):  # whoever asks for them later gets them
        assert sys.modules.get(name, sys) is not None


def test_no_tracker_and_no_compiler_is_imported_for_megatron() -> None:
    """They were 2 of 3.3 s of CPU, in every process of every run."""
    run_on_ranks(what_was_left_out, 1)
