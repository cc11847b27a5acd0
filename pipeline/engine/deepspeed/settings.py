"""DeepSpeed's configuration, from ours.

Every key we rely on is written out: DeepSpeed's defaults have changed between releases, and some
are wrong for us.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.config.choices import Precision
from pipeline.config.run_shape import RunShape
from pipeline.engine.deepspeed.reduction import BUCKET_ELEMENTS
from pipeline.model.architecture import Architecture
from pipeline.planning.flops import num_parameters

# weights gathered at a time; larger buckets no longer raise the bandwidth
ALLGATHER_ELEMENTS = 200_000_000


def deepspeed_config(architecture: Architecture, shape: RunShape) -> dict[str, Any]:
    """DeepSpeed's configuration, every key we rely on written out."""
    parallel, precision = architecture.parallel, architecture.precision
    stage = shape.zero_stage
    size = num_parameters(architecture.model, shape.vocab_size) // shape.sizes.ranks_per_copy
    size += 2 - size % 2  # DeepSpeed wants bucket sizes even
    zero: dict[str, Any] = {
        "stage": stage,
        # Gradients are reduced while the backward pass goes on (at stage 1 by reduction.py;
        # fp16 by DeepSpeed). DeepSpeed does not under a pipeline, and offloaded gradients leave for
        # the host one by one.
        "overlap_comm": stage > int(parallel.offload_optimizer or shape.sizes.pipeline > 1),
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "allgather_partitions": True,
        # Elements. DeepSpeed allocates the bucket whole, so a small model must not ask for a large
        # one.
        "reduce_bucket_size": min(BUCKET_ELEMENTS, size),
        "allgather_bucket_size": min(ALLGATHER_ELEMENTS, size),
        "round_robin_gradients": False,
    }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": shape.micro_batch_size,
        "gradient_accumulation_steps": shape.at(0).num_micro_batches,
        "gradient_clipping": 0.0,  # the optimizer's kernel clips (engine/verdict.py)
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "prescale_gradients": False,
        "steps_per_print": 2**60,
        "wall_clock_breakdown": False,
        "timers": {
            "throughput": {"enabled": False, "synchronized": False}
        },  # waits for the device twice a micro-batch
        # Partitioned activations are silently wrong under sequence parallelism, which already
        # splits them.
        "pipeline": {
            "pipe_partitioned": False,
            "grad_partitioned": False,
            "activation_checkpoint_interval": 0,
        },
    }
    if precision is not Precision.fp32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        # What is summed in fp32 is reduced in fp32: DeepSpeed takes the model's precision, so that
        # the ranks' sums lost 16 bits on the way and the result depended on their number.
        config["communication_data_type"] = "fp32"
    if precision is Precision.bf16:
        config["bf16"] = {
            "enabled": True,
            "immediate_grad_update": True,
            "check_grad_overflow": False,
        }
    if precision is Precision.fp16:
        config["fp16"] = {"enabled": True, "loss_scale": 0}  # 0: dynamic, by engine/loss_scale.py
    return config
