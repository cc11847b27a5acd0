"""What the fork server of tests/support/ranks.py imports once; kept free of process groups and threads."""

import gc
import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pipeline.distributed import megatron_on_cpu

    megatron_on_cpu.install()
    import deepspeed  # noqa: F401
    import deepspeed.pipe  # noqa: F401

    import pipeline.training.build  # noqa: F401  (0.3 s of CPU in every rank)
    from tests.support.left_out import leave_out

    leave_out()

# What is loaded here stays: without this every full collection of a rank takes 0.3 s of CPU.
gc.collect()
gc.freeze()
