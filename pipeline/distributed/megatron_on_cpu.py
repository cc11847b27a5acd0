"""Let megatron-core run without Transformer Engine, and where no CUDA device is.

megatron-core 0.16 takes two things from CUDA without asking: the current device for new tensors,
and the generator state behind its dropout streams. Each gets its CPU meaning here. On every device
its router names a function of Transformer Engine, which is not used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import pipeline.distributed.lean_megatron  # noqa: F401
from pipeline.patching import replace, supply

LAYOUTS = "tests/engine/test_equivalence.py::test_layouts_match_plain_torch"

_installed = False


def install() -> None:
    """Patch megatron-core once; call before any megatron-core layer is built."""
    global _installed
    if _installed:
        return
    _installed = True
    if not torch.cuda.is_available():
        _use_the_cpu()
    import megatron.core.transformer.moe.moe_utils as moe_utils

    supply(
        moe_utils,
        "te_general_gemm",
        None,
        why="named in the router, but not defined without Transformer Engine",
        upstream="not reported",
        proof="tests/model/test_moe.py",
    )


def _use_the_cpu() -> None:
    """Give what megatron-core takes from CUDA its CPU meaning."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    cpu = torch.device("cpu")
    # Only ever used as a `device=` argument by megatron-core.
    change = partial(replace, upstream="not reported", proof=f"{LAYOUTS}[2]")
    change(
        torch.cuda,
        "current_device",
        lambda: cpu,
        why="megatron-core makes its tensors there, and asks for nothing else",
    )

    import megatron.core.tensor_parallel.random as random

    change(
        random,
        "CudaRNGStatesTracker",
        _cpu_tracker(random),
        why="dropout streams are kept in CUDA generators",
    )
    _dispatch_tokens_on_the_cpu()


def _dispatch_tokens_on_the_cpu() -> None:
    """Let the dispatcher that CUDA uses, all-to-all, run where there are no CUDA streams."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    change = partial(
        replace,
        MoEAlltoAllTokenDispatcher,
        upstream="not reported",
        proof="tests/model/test_moe.py::test_expert_parallelism_matches_plain_torch",
    )
    change("cuda_dtoh_stream", object(), why="makes a CUDA stream, if there is none yet")
    change(
        "_maybe_dtoh_and_synchronize",
        _splits_as_numbers,
        why="copies the numbers of tokens to the host on a CUDA stream",
    )


def _splits_as_numbers(
    dispatcher: Any, point: str, tokens_per_expert: torch.Tensor | None = None
) -> torch.Tensor | None:
    """megatron-core's, for numbers that are on the host: torch's all-to-all takes no tensors."""
    for name in ("input_splits", "output_splits", "output_splits_tp"):
        if isinstance(splits := getattr(dispatcher, name), torch.Tensor):
            setattr(dispatcher, name, splits.numpy())
    return tokens_per_expert


def _cpu_tracker(random: Any) -> type:
    """megatron-core's tracker of named random streams, over the CPU generator."""

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            """Start stream `name` at `seed`."""
            self._is_initialized = True
            if name in self.states_ or seed in self.seeds_:
                raise ValueError(f"random stream {name} or seed {seed} exists already")
            self.seeds_.add(seed)
            generator = torch.Generator()
            generator.manual_seed(seed)
            self.states_[name] = generator.get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            """Draw from stream `name` inside the block."""
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    return CpuRNGStatesTracker
