"""DeepSpeed as we need it; imported before anything of it, which reads the environment at once."""

from __future__ import annotations

import logging
import os

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed.ops  # noqa: E402

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# A shared-memory all-reduce that is compiled at start-up (about a minute) and that our groups do
# not use.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
