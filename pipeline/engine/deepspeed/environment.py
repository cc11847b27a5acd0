"""DeepSpeed as we need it; imported before anything of it, which reads the environment at once."""

from __future__ import annotations

import logging
import os

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed.ops  # noqa: E402

from pipeline.patching import replace  # noqa: E402

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
replace(
    deepspeed.ops,
    "__compatible_ops__",
    {**deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm": False},
    why="a shared-memory all-reduce that our groups do not use is compiled at start-up: a minute",
    upstream="not reported",
    proof="tests/engine/test_engine.py::test_nothing_is_compiled_at_start_up",
)
