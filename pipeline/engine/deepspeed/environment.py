"""DeepSpeed as we need it; imported before anything of it, which reads the environment at once."""

from __future__ import annotations

import logging
import os
from unittest import mock

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed.ops  # noqa: E402
from deepspeed.runtime import bf16_optimizer, compiler  # noqa: E402

from pipeline.patching import replace  # noqa: E402

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Its optimizers ask whether ours is DeepSpeed's Muon, which nothing here uses. That marks functions
# to be compiled, which loads torch's compiler: 2 s of every rank's start.
with mock.patch.object(compiler, "compile", lambda: lambda function: function):
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
replace(
    deepspeed.ops,
    "__compatible_ops__",
    {**deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm": False},
    why="a shared-memory all-reduce that our groups do not use is compiled at start-up: a minute",
    upstream="not reported",
    proof="tests/engine/test_engine.py::test_nothing_is_compiled_at_start_up",
)
replace(
    bf16_optimizer,
    "see_memory_usage",
    lambda *_, **__: None,
    why="collects all garbage, 0.3 s each of four times or more, to print lines that say nothing",
    upstream="not reported",
    proof="tests/engine/test_engine.py::test_no_garbage_is_collected_at_start_up",
)
