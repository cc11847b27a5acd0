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
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.pipe  # noqa: F401
    import hydra  # noqa: F401
    import pytest  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama
    import transformers.models.llava.modeling_llava  # noqa: F401

    import pipeline.checkpoint.restore
    import pipeline.huggingface.whole_model
    import pipeline.training.trainer  # noqa: F401
    import tests.support.layouts  # noqa: F401
    from tests.support.left_out import leave_out

    leave_out()

# What is loaded here stays: without this every full collection of a rank takes 0.3 s of CPU.
gc.collect()
gc.freeze()
